"""From a ladder's rung to its measured noise scale: plan the probe, launch it, take its result."""

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling.batch import probe
from homelab_scaling.batch.advice import Measured
from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.estimator import NoiseScale
from homelab_scaling.batch.midrun import MidRun, middle_of_run
from homelab_scaling.batch.probe import ProbePlan, ProbeResult
from homelab_scaling.box import Box
from homelab_scaling.errors import RunFailed, Stopped, StoppedByWatchdog
from homelab_scaling.fit.words import listed
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.runs import RunRecord
from homelab_scaling.specs import CorpusManifest, RunSpec, ShardFile, Split
from homelab_scaling.sweep.launch import is_locked, ranks_of
from homelab_scaling.sweep.recipe import StopRequest, run_recipe
from homelab_scaling.watch import link

MAX_HALVINGS = 16
"""Launches of a probe that runs out of memory, each with a smaller micro-batch."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a measurement will cost."""

    flops: float
    seconds: float | None
    """None where a probe's is unknown."""
    tokens: int


def longest_run(plan: Plan, rung: str) -> RunSpec:
    """The rung's first run to its longest horizon, whose beginning a probe trains."""
    return max((run for run in plan.runs if run.rung == rung), key=lambda run: run.science.horizons_tokens[-1])


def bill_of(plans: Sequence[ProbePlan]) -> Bill:
    """All probes together."""
    seconds = [p.seconds for p in plans if p.seconds is not None]
    return Bill(
        flops=sum(p.flops for p in plans),
        seconds=sum(seconds) if len(seconds) == len(plans) else None,
        tokens=sum(p.burn_in_tokens for p in plans),
    )


def run_probes(
    plans: Sequence[ProbePlan], *, lab: Path, shards: Path, box: Box, again: bool, say: Say
) -> list[ProbeResult]:
    """The results of probes: from disk where this very one was run before, the others launched.

    Args:
        lab: LAB/<ladder>.
        shards: the folder of the text, named absolutely because a probe's folder is not where a run's is.
        again: throw away old results.

    Raises:
        RunFailed: one left no result.
        Stopped: it was asked to stop.
        StoppedByWatchdog: the watchdog ended it.
    """
    plans = [_absolute(plan, shards) for plan in plans]
    if again:
        for plan in plans:
            probe.result_path(lab, plan.rung).unlink(missing_ok=True)
            shutil.rmtree(probe.work_folder(lab, plan.rung).path, ignore_errors=True)
    found = _launch(plans, lab=lab, box=box, say=say)
    if missing := [plan for plan in plans if plan.rung not in found]:
        record = probe.work_folder(lab, missing[0].rung).read_record()
        diverged = record is not None and record.status == "diverged"  # it would do so again
        raise RunFailed(
            f"the probe of {listed([plan.rung for plan in missing])} ended without a result ({_why(missing[0], lab)})"
            + "; the same command goes on" * (not diverged)
        )
    return [found[plan.rung] for plan in plans]


def try_probes(
    plans: Sequence[ProbePlan], *, lab: Path, shards: Path, box: Box, say: Say
) -> tuple[dict[str, ProbeResult], dict[str, str]]:
    """Results by rung, and why the others have none: a probe that diverged, or that ended badly twice.

    Raises:
        Stopped, StoppedByWatchdog: as `run_probes`.
    """
    plans = [_absolute(plan, shards) for plan in plans]
    failed: dict[str, str] = {}
    tried: Counter[str] = Counter()
    while True:
        todo = [plan for plan in plans if plan.rung not in failed]
        found = _launch(todo, lab=lab, box=box, say=say)
        # They ran in this order; what comes after the one that ended the launch was not reached.
        culprit = next((plan for plan in todo if plan.rung not in found), None)
        if culprit is None:
            return found, failed
        tried[culprit.rung] += 1
        record, why = probe.work_folder(lab, culprit.rung).read_record(), _why(culprit, lab)
        status, stopped_by = (record.status, record.stopped_by) if record else (None, None)
        if status == "diverged" or tried[culprit.rung] > (MAX_HALVINGS if stopped_by == "memory" else 1):
            failed[culprit.rung] = why
        else:
            say(f"the probe of {culprit.rung} ended without a result ({why}); once more")


def _absolute(plan: ProbePlan, shards: Path) -> ProbePlan:
    return replace(plan, spec=replace(plan.spec, shards=str(shards.resolve())))


def _launch(plans: Sequence[ProbePlan], *, lab: Path, box: Box, say: Say) -> dict[str, ProbeResult]:
    """Launches the probes that are not on disk; what there is then, by rung.

    Raises:
        Stopped, StoppedByWatchdog: as `run_probes`.
    """
    _wait_for_orphans(plans, lab, say)
    todo = [plan for plan in plans if probe.finished_probe(plan, lab) is None]
    before = {plan.rung: probe.work_folder(lab, plan.rung).read_record() for plan in todo}
    began_s = link.now_s()
    # A launch has one number of ranks; what shares it shares the start-up.
    for ranks in sorted({plan.spec.execution.n_processes for plan in todo}):
        together = [plan for plan in todo if plan.spec.execution.n_processes == ranks]
        paths = [str(probe.prepare_probe(plan, lab)) for plan in together]
        for plan in together:
            say(plan.words)
        run_recipe(
            "noise_probe",
            ["--probe", *paths],
            n_processes=ranks,
            box=box,
            on_gpu=box.on_gpu,
            lab=lab.parent,
            watch=together[0].spec.watch,
            say=say,
        )
    found = {plan.rung: result for plan in plans if (result := probe.finished_probe(plan, lab)) is not None}
    for plan in todo:
        reason = _ended_by_watchdog(plan, lab, before[plan.rung], began_s)
        if plan.rung not in found and reason is not None:
            raise StoppedByWatchdog(f"the probe of {plan.rung} was ended by the watchdog: {reason}")
    return found


def _wait_for_orphans(plans: Sequence[ProbePlan], lab: Path, say: Say) -> None:
    """Waits for a launch of these probes that outlived the command that made it.

    Raises:
        Stopped: it was asked to stop, and so was that launch.
    """
    for plan in plans:
        folder = probe.work_folder(lab, plan.rung)
        if not is_locked(folder):
            continue
        say(f"the probe of {plan.rung} still runs, from a command that is gone; waiting for it")
        with StopRequest() as stop:
            told = False
            while is_locked(folder) or any(ranks_of(folder)):  # which go on with the probes of the same launch
                if stop.asked() and not told:
                    told = True
                    for pid, _ in ranks_of(folder):
                        with contextlib.suppress(ProcessLookupError, PermissionError):
                            os.kill(pid, signal.SIGTERM)
                time.sleep(0.2)
            if stop.asked():
                raise Stopped("stopped; the same command goes on from here")


def _why(plan: ProbePlan, lab: Path) -> str:
    """How a probe without a result ended."""
    record = probe.work_folder(lab, plan.rung).read_record()
    if record is None or record.status == "running":
        return "it died without a word"
    return f"{record.status}: {record.reason}" if record.reason else record.status


def _ended_by_watchdog(plan: ProbePlan, lab: Path, before: RunRecord | None, began_s: float) -> str | None:
    """Why the watchdog stopped this launch of a probe, or ended it; None where it did neither."""
    record = probe.work_folder(lab, plan.rung).read_record()
    if record is not None and record != before and record.stopped_by == "watchdog":
        return record.reason or "no reason recorded"
    word = link.machine_folder(lab.parent).read_ended(plan.spec.run_id)
    return word.reason if word is not None and word.t_s >= began_s else None


def measured_from(result: ProbeResult) -> Measured:
    """What the advice needs of a probe."""
    return Measured(
        b_simple=estimate_of(result.middle),
        why_no_number=None if estimate_of(result.middle) is not None else result.middle.words,
        at_least_tokens=result.middle.at_least_tokens,
        loss_nats=result.middle.loss_nats,
        points=result.points,
        burn_in_tokens=result.burn_in_tokens,
        flops=result.flops,
        seconds=result.seconds,
        kwh=result.kwh,
        overhead_frac=result.overhead_frac,
    )


def b_simple_at_middle(points: Sequence[NoiseScale], horizon_tokens: int) -> Estimate | None:
    """B_simple in tokens half-way through a stretch of training; None where the points do not tell."""
    return estimate_of(middle_of_run(points, horizon_tokens=horizon_tokens))


def estimate_of(middle: MidRun) -> Estimate | None:
    """Value and interval, where there are both."""
    if middle.b_simple_tokens is None or middle.ci95_tokens is None:
        return None
    low, high = middle.ci95_tokens
    return Estimate(value=middle.b_simple_tokens, low=low, high=high)


def assumed_corpus(ladder: Ladder, n_vocab: int) -> CorpusManifest:
    """A text to plan with before there is one: as long as it needs to be, its hashes empty."""

    def split(name: str) -> Split:
        file = ShardFile(name=f"{name}.bin", n_tokens=10**15, sha256="")
        return Split(files=(file,), n_tokens=10**15, n_bytes=None, n_documents=None)

    return CorpusManifest(
        tokenizer=ladder.data.tokenizer,
        tokenizer_file=None,
        tokenizer_hash="",
        n_vocab=n_vocab,
        eot_id=None,
        dtype="uint32",
        train=split("train"),
        val=split("val"),
        sources=ladder.data.sources,
        held_out_rule="",
    )
