"""Where the seconds of a run go, across interruptions."""

import dataclasses
import time
from typing import Any

from homelab_scaling.train.checkpoint import Clock
from homelab_scaling.train.schedule import Phase


class Timing:
    """Seconds by phase, and an honest token rate; kept across segments through the checkpoint."""

    def __init__(self, clock: Clock, started: float) -> None:
        self.clock = clock
        self.mark = started

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.monotonic()
        elapsed, self.mark = now - self.mark, now
        return elapsed

    def book(self, name: str, phase: Phase, seconds: float) -> None:
        book: dict[str, float] = getattr(self.clock, name)
        book[phase.key] = book.get(phase.key, 0.0) + seconds

    def add(self, **amounts: float) -> None:
        """Adds to the clock's plain totals."""
        new: dict[str, Any] = {k: getattr(self.clock, k) + v for k, v in amounts.items()}
        self.clock = dataclasses.replace(self.clock, **new)
