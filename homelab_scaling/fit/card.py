"""The fit card: everything a reader must know to judge or to repeat a fit, as JSON; what is unknown says why.

Source: the checklist of Li et al. 2025, "(Mis)Fitting: A Survey of Scaling Laws" (hypothesis, training, data
collection, fitting), with resampling and versions added.
"""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

import homelab_scaling
from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.result import FitReport, ScalingFit
from homelab_scaling.fit.solve import GRADIENT_CERTIFIED
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.runs import Machine, RunRecord, run_folders
from homelab_scaling.specs import CorpusManifest, RunSpec

CARD_FILE = "fit_card.json"
FROM_TABLE = "the points came from a table, which does not say"
Part = Literal["form", "training", "points", "fitting", "uncertainty", "code and data"]
COUNTED = {
    "total": "every parameter once: blocks, norms, position and token embeddings, the output head where it is not tied",
    "body": "the blocks and the final norm only: no embedding, no output head",
    "body+head": "the blocks and the output head (V x d as used, also when tied): no position embedding",
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of the checklist."""

    part: Part
    question: str
    answer: str | None
    why_unknown: str | None = None
    """A reason where the answer is None."""


@dataclass(frozen=True, kw_only=True)
class FitCard:
    """fit_card.json."""

    source: str
    items: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of the runs behind the points; empty for a table."""

    specs: tuple[RunSpec, ...] = ()
    machines: tuple[Machine, ...] = ()
    corpus: CorpusManifest | None = None


def fit_card(report: FitReport, training: Training | None = None) -> FitCard:
    """The card of a fit, from the fit and the specs of its runs."""
    known = training or Training()
    ordered = sorted(
        known.specs, key=lambda spec: (spec.science.shape.d_model, spec.science.shape.n_layer, spec.run_id)
    )
    known = replace(known, specs=tuple(ordered))
    items = [*_form(report), *_training(report, known), *_points(report, known), *_fitting(report)]
    return FitCard(source=report.source, items=(*items, *_uncertainty(report), *_provenance(report, known)))


def read_training(lab: Path) -> Training:
    """Specs, machines and corpus of a lab's runs; what cannot be read is left out."""
    specs, machines, corpus = [], [], None
    for folder in run_folders(lab):
        try:
            spec, record = folder.read_spec(), folder.read_record()
        except HomelabError:
            continue
        specs.append(spec)
        machines += _machine(record)
        try:
            corpus = corpus or codec.read_json(folder.path / spec.shards / "manifest.json", CorpusManifest)
        except HomelabError:
            continue
    return Training(specs=tuple(specs), machines=tuple(dict.fromkeys(machines)), corpus=corpus)


def _machine(record: RunRecord | None) -> list[Machine]:
    return [record.machine] if record else []


def write_card(report: FitReport, folder: Path, training: Training | None = None) -> Path:
    """Writes fit_card.json into `folder` and returns its path."""
    path = folder / CARD_FILE
    codec.write_json(path, fit_card(report, training))
    return path


def _item(part: Part, question: str, answer: str | None, why: str = FROM_TABLE) -> Item:
    return Item(part=part, question=question, answer=answer or None, why_unknown=None if answer else why)


def _all(values: Iterable[object]) -> str:
    return listed([str(v) for v in dict.fromkeys(values)])


# ---------------------------------------------------------------------------------------------------------------- items


def _form(report: FitReport) -> list[Item]:
    fits = report.main
    laws = [get_law(fit.law) for fit in fits]
    shown = "; ".join(f"{law.formula} ({law.name})" for law in laws)
    free = "; ".join(f"{law.name}: {listed(list(law.free))}" for law in laws)
    pinned = [f"{law.name}: {name} = {value:.6g}" for law in laws for name, value in law.pinned]
    return [
        _item("form", "Which forms were fitted?", shown),
        _item("form", "Where do they come from?", "; ".join(dict.fromkeys(law.source for law in laws))),
        _item("form", "Which parameters were fitted?", free + (f"; given: {listed(pinned)}" if pinned else "")),
        _item(
            "form",
            "Which law is preferred, and why?",
            f"{report.evidence.chosen_law}: the lowest error on held-out larger runs"
            if report.evidence and report.evidence.chosen_law
            else None,
            "nothing was held out, so the laws stand side by side",
        ),
    ]


def _training(report: FitReport, known: Training) -> list[Item]:
    points = report.points
    sizes = sorted({p.n_params for p in points})
    tokens = sorted({p.n_tokens for p in points})
    unique = [p for p in points if p.n_tokens_unique]
    repeated = [p for p in unique if p.n_tokens > (p.n_tokens_unique or 0) * 1.001]
    text = None
    if known.corpus is not None:
        c = known.corpus
        text = f"{listed(list(c.sources))}; tokenizer {c.tokenizer}, {c.n_vocab:,} ids, data_id {c.data_id}"
    elif ids := [p.data_id for p in points if p.data_id]:
        text = f"data_id {_all(ids)}"
    gone = "the points of this fit were not kept beside it"
    return [
        _item("training", "How many models, of which sizes?", _span(report, sizes, "parameters"), gone),
        _item("training", "On how much data each?", _span(report, tokens, "tokens", runs=False), gone),
        _item("training", "What does N count?", COUNTED.get(report.count, report.count)),
        _item("training", "What does C count?", _compute(report)),
        _item(
            "training", "On which text?", text, "the rows do not name their text" if not known.specs else "no manifest"
        ),
        _item(
            "training",
            "Was data repeated within a run?",
            (f"yes: {len(repeated)} of {len(points)} rows" if repeated else "no")
            if len(unique) == len(points)
            else None,
            "not every row says how many distinct tokens it saw",
        ),
        *_recipe(report, known.specs),
    ]


def _span(report: FitReport, values: Sequence[float], unit: str, *, runs: bool = True) -> str | None:
    if not values:
        return None
    of_runs = f"{report.n_runs} runs of " if runs else ""
    many = f"{len(values)} {'sizes' if runs else 'token counts'}"
    return f"{of_runs}{many}, {short(values[0])} to {short(values[-1])} {unit} (ratio {brief(values[-1] / values[0])})"


def _compute(report: FitReport) -> str | None:
    noted = [note.removeprefix("C is ") for note in report.notes if note.startswith("C is ")]
    where = f"for laws of C: {noted[0]}; " if noted else ""
    return f"{where}for the best split of a budget: 6 N D of this count"


def _recipe(report: FitReport, specs: Sequence[RunSpec]) -> list[Item]:
    if not specs:
        named = sorted({p.schedule for p in report.points if p.schedule})
        families = sorted({p.family for p in report.points if p.family})
        return [
            _item("training", "Which architecture?", listed(families)),
            _item("training", "Which learning-rate schedule?", listed(named)),
            _item("training", "How were learning rate and batch chosen per size?", None),
        ]
    science = [spec.science for spec in specs]
    shapes = [f"{s.shape.n_layer} x {s.shape.d_model}" for s in sorted(science, key=lambda s: s.shape.d_model)]
    schedules = _all(
        f"{s.schedule.name}, warm-up {short(s.schedule.warmup_tokens)} tokens, decay over the last "
        f"{100 * s.schedule.decay_frac:g} % to {100 * s.schedule.lr_final_frac:g} % of the peak"
        for s in science
    )
    per_rung = dict.fromkeys(
        (spec.rung, spec.science.schedule.lr_peak, spec.science.batch_tokens_global) for spec in specs
    )
    rates = "; ".join(f"{rung}: lr {rate:.3g}, batch {batch:,} tokens" for rung, rate, batch in per_rung)
    optims = _all(
        f"{s.optim.name} (betas {s.optim.beta1:g}, {s.optim.beta2:g}; weight decay {s.optim.weight_decay:g}; clipping "
        f"{s.optim.grad_clip:g}), {s.precision}"
        for s in science
    )
    context = _all(s.shape.context_tokens for s in science)
    return [
        _item("training", "Which architecture?", f"GPT-2, layers x width {_all(shapes)}, context {context} tokens"),
        _item("training", "Which learning-rate schedule?", schedules),
        _item("training", "Which learning rate and batch per size?", rates),
        _item("training", "Which optimizer and precision?", optims),
    ]


def _points(report: FitReport, known: Training) -> list[Item]:
    decayed = [p.decayed for p in report.points]
    per_run = report.n_points / max(1, report.n_runs)
    which = f"{report.n_points} rows of {report.n_runs} runs ({per_run:.3g} a run)"
    if decayed and all(decayed):
        which += ", each after a finished decay of the learning rate"
    elif decayed and any(d is None for d in decayed):
        which += "; whether the learning rate had decayed is not said for every row"
    reasons = dict.fromkeys(e.reason for e in report.excluded)
    shown = "; ".join(f"{sum(e.reason == why for e in report.excluded)} x {why}" for why in list(reasons)[:6])
    more = f"; and {len(reasons) - 6} more reasons" if len(reasons) > 6 else ""
    loss = "cross-entropy on held-out text, nats per token"
    if known.specs:
        loss += f"; {_all(short(s.science.val_tokens) for s in known.specs)} tokens, the same for every rung"
    if known.corpus is not None:
        loss += f"; held out: {known.corpus.held_out_rule}"
    return [
        _item("points", "Which measurements are points?", which),
        _item("points", "Are checkpoints on the way used, smoothed or interpolated?", "no" if known.specs else None),
        _item("points", "Which were left out, and why?", (shown + more) or "none"),
        _item("points", "Which loss was measured?", loss),
    ]


def _fitting(report: FitReport) -> list[Item]:
    fitted = [fit for fit in report.main if fit.is_fitted]
    if not fitted:
        why = next((fit.status for fit in report.main), "no law was asked for")
        return [_item("fitting", "What was minimised, how?", None, why)]
    worst = max(fit.gradient_norm or 0.0 for fit in fitted)
    basins = "; ".join(f"{fit.law}: {fit.starts_in_basin} of {fit.n_starts}" for fit in fitted)
    return [
        _item("fitting", "What was minimised?", f"sum over points of {_all(fit.objective for fit in fitted)}"),
        _item(
            "fitting",
            "By which optimizer?",
            "batched Levenberg-Marquardt on centred logarithms of the parameters: reweighted Gauss-Newton steps, then "
            "the exact Hessian; analytic derivatives",
        ),
        _item(
            "fitting",
            "From which starts, and how many reached the optimum?",
            f"a grid of exponents from 0.02 to 2.5, the linear parameters by least squares at each; {basins}",
        ),
        _item(
            "fitting",
            "With which bounds and tolerance?",
            f"exponents 1e-5 to 10, E and each term e^-14 to e^3 of the mean loss; scaled gradient {worst:.0e} at "
            f"worst, certified below {GRADIENT_CERTIFIED:.0e}",
        ),
        _item("fitting", "Did every fit converge?", _convergence(fitted)),
        _item("fitting", "How well does it fit, and predict?", *_quality(report)),
    ]


def _convergence(fitted: Sequence[ScalingFit]) -> str:
    poor = [f"{fit.law}: {fit.status}" for fit in fitted if not fit.status.startswith("converged (")]
    return listed(poor) if poor else f"yes, all {len(fitted)}"


def _quality(report: FitReport) -> tuple[str | None, str]:
    joint = report.get("chinchilla")
    said = []
    if joint is not None and joint.sigma_log:
        said.append(f"{joint.law}: residual standard deviation {100 * joint.sigma_log:.2g} % of the loss")
    for one in report.evidence.holdouts if report.evidence else ():
        if one.rms_frac is not None:
            said.append(f"{one.law} on larger {'N' if one.along == 'n_params' else 'C'}: {100 * one.rms_frac:.2g} %")
    return "; ".join(said) or None, "no law of N and D was fitted"


def _uncertainty(report: FitReport) -> list[Item]:
    methods = list(dict.fromkeys(fit.interval for fit in report.main if fit.is_fitted and fit.draws_file))
    answer = f"{'; '.join(methods)}; {report.n_bootstrap:,} resamples, seed {report.seed}" if methods else None
    why = "no resamples were asked for (--bootstrap 0)" if not report.n_bootstrap else "no law could be fitted"
    if not report.n_bootstrap:
        answer = None
    crossed = [name for fit in report.main for name in fit.cross_checks]
    differ = [c.disagreement for fit in report.main for c in fit.cross_checks.values() if c.disagreement]
    return [
        _item("uncertainty", "How were intervals made?", answer, why),
        _item(
            "uncertainty",
            "Were they cross-checked?",
            f"by profile and delta method ({_all(crossed)}): {len(differ)} of {len(crossed)} disagree"
            if crossed
            else None,
            "this fit has no profile or delta intervals",
        ),
        _item(
            "uncertainty", "What do they not cover?", "other text, another recipe, and sizes outside the measured range"
        ),
    ]


def _provenance(report: FitReport, known: Training) -> list[Item]:
    runs = [
        f"{m.device}: torch {m.torch}, accelerate {m.accelerate}, transformers {m.transformers}, homelab_scaling "
        f"{m.homelab_scaling}{f' at {m.git_commit}' if m.git_commit else ''}"
        for m in known.machines
    ]
    here = f"homelab_scaling {homelab_scaling.__version__}, numpy {np.__version__}, Python {platform.python_version()}"
    return [
        _item("code and data", "Which code trained the models?", _all(runs)),
        _item("code and data", "Which code fitted and reported?", here),
        _item(
            "code and data",
            "Where are the points and draws?",
            "points.csv and draws_*.npz beside fit.json" if report.points else None,
            "they were not kept with this fit",
        ),
    ]
