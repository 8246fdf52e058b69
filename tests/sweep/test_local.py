"""How a launch ended, from what it and the watchdog left on disk; nothing is launched for real here."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from toy_run import make_toy_run, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.box import detect_box
from homelab_scaling.runs import RunFolder, RunRecord
from homelab_scaling.specs import RunSpec, WatchLimits
from homelab_scaling.sweep import launch, local, recipe
from homelab_scaling.train import oom_notes
from homelab_scaling.watch.link import Ended, MachineFolder


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> tuple[RunSpec, RunFolder]:
    """A run folder of a machine whose watchdog's files are in tmp_path/machine."""
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    monkeypatch.setattr(recipe, "start_watchdog", lambda lab: None)
    return make_toy_run(tmp_path, write_shards(tmp_path / "shards"), horizons=(20,))


@pytest.fixture
def finished(run, monkeypatch) -> RunRecord:
    monkeypatch.delenv("HOMELAB_MACHINE")
    record = train_here(*run)
    run[1].record.unlink()
    monkeypatch.setenv("HOMELAB_MACHINE", str(run[1].path.parents[2] / "machine"))
    return record


def launches(monkeypatch, *scripts) -> list[RunSpec]:
    """Instead of the trainer, one function a launch, called before a process that does nothing."""
    launched: list[RunSpec] = []
    queue = list(scripts)

    def command(spec, folder, box):
        launched.append(spec)
        queue.pop(0)()
        return [sys.executable, "-c", "raise SystemExit(1)"]

    monkeypatch.setattr(launch, "launch_command", command)
    return launched


def say_ended(run, seconds: float) -> None:
    machine = MachineFolder(run[1].path.parents[2] / "machine")
    word = Ended(run_id=run[0].run_id, t_s=time.time() + seconds, reason="GPU-1 was lost", last_checkpoint="u00000006")
    codec.write_json(machine.ended / f"{run[0].run_id}.json", word)


@pytest.mark.parametrize("status", ["running", "failed"])
def test_a_run_that_the_watchdog_had_to_end_is_recorded_as_such(run, finished, monkeypatch, status: str) -> None:
    spec, folder = run

    def hang() -> None:
        codec.write_json(folder.record, replace(finished, status=status, rows=(), reason="CUDA error"))
        say_ended(run, 1)

    launches(monkeypatch, hang)
    other = (spec, RunFolder(folder.path.with_name("next")))
    outcome = local.run_all([run, other], detect_box(), print)
    assert outcome.exit_code == 3 and "GPU-1 was lost; goes on from u00000006" in outcome.watchdog
    record = folder.read_record()
    assert (record.status, record.stopped_by) == ("stopped", "watchdog") and "u00000006" in record.reason


def test_an_old_word_of_the_watchdog_does_not_count(run, finished, monkeypatch) -> None:
    say_ended(run, -60)
    died = lambda: codec.write_json(run[1].record, replace(finished, status="running", rows=()))  # noqa: E731
    launches(monkeypatch, died, died)
    outcome = local.run_all([run], detect_box(), print)
    assert outcome.exit_code == 1 and "the trainer died" in outcome.failed[run[0].run_id]


def test_a_launch_that_was_killed_for_its_memory_is_launched_again(run, finished, monkeypatch) -> None:
    """The main rank waits inside a collective and is killed: only the other rank's note tells."""
    spec, folder = run

    def one_rank_runs_out() -> None:
        current = folder.read_spec()
        codec.append_jsonl(folder.events, [{"kind": "segment", "pids": []}])
        codec.write_json(folder.record, replace(finished, status="running", rows=()))
        note = oom_notes.write_note(current, folder, update=7, step=7, said="CUDA out of memory")
        codec.append_jsonl(folder.events, [{"kind": "oom", **note}])

    def finish() -> None:
        codec.write_json(folder.record, finished)

    launched = launches(monkeypatch, one_rank_runs_out, one_rank_runs_out, finish)
    outcome = local.run_all([run], detect_box(), print)
    assert outcome.finished == (spec.run_id,)
    assert [s.execution.microbatch_seqs_per_rank for s in launched] == [4, 2, 1]
    assert folder.read_spec().execution.microbatch_seqs_per_rank == 1

    folder.record.unlink()
    launches(monkeypatch, one_rank_runs_out)
    outcome = local.run_all([(folder.read_spec(), folder)], detect_box(), print)
    assert outcome.exit_code == 1 and "one sequence a micro-batch" in outcome.failed[spec.run_id]


def test_the_watchdog_is_started_first_where_there_is_something_to_watch(run, finished, monkeypatch, capsys) -> None:
    spec, folder = run
    codec.write_json(folder.record, finished)
    order: list[str] = []
    monkeypatch.setattr(recipe, "start_watchdog", lambda lab: order.append(str(lab)))
    local.run_all([run], detect_box(), order.append)
    assert order[0] == str(folder.path.parents[2]) and "before" in order[1]
    monkeypatch.delenv("HOMELAB_MACHINE")
    order.clear()
    local.run_all([run], replace(detect_box(), n_gpus=0), order.append)
    assert len(order) == 1, "on CPU there is nothing to watch"
    local.run_all([(replace(spec, watch=WatchLimits(enabled=False)), folder)], detect_box(), order.append)
    assert len(order) == 2

    def fails(lab: Path) -> None:
        raise OSError("no more processes")

    monkeypatch.setenv("HOMELAB_MACHINE", "x")
    monkeypatch.setattr(recipe, "start_watchdog", fails)
    order.clear()
    assert local.run_all([run], detect_box(), order.append).exit_code == 0
    assert "nothing guards the cards" in order[0]
