"""Does the whole job of a ladder: shards, plan, batches, every rung, fit, report. Run it again after anything.

Where the ladder gives no batch, the gradient noise scale of each rung is measured before it is trained.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import DataError, SpecError, Stopped, StoppedByWatchdog, UserError

if TYPE_CHECKING:
    from homelab_scaling.specs import RunSpec
    from homelab_scaling.sweep.batches import Batches
    from homelab_scaling.sweep.engine import Engine
    from homelab_scaling.sweep.limits import Limits
    from homelab_scaling.sweep.local import Outcome
    from homelab_scaling.sweep.prepare import Experiment


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which ladder, where to keep it, how to watch it."""

    ladder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LADDER")]
    """A ladder file, or the name of a shipped one such as quickstart."""
    lab: Path = Path("lab")
    """The folder that holds the labs; this one goes to LAB/<ladder's name>."""
    seeds: int | None = None
    """Train every rung with so many seeds: the ladder's own first, then the next numbers. Without it, a lab goes on
    with all the seeds it has."""
    prepare: bool = False
    """Build shards, write plan.json and every spec.json, and stop there (to launch by hand); measures no batch."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where curves go."""
    compile: Literal["auto", "on", "off"] | None = None
    """torch.compile, when not as the ladder says."""
    autotune: bool = False
    """Try micro-batches, compile modes and loss paths for a minute before the first run of each shape, and keep the
    fastest; what was found is remembered for this machine."""
    gpus: str | None = None
    """Which GPUs, as nvidia-smi counts them: `0,1`; all of them when not given."""
    slots: int = 1
    """Without a GPU: how many runs share the CPU at a time."""
    max_hours: float | None = None
    """Stop cleanly after so many hours; the same command goes on."""
    until: str | None = None
    """Stop cleanly at a time of day, such as 07:00; the same command goes on."""
    max_usd: float | None = None
    """Stop cleanly when the whole ladder has cost so much, by its [money] table."""
    engine: Literal["local", "ray"] = "local"
    """`ray` trains on an existing Ray cluster, one task a run."""
    address: str = "auto"
    """HOST:PORT of that cluster's head; auto is the one this machine belongs to."""
    folders: Literal["auto", "shared", "sent"] = "auto"
    """Whether its machines mount the lab, or files are sent; auto looks."""
    json: bool = False
    """Print how it ended as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.plan.show import budget_line, lab_seeds_words, measuring_notes
    from homelab_scaling.sweep.batches import Batches, Wishes
    from homelab_scaling.sweep.limits import alarmed, make_limits
    from homelab_scaling.sweep.prepare import ensure_corpus, existing_corpus, write_specs

    if args.autotune and args.engine != "local":
        raise UserError("--autotune tries settings on this machine, but --engine ray trains on others; drop one")
    limits = make_limits(max_hours=args.max_hours, until=args.until, max_usd=args.max_usd, now_s=time.time())
    with _engine(args, limits) as engine:
        experiment = engine.experiment
        with experiment.lock():
            plan = Batches(experiment, existing_corpus(experiment)).planned()
            engine.refuse_early(plan)
            _say(budget_line(plan))
            if (words := lab_seeds_words(plan)) is not None:
                _say(f"  {words}")
            with alarmed(limits):
                batches = Batches(experiment, ensure_corpus(experiment), Wishes(at_once=args.slots))
                plan = batches.planned()
                for line in [*plan.warnings, *measuring_notes(plan)]:
                    _say(f"  ! {line}" if line in plan.warnings else f"  {line}")
                if args.prepare:
                    runs = write_specs(plan, experiment, _change(args, experiment))
                    _say(f"prepared: {len(runs)} runs in {experiment.lab / 'runs'}")
                    return 0
            outcome = _train(args, batches, limits, engine)
            report = _wrap_up(experiment)
    return _end(args, experiment, outcome, report)


@contextlib.contextmanager
def _engine(args: Args, limits: "Limits") -> "Iterator[Engine]":
    """This box, or the Ray cluster."""
    from homelab_scaling.sweep.engine import ThisBox
    from homelab_scaling.sweep.prepare import open_experiment
    from homelab_scaling.sweep.where import use_gpus

    if args.engine == "local":
        for flag, value in (("--address", args.address), ("--folders", args.folders)):
            if value != "auto":
                raise SpecError(f"{flag} {value} is about a Ray cluster; add --engine ray, or leave it out")
        use_gpus(args.gpus)
        yield ThisBox(open_experiment(args.ladder, args.lab, args.seeds), limits, args.slots, _say)
        return
    from homelab_scaling.sweep.ray_cluster import connected
    from homelab_scaling.sweep.ray_engine import RayEngine

    for flag, given in (("--gpus", args.gpus is not None), ("--slots", args.slots != 1), ("--autotune", args.autotune)):
        if given:
            raise SpecError(f"{flag} is about this machine, and --engine ray trains on others; leave one of them out")
    experiment = open_experiment(args.ladder, args.lab, args.seeds)
    with connected(args.address) as ray:
        yield RayEngine(ray, experiment, args.folders, limits, _say)


def _train(args: Args, batches: "Batches", limits: "Limits", engine: "Engine") -> "Outcome":
    """Measures and trains, group of rungs by group; a stop while measuring ends it as a stop while training does."""
    from homelab_scaling.sweep import local
    from homelab_scaling.sweep.bracket import ensure_rates
    from homelab_scaling.sweep.limits import alarmed
    from homelab_scaling.sweep.prepare import write_specs

    experiment, corpus = batches.experiment, batches.corpus
    assert corpus is not None
    change = _change(args, experiment)
    outcome = local.Outcome(finished=(), failed={}, stopped=False)
    try:
        with alarmed(limits):
            for rungs in batches.in_turn(_say):
                tuning = ensure_rates(experiment, corpus, engine.run_all, _say, rungs=rungs, change=change)
                if tuning is not None:  # the rates of larger rungs would be the wrong ones
                    outcome = outcome.then(tuning)
                    break
                ended = engine.run_all(write_specs(batches.planned(), experiment, change, rungs))
                outcome = outcome.then(ended)
                if outcome.stopped:
                    break
    except Stopped:
        outcome = replace(outcome, stopped=True, limit=limits.reached(time.time(), None))
    except StoppedByWatchdog as error:
        outcome = replace(outcome, stopped=True, watchdog=str(error))
    return outcome


def _change(args: Args, experiment: "Experiment") -> Callable[["RunSpec"], "RunSpec"]:
    """What the flags make of a planned run's execution settings."""
    from homelab_scaling.train.autotune import Tuner

    fixed = experiment.ladder.train.microbatch_seqs_per_rank is not None
    tuner = Tuner(experiment.box, _say, fixed_microbatch=fixed) if args.autotune else None

    def change(spec: "RunSpec") -> "RunSpec":
        execution = replace(spec.execution, trackers=args.trackers, compile=args.compile or spec.execution.compile)
        changed = replace(spec, execution=execution)
        return tuner(changed) if tuner else changed

    return change


def _wrap_up(experiment: "Experiment") -> Path | None:
    """runs.csv, the fit and the report, from whatever has finished; also after a failure or a stop.

    None where it was stopped before there was a run.
    """
    from homelab_scaling.fit.fit import fit_points
    from homelab_scaling.fit.result import save_fit
    from homelab_scaling.report.page import write_report
    from homelab_scaling.runs import read_runs, write_runs_csv

    if not (experiment.lab / "runs").is_dir():
        return None
    write_runs_csv(experiment.lab)
    points, excluded = read_runs(experiment.lab)
    try:
        save_fit(fit_points(points, excluded, source=experiment.ladder.name), experiment.lab / "fit")
    except DataError as error:  # too few rows yet: no reason to lose the report, or how the ladder ended
        (experiment.lab / "fit" / "fit.json").unlink(missing_ok=True)
        _say(f"no fit: {error}")
    return write_report(experiment.lab)


def _end(args: Args, experiment: "Experiment", outcome: "Outcome", report: Path | None) -> int:
    if outcome.watchdog:
        _say(f"{outcome.watchdog}\nrun the same command again when the card is well, to go on")
    elif outcome.limit:
        _say(f"stopped: {outcome.limit}; run the same command again to go on")
    elif outcome.stopped:
        _say("stopped; run the same command again to go on")
    for run_id, reason in outcome.failed.items():
        _say(f"not finished: {run_id}: {reason}")
    if args.json:
        path = None if report is None else str(report)
        print(codec.dumps({"lab": str(experiment.lab), "report": path, "outcome": codec.to_plain(outcome)}))
    elif report is not None:
        print(f"report: {report}")
    return outcome.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["run", *sys.argv[1:]]))
