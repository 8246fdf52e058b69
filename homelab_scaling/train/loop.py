"""The training loop: one run, from whatever is on disk to its last row.

Reads top to bottom: resume, then for each phase its updates, then its row. Everything that may differ between segments
comes from `session`; everything that decides the result comes from the science spec. The device is asked for numbers
only at log boundaries; commands, validations and checkpoints happen there, at the same step on every rank.

Shapes: B sequences of one micro-batch, T context.
"""

import contextlib
import datetime
import gc
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from homelab_scaling import codec
from homelab_scaling.data.batches import BatchOrder, n_windows, read_windows
from homelab_scaling.data.shards import Shards, open_shards
from homelab_scaling.errors import HomelabError, RunFailed, SpecError, Stopped
from homelab_scaling.runs import Row, RunFolder, RunRecord, RunStatus
from homelab_scaling.specs import RunSpec
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train.evaluate import Evaluator, Validation
from homelab_scaling.train.hooks import Hooks, MetricsFile, Progress, Trackers, surviving
from homelab_scaling.train.keeper import Keeper
from homelab_scaling.train.ledger import make_record, make_row
from homelab_scaling.train.meter import Meter, Pending
from homelab_scaling.train.model import LanguageModel, build_model, sdpa_backend
from homelab_scaling.train.optim import MaskedAdamW
from homelab_scaling.train.schedule import Phase, lr_at, phases
from homelab_scaling.train.session import (
    Choices,
    choose,
    describe_machine,
    max_over_ranks,
    start_accelerator,
    sum_over_ranks,
)
from homelab_scaling.train.stop import StopWish
from homelab_scaling.train.timing import Timing

GO_ON, SAVE, STOP = 0, 1, 2
"""Command codes, ordered by urgency; ranks obey the largest."""

EVAL_BATCH_TOKENS = 16_384


class Diverged(RunFailed):
    """A loss or gradient became non-finite; the weights were not touched by it."""


class Trainer:
    """One launch of one run.

    Args:
        spec: what to train.
        folder: where it lives; the caller holds its lock (main process).
        accelerator: from `session.start_accelerator`.
        choices: the resolved execution settings.
        hooks: told about steps, validations and rows (main process only).
        started: `time.monotonic()` of the process's start, so that start-up is on the bill.
    """

    def __init__(
        self,
        *,
        spec: RunSpec,
        folder: RunFolder,
        accelerator: Any,
        choices: Choices,
        hooks: list[Hooks],
        started: float,
    ) -> None:
        self.spec, self.folder, self.accelerator, self.choices, self.hooks = spec, folder, accelerator, choices, hooks
        self.science, self.execution = spec.science, spec.execution
        self.device: torch.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.plan = phases(self.science)
        self.accumulation = self.execution.accumulation_steps(self.science)
        self.machine = describe_machine(self.device, self.world_size)

        self.shards = _open_matching_shards(spec, folder)
        context = self.science.shape.context_tokens
        self.order = BatchOrder(n_windows(len(self.shards.train), context), self.science.seed)
        self.model: LanguageModel = build_model(
            self.science.shape, self.science.n_vocab, seed=self.science.seed, loss_path=choices.loss_path
        )
        if choices.compile:
            self.model.compile_in_place()
        self.wrapped = accelerator.prepare(self.model)
        self.optimizer = MaskedAdamW(self.model, self.science.optim)
        self.keeper = Keeper(
            self.folder.checkpoints,
            self.model,
            self.optimizer,
            science=self.science,
            data_id=self.shards.manifest.data_id,
        )
        self.evaluate_full = self._evaluator(self.science.val_tokens)
        self.evaluate_curve = self._evaluator(min(self.execution.curve_tokens, self.science.val_tokens))

        self.update = 0
        self.step = 0
        self.rows: tuple[Row, ...] = ()
        self.timing = Timing(ckpt.Clock(), started)
        self.meter = Meter(self.science, self.machine, self.device)
        self.first_interval = True
        self.last_saved = time.monotonic()
        self.stop = StopWish()

    def _evaluator(self, n_tokens: int) -> Evaluator:
        return Evaluator(
            self.shards,
            context_tokens=self.science.shape.context_tokens,
            n_tokens=n_tokens,
            rank=self.rank,
            world_size=self.world_size,
            batch_seqs=self._validation_batch(),
            device=self.device,
            sum_over_ranks=sum_over_ranks,
        )

    def _validation_batch(self) -> int:
        """Windows per forward pass; a compiled model keeps the shape it is compiled for."""
        if self.choices.compile:
            return self.execution.microbatch_seqs_per_rank
        return max(1, EVAL_BATCH_TOKENS // self.science.shape.context_tokens)

    # ------------------------------------------------------------------------------------------------ the whole run

    def run(self) -> RunRecord:
        """Trains to the last row and returns the record, which is on disk by then.

        Raises:
            Stopped: a signal asked for it; checkpointed, the same command goes on.
            Diverged: a non-finite loss or gradient.
        """
        try:
            first_phase = self.resume()
            with self.stop:
                for phase in self.plan[first_phase:]:
                    self.train_phase(phase)
                    if phase.earns_row:
                        self.finish_row(phase)
                        if phase.index + 1 < len(self.plan):
                            self.return_to_fork(phase)
            record = self.write_record("finished")
            self._tell("finished", record)
            return record
        except Stopped as stop:
            self.write_record("stopped", str(stop))
            raise
        except Diverged as error:
            self.write_record("diverged", str(error))
            raise
        except Exception as error:
            said = str(error) if isinstance(error, HomelabError) else f"{type(error).__name__}: {error}"
            self.write_record("failed", said.split("\n")[0])
            raise
        finally:
            self._tell("end")

    def train_phase(self, phase: Phase) -> None:
        """Every update of a phase that is not done yet."""
        validate_at = self._validation_steps(phase)
        if self.first_interval:
            self.timing.add(start_s=self.timing.lap())
        while self.step < phase.end_step:
            self.do_update(lr_at(self.science, phase, self.step))
            if self.first_interval and len(self.meter.pending) == 1:
                gc.collect()
                gc.freeze()  # long-lived objects are never scanned again; nanochat measured pauses of 500 ms
            saved_at = self.execution.checkpoint_every_steps
            at_log = self.step % self.execution.log_every_steps == 0
            at_save = saved_at is not None and self.step % saved_at == 0
            if at_log or at_save or self.step in validate_at or self.step == phase.end_step:
                self.boundary(phase, validate=self.step in validate_at, save=at_save)

    def do_update(self, lr: float) -> None:
        """One optimizer update at rate `lr`; leaves loss and gradient norm on the device."""
        loss_sum = torch.zeros((), device=self.device)
        for micro in range(self.accumulation):
            x_BT, y_BT = self.micro_batch(micro)
            is_last = micro == self.accumulation - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                loss = self.wrapped(x_BT, y_BT)
                # A loss that is not finite poisons its own gradients, so that every rank sees it in the averaged norm.
                poison = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
                self.accelerator.backward(loss * poison / self.accumulation)
            loss_sum += loss.detach() / self.accumulation
        norm = self.optimizer.clip()
        self.optimizer.step(lr, torch.isfinite(norm))
        self.optimizer.zero_grad()
        self.meter.add(Pending(step=self.step, lr=lr, loss=loss_sum, grad_norm=norm))
        self.step += 1
        self.update += 1

    def micro_batch(self, micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each, of this rank's `micro`-th slice of the current global batch."""
        size = self.execution.microbatch_seqs_per_rank
        first = self.step * self.science.batch_seqs_global + (micro * self.world_size + self.rank) * size
        windows = self.order.windows(first, size)
        window = read_windows(self.shards.train, windows, self.science.shape.context_tokens)
        tokens = torch.from_numpy(window.astype(np.int32))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        tokens = tokens.long()
        return tokens[:, :-1], tokens[:, 1:]

    # ------------------------------------------------------------------------------------------- once in a while

    def boundary(self, phase: Phase, *, validate: bool, save: bool) -> None:
        """Reads the device, then does what is due: log, validate, checkpoint, obey."""
        n_updates = len(self.meter.pending)
        lines, bad = self.meter.drain(phase, self.update)
        seconds = self.timing.lap()
        self.timing.book("train_s", phase, seconds)
        if not self.first_interval:  # that one holds compilation and cold caches
            self.timing.add(rated_tokens=n_updates * self.science.batch_tokens_global, rated_s=seconds)
        self.first_interval = False
        rate = self.meter.rate(phase, update=self.update, step=self.step, n_updates=n_updates, seconds=seconds)
        self._tell("steps", lines, rate)
        if bad is not None:
            raise Diverged(
                f"loss or gradient became non-finite at step {bad.step} "
                f"({bad.step * self.science.batch_tokens_global} tokens, lr {bad.lr:.3g}); "
                "lower this rung's learning rate and run it anew"
            )
        if validate:
            self.validate(phase, self.evaluate_curve, "curve")
        command = max_over_ranks(self._wish(save), self.device)
        at_fork = phase.kind == "trunk" and self.step == phase.end_step
        done = phase.earns_row and self.step == phase.end_step
        if at_fork or (command >= SAVE and not done):
            self.save_checkpoint(phase)
        if command == STOP and not done:
            raise Stopped(
                f"{self.stop.reason or 'another rank was asked to stop'} at step {self.step}; run again to go on"
            )

    def _validation_steps(self, phase: Phase) -> frozenset[int]:
        """Where the curve set is measured; the end of a decay is left to the full set."""
        every_tokens = self.execution.curve_every_tokens
        if every_tokens is None:
            return frozenset()
        every = max(1, every_tokens // self.science.batch_tokens_global)
        steps = set(range(every, phase.end_step + 1, every)) - ({phase.end_step} if phase.earns_row else set())
        return frozenset(s for s in steps if s > phase.start_step)

    def validate(self, phase: Phase, evaluator: Evaluator, which: str) -> Validation:
        """Measures the held-out loss and logs it."""
        with self.accelerator.autocast():
            result = evaluator.measure(self.model)
        if not math.isfinite(result.loss_nats):
            raise Diverged(f"the validation loss is not finite at step {self.step}; lower this rung's learning rate")
        self.timing.book("validate_s", phase, self.timing.lap())
        line = {
            "kind": "val",
            "update": self.update,
            "phase": phase.name,
            "step": self.step,
            "tokens": self.step * self.science.batch_tokens_global,
            "loss": result.loss_nats,
            "loss_se": result.loss_se_nats,
            "bpb": result.bpb,
            "set": which,
        }
        self._tell("validated", line)
        return result

    def _wish(self, save: bool) -> int:
        """What this rank wants; only the main rank looks at the clock, so that ranks never disagree about time."""
        if self.stop.reason is not None:
            return STOP
        overdue = self.is_main and time.monotonic() - self.last_saved > self.execution.checkpoint_every_s
        return SAVE if save or overdue else GO_ON

    # ------------------------------------------------------------------------------------- rows and checkpoints

    def finish_row(self, phase: Phase) -> None:
        """Full validation, the finished weights, the row, the record: in this order, so a row implies its weights."""
        result = self.validate(phase, self.evaluate_full, "full")
        if self.is_main:
            self.keeper.save_row(phase, step=self.step, update=self.update, clock=self.timing.clock)
            self.timing.book("checkpoint_s", phase, self.timing.lap())
            vram = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            row = make_row(
                spec=self.spec,
                corpus=self.shards.manifest,
                decay=phase,
                result=result,
                clock=self.timing.clock,
                machine=self.machine,
                peak_vram_bytes=vram,
            )
            self.rows = (*self.rows, row)
            self.write_record("running", "more rows to come")
            self.event(
                "row",
                row_id=row.row_id,
                update=self.update,
                weights_sha256=ckpt.tensors_hash(self.keeper.weights()),
                n_documents=result.n_documents,
                optimizer_state_bytes=self.optimizer.state_bytes(),
            )
            self._tell("row", row)
        self.accelerator.wait_for_everyone()

    def return_to_fork(self, decay: Phase) -> None:
        """Back to the trunk's state before `decay`; counts as progress, not as a resume."""
        self.keeper.load(ckpt.update_folder(self.folder.checkpoints, decay.first_update))
        self.step, self.update = decay.start_step, decay.end_update
        self.timing.book("checkpoint_s", decay, self.timing.lap())

    def save_checkpoint(self, phase: Phase) -> None:
        """Saves the resume state; every rank waits for it."""
        if self.is_main:
            self.timing.book("train_s", phase, self.timing.lap())
            self.keeper.save(phase, step=self.step, update=self.update, clock=self.timing.clock)
            self.timing.book("checkpoint_s", phase, self.timing.lap())
        self.accelerator.wait_for_everyone()
        self.timing.lap()
        self.last_saved = time.monotonic()

    def resume(self) -> int:
        """Takes up the newest usable state; returns the index of the phase to go on with."""
        record = self.folder.read_record()
        rows = record.rows if record is not None else ()
        point, skipped = self.keeper.take_up(self.plan, {row.n_tokens for row in rows})
        if point.clock is not None:
            self.timing.clock = point.clock
        self.step, self.update = point.step, point.update
        self.rows = tuple(row for row in rows if row.n_tokens in point.rows_kept)
        self.accelerator.wait_for_everyone()  # every rank has read the record before the main one replaces it
        self._announce(skipped)
        return point.phase_index

    def _announce(self, skipped: list[str]) -> None:
        """The segment's entry in events.jsonl; hooks learn what survived."""
        pids = self.accelerator.gather(torch.tensor([os.getpid()], device=self.device)).tolist()
        if self.is_main:
            kept = surviving(codec.read_jsonl(self.folder.metrics), self.update)
            batch = self.science.batch_tokens_global
            self._tell("start", kept, self.update * batch, self._about(skipped))
            self.event(
                "segment",
                update=self.update,
                step=self.step,
                pids=pids,
                n_processes=self.world_size,
                microbatch_seqs_per_rank=self.execution.microbatch_seqs_per_rank,
                accumulation=self.accumulation,
                device=self.machine.device,
                compile=self.choices.compile,
                compile_reason=self.choices.compile_reason,
                loss_path=self.choices.loss_path,
                loss_reason=self.choices.loss_reason,
                sdpa=sdpa_backend(self.model, self.device, self._compute_dtype()),
                skipped_checkpoints=skipped,
            )
            self.write_record("running", "in progress")

    def _about(self, skipped: list[str]) -> str:
        """The segment in a line: what `auto` became, and why; before it, each checkpoint that could not be used."""
        c = self.choices
        where = f"goes on at step {self.step}" if self.update else "starts"
        said = [f"{self.spec.run_id}: skipped checkpoint {why}" for why in skipped]
        said.append(
            f"{self.spec.run_id} {where} on {self.machine.device}, {self.world_size} x "
            f"{self.execution.microbatch_seqs_per_rank} sequences x {self.accumulation}, {self.science.precision}; "
            f"torch.compile {'on' if c.compile else 'off'} ({c.compile_reason}); {c.loss_path} loss ({c.loss_reason})"
        )
        return "\n".join(said)

    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.science.precision == "bf16" else torch.float32

    # ------------------------------------------------------------------------------------------------- telling

    def write_record(self, status: RunStatus, reason: str | None = None) -> RunRecord:
        """Replaces record.json (main process) and returns what it says."""
        record = make_record(
            spec=self.spec,
            rows=self.rows,
            machine=self.machine,
            clock=self.timing.clock,
            status=status,
            reason=reason,
        )
        if self.is_main:
            codec.write_json(self.folder.record, record)
            if status != "running":
                self.event("end", status=status, reason=reason, update=self.update)
        return record

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        codec.append_jsonl(self.folder.events, [{"kind": kind, "time": now, **fields}])

    def _tell(self, moment: str, *args: Any) -> None:
        if self.is_main:
            for hook in self.hooks:
                getattr(hook, moment)(*args)


def _open_matching_shards(spec: RunSpec, folder: RunFolder) -> Shards:
    """The run's shards, after checking that they are the ones its science names."""
    path = Path(spec.shards)
    shards = open_shards(path if path.is_absolute() else (folder.path / path).resolve())
    found = (shards.manifest.tokenizer_hash, shards.manifest.train.fingerprint, shards.manifest.val.fingerprint)
    wanted = (spec.science.tokenizer_hash, spec.science.train_fingerprint, spec.science.val_fingerprint)
    if found != wanted:
        raise SpecError(
            f"{shards.folder}: these shards are not the ones {spec.run_id} was planned on; restore them or plan again"
        )
    return shards


def train(spec: RunSpec, folder: RunFolder, *, started: float, extra_hooks: list[Hooks] | None = None) -> RunRecord:
    """Trains one run in this process (one rank of a launch) and returns its record; a finished run is left alone.

    Raises:
        MachineError: another process holds the folder, or the machine cannot do what the spec wants.
        Stopped, Diverged: as `Trainer.run`.
    """
    accelerator = start_accelerator(spec, folder.path)
    with folder.lock() if accelerator.is_main_process else contextlib.nullcontext():
        record = folder.read_record()
        if record is not None and record.status == "finished":
            return record
        choices = choose(spec, accelerator.device.type == "cuda")
        total = sum(p.n_updates for p in phases(spec.science)) * spec.science.batch_tokens_global
        hooks = [
            MetricsFile(folder),
            Trackers(accelerator, folder, spec),
            Progress(spec.run_id, total),
            *(extra_hooks or []),
        ]
        trainer = Trainer(
            spec=spec, folder=folder, accelerator=accelerator, choices=choices, hooks=hooks, started=started
        )
        return trainer.run()
