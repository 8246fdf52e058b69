"""Fits scaling laws to a lab or a points CSV, with certified optima, intervals and warnings."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from homelab_scaling import cli, codec

if TYPE_CHECKING:
    from homelab_scaling.fit.result import Estimate, FitReport, ScalingFit


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to fit, and how."""

    source: tyro.conf.Positional[Path]
    """A lab's folder (LAB/LADDER) or a points CSV."""
    law: tuple[str, ...] = ()
    """Laws to fit: power-n, power-d, power-c, the same with -offset, chinchilla; all when not given."""
    objective: str = "adaptive"
    """adaptive, huber:1e-3 (the literature's), lad, l2-log or l2."""
    bootstrap: int = 4000
    """Resamples behind each interval; 0 for none."""
    seed: int = 0
    """Of the resamples."""
    count: Literal["total", "body", "body+head"] = "total"
    """Which parameters N counts."""
    columns: tuple[str, ...] = ()
    """CSV: our column = the file's, for example loss_nats=val_loss n_params=N."""
    where: tuple[str, ...] = ()
    """CSV: keep rows with column=value."""
    drop_highest_loss: int = 0
    """Leave out this many points of highest loss (5 is the standard filter of the Chinchilla table)."""
    out: Path | None = None
    """Folder for fit.json and the draws; a lab's is LAB/LADDER/fit, a CSV's fit is only written when this is given."""
    json: bool = False
    """Print the fit as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.fit.fit import fit_points
    from homelab_scaling.fit.points import Selection, parse_pairs, read_points
    from homelab_scaling.fit.result import save_fit

    selection = Selection(
        columns=parse_pairs(args.columns, "--columns"),
        where=parse_pairs(args.where, "--where"),
        drop_highest_loss=args.drop_highest_loss,
    )
    table = read_points(args.source, selection)
    report = fit_points(
        table.points,
        table.excluded,
        laws=args.law,
        objective=args.objective,
        n_bootstrap=args.bootstrap,
        seed=args.seed,
        count=args.count,
        source=table.source,
        notes=table.notes,
    )
    folder = args.out or (args.source / "fit" if args.source.is_dir() else None)
    written = save_fit(report, folder) if folder else None
    if args.json:
        print(codec.dumps(report))
    else:
        _print(report)
    if written:
        print(f"written: {written}", file=sys.stderr)
    return 0


def _print(report: "FitReport") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{report.source}: {report.n_points} points from {report.n_runs} runs, N counts {report.count}, "
        f"objective {report.objective}",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("law", "rows", "points", "quantity", "value", "95 % interval"):
        table.add_column(heading, justify="right" if heading in ("points", "value") else "left")
    for fit in report.fits:
        _add(table, fit)
    console.print(table)
    for fit in report.fits:
        console.print(f"{fit.law}, {fit.rows}: {fit.status}; {fit.interval}", highlight=False, markup=False)
    for line in dict.fromkeys([*report.notes, *report.warnings, *(w for fit in report.fits for w in fit.warnings)]):
        console.print(f"  ! {line}", highlight=False, markup=False)
    if report.excluded:
        console.print(f"{len(report.excluded)} excluded:")
        for gone in report.excluded[:20]:
            console.print(f"  - {gone.row_id}: {gone.reason}", highlight=False, markup=False)


def _add(table: "object", fit: "ScalingFit") -> None:
    from rich.table import Table

    assert isinstance(table, Table)
    quantities = {**fit.parameters, **{k: v for k, v in fit.derived.items() if k in ("a", "b", "r2_log")}}
    for index, (name, one) in enumerate(quantities.items()):
        head = (fit.law, fit.rows.split(":")[0], str(fit.n_points)) if index == 0 else ("", "", "")
        table.add_row(*head, name.replace("r2_log", "R^2 (log-log)"), *_cells(one), end_section=False)
    table.add_section()


def _cells(one: "Estimate") -> tuple[str, str]:
    from homelab_scaling.fit.words import between, number

    value = "not pinned" if one.value is None else number(one.value)
    return value, between(*one.ci95) if one.ci95 else ""


if __name__ == "__main__":
    raise SystemExit(cli.main(["fit", *sys.argv[1:]]))
