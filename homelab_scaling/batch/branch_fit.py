"""The critical batch from branches of one checkpoint: how far each batch came with the same tokens.

Legend
    B_0, B_k  batch of the reference (the smallest) and of a branch     f(t)    the reference's loss after t tokens
    D         tokens of a branch                                        D_eff   tokens after which f is where B_k came
    x         1 / B_crit

On the hyperbola a batch B needs E_min (1 + x B) tokens to a loss, so with D tokens it comes where the reference is
after D_eff = D (1 + x B_0) / (1 + x B_k). One number, B_crit, must explain all branches; it is fitted to their losses
(not to D_eff, which a branch that got nowhere does not have), each weighed by its own noise.

Source: the test is Merrill et al. 2025 (arXiv 2505.23971), whose rule is `merrill_rule`; the hyperbola is McCandlish et
al. 2018 (arXiv 1812.06162), eq. 2.11; tests/batch/test_branch_fit.py measures the coverage of the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.batch.critical import LEVEL, Estimate
from homelab_scaling.batch.estimator import Z95
from homelab_scaling.errors import DataError
from homelab_scaling.fit.words import listed

Array = NDArray[np.float64]

TOLERANCE_NATS = 0.01
"""Merrill's: losses this near count as equal."""
EMA = 0.5
"""Merrill's weight of the newest loss."""
LATE_FRAC = 0.25
"""The last share of a branch whose validations are averaged to where it came."""
MIN_BRANCHES = 4
MIN_PROGRESS_SD = 4.0
"""How many standard errors the reference must have come down for the others to be held against it."""
FORM_FRAC = 0.003
"""Of what the reference came down: how far the form of its curve is trusted, added to every branch's noise."""
REACH = 1000.0
"""B_crit is looked for up to this factor outside the batches tried."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """What was heard of one branch."""

    run_id: str
    batch_tokens: int
    lr: float
    tokens: tuple[int, ...]
    """Trained since the checkpoint at each validation, from 0 on; the same for every branch."""
    losses: Array
    """(validations, windows) held-out loss in nats; the windows are the same for every branch."""
    diverged: bool = False

    @property
    def means(self) -> Array:
        """Held-out loss at each validation."""
        return np.asarray(self.losses.mean(axis=1))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch and what became of it."""

    run_id: str
    batch_tokens: int
    lr: float
    loss_nats: float | None
    """Where it came: the mean over the last quarter of its validations; None where it diverged."""
    sd_nats: float | None
    """Of its difference to the reference."""
    expected_nats: float | None
    """By the fitted B_crit."""
    token_ratio: float | None
    """D / D_eff: tokens it needs for one of the reference's; None where the reference never has that loss."""


@dataclass(frozen=True, kw_only=True)
class BranchResult:
    """A branch test: LAB/<ladder>/branch/result.json."""

    rung: str
    plan_hash: str
    base_tokens: int
    """The batch up to the checkpoint."""
    start_tokens: int
    """Trained up to the checkpoint."""
    delta_tokens: int
    """Trained by each branch."""
    start_nats: float
    branches: tuple[Branch, ...]
    """Ascending; the first is the reference."""
    b_crit: Estimate | None
    """Tokens, over this stretch of training; None where the branches bound it on one side at most."""
    at_least_tokens: float | None
    at_most_tokens: float | None
    why_no_number: str | None
    misfit: float | None
    """Chi-square per degree of freedom about the hyperbola: above 1 it misses by more than the measurement's noise,
    and the interval is widened accordingly."""
    merrill_tokens: int | None
    """By Merrill's rule: the largest batch whose loss is within the tolerance of every smaller one's."""
    merrill_is_last: bool
    """It is the largest batch tried, so a lower bound."""
    tolerance_nats: float
    flops: float
    seconds: float | None
    kwh: float | None
    notes: tuple[str, ...]

    @property
    def middle_tokens(self) -> float:
        """Trained at the middle of the branches: where a noise scale is to be compared with."""
        return self.start_tokens + self.delta_tokens / 2

    @property
    def words(self) -> str:
        """The result in a sentence."""
        sizes = f"{len(self.branches)} batches of {self.branches[0].batch_tokens:,} to "
        sizes += f"{self.branches[-1].batch_tokens:,} tokens"
        rule = "no rule applies"
        if self.merrill_tokens is not None:
            rule = (
                f"Merrill's rule: {'at least ' * self.merrill_is_last}{self.merrill_tokens:,} (within "
                f"{self.tolerance_nats:g} nats)"
            )
        if self.b_crit is not None:
            b = self.b_crit
            head = f"B_crit {b.value:,.0f} tokens [{b.low:,.0f}, {b.high:,.0f}]"
        elif self.at_least_tokens is not None:
            head = f"B_crit at least {self.at_least_tokens:,.0f} tokens ({self.why_no_number})"
        elif self.at_most_tokens is not None:
            head = f"B_crit at most {self.at_most_tokens:,.0f} tokens ({self.why_no_number})"
        else:
            head = f"B_crit unknown ({self.why_no_number})"
        return (
            f"branches of {self.rung} after {self.start_tokens:,} tokens, {sizes}, {self.delta_tokens:,} tokens each: "
            f"{head}; {rule}"
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What `fit_branches` concludes; the fields are those of `BranchResult`."""

    branches: tuple[Branch, ...]
    start_nats: float
    b_crit: Estimate | None
    at_least_tokens: float | None
    at_most_tokens: float | None
    why_no_number: str | None
    misfit: float | None
    merrill_tokens: int | None
    merrill_is_last: bool
    tolerance_nats: float
    notes: tuple[str, ...]


# ----------------------------------------------------------------------------------------------------- Merrill's rule


def merrill_rule(
    batches: Sequence[int], losses: Sequence[float | None], tolerance_nats: Sequence[float] | float = TOLERANCE_NATS
) -> int:
    """The largest batch whose loss is at most `tolerance_nats` above that of every smaller one.

    Args:
        batches: ascending.
        losses: smoothed, after the same tokens; None for one that diverged.
        tolerance_nats: one for all, or one for each batch.

    Source: Merrill et al. 2025 (arXiv 2505.23971), section 3.1.
    """
    tolerances = [tolerance_nats] * len(batches) if isinstance(tolerance_nats, int | float) else tolerance_nats
    good = batches[0]
    for i, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
        smaller = [other for other in losses[:i] if other is not None]
        if loss is not None and all(loss <= other + tolerances[i] for other in smaller):
            good = batch
    return good


def ema(losses: Sequence[float], alpha: float = EMA) -> float:
    """The last value of an exponential average that begins with the first loss."""
    value = losses[0]
    for loss in losses[1:]:
        value = alpha * loss + (1 - alpha) * value
    return value


# ------------------------------------------------------------------------------------------------------ the estimator


@dataclass(frozen=True, kw_only=True, eq=False)
class _Smooth:
    """f(t) = a - sum_j b_j (1 - exp(-t / tau_j)), b_j >= 0: falls, ever more slowly, in any such way."""

    a: float
    b: Array
    tau: Array

    def __call__(self, t: Array) -> Array:
        return np.asarray(self.a + np.expm1(-t[..., None] / self.tau) @ self.b)

    def tokens_at(self, loss: float, most: float) -> float | None:
        """Its inverse; None where the loss is not below the start, or is not reached within `most`."""
        if not float(self(np.array([most]))[0]) <= loss < self.a:
            return None
        low, high = 0.0, most
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self(np.array([middle]))[0]) > loss else (low, middle)
        return high


def _smooth(tokens: Array, losses: Array) -> _Smooth:
    """Least squares under b_j >= 0, which needs no further smoothing: few b_j come out above 0."""
    from scipy.optimize import lsq_linear

    tau = tokens[-1] * np.geomspace(0.05, 20, 8)
    design = np.concatenate([np.ones((len(tokens), 1)), np.expm1(-tokens[:, None] / tau)], axis=1)
    theta = lsq_linear(design, losses, bounds=(0, np.inf), method="bvls").x
    return _Smooth(a=float(theta[0]), b=theta[1:], tau=tau)


def _scatter(losses: Array) -> float:
    """Of a validation about a smooth path, by second differences past the bend at the beginning."""
    late = losses[len(losses) // 3 :]
    return float(np.sqrt(np.mean(np.diff(late, n=2) ** 2) / 6)) if len(late) > 2 else 0.0


def fit_branches(curves: Sequence[Curve], *, tolerance_nats: float = TOLERANCE_NATS) -> Found:
    """B_crit in tokens with a 95 % interval, or a bound, or why neither; and Merrill's rule beside it.

    Args:
        curves: of at least four batches; the smallest is the reference.

    Raises:
        DataError: too few branches, or branches that were not measured alike.
    """
    curves = sorted(curves, key=lambda c: c.batch_tokens)
    good = [c for c in curves if not c.diverged]
    lost = [c for c in curves if c.diverged]
    notes = [f"{c.batch_tokens:,} tokens: diverged at rate {c.lr:.2e}, left out" for c in lost]
    if len(good) < MIN_BRANCHES:
        raise DataError(
            f"{len(good)} of {len(curves)} branches came to their end, wants {MIN_BRANCHES}: "
            f"{listed(notes) if notes else 'too few were planned'}; lower the ladder's rate"
        )
    if any(c.tokens != good[0].tokens or c.losses.shape != good[0].losses.shape for c in good):
        raise DataError("the branches were validated at different tokens or on different windows; run the test anew")
    tokens = np.array(good[0].tokens, dtype=np.float64)
    late = np.arange(len(tokens)) >= len(tokens) - max(1, round(LATE_FRAC * (len(tokens) - 1)))
    reference = _smooth(tokens, good[0].means)
    came = np.array([float(c.means[late].mean()) for c in good])
    own = np.array([_scatter(c.means) for c in good]) / math.sqrt(int(late.sum()))  # its path's own ups and downs
    text = np.array([_paired_sd(c, good[0], late) for c in good])
    at = float(tokens[late].mean())
    progress = reference.a - float(reference(np.array([at]))[0])
    sd = np.sqrt(own**2 + text**2 + (FORM_FRAC * max(progress, 1e-6)) ** 2)
    fit = _fit(reference, at, np.array([float(c.batch_tokens) for c in good]), came, sd)
    noise = {c.run_id: float(s) for c, s in zip(good, sd, strict=True)}
    merrill = merrill_rule(
        [c.batch_tokens for c in curves],
        [None if c.diverged else ema([float(v) for v in c.means[1:]]) for c in curves],
        [max(tolerance_nats, Z95 * math.hypot(noise.get(c.run_id, 0.0), sd[0])) for c in curves],
    )
    if fit.misfit is not None and fit.misfit > 3:
        notes.append(
            f"the branches lie {math.sqrt(fit.misfit):.1f} standard errors off the hyperbola; the interval is widened"
        )
    ends = {c.run_id: i for i, c in enumerate(good)}
    return Found(
        branches=tuple(
            Branch(
                run_id=c.run_id,
                batch_tokens=c.batch_tokens,
                lr=c.lr,
                loss_nats=None if c.diverged else float(came[ends[c.run_id]]),
                sd_nats=None if c.diverged else float(sd[ends[c.run_id]]),
                expected_nats=None if c.diverged or fit.expected is None else float(fit.expected[ends[c.run_id]]),
                token_ratio=None if c.diverged else _ratio(reference, at, came[ends[c.run_id]]),
            )
            for c in curves
        ),
        start_nats=float(good[0].means[0]),
        b_crit=fit.b_crit,
        at_least_tokens=fit.at_least,
        at_most_tokens=fit.at_most,
        why_no_number=fit.why_no_number,
        misfit=fit.misfit,
        merrill_tokens=merrill,
        merrill_is_last=merrill == curves[-1].batch_tokens,
        tolerance_nats=tolerance_nats,
        notes=tuple(notes),
    )


def _paired_sd(curve: Curve, reference: Curve, late: NDArray[np.bool_]) -> float:
    """Standard error of the difference on the same windows, by windows."""
    differences = (curve.losses[late] - reference.losses[late]).mean(axis=0)
    n = len(differences)
    return float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def _ratio(reference: _Smooth, at: float, came: float) -> float | None:
    effective = reference.tokens_at(came, 10 * at)
    return None if not effective else float(at / effective)


@dataclass(frozen=True, kw_only=True)
class _Fit:
    b_crit: Estimate | None = None
    at_least: float | None = None
    at_most: float | None = None
    why_no_number: str | None = None
    misfit: float | None = None
    expected: Array | None = None


def _fit(f: _Smooth, at: float, batches: Array, came: Array, sd: Array) -> _Fit:
    """One parameter, by its whole chi-square: what cannot be excluded on one side gives a bound on the other.

    The reference's own error is shared by all differences to it, so their covariance is full.
    """
    from scipy import stats

    progress, shared = f.a - float(f(np.array([at]))[0]), float(sd[0])
    if progress < MIN_PROGRESS_SD * shared:
        return _Fit(
            why_no_number=f"the smallest batch came down by {progress:.3f} nats only, with a noise of {shared:.3f}; "
            "lengthen the branches"
        )
    weights = np.linalg.inv(np.diag(sd[1:] ** 2) + shared**2)
    grid = np.linspace(math.log(batches[0] / REACH), math.log(batches[-1] * REACH), 4001)

    def expected(log_b_crit: Array) -> Array:
        x = np.exp(-log_b_crit)[..., None]
        return f(at * (1 + x * batches[0]) / (1 + x * batches))

    missed = came[1:] - expected(grid)[:, 1:]
    chi2 = np.einsum("gi,ij,gj->g", missed, weights, missed)
    best, dof = int(chi2.argmin()), len(batches) - 2
    misfit = float(chi2[best]) / dof
    # Noise that was measured, or more of it where the branches scatter more. Source: Birge 1932, as in midrun.py.
    allowed = max(Z95**2, float(stats.t.ppf(0.5 + LEVEL / 2, dof)) ** 2 * misfit)
    inside = chi2 <= chi2[best] + allowed
    low, high = grid[inside][[0, -1]]
    open_low, open_high = bool(inside[0]), bool(inside[-1])
    value, least, most = (float(math.exp(v)) for v in (grid[best], low, high))
    if not (open_low or open_high):
        return _Fit(
            b_crit=Estimate(value=value, low=least, high=most),
            misfit=misfit,
            expected=expected(grid[best : best + 1])[0],
        )
    why = "no branch is significantly behind the smallest batch; try larger ones"
    if open_low:
        why = "every larger batch only saved steps as it cost tokens; try smaller ones"
    if open_low and open_high:
        why = "the noise hides how the branches differ; lengthen them"
    return _Fit(
        at_least=None if open_low else least,
        at_most=None if open_high else most,
        why_no_number=why,
        misfit=misfit,
        expected=expected(grid[best : best + 1])[0],
    )
