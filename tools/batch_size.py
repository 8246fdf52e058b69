"""Measures the gradient noise scale of each rung; advises batch, split and learning rate, with what each would cost.

Says first how many steps the measurement takes and how long. What was measured is frozen in LAB/LADDER/batch.json,
which `homelab plan` and `homelab run` follow wherever the ladder gives no batch.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError, UserError

if TYPE_CHECKING:
    from homelab_scaling.batch.probe import ProbePlan
    from homelab_scaling.sweep.batches import Batches

TABLE_COLUMNS = 100
"""Narrower, the tables would break their numbers."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which ladder, what to measure, what the advice may cost."""

    ladder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="LADDER")]
    """A ladder file, or the name of a shipped one such as quickstart."""
    lab: Path = Path("lab")
    """The folder that holds the labs; shards and batch.json are in LAB/<ladder's name>."""
    rungs: tuple[str, ...] = ()
    """Measure only these; the others get a forecast from them. All when not given."""
    burn_in: float | None = None
    """Share of the longest horizon that a probe trains to measure on; as [batch].burn_in_frac when not given."""
    again: bool = False
    """Measure anew what batch.json holds already."""
    verify: bool = False
    """Train the smallest rung at five batches over a factor of 16, rates tuned for each; calibrate all by it."""
    overhead: float = 0.2
    """Share of tokens above those of a small batch that the advice may spend."""
    beta2: bool = False
    """Advise a beta2, too, that forgets after as many tokens as the ladder's does at its own batch."""
    watts: float | None = None
    """Power of the whole machine under load, for kWh and money; else as `homelab plan` finds it."""
    dry_run: bool = False
    """Say what would be measured, how long it takes and what published work would take; write nothing."""
    json: bool = False
    """Print batch.json (with --dry-run the plan of the measurement) as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.sweep.batches import Batches, Wishes
    from homelab_scaling.sweep.prepare import ensure_corpus, existing_corpus, open_experiment

    if not 0 < args.overhead <= 1:
        raise UserError(f"--overhead {args.overhead:g}: wants a share of tokens, more than 0 and at most 1")
    if args.watts is not None and args.watts <= 0:
        raise UserError(f"--watts {args.watts:g}: wants the power of the machine under load, a positive number")
    experiment = open_experiment(args.ladder, args.lab)
    names = tuple(r.name for r in experiment.ladder.rungs)
    unknown = [name for name in args.rungs if name not in names]
    if unknown:
        raise SpecError(f"{experiment.ladder_file.name} has no rung {unknown[0]!r}; its rungs are {', '.join(names)}")
    wishes = Wishes(
        burn_in_frac=args.burn_in,
        again=(args.rungs or names) if args.again else (),
        watts=args.watts,
        overhead_max_frac=args.overhead,
        rescale_beta2=args.beta2,
        branch=not args.verify,
    )
    if args.dry_run:
        return _dry_run(args, Batches(experiment, existing_corpus(experiment), wishes))
    with experiment.lock():
        return _measure(args, Batches(experiment, ensure_corpus(experiment), wishes))


def _probes(args: Args, batches: "Batches") -> "list[ProbePlan]":
    """What is still to be measured; with --verify the smallest rung is always among what is known or measured."""
    wanted = set(args.rungs or (s.rung.name for s in batches.settings))
    if args.verify:
        wanted.add(batches.smallest.rung.name)
    names = (s.rung.name for s in batches.settings)
    return [batches.probe(name) for name in names if name in wanted and not batches.is_known(name)]


def _dry_run(args: Args, batches: "Batches") -> int:
    from homelab_scaling.batch.page import dry_page
    from homelab_scaling.batch.priors import priors_for
    from homelab_scaling.plan.rules import step_law_batch
    from homelab_scaling.sweep.calibrating import sweep_plan

    probes = _probes(args, batches)
    # Nothing is measured yet: a sweep would be laid about the batch that Step Law has for the rung.
    sweep = sweep_plan(batches, step_law_batch(batches.smallest.horizon_tokens)) if args.verify else None
    priors = {
        s.rung.name: priors_for(
            n_params=s.rung.size.n_params,
            n_body=s.rung.size.params.n_body,
            n_tokens=s.horizon_tokens,
            context_tokens=s.shape.context_tokens,
        )
        for s in batches.settings
    }
    if args.json:
        document = {"probes": codec.to_plain(tuple(probes)), "sweep": sweep.words if sweep else None}
        print(codec.dumps(document | {"priors": codec.to_plain(priors)}))
        return 0
    said = ["no shards yet: they are built first"] if batches.corpus is None else []
    smallest = batches.smallest.rung.name
    branches = batches.branch_plan()
    if branches is not None and (batches.is_known(smallest) or smallest in {p.rung for p in probes}):
        said.insert(0, branches.words)
    _print(dry_page(probes, sweep, priors, [*said, *batches.kept_words()]))
    return 0


def _measure(args: Args, batches: "Batches") -> int:
    from homelab_scaling.batch.advice import batch_file
    from homelab_scaling.batch.measure import bill_of
    from homelab_scaling.batch.page import advice_page
    from homelab_scaling.plan.show import duration, flops
    from homelab_scaling.sweep.calibrating import calibrate_by_branch, calibrate_by_sweep

    for line in batches.kept_words():
        _say(line)
    probes = _probes(args, batches)
    if probes:
        bill = bill_of(probes)
        names = ", ".join(p.rung for p in probes)
        _say(f"to measure: {names}; {flops(bill.flops)} FLOPs, about {duration(bill.seconds)}")
    batches.measure(probes, _say)
    if args.verify:
        calibration, sweep = calibrate_by_sweep(batches, _say)
        advice = batches.advise(calibration=calibration, sweep=sweep)
    else:
        found = calibrate_by_branch(batches, _say)
        advice = batches.advise(calibration=found[0], branch=found[1]) if found else batches.advise()
    if args.json:
        print(codec.dumps(codec.to_plain(advice)))
        return 0
    planned = {r.name: (r.training.batch_tokens, r.training.batch_source) for r in batches.plan.rungs}
    _print(advice_page(advice, planned))
    for warning in batches.planned().warnings:
        _say(f"! {warning}")
    _say(f"written: {batch_file(batches.lab)}")
    return 0


def _print(parts: Sequence[object]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=max(TABLE_COLUMNS, Console().width))
    for part in parts:
        console.print(part)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["batch-size", *sys.argv[1:]]))
