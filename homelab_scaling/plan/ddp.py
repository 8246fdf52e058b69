"""What a data-parallel step costs, as a pure model: computing, then the gradients that computing could not hide.

    step = max(6 N b / F, floor) + late / BW + max(0, early / BW - overlap x computing) + latency x buckets

Legend: N parameters, b tokens per rank between two syncs, F FLOP/s of one rank, BW bytes/s of the way between ranks,
late: the token embedding's gradient, the last one ready (tied or not: the lookup is the first thing that a forward
pass does), so that none of it travels while the backward pass computes; early: all other gradients.

A ring all-reduce moves 2 (n - 1) / n of the gradients each way, so communication over computing is 4 F / (6 BW b) for
two ranks: N cancels, and only more tokens between two syncs make a second card pay.

Scaling, always by name. Strong: the same batch, split; efficiency T1(whole batch) / (n T_n). Weak: the same batch per
rank; efficiency T1(rank's batch) / T_n. They differ wherever a step has a part that does not grow with its batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from homelab_scaling.errors import SpecError
from homelab_scaling.plan.counting import ParamCount, pad_vocab
from homelab_scaling.specs import ModelShape

ALLREDUCE_BYTES_PER_S = 8e9
"""Two cards without peer-to-peer on x8 slots, through host memory: 4 to 12e9 seen; `homelab ddp` measures it."""
BUCKET_LATENCY_S = 100e-6
"""Of one all-reduce of next to nothing, through host memory."""
OVERLAP_FRAC = 0.8 * 2 / 3
"""Share of a step's compute behind which gradient traffic hides: the backward pass, four fifths of it."""
GRADIENT_BYTES = 4
MAX_BATCH_TOKENS = 2**27
"""Where the search for a batch ends."""
MIB = 2**20
DEFAULT_BUCKET_MIB = 25
MAX_BUCKET_MIB = 50


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """The way that gradients take between ranks."""

    bytes_per_s: float
    """Of an all-reduce: bytes that must pass one rank's link one way, over seconds."""
    latency_s: float
    basis: str


ASSUMED_FABRIC = Fabric(
    bytes_per_s=ALLREDUCE_BYTES_PER_S,
    latency_s=0.0,
    basis=f"assumed {ALLREDUCE_BYTES_PER_S / 1e9:g} GB/s between cards",
)


@dataclass(frozen=True, kw_only=True)
class DdpStep:
    """One optimizer step of one rank, in seconds, by cause."""

    compute_s: float
    late_s: float
    """The token embedding's gradient, after the backward pass."""
    spill_s: float
    """Other gradients that the backward pass was too short to hide."""
    latency_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that nothing hides."""
        return self.late_s + self.spill_s + self.latency_s

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def weak_efficiency(self) -> float:
        """Against one rank alone on this rank's batch."""
        return self.compute_s / self.seconds


def ring_bytes(n_bytes: float, n_ranks: int) -> float:
    """What passes each rank's link, one way, in an all-reduce of `n_bytes`."""
    return n_bytes * 2 * (n_ranks - 1) / n_ranks


def ddp_step(
    params: ParamCount,
    compute_s: float,
    fabric: Fabric = ASSUMED_FABRIC,
    *,
    n_ranks: int = 2,
    n_passes: int = 1,
    n_buckets: int = 1,
) -> DdpStep:
    """A step of `compute_s` on each of `n_ranks`, with what exchanging gradients adds.

    Args:
        n_passes: forward and backward passes per step (accumulation); gradients travel in the last one only, so only
            its backward pass hides them.
        n_buckets: all-reduces per step; each costs the latency.
    """
    if n_ranks == 1:
        return DdpStep(compute_s=compute_s, late_s=0.0, spill_s=0.0, latency_s=0.0)
    late = min(params.n_embed + params.n_padding, params.n_stored)
    per_s = fabric.bytes_per_s / ring_bytes(GRADIENT_BYTES, n_ranks)
    early_s = (params.n_stored - late) / per_s
    return DdpStep(
        compute_s=compute_s,
        late_s=late / per_s,
        spill_s=max(0.0, early_s - OVERLAP_FRAC * compute_s / n_passes),
        latency_s=fabric.latency_s * n_buckets,
    )


def least_tokens(pays: Callable[[int], bool], step: int = 1) -> int | None:
    """The smallest multiple of `step` tokens per rank from which on `pays` holds; None if that is beyond any batch.

    Args:
        pays: false below some batch and true above it.
    """
    high = step
    while not pays(high):
        high *= 2
        if high > MAX_BATCH_TOKENS:
            return None
    low = high // 2
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


# ------------------------------------------------------------------------------------------------------------- buckets


def gradients_in_order(shape: ModelShape, n_vocab: int) -> list[tuple[str, int]]:
    """Every gradient's group (`head`, `body`, `pos`, `embed`) and bytes, in the order a backward pass finishes them.

    tests/train/test_ddp.py compares with the order that hooks see.
    """
    d = shape.d_model
    block = [d, 4 * d * d, 4 * d, 4 * d * d, d, d, d, d * d, 3 * d, 3 * d * d, d, d]
    table = pad_vocab(n_vocab) * d
    numbers = [] if shape.tied else [("head", table)]
    numbers += [("body", n) for n in [d, d, *(block * shape.n_layer)]]
    numbers += [("pos", shape.context_tokens * d), ("embed", table)]
    return [(group, GRADIENT_BYTES * n) for group, n in numbers]


def buckets_of(sizes: Sequence[int], cap_bytes: int) -> list[list[int]]:
    """How DDP cuts gradients into all-reduces: in the order they get ready, a bucket closed when it reaches the cap."""
    buckets: list[list[int]] = [[]]
    for size in sizes:
        if sum(buckets[-1]) >= cap_bytes:
            buckets.append([])
        buckets[-1].append(size)
    return buckets


def choose_bucket_mib(shape: ModelShape, n_vocab: int, fabric: Fabric | None = None) -> int:
    """DDP's bucket_cap_mb for this shape: the one that leaves least to be sent after the last gradient is ready.

    DDP closes a bucket when it is full. What is left over when the embedding's gradient comes shares a bucket with it
    and waits for it, up to a whole cap; with the default of 25 MiB a model of 18M parameters sends all at the end.
    Small buckets leave less and cost a latency each. Never below 1 MiB: torch.compile splits its graphs by the same
    cap and refuses less.
    """
    sizes = [size for _, size in gradients_in_order(shape, n_vocab)]
    per_s = fabric.bytes_per_s if fabric else ALLREDUCE_BYTES_PER_S
    latency_s = (fabric.latency_s if fabric else 0.0) or BUCKET_LATENCY_S

    def cost_s(cap: int) -> float:
        buckets = buckets_of(sizes, cap * MIB)
        # The last bucket is late as a whole; one before it was closed by a gradient that came hardly earlier.
        last = sum(buckets[-1]) + (sum(buckets[-2]) if len(buckets) > 1 else 0)
        return last / per_s + latency_s * len(buckets)

    return min(range(1, MAX_BUCKET_MIB + 1), key=lambda cap: (cost_s(cap), abs(cap - DEFAULT_BUCKET_MIB)))


# ------------------------------------------------------------------------------------------- one run after another, or


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How several runs finish earliest on several cards."""

    n_ddp: int
    """So many of the longest runs go over all cards, one after the other; the rest is packed, longest first."""
    seconds: float
    one_card_s: float
    packed_s: float
    """No run is split."""
    all_ddp_s: float
    """Every run is split."""


def best_mix(seconds: Sequence[float], speedups: Sequence[float], n_cards: int = 2) -> Mix:
    """Which of the longest runs to split over all cards so that the last one is done earliest; ties split fewer.

    Args:
        seconds: of each run on one card.
        speedups: of each run over all cards against one (strong scaling).

    Raises:
        SpecError: a time or speed-up that is not positive, or not one of each.
    """
    if len(seconds) != len(speedups) or not all(math.isfinite(x) and x > 0 for x in [*seconds, *speedups]):
        raise SpecError("best_mix wants a positive time and a positive speed-up for every run")
    runs = sorted(zip(seconds, speedups, strict=True), reverse=True)
    totals = [
        sum(s / up for s, up in runs[:k]) + packed([s for s, _ in runs[k:]], n_cards) for k in range(len(runs) + 1)
    ]
    best = min(range(len(totals)), key=lambda k: (totals[k], k))
    return Mix(
        n_ddp=best,
        seconds=totals[best],
        one_card_s=sum(seconds),
        packed_s=totals[0],
        all_ddp_s=totals[-1],
    )


def packed(seconds: Sequence[float], n_cards: int) -> float:
    """When the last of several runs ends, each on one card, the longest first to the card that is free first."""
    ends = [0.0] * n_cards
    for run in sorted(seconds, reverse=True):
        ends[ends.index(min(ends))] += run
    return max(ends)
