"""Fits scaling laws to a lab or a points CSV, with certified optima, intervals and warnings."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec

if TYPE_CHECKING:
    from rich.table import Table

    from homelab_scaling.fit.result import Estimate, FitReport

SHOWN_EXCLUDED = 20


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to fit, and how."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LAB_OR_CSV")]
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

    from homelab_scaling.fit.diagnose import about_fits

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 110
    console.print(
        f"{report.source}: {report.n_points} points from {report.n_runs} runs; N counts {report.count}; "
        f"objective {report.objective}; {report.n_bootstrap:,} resamples"
    )
    console.print(_table(report))
    fitted = [fit for fit in report.fits if fit.is_fitted]
    poor = [fit for fit in fitted if not fit.status.startswith("converged (")]
    console.print(f"{len(fitted) - len(poor)} of {len(fitted)} fits reached a certified optimum")
    for fit in poor:
        console.print(f"  ! {fit.law} at {fit.rows}: {fit.status}")
    for line in (*report.notes, *report.warnings, *about_fits(report)):
        console.print(f"  ! {line}")
    if report.excluded:
        console.print(f"{len(report.excluded)} excluded:")
    for gone in report.excluded[:SHOWN_EXCLUDED]:
        console.print(f"  - {gone.row_id}: {gone.reason}")
    if len(report.excluded) > SHOWN_EXCLUDED:
        console.print(f"  - and {len(report.excluded) - SHOWN_EXCLUDED} more (--json lists all)")


def _table(report: "FitReport") -> "Table":
    """Main fits with every parameter, their siblings at other D or N with the exponent alone."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("law", "rows", "points", "quantity", "value", "95 % interval"):
        table.add_column(heading, justify="right" if heading in ("points", "value") else "left", no_wrap=True)
    main = report.main
    for fit in (*main, *(fit for fit in report.fits if fit not in main)):
        kept = ("a", "b", "r2_log") if fit in main else ("exponent",)
        quantities = dict(fit.parameters) if fit in main else {}
        quantities |= {name: one for name, one in fit.derived.items() if name in kept}
        for index, (name, one) in enumerate(quantities.items()):
            head = (fit.law, fit.rows.split(":")[0], str(fit.n_points)) if index == 0 else ("", "", "")
            table.add_row(*head, name.replace("r2_log", "R^2 (log-log)"), *_cells(one))
    return table


def _cells(one: "Estimate") -> tuple[str, str]:
    from homelab_scaling.fit.words import between, number

    value = "not pinned" if one.value is None else number(one.value)
    return value, between(*one.ci95) if one.ci95 else ""


if __name__ == "__main__":
    raise SystemExit(cli.main(["fit", *sys.argv[1:]]))
