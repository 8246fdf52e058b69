"""Per rung of a plan: how efficient DDP is here, from which batch it pays, and what finishes the ladder earliest.

Everything prefers what `homelab ddp` measured on this machine, then the model with the measured bandwidth, then the
model with an assumed one; every figure says which.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from homelab_scaling.box import Box
from homelab_scaling.plan import cost
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.plan.ddp import ASSUMED_FABRIC, Fabric, Mix, best_mix, ddp_step, least_tokens
from homelab_scaling.plan.ddp_judge import NOTABLY, Advice
from homelab_scaling.plan.ddp_times import DdpMeasurement, RungTimes
from homelab_scaling.plan.parts import Plan, RungPlan

CPU_BASIS = "assumed: CPU ranks share the cores that one process would use"
FALLBACK_FLOPS_PER_S = 39e12
"""40 % of an RTX 4080's peak."""
WELL = 0.9
"""The efficiency from which DDP is nearly as good as independent runs."""


def ddp_efficiency(measurement: DdpMeasurement | None, rung: RungPlan, n_ranks: int, *, box: Box) -> tuple[float, str]:
    """Strong-scaling efficiency of a rung's own batch over `n_ranks`, and what it stands on.

    A run that takes T on one card takes T / (n_ranks * efficiency) over all of them.
    """
    if n_ranks == 1:
        return 1.0, "one rank exchanges nothing"
    one, many, basis = step_seconds(measurement, rung, n_ranks, box=box)
    return one / (n_ranks * many), basis


def step_seconds(
    measurement: DdpMeasurement | None,
    rung: RungPlan,
    n_ranks: int,
    *,
    box: Box,
    tokens_per_rank: int | None = None,
) -> tuple[float, float, str]:
    """Seconds of one optimizer step on one card and over `n_ranks`, and what both stand on.

    Args:
        tokens_per_rank: between two syncs, instead of the rung's own batch.
    """
    asked = tokens_per_rank or rung.training.batch_tokens // n_ranks
    here = measurement if measurement is not None and measurement.is_of(box) else None
    if here is not None and here.n_ranks == n_ranks:
        times = here.times_of(rung.size.shape, _vocab(rung), rung.training.precision)
        if times is not None:
            whole, split = times.at_batch(asked, n_ranks)
            own = asked == times.tokens_per_rank(n_ranks)
            basis = f"measured {_day(here)}" + (
                "" if own else f" at {times.tokens_per_rank(n_ranks):,} tokens per rank"
            )
            return whole, split, basis
    if not box.on_gpu and here is None:
        compute_s = _compute_s(rung, asked, box)
        return n_ranks * compute_s, n_ranks * compute_s, CPU_BASIS
    fabric = here.fabric if here is not None else ASSUMED_FABRIC
    compute_s, ground = _scaled_s(here, rung, asked) or (_compute_s(rung, asked, box), "assumed speed")
    tokens = rung.placement.microbatch_seqs_per_rank * rung.size.shape.context_tokens
    step = ddp_step(rung.size.params, compute_s, fabric, n_ranks=n_ranks, n_passes=max(1, asked // tokens))
    return n_ranks * compute_s, step.seconds, f"model, {ground}, {fabric.basis}"


def _vocab(rung: RungPlan) -> int:
    return rung.size.params.n_embed // rung.size.shape.d_model


def _scaled_s(here: DdpMeasurement | None, rung: RungPlan, tokens_per_rank: int) -> tuple[float, str] | None:
    """Computing as fast per FLOP as the measured rung that is nearest in size."""
    if here is None or not here.rungs:
        return None

    def flops(times: RungTimes) -> float:
        return flops_per_token(times.shape, times.n_vocab, padded=True)

    own = rung.size.flops_per_token.causal_padded
    near = min(here.rungs, key=lambda times: max(flops(times), own) / min(flops(times), own))
    per_flop = near.no_sync.seconds / near.tokens_per_rank(here.n_ranks) / flops(near)
    return tokens_per_rank * own * per_flop, f"speed measured on rung {near.rung}"


def _compute_s(rung: RungPlan, tokens_per_rank: int, box: Box) -> float:
    """By the plan's assumptions; where the card is in no table, as an RTX 4080 would."""
    shape = rung.size.shape
    rate = cost.predict_rate(
        shape,
        _vocab(rung),
        box=box,
        n_processes=1,
        microbatch_seqs=rung.placement.microbatch_seqs_per_rank,
        accumulation_steps=max(1, tokens_per_rank // (rung.placement.microbatch_seqs_per_rank * shape.context_tokens)),
        precision=rung.training.precision,
    )
    per_s = rate.tokens_per_s if rate else FALLBACK_FLOPS_PER_S / rung.size.flops_per_token.causal_padded
    return tokens_per_rank / per_s


def _day(measurement: DdpMeasurement) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(measurement.measured_s))


@dataclass(frozen=True, kw_only=True)
class PaysFrom:
    """Tokens per rank between two syncs; None where no batch is large enough."""

    at_all_tokens: int | None
    """n cards are faster than one."""
    well_tokens: int | None
    """They do 90 % of what independent runs do."""


def pays_from(measurement: DdpMeasurement | None, rung: RungPlan, n_ranks: int, *, box: Box) -> PaysFrom:
    """From which batch on a second card pays for this rung."""

    def speedup(n_tokens: int) -> float:
        one, many, _ = step_seconds(measurement, rung, n_ranks, box=box, tokens_per_rank=n_tokens)
        return one / many

    sequence = rung.size.shape.context_tokens
    return PaysFrom(
        at_all_tokens=least_tokens(lambda n: speedup(n) > NOTABLY, sequence),
        well_tokens=least_tokens(lambda n: speedup(n) >= WELL * n_ranks, sequence),
    )


@dataclass(frozen=True, kw_only=True)
class RungAdvice:
    """What to do with a rung's runs when the whole ladder is to be done early."""

    rung: str
    advice: Advice
    efficiency: float
    """Strong scaling, at the rung's batch."""
    basis: str
    pays_from: PaysFrom


@dataclass(frozen=True, kw_only=True)
class LadderAdvice:
    """Every rung, and the ladder as a whole."""

    n_ranks: int
    rungs: tuple[RungAdvice, ...]
    mix: Mix
    fabric: Fabric
    words: str


def advise_ladder(measurement: DdpMeasurement | None, plan: Plan, n_ranks: int, *, box: Box) -> LadderAdvice:
    """One GPU, DDP or two independent runs: for each rung what finishes the ladder earliest."""
    runs: list[tuple[float, float, str]] = []
    facts = {}
    for rung in plan.rungs:
        one, many, basis = step_seconds(measurement, rung, n_ranks, box=box)
        facts[rung.name] = one, many, basis
        steps = [launch.tokens_trained / rung.training.batch_tokens for launch in rung.launches]
        n_seeds = max(1, rung.bill.n_runs // len(rung.launches))
        runs += [(one * n, one / many, rung.name) for n in steps for _ in range(n_seeds)]
    runs.sort(reverse=True)
    gain = _runs_gain(measurement, n_ranks, box)
    slowed = n_ranks / gain  # runs side by side slow one another down where they share memory, power or a bus
    mix = best_mix([s * slowed for s, _, _ in runs], [up * slowed for _, up, _ in runs], n_ranks)
    mix = replace(mix, one_card_s=sum(s for s, _, _ in runs))
    split = {name for _, _, name in runs[: mix.n_ddp]}
    whole = {name for _, _, name in runs[mix.n_ddp :]}
    rungs = tuple(
        RungAdvice(
            rung=rung.name,
            advice=_advice_of(rung.name, split, len(whole), gain),
            efficiency=facts[rung.name][0] / (n_ranks * facts[rung.name][1]),
            basis=facts[rung.name][2],
            pays_from=pays_from(measurement, rung, n_ranks, box=box),
        )
        for rung in plan.rungs
    )
    fabric = measurement.fabric if measurement is not None and measurement.is_of(box) else ASSUMED_FABRIC
    return LadderAdvice(n_ranks=n_ranks, rungs=rungs, mix=mix, fabric=fabric, words=_words(mix, runs, n_ranks))


def _runs_gain(measurement: DdpMeasurement | None, n_ranks: int, box: Box) -> float:
    """Tokens per second of n independent runs over those of one; n where nobody measured."""
    if measurement is None or not measurement.is_of(box) or measurement.n_ranks != n_ranks or not measurement.rungs:
        return float(n_ranks)
    return statistics.median(n_ranks * r.alone_full.seconds / r.together_full.seconds for r in measurement.rungs)


def _advice_of(name: str, split: set[str], n_whole: int, gain: float) -> Advice:
    if name in split:
        return "DDP"
    return "two independent runs" if n_whole > 1 and gain > NOTABLY else "one GPU"


def _words(mix: Mix, runs: Sequence[tuple[float, float, str]], n_ranks: int) -> str:
    from homelab_scaling.plan.show import duration

    told = [
        f"one card after another run {duration(mix.one_card_s)}",
        f"independent runs on {n_ranks} cards {duration(mix.packed_s)}",
        f"DDP for every run {duration(mix.all_ddp_s)}",
    ]
    if 0 < mix.n_ddp < len(runs):
        names = ", ".join(dict.fromkeys(name for _, _, name in runs[: mix.n_ddp]))
        told.append(f"DDP for {names} and independent runs for the rest {duration(mix.seconds)}")
    return "; ".join(told)
