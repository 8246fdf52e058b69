"""Writes a lab's report: the law in words, tables, figures, weaknesses; Markdown, one HTML page, TensorBoard."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from homelab_scaling import cli, codec


@dataclass(frozen=True, kw_only=True)
class Args:
    """Which lab to report on."""

    lab: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LAB")]
    """A lab's folder: LAB/LADDER."""
    json: bool = False
    """Print the paths as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.report.page import write_report

    path = write_report(args.lab)
    if args.json:
        pictures = sorted(str(p) for p in path.parent.glob("*.png"))
        print(codec.dumps({"report": str(path), "markdown": str(path.with_suffix(".md")), "pictures": pictures}))
    else:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["report", *sys.argv[1:]]))
