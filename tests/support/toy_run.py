"""A corpus of a few thousand tokens with structure to learn, and specs that train on it in a second."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from homelab_scaling import codec
from homelab_scaling.runs import RunFolder, RunRecord
from homelab_scaling.specs import (
    CorpusManifest,
    ExecutionSpec,
    ModelShape,
    Optim,
    RunSpec,
    Schedule,
    ScienceSpec,
    ShardFile,
    Split,
    make_run_id,
)
from homelab_scaling.train.hooks import Hooks

N_VOCAB, EOT, CONTEXT = 100, 99, 16
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pretrain.py"


def write_shards(folder: Path) -> CorpusManifest:
    """Documents of a noisy counting sequence, ended by EOT."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, n_documents in (("train", 400), ("val", 40)):
        documents = []
        for _ in range(n_documents):
            length = int(rng.integers(20, 60))
            counting = (int(rng.integers(0, 90)) + np.arange(length)) % 90
            documents.append(np.where(rng.random(length) < 0.1, rng.integers(0, 90, length), counting))
            documents.append([EOT])
        tokens = np.concatenate(documents).astype(np.uint16)
        (folder / f"{name}.bin").write_bytes(tokens.tobytes())
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        file = ShardFile(name=f"{name}.bin", n_tokens=len(tokens), sha256=digest)
        splits[name] = Split(files=(file,), n_tokens=len(tokens), n_bytes=3 * len(tokens), n_documents=n_documents)
    manifest = CorpusManifest(
        tokenizer="bytes",
        tokenizer_file=None,
        tokenizer_hash="toy",
        n_vocab=N_VOCAB,
        eot_id=EOT,
        dtype="uint16",
        sources=("toy",),
        held_out_rule="separately drawn",
        **splits,
    )
    codec.write_json(folder / "manifest.json", manifest)
    return manifest


def make_toy_run(
    root: Path,
    manifest: CorpusManifest,
    *,
    lab: str = "a",
    optimizer: str = "adamw",
    horizons: tuple[int, ...] = (20, 40),
    **changes: Any,
) -> tuple[RunSpec, RunFolder]:
    """A run folder with its spec.json: WSD with two horizons of 20 and 40 steps of 8 sequences."""
    batch = 8 * CONTEXT
    science = ScienceSpec(
        shape=ModelShape(n_layer=2, d_model=32, n_head=2, context_tokens=CONTEXT),
        n_vocab=N_VOCAB,
        tokenizer_hash=manifest.tokenizer_hash,
        train_fingerprint=manifest.train.fingerprint,
        val_fingerprint=manifest.val.fingerprint,
        horizons_tokens=tuple(batch * h for h in horizons),
        batch_tokens_global=batch,
        schedule=Schedule(name="wsd", lr_peak=1e-2, warmup_tokens=2 * batch, decay_frac=0.25, lr_final_frac=0.0),
        optim=Optim(name=optimizer),
        precision="fp32",
        seed=1,
        val_tokens=1_000,
    )
    execution = ExecutionSpec(
        device="cpu",
        microbatch_seqs_per_rank=4,
        compile="off",
        log_every_steps=4,
        checkpoint_every_steps=6,
        curve_tokens=400,
        curve_every_tokens=8 * batch,
        trackers=(),
    )
    for key, value in changes.items():
        if hasattr(execution, key):
            execution = replace(execution, **{key: value})
        else:
            science = replace(science, **{key: value})
    spec = RunSpec(
        run_id=make_run_id("toy", science),
        ladder="toy",
        rung="toy",
        science=science,
        execution=execution,
        shards=str(root / "shards"),
    )
    folder = RunFolder(root / lab / "runs" / spec.run_id)
    codec.write_json(folder.spec, spec)
    return spec, folder


def train_here(spec: RunSpec, folder: RunFolder, extra_hooks: list[Any] | None = None) -> RunRecord:
    """Trains in this process, from a clean Accelerate."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from homelab_scaling.train.loop import train

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train(spec, folder, started=time.monotonic(), extra_hooks=extra_hooks)


def train_on_ranks(folder: RunFolder, n_ranks: int) -> None:
    """Trains in processes of their own, over gloo, as `accelerate launch` starts them."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n_ranks)),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(RECIPE), "--spec", str(folder.spec)),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


class KillAt(Hooks):
    """kill -9 from inside, right after the metrics of an update were written (and before its checkpoint)."""

    def __init__(self, update: int) -> None:
        self.update = update

    def steps(self, lines: list[dict[str, Any]], rate: dict[str, Any] | None) -> None:
        if lines and lines[-1]["update"] >= self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(spec_path: str, update: int) -> None:
    folder = RunFolder(Path(spec_path).parent)
    train_here(codec.read_json(folder.spec, RunSpec), folder, [KillAt(update)])


def kill_at(folder: RunFolder, update: int) -> None:
    """Trains in a process of its own until it is killed after `update`."""
    assert in_own_process(_train_and_die, str(folder.spec), update) == -signal.SIGKILL


def in_own_process(target: Callable[..., None], *args: Any) -> int | None:
    """The exit code of a process that calls `target(*args)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["homelab_scaling.train.loop"])
    process = context.Process(target=target, args=args)
    process.start()
    process.join(timeout=120)
    return process.exitcode


class StopAt(Hooks):
    """A signal to ourselves after an update."""

    def __init__(self, update: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.update, self.number = update, number

    def steps(self, lines: list[dict[str, Any]], rate: dict[str, Any] | None) -> None:
        if lines and lines[-1]["update"] == self.update:
            os.kill(os.getpid(), self.number)


STEP_KEYS = ("update", "phase", "step", "tokens", "lr", "loss", "grad_norm")


def steps_of(folder: RunFolder) -> list[dict[str, Any]]:
    """The training steps in metrics.jsonl, without what depends on the clock."""
    lines = codec.read_jsonl(folder.metrics)
    return [{k: line[k] for k in STEP_KEYS} for line in lines if line["kind"] == "step"]
