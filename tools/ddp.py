"""Does a second GPU pay? Step times with and without DDP, the way between cards, and what to do with a ladder's runs.

Measures one rank on the whole batch and on its share, DDP without and with exchanging gradients, all-reduces of 1, 25,
100 and 500 MiB, PCIe links and peer-to-peer; keeps it in LAB/machine/ddp.json. Without a GPU it shows two CPU ranks.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import UserError

if TYPE_CHECKING:
    from homelab_scaling.bench.ddp import DdpReport

TIMES = ("single", "ddp", "compute", "communication", "rank")


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure, or which times to judge."""

    ladder: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[LADDER]")] = None
    """A ladder file or the name of a shipped one; gpt2_5m_120m on GPUs and quickstart on a CPU when not given."""
    lab: Path = Path("lab")
    """The folder that holds the labs; the result goes to LAB/machine/ddp.json."""
    rung: tuple[str, ...] = ()
    """Only these rungs, however long they take."""
    cpu: bool = False
    """Measure CPU ranks over gloo, GPUs or not."""
    ranks: int | None = None
    """How many; every card, or 2 on a CPU, when not given."""
    steps: int = 20
    """Timed steps of each kind, after 10 that warm up; fewer on a CPU where a rung would take long."""
    card: str | None = None
    """Do not measure: what the model says of this card, for example "RTX 4080"."""
    gpus: int | None = None
    """Do not measure: what the model says of so many cards."""
    times: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=MS...")] = ()
    """Do not measure: judge step times in milliseconds, such as single=22.03 ddp=26.36 compute=15.12
    communication=11.24; `rank` is one card at the per-rank batch."""
    json: bool = False
    """Print one JSON document."""


def main(args: Args) -> int:
    if args.times:
        return judge_times(args)
    report = modelled(args) if args.card is not None or args.gpus is not None else measured(args)
    if args.json:
        print(codec.dumps(report))
        return 0
    from rich.console import Console

    from homelab_scaling.bench.ddp_page import page

    console = Console(highlight=False, width=max(100, Console().width))
    for part in page(report):
        console.print(part)
    return 0


def judge_times(args: Args) -> int:
    """Published numbers, judged."""
    from homelab_scaling.bench.ddp_page import judgement_lines
    from homelab_scaling.plan.ddp_judge import judge

    given = parse_times(args.times)
    n_ranks = 2 if args.ranks is None else args.ranks
    if n_ranks < 2:
        raise UserError(f"--ranks {n_ranks}: wants 2 or more")
    found = judge(
        t1_full_s=given["single"],
        t_ddp_s=given["ddp"],
        compute_s=given.get("compute"),
        communication_s=given.get("communication"),
        t1_rank_s=given.get("rank"),
        n_ranks=n_ranks,
    )
    print(codec.dumps(found) if args.json else "\n".join(judgement_lines(found)))
    return 0


def parse_times(words: tuple[str, ...]) -> dict[str, float]:
    """Seconds by name, from words such as `ddp=26.36` (milliseconds).

    Raises:
        UserError: not a name that is known, not a number, or single or ddp is missing.
    """
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in TIMES or not equals:
            raise UserError(f"--times {word}: wants NAME=MILLISECONDS with a name among {', '.join(TIMES)}")
        try:
            found[name] = float(value) / 1e3
        except ValueError:
            raise UserError(f"--times {word}: {value!r} is not a number of milliseconds") from None
    missing = [name for name in ("single", "ddp") if name not in found]
    if missing:
        raise UserError(f"--times wants {' and '.join(missing)} too, as in single=22.03 ddp=26.36")
    return found


def modelled(args: Args) -> "DdpReport":
    """The model's word on cards that are not here, or not measured."""
    from homelab_scaling.bench.ddp import default_ladder, open_setting, report
    from homelab_scaling.box import detect_box
    from homelab_scaling.plan.peaks import box_with

    here = detect_box()
    card = args.card or (here.device if here.on_gpu else None)
    if card is None:
        raise UserError(f'--gpus {args.gpus}: this machine has no card to multiply; name one with --card "RTX 4080"')
    n_gpus = 2 if args.gpus is None else args.gpus
    if n_gpus < 2:
        raise UserError(f"--gpus {n_gpus}: wants 2 or more, one card exchanges nothing")
    box = box_with(card, n_gpus)
    return report(open_setting(args.ladder or default_ladder(box), args.lab, box, n_gpus), None)


def measured(args: Args) -> "DdpReport":
    """What this machine does."""
    from homelab_scaling.bench.ddp import choose_ranks, cpu_only, default_ladder, measure, open_setting, report
    from homelab_scaling.box import detect_box

    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: wants 1 or more")
    here = detect_box()
    box = cpu_only() if args.cpu else here
    save = box.on_gpu == here.on_gpu  # CPU ranks beside cards are a demonstration, and what the cards do is kept
    n_ranks = choose_ranks(box, args.ranks)
    setting = open_setting(args.ladder or default_ladder(box), args.lab, box, n_ranks)
    found = measure(setting, labs=args.lab, rungs=args.rung, n_steps=args.steps, say=_say, save=save)
    return report(setting, found, labs=args.lab if save else None)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["ddp", *sys.argv[1:]]))
