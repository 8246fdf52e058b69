"""What the largest model's states and peak memory are with either optimizer: counted, predicted, measured."""

from dataclasses import dataclass

from homelab_scaling.plan.counting import count_params
from homelab_scaling.plan.memory import VramEstimate, choose_loss_path, predict_vram
from homelab_scaling.report.collect import LabView, RunView
from homelab_scaling.specs import ModelShape, OptimizerName

TYPICAL_MICROBATCH_TOKENS = 8192
"""For a prediction of memory where no run says its micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of the largest rung, with either optimizer."""

    rung: str
    n_params: int
    state_bytes: dict[OptimizerName, int]
    """Weights, gradients and moments."""
    estimates: dict[OptimizerName, VramEstimate]
    optimizer: OptimizerName
    """The ladder's own."""
    at: str
    """For which micro-batch, in words."""
    measured_bytes: int | None
    """The highest peak of that rung."""

    @property
    def saved_bytes(self) -> int:
        """What 8-bit moments save."""
        return self.state_bytes["adamw"] - self.state_bytes["adamw8bit"]

    @property
    def saved_of_state_frac(self) -> float:
        return self.saved_bytes / self.state_bytes["adamw"]

    @property
    def peak_bytes(self) -> int:
        """With AdamW: predicted, or the measured one (and what 8-bit moments saved of it put back)."""
        if self.measured_bytes is None:
            return self.estimates["adamw"].allocated_bytes
        return self.measured_bytes + (self.saved_bytes if self.optimizer == "adamw8bit" else 0)

    @property
    def saved_of_peak_frac(self) -> float:
        if self.measured_bytes is None:
            with_8bit, without = (self.estimates[o].allocated_bytes for o in ("adamw8bit", "adamw"))
            return 1 - with_8bit / without
        return self.saved_bytes / self.peak_bytes


def largest_memory(view: LabView) -> Memory | None:
    """Of the largest rung that was run, or planned; None where neither is known."""
    runs = [run for run in view.runs if run.spec is not None]
    if runs:
        return _memory_of(runs[-1])
    if not view.planned_shapes or view.n_vocab_planned is None:
        return None
    vocab = view.n_vocab_planned
    rung, shape = max(view.planned_shapes, key=lambda one: count_params(one[1], vocab).n_params)
    seqs = max(1, TYPICAL_MICROBATCH_TOKENS // shape.context_tokens)
    return _memory(rung, shape, vocab, microbatch_seqs=seqs)


def _memory_of(run: RunView) -> Memory:
    assert run.spec is not None
    science, execution = run.spec.science, run.spec.execution
    peaks = [row.peak_vram_bytes for row in run.rows if row.peak_vram_bytes is not None]
    return _memory(
        run.rung,
        science.shape,
        science.n_vocab,
        microbatch_seqs=execution.microbatch_seqs_per_rank,
        precision=science.precision,
        n_processes=execution.n_processes,
        checkpointing=execution.activation_checkpointing,
        optimizer=science.optim.name,
        measured_bytes=max(peaks, default=None) if execution.sharding == "none" else None,
    )


def _memory(
    rung: str,
    shape: ModelShape,
    n_vocab: int,
    *,
    microbatch_seqs: int,
    precision: str = "bf16",
    n_processes: int = 1,
    checkpointing: bool = False,
    optimizer: OptimizerName = "adamw8bit",
    measured_bytes: int | None = None,
) -> Memory:
    tokens = microbatch_seqs * shape.context_tokens
    names: tuple[OptimizerName, ...] = ("adamw", "adamw8bit")
    estimates = {
        name: predict_vram(
            shape,
            n_vocab,
            optimizer=name,
            microbatch_seqs=microbatch_seqs,
            n_processes=n_processes,
            precision="fp32" if precision == "fp32" else "bf16",
            loss_path=choose_loss_path(tokens, n_vocab, on_gpu=True),
            checkpointing=checkpointing,
        )
        for name in names
    }
    counts = count_params(shape, n_vocab)
    return Memory(
        rung=rung,
        n_params=counts.n_params,
        state_bytes={name: 8 * counts.n_stored + e.optimizer_bytes for name, e in estimates.items()},
        estimates=estimates,
        optimizer=optimizer,
        at=f"at {tokens:,} tokens at a time, by plan/memory.py",
        measured_bytes=measured_bytes,
    )
