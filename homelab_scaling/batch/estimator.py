"""The gradient noise scale from squared gradient norms: unbiased, with an interval that says when the data are too few.

Legend
    b   sequences of a micro-batch             q   mean squared norm of the K micro-gradients
    K   micro-batches of a step, all ranks     Q   squared norm of their mean
    T   measuring steps                        G2  |G|^2 of the true gradient
    r   B_simple / (b K)                       S   tr(Sigma), the variance of one sequence's gradient

Because E q = G2 + S / b and E Q = G2 + S / (b K), one step gives unbiased estimates of both; each is noisy, and that of
G2 may come out negative, so steps are averaged first and divided once: B_simple = mean S / mean G2.

Source: McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1 with B_small = b, B_big = b K; Fieller 1954, "Some
problems in interval estimation"; tests/batch/test_estimator.py measures bias and coverage.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import DataError

Array = NDArray[np.float64]

CONFIDENCE = 0.95
Z95 = 1.959963984540054
Z90 = 1.6448536269514722
MIN_STEPS = 3
"""Fewer measuring steps have no spread worth the name."""
GOOD_K = 8
"""Micro-batches of a step worth having: below, K / (K - 1) is felt."""
RHO, D_EFF = 0.04, 60.0
"""Assumed by the plan: the share of the noise that lies along the gradient, G' Sigma G / (|G|^2 tr Sigma), and how many
directions carry it, (tr Sigma)^2 / tr(Sigma^2).

Measured on GPT-2 of 110k and 474k parameters on Python source, loss 6.1 to 4.4: 0.26 to 0.004 and 11 to 370, the later
in training the better; with both, the plan was within a factor of 2 of the variance seen.
"""
WITHIN = 0.20
"""How near a planned measurement is to come, nine times in ten."""


@dataclass(frozen=True, kw_only=True)
class NoiseMeasurement:
    """One measuring step: what the hook saw, and the two unbiased estimates that follow."""

    k: int
    """Micro-batches over all ranks."""
    microbatch_seqs: int
    mean_sq_norm: float
    """q: mean over micro-batches of the squared norm of their mean gradient."""
    sq_norm_of_mean: float
    """Q: squared norm of the whole step's mean gradient, before clipping."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise DataError(
                f"found {self.k} micro-batch in a measuring step, wants 2 or more: noise shows only between "
                "micro-batches; accumulate gradients, use more ranks, or have the batch cut in two"
            )
        if not (math.isfinite(self.mean_sq_norm) and math.isfinite(self.sq_norm_of_mean)):
            raise DataError(
                f"found gradients that are not finite (squared norms {self.mean_sq_norm:g} and "
                f"{self.sq_norm_of_mean:g}), wants finite ones; lower the learning rate and measure anew"
            )

    @property
    def grad_sq(self) -> float:
        """Unbiased |G|^2; may be negative, which says that one step is not enough."""
        return (self.k * self.sq_norm_of_mean - self.mean_sq_norm) / (self.k - 1)

    @property
    def trace(self) -> float:
        """Unbiased tr(Sigma) of one sequence's gradient."""
        return self.microbatch_seqs * self.k / (self.k - 1) * (self.mean_sq_norm - self.sq_norm_of_mean)


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """B_simple at one point of a run, in sequences and in tokens, with a 95 % interval or an honest refusal."""

    b_simple_seqs: float | None
    b_simple_tokens: float | None
    """`b_simple_seqs` times `context_tokens`; None where `why_no_number` says why."""
    ci95_tokens: tuple[float, float] | None
    """Fieller's; None where it has no upper end."""
    at_least_tokens: float | None
    """Lower end (97.5 %) where there is no upper one."""
    why_no_number: str | None
    grad_sq: float
    """Mean of the estimates of |G|^2; negative where noise drowns it."""
    trace: float
    """Mean of the estimates of tr(Sigma), per sequence."""
    loss_nats: float
    """Training loss at these weights, mean over the measuring batches."""
    tokens_trained: int
    n_params: int
    context_tokens: int
    n_steps: int
    k: int
    microbatch_seqs: int
    overhead_frac: float | None = None
    """What hooks (and a split batch) add to a measuring step, as a share of its time; None where not timed."""
    why_not_informative: str | None = None
    """Why this point must not stand for the run; None where it may."""

    @property
    def sd_log(self) -> float | None:
        """Standard error of log B_simple, from the interval; None where it has no positive ends."""
        if self.b_simple_tokens is None or self.ci95_tokens is None or self.ci95_tokens[0] <= 0:
            return None
        return math.log(self.ci95_tokens[1] / self.ci95_tokens[0]) / (2 * Z95)

    @property
    def words(self) -> str:
        """`B_simple 3,189 tokens (24.9 sequences), 95 % 2,900 to 3,510`, or at least how much."""
        if self.b_simple_tokens is not None and self.b_simple_seqs is not None and self.ci95_tokens is not None:
            low, high = self.ci95_tokens
            return (
                f"B_simple {self.b_simple_tokens:,.0f} tokens ({self.b_simple_seqs:,.1f} sequences), "
                f"95 % {low:,.0f} to {high:,.0f}"
            )
        if self.ci95_tokens is not None:
            return f"B_simple at most {self.ci95_tokens[1]:,.0f} tokens ({self.why_no_number})"
        if self.at_least_tokens is not None:
            return f"B_simple at least {self.at_least_tokens:,.0f} tokens ({self.why_no_number})"
        return f"B_simple unknown ({self.why_no_number})"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two means and what its data say about it."""

    value: float | None
    """None where the denominator is not significantly positive, or the numerator not positive."""
    low: float | None
    high: float | None
    """None where the interval has no upper end; then `low` alone is a lower bound."""
    why_no_value: str | None
    numerator: float
    denominator: float


def noise_scale(
    measurements: Sequence[NoiseMeasurement],
    *,
    context_tokens: int,
    loss_nats: float,
    tokens_trained: int,
    n_params: int,
    overhead_frac: float | None = None,
    why_not_informative: str | None = None,
) -> NoiseScale:
    """B_simple of measuring steps at (nearly) the same weights.

    Raises:
        DataError: fewer than 3 steps.
    """
    trace = np.array([m.trace for m in measurements])
    grad_sq = np.array([m.grad_sq for m in measurements])
    ratio = fieller(trace, grad_sq)

    low, high = (None if end is None else end * context_tokens for end in (ratio.low, ratio.high))
    return NoiseScale(
        b_simple_seqs=ratio.value,
        b_simple_tokens=None if ratio.value is None else ratio.value * context_tokens,
        ci95_tokens=None if low is None or high is None else (low, high),
        at_least_tokens=low if high is None else None,
        why_no_number=ratio.why_no_value,
        grad_sq=ratio.denominator,
        trace=ratio.numerator,
        loss_nats=loss_nats,
        tokens_trained=tokens_trained,
        n_params=n_params,
        context_tokens=context_tokens,
        n_steps=len(measurements),
        k=measurements[-1].k,
        microbatch_seqs=measurements[-1].microbatch_seqs,
        overhead_frac=overhead_frac,
        why_not_informative=why_not_informative,
    )


def fieller(numerator: Array, denominator: Array) -> Ratio:
    """mean(numerator) / mean(denominator) of paired samples whose true means are not negative, with Fieller's interval.

    The interval is every ratio v for which mean(numerator - v denominator) does not differ from 0 by Student's t. It is
    bounded only where the denominator is significantly positive; otherwise there is a lower end, or nothing.

    Raises:
        DataError: fewer than 3 samples.
    """
    if len(numerator) < MIN_STEPS:
        raise DataError(
            f"found {len(numerator)} measuring steps, wants {MIN_STEPS} or more: fewer show no spread; measure longer"
        )
    from scipy import stats

    x, y, dof = float(numerator.mean()), float(denominator.mean()), len(numerator) - 1
    dx, dy = numerator - x, denominator - y
    var_x, var_y, cov = (float(product.mean()) / dof for product in (dx * dx, dy * dy, dx * dy))  # of the means
    t2 = float(stats.t.ppf(0.5 + CONFIDENCE / 2, dof)) ** 2
    # a v^2 - 2 h v + c <= 0. A negative mean of squares is chance: 0 is the nearest that can be true.
    y_possible = max(y, 0.0)
    a, h, c = y_possible**2 - t2 * var_y, x * y_possible - t2 * cov, x * x - t2 * var_x
    root = math.sqrt(max(0.0, h * h - a * c))
    if a > 0 and x > 0 and h + root > 0:
        return Ratio(
            value=x / y,
            low=max(0.0, (h - root) / a),
            high=(h + root) / a,
            why_no_value=None,
            numerator=x,
            denominator=y,
        )
    if a > 0:
        why = "the noise between micro-batches is not above zero; measure more steps"
        high = (h + root) / a if h + root > 0 else None
        low = None if high is None else 0.0
    else:  # every ratio between the two roots, one on each side of 0, is excluded
        why = f"|G|^2 is not significantly above zero in {len(numerator)} steps; measure more, or with more per step"
        low, high = ((h - root) / a if a < 0 and c > 0 and x > 0 else None), None
    return Ratio(value=None, low=low, high=high, why_no_value=why, numerator=x, denominator=y)


def steps_for(
    b_simple_seqs: float,
    *,
    k: int,
    microbatch_seqs: int,
    within: float = WITHIN,
    rho: float = RHO,
    d_eff: float = D_EFF,
) -> int:
    """Measuring steps that bring B_simple to within a share of its value, nine times in ten.

    T = (1.64 / within)^2 (4 rho r + 2 K / (K - 1) r^2 / d_eff): the variance of |G|^2's estimate, a U-statistic, for
    Gaussian gradients; that of tr(Sigma) is small beside it. At least 3.

    Args:
        b_simple_seqs: expected.
        rho, d_eff: of the gradient noise; the defaults are measured (see RHO).
    """
    r = b_simple_seqs / (microbatch_seqs * k)
    return max(MIN_STEPS, math.ceil((Z90 / within) ** 2 * (4 * rho * r + 2 * k / (k - 1) * r * r / d_eff)))


def measurable_seqs(
    n_steps: int, *, k: int, microbatch_seqs: int, within: float = WITHIN, rho: float = RHO, d_eff: float = D_EFF
) -> float:
    """The largest B_simple, in sequences, that `n_steps` measure to within a share of it: `steps_for`, solved."""
    quadratic, linear = 2 * k / (k - 1) / d_eff, 4 * rho
    wanted = n_steps * (within / Z90) ** 2
    r = (-linear + math.sqrt(linear * linear + 4 * quadratic * wanted)) / (2 * quadratic)
    return r * k * microbatch_seqs
