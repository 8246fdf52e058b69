"""The best size and token count as power laws of compute, N_opt ~ C^a and D_opt ~ C^b, by least squares in logs.

Legend:  R batch member (a resample), g point (a budget, or a place on an envelope)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.models import Array

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """Two power laws of C = 6 N D for each batch member; NaN where its rows did not carry them."""

    a: Array
    """(R,) exponent of N_opt."""
    b: Array
    """(R,) exponent of D_opt."""
    log_n: Array
    """(R,) log N_opt at `flops`."""
    log_d: Array
    """(R,)."""
    flops: float


def grow(log_c: Array, log_n: Array, log_d: Array, weights: Array, *, flops: float, usable: Mask) -> Growth:
    """Both power laws through the points of every batch member.

    Args:
        log_c, log_n, log_d: (R, g), anything where the weight is 0.
        weights: (R, g).
        flops: where N_opt and D_opt are read off.
        usable: members with enough points (R,); the others become NaN.
    """
    here = np.where(weights > 0, log_c, 0.0)
    a, log_n_at = line(here, np.where(weights > 0, log_n, 0.0), weights, at=float(np.log(flops)))
    b, log_d_at = line(here, np.where(weights > 0, log_d, 0.0), weights, at=float(np.log(flops)))
    a, b, log_n_at, log_d_at = (np.where(usable, v, np.nan) for v in (a, b, log_n_at, log_d_at))
    return Growth(a=a, b=b, log_n=log_n_at, log_d=log_d_at, flops=flops)


def line(x: Array, y: Array, weights: Array, *, at: float) -> tuple[Array, Array]:
    """Slope of the weighted least-squares line through each row of points, and its value at `at`, each (R,)."""
    total = weights.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        x_mean, y_mean = (weights * x).sum(axis=-1) / total, (weights * y).sum(axis=-1) / total
        dx = x - x_mean[..., None]
        slope = (weights * dx * (y - y_mean[..., None])).sum(axis=-1) / (weights * dx * dx).sum(axis=-1)
    return np.asarray(slope), np.asarray(y_mean + slope * (at - x_mean))


def power_law(c: Array, optimum: Array, sd_log: Array | None = None) -> tuple[float, float]:
    """Exponent and prefactor of optimum ~ C^exponent by least squares in logs, weighted by 1 / sd^2 where known.

    Args:
        c: compute budgets (g,).
        optimum: the best N or D at each (g,).
        sd_log: standard deviations of log optimum (g,).

    Source: Hoffmann et al. 2022 section 3.2; the weights are Porian et al. 2024's.
    """
    weights = np.ones(len(c)) if sd_log is None else 1.0 / np.asarray(sd_log) ** 2
    slope, at_one = line(np.log(c)[None], np.log(optimum)[None], weights[None], at=0.0)
    return float(slope[0]), float(np.exp(at_one[0]))
