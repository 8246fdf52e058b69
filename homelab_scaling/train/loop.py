"""The training loop: one run, from whatever is on disk to its last row.

Reads top to bottom: resume, then for each phase its updates, then its row. Everything that may differ between segments
comes from `session`; everything that decides the result comes from the science spec. One step is in `step`. The device
is asked for numbers only at log boundaries; validations and checkpoints happen there, at the same step on every rank,
and where a window of the noise scale ends there is one too. Signals and the watchdog's orders are met in `obey`.
"""

import contextlib
import gc
import math
import os
import time
from functools import partial
from typing import Any

import torch

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.runs import Row, RunFolder, RunRecord, RunStatus, StoppedBy
from homelab_scaling.specs import RunSpec
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train import oom, oom_notes
from homelab_scaling.train.batch_warmup import grows
from homelab_scaling.train.evaluate import Evaluator, Validation
from homelab_scaling.train.hooks import Hooks, Line, MetricsFile, Progress, surviving
from homelab_scaling.train.journal import Diverged, Journal, how_it_ended
from homelab_scaling.train.keeper import Keeper
from homelab_scaling.train.ledger import make_record, make_row
from homelab_scaling.train.obey import Agreed, Code, Obey
from homelab_scaling.train.orders import connect
from homelab_scaling.train.ranks import Ranks
from homelab_scaling.train.schedule import Phase, lr_at, phases, validation_steps
from homelab_scaling.train.session import Choices, about_segment, choose, start_accelerator, sum_over_ranks
from homelab_scaling.train.step import Stepper
from homelab_scaling.train.stop import StopWish
from homelab_scaling.train.timing import Timing
from homelab_scaling.train.trackers import Trackers
from homelab_scaling.watch.energy import read_wall_model

EVAL_BATCH_TOKENS = 16_384


class Trainer(Stepper):
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
        journal = Journal(folder, hooks, is_main=accelerator.is_main_process)
        super().__init__(spec, folder, accelerator, choices, journal)
        self.plan = phases(self.science)
        self.keeper = Keeper(
            self.folder.checkpoints,
            self.optimizer,
            science=self.science,
            data_id=self.shards.manifest.data_id,
            is_main=self.is_main,
        )
        evaluator = partial(
            Evaluator,
            self.shards,
            context_tokens=self.science.shape.context_tokens,
            rank=self.rank,
            world_size=self.world_size,
            batch_seqs=self._validation_batch(),
            device=self.device,
            sum_over_ranks=sum_over_ranks,
        )
        self.evaluate_full = evaluator(n_tokens=self.science.val_tokens)
        self.evaluate_curve = evaluator(n_tokens=min(self.execution.curve_tokens, self.science.val_tokens))

        self.rows: tuple[Row, ...] = ()
        self.saved_update: int | None = None
        self.stop = StopWish()
        self.ranks = Ranks(self.world_size)
        self.watched = connect(spec, folder, accelerator, self.ranks, self.journal.event)
        self.timing = Timing(ckpt.Clock(), started, self.watched.meter)
        self.obey = Obey(
            ranks=self.ranks,
            orders=self.watched.orders,
            stop=self.stop,
            timing=self.timing,
            device=self.device,
            is_main=self.is_main,
            log_every_steps=self.execution.log_every_steps,
            checkpoint_every_s=self.execution.checkpoint_every_s,
            event=self.journal.event,
        )

    def _validation_batch(self) -> int:
        """Windows per forward pass; a compiled model keeps the shape it is compiled for."""
        if self.choices.compile:
            return self.split.microbatch_seqs
        return max(1, EVAL_BATCH_TOKENS // self.science.shape.context_tokens)

    # ------------------------------------------------------------------------------------------------ the whole run

    def run(self) -> RunRecord:
        """Trains to the last row and returns the record, which is on disk by then.

        Raises:
            Stopped: a signal asked for it, or memory ran out; checkpointed, the same command goes on.
            StoppedByWatchdog: to protect a card; the same.
            Diverged: a non-finite loss or gradient.
        """
        try:
            with self.stop, self.watched.orders or contextlib.nullcontext():
                for phase in self.plan[self.resume() :]:
                    self.train_phase(phase)
                    if phase.earns_row:
                        self.finish_row(phase)
                        if phase.index + 1 < len(self.plan):
                            self.return_to_fork(phase)
            self.keeper.wait()
            record = self.write_record("finished")
            self.journal.tell("finished", record)
            return record
        except Exception as error:
            ended = error
            if self.world_size > 1 and not isinstance(error, HomelabError):
                ended = oom_notes.end_of_segment(self.folder) or error
            self.keeper.close()
            self.write_record(*how_it_ended(ended))
            if ended is error:
                raise
            raise ended from error
        finally:
            self.journal.tell("end")

    def train_phase(self, phase: Phase) -> None:
        """Every update of a phase that is not done yet."""
        validate_at = validation_steps(self.science, phase, self.execution.curve_every_tokens)
        self.noise.enter(phase, self.halvings)
        if self.first_interval:
            self.timing.book_start(self.timing.lap())
        while self.step < phase.end_step:
            began = time.monotonic()
            self.do_update(lr_at(self.science, phase, self.step))
            self.obey.after_update(began)
            if self.first_interval and len(self.meter.pending) == 1:
                gc.collect()
                gc.freeze()  # long-lived objects are never scanned again; nanochat measured pauses of 500 ms
            saved_at = self.execution.checkpoint_every_steps
            at_log = self.step % self.execution.log_every_steps == 0 or self.noise.ends_at(self.step)
            at_save = saved_at is not None and self.step % saved_at == 0
            if at_log or at_save or self.step in validate_at or self.step == phase.end_step:
                self.boundary(phase, validate=self.step in validate_at, save=at_save)
            elif self.obey.due(self.update) and (agreed := self.obey.look(self.update)).acts:
                self.boundary(phase, agreed=agreed)

    def split_anew(self, halvings: int) -> None:
        """Another cut of the step; a compiled model validates in the size that it is compiled for."""
        before = self.split
        super().split_anew(halvings)
        if self.choices.compile and self.split != before:
            for evaluator in (self.evaluate_full, self.evaluate_curve):
                evaluator.batch_seqs = min(self._validation_batch(), evaluator.most_windows)

    # ------------------------------------------------------------------------------------------- once in a while

    def boundary(
        self, phase: Phase, *, validate: bool = False, save: bool = False, agreed: Agreed | None = None
    ) -> None:
        """Reads the device, then does what is due: log, validate, checkpoint, obey."""
        self.keeper.check()
        n_updates = len(self.meter.pending)
        lines, bad = self.meter.drain(phase, self.update)
        seconds = self.timing.lap()
        self.timing.book("train_s", phase, seconds)
        self.obey.note_step(seconds / n_updates)
        if not self.first_interval:
            self.timing.add(rated_tokens=n_updates * self.science.batch_tokens_global, rated_s=seconds)
        self.first_interval = False
        rate = self.meter.rate(phase, update=self.update, step=self.step, n_updates=n_updates, seconds=seconds)
        rate |= self.timing.energy()
        self.journal.tell("steps", lines, rate)
        if bad is not None:
            raise Diverged(
                f"loss or gradient became non-finite at step {bad.step} "
                f"({bad.step * self.science.batch_tokens_global} tokens, lr {bad.lr:.3g}); "
                "lower this rung's learning rate and run it anew"
            )
        self.heed_noise(phase, lines)
        if validate:
            self.validate(phase, self.evaluate_curve, "curve")
        done = phase.earns_row and self.step == phase.end_step
        at_fork = phase.kind == "trunk" and self.step == phase.end_step
        agreed = agreed or self.obey.look(self.update, save=save)
        if at_fork or ((agreed.save or agreed.stops) and not done):
            self.save_checkpoint(phase)
        if agreed.code == Code.PAUSE:
            agreed = self.obey.pause(self.update, agreed.reason)
            self.timing.book("paused_s", phase, self.timing.lap())
        if agreed.stops and not done:
            self.save_checkpoint(phase)
            self.keeper.wait()
            raise agreed.error(self.step)

    def heed_noise(self, phase: Phase, lines: list[Line]) -> None:
        """Keeps what was heard; where a window ends, logs its noise scale and perhaps doubles a batch that warms up."""
        self.noise.collect(lines)
        line = self.noise.finish(self.step, self.update)
        if line is None:
            return
        self.journal.tell("noise", line)
        # Agreed, lest a last bit part the ranks.
        if self.halvings and self.ranks.max([grows(line, self.science, self.halvings)])[0]:
            self.split_anew(self.halvings - 1)
            self.noise.enter(phase, self.halvings)
            if self.is_main:
                found = {key: line[key] for key in ("update", "step", "tokens", "noise_scale_tokens")}
                self.journal.event("batch", **found, batch_tokens=self.batch_tokens)

    def validate(self, phase: Phase, evaluator: Evaluator, which: str) -> Validation:
        """Measures the held-out loss and logs it."""
        with self.accelerator.autocast():
            result = oom.measure(evaluator, self.model, self.journal.event)
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
        self.journal.tell("validated", line)
        return result

    # ------------------------------------------------------------------------------------- rows and checkpoints

    def finish_row(self, phase: Phase) -> None:
        """Full validation, the finished weights, the row, the record: in this order, so a row implies its weights."""
        result = self.validate(phase, self.evaluate_full, "full")
        sha256 = self.keeper.save_row(phase, step=self.step, update=self.update, clock=self.timing.clock)
        if self.is_main:
            self.timing.book("checkpoint_s", phase, self.timing.lap())
            vram = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            row = make_row(
                spec=self.spec,
                corpus=self.shards.manifest,
                decay=phase,
                result=result,
                clock=self.timing.clock,
                machine=self.machine,
                wall=read_wall_model(self.watched.machine),
                peak_vram_bytes=vram,
            )
            self.rows = (*self.rows, row)
            self.write_record("running", "more rows to come")
            self.journal.event(
                "row",
                row_id=row.row_id,
                update=self.update,
                weights_sha256=sha256,
                n_documents=result.n_documents,
                optimizer_state_bytes=self.optimizer.state_bytes(),
            )
            self.journal.tell("row", row)
        self.accelerator.wait_for_everyone()

    def return_to_fork(self, decay: Phase) -> None:
        """Back to the trunk's state before `decay`; counts as progress, not as a resume."""
        at_fork = self.keeper.load(ckpt.update_folder(self.folder.checkpoints, decay.first_update))
        self.split_anew(at_fork.batch_halvings)
        self.step, self.update = decay.start_step, decay.end_update
        self.timing.book("checkpoint_s", decay, self.timing.lap())

    def save_checkpoint(self, phase: Phase) -> None:
        """Begins to save the resume state, unless it is saved already; what it books is the wait for a copy."""
        if self.saved_update == self.update:
            return
        self.timing.book("train_s", phase, self.timing.lap())
        self.keeper.save(
            phase,
            step=self.step,
            update=self.update,
            clock=self.timing.clock,
            batch_halvings=self.halvings,
        )
        self.timing.book("checkpoint_s", phase, self.timing.lap())
        self.accelerator.wait_for_everyone()
        self.timing.lap()
        self.saved_update = self.update
        self.obey.note_saved()

    def resume(self) -> int:
        """Takes up the newest usable state; returns the index of the phase to go on with."""
        record = self.folder.read_record()
        rows = record.rows if record is not None else ()
        point, skipped = self.keeper.take_up(self.plan, {row.n_tokens for row in rows})
        if point.clock is not None:
            self.timing.clock = point.clock
        self.step, self.update = point.step, point.update
        self.rows = tuple(row for row in rows if row.n_tokens in point.rows_kept)
        if point.batch_halvings is not None:
            self.split_anew(point.batch_halvings)
        # Every rank has read the record and noise.jsonl before the main one replaces them.
        self.noise.take_up(self.update, self.accelerator.wait_for_everyone)
        self._announce(skipped)
        return point.phase_index

    def _announce(self, skipped: list[str]) -> None:
        """The segment's entry in events.jsonl; hooks learn what survived."""
        self.pids = self.accelerator.gather(torch.tensor([os.getpid()], device=self.device)).tolist()
        if self.is_main:
            kept = surviving(codec.read_jsonl(self.folder.metrics), self.update)
            about = about_segment(self.spec, self.choices, self.machine, step=self.step, skipped=skipped)
            self.journal.tell("start", kept, self.update * self.science.batch_tokens_global, about)
            self.journal.event("segment", **self.segment(skipped))
            self.write_record("running", "in progress")

    # ------------------------------------------------------------------------------------------------- telling

    def write_record(
        self, status: RunStatus, reason: str | None = None, stopped_by: StoppedBy | None = None
    ) -> RunRecord:
        """Replaces record.json (main process) and returns what it says."""
        meter = self.watched.meter
        record = make_record(
            spec=self.spec,
            rows=self.rows,
            machine=self.machine,
            clock=self.timing.clock,
            status=status,
            reason=reason,
            stopped_by=stopped_by,
            why_no_meter=self.watched.why_not or (meter.why_not if meter else None) or "no sensor has measured it yet",
        )
        if self.is_main:
            codec.write_json(self.folder.record, record)
            if status != "running":
                self.journal.event("end", status=status, reason=reason, update=self.update)
        return record


def train(spec: RunSpec, folder: RunFolder, *, started: float, extra_hooks: list[Hooks] | None = None) -> RunRecord:
    """Trains one run in this process (one rank of a launch) and returns its record; a finished run is left alone.

    Raises:
        MachineError: another process holds the folder, or the machine cannot do what the spec wants.
        Stopped, StoppedByWatchdog, Diverged: as `Trainer.run`.
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
