"""Points in, fitted laws out: every law with its optimum certified, its intervals drawn and its weaknesses named."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.fit import checks, diagnose, repeated, underdetermined
from homelab_scaling.fit.crosscheck import cross_checks
from homelab_scaling.fit.evidence import gather
from homelab_scaling.fit.laws import CHINCHILLA, LAWS, MIN_EXPONENT, Law, Posed, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import ObjectiveName, parse_objective
from homelab_scaling.fit.points import Compute, Count, apply_compute, apply_count
from homelab_scaling.fit.repeated import REPEATED, RepeatedLaw
from homelab_scaling.fit.resample import FEW_RUNS, Resamples, budget_strata, clusters, resample
from homelab_scaling.fit.result import Draws, Estimate, Evidence, FitReport, ScalingFit, draws_name
from homelab_scaling.fit.slices import Slice, Table, slices_for, tabulate
from homelab_scaling.fit.solve import Optimum, solve
from homelab_scaling.runs import Excluded, LossPoint

N_BOOTSTRAP = 4000
N_STARTS = {1: 96, 2: 1024}
FEW_IN_BASIN = 0.01
SMALL_BATCH = (
    "in the laws of N and D and in the evidence, tokens and compute are those of a batch far below critical: "
    "D / (1 + B / B_crit) and C / (1 + B / B_crit); at a batch B take (1 + B / B_crit) times as many"
)
"""What `--compute c_min` means."""


def fit_points(
    points: Sequence[LossPoint],
    excluded: Sequence[Excluded] = (),
    *,
    laws: Sequence[str] = (),
    objective: str = "adaptive",
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
    count: Count = "total",
    compute: Compute = "c",
    source: str = "points",
    notes: Sequence[str] = (),
    with_evidence: bool | None = None,
) -> FitReport:
    """Every law in `laws` (all known ones when empty) fitted to the rows it is about.

    Args:
        points: checked points (points.read_points).
        excluded: what was left out already, and why.
        n_bootstrap: resamples per fit; 0 gives no intervals.
        seed: of the resamples.
        count: which parameters N counts.
        compute: what C and D are in the laws of N and D and in the evidence; L(N), L(D) and L(C) always keep what was
            trained, and L(C_min) is fitted beside L(C) wherever every row knows its C_min.
        with_evidence: whether to set other approaches, held-out rows and other counts beside a law of N and D; by
            default only when all laws are fitted. Then the law that hold-out chose is fitted too, pinned or not.

    Raises:
        SpecError: an unknown law or objective, or a negative number of resamples.
        DataError: fewer than two points, or a count that the rows do not support.
    """
    chosen = [get_law(name) for name in laws]
    name = parse_objective(objective)
    if not 0 <= n_bootstrap <= 100_000:
        raise SpecError(f"{n_bootstrap} bootstrap resamples asked for, wants 0 to 100,000")
    if len(points) < 2:
        raise DataError(f"{source}: {len(points)} points; a law needs at least three, so finish more rungs")
    as_trained = table = tabulate(apply_count(tuple(points), count))
    as_counted = apply_compute(tuple(points), compute)
    split = table if compute == "c" else tabulate(apply_count(as_counted, count))
    chosen = chosen or _laws_for(table)
    fits: list[ScalingFit] = []
    draws: dict[str, Draws] = {}

    def fit_slices(law: Law) -> None:
        table = split if law.axes == CHINCHILLA.axes else as_trained
        found = slices_for(law, table) if set(law.axes) <= set(table.columns) else []
        if not found:
            fits.append(_no_slice(law, name, table, excluded))
        for index, rows in enumerate(found):
            if index and diagnose.too_few(law, table, rows.rows):
                continue  # the main slice says why; its siblings need not repeat it
            # Each fit has its own stream: adding a law must not change the others' intervals.
            rng = np.random.default_rng([seed, *law.name.encode(), *rows.rows.tolist()[:64]])
            one, drawn = fit_law(law, table, rows, excluded=excluded, name=name, n_bootstrap=n_bootstrap, rng=rng)
            if drawn is not None:
                file = draws_name(len(fits), law.name)
                draws[file] = drawn
                one = replace(one, draws_file=file)
            fits.append(one)

    for law in chosen:
        fit_slices(law)
    evidence: Evidence | None = None
    if (with_evidence is None and not laws) or (with_evidence and any(law.splits for law in chosen)):
        evidence = gather(as_counted, split, name=name, asked=chosen, n_draws=n_bootstrap, seed=seed)
    if evidence and evidence.chosen_law and not laws and evidence.chosen_law not in {law.name for law in chosen}:
        fit_slices(get_law(evidence.chosen_law))
    said = [*notes]
    if any("flops" in law.axes for law in chosen):
        said.append(f"C is {table.flops_from}")
    if compute == "c_min":
        said.append(SMALL_BATCH)
    report = FitReport(
        source=source,
        count=count,
        compute=compute,
        objective=objective,
        n_bootstrap=n_bootstrap,
        seed=seed,
        n_points=len(points),
        n_runs=len(set(table.run_ids)),
        excluded=tuple(excluded),
        fits=tuple(fits),
        notes=tuple(said),
        warnings=(*diagnose.table_warnings(table), *checks.table_checks(points)),
        evidence=evidence,
    )
    report.draws.update(draws)
    report.points.extend(points)
    return report


def _laws_for(table: Table) -> list[Law]:
    """All laws whose columns are there; that of repeated data where some row repeats its tokens."""
    found = [law for law in LAWS.values() if set(law.axes) <= set(table.columns)]
    if "n_tokens_unique" in table.columns and repeated.repeats_of(table.columns).any():
        found.append(REPEATED)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """One law on one set of rows, ready for the engine."""

    law: Law
    losses: Array
    columns: dict[str, Array]
    runs: NDArray[np.int64]
    posed: Posed


def _pose(law: Law, table: Table, rows: Slice) -> _Problem:
    columns = {axis: table.columns[axis][rows.rows] for axis in law.axes}
    losses = table.losses[rows.rows]
    return _Problem(
        law=law,
        losses=losses,
        columns=columns,
        runs=clusters([table.run_ids[i] for i in rows.rows]),
        posed=law.pose(columns, losses),
    )


def fit_law(
    law: Law,
    table: Table,
    rows: Slice,
    *,
    excluded: Sequence[Excluded],
    name: ObjectiveName,
    n_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[ScalingFit, Draws | None]:
    """One law on one set of rows, and its draws; no draws where the rows cannot carry the law."""
    if isinstance(law, RepeatedLaw):
        return _fit_repeated(law, table, rows, excluded=excluded, name=name, n_bootstrap=n_bootstrap, rng=rng)
    outside = np.setdiff1d(np.arange(len(table.losses)), rows.rows)
    left_out = (*excluded, *(Excluded(row_id=table.names[i], reason=rows.outside) for i in outside))
    fault = diagnose.too_few(law, table, rows.rows)
    if fault is not None:
        poor = _not_fitted(law, name, rows, left_out=left_out, table=table, fault=fault)
        return _with_ranges(poor, law, table, rows) if n_bootstrap else (poor, None)
    problem = _pose(law, table, rows)
    n_runs = int(problem.runs.max()) + 1
    resolved = name
    if name.kind == "adaptive" and n_runs < FEW_RUNS:
        resolved = parse_objective("l2-log")  # outliers cannot be told from noise with so few runs
    y = np.log(problem.losses)
    posed = problem.posed
    optimum = solve(posed.model, y, posed.starts(N_STARTS[len(law.axes)]), resolved, bounds=posed.bounds)
    again: Resamples | None = None
    if n_bootstrap:
        again = resample(
            posed.model,
            y,
            runs=problem.runs,
            strata=budget_strata(table.columns["flops"][rows.rows], problem.runs),
            optimum=optimum,
            name=resolved,
            bounds=posed.bounds,
            n_draws=n_bootstrap,
            rng=rng,
        )
    point = posed.natural(optimum.theta)
    values = posed.natural(again.theta) if again else np.zeros((0, len(law.names)))
    drawn = Draws(names=law.names, point=point, values=values)
    reported = _report_fit(
        problem, rows, left_out=left_out, name=name, optimum=optimum, again=again, drawn=drawn, n_runs=n_runs
    )
    said = (
        checks.curvature(law, table, rows.rows),
        checks.influence(law, posed, table, rows.rows, optimum=optimum, name=resolved, derived=reported.derived),
    )
    return replace(reported, warnings=reported.warnings + tuple(s for s in said if s)), drawn


def _fit_repeated(
    law: RepeatedLaw,
    table: Table,
    rows: Slice,
    *,
    excluded: Sequence[Excluded],
    name: ObjectiveName,
    n_bootstrap: int,
    rng: np.random.Generator,
) -> tuple[ScalingFit, Draws | None]:
    """`fit_law` for the law of repeated data, whose base law is given or fitted before it."""
    fault = repeated.why_not(law, table, rows.rows)
    if fault is not None:
        return _not_fitted(law, name, rows, left_out=tuple(excluded), table=table, fault=fault), None
    n_runs = len({table.run_ids[i] for i in rows.rows})
    resolved = parse_objective("l2-log") if name.kind == "adaptive" and n_runs < FEW_RUNS else name
    done = repeated.fit_repeated(law, table, rows.rows, name=resolved, n_draws=n_bootstrap, rng=rng)
    optimum, losses = done.optimum, table.losses[rows.rows]
    drawn = Draws(names=law.names, point=done.posed.natural(optimum.theta), values=done.draws)
    estimates = {p: estimate(float(drawn.point[i]), drawn.values[:, i]) for i, p in enumerate(law.names)}
    if law.base is not None:
        estimates |= {p: Estimate(value=value) for p, value in law.pinned}
    unpinned = repeated.unpinned(done, estimates)
    residuals = np.log(losses) - done.posed.model.value(optimum.theta[None])[0][0]
    n_fitted = len(law.free) + (0 if law.base is not None else len(repeated.BASE))
    crossed = repeated.cross_checks(done, table, rows.rows, estimates)
    at_point, at_draws = law.derived(drawn.point), law.derived(drawn.values)
    return (
        ScalingFit(
            law=law.name,
            objective=_resolved_name(name, optimum),
            n_points=len(losses),
            excluded=tuple(excluded),
            parameters={p: _hide(e) if p in unpinned else e for p, e in estimates.items()},
            derived={q: estimate(float(v), at_draws[q]) for q, v in at_point.items()},
            objective_value=optimum.value,
            gradient_norm=optimum.gradient,
            starts_in_basin=optimum.starts_in_basin,
            status=_status(optimum),
            warnings=(
                *repeated.cautions(done, unpinned, np.log(losses)),
                *(c.disagreement for c in crossed.values() if c.disagreement),
            ),
            draws_file=None,
            rows=repeated.rows_in_words(done, rows.words),
            n_runs=n_runs,
            n_starts=optimum.n_starts,
            interval=done.method,
            unpinned=unpinned,
            ranges={a: (float(v.min()), float(v.max())) for a in law.axes for v in (table.columns[a][rows.rows],)},
            cross_checks=crossed,
            sigma_log=float(np.sqrt((residuals**2).sum() / max(1, len(losses) - n_fitted))),
        ),
        drawn,
    )


def _report_fit(
    problem: _Problem,
    rows: Slice,
    *,
    left_out: tuple[Excluded, ...],
    name: ObjectiveName,
    optimum: Optimum,
    again: Resamples | None,
    drawn: Draws,
    n_runs: int,
) -> ScalingFit:
    law, losses, posed = problem.law, problem.losses, problem.posed
    estimates = {p: estimate(float(drawn.point[i]), drawn.values[:, i]) for i, p in enumerate(law.names)}
    for pinned, value in law.pinned:
        estimates[pinned] = Estimate(value=value)
    if law.offset:
        estimates["E"] = _floored(estimates["E"], 1e-4 * float(losses.min()))
    for exponent in law.exponents:
        estimates[exponent] = _floored(estimates[exponent], 2 * MIN_EXPONENT)
    unpinned = diagnose.unpinned_parameters(law, posed.full(optimum.theta), estimates, losses)
    derived, loose = _derived(law, drawn, unpinned, float(losses.min()))
    f, _shares = posed.model.value(optimum.theta[None])
    residuals = np.log(losses) - f[0]
    spread = float(((np.log(losses) - np.log(losses).mean()) ** 2).sum())
    r2 = 1 - float((residuals**2).sum()) / spread if spread > 0 else None
    derived["r2_log"] = Estimate(value=r2)
    everything = Table(
        points=(), columns=problem.columns, losses=losses, run_ids=[], flops_from=""
    )  # the rows of this fit alone
    warnings = diagnose.design_warnings(law, everything, np.arange(len(losses)), n_runs)
    warnings += diagnose.fit_warnings(law, estimates, unpinned | loose)
    if again and again.n_failed:
        warnings.append(f"{again.n_failed} resamples did not converge and are left out of the intervals")
    hidden = unpinned | loose
    checks = (
        cross_checks(
            law,
            posed,
            optimum,
            np.log(losses),
            runs=problem.runs,
            estimates=estimates | derived,
            skip=_at_bound(hidden),
        )
        if again
        else {}
    )
    warnings += [check.disagreement for check in checks.values() if check.disagreement]
    return ScalingFit(
        law=law.name,
        objective=_resolved_name(name, optimum),
        n_points=len(losses),
        excluded=left_out,
        parameters={p: _hide(e) if p in unpinned else e for p, e in estimates.items()},
        derived=derived,
        objective_value=optimum.value,
        gradient_norm=optimum.gradient,
        starts_in_basin=optimum.starts_in_basin,
        status=_status(optimum),
        warnings=tuple(warnings),
        draws_file=None,
        rows=rows.words,
        n_runs=n_runs,
        n_starts=optimum.n_starts,
        interval=again.method if again else "no intervals: run with --bootstrap 4000",
        unpinned=hidden,
        ranges={axis: (float(v.min()), float(v.max())) for axis, v in problem.columns.items()},
        cross_checks=checks,
        sigma_log=float(np.sqrt((residuals**2).sum() / max(1, len(losses) - len(law.free)))),
    )


def _derived(
    law: Law, drawn: Draws, unpinned: dict[str, str], lowest: float
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """What follows from the parameters, and which of it is not pinned down."""
    at_point = law.derived(drawn.point)
    at_draws = law.derived(drawn.values)
    found, loose = {}, {}
    for name, value in at_point.items():
        one = _floored(estimate(float(value), at_draws[name]), 2 * MIN_EXPONENT)
        reason = next((unpinned[e] for e in law.exponents if e in unpinned and "bound" in unpinned[e]), None)
        if reason is None and one.ci95 is not None:
            reason = diagnose.wide("share" if name in ("a", "b") else "exponent", one.ci95, lowest)
        if reason is not None:
            loose[name], one = reason, _hide(one)
        found[name] = one
    return found, loose


def estimate(value: float, draws: Array) -> Estimate:
    """A value with the standard deviation and the 2.5 % and 97.5 % points of its draws."""
    if len(draws) < 2:
        return Estimate(value=value)
    with np.errstate(over="ignore", invalid="ignore"):
        se = float(np.std(draws))
    if (draws == value).all():
        return Estimate(value=value)  # by construction: no resample could have moved it
    low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    return Estimate(value=value, se=se if np.isfinite(se) else None, ci95=(low, high))


def _floored(e: Estimate, floor: float) -> Estimate:
    """A parameter kept above 0 by its logarithm or its bound: an end of its interval under `floor` is reported as 0."""
    if e.ci95 is None:
        return e
    low, high = (0.0 if end < floor else end for end in e.ci95)
    return Estimate(value=e.value, se=e.se, ci95=(low, high))


def _at_bound(unpinned: dict[str, str]) -> list[str]:
    return [name for name, why in unpinned.items() if "bound" in why or "vanished" in why]


def _hide(one: Estimate) -> Estimate:
    """Keeps the interval, which says how little is known, and drops the digits."""
    return Estimate(value=None, se=None, ci95=one.ci95)


def _resolved_name(name: ObjectiveName, optimum: Optimum) -> str:
    if name.kind != "adaptive":
        return name.name
    delta = optimum.objective.delta
    return f"adaptive (huber:{delta:.3g})" if np.isfinite(delta) else "adaptive (l2-log: fewer than 12 runs)"


def _status(optimum: Optimum) -> str:
    found = f"{optimum.starts_in_basin} of {optimum.n_starts} starts reached it, scaled gradient {optimum.gradient:.0e}"
    if not optimum.converged:
        return f"stopped short of the optimum ({found}): use another objective, or fewer parameters"
    if optimum.starts_in_basin < FEW_IN_BASIN * optimum.n_starts:
        return f"converged, but the basin is small ({found}): compare with --objective l2-log before relying on it"
    return f"converged ({found})"


def _no_slice(law: Law, name: ObjectiveName, table: Table, excluded: Sequence[Excluded]) -> ScalingFit:
    missing = [axis for axis in law.axes if axis not in table.columns]
    if missing:
        fault = f"not every row has {missing[0]}, which {law.title} needs; add that column"
        nothing = Slice(rows=np.arange(0), words="none", outside=f"{missing[0]} is not known for every row")
        return _not_fitted(law, name, nothing, left_out=tuple(excluded), table=table, fault=fault)
    what = "token count is shared by three sizes" if law.axes == ("n_params",) else "size has three token counts"
    fault = f"no {what}, which {law.title} needs; L(N, D) uses all rows, or add horizons equal for all rungs"
    nothing = Slice(rows=np.arange(0), words="none", outside=f"no {what}")
    return _not_fitted(law, name, nothing, left_out=tuple(excluded), table=table, fault=fault)


def _with_ranges(poor: ScalingFit, law: Law, table: Table, rows: Slice) -> tuple[ScalingFit, Draws | None]:
    """The same refusal with intervals: what the points leave open, where they are too few to choose within it."""
    if not law.splits or len(rows.rows) < underdetermined.FEWEST:
        return poor, None
    problem = _pose(law, table, rows)
    places = underdetermined.places_of(problem.columns)
    drawn = underdetermined.compatible_laws(law, problem.posed, problem.losses, places)
    if drawn is None:
        return poor, None
    parameters, derived = underdetermined.ranges(law, drawn)
    found = replace(
        poor,
        parameters=parameters,
        derived=derived,
        interval=underdetermined.words(len(problem.losses), drawn, len(places)),
        unpinned=dict.fromkeys((*parameters, *derived), next(iter(poor.unpinned.values()))),
        ranges={axis: (float(v.min()), float(v.max())) for axis, v in problem.columns.items()},
    )
    return found, drawn


def _not_fitted(
    law: Law, name: ObjectiveName, rows: Slice, *, left_out: tuple[Excluded, ...], table: Table, fault: str
) -> ScalingFit:
    """A fit that says why there are no digits."""
    return ScalingFit(
        law=law.name,
        objective=name.name,
        n_points=len(rows.rows),
        excluded=left_out,
        parameters={p: Estimate(value=None) for p in law.names},
        derived={},
        objective_value=None,
        gradient_norm=None,
        starts_in_basin=0,
        status=f"not fitted: {fault}",
        warnings=(f"{law.title} is not fitted: {fault}",),
        draws_file=None,
        rows=rows.words,
        n_runs=len({table.run_ids[i] for i in rows.rows}),
        n_starts=0,
        interval="none",
        unpinned=dict.fromkeys(law.names, fault),
        ranges={},
        sigma_log=None,
    )
