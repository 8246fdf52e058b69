"""What one contestant of `homelab bench train` is told: shape, batch, precision, device, and where the tokens are."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from homelab_scaling import codec
from homelab_scaling.errors import UserError
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

N_VOCAB = 50_257
"""GPT-2's."""
N_WINDOWS = 256
"""Of the token file: enough that no step sees its own batch again soon."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """job.json."""

    contestant: str
    shape: ModelShape
    n_vocab: int
    batch_seqs: int
    microbatch_seqs: int
    precision: Precision
    device: Literal["cpu", "cuda"]
    n_threads: int
    compiles: bool
    """Whether the machine can compile; a peer that wants it goes without where it cannot."""
    nanogpt: str | None
    shards: str
    spec: str
    folder: str


def write_random_shards(folder: Path, n_vocab: int, n_tokens: int, *, seed: int = 0) -> CorpusManifest:
    """A corpus of uniformly random ids; its losses mean nothing, its shapes and its cost are those of real text."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, n in (("train", n_tokens), ("val", max(1, n_tokens // 4))):
        ids = rng.integers(0, n_vocab, size=n).astype(np.uint16)
        (folder / f"{name}.bin").write_bytes(ids.tobytes())
        file = ShardFile(name=f"{name}.bin", n_tokens=n, sha256=hashlib.sha256(ids.tobytes()).hexdigest())
        splits[name] = Split(files=(file,), n_tokens=n, n_bytes=4 * n, n_documents=1)
    manifest = CorpusManifest(
        tokenizer="random",
        tokenizer_file=None,
        tokenizer_hash="random",
        n_vocab=n_vocab,
        eot_id=None,
        dtype="uint16",
        sources=("random ids",),
        held_out_rule="drawn apart",
        **splits,
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
    n_steps: int = 100_000,
    val_tokens: int | None = None,
    name: str = "bench",
    watched: bool = False,
) -> RunSpec:
    """A run over that corpus as the trainer takes it; unwatched, since a bench's pauses are no training."""
    batch_tokens = batch_seqs * shape.context_tokens
    science = ScienceSpec(
        shape=shape,
        n_vocab=manifest.n_vocab,
        tokenizer_hash=manifest.tokenizer_hash,
        train_fingerprint=manifest.train.fingerprint,
        val_fingerprint=manifest.val.fingerprint,
        horizons_tokens=(n_steps * batch_tokens,),
        batch_tokens_global=batch_tokens,
        schedule=Schedule(name="wsd", lr_peak=1e-4, warmup_tokens=batch_tokens, decay_frac=0.2, lr_final_frac=0.0),
        optim=Optim(),
        precision=precision,
        seed=0,
        val_tokens=val_tokens or shape.context_tokens,
    )
    return RunSpec(
        run_id=make_run_id(name, science),
        ladder=name,
        rung=name,
        science=science,
        execution=execution,
        shards=str(shards.resolve()),
        watch=WatchLimits(enabled=watched),
    )


@dataclass(frozen=True, kw_only=True)
class JobMaker:
    """What is the same at every shape."""

    precision: Precision
    device: Literal["cpu", "cuda"]
    n_threads: int
    compiles: bool
    nanogpt: Path | None
    tokens_per_step: int
    microbatch_seqs: int | None
    n_vocab: int = N_VOCAB

    def write(self, folder: Path, names: list[str], shape: ModelShape) -> dict[str, tuple[Job, Path]]:
        """Token files, spec and a job file for each contestant, in `folder`.

        Raises:
            UserError: the batch does not split into sequences, or into micro-batches.
        """
        batch_seqs, rest = divmod(self.tokens_per_step, shape.context_tokens)
        if batch_seqs < 1 or rest:
            raise UserError(f"--tokens-per-step {self.tokens_per_step}: wants a multiple of {shape.context_tokens}")
        micro = self.microbatch_seqs or batch_seqs
        if batch_seqs % micro:
            raise UserError(f"--microbatch {micro} does not divide the {batch_seqs} sequences of a step")
        shards = folder / "shards"
        manifest = write_random_shards(shards, self.n_vocab, N_WINDOWS * shape.context_tokens + 1)
        execution = ExecutionSpec(device=self.device, microbatch_seqs_per_rank=micro, trackers=())
        spec = make_spec(
            shape, manifest, shards=shards, batch_seqs=batch_seqs, precision=self.precision, execution=execution
        )
        codec.write_json(folder / "spec.json", spec)
        jobs = {}
        for name in names:
            job = Job(
                contestant=name,
                shape=shape,
                n_vocab=self.n_vocab,
                batch_seqs=batch_seqs,
                microbatch_seqs=micro,
                precision=self.precision,
                device=self.device,
                n_threads=self.n_threads,
                compiles=self.compiles,
                nanogpt=str(self.nanogpt.resolve()) if self.nanogpt else None,
                shards=str(shards),
                spec=str(folder / "spec.json"),
                folder=str(folder),
            )
            jobs[name] = (job, folder / f"{name}.json")
            codec.write_json(jobs[name][1], job)
        return jobs
