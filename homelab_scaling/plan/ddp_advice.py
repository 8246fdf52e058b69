"""Per rung of a plan: how efficient DDP is here, from which batch it pays, and what finishes the ladder earliest.

Everything prefers what `homelab ddp` measured on this machine, then the model with the measured bandwidth, then the
model with an assumed one; every figure says which.
"""

import statistics
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
            basis = here.basis + ("" if own else f" at {times.tokens_per_rank(n_ranks):,} tokens per rank")
            return whole, split, basis
    if not box.on_gpu and here is None:
        whole = _compute_s(rung, n_ranks * asked, box)
        return whole, whole, CPU_BASIS
    fabric = here.fabric if here is not None else ASSUMED_FABRIC
    per_token, ground = _measured_speed(here, rung)
    whole, part = (
        n * per_token if per_token is not None else _compute_s(rung, n, box) for n in (n_ranks * asked, asked)
    )
    tokens = rung.placement.microbatch_seqs_per_rank * rung.size.shape.context_tokens
    step = ddp_step(rung.size.params, part, fabric, n_ranks=n_ranks, n_passes=max(1, asked // tokens))
    return whole, step.seconds + _unexplained_s(here, rung), f"model, {ground}, {fabric.basis}"


def _vocab(rung: RungPlan) -> int:
    return rung.size.params.n_embed // rung.size.shape.d_model


def _flops(times: RungTimes) -> float:
    return flops_per_token(times.shape, times.n_vocab, padded=True)


def _nearest(here: DdpMeasurement | None, rung: RungPlan) -> RungTimes | None:
    """The measured rung nearest in size."""
    own = rung.size.flops_per_token.causal_padded
    rungs = here.rungs if here is not None else ()
    return min(rungs, key=lambda times: max(_flops(times), own) / min(_flops(times), own), default=None)


def _measured_speed(here: DdpMeasurement | None, rung: RungPlan) -> tuple[float | None, str]:
    """Seconds per token of one rank, as fast per FLOP as the measured rung nearest in size; None where none was."""
    near = _nearest(here, rung)
    if here is None or near is None:
        return None, "assumed speed"
    per_flop = near.no_sync.seconds / near.tokens_per_rank(here.n_ranks) / _flops(near)
    return rung.size.flops_per_token.causal_padded * per_flop, f"speed and waiting as measured on rung {near.rung}"


def _unexplained_s(here: DdpMeasurement | None, rung: RungPlan) -> float:
    """What a sync took in the nearest measured rung beyond what bandwidth explains: waiting, above all."""
    near = _nearest(here, rung)
    if here is None or near is None:
        return 0.0
    step = ddp_step(
        near.params, near.no_sync.seconds, here.fabric, n_ranks=here.n_ranks, n_passes=near.accumulation_steps
    )
    return max(0.0, near.exposed_s - step.exposed_s)


def _compute_s(rung: RungPlan, n_tokens: int, box: Box) -> float:
    """One rank on so many tokens by the plan's assumptions; where the card is in no table, as an RTX 4080 would.

    Kernel launches set a floor to each pass, so a small batch is not done in proportion to its tokens.
    """
    shape = rung.size.shape
    seqs = max(1, n_tokens // shape.context_tokens)
    micro = min(rung.placement.microbatch_seqs_per_rank, seqs)
    rate = cost.predict_rate(
        shape,
        _vocab(rung),
        box=box,
        n_processes=1,
        microbatch_seqs=micro,
        accumulation_steps=-(-seqs // micro),
        precision=rung.training.precision,
    )
    per_s = rate.tokens_per_s if rate else FALLBACK_FLOPS_PER_S / rung.size.flops_per_token.causal_padded
    return n_tokens / per_s


@dataclass(frozen=True, kw_only=True)
class PaysFrom:
    """Tokens per rank between two syncs; None where no batch is large enough."""

    at_all_tokens: int | None
    """n cards are faster than one."""
    well_tokens: int | None
    """They do 90 % of what independent runs do."""


def pays_from(measurement: DdpMeasurement | None, rung: RungPlan, n_ranks: int, *, box: Box) -> PaysFrom:
    """From which batch on a second card pays for this rung."""
    gain = runs_gain(measurement, n_ranks, box)

    def speedup(n_tokens: int) -> float:
        one, many, _ = step_seconds(measurement, rung, n_ranks, box=box, tokens_per_rank=n_tokens)
        return one / many

    sequence = rung.size.shape.context_tokens
    return PaysFrom(
        at_all_tokens=least_tokens(lambda n: speedup(n) > NOTABLY, sequence),
        well_tokens=least_tokens(lambda n: speedup(n) >= WELL * gain, sequence),
    )


@dataclass(frozen=True, kw_only=True)
class RungAdvice:
    """What to do with a rung's runs when the whole ladder is to be done early."""

    rung: str
    tokens_per_rank: int
    alone: Advice
    """For one run with nothing beside it."""
    advice: Advice
    """For the rung's runs in this ladder."""
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
    gain = runs_gain(measurement, n_ranks, box)
    slowed = n_ranks / gain  # runs side by side slow one another down where they share memory, power or a bus
    mix = best_mix([s * slowed for s, _, _ in runs], [up * slowed for _, up, _ in runs], n_ranks)
    mix = replace(mix, one_card_s=sum(s for s, _, _ in runs))
    split = {name for _, _, name in runs[: mix.n_ddp]}
    whole = {name for _, _, name in runs[mix.n_ddp :]}
    rungs = tuple(
        RungAdvice(
            rung=rung.name,
            tokens_per_rank=rung.training.batch_tokens // n_ranks,
            alone="DDP" if facts[rung.name][0] > NOTABLY * facts[rung.name][1] else "one GPU",
            advice=_advice_of(rung.name, split, len(whole), gain),
            efficiency=facts[rung.name][0] / (n_ranks * facts[rung.name][1]),
            basis=facts[rung.name][2],
            pays_from=pays_from(measurement, rung, n_ranks, box=box),
        )
        for rung in plan.rungs
    )
    fabric = measurement.fabric if measurement is not None and measurement.is_of(box) else ASSUMED_FABRIC
    return LadderAdvice(
        n_ranks=n_ranks,
        rungs=rungs,
        mix=mix,
        fabric=fabric,
        words=_words(mix, runs, f"{n_ranks} {'cards' if box.on_gpu else 'CPU ranks'}"),
    )


def runs_gain(measurement: DdpMeasurement | None, n_ranks: int, box: Box) -> float:
    """Tokens per second of n independent runs over those of one; n where nobody measured."""
    if measurement is None or not measurement.is_of(box) or measurement.n_ranks != n_ranks or not measurement.rungs:
        return float(n_ranks)
    return statistics.median(n_ranks * r.alone_full.seconds / r.together_full.seconds for r in measurement.rungs)


def _advice_of(name: str, split: set[str], n_whole: int, gain: float) -> Advice:
    if name in split:
        return "DDP"
    return "two independent runs" if n_whole > 1 and gain > NOTABLY else "one GPU"


def _words(mix: Mix, runs: Sequence[tuple[float, float, str]], cards: str) -> str:
    from homelab_scaling.plan.show import duration

    told = [
        f"one run after another, not split, {duration(mix.one_card_s)}",
        f"independent runs on {cards} {duration(mix.packed_s)}",
        f"DDP for every run {duration(mix.all_ddp_s)}",
    ]
    if 0 < mix.n_ddp < len(runs):
        names = ", ".join(dict.fromkeys(name for _, _, name in runs[: mix.n_ddp]))
        told.append(f"DDP for {names} and independent runs for the rest {duration(mix.seconds)}")
    return "; ".join(told)
