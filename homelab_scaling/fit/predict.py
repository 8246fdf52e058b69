"""Predictions from a fit: the loss at a point, the best split of a budget, each with interval and reach.

Every function takes the fit and its draws; a quantity's interval is the middle 95 % of what the draws give. Quantiles
do not change under a logarithm, so an interval of N or D is the same in log space.
"""

from dataclasses import dataclass
from typing import cast, get_args

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit import allocate
from homelab_scaling.fit.allocate import Terms
from homelab_scaling.fit.laws import AXIS_LETTER, Law, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.points import Compute, Count, apply_compute, apply_count
from homelab_scaling.fit.result import Draws, Estimate, FitReport, ScalingFit

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a prediction goes beyond what was measured."""

    factor: float
    """Over the variables the largest; 1 inside the range."""
    axis: str | None
    """N, D or C, the variable that is furthest out; None inside."""

    @property
    def words(self) -> str:
        return "inside" if self.axis is None else f"{self.axis} x {shown_factor(self.factor)} out"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A loss at a point of the law's variables."""

    at: dict[str, float]
    """Variable -> value."""
    loss_nats: float
    ci95: tuple[float, float] | None
    """Of the law itself; a single run scatters around it by the fit's sigma_log as well."""
    extrapolation: float
    """How far outside the fitted range, as the largest factor over the variables; 1 inside it."""
    furthest: str | None = None
    """The variable that is furthest outside."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The N and D that a law prefers for a budget, with C = 6 N D."""

    flops: float
    n_params: Estimate
    n_tokens: Estimate
    loss_nats: Estimate
    extrapolation: float
    """How far the budget, N or D, whichever is worst, lies outside the fitted range; 1 inside it."""
    tokens_per_param: Estimate
    furthest: str | None = None
    """The variable that is furthest outside."""


def draws_of(report: FitReport, fit: ScalingFit) -> Draws:
    """The draws of one fit.

    Raises:
        SpecError: the fit has none, because it was not fitted or its draws file is gone.
    """
    drawn = report.draws.get(fit.draws_file or "")
    if drawn is None or not fit.is_fitted:
        raise SpecError(f"{fit.law}: no draws to predict from ({fit.status}); run `homelab fit` again")
    return drawn


def chosen_fit(report: FitReport, law: str | None, *, axes: tuple[str, ...] = ()) -> tuple[ScalingFit, Law, Draws]:
    """The fit of a law by name, or the first fitted one of exactly these variables.

    Raises:
        SpecError: there is none, or it was not fitted; names those that are there.
    """
    fits = [fit for fit in report.main if fit.is_fitted]
    for fit in fits:
        if fit.law == law or (law is None and get_law(fit.law).axes == axes):
            return fit, get_law(fit.law), draws_of(report, fit)
    named = law or f"law of {' and '.join(AXIS_LETTER[a] for a in axes)}"
    status = next((f" ({f.status})" for f in report.main if f.law == law), "")
    known = ", ".join(dict.fromkeys(fit.law for fit in fits)) or "none"
    raise SpecError(f"{report.source}: no fitted {named}{status}; laws that can be asked here: {known}")


def predict_loss(fit: ScalingFit, drawn: Draws, **at: float) -> Forecast:
    """The fitted loss at n_params=..., n_tokens=... or flops=..., whichever the law takes.

    Raises:
        SpecError: a variable of the law is missing or not positive.
    """
    law = get_law(fit.law)
    missing = [axis for axis in law.axes if not at.get(axis, 0.0) > 0]
    if missing:
        raise SpecError(f"{law.name} needs a positive {missing[0]}; give one")
    value = float(law.loss(drawn.point, dict(at)))
    far = reach(fit, at={axis: at[axis] for axis in law.axes})
    return Forecast(
        at={axis: at[axis] for axis in law.axes},
        loss_nats=value,
        ci95=interval(law.loss(drawn.values, dict(at))),
        extrapolation=far.factor,
        furthest=far.axis,
    )


def loss_band(fit: ScalingFit, drawn: Draws, columns: dict[str, Array]) -> tuple[Array, Array | None, Array | None]:
    """The fitted curve over arrays of the law's variables, and the 95 % band of the law (None without draws)."""
    law = get_law(fit.law)
    line = law.loss(drawn.point, dict(columns))
    if len(drawn.values) < 2:
        return line, None, None
    each = law.loss(drawn.values[:, None, :], dict(columns))
    low, high = np.quantile(each, (0.025, 0.975), axis=0)
    return line, low, high


def predict_split(fit: ScalingFit, drawn: Draws, flops: float, *, budgets: Range | None = None) -> Split:
    """N_opt, D_opt and the loss there for a budget of C = 6 N D; intervals are taken in log space.

    Args:
        budgets: smallest and largest measured budget; without them the corners of the fitted N and D.

    Raises:
        SpecError: not a law of N and D.
    """
    law = get_law(fit.law)
    terms = [Terms.of(law, v) for v in (drawn.point, drawn.values)]
    (n, d), (n_all, d_all) = (allocate.split_budget(t, flops) for t in terms)
    far = reach(fit, at={"flops": flops, "n_params": float(n), "n_tokens": float(d)}, budgets=budgets)
    return Split(
        flops=flops,
        n_params=estimate(n, n_all),
        n_tokens=estimate(d, d_all),
        tokens_per_param=estimate(d / n, d_all / n_all),
        loss_nats=estimate(allocate.loss_at(law, drawn.point, n, d), allocate.loss_at(law, drawn.values, n_all, d_all)),
        extrapolation=far.factor,
        furthest=far.axis,
    )


def budgets_of(report: FitReport, fit: ScalingFit) -> Range:
    """Smallest and largest 6 N D that was trained; of a published law the corners of its N and D.

    Raises:
        SpecError: the law has neither N nor D, nor C.
    """
    if report.points and "flops" not in fit.ranges:
        gone = {one.row_id for one in fit.excluded}
        kept = tuple(p for p in report.points if p.row_id is None or p.row_id not in gone)
        rows = apply_count(apply_compute(kept, compute_of(report)), count_of(report))
        spent = [6.0 * p.n_params * p.n_tokens for p in rows]
        return min(spent), max(spent)
    if "flops" in fit.ranges:
        return fit.ranges["flops"]
    if {"n_params", "n_tokens"} <= set(fit.ranges):
        return _corners(fit)
    raise SpecError(f"{fit.law} knows no budgets; use a law of N and D, or of C")


def count_of(report: FitReport) -> Count:
    """The parameter count of a report, which its file holds as text.

    Raises:
        SpecError: none of the three.
    """
    for count in get_args(Count):
        if count == report.count:
            return cast(Count, count)
    raise SpecError(f"{report.source}: N is counted as {report.count!r}; wants {', '.join(get_args(Count))}")


def compute_of(report: FitReport) -> Compute:
    """What C and D are in a report's laws of N and D."""
    return "c_min" if report.compute == "c_min" else "c"


def _corners(fit: ScalingFit) -> Range:
    n, d = fit.ranges["n_params"], fit.ranges["n_tokens"]
    return 6 * n[0] * d[0], 6 * n[1] * d[1]


def reach(fit: ScalingFit, at: dict[str, float], *, budgets: Range | None = None) -> Reach:
    """How far these values of N, D and C lie outside what the fit saw.

    Args:
        at: variable -> value; those that the fit knows nothing of are ignored.
        budgets: measured budgets, for `flops` where the law has no C of its own.
    """
    known = dict(fit.ranges)
    if "flops" in at and "flops" not in known and {"n_params", "n_tokens"} <= set(known):
        known["flops"] = budgets or _corners(fit)
    factors = {AXIS_LETTER[a]: _beyond(v, known[a]) for a, v in at.items() if a in known}
    axis = max(factors, key=lambda a: factors[a], default=None)
    # A float of rounding beyond the last point is not outside.
    if axis is None or factors[axis] < 1 + 1e-9:
        return Reach(factor=1.0, axis=None)
    return Reach(factor=factors[axis], axis=axis)


def estimate(point: Array, draws: Array) -> Estimate:
    """A derived quantity and the middle 95 % of its draws, those apart that have no value (NaN)."""
    draws = np.asarray(draws, dtype=np.float64)
    return Estimate(value=float(point), ci95=interval(draws[~np.isnan(draws)]))


def interval(draws: Array) -> tuple[float, float] | None:
    """2.5 % and 97.5 % of the draws; None without any."""
    if len(draws) < 2:
        return None
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def shown_factor(factor: float) -> str:
    """1.02, 4.2, 37, 1.6e5."""
    if factor >= 1e4:
        return f"{factor:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}" if factor >= 1.95 else f"{factor:.2f}"


def _beyond(value: float, known: Range) -> float:
    return max(value / known[1], known[0] / value, 1.0)
