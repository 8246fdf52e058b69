"""Predictions from a fit: losses, the split of a budget, tokens for a size, each with interval and reach.

Every function takes the fit and its draws; a quantity's interval is the middle 95 % of what the draws give. Quantiles do
not change under a logarithm, so an interval of N or D is the same in log space.
"""

from dataclasses import dataclass

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit import allocate
from homelab_scaling.fit.allocate import Terms, Worth
from homelab_scaling.fit.family import ShapeFamily, best_real_shape, optimal_shape
from homelab_scaling.fit.laws import AXIS_LETTER, Law, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.points import apply_count
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
        return "inside" if self.axis is None else f"{self.axis} x {shown_factor(self.factor)} outside"


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
    furthest: str | None = None
    """The variable that is furthest outside."""


@dataclass(frozen=True, kw_only=True)
class RuleSplit:
    """The same budget at a fixed number of tokens per parameter."""

    tokens_per_param: float
    n_params: float
    n_tokens: float
    loss_nats: Estimate
    """What the law says of it."""
    above_best_nats: Estimate
    """That loss less the one at the law's own split."""
    extrapolation: float
    furthest: str | None


@dataclass(frozen=True, kw_only=True)
class ShapeSplit:
    """The same budget spent on real shapes, every matmul counted instead of 6 N D."""

    family: str
    n_params: Estimate
    n_tokens: Estimate
    loss_nats: Estimate
    n_layer: int
    d_model: int
    """The real shape of lowest loss at this budget, with its N, D and loss in the `shape_` fields."""
    shape_n_params: float
    shape_n_tokens: float
    shape_loss_nats: float
    extrapolation: float
    furthest: str | None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Everything about one budget."""

    fitted: Split
    rule: RuleSplit
    shapes: ShapeSplit | None
    """None where vocabulary and context are unknown."""


@dataclass(frozen=True, kw_only=True)
class BestPartner:
    """The D for which a given N is compute-optimal, or the N for a given D."""

    given: str
    """n_params or n_tokens: which of the two was asked about."""
    n_params: Estimate
    n_tokens: Estimate
    tokens_per_param: Estimate
    flops: Estimate
    """6 N D, or exact FLOPs where it comes from shapes."""
    loss_nats: Estimate
    family: str | None
    """The shapes whose exact FLOPs replace 6 N D; None for 6 N D."""
    extrapolation: float
    furthest: str | None


@dataclass(frozen=True, kw_only=True)
class Doubling:
    """One doubling of the tokens of a model."""

    from_tokens: float
    loss_nats: Estimate
    """After it."""
    gain_nats: Estimate
    gain_frac: float
    """Of the loss before it."""
    fresh_loss_nats: Estimate
    """What the compute of this doubling reaches in a new model at the best split."""
    extrapolation: float
    furthest: str | None


@dataclass(frozen=True, kw_only=True)
class MoreTokens:
    """What further tokens buy for a model of N parameters that has seen D."""

    n_params: float
    n_tokens: float
    doublings: tuple[Doubling, ...]
    worth: str
    """The least a doubling has to gain."""
    worth_until_tokens: Estimate
    """D beyond which another doubling gains less than that."""
    beats_fresh_from_tokens: Estimate
    beats_fresh_until_tokens: Estimate
    """Between these D, doubling this model's tokens beats a new model at the best split of the same compute."""
    extrapolation: float
    """Of `worth_until_tokens`."""
    furthest: str | None


def draws_of(report: FitReport, fit: ScalingFit) -> Draws:
    """The draws of one fit.

    Raises:
        SpecError: the fit has none, because it was not fitted or its draws file is gone.
    """
    drawn = report.draws.get(fit.draws_file or "")
    if drawn is None:
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
    status = next((f.status for f in report.main if f.law == law), "it was not asked for")
    known = ", ".join(dict.fromkeys(fit.law for fit in fits)) or "none"
    raise SpecError(f"{report.source}: no fitted {named} ({status}); fitted here: {known}")


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
    far = reach(fit, **{axis: at[axis] for axis in law.axes})
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
    far = reach(fit, budgets=budgets, flops=flops, n_params=float(n), n_tokens=float(d))
    return Split(
        flops=flops,
        n_params=estimate(n, n_all),
        n_tokens=estimate(d, d_all),
        loss_nats=estimate(allocate.loss_at(law, drawn.point, n, d), allocate.loss_at(law, drawn.values, n_all, d_all)),
        extrapolation=far.factor,
        furthest=far.axis,
    )


def predict_budget(
    fit: ScalingFit, drawn: Draws, flops: float, *, family: ShapeFamily | None = None, budgets: Range | None = None
) -> Budget:
    """A budget by the law, by 20 tokens per parameter, and over real shapes.

    Raises:
        SpecError: not a law of N and D, or no shape of the family fits the budget.
    """
    law = get_law(fit.law)
    fitted = predict_split(fit, drawn, flops, budgets=budgets)
    n, d = allocate.split_by_rule(flops)
    losses = [allocate.loss_at(law, v, n, d) for v in (drawn.point, drawn.values)]
    best = [allocate.best_loss(law, v, flops) for v in (drawn.point, drawn.values)]
    far = reach(fit, budgets=budgets, flops=flops, n_params=n, n_tokens=d)
    rule = RuleSplit(
        tokens_per_param=allocate.RULE_TOKENS_PER_PARAM,
        n_params=n,
        n_tokens=d,
        loss_nats=estimate(*losses),
        above_best_nats=estimate(losses[0] - best[0], losses[1] - best[1]),
        extrapolation=far.factor,
        furthest=far.axis,
    )
    shapes = None if family is None else predict_shape(fit, drawn, flops, family, budgets=budgets)
    return Budget(fitted=fitted, rule=rule, shapes=shapes)


def predict_shape(
    fit: ScalingFit, drawn: Draws, flops: float, family: ShapeFamily, *, budgets: Range | None = None
) -> ShapeSplit:
    """N_opt and D_opt where C is the exact FLOP count of a shape, and the real shape nearest to it in loss.

    Raises:
        SpecError: not a law of N and D, or the optimum lies outside the family.
    """
    law = get_law(fit.law)
    point = optimal_shape(law, drawn.point, flops, family)
    drawn_all = optimal_shape(law, drawn.values, flops, family)
    shape, d_real, loss_real = best_real_shape(law, drawn.point, flops, family)
    far = reach(fit, budgets=budgets, flops=flops, n_params=float(point.n_params), n_tokens=float(point.n_tokens))
    return ShapeSplit(
        family=family.words,
        n_params=estimate(point.n_params, drawn_all.n_params),
        n_tokens=estimate(point.n_tokens, drawn_all.n_tokens),
        loss_nats=estimate(point.loss_nats, drawn_all.loss_nats),
        n_layer=shape.n_layer,
        d_model=shape.d_model,
        shape_n_params=float(family.n_of(shape)),
        shape_n_tokens=d_real,
        shape_loss_nats=loss_real,
        extrapolation=far.factor,
        furthest=far.axis,
    )


def predict_partner(
    fit: ScalingFit,
    drawn: Draws,
    *,
    n_params: float | None = None,
    n_tokens: float | None = None,
    family: ShapeFamily | None = None,
    budgets: Range | None = None,
) -> BestPartner:
    """The D for which `n_params` is compute-optimal, or the N for which `n_tokens` is.

    Args:
        family: counts the exact FLOPs of its shapes instead of 6 N D; only for a given `n_params`.

    Raises:
        SpecError: not a law of N and D, neither or both given, or N outside the family.
    """
    law = get_law(fit.law)
    if (n_params is None) == (n_tokens is None) or (family is not None and n_params is None):
        raise SpecError("the best partner is of one number: give n_params or n_tokens (shapes need n_params)")
    found = []
    for values in (drawn.point, drawn.values):
        terms = Terms.of(law, values)
        if n_params is not None:
            n = np.full(values.shape[:-1], n_params)
            d = allocate.tokens_for(terms, n, family.elasticity(n_params) if family else 1.0)
        else:
            assert n_tokens is not None
            d = np.full(values.shape[:-1], n_tokens)
            n = allocate.params_for(terms, d)
        per_token = allocate.FLOPS_PER_PARAM_TOKEN * n
        if family is not None and n_params is not None:
            per_token = np.full_like(n, float(family.flops_at(np.array(family.width_for(n_params)))))
        found.append((n, d, d / n, per_token * d, allocate.loss_at(law, values, n, d)))
    n_est, d_est, ratio, flops, loss = (estimate(p, q) for p, q in zip(*found, strict=True))
    n_value, d_value, _ratio, c_value, _loss = (float(x) for x in found[0])
    far = reach(fit, budgets=budgets, flops=c_value, n_params=n_value, n_tokens=d_value)
    return BestPartner(
        given="n_params" if n_params is not None else "n_tokens",
        n_params=n_est if n_params is None else Estimate(value=n_params),
        n_tokens=d_est if n_tokens is None else Estimate(value=n_tokens),
        tokens_per_param=ratio,
        flops=flops,
        loss_nats=loss,
        family=family.words if family else None,
        extrapolation=far.factor,
        furthest=far.axis,
    )


def predict_more_tokens(
    fit: ScalingFit, drawn: Draws, n_params: float, n_tokens: float, worth: Worth, *, n_doublings: int = 4
) -> MoreTokens:
    """What each further doubling of its tokens buys a model, and until when it is worth its compute.

    Raises:
        SpecError: not a law of N and D.
    """
    law = get_law(fit.law)
    both = (drawn.point, drawn.values)
    doublings = []
    for k in range(n_doublings):
        d = n_tokens * 2.0**k
        after, gain, new = (
            estimate(*(of(values) for values in both))
            for of in (
                lambda v, d=d: allocate.loss_at(law, v, n_params, 2 * d),
                lambda v, d=d: allocate.doubling_gain(law, v, n_params, d),
                lambda v, d=d: allocate.best_loss(law, v, allocate.FLOPS_PER_PARAM_TOKEN * n_params * d),
            )
        )
        far = reach(fit, n_params=n_params, n_tokens=2 * d)
        before = float(allocate.loss_at(law, drawn.point, n_params, d))
        doublings.append(
            Doubling(
                from_tokens=d,
                loss_nats=after,
                gain_nats=gain,
                gain_frac=_value(gain) / before,
                fresh_loss_nats=new,
                extrapolation=far.factor,
                furthest=far.axis,
            )
        )
    until = estimate(*(allocate.worth_until(law, v, n_params, worth) for v in both))
    fresh = [allocate.beats_fresh(law, v, n_params) for v in both]
    far = reach(fit, n_params=n_params, n_tokens=_value(until))
    return MoreTokens(
        n_params=n_params,
        n_tokens=n_tokens,
        doublings=tuple(doublings),
        worth=worth.words,
        worth_until_tokens=until,
        beats_fresh_from_tokens=estimate(fresh[0][0], fresh[1][0]),
        beats_fresh_until_tokens=estimate(fresh[0][1], fresh[1][1]),
        extrapolation=far.factor,
        furthest=far.axis,
    )


def optimal_split(values: Array, flops: float) -> tuple[Array, Array]:
    """N and D minimising E + A N^-alpha + B D^-beta at 6 N D = flops, from natural parameters (..., parameter)."""
    return allocate.split_budget(Terms.of(get_law("chinchilla"), values), flops)


def budgets_of(report: FitReport, fit: ScalingFit) -> Range:
    """Smallest and largest 6 N D that was trained; of a published law the corners of its N and D.

    Raises:
        SpecError: the law has neither N nor D, nor C.
    """
    if report.points and "flops" not in fit.ranges:
        gone = {one.row_id for one in fit.excluded}
        rows = apply_count(tuple(p for p in report.points if p.row_id is None or p.row_id not in gone), report.count)
        spent = [6.0 * p.n_params * p.n_tokens for p in rows]
        return min(spent), max(spent)
    if "flops" in fit.ranges:
        return fit.ranges["flops"]
    if {"n_params", "n_tokens"} <= set(fit.ranges):
        return _corners(fit)
    raise SpecError(f"{fit.law} knows no budgets; use a law of N and D, or of C")


def _corners(fit: ScalingFit) -> Range:
    n, d = fit.ranges["n_params"], fit.ranges["n_tokens"]
    return 6 * n[0] * d[0], 6 * n[1] * d[1]


def reach(fit: ScalingFit, *, budgets: Range | None = None, **at: float) -> Reach:
    """How far these values of N, D and C lie outside what the fit saw.

    Args:
        budgets: measured budgets, for `flops` where the law has no C of its own.
        at: variable -> value; those that the fit knows nothing of are ignored.
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
    return f"{factor:,.0f}" if factor >= 20 else f"{factor:.1f}" if factor >= 1.95 else f"{factor:.2f}"


def _value(one: Estimate) -> float:
    assert one.value is not None
    return one.value


def _beyond(value: float, known: Range) -> float:
    return max(value / known[1], known[0] / value, 1.0)
