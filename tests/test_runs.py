"""Run folders, records and the tables derived from them."""

import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.runs import (
    CORRECTED_COLUMNS,
    DERIVED_COLUMNS,
    Excluded,
    LossPoint,
    Machine,
    Row,
    RunFolder,
    RunRecord,
    flock,
    read_records,
    read_rows,
    read_runs,
    run_folders,
    runs_csv,
    to_point,
    why_not_corrected,
    write_runs_csv,
)

ROW = Row(
    row_id="small-s0-abc@1000",
    run_id="small-s0-abc",
    rung="small",
    seed=0,
    n_params=67_000,
    n_tokens=1_000,
    loss_nats=4.25,
    loss_se_nats=0.01,
    bpb=None,
    flops=4.02e8,
    flops_marginal=1e8,
    n_body=50_000,
    n_pos=1_000,
    n_embed=16_000,
    n_head=16_000,
    n_steps=10,
    batch_tokens=100,
    lr_peak=0.003,
    schedule="wsd",
    decayed=True,
    optimizer="adamw",
    precision="fp32",
    data_id="0123456789ab",
    n_tokens_unique=1_000,
    seconds=2.5,
    seconds_marginal=1.5,
    tokens_per_s=400.0,
    mfu_frac=None,
)
MACHINE = Machine(
    device="cpu",
    n_processes=1,
    torch="2.13.0",
    accelerate="1.15.0",
    transformers="5.23.0",
    python="3.11.7",
    homelab_scaling="0.1.0",
)
RECORD = RunRecord(
    run_id="small-s0-abc",
    ladder="quickstart",
    rung="small",
    status="finished",
    reason=None,
    science_hash="ab" * 32,
    rows=(ROW, dataclasses.replace(ROW, row_id="small-s0-abc@2000", n_tokens=2_000, loss_nats=4.0)),
    machine=MACHINE,
    unknown={"mfu_frac": "no peak is known for this CPU", "bpb": "the shards never said how many bytes they hold"},
)


def write_record(lab: Path, name: str, record: RunRecord = RECORD) -> RunFolder:
    folder = RunFolder(lab / "runs" / name)
    codec.write_json(folder.record, record)
    return folder


def test_a_record_comes_back_as_it_was_written(lab: Path) -> None:
    folder = write_record(lab, "small-s0-abc")
    assert folder.read_record() == RECORD
    assert RunFolder(lab / "runs" / "other").read_record() is None


def test_rows_and_points_come_from_every_finished_record(lab: Path) -> None:
    write_record(lab, "b")
    write_record(lab, "a", dataclasses.replace(RECORD, rows=(dataclasses.replace(ROW, row_id="first"),)))
    rows, excluded = read_rows(lab)
    assert [row.row_id for row in rows] == ["first", "small-s0-abc@1000", "small-s0-abc@2000"]
    assert excluded == []
    points, _ = read_runs(lab)
    assert [(p.n_params, p.n_tokens, p.loss_nats, p.row_id) for p in points[1:]] == [
        (67_000, 1_000, 4.25, "small-s0-abc@1000"),
        (67_000, 2_000, 4.0, "small-s0-abc@2000"),
    ]


def test_a_point_carries_every_column_the_two_share() -> None:
    point, shared = to_point(ROW), {f.name for f in dataclasses.fields(LossPoint)} & set(codec.to_plain(ROW))
    assert len(shared) >= 18
    assert {name: getattr(point, name) for name in shared} == {name: getattr(ROW, name) for name in shared}


def test_nothing_vanishes_silently(lab: Path) -> None:
    write_record(lab, "diverged", dataclasses.replace(RECORD, status="diverged", reason="loss not finite at step 7"))
    write_record(lab, "stopped", dataclasses.replace(RECORD, status="stopped", rows=()))
    write_record(lab, "torn").record.write_text('{"run_id": "tor')
    RunFolder(lab / "runs" / "started").spec.parent.mkdir()
    RunFolder(lab / "runs" / "started").spec.write_text("{}")
    (lab / "runs" / "notes").mkdir()
    (lab / "runs" / ".trash").mkdir()
    rows, excluded = read_rows(lab)
    assert len(rows) == 2, "rows earned before a run diverged are kept"
    assert [e.row_id for e in excluded] == ["diverged", "notes", "started", "stopped", "torn"]
    reasons = {e.row_id: e.reason for e in excluded}
    assert reasons["diverged"] == "diverged: loss not finite at step 7"
    assert reasons["stopped"] == "stopped: no reason recorded"
    assert reasons["started"].startswith("no record.json")
    assert reasons["notes"].startswith("not a run folder")
    assert reasons["torn"].startswith("unreadable record: ") and "record.json" in reasons["torn"]
    assert isinstance(excluded[0], Excluded)


def test_a_record_with_a_wrong_type_is_unreadable_and_not_trusted(lab: Path) -> None:
    folder = write_record(lab, "edited")
    folder.record.write_text(folder.record.read_text().replace('"n_tokens": 1000', '"n_tokens": 1000.5'))
    rows, (excluded,) = read_rows(lab)
    assert rows == []
    assert "rows[0].n_tokens" in excluded.reason


def test_a_folder_of_runs_is_a_lab_too_and_no_lab_is_an_error(lab: Path) -> None:
    write_record(lab, "a")
    assert [f.path.name for f in run_folders(lab / "runs")] == [f.path.name for f in run_folders(lab)] == ["a"]
    with pytest.raises(SpecError, match="no such lab; run `homelab run LADDER` first"):
        run_folders(lab / "elsewhere")


def test_runs_csv_has_a_line_per_row_and_empty_cells_for_the_unknown(lab: Path) -> None:
    write_record(lab, "a")
    path = write_runs_csv(lab)
    lines = list(csv.DictReader(path.read_text().splitlines()))
    of_row, of_machine = ([f.name for f in dataclasses.fields(kind)] for kind in (Row, Machine))
    assert list(lines[0]) == [*of_row, *DERIVED_COLUMNS, "status", *of_machine]
    assert lines[0]["status"] == RECORD.status and lines[0]["torch"] == RECORD.machine.torch
    assert [line["n_tokens"] for line in lines] == ["1000", "2000"]
    derived = {name: getattr(ROW, name) for name in DERIVED_COLUMNS}
    known = {**codec.to_plain(ROW), **derived, **codec.to_plain(RECORD.machine)}
    assert {name for name, cell in lines[0].items() if cell == ""} == {n for n, value in known.items() if value is None}
    assert float(lines[0]["flops"]) == ROW.flops
    path.unlink()
    assert write_runs_csv(lab).read_text() == runs_csv(read_records(lab)[0]), "the table can be rebuilt at any time"


def write_batches(lab: Path, method: str, *, sd_log: float | None = 0.1, basis: str = "measured") -> None:
    b_crit = {"value": 400.0, "low": 300.0, "high": 500.0}
    rung = {"rung": "small", "n_params": ROW.n_params, "n_tokens": ROW.n_tokens, "b_crit": b_crit, "basis": basis}
    calibration = {"method": method, "sd_log": sd_log}
    plain = {"data_id": ROW.data_id, "calibration": calibration, "rungs": [rung]}
    (lab / "batch.json").write_text(json.dumps(plain))


@pytest.mark.parametrize(("method", "basis"), [("sweep", "measured"), ("branch", "measured"), ("sweep", "forecast")])
def test_a_calibrated_critical_batch_corrects_compute_and_steps(lab: Path, method: str, basis: str) -> None:
    write_record(lab, "a")
    write_batches(lab, method, basis=basis)
    assert why_not_corrected(lab) is None
    (point, longer), _ = read_runs(lab)
    assert point.c_min_flops == pytest.approx(ROW.flops / (1 + 100 / 400))
    assert point.s_min_steps == pytest.approx(ROW.n_steps / (1 + 400 / 100))
    assert longer.c_min_flops == pytest.approx(ROW.flops / (1 + 100 / (400 * 2**0.5))), "it grows along a run"
    lines = list(csv.DictReader(write_runs_csv(lab).read_text().splitlines()))
    assert [float(lines[0][name]) for name in CORRECTED_COLUMNS] == [point.c_min_flops, point.s_min_steps]


@pytest.mark.parametrize(
    ("method", "sd_log", "basis", "why"),
    [
        ("uncalibrated", None, "measured", "batch.json is uncalibrated"),
        ("branch", None, "measured", "its branch test gave only a bound"),
        ("sweep", 0.1, "bound", "batch.json has measured no rung"),
        ("sweep", 0.1, "prior", "batch.json has measured no rung"),
    ],
)
def test_a_guessed_critical_batch_corrects_nothing(
    lab: Path, method: str, sd_log: float | None, basis: str, why: str
) -> None:
    write_record(lab, "a")
    assert why_not_corrected(lab) == "there is no batch.json"
    write_batches(lab, method, sd_log=sd_log, basis=basis)
    assert why_not_corrected(lab) == why
    (point, _), _ = read_runs(lab)
    assert point.c_min_flops is None and point.s_min_steps is None
    assert "c_min_flops" not in write_runs_csv(lab).read_text()


def _hold(path: Path, held: "multiprocessing.synchronize.Event") -> None:
    with flock(path, "taken"):
        held.set()
        time.sleep(60)


def test_a_run_folder_lets_one_process_in_and_frees_itself_when_that_dies(lab: Path) -> None:
    context = multiprocessing.get_context("spawn")
    folder, held = RunFolder(lab / "runs" / "a"), context.Event()
    other = context.Process(target=_hold, args=(folder.path / ".lock", held))
    other.start()
    try:
        assert held.wait(timeout=30)
        with pytest.raises(MachineError, match="another process is training this run"), folder.lock():
            pass
    finally:
        os.kill(int(other.pid or 0), signal.SIGKILL)
        other.join()
    with folder.lock():
        pass
    with folder.lock():  # and a lock given back can be taken again
        pass


def test_runs_of_an_older_ladder_are_excluded_by_name(lab: Path) -> None:
    for run_id in ("kept", "old"):
        row = dataclasses.replace(ROW, run_id=run_id, row_id=f"{run_id}@1000")
        codec.write_json(lab / "runs" / run_id / "record.json", dataclasses.replace(RECORD, run_id=run_id, rows=(row,)))
    codec.write_json(lab / "plan.json", {"runs": [{"run_id": "kept"}]})
    rows, excluded = read_rows(lab)
    assert [row.run_id for row in rows] == ["kept"]
    assert [(e.row_id, "ladder was changed" in e.reason) for e in excluded] == [("old", True)]
    codec.write_json(lab / "plan.json", {"runs": []})  # planned before the shards: says nothing about runs
    assert len(read_rows(lab)[0]) == 2


@pytest.mark.parametrize("changes", [{"n_params": 68_000}, {"data_id": "another"}])
def test_a_critical_batch_of_another_model_or_text_corrects_nothing(lab: Path, changes: dict[str, Any]) -> None:
    write_record(lab, "a", dataclasses.replace(RECORD, rows=(dataclasses.replace(ROW, **changes),)))
    write_batches(lab, "sweep")
    (point,), _ = read_runs(lab)
    assert point.c_min_flops is None


@pytest.mark.parametrize("text", ["{", "[]", '{"calibration": {"method": "sweep", "sd_log": 0.1}, "rungs": [{}]}'])
def test_a_damaged_batch_file_costs_the_corrections_only(lab: Path, text: str) -> None:
    write_record(lab, "a")
    (lab / "batch.json").write_text(text)
    assert "batch.json" in str(why_not_corrected(lab)) and len(read_runs(lab)[0]) == 2
