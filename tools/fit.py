"""Fits scaling laws to a lab, a points CSV or tracked runs, with certified optima, intervals and warnings."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import DataError

if TYPE_CHECKING:
    from homelab_scaling.fit.points import PointTable
    from homelab_scaling.fit.result import FitReport

PLAIN_COLUMNS = 110
"""Of output that is not a terminal's."""
TRACKERS = ("tensorboard", "mlflow", "wandb")
TRACKED = ("with_", "tokens_per_step", "n_vocab", "loss_at", "keep_unfinished")
"""Fields that only say how tracked runs are read."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to fit, and how."""

    source: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="LAB_OR_CSV")] = None
    """A lab's folder (LAB/LADDER) or a points CSV; nothing with one of the --from flags."""
    from_tensorboard: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Take finished runs instead: every folder of event files under this one is a run."""
    from_mlflow: Annotated[str | None, tyro.conf.arg(metavar="URI_OR_DIR")] = None
    """Or every run of an MLflow server, database or folder mlruns."""
    from_wandb: Annotated[str | None, tyro.conf.arg(metavar="DIR_OR_PROJECT")] = None
    """Or every run of a folder that W&B wrote, or of ENTITY/PROJECT."""
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
    """Our column = the file's, for example loss_nats=val_loss n_params=N; of tracked runs a curve's or a
    configuration's name, or a part of the run's name as in 'n_params=name:(\\d+M)'. What has a usual name is found."""
    where: tuple[str, ...] = ()
    """Keep rows with column=value; of tracked runs, those whose configuration says so (or run, status, experiment)."""
    with_: Annotated[Path | None, tyro.conf.arg(name="with", metavar="CSV")] = None
    """Tracked runs: a table run,n_params,n_tokens,... for what the tracker does not know."""
    tokens_per_step: float | None = None
    """Tracked runs: tokens of one optimizer step, where no curve counts tokens."""
    n_vocab: int | None = None
    """Tracked runs: vocabulary to count a GPT-2 configuration's parameters with, where it says none or a padded one."""
    loss_at: Literal["last", "min"] = "last"
    """Tracked runs: which value of the loss's curve."""
    keep_unfinished: bool = False
    """Tracked runs: also those that the tracker calls running, failed or crashed."""
    save_points: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
    """Also write the points that are fitted, as a CSV to look at, mend and give again."""
    drop_highest_loss: int = 0
    """Leave out this many points of highest loss (5 is the standard filter of the Chinchilla table)."""
    out: Path | None = None
    """Folder for fit.json and the draws; a lab's is LAB/LADDER/fit, a CSV's fit is only written when this is given."""
    json: bool = False
    """Print the fit as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.fit.card import read_training, write_card
    from homelab_scaling.fit.fit import fit_points
    from homelab_scaling.fit.points import points_csv, with_c_min
    from homelab_scaling.fit.result import save_fit

    table = _read(args)
    if args.save_points:
        codec.write_text(args.save_points, points_csv(table.points))
        print(f"written: {args.save_points}, {len(table.points)} points", file=sys.stderr)
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
    lab = args.source if args.source and args.source.is_dir() else None
    folder = args.out or (lab / "fit" if lab else None)
    written = save_fit(report, folder) if folder else None
    if folder:
        write_card(report, folder, read_training(lab) if lab else None)
    if args.json:
        print(codec.dumps(report))
    else:
        _print(report)
    if written:
        print(f"written: {written}", file=sys.stderr)
    return 0


def _read(args: Args) -> "PointTable":
    from homelab_scaling.fit.points import Selection, parse_pairs, read_points

    columns, where = parse_pairs(args.columns, "--columns"), parse_pairs(args.where, "--where")
    flags = {f"--from-{name}": getattr(args, f"from_{name}") for name in TRACKERS}
    given = [flag for flag, value in flags.items() if value is not None]
    if len(given) + (args.source is not None) != 1:
        found = [*([str(args.source)] if args.source else []), *given]
        raise DataError(
            f"{' and '.join(found) or 'nothing'} to fit; give one: a lab's folder, a points CSV, {', '.join(flags)}"
        )
    if args.source is None:
        return _read_tracked(args, columns, where)
    default = Args()
    alone = [name for name in TRACKED if getattr(args, name) != getattr(default, name)]
    if alone:
        raise DataError(f"--{alone[0].strip('_').replace('_', '-')} is for tracked runs ({', '.join(flags)}); drop it")
    selection = Selection(columns=columns, where=where, drop_highest_loss=args.drop_highest_loss)
    return read_points(args.source, selection)


def _read_tracked(args: Args, columns: dict[str, str], where: dict[str, str]) -> "PointTable":
    from homelab_scaling.fit.from_trackers.collect import Reading, collect
    from homelab_scaling.fit.points import checked

    if args.from_tensorboard is not None:
        from homelab_scaling.fit.from_trackers.tensorboard_runs import read_tensorboard

        source, runs = f"TensorBoard {args.from_tensorboard}", read_tensorboard(args.from_tensorboard)
    elif args.from_mlflow is not None:
        from homelab_scaling.fit.from_trackers.mlflow_runs import read_mlflow

        source, runs = f"MLflow {args.from_mlflow}", read_mlflow(args.from_mlflow)
    else:
        from homelab_scaling.fit.from_trackers.wandb_runs import read_wandb

        source, runs = f"W&B {args.from_wandb}", read_wandb(str(args.from_wandb))
    reading = Reading(
        columns=columns,
        where=where,
        loss_at=args.loss_at,
        tokens_per_step=args.tokens_per_step,
        n_vocab=args.n_vocab,
        table=args.with_,
        keep_unfinished=args.keep_unfinished,
    )
    return checked(collect(source, runs, reading), drop_highest_loss=args.drop_highest_loss)


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
