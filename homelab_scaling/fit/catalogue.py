"""Published laws, usable wherever a fitted one is: predict, compare, simulate, prior.

Their losses are nats per token of their own tokenizer and text; on other text only their shape carries over.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.laws import Law, get_law
from homelab_scaling.fit.result import Draws, Estimate, FitReport, ScalingFit, load_fit


@dataclass(frozen=True, kw_only=True)
class PublishedLaw:
    """A law with its numbers."""

    name: str
    law: str
    values: dict[str, float]
    source: str
    count: str
    """Which parameters its N counts."""
    ranges: dict[str, tuple[float, float]]
    """Where it was measured."""
    se: dict[str, float]
    """Published standard errors, where there are any."""


_CHINCHILLA_RANGES = {"n_params": (4.4e7, 1.6e10), "n_tokens": (2.7e8, 3.0e11)}
_MUENNIGHOFF = {
    "E": float(np.exp(0.6254804)),
    "A": float(np.exp(6.255414)),
    "B": float(np.exp(7.3049974)),
    "alpha": 0.3526596,
    "beta": 0.3526596,
}
_BESIROGLU_SE = {"A": 124.5, "B": 1293.0, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}

CATALOGUE: dict[str, PublishedLaw] = {
    one.name: one
    for one in (
        PublishedLaw(
            name="kaplan-2020",
            law="kaplan",
            values={"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
            source="Kaplan et al. 2020 table 2: joint fit of eq. 1.5, WebText2, N without embeddings",
            count="body",
            ranges={"n_params": (7.7e2, 1.5e9), "n_tokens": (2.2e7, 2.3e10)},
            se={},
        ),
        PublishedLaw(
            name="kaplan-2020-n",
            law="power-n",
            values={"A": 8.8e13**0.076, "alpha": 0.076},
            source="Kaplan et al. 2020 eq. 1.1: L(N) at convergence, N_c 8.8e13, N without embeddings",
            count="body",
            ranges={"n_params": (7.7e2, 1.5e9)},
            se={},
        ),
        PublishedLaw(
            name="kaplan-2020-d",
            law="power-d",
            values={"B": 5.4e13**0.095, "beta": 0.095},
            source="Kaplan et al. 2020 eq. 1.2: L(D) with early stopping, D_c 5.4e13",
            count="body",
            ranges={"n_tokens": (2.2e7, 2.3e10)},
            se={},
        ),
        PublishedLaw(
            name="kaplan-2020-c",
            law="power-c",
            values={"K": (3.1e8 * 8.64e19) ** 0.050, "gamma": 0.050},
            source="Kaplan et al. 2020 eq. 1.3: L(C_min), C_c 3.1e8 PF-days, compute without embeddings",
            count="body",
            ranges={"flops": (1e-8 * 8.64e19, 10 * 8.64e19)},
            se={},
        ),
        PublishedLaw(
            name="hoffmann-2022",
            law="chinchilla",
            values={"E": 1.69337368, "A": 406.401018, "B": 410.722827, "alpha": 0.33917084, "beta": 0.2849083},
            source="Hoffmann et al. 2022 eq. 10, exact values from the TeX source (the text rounds to .34 and .28)",
            count="total",
            ranges=_CHINCHILLA_RANGES,
            se={},
        ),
        PublishedLaw(
            name="hoffmann-2022-rounded",
            law="chinchilla",
            values={"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
            source="Hoffmann et al. 2022 eq. 10 as the text rounds it; .28 for .2849 adds a tenth to the data term",
            count="total",
            ranges=_CHINCHILLA_RANGES,
            se={},
        ),
        PublishedLaw(
            name="besiroglu-2024",
            law="chinchilla",
            values={"E": 1.8172181, "A": 477.82587, "B": 2143.41736, "alpha": 0.3473105, "beta": 0.3671724},
            source="Besiroglu et al. 2024, the stated objective (sum of Huber 1e-3 on log loss) at its exact minimum",
            count="total",
            ranges=_CHINCHILLA_RANGES,
            se=_BESIROGLU_SE,
        ),
        PublishedLaw(
            name="besiroglu-2024-lad",
            law="chinchilla",
            values={"E": 1.8168641, "A": 482.0061, "B": 2085.4362, "alpha": 0.3478131, "beta": 0.3658542},
            source="Besiroglu et al. 2024, the headline numbers: least absolute deviations of log loss",
            count="total",
            ranges=_CHINCHILLA_RANGES,
            se=_BESIROGLU_SE,
        ),
        PublishedLaw(
            name="muennighoff-2023",
            law="chinchilla-tied",
            values=_MUENNIGHOFF,
            source="Muennighoff et al. 2023 (datablations), C4 refit of Chinchilla's points with alpha = beta",
            count="total",
            ranges=_CHINCHILLA_RANGES,
            se={},
        ),
        PublishedLaw(
            name="muennighoff-2023-repeated",
            law="repeated",
            values={**_MUENNIGHOFF, "R_D": 15.387756, "R_N": 5.309743},
            source="Muennighoff et al. 2023 eq. 5 and 6: 182 C4 runs, the muennighoff-2023 base; on their rows R_D 95, "
            "R_N 1.7 scores .13 % better (their search began at 20 or less)",
            count="total",
            ranges={"n_params": (7.1e6, 8.7e9), "n_tokens": (1e8, 9e11), "n_tokens_unique": (1e8, 1.78e11)},
            se={},
        ),
    )
}


def as_report(one: PublishedLaw) -> FitReport:
    """A published law in the shape of a fit: no draws, because no draws were published."""
    law = get_law(one.law)
    values = np.array([one.values[name] for name in law.names])
    file = f"{one.name}.npz"
    fit = ScalingFit(
        law=one.law,
        objective="published",
        n_points=0,
        excluded=(),
        parameters={name: Estimate(value=one.values[name], se=one.se.get(name)) for name in law.names},
        derived={name: Estimate(value=float(value)) for name, value in law.derived(values).items()},
        objective_value=0.0,
        gradient_norm=None,
        starts_in_basin=0,
        status=f"published: {one.source}",
        warnings=(),
        draws_file=file,
        rows="published",
        n_runs=0,
        n_starts=0,
        interval="none: published without draws",
        unpinned={},
        ranges=one.ranges,
        sigma_log=None,
    )
    report = FitReport(
        source=one.name,
        count=one.count,
        objective="published",
        n_bootstrap=0,
        seed=0,
        n_points=0,
        n_runs=0,
        excluded=(),
        fits=(fit,),
        notes=(one.source,),
        warnings=(),
    )
    report.draws[file] = Draws(names=law.names, point=values, values=np.zeros((0, len(law.names))))
    return report


def open_fit(source: str) -> FitReport:
    """A fit by what a person calls it: a catalogue name, fit.json, its folder, or a lab's folder.

    Raises:
        SpecError: none of these, or nothing has been fitted there.
    """
    if source in CATALOGUE:
        return as_report(CATALOGUE[source])
    path = Path(source)
    for candidate in (path, path / "fit.json", path / "fit" / "fit.json"):
        if candidate.is_file():
            return load_fit(candidate)
    if path.is_dir():
        raise SpecError(f"{source}: no fit.json in it; run `homelab fit {source}` first")
    known = ", ".join(CATALOGUE)
    raise SpecError(f"{source}: no fit, folder or published law of that name; give a lab, a fit.json or one of {known}")


def must_be_as_trained(report: FitReport) -> None:
    """Refuses a fit whose tokens are not those that runs are trained for.

    Raises:
        SpecError: it was made with --compute c_min.
    """
    if report.compute == "c_min":
        raise SpecError(
            f"{report.source}: this fit counts tokens and compute as at a very small batch (--compute c_min), and here "
            "they must be those that runs train for; fit again without --compute, into another --out if both are wanted"
        )


def joint_fit(report: FitReport, law: str | None = None) -> tuple[ScalingFit, Law, Draws]:
    """The fit of a law of N and D that a question about budgets needs, its law and its draws.

    Args:
        law: which one; when not given the one that hold-out chose, else chinchilla, tied, Kaplan's, whichever is there.

    Raises:
        SpecError: the report has none that was fitted.
    """
    chosen = report.evidence.chosen_law if report.evidence else None
    wanted = [law] if law else [*([chosen] if chosen else []), "chinchilla", "chinchilla-tied", "kaplan"]
    others = [] if law else [fit.law for fit in report.fits]
    for name in (*wanted, *others):
        fit = report.get(name)
        if fit is not None and fit.is_fitted and get_law(name).splits and fit.draws_file in report.draws:
            return fit, get_law(name), report.draws[fit.draws_file]
    joint = [f.status for f in report.fits if (get_law(f.law).splits if law is None else f.law == law)]
    found = joint[0] if joint else "it was not asked for"
    again = f"fit one with `homelab fit --law {law or 'chinchilla'}`"
    raise SpecError(f"{report.source}: no fitted {law or 'L(N, D)'} ({found}); {again}")
