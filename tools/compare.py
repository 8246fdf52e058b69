"""Says whether recipe B beats recipe A in the exponent, only in the constant, or not distinguishably."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec

if TYPE_CHECKING:
    from rich.table import Table

    from homelab_scaling.fit.compare import AtBudget, Comparison, Difference
    from homelab_scaling.fit.result import Estimate

TABLE_COLUMNS = 100


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which two, and how they are refitted."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A lab, a fit, a points CSV or a published law such as hoffmann-2022."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The same; better means a lower loss for the same compute."""
    flops: tuple[float, ...] = ()
    """Budgets C = 6 N D to compare at; when not given the largest that both reach, 10 and 100 times it."""
    law: str | None = None
    """Law of both, when not given the one they were fitted with, else chinchilla."""
    objective: str = "adaptive"
    """adaptive, huber:1e-3, lad, l2-log or l2."""
    bootstrap: int = 4000
    """Paired resamples; 0 for none."""
    seed: int = 0
    """Of the resamples."""
    count: Literal["total", "body", "body+head"] | None = None
    """Which parameters N counts; when not given what the fits did."""
    shared_e: float | None = None
    """Irreducible loss of the second reading; when not given the one that fits both best."""
    bpb: bool = False
    """Compare bits per byte, for two tokenizers on the same held-out text."""
    json: bool = False
    """Print the comparison as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.fit.arms import open_arm
    from homelab_scaling.fit.compare import compare

    found = compare(
        open_arm(args.a, args.count),
        open_arm(args.b, args.count),
        law=args.law,
        flops=args.flops,
        objective=args.objective,
        n_draws=args.bootstrap,
        seed=args.seed,
        pin_e=args.shared_e,
        bpb=args.bpb,
    )
    if args.json:
        print(codec.dumps(found))
    else:
        _print(found)
    return 0


def _print(found: "Comparison") -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = TABLE_COLUMNS
    laws = found.law if found.law == found.law_b else f"{found.law} and {found.law_b}"
    console.print(f"A = {found.a}, B = {found.b}; {laws}; N counts {found.count}; objective {found.objective}")
    console.print(f"{found.pairing}; resamples: {found.interval}")
    console.print(_parameters(found.differences))
    if found.budgets:
        console.print(_budgets(found.budgets, found.shared_e))
    console.print(f"Verdict: {found.verdict.words}", style="bold")
    if found.verdict_shared_e is not None and found.shared_e is not None:
        console.print(f"With one E = {found.shared_e:.4g} for both: {found.verdict_shared_e.words}")
    console.print(f"  rule: {found.rule}", style="dim")
    for note in found.notes:
        console.print(f"  ! {note}")


def _table(title: str | None, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _parameters(differences: "tuple[Difference, ...]") -> "Table":
    table = _table(None, "", "A", "B", "B against A", "95 % interval")
    for one in differences:
        mark = "x " if one.scale == "ratio" else ""
        name = {"exponent": "exponent of L(C)"}.get(one.name, one.name)
        table.add_row(
            name, _value(one.a), _value(one.b), mark + _change(one), _between(one.change.ci95, one.scale == "ratio")
        )
    return table


def _value(one: "Estimate") -> str:
    from homelab_scaling.fit.words import number

    return "not pinned" if one.value is None else number(one.value)


def _change(one: "Difference") -> str:
    value = one.change.value
    if value is None:
        return "?"
    return f"{value:.3g}" if one.scale == "ratio" else f"{value:+.4f}"


def _between(ci95: tuple[float, float] | None, in_ratio: bool) -> str:
    if ci95 is None:
        return "-"
    return f"[{ci95[0]:.3g}, {ci95[1]:.3g}]" if in_ratio else f"[{ci95[0]:+.4f}, {ci95[1]:+.4f}]"


def _budgets(budgets: "tuple[AtBudget, ...]", shared_e: float | None) -> "Table":
    from homelab_scaling.fit.compare import multiplier_words

    columns = ["C (6 N D)", "loss A", "loss B", "P(B better)", "A needs x compute", "beyond data"]
    if shared_e is not None:
        columns.insert(5, "with shared E")
    table = _table("On the best split of each budget", *columns)
    for at in budgets:
        assert at.loss_a.value is not None and at.loss_b.value is not None
        cells = [
            f"{at.flops:.2e}",
            f"{at.loss_a.value:.4f}",
            f"{at.loss_b.value:.4f}",
            "-" if at.p_b_better is None else f"{at.p_b_better:.3f}",
            multiplier_words(at.multiplier),
        ]
        if shared_e is not None:
            cells.append(multiplier_words(at.multiplier_shared_e) if at.multiplier_shared_e else "-")
        table.add_row(*cells, f"x {at.extrapolation:.3g}" if at.extrapolation > 1 else "no")
    return table


if __name__ == "__main__":
    raise SystemExit(cli.main(["compare", *sys.argv[1:]]))
