"""Real launches: one process, two processes, a silent single process, a signal."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.runs import RunFolder
from homelab_scaling.train.checkpoint import read_manifest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pretrain.py"

pytestmark = pytest.mark.slow


def launch(folder: RunFolder, *flags: str, mode: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of the recipe on CPU, every default spelt out."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *mode),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
        *(str(RECIPE), "--spec", str(folder.spec), *flags),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


TWO = ("--multi_gpu", "--num_processes", "2")


def test_two_processes_give_the_losses_of_one_and_hand_over_to_one(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards")
    spec, alone = make_toy_run(tmp_path, manifest, lab="one")
    train_here(spec, alone)
    # Both ranks slice the same global batch; the spec on disk asks for two.
    _, both = make_toy_run(tmp_path, manifest, lab="two", n_processes=2, microbatch_seqs_per_rank=2)
    done = launch(both, mode=TWO)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = steps_of(alone), steps_of(both)
    assert [x["update"] for x in two] == [x["update"] for x in one]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=2e-5)
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=2e-3)
    ours, theirs = both.read_record(), alone.read_record()
    assert [r.loss_nats for r in ours.rows] == pytest.approx([r.loss_nats for r in theirs.rows], rel=1e-4)
    assert [r.loss_se_nats for r in ours.rows] == pytest.approx([r.loss_se_nats for r in theirs.rows], rel=1e-3)
    assert ours.machine.n_processes == 2


def test_a_run_of_two_processes_is_finished_by_one(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards")
    spec, alone = make_toy_run(tmp_path, manifest, lab="one")
    train_here(spec, alone)
    _, folder = make_toy_run(tmp_path, manifest, lab="two", n_processes=2, microbatch_seqs_per_rank=2)
    done = launch(folder, mode=TWO)
    assert done.returncode == 0, done.stderr[-2000:]
    # Take the last row back, as if the launch had been killed inside its decay.
    record = folder.read_record()
    codec.write_json(folder.record, replace(record, status="running", rows=record.rows[:1]))
    done = launch(folder, "--processes", "1", "--microbatch", "4", mode=("--cpu", "--num_processes", "1"))
    assert done.returncode == 0, done.stderr[-2000:]
    segments = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"]
    assert [s["n_processes"] for s in segments] == [2, 1] and segments[1]["update"] > 35
    assert [x["loss"] for x in steps_of(folder)] == pytest.approx([x["loss"] for x in steps_of(alone)], rel=2e-5)
    assert len(folder.read_record().rows) == 2


def test_a_launch_that_silently_starts_one_process_is_refused(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards")
    _, folder = make_toy_run(tmp_path, manifest, n_processes=2, microbatch_seqs_per_rank=2)
    done = launch(folder, mode=("--cpu", "--num_processes", "2"))
    assert done.returncode != 0
    assert "this launch has 1 process, the spec wants 2" in done.stderr
    assert sorted(p.name for p in folder.path.iterdir()) == ["spec.json"]


LADDER = """
name = "two"
context_tokens = 32
seeds = [0, 1]
rungs = [{ name = "a", n_layer = 1, d_model = 16, n_head = 1 }]
data = { sources = ["text"], tokenizer = "bytes", val_frac = 0.2 }
horizons = { tokens = [10_240] }
batch = { tokens = 512 }
validation = { full_tokens = 2_048, curve_tokens = 512 }
"""


def test_a_rung_by_name_trains_all_its_seeds_and_only_the_first_pays_for_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("pretrain.py", "README.md", "LOG.md"):
        source = RECIPE.with_name(name).read_text(encoding="utf-8")
        (tmp_path / "text" / f"{name}.txt").write_text(source, encoding="utf-8")
    ladder, labs = tmp_path / "two.toml", tmp_path / "lab"
    ladder.write_text(LADDER)
    homelab = [sys.executable, "-m", "homelab_scaling", "run", str(ladder), "--lab", str(labs), "--prepare"]
    subprocess.run(homelab, check=True, capture_output=True, timeout=120)
    command = [sys.executable, str(RECIPE), "--ladder", str(ladder), "--rung", "a", "--lab", str(labs)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    records = [RunFolder(path).read_record() for path in sorted((labs / "two" / "runs").iterdir())]
    assert [r.status for r in records] == ["finished", "finished"]
    starts = []
    for record in records:
        row = labs / "two" / "runs" / record.run_id / "checkpoints" / "row-10240"
        starts.append((record.rows[0].seed, read_manifest(row).clock.start_s))
    (_, first), (_, second) = sorted(starts)
    assert second < first / 2
