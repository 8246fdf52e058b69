"""The watchdog: polls the cards, judges them, says so in files, and ends runs that hang on a lost card.

One process per machine. It writes only LAB/machine (see link.py). The sensors live in a process of their own
(apart.py), so nothing here waits for a driver.
"""

import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch import link, processes
from homelab_scaling.watch.apart import SensorsApart
from homelab_scaling.watch.gpu import SensorSource
from homelab_scaling.watch.link import Control, Ended, MachineFolder, Order, Registration, Status, Transition
from homelab_scaling.watch.policy import initial_state, judge, strictest
from homelab_scaling.watch.readings import CardFacts, Sample
from homelab_scaling.watch.recording import Recording

CHECKPOINT_FILE = "checkpoint.json"
EVENTS_LIMIT_BYTES = 4_000_000
N_TRANSITIONS = 10
LIVE = "nvml"
"""The source whose samples are recorded."""
VRAM_WORD = "VRAM"
LOCK_PATIENCE_S = 1.0
"""Somebody who only looks whether the lock is held holds it for a moment."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How this watchdog behaves; what a run wants comes with its registration."""

    interval_s: float = 1.0
    """Between polls, unless a registered run wants them closer or the driver is slow."""
    idle_exit_s: float | None = None
    """Ends by itself after so long without a run; None goes on forever."""
    kill_grace_s: float = 20.0
    """Between SIGTERM and SIGKILL for a run that hangs."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one poll gave, for whoever looks on in the foreground."""

    status: Status
    transitions: tuple[Transition, ...]
    """New ones."""
    n_runs: int


def run_watchdog(
    machine: MachineFolder,
    source: SensorSource,
    *,
    stop: Callable[[], bool],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = link.now_s,
    options: Options | None = None,
    on_turn: Callable[[Turn], None] | None = None,
) -> str:
    """Watches until `stop()`; the caller holds the lock (`link.only_watchdog`).

    Args:
        clock: Unix time.
        on_turn: called after every poll.

    Returns:
        Why it ended.
    """
    dog = Watchdog(machine, source, clock=clock, options=options or Options())
    dog.event("start", source=source.source, interval_s=dog.interval_s)
    why = "asked to stop"
    try:
        while not stop():
            begun = clock()
            turn = dog.turn(begun)
            if on_turn is not None:
                on_turn(turn)
            if dog.is_idle(begun):
                why = f"no run for {dog.options.idle_exit_s:.0f} s"
                break
            sleep(max(0.0, dog.interval_s - max(0.0, clock() - begun)))
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"
        raise
    finally:
        dog.withdraw()
        dog.event("stop", reason=why)
        source.close()
    return why


class Watchdog:
    """One poll after the other; see `run_watchdog`."""

    def __init__(
        self, machine: MachineFolder, source: SensorSource, *, clock: Callable[[], float], options: Options
    ) -> None:
        self.machine, self.source, self.options, self.clock = machine, source, options, clock
        machine.path.mkdir(parents=True, exist_ok=True)
        _mend(machine.events)
        self.interval_s = options.interval_s
        self._own_interval_s = source.interval_s
        self._started = clock()
        self._state = initial_state()
        before = machine.read_status()
        self._transitions = deque(before.transitions if before else (), maxlen=N_TRANSITIONS)
        self._orders: dict[str, Order] | None = None  # as last written; None: never
        self._lost: dict[str, float] = {}
        self._recording: Recording | None = None
        self._seen: dict[str, _Seen] = {}
        self._busy_s = self._started
        self._unwritten: str | None = None
        if isinstance(source, SensorsApart):
            source.tell = lambda kind, reason: self.event(kind, reason=reason)

    # ------------------------------------------------------------------------------------------------ one poll

    def turn(self, now: float) -> Turn:
        """Polls, judges, writes; ends what hangs."""
        registrations = self._registrations(now)
        self.interval_s = self._interval(registrations)
        if isinstance(self.source, SensorsApart):
            self.source.every_s = self.interval_s
        sample = self.source.poll(now)
        facts = {one.uuid: one for one in self.source.facts}
        limits = _limits(registrations, {*facts, *(card.uuid for card in sample.cards)})
        self._state, verdict = judge(self._state, sample, facts, limits)
        self._transitions.extend(verdict.transitions)
        status = Status(
            pid=os.getpid(),
            started_s=self._started,
            t_s=now,
            interval_s=self.interval_s,
            poll_p50_s=self.source.poll_p50_s,
            poll_p99_s=self.source.poll_p99_s,
            source=self.source.source,
            facts=tuple(facts.values()),
            readings=sample.cards,
            cards=verdict.cards,
            transitions=tuple(self._transitions),
            sensor_error=self.source.error,
        )
        with self._writing():
            self._order(verdict.orders, now)
            codec.write_json(self.machine.status, status, durable=False)
            self._record(sample, tuple(facts.values()))
            for one in verdict.transitions:
                self.event("transition", **codec.to_plain(one))
        if isinstance(self.source, SensorsApart) and any(VRAM_WORD in one.reason for one in verdict.transitions):
            self.source.ask_processes()  # a card that fills up: whose doing is it
        self._note_lost({uuid for uuid, card in verdict.cards.items() if card.health == "lost"}, now)
        for registration in registrations:
            self._end_if_hung(registration, now)
        return Turn(status=status, transitions=verdict.transitions, n_runs=len(registrations))

    def is_idle(self, now: float) -> bool:
        """Whether it has been without a run for as long as it is told to wait."""
        return self.options.idle_exit_s is not None and now - self._busy_s > self.options.idle_exit_s

    def withdraw(self) -> None:
        """Takes every order back: nobody stays paused for a watchdog that is not there."""
        with self._writing():
            self._order({}, self.clock())
            if self._recording is not None:
                self._recording.close()

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl; what cannot be written is not worth the watchdog's life."""
        with self._writing():
            self.machine.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if self.machine.events.stat().st_size > EVENTS_LIMIT_BYTES:
                    os.replace(self.machine.events, self.machine.events.with_suffix(".jsonl.1"))
            codec.append_jsonl(self.machine.events, [{"kind": kind, "t_s": self.clock(), **fields}])

    def _interval(self, registrations: list[Registration]) -> float:
        """As close as the most impatient run wants it; wider while the driver is slow."""
        wanted = min([self.options.interval_s, *(one.limits.interval_s for one in registrations)])
        slow = self.source.interval_s > self._own_interval_s
        return max(wanted, self.source.interval_s) if slow else wanted

    def _record(self, sample: Sample, facts: tuple[CardFacts, ...]) -> None:
        """Keeps what the cards said; a replay is on record already."""
        if not sample.cards or self.source.source != LIVE:
            return
        if self._recording is None:
            self._recording = Recording(self.machine.samples)
        self._recording.append(sample, facts)

    def _order(self, orders: dict[str, Order], now: float) -> None:
        """Writes control.json if an order changed; ids grow over restarts, whatever became of the file."""
        if self._orders is not None and _what(orders) == _what(self._orders):
            return
        before = self.machine.read_control()
        number = before.id + 1 if before is not None else int(now)
        codec.write_json(self.machine.control, Control(id=number, t_s=now, cards=orders), durable=False)
        self._orders = dict(orders)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk is said once, and survived."""
        try:
            yield
        except (OSError, HomelabError) as error:
            if str(error) != self._unwritten:
                print(f"watchdog: {error}", file=sys.stderr, flush=True)
            self._unwritten = str(error)

    # -------------------------------------------------------------------------------------------------- the runs

    def _registrations(self, now: float) -> list[Registration]:
        """Runs that are in progress; the registrations of those that are gone are removed."""
        alive = []
        for one in self.machine.registrations():
            seen = self._seen.get(one.run_id)
            if seen is None or seen.started_s != one.started_s:
                seen = self._seen[one.run_id] = _first_seen(one)
                self._forget_end(one)
            if processes.still(seen.ticks):
                alive.append(one)
            else:
                self._drop(one, "none of its processes is there")
        for run_id in set(self._seen) - {one.run_id for one in alive}:
            del self._seen[run_id]
        if alive:
            self._busy_s = now
        return alive

    def _forget_end(self, one: Registration) -> None:
        """A run that is back is not one that was ended."""
        ended = self.machine.read_ended(one.run_id)
        if ended is not None and ended.t_s < one.started_s:
            with contextlib.suppress(OSError):
                (self.machine.ended / f"{one.run_id}.json").unlink()

    def _drop(self, one: Registration, reason: str) -> None:
        with contextlib.suppress(OSError):
            (self.machine.runs / f"{one.run_id}.json").unlink()
        self.event("dropped", run_id=one.run_id, reason=reason)

    def _note_lost(self, lost: set[str], now: float) -> None:
        self._lost = {uuid: self._lost.get(uuid, now) for uuid in lost}

    def _end_if_hung(self, one: Registration, now: float) -> None:
        """A run that is still there long after one of its cards was lost waits for an answer that will not come."""
        since = [max(self._lost[uuid], one.started_s) for uuid in one.cards if uuid in self._lost]
        seen = self._seen[one.run_id]
        if seen.told_s is None:
            if since and now - min(since) >= one.limits.hang_kill_s:
                self._seen[one.run_id] = replace(seen, told_s=now)
                self._ask_to_end(one, now, f"it had not ended {now - min(since):.0f} s after a card of its was lost")
        elif now - seen.told_s >= self.options.kill_grace_s:
            self._signal(one, signal.SIGKILL)
            self._drop(one, "killed")

    def _ask_to_end(self, one: Registration, now: float, reason: str) -> None:
        good = last_checkpoint(Path(one.folder)) if one.folder else None
        ended = Ended(run_id=one.run_id, t_s=now, reason=reason, last_checkpoint=str(good) if good else None)
        with self._writing():
            codec.write_json(self.machine.ended / f"{one.run_id}.json", ended)
        self.event("ended", **{**codec.to_plain(ended), "pids": list(one.pids)})
        self._signal(one, signal.SIGTERM)
        self._signal(one, signal.SIGCONT)  # what is stopped hears nothing

    def _signal(self, one: Registration, number: signal.Signals) -> None:
        for pid in processes.still(self._seen[one.run_id].ticks):
            if (
                one.foreign and number != signal.SIGTERM
            ):  # its ranks are not registered, and may lead groups of their own
                processes.send(processes.family(pid), number)
            else:
                processes.end(pid, number)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What is remembered of a registration."""

    started_s: float
    ticks: dict[int, int]
    """Pid -> when that process started, so that a pid used again is not taken for it."""
    told_s: float | None = None
    """When it was asked to end."""


def _first_seen(one: Registration) -> _Seen:
    found = {pid: processes.look_up(pid) for pid in one.pids}
    # A registration left behind by a power cut names pids that may be anybody's by now.
    mine = {pid: p.start_ticks for pid, p in found.items() if p and processes.started_s(p) < one.started_s + 60}
    return _Seen(started_s=one.started_s, ticks=mine)


def _limits(registrations: list[Registration], uuids: set[str]) -> dict[str, WatchLimits]:
    """By card: the strictest of its runs."""
    by_card = {uuid: [one.limits for one in registrations if uuid in one.cards] for uuid in uuids}
    return {uuid: strictest(several) for uuid, several in by_card.items() if several}


def _what(orders: dict[str, Order]) -> dict[str, tuple[str, float]]:
    """What is ordered, without the words: a temperature in a reason is no new order."""
    return {uuid: (one.level, one.duty) for uuid, one in orders.items()}


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run folder whose files are all there (a resume checks their hashes too)."""
    for folder in sorted(RunFolder(run).checkpoints.glob("u[0-9]*"), reverse=True):
        with contextlib.suppress(HomelabError, OSError, AttributeError):
            files = codec.read_plain_json(folder / CHECKPOINT_FILE).get("sha256", {})
            if files and all((folder / name).stat().st_size > 0 for name in files):
                return folder
    return None


def _mend(path: Path) -> None:
    """Cuts a torn last line off (a killed writer's), so that the next one is a line of its own."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


# ------------------------------------------------------------------------------------------------- the process itself


@contextmanager
def sole_watchdog(machine: MachineFolder) -> Iterator[bool]:
    """As `link.only_watchdog`, but does not take a glance at the lock for a watchdog."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        with contextlib.ExitStack() as stack:
            mine = stack.enter_context(link.only_watchdog(machine))
            if mine or time.monotonic() > deadline:
                yield mine
                return
        time.sleep(0.1)
