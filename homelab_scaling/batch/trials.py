"""The trials of a sweep of batch sizes: which to run, how many steps each took to one loss, and what follows.

Legend: B batch, D_0 the tokens that the middle batch is trained on; the loss it has then is everybody's target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from homelab_scaling.batch.critical import TradeOff, fit_trade_off
from homelab_scaling.errors import DataError
from homelab_scaling.fit.words import listed

SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the middle batch: five over a factor of 16."""
RATES = (0.5, 1.0, 2.0)
"""Of the middle batch's rate times sqrt(B / B_middle): tried at every batch."""
MORE_RATES = 2
"""Where the best rate is the lowest or highest tried, the next factor of 2 is tried as well, this often."""
ROOM = 1.25
"""A trial may take this many times what the worst case of the hyperbola would."""
MIN_STEPS = 50
"""Of the middle batch to the target; the largest takes a quarter of them at least."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One short training run at one batch and rate."""

    run_id: str
    batch_tokens: int
    lr_peak: float
    n_steps: float | None
    """To the target loss, between validations by interpolation; None where it was not reached."""
    why_not: str | None


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep and its hyperbola."""

    rung: str
    target_nats: float
    target_tokens: int
    """D_0."""
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    """The fastest rate of each batch, ascending."""
    trade_off: TradeOff
    """Batches in tokens."""
    notes: tuple[str, ...]


def sweep_batches(b_crit_tokens: float, context_tokens: int, target_tokens: int) -> tuple[int, ...]:
    """Five batches [sequences] over a factor of 16 about B_crit, as far as sequences and steps allow.

    Raises:
        DataError: the target is too near for five batches of whole sequences.
    """
    most = target_tokens / MIN_STEPS / context_tokens
    if most < 1 / SIZES[0]:
        raise DataError(
            f"{target_tokens:,} tokens are too few for a sweep of batches: the middle one of "
            f"{round(context_tokens / SIZES[0]):,} tokens at least would get fewer than {MIN_STEPS} steps; lengthen "
            "the rung's smallest horizon"
        )
    middle = 2 ** round(math.log2(min(max(b_crit_tokens / context_tokens, 1 / SIZES[0]), most)))
    middle = middle if middle <= most else middle // 2
    return tuple(round(size * middle) for size in SIZES)


def most_tokens(batch_seqs: int, middle_seqs: int, target_tokens: int) -> float:
    """What a trial may take: at worst a larger batch needs as many steps, a smaller one as many tokens."""
    return ROOM * target_tokens * max(1.0, batch_seqs / middle_seqs)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Mean of each with its two neighbours; the ends with their one."""
    return [sum(part) / len(part) for i in range(len(losses)) for part in [losses[max(0, i - 1) : i + 2]]]


def crossing(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """The step at which the smoothed curve first comes down to `target`, log-linear in steps; None if it never does."""
    curve = smoothed(losses)
    for i, loss in enumerate(curve):
        if loss > target:
            continue
        if i == 0:
            return float(steps[0])
        share = (curve[i - 1] - target) / (curve[i - 1] - loss)
        return float(steps[i - 1] * math.pow(steps[i] / steps[i - 1], share))
    return None


def reached(losses: Sequence[float], target: float) -> bool:
    """Whether a curve is so far below that more of it cannot change where it crossed."""
    return len(losses) >= 3 and max(losses[-3:]) <= target


def more_rates(factors: Mapping[float, float | None]) -> float | None:
    """The next factor to try where the best one is at an edge; None where it is inside, or nothing was reached.

    Args:
        factors: factor -> steps (or loss) to be made small; None for a trial that failed.
    """
    good = {factor: value for factor, value in factors.items() if value is not None}
    if not good or len(factors) >= len(RATES) + MORE_RATES:
        return None
    best = min(good, key=lambda factor: good[factor])
    if best == max(factors):
        return best * 2
    return best / 2 if best == min(factors) else None


def summarise(
    trials: Sequence[Trial], *, rung: str, target_nats: float, target_tokens: int, edges: Sequence[int]
) -> SweepResult:
    """The fastest rate of each batch and the hyperbola through them.

    Args:
        edges: batches whose best rate is still the lowest or highest tried.

    Raises:
        DataError: fewer than four batches over a factor of 16 reached the target.
    """
    best: list[Trial] = []
    notes = []
    for batch in sorted({t.batch_tokens for t in trials}):
        found = [t for t in trials if t.batch_tokens == batch and t.n_steps is not None]
        if found:
            best.append(min(found, key=lambda t: t.n_steps or math.inf))
        else:
            reasons = dict.fromkeys(t.why_not or "" for t in trials if t.batch_tokens == batch)
            notes.append(f"{batch:,} tokens: left out, {listed(list(reasons))}")
    notes += [f"{batch:,} tokens: its best rate is at the edge of those tried" for batch in edges]
    return SweepResult(
        rung=rung,
        target_nats=target_nats,
        target_tokens=target_tokens,
        trials=tuple(trials),
        best=tuple(best),
        trade_off=fit_trade_off([t.batch_tokens for t in best], [t.n_steps or math.nan for t in best]),
        notes=tuple(notes),
    )
