"""Keeps a run resumable: what is saved when, what is dropped, and where a launch takes up again."""

import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from homelab_scaling.specs import ScienceSpec
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train.checkpoint import MODEL, OPTIM, Checkpoint, Clock
from homelab_scaling.train.model import LanguageModel
from homelab_scaling.train.optim import MaskedAdamW
from homelab_scaling.train.schedule import Phase

Plan = tuple[Phase, ...]


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a launch goes on."""

    phase_index: int
    """len(plan) when every row is there already."""
    step: int
    update: int
    rows_kept: frozenset[int]
    """Horizons whose recorded rows stand; the others are earned again."""
    clock: Clock | None = None
    batch_halvings: int | None = None
    """Of a batch warm-up; None begins it."""


def resume_point(plan: Plan, update: int, rows_done: set[int]) -> ResumePoint | None:
    """Where to go on from a checkpoint after `update` updates, or None if that cannot be.

    A fork whose decay has its row is left behind: the trunk goes on. A checkpoint beyond a row that is not in the
    record (somebody lost record.json) is of no use, because that row's fork is gone.
    """
    index = next(p.index for p in plan if p.first_update <= update < p.end_update)
    phase = plan[index]
    step = phase.start_step + update - phase.first_update
    while phase.earns_row and update == phase.first_update and phase.horizon_tokens in rows_done:
        if index + 1 == len(plan):
            break
        update, index = phase.end_update, index + 1
        phase = plan[index]
    behind = frozenset(p.horizon_tokens for p in plan[:index] if p.earns_row)
    if not behind <= rows_done:
        return None
    return ResumePoint(phase_index=index, step=step, update=update, rows_kept=behind)


class Keeper:
    """Reads and writes one run's checkpoints.

    Args:
        checkpoints: the run's folder of them.
        model, optimizer: whose state is kept.
    """

    def __init__(
        self, checkpoints: Path, model: LanguageModel, optimizer: MaskedAdamW, *, science: ScienceSpec, data_id: str
    ) -> None:
        self.checkpoints, self.model, self.optimizer = checkpoints, model, optimizer
        self.science, self.data_id = science, data_id

    def weights(self) -> dict[str, Tensor]:
        """Every parameter once, under its Hugging Face name."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def save(self, phase: Phase, *, step: int, update: int, clock: Clock, batch_halvings: int = 0) -> None:
        """Saves the resume state, then drops the ones it replaces; a decay keeps the fork it came from."""
        tensors, counters = self.optimizer.state_dict()
        folder = ckpt.update_folder(self.checkpoints, update)
        manifest = self._manifest(phase, step=step, update=update, clock=clock, counters=counters)
        manifest = replace(manifest, batch_halvings=batch_halvings)
        ckpt.save(folder, manifest, {MODEL: self.weights(), OPTIM: tensors})
        fork = ckpt.update_folder(self.checkpoints, phase.first_update) if phase.kind == "decay" else None
        for old in ckpt.resume_folders(self.checkpoints):
            if old not in (folder, fork):
                _remove(old)

    def save_row(self, phase: Phase, *, step: int, update: int, clock: Clock) -> None:
        """Saves the finished model of a row, without the optimizer; it is never dropped."""
        manifest = self._manifest(phase, step=step, update=update, clock=clock, counters={})
        ckpt.save(ckpt.row_folder(self.checkpoints, phase.horizon_tokens), manifest, {MODEL: self.weights()})

    def _manifest(self, phase: Phase, *, step: int, update: int, clock: Clock, counters: dict[str, int]) -> Checkpoint:
        return Checkpoint(
            update=update,
            step=step,
            tokens=step * self.science.batch_tokens_global,
            sequences=step * self.science.batch_seqs_global,
            phase=phase.name,
            science_hash=self.science.hash,
            data_id=self.data_id,
            clock=clock,
            counters=counters,
        )

    def load(self, folder: Path) -> Checkpoint:
        """Puts model and optimizer back to a saved resume state, after checking it.

        Raises:
            CheckpointError: it is damaged.
        """
        manifest = ckpt.read_manifest(folder)
        device = next(self.model.parameters()).device
        loaded = ckpt.load_tensors(folder, MODEL, device)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(loaded[name])
        self.optimizer.load_state_dict(ckpt.load_tensors(folder, OPTIM, device), manifest.counters)
        return manifest

    def take_up(self, plan: Plan, rows_done: set[int]) -> tuple[ResumePoint, list[str]]:
        """Loads the newest usable checkpoint, if any; says where to go on and which checkpoints were passed over."""
        last = plan[-1]
        if {
            p.horizon_tokens for p in plan if p.earns_row
        } <= rows_done:  # killed between the last row and the last word
            return _finished(last, rows_done), []
        found, manifest, skipped = ckpt.newest_valid(self.checkpoints, self.science.hash)
        point = None if manifest is None else resume_point(plan, manifest.update, rows_done)
        if found is None or manifest is None or point is None:
            if found is not None:
                skipped.append(f"{found.name}: record.json no longer has the rows before it; the run begins again")
            return ResumePoint(phase_index=0, step=0, update=0, rows_kept=frozenset()), skipped
        self.load(found)
        return ResumePoint(
            phase_index=point.phase_index,
            step=point.step,
            update=point.update,
            rows_kept=point.rows_kept,
            clock=manifest.clock,
            batch_halvings=manifest.batch_halvings,
        ), skipped


def _finished(last: Phase, rows_done: set[int]) -> ResumePoint:
    return ResumePoint(
        phase_index=last.index + 1, step=last.end_step, update=last.end_update, rows_kept=frozenset(rows_done)
    )


def _remove(folder: Path) -> None:
    # Renamed first: a half-deleted folder must not look like a checkpoint.
    gone = folder.with_name(f".{folder.name}.gone")
    with contextlib.suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
