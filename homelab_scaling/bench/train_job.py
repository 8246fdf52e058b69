"""What one contestant of `homelab bench train` is told: shape, batch, precision, device, and where the tokens are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from homelab_scaling import codec
from homelab_scaling.errors import UserError
from homelab_scaling.specs import ExecutionSpec, ModelShape, Precision, RunSpec
from homelab_scaling.train.rehearsal import make_spec, write_random_shards

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

    def write(
        self, folder: Path, names: list[str], shape: ModelShape, change: Callable[[RunSpec], RunSpec] | None = None
    ) -> dict[str, tuple[Job, Path]]:
        """Token files, spec and a job file for each contestant, in `folder`.

        Args:
            change: of our own execution settings; batch and precision stay as everybody's.

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
        execution = ExecutionSpec(
            device=self.device,
            microbatch_seqs_per_rank=micro,
            compile="auto" if self.compiles else "off",
            trackers=(),
        )
        spec = make_spec(
            shape, manifest, shards=shards, batch_seqs=batch_seqs, precision=self.precision, execution=execution
        )
        codec.write_json(folder / "spec.json", change(spec) if change else spec)
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
