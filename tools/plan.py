"""Shows every derived number of a ladder, wanted against actual, before anything is trained."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from homelab_scaling import cli, codec

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
    write: bool = False
    """Write LAB/LADDER/plan.json."""
    json: bool = False
    """Print the plan as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.plan.cost import measured_rates
    from homelab_scaling.plan.ladder import find_corpus, plan_ladder, read_ladder, shards_folder
    from homelab_scaling.plan.machine import machine_for
    from homelab_scaling.plan.show import plan_page

    ladder, path = read_ladder(args.ladder)
    shards = shards_folder(ladder, path, args.lab)
    plan = plan_ladder(
        ladder,
        find_corpus(ladder, shards),
        machine_for(args.card, args.gpus),
        shards="../../shards" if ladder.data.shards is None else str(shards),
        measured=measured_rates([args.lab / ladder.name]),
        watts=args.watts,
        folder=path.parent,
    )
    if args.write:
        target = args.lab / ladder.name / "plan.json"
        codec.write_json(target, plan)
        print(f"written: {target}", file=sys.stderr)
    if args.json:
        print(codec.dumps(plan))
        return 0
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=max(TABLE_COLUMNS, Console().width))
    for part in plan_page(plan):
        console.print(part)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["plan", *sys.argv[1:]]))
