"""Collects one frame's facts about a lab from its files; reads only what is new, and survives whatever is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling.errors import SpecError
from homelab_scaling.plan.timetable import Timetable, timetable_path
from homelab_scaling.specs import Money
from homelab_scaling.watch import ahead, processes
from homelab_scaling.watch.costs import together
from homelab_scaling.watch.feed import Cached, Feed, FolderFeed
from homelab_scaling.watch.frame import ACTIVE, Cost, CriticalBatch, Frame, LadderNow, Rung, Span
from homelab_scaling.watch.gpu import SensorSource
from homelab_scaling.watch.lawview import LawEye
from homelab_scaling.watch.machineview import N_MOMENTS, LiveMachine, Machine
from homelab_scaling.watch.runview import NOT_JUDGED, RunEye

MACHINE = "machine"
LIST_EVERY_S = 5.0
"""How often folders are listed for new runs and other ladders."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the monitor was pointed at."""

    lab: Path
    """The folder that holds the labs."""
    ladder: Path | None
    """LAB/LADDER; None takes the one with the newest activity."""


def find_place(path: Path) -> Place:
    """A lab or one of its ladders; a lab need not exist yet.

    Raises:
        SpecError: the path is a file, or a folder in which nothing of ours is.
    """
    if path.is_file():
        raise SpecError(f"{path}: this is a file; give a lab's folder, or --replay {path} to play a recording")
    if _is_ladder(path):
        return Place(lab=path.resolve().parent, ladder=path)
    if path.is_dir() and path.resolve().name == MACHINE:
        return Place(lab=path.resolve().parent, ladder=None)
    ours = (path / MACHINE).is_dir() or ladders(path) or _is_prepared(path)
    if path.is_dir() and not ours and any(path.iterdir()):
        raise SpecError(f"{path}: no ladder in it (no LADDER/plan.json, no LADDER/runs); give LAB or LAB/LADDER")
    if not path.exists() and path != Path("lab"):
        raise SpecError(f"{path}: no such folder; give LAB or LAB/LADDER (`homelab run LADDER --lab LAB` makes one)")
    return Place(lab=path, ladder=None)


def ladders(lab: Path) -> list[Path]:
    """Every LAB/LADDER."""
    try:
        return sorted(p for p in lab.iterdir() if p.name != MACHINE and _is_ladder(p))
    except OSError:
        return []


def _is_ladder(path: Path) -> bool:
    return path.is_dir() and ((path / "plan.json").is_file() or (path / "runs").is_dir())


def _is_prepared(lab: Path) -> bool:
    """Whether a ladder has begun here that has no plan yet: its shards are being built."""
    return any((child / "shards").is_dir() or not any(child.iterdir()) for child in lab.glob("*/"))


def newest_ladder(lab: Path) -> Path | None:
    """The ladder something last happened in; None without any."""
    return max(ladders(lab), key=_moved_s, default=None)


def _moved_s(ladder: Path) -> float:
    names = ("plan.json", "runs/*/metrics.jsonl", "runs/*/events.jsonl", "runs/*/record.json")
    times = []
    for path in (p for name in names for p in ladder.glob(name)):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


class View:
    """A lab and its machine, frame by frame.

    Args:
        place: what to look at.
        run: beginning of the run (or rung) to keep in focus; None takes the one that is going on.
        open_sensors: how to ask the cards themselves where there is no run and no watchdog.
    """

    def __init__(
        self, place: Place, *, run: str | None = None, open_sensors: Callable[[], SensorSource] | None = None
    ) -> None:
        self.place, self.wanted = place, run
        self._machine = LiveMachine(place.lab, open_sensors)
        self._ladder: LadderEye | None = None
        self._listed_s = float("-inf")

    def frame(self, now_s: float) -> Frame:
        """Everything there is to say now."""
        if now_s - self._listed_s >= LIST_EVERY_S or now_s < self._listed_s:
            self._listed_s = now_s
            self._choose()
        if self._ladder is not None:
            self._ladder.look(now_s)
        has_runs = self._ladder is not None and any(run.is_active for run in self._ladder.runs)
        self._machine.asks_driver = not has_runs
        machine = self._machine.look(now_s)
        if self._ladder is not None:
            self._ladder.note_pids({r.run_id: r.pids for r in machine.registrations})
        return make_frame(now_s, self.place.lab, self._ladder, machine, self.wanted)

    def _choose(self) -> None:
        path = self.place.ladder or newest_ladder(self.place.lab)
        if path is None:
            self._ladder = None
        elif self._ladder is None or self._ladder.path != path:
            self._ladder = LadderEye(path)
        if self._ladder is not None:
            self._ladder.list()

    def close(self) -> None:
        """Lets go of the driver, if it was asked."""
        self._machine.close()


class LadderEye:
    """Follows every run of LAB/LADDER."""

    def __init__(self, path: Path, feeds: Sequence[Feed] | None = None) -> None:
        self.path = path
        self.runs: list[RunEye] = [RunEye(feed) for feed in feeds or ()]
        self.law = LawEye(path)
        self.plan = Cached(path / "plan.json")
        self._schedule = Cached(timetable_path(path))
        self._timetable: Timetable | None = None
        self._focus: str | None = None
        self.advice = Cached(path / "batch.json")
        self._fixed = feeds is not None
        self._order: dict[str, int] = {}

    def list(self) -> None:
        """Takes up new run folders; the plan's runs come first, in its order."""
        plan = self.plan.read() or {}
        planned = [str(r.get("run_id")) for r in plan.get("runs") or () if isinstance(r, dict) and r.get("run_id")]
        if not self._fixed:
            try:
                here = sorted(
                    p.name for p in (self.path / "runs").iterdir() if p.is_dir() and not p.name.startswith(".")
                )
            except OSError:
                here = []
            known = {run.run_id: run for run in self.runs}
            foreign = [name for name in here if not (self.path / "runs" / name / "spec.json").exists()]
            names = dict.fromkeys([*planned, *(foreign if planned else here)])
            self.runs = [known.get(name) or RunEye(FolderFeed(self.path / "runs" / name)) for name in names]
        self._order = {name: i for i, name in enumerate(planned)}

    def look(self, now_s: float) -> None:
        """Takes in what is new of every run."""
        for run in self.runs:
            run.look(now_s)
        self.runs.sort(key=lambda run: (self._order.get(run.run_id, len(self._order)), run.n_params or 0, run.run_id))

    def critical(self, rung: str) -> CriticalBatch | None:
        """What batch.json says of a rung; None where nothing, or nothing that was measured."""
        advice = self.advice.read() or {}
        try:
            (found,) = (one for one in advice["rungs"] if one["rung"] == rung and one["basis"] != "prior")
            return CriticalBatch(
                tokens=float(found["b_crit"]["value"]),
                low_tokens=float(found["b_crit"]["low"]),
                high_tokens=float(found["b_crit"]["high"]),
                basis=str(found["basis"]),
                calibration=str(advice["calibration"]["method"]),
                c_side=advice["calibration"].get("side"),
                advised_tokens=int(found["batch_tokens"]),
            )
        except (KeyError, TypeError, ValueError):
            return None

    def note_pids(self, pids: dict[str, tuple[int, ...]]) -> None:
        """More processes that may be the runs' own."""
        for run in self.runs:
            if isinstance(run.feed, FolderFeed):
                run.feed.pids = pids.get(run.run_id, ())

    def focus(self, wanted: str | None) -> RunEye | None:
        """The run to show: the one asked for, else the one that is going on, else the one that moved last."""
        asked = [run for run in self.runs if wanted and run.run_id.startswith(wanted)]
        if wanted and not asked:
            known = ", ".join(run.run_id for run in self.runs) or "none"
            raise SpecError(f"{self.path}: no run begins with {wanted}; it has {known}")
        begun = [run for run in asked or self.runs if run.state != "queued"]
        # Of several that are at work, the same one as before: else the screen would jump with every metric.
        found = max(begun, key=lambda run: (run.is_active, run.run_id == self._focus, run.moved_s), default=None)
        self._focus = found.run_id if found is not None else None
        return found

    def timetable(self) -> Timetable | None:
        """What a driver wrote to schedule.json that is at work on several slots now; None without one."""
        if self._fixed:
            return None
        plain = self._schedule.read()
        if self._schedule.changed or plain is None:
            self._timetable = ahead.read_timetable(plain)
        table = self._timetable
        at_work = table is not None and not table.over and processes.is_alive(table.pid)
        return table if at_work else None


def make_frame(now_s: float, lab: Path, ladder: LadderEye | None, machine: Machine, wanted: str | None = None) -> Frame:
    """A frame from what was looked at."""
    if ladder is None:
        return Frame(
            t_s=now_s,
            lab=str(lab),
            ladder=None,
            run=None,
            rungs=(),
            cards=machine.cards,
            watchdog=machine.watchdog,
            ahead=machine.ahead,
            notes=(),
        )
    run = ladder.focus(wanted)
    costs = {one.run_id: one.cost(machine.wall) for one in ladder.runs if one.state != "queued"}
    law = ladder.law.judge(run, ladder.runs) if run is not None else NOT_JUDGED
    shown = run.now(law, machine.wall, ladder.critical(run.rung)) if run is not None else None
    rungs = tuple(one.line(costs.get(one.run_id)) for one in ladder.runs)
    notes = [f"{one.run_id}: {problem}" for one in ladder.runs if one.seen for problem in one.seen.problems]
    notes = [problem for problem in (ladder.plan.problem, ladder.advice.problem) if problem] + notes
    dog, table = machine.watchdog, ladder.timetable()
    moments = sorted([*dog.moments, *(moment for one in ladder.runs for moment in one.moments())], key=lambda m: m.t_s)
    return Frame(
        t_s=now_s,
        lab=str(lab),
        ladder=_ladder_now(ladder, rungs, list(costs.values()), table, now_s),
        run=shown,
        rungs=rungs,
        cards=machine.cards,
        watchdog=replace(dog, moments=tuple(moments[-N_MOMENTS:])),
        ahead=machine.ahead,
        notes=tuple(notes),
        timetable=table if table is not None and len(table.slots) > 1 else None,
    )


def _ladder_now(
    ladder: LadderEye, rungs: Sequence[Rung], costs: Sequence[Cost], table: Timetable | None, now_s: float
) -> LadderNow:
    question = (ladder.plan.read() or {}).get("question")
    queued_s = _queued_s(ladder)
    money = next((run.spec.money for run in ladder.runs if run.spec), Money())
    return LadderNow(
        name=ladder.path.resolve().name,
        path=str(ladder.path),
        question=question if isinstance(question, str) else None,
        n_runs=len(rungs),
        n_finished=sum(rung.state == "finished" for rung in rungs),
        left_s=ahead.until_all_end(table, now_s) or _left(ladder, queued_s),
        cost=together(costs, queued_s=queued_s, money=money),
    )


def _queued_s(ladder: LadderEye) -> float | None:
    """Planned seconds of the runs that have not begun, put right by how wrong the plan was so far."""
    ratio = _plan_ratio(ladder)
    waiting = [run.spec.execution.predicted_s if run.spec else None for run in ladder.runs if run.state == "queued"]
    known = [seconds for seconds in waiting if seconds is not None]
    return ratio * sum(known) if len(known) == len(waiting) else None


def _plan_ratio(ladder: LadderEye) -> float:
    """Measured over planned seconds of the finished runs; 1 without any."""
    measured = planned = 0.0
    for run in ladder.runs:
        seconds = [row.get("seconds_marginal") for row in run.rows]
        if run.state == "finished" and run.spec and run.spec.execution.predicted_s:
            measured += sum(float(s) for s in seconds if isinstance(s, int | float))
            planned += run.spec.execution.predicted_s
    return measured / planned if measured > 0 and planned > 0 else 1.0


def _left(ladder: LadderEye, queued_s: float | None) -> Span | None:
    """Seconds until every run is done, one after the other; None where some of it is unknown."""
    going = [run for run in ladder.runs if run.state in (*ACTIVE, "interrupted", "stopped")]
    spans = [run.left()[0] for run in going]
    known = [span for span in spans if span is not None]
    if queued_s is None or len(known) < len(spans) or (not known and queued_s == 0):
        return None
    sure = 0.8 if _plan_ratio(ladder) != 1.0 else 0.5
    return Span(
        low=sum(s.low for s in known) + sure * queued_s,
        mid=sum(s.mid for s in known) + queued_s,
        high=sum(s.high for s in known) + queued_s / sure,
    )
