"""The loop: the same losses however the batch is cut, non-finite numbers kept out, other processes kept out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_run import StopAt, steps_of, train_here

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, RunFailed, SpecError, Stopped
from homelab_scaling.runs import read_rows
from homelab_scaling.train.model import LanguageModel
from homelab_scaling.train.session import choose_compile, refuse_silent_split

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "toy_losses.json"


def losses(folder) -> list[float]:
    return [line["loss"] for line in steps_of(folder)]


def test_golden_losses(make_run) -> None:
    """The first 20 fp32 losses of the toy run. Regenerate only for a reason that the commit names."""
    spec, folder = make_run(horizons=(20,))
    train_here(spec, folder)
    golden = json.loads(GOLDEN.read_text())
    assert losses(folder) == pytest.approx(golden["losses"], rel=1e-4)
    assert folder.read_record().rows[0].loss_nats == pytest.approx(golden["validation"], rel=1e-4)


@pytest.mark.parametrize("microbatch", [1, 2, 8])
def test_accumulation_changes_nothing(make_run, microbatch: int) -> None:
    spec, folder = make_run(lab="whole", horizons=(12,), microbatch_seqs_per_rank=4)
    train_here(spec, folder)
    spec, other = make_run(lab="cut", horizons=(12,), microbatch_seqs_per_rank=microbatch)
    train_here(spec, other)
    assert losses(other) == pytest.approx(losses(folder), rel=2e-5)


@pytest.mark.parametrize("path", ["plain", "chunked"])
def test_loss_paths_agree(make_run, path: str) -> None:
    spec, folder = make_run(lab="auto", horizons=(12,))
    train_here(spec, folder)
    spec, other = make_run(lab=path, horizons=(12,), loss=path)
    train_here(spec, other)
    assert losses(other) == pytest.approx(losses(folder), rel=2e-5)


def test_a_shorter_horizon_sees_a_prefix_of_a_longer_one(make_run) -> None:
    spec, short = make_run(lab="short", horizons=(20,))
    train_here(spec, short)
    spec, long = make_run(lab="long", horizons=(20, 40))
    train_here(spec, long)
    assert losses(long)[:20] == losses(short)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_non_finite_loss_never_reaches_the_weights(make_run, monkeypatch, optimizer: str) -> None:
    spec, clean = make_run(lab="clean", optimizer=optimizer, checkpoint_every_steps=10)
    with pytest.raises(Stopped):
        train_here(spec, clean, [StopAt(9)])  # checkpoints after update 10
    spec, folder = make_run(lab="poisoned", optimizer=optimizer, checkpoint_every_steps=100)
    forward, calls = LanguageModel.forward, []
    kept = []

    def poisoned(self, x_BT, y_BT):
        calls.append(1)
        kept[:] = [self]
        loss = forward(self, x_BT, y_BT)
        return loss * math.nan if len(calls) == 2 * 10 + 1 else loss  # first micro-batch of update 10

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    with pytest.raises(RunFailed, match="non-finite at step 10"):
        train_here(spec, folder)

    record = folder.read_record()
    assert record.status == "diverged" and "lower this rung's learning rate" in record.reason
    lines = steps_of(folder)
    assert [line["update"] for line in lines] == list(range(11)) and lines[-1]["loss"] is None
    assert not list(folder.checkpoints.glob("u*")), "no checkpoint after the poison"
    rows, excluded = read_rows(folder.path.parent.parent)
    assert rows == [] and "diverged" in excluded[0].reason
    # Updates 10 and 11 ran before the host looked: 10 was masked, 11 was an ordinary step from clean weights.
    assert all(torch.isfinite(p).all() for p in kept[0].parameters())


def test_a_masked_update_leaves_the_weights_bit_for_bit(make_run, monkeypatch) -> None:
    """From the poisoned update on, everything is poisoned: the weights must be those of the checkpoint before."""
    spec, clean = make_run(lab="clean", log_every_steps=1, checkpoint_every_steps=8)
    with pytest.raises(Stopped):
        train_here(spec, clean, [StopAt(7)])
    from safetensors.torch import load_file

    wanted = load_file(clean.checkpoints / "u00000008" / "model.safetensors")
    spec, folder = make_run(lab="poisoned", log_every_steps=4, checkpoint_every_steps=100)
    forward, calls, kept = LanguageModel.forward, [], []

    def poisoned(self, x_BT, y_BT):
        calls.append(1)
        kept[:] = [self]
        loss = forward(self, x_BT, y_BT)
        return loss * math.nan if len(calls) > 2 * 8 else loss

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    with pytest.raises(RunFailed):
        train_here(spec, folder)
    assert all(torch.equal(p, wanted[name]) for name, p in kept[0].named_parameters())


def test_two_processes_cannot_have_one_folder(make_run) -> None:
    spec, folder = make_run()
    with folder.lock(), pytest.raises(MachineError, match="another process is training this run"):
        train_here(spec, folder)
    assert not folder.metrics.exists() and not folder.record.exists()


def test_other_shards_are_refused(make_run) -> None:
    spec, folder = make_run()
    manifest = Path(spec.shards) / "manifest.json"
    plain = json.loads(manifest.read_text())
    plain["tokenizer_hash"] = "another"
    manifest.write_text(json.dumps(plain))
    with pytest.raises(SpecError, match="not the ones"):
        train_here(spec, folder)


def test_an_edited_spec_is_refused(make_run) -> None:
    _, folder = make_run()
    plain = json.loads(folder.spec.read_text())
    plain["science"]["seed"] = 5
    folder.spec.write_text(json.dumps(plain))
    with pytest.raises(SpecError, match="was edited"):
        folder.read_spec()


def test_validation_curve_is_kept_to_its_cadence(make_run) -> None:
    spec, folder = make_run()
    train_here(spec, folder)
    lines = [x for x in codec.read_jsonl(folder.metrics) if x["kind"] == "val"]
    curve = [(x["phase"], x["step"]) for x in lines if x["set"] == "curve"]
    assert curve == [("trunk", 8), ("decay@2560", 16), ("trunk", 16), ("trunk", 24), ("decay@5120", 32)]
    full = [x for x in lines if x["set"] == "full"]
    assert [x["tokens"] for x in full] == [20 * 128, 40 * 128]
    assert all(x["bpb"] == pytest.approx(x["loss"] / math.log(2) / 3) for x in full)


def test_silent_splits_are_refused() -> None:
    refuse_silent_split(2, 2, {"WORLD_SIZE": "2"})
    refuse_silent_split(1, 1, {})
    with pytest.raises(SpecError, match=r"this launch has 1 process, the spec wants 2"):
        refuse_silent_split(1, 2, {})
    with pytest.raises(SpecError, match="train independently"):
        refuse_silent_split(1, 1, {"WORLD_SIZE": "2"})


def test_the_compile_rule(make_run) -> None:
    spec, _ = make_run(compile="auto")

    def auto(**changes):
        return choose_compile(replace(spec.execution, **changes), n_layer=4, on_gpu=False, missing=[])

    assert auto(predicted_s=3600.0)[0]
    on, why = auto(predicted_s=30.0)
    assert not on and "first step costs about 14 s of a run of about 30 s" in why
    assert not auto(compile="off")[0] and auto(compile="on")[0]
    on, why = choose_compile(spec.execution, n_layer=4, on_gpu=True, missing=["a C compiler"])
    assert not on and "without a C compiler" in why


def test_a_cosine_run_has_one_row_and_ends_at_its_floor(make_run) -> None:
    spec, _ = make_run()
    schedule = replace(spec.science.schedule, name="cosine", lr_final_frac=0.1)
    spec, whole = make_run(lab="cosine", horizons=(20,), schedule=schedule)
    record = train_here(spec, whole)
    rates = [line["lr"] for line in steps_of(whole)]
    assert len(record.rows) == 1 and record.rows[0].schedule == "cosine"
    assert max(rates) <= 1e-2 and rates[-1] == pytest.approx(1e-3, rel=0.1)
    spec, folder = make_run(lab="stopped", horizons=(20,), schedule=schedule)
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(11)])
    train_here(spec, folder)
    assert steps_of(folder) == steps_of(whole)
