"""Out of memory: the same losses with a smaller micro-batch, in place or after a relaunch."""

from pathlib import Path

import pytest
import torch
from short_of_memory import shorten
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.box import detect_box
from homelab_scaling.errors import RunFailed, Stopped
from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep import launch, local
from homelab_scaling.train.evaluate import Evaluator
from homelab_scaling.train.model import LanguageModel
from homelab_scaling.train.oom_notes import OutOfMemory, keep_smaller, smaller
from homelab_scaling.train.optim import MaskedAdamW

RECIPE = Path(__file__).resolve().parents[1] / "support" / "short_of_memory.py"


def values(folder: RunFolder, key: str = "loss") -> list[float]:
    return [line[key] for line in steps_of(folder)]


def events_of(folder: RunFolder, kind: str) -> list[dict]:
    return [e for e in codec.read_jsonl(folder.events) if e["kind"] == kind]


# Calls of forward with gradients: two a step at a micro-batch of 4. 2 * 10 + 1 is the second micro-batch of step 10:
# half of the update's gradients exist by then and must not survive.
@pytest.mark.parametrize("at_call", [0, 20, 21], ids=["at once", "first half of a step", "second half of a step"])
def test_one_process_goes_on_in_place_with_the_same_losses(make_run, monkeypatch, at_call: int) -> None:
    spec, whole = make_run(lab="whole")
    reference = train_here(spec, whole)
    spec, folder = make_run(lab="short")
    monkeypatch.setattr(LanguageModel, "forward", shorten(LanguageModel.forward, fits=1, at_call=at_call))
    record = train_here(spec, folder)
    assert [line["update"] for line in steps_of(folder)] == list(range(45)), "each update once"
    assert values(folder) == pytest.approx(values(whole), rel=1e-6)
    assert values(folder, "grad_norm") == pytest.approx(values(whole, "grad_norm"), rel=1e-5)
    assert [r.loss_nats for r in record.rows] == pytest.approx([r.loss_nats for r in reference.rows], rel=1e-6)
    notes = events_of(folder, "oom")
    assert [(n["microbatch_seqs_per_rank"], n["next"]) for n in notes] == [(4, 2), (2, 1)]
    assert {n["update"] for n in notes} == {at_call // 2} and notes[0]["said"].startswith("CUDA out of memory")
    segments = events_of(folder, "segment")
    assert [(s["microbatch_seqs_per_rank"], s["accumulation"]) for s in segments] == [(4, 2), (2, 4), (1, 8)]
    assert folder.read_spec().execution.microbatch_seqs_per_rank == 1, "the next launch starts there"


def test_a_single_sequence_that_does_not_fit_is_a_failure_that_says_what_to_do(make_run, monkeypatch) -> None:
    spec, folder = make_run(horizons=(20,))
    monkeypatch.setattr(LanguageModel, "forward", shorten(LanguageModel.forward, fits=0, at_call=9))
    with pytest.raises(RunFailed, match="with one sequence a micro-batch; shorten context_tokens") as error:
        train_here(spec, folder)
    assert not isinstance(error.value, OutOfMemory)
    record = folder.read_record()
    assert record.status == "failed" and "out of memory at step 4" in record.reason


def test_other_errors_are_not_taken_for_it(make_run, monkeypatch) -> None:
    spec, folder = make_run(horizons=(20,))

    def broken(self, x, y):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(LanguageModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        train_here(spec, folder)
    assert events_of(folder, "oom") == [] and folder.read_record().status == "failed"


def test_an_update_that_ran_out_half_way_is_taken_back_to_the_last_checkpoint(make_run, monkeypatch) -> None:
    """Once the optimizer has begun to write, the weights cannot be trusted: only a relaunch goes on."""
    spec, whole = make_run(lab="whole")
    train_here(spec, whole)
    spec, folder = make_run(lab="half")
    step, calls = MaskedAdamW.step, []

    def half(self, lr, finite):
        calls.append(lr)
        step(self, lr, finite)
        if len(calls) == 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MaskedAdamW, "step", half)
    with pytest.raises(OutOfMemory, match="relaunch with micro-batch 2") as error:
        train_here(spec, folder)
    assert isinstance(error.value, Stopped)
    assert folder.read_record().stopped_by == "memory"
    assert train_here(folder.read_spec(), folder).status == "finished"
    assert values(folder) == pytest.approx(values(whole), rel=1e-6)
    assert [s["update"] for s in events_of(folder, "segment")] == [0, 6]


def test_a_validation_is_cut_smaller(make_run, monkeypatch) -> None:
    spec, whole = make_run(lab="whole", horizons=(20,))
    reference = train_here(spec, whole)
    spec, folder = make_run(lab="short", horizons=(20,))
    losses, sizes = LanguageModel.token_losses, []

    def short(self, x, y):
        sizes.append(len(x))
        if len(x) > 10:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return losses(self, x, y)

    monkeypatch.setattr(LanguageModel, "token_losses", short)
    record = train_here(spec, folder)
    assert record.rows[0].loss_nats == pytest.approx(reference.rows[0].loss_nats, rel=1e-6)
    assert max(sizes) > 10 and sizes[-1] <= 10 and events_of(folder, "oom in validation")
    assert values(folder) == values(whole)


def test_a_validation_of_single_windows_that_does_not_fit_fails(make_run, monkeypatch) -> None:
    spec, folder = make_run(horizons=(20,))

    def never(self, model):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Evaluator, "measure", never)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train_here(spec, folder)


def test_the_smaller_micro_batch_divides_the_larger() -> None:
    assert [smaller(n) for n in (1, 2, 3, 4, 6, 9, 12, 35)] == [None, 1, 1, 2, 3, 3, 6, 7]


def test_a_plan_made_anew_keeps_what_memory_taught(make_run, monkeypatch) -> None:
    from dataclasses import replace

    spec, folder = make_run(horizons=(20,))
    assert keep_smaller(spec, folder) == spec
    monkeypatch.setattr(LanguageModel, "forward", shorten(LanguageModel.forward, fits=2))
    train_here(spec, folder)
    assert keep_smaller(spec, folder).execution.microbatch_seqs_per_rank == 2
    two = replace(spec, execution=replace(spec.execution, n_processes=2))
    assert keep_smaller(two, folder) == two, "two processes need less each"
    one = replace(spec, execution=replace(spec.execution, microbatch_seqs_per_rank=1))
    assert keep_smaller(one, folder) == one


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_end_together_and_are_launched_again(tmp_path: Path, monkeypatch, rank: int) -> None:
    manifest = write_shards(tmp_path / "shards")
    spec, alone = make_toy_run(tmp_path, manifest, lab="one")
    train_here(spec, alone)
    spec, folder = make_toy_run(tmp_path, manifest, lab="two", n_processes=2, microbatch_seqs_per_rank=4)
    command = launch.launch_command

    def with_small_card(*args):
        return [str(RECIPE) if part.endswith("pretrain.py") else part for part in command(*args)]

    monkeypatch.setattr(launch, "launch_command", with_small_card)
    for key, value in {"SHORT_RANK": rank, "SHORT_FITS": 2, "SHORT_AT_CALL": 9}.items():
        monkeypatch.setenv(key, str(value))
    said: list[str] = []
    outcome = local.run_all([(spec, folder)], detect_box(), said.append)
    assert outcome.finished == (spec.run_id,) and outcome.exit_code == 0
    assert any("out of memory at step 9: relaunch with micro-batch 2" in line for line in said)
    assert values(folder) == pytest.approx(values(alone), rel=2e-5)
    segments = events_of(folder, "segment")
    assert [(s["microbatch_seqs_per_rank"], s["update"]) for s in segments] == [(4, 0), (2, 6)]
    assert len(events_of(folder, "oom")) == 1
