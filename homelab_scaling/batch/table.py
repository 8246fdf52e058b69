"""What each batch costs on this machine: steps, tokens, hours, kWh and money to one and the same loss.

A row reaches the loss that the rung's longest horizon D reaches with a batch far below critical: D (1 + B / B_crit)
tokens in D / B_crit (1 + B_crit / B) steps.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.batch.priors import OVERHEAD_FRAC
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan import cost, memory
from homelab_scaling.plan.cost import MeasuredRate
from homelab_scaling.plan.parts import RungPlan
from homelab_scaling.plan.rules import FEW_STEPS
from homelab_scaling.runs import RunFolder, RunRecord, readable_runs
from homelab_scaling.specs import ModelShape, Precision

REAL_GAIN_FRAC = 0.02
"""Less time saved than this is not worth a larger batch: it is within the repeatability of a measured speed."""
TUNED_GAIN_FRAC = 0.10
"""Less time saved than this is not worth leaving the batch that the rate was tuned at: scaling a rate by sqrt(B) is a
risk of its own (quickstart's 110k rung loses 0.18 nats at 1.7 times its best rate)."""
SHORTEST_STEPS = 500
"""Of the smallest horizon, at a batch that is advised. B_crit early in training is far below that of mid-run, and a
short run never makes good what it lost there: at 2,048 tokens instead of 1,024, its rate by the square root, the
quickstart's 54k rung was 0.30 nats worse after 293 steps, 0.10 after 586, level after 1,172; the 238k rung 0.51, 0.50
and 0.32."""
TOO_FEW = f"would leave the shortest horizon fewer than {SHORTEST_STEPS} steps"
MIN_INTERVALS = 3
"""Fewer log intervals than this tell no speed."""
BEYOND_CRITICAL = 4.0
"""The table ends at this many times B_crit."""


@dataclass(frozen=True, kw_only=True)
class BatchRate:
    """Tokens per second measured on this machine at one batch."""

    shape: ModelShape
    n_vocab: int
    precision: Precision
    device: str
    n_processes: int
    batch_seqs: int
    microbatch_seqs: int
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One batch."""

    batch_tokens: int
    batch_seqs: int
    n_processes: int
    microbatch_seqs_per_rank: int
    accumulation_steps: int
    n_steps: float
    tokens: float
    overhead_frac: float
    """Tokens above those of a small batch."""
    tokens_per_s: float | None
    rate_basis: str
    seconds: float | None
    kwh: float | None
    usd: float | None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a rung's rows have in common."""

    rung: RungPlan
    n_vocab: int
    box: Box
    ladder: Ladder
    measured: Sequence[MeasuredRate] = ()
    """For power."""
    rates: Sequence[BatchRate] = ()
    watts: float | None = None

    @property
    def shape(self) -> ModelShape:
        return self.rung.size.shape

    @property
    def horizon_tokens(self) -> int:
        """The longest."""
        return self.rung.training.horizons[-1].tokens


def measured_batch_rates(labs: Iterable[Path]) -> tuple[BatchRate, ...]:
    """Every speed that the runs of these labs reached, with the batch and the split they reached it with."""
    return tuple(
        BatchRate(
            shape=spec.science.shape,
            n_vocab=spec.science.n_vocab,
            precision=spec.science.precision,
            device=record.machine.device,
            n_processes=record.machine.n_processes,
            batch_seqs=spec.science.batch_seqs_global,
            microbatch_seqs=spec.execution.microbatch_seqs_per_rank,
            tokens_per_s=speed,
        )
        for folder, spec, record in readable_runs(labs)
        if (speed := _speed(record, folder)) is not None
    )


def _speed(record: RunRecord, folder: RunFolder) -> float | None:
    """Of the rows, or of what was trained where a trial was stopped before its first; None where that is too little."""
    rates = [row.tokens_per_s for row in record.rows if row.tokens_per_s]
    if rates:
        return statistics.median(rates)
    # The first interval holds compilation and cold caches.
    lines = [line for line in codec.read_jsonl(folder.metrics) if line["kind"] == "rate"][1:]
    seconds = sum(line["interval_s"] for line in lines)
    return sum(line["interval_tokens"] for line in lines) / seconds if len(lines) >= MIN_INTERVALS else None


def trade_off_table(setting: Setting, b_crit_tokens: float, also_tokens: Iterable[int] = ()) -> tuple[Row, ...]:
    """Rows from one sequence to four times B_crit, ascending, each split so that it fits the card.

    Args:
        also_tokens: batches to show beside the grid of 1, 2, 3, 4, 6, 8, 12 ... sequences, such as the ladder's own.

    Raises:
        SpecError: not even one sequence fits the card.
    """
    context = setting.shape.context_tokens
    # No batch that would leave the smallest horizon fewer than 20 steps.
    most = max(1, setting.rung.training.horizons[0].tokens // FEW_STEPS // context)
    most = min(most, max(2, math.ceil(BEYOND_CRITICAL * b_crit_tokens / context)))
    grid = {2**k for k in range(40)} | {3 * 2**k for k in range(40)} | {max(1, t // context) for t in also_tokens}
    rows = [_row(setting, seqs, b_crit_tokens) for seqs in sorted(grid) if seqs <= most]
    fitting = tuple(row for row in rows if row is not None)
    if not fitting:
        raise _fits_no_card(setting)
    return fitting


def row_at(setting: Setting, batch_tokens: int, b_crit_tokens: float) -> Row:
    """The row of one batch, however few steps it leaves.

    Raises:
        SpecError: not even one sequence fits the card.
    """
    row = _row(setting, batch_tokens // setting.shape.context_tokens, b_crit_tokens)
    if row is None:
        raise _fits_no_card(setting)
    return row


def _fits_no_card(setting: Setting) -> SpecError:
    return SpecError(
        f"rung {setting.rung.name}: not even one sequence of {setting.shape.context_tokens} tokens fits the card; "
        "shorten context_tokens, narrow the model or take a larger card"
    )


def _row(setting: Setting, seqs: int, b_crit_tokens: float) -> Row | None:
    split = split_batch(setting, seqs)
    if split is None:
        return None
    ranks, micro, accumulation = split
    batch = seqs * setting.shape.context_tokens
    overhead = batch / b_crit_tokens
    tokens = setting.horizon_tokens * (1 + overhead)
    rate, basis = rate_of(setting, ranks, micro, accumulation)
    seconds = None if rate is None else tokens / rate
    power = cost.predict_power(
        setting.box,
        ranks,
        setting.watts,
        shape=setting.shape,
        measured=setting.measured,
        money=setting.ladder.money,
    )
    kwh = None if seconds is None or power is None else cost.kwh_of(seconds, power)
    return Row(
        batch_tokens=batch,
        batch_seqs=seqs,
        n_processes=ranks,
        microbatch_seqs_per_rank=micro,
        accumulation_steps=accumulation,
        n_steps=tokens / batch,
        tokens=tokens,
        overhead_frac=overhead,
        tokens_per_s=rate,
        rate_basis=basis,
        seconds=seconds,
        kwh=kwh,
        usd=cost.usd_of(seconds, kwh, setting.ladder.money),
    )


def split_batch(setting: Setting, seqs: int) -> tuple[int, int, int] | None:
    """Ranks, sequences of a micro-batch, accumulation; None where the card holds not one sequence.

    As many ranks as there are cards (or as the ladder says) and the batch divides by; the largest micro-batch that
    fits, unless the ladder fixes one.
    """
    ladder, box = setting.ladder, setting.box
    wished = ladder.train.processes or max(1, box.n_gpus)
    ranks = next(k for k in range(wished, 0, -1) if seqs % k == 0)
    fixed = ladder.train.microbatch_seqs_per_rank
    if fixed is not None and (seqs // ranks) % fixed == 0:
        return ranks, fixed, seqs // ranks // fixed
    micro = memory.largest_microbatch(
        setting.shape,
        setting.n_vocab,
        seqs_per_rank=seqs // ranks,
        optimizer=ladder.optim.name,
        n_processes=ranks,
        precision=setting.rung.training.precision,
        card_bytes=box.vram_bytes,
        loss_path=None if ladder.train.loss == "auto" else ladder.train.loss,
        checkpointing=ladder.train.activation_checkpointing,
        sharding=ladder.train.sharding,
    )
    return None if micro is None else (ranks, micro, seqs // ranks // micro)


def rate_of(setting: Setting, ranks: int, micro: int, accumulation: int) -> tuple[float | None, str]:
    """Tokens per second and its ground: measured at this batch, the cost model scaled to what was, or the model."""
    seqs = ranks * micro * accumulation
    own = [rate for rate in setting.rates if _same_model(setting, rate) and rate.n_processes == ranks]
    here = [rate.tokens_per_s for rate in own if rate.batch_seqs == seqs]
    if here:
        return statistics.median(here), f"measured ({len(here)})"
    predicted = _predict(setting, ranks, micro, accumulation)
    if predicted is None:
        return None, cost.why_no_rate(setting.box, setting.rung.training.precision)
    scales = []
    for rate in own:
        model = _predict(setting, ranks, rate.microbatch_seqs, rate.batch_seqs // ranks // rate.microbatch_seqs)
        if model is not None:
            scales.append(rate.tokens_per_s / model.tokens_per_s)
    if scales:
        return predicted.tokens_per_s * statistics.median(scales), f"model scaled to {len(scales)} measured"
    return predicted.tokens_per_s, predicted.basis


def _predict(setting: Setting, ranks: int, micro: int, accumulation: int) -> cost.Rate | None:
    return cost.predict_rate(
        setting.shape,
        setting.n_vocab,
        box=setting.box,
        n_processes=ranks,
        microbatch_seqs=micro,
        accumulation_steps=accumulation,
        precision=setting.rung.training.precision,
    )


def _same_model(setting: Setting, rate: BatchRate) -> bool:
    here = rate.device == setting.box.device or (not setting.box.on_gpu and rate.device.startswith("cpu"))
    wanted = (setting.shape, setting.n_vocab, setting.rung.training.precision)
    return here and (rate.shape, rate.n_vocab, rate.precision) == wanted


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The row taken, and why in a sentence."""

    row: Row
    why: str


def choose_row(
    rows: Sequence[Row],
    overhead_max_frac: float = OVERHEAD_FRAC,
    *,
    tuned_tokens: int | None = None,
    tuned_least_frac: float | None = None,
    most_tokens: int | None = None,
) -> Choice:
    """The largest batch within the overhead that saves real time against every smaller one.

    Without any speed, the largest within the overhead. Where none is within it, the smallest there is.

    Args:
        tuned_tokens: the batch that the rate was tuned at: within the overhead it is left only for a gain in time that
            is worth scaling the rate by a rule.
        tuned_least_frac: its overhead by the upper end of B_crit's interval: within the allowed, it is not left for a
            smaller one, because a batch that may be right is better than a rate that nobody tuned (on two cores, 128
            tokens at the scaled rate ended .42 nat behind 1,024 at the tuned one: recipes/LOG.md).
        most_tokens: no larger batch is taken, whatever it saves.
    """
    allowed = [row for row in rows if row.overhead_frac <= overhead_max_frac]
    tuned = next((row for row in rows if row.batch_tokens == tuned_tokens), None)
    if tuned is not None and tuned not in allowed and (tuned_least_frac or math.inf) <= overhead_max_frac:
        return Choice(
            row=tuned,
            why=f"the rate was tuned at it, and B_crit is not known well enough to leave it: {tuned.overhead_frac:.0%} "
            f"more tokens than a small batch would need by its value, {tuned_least_frac:.0%} by the upper end of its "
            "interval",
        )
    if not allowed:
        row = rows[0]
        return Choice(
            row=row,
            why=f"the smallest that can be run; it already costs {row.overhead_frac:.0%} more tokens than a smaller "
            f"one would, above the {overhead_max_frac:.0%} allowed",
        )
    if most_tokens is not None and allowed[-1].batch_tokens > most_tokens:
        fewer = [row for row in allowed if row.batch_tokens <= max(most_tokens, allowed[0].batch_tokens)]
        found = _fastest(fewer, rows[: len(fewer) + 1], overhead_max_frac, tuned_tokens)
        return replace(found, why=f"{found.why}; more than {most_tokens:,} {TOO_FEW}")
    return _fastest(allowed, rows, overhead_max_frac, tuned_tokens)


def _fastest(allowed: Sequence[Row], rows: Sequence[Row], overhead_max_frac: float, tuned_tokens: int | None) -> Choice:
    taken, top = allowed[0], allowed[-1]
    for row in allowed[1:]:
        if row.seconds is None or taken.seconds is None or row.seconds < taken.seconds * (1 - REAL_GAIN_FRAC):
            taken = row
    tuned = next((row for row in allowed if row.batch_tokens == tuned_tokens), None)
    if tuned is not None and tuned is not taken and tuned.seconds is not None and taken.seconds is not None:
        gained = 1 - taken.seconds / tuned.seconds
        if gained < TUNED_GAIN_FRAC:
            how = f"save {gained:.0%} of the time" if gained >= 0 else f"take {-gained:.0%} more time"
            return Choice(
                row=tuned,
                why=f"{tuned.overhead_frac:.0%} more tokens than a small batch would need, and the rate was tuned at "
                f"it; {taken.batch_tokens:,} tokens ({taken.overhead_frac:.0%}) would {how}, and a tuned rate is "
                f"scaled for a gain of {TUNED_GAIN_FRAC:.0%}",
            )
    head = f"{taken.overhead_frac:.0%} more tokens than a small batch would need"
    if taken.seconds is None:
        return Choice(row=taken, why=f"{head}, the most allowed; no speed is known to weigh against it")
    after = next((row for row in rows if row.batch_tokens > top.batch_tokens), None)
    if taken is top:
        rest = f"; {after.batch_tokens:,} tokens would cost {after.overhead_frac:.0%}" if after else ""
        return Choice(row=taken, why=f"{head} and the fastest within {overhead_max_frac:.0%}{rest}")
    assert top.seconds is not None
    gained = 1 - top.seconds / taken.seconds
    how = f"saves only {gained:.1%} of the time" if gained > 0 else f"takes {-gained:.1%} more time"
    return Choice(
        row=taken,
        why=f"{head}; a larger batch of {top.batch_tokens:,} tokens ({top.overhead_frac:.0%}) {how}: the machine is "
        "saturated",
    )
