"""Asks trained models what they can do: scores with their errors, minutes, energy and money.

Without --tasks our own: bits per byte, copy, last word, minimal pairs, which tell models of a few million parameters
apart and need no network. --list names the usual tasks of lm-evaluation-harness and the forms of JSONL files of your
own. Every answer is kept as it comes: the same command goes on where it was stopped, and asks nothing twice. Several
models, or a lab, are compared on the same documents.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which models, what to ask them, what that costs."""

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN|MODEL ...]")] = ()
    """Runs (LAB/LADDER/runs/RUN), checkpoints inside them, Hugging Face folders, or a lab: every finished run's
    largest row."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ()
    """Names (see --list), YAML files of lm-evaluation-harness, or JSONL files."""
    at: Annotated[str | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Which row of a run, by its tokens, or which checkpoint, by its name; the largest row when not given."""
    all_rows: bool = False
    """Every row of a run, or of every run of a lab."""
    limit: int | None = None
    """Only so many documents of each task (of each part of a group such as blimp)."""
    shots: int | None = None
    """Worked examples in each prompt; as is usual for the task when not given."""
    max_new_tokens: int | None = None
    """Most tokens of a generated answer; never more than half of the model's context."""
    include: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER ...")] = ()
    """Folders with YAML tasks of your own, which then have names."""
    text: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Text for our own tasks in place of the run's held-out documents: files as `homelab corpus` takes them."""
    text_field: str = "text"
    """Of a JSONL or Parquet file given with --text."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A tokenizer.json, for runs on shards that came without one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where scores go, a folder for each model; LAB/LADDER/evals for runs and ./evals for others when not given."""
    device: str = "auto"
    """cpu, cuda or cuda:N; a GPU if there is one."""
    batch_seqs: int | None = None
    """Sequences at a time in tasks of lm-evaluation-harness; changes the speed, not the score."""
    seed: int = 0
    """Of the items that our own tasks draw."""
    watts: float | None = None
    """Power of the whole machine while it answers, for kWh and money where no sensor measures it."""
    usd_per_kwh: float | None = None
    """As the run's [money] says when not given."""
    usd_per_hour: float | None = None
    """Of the machine; as the run's [money] says when not given."""
    list: bool = False
    """Name the known tasks and what they need, ask nothing."""
    json: bool = False
    """Print one JSON document."""


def main(args: Args) -> int:
    if args.list:
        return _list(args)
    if not args.models:
        raise UserError("which model? give a run (LAB/LADDER/runs/RUN), a lab or a Hugging Face folder; or --list")
    from homelab_scaling.evals.harness import Options
    from homelab_scaling.evals.session import Wishes, as_json, evaluate, load_tasks
    from homelab_scaling.evals.sources import targets
    from homelab_scaling.evals.telling import telling
    from homelab_scaling.train.stop import StopWish

    wishes = Wishes(
        tasks=args.tasks,
        include=args.include,
        options=Options(
            shots=args.shots, limit=args.limit, max_new_tokens=args.max_new_tokens, batch_seqs=args.batch_seqs
        ),
        device=args.device,
        tokenizer=args.tokenizer,
        text=args.text,
        text_field=args.text_field,
        seed=args.seed,
        watts=args.watts,
        usd_per_kwh=args.usd_per_kwh,
        usd_per_hour=args.usd_per_hour,
    )
    at = int(args.at) if args.at is not None and args.at.isdecimal() else args.at
    found = targets(args.models, at=at, all_rows=args.all_rows, out=args.out)
    loaded = load_tasks(wishes, _say)  # before Ctrl-C becomes a wish: downloads have no pieces to stop between
    is_ladder = len(args.models) == 1
    with StopWish() as wish, telling() as report:
        result = evaluate(
            found, wishes, loaded, one_by_one=is_ladder, say=_say, report=report, stopped=lambda: wish.reason
        )
    if args.json:
        print(codec.dumps(as_json(result)))
        return 0
    from homelab_scaling.evals.show import page

    _print(page(result.models, result.deltas))
    for path in (*result.folders, *result.pictures):
        _say(f"written: {path}")
    return 0


def _list(args: Args) -> int:
    from homelab_scaling.evals.show import listed_tasks, listing

    if args.json:
        print(codec.dumps({"tasks": listed_tasks()}))
    else:
        _print(listing())
    return 0


def _print(parts: object) -> None:
    from collections.abc import Iterable

    from rich.console import Console

    assert isinstance(parts, Iterable)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 130
    for part in parts:
        console.print(part)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["eval", *sys.argv[1:]]))
