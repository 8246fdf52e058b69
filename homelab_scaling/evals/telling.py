"""How far an evaluation is, on stderr: a bar on a terminal, one line a minute otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from homelab_scaling.evals.sitting import Progress

LINE_EVERY_S = 60.0

Report = Callable[[Progress], None]


@contextmanager
def telling() -> Iterator[Report]:
    """A callback for `Sitting.report`, while the block runs."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines().report


def describe(progress: Progress) -> str:
    """bpb: 128 of 500 documents (64 of them from before), 12 s."""
    kept = f" ({progress.n_kept:,} of them from before)" if progress.n_kept else ""
    return f"{progress.task}: {progress.n_done:,} of {progress.n_documents:,} documents{kept}, {progress.seconds:.0f} s"


class _Lines:
    def __init__(self) -> None:
        self._told_s = time.monotonic()

    def report(self, progress: Progress) -> None:
        now, is_done = time.monotonic(), progress.n_done == progress.n_documents
        if is_done or now - self._told_s >= LINE_EVERY_S:
            self._told_s = now
            print(describe(progress), file=sys.stderr, flush=True)


@contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        told: Progress | None = None
        bar: Any = None

        def report(progress: Progress) -> None:
            nonlocal told, bar
            is_new = told is None or progress.task != told.task or progress.n_done < told.n_done
            told = progress
            if is_new:
                bar = bars.add_task(progress.task, total=progress.n_documents)
            bars.update(bar, completed=progress.n_done)

        yield report
