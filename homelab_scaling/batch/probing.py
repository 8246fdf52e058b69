"""The probe at work: the ordinary trainer, on one trunk, with a hook on the measuring steps.

Everything of a run holds here too: resume from the last checkpoint, the watchdog's orders, a smaller micro-batch when
memory runs out, the bill. What is added: after every log interval the squared norms go to noise.jsonl, and at the end
they become LAB/<ladder>/batch/<rung>.json.
"""

import contextlib
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from homelab_scaling import codec
from homelab_scaling.batch.estimator import NoiseScale
from homelab_scaling.batch.midrun import middle_of_run
from homelab_scaling.batch.noise import NoiseHook
from homelab_scaling.batch.probe import (
    UNTRAINED,
    ProbePlan,
    ProbeResult,
    finished_probe,
    result_path,
    work_folder,
)
from homelab_scaling.data.shards import Shards
from homelab_scaling.plan.noise import every_steps
from homelab_scaling.runs import RunRecord
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train.bill import make_bill
from homelab_scaling.train.checkpoint import START
from homelab_scaling.train.hooks import MetricsFile, Progress
from homelab_scaling.train.loop import Trainer
from homelab_scaling.train.noise_log import NoiseLog, scale_of
from homelab_scaling.train.noise_windows import Window
from homelab_scaling.train.oom_notes import keep_smaller
from homelab_scaling.train.schedule import Phase
from homelab_scaling.train.session import choose, start_accelerator, sum_over_ranks
from homelab_scaling.watch.energy import read_wall_model

UNIGRAM_TOKENS = 4_000_000
TIMED_PAIRS = 5


class Prober(Trainer):
    """A trainer that stops at the end of the burn-in and leaves a ProbeResult."""

    def __init__(self, plan: ProbePlan, lab: Path, **trainer: Any) -> None:
        super().__init__(**trainer)
        self.probe, self.lab = plan, lab
        n_steps = plan.burn_in_tokens // self.science.batch_tokens_global
        self.trunk = Phase(
            index=0, kind="trunk", first_update=0, start_step=0, end_step=n_steps, horizon_tokens=plan.burn_in_tokens
        )
        self.plan = (self.trunk,)
        self.noise = NoiseLog(
            self.science,
            self.folder.path / "noise.jsonl",
            hook=NoiseHook(self.wrapped, world_size=self.world_size, sum_over_ranks=sum_over_ranks),
            windows=lambda phase, halvings: plan.windows,
            is_main=self.is_main,
        )

    def resume(self) -> int:
        """Takes up the newest whole checkpoint and the measurements before it."""
        found, manifest, skipped = ckpt.newest_valid(self.folder.checkpoints, self.science.hash)
        if found is not None and manifest is not None:
            self.keeper.load(found)
            self.timing.clock = manifest.clock
            self.step, self.update = manifest.step, manifest.update
        self.noise.take_up(self.update, self.accelerator.wait_for_everyone)
        self._announce(skipped)
        return 0

    def train_phase(self, phase: Phase) -> None:
        """The burn-in, then the result."""
        super().train_phase(phase)
        self.keeper.wait()
        overhead = self._overhead()
        if self.is_main:
            result = self._result(overhead)
            codec.write_json(result_path(self.lab, self.probe.rung), result)
            if not self.probe.keep_checkpoint:
                shutil.rmtree(self.folder.checkpoints, ignore_errors=True)  # nothing goes on from here
            print(said(result), file=sys.stderr, flush=True)
        self.accelerator.wait_for_everyone()

    def _overhead(self) -> float:
        """Share of an update's gradients that listening adds, by timing the next batch with and without it."""

        def timed(listen: bool) -> float:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            self.gradients(listen=listen)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - began
            self.optimizer.zero_grad()
            return seconds

        timed(listen=True)
        pairs = [(timed(listen=True), timed(listen=False)) for _ in range(TIMED_PAIRS)]
        return max(0.0, statistics.median(on / off for on, off in pairs) - 1)

    def _result(self, overhead: float) -> ProbeResult:
        lines = codec.read_jsonl(self.noise.path)
        unigram = unigram_nats(self.shards)
        points = tuple(self._point(window, lines, unigram, overhead) for window in self.probe.windows)
        self.timing.book("train_s", self.trunk, self.timing.lap())
        clock = self.timing.clock
        bill = make_bill(clock, [self.trunk.key, START], self.spec.money, read_wall_model(self.watched.machine))
        return ProbeResult(
            rung=self.probe.rung,
            probe_hash=self.probe.hash,
            science_hash=self.science.hash,
            data_id=self.shards.manifest.data_id,
            horizon_tokens=self.probe.horizon_tokens,
            points=points,
            middle=middle_of_run(points, horizon_tokens=self.probe.horizon_tokens),
            unigram_nats=unigram,
            overhead_frac=overhead,
            every_steps=every_steps(overhead),
            burn_in_tokens=self.probe.burn_in_tokens,
            flops=self.probe.flops,
            seconds=bill.seconds,
            kwh=bill.kwh,
            machine=self.machine,
        )

    def _point(self, window: Window, lines: list[dict[str, Any]], unigram: float, overhead: float) -> NoiseScale:
        """The noise scale of one window."""
        own = [line for line in lines if line["step"] in window.steps]
        loss = statistics.fmean(line["loss"] for line in own)
        return scale_of(
            own,
            self.science,
            tokens_trained=round(window.middle_step * self.science.batch_tokens_global),
            overhead_frac=overhead,
            why_not_informative=None if loss < unigram else UNTRAINED,
        )


def said(result: ProbeResult) -> str:
    """The result in a few lines, for people."""
    lines = [
        f"{result.rung}: after {p.tokens_trained:,} tokens (loss {p.loss_nats:.3f}): {p.words}"
        + (f"; not used: {p.why_not_informative}" if p.why_not_informative else "")
        for p in result.points
    ]
    lines.append(f"{result.rung}: at the middle of the run: {result.middle.words}")
    lines.append(
        f"{result.rung}: a measuring step costs {result.overhead_frac:.1%} more; every {result.every_steps} steps that "
        f"is {result.overhead_frac / result.every_steps:.1%} on average"
    )
    return "\n".join(lines)


def unigram_nats(shards: Shards) -> float:
    """Entropy of a single token of the training text, from its first few million."""
    counts = np.bincount(shards.train[0:UNIGRAM_TOKENS], minlength=shards.manifest.n_vocab)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def run_probe(plan: ProbePlan, lab: Path, *, started: float) -> RunRecord | None:
    """Runs one probe in this process (one rank of a launch); None where its result is there already.

    Args:
        lab: LAB/<ladder>.
        started: `time.monotonic()` of the process's start.

    Raises:
        MachineError: another process holds the folder, or the machine cannot do what the spec wants.
        Stopped, StoppedByWatchdog, Diverged: as a run.
    """
    folder = work_folder(lab, plan.rung)
    spec = keep_smaller(plan.spec, folder)  # a micro-batch that memory was too small for is not tried again
    accelerator = start_accelerator(spec, folder.path)
    with folder.lock() if accelerator.is_main_process else contextlib.nullcontext():
        if finished_probe(plan, lab) is not None:
            return None
        hooks = [MetricsFile(folder), Progress(f"probe of {plan.rung}", plan.burn_in_tokens)]
        prober = Prober(
            plan,
            lab,
            spec=spec,
            folder=folder,
            accelerator=accelerator,
            choices=choose(spec, accelerator.device.type == "cuda"),
            hooks=hooks,
            started=started,
        )
        return prober.run()
