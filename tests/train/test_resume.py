"""Killed anywhere, launched again: the same numbers, bit for bit."""

import json
import signal
from typing import Any

import pytest
from toy_run import StopAt, kill_at, steps_of, train_here

from homelab_scaling import codec
from homelab_scaling.errors import Stopped
from homelab_scaling.runs import RunFolder


def validations_of(folder: RunFolder) -> list[tuple[Any, ...]]:
    lines = codec.read_jsonl(folder.metrics)
    return [(x["update"], x["phase"], x["loss"], x["set"]) for x in lines if x["kind"] == "val"]


def weights_of(folder: RunFolder) -> dict[str, str]:
    """Row -> hash of its weights, from the last time it was earned."""
    return {e["row_id"]: e["weights_sha256"] for e in codec.read_jsonl(folder.events) if e["kind"] == "row"}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([3], id="before the first checkpoint"),
        pytest.param([13], id="in the trunk"),
        pytest.param([18], id="inside the first decay"),
        pytest.param([21], id="after the first row, before the trunk's next checkpoint"),
        pytest.param([42], id="inside the last decay"),
        pytest.param([9, 17, 22, 41], id="four times"),
    ],
)
def test_killed_runs_equal_the_uninterrupted_one(make_run, optimizer: str, kills: list[int]) -> None:
    spec, whole = make_run(lab="whole", optimizer=optimizer)
    reference = train_here(spec, whole)
    spec, torn = make_run(lab="torn", optimizer=optimizer)
    for update in kills:
        kill_at(torn, update)
    record = train_here(spec, torn)

    assert record.status == "finished"
    updates = [line["update"] for line in steps_of(torn)]
    assert updates == list(range(45)), "each update once, in order"
    assert steps_of(torn) == steps_of(whole)
    assert validations_of(torn) == validations_of(whole)
    assert weights_of(torn) == weights_of(whole)
    assert [(r.n_tokens, r.loss_nats) for r in record.rows] == [(r.n_tokens, r.loss_nats) for r in reference.rows]
    assert [r.flops_marginal for r in record.rows] == [r.flops_marginal for r in reference.rows]


def test_a_whole_run(make_run) -> None:
    spec, folder = make_run()
    record = train_here(spec, folder)
    assert record.status == "finished" and len(record.rows) == 2
    lines = steps_of(folder)
    assert [line["update"] for line in lines] == list(range(45))
    # Trunk to 15, decay 15-20, trunk 15-30, decay 30-40: the decays are branches, not detours.
    assert [line["step"] for line in lines] == [*range(20), *range(15, 40)]
    assert lines[14]["loss"] < lines[0]["loss"], "it learns"
    assert record.rows[1].loss_nats < record.rows[0].loss_nats
    per_step = record.rows[0].flops / 20
    assert record.rows[1].flops == pytest.approx(40 * per_step)
    assert sum(r.flops_marginal for r in record.rows) == pytest.approx(45 * per_step), "the bill is what was computed"
    assert all(r.seconds >= r.seconds_marginal > 0 for r in record.rows)
    assert json.loads(folder.record.read_text())["unknown"]["kwh"]
    assert train_here(spec, folder) == record, "a finished run is left alone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_the_run_goes_on(make_run, number: signal.Signals) -> None:
    spec, whole = make_run(lab="whole")
    train_here(spec, whole)
    spec, folder = make_run(lab="stopped")
    with pytest.raises(Stopped, match=number.name):
        train_here(spec, folder, [StopAt(7, number)])
    record = folder.read_record()
    assert record is not None and record.status == "stopped"
    assert train_here(spec, folder).status == "finished"
    assert steps_of(folder) == steps_of(whole)
    segments = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"]
    assert [s["update"] for s in segments] == [0, 8], "nothing was computed twice"


def test_a_torn_checkpoint_is_skipped_and_named(make_run, capsys) -> None:
    spec, whole = make_run(lab="whole")
    train_here(spec, whole)
    spec, folder = make_run(lab="torn", checkpoint_every_steps=4)
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(11)])
    newest = sorted(folder.checkpoints.glob("u*"))[-1]
    older = newest.with_name("u00000004")
    # The older one was removed; make another valid one by training a copy to step 4 only.
    spec4, donor = make_run(lab="donor", checkpoint_every_steps=4)
    with pytest.raises(Stopped):
        train_here(spec4, donor, [StopAt(3)])
    (donor.checkpoints / "u00000004").rename(older)
    model = newest / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train_here(spec, folder).status == "finished"
    last = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"][-1]
    assert last["update"] == 4 and "does not match its hash" in last["skipped_checkpoints"][0]
    assert f"skipped checkpoint {newest.name}: model.safetensors does not match its hash" in capsys.readouterr().err
    assert steps_of(folder) == steps_of(whole)


def test_a_lost_record_loses_no_row(make_run) -> None:
    spec, whole = make_run(lab="whole")
    reference = train_here(spec, whole)
    spec, folder = make_run(lab="lost")
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(28)])  # in the trunk, after the first row
    folder.record.unlink()
    record = train_here(spec, folder)
    assert [r.loss_nats for r in record.rows] == [r.loss_nats for r in reference.rows]
    last = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"][-1]
    assert last["update"] == 0 and "no longer has the rows" in last["skipped_checkpoints"][0]
    assert steps_of(folder) == steps_of(whole)
