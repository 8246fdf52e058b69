"""Says which runs to do next for a budget, and by how much they would narrow what you want to know."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError

if TYPE_CHECKING:
    from rich.table import Table

    from homelab_scaling.plan.budget import Pricer
    from homelab_scaling.plan.design import Advice

TABLE_COLUMNS = 100


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which fit, what to learn, what to spend."""

    fit: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FIT")]
    """A lab or a fit that knows its points."""
    budget: str
    """What may be spent: 4h, 30min, 1e17 (FLOPs) or 5kWh."""
    target: str = "d-opt:1e9"
    """What to learn: d-opt:N (tokens for a size), n-opt:C, loss:N,D, a, alpha, beta or E."""
    law: str | None = None
    """When not given the one the hold-out chose, else chinchilla."""
    card: str | None = None
    """Price for this card instead of the machine's own, for example "RTX 4080"."""
    gpus: int | None = None
    """How many of them; 0 prices for the CPU."""
    watts: float | None = None
    """Power of the whole machine under load, for a budget in kWh; else the cards' rated power."""
    vocab: int | None = None
    """Vocabulary, for a fit without a lab: with --context its runs become real shapes with a speed."""
    context: int | None = None
    """Context in tokens, for a fit without a lab."""
    json: bool = False
    """Print the advice as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.fit.catalogue import joint_fit, must_be_as_trained, open_fit
    from homelab_scaling.fit.targets import parse_target
    from homelab_scaling.plan.budget import parse_budget
    from homelab_scaling.plan.design import advise

    budget = parse_budget(args.budget)
    report = open_fit(args.fit)
    must_be_as_trained(report)
    fit, law, drawn = joint_fit(report, args.law)
    found = advise(
        report,
        fit,
        law,
        drawn,
        target=parse_target(args.target, law),
        budget=budget,
        pricer=_pricer(args, report.count),
    )
    if args.json:
        print(codec.dumps(found))
    else:
        _print(found)
    return 0


def _pricer(args: Args, count: str) -> "Pricer":
    from homelab_scaling.plan.budget import Facts, ShapePricer, SixNd, find_lab, lab_facts
    from homelab_scaling.plan.machine import machine_for

    if args.watts is not None and not args.watts > 0:
        raise SpecError(f"--watts {args.watts:g}: wants the power of the machine under load, a positive number")
    if (args.vocab is None) != (args.context is None):
        raise SpecError("--vocab and --context belong together; give both, for example --vocab 50257 --context 1024")
    lab = find_lab(args.fit)
    known = lab_facts(lab) if lab is not None and args.vocab is None else None
    if args.vocab is not None and args.context is not None:
        if args.vocab < 2 or args.context < 8:
            raise SpecError(f"--vocab {args.vocab} --context {args.context}: wants at least 2 and 8")
        known = Facts(n_vocab=args.vocab, context_tokens=args.context), ()
    if known is None:
        return SixNd()
    facts, measured = known
    return ShapePricer(
        facts=facts,
        box=machine_for(args.card, args.gpus),
        count=count,  # type: ignore[arg-type]
        watts=args.watts,
        measured=measured,
    )


def _print(found: "Advice") -> None:
    from rich.console import Console

    from homelab_scaling.plan.design import amount

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = TABLE_COLUMNS
    unit = f" {found.target_unit}" if found.target_unit else ""
    console.print(f"{found.source}: {found.law}; budget {amount(found.budget.amount, found.budget)}; {found.basis}")
    console.print(
        f"{found.target_words} now: {_short(found, found.value)}{unit}; 95 % interval by the delta method "
        f"{_between(found, found.ci95_now)}, by the fit's resamples {_between(found, found.ci95_resampled)}"
    )
    console.print(f"noise {found.noise.basis}")
    console.print(_table(found))
    console.print(f"Verdict: {found.verdict}", style="bold")
    for note in found.notes:
        console.print(f"  ! {note}")


def _short(found: "Advice", value: float) -> str:
    from homelab_scaling.fit.words import number, short

    return short(value) if found.target_unit in ("tokens", "parameters") else number(value)


def _between(found: "Advice", ci95: tuple[float, float] | None) -> str:
    return "unknown" if ci95 is None else f"{_short(found, ci95[0])} to {_short(found, ci95[1])}"


def _table(found: "Advice") -> "Table":
    from rich.table import Table

    from homelab_scaling.plan.design import amount, run_words

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("what", "runs (N on longest D)", "cost", "interval then", "width"):
        wraps = heading.startswith("runs")
        table.add_column(heading, justify="right" if heading in ("cost", "width") else "left", no_wrap=not wraps)
    for one in found.options:
        spent = one.price.of(found.budget.unit)
        cost = "?" if spent is None else amount(spent, found.budget)
        table.add_row(
            one.kind,
            run_words(one.runs),
            cost if one.within_budget else f"{cost} (over)",
            _between(found, one.ci95),
            f"x {one.width_frac:.2f}",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(cli.main(["next", *sys.argv[1:]]))
