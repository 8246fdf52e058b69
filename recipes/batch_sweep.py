"""Trains the trials of a sweep of batch sizes, one after the other: what `homelab batch-size --verify` launches.

    accelerate launch recipes/batch_sweep.py --specs lab/NAME/batch_sweep/runs/*/spec.json --until 4.6

Each is a run of the ordinary trainer; with --until it is stopped as soon as its held-out loss is below for good.
"""

import os
import signal
import sys
import time

STARTED = time.monotonic()

from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

from homelab_scaling import cli, codec  # noqa: E402
from homelab_scaling.batch.trials import reached  # noqa: E402
from homelab_scaling.errors import HomelabError, RunFailed, Stopped  # noqa: E402
from homelab_scaling.runs import RunFolder  # noqa: E402
from homelab_scaling.specs import RunSpec  # noqa: E402
from homelab_scaling.train.hooks import Hooks, Line  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Args:
    """Trains several short runs in one process."""

    specs: tuple[Path, ...]
    """spec.json of each."""
    until: float | None = None
    """Held-out loss in nats at which a run has gone far enough."""


class Until(Hooks):
    """Asks for a stop when the held-out loss has passed the target."""

    def __init__(self, target: float | None) -> None:
        self.target, self.losses, self.asked = target, [0.0] * 0, False

    def start(self, kept: list[Line], tokens: int, about: str) -> None:
        self.losses = [line["loss"] for line in kept if line["kind"] == "val"]

    def validated(self, line: Line) -> None:
        self.losses.append(line["loss"])
        if self.target is not None and not self.asked and reached(self.losses, self.target):
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)  # the loop's own way to end: at this boundary, with a record


def main(argv: list[str]) -> int:
    """Exit code: 0 when every trial has ended; see errors.py."""
    from homelab_scaling.train.loop import train
    from homelab_scaling.train.session import leave_group

    started = STARTED
    try:
        args = cli.parse(Args, argv, "recipes/batch_sweep.py")
        for path in args.specs:
            until = Until(args.until)
            try:
                train(
                    codec.read_json(path, RunSpec),
                    RunFolder(path.resolve().parent),
                    started=started,
                    extra_hooks=[until],
                )
            except RunFailed as error:  # too high a rate; the others go on
                print(f"batch_sweep: {error}", file=sys.stderr)
            except Stopped:
                if not until.asked:
                    raise
            started = time.monotonic()
    except HomelabError as error:
        print(f"batch_sweep: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        leave_group(together=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
