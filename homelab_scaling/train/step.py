"""One step of a run: a full batch through the model, its gradients, the optimizer; and what to do when memory ends.

In a batch warm-up a step is several optimizer updates, of one full batch together. Nothing here reads the device.
"""

import os
from typing import Any

import torch
from torch import Tensor

from homelab_scaling.errors import CheckpointError, HomelabError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.train import oom, oom_notes, sharded
from homelab_scaling.train.batch_warmup import batch_tokens, first_halvings, split_step
from homelab_scaling.train.feed import Feed, open_matching_shards
from homelab_scaling.train.journal import Journal
from homelab_scaling.train.meter import Meter, Pending
from homelab_scaling.train.model import LanguageModel, build_model
from homelab_scaling.train.noise_log import log_of_run, said_of
from homelab_scaling.train.optim import MaskedAdamW
from homelab_scaling.train.passes import Passes
from homelab_scaling.train.session import Choices, describe_machine, segment_facts


class Stepper:
    """Text, model and optimizer of one launch, and the steps that bring them together.

    Args:
        spec: what to train.
        folder: of the run.
        accelerator: from `session.start_accelerator`.
        choices: the resolved execution settings.
        journal: takes events.
    """

    def __init__(self, spec: RunSpec, folder: RunFolder, accelerator: Any, choices: Choices, journal: Journal) -> None:
        self.spec, self.folder, self.accelerator, self.choices = spec, folder, accelerator, choices
        self.journal = journal
        self.science, self.execution = spec.science, spec.execution
        self.device: torch.device = accelerator.device
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # a launch may train several runs
        self.halvings = first_halvings(self.science)
        self.split = split_step(self.science, self.execution, self.halvings)
        self.machine = describe_machine(self.device, self.world_size)

        self.shards = open_matching_shards(spec, folder)
        self.feed = Feed(self.shards, spec, rank=self.rank, world_size=self.world_size, device=self.device)
        self.model: LanguageModel = build_model(
            self.science.shape,
            self.science.n_vocab,
            seed=self.science.seed,
            loss_path=choices.loss_path,
            recompute=self.execution.activation_checkpointing,
        )
        self.why_no_start = self._load_start()
        """Why the weights that the run begins from are not in the model; what has a checkpoint does without."""
        if choices.compile:
            self.model.compile_in_place(choices.compile_mode)
        self.wrapped, parts = sharded.wrap(accelerator, self.model, spec, os.environ)
        self.passes = Passes(accelerator, self.wrapped, self.feed, compiled=choices.compile)
        self.optimizer = MaskedAdamW(self.model, self.science.optim, parts)
        if choices.compile and choices.compile_mode == "reduce-overhead":
            self.optimizer.keep_gradients()
        self.noise = log_of_run(
            spec, folder.path / "noise.jsonl", self.wrapped, world_size=self.world_size, is_main=self.is_main
        )
        self.update = 0
        """Steps done, those of decays left behind too."""
        self.step = 0
        """Steps on the path to the present weights."""
        self.meter = Meter(self.science, self.machine, self.device)
        self.pids: list[int] = []
        self.first_interval = True
        """The interval holds compilation and cold caches, and so no honest rate."""

    def _load_start(self) -> str | None:
        """Puts the weights that the run begins from into the model, if not random ones; else says why not."""
        if self.science.start is None:
            return None
        from homelab_scaling.export.start import load_start

        return load_start(self.model, self.spec)

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer update, on this rank."""
        return self.split.accumulation

    @property
    def batch_tokens(self) -> int:
        """The batch of an optimizer update at present."""
        return batch_tokens(self.science, self.halvings)

    def do_update(self, lr: float) -> None:
        """One step at rate `lr`; leaves loss and gradient norm on the device.

        A step is one optimizer update, or in a batch warm-up several, of one full batch together.
        """
        if self.update == 0 and self.why_no_start is not None:
            raise CheckpointError(self.why_no_start)
        n_parts, lr = self.split.n_updates, lr * self.split.lr_scale
        listen = self.noise.measures(self.step)
        loss, norm = self.do_part(0, lr, listen)
        for part in range(1, n_parts):
            of_part = self.do_part(part, lr, listen)
            loss, norm = loss + of_part[0], norm + of_part[1]
        if n_parts > 1:
            loss, norm = loss / n_parts, norm / n_parts
        self.meter.add(Pending(step=self.step, lr=lr, loss=loss, grad_norm=norm, batch_tokens=self.batch_tokens))
        self.step += 1
        self.update += 1

    def do_part(self, part: int, lr: float, listen: bool) -> tuple[Tensor, Tensor]:
        """One optimizer update of a step: this rank's mean loss and the gradients' norm, both on the device."""
        while True:
            try:
                loss, norm = self.gradients(part, listen=listen)
                break
            except RuntimeError as error:
                if (said := oom.complaint(error)) is None:
                    raise
            self.make_room(said)  # the error is gone by here, and with it the activations that its frames held
        if listen:
            self.noise.note(norm, update=self.update, step=self.step, batch_tokens=self.batch_tokens)
        try:
            self.optimizer.step(lr, torch.isfinite(norm))
        except RuntimeError as error:
            if (said := oom.complaint(error)) is None:
                raise
            raise self.note_oom(said) from error  # the update may be half done: only the last checkpoint is sure
        self.optimizer.zero_grad()
        return loss, norm

    def gradients(self, part: int = 0, *, listen: bool = False) -> tuple[Tensor, Tensor]:
        """Clipped gradients of a part of the current batch, left in the parameters; the loss and the norm before."""
        loss = self.passes.backward(self.step, part, self.split, self.noise if listen else None)
        return loss, self.optimizer.clip()

    def make_room(self, said: str) -> None:
        """After memory ran out, before the weights were touched: a smaller micro-batch, or the end of this launch."""
        error = self.note_oom(said)
        fewer = oom_notes.smaller(self.execution.microbatch_seqs_per_rank)
        if self.world_size > 1 or fewer is None:
            raise error
        self.spec = oom_notes.with_microbatch(self.spec, fewer)
        self.execution = self.spec.execution
        self.optimizer.zero_grad()
        self.split_anew(self.halvings)
        oom.free_caches()
        self.journal.event("segment", **self.segment([]))

    def split_anew(self, halvings: int) -> None:
        """Another cut of the step; a compiled model is compiled once for each size, not for any, which is slower."""
        before, self.halvings = self.split.microbatch_seqs, halvings
        self.split = split_step(self.science, self.execution, halvings)
        if self.split.microbatch_seqs == before:
            return
        self.first_interval = True
        if self.choices.compile:
            torch.compiler.reset()

    def note_oom(self, said: str) -> HomelabError:
        """Tells disk and peers; returns what to raise where this launch cannot go on."""
        note = oom_notes.write_note(self.spec, self.folder, update=self.update, step=self.step, said=said)
        self.journal.event("oom", **note)
        return oom_notes.error_of(note)

    def segment(self, skipped: list[str]) -> dict[str, Any]:
        """How the run is executed from here on, for its entry in events.jsonl."""
        done = {"update": self.update, "step": self.step, "pids": self.pids, "skipped_checkpoints": skipped}
        done |= {"batch_tokens": self.batch_tokens, "noise": said_of(self.spec, compiled=self.choices.compile)}
        return done | segment_facts(self.spec, self.choices, self.machine, self.model, self.device)
