"""c, by which the critical batch follows from the noise scale: B_crit = c B_simple; measured on the smallest rung.

A sweep of batches (verify.py) or branches of a checkpoint (branch.py) tell B_crit over a stretch of training, a probe
tells B_simple at the middle of the same stretch. Without either c is 1, and says so.
"""

import math
from dataclasses import dataclass
from typing import Literal

from homelab_scaling.batch.branch_fit import BranchResult
from homelab_scaling.batch.critical import Estimate, TradeOff
from homelab_scaling.batch.estimator import Z95

UNCALIBRATED = (
    "uncalibrated: B_crit is taken to be B_simple itself, which was found orders of magnitude too low (Merrill 2025) "
    "and seven times too high (a noisy quadratic); --verify measures the factor on the smallest rung"
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """c = B_crit / B_simple."""

    c: float = 1.0
    method: Literal["uncalibrated", "sweep", "branch"] = "uncalibrated"
    sd_log: float | None = None
    """Of log c; None where it was not measured, or where c is a bound."""
    side: Literal["at least", "at most"] | None = None
    """Where c is a bound that is taken as if it were the value: which one."""
    rung: str | None = None
    """On which it was measured."""
    sentence: str = UNCALIBRATED

    @property
    def words(self) -> str:
        """How B_crit follows from the noise scale, in a few words."""
        if self.method == "uncalibrated":
            return self.method
        return f"calibrated by {self.method}" + (f", c {self.side} {self.c:.2g}" if self.side else "")


def calibrate(sweep: TradeOff, b_simple: Estimate, rung: str) -> Calibration:
    """c from a sweep's B_crit and the noise scale at the middle of the same stretch of training, both in tokens."""
    c = sweep.b_crit.value / b_simple.value
    sd = math.hypot(sd_log(sweep.b_crit), sd_log(b_simple))
    doubt = ""
    if sweep.bend.doubted:
        doubt = f"; the sweep bends more sharply than the hyperbola (exponent {sweep.bend.exponent:.2f})"
    return Calibration(
        c=c,
        method="sweep",
        sd_log=sd,
        rung=rung,
        sentence=(
            f"calibrated on {rung}: B_crit {sweep.b_crit.value:,.0f} tokens by {sweep.n_batches} batch sizes, B_simple "
            f"{b_simple.value:,.0f} at the middle of the same stretch: c = {c:.2f} "
            f"[{c * math.exp(-Z95 * sd):.2f}, {c * math.exp(Z95 * sd):.2f}]{doubt}"
        ),
    )


def calibration_from_branch(result: BranchResult, b_simple: Estimate | None, rung: str) -> Calibration:
    """c from a branch test and the noise scale at the middle of its branches (`result.middle_tokens`), in tokens.

    A lower bound is taken as if it were the value, which is the careful side; an upper one only where it lies below
    the noise scale itself, which is what an uncalibrated answer takes. Without either, or without a noise scale, the
    answer is uncalibrated and says why.
    """
    bound = result.at_least_tokens or result.at_most_tokens
    if result.b_crit is None and result.at_least_tokens is None and bound and b_simple and bound > b_simple.value:
        within = f"B_crit is at most {bound:,.0f} tokens, which {b_simple.value:,.0f} of B_simple is within"
        return Calibration(sentence=f"the branch test on {rung} does not calibrate: {within}; {UNCALIBRATED}")
    b_crit = result.b_crit.value if result.b_crit is not None else bound
    if b_crit is None or b_simple is None:
        why = result.why_no_number if b_crit is None else "the noise scale there is not known"
        return Calibration(sentence=f"the branch test on {rung} does not calibrate: {why}; {UNCALIBRATED}")
    c = b_crit / b_simple.value
    if result.b_crit is None:
        sd = None
        side: Literal["at least", "at most"] | None = "at least" if result.at_least_tokens is not None else "at most"
        interval = f"c = {c:.2f}, as if it were that"
    else:
        side, sd = None, math.hypot(sd_log(result.b_crit), sd_log(b_simple))
        interval = f"c = {c:.2f} [{c * math.exp(-Z95 * sd):.2f}, {c * math.exp(Z95 * sd):.2f}]"
    return Calibration(
        c=c,
        method="branch",
        sd_log=sd,
        side=side,
        rung=rung,
        sentence=(
            f"calibrated on {rung}: B_crit {f'{side} ' if side else ''}{b_crit:,.0f} tokens by {len(result.branches)} "
            f"branches of one checkpoint, B_simple {b_simple.value:,.0f} at the middle of the same stretch: {interval}"
        ),
    )


def sd_log(x: Estimate) -> float:
    """Standard error of log x."""
    return math.log(x.high / x.low) / (2 * Z95)


def scaled(x: Estimate, calibration: Calibration) -> Estimate:
    """c x, with both errors."""
    half = Z95 * math.hypot(sd_log(x), calibration.sd_log or 0.0)
    value = calibration.c * x.value
    return Estimate(value=value, low=value * math.exp(-half), high=value * math.exp(half))
