"""Predicted seconds, kilowatt-hours and money of a run, each with the ground it stands on.

A rate measured on this box beats every assumption; until there is one, a step is compute at an assumed share of the
card's peak, a floor for kernel launches, and what data-parallel traffic adds. Unknown stays None and says why.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling.box import Box
from homelab_scaling.plan.counting import count_params, flops_per_token, pad_vocab
from homelab_scaling.plan.ddp import ASSUMED_FABRIC, ddp_step
from homelab_scaling.plan.ddp_times import DdpMeasurement
from homelab_scaling.plan.peaks import find_card, peak_bf16_flops, why_no_peak
from homelab_scaling.runs import Row, readable_runs
from homelab_scaling.specs import ModelShape, Money, OptimizerName, Precision, Sharding

# CPU, fp32, our chunked loss: fitted to the quickstart's five rungs of 54k to 874k parameters (2 cores of a 2023 Xeon,
# vocabulary 2,048, batches of 8 x 128), which it reproduces within 18 %.
CPU_FLOPS_PER_CORE = 81e9
CPU_CORE_S_PER_LOGIT = 4e-9
CPU_S_PER_MICROSTEP = 0.003
CPU_BF16_SPEEDUP = 2.4
"""Of the matmuls, where the CPU has bf16 instructions (measured 2.4 at d = 256 and 512)."""
MAX_USEFUL_CORES = 8
CPU_START_S = 8.0

GPU_MFU_WIDE = 0.45
GPU_MFU_HALF_WIDTH = 128
"""Assumed MFU = 0.45 d / (d + 128): narrow models wait for memory (softmax over the vocabulary), wide ones compute."""
GPU_LAUNCH_S_PER_LAYER = 0.5e-3
GPU_LAUNCH_S = 1e-3
GPU_START_S = 45.0
"""Imports, CUDA context and the first compiled step."""
SHARDED_WAYS: dict[Sharding, float] = {"grad-op": 1.0, "full": 1.5}
"""Traffic of FSDP, in all-reduces of all parameters per forward and backward pass."""

VALIDATION_COST_FRAC = 1 / 3
"""Forward only, against forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Training speed over all ranks."""

    tokens_per_s: float
    basis: str
    """`measured on this box ...` or `assumed ...`."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRate:
    """Tokens per second that a finished row recorded, with what it was measured on."""

    shape: ModelShape
    n_vocab: int
    device: str
    n_processes: int
    precision: Precision
    tokens_per_s: float
    activation_checkpointing: bool = False
    sharding: Sharding = "none"
    optimizer: OptimizerName = "adamw"
    microbatch_seqs: int | None = None
    peak_vram_bytes: int | None = None
    """torch's max_memory_allocated; None on CPU."""
    watts: float | None = None
    """Mean power at the plug while it ran, from measured card energy; None where there was no sensor."""
    watts_err_frac: float | None = None


@dataclass(frozen=True, kw_only=True)
class Power:
    """Electrical power assumed while a run lasts."""

    watts: float
    basis: str


def measured_rates(labs: Iterable[Path]) -> tuple[MeasuredRate, ...]:
    """Every speed that the records of these labs hold; labs without runs and unreadable records give none."""
    return tuple(
        MeasuredRate(
            shape=spec.science.shape,
            n_vocab=spec.science.n_vocab,
            device=record.machine.device,
            n_processes=record.machine.n_processes,
            precision=spec.science.precision,
            tokens_per_s=row.tokens_per_s,
            activation_checkpointing=spec.execution.activation_checkpointing,
            sharding=spec.execution.sharding,
            optimizer=spec.science.optim.name,
            microbatch_seqs=spec.execution.microbatch_seqs_per_rank,
            peak_vram_bytes=row.peak_vram_bytes,
            watts=_measured_watts(row),
            watts_err_frac=row.kwh_wall_err_frac,
        )
        for _folder, spec, record in readable_runs(labs)
        for row in record.rows
        if row.tokens_per_s
    )


def _measured_watts(row: Row) -> float | None:
    if row.kwh_wall is None or not row.seconds or row.kwh_from == "stated watts":
        return None
    return row.kwh_wall * 3.6e6 / row.seconds


def predict_rate(
    shape: ModelShape,
    n_vocab: int,
    *,
    box: Box,
    n_processes: int,
    microbatch_seqs: int,
    accumulation_steps: int,
    precision: Precision,
    activation_checkpointing: bool = False,
    sharding: Sharding = "none",
    measured: Sequence[MeasuredRate] = (),
    ddp: DdpMeasurement | None = None,
) -> Rate | None:
    """Tokens per second over all ranks; None where no measurement and no assumption covers the device.

    Args:
        measured: speeds of finished rows, the best ground of all.
        ddp: what `homelab ddp` measured here: the times of a rung, else the bandwidth between cards.
    """
    asked = (shape, n_vocab, n_processes, precision, activation_checkpointing, sharding)
    same = [
        m.tokens_per_s
        for m in measured
        if (m.shape, m.n_vocab, m.n_processes, m.precision, m.activation_checkpointing, m.sharding) == asked
        and _is_here(m, box)
    ]
    if same:
        return Rate(
            tokens_per_s=statistics.median(same), basis=f"measured on this box ({len(same)} row{'s' * (len(same) > 1)})"
        )
    tokens_per_rank = microbatch_seqs * accumulation_steps * shape.context_tokens
    here = ddp if ddp is not None and ddp.is_of(box) else None
    if here is not None and not activation_checkpointing and sharding == "none":
        timed_s = here.step_s(shape, n_vocab, precision, n_ranks=n_processes, tokens_per_rank=tokens_per_rank)
        if timed_s is not None:
            return Rate(tokens_per_s=tokens_per_rank * n_processes / timed_s, basis=here.basis)
    if not box.on_gpu:
        compute_s = _cpu_step_s(
            shape, n_vocab, tokens_per_rank * n_processes, box.n_cores, precision, activation_checkpointing
        )
        step_s = compute_s + CPU_S_PER_MICROSTEP * accumulation_steps
        return Rate(tokens_per_s=tokens_per_rank * n_processes / step_s, basis="assumed (CPU model of plan/cost.py)")
    peak = peak_bf16_flops(box.device)
    if peak is None or precision != "bf16":
        return None
    mfu = GPU_MFU_WIDE * shape.d_model / (shape.d_model + GPU_MFU_HALF_WIDTH)
    compute_s = tokens_per_rank * asked_flops_per_token(shape, n_vocab, activation_checkpointing) / (peak * mfu)
    floor_s = accumulation_steps * (GPU_LAUNCH_S_PER_LAYER * shape.n_layer + GPU_LAUNCH_S)
    fabric = here.fabric if here else ASSUMED_FABRIC
    # Sharded parameters and gradients travel in every pass: gathered (full: twice) and reduced, half a ring each.
    rounds, ways = (accumulation_steps, SHARDED_WAYS[sharding]) if sharding != "none" else (1, 1.0)
    step = ddp_step(
        count_params(shape, n_vocab),
        max(compute_s, floor_s) / rounds,
        replace(fabric, bytes_per_s=fabric.bytes_per_s / ways),
        n_ranks=n_processes,
        n_passes=accumulation_steps // rounds,
    )
    between = f"; {fabric.basis}" if here and n_processes > 1 else ""
    return Rate(
        tokens_per_s=tokens_per_rank * n_processes / (rounds * step.seconds),
        basis=f"assumed (MFU {mfu:.0%} of {peak / 1e12:.1f} TFLOP/s per card{between})",
    )


def why_no_rate(box: Box, precision: Precision) -> str:
    """The reason to store where `predict_rate` gave None."""
    if peak_bf16_flops(box.device) is None:
        return f"{why_no_peak(box.device)}, so no speed can be assumed; the first run measures it"
    return f"no speed is assumed for {precision} on a GPU; the first run measures it"


def asked_flops_per_token(shape: ModelShape, n_vocab: int, activation_checkpointing: bool = False) -> float:
    """FLOPs per token asked of the hardware: with padded columns, and the blocks' forward twice where recomputed."""
    flops = flops_per_token(shape, n_vocab, padded=True)
    blocks = flops - 6 * pad_vocab(n_vocab) * shape.d_model
    return flops + (blocks / 3 if activation_checkpointing else 0.0)


def _cpu_step_s(  # noqa: PLR0917
    shape: ModelShape, n_vocab: int, n_tokens: int, n_cores: int, precision: Precision, recompute: bool
) -> float:
    """Matmuls at the assumed rate, softmax and cross-entropy by their logits."""
    cores = min(n_cores, MAX_USEFUL_CORES)
    speedup = CPU_BF16_SPEEDUP if precision == "bf16" else 1.0
    flops = n_tokens * asked_flops_per_token(shape, n_vocab, recompute)
    matmul_s = flops / (CPU_FLOPS_PER_CORE * speedup * cores)
    return matmul_s + n_tokens * pad_vocab(n_vocab) * CPU_CORE_S_PER_LOGIT / cores


def run_seconds(rate: Rate, *, n_tokens_trained: int, n_tokens_validated: int, box: Box) -> float:
    """Wall seconds of one launch: start, training with every decay, validation; checkpoints are small beside them."""
    start_s = GPU_START_S if box.on_gpu else CPU_START_S
    return start_s + (n_tokens_trained + VALIDATION_COST_FRAC * n_tokens_validated) / rate.tokens_per_s


def predict_power(
    box: Box,
    n_processes: int,
    stated_watts: float | None,
    *,
    shape: ModelShape | None = None,
    measured: Sequence[MeasuredRate] = (),
    money: Money | None = None,
) -> Power | None:
    """Watts while training, from the best ground there is; None where there is none.

    In this order: what the user states for this plan, what finished rows measured (of the same shape, else of any on as
    many ranks), what [money] states, the cards' rated board power.
    """
    if stated_watts is not None:
        return Power(watts=stated_watts, basis=f"stated: {stated_watts:g} W for the whole machine")
    seen = [m for m in measured if m.watts is not None and m.n_processes == n_processes and _is_here(m, box)]
    seen = [m for m in seen if m.shape == shape] or seen
    if seen:
        watts = statistics.median(m.watts or 0.0 for m in seen)
        err = max((m.watts_err_frac for m in seen if m.watts_err_frac is not None), default=None)
        basis = f"measured on this box ({len(seen)} row{'s' * (len(seen) > 1)}), at the wall plug"
        return Power(watts=watts, basis=basis + ("" if err is None else f", within {err:.0%}"))
    if money is not None and money.watts is not None:
        return Power(watts=money.watts, basis=f"stated in [money]: {money.watts:g} W for the whole machine")
    card = find_card(box.device) if box.on_gpu else None
    if card is None:
        return None
    watts = card.board_watts * n_processes
    return Power(
        watts=watts, basis=f"rated board power, {n_processes} x {card.board_watts} W (cards only, an upper bound)"
    )


def _is_here(seen: MeasuredRate, box: Box) -> bool:
    return seen.device == box.device or (not box.on_gpu and seen.device.startswith("cpu"))


def why_no_power(box: Box) -> str:
    """The reason to store where `predict_power` gave None."""
    return f"no watts are stated for {box.device}; give --watts, or [money] watts"


def kwh_of(seconds: float, power: Power) -> float:
    """Kilowatt-hours."""
    return power.watts * seconds / 3.6e6


def usd_parts(seconds: float | None, kwh: float | None, money: Money) -> tuple[float | None, float | None]:
    """Money for energy and for machine time by the [money] table; None where amount or price is unknown."""
    per_kwh, per_hour = money.usd_per_kwh, money.usd_per_machine_hour
    return (
        None if kwh is None or per_kwh is None else kwh * per_kwh,
        None if seconds is None or per_hour is None else seconds / 3600 * per_hour,
    )


def usd_of(seconds: float | None, kwh: float | None, money: Money) -> float | None:
    """Energy and machine time together, as far as they are known; None where neither is."""
    parts = [part for part in usd_parts(seconds, kwh, money) if part is not None]
    return sum(parts) if parts else None
