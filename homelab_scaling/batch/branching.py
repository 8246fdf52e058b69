"""The branch test at work: the ordinary trainer, begun from another run's checkpoint, heard window by window.

The watchdog's orders, a smaller micro-batch when memory runs out and the bill hold as for a run; a branch that was
interrupted begins again. What is added: the start, the place in the text, and windows.jsonl.

Losses are those of averaged weights. At a constant rate the weights jitter about a path, by an amount that hides what a
tenth of a run brings (0.025 nats from one validation to the next on a 54k rung; averaged, 0.004), and that depends on
the batch while the path does not. Source: Zhang et al. 2024 (arXiv 2410.21676) measure the critical batch so; the
average is Shamir & Zhang 2013 (arXiv 1212.1824), section 4.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from homelab_scaling import codec
from homelab_scaling.batch.branch import bill_path, is_done, windows_path
from homelab_scaling.batch.branch_plan import BranchPlan, BranchSpec
from homelab_scaling.batch.probe import work_folder
from homelab_scaling.errors import CheckpointError
from homelab_scaling.runs import RunFolder
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train.bill import make_bill
from homelab_scaling.train.checkpoint import START
from homelab_scaling.train.evaluate import Evaluator, Validation
from homelab_scaling.train.hooks import MetricsFile, Progress
from homelab_scaling.train.journal import Diverged
from homelab_scaling.train.loop import Trainer
from homelab_scaling.train.oom_notes import keep_smaller
from homelab_scaling.train.schedule import Phase
from homelab_scaling.train.session import choose, start_accelerator
from homelab_scaling.watch.energy import read_wall_model

AVERAGE = 4.0
"""Power of the weights' average: that of a step grows as step^4, so that the last fifth of the way is half of it."""


class ByWindow(Evaluator):
    """An evaluator that also remembers the mean loss of every window: what pairs two models on the same text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        n = len(self.windows)
        self.documents, self.n_documents = np.repeat(np.arange(n)[:, None], self.context, axis=1), n
        self.losses: list[float] = []
        over_ranks = self.sum_over_ranks

        def remember(sums: Any) -> Any:
            summed = over_ranks(sums)
            self.losses = (summed[0] / summed[1]).tolist()
            return summed

        self.sum_over_ranks = remember


class Stretch(Trainer):
    """A trainer of one stretch at constant rate, without a row: a burn-in, or a branch from its checkpoint.

    Args:
        n_steps: of the stretch.
        start: the checkpoint that it begins from; None begins with fresh weights.
        first_sequence: of the text.
    """

    def __init__(self, *, n_steps: int, start: Path | None, first_sequence: int, **trainer: Any) -> None:
        super().__init__(**trainer)
        self.start, self.feed.first_sequence = start, first_sequence
        tokens = n_steps * self.science.batch_tokens_global
        self.trunk = Phase(index=0, kind="trunk", first_update=0, start_step=0, end_step=n_steps, horizon_tokens=tokens)
        self.plan = (self.trunk,)
        self.averaged = [p.clone() for p in self._live()]
        self.by_window = ByWindow(
            self.shards,
            context_tokens=self.science.shape.context_tokens,
            n_tokens=self.evaluate_curve.context * len(self.evaluate_curve.windows),
            rank=self.rank,
            world_size=self.world_size,
            batch_seqs=self.evaluate_curve.batch_seqs,
            device=self.device,
            sum_over_ranks=self.evaluate_curve.sum_over_ranks,
        )

    def resume(self) -> int:
        """A burn-in goes on from its own checkpoint; a branch begins anew, since its average is in none."""
        skipped: list[str] = []
        if self.start is None:
            found, manifest, skipped = ckpt.newest_valid(self.folder.checkpoints, self.science.hash)
            if found is not None and manifest is not None:
                self.keeper.load(found)
                self.timing.clock = manifest.clock
                self.step, self.update = manifest.step, manifest.update
        else:
            self.keeper.load(self.start)
        torch._foreach_copy_(self.averaged, self._live())
        windows_path(self.folder).unlink(missing_ok=True)
        self._announce(skipped)
        if self.start is not None:
            self.validate(self.trunk, self.by_window, "curve")
        return 0

    def do_update(self, lr: float) -> None:
        """An update, and its share in the average of the weights."""
        super().do_update(lr)
        share = (AVERAGE + 1) / (AVERAGE + self.step)
        torch._foreach_lerp_(self.averaged, self._live(), share)

    def validate(self, phase: Phase, evaluator: Evaluator, which: str) -> Validation:
        """The held-out loss, and that of each window beside it."""
        with self._average():
            result = super().validate(phase, self.by_window, which)
        line = {"step": self.step, "tokens": self.step * self.science.batch_tokens_global}
        codec.append_jsonl(windows_path(self.folder), [line | {"losses": self.by_window.losses}])
        return result

    @contextlib.contextmanager
    def _average(self) -> Iterator[None]:
        """The averaged weights in the model's place."""
        live = self._live()
        own = [p.clone() for p in live]
        torch._foreach_copy_(live, self.averaged)
        try:
            yield
        finally:
            torch._foreach_copy_(live, own)

    def _live(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.optimizer.names]

    def train_phase(self, phase: Phase) -> None:
        """The stretch, then its bill."""
        super().train_phase(phase)
        self.timing.book("train_s", self.trunk, self.timing.lap())
        wall = read_wall_model(self.watched.machine)
        bill = make_bill(self.timing.clock, [self.trunk.key, START], self.spec.money, wall)
        codec.write_json(bill_path(self.folder), {"seconds": bill.seconds, "kwh": bill.kwh})


def run_branches(plan: BranchPlan, *, started: float) -> None:
    """Runs the burn-in, unless its checkpoint is there, and every branch that is not done, in this process.

    Args:
        started: `time.monotonic()` of the process's start.

    Raises:
        MachineError: another process holds a folder, or the machine cannot do what the spec wants.
        Stopped, StoppedByWatchdog: as a run.
        Diverged: the burn-in did; a branch that does is left as it is.
    """
    start = find_start(plan)
    if start is None:
        _train(
            plan.start_folder,
            plan.start.run_id,
            n_steps=plan.start_steps,
            start=None,
            first_sequence=0,
            started=started,
        )
        start = find_start(plan)
        started = time.monotonic()
    if start is None:
        raise CheckpointError(f"{plan.start_folder.path}: the burn-in left no whole checkpoint; run it again")
    for branch in plan.branches:
        if is_done(plan, branch):
            continue
        try:
            _train_branch(plan, branch, start, started)
        except Diverged as error:  # too high a rate for this batch; the others go on
            print(f"branch_test: {error}", file=sys.stderr)
        started = time.monotonic()


def find_start(plan: BranchPlan) -> Path | None:
    """A whole checkpoint of the rung at the end of the burn-in: the probe's, or our own."""
    for folder in (work_folder(Path(plan.lab), plan.rung), plan.start_folder):
        found = ckpt.update_folder(folder.checkpoints, plan.start_steps)
        with contextlib.suppress(CheckpointError):
            manifest = ckpt.read_manifest(found)
            if manifest.science_hash == plan.start.science.hash and manifest.step == plan.start_steps:
                return found
    return None


def _train_branch(plan: BranchPlan, branch: BranchSpec, start: Path, started: float) -> None:
    _train(
        plan.run_folder(branch),
        branch.spec.run_id,
        n_steps=branch.n_steps,
        start=start,
        first_sequence=branch.first_sequence,
        started=started,
    )


def _train(
    folder: RunFolder, said: str, *, n_steps: int, start: Path | None, first_sequence: int, started: float
) -> None:
    planned = folder.read_spec()
    spec = keep_smaller(planned, folder)  # a micro-batch that memory was too small for is not tried again
    accelerator = start_accelerator(spec, folder.path)
    with folder.lock():
        stretch = Stretch(
            n_steps=n_steps,
            start=start,
            first_sequence=first_sequence,
            spec=spec,
            folder=folder,
            accelerator=accelerator,
            choices=choose(spec, accelerator.device.type == "cuda"),
            hooks=[MetricsFile(folder), Progress(said, n_steps * spec.science.batch_tokens_global)],
            started=started,
        )
        stretch.run()
