"""How a run would be executed on one GPU and on several: micro-batch, seconds, or why it does not fit.

Ranks are an execution setting: the plan proposes them, the schedule decides, and they may change between launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import TrainTable
from homelab_scaling.plan import cost, memory
from homelab_scaling.plan.cost import MeasuredRate, Rate
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.plan.ddp_times import DdpMeasurement
from homelab_scaling.plan.rules import tokens_trained
from homelab_scaling.runs import RUNS_FOLDERS, RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.sweep.room import need_of_run, why_no_room
from homelab_scaling.sweep.slots import Job, Unit


@dataclass(frozen=True, kw_only=True)
class Placer:
    """What decides how a run is executed on so many slots."""

    box: Box
    """As far as the slots reach."""
    n_slots: int
    train: TrainTable | None = None
    """The ladder's [train]; None keeps the ranks and the micro-batch that each spec has."""
    measured: Sequence[MeasuredRate] = ()
    ddp: DdpMeasurement | None = None
    """What `homelab ddp` measured here, by which the model knows what a second card brings."""

    def widths(self, spec: RunSpec) -> tuple[int, ...]:
        """Numbers of slots that this run may have, as far as its batch divides; a CPU slot holds all its ranks."""
        own = spec.execution.n_processes
        if not self.box.on_gpu:
            return (1,)
        if self.train is None or self.train.processes is not None:
            return (own if self.train is None else self.train.processes or own,)
        batch = spec.science.batch_seqs_global
        widths = tuple(k for k in range(1, self.n_slots + 1) if batch % k == 0)
        return widths[-1:] if spec.execution.sharding != "none" else widths

    def placed(self, spec: RunSpec, width: int) -> RunSpec | None:
        """The run on so many slots, with the largest micro-batch that fits; None where not one sequence does."""
        if not self.box.on_gpu or self.train is None:
            return spec
        per_rank, asked = spec.science.batch_seqs_global // width, self.train.microbatch_seqs_per_rank
        if asked is not None and per_rank % asked:
            return None
        micro = asked or self._largest_microbatch(spec, width, per_rank)
        if micro is None and ((need := need_of_run(spec, self.box.vram_bytes)) is None or need.fits):
            micro = 1  # with its states sharded, or its blocks recomputed
        if micro is None:
            return None
        placed = replace(spec.execution, n_processes=width, microbatch_seqs_per_rank=micro)
        return replace(spec, execution=placed)

    def _largest_microbatch(self, spec: RunSpec, width: int, per_rank: int) -> int | None:
        science, execution = spec.science, spec.execution
        return memory.largest_microbatch(
            science.shape,
            science.n_vocab,
            seqs_per_rank=per_rank,
            optimizer=science.optim.name,
            n_processes=width,
            precision=science.precision,
            card_bytes=self.box.vram_bytes,
            loss_path=None if execution.loss == "auto" else execution.loss,
            checkpointing=execution.activation_checkpointing,
            sharding=execution.sharding,
        )

    def rate(self, spec: RunSpec) -> Rate | None:
        """Tokens per second: measured on as many ranks, else the model scaled to what was measured on others."""
        ranks = spec.execution.n_processes
        modelled = self._modelled(spec)
        by_ranks: dict[int, list[MeasuredRate]] = {}
        for one in self.measured:
            by_ranks.setdefault(one.n_processes, []).append(one)
        own = self._modelled(spec, by_ranks.get(ranks, ()))
        if modelled is None or own is None or own != modelled:
            return own
        for others, rates in sorted(by_ranks.items()):
            there = self.placed(spec, others) if others in self.widths(spec) else None
            if there is None or others == ranks:
                continue
            seen, model = self._modelled(there, rates), self._modelled(there)
            if seen is not None and model is not None and seen != model:
                scale = seen.tokens_per_s / model.tokens_per_s
                return Rate(
                    tokens_per_s=modelled.tokens_per_s * scale,
                    basis=f"model scaled to what was measured on {others} rank{'s' * (others > 1)}",
                )
        return own

    def _modelled(self, spec: RunSpec, measured: Sequence[MeasuredRate] = ()) -> Rate | None:
        science, execution = spec.science, spec.execution
        return cost.predict_rate(
            science.shape,
            science.n_vocab,
            box=self.box,
            n_processes=execution.n_processes,
            microbatch_seqs=execution.microbatch_seqs_per_rank,
            accumulation_steps=execution.accumulation_steps(science),
            precision=science.precision,
            activation_checkpointing=execution.activation_checkpointing,
            sharding=execution.sharding,
            measured=measured,
            ddp=self.ddp,
        )

    def seconds(self, spec: RunSpec) -> float | None:
        """Predicted wall seconds of the whole run as its execution settings have it; None where no speed is known."""
        rate = self.rate(spec)
        if rate is None:
            return None
        n_trained, n_validated = work_of(spec)
        return cost.run_seconds(rate, n_tokens_trained=n_trained, n_tokens_validated=n_validated, box=self.box)

    def timed(self, spec: RunSpec, width: int) -> RunSpec | None:
        """`placed`, with its predicted seconds where they are known."""
        placed = self.placed(spec, width)
        if placed is None or not self.box.on_gpu or self.train is None:
            return placed
        return replace(placed, execution=replace(placed.execution, predicted_s=self.seconds(placed)))

    def jobs(self, runs: Sequence[tuple[RunSpec, float]]) -> tuple[list[Job], Unit]:
        """What the scheduler places, in seconds; in FLOPs where the speed of one of them is unknown.

        Args:
            runs: each with the share of it that is still to be done.

        Raises:
            SpecError: a run fits no number of slots that there are.
        """
        places = {spec.run_id: self._places(spec) for spec, _ in runs}
        times = {run_id: {k: self.seconds(spec) for k, spec in own.items()} for run_id, own in places.items()}
        known = all(seconds is not None for own in times.values() for seconds in own.values())
        jobs = []
        for spec, left in runs:
            amounts = {
                k: left * (seconds if known and seconds is not None else flops_of(spec) / k)
                for k, seconds in times[spec.run_id].items()
            }
            jobs.append(Job(run_id=spec.run_id, rung=spec.rung, seconds=amounts))
        return jobs, "s" if known else "FLOPs"

    def _places(self, spec: RunSpec) -> dict[int, RunSpec]:
        widths = self.widths(spec)
        within = [k for k in widths if k <= self.n_slots]
        if not within:
            raise SpecError(
                f"rung {spec.rung}: it is to train on {min(widths, default=1)} GPUs at once, and {self.n_slots} can be "
                "had; change train.processes or --gpus"
            )
        found = {k: placed for k in within if (placed := self.placed(spec, k)) is not None}
        if not found:
            need = need_of_run(spec, self.box.vram_bytes)
            raise SpecError(why_no_room(need) if need else f"rung {spec.rung}: not even one sequence fits the cards")
        return found


def work_of(spec: RunSpec) -> tuple[int, int]:
    """Tokens that a run trains, decays included, and tokens that it validates."""
    science, every = spec.science, spec.execution.curve_every_tokens
    trained = tokens_trained(science.horizons_tokens, science.batch_tokens_global, science.schedule.decay_frac)
    curves = trained // every * spec.execution.curve_tokens if every else 0
    return trained, len(science.horizons_tokens) * science.val_tokens + curves


def flops_of(spec: RunSpec) -> float:
    """Training FLOPs of the whole run."""
    return work_of(spec)[0] * flops_per_token(spec.science.shape, spec.science.n_vocab)


def lab_of_runs(runs: Sequence[tuple[RunSpec, RunFolder]]) -> Path:
    """LAB/<ladder>, in whose runs/ the folders lie."""
    parent = runs[0][1].path.resolve().parent
    return parent.parent if parent.name in RUNS_FOLDERS else parent
