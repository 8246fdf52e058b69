"""A batch that starts small: the same text, the rate by the square root, doubled when the noise scale says so."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_of_memory import shorten
from toy_run import StopAt, kill_at, train_here, train_on_ranks

from homelab_scaling import codec
from homelab_scaling.errors import SpecError, Stopped
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import BatchWarmup
from homelab_scaling.train import loop
from homelab_scaling.train.batch_warmup import StepSplit, grows, split_step
from homelab_scaling.train.feed import Feed
from homelab_scaling.train.model import LanguageModel
from homelab_scaling.train.schedule import lr_at, phases

FULL = 128
"""Tokens of the toy's batch: 8 sequences."""
FROM_32 = BatchWarmup(from_tokens=32)


def lines_of(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    """Metrics of a kind; rates hold clock times."""
    return [line for line in codec.read_jsonl(folder.metrics) if line["kind"] == kind]


def batches_of(folder: RunFolder) -> list[int]:
    """The batch of each step, which is named only where it is not the full one."""
    return [line.get("batch_tokens", FULL) for line in lines_of(folder, "step")]


def events_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [e for e in codec.read_jsonl(folder.events) if e["kind"] == "batch"]


def weights_of(folder: RunFolder) -> dict[str, str]:
    return {e["row_id"]: e["weights_sha256"] for e in codec.read_jsonl(folder.events) if e["kind"] == "row"}


def test_the_batch_doubles_where_the_noise_scale_passes_and_the_rate_follows_the_root(make_run) -> None:
    spec, folder = make_run(horizons=(100,), batch_warmup=replace(FROM_32, grow_at=4.0), curve_every_tokens=None)
    train_here(spec, folder)
    steps, noise = lines_of(folder, "step"), lines_of(folder, "noise")
    assert [line["tokens"] for line in steps] == [FULL * n for n in range(1, 101)], "a step stays a full batch"
    batch, changes = 32, []
    by_step = {line["step"]: line for line in noise}
    for step, line in enumerate(steps):
        if step in by_step and batch < FULL:
            window = by_step[step]
            assert window["batch_tokens"] == batch and window["n_steps"] == 8 * FULL // batch
            found = window["noise_scale_tokens"] or window["noise_at_least_tokens"] or 0.0
            if found >= 4 * batch:
                batch *= 2
                changes.append((step, step * FULL, batch, window["noise_scale_tokens"]))
        assert line.get("batch_tokens", FULL) == batch
        phase = next(p for p in phases(spec.science) if p.start_step <= step < p.end_step)
        assert line["lr"] == pytest.approx(lr_at(spec.science, phase, step) * math.sqrt(batch / FULL))
    assert batch == FULL and len(changes) == 2 and changes[0][0] >= 8, "this run grows to its full batch, not at once"
    windows = [line["batch_tokens"] for line in noise if line["step"] <= changes[-1][0]]
    assert len(windows) > 2, "and not every window passes"
    assert [(e["step"], e["tokens"], e["batch_tokens"], e["noise_scale_tokens"]) for e in events_of(folder)] == changes


def test_a_threshold_out_of_reach_keeps_the_small_batch_and_takes_every_part_of_a_step(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, micro_batch = [], Feed.micro_batch

    def noted(self: Feed, step: int, micro: int, size: int) -> Any:
        x_BT, y_BT = micro_batch(self, step, micro, size)
        read.append((step, x_BT.clone()))
        return x_BT, y_BT

    monkeypatch.setattr(Feed, "micro_batch", noted)
    spec, folder = make_run(horizons=(20,), batch_warmup=BatchWarmup(from_tokens=32, grow_at=1e9))
    train_here(spec, folder)
    small = {n: torch.cat([x for step, x in read if step == n]) for n in range(20)}
    assert {len(x) for _, x in read} == {1}, "2 sequences are compared one with the other"
    read.clear()
    plain, full = make_run(lab="full", horizons=(20,))
    train_here(plain, full)
    for step in range(20):
        assert torch.equal(small[step], torch.cat([x for n, x in read if n == step])), "the same text in the same order"
    assert batches_of(folder) == [32] * 20 and events_of(folder) == [] and batches_of(full) == [FULL] * 20
    assert weights_of(folder) != weights_of(full)


def test_each_part_of_a_step_is_an_optimizer_update(make_run) -> None:
    spec, folder = make_run(batch_warmup=BatchWarmup(from_tokens=32, grow_at=1e9))
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(5)])
    states = load_file(folder.checkpoints / "u00000006" / "optim.safetensors")
    assert {int(t) for name, t in states.items() if name.endswith("/step")} == {6 * 4}


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_resume_in_the_middle_of_the_warm_up_is_exact(make_run, how: str) -> None:
    settings = {"horizons": (60, 90), "batch_warmup": FROM_32, "checkpoint_every_steps": 5}
    spec, whole = make_run(lab="whole", **settings)
    train_here(spec, whole)
    doubled = [e["update"] for e in events_of(whole)]
    assert len(doubled) == 2
    middle = (doubled[0] + doubled[1]) // 2 + 1
    spec, folder = make_run(lab="torn", **settings)
    if how == "killed":
        kill_at(folder, middle)
    else:
        ends = sorted({line["update"] for line in lines_of(whole, "rate")})
        with pytest.raises(Stopped):
            train_here(spec, folder, [StopAt(min(u for u in ends if u > doubled[0]) - 1)])
        assert events_of(folder) == [events_of(whole)[0] | {"time": events_of(folder)[0]["time"]}]
    train_here(spec, folder)
    for kind in ("step", "noise"):
        assert lines_of(folder, kind) == lines_of(whole, kind)
    assert weights_of(folder) == weights_of(whole)
    assert events_of(folder)[-1]["update"] == doubled[1]


def test_a_fork_returns_to_its_batch(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the batch grows in the first decay alone, so the trunk that is taken up after it must not have grown."""
    first = "decay@5120"
    spec, _ = make_run()
    schedule = replace(spec.science.schedule, decay_frac=0.4)
    spec, folder = make_run(
        lab="forked", horizons=(40, 60), schedule=schedule, batch_warmup=FROM_32, checkpoint_every_steps=None
    )
    monkeypatch.setattr(loop, "grows", lambda line, science, halvings: line["phase"] == first and line["step"] == 32)
    train_here(spec, folder)
    by_phase = {}
    for line in lines_of(folder, "step"):
        by_phase.setdefault((line["phase"], line["step"] >= 32), set()).add(line.get("batch_tokens", FULL))
    assert by_phase == {
        ("trunk", False): {32},
        (first, False): {32},
        (first, True): {64},
        ("trunk", True): {32},
        ("decay@7680", True): {32},
    }
    (event,) = events_of(folder)
    assert (event["step"], event["batch_tokens"]) == (32, 64)


def test_how_a_step_is_split(make_run) -> None:
    spec, _ = make_run(batch_tokens_global=64 * 16, horizons=(80,), batch_warmup=BatchWarmup(from_tokens=8 * 16))
    science = spec.science

    def split(halvings: int, ranks: int, micro: int) -> StepSplit:
        execution = replace(spec.execution, n_processes=ranks, microbatch_seqs_per_rank=micro)
        return split_step(science, execution, halvings)

    assert split(0, 1, 32) == StepSplit(n_updates=1, accumulation=2, microbatch_seqs=32)
    for ranks in (1, 2, 4):
        for halvings, size in ((3, 2), (2, 4), (1, 8)):
            found = split(halvings, ranks, 16)
            assert found.microbatch_seqs == size, "what is compared does not depend on ranks"
            assert found.accumulation * ranks == 4 and found.n_updates == 2**halvings
            assert found.lr_scale == pytest.approx(math.sqrt(1 / 2**halvings))
    assert split(1, 1, 4) == StepSplit(n_updates=2, accumulation=8, microbatch_seqs=4), "no more than memory holds"
    assert split(3, 8, 16) == StepSplit(n_updates=8, accumulation=1, microbatch_seqs=1)
    with pytest.raises(SpecError, match="8 sequences do not split over 16 ranks"):
        split(3, 16, 4)
    for tokens, wrong in ((16, "wants 2 sequences or more"), (24 * 16, "reach the full batch by doubling")):
        with pytest.raises(SpecError, match=wrong):
            replace(science, batch_warmup=BatchWarmup(from_tokens=tokens))


@pytest.mark.parametrize(
    ("value", "at_least", "wanted"),
    [(63.0, None, False), (64.0, None, True), (None, 64.0, True), (None, 63.0, False), (None, None, False)],
)
def test_when_a_batch_grows(make_run, value: float | None, at_least: float | None, wanted: bool) -> None:
    spec, _ = make_run(batch_warmup=FROM_32)
    line = {"noise_scale_tokens": value, "noise_at_least_tokens": at_least}
    assert grows(line, spec.science, 2) is wanted
    assert not grows(line, spec.science, 1) and not grows({**line, "noise_scale_tokens": 1e9}, spec.science, 0)


def test_memory_that_runs_out_in_the_warm_up_repeats_no_update(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates a step, of four passes each; memory ends in the second update of a step."""
    settings = {
        "horizons": (24,),
        "batch_tokens_global": 2 * FULL,
        "batch_warmup": BatchWarmup(from_tokens=FULL, grow_at=1e9),
        "curve_every_tokens": None,
        "checkpoint_every_steps": 2,
    }
    spec, whole = make_run(lab="whole", **settings)
    train_here(spec, whole)
    monkeypatch.setattr(LanguageModel, "forward", shorten(LanguageModel.forward, fits=1, at_call=2 * 4 * 3 + 6))
    spec, folder = make_run(lab="short", **settings)
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(9)])
    states = load_file(folder.checkpoints / "u00000010" / "optim.safetensors")
    assert {int(t) for name, t in states.items() if name.endswith("/step")} == {10 * 2}
    train_here(spec, folder)
    losses = [[x["loss"] for x in lines_of(one, "step")] for one in (folder, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != losses[1]
    raw = [(x["k"], x["microbatch_seqs"]) for x in codec.read_jsonl(folder.path / "noise.jsonl")]
    assert raw == [(4, 2)] * 7 + [(8, 1)] * 9, "8 steps of 2 updates"


class Compiled:
    """A backend that compiles nothing and remembers the sizes of the batches that it was asked to compile for."""

    def __init__(self) -> None:
        self.sizes: list[Any] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Any:
        tokens = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64]
        self.sizes += [x.shape[0] for x in tokens] + [x for x in inputs if isinstance(x, torch.SymInt)]
        return graph.forward

    def install(self, model: LanguageModel, mode: str = "default") -> None:
        model._compiled_backbone = torch.compile(model._hidden_states, backend=self)


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals
def test_a_compiled_model_is_compiled_once_for_each_size_and_for_no_measurement(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Compiled()
    monkeypatch.setattr(LanguageModel, "compile_in_place", lambda self, mode="default": compiled.install(self, mode))
    torch._dynamo.reset()
    settings = {"horizons": (48,), "compile": "on", "microbatch_seqs_per_rank": 8, "noise_every_steps": 2}
    spec, folder = make_run(lab="single", **settings, curve_every_tokens=None)
    train_here(spec, folder)
    assert [(x["k"], x["microbatch_seqs"]) for x in lines_of(folder, "noise")] == [(2, 4)] * 2
    assert set(compiled.sizes) == {8}, "both halves of a measured micro-batch are filled up to its size"
    compiled.sizes.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(loop, "grows", lambda line, science, halvings: True)
    spec, folder = make_run(lab="warmed", **settings, batch_warmup=FROM_32)
    train_here(spec, folder)
    assert batches_of(folder) == [32] * 8 + [64] * 8 + [FULL] * 32
    assert all(isinstance(size, int) for size in compiled.sizes), "never for any size"
    assert [size for size, _ in itertools.groupby(compiled.sizes)] == [1, 8], "1 sequence a pass, then all 8"


@pytest.mark.slow
def test_two_ranks_double_where_one_does(make_run) -> None:
    settings = {"horizons": (40,), "batch_warmup": BatchWarmup(from_tokens=64), "curve_every_tokens": None}
    spec, alone = make_run(lab="one", **settings)
    train_here(spec, alone)
    spec, folder = make_run(lab="two", n_processes=2, **settings)
    train_on_ranks(folder, 2)
    assert batches_of(folder) == batches_of(alone)
    assert len(events_of(folder)) == len(events_of(alone)) == 1, "told by one rank"
    key = "noise_scale_tokens"
    assert events_of(folder)[0][key] == pytest.approx(events_of(alone)[0][key], rel=1e-2)
    for kind in ("loss", "grad_norm", "lr"):
        one, two = ([line[kind] for line in lines_of(f, "step")] for f in (alone, folder))
        assert two == pytest.approx(one, rel=1e-3)
