"""What a run says of itself: events.jsonl, and the moments its hooks hear of."""

import datetime
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError, RunFailed, Stopped, StoppedByWatchdog
from homelab_scaling.runs import RunFolder, RunStatus, StoppedBy
from homelab_scaling.train.hooks import Hooks
from homelab_scaling.train.oom_notes import OutOfMemory


class Diverged(RunFailed):
    """A loss or gradient became non-finite; the weights were not touched by it."""


class Journal:
    """Events of every rank; moments of the main one."""

    def __init__(self, folder: RunFolder, hooks: list[Hooks], *, is_main: bool) -> None:
        self.path, self.hooks, self.is_main = folder.events, hooks, is_main

    def event(self, kind: str, **fields: Any) -> None:
        """One line of events.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        codec.append_jsonl(self.path, [{"kind": kind, "time": now, **fields}])

    def tell(self, moment: str, *args: Any) -> None:
        """Calls a moment of every hook, on the main process."""
        if self.is_main:
            for hook in self.hooks:
                getattr(hook, moment)(*args)


def how_it_ended(error: Exception) -> tuple[RunStatus, str, StoppedBy | None]:
    """Status, reason and originator for record.json, from what ended the run."""
    if isinstance(error, StoppedByWatchdog):
        return "stopped", str(error), "watchdog"
    if isinstance(error, Stopped):
        return "stopped", str(error), "memory" if isinstance(error, OutOfMemory) else "signal"
    if isinstance(error, Diverged):
        return "diverged", str(error), None
    said = str(error) if isinstance(error, HomelabError) else f"{type(error).__name__}: {error}"
    return "failed", said.split("\n")[0], None
