"""Where the seconds and the joules of a run go, across interruptions."""

import dataclasses
import time
from typing import Any

from homelab_scaling.train.checkpoint import PAUSED, START, Clock
from homelab_scaling.train.schedule import Phase
from homelab_scaling.watch.energy import EnergyMeter


class Timing:
    """Seconds and joules by phase, and an honest token rate; kept across segments through the checkpoint.

    Sleep between steps is no part of any lap.

    Args:
        started: `time.monotonic()` when the clock began to run.
        meter: of the run's cards; None books no energy.
    """

    def __init__(self, clock: Clock, started: float, meter: EnergyMeter | None = None) -> None:
        self.clock = clock
        self.mark = started
        self.meter = meter
        self._slept_in_lap = self._slept = 0.0
        self._joules = self._metered_s = 0.0

    def lap(self) -> float:
        """Seconds since the last lap that were not slept."""
        now = time.monotonic()
        elapsed, self.mark = now - self.mark - self._slept_in_lap, now
        self._slept_in_lap = 0.0
        return max(elapsed, 0.0)

    def rest(self, seconds: float) -> None:
        """Sleeps; the next booking says for how long."""
        began = time.monotonic()
        time.sleep(seconds)
        slept = time.monotonic() - began
        self._slept_in_lap += slept
        self._slept += slept

    def book(self, name: str, phase: Phase, seconds: float) -> None:
        """Books a lap, the sleep since the last booking, and the energy since then."""
        self._note(name, phase.key, seconds)
        if self._slept:
            self._note("slept_s", phase.key, self._slept)
            self._slept = 0.0
        self._book_energy(PAUSED if name == "paused_s" else phase.key)

    def book_start(self, seconds: float) -> None:
        """Books what passed before the first update."""
        self.add(start_s=seconds)
        self._book_energy(START)

    def add(self, **amounts: float) -> None:
        """Adds to the clock's plain totals."""
        new: dict[str, Any] = {k: getattr(self.clock, k) + v for k, v in amounts.items()}
        self.clock = dataclasses.replace(self.clock, **new)

    def energy(self) -> dict[str, float | None]:
        """For a rate line: the cards' mean power since the last one, their joules so far, and the pacing's sleep."""
        joules, seconds = self._joules, self._metered_s
        self._joules = self._metered_s = 0.0
        return {
            "power_w": joules / seconds if seconds > 0 else None,
            "energy_j": sum(self.clock.energy_j.values()) if self.clock.energy_j else None,
            "slept_s": sum(self.clock.slept_s.values()),
        }

    def _note(self, name: str, key: str, amount: float) -> None:
        book: dict[str, float] = getattr(self.clock, name)
        book[key] = book.get(key, 0.0) + amount

    def _book_energy(self, key: str) -> None:
        if self.meter is None:
            return
        lap = self.meter.lap()
        metered_s = lap.seconds - lap.unseen_s
        if lap.joules == 0.0 and abs(metered_s) < 1e-6:  # nothing was seen
            return
        self._note("energy_j", key, lap.joules)
        self._note("metered_s", key, metered_s)
        self._joules += lap.joules
        self._metered_s += metered_s
        if self.meter.source is not None and self.clock.energy_from != "integrated":
            self.clock = dataclasses.replace(self.clock, energy_from=self.meter.source)
