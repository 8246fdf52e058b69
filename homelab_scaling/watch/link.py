"""How the watchdog, the runs, and whoever looks on speak to one another: small files under LAB/machine.

    LAB/machine/status.json     watchdog -> all      atomic, every poll: facts, readings, levels, transitions
    LAB/machine/control.json    watchdog -> runs     atomic, on change: an increasing id and an order per card
    LAB/machine/gpu.jsonl       watchdog -> all      every sample, rotated
    LAB/machine/events.jsonl    watchdog -> all      transitions and their reasons
    LAB/machine/runs/ID.json    run -> watchdog      which pids on which cards, with which limits
    LAB/machine/ended/ID.json   watchdog -> run      what it had to end, and why

The watchdog writes nothing else; a run writes only its own registration. There is one watchdog a machine: the second
lab's runs register with the first lab's (see `machine_folder`).
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.runs import RUNS_FOLDERS, RunFolder
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch.readings import CardFacts, CardReading

T = TypeVar("T")

Level = Literal["ok", "warn", "slow", "pause", "stop"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "slow", "pause", "stop")
"""In order of urgency."""

STALE_POLLS = 5
"""A status older than this many polls is no status."""
CARDS_VARIABLE = "HOMELAB_WATCH_CARDS"
"""UUIDs (comma-separated, or `all`) that a run counts as its own instead of its CUDA devices."""
MACHINE_VARIABLE = "HOMELAB_MACHINE"
"""Folder of the machine's files, instead of LAB/machine."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a card's runs are to do."""

    level: Level = "ok"
    duty: float = 1.0
    """Share of the time that training may compute; below 1 it sleeps between steps."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Control:
    """control.json."""

    id: int
    """Grows with every change, over restarts too."""
    t_s: float
    cards: dict[str, Order] = field(default_factory=dict)
    """By UUID; a card that is not there has no order."""


@dataclass(frozen=True, kw_only=True)
class Transition:
    """A card's change of level; a line of events.jsonl and the last few in status.json."""

    t_s: float
    uuid: str
    before: Level
    after: Level
    duty: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class CardStatus:
    """What the watchdog makes of one card now."""

    level: Level = "ok"
    duty: float = 1.0
    reason: str = ""
    since_s: float = 0.0
    """Unix time of the last change."""
    health: str = "ok"
    """Of the sensor: ok, stale, stuck, implausible, lost, unknown."""
    throttled_frac: dict[str, float] = field(default_factory=dict)
    """Throttle word -> share of the last ten minutes."""
    lost_clock_frac: float | None = None
    """Of the SM clock, while throttled by heat, against the unthrottled minutes."""
    vram_peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Status:
    """status.json."""

    pid: int
    started_s: float
    t_s: float
    interval_s: float
    poll_p50_s: float
    poll_p99_s: float
    source: str = "nvml"
    """nvml, or the file that is replayed."""
    facts: tuple[CardFacts, ...] = ()
    readings: tuple[CardReading, ...] = ()
    cards: dict[str, CardStatus] = field(default_factory=dict)
    transitions: tuple[Transition, ...] = ()
    """The last ten, newest last."""
    sensor_error: str | None = None
    """Why there are no readings at all."""

    def is_fresh(self, now_s: float) -> bool:
        return now_s - self.t_s <= STALE_POLLS * max(self.interval_s, 1.0)


@dataclass(frozen=True, kw_only=True)
class Registration:
    """runs/ID.json: a run in progress."""

    run_id: str
    folder: str
    """Of the run, absolute; "" for a foreign trainer."""
    pids: tuple[int, ...]
    """Ranks, or the guarded command."""
    cards: tuple[str, ...]
    """UUIDs it trains on; empty on CPU."""
    started_s: float
    limits: WatchLimits = field(default_factory=WatchLimits)
    foreign: bool = False
    """A command that does not read control.json: paced with signals."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """ended/ID.json: a run that the watchdog had to end."""

    run_id: str
    t_s: float
    reason: str
    last_checkpoint: str | None = None


class MachineFolder:
    """The paths under LAB/machine, and what is read from and written to them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.status = path / "status.json"
        self.control = path / "control.json"
        self.samples = path / "gpu.jsonl"
        self.events = path / "events.jsonl"
        self.runs = path / "runs"
        self.ended = path / "ended"
        self.lock = path / ".watchdog.lock"
        self.log = path / "watchdog.log"

    def read_status(self) -> Status | None:
        """The last status, fresh or not; None where there is none that can be read."""
        return _read(self.status, Status)

    def read_control(self) -> Control | None:
        """The orders in force; None where there are none that can be read."""
        return _read(self.control, Control)

    def register(self, one: Registration) -> Path:
        """Makes a run known to the watchdog; the path to remove when it is over."""
        self.runs.mkdir(parents=True, exist_ok=True)
        path = self.runs / f"{one.run_id}.json"
        codec.write_json(path, one)
        return path

    def registrations(self) -> list[Registration]:
        """Every run that says it is in progress; unreadable files are skipped."""
        found = [_read(path, Registration) for path in sorted(self.runs.glob("*.json"))]
        return [one for one in found if one is not None]

    def read_ended(self, run_id: str) -> Ended | None:
        """What the watchdog says of a run it ended; None if it did not."""
        return _read(self.ended / f"{run_id}.json", Ended)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return codec.read_json(path, kind)
    except HomelabError:
        return None


def machine_folder(lab: Path) -> MachineFolder:
    """Where this machine's watchdog keeps its files: LAB/machine, unless another lab's watchdog is alive.

    Args:
        lab: the folder that holds the labs.
    """
    given = os.environ.get(MACHINE_VARIABLE)
    if given:
        return MachineFolder(Path(given))
    with contextlib.suppress(OSError), open(_pointer(), encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # held: its watchdog lives
            elsewhere = Path(file.read().strip())
            if elsewhere.is_dir():
                return MachineFolder(elsewhere)
    return MachineFolder(lab.resolve() / "machine")


def lab_of(folder: RunFolder) -> Path:
    """The folder of labs that a run lies in: LAB of LAB/<ladder>/runs/<run_id>."""
    parents = folder.path.resolve().parents
    return parents[2] if len(parents) > 2 and parents[0].name in RUNS_FOLDERS else parents[0]


@contextlib.contextmanager
def only_watchdog(folder: MachineFolder) -> Iterator[bool]:
    """True while this process is the machine's watchdog, False where another one is; the kernel frees it if we die."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(lock_path(folder), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.seek(0)
        file.truncate()
        file.write(str(folder.path.resolve()))
        file.flush()
        yield True


def lock_path(folder: MachineFolder) -> Path:
    """What the watchdog of this machine holds while it lives."""
    return folder.lock if os.environ.get(MACHINE_VARIABLE) else _pointer()


def _pointer() -> Path:
    """The machine-wide lock, whose text is the folder of the watchdog that holds it."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) if base and Path(base).is_dir() else Path(tempfile.gettempdir())
    return root / f"homelab-watchdog-{os.getuid()}.lock"


def why_not_watched(limits: WatchLimits, *, on_gpu: bool) -> str | None:
    """Why a run gets no watchdog; None where it gets one."""
    if not limits.enabled:
        return "watch.enabled is false"
    if not (on_gpu or os.environ.get(CARDS_VARIABLE) or os.environ.get(MACHINE_VARIABLE)):
        return "the run is on CPU, and there is no card to watch"
    return None


def worst(orders: list[Order]) -> Order:
    """The most urgent of several orders, at the lowest duty of all."""
    if not orders:
        return Order()
    first = max(orders, key=lambda o: LEVELS.index(o.level))
    return Order(level=first.level, duty=min(o.duty for o in orders), reason=first.reason)


def now_s() -> float:
    return time.time()
