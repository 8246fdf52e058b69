"""Tunes the learning rate of the smallest rungs before the larger ones are planned: the trials, the winners, lr.json.

A trial is an ordinary run in LAB/<ladder>/bracket_runs, so the watchdog, a lack of memory and interruptions are met as
for any run. What is decided is frozen: started again, nothing that is in lr.json is trained or judged anew.
"""

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from homelab_scaling import codec
from homelab_scaling.batch.bracket import (
    Bracket,
    BracketRung,
    RateTrial,
    best_rate,
    bracket_file,
    fit_rates,
    next_factor,
    read_bracket,
    tuned_rung,
    tuning_effect,
)
from homelab_scaling.errors import DataError
from homelab_scaling.plan.parts import Plan, RungPlan
from homelab_scaling.plan.tuned import TunedRates, rungs_to_tune
from homelab_scaling.runs import BRACKET_RUNS, RunFolder, readable_runs
from homelab_scaling.specs import CorpusManifest, RunSpec, make_run_id
from homelab_scaling.sweep.local import Outcome, Run
from homelab_scaling.sweep.prepare import Experiment, make_plan
from homelab_scaling.train.oom_notes import keep_smaller

Say = Callable[[str], None]


def ensure_rates(
    experiment: Experiment,
    corpus: CorpusManifest,
    launch: Callable[[list[Run]], Outcome],
    say: Say,
    *,
    rungs: Collection[str] | None = None,
    change: Callable[[RunSpec], RunSpec] = lambda spec: spec,
) -> Outcome | None:
    """Tunes what the ladder wants tuned and lr.json does not hold yet; the plan made after it obeys.

    Args:
        launch: trains runs, such as `sweep.local.run_all` with the caller's settings.
        rungs: only these, whose batches are settled; all when not given.
        change: execution settings of every trial.

    Returns:
        None where the larger rungs may be trained; else how it ended before that: stopped, with a trial that failed, or
        with a rung of which every rate diverged.
    """
    plan = make_plan(experiment, corpus, tuned=False)
    wanted = [r for r in rungs_to_tune(experiment.ladder, plan.rungs) if rungs is None or r.name in rungs]
    if not wanted:
        return None
    bracket = _start(experiment, plan)
    for rung in wanted:
        if bracket.rates.rung(rung.name) is None and rung.name not in bracket.rates.kept:
            tuning = _Tuning(experiment, plan, rung, change)
            ended = tuning.run(launch, say)
            if ended is not None:
                return ended
            try:
                found = tuning.result()
            except DataError as error:  # an end like that of a run that diverged: the report is still written
                return Outcome(finished=(), failed={rung.name: str(error)}, stopped=False)
            bracket = _refitted(bracket, (*bracket.rungs, found))
            codec.write_json(bracket_file(experiment.lab), bracket)
            say(_said(bracket.rungs, rung.name))
        _move_winners(experiment, bracket)
    if len(bracket.rungs) > 1:
        say(bracket.rates.words)
        say(bracket.effect.words)
    return None


def _start(experiment: Experiment, plan: Plan) -> Bracket:
    """lr.json as far as it holds for this ladder and text, else an empty one that keeps the rates of begun rungs."""
    found, rule, data_id = read_bracket(experiment.lab), experiment.ladder.lr, plan.data_id or ""
    begun = {spec.rung: spec.science.schedule.lr_peak for _, spec, _ in readable_runs([experiment.lab])}
    if found is not None and found.rates.holds_for(rule, data_id) is None:
        here = {r.name: (r.size.shape, r.training.batch_tokens) for r in plan.rungs}
        kept = tuple(r for r in found.rungs if here.get(r.name) == (r.shape, r.batch_tokens))
        # Larger rungs that began by the law so far: a law through one rung more is not for them.
        followed = {name: lr for name, lr in begun.items() if name not in {r.name for r in found.rungs}}
        found = replace(found, rates=replace(found.rates, kept=followed | found.rates.kept))
        return found if kept == found.rungs else _refitted(found, kept)
    rates = TunedRates(data_id=data_id, rule=rule, rungs=(), log_factor=0.0, slope=0.0, kept=begun)
    return Bracket(ladder=experiment.ladder.name, rungs=(), rates=rates, effect=tuning_effect(()))


def _refitted(bracket: Bracket, rungs: Sequence[BracketRung]) -> Bracket:
    rungs = tuple(sorted(rungs, key=lambda r: r.n_params))
    log_factor, slope = fit_rates(rungs)
    tried = tuple(sorted({t.factor for rung in rungs for t in rung.trials if t.final is not None}))
    rates = replace(
        bracket.rates, rungs=tuple(tuned_rung(r) for r in rungs), log_factor=log_factor, slope=slope, tried=tried
    )
    return replace(bracket, rungs=rungs, rates=rates, effect=tuning_effect(rungs))


def _said(rungs: Sequence[BracketRung], name: str) -> str:
    rung = next(r for r in rungs if r.name == name)
    losses = ", ".join(f"x {t.factor:g}: {'–' if t.final is None else f'{t.final:.3f}'}" for t in rung.trials)
    note = f" ({rung.best.note})" if rung.best.note else ""
    return (
        f"{name}: loss by rate {losses}; takes x {rung.best.factor:g}, the best lies at x {rung.best.vertex:.2f}{note}"
    )


def _move_winners(experiment: Experiment, bracket: Bracket) -> None:
    """The run of each tuned rung goes to runs/; done again after an interruption, it finds nothing to do."""
    for rung in bracket.rungs:
        for run_id in rung.winner.run_ids:
            source, target = experiment.lab / BRACKET_RUNS / run_id, experiment.run(run_id)
            if not source.is_dir():
                continue
            if target.path.is_dir() and not target.record.exists():  # a spec.json that --prepare wrote
                shutil.rmtree(target.path)
            target.path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, target.path)


class _Tuning:
    """One rung's trials."""

    def __init__(
        self, experiment: Experiment, plan: Plan, rung: RungPlan, change: Callable[[RunSpec], RunSpec]
    ) -> None:
        self.experiment, self.rung, self.change = experiment, rung, change
        seed = experiment.ladder.seeds[0]
        self.runs = [spec for spec in plan.runs if spec.rung == rung.name and spec.science.seed == seed]
        self.asked = tuple(sorted(experiment.ladder.lr.bracket))
        self.trials: dict[float, list[Run]] = {}

    def run(self, launch: Callable[[list[Run]], Outcome], say: Say) -> Outcome | None:
        """Trains the asked factors, then beyond an edge; None when there is nothing left to try."""
        todo: tuple[float, ...] = self.asked
        while todo:
            listed = ", ".join(f"{f:g}" for f in todo)
            say(f"tuning the rate of {self.rung.name}: {listed} x {self.runs[0].science.schedule.lr_peak:.2e}")
            for factor in todo:
                self.trials[factor] = [self._prepare(spec, factor) for spec in self.runs]
            ended = launch([run for factor in todo for run in self.trials[factor]])
            if ended.stopped:
                return ended
            if failed := {i: why for i, why in ended.failed.items() if not self._diverged(i)}:
                return replace(ended, failed=failed)
            more = next_factor({f: self._trial(f).final for f in self.trials}, len(self.asked))
            todo = () if more is None else (more,)
        return None

    def _prepare(self, spec: RunSpec, factor: float) -> Run:
        """A trial's spec.json, beside what it left when it was interrupted."""
        schedule = spec.science.schedule
        if factor != 1:
            schedule = replace(schedule, lr_peak=float(f"{schedule.lr_peak * factor:.6g}"))
        science = replace(spec.science, schedule=schedule)
        run_id = make_run_id(spec.rung, science)
        folder = RunFolder(self.experiment.lab / BRACKET_RUNS / run_id)
        trial = keep_smaller(self.change(replace(spec, science=science, run_id=run_id)), folder)
        codec.write_json(folder.spec, trial)
        return trial, folder

    def _diverged(self, run_id: str) -> bool:
        folders = [folder for runs in self.trials.values() for spec, folder in runs if spec.run_id == run_id]
        record = folders[0].read_record() if folders else None
        return record is not None and record.status == "diverged"

    def _trial(self, factor: float) -> RateTrial:
        runs = self.trials[factor]
        losses: dict[int, float] = {}
        why = None
        for spec, folder in runs:
            record = folder.read_record()
            losses |= {row.n_tokens: row.loss_nats for row in record.rows} if record else {}
            if record is None or record.status != "finished":
                why = f"{spec.run_id}: {record.reason if record else 'no record'}"
        return RateTrial(
            factor=factor,
            lr_peak=runs[0][0].science.schedule.lr_peak,
            run_ids=tuple(spec.run_id for spec, _ in runs),
            losses=tuple(losses.get(h.tokens) for h in self.rung.training.horizons),
            why_not=why,
        )

    def result(self) -> BracketRung:
        """What was found.

        Raises:
            DataError: every rate diverged.
        """
        trials = tuple(self._trial(factor) for factor in sorted(self.trials))
        return BracketRung(
            name=self.rung.name,
            shape=self.rung.size.shape,
            n_params=self.rung.size.n_params,
            n_body=self.rung.size.params.n_body,
            batch_tokens=self.rung.training.batch_tokens,
            horizons_tokens=tuple(h.tokens for h in self.rung.training.horizons),
            trials=trials,
            best=best_rate({t.factor: t.final for t in trials}),
        )
