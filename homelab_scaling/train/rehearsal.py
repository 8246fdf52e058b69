"""A run on random tokens, to time what the trainer does without a corpus: by the bench and by --autotune."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from homelab_scaling import codec
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import (
    CorpusManifest,
    ExecutionSpec,
    ModelShape,
    Optim,
    Precision,
    RunSpec,
    Schedule,
    ScienceSpec,
    ShardFile,
    Split,
    WatchLimits,
    make_run_id,
)

if TYPE_CHECKING:
    from homelab_scaling.train.step import Stepper

LR = 1e-4


def write_random_shards(folder: Path, n_vocab: int, n_tokens: int, *, seed: int = 0) -> CorpusManifest:
    """A corpus of uniformly random ids; its losses mean nothing, its shapes and its cost are those of real text."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if n_vocab <= 2**16 else np.uint32
    splits = {}
    for name, n in (("train", n_tokens), ("val", max(1, n_tokens // 4))):
        ids = rng.integers(0, n_vocab, size=n).astype(dtype)
        (folder / f"{name}.bin").write_bytes(ids.tobytes())
        file = ShardFile(name=f"{name}.bin", n_tokens=n, sha256=hashlib.sha256(ids.tobytes()).hexdigest())
        splits[name] = Split(files=(file,), n_tokens=n, n_bytes=4 * n, n_documents=1)
    manifest = CorpusManifest(
        tokenizer="random",
        tokenizer_file=None,
        tokenizer_hash="random",
        n_vocab=n_vocab,
        eot_id=None,
        dtype="uint16" if dtype == np.uint16 else "uint32",
        sources=("random ids",),
        held_out_rule="drawn apart",
        train=splits["train"],
        val=splits["val"],
    )
    codec.write_json(folder / "manifest.json", manifest)
    return manifest


def make_spec(
    shape: ModelShape,
    manifest: CorpusManifest,
    *,
    shards: Path,
    batch_seqs: int,
    precision: Precision,
    execution: ExecutionSpec,
    optim: Optim | None = None,
    n_steps: int = 100_000,
    val_tokens: int | None = None,
    watched: bool = False,
) -> RunSpec:
    """A run over that corpus as the trainer takes it.

    Args:
        n_steps: of its one horizon.
        val_tokens: of the full validation; None takes a sequence.
        watched: whether a watchdog may act; in a race its pauses would be no training.
    """
    batch_tokens = batch_seqs * shape.context_tokens
    science = ScienceSpec(
        shape=shape,
        n_vocab=manifest.n_vocab,
        tokenizer_hash=manifest.tokenizer_hash,
        train_fingerprint=manifest.train.fingerprint,
        val_fingerprint=manifest.val.fingerprint,
        horizons_tokens=(n_steps * batch_tokens,),
        batch_tokens_global=batch_tokens,
        schedule=Schedule(name="wsd", lr_peak=LR, warmup_tokens=batch_tokens, decay_frac=0.2, lr_final_frac=0.0),
        optim=optim or Optim(),
        precision=precision,
        seed=0,
        val_tokens=val_tokens or shape.context_tokens,
    )
    return RunSpec(
        run_id=make_run_id("rehearsal", science),
        ladder="rehearsal",
        rung="rehearsal",
        science=science,
        execution=execution,
        shards=str(shards.resolve()),
        watch=WatchLimits(enabled=watched),
    )


def rehearse(spec: RunSpec, folder: Path) -> "Stepper":
    """Model, optimizer and data of a run, ready for `do_update`; the trainer's own, without its log and checkpoints."""
    from homelab_scaling.train.journal import Journal
    from homelab_scaling.train.session import choose, start_accelerator
    from homelab_scaling.train.step import Stepper

    run = RunFolder(folder / f"{spec.run_id}-{os.getpid()}")
    codec.write_json(run.spec, spec)
    accelerator = start_accelerator(spec, run.path)
    choices = choose(spec, accelerator.device.type == "cuda")
    return Stepper(spec, run, accelerator, choices, Journal(run, [], is_main=True))
