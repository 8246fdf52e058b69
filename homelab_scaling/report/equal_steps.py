"""Ladders that train every size for the same number of steps: each model's slope on the way, and what such a design
can and cannot show.

The slope is that of log held-out loss on log compute along one run. For one model compute is tokens times a constant,
so it is as well the slope against tokens: it says how a model learns, not what its size is worth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from homelab_scaling.fit.models import Array
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.report.collect import LabView, RunView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.words import flops_text, loss_text

MIN_POINTS = 4
"""On the way, for a slope and its halves."""
SEED_NATS = 0.01
"""What the seed alone moves small models by (recipes/LOG.md; .006 to .013 in repeated runs)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """Held-out losses of one run after its warm-up."""

    tokens: Array
    flops: Array
    losses: Array

    def slope(self) -> float:
        """Of log loss on log compute, by least squares."""
        return _slope(self.flops, self.losses)

    def reach(self) -> tuple[float, float]:
        """The steepest and the flattest slope of any stretch of half the points."""
        n, half = len(self.losses), (len(self.losses) + 1) // 2
        slopes = [_slope(self.flops[i : i + half], self.losses[i : i + half]) for i in range(n - half + 1)]
        return min(slopes), max(slopes)

    def loss_at(self, flops: float) -> float | None:
        """Read between the points; None outside them."""
        if not self.flops[0] * (1 - 1e-9) <= flops <= self.flops[-1] * (1 + 1e-9):
            return None
        return math.exp(float(np.interp(math.log(flops), np.log(self.flops), np.log(self.losses))))


@dataclass(frozen=True, kw_only=True)
class ModelSlope:
    """How one rung's loss falls on the way."""

    rung: str
    n_params: int
    value: float
    """Mean over the seeds."""
    ci95: tuple[float, float] | None
    """Of that mean, from the spread of the seeds; None with one seed, which has no spread."""
    reach: tuple[float, float]
    """Of any stretch of half the points, the steepest and the flattest, mean over the seeds: how far the slope depends
    on where one looks. No interval of confidence."""
    n_points: int
    n_seeds: int


def _slope(flops: Array, losses: Array) -> float:
    x = np.log(flops)
    x = x - x.mean()
    return float(x @ np.log(losses) / (x @ x))


def way_of(run: RunView) -> Way | None:
    """A run's curve before any decay; None where there are too few points for a slope."""
    warmup = run.spec.science.schedule.warmup_tokens if run.spec is not None else 0
    found = {  # a point that was measured again after a resume is one point
        tokens: loss
        for curve in run.validation
        if not curve.is_decay
        for tokens, loss in zip(curve.tokens, curve.losses, strict=True)
        if tokens > warmup and loss > 0
    }
    if len(found) < MIN_POINTS:
        return None
    tokens = np.array(sorted(found), dtype=np.float64)
    losses = np.array([found[t] for t in sorted(found)], dtype=np.float64)
    return Way(tokens=tokens, flops=tokens * run.flops_per_token, losses=losses)


def model_slopes(view: LabView) -> list[ModelSlope]:
    """Of every rung with a curve, by size."""
    by_rung: dict[tuple[int, str], list[Way]] = {}
    for run in view.runs:
        if (way := way_of(run)) is not None:
            by_rung.setdefault((run.n_params, run.rung), []).append(way)
    return [_of_rung(rung, n_params, ways) for (n_params, rung), ways in sorted(by_rung.items())]


def _of_rung(rung: str, n_params: int, ways: Sequence[Way]) -> ModelSlope:
    values = np.array([way.slope() for way in ways])
    steepest, flattest = np.array([way.reach() for way in ways]).mean(axis=0)
    mean, ci95 = float(values.mean()), None
    if len(values) > 1:
        from scipy.special import stdtrit

        half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
        ci95 = (mean - half, mean + half)
    return ModelSlope(
        rung=rung,
        n_params=n_params,
        value=mean,
        ci95=ci95,
        reach=(float(steepest), float(flattest)),
        n_points=min(len(way.losses) for way in ways),
        n_seeds=len(ways),
    )


def equal_steps(view: LabView) -> int | None:
    """How many steps every run of the ladder takes; None where they differ, or there is one size."""
    sciences = [run.spec.science for run in view.runs if run.spec is not None]
    steps = {tokens // s.batch_tokens_global for s in sciences for tokens in s.horizons_tokens}
    return steps.pop() if len(steps) == 1 and len({run.n_params for run in view.runs}) > 1 else None


# ---------------------------------------------------------------------------------------------------------- the section


def steps_study(view: LabView, pictures: Sequence[Block]) -> list[Block]:
    """The section; nothing for a ladder of another design."""
    n_steps = equal_steps(view)
    if n_steps is None:
        return []
    slopes = {one.rung: one for one in model_slopes(view)}
    return [
        Heading(text="Every size for the same steps"),
        *([_table(view, n_steps, slopes)] if slopes else []),
        *pictures,
        Paragraph(text="What such a design can and cannot show:"),
        Bullets(items=tuple(said for said in _can_and_cannot(view, n_steps, slopes) if said)),
    ]


def _ends(view: LabView) -> list[RunView]:
    """One run of each size, ascending."""
    found: dict[int, RunView] = {}
    for run in view.runs:
        found.setdefault(run.n_params, run)
    return [found[n] for n in sorted(found)]


def _end_tokens(run: RunView) -> int:
    assert run.spec is not None
    return run.spec.science.horizons_tokens[-1]


def _spent(view: LabView) -> tuple[RunView, float]:
    """The run that is done with the fewest FLOPs, and these."""
    runs = [run for run in _ends(view) if run.spec is not None]
    least = min(runs, key=lambda run: run.flops_per_token * _end_tokens(run))
    return least, least.flops_per_token * _end_tokens(least)


def _table(view: LabView, n_steps: int, slopes: dict[str, ModelSlope]) -> Grid:
    least, spent = _spent(view)
    own = way_of(least)
    common = spent if own is None else float(own.flops[-1])
    lines = []
    for run in _ends(view):
        slope, way = slopes.get(run.rung), way_of(run)
        if run.spec is None or slope is None or way is None:
            continue
        flops = run.flops_per_token * _end_tokens(run)
        then = way.loss_at(common)
        lines.append(
            (
                run.rung,
                short(run.n_params),
                loss_text(run.rows[-1]) if run.rows else "–",
                f"{flops:.2e}",
                f"x {brief(flops / spent)}",
                brief(_end_tokens(run) / run.n_params),
                signed(slope.value) + (f" [{signed(slope.ci95[0])}, {signed(slope.ci95[1])}]" if slope.ci95 else ""),
                f"{signed(slope.reach[0])} to {signed(slope.reach[1])}",
                "–" if then is None else f"{then:.3f}",
            )
        )
    n_seeds = max(one.n_seeds for one in slopes.values())
    interval = (
        f"in brackets the 95 % interval of its mean over {n_seeds} seeds (Student's t)"
        if n_seeds > 1
        else "without an interval, since one seed has no spread and neighbouring points of a curve are not independent"
    )
    return Grid(
        head=(
            "rung", "N", "loss ± se", "FLOPs", "of the least", "tokens/N", "slope", "of half its points",
            f"loss at {flops_text(common)}",
        ),
        rows=tuple(lines),
        left=frozenset({"rung"}),
        caption=f"After {n_steps:,} steps each. The slope is that of the held-out loss against the model's own compute "
        f"in log-log, over all points after the warm-up, {interval}; beside it the steepest and the flattest of any "
        "stretch of half the points: how far it depends on where one looks. Last, each curve (of the small held-out "
        f"set) at the FLOPs where that of {least.rung} ends.",
    )  # fmt: skip


def signed(value: float) -> str:
    """-0.136 with a minus that cannot be taken for a dash."""
    return brief(value).replace("-", "−")


def _can_and_cannot(view: LabView, n_steps: int, slopes: dict[str, ModelSlope]) -> list[str]:
    return [_order(view, n_steps), _not_compute(view, slopes), _one_seed(view), _on_the_way(view), _own_slope(slopes)]


def _order(view: LabView, n_steps: int) -> str:
    done = [run for run in _ends(view) if run.rows]
    if len(done) < 2:
        return f"Nothing yet: {len(done)} of {len(_ends(view))} sizes have finished their {n_steps:,} steps."
    losses = [run.rows[-1].loss_nats for run in done]
    named = listed([f"{run.rung} {loss:.3f}" for run, loss in zip(done, losses, strict=True)])
    said = f"It shows the order of the sizes after the same {n_steps:,} steps: {named} nats per token"
    if all(a > b for a, b in pairwise(losses)):
        return f"{said}, lower at every step in size."
    return f"{said}. That is not lower at every step in size: the rate, the batch or the steps do not suit every rung."


def _not_compute(view: LabView, slopes: dict[str, ModelSlope]) -> str:
    least, spent = _spent(view)
    largest = _ends(view)[-1]
    if largest.spec is None or largest is least:
        return ""
    times = largest.flops_per_token * _end_tokens(largest) / spent
    said = (
        f"Equal steps are not equal compute: {largest.rung} spends {brief(times)} times the FLOPs of {least.rung}, and "
        f"sees {brief(_end_tokens(largest) / largest.n_params)} tokens a parameter where {least.rung} sees "
        f"{brief(_end_tokens(least) / least.n_params)}. Which size is best for a budget cannot be read off the ends"
    )
    way, own = way_of(largest), way_of(least)
    if way is None or own is None or largest.rung not in slopes:
        return f"{said}."
    common = float(own.flops[-1])
    then, end = way.loss_at(common), float(own.losses[-1])
    if then is None:
        step = common / largest.flops_per_token / largest.spec.science.batch_tokens_global
        return (
            f"{said}: for what {least.rung} had spent where its curve ends, {largest.rung} takes about "
            f"{max(1.0, step):.0f} steps, and its own curve begins later."
        )
    better = "lower" if then < end else "higher"
    return (
        f"{said}: at the {flops_text(common)} FLOPs where the curve of {least.rung} ends at {end:.3f}, that of "
        f"{largest.rung} was at {then:.3f}, {better}."
    )


def _one_seed(view: LabView) -> str:
    seeds = {run.seed for run in view.runs}
    if len(seeds) > 1:
        return ""
    losses = [run.rows[-1].loss_nats for run in _ends(view) if run.rows]
    gaps = [abs(a - b) for a, b in pairwise(losses)]
    said = f"One seed: the seed alone moves models of this kind by about {SEED_NATS} nat"
    if not gaps:
        return f"{said}, and nothing here says by how much."
    least = min(gaps)
    noise = 2 * math.sqrt(2) * SEED_NATS
    verdict = "far more than that" if least > 3 * noise else "more than that" if least > noise else "no more than that"
    return (
        f"{said}. The smallest gap between neighbouring sizes is {least:.3f} nats, {verdict}; how far the seed moves a "
        "slope is not known from one run."
    )


def _on_the_way(view: LabView) -> str:
    schedules = {run.spec.science.schedule for run in view.runs if run.spec is not None}
    names = {schedule.name for schedule in schedules}
    if names == {"cosine"}:
        half = listed(sorted({f"{100 * (1 + s.lr_final_frac) / 2:.0f} %" for s in schedules}))
        return (
            f"A point on the way is not a shorter run: halfway a cosine still trains at {half} of its peak rate, so "
            "the curve lies above what a run of that length would reach, and part of its fall towards the end is the "
            "falling rate. Only a row is at its final rate; one horizon a size says nothing of the exponent of tokens."
        )
    return (
        "A point on the way is not a shorter run: before its decay a trunk trains at the full rate, so the curve lies "
        "above what a run of that length would reach. Only finished rows are at their final rate."
    )


def _own_slope(slopes: dict[str, ModelSlope]) -> str:
    if not slopes:
        return ""
    steep, flat = min(slopes.values(), key=lambda s: s.value), max(slopes.values(), key=lambda s: s.value)
    span = f"{signed(steep.value)} ({steep.rung})" + (
        "" if steep is flat else f" to {signed(flat.value)} ({flat.rung})"
    )
    return (
        f"A model's own slope ({span}) is no scaling law: along one run compute is tokens times a constant, so it "
        "tells how that model learns from more steps. The exponent of compute is that of the lower envelope of many "
        "sizes, each trained to its end."
    )
