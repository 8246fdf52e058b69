"""schedule.json from what the driver knows: launches that were, that run, and that are to come."""

import os
from typing import TYPE_CHECKING

from homelab_scaling.plan.timetable import Choice, SlotNow, Timetable, Turn
from homelab_scaling.sweep.slots import Assignment, Schedule
from homelab_scaling.watch import link

if TYPE_CHECKING:
    from homelab_scaling.sweep.drive import Driver, Past, Running


def timetable_of(driver: "Driver", *, over: bool = False) -> Timetable:
    """The timetable now."""
    now, state, first = link.now_s(), driver.state, driver.first
    rests = _rests(driver) if not over else {}
    past = [_begun(driver, one.running, None, one) for one in state.past]
    running = [_begun(driver, one, rests.get(one.task.spec.run_id)) for one in state.running]
    waiting = {task.spec.run_id: task for task in state.waiting}
    to_come, base = [], _base(driver.schedule, driver.scheduled_s)
    for one in driver.schedule.assignments if driver.schedule is not None else ():
        if one.run_id in waiting:
            to_come.append(_to_come(driver, one, waiting[one.run_id].spec.science.seed, base))
    placed = {turn.run_id for turn in to_come}
    for task in waiting.values():
        if task.spec.run_id not in placed:  # stopped before it got its turn
            blank = Assignment(run_id=task.spec.run_id, rung=task.spec.rung, slots=(), start_s=0, end_s=0)
            to_come.append(_to_come(driver, blank, task.spec.science.seed, None))
    to_come += [
        _to_come(driver, rests[one.task.spec.run_id], one.task.spec.science.seed, driver.started_s)
        for one in state.running
        if one.task.spec.run_id in rests
    ]
    known = first is not None and first.unit == "s"
    return Timetable(
        ladder=driver.lab.name,
        pid=os.getpid(),
        t_s=now,
        started_s=driver.started_s,
        slots=tuple(driver.slots),
        turns=(*past, *running, *to_come),
        choices=tuple(
            Choice(name=c.name, what=c.what, seconds=c.makespan_s) for c in (first.alternatives if first else ())
        )
        if known
        else (),
        why=first.why if first is not None else "",
        ends_at_s=driver.limits.ends_at_s,
        over=over,
    )


def _base(schedule: Schedule | None, made_s: float) -> float | None:
    """What a schedule's seconds count from; None where they are no seconds."""
    return made_s if schedule is not None and schedule.unit == "s" else None


def _rests(driver: "Driver") -> dict[str, Assignment]:
    """Runs in progress that are to be spread when nothing else waits, as the first schedule foresaw it."""
    first = driver.first
    if first is None or first.unit != "s":
        return {}
    going = {one.task.spec.run_id for one in driver.state.running if not one.task.was_spread}
    return {one.run_id: one for one in first.assignments if one.part == "rest" and one.run_id in going}


def _begun(
    driver: "Driver",
    one: "Running",
    rest: Assignment | None,
    past: "Past | None" = None,
) -> Turn:
    spec = one.launch.spec
    end_s = past.ended_s if past is not None else None
    if past is None and (left := driver.left_s(one)) is not None:
        end_s = link.now_s() + left if rest is None else min(link.now_s() + left, driver.started_s + rest.start_s)
    planned = _planned(driver, spec.run_id, len(one.slots))
    return Turn(
        run_id=spec.run_id,
        rung=spec.rung,
        seed=spec.science.seed,
        slots=tuple(slot.index for slot in one.slots),
        n_gpus=_n_gpus(driver, one.slots),
        ddp=spec.execution.n_processes > 1,
        state=past.state if past is not None else "running",
        planned_start_s=planned[0],
        planned_end_s=planned[1],
        start_s=one.launch.began_s or None,
        end_s=end_s,
        reason=past.reason if past is not None else None,
        launcher=one.launch.launcher if past is None else None,
    )


def _to_come(driver: "Driver", one: Assignment, seed: int, base_s: float | None) -> Turn:
    planned = _planned(driver, one.run_id, len(one.slots))
    slots = [slot for slot in driver.slots if slot.index in one.slots]
    return Turn(
        run_id=one.run_id,
        rung=one.rung,
        seed=seed,
        slots=one.slots,
        n_gpus=_n_gpus(driver, tuple(slots)),
        ddp=one.ddp,
        state="waiting",
        planned_start_s=planned[0],
        planned_end_s=planned[1],
        start_s=None if base_s is None else base_s + one.start_s,
        end_s=None if base_s is None else base_s + one.end_s,
    )


def _n_gpus(driver: "Driver", slots: tuple[SlotNow, ...]) -> int:
    return len(slots) if driver.placer.box.on_gpu else 0


def _planned(driver: "Driver", run_id: str, width: int) -> tuple[float | None, float | None]:
    """When the first schedule had it on so many slots."""
    first = driver.first
    if first is None or first.unit != "s":
        return None, None
    for one in first.assignments:
        if one.run_id == run_id and len(one.slots) == width:
            return driver.started_s + one.start_s, driver.started_s + one.end_s
    return None, None
