"""LAB/<ladder>/schedule.json: which run has which slots, when it was to begin and end, and when it did."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TurnState = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]


def timetable_path(lab: Path) -> Path:
    """Of LAB/<ladder>."""
    return lab / "schedule.json"


@dataclass(frozen=True, kw_only=True)
class SlotNow:
    """A GPU, or a share of the CPU."""

    index: int
    """As nvidia-smi counts GPUs."""
    name: str
    """GPU 0, CPU, CPU 1."""
    uuid: str | None = None
    lost: str | None = None
    """Why no run gets it any more."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One launch of a run, past, present or to come; a run that is tried again or spread has several."""

    run_id: str
    rung: str
    seed: int
    slots: tuple[int, ...]
    n_gpus: int
    """0 on CPU."""
    ddp: bool
    state: TurnState
    planned_start_s: float | None
    """Unix time, when the job began; None where no speed was known, or where it was not foreseen."""
    planned_end_s: float | None
    start_s: float | None
    """When it began, or as now expected; None where unknown."""
    end_s: float | None
    """When it ended, or as now expected; None where unknown."""
    reason: str | None = None
    """Why it is not finished."""
    launcher: tuple[int, int] | None = None
    """Pid and start (ticks since boot) of a running one's launcher, so that a new driver knows it again."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to run the same ladder, and how long it would take."""

    name: str
    what: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """schedule.json; written anew at every change."""

    ladder: str
    pid: int
    """Of the driver."""
    t_s: float
    """Of the last change."""
    started_s: float
    slots: tuple[SlotNow, ...]
    turns: tuple[Turn, ...]
    """Launches that were, then those that run, then those to come, each by their start."""
    choices: tuple[Choice, ...]
    """Pack, all DDP, mixed; empty with one slot, or where no speed is known."""
    why: str
    ends_at_s: float | None = None
    """When everything is stopped, if that was asked for."""
    over: bool = False
    """The driver has ended."""

    @property
    def end_s(self) -> float | None:
        """When the last run ends, as now expected; None where unknown."""
        ends = [turn.end_s for turn in self.turns if turn.state in ("waiting", "running")]
        known = [end for end in ends if end is not None]
        return max(known) if known and len(known) == len(ends) else None
