"""Does the second card pay: step times in, figures with the name of their scaling and a piece of advice out.

Communication is the time of a step with gradients exchanged less the time of the same step without; both at the same
batch. Times of different batches are only ever divided.
"""

import math
from dataclasses import dataclass
from typing import Literal

from homelab_scaling.errors import UserError

Advice = Literal["one GPU", "DDP", "two independent runs"]
"""The last is one run on each card, however many cards there are."""

ADDS_UP_WITHIN = 0.02
NOTABLY = 1.02
"""A speed-up below this is none: two timings differ by as much."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What step times say about several cards."""

    n_ranks: int
    t1_full_s: float
    t1_rank_s: float | None
    t_ddp_s: float
    compute_s: float | None
    communication_s: float | None
    """Exposed: what computing did not hide."""
    wrapper_s: float | None
    """What DDP adds without exchanging anything."""
    overhead_frac: float | None
    """Exposed communication as a share of the DDP step."""
    strong_efficiency: float
    """Same batch, split: T1(whole batch) / (n T_ddp)."""
    strong_speedup: float
    """Over one card on the same batch."""
    weak_efficiency: float
    """Same batch per rank: T1(rank's batch) / T_ddp."""
    weak_speedup: float
    """Tokens per second over those of one card at the rank's batch."""
    weak_is_measured: bool
    """False: only one single-card time was given, and this is how it would read if it was taken at the rank's batch."""
    runs_speedup: float
    """Tokens per second of n independent runs over those of one."""
    runs_over_ddp: float
    """How much more n independent runs do in the same time than DDP."""
    advice: Advice
    words: str

    @property
    def why_two_weaks(self) -> str | None:
        """What a reader has to know about the weak figures."""
        if self.weak_is_measured:
            return None
        return "if `single` was timed at the per-rank batch instead of the whole one"


def judge(
    *,
    t1_full_s: float,
    t_ddp_s: float,
    compute_s: float | None = None,
    communication_s: float | None = None,
    t1_rank_s: float | None = None,
    wrapper_s: float | None = None,
    runs_speedup: float | None = None,
    n_ranks: int = 2,
    n_runs: int | None = None,
) -> Judgement:
    """Overhead, efficiencies and advice from step times [s].

    Args:
        t1_full_s: one card, the whole batch.
        t_ddp_s: n cards, the same batch, gradients exchanged.
        compute_s: of that step, the part that is there without any exchange; with one of compute and communication the
            other follows.
        t1_rank_s: one card, the batch of one rank; None reads `t1_full_s` as that for the weak figures, and says so.
        runs_speedup: measured gain of n runs side by side; None is n, what cards that do not disturb each other give.
        n_runs: how many runs there are to do; None is enough for every card.

    Raises:
        UserError: times that cannot be.
    """
    given = {"single": t1_full_s, "ddp": t_ddp_s, "compute": compute_s, "communication": communication_s}
    compute_s, communication_s = _parts(given, t_ddp_s, compute_s, communication_s)
    speedup = t1_full_s / t_ddp_s
    rank_s = t1_full_s if t1_rank_s is None else t1_rank_s
    gain = float(n_ranks) if runs_speedup is None else runs_speedup
    alone = n_runs is not None and n_runs < 2
    advice = _advise(speedup, gain, alone=alone)
    return Judgement(
        n_ranks=n_ranks,
        t1_full_s=t1_full_s,
        t1_rank_s=t1_rank_s,
        t_ddp_s=t_ddp_s,
        compute_s=compute_s,
        communication_s=communication_s,
        wrapper_s=wrapper_s,
        overhead_frac=None if communication_s is None else communication_s / t_ddp_s,
        strong_efficiency=speedup / n_ranks,
        strong_speedup=speedup,
        weak_efficiency=rank_s / t_ddp_s,
        weak_speedup=n_ranks * rank_s / t_ddp_s,
        weak_is_measured=t1_rank_s is not None,
        runs_speedup=gain,
        runs_over_ddp=gain / speedup,
        advice=advice,
        words=_words(advice, speedup, gain, n_ranks, alone=alone),
    )


def _parts(
    given: dict[str, float | None], t_ddp_s: float, compute_s: float | None, communication_s: float | None
) -> tuple[float | None, float | None]:
    """Computing and communication, checked."""
    for name, seconds in given.items():
        if seconds is not None and not (
            math.isfinite(seconds) and seconds >= (0 if name == "communication" else 1e-12)
        ):
            raise UserError(f"{name} = {1e3 * seconds:g} ms: wants the time of a step, a positive number")
    if compute_s is None and communication_s is not None:
        compute_s = t_ddp_s - communication_s
    elif communication_s is None and compute_s is not None:
        communication_s = t_ddp_s - compute_s
    if compute_s is None or communication_s is None:
        return None, None
    total = compute_s + communication_s
    if compute_s <= 0 or communication_s < 0 or abs(total - t_ddp_s) > ADDS_UP_WITHIN * t_ddp_s:
        raise UserError(
            f"compute {1e3 * compute_s:.4g} and communication {1e3 * communication_s:.4g} make {1e3 * total:.4g} ms, "
            f"ddp says {1e3 * t_ddp_s:.4g}: all three must be of one and the same step"
        )
    return compute_s, communication_s


def _advise(speedup: float, gain: float, *, alone: bool) -> Advice:
    if alone:
        return "DDP" if speedup > NOTABLY else "one GPU"
    if max(speedup, gain) <= NOTABLY:
        return "one GPU"
    return "DDP" if speedup > gain else "two independent runs"


def _words(advice: Advice, speedup: float, gain: float, n_ranks: int, *, alone: bool) -> str:
    cards = "two cards" if n_ranks == 2 else f"{n_ranks} cards"
    runs = "two runs" if n_ranks == 2 else f"{n_ranks} runs"
    if advice == "DDP":
        return f"DDP: {cards} finish this run {speedup:.2f}x sooner than one"
    if advice == "one GPU":
        also = "" if alone else f", and {runs} side by side do {gain:.2f}x"
        return f"one GPU: over {cards} with DDP the same step takes {1 / speedup:.2f}x as long{also}"
    if speedup < 1:
        slow = f"with DDP {cards} are slower than one ({speedup:.2f}x)"
    else:
        slow = f"with DDP {cards} do {speedup:.2f}x of one"
    single = "one GPU" if speedup <= NOTABLY else "DDP"
    return (
        f"two independent runs: {slow}, {runs} side by side do {gain:.2f}x, {gain / speedup:.1f} times as much; "
        f"for a single run and nothing beside it, {single}"
    ).replace("two independent", f"{'two' if n_ranks == 2 else n_ranks} independent")
