"""Launches runs on this box: packed onto its GPUs, or one after the other; each under `accelerate launch`.

where.py   the slots there are          slots.py   which run goes where, as a pure function
placing.py how a run fits so many slots launch.py  one launch and how it ended
drive.py   the loop over all of them    limits.py  when to stop
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder, TrainTable
from homelab_scaling.plan.cost import GPU_START_S, measured_rates
from homelab_scaling.plan.ddp_times import read_ddp
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.timetable import Timetable
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.sweep.drive import Driver, State, make_task
from homelab_scaling.sweep.limits import Limits, refuse_unknown_money
from homelab_scaling.sweep.placing import Placer, lab_of_runs
from homelab_scaling.sweep.recipe import StopRequest, see_to_watchdog
from homelab_scaling.sweep.room import need_of_run, needs_of_plan, refuse_what_fits_no_card
from homelab_scaling.sweep.slots import Schedule, make_schedule
from homelab_scaling.sweep.where import ask_driver, slots_of, threads_of
from homelab_scaling.watch import link
from homelab_scaling.watch.ahead import duration
from homelab_scaling.watch.gantt import gantt, queue_line, sentences

Run = tuple[RunSpec, RunFolder]

GANTT_COLUMNS = 78


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a ladder ended."""

    finished: tuple[str, ...]
    failed: dict[str, str]
    """run_id -> why."""
    stopped: bool
    """A signal, a limit or the watchdog ended it; the rest was not started."""
    watchdog: str | None = None
    """Why the watchdog ended it."""
    limit: str | None = None
    """Which limit ended it, and what remains."""

    def then(self, other: "Outcome") -> "Outcome":
        """Both, one after the other."""
        return Outcome(
            finished=(*self.finished, *other.finished),
            failed=self.failed | other.failed,
            stopped=self.stopped or other.stopped,
            watchdog=self.watchdog or other.watchdog,
            limit=self.limit or other.limit,
        )

    @property
    def exit_code(self) -> int:
        return 3 if self.watchdog else 75 if self.stopped else 1 if self.failed else 0


def run_all(
    runs: list[Run],
    box: Box,
    say: Callable[[str], None],
    *,
    train: TrainTable | None = None,
    limits: Limits | None = None,
    n_cpu_slots: int = 1,
) -> Outcome:
    """Runs everything that is not finished; a failed run is tried once more, and does not stop the others.

    A diverged run is not started again: the same spec would diverge the same way. A run that ran out of memory is, with
    a smaller micro-batch, from its last checkpoint. When the watchdog stops a run for its card to rest, everything
    stops; when the card is gone, the others go on, and so does this run on the cards that are left.

    Args:
        runs: in the ladder's order.
        train: the ladder's [train], by which ranks and micro-batch are chosen anew; None keeps those of each spec.
        n_cpu_slots: without a GPU, how many runs share the CPU.

    Raises:
        SpecError: a run fits no card, or a limit in money on a machine whose costs are unknown; nothing was started.
    """
    limits = limits or Limits()
    slots = slots_of(box, n_cpu_slots)
    done, tasks, failed = [], [], {}
    for number, (spec, folder) in enumerate(runs, start=1):
        record = folder.read_record()
        if record is None or record.status not in ("finished", "diverged"):
            tasks.append(make_task(number, spec, folder))
            continue
        done.append(f"[{number}/{len(runs)}] {spec.run_id}: {record.status} before, not repeated")
        if record.status == "diverged":
            failed[spec.run_id] = f"diverged: {record.reason}"
    lab = lab_of_runs(runs) if runs else None
    placer = Placer(
        box=threads_of(box, 1 if box.on_gpu else len(slots)),
        n_slots=len(slots),
        train=train,
        measured=measured_rates([lab]) if lab else (),
        ddp=read_ddp(lab.parent) if lab else None,
    )
    refuse_what_fits_no_card(need_of_run(task.spec, box.vram_bytes) for task in tasks)
    placer.jobs([(task.spec, 1.0) for task in tasks])
    for spec, _ in runs[:1]:
        refuse_unknown_money(limits, spec.money, box)
    for spec, folder in runs[:1]:
        on_gpu = box.on_gpu and spec.execution.device != "cpu"
        see_to_watchdog(link.lab_of(folder), spec.watch, on_gpu=on_gpu, say=say)
    for line in [*done, *(f"{run_id}: {why}" for run_id, why in failed.items())]:
        say(line)
    finished = tuple(spec.run_id for spec, folder in runs if _is_finished(folder))
    if not tasks or lab is None:
        return Outcome(finished=finished, failed=failed, stopped=False)
    driver = Driver(
        tasks,
        slots,
        placer,
        lab=lab,
        say=say,
        limits=limits,
        sees=ask_driver,
        total=len(runs),
        show=lambda table: _show(table, say),
    )
    with StopRequest() as stop:
        state = driver.run(stop)
    return Outcome(
        finished=(*finished, *state.finished),
        failed=failed | state.failed,
        stopped=state.stopping,
        watchdog=state.watchdog,
        limit=None if state.limit is None else f"{state.limit}; {what_remains(state, placer)}",
    )


def _is_finished(folder: RunFolder) -> bool:
    record = folder.read_record()
    return record is not None and record.status == "finished"


def what_remains(state: State, placer: Placer) -> str:
    """The rest of a ladder that was stopped, in words."""
    if not state.waiting:
        return "nothing remains"
    seconds = [placer.seconds(task.spec) for task in state.waiting]
    n = len(state.waiting)
    said = f"{n} run{'s' * (n > 1)} {'remain' if n > 1 else 'remains'}"
    known = [s * task.left_frac for s, task in zip(seconds, state.waiting, strict=True) if s is not None]
    return f"{said}, about {duration(sum(known))} on one slot" if len(known) == n else said


def _show(table: Timetable, say: Callable[[str], None]) -> None:
    """The Gantt chart and why it is this one; nothing where there is nothing to choose."""
    if len(table.turns) < 2:
        return
    for line in gantt(table, table.t_s, GANTT_COLUMNS) or [queue_line(table, GANTT_COLUMNS)]:
        say(f"  {line.plain.rstrip()}")
    if len(table.slots) > 1:
        for sentence in sentences(table):
            say(textwrap.fill(sentence, GANTT_COLUMNS, initial_indent="  ", subsequent_indent="    "))


def planned_schedule(plan: Plan, ladder: Ladder, lab: Path) -> Schedule | None:
    """How `homelab run` would pack a whole plan onto the plan's cards; None with one slot, or without known speeds.

    Args:
        lab: LAB/<ladder>, for what was measured there.
    """
    n_slots = plan.box.n_gpus
    if n_slots < 2 or not plan.runs:
        return None
    placer = Placer(
        box=plan.box,
        n_slots=n_slots,
        train=ladder.train,
        measured=measured_rates([lab]),
        ddp=read_ddp(lab.parent),
    )
    try:
        jobs, unit = placer.jobs([(spec, 1.0) for spec in plan.runs])
    except SpecError:
        return None  # a rung fits no card, which the plan says in its own words
    return make_schedule(jobs, range(n_slots), restart_s=GPU_START_S, unit=unit) if unit == "s" else None


def schedule_words(schedule: Schedule) -> str:
    """When all runs of a plan would be done, packed, spread and mixed."""
    others = [f"{one.what} {duration(one.makespan_s)}" for one in schedule.alternatives]
    found = f"on {len(schedule.slots)} cards at once all runs end after about {duration(schedule.makespan_s)}"
    return f"{found}: {schedule.why}" + (f" ({'; '.join(others)})" if others else "")


def refuse_early(plan: Plan, ladder: Ladder, limits: Limits, n_cpu_slots: int = 1) -> None:
    """What `run_all` would refuse, before shards are built and batches are measured.

    Raises:
        SpecError: a rung fits no card, shares of the CPU that are not there, a limit in money without a price.
    """
    slots_of(plan.box, n_cpu_slots)
    refuse_what_fits_no_card(needs_of_plan(plan, ladder))
    refuse_unknown_money(limits, ladder.money, plan.box)
