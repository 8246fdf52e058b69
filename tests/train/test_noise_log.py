"""The noise scale of ordinary runs: as separate backward passes give it, once, whatever happens, and at no cost off."""

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from noise_ranks import norms_by_separate_passes
from torch import nn
from toy_run import CONTEXT, StopAt, kill_at, steps_of, train_here, train_on_ranks

from homelab_scaling import codec
from homelab_scaling.batch.estimator import NoiseMeasurement, noise_scale
from homelab_scaling.batch.noise import NoiseHook
from homelab_scaling.errors import DataError, RunFailed, SpecError, Stopped
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import ModelShape, Optim, Schedule, ScienceSpec, make_run_id
from homelab_scaling.train.loop import Trainer
from homelab_scaling.train.model import LanguageModel
from homelab_scaling.train.noise_log import NoiseLog, said_of
from homelab_scaling.train.noise_windows import run_windows, warmup_windows
from homelab_scaling.train.passes import Passes
from homelab_scaling.train.schedule import Phase, phases


def noise_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in codec.read_jsonl(folder.metrics) if line["kind"] == "noise"]


def weights_of(folder: RunFolder) -> dict[str, str]:
    return {e["row_id"]: e["weights_sha256"] for e in codec.read_jsonl(folder.events) if e["kind"] == "row"}


@pytest.mark.parametrize(("microbatch", "k"), [(4, 2), (2, 4), (8, 2)])
def test_a_window_gives_what_separate_passes_over_its_batches_give(
    make_run, monkeypatch: pytest.MonkeyPatch, microbatch: int, k: int
) -> None:
    """Micro-batches of 8 are the whole update, which is cut in two."""
    spec, folder = make_run(horizons=(48,), microbatch_seqs_per_rank=microbatch, noise_every_steps=2)
    gradients, seen = Trainer.gradients, {}

    def both(self: Trainer, part: int = 0, *, listen: bool = False) -> Any:
        if listen:
            size = 8 // k
            parts = [self.feed.micro_batch(self.step, micro, size) for micro in range(k)]
            batches = [with_target(x, y) for x, y in parts]
            q, of_mean = norms_by_separate_passes(self.model, batches)
            seen[self.step] = NoiseMeasurement(k=k, microbatch_seqs=size, mean_sq_norm=q, sq_norm_of_mean=of_mean)
        return gradients(self, part, listen=listen)

    monkeypatch.setattr(Trainer, "gradients", both)
    train_here(spec, folder)
    losses = {line["step"]: line["loss"] for line in steps_of(folder)}
    lines = noise_of(folder)
    # 48 steps, the last 12 a decay that is too short for 8 measuring steps.
    assert [(x["phase"], x["update"], x["step"], x["tokens"]) for x in lines] == [
        ("trunk", 16, 16, 16 * 128),
        ("trunk", 36, 36, 36 * 128),
    ]
    assert list(seen) == list(range(0, 36, 2)), "what is heard is what the windows use"
    for line, steps in zip(lines, (range(0, 16, 2), range(16, 36, 2)), strict=True):
        wanted = noise_scale(
            [seen[step] for step in steps], context_tokens=CONTEXT, loss_nats=1.0, tokens_trained=1, n_params=1
        )
        assert (line["n_steps"], line["k"], line["microbatch_seqs"]) == (len(steps), k, 8 // k)
        assert line["loss"] == pytest.approx(sum(losses[step] for step in steps) / len(steps))
        assert line["batch_tokens"] == 128 and line["why"] == wanted.why_no_number
        for key, value in zip(
            ("noise_scale_tokens", "noise_low_tokens", "noise_high_tokens"),
            (wanted.b_simple_tokens, *(wanted.ci95_tokens or (None, None))),
            strict=True,
        ):
            assert line[key] == (None if value is None else pytest.approx(value, rel=1e-3))
    assert any(line["noise_scale_tokens"] is not None for line in lines)


def with_target(x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """Inputs and targets as the one (B, T + 1) tensor they came from."""
    return torch.cat([x_BT, y_BT[:, -1:]], dim=1)


def test_measuring_changes_no_weight_and_off_hears_nothing(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, measured = make_run(lab="measured", noise_every_steps=1)
    train_here(spec, measured)
    assert noise_of(measured)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a hook, though nothing is measured")

    monkeypatch.setattr(NoiseHook, "__init__", forbidden)
    spec, off = make_run(lab="off")
    train_here(spec, off)
    assert weights_of(off) == weights_of(measured) and steps_of(off) == steps_of(measured)
    assert noise_of(off) == [] and not (off.path / "noise.jsonl").exists()


def test_an_update_that_is_cut_to_be_measured_trains_as_one_that_is_not(make_run) -> None:
    spec, whole = make_run(lab="whole", horizons=(24,), microbatch_seqs_per_rank=8)
    train_here(spec, whole)
    spec, cut = make_run(lab="cut", horizons=(24,), microbatch_seqs_per_rank=8, noise_every_steps=1)
    train_here(spec, cut)
    assert noise_of(cut)
    for key in ("loss", "grad_norm"):
        one, two = ([line[key] for line in steps_of(folder)] for folder in (whole, cut))
        assert two == pytest.approx(one, rel=1e-4) and two != one, "low-order bits only"


def test_only_measuring_steps_are_heard(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = make_run(horizons=(48,), noise_every_steps=3)
    heard, backward = [], Passes.backward

    def counted(self: Passes, step: int, part: int, split: Any, noise: Any) -> Any:
        heard.extend([step] if noise is not None else [])
        return backward(self, step, part, split, noise)

    monkeypatch.setattr(Passes, "backward", counted)
    train_here(spec, folder)
    assert heard == list(range(0, 36, 3)), "36 steps of trunk are one window of 12; the decay of 12 has none"
    assert [line["n_steps"] for line in noise_of(folder)] == [12]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_an_interrupted_window_is_neither_lost_nor_counted_twice(make_run, how: str) -> None:
    settings = {"horizons": (40, 64), "noise_every_steps": 1, "log_every_steps": 5, "checkpoint_every_steps": 6}
    spec, whole = make_run(lab="whole", **settings)
    train_here(spec, whole)
    wanted = noise_of(whole)
    assert [line["phase"] for line in wanted].count("trunk") >= 4 and {"decay@5120", "decay@8192"} <= {
        line["phase"] for line in wanted
    }
    spec, folder = make_run(lab="torn", **settings)
    if how == "killed":
        kill_at(folder, 21)  # the last checkpoint is of update 18, three measurements of a window are on disk beyond
    else:
        for update in (19, 35):  # inside a window of the trunk, and inside the decay's only one
            with pytest.raises(Stopped):
                train_here(spec, folder, [StopAt(update)])
    train_here(spec, folder)
    assert noise_of(folder) == wanted
    raw = codec.read_jsonl(folder.path / "noise.jsonl")
    assert raw == codec.read_jsonl(whole.path / "noise.jsonl")
    updates = [line["update"] for line in raw]
    assert updates == sorted(set(updates)) and len(updates) == sum(line["n_steps"] for line in wanted)
    assert weights_of(folder) == weights_of(whole)


def test_a_run_that_diverges_says_so_as_if_nothing_were_measured(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = make_run(noise_every_steps=1)
    forward, calls = LanguageModel.forward, []

    def poisoned(self: Any, x_BT: Any, y_BT: Any) -> Any:
        calls.append(1)
        loss = forward(self, x_BT, y_BT)
        return loss * math.nan if len(calls) == 2 * 10 + 1 else loss

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
    with pytest.raises(RunFailed, match="non-finite at step 10"):
        train_here(spec, folder)
    record = folder.read_record()
    assert record is not None and record.status == "diverged" and record.reason is not None
    assert "lower this rung's learning rate" in record.reason and "\n" not in record.reason
    assert all(math.isfinite(line["mean_sq_norm"]) for line in codec.read_jsonl(folder.path / "noise.jsonl"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_trackers_draw_the_noise_scale_with_its_interval(make_run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec, folder = make_run(horizons=(48,), trackers=("tensorboard",), noise_every_steps=1)
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(31)])
    train_here(spec, folder)
    events = EventAccumulator(str(folder.tensorboard / "toy"), size_guidance={"scalars": 0})
    events.Reload()
    for key in ("noise_scale_tokens", "noise_low_tokens", "noise_high_tokens"):
        drawn = {e.step: e.value for e in events.Scalars(f"train-noise/{key}")}
        wanted = {x["step"]: x[key] for x in noise_of(folder) if x["phase"] == "trunk" and x[key] is not None}
        assert drawn == pytest.approx(wanted) and drawn
    assert "train-noise/k" not in events.Tags()["scalars"]


def test_what_cannot_be_measured_is_refused_or_said(make_run) -> None:
    spec, folder = make_run(noise_every_steps=1)
    one = replace(spec.science, batch_tokens_global=16, schedule=replace(spec.science.schedule, warmup_tokens=16))
    execution = replace(spec.execution, microbatch_seqs_per_rank=1)
    single = replace(spec, run_id=make_run_id("toy", one), science=one, execution=execution)
    with pytest.raises(DataError, match="found 1 micro-batch of 1 sequence an update"):
        train_here(single, folder)
    sharded = replace(spec, execution=replace(spec.execution, sharding="full", noise_every_steps=None))
    assert "off: found sharded parameters (FSDP)" in said_of(sharded, compiled=False)
    assert said_of(spec, compiled=False) == "every 1 updates, as trained"
    whole = replace(spec, execution=replace(spec.execution, microbatch_seqs_per_rank=8))
    assert "in 2 parts, each 2 times over" in said_of(whole, compiled=True)


def test_a_sharded_model_is_refused_where_measuring_is_asked_for(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs a process group to be made."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    monkeypatch.setattr(Accelerator, "prepare", lambda self, model: FullyShardedDataParallel(model))
    spec, folder = make_run(noise_every_steps=1)
    with pytest.raises(SpecError, match="measure the noise scale under DDP or on one card"):
        train_here(spec, folder)


@given(
    n_steps=st.integers(8, 20_000), every=st.integers(1, 80), decay=st.floats(0.05, 0.5), shorter=st.floats(0.1, 0.9)
)
@settings(derandomize=True, deadline=None)
def test_windows_are_whole_disjoint_and_about_twenty(n_steps: int, every: int, decay: float, shorter: float) -> None:
    science = toy_science(n_steps, decay, shorter)
    n_windows = 0
    for phase in phases(science):
        windows = run_windows(science, phase, every)
        n_windows += len(windows)
        assert bool(windows) == (phase.n_updates >= 8 * every)
        assert all(len(w.steps) >= 8 for w in windows)
        ends = [phase.start_step, *(w.end_step for w in windows)]
        assert [w.first_step for w in windows] == ends[:-1] and ends[-1] <= phase.end_step
        assert not windows or phase.end_step - ends[-1] < every, "only what measures nothing is left over"
        assert run_windows(science, phase, None) == ()
    assert n_windows <= 40


def toy_science(n_steps: int, decay: float, shorter: float) -> ScienceSpec:
    horizons = sorted({max(1, round(shorter * n_steps)), n_steps})
    return ScienceSpec(
        shape=ModelShape(n_layer=1, d_model=8, n_head=1, context_tokens=8),
        n_vocab=9,
        tokenizer_hash="t",
        train_fingerprint="a",
        val_fingerprint="b",
        horizons_tokens=tuple(16 * n for n in horizons),
        batch_tokens_global=16,
        schedule=Schedule(name="wsd", lr_peak=0.1, warmup_tokens=0, decay_frac=decay, lr_final_frac=0.0),
        optim=Optim(),
        precision="fp32",
        seed=0,
        val_tokens=8,
    )


def test_warm_up_windows_follow_one_another_and_then_thin_out() -> None:
    def phase(start: int, end: int) -> Phase:
        return Phase(index=0, kind="trunk", first_update=0, start_step=start, end_step=end, horizon_tokens=1)

    windows = warmup_windows(phase(0, 100_000))
    assert [w.first_step for w in windows[:11]] == list(range(0, 88, 8))
    assert all(w.every == 1 and len(w.steps) == 8 for w in windows)
    gaps = [b.first_step / max(1, a.first_step) for a, b in itertools.pairwise(windows[10:])]
    assert all(1.09 < g < 1.13 for g in gaps) and len(windows) < 100
    later = warmup_windows(phase(50, 400))
    assert later == tuple(w for w in windows if w.first_step >= 50 and w.end_step <= 400), "whatever phase it is in"


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [2, 4])
def test_two_launched_ranks_write_the_lines_of_one(make_run, microbatch: int) -> None:
    """At 4 an update is one pass of each rank, so that DDP takes its graph for static."""
    settings = {"horizons": (32,), "noise_every_steps": 1, "log_every_steps": 8, "curve_every_tokens": None}
    spec, alone = make_run(lab="one", microbatch_seqs_per_rank=microbatch, **settings)
    train_here(spec, alone)
    spec, folder = make_run(lab="two", microbatch_seqs_per_rank=microbatch, n_processes=2, **settings)
    train_on_ranks(folder, 2)
    one, two = noise_of(alone), noise_of(folder)
    assert len(one) == len(two) >= 2
    for a, b in zip(one, two, strict=True):
        for key in ("update", "step", "n_steps", "k", "microbatch_seqs"):
            assert a[key] == b[key]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    raw = [codec.read_jsonl(f.path / "noise.jsonl") for f in (alone, folder)]
    assert len(raw[0]) == len(raw[1]), "written once, by one rank"
    for a, b in zip(*raw, strict=True):
        assert b["mean_sq_norm"] == pytest.approx(a["mean_sq_norm"], rel=2e-2), json.dumps([a, b])
        assert b["sq_norm_of_mean"] == pytest.approx(a["sq_norm_of_mean"], rel=2e-2)


def test_a_kill_while_measurements_are_taken_up_loses_none(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder = make_run()
    path = folder.path / "noise.jsonl"
    codec.append_jsonl(path, [{"update": update} for update in (1, 2, 9)])

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    log = NoiseLog(spec.science, path, hook=None, windows=lambda phase, halvings: (), is_main=True)
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr(codec, "append_jsonl", killed)
        dying.setattr(codec.os, "replace", killed)
        log.take_up(5, lambda: None)
    assert len(codec.read_jsonl(path)) == 3
    log.take_up(5, lambda: None)
    assert codec.read_jsonl(path) == log.lines == [{"update": 1}, {"update": 2}]
