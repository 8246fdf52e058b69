"""The learning rate, tuned on the smallest rungs: which rates to try, which is best, and what tuning did to the law.

Each of the smallest rungs is trained to all its horizons at a few multiples of the rule's rate. The run that ends
lowest at the longest horizon is the rung's own; where between the tried rates the best lies is read off a parabola in
log rate, and a power law through these goes to the larger rungs. Losses of runs that differ in nothing but the seed
differ by about 0.01 nats: that is what a best rate is told by, and its error.

    LAB/<ladder>/lr.json                    the content of `Bracket`, frozen rung by rung
    LAB/<ladder>/bracket_runs/<run_id>      a trial, an ordinary run; the winner moves on to runs/
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from homelab_scaling import codec
from homelab_scaling.errors import DataError
from homelab_scaling.plan.tuned import TunedRates, TunedRung
from homelab_scaling.specs import ModelShape

SEED_SD_NATS = 0.01
"""Of the loss of one run, by its seed alone: 0.006 to 0.013 on small GPT-2s (four seeds)."""
MORE_FACTORS = 2
"""How often one more factor is tried beyond an edge."""
PUBLISHED_MOVE = "tuning batch and rate moved the exponent of N_opt(C) from .57 to .50 in Porian et al. 2024"
"""arXiv 2406.19146."""


@dataclass(frozen=True, kw_only=True)
class RateTrial:
    """One rung at one multiple of the rule's rate."""

    factor: float
    lr_peak: float
    run_ids: tuple[str, ...]
    """One, or one for each horizon where the schedule is a cosine."""
    losses: tuple[float | None, ...]
    """Final loss in nats of each horizon, ascending; None where there is no row."""
    why_not: str | None = None
    """Why there is no row of the longest horizon."""

    @property
    def final(self) -> float | None:
        """At the longest horizon."""
        return self.losses[-1]


@dataclass(frozen=True, kw_only=True)
class Best:
    """Where the best rate of a rung lies."""

    factor: float
    """Of the trial taken."""
    vertex: float
    """Between the tried factors, by a parabola in log rate through the best three."""
    sd_log: float | None
    """Of log vertex, by the noise of seeds; None where three losses do not tell."""
    note: str | None
    """What to think of it, where there is something."""


@dataclass(frozen=True, kw_only=True)
class BracketRung:
    """What was tried on one rung."""

    name: str
    shape: ModelShape
    n_params: int
    n_body: int
    batch_tokens: int
    horizons_tokens: tuple[int, ...]
    trials: tuple[RateTrial, ...]
    """Ascending in factor."""
    best: Best

    def trial(self, factor: float) -> RateTrial | None:
        return next((t for t in self.trials if t.factor == factor), None)

    @property
    def winner(self) -> RateTrial:
        found = self.trial(self.best.factor)
        assert found is not None
        return found


@dataclass(frozen=True, kw_only=True)
class HorizonEffect:
    """What tuning did at one horizon."""

    horizons_tokens: tuple[int, ...]
    """Of each rung, ascending in size."""
    exponent_rule: float
    """-d log L / d log N over the tuned rungs, at the rule's rate."""
    exponent_best: float
    """At the best rate of each."""
    sd: float
    """Of either, by the noise of seeds."""
    gains_nats: tuple[float, ...]
    """Loss at the rule's rate less that at the best, by rung."""


@dataclass(frozen=True, kw_only=True)
class TuningEffect:
    """What tuning did to the law over the tuned rungs; rendered by report/tuning.py."""

    rungs: tuple[str, ...]
    """Ascending in size."""
    horizons: tuple[HorizonEffect, ...]
    why_none: str | None
    """Why there is no exponent; None where there is."""

    @property
    def words(self) -> str:
        """In a sentence."""
        if not self.horizons:
            return f"what tuning did to the law cannot be told: {self.why_none}"
        last = self.horizons[-1]
        moved = last.exponent_best - last.exponent_rule
        told = "less than its error" if abs(moved) < math.sqrt(2) * last.sd else "more than its error"
        return (
            f"over {self.rungs[0]} to {self.rungs[-1]} the loss at the longest horizon falls as N^-"
            f"{last.exponent_best:.3f} at the best rates and N^-{last.exponent_rule:.3f} at the rule's (each +- "
            f"{last.sd:.3f} by the noise of seeds): moved by {moved:+.3f}, {told}"
        )


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """lr.json."""

    ladder: str
    rungs: tuple[BracketRung, ...]
    """Ascending in size; frozen, each as soon as it is decided."""
    rates: TunedRates
    effect: TuningEffect


def bracket_file(lab: Path) -> Path:
    """LAB/<ladder>/lr.json."""
    return lab / "lr.json"


def read_bracket(lab: Path) -> Bracket | None:
    """What a lab's lr.json says, or None where there is none."""
    path = bracket_file(lab)
    return codec.read_json(path, Bracket) if path.exists() else None


def tuned_rates(lab: Path) -> TunedRates | None:
    """What the planner takes from lr.json."""
    bracket = read_bracket(lab)
    return bracket.rates if bracket is not None else None


# ------------------------------------------------------------------------------------------------------------ one rung


def next_factor(losses: Mapping[float, float | None], n_asked: int) -> float | None:
    """The next multiple to try where the best one is at an edge; None where it is inside or enough were tried.

    Args:
        losses: factor -> final loss; None for one that diverged.
        n_asked: how many factors the ladder lists.
    """
    good = {f: loss for f, loss in losses.items() if loss is not None}
    if not good or len(losses) >= n_asked + MORE_FACTORS:
        return None
    ordered, best = sorted(losses), min(good, key=lambda f: good[f])
    if best == ordered[-1]:
        return best * ordered[-1] / ordered[-2]
    return best * ordered[0] / ordered[1] if best == ordered[0] else None


def best_rate(losses: Mapping[float, float | None], *, seed_sd_nats: float = SEED_SD_NATS) -> Best:
    """The best of the tried factors, and the vertex of the parabola about it.

    Raises:
        DataError: every factor diverged.
    """
    good = {f: loss for f, loss in losses.items() if loss is not None}
    if not good:
        raise DataError(f"every rate diverged, from {min(losses):g} x the rule's up; lower the ladder's rate")
    best = min(good, key=lambda f: good[f])
    ordered = sorted(good)
    at = ordered.index(best)
    if len(ordered) < 3 or not 0 < at < len(ordered) - 1:
        side = "too few rates ended" if len(ordered) < 3 else f"the best rate is the {_edge(at)} tried"
        return Best(factor=best, vertex=best, sd_log=None, note=f"{side}: the true one may lie beyond")
    three = ordered[at - 1 : at + 2]
    x, y = np.log(three), np.array([good[f] for f in three])
    # The vertex is linear in y above and below the line: its error by each loss in turn.
    vertex = _vertex(x, y)
    moved = [_vertex(x, y + seed_sd_nats * np.eye(3)[i]) - vertex for i in range(3)]
    sd = min(math.sqrt(sum(d * d for d in moved)), float(x[2] - x[0]) / 2)
    spread = float(y.max() - y.min())
    note = None
    if spread < 2 * seed_sd_nats:
        note = (
            f"losses between {three[0]:g} and {three[2]:g} x the rule's rate differ by {spread:.3f} nats, within what "
            f"seeds do ({seed_sd_nats:g}): any of them is as good"
        )
    return Best(factor=best, vertex=math.exp(vertex), sd_log=sd, note=note)


def _edge(at: int) -> str:
    return "lowest" if at == 0 else "highest"


def _vertex(x: np.ndarray, y: np.ndarray) -> float:
    """Of the parabola through three points, within their range; the middle where it does not open upwards."""
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    if curvature <= 0:
        return float(x[1])
    return float(np.clip((x[0] + x[1]) / 2 - left / (2 * curvature), x[0], x[2]))


# ----------------------------------------------------------------------------------------------------------- the ladder


def fit_rates(rungs: Sequence[BracketRung]) -> tuple[float, float]:
    """log factor at n_body = 1, and its slope in log n_body: exact through two rungs, weighted by error through three.

    One rung gives its factor and no slope, none no factor.
    """
    if not rungs:
        return 0.0, 0.0
    y = np.array([math.log(r.best.vertex) for r in rungs])
    if len(rungs) < 2:
        return float(y[0]), 0.0
    x = np.log([r.n_body for r in rungs])
    known = [r.best.sd_log for r in rungs if r.best.sd_log]
    worst = max(known, default=1.0)
    weights = [1 / (r.best.sd_log or worst) for r in rungs]
    slope, offset = np.polyfit(x, y, 1, w=weights)
    return float(offset), float(slope)


def tuning_effect(rungs: Sequence[BracketRung], *, seed_sd_nats: float = SEED_SD_NATS) -> TuningEffect:
    """The exponent of L(N) over the tuned rungs with and without tuning, for each horizon that all of them have."""
    names = tuple(r.name for r in rungs)

    def none(why: str) -> TuningEffect:
        return TuningEffect(rungs=names, horizons=(), why_none=why)

    if len(rungs) < 2:
        return none("fewer than two rungs have no exponent")
    rule = [r.trial(1.0) for r in rungs]
    if any(trial is None or trial.final is None for trial in rule):
        return none("not every rung came to its end at the rule's own rate")
    found = []
    for i in range(min(len(r.horizons_tokens) for r in rungs)):
        plain = [trial.losses[i] if trial else None for trial in rule]
        tuned = [r.winner.losses[i] for r in rungs]
        losses = [(p, t) for p, t in zip(plain, tuned, strict=True) if p is not None and t is not None]
        if len(losses) < len(rungs):
            continue
        x = np.log([r.n_params for r in rungs])
        y_rule, y_best = (np.log([pair[k] for pair in losses]) for k in (0, 1))
        lever = (x - x.mean()) / float(((x - x.mean()) ** 2).sum())
        relative = seed_sd_nats / np.array([t for _, t in losses])
        found.append(
            HorizonEffect(
                horizons_tokens=tuple(r.horizons_tokens[i] for r in rungs),
                exponent_rule=-float(lever @ y_rule),
                exponent_best=-float(lever @ y_best),
                sd=float(np.sqrt((lever**2) @ (relative**2))),
                gains_nats=tuple(p - t for p, t in losses),
            )
        )
    if not found:
        return none("no horizon has a loss at both rates on every rung")
    return TuningEffect(rungs=names, horizons=tuple(found), why_none=None)


def tuned_rung(rung: BracketRung) -> TunedRung:
    """What the plan takes of it."""
    return TunedRung(
        name=rung.name,
        shape=rung.shape,
        n_body=rung.n_body,
        batch_tokens=rung.batch_tokens,
        lr_peak=rung.winner.lr_peak,
        factor=rung.best.vertex,
        factor_sd_log=rung.best.sd_log,
    )
