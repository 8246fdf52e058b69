"""Shows every derived number of a ladder, wanted against actual, before anything is trained."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec

if TYPE_CHECKING:
    from homelab_scaling.box import Box
    from homelab_scaling.ladder import Ladder
    from homelab_scaling.plan.parts import Plan
    from homelab_scaling.plan.simulate import Planner, Simulation
    from homelab_scaling.sweep.batches import Batches

TABLE_COLUMNS = 100
"""Narrower, the tables would break their numbers."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which ladder, and for which machine."""

    ladder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LADDER")]
    """A ladder file, or the name of a shipped one such as quickstart."""
    lab: Path = Path("lab")
    """The folder that holds the labs; finished shards and measured speeds are taken from LAB/LADDER."""
    card: str | None = None
    """Plan for this card instead of the machine's own, for example "RTX 4080"."""
    gpus: int | None = None
    """How many of them; 0 plans for the CPU."""
    watts: float | None = None
    """Power of the whole machine under load, for kWh and money; else the cards' rated power."""
    seeds: int | None = None
    """Train every rung with so many seeds: the ladder's own first, then the next numbers. Without it, a lab goes on
    with all the seeds it has."""
    write: bool = False
    """Write LAB/LADDER/plan.json."""
    simulate: Annotated[str | None, tyro.conf.arg(metavar="LAW")] = None
    """Say what this ladder would find if LAW were true: a published law such as hoffmann-2022, a fit or a lab."""
    worlds: int = 200
    """Simulated experiments behind each expected interval."""
    noise: tuple[float, float] = (0.003, 0.001)
    """Relative noise of a loss: shared within a run (seed, data order), and of each row alone."""
    target: tuple[str, ...] = ()
    """What else to expect an interval of: d-opt:N, n-opt:C or loss:N,D; d-opt:1e9 when not given."""
    json: bool = False
    """Print the plan as one JSON document, on several cards with their `schedule`; with --simulate, a `simulation`."""


def main(args: Args) -> int:
    from homelab_scaling.batch.advice import advised_batches
    from homelab_scaling.batch.bracket import tuned_rates
    from homelab_scaling.plan.begin import start_of
    from homelab_scaling.plan.cost import measured_rates
    from homelab_scaling.plan.ddp_times import read_ddp
    from homelab_scaling.plan.ladder import find_corpus, plan_ladder, read_ladder, shards_folder
    from homelab_scaling.plan.machine import machine_for
    from homelab_scaling.plan.seeds import plan_with_seeds, with_seeds
    from homelab_scaling.plan.show import plan_page
    from homelab_scaling.plan.simulation_page import simulation_page
    from homelab_scaling.sweep.local import planned_schedule, schedule_words

    ladder, path = read_ladder(args.ladder)
    if args.seeds is not None:
        ladder = with_seeds(ladder, args.seeds)
    shards = shards_folder(ladder, path, args.lab)
    corpus = find_corpus(ladder, shards)
    box = machine_for(args.card, args.gpus)
    measured, advised = measured_rates([args.lab / ladder.name]), advised_batches(args.lab / ladder.name)

    def planner(one: "Ladder") -> "Plan":
        return plan_ladder(
            one,
            corpus,
            box,
            shards="../../shards" if ladder.data.shards is None else str(shards),
            measured=measured,
            ddp=read_ddp(args.lab),
            advised=advised,
            tuned=tuned_rates(args.lab / ladder.name),
            watts=args.watts,
            folder=path.parent,
            start=start_of(ladder, path, corpus, shards),
        )

    plan = plan_with_seeds(ladder, args.lab / ladder.name, planner, asked=args.seeds is not None)
    batches = _batches(args, box)
    plan = replace(plan, measuring=batches.measuring())
    packed = planned_schedule(plan if plan.runs else batches.plan, ladder, args.lab / ladder.name)
    simulation = _simulation(args, ladder, planner)
    if args.write:
        target = args.lab / ladder.name / "plan.json"
        codec.write_json(target, plan)
        print(f"written: {target}", file=sys.stderr)
    if args.json:
        more = {"schedule": packed, "simulation": simulation}
        print(codec.dumps(codec.to_plain(plan) | {k: codec.to_plain(v) for k, v in more.items() if v is not None}))
        return 0
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=max(TABLE_COLUMNS, Console().width))
    said = schedule_words(packed) if packed else None
    for part in [*plan_page(plan, said), *(simulation_page(simulation) if simulation else [])]:
        console.print(part)
    return 0


def _batches(args: Args, box: "Box") -> "Batches":
    """What `homelab run` will measure before it trains, and a plan with runs although there are no shards yet."""
    from homelab_scaling.sweep.batches import Batches
    from homelab_scaling.sweep.prepare import existing_corpus, open_experiment

    experiment = replace(open_experiment(args.ladder, args.lab, args.seeds), box=box)
    return Batches(experiment, existing_corpus(experiment))


def _simulation(args: Args, ladder: "Ladder", planner: "Planner") -> "Simulation | None":
    if args.simulate is None:
        return None
    from homelab_scaling.fit.worlds import Noise
    from homelab_scaling.plan.simulate import open_truth, simulate

    run_sd, row_sd = args.noise
    return simulate(
        ladder,
        planner,
        open_truth(args.simulate),
        noise=Noise(run_sd=run_sd, row_sd=row_sd),
        n_worlds=args.worlds,
        targets=args.target,
    )


if __name__ == "__main__":
    raise SystemExit(cli.main(["plan", *sys.argv[1:]]))
