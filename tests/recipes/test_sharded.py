"""The FSDP recipes, launched as shipped: they train, checkpoint, resume, and hand over to other launches.

Here on two CPU ranks over gloo, which run the same code as two GPUs. What only two GPUs can show, and the last test
asks of them: NCCL's collectives, that the states of a run too large for one card fit two, and speed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.box import missing_for_compile
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.train import checkpoint as ckpt

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = ("fsdp1_full", "fsdp1_grad_op", "fsdp2_full", "fsdp2_grad_op")

pytestmark = pytest.mark.slow


def command_of(config: str, folder: RunFolder, *flags: str) -> list[str]:
    """`accelerate launch` of the recipe with a shipped config."""
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(RECIPES / "accelerate_configs" / f"{config}.yaml"), "--main_process_port", "0"),
        *(str(RECIPES / "pretrain.py"), "--spec", str(folder.spec), *flags),
    ]


ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}


def launch(config: str, folder: RunFolder, *flags: str) -> None:
    done = subprocess.run(
        command_of(config, folder, *flags), capture_output=True, text=True, timeout=400, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def segments_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"]


def weights_of(folder: RunFolder) -> list[str]:
    return [e["weights_sha256"] for e in codec.read_jsonl(folder.events) if e["kind"] == "row"]


def take_last_row_back(folder: RunFolder) -> None:
    """As if the launch had been killed inside its last decay."""
    record = folder.read_record()
    assert record is not None
    codec.write_json(folder.record, replace(record, status="running", rows=record.rows[:-1]))


def layout(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of a safetensors file."""
    with safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> CorpusManifest:
    return write_shards(tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture(scope="module")
def make(
    tmp_path_factory: pytest.TempPathFactory, manifest: CorpusManifest
) -> Callable[..., tuple[RunSpec, RunFolder]]:
    root = tmp_path_factory.mktemp("labs")
    write_shards(root / "shards")
    return lambda lab, **changes: make_toy_run(root, manifest, lab=lab, **changes)


@pytest.fixture(scope="module")
def alone(make: Callable[..., tuple[RunSpec, RunFolder]]) -> RunFolder:
    """The run in one process, whole."""
    spec, folder = make("alone")
    train_here(spec, folder)
    return folder


TWO = {"n_processes": 2, "microbatch_seqs_per_rank": 2}


SHARDING = {"fsdp1_full": "full", "fsdp1_grad_op": "grad-op", "fsdp2_full": "full", "fsdp2_grad_op": "grad-op"}


@pytest.mark.parametrize("config", [*CONFIGS, "two_gpus"])
def test_a_recipe_trains_as_one_process_does_and_resumes_to_the_bit(config: str, make, alone: RunFolder) -> None:
    """Two horizons, so that a decay is left behind and the trunk taken up from its fork, after an evaluation."""
    _, folder = make(config, **TWO)
    launch(config, folder, "--recompute", "on")
    one, two = steps_of(alone), steps_of(folder)
    assert [x["update"] for x in two] == [x["update"] for x in one]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=2e-5)
    assert [x["grad_norm"] for x in two] == pytest.approx([x["grad_norm"] for x in one], rel=2e-3)
    ours, theirs = folder.read_record(), alone.read_record()
    assert [r.loss_nats for r in ours.rows] == pytest.approx([r.loss_nats for r in theirs.rows], rel=1e-4)
    segment = segments_of(folder)[0]
    assert segment["sharding"] == SHARDING.get(config, "none")
    assert segment["n_processes"] == 2 and segment["activation_checkpointing"]

    take_last_row_back(folder)
    launch(config, folder, "--recompute", "on")
    assert segments_of(folder)[1]["update"] > 35, "it resumed"
    assert steps_of(folder) == two
    assert folder.read_record().rows[-1].loss_nats == ours.rows[-1].loss_nats
    assert weights_of(folder)[-1] == weights_of(folder)[-2]


@pytest.mark.skipif(bool(missing_for_compile()), reason=f"no {' or '.join(missing_for_compile())}")
@pytest.mark.parametrize("config", ["fsdp1_grad_op", "fsdp2_full"])
def test_compiled_in_bf16_and_recomputed_it_is_the_same_run(config: str, make) -> None:
    spec, alone = make("alone-bf16", precision="bf16")
    theirs = train_here(spec, alone)
    _, folder = make(f"compiled-{config}", precision="bf16", **TWO)
    launch(config, folder, "--compile", "on", "--recompute", "on")
    record = folder.read_record()
    assert [r.loss_nats for r in record.rows] == pytest.approx([r.loss_nats for r in theirs.rows], rel=2e-3)


def test_a_checkpoint_has_one_form_whatever_the_launch(make, alone: RunFolder) -> None:
    _, folder = make("form", **TWO)
    launch("fsdp2_full", folder)
    for whole in (*ckpt.resume_folders(alone.checkpoints), *alone.checkpoints.glob("row-*")):
        twin = folder.checkpoints / whole.name
        for file in ckpt.read_manifest(whole).sha256:
            assert layout(twin / file) == layout(whole / file), f"{whole.name}/{file}"
        assert ckpt.read_manifest(twin).update == ckpt.read_manifest(whole).update


@pytest.mark.parametrize(("first", "then"), [("fsdp2_full", None), (None, "fsdp1_grad_op"), ("fsdp1_full", "two_gpus")])
def test_sharded_and_whole_launches_go_on_from_one_another(
    first: str | None, then: str | None, make, alone: RunFolder
) -> None:
    spec, folder = make(f"{first}-{then}")

    def go(config: str | None) -> None:
        if config is None:
            train_here(spec, folder)
        else:
            launch(config, folder, "--processes", "2", "--microbatch", "2")

    go(first)
    take_last_row_back(folder)
    go(then)
    shardings = [(s["n_processes"], s["sharding"]) for s in segments_of(folder)]
    assert shardings[0] != shardings[1] and segments_of(folder)[1]["update"] > 35
    assert [x["loss"] for x in steps_of(folder)] == pytest.approx([x["loss"] for x in steps_of(alone)], rel=2e-5)
    rows, theirs = folder.read_record().rows, alone.read_record().rows
    assert [r.loss_nats for r in rows] == pytest.approx([r.loss_nats for r in theirs], rel=1e-4)


def test_a_killed_sharded_run_goes_on_from_its_last_checkpoint(make, alone: RunFolder) -> None:
    _, folder = make("killed", sharding="full", **TWO)
    process = subprocess.Popen(
        command_of("two_gpus", folder), env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 200
        while not ckpt.resume_folders(folder.checkpoints) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    for pid in {p for s in segments_of(folder) for p in s["pids"]}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # ranks have a session of their own
    launch("two_gpus", folder)
    assert segments_of(folder)[-1]["sharding"] == "full"
    record = folder.read_record()
    assert record.status == "finished"
    theirs = [r.loss_nats for r in alone.read_record().rows]
    assert [r.loss_nats for r in record.rows] == pytest.approx(theirs, rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL, memory and speed of FSDP want two GPUs")
@pytest.mark.parametrize("config", CONFIGS)
def test_on_two_gpus(config: str, make, alone: RunFolder) -> None:
    _, folder = make(f"gpu-{config}", **TWO)
    launch(config, folder, "--device", "cuda")
    take_last_row_back(folder)
    launch(config, folder, "--device", "cuda")
    rows, theirs = folder.read_record().rows, alone.read_record().rows
    assert [r.loss_nats for r in rows] == pytest.approx([r.loss_nats for r in theirs], rel=1e-3)
    assert all(r.peak_vram_bytes for r in rows)
