"""The same rows under three counts of N: with everything, the body alone, the body and the output head.

Small models are mostly vocabulary, so what N counts moves the exponents more than any choice of fit.
Source: Porian et al. 2024; Pearce and Song 2024.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from homelab_scaling.fit import diagnose
from homelab_scaling.fit.joint import draw_joint, from_draws, solve_joint
from homelab_scaling.fit.laws import LAWS, MIN_EXPONENT
from homelab_scaling.fit.objectives import ObjectiveName
from homelab_scaling.fit.points import Count, apply_count
from homelab_scaling.fit.resample import Resampling
from homelab_scaling.fit.result import CountRow, Estimate
from homelab_scaling.fit.slices import Table, slices_for, tabulate
from homelab_scaling.fit.solve import refit, solve
from homelab_scaling.fit.words import listed
from homelab_scaling.runs import LossPoint

COUNTS: tuple[Count, ...] = ("total", "body", "body+head")


def count_rows(points: Sequence[LossPoint], *, name: ObjectiveName, n_draws: int, seed: int) -> list[CountRow]:
    """a and alpha under each count, or why there are none."""
    return [_count_row(points, count, name, n_draws, seed) for count in COUNTS]


def _count_row(points: Sequence[LossPoint], count: Count, name: ObjectiveName, n_draws: int, seed: int) -> CountRow:
    """a of the joint law and alpha of L(N) with N counted this way."""
    nothing = Estimate(value=None)
    needed = {"total": (), "body": ("n_body",), "body+head": ("n_body", "n_head")}[count]
    missing = [column for column in needed if any(getattr(p, column) is None for p in points)]
    if missing:
        why = f"not every row has {listed(missing)}; add that to the table"
        return CountRow(count=count, a=nothing, alpha=nothing, why_not=why)
    table = tabulate(apply_count(tuple(points), count))
    joint = solve_joint(LAWS["chinchilla"], table, name)
    if joint is None:
        fault = diagnose.too_few(LAWS["chinchilla"], table, np.arange(len(table.losses)))
        return CountRow(count=count, a=nothing, alpha=nothing, why_not=fault)
    drawn = draw_joint(joint, table, n_draws, seed)
    a = joint.law.derived(joint.with_draws(drawn, name))["a"]
    alpha, why_not = _size_exponent(table, drawn, name)
    found = from_draws(float(a[0]), a[1:][np.isfinite(a[1:])])
    if found.ci95 is not None and diagnose.wide("share", found.ci95, 1.0):
        found = replace(found, value=None, se=None)
    return CountRow(count=count, a=found, alpha=alpha, why_not=why_not)


def _size_exponent(table: Table, drawn: Resampling | None, name: ObjectiveName) -> tuple[Estimate, str | None]:
    """Exponent of L(N) at the largest D that three sizes share."""
    law = LAWS["power-n"]
    slices = slices_for(law, table)
    if not slices:
        return Estimate(value=None), "no alpha: no token count is shared by three sizes"
    rows = slices[0].rows
    n, losses = table.columns["n_params"][rows], table.losses[rows]
    posed = law.pose({"n_params": n}, losses)
    best = solve(posed.model, np.log(losses), posed.starts(32), name, bounds=posed.bounds)
    value = float(posed.natural(best.theta)[law.names.index("alpha")])
    if drawn is None:
        return Estimate(value=value), None
    y, weights = drawn.y[..., rows], drawn.weights[..., rows]
    again = refit(posed.model, y, weights, best, name, bounds=posed.bounds)
    alphas = posed.natural(again.theta)[:, law.names.index("alpha")]
    # A resample of one size says nothing of a slope.
    held = np.broadcast_to(weights > 0, (len(alphas), len(rows)))
    two = np.where(held, n, 0.0).max(axis=1) > 1.01 * np.where(held, n, np.inf).min(axis=1)
    alphas = alphas[two & np.isfinite(alphas)]
    return from_draws(value, np.where(alphas < 2 * MIN_EXPONENT, 0.0, alphas)), None
