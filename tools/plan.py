"""Shows every derived number of a ladder, wanted against actual, before anything is trained."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError

if TYPE_CHECKING:
    from homelab_scaling.box import Box


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
    from homelab_scaling.plan.show import plan_page

    ladder, path = read_ladder(args.ladder)
    shards = shards_folder(ladder, path, args.lab)
    plan = plan_ladder(
        ladder,
        find_corpus(ladder, shards),
        _box(args),
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


def _box(args: Args) -> "Box":
    """The machine to plan for: this one, or the one described by --card and --gpus."""
    import dataclasses

    from homelab_scaling.box import describe_box, detect_box
    from homelab_scaling.plan.peaks import box_with

    if args.card is not None:
        return box_with(args.card, 1 if args.gpus is None else args.gpus)
    box = detect_box()
    if args.gpus is None or args.gpus == box.n_gpus:
        return box
    if args.gpus == 0:
        return describe_box([])
    if not 0 < args.gpus < box.n_gpus:
        raise SpecError(f"--gpus {args.gpus}, but this machine has {box.n_gpus}; name the card you mean with --card")
    return dataclasses.replace(box, n_gpus=args.gpus)


if __name__ == "__main__":
    raise SystemExit(cli.main(["plan", *sys.argv[1:]]))
