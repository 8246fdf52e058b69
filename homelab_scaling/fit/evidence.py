"""What stands beside the fits: four roads to N_opt(C) on the same resamples, laws on held-out rows, three counts of N.

Legend:  R resample, n row, P parameter; member 0 of a batch is the rows as measured
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from homelab_scaling.fit import diagnose, envelope, isoflop, select
from homelab_scaling.fit.counts import count_rows
from homelab_scaling.fit.growth import Growth
from homelab_scaling.fit.joint import MIN_DRAWS, Joint, draw_joint, from_draws, solve_joint
from homelab_scaling.fit.laws import LAWS, Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import ObjectiveName, parse_objective
from homelab_scaling.fit.resample import FEW_RUNS, Resampling, clusters
from homelab_scaling.fit.result import Approach, Disagreement, Estimate, Evidence
from homelab_scaling.fit.slices import Table
from homelab_scaling.fit.words import brief, listed
from homelab_scaling.runs import LossPoint

ApproachName = Literal["1", "2", "3-free", "3-tied"]

N_DRAWS = 1000
"""Resamples for the comparison: enough for a p-value to .01, and an envelope of each is dear."""
BEYOND = 10.0
"""N_opt is compared this factor beyond the largest run: where a law is meant to be used."""
MAX_FAILED = 0.5
CLOSE = 1.1
DISAGREE = 0.05
SAME_C = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class _Road:
    """An approach before it is put into words: its growth over the batch, or why there is none."""

    name: ApproachName
    growth: Growth | None
    notes: tuple[str, ...] = ()
    why_not: str | None = None
    without_interval: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """The rows with their resamples, the same for every road."""

    table: Table
    log_losses: Array
    """(R + 1, n)."""
    weights: Array
    """(R + 1, n)."""
    flops: float
    surface: Joint
    """The fitted law whose noise-free losses show what an approach gets wrong by itself."""


def gather(
    points: Sequence[LossPoint],
    table: Table,
    *,
    name: ObjectiveName,
    asked: Sequence[Law] = (),
    n_draws: int = N_DRAWS,
    seed: int = 0,
) -> Evidence | None:
    """The evidence beside a report's fits; None where the rows carry no law of N and D.

    Args:
        points: the rows as given, for the three counts.
        table: the rows under the report's own count.
        name: of the objective, as asked for.
        asked: laws the user named; pinned ones join the hold-out.
        n_draws: resamples of the comparison, at most 1,000 are used.
    """
    n_draws = min(n_draws, N_DRAWS)
    runs = clusters(table.run_ids)
    n_runs = int(runs.max()) + 1
    if name.kind == "adaptive" and n_runs < FEW_RUNS:
        name = parse_objective("l2-log")
    free, tied = (solve_joint(LAWS[law], table, name) for law in ("chinchilla", "chinchilla-tied"))
    surface = free or tied
    if surface is None:
        return None
    drawn = draw_joint(surface, table, n_draws, seed)
    n = table.columns["n_params"]
    bench = _Bench(
        table=table,
        log_losses=_with_measured(drawn.y if drawn else np.zeros((0, len(n))), np.log(table.losses), n_draws),
        weights=_with_measured(drawn.weights if drawn else np.zeros((0, len(n))), np.ones(len(n)), n_draws),
        flops=BEYOND * float((6 * n * table.columns["n_tokens"]).max()),
        surface=surface,
    )
    roads = [_envelope_road(bench), _isoflop_road(bench)]
    for road, joint in (("3-free", free), ("3-tied", tied)):
        roads.append(_joint_road(road, joint, bench, drawn, name))  # type: ignore[arg-type]
    approaches = tuple(_approach(road) for road in roads)
    disagreements = tuple(_disagreements(roads))
    laws, notes = select.candidates(table.losses, asked)
    held = select.hold_outs(laws, table.columns, table.losses, name=name)
    chosen, errors = select.choose(held)
    return Evidence(
        budget_flops=bench.flops,
        approaches=approaches,
        disagreements=disagreements,
        holdouts=tuple(held),
        chosen_law=chosen,
        counts=tuple(count_rows(points, name=name, n_draws=n_draws, seed=seed)),
        notes=(*_about(bench, drawn), *_apart(disagreements), *notes, *_close(chosen, errors)),
    )


def _with_measured(values: Array, measured: Array, n_draws: int) -> Array:
    """(R + 1, n): what was measured, then the resamples."""
    return np.concatenate([measured[None], np.broadcast_to(values, (n_draws, len(measured)))])


# ------------------------------------------------------------------------------------------------------------ the roads


def _envelope_road(bench: _Bench) -> _Road:
    fault = envelope.mid_schedule(bench.table.points)
    curves = envelope.loss_curves(bench.table.columns)
    fault = fault or envelope.too_few_curves(curves)
    if fault:
        return _Road(name="1", growth=None, why_not=fault)
    found = envelope.fit_envelope(curves, bench.log_losses, bench.weights, flops=bench.flops)
    if not np.isfinite(found.a[0]):
        why = (
            f"fewer than {envelope.MIN_SIZES} sizes win between a smaller and a larger one at the same compute: "
            "the horizons overlap too little; add horizons to every size"
        )
        return _Road(name="1", growth=None, why_not=why)
    notes = [f"envelope of {len(curves)} loss curves"]
    if any(p.schedule is None for p in bench.table.points):
        notes.append("takes each row for the end of a finished schedule, since not every row names its schedule")
    values = bench.surface.values
    exact = np.log(bench.surface.law.loss(values, dict(bench.table.columns)))[None]
    again = envelope.fit_envelope(curves, exact, np.ones_like(exact), flops=bench.flops)
    a, log_n, log_d = isoflop.best_split(bench.surface.law, values, bench.flops)
    if np.isfinite(again.a[0]):
        one = isoflop.Bias(
            a=float(again.a[0] - a),
            n_opt_frac=float(np.exp(again.log_n[0] - log_n) - 1),
            d_opt_frac=float(np.exp(again.log_d[0] - log_d) - 1),
        )
        notes.append(_own_bias(one, bench))
    return _Road(name="1", growth=found, notes=tuple(notes))


def _isoflop_road(bench: _Bench) -> _Road:
    columns = bench.table.columns
    budgets = isoflop.find_budgets(columns["flops"], columns["n_params"])
    losses = np.exp(bench.log_losses)
    vertices = isoflop.vertices(budgets, columns, losses, bench.weights)
    notes = [
        f"dropped C = {short_flops(v.budget.flops)} ({v.budget.n_sizes} sizes): {v.fault}"
        for v in vertices
        if v.fault and v.budget.counts
    ]
    good = [v for v in vertices if v.budget.counts and v.fault is None]
    three = [v for v in vertices if not v.budget.counts and v.fault is None]
    without = len(good) < isoflop.MIN_BUDGETS
    if without and len(good) + len(three) < isoflop.MIN_BUDGETS:
        have = f"{len(good)} budgets" if len(good) != 1 else "1 budget"
        why = (
            f"{have} with {isoflop.MIN_SIZES} sizes and a bracketed minimum, wants {isoflop.MIN_BUDGETS}: train "
            f"{isoflop.MIN_SIZES} or more sizes to the same compute (within 5 %), on both sides of the best one"
        )
        return _Road(name="2", growth=None, why_not=why, notes=tuple(notes))
    if without:
        good = sorted(good + three, key=lambda v: v.budget.flops)
        notes.append("budgets of three sizes only, where a parabola always fits: no interval")
    elif three:
        notes.append(f"{len(three)} budgets of three sizes are left out: a parabola goes through any three points")
    found = isoflop.growth(good, flops=bench.flops)
    used = [v.budget for v in good]
    notes.insert(0, f"{len(used)} budgets of {sum(len(b.rows) for b in used)} rows")
    notes += _too_wide(good, columns["n_params"])
    own = isoflop.bias(bench.surface.law, bench.surface.values, used, columns, flops=bench.flops)
    if own is not None:
        notes.append(_own_bias(own, bench))
    akima = isoflop.akima_growth(used, columns, bench.table.losses, flops=bench.flops)
    if akima is not None:
        notes.append(f"with Akima's interpolation in place of parabolas a = {brief(float(akima.a[0]))}")
    return _Road(name="2", growth=found, notes=tuple(notes), without_interval=without)


def _too_wide(vertices: Sequence[isoflop.Vertex], n_params: Array) -> list[str]:
    reach = [float(np.exp(np.abs(np.log(n_params[v.budget.rows]) - v.log_n[0]).max())) for v in vertices]
    wide = [r for r in reach if r > isoflop.WIDE]
    if not wide:
        return []
    return [
        f"{len(wide)} of {len(reach)} budgets reach sizes up to a factor of {brief(max(wide))} from their best one, "
        f"where losses are no parabola: keep within {isoflop.WIDE:.0f}"
    ]


def _own_bias(one: isoflop.Bias, bench: _Bench) -> str:
    return (
        f"its own bias, from noise-free losses of the fitted {bench.surface.law.title} at these rows: a "
        f"{one.a:+.4f}, N_opt {100 * one.n_opt_frac:+.1f} %, D_opt {100 * one.d_opt_frac:+.1f} % at "
        f"C = {short_flops(bench.flops)}"
    )


def _joint_road(
    road: ApproachName, joint: Joint | None, bench: _Bench, drawn: Resampling | None, name: ObjectiveName
) -> _Road:
    law = LAWS["chinchilla" if road == "3-free" else "chinchilla-tied"]
    if joint is None:
        why = diagnose.too_few(law, bench.table, np.arange(len(bench.table.losses)))
        return _Road(name=road, growth=None, why_not=why)
    values = joint.with_draws(drawn, name)
    a, log_n, log_d = isoflop.best_split(joint.law, values, bench.flops)
    notes = ("a is .5 by assumption: alpha = beta",) if road == "3-tied" else ()
    found = Growth(a=a, b=1 - a, log_n=log_n, log_d=log_d, flops=bench.flops)
    return _Road(name=road, growth=found, notes=notes)


# ------------------------------------------------------------------------------------------------------------- in words


def short_flops(flops: float) -> str:
    """Compute as people write it: 5.76e+23 FLOPs."""
    return f"{flops:.3g} FLOPs"


def _approach(road: _Road) -> Approach:
    nothing = Estimate(value=None)
    if road.growth is None:
        return Approach(name=road.name, a=nothing, b=nothing, n_opt=nothing, why_not=road.why_not, notes=road.notes)
    growth, notes = road.growth, list(road.notes)
    n_draws = len(growth.a) - 1
    there = np.isfinite(growth.a[1:]) & np.isfinite(growth.log_n[1:])
    kept = there & (not road.without_interval)
    n_failed = int((~there).sum())
    if n_draws and n_failed > MAX_FAILED * n_draws:
        kept = np.zeros_like(kept)
        notes.append(f"no interval: {n_failed} of {n_draws} resamples do not carry it; add runs")
    elif n_failed and not road.without_interval:
        notes.append(f"{n_failed} of {n_draws} resamples do not carry it: the interval is from the others, too narrow")
    a, b = (from_draws(float(v[0]), v[1:][kept]) for v in (growth.a, growth.b))
    logs = from_draws(float(growth.log_n[0]), growth.log_n[1:][kept])
    with np.errstate(over="ignore"):
        ends = None if logs.ci95 is None else tuple(float(np.exp(np.clip(e, -700, 700))) for e in logs.ci95)
        n_opt = Estimate(value=float(np.exp(np.clip(growth.log_n[0], -700, 700))), ci95=ends)  # type: ignore[arg-type]
    if road.name == "3-tied":
        a = b = Estimate(value=0.5)  # by construction, so it has no interval
    if a.ci95 is not None and (loose := diagnose.wide("share", a.ci95, 1.0)):
        notes.append(f"a is not pinned down: {loose}")
        a, b, n_opt = (replace(e, value=None, se=None) for e in (a, b, n_opt))
    return Approach(name=road.name, a=a, b=b, n_opt=n_opt, notes=tuple(notes))


def _disagreements(roads: Sequence[_Road]) -> list[Disagreement]:
    """Every pair of approaches that gave numbers, from their paired draws."""
    found = []
    for one, two in combinations([r for r in roads if r.growth is not None], 2):
        assert one.growth is not None and two.growth is not None
        difference = one.growth.a - two.growth.a
        draws = difference[1:][np.isfinite(difference[1:])]
        if one.without_interval or two.without_interval or len(draws) < MAX_FAILED * (len(difference) - 1):
            draws = draws[:0]
        p_value = None
        if len(draws) >= MIN_DRAWS:
            tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
            p_value = min(1.0, 2 * (1 + tail) / (1 + len(draws)))
        found.append(
            Disagreement(
                first=one.name,
                second=two.name,
                a_difference=from_draws(float(difference[0]), draws),
                p_value=p_value,
            )
        )
    return found


def _about(bench: _Bench, drawn: Resampling | None) -> list[str]:
    said = [f"approaches are compared at C = {short_flops(bench.flops)}, ten times the largest run, with C = 6 N D"]
    if drawn is not None:
        said[0] += f"; intervals and p-values from {len(bench.weights) - 1:,} shared resamples ({drawn.method})"
    columns = bench.table.columns
    ratio = columns["flops"] / (6 * columns["n_params"] * columns["n_tokens"])
    if np.abs(ratio - 1).max() > SAME_C:
        said.append(
            f"the rows' own FLOPs are {ratio.min():.2f} to {ratio.max():.2f} of 6 N D; budgets are found by them, "
            "exponents and N_opt are against 6 N D in all approaches"
        )
    return said


def _apart(found: Sequence[Disagreement]) -> list[str]:
    return [
        f"approaches {d.first} and {d.second} disagree: a differs by {d.a_difference.value:+.3f} "
        f"(p = {d.p_value:.3f}); trust neither beyond the measured range before their notes explain it"
        for d in found
        if d.p_value is not None and d.p_value < DISAGREE and "3-tied" not in (d.first, d.second)
    ]


def _close(chosen: str | None, errors: dict[str, float]) -> list[str]:
    if chosen is None:
        return []
    near = sorted(law for law, e in errors.items() if law != chosen and e < CLOSE * errors[chosen])
    best = f"{chosen} predicts held-out rows best ({100 * errors[chosen]:.2f} % root mean square)"
    return [f"{best}, {listed(near)} within a tenth of it: no clear choice"] if near else [best]
