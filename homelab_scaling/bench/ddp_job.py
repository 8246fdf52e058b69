"""What `homelab ddp` asks of the ranks it launches, and what they answer: job.json and answer.json, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.plan.ddp import MIB
from homelab_scaling.plan.ddp_times import CardLink, CardPair, RungTimes, Sweep
from homelab_scaling.plan.memory import LossPath
from homelab_scaling.plan.parts import Plan, RungPlan
from homelab_scaling.specs import ModelShape, Optim, Precision

SWEEP_MIB = (1, 25, 100, 500)
N_WARMUP = 10
"""Steps of every kind before the first one is timed."""
N_STEPS = 20
SECONDS_PER_RUNG = {True: 120.0, False: 40.0}
"""On a GPU, on a CPU: what fewer steps are timed for, and a rung is left out for."""


@dataclass(frozen=True, kw_only=True)
class RungJob:
    """One rung to be timed, once as a single card would train it and once as a rank of several."""

    name: str
    shape: ModelShape
    n_vocab: int
    precision: Precision
    optim: Optim
    loss_path: LossPath
    batch_tokens: int
    """Global."""
    single_microbatch_seqs: int
    """What one card alone would take per pass."""
    microbatch_seqs_per_rank: int
    compile: bool
    recompute: bool = False

    @property
    def batch_seqs(self) -> int:
        return self.batch_tokens // self.shape.context_tokens


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """job.json."""

    device: Literal["cpu", "cuda"]
    n_ranks: int
    rungs: tuple[RungJob, ...] = ()
    """None: only the all-reduce sweep."""
    sweep_mib: tuple[int, ...] = SWEEP_MIB
    n_warmup: int = N_WARMUP
    n_steps: int = N_STEPS
    seconds_per_rung: float | None = None
    """None takes all the time it needs."""
    answer: str
    """Path of answer.json."""


@dataclass(frozen=True, kw_only=True)
class ProbeAnswer:
    """answer.json, written by the main rank."""

    backend: str
    threads_per_rank: int | None
    torch: str
    sweep: Sweep
    links: tuple[CardLink, ...]
    pairs: tuple[CardPair, ...]
    why_no_links: str | None
    rungs: tuple[RungTimes, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def rung_jobs(split: Plan, single: Plan, *, names: Sequence[str], optim: Optim, box: Box) -> tuple[RungJob, ...]:
    """What to time, from the plan for several ranks and the plan for one.

    Args:
        names: of rungs; empty is all of them.

    Raises:
        SpecError: no such rung.
    """
    known = [rung.name for rung in split.rungs]
    for name in names:
        if name not in known:
            raise SpecError(f"ladder {split.ladder} has no rung {name!r}; its rungs are {', '.join(known)}")
    by_name = {rung.name: rung for rung in single.rungs}
    return tuple(
        _job(rung, by_name[rung.name], n_vocab=split.n_vocab, optim=optim, box=box)
        for rung in split.rungs
        if not names or rung.name in names
    )


def _job(rung: RungPlan, alone: RungPlan, *, n_vocab: int, optim: Optim, box: Box) -> RungJob:
    return RungJob(
        name=rung.name,
        shape=rung.size.shape,
        n_vocab=n_vocab,
        precision=rung.training.precision,
        optim=optim,
        loss_path=rung.placement.loss_path,
        batch_tokens=rung.training.batch_tokens,
        single_microbatch_seqs=alone.placement.microbatch_seqs_per_rank,
        microbatch_seqs_per_rank=rung.placement.microbatch_seqs_per_rank,
        compile=box.on_gpu and box.has_compiler,
    )


def mib(n_bytes: float) -> str:
    """A size in words: 25 MiB."""
    return f"{n_bytes / MIB:g} MiB"
