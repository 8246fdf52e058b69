"""Which power limit gives the most tokens per joule, measured on the user's own step.

Published figures do not carry over: between models and precisions the same step down in power costs from 3 to 27 % of
speed.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from homelab_scaling.errors import MachineError, RunFailed, SpecError
from homelab_scaling.watch import processes
from homelab_scaling.watch.energy import EnergyMeter, Lap
from homelab_scaling.watch.link import LEVELS, MachineFolder

STRIDE_W = 25.0
LOWEST_FRAC = 0.5
"""Of the limit in force: below it no card is efficient."""
SETTLE_S = 10.0
"""After a change, before anything is measured: clocks and temperature follow."""
WINDOW_S = 40.0
MIN_LINES = 3
"""Rate lines of metrics.jsonl in a window, at least."""
PATIENCE = 10.0
"""Windows to wait for them before giving up."""
LONGEST_POLL_GAP_FRAC = 0.05

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Work and power over one window."""

    units_per_s: float
    power_w: float


class Work(Protocol):
    """Something that keeps the cards busy and can be measured."""

    unit: Literal["tokens", "runs"]

    def measure(self) -> Measured:
        """One window, from now on."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One power limit."""

    limit_w: float
    units_per_s: float
    power_w: float

    @property
    def units_per_j(self) -> float:
        return self.units_per_s / self.power_w


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep found."""

    unit: Literal["tokens", "runs"]
    points: tuple[SweepPoint, ...]
    """From the highest limit down."""
    drift_frac: float
    """By how much the highest limit was slower at the end than at the beginning."""
    best: SweepPoint
    max_slowdown: float

    @property
    def slowdown_frac(self) -> float:
        """Of the recommended limit against the highest."""
        return 1 - self.best.units_per_s / self.points[0].units_per_s

    @property
    def saved_frac(self) -> float:
        """Energy per unit saved."""
        return 1 - self.points[0].units_per_j / self.best.units_per_j


def limits_to_try(
    *, lowest_w: float, now_w: float, stride_w: float = STRIDE_W, lowest_frac: float = LOWEST_FRAC
) -> list[float]:
    """From the limit in force down in steps, to half of it or to what the card allows."""
    floor = max(lowest_w, lowest_frac * now_w)
    steps = int((now_w - floor) / stride_w + 1e-9)
    return [now_w - step * stride_w for step in range(steps + 1)]


def recommend(points: Sequence[SweepPoint], max_slowdown: float = 0.05) -> SweepPoint:
    """The most work per joule among the limits that cost at most this share of the fastest one's speed."""
    if not points:
        raise SpecError("a power sweep without a point; measure at least one limit")
    fastest = max(one.units_per_s for one in points)
    allowed = [one for one in points if one.units_per_s >= (1 - max_slowdown) * fastest]
    return max(allowed, key=lambda one: (one.units_per_j, one.limit_w))


def sweep(
    limits_w: Sequence[float],
    set_limit: Callable[[float], None],
    work: Work,
    *,
    say: Say,
    check: Callable[[], None] = lambda: None,
    max_slowdown: float = 0.05,
) -> SweepResult:
    """Measures every limit, and the first one again at the end: a room that warms up must not pass for a limit.

    Args:
        limits_w: from the highest down.
        set_limit: sets every card; putting it back is the caller's.
        check: raises if a window is worth nothing.
    """
    found = []
    for limit in [*limits_w, limits_w[0]]:
        set_limit(limit)
        one = work.measure()
        check()
        found.append(SweepPoint(limit_w=limit, units_per_s=one.units_per_s, power_w=one.power_w))
        say(f"{limit:.0f} W: {one.units_per_s:,.4g} {work.unit}/s at {one.power_w:.0f} W")
    first, *rest, last = found
    top = SweepPoint(
        limit_w=first.limit_w,
        units_per_s=(first.units_per_s + last.units_per_s) / 2,
        power_w=(first.power_w + last.power_w) / 2,
    )
    points = (top, *rest)
    return SweepResult(
        unit=work.unit,
        points=points,
        drift_frac=1 - last.units_per_s / first.units_per_s,
        best=recommend(points, max_slowdown),
        max_slowdown=max_slowdown,
    )


def calm(machine: MachineFolder) -> None:
    """Raises RunFailed if the watchdog slows or stops a card now: what was measured then is not the limit's doing."""
    status = machine.read_status()
    for uuid, card in (status.cards if status is not None else {}).items():
        if LEVELS.index(card.level) >= LEVELS.index("slow"):
            raise RunFailed(
                f"{uuid}: {card.level} ({card.reason}) during the sweep; let the machine cool and sweep again"
            )


class LapMeter(Protocol):
    """`energy.EnergyMeter`, or a test's."""

    def lap(self) -> Lap: ...


def power_of(lap: Lap) -> float:
    """Mean power of the cards over a lap.

    Raises:
        RunFailed: the sensors were silent for a part of it.
    """
    if lap.seconds <= 0 or lap.joules <= 0 or abs(lap.unseen_s) > LONGEST_POLL_GAP_FRAC * lap.seconds:
        raise RunFailed(
            f"the cards' energy was not measured for {lap.unseen_s:.0f} of {lap.seconds:.0f} s; sweep again"
        )
    return lap.joules / lap.seconds


@dataclass(kw_only=True)
class RunningTraining:
    """A training that goes on while limits change; its speed is read from its metrics.jsonl."""

    command: Sequence[str]
    metrics: Path
    meter: LapMeter
    settle_s: float = SETTLE_S
    window_s: float = WINDOW_S
    unit: Literal["tokens", "runs"] = "tokens"
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    _offset: int = field(default=0, init=False)
    _found: list[dict[str, float]] = field(default_factory=list, init=False)

    def __enter__(self) -> "RunningTraining":
        self._process = _start(self.command)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            end_family(self._process)

    def measure(self) -> Measured:
        """Lets the change settle, then reads whole log intervals for a window.

        Raises:
            RunFailed: the training ended, or writes nothing.
        """
        self._wait(self.settle_s)
        self._wait_for_lines(len(self._rates()) + 1)  # the interval that holds the change is not counted
        n_before = len(self._rates())
        self.meter.lap()
        self._wait(self.window_s)
        self._wait_for_lines(n_before + MIN_LINES)
        lines = self._rates()[n_before:]
        power_w = power_of(self.meter.lap())
        seconds = sum(line["interval_s"] for line in lines)
        return Measured(units_per_s=sum(line["interval_tokens"] for line in lines) / seconds, power_w=power_w)

    def _rates(self) -> list[dict[str, float]]:
        """Every rate line so far; only what is new is read."""
        with contextlib.suppress(FileNotFoundError), open(self.metrics, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:  # begun anew
                self._offset, self._found = 0, []
            file.seek(self._offset)
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            self._found += [line for line in map(json.loads, whole.splitlines()) if line.get("kind") == "rate"]
        return self._found

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._check()
            time.sleep(min(0.5, left))

    def _wait_for_lines(self, n: int) -> None:
        deadline = time.monotonic() + PATIENCE * max(1.0, self.window_s)
        while len(self._rates()) < n:
            self._check()
            if time.monotonic() > deadline:
                raise RunFailed(f"{self.metrics}: no new rate lines; name the metrics.jsonl that the command writes")
            time.sleep(0.05)

    def _check(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise RunFailed(
                f"the command ended (exit code {self._process.returncode}) before the sweep did; give one that trains "
                "for longer"
            )


@dataclass(kw_only=True)
class FixedWork:
    """A command that does the same work each time it is run."""

    command: Sequence[str]
    meter: LapMeter
    unit: Literal["tokens", "runs"] = "runs"

    def measure(self) -> Measured:
        """Runs it once.

        Raises:
            RunFailed: it failed.
        """
        begun = time.monotonic()
        self.meter.lap()
        process = _start(self.command)
        try:
            code = process.wait()
        finally:
            end_family(process)
        if code:
            raise RunFailed(
                f"{self.command[0]} ended with exit code {code}; a power sweep wants a command that succeeds"
            )
        seconds = time.monotonic() - begun
        return Measured(units_per_s=1 / seconds, power_w=power_of(self.meter.lap()))


def cards_meter(machine: MachineFolder) -> EnergyMeter:
    """The energy of all cards."""
    return EnergyMeter(machine, "all")


def _start(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(list(command), process_group=0, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise MachineError(f"{command[0]}: {error.strerror}; give a program that can be started") from None


def end_family(process: "subprocess.Popen[bytes]", grace_s: float = 20.0) -> None:
    """Ends a command and everything it started."""
    known = processes.identified(processes.family(process.pid))
    processes.send(known, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while processes.still(known) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.05)
    processes.send(processes.still(known), signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
