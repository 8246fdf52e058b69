"""Measures the gradient noise scale of one rung, or of several: what `homelab batch-size` launches.

    accelerate launch recipes/noise_probe.py --ladder recipes/ladders/quickstart.toml --rung 110k
    accelerate launch --num_processes 2 --multi_gpu recipes/noise_probe.py --probe lab/NAME/batch/RUNG/probe.json

Trains a stretch of the rung at its own batch and rate, listens to its gradients, and writes lab/NAME/batch/RUNG.json.
Launch the same line again to resume; a finished probe of the same science is not repeated. Read
homelab_scaling/batch/probing.py for what happens inside.
"""

import os
import sys
import time

STARTED = time.monotonic()

from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402

from homelab_scaling import cli, codec  # noqa: E402
from homelab_scaling.batch.probe import (  # noqa: E402
    BURN_IN_FRAC,
    N_POINTS,
    ProbePlan,
    finished_probe,
    plan_probe,
    prepare_probe,
    result_path,
    work_folder,
)
from homelab_scaling.errors import (  # noqa: E402
    HomelabError,
    RunFailed,
    SpecError,
    Stopped,
    StoppedByWatchdog,
    UserError,
)
from homelab_scaling.specs import RunSpec  # noqa: E402
from homelab_scaling.sweep.prepare import Experiment, existing_corpus, make_plan, open_experiment  # noqa: E402
from homelab_scaling.train.oom_notes import NoRoom, OutOfMemory  # noqa: E402

TOGETHER = (Stopped, StoppedByWatchdog, RunFailed)
"""Ends that every rank comes to after the same update."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measures the gradient noise scale of a rung."""

    probe: tuple[Path, ...] = ()
    """probe.json of each probe, as `homelab batch-size` writes them."""
    ladder: str | None = None
    """Ladder file (or the name of a shipped one), instead of --probe; its shards must have been built."""
    rung: str | None = None
    """With --ladder: which rung."""
    lab: Path = Path("lab")
    """With --ladder: the folder that holds the labs."""
    burn_in: float = BURN_IN_FRAC
    """With --ladder: how much of the longest horizon is trained."""
    points: int = N_POINTS
    """With --ladder: how many measurements, each at about twice the tokens of the one before."""
    microbatch: int | None = None
    """With --ladder: sequences per micro-batch; smaller ones show more of the noise and cost more time."""
    processes: int | None = None
    """With --ladder: ranks of this launch, when they differ from the plan's."""


def probes_of(args: Args) -> list[tuple[ProbePlan, Path]]:
    """The probes asked for, each with its lab (LAB/<ladder>); with --ladder, its folder is written first."""
    if bool(args.probe) == (args.ladder is not None):
        raise UserError("give either --probe FILE... or --ladder FILE --rung NAME")
    if args.probe:
        return [(codec.read_json(path, ProbePlan), path.resolve().parents[2]) for path in args.probe]
    if args.rung is None:
        raise UserError("--ladder wants --rung NAME too; `homelab plan LADDER` lists the names")
    spec, experiment = rung_spec(str(args.ladder), args.rung, args.lab)
    if args.processes is not None:
        spec = replace(spec, execution=replace(spec.execution, n_processes=args.processes))
    plan = plan_probe(
        spec,
        burn_in_frac=args.burn_in,
        n_points=args.points,
        microbatch_seqs=args.microbatch,
        box=experiment.box,
    )
    lab = experiment.lab
    if os.environ.get("RANK", "0") == "0":
        print(plan.words, file=sys.stderr, flush=True)
        if finished_probe(plan, lab) is None:
            with work_folder(lab, plan.rung).lock():  # another probe of this rung may be at work there
                prepare_probe(plan, lab)
    return [(plan, lab)]


def rung_spec(ladder: str, rung: str, labs: Path) -> tuple[RunSpec, Experiment]:
    """The longest run of a rung's first seed as the ladder alone would have it, and the experiment it belongs to."""

    experiment = open_experiment(ladder, labs)
    corpus = existing_corpus(experiment)
    if corpus is None:
        raise SpecError(f"{experiment.shards}: no shards yet; run `homelab run {ladder} --prepare` first")
    seed = experiment.ladder.seeds[0]
    runs = make_plan(experiment, corpus, advised=False).runs
    chosen = [spec for spec in runs if spec.rung == rung and spec.science.seed == seed]
    if not chosen:
        names = ", ".join(r.name for r in experiment.ladder.rungs)
        raise SpecError(f"{experiment.ladder_file.name} has no rung {rung!r}; its rungs are {names}")
    return max(chosen, key=lambda spec: spec.science.horizons_tokens[-1]), experiment


def main(argv: list[str]) -> int:
    """Exit code of this rank; see errors.py."""
    try:
        run_all(probes_of(cli.parse(Args, argv, "recipes/noise_probe.py")))
    except HomelabError as error:
        print(f"noise_probe: {error}", file=sys.stderr)
        if is_alone(error):
            sys.stderr.flush()
            os._exit(error.exit_code)  # no farewell: the other ranks wait in a collective and must be ended
        return error.exit_code
    return 0


def run_all(probes: list[tuple[ProbePlan, Path]]) -> None:
    """Runs probes one after the other, and leaves the process group in good order whatever happens."""
    from homelab_scaling.batch.probing import run_probe
    from homelab_scaling.train.session import leave_group

    together, alone = False, False
    try:
        started = STARTED
        for plan, lab in probes:
            if run_probe(plan, lab, started=started) is None:
                print(f"{plan.rung}: measured before, in {result_path(lab, plan.rung)}", file=sys.stderr)
            started = time.monotonic()  # only the first probe pays for the imports
        together = True
    except TOGETHER as error:
        alone = is_alone(error)
        together = not alone
        raise
    finally:
        if not alone:
            leave_group(together=together)


def is_alone(error: HomelabError) -> bool:
    """Only this rank of several ended: memory ran out on it."""
    return isinstance(error, OutOfMemory | NoRoom) and int(os.environ.get("WORLD_SIZE", "1")) > 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
