"""What there is to know of one run at one moment: from its folder as it grows (the replay's feed is in play.py)."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.watch import processes
from homelab_scaling.watch.tail import Fresh, Tail

CHECKPOINT_FILE = "checkpoint.json"
CLOCK_SLACK_S = 60.0
"""A process that started later than its run's segment by more than this only has the same number."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at a run; `metrics` holds only what is new, everything else all that is known."""

    metrics: Fresh
    events: Sequence[dict[str, Any]]
    record: dict[str, Any] | None
    logged_s: float | None
    """When metrics.jsonl last grew."""
    saved_s: float | None
    """When the newest checkpoint was written."""
    is_alive: bool | None
    """Whether one of its processes is there; None where it never named one."""
    clock: dict[str, Any] = field(default_factory=dict)
    """Of the newest checkpoint: seconds and joules by phase."""
    clock_update: int = 0
    """How many updates `clock` covers."""
    has_spec: bool = True
    """Whether there is a spec.json, readable or not; another trainer's run has none."""
    problems: tuple[str, ...] = ()


class Feed(Protocol):
    """Where looks come from."""

    run_id: str
    spec: RunSpec | None
    problem: str | None
    """Why there is no spec."""

    def look(self, now_s: float) -> Look: ...


class FolderFeed:
    """A run's folder, read as it grows.

    Args:
        path: the run's folder.
        pids: more processes that may be its own (the watchdog's registration).
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.run_id = path.name
        self.spec: RunSpec | None = None
        self.problem: str | None = "it has no spec.json yet"
        self.pids: tuple[int, ...] = ()
        self._metrics = Tail(self.folder.metrics)
        self._events_tail = Tail(self.folder.events)
        self._events: list[dict[str, Any]] = []
        self._record = Cached(self.folder.record)
        self._spec = Cached(self.folder.spec)
        self._clock: tuple[Path | None, dict[str, Any], int, float | None] = (None, {}, 0, None)

    def look(self, now_s: float) -> Look:
        """Everything that is in the folder now."""
        self._read_spec()
        metrics, events = self._metrics.read(), self._events_tail.read()
        if events.restarted:
            self._events = []
        self._events += events.lines
        record = self._record.read()
        checkpoint, clock, clock_update, saved_s = self._read_clock()
        problems = [p for p in (self.problem if self._spec.exists else None, self._record.problem) if p]
        return Look(
            metrics=metrics,
            events=self._events,
            record=record,
            logged_s=self._metrics.changed_s,
            saved_s=saved_s if checkpoint else None,
            is_alive=self._is_alive(),
            clock=clock,
            clock_update=clock_update,
            has_spec=self._spec.exists,
            problems=tuple(problems),
        )

    def _read_spec(self) -> None:
        plain, changed = self._spec.read(), self._spec.changed
        if plain is None:
            self.problem = self._spec.problem or "it has no spec.json"
        elif changed:
            try:
                self.spec, self.problem = codec.from_plain(plain, RunSpec, "spec.json"), None
            except HomelabError as error:
                self.spec, self.problem = None, str(error)

    def _is_alive(self) -> bool | None:
        segments = [e for e in self._events if e.get("kind") == "segment"]
        named = segments[-1].get("pids") if segments else None
        pids = [pid for pid in (*(named if isinstance(named, list) else ()), *self.pids) if isinstance(pid, int)]
        if not pids:
            return None
        began = event_s(segments[-1]) if segments else None
        return any(_lives(pid, began) for pid in pids)

    def _read_clock(self) -> tuple[Path | None, dict[str, Any], int, float | None]:
        """The newest whole checkpoint's clock; read again only when there is a newer one."""
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.checkpoints.glob("u[0-9]*"), reverse=True):
                if path == self._clock[0]:
                    break
                with contextlib.suppress(HomelabError, OSError):
                    plain = codec.read_plain_json(path / CHECKPOINT_FILE)
                    clock = plain.get("clock") if isinstance(plain, dict) else None
                    update = plain.get("update") if isinstance(plain, dict) else None
                    self._clock = (
                        path,
                        clock if isinstance(clock, dict) else {},
                        update if isinstance(update, int) else 0,
                        (path / CHECKPOINT_FILE).stat().st_mtime,
                    )
                    break
        return self._clock


class Cached:
    """A small JSON object on disk, parsed again only when it changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self.exists = False
        self.changed = False
        """Whether the last read found new content."""
        self._stamp: tuple[int, int, int] | None = None
        self._plain: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """The object; None where there is none that can be read (`problem` says why, if it is there)."""
        self.changed = False
        try:
            stat = self.path.stat()
        except OSError:
            self.exists, self.problem, self._stamp, self._plain = False, None, None, None
            return None
        self.exists = True
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp == self._stamp:
            return self._plain
        self._stamp, self.changed = stamp, True
        try:
            plain = codec.read_plain_json(self.path)
            if not isinstance(plain, dict):
                raise ValueError("no table of names and values")
            self._plain, self.problem = plain, None
        except (HomelabError, OSError, ValueError) as error:
            self._plain, self.problem = None, f"{self.path.name} cannot be read ({error})"
        return self._plain


def event_s(event: dict[str, Any]) -> float | None:
    """Unix time of a line of a run's events.jsonl."""
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return None


def _lives(pid: int, began_s: float | None) -> bool:
    process = processes.look_up(pid)
    if process is None:
        return False
    try:
        return began_s is None or processes.started_s(process) < began_s + CLOCK_SLACK_S
    except (OSError, StopIteration):
        return True
