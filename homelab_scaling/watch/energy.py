"""Joules of a run from the watchdog's status.json, and what they are at the wall plug.

The cards' energy is measured (counter, or trapezoid of power; +-5 % of reading). What the wall plug sees is a model,
P_wall = a + c * sum(P_gpu): uncalibrated within 10 to 15 %, better after `homelab watchdog calibrate`.

Source: +-5 % of reading, not watts: Yang et al. 2024, "Part-time power measurements" (arXiv 2312.02741).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError, SpecError
from homelab_scaling.watch.link import MachineFolder, Status

Source = Literal["counter", "integrated"]

CARD_ERR_FRAC = 0.05
WALL_ERR_FRAC = 0.15
"""Of the uncalibrated model."""
JOULES_PER_KWH = 3.6e6
READ_EVERY_S = 0.5
WALL_FILE = "wall.json"


@dataclass(frozen=True, kw_only=True)
class WallModel:
    """wall.json: P_wall = base_w + slope * (power of all cards)."""

    base_w: float = 110.0
    """Everything but the cards; the default is a desktop with one busy CPU core."""
    slope: float = 1 / 0.92
    """1 / efficiency of the power supply."""
    se_w: float | None = None
    """Standard deviation of the calibration's residuals."""
    n: int = 0
    """Readings of the plug behind it; 0 is the uncalibrated default."""

    def __post_init__(self) -> None:
        if self.base_w < 0 or self.slope <= 0:
            raise SpecError(
                f"wall model of {self.base_w:g} W + {self.slope:g} x cards: wants a base of 0 or more and a positive "
                "slope; calibrate again with the cards idle, half and fully busy"
            )

    @property
    def is_calibrated(self) -> bool:
        return self.n > 0

    def joules(self, card_joules: float, seconds: float) -> float:
        """At the plug, over `seconds` in which the cards took `card_joules`."""
        return self.base_w * seconds + self.slope * card_joules

    def shared(self, frac: float) -> "WallModel":
        """For a run that has this share of what is not its cards."""
        return replace(self, base_w=frac * self.base_w)

    def err_frac(self, wall_w: float) -> float:
        """Relative error to state at this power: two standard deviations of the residuals, at least 2 %."""
        if not self.is_calibrated or self.se_w is None or wall_w <= 0:
            return WALL_ERR_FRAC
        return max(0.02, 2 * self.se_w / wall_w)


def read_wall_model(machine: MachineFolder) -> WallModel:
    """The machine's calibrated model, or the uncalibrated default."""
    try:
        return codec.read_json(machine.path / WALL_FILE, WallModel)
    except HomelabError:
        return WallModel()


def write_wall_model(machine: MachineFolder, model: WallModel) -> None:
    """Keeps a calibration for every later run on this machine."""
    codec.write_json(machine.path / WALL_FILE, model)


@dataclass(frozen=True, kw_only=True)
class Lap:
    """Energy since the lap before."""

    joules: float
    """Measured, over all of the run's cards; what was not seen is not in it."""
    seconds: float
    unseen_s: float
    """Of these seconds, how many no sensor covered. Negative where a counter made good an earlier gap."""

    @property
    def power_w(self) -> float | None:
        """Mean power of the lap; None where a part of it was not seen."""
        return self.joules / self.seconds if self.seconds > 0 and abs(self.unseen_s) < 0.01 * self.seconds else None


@dataclass(frozen=True, kw_only=True)
class _Seen:
    t_s: float
    joules: float
    watts: float
    watchdog: tuple[int, float]
    """Pid and start; the readings' joules count from there."""


class EnergyMeter:
    """Reads how much energy some cards took between laps. A second run on the same card sees the same joules.

    A status is up to a second old, so the last power carries on to now; sums stay those of the readings. A restarted
    watchdog counts anew: between the two nothing was seen. While no fresh status is there, time passes as unseen, until
    the same watchdog's counter accounts for it.

    Args:
        machine: the watchdog's files.
        cards: UUIDs; "all" takes every card that the status has.
        now: Unix time.
    """

    def __init__(
        self, machine: MachineFolder, cards: tuple[str, ...] | Literal["all"], now: Callable[[], float] = time.time
    ) -> None:
        self.machine, self.cards, self.now = machine, cards, now
        self.source: Source | None = None
        self.why_not: str | None = "no watchdog has measured these cards" if cards else "the run uses no card"
        self._status: Status | None = None
        self._read_s = float("-inf")
        self._began = self._lap_s = now()
        self._last: _Seen | None = None
        self._joules = self._unseen = 0.0
        self._said_joules = self._said_unseen = 0.0
        self.lap()

    def lap(self) -> Lap:
        """What came since the last lap."""
        now = self.now()
        fresh = self._look(now)
        joules, unseen = self._joules, self._unseen
        since = max(0.0, now - (self._last.t_s if self._last else self._began))
        if fresh and self._last:
            joules += self._last.watts * since
        else:
            unseen += since
        seconds, self._lap_s = max(0.0, now - self._lap_s), now
        # What was said is not taken back: a guess that was too high is made good by the laps that follow.
        lap = Lap(joules=max(0.0, joules - self._said_joules), seconds=seconds, unseen_s=unseen - self._said_unseen)
        self._said_joules += lap.joules
        self._said_unseen = unseen
        return lap

    def _look(self, now: float) -> bool:
        """Takes in the newest status; whether it is fresh and knows every card."""
        if not self.cards:
            return False
        if not 0 <= now - self._read_s < READ_EVERY_S:
            self._status, self._read_s = self.machine.read_status(), now
        if self._status is None or not self._status.is_fresh(now):
            return False
        seen = self._sum(self._status)
        if seen is None:
            return False
        before = self._last
        if before is None or before.watchdog != seen.watchdog:
            # The readings count from the watchdog's start: all of it is ours if it was started after us.
            started = seen.watchdog[1]
            if before is not None or started >= self._began:
                self._joules += seen.joules
                self._unseen += max(0.0, started - (before.t_s if before else self._began))
            else:
                self._unseen += max(0.0, seen.t_s - self._began)
        else:
            self._joules += max(0.0, seen.joules - before.joules)
        self._last = seen
        return True

    def _sum(self, status: Status) -> _Seen | None:
        readings = {r.uuid: r for r in status.readings}
        wanted = tuple(readings) if self.cards == "all" else self.cards
        mine = [readings.get(uuid) for uuid in wanted]
        joules = [r.energy_j for r in mine if r is not None and r.energy_j is not None]
        if not mine or len(joules) < len(mine):
            self.why_not = status.sensor_error or "a card's driver gives neither energy nor power"
            return None
        self.why_not = None
        self.source = "counter" if all(r is not None and r.energy_from == "counter" for r in mine) else "integrated"
        return _Seen(
            t_s=status.t_s,
            joules=sum(joules),
            watts=sum(r.power_w or 0.0 for r in mine if r is not None),
            watchdog=(status.pid, status.started_s),
        )
