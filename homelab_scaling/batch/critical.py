"""The critical batch size from a sweep of batch sizes, and its law over a ladder.

Legend: B batch, S steps and E = S B examples (or tokens) to one and the same loss; S_min the steps that no batch can go
below, E_min the examples that no batch can go below; B_crit = E_min / S_min. B and E in one unit, sequences or tokens.

    (S / S_min - 1)(E / E_min - 1) = 1        S = S_min (1 + B_crit / B)        E = E_min (1 + B / B_crit)

Source: McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11; Kaplan et al. 2020 (arXiv 2001.08361), eqs. 5.4 and 5.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homelab_scaling.batch.priors import KAPLAN_LOSS_EXPONENT, POWER_LINES_CRIT_EXPONENT, ZHANG_EXPONENT
from homelab_scaling.errors import DataError

Array = npt.NDArray[np.float64]

MIN_BATCHES = 4
MIN_SPAN = 16.0
LEVEL = 0.95
EXPONENT_BOUNDS = (0.2, 5.0)
DOUBT_BELOW = 0.05
"""p below which the generalised exponent is taken to fit truly better."""

PUBLISHED_LAWS: dict[str, dict[str, float]] = {
    "L": {"Kaplan 2020": KAPLAN_LOSS_EXPONENT},
    "D": {"Zhang 2024": ZHANG_EXPONENT, "Power Lines 2025": POWER_LINES_CRIT_EXPONENT},
}
"""Exponents of B_crit against loss and against tokens."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BendTest:
    """Does S = S_min (1 + (B_crit / B)^a)^(1 / a), with a free, fit better than the hyperbola, a = 1?"""

    exponent: float
    rms: float
    """Of log S under the free exponent."""
    p: float | None
    """Of the F test that a = 1; None with fewer than five batches, which leave nothing to judge by."""

    @property
    def doubted(self) -> bool:
        """The hyperbola is missed by more than the scatter explains."""
        return self.p is not None and self.p < DOUBT_BELOW


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """The hyperbola of one sweep, in the unit of the batches given."""

    s_min: Estimate
    e_min: Estimate
    b_crit: Estimate
    rms: float
    """Root mean square of the residuals of log S."""
    n_batches: int
    bend: BendTest

    def steps(self, batch: float) -> float:
        """Steps to the loss of the sweep at `batch`."""
        return self.s_min.value * (1 + self.b_crit.value / batch)

    def examples(self, batch: float) -> float:
        """Examples (or tokens) to it."""
        return self.e_min.value * (1 + batch / self.b_crit.value)


def fit_trade_off(batches: Sequence[float], steps: Sequence[float]) -> TradeOff:
    """S_min, E_min and B_crit with Student intervals from log S = log S_min + log(1 + B_crit / B).

    Args:
        batches: B, at least four different ones over a factor of 16.
        steps: S, updates to one and the same loss, with the learning rate tuned for each batch.

    Raises:
        DataError: too few batches, too narrow a span, or steps that are not positive.
    """
    from scipy import stats

    log_b, log_s = _checked(batches, steps)
    theta, residuals, jacobian = _least_squares(log_b, log_s, None)
    n, dof = len(log_b), len(log_b) - 2
    rms = math.sqrt(float(np.mean(residuals**2)))
    variance = float(residuals @ residuals) / dof
    covariance = variance * np.linalg.inv(jacobian.T @ jacobian)
    t = float(stats.t.ppf(0.5 + LEVEL / 2, dof))

    def estimate(direction: tuple[float, float]) -> Estimate:
        v = np.array(direction)
        centre, half = float(v @ theta), t * math.sqrt(float(v @ covariance @ v))
        return Estimate(value=math.exp(centre), low=math.exp(centre - half), high=math.exp(centre + half))

    return TradeOff(
        s_min=estimate((1, 0)),
        b_crit=estimate((0, 1)),
        e_min=estimate((1, 1)),
        rms=rms,
        n_batches=n,
        bend=_test_bend(log_b, log_s, float(residuals @ residuals), theta),
    )


def _checked(batches: Sequence[float], steps: Sequence[float]) -> tuple[Array, Array]:
    if len(batches) != len(steps):
        raise DataError(f"{len(batches)} batches but {len(steps)} step counts; give one for each")
    if any(not (math.isfinite(x) and x > 0) for x in (*batches, *steps)):
        raise DataError("a sweep holds a batch or a step count that is not a positive number; leave that run out")
    n_different, span = len(set(batches)), max(batches, default=1.0) / min(batches, default=1.0)
    if n_different < MIN_BATCHES or span < MIN_SPAN * (1 - 1e-9):
        raise DataError(
            f"{n_different} batch sizes over a factor of {span:.3g}: a critical batch size wants at least "
            f"{MIN_BATCHES} over a factor of {MIN_SPAN:g}; add smaller or larger ones"
        )
    return np.log(np.array(batches, dtype=np.float64)), np.log(np.array(steps, dtype=np.float64))


def _least_squares(log_b: Array, log_s: Array, exponent_from: Array | None) -> tuple[Array, Array, Array]:
    """Parameters (log S_min, log B_crit[, log a]), residuals and Jacobian; a is free where a start is given."""
    from scipy.optimize import least_squares

    def residuals(theta: Array) -> Array:
        a = math.exp(theta[2]) if len(theta) == 3 else 1.0
        missed: Array = log_s - theta[0] - np.logaddexp(0.0, a * (theta[1] - log_b)) / a
        return missed

    if exponent_from is not None:
        low, high = np.log(EXPONENT_BOUNDS)
        wide = np.inf
        start = np.array([*exponent_from, 0.0])
        found = least_squares(residuals, start, bounds=([-wide, -wide, low], [wide, wide, high]))
        return found.x, found.fun, found.jac
    # The knee may lie anywhere in the sweep, or outside it: the best of several beginnings.
    starts = np.linspace(log_b.min() - 1, log_b.max() + 1, 7)
    fits = [least_squares(residuals, np.array([log_s.min(), knee]), xtol=1e-12, ftol=1e-12) for knee in starts]
    found = min(fits, key=lambda fit: float(fit.cost))
    return found.x, found.fun, found.jac


def _test_bend(log_b: Array, log_s: Array, squares: float, theta: Array) -> BendTest:
    from scipy import stats

    free, residuals, _ = _least_squares(log_b, log_s, theta)
    squares_free, dof = float(residuals @ residuals), len(log_b) - 3
    p = None
    if dof >= 2:
        f = max(0.0, squares - squares_free) / max(squares_free / dof, 1e-300)
        p = float(stats.f.sf(f, 1, dof))
    return BendTest(exponent=math.exp(free[2]), rms=math.sqrt(squares_free / len(log_b)), p=p)


# ---------------------------------------------------------------------------------------------------- over a ladder


@dataclass(frozen=True, kw_only=True)
class BatchLaw:
    """B_crit = factor x^exponent over a ladder."""

    of: str
    """What x is: L (loss, nats), D (tokens) or N (parameters)."""
    exponent: Estimate
    log_factor: float
    rms: float
    n_points: int
    x_range: tuple[float, float]
    published: dict[str, float]
    """Exponents of the laws beside which it stands."""
    covariance: tuple[tuple[float, float], tuple[float, float]]
    """Of (log_factor, exponent), scatter included."""

    def predict(self, x: float) -> Estimate:
        """B_crit of one more rung at `x`, with an interval that holds the rung's own scatter."""
        from scipy import stats

        v = np.array([1.0, math.log(x)])
        dof = self.n_points - 2
        scatter = self.rms**2 * self.n_points / dof
        half = float(stats.t.ppf(0.5 + LEVEL / 2, dof)) * math.sqrt(float(v @ np.array(self.covariance) @ v) + scatter)
        centre = self.log_factor + self.exponent.value * math.log(x)
        return Estimate(value=math.exp(centre), low=math.exp(centre - half), high=math.exp(centre + half))

    def compare(self) -> str:
        """Whether the published exponents lie in the interval, in a sentence."""
        mine = f"{self.exponent.value:.2f} [{self.exponent.low:.2f}, {self.exponent.high:.2f}]"
        said = [
            f"{name}'s {value:.2f} is {'inside' if self.exponent.low <= value <= self.exponent.high else 'outside'}"
            for name, value in self.published.items()
        ]
        head = f"B_crit goes as {self.of}^{mine} over {self.n_points} rungs"
        return f"{head}; {' and '.join(said)}" if said else head


def fit_batch_law(of: str, x: Sequence[float], b_crit: Sequence[float]) -> BatchLaw:
    """A straight line through log B_crit against log x, each rung one point.

    Raises:
        DataError: fewer than three rungs, or all at one x.
    """
    from scipy import stats

    if len(x) < 3 or max(x) / min(x) < 1.05:
        raise DataError(
            f"{len(x)} rung{'s' * (len(x) != 1)} with a measured batch over a range of {of} of a factor "
            f"{max(x) / min(x) if x else 1:.2f}: a law wants at least 3 rungs that differ in {of}; measure more rungs"
        )
    log_x, log_b = np.log(np.array(x, dtype=np.float64)), np.log(np.array(b_crit, dtype=np.float64))
    design = np.stack([np.ones_like(log_x), log_x], axis=1)
    theta, *_ = np.linalg.lstsq(design, log_b, rcond=None)
    residuals = log_b - design @ theta
    dof = len(x) - 2
    covariance = float(residuals @ residuals) / dof * np.linalg.inv(design.T @ design)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, dof)) * math.sqrt(covariance[1, 1])
    slope = float(theta[1])
    return BatchLaw(
        of=of,
        exponent=Estimate(value=slope, low=slope - half, high=slope + half),
        log_factor=float(theta[0]),
        rms=math.sqrt(float(np.mean(residuals**2))),
        n_points=len(x),
        x_range=(float(min(x)), float(max(x))),
        published=PUBLISHED_LAWS.get(of, {}),
        covariance=((covariance[0, 0], covariance[0, 1]), (covariance[1, 0], covariance[1, 1])),
    )
