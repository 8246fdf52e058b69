"""A build's progress on stderr: a bar on a terminal, one line a minute otherwise."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from homelab_scaling.data.build import Progress, Report

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 60.0


@contextmanager
def show_progress() -> Iterator[Report]:
    """A callback for `build_shards` that shows stage, MB/s and tokens/s while the block runs."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines().report


def describe(progress: Progress, seconds: float) -> str:
    """The numbers of a stage in one phrase."""
    done = f"{progress.n_bytes / 1e6:.1f}"
    total = f"/{progress.total_bytes / 1e6:.1f}" if progress.total_bytes else ""
    rate = f", {progress.n_bytes / 1e6 / seconds:.1f} MB/s" if seconds > 0 and progress.n_bytes else ""
    tokens = f", {progress.n_tokens / seconds:,.0f} tokens/s" if seconds > 0 and progress.n_tokens else ""
    return f"{done}{total} MB{rate}{tokens}"


class _Lines:
    def __init__(self) -> None:
        self._stage = ""
        self._began_s = self._printed_s = time.monotonic()

    def report(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage != self._stage:
            self._stage, self._began_s = progress.stage, now
        elif now - self._printed_s >= LINE_EVERY_S:
            self._printed_s = now
            print(f"corpus: {progress.stage}: {describe(progress, now - self._began_s)}", file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, tuple[TaskID, float]] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                for task, _began_s in tasks.values():
                    bars.update(task, total=1, completed=1)
                task = bars.add_task(progress.stage, total=progress.total_bytes, numbers="")
                tasks[progress.stage] = task, time.monotonic()
            task, began_s = tasks[progress.stage]
            numbers = describe(progress, time.monotonic() - began_s) if progress.n_bytes else ""
            bars.update(task, completed=progress.n_bytes, numbers=numbers)

        yield report
        for task, _began_s in tasks.values():
            bars.update(task, total=1, completed=1)
