"""The critical batch size of rungs that were not measured, from those that were; revised with every measurement.

Along a ladder, log B_crit = a + s log x + scatter, where x is D where the ladder's tokens differ and N where they do
not. What published studies say of s is a prior, so that one measured rung is enough for a guess and its interval; a
second and a third take over.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.estimator import Z95

D_SLOPE, D_SLOPE_SD = 0.47, 0.20
"""Zhang 2024 has 0.47, Power Lines 0.46, their optimum 0.38, Step Law 0.57; N grows along in most ladders."""
N_SLOPE, N_SLOPE_SD = 0.22, 0.20
"""At equal D: Zhang has 0.09; Kaplan's L^-4.8 with L ~ N^-0.076 has 0.36."""
SCATTER_LN = 0.25
"""Of one rung about its ladder's line, beyond what its measurement says: seeds, extrapolation to the run's middle."""
SAME_TOKENS_FACTOR = 1.2


@dataclass(frozen=True, kw_only=True)
class Known:
    """One measured rung."""

    n_params: float
    n_tokens: float
    b_crit_tokens: float
    sd_log: float
    """Standard error of log B_crit; of the measurement alone."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """B_crit of one rung from others."""

    b_crit: Estimate
    of: str
    """What the line runs over: D or N."""
    exponent: Estimate
    n_known: int

    @property
    def words(self) -> str:
        many = f"{self.n_known} measured rung{'s' * (self.n_known > 1)}"
        return f"from {many} by {self.of}^{self.exponent.value:.2f} [{self.exponent.low:.2f}, {self.exponent.high:.2f}]"


def forecast(known: Sequence[Known], *, n_params: float, n_tokens: float) -> Forecast:
    """B_crit of a rung of this size and horizon, with a 95 % interval for what a measurement would find.

    Args:
        known: one or more measured rungs of the same ladder.
    """
    tokens = [*(k.n_tokens for k in known), n_tokens]
    by_tokens = max(tokens) / min(tokens) > SAME_TOKENS_FACTOR
    slope, slope_sd = (D_SLOPE, D_SLOPE_SD) if by_tokens else (N_SLOPE, N_SLOPE_SD)
    x = np.log([k.n_tokens if by_tokens else k.n_params for k in known])
    at = math.log(n_tokens if by_tokens else n_params)
    y = np.log([k.b_crit_tokens for k in known])
    weight = 1 / (np.array([k.sd_log for k in known]) ** 2 + SCATTER_LN**2)
    # Normal equations of the line through `at`, with the prior as one more observation of the slope.
    design = np.stack([np.ones_like(x), x - at], axis=1)
    precision = design.T @ (weight[:, None] * design) + np.diag([0.0, slope_sd**-2])
    theta = np.linalg.solve(precision, design.T @ (weight * y) + np.array([0.0, slope / slope_sd**2]))
    covariance = np.linalg.inv(precision)
    half = Z95 * math.sqrt(covariance[0, 0] + SCATTER_LN**2)
    half_slope = Z95 * math.sqrt(covariance[1, 1])
    value, exponent = float(theta[0]), float(theta[1])
    return Forecast(
        b_crit=Estimate(value=math.exp(value), low=math.exp(value - half), high=math.exp(value + half)),
        of="D" if by_tokens else "N",
        exponent=Estimate(value=exponent, low=exponent - half_slope, high=exponent + half_slope),
        n_known=len(known),
    )
