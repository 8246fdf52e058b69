"""Keeps a run resumable: what is saved when, what is dropped, and where a launch takes up again.

The loop waits until weights and optimizer states are copied to host memory; writing, flushing, hashing, renaming and
dropping what is replaced happen in a thread. At most one checkpoint is under way, and the older one goes only when the
newer is on the disk: whatever kills the process, a whole one is left.
"""

import contextlib
import copy
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from homelab_scaling.specs import ScienceSpec
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train.checkpoint import MODEL, OPTIM, Checkpoint, Clock
from homelab_scaling.train.optim import MaskedAdamW
from homelab_scaling.train.schedule import Phase
from homelab_scaling.train.writer import HostCopies, Writer

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
    """Reads and writes one run's checkpoints; every rank calls the same, and the main one writes.

    Args:
        checkpoints: the run's folder of them.
        optimizer: whose weights and states are kept.
        is_main: whether this rank writes.
    """

    def __init__(
        self,
        checkpoints: Path,
        optimizer: MaskedAdamW,
        *,
        science: ScienceSpec,
        data_id: str,
        is_main: bool = True,
    ) -> None:
        self.checkpoints, self.optimizer, self.is_main = checkpoints, optimizer, is_main
        self.parts = optimizer.parts
        self.science, self.data_id = science, data_id
        self.writer = Writer()
        self._copies = HostCopies()

    def _copy(self, file: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Whole tensors in host memory, on the main rank; the others only give their parts."""
        copies = {}
        for name, tensor in tensors:
            if self.is_main:
                copies[name] = self._copies.take(f"{file}/{name}", tensor)
        return copies

    def _weights(self) -> dict[str, Tensor]:
        """Every parameter once, under its Hugging Face name."""
        return self._copy(MODEL, ((name, self.parts.full(name, p)) for name, p in self.parts.parameters.items()))

    def save(self, phase: Phase, *, step: int, update: int, clock: Clock, batch_halvings: int = 0) -> None:
        """Begins to save the resume state, then to drop those it replaces; a decay keeps the fork it came from.

        Raises:
            CheckpointError: the one before it could not be written.
        """
        self.writer.wait()  # for the host memory, too
        files = {MODEL: self._weights(), OPTIM: self._copy(OPTIM, self.optimizer.states())}
        if not self.is_main:
            return
        counters = self.optimizer.counters()
        manifest = self._manifest(phase, step=step, update=update, clock=clock, counters=counters)
        manifest = replace(manifest, batch_halvings=batch_halvings)
        folder = ckpt.update_folder(self.checkpoints, update)
        fork = ckpt.update_folder(self.checkpoints, phase.first_update) if phase.kind == "decay" else None
        self._copies.finish()
        self.writer.submit(lambda: self._write(folder, manifest, files, keep=fork))

    def _write(
        self, folder: Path, manifest: Checkpoint, files: dict[str, dict[str, Tensor]], keep: Path | None
    ) -> None:
        ckpt.save(folder, manifest, files)
        for old in ckpt.resume_folders(self.checkpoints):
            if old not in (folder, keep):
                _remove(old)

    def save_row(self, phase: Phase, *, step: int, update: int, clock: Clock) -> str | None:
        """Saves the finished model of a row, without the optimizer, before it returns; it is never dropped.

        Returns:
            The hash of the weights; None on other ranks.

        Raises:
            CheckpointError: it, or the resume state before it, could not be written.
        """
        self.writer.wait()
        weights = self._weights()
        if not self.is_main:
            return None
        manifest = self._manifest(phase, step=step, update=update, clock=clock, counters={})
        self._copies.finish()
        ckpt.save(ckpt.row_folder(self.checkpoints, phase.horizon_tokens), manifest, {MODEL: weights})
        return ckpt.tensors_hash(weights)

    def check(self) -> None:
        """Raises the error of a checkpoint that could not be written meanwhile."""
        self.writer.check()

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self.writer.wait()

    def close(self) -> None:
        """Waits, where another error is on its way out already."""
        with contextlib.suppress(Exception):
            self.writer.wait()

    def _manifest(self, phase: Phase, *, step: int, update: int, clock: Clock, counters: dict[str, int]) -> Checkpoint:
        return Checkpoint(
            update=update,
            step=step,
            tokens=step * self.science.batch_tokens_global,
            sequences=step * self.science.batch_seqs_global,
            phase=phase.name,
            science_hash=self.science.hash,
            data_id=self.data_id,
            clock=copy.deepcopy(clock),  # it goes on while this is written
            counters=counters,
        )

    def load(self, folder: Path) -> Checkpoint:
        """Puts model and optimizer back to a saved resume state, after checking it.

        Raises:
            CheckpointError: it is damaged.
        """
        self.wait()
        manifest = ckpt.read_manifest(folder)
        device = self.parts.load_device
        self.parts.load_weights(ckpt.load_tensors(folder, MODEL, device))
        self.optimizer.load_state_dict(ckpt.load_tensors(folder, OPTIM, device), manifest.counters)
        return manifest

    def take_up(self, plan: Plan, rows_done: set[int]) -> tuple[ResumePoint, list[str]]:
        """Loads the newest usable checkpoint, if any; says where to go on and which checkpoints were passed over."""
        if self.is_main:
            ckpt.sweep(self.checkpoints)
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
