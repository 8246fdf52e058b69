"""Runs of other trainings as points: read as their trackers store them, refused in one sentence, nothing silent."""

import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_runs import (
    NANOGPT_SHAPES,
    SIZES,
    descent,
    law,
    nanogpt_config,
    nanogpt_rows,
    plant_events,
    plant_ladder,
    plant_wandb,
    write_records,
)

from homelab_scaling.errors import DataError
from homelab_scaling.fit.from_trackers.collect import Reading, collect
from homelab_scaling.fit.from_trackers.guess import count_gpt2, looks_like_loss
from homelab_scaling.fit.from_trackers.tensorboard_runs import read_tensorboard
from homelab_scaling.fit.from_trackers.tracked import as_number, make_series
from homelab_scaling.fit.from_trackers.wandb_file import read_records
from homelab_scaling.fit.points import PointTable, read_points
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.specs import ModelShape

EAGER = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 500}


def taken(top: Path, **reading: Any) -> PointTable:
    return collect("here", read_tensorboard(top), Reading(**reading))


def reasons(table: PointTable) -> dict[str, str]:
    return {gone.row_id: gone.reason for gone in table.excluded}


# ------------------------------------------------------------------------------------------------------- TensorBoard


def test_runs_with_usual_names_need_no_flag(tmp_path: Path, homelab: Callable[..., Any]) -> None:
    sizes = plant_ladder(tmp_path / "logs")
    table = taken(tmp_path / "logs")
    assert [(p.n_params, p.n_tokens) for p in table.points] == sizes
    assert [p.loss_nats for p in table.points] == pytest.approx([law(n, d) for n, d in sizes], abs=1e-6)
    assert [p.seed for p in table.points] == list(range(5)) and table.points[0].row_id == "run-0"
    assert not table.excluded
    assert "loss_nats: the last value of val/loss" in table.notes
    assert (
        "n_tokens: train/tokens at that step" in table.notes
        and "n_params: n_params of the configuration" in table.notes
    )

    saved = tmp_path / "points.csv"
    flags = ("--law", "power-n", "--bootstrap", 0)
    said = homelab("fit", "--from-tensorboard", tmp_path / "logs", "--save-points", saved, *flags)
    assert said.code == 0, said.err
    page = " ".join(said.out.split())  # where its lines break depends on the length of the folder's name
    assert "note: loss_nats: the last value of val/loss" in page and "5 points from 5 runs" in page
    assert read_points(saved).points == table.points
    again = homelab("fit", saved, *flags, "--json")
    assert json.loads(again.out)["n_points"] == 5


def test_the_lowest_value_is_said_to_be_biased_and_takes_its_own_tokens(tmp_path: Path) -> None:
    for index, (n, d) in enumerate(SIZES):
        loss, tokens = descent(n, d)
        rising = [*loss[:2], (loss[1][0] + 1, 1.0 + index / 10), loss[2]]
        plant_events(tmp_path / str(index), {"val/loss": rising, "tokens_seen": tokens}, hparams={"n_params": n})
    table = taken(tmp_path, loss_at="min")
    assert [p.loss_nats for p in table.points] == pytest.approx([1 + i / 10 for i in range(5)])
    assert [p.n_tokens for p in table.points] == [d / 2 for _, d in SIZES], "tokens at that step, not at the end"
    assert any("biased low" in note for note in table.notes)
    assert taken(tmp_path).points[0].loss_nats == pytest.approx(law(*SIZES[0]))


@pytest.mark.parametrize("tokens", ["curve", "flag"])
def test_hugging_face_s_trainer(tmp_path: Path, tokens: str) -> None:
    """Its texts hold the configuration; its steps are optimizer steps; its tokens are logged where that was asked."""
    for index, n_embd in enumerate((64, 128, 256)):
        loss = [(50, 5.0), (100, 4.0 - index / 10)]
        curves = {"eval/loss": loss, "train/loss": loss, "train/train_loss": [(100, 4.4)], "eval/runtime": loss}
        if tokens == "curve":
            curves["train/num_input_tokens_seen"] = [(100, 819_200.0)]
        texts = {
            "args": json.dumps({"seed": 40 + index, "per_device_train_batch_size": 8, "output_dir": "x{y}"}),
            "model_config": json.dumps({**GPT2, "n_embd": n_embd, "n_inner": None, "task": {"a": 1}}),
        }
        plant_events(tmp_path / f"r{index}", curves, texts=texts)
    table = taken(tmp_path, tokens_per_step=8192.0 if tokens == "flag" else None)
    shapes = [ModelShape(n_layer=2, d_model=d, n_head=4, context_tokens=128) for d in (64, 128, 256)]
    assert [p.n_params for p in table.points] == [count_params(shape, 500).n_params for shape in shapes]
    assert [(p.n_tokens, p.seed) for p in table.points] == [(819_200, 40), (819_200, 41), (819_200, 42)]
    assert [p.flops for p in table.points] == [flops_per_token(shape, 500) * 819_200 for shape in shapes]
    assert [p.n_head for p in table.points] == [500 * d for d in (64, 128, 256)], "not its 4 heads"
    if tokens == "flag":
        assert "n_tokens: the step axis x 8,192 tokens" in table.notes
    else:
        assert reasons(taken(tmp_path, n_vocab=499)) == {} and taken(tmp_path, n_vocab=499).points[0].n_params == (
            table.points[0].n_params - 64
        )


def test_part_of_the_runs_counted_leaves_one_convention_of_compute(tmp_path: Path) -> None:
    for index in range(3):
        hparams = {"n_params": 1e6} if index == 2 else GPT2
        curves = {"val/loss": [(10, 4.0 - index)], "tokens": [(10, 1e6 * (index + 1))]}
        plant_events(tmp_path / str(index), curves, hparams=hparams)
    table = taken(tmp_path)
    assert [p.flops for p in table.points] == [None] * 3 and [p.n_body for p in table.points] == [None] * 3
    assert not any(note.startswith("flops") for note in table.notes)
    assert all(p.flops for p in taken(tmp_path, where={"n_layer": "2"}).points)


def test_our_own_folders_give_a_point_per_decay(tmp_path: Path) -> None:
    facts = {"run_id": "a-1", "n_params": 5000, "data_id": "t", "family": "gpt2", "schedule": "wsd", "seed": 3}
    begun = {"start": "hf:gpt2"}
    curves = {
        "train/loss": [(i, 3.0) for i in range(9)],
        "train-val-curve/loss": [(4, 3.3), (8, 3.2)],
        **{f"decay-{d}-val-full/{what}": [(s, v)] for d, s, v0 in ((2560, 5, 3.1), (5120, 9, 2.9)) for what, v in
           (("loss", v0), ("loss_se", 0.01), ("bpb", v0 / 2))},
    }  # fmt: skip
    plant_events(tmp_path / "lab/runs/a-1/tensorboard/lab", curves, hparams=facts)
    plant_events(tmp_path / "lab/runs/b-2/tensorboard/lab", {"train/loss": [(1, 3.0)]}, hparams={"n_params": 9000})
    cosine = {"train-val-full/loss": [(30, 2.7)], "train-val-full/bpb": [(30, 1.4)]}
    plant_events(
        tmp_path / "lab/runs/c-3/tensorboard/lab",
        cosine,
        hparams={**facts, **begun, "run_id": "c-3", "schedule": "cosine", "batch_tokens_global": 128},
    )
    table = taken(tmp_path / "lab")
    assert [(p.row_id, p.n_tokens) for p in table.points] == [("a-1@2560", 2560), ("a-1@5120", 5120), ("c-3", 3840)]
    assert table.points[0].loss_nats == pytest.approx(3.1) and table.points[0].loss_se_nats == pytest.approx(0.01)
    assert {p.run_id for p in table.points[:2]} == {"a-1"} and all(p.decayed for p in table.points)
    assert [p.start for p in table.points] == [None, None, "hf:gpt2"], "such tokens are not a law's"
    assert reasons(table) == {"b-2": "no full validation at the end of a decay; its curves are train/loss"}


def test_our_folders_from_before_hyperparameters_have_their_spec_beside_them(tmp_path: Path) -> None:
    from toy_run import make_toy_run, write_shards

    manifest = write_shards(tmp_path / "shards")
    spec, folder = make_toy_run(tmp_path, manifest)
    plant_events(folder.tensorboard / "toy", {"decay-2560-val-full/loss": [(20, 3.0)]})
    (point,) = taken(tmp_path / "a").points
    assert (point.row_id, point.n_tokens, point.seed) == (f"{spec.run_id}@2560", 2560, 1)
    assert point.n_params == count_params(spec.science.shape, spec.science.n_vocab).n_params
    assert point.data_id == manifest.data_id
    (folder.spec).write_text("{torn")
    assert "no n_params" in reasons(taken(tmp_path / "a"))[spec.run_id]


def test_sizes_from_names_and_from_a_table(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    for size in ("10M", "25M", "0.1B"):
        plant_events(logs / f"owt-{size}-run", {"valid_loss": [(100, 3.0 + 1 / float(size[:-1]))]})
    table = taken(logs, columns={"n_params": r"name:owt-([\d.]+[MB])"}, tokens_per_step=1e4)
    assert sorted(p.n_params for p in table.points) == [1e7, 2.5e7, 1e8]
    csv = tmp_path / "runs.csv"
    csv.write_text("run,n_params,n_tokens,kwh\nowt-10M-run,10e6,1e9,0.5\nowt-25M-run,25M,2e9,\nnowhere,1,1,1\n")
    table = taken(logs, table=csv)
    assert [(p.n_params, p.n_tokens, p.kwh) for p in table.points] == [(1e7, 1e9, 0.5), (2.5e7, 2e9, None)]
    assert "no n_params: nothing called so" in reasons(table)["owt-0.1B-run"]
    assert any("no run here is called nowhere" in note for note in table.notes), "a misspelt name is not silent"


def test_where_chooses_by_configuration_and_name(tmp_path: Path) -> None:
    plant_ladder(tmp_path)
    assert [p.row_id for p in taken(tmp_path, where={"seed": "3"}).points] == ["run-3"]
    assert [p.row_id for p in taken(tmp_path, where={"run": "run-2"}).points] == ["run-2"]


def test_what_a_run_lacks_is_its_reason(tmp_path: Path) -> None:
    plant_ladder(tmp_path)
    good = {"n_params": 5e6}
    curve = {"tokens": [(9, 1e7)]}
    plant_events(tmp_path / "no-loss", {"train/loss": [(9, 3.0)], **curve}, hparams=good)
    plant_events(tmp_path / "nan", {"val/loss": [(8, 3.0), (9, math.nan)], **curve}, hparams=good)
    plant_events(tmp_path / "no-tokens", {"val/loss": [(9, 3.0)]}, hparams=good)
    plant_events(tmp_path / "start", {"val/loss": [(0, 3.0)]}, hparams={**good, "tokens_per_step": 100})
    plant_events(tmp_path / "llama", {"val/loss": [(9, 3.0)], **curve}, hparams={"model_type": "llama"})
    plant_events(tmp_path / "no-vocab", {"val/loss": [(9, 3.0)], **curve},
                 hparams={"n_layer": 2, "n_embd": 64, "block_size": 128})  # fmt: skip
    plant_events(tmp_path / "negative", {"val/loss": [(9, -3.0)], **curve}, hparams=good)
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "events.out.tfevents.1.x").write_bytes(b"not an event file at all" * 20)
    table = taken(tmp_path)
    assert len(table.points) == 5
    said = reasons(table)
    wanted = {
        "no-loss": "no val/loss; its curves are tokens, train/loss",
        "nan": "loss_nats is 'nan' (the last value of val/loss), wants a finite number",
        "no-tokens": "no n_tokens: neither a curve nor its configuration",
        "start": "its loss was measured at step 0",
        "llama": "model_type llama is not counted here",
        "no-vocab": "no vocab_size to count its embeddings with; add --n-vocab",
        "negative": "loss_nats is -3 (the last value of val/loss), wants a number above 0",
        "garbage": "no val/loss; its curves are none",
    }
    assert set(said) == set(wanted)
    assert {name: part for name, part in wanted.items() if part not in said[name]} == {}
    assert len(taken(tmp_path, n_vocab=500).points) == 6


def test_hyperparameters_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """torch's add_hparams writes them below the run, in a folder named after the clock."""
    for index in range(2):
        plant_events(tmp_path / f"r{index}", {"val/loss": [(9, 3.0 - index)], "tokens": [(9, 1e6)]})
        plant_events(tmp_path / f"r{index}" / "1700000000.5", {"hparam/x": [(0, 1.0)]}, hparams={"n_params": 1e6})
    table = taken(tmp_path)
    assert [p.row_id for p in table.points] == ["r0", "r1"] and not table.excluded
    assert table.points[0].n_params == 1e6


def test_scalars_as_tensorflow_2_and_jax_write_them(tmp_path: Path) -> None:
    curves = {"val/loss": [(1, 4.0), (2, 3.5)], "tokens": [(1, 1e6), (2, 2e6)]}
    plant_events(tmp_path / "r", curves, hparams={"n_params": 1e6}, as_tensors=True)
    (point,) = taken(tmp_path).points
    assert (point.loss_nats, point.n_tokens) == (3.5, 2e6)


def test_a_long_curve_is_not_thinned(tmp_path: Path) -> None:
    """TensorBoard's reader keeps a sample of 10,000 unless told otherwise, and the lowest value would be lost."""
    curve = [(i, 2.0 if i == 7 else 3.0) for i in range(10_500)]
    plant_events(tmp_path / "r", {"val/loss": curve}, hparams={"n_params": 1e6})
    (point,) = taken(tmp_path, loss_at="min", tokens_per_step=10.0).points
    assert (point.loss_nats, point.n_tokens) == (2.0, 70)


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    """What the second launch computed again replaces what the first had written past its checkpoint."""
    first = [(1, 4.0), (2, 3.0), (3, 2.9), (4, 2.8)]
    plant_events(tmp_path / "r", {"val/loss": first}, hparams={"n_params": 1e6}, suffix=".a", wall_time=1.0)
    plant_events(tmp_path / "r", {"val/loss": [(3, 2.5)]}, suffix=".b", wall_time=2.0)
    (run,) = read_tensorboard(tmp_path)
    assert run.read("val/loss").steps == (1, 2, 3, 4) and run.read("val/loss").exactly(3) == 2.5


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_event_file_gives_what_was_written(tmp_path: Path, cut: int) -> None:
    curve = [(i, 10.0 - i) for i in range(9)]
    path = plant_events(tmp_path / "r", {"tokens": [(0, 1e6)], "val/loss": curve}, hparams={"n_params": 1e6})
    path.write_bytes(path.read_bytes()[:-cut])
    (point,) = taken(tmp_path).points
    assert 2.0 < point.loss_nats < 10


@pytest.mark.parametrize(
    ("plant", "flags", "said"),
    [
        (lambda top: None, [], "no such folder; name the one you give to tensorboard"),
        (lambda top: top.touch(), [], "a file; name the folder that it lies in"),
        (lambda top: top.mkdir(), [], "no event files (*tfevents*) in it"),
        (lambda top: plant_events(top / "a", {}), [], "no run has a curve"),
        (
            lambda top: plant_events(top / "a", {"train/loss": [(1, 2.0)], "lr": [(1, 0.1)]}),
            [],
            "no curve is called as a validation loss usually is; there are lr, train/loss: name one with --columns",
        ),
        (
            lambda top: plant_events(top / "a", {"val/loss": [(1, 2.0)], "eval/loss": [(1, 2.1)]}),
            [],
            "several curves may be the loss (eval/loss, val/loss); choose with --columns loss_nats=eval/loss",
        ),
        (
            plant_ladder,
            ["--columns", "loss_nats=test/loss"],
            "no run has it; their curves are train/loss, train/tokens",
        ),
        (plant_ladder, ["--columns", "size=n_params"], "we know no column size"),
        (plant_ladder, ["--columns", "n_params=name:("], "not a regular expression"),
        (plant_ladder, ["--columns", "n_params=name:M"], "wants one group"),
        (plant_ladder, ["--columns", "n_params=wrong"], "0 finished points (5 excluded: no wrong for n_params"),
        (plant_ladder, ["--where", "text=owt"], "no run's configuration has text; there are n_params, run, seed"),
        (plant_ladder, ["--where", "seed=7"], "no run has it; seed is 0"),
        (plant_ladder, ["--tokens-per-step", "0"], "wants a number above 0"),
        (plant_ladder, ["--n-vocab", "1"], "wants 2 or more"),
        (plant_ladder, ["--with", "nowhere.csv"], "nowhere.csv: no such file; write a header of run,n_params,n_tokens"),
        (plant_ladder, ["--from-mlflow", "mlruns"], "--from-tensorboard and --from-mlflow to fit; give one"),
        (plant_ladder, ["points.csv"], "points.csv and --from-tensorboard to fit; give one"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    tmp_path: Path, homelab: Callable[..., Any], plant: Callable[[Path], object], flags: list[str], said: str
) -> None:
    plant(tmp_path / "logs")
    out = tmp_path / "out"
    found = homelab(
        "fit", *flags[:1] if flags == ["points.csv"] else [], "--from-tensorboard", tmp_path / "logs",
        *flags if flags != ["points.csv"] else [], "--out", out, "--save-points", tmp_path / "saved.csv",
    )  # fmt: skip
    assert (found.code, found.out) == (2, "")
    assert said in found.err and found.err.count("\n") == 1
    assert not out.exists() and not (tmp_path / "saved.csv").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column run"),
        ("name,n_params\na,1\n", "no column run"),
        ("run,size\nrun-0,1\n", "column 'size' is none of ours"),
        ("run,loss_nats\nrun-0,1\n", "column 'loss_nats' is none of ours"),
        ("run,n_params\nrun-0,1\nrun-0,2\n", "run run-0 is there twice"),
    ],
)
def test_bad_tables_beside_the_runs(tmp_path: Path, homelab: Callable[..., Any], text: str, said: str) -> None:
    plant_ladder(tmp_path / "logs")
    (tmp_path / "runs.csv").write_text(text)
    found = homelab("fit", "--from-tensorboard", tmp_path / "logs", "--with", tmp_path / "runs.csv")
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1


def test_flags_of_tracked_runs_are_refused_elsewhere(tmp_path: Path, homelab: Callable[..., Any]) -> None:
    assert "nothing to fit; give one: a lab's folder" in homelab("fit").err
    found = homelab("fit", tmp_path / "points.csv", "--loss-at", "min")
    assert found.code == 2 and "--loss-at is for tracked runs" in found.err
    assert "--with is for tracked runs" in homelab("fit", "x.csv", "--with", "y.csv").err


def test_reading_runs_imports_no_torch(tmp_path: Path) -> None:
    plant_ladder(tmp_path)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from homelab_scaling.fit.from_trackers.collect import Reading, collect\n"
        "from homelab_scaling.fit.from_trackers.tensorboard_runs import read_tensorboard\n"
        f"assert len(collect('x', read_tensorboard(Path({str(tmp_path)!r})), Reading()).points) == 5\n"
        "print(sorted({'torch', 'tensorflow', 'wandb', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -------------------------------------------------------------------------------------------------------------- pieces


def test_numbers_as_people_write_them() -> None:
    told = {"124M": 124e6, "1.5b": 1.5e9, "2_000": 2000, "1,000,000": 1e6, "3e8": 3e8, " 7 ": 7, 5: 5, "10 K": 1e4}
    assert {text: as_number(text) for text in told} == told
    assert [as_number(odd) for odd in ("", "M", "3,14", "nan", math.nan, math.inf, None, True, "12 MB", [])] == [
        None
    ] * 10


def test_a_curve_holds_each_step_once() -> None:
    curve = make_series([(1, 5.0), (2, 4.0), (3, 9.0), (2, 3.0)])
    assert (curve.steps, curve.values) == ((1, 2, 3), (5.0, 3.0, 9.0))
    assert (curve.pick("last"), curve.pick("min")) == ((3, 9.0), (2, 3.0))
    assert (curve.until(0), curve.until(2), curve.until(99), curve.exactly(4)) == (None, 3.0, 9.0, None)
    assert make_series([]).pick("min") is None


def test_losses_by_name() -> None:
    yes = ["val/loss", "eval/loss", "Loss/val", "eval_loss", "validation.loss", "lm loss validation", "val_loss"]
    no = ["train/loss", "loss", "val/acc", "val/loss_scale", "eval/bpb", "train-val-full/loss"]
    assert [tag for tag in yes + no if looks_like_loss(tag)] == yes


def test_nanogpt_s_count_is_what_nanogpt_prints() -> None:
    """`number of parameters: 123.59M`: without biases and positions, with 47 padded rows (nanoGPT's README)."""
    config = {"n_layer": 12, "n_embd": 768, "block_size": 1024, "bias": False, "dataset": "openwebtext"}
    padded = count_gpt2(config, 50304)
    assert not isinstance(padded, str) and padded.n_params - padded.params.n_pos == 123_587_328
    real = count_gpt2(config, None)
    assert not isinstance(real, str) and padded.n_params - real.n_params == 47 * 768
    whole = count_gpt2({**config, "bias": True}, None)
    assert not isinstance(whole, str) and whole.n_params == 124_439_808, "GPT-2 small"


# ----------------------------------------------------------------------------------------------------------------- W&B


@pytest.mark.parametrize("size", [10, 32_754, 32_755, 32_760, 32_768, 70_000, 98_290])
def test_records_of_every_length_come_back_across_blocks(tmp_path: Path, size: int) -> None:
    records = [b"a" * 5, b"b" * size, b"", b"c" * 40_000, b"d"]
    write_records(tmp_path / "x.wandb", records)
    assert list(read_records(tmp_path / "x.wandb")) == records
    whole = (tmp_path / "x.wandb").read_bytes()
    (tmp_path / "x.wandb").write_bytes(whole[:-3])
    assert list(read_records(tmp_path / "x.wandb")) == records[:-1]
    damaged = bytearray(whole)
    damaged[7 + 7 + 5 + 7 + 3] ^= 1
    (tmp_path / "x.wandb").write_bytes(damaged)
    assert list(read_records(tmp_path / "x.wandb")) == records[:1], "nothing is believed past a wrong checksum"


def nanogpt_runs(top: Path) -> list[float]:
    """Three of nanoGPT's runs; returns their sizes."""
    for n_layer, n_embd in NANOGPT_SHAPES:
        plant_wandb(top, f"id{n_layer}", nanogpt_config(n_layer, n_embd), nanogpt_rows(n_layer), name=f"gpt-{n_layer}")
    counted = [count_gpt2(nanogpt_config(*shape), None) for shape in NANOGPT_SHAPES]
    return [c.n_params for c in counted if not isinstance(c, str)]


@EAGER
def test_nanogpt_s_runs_in_wandb_need_no_flag(tmp_path: Path, homelab: Callable[..., Any]) -> None:
    pytest.importorskip("wandb")
    sizes = nanogpt_runs(tmp_path / "wandb")
    saved = tmp_path / "points.csv"
    said = homelab("fit", "--from-wandb", tmp_path, "--save-points", saved, "--bootstrap", 0, "--law", "power-n")
    assert said.code == 0, said.err
    points = read_points(saved).points
    assert [p.n_params for p in points] == sizes
    assert [p.n_tokens for p in points] == [400 * 8 * 12 * 256] * 3, "by `iter`, since W&B's own axis counts calls"
    assert [p.loss_nats for p in points] == pytest.approx([4.1 - 2 - n / 10 for n, _ in NANOGPT_SHAPES])
    assert [p.row_id for p in points] == ["gpt-2", "gpt-3", "gpt-4"]
    assert "iter x gradient_accumulation_steps x batch_size x block_size" in said.out


@EAGER
def test_wandb_runs_that_were_resumed_killed_or_torn(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from homelab_scaling.fit.from_trackers.wandb_runs import read_wandb

    config = {"n_params": 1e6, "tokens_per_step": 10}
    rows = [{"val/loss": 5.0 - i} for i in range(3)]
    plant_wandb(tmp_path, "a", config, rows, exit_code=None)
    plant_wandb(tmp_path, "a", config, [{"val/loss": 2.5}, {"val/loss": 2.0}], first_step=2, began=1_700_000_900)
    plant_wandb(tmp_path, "b", config, rows, exit_code=None)
    plant_wandb(tmp_path, "c", config, rows, exit_code=1)
    torn = plant_wandb(tmp_path, "d", config, rows)
    torn.write_bytes(torn.read_bytes()[:-20])
    wreck = plant_wandb(tmp_path, "e", config, rows)
    wreck.write_bytes(b"nothing of W&B's")
    runs = {run.name: run for run in read_wandb(str(tmp_path))}
    assert runs["a"].read("val/loss").values == (5.0, 4.0, 2.5, 2.0), "the later file holds where they overlap"
    table = collect("W&B", list(runs.values()), Reading())
    assert [(p.row_id, p.n_tokens, p.loss_nats) for p in table.points] == [("a", 30, 2.0)]
    said = reasons(table)
    assert said["b"].startswith("W&B's file says nothing of its end") and "ended in error" in said["c"]
    assert said["d"].startswith("W&B's file says nothing of its end") and "cannot be read" in said["run-e"]
    kept = collect("W&B", list(runs.values()), Reading(keep_unfinished=True))
    assert [p.row_id for p in kept.points] == ["a", "b", "c", "d"]


class Remote:
    """A run as W&B's Api shows it; knows which curves were asked for."""

    def __init__(self, name: str, state: str, loss: float) -> None:
        self.name, self.id, self.state, self.project = name, f"id{loss}", state, "owt"
        self.config = {**nanogpt_config(2, 128), "nested": {"a": 1}}
        self.summary = {"val/loss": "NaN", "iter": 400, "_runtime": 9, "gradients": {"min": 0.1}}
        self.loss, self.asked = loss, []

    def scan_history(self, keys: list[str]) -> list[dict[str, Any]]:
        self.asked.append(keys[0])
        rows = [{"_step": i, "iter": 100 * i, "val/loss": self.loss + 4 - i} for i in range(5)]
        return [{key: row[key] for key in keys} for row in rows]


def test_a_project_on_wandb_s_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for its Api, since no test has a network."""
    from homelab_scaling.fit.from_trackers import wandb_runs

    served = [Remote("a", "finished", 3.0), Remote("a", "finished", 3.5), Remote("b", "crashed", 3.25)]

    class Api:
        def __init__(self, timeout: int) -> None: ...

        def runs(self, project: str, order: str) -> list[Remote]:
            if project != "me/owt":
                raise ValueError(f"Could not find project <Project {project}>\nmore")
            return served

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Api))
    monkeypatch.setattr(wandb_runs, "why_silent", lambda url: None)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    table = collect("W&B", wandb_runs.read_wandb("me/owt"), Reading())
    assert [(p.row_id, p.loss_nats, p.n_tokens) for p in table.points] == [
        ("a (id3.0)", 3.0, 400 * 8 * 12 * 256),
        ("a (id3.5)", 3.5, 400 * 8 * 12 * 256),
    ]
    assert reasons(table) == {"b": "W&B says crashed: it has not finished (--keep-unfinished takes it)"}
    assert served[0].asked == ["val/loss", "iter"] and served[2].asked == [], "only what is needed is asked for"
    with pytest.raises(DataError, match=r"me/gone: W&B refuses \(Could not find project <Project me/gone>\); check"):
        wandb_runs.read_wandb("me/gone")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("someone/project", "http://127.0.0.1:9 does not answer"),
        ("nowhere", "no such folder, and no ENTITY/PROJECT"),
        ("{empty}", "no run-*.wandb in this folder"),
    ],
)
def test_wandb_that_is_not_there(
    tmp_path: Path, homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    found = homelab("fit", "--from-wandb", where.format(empty=tmp_path))
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- MLflow


@EAGER
def test_mlflow_runs_of_a_folder(tmp_path: Path, homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    for experiment in ("owt", "other"):
        experiment_id = client.create_experiment(experiment)
        for index, (n, d) in enumerate(SIZES):
            run = client.create_run(experiment_id, run_name=f"{experiment}-{index}")
            client.log_param(run.info.run_id, "model/num_parameters", str(int(n)))
            for step, loss in descent(n, d)[0]:
                client.log_metric(run.info.run_id, "val_loss", loss, step=step)
            if index < 4:
                client.set_terminated(run.info.run_id)
    saved = tmp_path / "points.csv"
    flags = ("--where", "experiment=owt", "--tokens-per-step", 1e6, "--bootstrap", 0, "--law", "power-n")
    said = homelab("fit", "--from-mlflow", tmp_path, *flags, "--save-points", saved)
    assert said.code == 0, said.err
    points = read_points(saved).points
    assert [(p.row_id, p.n_params, p.n_tokens) for p in points] == [
        (f"owt-{i}", n, 1e8) for i, (n, _d) in enumerate(SIZES[:4])
    ]
    assert [p.loss_nats for p in points] == pytest.approx([law(n, d) for n, d in SIZES[:4]])
    assert "owt-4: MLflow says RUNNING: it has not finished" in said.out


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("http://127.0.0.1:9", "the server does not answer (Connection refused)"),
        ("nowhere", "no such folder or file, and no URI"),
        ("{empty}", "neither MLflow's files nor an mlflow.db"),
        ("odd://x", "MLflow cannot read it"),
        ("sqlite:///{text}", "a database wants the whole of MLflow"),
        ("{text}", "a database wants the whole of MLflow"),
    ],
)
@EAGER
def test_mlflow_that_is_not_there(
    tmp_path: Path, homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, where: str, said: str
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    (tmp_path / "mlflow.txt").write_text("no database")
    (tmp_path / "empty").mkdir()
    found = homelab("fit", "--from-mlflow", where.format(empty=tmp_path / "empty", text=tmp_path / "mlflow.txt"))
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize(("tracker", "where"), [("mlflow", "http://127.0.0.1:9"), ("wandb", "{top}")])
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tracker: str, where: str
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    (tmp_path / "run-x.wandb").touch()
    found = homelab("fit", f"--from-{tracker}", where.format(top=tmp_path))
    assert found.code == 2 and f"pip install 'homelab_scaling[{tracker}]'" in found.err
