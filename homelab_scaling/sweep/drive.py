"""The loop that keeps every slot of this box busy until all runs are done, or it is told to stop.

The schedule is made anew whenever something happens (a run ended, failed, lost its card), from what is left and from
what was measured meanwhile; so a wrong prediction costs a little order and nothing else. All truth is in the runs'
folders: a driver that was killed is replaced by the next one, which finds what still runs and waits for it.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.plan.cost import CPU_START_S, GPU_START_S, measured_rates
from homelab_scaling.plan.timetable import SlotNow, Timetable, TurnState, timetable_path
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.sweep import launch as launching
from homelab_scaling.sweep.launch import Ended, Launch
from homelab_scaling.sweep.limits import Limits
from homelab_scaling.sweep.placing import Placer
from homelab_scaling.sweep.purse import Purse
from homelab_scaling.sweep.recipe import StopRequest
from homelab_scaling.sweep.relay import Relay
from homelab_scaling.sweep.schedule_file import timetable_of
from homelab_scaling.sweep.slots import Schedule, make_schedule, worth_spreading
from homelab_scaling.sweep.where import environment_of, threads_of, why_lost
from homelab_scaling.train.oom_notes import keep_smaller
from homelab_scaling.watch import link
from homelab_scaling.watch.feed import FolderFeed
from homelab_scaling.watch.runview import RunEye

POLL_S = 0.1
REFRESH_S = 30.0
"""How often the schedule is made anew when nothing happens: by now a run may be known to be slower than predicted."""
OUTPUT = "output.log"
"""In a run's folder: what its trainer printed, where several train at once."""


@dataclass
class Task:
    """A run that is not done yet."""

    number: int
    spec: RunSpec
    folder: RunFolder
    eye: RunEye
    tries: int = 0
    """Launches that failed."""
    was_spread: bool = False

    @property
    def left_frac(self) -> float:
        """Share of its updates still to do."""
        total = self.eye.n_updates
        return max(0.0, 1 - self.eye.update / total) if total else 1.0


@dataclass
class Running:
    """A task on its slots."""

    task: Task
    slots: tuple[SlotNow, ...]
    launch: Launch
    relay: Relay | None
    spread: bool = False
    """It was told to stop in order to go on with more slots."""


@dataclass
class Past:
    """A launch that is over, for schedule.json."""

    running: Running
    state: TurnState
    reason: str | None
    ended_s: float


@dataclass
class State:
    """What becomes of the runs."""

    waiting: list[Task]
    running: list[Running] = field(default_factory=list)
    past: list[Past] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopping: bool = False
    watchdog: str | None = None
    limit: str | None = None


class Driver:
    """Runs tasks on slots.

    Args:
        placer: how a run is executed on so many slots.
        lab: LAB/<ladder>, where schedule.json goes.
        sees: which GPUs the driver lists now (UUIDs).
        total: how many runs there are, those before these included.
        show: told of the first schedule, before anything of it is started.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        slots: Sequence[SlotNow],
        placer: Placer,
        *,
        lab: Path,
        say: Callable[[str], None],
        limits: Limits,
        sees: Callable[[], frozenset[str] | None],
        total: int,
        show: Callable[[Timetable], None],
    ) -> None:
        self.state = State(waiting=list(tasks))
        self.slots, self.placer, self.lab = list(slots), placer, lab
        self.say, self.limits, self.sees, self.total, self.show = say, limits, sees, total, show
        self.labs = link.lab_of(tasks[0].folder) if tasks else lab.parent
        self.purse = Purse(lab, self.labs) if limits.max_usd is not None else None
        self.started_s = link.now_s()
        self.scheduled_s = self.started_s
        self.schedule: Schedule | None = None
        self.first: Schedule | None = None
        self._dirty, self._refreshed_s = True, 0.0

    @property
    def alive(self) -> list[SlotNow]:
        """Slots that are not lost."""
        return [slot for slot in self.slots if slot.lost is None]

    @property
    def free(self) -> list[SlotNow]:
        """Slots that no run has."""
        busy = {slot.index for one in self.state.running for slot in one.slots}
        return [slot for slot in self.alive if slot.index not in busy]

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self, stop: StopRequest) -> State:
        """Until nothing is left to do, or everything has stopped."""
        state = self.state
        self._adopt()
        while True:
            self._collect()
            self._heed(stop)
            if self._dirty or link.now_s() - self._refreshed_s > REFRESH_S:
                self._dirty = False
                self._look()
                if not state.stopping:
                    self._begin()
                self._write()
            if not state.running and (state.stopping or not state.waiting):
                break
            if not self._dirty:
                time.sleep(POLL_S)
        self._look()
        self._write(over=True)
        return state

    def _collect(self) -> None:
        for one in list(self.state.running):
            ended = one.launch.poll()
            if one.relay is not None:
                one.relay.pass_on(last=ended is not None)
            if ended is not None:
                self.state.running.remove(one)
                one.task.eye.look(link.now_s())
                self._settle(one, ended)
                self._dirty = True

    def _heed(self, stop: StopRequest) -> None:
        """Ctrl-C and limits: first every run is asked to stop with a checkpoint, then they are ended."""
        state = self.state
        if not state.stopping:
            state.limit = None if stop.asked() else self.limits.reached(link.now_s(), self._spent())
            if stop.asked() or state.limit is not None:
                self._stop_all()
        elif stop.asked(2):
            for one in state.running:
                one.launch.kill()

    def _spent(self) -> float | None:
        return None if self.purse is None else self.purse.spent(link.now_s())

    def _stop_all(self) -> None:
        self.state.stopping = self._dirty = True
        for one in list(self.state.running):
            if one.launch.is_ours:
                one.launch.ask_to_stop()
            else:
                self.say(f"{one.task.spec.run_id}: somebody else trains it; it is left alone")
                self.state.running.remove(one)

    # ---------------------------------------------------------------------------------------- how a launch ended

    def _settle(self, one: Running, ended: Ended) -> None:
        task, run_id = one.task, one.task.spec.run_id
        self.state.past.append(Past(running=one, state=_turn_state(ended), reason=ended.reason, ended_s=link.now_s()))
        if ended.status == "finished":
            self.state.finished.append(run_id)
        elif ended.status == "stopped":
            self._stopped(one, ended)
        elif ended.status == "failed" and not self.state.stopping and self._drop_lost(one.slots):
            self._again(task)
        elif ended.status == "failed" and not (ended.final or task.tries or self.state.stopping):
            task.tries += 1
            self.say(f"{run_id}: {ended.reason}; trying it once more now")
            self._again(task)
        else:
            self._give_up(task, f"{ended.status}: {ended.reason}")

    def _stopped(self, one: Running, ended: Ended) -> None:
        task = one.task
        if ended.stopped_by == "memory":
            if keep_smaller(one.launch.spec, task.folder) == one.launch.spec:
                self._give_up(task, f"failed: {ended.reason}")
                return
            self.say(f"{task.spec.run_id}: {ended.reason}")
            self._again(task)
        elif ended.stopped_by == "watchdog":
            if self._drop_lost(one.slots) and self.alive and not self.state.stopping:
                self._again(task)
                return
            self.state.watchdog = self.state.watchdog or ended.reason
            self._again(task)
            self._stop_all()
        else:
            self._again(task)
            if not (one.spread or one.launch.is_adopted or self.state.stopping):
                self._stop_all()  # somebody stopped this run, and meant the ladder

    def _again(self, task: Task) -> None:
        self.state.waiting.append(task)
        self.state.waiting.sort(key=lambda one: one.number)

    def _give_up(self, task: Task, why: str) -> None:
        self.state.failed[task.spec.run_id] = why
        self.say(f"{task.spec.run_id}: {why}")

    def _drop_lost(self, of: Sequence[SlotNow]) -> bool:
        """Takes slots out of use whose GPU is gone; whether one of `of` is among them."""
        if not any(slot.uuid for slot in of):
            return False
        seen = self.sees()
        for i, slot in enumerate(self.slots):
            why = slot.lost or why_lost(slot, self.labs, seen)
            if why is not None and slot.lost is None:
                self.slots[i] = replace(slot, lost=why)
                left = ", ".join(other.name for other in self.alive) or "nothing"
                self.say(f"{slot.name} is gone ({why}); its runs go on with {left}")
        gone = {slot.index for slot in self.slots if slot.lost is not None}
        return any(slot.index in gone for slot in of)

    # --------------------------------------------------------------------------------------------- what is next

    def _look(self) -> None:
        """Takes in how far every run is and how fast."""
        now = link.now_s()
        for task in [*self.state.waiting, *(one.task for one in self.state.running)]:
            task.eye.look(now)
        self._refreshed_s = now

    def _begin(self) -> None:
        """Starts every run that the schedule has now; where nothing waits, spreads one that would end much earlier."""
        if self.state.waiting and self.free:
            self._drop_lost(self.alive)
            if not self.alive:
                self.state.watchdog = "every GPU is gone; it usually takes a reboot to get one back"
                self._stop_all()
                return
            if self._ends_too_soon():
                return
        self.schedule, self.scheduled_s = self._schedule(), link.now_s()
        if self.first is None and self.schedule is not None:
            self.first = self.schedule
            self.show(timetable_of(self))
        for assignment in self.schedule.assignments if self.schedule else ():
            slots = tuple(slot for slot in self.free if slot.index in assignment.slots)
            if assignment.start_s <= 0 and len(slots) == len(assignment.slots) and assignment.part != "rest":
                task = next(t for t in self.state.waiting if t.spec.run_id == assignment.run_id)
                self._start(task, slots)
        if not self.state.waiting:
            self._spread()

    def _ends_too_soon(self) -> bool:
        """Nothing is started that would be stopped before its first step."""
        ends, start_s = self.limits.ends_at_s, GPU_START_S if self.placer.box.on_gpu else CPU_START_S
        if ends is None or link.now_s() < ends - start_s:
            return False
        if not self.state.running:
            self.state.limit = self.limits.reached(ends, None)
            self._stop_all()
        return True

    def _schedule(self) -> Schedule | None:
        """What waits, on the slots there are; runs that need more slots than that are given up."""
        rates = measured_rates([self.lab])
        self.placer = replace(self.placer, n_slots=len(self.alive), measured=rates)
        for task in list(self.state.waiting):
            try:
                self.placer.jobs([(task.spec, 1.0)])
            except HomelabError as error:
                self.state.waiting.remove(task)
                self._give_up(task, f"failed: {error}")
        if not self.state.waiting:
            return None
        jobs, unit = self.placer.jobs([(task.spec, task.left_frac) for task in self.state.waiting])
        busy = {slot.index: self.left_s(one) or 1.0 for one in self.state.running for slot in one.slots}
        start_s = GPU_START_S if self.placer.box.on_gpu else CPU_START_S
        return make_schedule(jobs, [slot.index for slot in self.alive], free_at=busy, restart_s=start_s, unit=unit)

    def left_s(self, one: Running) -> float | None:
        """Seconds until a run in progress ends; None where nobody knows."""
        span, _why = one.task.eye.left()
        if span is not None and one.task.eye.is_active:
            return max(1.0, span.mid)
        whole = self.placer.seconds(one.launch.spec)
        if whole is None:
            return None
        return max(1.0, one.task.left_frac * whole - max(0.0, link.now_s() - one.launch.began_s))

    def _spread(self) -> None:
        """Stops the longest run in order to go on with it on the free slots too, where that pays."""
        known = [(left, one) for one in self.state.running if (left := self.left_s(one)) is not None]
        if not self.free or not known:
            return
        left, one = max(known, key=lambda pair: pair[0])
        if one.task.was_spread or not one.launch.is_ours or one.launch.told_s is not None:
            return
        jobs, unit = self.placer.jobs([(one.task.spec, 1.0)])
        start_s = GPU_START_S if self.placer.box.on_gpu else CPU_START_S
        width = len(one.slots) + len(self.free)
        if unit == "s" and (k := worth_spreading(jobs[0], left, len(one.slots), width, start_s)) is not None:
            self.say(f"{one.task.spec.run_id}: nothing else waits, so it goes on with {k} GPUs")
            one.spread = one.task.was_spread = True
            one.launch.ask_to_stop()

    # ----------------------------------------------------------------------------------------------- launching

    def _start(self, task: Task, slots: tuple[SlotNow, ...]) -> None:
        placed = self.placer.timed(task.spec, len(slots))
        assert placed is not None, "the schedule has only widths that fit"
        share_frac = len(slots) / len(self.slots)
        spec = keep_smaller(replace(placed, execution=replace(placed.execution, machine_frac=share_frac)), task.folder)
        codec.write_json(task.folder.spec, spec)
        several = len(self.slots) > 1
        share = threads_of(self.placer.box, len(self.slots) / len(slots)) if self.placer.box.on_gpu else self.placer.box
        on = f" on {', '.join(slot.name for slot in slots)}" if several else ""
        self.say(f"[{task.number}/{self.total}] {spec.run_id}{on}")
        output = task.folder.path / OUTPUT if several or not sys.stderr.isatty() else None
        all_of_them = not self.placer.box.on_gpu or len(slots) == len(self.slots)
        more = {} if all_of_them else environment_of(slots)
        started = launching.start(spec, task.folder, share, more=more, output=output)
        self.state.waiting.remove(task)
        relay = Relay(output, spec.run_id, self.say) if output is not None else None
        self.state.running.append(Running(task=task, slots=slots, launch=started, relay=relay))

    def _adopt(self) -> None:
        """Takes over what an earlier driver left running: never two trainers in one folder."""
        before = _read(timetable_path(self.lab))
        turns = {turn.run_id: turn for turn in before.turns if turn.state == "running"} if before else {}
        for task in list(self.state.waiting):
            turn = turns.get(task.spec.run_id)
            found = launching.find_orphan(task.spec, task.folder, turn.launcher if turn else None)
            if found is None:
                continue
            indices = set(turn.slots) if turn else {slot.index for slot in self.slots}
            slots = tuple(slot for slot in self.slots if slot.index in indices)
            self.say(f"[{task.number}/{self.total}] {task.spec.run_id}: is being trained already; waiting for it")
            self.state.waiting.remove(task)
            if turn is not None and turn.start_s is not None:
                found.began_s = turn.start_s
            output = task.folder.path / OUTPUT
            relay = Relay(output, task.spec.run_id, self.say, from_end=True) if output.exists() else None
            self.state.running.append(Running(task=task, slots=slots, launch=found, relay=relay))

    def _write(self, *, over: bool = False) -> None:
        codec.write_json(timetable_path(self.lab), timetable_of(self, over=over))


def make_task(number: int, spec: RunSpec, folder: RunFolder) -> Task:
    """A run that is to be done."""
    return Task(number=number, spec=spec, folder=folder, eye=RunEye(FolderFeed(folder.path)))


def _turn_state(ended: Ended) -> TurnState:
    return "failed" if ended.status == "running" else ended.status


def _read(path: Path) -> Timetable | None:
    try:
        return codec.read_json(path, Timetable) if path.exists() else None
    except HomelabError:
        return None
