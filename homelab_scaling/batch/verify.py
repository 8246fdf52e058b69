"""Runs the sweep behind `homelab batch-size --verify`: short trainings of the smallest rung, in a folder of their own.

    LAB/<ladder>/batch_sweep/runs/<run_id>      a trial: its spec and curve, by recipes/batch_sweep.py

Constant rate after a short warm-up, so that no trial's budget bends its curve. A trial is stopped when its loss has
passed the target. Started again, finished trials are read from disk.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.batch import trials
from homelab_scaling.batch.table import Setting, rate_of, split_batch
from homelab_scaling.batch.trials import RATES, SweepResult, Trial
from homelab_scaling.errors import RunFailed, SpecError, StoppedByWatchdog
from homelab_scaling.plan.cost import GPU_START_S, VALIDATION_COST_FRAC
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec, Schedule, make_run_id
from homelab_scaling.sweep.recipe import run_recipe

WARMUP_FRAC = 0.04
"""Of what a trial may take."""
CURVE_POINTS = 40
"""Validations on the way to what a trial may take at most."""
CURVE_TOKENS = 16_384
"""Of each validation, at most: the same windows for every trial, so that their own chance hardly counts."""
LAUNCH_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep will run."""

    setting: Setting
    """Of the smallest rung, on one process."""
    template: RunSpec
    """Its first run, whose data, shape and optimizer every trial shares."""
    folder: Path
    """LAB/<ladder>/batch_sweep."""
    shards: Path
    batches_seqs: tuple[int, ...]
    target_tokens: int
    lr_middle: float

    @property
    def middle_seqs(self) -> int:
        return self.batches_seqs[len(self.batches_seqs) // 2]

    @property
    def tokens_most(self) -> float:
        """Trained if no trial stops early."""
        return len(RATES) * sum(
            self.target_tokens
            if seqs == self.middle_seqs
            else trials.most_tokens(seqs, self.middle_seqs, self.target_tokens)
            for seqs in self.batches_seqs
        )

    @property
    def seconds(self) -> tuple[float, float] | None:
        """About how long, if each trial takes D_0, and at most; None where no speed is known."""
        split = split_batch(self.setting, self.middle_seqs)
        rate = rate_of(self.setting, *split)[0] if split else None
        if rate is None:
            return None
        validated = len(RATES) * len(self.batches_seqs) * CURVE_POINTS * self.curve_tokens * VALIDATION_COST_FRAC
        start = 2 * (GPU_START_S if self.setting.box.on_gpu else LAUNCH_S)
        about = len(RATES) * len(self.batches_seqs) * self.target_tokens
        return start + (about + validated) / rate, start + (self.tokens_most + validated) / rate

    @property
    def curve_tokens(self) -> int:
        """Of one validation; together they shall not cost more than the training."""
        context = self.setting.shape.context_tokens
        wanted = min(self.template.science.val_tokens, CURVE_TOKENS, 3 * self.target_tokens // CURVE_POINTS)
        return max(context, wanted // context * context)

    @property
    def words(self) -> str:
        """The plan in a sentence."""
        context = self.setting.shape.context_tokens
        sizes = ", ".join(f"{seqs * context:,}" for seqs in self.batches_seqs)
        cost = self.seconds
        took = f"about {cost[0]:,.0f} s, at most {cost[1]:,.0f} s" if cost else "time unknown"
        return (
            f"sweep on {self.setting.rung.name}: batches of {sizes} tokens, rates {', '.join(f'{r:g}' for r in RATES)} "
            f"x {self.lr_middle:.2e} x sqrt(B / {self.middle_seqs * context:,}), up to {trials.MORE_RATES} more where "
            f"the best is at the edge, to the loss of the middle batch after {self.target_tokens:,} tokens; {took}"
        )


def plan_sweep(
    setting: Setting,
    template: RunSpec,
    lab: Path,
    shards: Path,
    *,
    b_crit_tokens: float,
    lr_middle: Callable[[int], float],
) -> SweepPlan:
    """What to run for one rung.

    Args:
        b_crit_tokens: the present belief, about which the batches are laid.
        lr_middle: batch in tokens -> its rate by the ladder's rule.

    Raises:
        DataError: the rung's smallest horizon is too short.
    """
    ladder = replace(setting.ladder, train=replace(setting.ladder.train, processes=1, microbatch_seqs_per_rank=None))
    context = setting.shape.context_tokens
    target = setting.rung.training.horizons[0].tokens // 2
    batches = trials.sweep_batches(b_crit_tokens, context, target)
    middle = batches[len(batches) // 2] * context
    return SweepPlan(
        setting=replace(setting, ladder=ladder),
        template=template,
        folder=lab / "batch_sweep",
        shards=shards,
        batches_seqs=batches,
        target_tokens=max(1, target // middle) * middle,
        lr_middle=lr_middle(middle),
    )


def trial_spec(plan: SweepPlan, seqs: int, factor: float) -> RunSpec:
    """A run at one batch and one multiple of the middle rate: warm-up, then constant to the end of what it may take."""
    context = plan.setting.shape.context_tokens
    batch = seqs * context
    most = plan.target_tokens
    if seqs != plan.middle_seqs:
        most = round(trials.most_tokens(seqs, plan.middle_seqs, plan.target_tokens))
    n_steps = -(-most // batch) + 1  # the last step of every schedule decays; it is not looked at
    split = split_batch(plan.setting, seqs)
    if split is None:
        raise SpecError(f"rung {plan.setting.rung.name}: not even one sequence of {context} tokens fits the card")
    science = replace(
        plan.template.science,
        horizons_tokens=(n_steps * batch,),
        batch_tokens_global=batch,
        schedule=Schedule(
            name="wsd",
            lr_peak=float(f"{plan.lr_middle * factor * (seqs / plan.middle_seqs) ** 0.5:.6g}"),
            warmup_tokens=max(1, round(WARMUP_FRAC * n_steps)) * batch,
            decay_frac=1 / n_steps,
            lr_final_frac=0.0,
        ),
        val_tokens=plan.curve_tokens,
        batch_warmup=None,
    )
    every = max(1, n_steps // CURVE_POINTS)
    execution = replace(
        plan.template.execution,
        n_processes=1,
        microbatch_seqs_per_rank=split[1],
        log_every_steps=every,
        checkpoint_every_s=86_400.0,
        checkpoint_every_steps=None,
        curve_tokens=plan.curve_tokens,
        curve_every_tokens=every * batch,
        noise_every_steps=None,
        trackers=(),
    )
    return replace(
        plan.template,
        run_id=make_run_id(plan.template.rung, science),
        science=science,
        execution=execution,
        shards=str(plan.shards),
    )


class _Sweep:
    """The trials so far."""

    def __init__(self, plan: SweepPlan, labs: Path, say: Say) -> None:
        self.plan, self.labs, self.say = plan, labs, say
        self.specs: dict[tuple[int, float], RunSpec] = {}

    def folder(self, spec: RunSpec) -> RunFolder:
        return RunFolder(self.plan.folder / "runs" / spec.run_id)

    def train(self, wanted: list[tuple[int, float]], until: float | None) -> None:
        """Every trial that is not on disk yet, in one launch."""
        paths = []
        for key in wanted:
            spec = self.specs[key] = trial_spec(self.plan, *key)
            folder = self.folder(spec)
            codec.write_json(folder.spec, spec)
            if not self._done(spec, until):
                paths.append(str(folder.spec))
        if not paths:
            return
        self.say(f"training {len(paths)} trial{'s' * (len(paths) > 1)}")
        box = self.plan.setting.box
        code = run_recipe(
            "batch_sweep",
            ["--specs", *paths, *(["--until", repr(until)] if until is not None else [])],
            n_processes=1,
            box=box,
            on_gpu=box.on_gpu,
            lab=self.labs,
            watch=self.plan.template.watch,
            say=self.say,
        )
        for key in wanted:
            shutil.rmtree(self.folder(self.specs[key]).checkpoints, ignore_errors=True)
        unfinished = [key for key in wanted if not self._done(self.specs[key], until)]
        if unfinished:
            record = self.folder(self.specs[unfinished[0]]).read_record()
            if record is not None and record.stopped_by == "watchdog":
                raise StoppedByWatchdog(f"the sweep was ended by the watchdog: {record.reason}")
            why = record.reason if record and record.reason else f"the launch ended with exit code {code}"
            raise RunFailed(f"{len(unfinished)} trials of the sweep did not end ({why}); the same command goes on")

    def _done(self, spec: RunSpec, until: float | None) -> bool:
        record = self.folder(spec).read_record()
        if record is None:
            return False
        return record.status in ("finished", "diverged") or (
            until is not None and trials.reached(self.curve(spec)[1], until)
        )

    def curve(self, spec: RunSpec) -> tuple[list[float], list[float]]:
        """Steps and held-out losses at constant rate."""
        lines = [
            line
            for line in codec.read_jsonl(self.folder(spec).metrics)
            if line["kind"] == "val" and line["set"] == "curve"
        ]
        return [float(line["step"]) for line in lines], [float(line["loss"]) for line in lines]

    def end_loss(self, key: tuple[int, float]) -> float | None:
        """The smoothed loss of a trial's last validation; None where it diverged."""
        record = self.folder(self.specs[key]).read_record()
        _, losses = self.curve(self.specs[key])
        if record is None or record.status == "diverged" or not losses:
            return None
        return trials.smoothed(losses)[-1]

    def trial(self, key: tuple[int, float], target: float) -> Trial:
        """What became of one."""
        spec = self.specs[key]
        steps, losses = self.curve(spec)
        found = trials.crossing(steps, losses, target)
        record = self.folder(spec).read_record()
        diverged = record is not None and record.status == "diverged"
        why = None
        if found is None:
            low = f", its lowest loss was {min(losses):.3f}" if losses else ""
            why = (
                f"diverged{low}" if diverged else f"not reached within {spec.science.horizons_tokens[0]:,} tokens{low}"
            )
        return Trial(
            run_id=spec.run_id,
            batch_tokens=spec.science.batch_tokens_global,
            lr_peak=spec.science.schedule.lr_peak,
            n_steps=found,
            why_not=why,
        )

    def factors(self, seqs: int) -> list[float]:
        return [factor for s, factor in self.specs if s == seqs]


def run_sweep(plan: SweepPlan, labs: Path, say: Say) -> SweepResult:
    """Trains what is not on disk yet and fits the hyperbola.

    Raises:
        DataError: too few batches reached the target.
        RunFailed: a trial did not end.
        Stopped, StoppedByWatchdog: it was asked to, or had to.
    """
    sweep, middle = _Sweep(plan, labs, say), plan.middle_seqs
    sweep.train([(middle, factor) for factor in RATES], None)
    while (more := trials.more_rates({f: sweep.end_loss((middle, f)) for f in sweep.factors(middle)})) is not None:
        sweep.train([(middle, more)], None)
    ends = [loss for f in sweep.factors(middle) if (loss := sweep.end_loss((middle, f))) is not None]
    if not ends:
        raise RunFailed(
            f"every rate diverged at the middle batch, from {plan.lr_middle * RATES[0]:.1e} up; lower the ladder's rate"
        )
    target = min(ends)
    say(f"target: held-out loss {target:.3f} nats, as the middle batch has after {plan.target_tokens:,} tokens")
    others = [seqs for seqs in plan.batches_seqs if seqs != middle]
    todo = [(seqs, factor) for seqs in others for factor in RATES]
    while todo:
        sweep.train(todo, target)
        found = {seqs: {f: sweep.trial((seqs, f), target).n_steps for f in sweep.factors(seqs)} for seqs in others}
        todo = [(seqs, more) for seqs in others if (more := trials.more_rates(found[seqs])) is not None]
    context = plan.setting.shape.context_tokens
    edges = []
    for seqs in plan.batches_seqs:
        steps = {f: sweep.trial((seqs, f), target).n_steps for f in sweep.factors(seqs)}
        good = {f: n for f, n in steps.items() if n is not None}
        if good and min(good, key=lambda f: good[f]) in (min(steps), max(steps)):
            edges.append(seqs * context)
    return trials.summarise(
        [sweep.trial(key, target) for key in sorted(sweep.specs)],
        rung=plan.setting.rung.name,
        target_nats=target,
        target_tokens=plan.target_tokens,
        edges=edges,
    )
