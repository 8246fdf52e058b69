"""A probe of one rung: train a short stretch of it, hear the gradients on the way, say what its noise scale is.

    LAB/<ladder>/batch/<rung>.json      the result; a probe with the same science is not repeated
    LAB/<ladder>/batch/<rung>/          while it lasts: probe.json, spec.json, noise.jsonl, checkpoints/, as of a run

The burn-in runs from the first update to a share of the longest horizon, at the rung's own batch and rate, and is on
the bill. Its later part is divided into windows, each twice as long as the one before. Every update of a window (or
every n-th) is a measuring step: its own micro-gradients are compared, so measuring costs no data, and a window's mean
is not at the mercy of one moment's |G|^2, which swings by factors at these rates.
"""

import itertools
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.batch.estimator import GOOD_K, WITHIN, NoiseScale, measurable_seqs, steps_for
from homelab_scaling.batch.midrun import MidRun
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.plan.cost import predict_rate
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.plan.noise import MIN_MEASUREMENTS as MIN_WINDOW_STEPS
from homelab_scaling.plan.noise import SHARDED
from homelab_scaling.runs import Machine, RunFolder
from homelab_scaling.specs import RunSpec, make_run_id
from homelab_scaling.train.noise_windows import Window
from homelab_scaling.train.schedule import phases

BURN_IN_FRAC = 0.2
N_POINTS = 3
MAX_WINDOW_STEPS = 128
"""More measure nothing better than the scatter between windows."""
UNTRAINED = (
    "a probe on untrained weights is not informative: until the token frequencies are learnt all gradients point the "
    "same way, so B_simple says how soon those are learnt and nothing of the run"
)


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """probe.json: what is to be measured, and what it costs; made before anything runs."""

    rung: str
    spec: RunSpec
    """The rung's science under the name RUNG-probe, at full batch from the start; a micro-batch small enough to have
    something to compare."""
    horizon_tokens: int
    burn_in_tokens: int
    windows: tuple[Window, ...]
    k: int
    """Micro-batches of an update, over all ranks."""
    microbatch_seqs: int
    measurable_tokens: float
    """The largest B_simple that the shortest window measures to within 20 %, by the estimator's plan."""
    flops: float
    """Of the burn-in, which is the whole cost."""
    seconds: float | None
    """By the plan's own rate; None where that is unknown."""
    keep_checkpoint: bool = False
    """Leave the last checkpoint, for a branch test to begin from (batch/branch.py), which then removes it."""

    @property
    def hash(self) -> str:
        """What decides the result: the science and the windows, not how they are executed."""
        return codec.stable_hash([self.spec.science.hash, self.spec.rung, codec.to_plain(self.windows)])

    def steps_for(self, b_simple_tokens: float) -> int:
        """Measuring steps that this batch, cut this way, needs for B_simple to within 20 %."""
        seqs = b_simple_tokens / self.spec.science.shape.context_tokens
        return steps_for(seqs, k=self.k, microbatch_seqs=self.microbatch_seqs)

    @property
    def words(self) -> str:
        """The plan in a sentence or two, for people."""
        took = "an unknown time" if self.seconds is None else f"about {self.seconds:,.0f} s"
        n_steps = " + ".join(str(len(window.steps)) for window in self.windows)
        return (
            f"probe of {self.rung}: trains {self.burn_in_tokens:,} tokens "
            f"({self.burn_in_tokens / self.horizon_tokens:.0%} of the longest horizon, {self.flops:.2g} FLOPs, {took}) "
            f"and measures on {n_steps} steps of {self.k} x {self.microbatch_seqs} sequences; that gives B_simple to "
            f"within {WITHIN:.0%} up to {self.measurable_tokens:,.0f} tokens, above less exactly, or a lower bound "
            f"(twice as much would want {self.steps_for(2 * self.measurable_tokens)} steps in the shortest window)"
        )


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """LAB/<ladder>/batch/<rung>.json."""

    rung: str
    probe_hash: str
    science_hash: str
    data_id: str
    horizon_tokens: int
    points: tuple[NoiseScale, ...]
    """One per window, by tokens trained."""
    middle: MidRun
    unigram_nats: float
    """Entropy of single tokens of the training text: what a model knows that knows only their frequencies."""
    overhead_frac: float
    """Of a measuring step's time, by the hooks; timed on the same batch with and without them."""
    every_steps: int
    """The cadence at which such steps cost a training run less than 3 % on average."""
    burn_in_tokens: int
    flops: float
    seconds: float
    """Of this probe: start-up, training, checkpoints."""
    kwh: float | None
    """Of the cards; None where no sensor saw most of it."""
    machine: Machine


def plan_probe(
    spec: RunSpec,
    *,
    burn_in_frac: float = BURN_IN_FRAC,
    n_points: int = N_POINTS,
    microbatch_seqs: int | None = None,
    box: Box | None = None,
) -> ProbePlan:
    """What a probe of this run's rung does and costs.

    Args:
        burn_in_frac: of the longest horizon.
        n_points: measurements, each at about twice the tokens of the one before.
        microbatch_seqs: of a measuring step; None takes the largest divisor of the run's that gives 8 micro-batches.
        box: the machine, to foretell what the smaller micro-batches cost; None leaves that out of the seconds.

    Raises:
        SpecError: the burn-in is too short to measure anything but untrained weights, the batch cannot be cut, or the
            parameters are sharded.
    """
    science, batch = replace(spec.science, batch_warmup=None), spec.science.batch_tokens_global
    horizon = science.horizons_tokens[-1]
    if not 0 < burn_in_frac <= 1:
        raise SpecError(f"burn-in of {burn_in_frac:g} of the horizon, wants more than 0 and at most 1")
    if spec.execution.sharding != "none" and spec.execution.n_processes > 1:
        raise SpecError(f"rung {spec.rung}: {SHARDED}, or write batch.tokens into the ladder")
    micro = microbatch_seqs or _microbatch(spec)
    execution = replace(
        spec.execution,
        microbatch_seqs_per_rank=micro,
        curve_every_tokens=None,
        trackers=(),
        checkpoint_every_steps=None,
        noise_every_steps=None,  # the probe has its own windows
    )
    k = execution.n_processes * execution.accumulation_steps(science)
    if k < 2:
        raise SpecError(
            f"rung {spec.rung}: found 1 micro-batch in a batch of {science.batch_seqs_global} sequence, wants 2 or "
            "more: noise shows only between micro-batches; enlarge the batch"
        )
    n_steps = round(burn_in_frac * horizon / batch)
    windows = _windows(spec, n_steps, n_points)
    n_trained = sum(p.n_updates for p in phases(science))
    seconds = None
    if execution.predicted_s is not None:
        seconds = execution.predicted_s * n_steps / n_trained * _slower(spec, micro, box)
    seqs = measurable_seqs(min(len(w.steps) for w in windows), k=k, microbatch_seqs=micro)
    name = f"{spec.rung}-probe"
    return ProbePlan(
        rung=spec.rung,
        spec=replace(
            spec,
            rung=name,
            science=science,
            run_id=make_run_id(name, science),
            execution=replace(execution, predicted_s=seconds),
        ),
        horizon_tokens=horizon,
        burn_in_tokens=n_steps * batch,
        windows=windows,
        k=k,
        microbatch_seqs=micro,
        measurable_tokens=seqs * science.shape.context_tokens,
        flops=n_steps * batch * flops_per_token(science.shape, science.n_vocab),
        seconds=seconds,
    )


def _slower(spec: RunSpec, micro: int, box: Box | None) -> float:
    """How much longer an update takes in micro-batches of this size than as the run would cut it."""

    def tokens_per_s(microbatch: int) -> float | None:
        execution = replace(spec.execution, microbatch_seqs_per_rank=microbatch)
        rate = box and predict_rate(
            spec.science.shape,
            spec.science.n_vocab,
            box=box,
            n_processes=execution.n_processes,
            microbatch_seqs=microbatch,
            accumulation_steps=execution.accumulation_steps(spec.science),
            precision=spec.science.precision,
        )
        return rate.tokens_per_s if rate else None

    as_run, as_probe = tokens_per_s(spec.execution.microbatch_seqs_per_rank), tokens_per_s(micro)
    return as_run / as_probe if as_run and as_probe else 1.0


def _microbatch(spec: RunSpec) -> int:
    """The largest divisor of the run's micro-batch that leaves 8 micro-batches or more; 1 where none does."""
    asked, seqs = spec.execution.microbatch_seqs_per_rank, spec.science.batch_seqs_global
    return next(m for m in range(asked, 0, -1) if asked % m == 0 and (seqs // m >= GOOD_K or m == 1))


def _windows(spec: RunSpec, n_steps: int, n_points: int) -> tuple[Window, ...]:
    """The last `n_points` doublings of the burn-in, none of them within the warm-up."""
    batch = spec.science.batch_tokens_global
    warmup = -(-spec.science.schedule.warmup_tokens // batch)
    first = max(warmup, n_steps // 2**n_points, 1)
    edges = [round(first * (n_steps / first) ** (i / n_points)) for i in range(n_points + 1)] if n_steps > first else []
    lengths = [end - begin for begin, end in itertools.pairwise(edges)]
    if n_points < 1 or not lengths or min(lengths) < MIN_WINDOW_STEPS:
        wanted = (warmup + MIN_WINDOW_STEPS) * 2**n_points
        raise SpecError(
            f"rung {spec.rung}: a burn-in of {n_steps} updates, {warmup} of them warm-up, leaves no {n_points} windows "
            f"of {MIN_WINDOW_STEPS} updates; lengthen the burn-in to about {wanted} updates or shrink the batch: "
            + UNTRAINED
        )
    return tuple(
        Window(first_step=begin, end_step=begin + length, every=-(-length // MAX_WINDOW_STEPS))
        for begin, length in zip(edges, lengths, strict=False)
    )


def result_path(lab: Path, rung: str) -> Path:
    """Where the result of a rung's probe lies; `lab` is LAB/<ladder>."""
    return lab / "batch" / f"{rung}.json"


def work_folder(lab: Path, rung: str) -> RunFolder:
    """Where a probe works."""
    return RunFolder(lab / "batch" / rung)


def plan_path(folder: RunFolder) -> Path:
    """probe.json of a probe's folder, what `recipes/noise_probe.py --probe` wants."""
    return folder.path / "probe.json"


def finished_probe(plan: ProbePlan, lab: Path) -> ProbeResult | None:
    """The result of this very probe, if it is there; one of another science or burn-in is none."""
    path = result_path(lab, plan.rung)
    if not path.exists():
        return None
    try:
        found = codec.read_json(path, ProbeResult)
    except SpecError:  # of an older version, or damaged: measured again
        return None
    return found if found.probe_hash == plan.hash else None


def prepare_probe(plan: ProbePlan, lab: Path) -> Path:
    """Writes a probe's folder so that it can be launched; returns its probe.json.

    What an interrupted probe of the same science left there is kept, of another is thrown away.
    """
    folder = work_folder(lab, plan.rung)
    path = plan_path(folder)
    if path.exists():
        try:
            same = codec.read_json(path, ProbePlan).hash == plan.hash
        except SpecError:
            same = False
        if not same:
            shutil.rmtree(folder.path)
    codec.write_json(folder.spec, plan.spec)
    codec.write_json(path, plan)
    return path
