"""Writes a lab's report (Markdown, HTML, TensorBoard); --check says whether unfinished runs are on the law."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which lab to report on, or to check."""

    lab: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LAB")]
    """A lab's folder: LAB/LADDER."""
    check: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[RUN ...]")] = None
    """Write nothing; say of each unfinished run, or of the runs named, whether it is on the law and since when not."""
    against: Annotated[str | None, tyro.conf.arg(metavar="FIT")] = None
    """With --check: the lab, fit or published law to check against; the lab's own fit when not given."""
    json: bool = False
    """Print the paths (or the checks) as one JSON document."""


def main(args: Args) -> int:
    if args.check is not None:
        return _check(args.lab, args.check, args)
    if args.against is not None:
        raise SpecError("--against names what to check against; add --check")
    from homelab_scaling.report.page import write_report

    path = write_report(args.lab)
    if args.json:
        pictures = sorted(str(p) for p in path.parent.glob("*.png"))
        print(codec.dumps({"report": str(path), "markdown": str(path.with_suffix(".md")), "pictures": pictures}))
    else:
        print(path)
    return 0


def _check(lab: Path, runs: tuple[str, ...], args: Args) -> int:
    from homelab_scaling.report.live import check_lab

    checks = check_lab(lab, runs=runs, against=args.against)
    if args.json:
        print(codec.dumps({"checks": codec.to_plain(checks)}))
        return 0
    for check in checks:
        print(f"{check.run_id}: {check.sentence}")
        for note in check.notes:
            print(f"  {note}")
    if not checks:
        print("every run has finished; name one to check it all the same", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["report", *sys.argv[1:]]))
