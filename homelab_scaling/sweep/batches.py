"""The batch of every rung of an experiment: what is known, what is to be measured, and the advice that follows.

    probes -> noise scale -> calibration -> batch.json -> the plan obeys

One session serves `homelab batch-size`, which measures what it is asked to, and `homelab run`, which measures each rung
before it is trained. `run` never fails for want of a number: a rung whose noise scale cannot be measured gets a lower
bound, a forecast from other rungs, or the ladder's own batch, and a line says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from homelab_scaling.batch.advice import (
    BatchAdvice,
    Measured,
    RungAdvice,
    advise,
    begun_runs,
    read_advice,
    write_advice,
)
from homelab_scaling.batch.branch import finished_branch
from homelab_scaling.batch.branch_fit import BranchResult
from homelab_scaling.batch.branch_plan import BranchPlan, plan_branch
from homelab_scaling.batch.calibration import Calibration
from homelab_scaling.batch.measure import (
    assumed_corpus,
    bill_of,
    longest_run,
    measured_from,
    run_probes,
    try_probes,
)
from homelab_scaling.batch.priors import OVERHEAD_FRAC
from homelab_scaling.batch.probe import ProbePlan, finished_probe, plan_probe
from homelab_scaling.batch.table import Setting, measured_batch_rates
from homelab_scaling.batch.trials import SweepResult
from homelab_scaling.errors import SpecError
from homelab_scaling.plan import rules
from homelab_scaling.plan.cost import CPU_START_S, GPU_START_S, measured_rates
from homelab_scaling.plan.parts import Measuring, Plan
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.sweep.calibrating import calibrate_by_branch
from homelab_scaling.sweep.prepare import Experiment, make_plan

TOGETHER_BELOW_S = 120.0
"""Probes of all rungs that take less than this share one launch, because each launch costs its start-up."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person asks of a measurement beside the ladder; None is as the ladder, or batch.json before, has it."""

    burn_in_frac: float | None = None
    """Share of the longest horizon that a probe trains."""
    again: tuple[str, ...] = ()
    """Rungs to measure anew."""
    watts: float | None = None
    """Of the whole machine under load."""
    overhead_max_frac: float | None = None
    rescale_beta2: bool | None = None
    branch: bool = True
    """Whether branches may calibrate, where the ladder has them; a sweep does it without."""
    at_once: int = 1
    """Runs that train side by side; then everything is measured first, so that they can be packed."""


class Batches:
    """One experiment's batches.

    Args:
        corpus: None plans with an assumed text; nothing can be measured then.
    """

    def __init__(self, experiment: Experiment, corpus: CorpusManifest | None, wishes: Wishes | None = None) -> None:
        self.experiment, self.corpus, self.wishes = experiment, corpus, wishes or Wishes()
        self.ladder, self.lab = experiment.ladder, experiment.lab
        given = corpus
        if given is None:
            given = assumed_corpus(self.ladder, make_plan(experiment, None, advised=False).n_vocab)
        # As the ladder alone has it: what is measured must not depend on what was advised before.
        self.plan = make_plan(experiment, given, advised=False)
        powers = measured_rates([self.lab])
        self.settings = [
            Setting(
                rung=rung,
                n_vocab=self.plan.n_vocab,
                box=experiment.box,
                ladder=self.ladder,
                measured=powers,
                watts=self.wishes.watts,
            )
            for rung in self.plan.rungs
        ]
        self.advice = self._read()
        self.measured = self._known()
        self.branched = False
        asked = self.wishes.burn_in_frac
        self.burn_in_frac = self.ladder.batch.burn_in_frac if asked is None else asked

    def _read(self) -> BatchAdvice | None:
        """batch.json, as far as it is about this text, these models and these horizons."""
        found = read_advice(self.lab)
        if found is None or found.data_id != self.plan.data_id:
            return None
        here = {s.rung.name: s for s in self.settings}
        kept = tuple(r for r in found.rungs if r.rung in here and _is_about(r, here[r.rung]))
        names = {r.rung for r in kept}
        calibration = found.calibration if found.calibration.rung in names else Calibration()
        sweep = found.sweep if found.sweep is not None and found.sweep.rung in names else None
        branch = found.branch if found.branch is not None and found.branch.rung in names else None
        return replace(found, rungs=kept, calibration=calibration, sweep=sweep, branch=branch)

    def _known(self) -> dict[str, Measured]:
        """Noise scales in batch.json, but for what is to be measured anew."""
        rungs = self.advice.rungs if self.advice else ()
        return {r.rung: r.measured for r in rungs if r.measured is not None and r.rung not in self.wishes.again}

    # ------------------------------------------------------------------------------------------------- what is known

    @property
    def smallest(self) -> Setting:
        return self.by_size[0]

    @property
    def by_size(self) -> list[Setting]:
        return sorted(self.settings, key=lambda s: s.rung.size.n_params)

    def is_known(self, name: str) -> bool:
        """Whether a rung's noise scale is there."""
        found = self.measured.get(name)
        return found is not None and found.b_simple is not None

    @property
    def begun(self) -> frozenset[str]:
        """Rungs whose training has begun at the batch that batch.json advises."""
        here = {s.rung.name: s for s in self.settings}
        advised = {r.rung for r in self.advice.rungs} if self.advice else set[str]()
        began = [run for run in begun_runs(self.lab) if run.rung in advised]
        text = {_text(run) for run in self.plan.runs}
        return frozenset(run.rung for run in began if _text(run) in text and _trains(run, here[run.rung]))

    @property
    def begun_unadvised(self) -> dict[str, str]:
        """Rungs whose training began at the ladder's own batch, which is not given as such; and the reason to say."""
        planned = {_but_for_its_rate(run) for run in self.plan.runs}
        began = {run.rung for run in begun_runs(self.lab) if _but_for_its_rate(run) in planned}
        return {
            name: "its training began before anything was measured"
            for name in self._free()
            if name in began and name not in self.begun
        }

    def _free(self) -> list[str]:
        """Rungs to which the ladder gives no batch, ascending in size."""
        fixed = {r.name for r in self.ladder.rungs if r.batch_tokens is not None}
        return [] if self.ladder.batch.tokens else [s.rung.name for s in self.by_size if s.rung.name not in fixed]

    @property
    def pending(self) -> list[str]:
        """Rungs that `homelab run` measures, ascending in size."""
        if not self.ladder.batch.measure:
            return []
        settled = {*self.begun, *self.begun_unadvised}
        return [name for name in self._free() if name not in settled and not self.is_known(name)]

    def kept_words(self) -> list[str]:
        """What is not measured again, in words."""
        said = []
        if known := [s.rung.name for s in self.settings if self.is_known(s.rung.name)]:
            said.append(f"measured before and kept: {', '.join(known)} (--again measures anew)")
        if kept := sorted(self.begun):
            said.append(f"training has begun, so the batch stays as it was advised: {', '.join(kept)}")
        said += [f"the batch of {name} stays the ladder's own: {why}" for name, why in self.begun_unadvised.items()]
        return said

    # ------------------------------------------------------------------------------------------------------ the plan

    def probe(self, name: str) -> ProbePlan:
        """What a probe of a rung does and costs.

        Raises:
            SpecError: the burn-in is too short, or the batch cannot be cut.
        """
        plan = plan_probe(longest_run(self.plan, name), burn_in_frac=self.burn_in_frac, box=self.experiment.box)
        branches_follow = name == self.smallest.rung.name and self.branch_plan() is not None
        return replace(plan, keep_checkpoint=branches_follow)

    def branch_plan(self) -> BranchPlan | None:
        """The branch test that is still to be made; None where the ladder wants none, or its horizon is too short."""
        wanted = self.wishes.branch and self.ladder.batch.calibrate == "branch"
        if not wanted or self.is_calibrated or self.branched:
            return None
        setting = self.smallest
        run = longest_run(self.plan, setting.rung.name)
        try:
            return plan_branch(setting, run, self.lab, self.experiment.shards, burn_in_frac=self.burn_in_frac)
        except SpecError:
            return None

    @property
    def is_calibrated(self) -> bool:
        """Whether batch.json knows how B_crit follows from the noise scale."""
        return self.advice is not None and self.advice.calibration.method != "uncalibrated"

    def probes(self, names: Sequence[str]) -> tuple[list[ProbePlan], dict[str, str]]:
        """The probes of rungs, and why others cannot have one."""
        plans, refused = [], {}
        for name in names:
            try:
                plans.append(self.probe(name))
            except SpecError as error:
                refused[name] = str(error)
        return plans, refused

    def measuring(self) -> Measuring | None:
        """What `homelab run` is going to measure, and what it costs; None where that is nothing."""
        pending = self.pending
        if not pending:
            return None
        plans, refused = self.probes(pending)
        todo = [plan for plan in plans if finished_probe(plan, self.lab) is None]
        bill = bill_of(todo)
        start = GPU_START_S if self.experiment.box.on_gpu else CPU_START_S
        together = max(self.wishes.at_once, self.experiment.box.n_gpus) > 1 or (
            bill.seconds is not None and bill.seconds < TOGETHER_BELOW_S
        )
        launches = min(1, len(todo)) if together else len(todo)
        seconds = None if bill.seconds is None else bill.seconds + launches * start
        flops = bill.flops
        smallest = self.smallest.rung.name
        branches = self.branch_plan() if smallest in pending or self.is_known(smallest) else None
        if branches is not None and finished_branch(branches) is not None:
            branches = None
        if branches is not None:
            # From the checkpoint that the probe will leave.
            share = 1 - branches.start_tokens / branches.tokens * (not branches.burn_in_paid)
            flops += branches.flops * share
            known = None if seconds is None or branches.seconds is None else (seconds, branches.seconds)
            seconds = known[0] + known[1] * share if known else None
        return Measuring(
            rungs=tuple(plan.rung for plan in plans),
            burn_in_frac=self.burn_in_frac,
            flops=flops,
            seconds=seconds,
            together=together,
            calibrated_on=branches.rung if branches is not None else None,
            kept=refused,
        )

    def planned(self) -> Plan:
        """The plan with every batch that is known so far, and what is measured before it is final."""
        return replace(make_plan(self.experiment, self.corpus), measuring=self.measuring())

    # ------------------------------------------------------------------------------------------------- the measuring

    def measure(self, plans: Sequence[ProbePlan], say: Say) -> None:
        """Runs probes and remembers what they found.

        Raises:
            RunFailed: one left no result.
            Stopped, StoppedByWatchdog: it was asked to stop.
        """
        results = run_probes(
            plans,
            lab=self.lab,
            shards=self.experiment.shards,
            box=self.experiment.box,
            again=bool(self.wishes.again),
            say=say,
        )
        for result in results:
            say(f"{result.rung}: {result.middle.words}")
            self.measured[result.rung] = measured_from(result)

    def measure_or_say(self, names: Sequence[str], say: Say) -> None:
        """Runs the probes of rungs; what has no number is remembered with its reason, and what is done then is said.

        Raises:
            Stopped, StoppedByWatchdog: it was asked to stop.
        """
        plans, refused = self.probes(names)
        found, failed = try_probes(plans, lab=self.lab, shards=self.experiment.shards, box=self.experiment.box, say=say)
        for name in names:
            if name in found:
                self.measured[name] = measured_from(found[name])
                if self.is_known(name):
                    say(f"{name}: {found[name].middle.words}")
            else:
                why = refused.get(name) or f"its probe ended without a result: {failed[name]}"
                self.measured[name] = Measured(b_simple=None, why_no_number=why, loss_nats=None)

    def advise(
        self,
        *,
        calibration: Calibration | None = None,
        sweep: SweepResult | None = None,
        branch: BranchResult | None = None,
        keep: frozenset[str] = frozenset(),
        or_prior: bool = False,
    ) -> BatchAdvice:
        """Writes batch.json from everything that is known.

        Args:
            calibration, sweep, branch: None keeps those of batch.json.
            keep: rungs whose advice stands although their training has not begun.
            or_prior: where nothing is measured, the ladder's own batches instead of an error.

        Raises:
            DataError: nothing is measured.
        """
        before, wishes = self.advice, self.wishes
        rates = measured_batch_rates([self.lab, self.lab / "batch_sweep"])
        overhead, beta2 = wishes.overhead_max_frac, wishes.rescale_beta2
        self.advice = advise(
            [replace(setting, rates=rates) for setting in self.settings],
            self.measured,
            ladder=self.ladder.name,
            data_id=self.plan.data_id or "",
            calibration=calibration or (before.calibration if before else None),
            sweep=sweep or (before.sweep if before else None),
            branch=branch or (before.branch if before else None),
            previous=before,
            begun=self.begun | keep,
            own_batch=self.begun_unadvised,
            or_prior=or_prior,
            rescale_beta2=beta2 if beta2 is not None else before is not None and before.rescale_beta2,
            overhead_max_frac=overhead or (before.overhead_max_frac if before else OVERHEAD_FRAC),
        )
        write_advice(self.lab, self.advice)
        return self.advice

    def in_turn(self, say: Say) -> Iterator[list[str]]:
        """Groups of rungs to be trained, in order, each as soon as its batches are settled.

        Before a group comes out, what it lacks is measured and batch.json is written. Nothing to measure gives one
        group of all rungs; little to measure is measured at once; else every rung is, before it is trained.

        Raises:
            Stopped, StoppedByWatchdog: while measuring.
        """
        everything = [s.rung.name for s in self.settings]
        measuring = self.measuring()
        if measuring is None:
            yield everything
            return
        if measuring.together:
            self._settle(self.pending, say)
            yield everything
            return
        pending, group = set(self.pending), list[str]()
        for name in (s.rung.name for s in self.by_size):
            if name in pending:
                if group:
                    yield group
                self._settle([name], say)
                yield [name]
                group = []
            else:
                group.append(name)
        if group:
            yield group

    def _settle(self, names: Sequence[str], say: Say) -> None:
        """Measures rungs and revises the advice of all that are not measured yet."""
        settled = frozenset(name for name in self.measured if self.is_known(name))
        self.measure_or_say(names, say)
        found = calibrate_by_branch(self, say)
        if found is None:
            advice = self.advise(keep=settled, or_prior=True)
        else:  # every B_crit follows from it
            advice = self.advise(calibration=found[0], branch=found[1], or_prior=True)
        for name in names:
            if (told := advice.rung(name)) is not None:
                say(in_words(told))


def _is_about(told: RungAdvice, setting: Setting) -> bool:
    """Whether advice is for this model and horizon; another batch rounds a horizon a little differently."""
    off = abs(rules.gap(setting.horizon_tokens, told.n_tokens))
    return told.shape == setting.shape and off <= rules.GAP_WARN_FRAC


def _trains(spec: RunSpec, setting: Setting) -> bool:
    """Whether a run is of this model and horizon, rather than of what the ladder said before it was changed."""
    horizons = setting.rung.training.horizons
    own = horizons if spec.science.schedule.name == "cosine" else horizons[-1:]  # a cosine has a run for each
    gaps = [abs(rules.gap(h.tokens, spec.science.horizons_tokens[-1])) for h in own]
    return spec.science.shape == setting.shape and min(gaps) <= rules.GAP_WARN_FRAC


def _text(run: RunSpec) -> tuple[str, ...]:
    science = run.science
    return science.tokenizer_hash, science.train_fingerprint, science.val_fingerprint


def _but_for_its_rate(run: RunSpec) -> tuple[object, ...]:
    """What a run trains, apart from the learning rate, which may have been tuned since it was planned."""
    science = run.science
    return run.rung, science.seed, science.shape, science.horizons_tokens, science.batch_tokens_global, *_text(run)


def in_words(told: RungAdvice) -> str:
    """A rung's advice in a sentence."""
    grounds: Mapping[str, str] = {
        "measured": "by its measured noise scale",
        "bound": "by a lower bound of its noise scale",
        "forecast": f"foretold {told.forecast.words}" if told.forecast else "foretold",
        "prior": "",
    }
    head = f"{told.rung}: batch {told.batch_tokens:,} tokens at rate {told.lr_peak:.2e}"
    if told.basis == "prior":
        return f"{head}: {told.why}"
    missing = ""
    if told.basis != "measured" and told.measured is not None:
        missing = f"; its own is not known: {told.measured.why_no_number}"
    return f"{head}, {grounds[told.basis]} (B_crit {told.b_crit.value:,.0f} tokens): {told.why}{missing}"
