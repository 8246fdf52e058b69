"""LAB/machine/ddp.json: what `homelab ddp` measured on this machine, and what it says about rungs, measured or not."""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.plan.counting import ParamCount, count_params
from homelab_scaling.plan.ddp import ASSUMED_FABRIC, Fabric, ring_bytes
from homelab_scaling.plan.ddp_judge import Judgement, judge
from homelab_scaling.specs import ModelShape, Precision


@dataclass(frozen=True, kw_only=True)
class Timed:
    """The median of many timings, with the middle half of them."""

    seconds: float
    low_s: float
    high_s: float
    n: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timed":
        """Of one or more timings."""
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        return cls(seconds=quartiles[1], low_s=quartiles[0], high_s=quartiles[2], n=len(seconds))

    @property
    def spread_frac(self) -> float:
        """Half the middle half, over the median."""
        return (self.high_s - self.low_s) / 2 / self.seconds


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One all-reduce of fp32 numbers."""

    n_bytes: int
    timed: Timed


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All-reduces of several sizes under one setting of NCCL_P2P_DISABLE."""

    setting: str
    """`NCCL_P2P_DISABLE=1`, `NCCL_P2P_DISABLE unset`, or `gloo`."""
    transfers: tuple[Transfer, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """Size -> why it was not tried."""


@dataclass(frozen=True, kw_only=True)
class CardLink:
    """One card's PCI Express link while it worked; None where the driver does not say."""

    index: int
    name: str
    generation: int | None
    generation_max: int | None
    width: int | None
    width_max: int | None


@dataclass(frozen=True, kw_only=True)
class CardPair:
    """Whether two cards read each other's memory."""

    first: int
    second: int
    p2p: str


@dataclass(frozen=True, kw_only=True)
class RungTimes:
    """Seconds of one optimizer step of a rung, each with forward, backward, clipping and AdamW.

    `alone`: one rank computes, the others wait. `together`: every rank does, without a word to the others, as
    independent runs would. `full` is the whole batch on one rank, `rank` the share of one rank.
    """

    rung: str
    shape: ModelShape
    n_vocab: int
    precision: Precision
    batch_tokens: int
    """Global."""
    microbatch_seqs_per_rank: int
    accumulation_steps: int
    compiled: bool
    bucket_mib: int
    alone_full: Timed
    alone_rank: Timed
    together_full: Timed
    together_rank: Timed
    no_sync: Timed
    """DDP, per-rank batch, gradients not exchanged."""
    sync: Timed
    sync_bucket_25: Timed | None = None
    """With DDP's own bucket size; None where ours is the same."""
    sync_bf16: Timed | None = None
    """Gradients rounded to bf16 on their way; None without NCCL."""

    @property
    def params(self) -> ParamCount:
        return count_params(self.shape, self.n_vocab)

    def tokens_per_rank(self, n_ranks: int) -> int:
        """Between two syncs."""
        return self.batch_tokens // n_ranks

    @property
    def exposed_s(self) -> float:
        """Communication that computing did not hide, with the wait for the slower rank; never below zero."""
        return max(0.0, self.sync.seconds - self.no_sync.seconds)

    def judge(self, n_ranks: int, n_runs: int | None = None) -> Judgement:
        """What these times say."""
        return judge(
            t1_full_s=self.alone_full.seconds,
            t1_rank_s=self.alone_rank.seconds,
            t_ddp_s=self.sync.seconds,
            communication_s=self.exposed_s,
            wrapper_s=self.no_sync.seconds - self.together_rank.seconds,
            runs_speedup=n_ranks * self.alone_full.seconds / self.together_full.seconds,
            n_ranks=n_ranks,
            n_runs=n_runs,
        )

    def at_batch(self, tokens_per_rank: float, n_ranks: int) -> tuple[float, float]:
        """Seconds of a step on one card and over all of them at another batch.

        Computing grows with the tokens; what a sync adds does not.
        """
        whole = self.alone_full.seconds * tokens_per_rank * n_ranks / self.batch_tokens
        part = min(self.no_sync.seconds, self.sync.seconds) * tokens_per_rank / self.tokens_per_rank(n_ranks)
        return whole, part + self.exposed_s


@dataclass(frozen=True, kw_only=True)
class DdpMeasurement:
    """ddp.json: what `homelab ddp` measured last on this machine."""

    device: str
    """`cpu` or the cards' name."""
    n_ranks: int
    backend: str
    threads_per_rank: int | None
    """On CPU."""
    measured_s: float
    """Unix time."""
    torch: str
    sweep: Sweep
    """Under the setting that a launch of ours gets."""
    other_sweep: Sweep | None
    """Under the other one; None on CPU."""
    links: tuple[CardLink, ...] = ()
    pairs: tuple[CardPair, ...] = ()
    why_no_links: str | None = None
    rungs: tuple[RungTimes, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    """Rung -> why it was not measured."""

    def is_of(self, box: Box) -> bool:
        """Whether it was taken on a machine like this one."""
        return self.device == (box.device if box.on_gpu else "cpu")

    @property
    def fabric(self) -> Fabric:
        """Bandwidth from the largest all-reduce, latency from the smallest."""
        transfers = sorted(self.sweep.transfers, key=lambda t: t.n_bytes)
        if not transfers:
            return ASSUMED_FABRIC
        small, large = transfers[0], transfers[-1]
        bytes_per_s = ring_bytes(large.n_bytes, self.n_ranks) / large.timed.seconds
        latency_s = max(0.0, small.timed.seconds - ring_bytes(small.n_bytes, self.n_ranks) / bytes_per_s)
        return Fabric(
            bytes_per_s=bytes_per_s,
            latency_s=latency_s,
            basis=f"measured {bytes_per_s / 1e9:.3g} GB/s between ranks ({self.sweep.setting})",
        )

    def times_of(self, shape: ModelShape, n_vocab: int, precision: Precision) -> RungTimes | None:
        """The rung of this shape, if it was measured."""
        same = (r for r in self.rungs if (r.shape, r.n_vocab, r.precision) == (shape, n_vocab, precision))
        return next(same, None)

    def step_s(
        self, shape: ModelShape, n_vocab: int, precision: Precision, *, n_ranks: int, tokens_per_rank: int
    ) -> float | None:
        """Seconds of a step of this shape over all ranks or on one GPU; None where that was not measured."""
        times = self.times_of(shape, n_vocab, precision)
        alone = n_ranks == 1 and self.threads_per_rank is None  # one CPU rank of several has not all of the cores
        if times is None or not (alone or n_ranks == self.n_ranks):
            return None
        one, many = times.at_batch(tokens_per_rank / self.n_ranks if alone else tokens_per_rank, self.n_ranks)
        return one if alone else many

    @property
    def basis(self) -> str:
        """What a figure taken from here stands on."""
        return f"measured by `homelab ddp` on {time.strftime('%Y-%m-%d', time.localtime(self.measured_s))}"


def ddp_path(labs: Path) -> Path:
    """LAB/machine/ddp.json; `labs` is the folder that holds the labs."""
    return labs / "machine" / "ddp.json"


def read_ddp(labs: Path) -> DdpMeasurement | None:
    """What `homelab ddp` measured here last; None where it never did, or what is there cannot be read."""
    try:
        return codec.read_json(ddp_path(labs), DdpMeasurement)
    except SpecError:
        return None


def write_ddp(labs: Path, measurement: DdpMeasurement) -> Path:
    """Replaces ddp.json."""
    path = ddp_path(labs)
    codec.write_json(path, measurement)
    return path
