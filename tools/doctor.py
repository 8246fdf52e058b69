"""Says what this box is and whether it can do the job, one line per finding with its remedy.

ok: nothing to do. warn: it works, but. fail: mend this first (the exit code is then 2).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from homelab_scaling import cli, codec, doctor
from homelab_scaling.errors import UserError

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to look at, and how to say it."""

    lab: Path = Path("lab")
    """Folder that will hold the runs; its disk is looked at."""
    json: bool = False
    """Print one JSON document instead."""


def main(args: Args) -> int:
    """Prints the findings; 2 if any of them is a fail."""
    checkup = doctor.examine(args.lab)
    if args.json:
        print(codec.dumps(checkup))
    else:
        show(checkup)
    return UserError.exit_code if checkup.n_fail else 0


def show(checkup: doctor.Checkup) -> None:
    """One line per finding and a verdict."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for finding in checkup.findings:
        line = Text(f"{finding.status:<4}  ", style=STYLES[finding.status])
        line.append(f"{finding.topic:<13} {finding.found}", style="default")
        if finding.remedy:
            line.append(f"; {finding.remedy}", style="dim")
        console.print(line)
    verdict = f"{checkup.n_fail} to mend first" if checkup.n_fail else "ready"
    console.print(f"{verdict}, {checkup.n_warn} warning{'' if checkup.n_warn == 1 else 's'}")


if __name__ == "__main__":
    raise SystemExit(cli.main(["doctor", *sys.argv[1:]]))
