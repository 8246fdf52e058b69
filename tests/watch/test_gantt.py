"""The timetable as text, and on the monitor's screen while a driver is at work."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from watched_lab import NOW, WatchedLab

from homelab_scaling import codec
from homelab_scaling.plan.timetable import SlotNow, Timetable, Turn
from homelab_scaling.watch.ahead import read_timetable, until_all_end
from homelab_scaling.watch.gantt import gantt, queue_line
from homelab_scaling.watch.screen import draw
from homelab_scaling.watch.view import View, find_place

HOUR = 3600.0


def turn(rung: str, slots: tuple[int, ...], start_h: float, end_h: float, state="waiting") -> Turn:
    start, end = NOW + start_h * HOUR, NOW + end_h * HOUR
    return Turn(
        run_id=f"{rung}-s0", rung=rung, seed=0, slots=slots, n_gpus=len(slots), ddp=len(slots) > 1, state=state,
        planned_start_s=start, planned_end_s=end, start_s=start, end_s=end,
    )  # fmt: skip


TURNS = (
    turn("51m", (1,), -3, -1, "finished"),
    turn("124m", (0,), -3, 1, "running"),
    turn("24m", (1,), -1, 1, "running"),
    turn("124m", (0, 1), 1, 3),
)
SLOTS = (SlotNow(index=0, name="GPU 0"), SlotNow(index=1, name="GPU 1"))


def table(turns: tuple[Turn, ...] = TURNS, **changes) -> Timetable:
    fields = {
        "ladder": "x", "pid": os.getpid(), "t_s": NOW, "started_s": NOW - 3 * HOUR, "slots": SLOTS, "turns": turns,
        "choices": (), "why": "because",
    }  # fmt: skip
    return Timetable(**{**fields, **changes})


def test_each_slot_is_a_line_of_the_right_proportions() -> None:
    first, second, axis = (line.plain for line in gantt(table(), NOW, 67))  # ten columns an hour
    assert first == "GPU 0  [124m#########################|--------][124m==============]"
    assert second == "GPU 1  [51m###############][24m######|--------][124m==============]"
    assert axis.startswith("       ") and len(axis) == 67


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
def test_every_line_has_the_width_it_was_given(width: int) -> None:
    many = tuple(turn(f"r{i}", (i % 2,), i * 0.01, i * 0.01 + 0.005) for i in range(40))
    for turns in (TURNS, many):
        assert {len(line.plain) for line in gantt(table(turns), NOW, width)} == {width}


def test_without_times_there_is_a_queue_and_no_chart() -> None:
    unknown = tuple(replace(one, start_s=None, end_s=None) for one in TURNS)
    assert gantt(table(unknown), NOW, 80) == [] and gantt(table(), NOW, 20) == []
    assert queue_line(table(unknown), 80).plain == "GPU 0 124m, GPU 1 24m; then 124m"
    assert until_all_end(table(unknown), NOW) is None


def test_the_end_of_several_slots_is_that_of_the_last_run() -> None:
    left = until_all_end(table(), NOW)
    assert left.mid == 3 * HOUR and left.low < left.mid < left.high
    assert until_all_end(table(slots=SLOTS[:1]), NOW) is None
    assert read_timetable({"ladder": "x"}) is None and read_timetable(None) is None
    assert read_timetable(codec.to_plain(table())) == table()


@pytest.fixture
def lab(tmp_path: Path) -> WatchedLab:
    made = WatchedLab.in_flight(tmp_path / "lab")
    codec.write_json(made.ladder / "schedule.json", table())
    return made


def screen(lab: WatchedLab, width: int = 80, height: int = 24) -> str:
    frame = View(find_place(lab.lab)).frame(NOW)
    lines = [line.plain for line in draw(frame, width, height)]
    assert len(lines) <= height and {len(line) for line in lines} == {width}
    return "\n".join(lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 34), (160, 45)])
def test_the_monitor_shows_the_slots_of_a_driver_that_is_at_work(lab: WatchedLab, width: int, height: int) -> None:
    shown = screen(lab, width, height)
    assert "slots  2, 1 waiting" in shown and "GPU 1  [51m###" in shown and "[124m===" in shown


@pytest.mark.parametrize("changes", [{"over": True}, {"pid": 2**22 + 1}, {"slots": SLOTS[:1]}])
def test_a_timetable_that_nobody_works_by_is_not_shown(lab: WatchedLab, changes) -> None:
    codec.write_json(lab.ladder / "schedule.json", table(**changes))
    assert "slots  " not in screen(lab)


def test_a_timetable_that_cannot_be_read_hides_nothing_else(lab: WatchedLab) -> None:
    (lab.ladder / "schedule.json").write_text('{"ladder": ')
    assert "51m" in screen(lab) and "slots  " not in screen(lab)


def test_of_several_runs_at_work_the_screen_keeps_to_one(lab: WatchedLab) -> None:
    lab.run("124m", ends_s=NOW - 1, done=0.1, status="running", pids=(1,))
    view = View(find_place(lab.lab))
    first = view.frame(NOW).run.run_id
    other = next(r for r in ("51m", "124m") if not first.startswith(r))
    os.utime(lab.folder(other).metrics, (NOW + 5, NOW + 5))
    assert view.frame(NOW + 6).run.run_id == first
