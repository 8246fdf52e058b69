"""The noise scale at the middle of a run, from measurements early in it.

log B_simple = a + s log(tokens), a weighted line. Tokens, not loss, because the middle of a run is known in tokens
beforehand, and because it extrapolates better: from the first three windows of two quickstart rungs, lines in log
tokens hit windows at 2 to 3.5 times the tokens within 7 %; lines in log loss, told the loss, were up to 26 % off. The
slope has a weak prior, so that two points that fluctuate do not send the line anywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.batch.estimator import Z95, NoiseScale

SLOPE, SLOPE_SD = 0.5, 0.3
"""Of log B_simple in log tokens. Published batches grow as D^0.38 to D^0.57 (Power Lines, Zhang, Step Law); the
quickstart's 54k and 474k rungs gave 0.46 and 0.58, and with this width 0.2 and 0.8 are covered too."""
SCATTER_LN = 0.15
"""Of a point about the line beyond its own interval: what a window of training does to |G|^2 by chance."""


@dataclass(frozen=True, kw_only=True)
class MidRun:
    """B_simple at the middle of a run, extrapolated, with a 95 % interval; or a lower bound; or why neither."""

    at_tokens: float
    """Tokens trained by then: half the horizon."""
    b_simple_tokens: float | None
    ci95_tokens: tuple[float, float] | None
    at_least_tokens: float | None
    why_no_number: str | None
    loss_nats: float | None
    """Training loss expected there, by a straight line in logs: a little low, since losses level off."""
    exponent: float | None
    """Of B_simple in tokens."""
    exponent_sd: float | None
    n_points: int
    """Measurements behind it."""

    @property
    def words(self) -> str:
        """The result in a sentence."""
        if self.b_simple_tokens is not None and self.ci95_tokens is not None:
            low, high = self.ci95_tokens
            return (
                f"B_simple {self.b_simple_tokens:,.0f} tokens (95 % {low:,.0f} to {high:,.0f}) after "
                f"{self.at_tokens:,.0f} tokens, from {self.n_points} measurement{'s' * (self.n_points > 1)}"
            )
        if self.at_least_tokens is not None:
            return f"B_simple at least {self.at_least_tokens:,.0f} tokens ({self.why_no_number})"
        return f"B_simple unknown ({self.why_no_number})"


def middle_of_run(points: Sequence[NoiseScale], *, horizon_tokens: float) -> MidRun:
    """B_simple half-way to the horizon, from the points that have a number and are informative.

    Where none has a number, the largest lower bound of an informative point holds here too: B_simple grows.
    """
    at = horizon_tokens / 2
    informative = [p for p in points if p.why_not_informative is None]
    usable = [p for p in informative if p.b_simple_tokens is not None and p.sd_log is not None]
    loss = _loss_at(informative, at)
    if not usable:
        bounds = [p.at_least_tokens for p in informative if p.at_least_tokens is not None]
        reasons = [p.why_no_number or "its interval reaches zero" for p in informative]
        reasons = (
            reasons or [p.why_not_informative for p in points if p.why_not_informative] or ["nothing was measured"]
        )
        return MidRun(
            at_tokens=at,
            b_simple_tokens=None,
            ci95_tokens=None,
            at_least_tokens=max(bounds, default=None),
            why_no_number=reasons[-1],
            loss_nats=loss,
            exponent=None,
            exponent_sd=None,
            n_points=len(informative),
        )
    sd = np.array([p.sd_log or 0.0 for p in usable])
    found = weighted_line(
        np.log([p.tokens_trained / at for p in usable]),
        np.log([p.b_simple_tokens or 0.0 for p in usable]),
        sd**2 + SCATTER_LN**2,
    )
    half = Z95 * math.sqrt(found.var + SCATTER_LN**2)
    return MidRun(
        at_tokens=at,
        b_simple_tokens=math.exp(found.value),
        ci95_tokens=(math.exp(found.value - half), math.exp(found.value + half)),
        at_least_tokens=None,
        why_no_number=None,
        loss_nats=loss,
        exponent=found.slope,
        exponent_sd=found.slope_sd,
        n_points=len(usable),
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """A straight line's height at x = 0 and its slope, with their errors."""

    value: float
    var: float
    slope: float
    slope_sd: float


def weighted_line(x: NDArray[np.float64], y: NDArray[np.float64], var: NDArray[np.float64]) -> Line:
    """Weighted least squares, the prior as one more observation of the slope; wider where points scatter more."""
    design = np.stack([np.ones_like(x), x], axis=1)
    precision = design.T @ (design / var[:, None]) + np.diag([0.0, SLOPE_SD**-2])
    theta = np.linalg.solve(precision, design.T @ (y / var) + np.array([0.0, SLOPE / SLOPE_SD**2]))
    chi2 = float(((y - design @ theta) ** 2 / var).sum()) + ((theta[1] - SLOPE) / SLOPE_SD) ** 2
    # n points and one prior against two parameters. Source: Birge 1932; the Particle Data Group's scale factor.
    covariance = np.linalg.inv(precision) * max(1.0, chi2 / max(1, len(x) - 1))
    return Line(
        value=float(theta[0]),
        var=float(covariance[0, 0]),
        slope=float(theta[1]),
        slope_sd=math.sqrt(covariance[1, 1]),
    )


def _loss_at(points: Sequence[NoiseScale], tokens: float) -> float | None:
    """The power law through the last two losses; None with fewer."""
    if len(points) < 2:
        return points[0].loss_nats if points else None
    first, last = sorted(points, key=lambda p: p.tokens_trained)[-2:]
    slope = math.log(last.loss_nats / first.loss_nats) / math.log(last.tokens_trained / first.tokens_trained)
    return float(last.loss_nats * (tokens / last.tokens_trained) ** slope)
