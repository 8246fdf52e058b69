"""The driver over stub trainers: two slots at once, failures, limits, a lost card, its own death."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import stub_runs
from stub_runs import CPU, TICK_S, TWO_GPUS, behave, trace
from toy_run import make_toy_run, write_shards

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import TrainTable
from homelab_scaling.plan.timetable import SlotNow, Timetable
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import Money, RunSpec
from homelab_scaling.sweep import launch, local
from homelab_scaling.sweep.limits import Limits
from homelab_scaling.watch.link import CardStatus, Status

Run = tuple[RunSpec, RunFolder]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return root, write_shards(root / "shards")


@pytest.fixture
def make(tmp_path: Path, manifest, monkeypatch):
    """Runs of LAB/a, whose trainer is a stub; `make(3, seconds=...)`."""
    monkeypatch.setattr(launch, "launch_command", stub_runs.command)

    def runs(n: int, **how) -> list[Run]:
        made = []
        for seed in range(n):
            spec, folder = make_toy_run(tmp_path, manifest[1], seed=seed, precision=how.get("precision", "fp32"))
            behave(folder, **{"seconds": 0.5, **how})
            made.append((spec, folder))
        return made

    return runs


def lab_of(runs: list[Run]) -> Path:
    return runs[0][1].path.parents[1]


def table_of(runs: list[Run]) -> Timetable:
    return codec.read_json(lab_of(runs) / "schedule.json", Timetable)


def span(run: Run) -> tuple[float, float]:
    lines = trace(run[1])
    return lines[0]["t_s"], lines[-1]["t_s"]


def assert_trained_once(runs: list[Run]) -> None:
    """Every tick of every run is there, once and in order: nothing was lost and nothing done twice."""
    for _spec, folder in runs:
        ticks = [line["tick"] for line in trace(folder)]
        assert ticks == list(range(len(ticks))) and ticks
        assert folder.read_record().status == "finished"


def test_two_slots_train_two_runs_at_once_and_every_run_once(make) -> None:
    runs, said = make(4), []
    outcome = local.run_all(runs, CPU, said.append, n_cpu_slots=2)
    assert outcome.exit_code == 0 and set(outcome.finished) == {spec.run_id for spec, _ in runs}
    assert_trained_once(runs)
    spans = [span(run) for run in runs]
    together = [sum(a < t < b for a, b in spans) for t, _ in spans]
    assert max(together) == 1, "two were at work when one of them began"
    table = table_of(runs)
    assert table.over and {turn.state for turn in table.turns} == {"finished"} and len(table.turns) == 4
    for slot in (0, 1):
        mine = sorted((t for t in table.turns if slot in t.slots), key=lambda t: t.start_s)
        assert len(mine) == 2 and all(a.end_s <= b.start_s + 0.5 for a, b in pairwise(mine))
    assert any(line.startswith("  CPU 0") and "[toy" in line for line in said), "the chart comes first"
    assert any("starts at tick 0" in line for line in said), "what a trainer prints is passed on"


def test_a_run_that_fails_once_goes_on_and_one_that_fails_twice_is_recorded(make) -> None:
    runs, said = make(3), []
    behave(runs[0][1], seconds=0.4, fail=1)
    behave(runs[1][1], seconds=0.4, fail=9)
    outcome = local.run_all(runs, CPU, said.append)
    assert outcome.exit_code == 1 and list(outcome.failed) == [runs[1][0].run_id]
    assert "out of luck" in outcome.failed[runs[1][0].run_id]
    assert_trained_once([runs[0], runs[2]])
    assert sum("trying it once more" in line for line in said) == 2
    states = [turn.state for turn in table_of(runs).turns]
    assert states.count("failed") == 3 and states.count("finished") == 2


def test_a_diverged_run_is_not_tried_again(make) -> None:
    runs = make(2)
    behave(runs[0][1], seconds=0.2, diverge=True)
    outcome = local.run_all(runs, CPU, print)
    assert outcome.exit_code == 1 and len(trace(runs[0][1])) == 4
    again = local.run_all(runs, CPU, print)
    assert again.failed == outcome.failed and len(trace(runs[0][1])) == 4


def test_ctrl_c_stops_every_run_with_its_work_kept(make) -> None:
    runs = make(3, seconds=30)
    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    outcome = local.run_all(runs, CPU, print, n_cpu_slots=2)
    assert outcome.exit_code == 75 and outcome.limit is None and time.monotonic() - began < 10
    assert [folder.read_record().status for _, folder in runs[:2]] == ["stopped", "stopped"]
    assert runs[2][1].read_record() is None
    for _, folder in runs:
        behave(folder, seconds=2)
    assert local.run_all(runs, CPU, print, n_cpu_slots=2).exit_code == 0
    assert_trained_once(runs)


@pytest.mark.slow
def test_a_time_limit_stops_everything_and_the_next_command_goes_on(make) -> None:
    runs, said = make(3, seconds=3), []
    # Where the CPU's start-up alone would take longer than that, nothing is begun.
    assert local.run_all(runs, CPU, print, limits=Limits(ends_at_s=time.time() + 1)).exit_code == 75
    assert not trace(runs[0][1])
    outcome = local.run_all(runs, CPU, said.append, n_cpu_slots=2, limits=Limits(ends_at_s=time.time() + 10.5))
    assert outcome.exit_code == 75 and outcome.stopped and "the end that was asked for" in outcome.limit
    assert "remain" in outcome.limit
    assert local.run_all(runs, CPU, print, n_cpu_slots=2).exit_code == 0
    assert_trained_once(runs)


def test_a_limit_in_money_counts_what_the_ladder_has_cost(make, monkeypatch) -> None:
    runs = make(2, seconds=0.3)
    monkeypatch.setattr(local.Driver, "_spent", lambda self: 0.4 * len(self.state.finished), raising=True)
    priced = [(replace(spec, money=Money(usd_per_machine_hour=1.0)), folder) for spec, folder in runs]
    outcome = local.run_all(priced, CPU, print, limits=Limits(max_usd=0.3))
    assert outcome.exit_code == 75 and "$0.40 of the $0.30" in outcome.limit
    assert runs[1][1].read_record() is None
    with pytest.raises(SpecError, match="states no price"):
        local.run_all(runs, CPU, print, limits=Limits(max_usd=0.3))
    by_energy = [(replace(spec, money=Money(usd_per_kwh=0.3)), folder) for spec, folder in runs]
    with pytest.raises(SpecError, match="nothing measures the energy of cpu"):
        local.run_all(by_energy, CPU, print, limits=Limits(max_usd=0.3))


def test_runs_see_their_own_gpu_only(make) -> None:
    runs = make(4)
    outcome = local.run_all(runs, TWO_GPUS, print, train=TrainTable())
    assert outcome.exit_code == 0
    assert {line["visible"] for run in runs for line in trace(run[1])} == {"0", "1"}
    assert all(len({line["visible"] for line in trace(folder)}) == 1 for _, folder in runs)
    assert {turn.n_gpus for turn in table_of(runs).turns} == {1}
    assert {folder.read_spec().execution.machine_frac for _, folder in runs} == {0.5}


def test_processes_of_the_ladder_are_obeyed(make) -> None:
    runs = make(2)
    outcome = local.run_all(runs, TWO_GPUS, print, train=TrainTable(processes=2))
    assert outcome.exit_code == 0
    assert {(line["visible"], line["ranks"]) for run in runs for line in trace(run[1])} == {(None, 2)}
    first, second = sorted(span(run) for run in runs)
    assert first[1] < second[0], "both need both cards"


def test_a_single_run_takes_both_gpus_where_that_is_faster(make, monkeypatch) -> None:
    (run,) = make(1)
    monkeypatch.setattr(local.Placer, "seconds", lambda self, spec: 1000.0 / spec.execution.n_processes**0.8)
    outcome = local.run_all([run], TWO_GPUS, print, train=TrainTable())
    assert outcome.exit_code == 0
    assert {line["ranks"] for line in trace(run[1])} == {2}


@pytest.mark.slow
def test_the_last_run_is_spread_when_nothing_else_waits(make, monkeypatch) -> None:
    """Its ticks go on where they stopped, with two ranks."""
    runs, said = make(2), []
    behave(runs[0][1], seconds=6)
    seconds = {runs[0][0].run_id: 2000.0, runs[1][0].run_id: 1000.0}
    monkeypatch.setattr(
        local.Placer, "seconds", lambda self, spec: seconds[spec.run_id] / spec.execution.n_processes**0.9
    )
    outcome = local.run_all(runs, TWO_GPUS, said.append, train=TrainTable())
    assert outcome.exit_code == 0
    assert_trained_once(runs)
    ranks = [line["ranks"] for line in trace(runs[0][1])]
    assert ranks == sorted(ranks) and set(ranks) == {1, 2}
    assert {line["ranks"] for line in trace(runs[1][1])} == {1}
    turns = [(t.ddp, t.state) for t in table_of(runs).turns if t.run_id == runs[0][0].run_id]
    assert turns == [(False, "stopped"), (True, "finished")]


CARDS = (SlotNow(index=0, name="GPU 0", uuid="GPU-a"), SlotNow(index=1, name="GPU 1", uuid="GPU-b"))


@pytest.mark.parametrize("word", ["watchdog", "driver"])
def test_a_gpu_that_is_gone_loses_its_runs_to_the_other(make, monkeypatch, tmp_path: Path, word: str) -> None:
    runs, said = make(3, seconds=0.6, lose_gpu="GPU-b"), []
    monkeypatch.setattr(local, "slots_of", lambda box, n: CARDS)
    seen = frozenset({"GPU-a", "GPU-b"})
    gone = {"at": seen}

    def ask():
        lost = any((record := folder.read_record()) and record.stopped_by == "watchdog" for _, folder in runs)
        if lost and word == "watchdog":
            status = Status(
                pid=1, started_s=0, t_s=time.time(), interval_s=1, poll_p50_s=0, poll_p99_s=0,
                cards={"GPU-b": CardStatus(health="lost", reason="the driver has lost the card")},
            )  # fmt: skip
            codec.write_json(tmp_path / "machine" / "status.json", status)
        elif lost:
            gone["at"] = frozenset({"GPU-a"})
        return gone["at"]

    monkeypatch.setattr(local, "ask_driver", ask)
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    monkeypatch.setattr(local, "see_to_watchdog", lambda *a, **k: None)
    outcome = local.run_all(runs, TWO_GPUS, said.append, train=TrainTable())
    assert outcome.exit_code == 0 and outcome.watchdog is None
    assert_trained_once(runs)
    assert any("GPU 1 is gone" in line and "go on with GPU 0" in line for line in said)
    assert [slot.lost is not None for slot in table_of(runs).slots] == [False, True]


def test_cards_that_need_rest_stop_everything(make, monkeypatch, tmp_path: Path) -> None:
    runs = make(3, seconds=5, lose_gpu="GPU-b")
    monkeypatch.setattr(local, "slots_of", lambda box, n: CARDS)
    monkeypatch.setattr(local, "ask_driver", lambda: frozenset({"GPU-a", "GPU-b"}))
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    monkeypatch.setattr(local, "see_to_watchdog", lambda *a, **k: None)
    outcome = local.run_all(runs, TWO_GPUS, print, train=TrainTable())
    assert outcome.exit_code == 3 and "watchdog" in outcome.watchdog
    assert {r.status for _, f in runs if (r := f.read_record())} == {"stopped"}


def start_driver(lab: Path, n_slots: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, stub_runs.__file__, "drive", str(lab), str(n_slots)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_a_driver_that_was_killed_is_replaced_and_nothing_is_trained_twice(make) -> None:
    runs = make(3, seconds=2.5)
    driver = start_driver(lab_of(runs), 2)
    wait_for(lambda: sum(len(trace(folder)) > 3 for _, folder in runs) == 2)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    begun = [run for run in runs if trace(run[1])]
    said: list[str] = []
    outcome = local.run_all(runs, CPU, said.append, n_cpu_slots=2)
    assert outcome.exit_code == 0
    assert_trained_once(runs)
    for run in begun:
        assert any(f"{run[0].run_id}: is being trained already" in line for line in said)
        assert len({line["pid"] for line in trace(run[1])}) == 1, "the orphan was waited for"


@pytest.mark.slow
def test_orphans_are_stopped_with_the_driver_that_found_them(make) -> None:
    runs = make(2, seconds=30)
    driver = start_driver(lab_of(runs), 2)
    wait_for(lambda: all(len(trace(folder)) > 3 for _, folder in runs))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    outcome = local.run_all(runs, CPU, print, n_cpu_slots=2)
    assert outcome.exit_code == 75
    assert {folder.read_record().status for _, folder in runs} == {"stopped"}


@pytest.mark.slow
def test_a_run_that_somebody_else_trains_is_waited_for_and_never_signalled(make) -> None:
    (run,) = make(1, seconds=2)
    by_hand = subprocess.Popen(stub_runs.command(*run, CPU), start_new_session=True)
    wait_for(lambda: len(trace(run[1])) > 3)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    said: list[str] = []
    assert local.run_all([run], CPU, said.append).exit_code == 75
    assert any("it is left alone" in line for line in said) and by_hand.poll() is None
    assert local.run_all([run], CPU, print).exit_code == 0
    by_hand.wait()
    assert_trained_once([run])
    assert len(trace(run[1])) == round(2 / TICK_S)
