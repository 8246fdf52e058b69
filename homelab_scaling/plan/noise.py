"""What the plan decides about the noise scale of ordinary runs: the cadence of measuring, the first batch of a warm-up.

A measuring update costs a few per cent more than another: a norm of every gradient of every micro-batch. Where an
update is a single micro-batch, that one is cut in two; a compiled model keeps its shape and computes both parts at full
size, twice the work (batch/noise.py). So measuring updates are rare enough for `MAX_OVERHEAD_FRAC` on average, and in
long runs rarer: more than `GOOD_MEASUREMENTS` in a window measure nothing better than the scatter between windows.
"""

import math
from collections.abc import Callable
from typing import Literal

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.rules import GAP_WARN_FRAC, decay_steps, gap
from homelab_scaling.specs import BatchWarmup

MAX_OVERHEAD_FRAC = 0.03
"""Of training time, averaged over the measuring cadence."""
MIN_MEASUREMENTS = 8
"""Fewer measuring updates give a window no interval worth reading."""
GOOD_MEASUREMENTS = 64
N_WINDOWS = 20
"""Of a run, about: each twice as long as the one before, until it is a twentieth of the run."""

SHARDED = (
    "found sharded parameters (FSDP), wants whole ones: a rank would see a part of each gradient, already averaged; "
    "measure the noise scale under DDP or on one card"
)

Cutting = Literal["as trained", "in parts", "in full-size parts"]
OVERHEAD_FRAC: dict[Cutting, float] = {"as trained": 0.12, "in parts": 0.25, "in full-size parts": 1.12}
"""Of a measuring update's time, on the safe side: hooks cost most where kernels are short. A probe times its own."""


def every_steps(overhead_frac: float, max_frac: float = MAX_OVERHEAD_FRAC) -> int:
    """The cadence at which measuring updates that cost `overhead_frac` more cost at most `max_frac` on average."""
    return max(1, math.ceil(overhead_frac / max_frac))


def why_not_measured(batch_seqs: int, longest_phase: int, every: int) -> str | None:
    """Why a run at this cadence would never give a number; None where it would."""
    if batch_seqs < 2:
        return "a batch of 1 sequence has no two micro-batches to compare"
    if longest_phase < MIN_MEASUREMENTS * every:
        return (
            f"its longest stretch of {longest_phase} updates has no {MIN_MEASUREMENTS} measuring ones at one in {every}"
        )
    return None


def cadence(*, n_steps: int, n_passes: int, may_compile: bool) -> int:
    """Every how many updates a run measures where the ladder does not say.

    Args:
        n_steps: updates to the longest horizon.
        n_passes: micro-batches of an update, over all ranks.
    """
    cutting: Cutting = "as trained" if n_passes > 1 else "in full-size parts" if may_compile else "in parts"
    return max(every_steps(OVERHEAD_FRAC[cutting]), n_steps // (N_WINDOWS * GOOD_MEASUREMENTS))


def plan_cadence(
    ladder: Ladder,
    *,
    rung: str,
    horizons_tokens: tuple[int, ...],
    batch_tokens: int,
    n_passes: int,
    warn: Callable[[str], None],
) -> int | None:
    """ExecutionSpec.noise_every_steps of one run: as the ladder asks, else as is cheap; None where it would be no use.

    Raises:
        SpecError: it is asked for on sharded parameters.
    """
    asked, sharded = ladder.batch.noise_every_steps, ladder.train.sharding != "none"
    if asked == 0 or (asked is None and sharded):
        return None
    if sharded:
        raise SpecError(f"batch.noise_every_steps = {asked}: {SHARDED}, or remove the line")
    n_steps = horizons_tokens[-1] // batch_tokens
    every = asked or cadence(n_steps=n_steps, n_passes=n_passes, may_compile=ladder.train.compile != "off")
    decay_frac = None if ladder.schedule.name == "cosine" else ladder.schedule.decay_frac
    longest = longest_phase(horizons_tokens, batch_tokens, decay_frac)
    why_not = why_not_measured(batch_tokens // ladder.context_tokens, longest, every)
    if why_not is not None and asked is not None:
        warn(f"rung {rung}: batch.noise_every_steps = {asked} measures nothing: {why_not}")
    return None if why_not is not None else every


def longest_phase(horizons_tokens: tuple[int, ...], batch_tokens: int, decay_frac: float | None) -> int:
    """Updates of the longest trunk stretch or decay of a run; `decay_frac` None is a cosine, which has one phase."""
    ends = [tokens // batch_tokens for tokens in horizons_tokens]
    if decay_frac is None:
        return ends[-1]
    forks = [end - decay_steps(end, decay_frac) for end in ends]
    stretches = [fork - before for before, fork in zip([0, *forks], forks, strict=False)]
    return max(*stretches, *(end - fork for end, fork in zip(ends, forks, strict=True)))


def plan_warmup(
    ladder: Ladder, *, rung: str, batch_tokens: int, n_ranks: int, warn: Callable[[str], None]
) -> BatchWarmup | None:
    """The warm-up of one rung's batch; None where the ladder asks for none, or for one from that batch or above.

    The nearest batch of whole sequences on every rank, two at least, that reaches the rung's by doubling; the rungs of
    a ladder differ in their batch, so it is rounded by up to a factor of sqrt(2).

    Raises:
        SpecError: the nearest one is farther off, or parameters are sharded.
    """
    wanted_tokens, context_tokens = ladder.batch.warmup_from_tokens, ladder.context_tokens
    if wanted_tokens is None or wanted_tokens >= batch_tokens:
        return None
    if ladder.train.sharding != "none":
        raise SpecError(f"batch.warmup_from_tokens needs the noise scale: {SHARDED}, or remove the line")
    seqs = batch_tokens // context_tokens
    least = max(2, n_ranks)
    halves = [seqs >> k for k in range(seqs.bit_length()) if seqs % (1 << k) == 0]
    possible = [n * context_tokens for n in halves if n >= least and n % n_ranks == 0]
    nearest = min(possible, key=lambda tokens: abs(math.log(tokens / wanted_tokens)), default=batch_tokens)
    if max(nearest / wanted_tokens, wanted_tokens / nearest) > math.sqrt(2) + 1e-9:
        raise SpecError(
            f"rung {rung}: batch.warmup_from_tokens = {wanted_tokens:,} does not reach the batch of {batch_tokens:,} "
            f"tokens ({seqs} sequences on {n_ranks} rank{'s' * (n_ranks > 1)}) by doubling; the nearest that does is "
            f"{nearest:,}, or choose a batch with more factors of 2"
        )
    if abs(gap(wanted_tokens, nearest)) > GAP_WARN_FRAC:
        warn(
            f"rung {rung}: wanted a batch warm-up from {wanted_tokens:,} tokens, {nearest:,} is the nearest that "
            f"reaches {batch_tokens:,} by doubling ({gap(wanted_tokens, nearest):+.0%})"
        )
    return None if nearest == batch_tokens else BatchWarmup(from_tokens=nearest)
