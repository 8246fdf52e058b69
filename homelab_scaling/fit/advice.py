"""What to buy with a budget, beside a size, or for a model that is half trained; each with interval and reach."""

from dataclasses import dataclass

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit import allocate
from homelab_scaling.fit.allocate import Terms, Worth
from homelab_scaling.fit.family import OutsideFamily, ShapeFamily, best_real_shape, optimal_shape
from homelab_scaling.fit.laws import Law, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.predict import Range, Split, estimate, predict_split, reach
from homelab_scaling.fit.result import Draws, Estimate, ScalingFit


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
    tokens_per_param: Estimate
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


def predict_budget(
    fit: ScalingFit, drawn: Draws, flops: float, *, family: ShapeFamily | None = None, budgets: Range | None = None
) -> Budget:
    """A budget by the law, by 20 tokens per parameter, and over real shapes.

    Raises:
        SpecError: not a law of N and D.
        OutsideFamily: no shape of the family fits the budget.
    """
    law = get_law(fit.law)
    fitted = predict_split(fit, drawn, flops, budgets=budgets)
    n, d = allocate.split_by_rule(flops)
    losses = [allocate.loss_at(law, v, n, d) for v in (drawn.point, drawn.values)]
    best = [allocate.best_loss(law, v, flops) for v in (drawn.point, drawn.values)]
    far = reach(fit, at={"flops": flops, "n_params": n, "n_tokens": d}, budgets=budgets)
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
        SpecError: not a law of N and D.
        OutsideFamily: the optimum lies outside the family.
    """
    law = get_law(fit.law)
    point = optimal_shape(law, drawn.point, flops, family)
    if not family.holds(float(point.n_params)):
        raise OutsideFamily(f"the best size for {flops:.3g} FLOPs is outside the {family.words}")
    drawn_all = optimal_shape(law, drawn.values, flops, family)
    shape, d_real, loss_real = best_real_shape(law, drawn.point, flops, family)
    far = reach(
        fit, at={"flops": flops, "n_params": float(point.n_params), "n_tokens": float(point.n_tokens)}, budgets=budgets
    )
    return ShapeSplit(
        family=family.words,
        n_params=estimate(point.n_params, drawn_all.n_params),
        n_tokens=estimate(point.n_tokens, drawn_all.n_tokens),
        tokens_per_param=estimate(point.n_tokens / point.n_params, drawn_all.n_tokens / drawn_all.n_params),
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
    found = [_partner(law, values, n_params, n_tokens, family) for values in (drawn.point, drawn.values)]
    n_est, d_est, ratio, flops, loss = (estimate(p, q) for p, q in zip(*found, strict=True))
    n_value, d_value, _ratio, c_value, _loss = (float(x) for x in found[0])
    far = reach(fit, at={"flops": c_value, "n_params": n_value, "n_tokens": d_value}, budgets=budgets)
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


def _partner(
    law: Law, values: Array, n_params: float | None, n_tokens: float | None, family: ShapeFamily | None
) -> tuple[Array, Array, Array, Array, Array]:
    """N, D, D/N, FLOPs and loss."""
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
    return n, d, d / n, per_token * d, allocate.loss_at(law, values, n, d)


def predict_more_tokens(
    fit: ScalingFit, drawn: Draws, n_params: float, n_tokens: float, worth: Worth, *, n_doublings: int = 4
) -> MoreTokens:
    """What each further doubling of its tokens buys a model, and until when it is worth its compute.

    Raises:
        SpecError: not a law of N and D.
    """
    law = get_law(fit.law)
    both = (drawn.point, drawn.values)
    until = estimate(*(allocate.worth_until(law, v, n_params, worth) for v in both))
    fresh = [allocate.beats_fresh(law, v, n_params) for v in both]
    far = reach(fit, at={"n_params": n_params, "n_tokens": _value(until)})
    return MoreTokens(
        n_params=n_params,
        n_tokens=n_tokens,
        doublings=tuple(_doubling(fit, drawn, n_params, n_tokens * 2.0**k) for k in range(n_doublings)),
        worth=worth.words,
        worth_until_tokens=until,
        beats_fresh_from_tokens=estimate(fresh[0][0], fresh[1][0]),
        beats_fresh_until_tokens=estimate(fresh[0][1], fresh[1][1]),
        extrapolation=far.factor,
        furthest=far.axis,
    )


def _doubling(fit: ScalingFit, drawn: Draws, n: float, d: float) -> Doubling:
    law = get_law(fit.law)

    def of(values: Array) -> tuple[Array, Array, Array]:
        return (
            allocate.loss_at(law, values, n, 2 * d),
            allocate.doubling_gain(law, values, n, d),
            allocate.best_loss(law, values, allocate.FLOPS_PER_PARAM_TOKEN * n * d),
        )

    after, gain, new = (estimate(*pair) for pair in zip(of(drawn.point), of(drawn.values), strict=True))
    far = reach(fit, at={"n_params": n, "n_tokens": 2 * d})
    return Doubling(
        from_tokens=d,
        loss_nats=after,
        gain_nats=gain,
        gain_frac=_value(gain) / (_value(after) + _value(gain)),
        fresh_loss_nats=new,
        extrapolation=far.factor,
        furthest=far.axis,
    )


def _value(one: Estimate) -> float:
    assert one.value is not None
    return one.value
