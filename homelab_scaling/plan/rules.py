"""The arithmetic between a ladder's wishes and whole batches: shapes, batches, horizons, learning rates.

Legend: B batch in tokens, D training tokens, N parameters.
"""

import math
from dataclasses import dataclass

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import MAX_CURVE_POINTS_PER_ROW, LrTable, Rung, Validation
from homelab_scaling.plan.counting import count_params
from homelab_scaling.specs import MAX_WARMUP_FRAC, ModelShape

GAP_WARN_FRAC = 0.10
FEW_STEPS = 20
ASPECT = 64
"""Width over depth of the shapes chosen for a target size (GPT-2 small: 768 / 12)."""
MIN_LAYERS = 4
STEP_LAW_MIN_BODY, STEP_LAW_MIN_TOKENS = 40e6, 1e8


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A derived number and where it came from."""

    value: float
    source: str


def gap(wanted: float, actual: float) -> float:
    """Relative difference of what was got to what was wanted."""
    return actual / wanted - 1


def nearest_shape(n_params: int, n_vocab: int, context_tokens: int, *, tied: bool) -> ModelShape:
    """The shape whose total parameters come nearest: d a multiple of 32 (64 above 512), L near max(4, d / 64).

    A percent of size weighs as much as ten percent of depth, so a rung hits its target without odd proportions.
    """
    widths = [*range(32, 513, 32), *range(576, 4097, 64)]
    best: tuple[float, ModelShape] | None = None
    for d in widths:
        head = 64 if d % 64 == 0 and d >= 128 else 32
        usual = max(MIN_LAYERS, d / ASPECT)
        for layers in range(max(2, math.floor(usual / 1.5)), math.ceil(usual * 1.5) + 1):
            shape = ModelShape(n_layer=layers, d_model=d, n_head=d // head, context_tokens=context_tokens, tied=tied)
            actual = count_params(shape, n_vocab).n_params
            miss = abs(math.log(actual / n_params)) + 0.1 * abs(math.log(layers / usual))
            if best is None or miss < best[0]:
                best = (miss, shape)
    assert best is not None
    return best[1]


def step_law_batch(n_tokens: float) -> float:
    """Batch in tokens: B = 0.58 D^0.571.

    Source: Step Law (arXiv 2503.04715), fitted at N 0.2B to 1B and D 4B to 100B; on smaller sweeps its learning rate
    holds and its batch comes out about 1.6 times low.
    """
    return 0.58 * math.pow(n_tokens, 0.571)


def unmeasured_batch(table: LrTable, n_tokens: float | None) -> Choice:
    """Batch in tokens where none is given and none was measured: the one that the rate is for, at most Step Law's.

    Args:
        n_tokens: the longest horizon; None where it is not known before the batch, and only `at_batch_tokens` tells.

    Raises:
        SpecError: neither is there.
    """
    at = table.at_batch_tokens
    if n_tokens is None:
        if at is None:
            raise SpecError(
                "horizons.steps needs batch.tokens: without it the batch follows from D by Step Law, and D from the "
                "batch; write batch.tokens"
            )
        return Choice(value=at, source="[lr]")
    law = max(1, round(step_law_batch(n_tokens)))
    return Choice(value=at, source="[lr]") if at is not None and at <= law else Choice(value=law, source="Step Law")


def unmeasured_lr_scale(table: LrTable, batch_tokens: int) -> float:
    """On the rate at such a batch: lowered with it, but not raised, since nobody knows B_crit."""
    at = table.at_batch_tokens
    return 1.0 if at is None else math.sqrt(min(1.0, batch_tokens / at))


def step_law_lr(n_body: float, n_tokens: float) -> float:
    """Peak learning rate: 1.79 N_body^-0.713 D^0.307.

    Source: as `step_law_batch`.
    """
    return 1.79 * math.pow(n_body, -0.713) * math.pow(n_tokens, 0.307)


def scales_with_batch(rung: Rung, table: LrTable) -> bool:
    """Whether an advised batch may scale the rate: not one that is written down as a number."""
    return rung.lr_peak is None and table.rule != "fixed"


def choose_lr(rung: Rung, table: LrTable, n_body: int, n_tokens_largest: int) -> Choice:
    """The rung's peak learning rate and the rule that gave it."""
    if rung.lr_peak is not None:
        return Choice(value=rung.lr_peak, source="rung")
    if table.rule == "fixed":
        return Choice(value=table.peak, source="fixed")
    if table.rule == "power":
        value = table.peak * (n_body / table.at_body_params) ** table.exponent
        return Choice(value=value, source=f"power {table.exponent:g}")
    return Choice(value=step_law_lr(n_body, n_tokens_largest), source="Step Law")


def scaled_lr(lr: Choice, rung: Rung, table: LrTable, scale: float) -> Choice:
    """The rule's rate at an advised batch."""
    if not scales_with_batch(rung, table) or scale == 1:
        return lr
    return Choice(value=lr.value * scale, source=f"{lr.source} x {scale:.2f}")


def round_batch(wanted_tokens: float, context_tokens: int, *, n_ranks: int = 1, derived: bool = False) -> int:
    """A batch in whole sequences that splits over `n_ranks`, in tokens.

    Args:
        derived: the number came from a formula; then it is also rounded to a sixteenth of its octave (at most 3 %), so
            that it has divisors for ranks and micro-batches.
    """
    seqs = wanted_tokens / context_tokens
    grain = 2 ** max(0, math.floor(math.log2(max(seqs, 1))) - 4) if derived else 1
    grain = math.lcm(grain, n_ranks)
    return max(1, round(seqs / grain)) * grain * context_tokens


def round_horizon(wanted_tokens: float, batch_tokens: int, where: str) -> int:
    """The nearest whole number of batches, in tokens.

    Raises:
        SpecError: that would be none.
    """
    steps = round(wanted_tokens / batch_tokens)
    if steps < 1:
        raise SpecError(
            f"{where}: a horizon of {wanted_tokens:,.0f} tokens is less than one batch of {batch_tokens:,} tokens; "
            "lengthen the horizon or shrink the batch"
        )
    return steps * batch_tokens


def warmup_tokens(warmup_frac: float, smallest_horizon: int, batch_tokens: int) -> int:
    """Warm-up in whole batches, never more than a tenth of the smallest horizon."""
    steps = smallest_horizon / batch_tokens
    return min(round(warmup_frac * steps), math.floor(MAX_WARMUP_FRAC * steps)) * batch_tokens


def decay_steps(n_steps: int, decay_frac: float) -> int:
    """Whole steps of a WSD decay; at least one."""
    return max(1, round(decay_frac * n_steps))


def tokens_trained(horizons: tuple[int, ...], batch_tokens: int, decay_frac: float) -> int:
    """Tokens that one run processes: the longest horizon, and the decay of every shorter one beside the trunk."""
    *shorter, longest = horizons
    return longest + sum(decay_steps(h // batch_tokens, decay_frac) for h in shorter) * batch_tokens


def curve_cadence(validation: Validation, horizons: tuple[int, ...], batch_tokens: int) -> tuple[int | None, bool]:
    """Tokens between points of the validation curve, and whether the cap of 20 points a row stretched the wish.

    The wished number of points is met on the smallest horizon; the largest keeps at most 20.
    """
    smallest, largest = horizons[0], horizons[-1]
    if validation.curve_every_steps is not None:
        wanted = float(validation.curve_every_steps * batch_tokens)
    elif validation.curve_points_per_row == 0:
        return None, False
    else:
        wanted = smallest / validation.curve_points_per_row
    least = largest / MAX_CURVE_POINTS_PER_ROW
    every = math.ceil(max(wanted, least) / batch_tokens) * batch_tokens
    return every, validation.curve_every_steps is not None and wanted < least
