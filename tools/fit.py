"""Fits scaling laws to a lab or a points CSV, with certified optima, intervals and warnings."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec

if TYPE_CHECKING:
    from homelab_scaling.fit.result import FitReport

PLAIN_COLUMNS = 110
"""Of output that is not a terminal's."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to fit, and how."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LAB_OR_CSV")]
    """A lab's folder (LAB/LADDER) or a points CSV."""
    law: tuple[str, ...] = ()
    """Laws to fit: power-n, power-d, power-c, power-c-min, the same with -offset, chinchilla, chinchilla-tied, kaplan,
    kaplan-s, repeated; NAME:E=1.7 or NAME:alpha=0.34 pins a parameter; all that the columns allow when not given."""
    objective: str = "adaptive"
    """adaptive, huber:1e-3 (the literature's), lad, l2-log or l2."""
    bootstrap: int = 4000
    """Resamples behind each interval; 0 for none."""
    seed: int = 0
    """Of the resamples."""
    count: Literal["total", "body", "body+head"] = "total"
    """Which parameters N counts."""
    compute: Literal["c", "c_min"] = "c"
    """What compute and tokens are in the laws of N and D and in what follows from them: as trained, or (c_min, Kaplan's
    axis) as at a batch far below critical, for rows whose critical batch is measured and calibrated."""
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
    from homelab_scaling.fit.card import read_training, write_card
    from homelab_scaling.fit.fit import fit_points
    from homelab_scaling.fit.points import Selection, parse_pairs, read_points, with_c_min
    from homelab_scaling.fit.result import save_fit

    selection = Selection(
        columns=parse_pairs(args.columns, "--columns"),
        where=parse_pairs(args.where, "--where"),
        drop_highest_loss=args.drop_highest_loss,
    )
    table = read_points(args.source, selection)
    if args.compute == "c_min":
        table = with_c_min(table)
    report = fit_points(
        table.points,
        table.excluded,
        laws=args.law,
        objective=args.objective,
        n_bootstrap=args.bootstrap,
        seed=args.seed,
        count=args.count,
        compute=args.compute,
        source=table.source,
        notes=table.notes,
        with_evidence=True,
    )
    folder = args.out or (args.source / "fit" if args.source.is_dir() else None)
    written = save_fit(report, folder) if folder else None
    if folder:
        write_card(report, folder, read_training(args.source) if args.source.is_dir() else None)
    if args.json:
        print(codec.dumps(report))
    else:
        _print(report)
    if written:
        print(f"written: {written}", file=sys.stderr)
    return 0


def _print(report: "FitReport") -> None:
    from rich.console import Console

    from homelab_scaling.fit.show import fit_page

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_COLUMNS
    for part in fit_page(report):
        console.print(part)


if __name__ == "__main__":
    raise SystemExit(cli.main(["fit", *sys.argv[1:]]))
