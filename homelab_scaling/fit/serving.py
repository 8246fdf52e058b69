"""Models that will be served: the size that is cheapest over its whole life, and the memory its cache takes.

Legend:  N parameters, D training tokens, T inference tokens, q = A N^-alpha / (A N^-alpha + B D^-beta) the share of
         size in what loss is left, s = q / (1 - q)
"""

from dataclasses import dataclass

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit import allocate
from homelab_scaling.fit.allocate import Terms, bounded_exp
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.predict import Range, estimate, reach
from homelab_scaling.fit.result import Draws, Estimate, ScalingFit
from homelab_scaling.plan.peaks import find_card, why_no_peak
from homelab_scaling.specs import ModelShape

TRAIN_FLOPS, SERVE_FLOPS = 6.0, 2.0
"""Per parameter and token: forward and backward, and forward alone."""
N_NEWTON = 60


def lifetime_flops(n: Array | float, d: Array | float, inference_tokens: float, weight: float = 1.0) -> Array:
    """6 N D + weight 2 N T: FLOPs of a life, or of training alone in units of which a serving FLOP costs `weight`."""
    return np.asarray(TRAIN_FLOPS * n * np.asarray(d) + weight * SERVE_FLOPS * n * inference_tokens)


def serve_optimum(terms: Terms, left: Array, inference_tokens: float, weight: float = 1.0) -> tuple[Array, Array]:
    """N and D that reach the level `left` = A N^-alpha + B D^-beta at the least 6 N D + weight 2 N T; NaN where none.

    With D(N) from the level, log of 6 N D(N) is convex in log N, so the one minimum is where the derivative vanishes:
    (1/beta) log(1 + s) + log(alpha s / beta - 1) = log(weight T / (3 (B / left)^(1/beta))). Its left side rises and is
    convex in log(alpha s / beta - 1), and Newton's steps from the right of the root never overshoot.

    Args:
        weight: cost of a serving FLOP over that of a training FLOP; 1 counts FLOPs.

    Source: Sardana et al. 2023 (min 6 N D + 2 N T at equal loss).
    """
    log_a, log_b, alpha, beta = terms
    reachable = left > 0
    log_left = np.log(np.where(reachable, left, 1.0))
    s_training = beta / alpha
    q = beta / (alpha + beta)
    if inference_tokens > 0 and weight > 0:
        target = np.log(weight * inference_tokens / 3) - (log_b - log_left) / beta
        v = target - np.log1p(s_training) / beta
        for _ in range(N_NEWTON):
            # log(1 + s) with s = s_training (1 + e^v), safe for large v
            log_1s = np.logaddexp(np.log1p(s_training), np.log(s_training) + v)
            slope = 1 + np.exp(np.log(s_training) + v - log_1s) / beta
            v = v - (log_1s / beta + v - target) / slope
        q = 1 / (1 + np.exp(-(np.log(s_training) + np.logaddexp(0.0, v))))
    n = bounded_exp((log_a - log_left - np.log(q)) / alpha)
    d = bounded_exp((log_b - log_left - np.log1p(-q)) / beta)
    return np.where(reachable, n, np.nan), np.where(reachable, d, np.nan)


# ---------------------------------------------------------------------------------------------------------------- money


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a FLOP costs on rented or owned hardware."""

    peak_flops_per_s: float
    mfu_frac: float
    """Share of the peak that the work reaches: training .3 to .5, decoding far less."""
    usd_per_hour: float

    def __post_init__(self) -> None:
        if not (self.peak_flops_per_s > 0 and np.isfinite(self.peak_flops_per_s)):
            raise SpecError(f"a peak of {self.peak_flops_per_s:g} FLOP/s; wants a positive number")
        if not 0 < self.mfu_frac <= 1:
            raise SpecError(f"an MFU of {self.mfu_frac:g}; wants a share above 0 and up to 1")
        if not (self.usd_per_hour > 0 and np.isfinite(self.usd_per_hour)):
            raise SpecError(f"a price of {self.usd_per_hour:g} USD per hour; wants a positive number")

    @property
    def usd_per_flop(self) -> float:
        return self.usd_per_hour / 3600 / (self.peak_flops_per_s * self.mfu_frac)

    @property
    def words(self) -> str:
        return f"${self.usd_per_hour:g}/h at {100 * self.mfu_frac:g} % of {self.peak_flops_per_s:.3g} FLOP/s"


def parse_peak(text: str) -> float:
    """FLOP/s from a number (97.5e12) or a card's name (RTX 4080).

    Raises:
        SpecError: neither.
    """
    try:
        return float(text)
    except ValueError:
        card = find_card(text)
    if card is None or card.bf16_tflops is None:
        raise SpecError(f"peak {text!r}: {why_no_peak(text)}; give FLOP/s such as 97.5e12 or a card such as RTX 4080")
    return card.bf16_tflops * 1e12


# -------------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good the served model has to be: as good as a model of N parameters, or a loss."""

    n_params: float | None = None
    n_tokens: float | None = None
    """What that model is trained on; None for the D at which its N is compute-optimal."""
    loss_nats: float | None = None

    def __post_init__(self) -> None:
        if (self.n_params is None) == (self.loss_nats is None):
            raise SpecError("the quality is either that of a model (--quality-of N) or a loss (--quality-loss)")


@dataclass(frozen=True, kw_only=True)
class Life:
    """One model, trained and served."""

    n_params: Estimate
    n_tokens: Estimate
    flops: Estimate
    """6 N D for training and 2 N for each inference token."""
    train_share_frac: float
    """Of those FLOPs."""
    usd: Estimate | None
    """None without prices."""
    extrapolation: float
    furthest: str | None


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """The cheapest model of a quality over training and a serving load."""

    inference_tokens: float
    quality_loss_nats: Estimate
    baseline: Life
    """The model whose quality is wanted; where a loss is wanted, the one that is cheapest to train."""
    by_flops: Life
    saved_flops: Estimate
    saved_flops_frac: Estimate
    by_money: Life | None
    """None without prices."""
    saved_usd: Estimate | None
    saved_usd_frac: Estimate | None
    unreachable_frac: float
    """Share of the draws in which no model reaches the quality; the intervals are over the others."""


@dataclass(frozen=True, kw_only=True)
class TokensToReach:
    """What one size needs for a loss."""

    n_params: float
    loss_nats: float
    n_tokens: Estimate
    flops: Estimate
    """6 N D."""
    unreachable_frac: float
    """Share of the draws in which it never reaches that loss."""
    extrapolation: float
    furthest: str | None


def predict_serving(
    fit: ScalingFit,
    drawn: Draws,
    quality: Quality,
    inference_tokens: float,
    *,
    machines: tuple[Machine, Machine] | None = None,
    budgets: Range | None = None,
) -> ServingPlan:
    """The N and D of equal quality that cost least over a life, in FLOPs and, with prices, in money.

    Args:
        machines: what trains and what serves.

    Raises:
        SpecError: not a law of N and D, or a quality that no model reaches.
    """
    weight = 1.0 if machines is None else machines[1].usd_per_flop / machines[0].usd_per_flop
    both = [_lives(fit, values, quality, inference_tokens, (1.0, weight)) for values in (drawn.point, drawn.values)]
    left, lives = both[0]
    if not left > 0:
        floor = float(get_law(fit.law).by_name(drawn.point)["E"]) if get_law(fit.law).offset else 0.0
        raise SpecError(f"no model reaches {quality.loss_nats:g} nats: the law's irreducible loss is {floor:.4g}")

    def life(index: int) -> Life:
        (n, d), (n_all, d_all) = lives[index], both[1][1][index]
        far = reach(fit, at={"flops": float(6 * n * d), "n_params": float(n), "n_tokens": float(d)}, budgets=budgets)
        return Life(
            n_params=estimate(n, n_all),
            n_tokens=estimate(d, d_all),
            flops=estimate(*(lifetime_flops(*pair, inference_tokens) for pair in ((n, d), (n_all, d_all)))),
            train_share_frac=float(6 * n * d / lifetime_flops(n, d, inference_tokens)),
            usd=None if machines is None else estimate(usd(n, d), usd(n_all, d_all)),
            extrapolation=far.factor,
            furthest=far.axis,
        )

    def usd(n: Array, d: Array) -> Array:
        assert machines is not None
        return lifetime_flops(n, d, inference_tokens, weight) * machines[0].usd_per_flop

    def saved(index: int, cost_weight: float) -> tuple[Estimate, Estimate]:
        costs = [[lifetime_flops(*one[1][i], inference_tokens, cost_weight) for i in (0, index)] for one in both]
        return estimate(*(b - c for b, c in costs)), estimate(*(1 - c / b for b, c in costs))

    saved_flops, saved_frac = saved(1, 1.0)
    dollars, dollars_frac = saved(2, weight)
    unit = None if machines is None else machines[0].usd_per_flop
    values = [_quality_loss(fit, v, quality) for v in (drawn.point, drawn.values)]
    return ServingPlan(
        inference_tokens=inference_tokens,
        quality_loss_nats=estimate(*values),
        baseline=life(0),
        by_flops=life(1),
        saved_flops=saved_flops,
        saved_flops_frac=saved_frac,
        by_money=None if unit is None else life(2),
        saved_usd=None if unit is None else _scaled(dollars, unit),
        saved_usd_frac=None if unit is None else dollars_frac,
        unreachable_frac=float(np.mean(~(both[1][0] > 0))) if len(drawn.values) else 0.0,
    )


def _lives(
    fit: ScalingFit, values: Array, quality: Quality, inference_tokens: float, weights: tuple[float, ...]
) -> tuple[Array, list[tuple[Array, Array]]]:
    """The level to reach, and (N, D) of the baseline and of the optimum under each weight."""
    law = get_law(fit.law)
    terms = Terms.of(law, values)
    if quality.n_params is not None:
        n = np.full(values.shape[:-1], quality.n_params)
        d = allocate.tokens_for(terms, n) if quality.n_tokens is None else np.full_like(n, quality.n_tokens)
        left = allocate.reducible_at(terms, n, d)
    else:
        assert quality.loss_nats is not None
        left = allocate.reducible(law, values, quality.loss_nats)
        n, d = serve_optimum(terms, left, 0.0)
    return left, [(n, d), *(serve_optimum(terms, left, inference_tokens, weight) for weight in weights)]


def _quality_loss(fit: ScalingFit, values: Array, quality: Quality) -> Array:
    if quality.loss_nats is not None:
        return np.full(values.shape[:-1], quality.loss_nats)
    law = get_law(fit.law)
    assert quality.n_params is not None
    d = quality.n_tokens
    tokens = allocate.tokens_for(Terms.of(law, values), quality.n_params) if d is None else d
    return allocate.loss_at(law, values, quality.n_params, tokens)


def _scaled(one: Estimate, by: float) -> Estimate:
    assert one.value is not None
    return Estimate(value=one.value * by, ci95=None if one.ci95 is None else (one.ci95[0] * by, one.ci95[1] * by))


def predict_tokens_to_reach(
    fit: ScalingFit, drawn: Draws, n_params: float, loss_nats: float, *, budgets: Range | None = None
) -> TokensToReach:
    """Tokens that bring a model of N parameters to a loss.

    Raises:
        SpecError: not a law of N and D, or that size never gets there.
    """
    law = get_law(fit.law)
    found = [
        allocate.tokens_to_reach(Terms.of(law, v), allocate.reducible(law, v, loss_nats), n_params)
        for v in (drawn.point, drawn.values)
    ]
    d = float(found[0])
    if not d > 0:
        floor = float(allocate.loss_at(law, drawn.point, n_params, np.exp(allocate.MAX_LOG)))
        raise SpecError(
            f"{n_params:.3g} parameters never reach {loss_nats:g} nats: with endless tokens the law gives {floor:.4g}; "
            "ask for a larger model or a higher loss"
        )
    far = reach(fit, at={"flops": 6 * n_params * d, "n_params": n_params, "n_tokens": d}, budgets=budgets)
    return TokensToReach(
        n_params=n_params,
        loss_nats=loss_nats,
        n_tokens=estimate(*found),
        flops=estimate(*(6 * n_params * one for one in found)),
        unreachable_frac=float(np.mean(np.isnan(found[1]))) if len(found[1]) else 0.0,
        extrapolation=far.factor,
        furthest=far.axis,
    )


# ---------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """Memory that serving a shape takes beside its weights: keys and values of every layer for every token."""

    n_layer: int
    d_model: int
    context_tokens: int
    bytes_per_element: float
    bytes_per_token: float
    bytes_per_sequence: float
    """At the full context."""
    weight_bytes: float | None
    """Of the parameters, in the same precision; None where N is unknown."""
    sequences_as_weights: float | None
    """Full sequences whose cache is as large as the weights."""


def kv_cache(
    n_layer: int, d_model: int, context_tokens: int, *, bytes_per_element: float = 2.0, n_params: float | None = None
) -> KvCache:
    """Cache of multi-head attention: 2 L d elements a token.

    Raises:
        SpecError: a number that is not positive.
    """
    given = {"layers": n_layer, "width": d_model, "context": context_tokens, "bytes per element": bytes_per_element}
    for name, value in given.items():
        if not value > 0:
            raise SpecError(f"{name} {value:g}; wants a positive number")
    per_token = 2.0 * n_layer * d_model * bytes_per_element
    weights = None if n_params is None else n_params * bytes_per_element
    return KvCache(
        n_layer=n_layer,
        d_model=d_model,
        context_tokens=context_tokens,
        bytes_per_element=bytes_per_element,
        bytes_per_token=per_token,
        bytes_per_sequence=per_token * context_tokens,
        weight_bytes=weights,
        sequences_as_weights=None if weights is None else weights / (per_token * context_tokens),
    )


def kv_cache_of(shape: ModelShape, *, bytes_per_element: float = 2.0, n_params: float | None = None) -> KvCache:
    """Cache of a GPT-2 shape at its full context."""
    return kv_cache(
        shape.n_layer, shape.d_model, shape.context_tokens, bytes_per_element=bytes_per_element, n_params=n_params
    )
