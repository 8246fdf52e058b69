"""A recording of the cards, and the finished runs beside it, as they would have looked at each moment."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from homelab_scaling.errors import DataError, HomelabError, SpecError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec, WatchLimits
from homelab_scaling.watch.energy import read_wall_model
from homelab_scaling.watch.feed import Cached, Look, event_s
from homelab_scaling.watch.frame import Frame
from homelab_scaling.watch.link import MachineFolder, Registration, Status, Transition
from homelab_scaling.watch.machineview import History, Machine, assemble
from homelab_scaling.watch.policy import PolicyState, initial_state, judge
from homelab_scaling.watch.readings import CardFacts, Sample
from homelab_scaling.watch.recording import read_recording
from homelab_scaling.watch.tail import Fresh, Tail
from homelab_scaling.watch.view import LadderEye, Place, make_frame, newest_ladder

Entry = tuple[tuple[CardFacts, ...], Sample]


class ReplayView:
    """Frames of a recorded gpu.jsonl, at moments of its own clock; the policy judges it anew.

    Args:
        recording: LAB/machine/gpu.jsonl, or such a file anywhere.
        place: whose runs are shown beside it; None takes those of the lab that the file lies in, if there is one.

    Raises:
        DataError: the file holds no sample.
    """

    def __init__(self, recording: Path, place: Place | None = None, *, run: str | None = None) -> None:
        if not recording.is_file():
            raise SpecError(f"{recording}: no such recording; give a gpu.jsonl that a watchdog wrote")
        self.recording, self.wanted = recording, run
        lab = place.lab if place else recording.resolve().parent.parent
        path = (place.ladder if place else None) or newest_ladder(lab)
        self.lab = lab
        self.ladder = None if path is None else LadderEye(path, _played_runs(path))
        self.start_s, self.end_s = _ends(recording)
        self._entries: Iterator[Entry] = read_recording(recording)
        self._next: Entry | None = next(self._entries, None)
        self._state: PolicyState = initial_state()
        self._cards: dict[str, Any] = {}
        self._facts: tuple[CardFacts, ...] = ()
        self._transitions: deque[Transition] = deque(maxlen=30)
        self._history = History()
        self._wall = read_wall_model(MachineFolder(recording.parent))

    def frame(self, t_s: float, speed: float = 1.0) -> Frame:
        """As it was at `t_s` of the recording's clock; time only goes forward."""
        if self.ladder is not None:
            self.ladder.list()
            self.ladder.look(t_s)
        machine = self._machine(t_s)
        found = make_frame(t_s, self.lab, self.ladder, machine, self.wanted)
        over = ", over" if t_s >= self.end_s else ""
        return replace(found, replay=f"replay x{speed:g}{over}")

    def _machine(self, t_s: float) -> Machine:
        limits = self._limits()
        while self._next is not None and self._next[1].t_s <= t_s:
            self._facts, new = self._next
            by_uuid = {one.uuid: one for one in self._facts}
            self._state, verdict = judge(self._state, new, by_uuid, {c.uuid: limits for c in new.cards})
            self._cards = verdict.cards
            self._transitions.extend(verdict.transitions)
            self._history.add(new)
            self._next = next(self._entries, None)
        sample = self._history.sample
        status = None
        if sample is not None:
            status = Status(
                pid=0,
                started_s=self.start_s,
                t_s=sample.t_s,
                interval_s=1.0,
                poll_p50_s=sample.poll_s,
                poll_p99_s=sample.poll_s,
                source=str(self.recording),
                facts=self._facts,
                readings=sample.cards,
                cards=self._cards,
                transitions=tuple(self._transitions),
            )
        registrations = self._registrations([c.uuid for c in sample.cards] if sample else [], limits)
        return assemble(status, self._history, (), registrations, t_s, state="recording", wall=self._wall)

    def _limits(self) -> WatchLimits:
        specs = [run.spec for run in self.ladder.runs if run.spec and run.is_active] if self.ladder else []
        return specs[0].watch if specs else WatchLimits()

    def _registrations(self, uuids: Sequence[str], limits: WatchLimits) -> list[Registration]:
        """Runs that were going on, as if they had used every card."""
        going = [run.run_id for run in self.ladder.runs if run.is_active] if self.ladder else []
        return [
            Registration(run_id=name, folder="", pids=(), cards=tuple(uuids), started_s=self.start_s, limits=limits)
            for name in going
        ]

    def close(self) -> None:
        """Nothing to let go of."""


def _ends(recording: Path) -> tuple[float, float]:
    first = last = None
    for _facts, sample in read_recording(recording):
        first = sample.t_s if first is None else first
        last = sample.t_s
    if first is None or last is None:
        raise DataError(f"{recording}: no sample in it; give a gpu.jsonl that a watchdog wrote")
    return first, last


def _played_runs(ladder: Path) -> "list[PlayedFeed]":
    try:
        folders = sorted(p for p in (ladder / "runs").iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []
    return [PlayedFeed(path) for path in folders]


class PlayedFeed:
    """A run's folder as it looked at a moment: lines up to then, the record without what came later."""

    def __init__(self, path: Path) -> None:
        folder = RunFolder(path)
        self.run_id = path.name
        self.spec: RunSpec | None = None
        self.problem: str | None = None
        self._has_spec = folder.spec.exists()
        try:
            self.spec = folder.read_spec() if self._has_spec else None
        except HomelabError as error:
            self.problem = str(error)
        self._record = Cached(folder.record).read() or {}
        self._events = [
            (t, e) for e in Tail(folder.events, first_bytes=None).read().lines if (t := event_s(e)) is not None
        ]
        lines = Tail(folder.metrics, first_bytes=None).read().lines
        self._lines = dated(lines, self._events)
        self._at = 0
        self._shown_s = float("-inf")

    def look(self, now_s: float) -> Look:
        """Lines since the last look, up to `now_s`."""
        restarted = now_s < self._shown_s
        if restarted:
            self._at = 0
        self._shown_s = now_s
        first = self._at
        while self._at < len(self._lines) and self._lines[self._at][0] <= now_s:
            self._at += 1
        fresh = [line for _, line in self._lines[first : self._at]]
        events = [e for t, e in self._events if t <= now_s]
        return Look(
            metrics=Fresh(lines=fresh, restarted=restarted),
            events=events,
            record=self._record_at(events, now_s),
            logged_s=self._lines[self._at - 1][0] if self._at else None,
            saved_s=None,
            is_alive=True,
            has_spec=self._has_spec,
            problems=(self.problem,) if self.problem else (),
        )

    def _record_at(self, events: Sequence[dict[str, Any]], now_s: float) -> dict[str, Any] | None:
        """The record as far as it was written: none before the run, all of it after its end."""
        if not any(e.get("kind") == "segment" for e in events):
            return None
        last = [e for e in events if e.get("kind") in ("segment", "end")][-1]
        if last.get("kind") == "end":
            rest = [e for t, e in self._events if t > now_s and e.get("kind") == "segment"]
            if not rest:
                return self._record
            return {
                **self._record,
                "status": last.get("status"),
                "reason": last.get("reason"),
                "rows": self._rows(events),
            }
        return {**self._record, "status": "running", "reason": None, "rows": self._rows(events)}

    def _rows(self, events: Sequence[dict[str, Any]]) -> list[Any]:
        earned = {e.get("row_id") for e in events if e.get("kind") == "row"}
        return [row for row in self._record.get("rows") or () if isinstance(row, dict) and row.get("row_id") in earned]


def dated(
    lines: Sequence[dict[str, Any]], events: Sequence[tuple[float, dict[str, Any]]]
) -> list[tuple[float, dict[str, Any]]]:
    """Each metrics line with a Unix time: its segment's start plus the log intervals before it, stretched to the next
    event where validations and checkpoints took time too. Lines of no segment are left out.
    """
    starts = [(t, int(e.get("update") or 0)) for t, e in events if e.get("kind") == "segment"]
    found: list[tuple[float, dict[str, Any]]] = []
    for i, (began, update) in enumerate(starts):
        until = starts[i + 1][1] if i + 1 < len(starts) else None
        mine = [ln for ln in lines if _within(ln, update, until)]
        found += _spread(mine, began, _next_stop(events, began))
    return found


def _within(line: dict[str, Any], first: int, until: int | None) -> bool:
    update = line.get("update")
    if not isinstance(update, int):
        return False
    done = update + 1 if line.get("kind") == "step" else update
    return done > first and (until is None or done <= until)


def _next_stop(events: Sequence[tuple[float, dict[str, Any]]], began: float) -> float | None:
    """When the segment that began then ended, if it says so."""
    for t, event in events:
        if t > began and event.get("kind") in ("end", "segment"):
            return t
    return None


def _spread(lines: Sequence[dict[str, Any]], began: float, ended: float | None) -> list[tuple[float, dict[str, Any]]]:
    """Times that grow with the log intervals from `began` to `ended`."""
    places: list[float] = []
    place = 0.0
    for line in lines:
        seconds = line.get("interval_s")
        if line.get("kind") == "rate" and isinstance(seconds, int | float):
            place += float(seconds)
        places.append(place)
    stretch = max(1.0, (ended - began) / place) if ended is not None and place > 0 else 1.0
    # The steps of an interval are written when it is over.
    times = [began + stretch * p for p in places]
    for i in range(len(lines) - 2, -1, -1):
        if lines[i].get("kind") == "step":
            times[i] = times[i + 1]
    return list(zip(times, lines, strict=True))
