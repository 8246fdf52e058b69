"""Curves that never overlap, metrics that survive, a tracker that is not there."""

import pytest
from toy_run import StopAt, train_here

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, Stopped
from homelab_scaling.train.hooks import surviving


def curves(folder) -> dict[str, list[int]]:
    """Tag -> the steps of its points, over every event file of the run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.tensorboard / "toy"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_curves_do_not_overlap_after_a_resume(make_run) -> None:
    spec, folder = make_run(trackers=("tensorboard",))
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(11)])
    train_here(spec, folder)
    found = curves(folder)
    trunk, decay = found["train/loss"], found["decay-2560/loss"]
    assert trunk == list(range(30)), "each step of the trunk once, the decays apart"
    assert decay == list(range(15, 20)) and found["decay-5120/loss"] == list(range(30, 40))
    assert {"train/lr", "train/grad_norm", "rate/tokens_per_s", "train-val-curve/loss"} <= set(found)


def test_what_survives_a_resume() -> None:
    lines = [
        {"kind": "step", "update": 3},
        {"kind": "step", "update": 4},
        {"kind": "val", "update": 4},
        {"kind": "rate", "update": 5},
        {"kind": "val", "update": 6},
    ]
    assert surviving(lines, 4) == [lines[0], lines[2]]


def test_a_tracker_that_is_not_installed_is_named(make_run, monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    spec, folder = make_run(trackers=("wandb",))
    with pytest.raises(MachineError, match=r"tracker wandb is not installed; pip install 'homelab_scaling\[wandb\]'"):
        train_here(spec, folder)
    assert codec.read_jsonl(folder.metrics) == [] and not folder.record.exists()


def test_a_tracker_that_does_not_start_is_one_sentence(make_run, monkeypatch) -> None:
    from accelerate.tracking import TensorBoardTracker

    def refuse(self) -> None:
        raise RuntimeError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(TensorBoardTracker, "start", refuse)
    spec, folder = make_run(trackers=("tensorboard",))
    with pytest.raises(MachineError, match=r"^tensorboard cannot be started \(No API key configured\.\); mend that"):
        train_here(spec, folder)
    record = folder.read_record()
    assert record is not None and record.status == "failed" and "No API key" in (record.reason or "")
