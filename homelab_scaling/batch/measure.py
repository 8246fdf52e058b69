"""From a ladder's rung to its measured noise scale: plan the probe, launch it, take its result."""

import shutil
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
from homelab_scaling.errors import RunFailed
from homelab_scaling.fit.words import listed
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.specs import CorpusManifest, RunSpec, ShardFile, Split
from homelab_scaling.sweep.local import run_recipe

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
    """
    plans = [replace(p, spec=replace(p.spec, shards=str(shards.resolve()))) for p in plans]
    if again:
        for plan in plans:
            probe.result_path(lab, plan.rung).unlink(missing_ok=True)
            shutil.rmtree(probe.work_folder(lab, plan.rung).path, ignore_errors=True)
    todo = [plan for plan in plans if probe.finished_probe(plan, lab) is None]
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
    found = [probe.finished_probe(plan, lab) for plan in plans]
    missing = [plan.rung for plan, result in zip(plans, found, strict=True) if result is None]
    if missing:
        raise RunFailed(
            f"the probe of {listed(missing)} ended without a result, for the reason above; the same command goes on"
        )
    return [result for result in found if result is not None]


def measured_from(result: ProbeResult) -> Measured:
    """What the advice needs of a probe."""
    return Measured(
        b_simple=estimate_of(result.middle),
        why_no_number=None if result.middle.b_simple_tokens is not None else result.middle.words,
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
