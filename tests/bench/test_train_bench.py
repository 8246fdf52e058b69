"""`homelab bench train`: every contestant trains, turns are interleaved, ratios are paired, the whole race works."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from homelab_scaling import cli
from homelab_scaling.bench import train, train_contestants, train_overheads, train_race
from homelab_scaling.bench.train_job import JobMaker
from homelab_scaling.errors import MachineError, UserError
from homelab_scaling.specs import ModelShape

NANOGPT = Path(__file__).parents[1] / "support" / "nanogpt"
SHAPE = ModelShape(n_layer=2, d_model=32, n_head=2, context_tokens=16)
NAMES = ["ours", "hf", "hf-trainer", "nanogpt"]


def maker(**changes: Any) -> JobMaker:
    given = {
        "precision": "fp32",
        "device": "cpu",
        "n_threads": 1,
        "compiles": False,
        "nanogpt": NANOGPT,
        "tokens_per_step": 128,
        "microbatch_seqs": 4,
        "n_vocab": 300,
    }
    return JobMaker(**(given | changes))


# ------------------------------------------------------------------------------------------------------ the contestants


def answers(name: str, folder: Path, orders: list[dict[str, Any]], monkeypatch) -> list[dict[str, Any]]:
    """What a contestant says to these orders, here in this process."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    job, _ = maker().write(folder, [name], SHAPE)[name]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)))
    said: list[dict[str, Any]] = []
    contestant = train_contestants.CONTESTANTS[name](job)
    contestant.race(train_contestants.referee(contestant, said.append))
    return said


@pytest.mark.parametrize("name", NAMES)
def test_every_contestant_takes_its_turns(name: str, tmp_path: Path, monkeypatch) -> None:
    orders = [{"do": "turn", "n_warm": 1, "n_steps": 3}, {"do": "parts", "n_steps": 2}]
    about, turn, parts = answers(name, tmp_path, orders, monkeypatch)
    assert about["about"]
    assert turn["wall_s"] > 0
    assert turn["cpu_s"] > 0
    assert turn["peak_bytes"] > 50e6
    if name == "hf-trainer":
        assert parts == {"step_s": None, "backbone_s": None}
    else:
        assert parts["backbone_s"] > 0
        assert parts["step_s"] > 0


def test_a_step_without_head_still_trains_the_blocks(tmp_path: Path) -> None:
    """Nothing but head and loss may be missing from it: the blocks and the embedding get gradients and an update."""
    job, _ = maker().write(tmp_path, ["hf"], SHAPE)["hf"]
    contestant = train_contestants.PlainHuggingFace(job)
    before = {name: p.detach().clone() for name, p in contestant.model.named_parameters()}
    contestant.backbone_step()
    moved = [name for name, p in contestant.model.named_parameters() if not torch.equal(p, before[name])]
    assert set(moved) == set(before)


def test_a_contestant_clips_and_averages_like_ours(tmp_path: Path, monkeypatch) -> None:
    """Two micro-batches of the plain loop give the gradient of the whole batch."""
    job, _ = maker().write(tmp_path, ["hf"], SHAPE)["hf"]
    contestant = train_contestants.PlainHuggingFace(job)
    assert contestant.accumulation == 2
    seen: list[torch.Tensor] = []
    real = contestant.micro_batch
    monkeypatch.setattr(contestant, "micro_batch", lambda: seen.append(batch := real()) or batch)
    monkeypatch.setattr(contestant, "_update", lambda: None)
    contestant.step()
    found = contestant.model.transformer.wpe.weight.grad.clone()
    contestant.optimizer.zero_grad()
    x = torch.cat([x for x, _ in seen])
    contestant.model(input_ids=x, labels=x).loss.backward()
    assert torch.allclose(found, contestant.model.transformer.wpe.weight.grad, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- the race


class Scripted:
    """A contestant that takes a second a step, or two, and writes down whose turn it was."""

    log: list[str]

    def __init__(self, name: str, path: Path, n_threads: int) -> None:
        self.name, self.about = name, ""
        self.step_s = {"ours": 1.0, "hf": 2.0, "hf-trainer": 2.5}[name]

    def answer(self) -> dict[str, Any]:
        return {"about": f"about {self.name}"}

    def ask(self, **order: Any) -> dict[str, Any]:
        if order["do"] == "parts":
            knows = self.name != "hf-trainer"
            return {"step_s": self.step_s if knows else None, "backbone_s": 0.25 if knows else None}
        self.log.append(self.name)
        seconds = order["n_steps"] * self.step_s
        return {"wall_s": seconds, "cpu_s": 2 * seconds, "peak_bytes": int(1e9 * self.step_s)}

    def end(self) -> None:
        self.log.append(f"end {self.name}")


def test_turns_alternate_and_ratios_are_ours_over_theirs(tmp_path: Path, monkeypatch) -> None:
    Scripted.log = []
    monkeypatch.setattr(train_race, "Racer", Scripted)
    names = ["ours", "hf"]
    jobs = maker().write(tmp_path, names, SHAPE)
    turns = train_race.race("toy", jobs, n_rounds=3, turn_s=10.0, say=lambda _: None)
    assert Scripted.log == [*names, "ours", "hf", "hf", "ours", "ours", "hf", "end ours", "end hf"]
    assert turns["ours"].n_steps == turns["hf"].n_steps == 5, "as many as the slowest takes in ten seconds"
    found = train._judge("toy", turns, jobs["ours"][0], peak=1e6)
    ours, hf = found.entries
    assert ours.tokens_per_s == (128.0,) * 3
    assert hf.tokens_per_s == (64.0,) * 3
    assert hf.tokens_per_cpu_s == (32.0,) * 3
    assert hf.ratio is not None
    assert hf.ratio.median == pytest.approx(2.0)
    assert (hf.ratio.low, hf.ratio.high) == (pytest.approx(2.0), pytest.approx(2.0))
    assert hf.peak_ratio == pytest.approx(0.5)
    assert (ours.head_loss_frac, hf.head_loss_frac) == (0.75, 0.875)
    assert ours.ratio is None
    assert ours.mfu is not None
    assert hf.mfu is not None
    assert ours.mfu == pytest.approx(2 * hf.mfu)


def test_the_trainers_share_of_head_and_loss_is_unknown(tmp_path: Path, monkeypatch) -> None:
    Scripted.log = []
    monkeypatch.setattr(train_race, "Racer", Scripted)
    jobs = maker().write(tmp_path, ["ours", "hf-trainer"], SHAPE)
    turns = train_race.race("toy", jobs, n_rounds=1, turn_s=1.0, say=lambda _: None)
    assert turns["hf-trainer"].head_loss_frac is None
    assert turns["ours"].n_steps == 1
    one = train._judge("toy", turns, jobs["ours"][0], peak=None).entries[1]
    assert one.ratio is not None
    assert one.ratio.low is None, "a single pair has no interval"
    assert one.mfu is None


def test_the_interval_is_students_of_the_mean_log_ratio() -> None:
    ratio = train.paired_ratio([2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    assert ratio.median == pytest.approx(4.0)
    half = 4.302652729911275 * math.log(2) / math.sqrt(3)
    assert ratio.low == pytest.approx(math.exp(math.log(4) - half))
    assert ratio.high == pytest.approx(math.exp(math.log(4) + half))


# ---------------------------------------------------------------------------------------------------------- the options


def test_shapes_are_layers_by_width_by_heads() -> None:
    assert train.parse_shape("6x256", 1024) == ModelShape(n_layer=6, d_model=256, n_head=4, context_tokens=1024)
    assert train.parse_shape("4x96", 256).n_head == 3
    assert train.parse_shape("6x320x5", 64).n_head == 5
    for wrong in ("6", "6x256x4x2", "six", "6x"):
        with pytest.raises(UserError, match="LAYERSxWIDTH"):
            train.parse_shape(wrong, 256)


def test_a_ladders_rungs_are_raced_at_its_context() -> None:
    shapes = train.shapes_of(train.TrainOptions(ladder="gpt2_5m_120m"))
    assert [name for name, _ in shapes] == ["5m", "12m", "24m", "51m", "124m"]
    assert {shape.context_tokens for _, shape in shapes} == {1024}
    assert shapes[-1][1].d_model == 768
    shorter = train.shapes_of(train.TrainOptions(ladder="gpt2_5m_120m", context=256))
    assert {shape.context_tokens for _, shape in shorter} == {256}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--shapes", "6"], "LAYERSxWIDTH"),
        (["--tokens-per-step", "100"], "multiple of 256"),
        (["--tokens-per-step", "1024", "--microbatch", "3"], "does not divide"),
        (["--nanogpt", "/nowhere"], "holds no model.py"),
        (["--only", "llama"], "knows ours"),
        (["--device", "cuda"], "no NVIDIA card"),
    ],
)
def test_bad_options_are_one_sentence(flags: list[str], says: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["bench", "train", *flags]) == 2
    said = capsys.readouterr().err
    assert says in said.splitlines()[-1]


def test_other_subjects_take_no_shapes(capsys) -> None:
    assert cli.main(["bench", "data", "--context", "64"]) == 2
    assert "are for train" in capsys.readouterr().err
    assert cli.main(["bench", "train_race"]) == 2
    assert "did you mean train" in capsys.readouterr().err


def test_a_contestant_that_dies_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise RuntimeError('not today')\n", encoding="utf-8")
    jobs = maker(nanogpt=tmp_path).write(tmp_path / "race", ["nanogpt"], SHAPE)
    with pytest.raises(MachineError, match=r"nanoGPT's model, compiled failed .*not today"):
        train_race.race("toy", jobs, n_rounds=1, turn_s=0.1, say=lambda _: None)


# ------------------------------------------------------------------------------------------------------------ overheads


def test_seams_inside_seams_count_once() -> None:
    class Run:
        def outer(self) -> None:
            self.inner()

        def inner(self) -> None:
            _burn(0.02)

    run, watch = Run(), train_overheads.Stopwatch()
    watch.around(run, "outer", "outer")
    watch.around(run, "inner", "inner")
    run.outer()
    assert watch.laps["inner"][0] >= 0.02
    assert watch.laps["outer"][0] < 0.015


def _burn(seconds: float) -> None:
    import time

    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_overheads_are_spread_at_a_rungs_cadence(tmp_path: Path) -> None:
    from homelab_scaling import codec
    from homelab_scaling.ladder import TrainTable, Validation
    from homelab_scaling.specs import RunSpec

    maker(n_vocab=300, microbatch_seqs=8).write(tmp_path, ["ours"], SHAPE)
    spec = codec.read_json(tmp_path / "spec.json", RunSpec)
    laps = {
        "batches": [0.001] * 5,
        "logging": [0.01] * 3,
        "validation": [1e-9],
        "checkpoints": [0.5, 0.7, 0.6],
        "orders": [0.0001] * (2 * train_overheads.N_STEPS),
        "writing": [2.0],
    }
    found = train_overheads.judge(
        {"step_s": 1.0, "laps": laps, "watched": False}, spec, Validation(), TrainTable(), "cpu"
    )
    shares = {one.name: one.share_frac for one in found.overheads}
    n_steps = 20 * found.n_params / 128
    assert shares["batches"] == pytest.approx(0.001, rel=0.02)
    assert shares["logging"] == pytest.approx(0.001, rel=0.02)
    assert shares["checkpoints"] == pytest.approx(0.6 * (n_steps / 600 + 1) / n_steps, rel=0.02)
    assert shares["orders"] == pytest.approx(0.0002, rel=0.02)
    assert found.whole_rung_s == pytest.approx(n_steps * 1.0, rel=0.01)
    assert "reached" in found.summary()
    assert "2.00 s beside training" in found.summary()


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.slow
def test_a_whole_race_in_processes(monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "missing_for_compile", lambda: ["a C++ compiler"])
    flags = ["--shapes", "1x32", "--context", "16", "--tokens-per-step", "64", "--threads", "1", "--turn-s", "0.05"]
    code = cli.main(["bench", "train", *flags, "--rounds", "2", "--nanogpt", str(NANOGPT), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    (shape,) = found["shapes"]
    assert [one["name"] for one in shape["entries"]] == NAMES
    ours, hf, _, _ = shape["entries"]
    assert len(hf["ratio"]["pairs"]) == 2
    assert hf["ratio"]["pairs"][0] == pytest.approx(ours["tokens_per_s"][0] / hf["tokens_per_s"][0])
    assert hf["peak_ratio"] == pytest.approx(ours["peak_bytes"] / hf["peak_bytes"])
    assert 0 < hf["head_loss_frac"] < 1
    assert found["why_no_mfu"]
    assert all(one["mfu"] is None for one in shape["entries"])


@pytest.mark.slow
def test_a_real_run_has_its_overheads_measured() -> None:
    found = train_overheads.measure(
        SHAPE,
        precision="fp32",
        device="cpu",
        device_name="cpu",
        batch_tokens=128,
        n_vocab=300,
        compile_it="off",
    )
    assert {one.name for one in found.overheads} == set(train_overheads.SEAMS)
    assert all(one.each_s > 0 for one in found.overheads)
    assert found.write_s is not None
    assert found.watched is False
