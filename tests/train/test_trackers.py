"""A tiny run in every tracker, without a network: stopped, killed, resumed; each step once, and back as points."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_run import KillAt, StopAt, in_own_process, steps_of, train_here

from homelab_scaling import codec
from homelab_scaling.errors import Stopped
from homelab_scaling.fit.from_trackers.collect import Reading, collect
from homelab_scaling.fit.from_trackers.tracked import TrackedRun
from homelab_scaling.fit.points import points_csv, read_points
from homelab_scaling.runs import LossPoint, RunFolder, read_runs
from homelab_scaling.specs import RunSpec

TRACKERS = ("tensorboard", "wandb", "mlflow")


def readers() -> dict[str, Callable[[Path], list[TrackedRun]]]:
    from homelab_scaling.fit.from_trackers.mlflow_runs import read_mlflow
    from homelab_scaling.fit.from_trackers.tensorboard_runs import read_tensorboard
    from homelab_scaling.fit.from_trackers.wandb_runs import read_wandb

    return {
        "tensorboard": read_tensorboard,
        "wandb": lambda lab: read_wandb(str(lab)),
        "mlflow": lambda lab: read_mlflow(str(lab)),
    }


@pytest.fixture(autouse=True)
def packages() -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)


def _train(spec_path: str, ending: str, update: int) -> None:
    """Trains in a process whose trackers' settings are its own."""
    import warnings

    warnings.simplefilter("ignore")
    folder = RunFolder(Path(spec_path).parent)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(folder.path / "cache")}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    hooks = {"finished": [], "stopped": [StopAt(update)], "killed": [KillAt(update)]}
    ended = "finished"
    try:
        train_here(codec.read_json(folder.spec, RunSpec), folder, hooks[ending])
    except Stopped:
        ended = "stopped"
    assert ended == ending


def launch(folder: RunFolder, ending: str = "finished", update: int = 11) -> None:
    code = in_own_process(_train, str(folder.spec), ending, update)
    assert code == (-signal.SIGKILL if ending == "killed" else 0)


def the_run(runs: list[TrackedRun], run_id: str) -> TrackedRun:
    (run,) = [run for run in runs if run.name == run_id]
    return run


def same_points(found: Sequence[LossPoint], wanted: Sequence[LossPoint]) -> None:
    """What every tracker knows of a point; TensorBoard's numbers are 32-bit floats."""
    exact = ("row_id", "run_id", "n_params", "n_tokens", "data_id", "seed", "family", "schedule", "decayed", "flops")
    exact += ("n_body", "n_head", "n_embed", "n_pos")
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, sorted(wanted, key=lambda p: p.n_tokens), strict=True):
        assert {name: getattr(one, name) for name in exact} == {name: getattr(other, name) for name in exact}
        for name in ("loss_nats", "loss_se_nats", "bpb"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6), name


def check_trunk(name: str, run: TrackedRun, folder: RunFolder) -> None:
    """Each step of the trunk once, with its loss."""
    wanted = {line["step"]: line["loss"] for line in steps_of(folder) if line["phase"] == "trunk"}
    assert len(wanted) == 30
    loss = run.read("train/loss")
    at = loss.steps if name == "tensorboard" else [int(run.read("train/step").exactly(u) or 0) for u in loss.steps]
    assert dict(zip(at, loss.values, strict=True)) == pytest.approx(wanted, rel=1e-6), name
    assert {"train/lr", "rate/tokens_per_s", "train-val-curve/loss", "decay-2560-val-full/bpb"} <= set(run.tags)


@pytest.mark.slow
def test_a_killed_run_is_one_run_in_every_tracker_and_gives_the_lab_s_points(make_run: Any, tmp_path: Path) -> None:
    spec, folder = make_run(trackers=TRACKERS, checkpoint_every_steps=6)
    lab = tmp_path / "a"
    launch(folder, "killed")
    launch(folder)
    points, _ = read_runs(lab)
    for name, read in readers().items():
        runs = read(lab)
        check_trunk(name, the_run(runs, spec.run_id), folder)
        table = collect(name, runs, Reading())
        same_points(table.points, points)
        assert not table.excluded, name
        saved = tmp_path / f"{name}.csv"
        codec.write_text(saved, points_csv(table.points))
        assert read_points(saved).points == table.points
    check_stores(lab, spec, folder)


def check_stores(lab: Path, spec: RunSpec, folder: RunFolder) -> None:
    """In the stores themselves, not only as our readers join them: what was told once is not told again."""
    import mlflow

    from homelab_scaling.fit.from_trackers.mlflow_runs import ALLOW_FILES, _environment, store_uri
    from homelab_scaling.fit.from_trackers.wandb_runs import _read_segment

    with _environment(ALLOW_FILES):
        client = mlflow.MlflowClient(tracking_uri=store_uri(str(lab)))
        (experiment,) = [e for e in client.search_experiments() if e.name == spec.ladder]
        (run,) = client.search_runs([experiment.experiment_id])
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert run.info.status == "FINISHED" and len(steps) == len(set(steps)) == 30
    (path,) = (folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    segment = _read_segment(path)
    logged = [step for step, _ in segment.curves["train/loss"]]
    assert segment.exit_code == 0 and len(logged) == len(set(logged)) == 30


@pytest.mark.slow
def test_a_stopped_run_is_unfinished_and_a_tracker_added_later_gets_the_beginning(
    make_run: Any, tmp_path: Path
) -> None:
    spec, folder = make_run(trackers=("tensorboard", "wandb"))
    lab = tmp_path / "a"
    launch(folder, "stopped")
    (stopped,) = readers()["wandb"](lab)
    assert stopped.unfinished is not None and stopped.read("train/loss").steps == tuple(range(12))
    codec.write_json(folder.spec, replace(spec, execution=replace(spec.execution, trackers=TRACKERS)))
    launch(folder)
    for name, read in readers().items():
        run = the_run(read(lab), spec.run_id)
        assert run.unfinished is None
        check_trunk(name, run, folder)
    check_stores(lab, spec, folder)


def _train_with_hugging_face(top: str) -> None:
    """Two tiny GPT-2s by Hugging Face's Trainer with its own TensorBoard callback."""
    import warnings

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    warnings.simplefilter("ignore")
    rows = [{"input_ids": (x := torch.arange(i, i + 32) % 100), "labels": x} for i in range(16)]
    for width in (16, 32):
        os.environ["TENSORBOARD_LOGGING_DIR"] = f"{top}/logs/w{width}"
        config = GPT2Config(n_layer=1, n_embd=width, n_head=2, n_positions=32, vocab_size=100, bos_token_id=1,
                            eos_token_id=1)  # fmt: skip
        model = GPT2LMHeadModel(config)
        args = TrainingArguments(
            output_dir=f"{top}/out", max_steps=4, per_device_train_batch_size=8, eval_strategy="steps", eval_steps=2,
            logging_steps=1, report_to=["tensorboard"], use_cpu=True, save_strategy="no", disable_tqdm=True,
            include_num_input_tokens_seen="all",
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        said = {"n_params": model.num_parameters(), "n_tokens": trainer.state.num_input_tokens_seen}
        said["loss_nats"] = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1]
        codec.write_json(Path(top) / f"w{width}.json", said)


@pytest.mark.slow
def test_runs_of_hugging_face_s_trainer_as_they_are(tmp_path: Path) -> None:
    assert in_own_process(_train_with_hugging_face, str(tmp_path)) == 0
    table = collect("here", readers()["tensorboard"](tmp_path / "logs"), Reading())
    assert [p.row_id for p in table.points] == ["w16", "w32"] and not table.excluded
    for point in table.points:
        said = codec.read_plain_json(tmp_path / f"{point.row_id}.json")
        assert (point.n_params, point.n_tokens) == (said["n_params"], said["n_tokens"]) and point.n_tokens == 1024
        assert point.loss_nats == pytest.approx(said["loss_nats"], rel=1e-6)
