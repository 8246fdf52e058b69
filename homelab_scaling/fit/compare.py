"""Two recipes side by side: exponents, constants, who is better at a budget, and how much compute that is worth.

Both arms are refitted with one law and one objective to resamples that treat matched runs alike: what the arms share
(seed, data order, design) then cancels in their difference. C = 6 N D along each arm's own best split.

Legend:  R resample, P parameter; L_A, L_B lowest loss that a budget buys in arm A, B; g exponent of L - E against C
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import best_loss
from homelab_scaling.fit.arms import (
    MIN_DRAWS,
    NO_INTERVAL,
    Arm,
    Side,
    check_comparable,
    choose_laws,
    in_bpb,
    interval95,
    refit_arms,
)
from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.words import number

REACH = 46.0
"""log of the largest multiplier that is looked for, 1e20."""

Kind = Literal["better exponent", "better constant only", "not distinguishable", "no intervals"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity in both arms."""

    name: str
    a: Estimate
    b: Estimate
    scale: Literal["difference", "ratio"]
    change: Estimate
    """B - A, or B / A for prefactors."""


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """How many times the compute A needs to reach B's loss."""

    value: float | None
    """None where A never gets there."""
    ci95: tuple[float, float | None] | None
    """None for an upper end that A never reaches."""
    never_frac: float | None
    """Share of the resamples in which A never reaches it."""


ROUNDING = 1e-9
"""Differences below this are of arithmetic, not of recipes: a lab compared with its copy is no better."""


@dataclass(frozen=True, kw_only=True)
class AtBudget:
    """Both arms on their best split of one budget."""

    flops: float
    loss_a: Estimate
    loss_b: Estimate
    p_b_better: float | None
    """Share of the paired resamples in which B's loss is lower; None without resamples."""
    multiplier: Multiplier
    multiplier_shared_e: Multiplier | None
    """With one irreducible loss for both; None where an arm cannot be refitted or the law has none."""
    extrapolation: float
    """How far beyond the smaller arm's largest budget."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the comparison says, by the stated rule."""

    kind: Kind
    better: Literal["A", "B"] | None
    words: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A beside B."""

    a: str
    b: str
    law: str
    law_b: str
    objective: str
    count: str
    pairing: str
    """In words: which runs share their resamples."""
    paired: bool
    n_matched: int
    n_runs: tuple[int, int]
    interval: str
    shared_e: float | None
    """Irreducible loss given to both in the second reading."""
    differences: tuple[Difference, ...]
    budgets: tuple[AtBudget, ...]
    """Empty where the losses of the two do not compare."""
    verdict: Verdict
    verdict_shared_e: Verdict | None
    rule: str
    notes: tuple[str, ...]


RULE = (
    "better exponent: the 95 % interval of the difference of the loss-compute exponents excludes 0; else better "
    "constant only: that of the log of the compute multiplier, at the largest budget both arms reach, excludes 0"
)


# ----------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """Both sides with as many resamples each, row by row comparable."""

    a: Side
    b: Side

    @property
    def n_draws(self) -> int:
        return len(self.a.values)


def _pair(a: Side, b: Side) -> _Pair:
    """Cuts to common, converged resamples; a side without any stands still at its point."""
    n_draws = min((len(s.values) for s in (a, b) if len(s.values)), default=0)
    values = [s.values[:n_draws] if len(s.values) else np.repeat(s.point[None], n_draws, axis=0) for s in (a, b)]
    good = np.isfinite(values[0]).all(axis=1) & np.isfinite(values[1]).all(axis=1)
    return _Pair(a=replace(a, values=values[0][good]), b=replace(b, values=values[1][good]))


def compute_multiplier(law_a: Law, a: Array, law_b: Law, b: Array, flops: float) -> Array:
    """C' / flops with L_A(C') = L_B(flops), by bisection on log C'; infinite where A never gets there.

    Args:
        a, b: natural parameters of each arm (..., P).
    """
    wanted = best_loss(law_b, b, flops)
    shape = np.broadcast_shapes(wanted.shape, a.shape[:-1])
    low, high = np.full(shape, -REACH), np.full(shape, REACH)
    never = best_loss(law_a, a, flops * np.exp(REACH)) > wanted
    for _ in range(60):
        middle = (low + high) / 2
        short_of = best_loss(law_a, a, flops * np.exp(middle)) > wanted
        low, high = np.where(short_of, middle, low), np.where(short_of, high, middle)
    return np.where(never, np.inf, np.exp((low + high) / 2))


def _multiplier(pair: _Pair, flops: float) -> Multiplier:
    a, b = pair.a, pair.b
    point = float(compute_multiplier(a.law, a.point, b.law, b.point, flops))
    ci95: tuple[float, float | None] | None = None
    never = None
    if pair.n_draws >= MIN_DRAWS:
        draws = compute_multiplier(a.law, a.values, b.law, b.values, flops)
        never = float(np.isinf(draws).mean())
        low, high = np.quantile(draws, (0.025, 0.975), method="higher")
        ci95 = (float(low), float(high) if np.isfinite(high) else None) if np.isfinite(low) else None
    return Multiplier(value=point if np.isfinite(point) else None, ci95=ci95, never_frac=never)


def _at_budget(pair: _Pair, flops: float, shared: _Pair | None, reached: float) -> AtBudget:
    a, b = pair.a, pair.b
    points = [float(best_loss(s.law, s.point, flops)) for s in (a, b)]
    draws = [best_loss(s.law, s.values, flops) for s in (a, b)]
    return AtBudget(
        flops=flops,
        loss_a=Estimate(value=points[0], ci95=interval95(draws[0])),
        loss_b=Estimate(value=points[1], ci95=interval95(draws[1])),
        p_b_better=_share_below(draws[1], draws[0]) if pair.n_draws >= MIN_DRAWS else None,
        multiplier=_multiplier(pair, flops),
        multiplier_shared_e=_multiplier(shared, flops) if shared else None,
        extrapolation=max(1.0, flops / reached),
    )


def _differences(pair: _Pair) -> tuple[Difference, ...]:
    """Every parameter and derived exponent that both laws have and at least one arm measured."""
    found = []
    a, b = pair.a, pair.b
    prefactors = {p.name for p in (*a.law.parameters, *b.law.parameters) if p.kind == "prefactor"}
    both = [{**s.law.by_name(s.point), **s.law.derived(s.point)} for s in (a, b)]
    drawn = [{**s.law.by_name(s.values), **s.law.derived(s.values)} for s in (a, b)]
    for name in (n for n in both[0] if n in both[1] and not (n in a.law.fixed and n in b.law.fixed)):
        values, draws = [float(side[name]) for side in both], [side[name] for side in drawn]
        in_ratio = name in prefactors
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            change = values[1] / values[0] if in_ratio else values[1] - values[0]
            changes = draws[1] / draws[0] if in_ratio else draws[1] - draws[0]
        loose = [name in s.unpinned for s in (a, b)]
        found.append(
            Difference(
                name=name,
                a=Estimate(
                    value=None if loose[0] else values[0],
                    ci95=interval95(draws[0]) if a.method != NO_INTERVAL else None,
                ),
                b=Estimate(
                    value=None if loose[1] else values[1],
                    ci95=interval95(draws[1]) if b.method != NO_INTERVAL else None,
                ),
                scale="ratio" if in_ratio else "difference",
                change=Estimate(value=None if any(loose) else change, ci95=interval95(changes)),
            )
        )
    return tuple(found)


def judge(exponent: Difference, at: AtBudget | None, *, shared: bool = False) -> Verdict:
    """The verdict by `RULE`.

    Args:
        exponent: of loss above E against compute.
        at: the largest budget both arms reach; None where their losses do not compare.
        shared: takes the multiplier with one E for both.
    """
    ci = exponent.change.ci95
    if ci is None:
        return Verdict(
            kind="no intervals",
            better=None,
            words="no verdict: without resamples or published draws there is no interval to judge by",
        )
    shown = f"the loss-compute exponents differ by {ci[0]:+.4f} to {ci[1]:+.4f} (B - A, 95 %)"
    if ci[0] > ROUNDING or ci[1] < -ROUNDING:
        better: Literal["A", "B"] = "B" if ci[0] > 0 else "A"
        other = "A" if better == "B" else "B"
        words = f"{better} has the better exponent: {shown}, so it gains on {other} with every further FLOP"
        return Verdict(kind="better exponent", better=better, words=words)
    if at is None:
        words = f"not distinguishable: {shown}, and constants of different texts do not compare"
        return Verdict(kind="not distinguishable", better=None, words=words)
    m = at.multiplier_shared_e if shared and at.multiplier_shared_e else at.multiplier
    if m.ci95 is not None and (m.ci95[0] > 1 + ROUNDING or (m.ci95[1] is not None and m.ci95[1] < 1 - ROUNDING)):
        better = "B" if m.ci95[0] > 1 else "A"
        words = (
            f"{better} has the better constant only: {shown}, but at C = {at.flops:.3g} A needs {multiplier_words(m)} "
            f"times the compute for B's loss"
        )
        return Verdict(kind="better constant only", better=better, words=words)
    words = (
        f"not distinguishable: {shown}, and at C = {at.flops:.3g} A needs {multiplier_words(m)} times the compute for "
        "B's loss"
    )
    return Verdict(kind="not distinguishable", better=None, words=words)


def _share_below(b: Array, a: Array) -> float:
    """Share of the pairs in which b is lower; equal ones count half."""
    equal = np.abs(b - a) <= ROUNDING * np.abs(a)
    return float(((b < a) & ~equal).mean() + 0.5 * equal.mean())


def multiplier_words(m: Multiplier) -> str:
    """1.27 [1.10, 1.45]; `unreachable` where A never gets to B's loss."""
    value = "unreachably many" if m.value is None else _times(m.value)
    if m.ci95 is None:
        return value
    return f"{value} [{_times(m.ci95[0])}, {'never' if m.ci95[1] is None else _times(m.ci95[1])}]"


def _times(value: float) -> str:
    return f"{value:.2f}" if 0.095 <= value < 100 else number(value)


def compare(
    a: Arm,
    b: Arm,
    *,
    law: str | None = None,
    flops: Sequence[float] = (),
    objective: str = "adaptive",
    n_draws: int = 4000,
    seed: int = 0,
    pin_e: float | None = None,
    bpb: bool = False,
) -> Comparison:
    """B against A; arms with points are refitted with one law, one objective and the same resamples.

    Args:
        law: None takes the law both were fitted with, or that of an arm which is only a law, else chinchilla.
        flops: budgets C = 6 N D; empty takes the largest that both reach, 10 and 100 times it.
        pin_e: irreducible loss of the second reading; None takes the one that fits both arms best.
        bpb: compares bits per byte instead of nats per token.

    Raises:
        SpecError: different counts of N, an unknown law, a budget that is not positive.
        DataError: different texts, or rows that cannot carry the law.
    """
    if any(not 0 < c < np.inf for c in flops):
        raise SpecError(f"--flops {' '.join(f'{c:g}' for c in flops)}: wants positive budgets, such as 1e17")
    if not 0 <= n_draws <= 100_000:
        raise SpecError(f"{n_draws} resamples asked for, wants 0 to 100,000")
    if pin_e is not None and not pin_e > 0:
        raise SpecError(f"--shared-e {pin_e:g}: wants an irreducible loss above 0")
    notes = check_comparable(a, b, bpb=bpb)
    if bpb:
        a, b = in_bpb(a), in_bpb(b)
    laws = choose_laws(a, b, law)
    refitted = refit_arms(a, b, laws, objective=objective, n_draws=n_draws, seed=seed, pin_e=pin_e)
    pair = _pair(*refitted.sides)
    shared = _pair(*refitted.shared) if refitted.shared else None
    reached = min(a.largest_flops, b.largest_flops)
    chosen = sorted(flops) if flops else [reached, 10 * reached, 100 * reached]
    budgets: tuple[AtBudget, ...] = ()
    judged = None
    if a.published == b.published:
        budgets = tuple(_at_budget(pair, float(c), shared, reached) for c in chosen)
        judged = _at_budget(pair, reached, shared, reached)
    else:
        notes.append("a published law holds for its own text and tokenizer: only exponents are compared, not losses")
    differences = _differences(pair)
    verdict = judge(_exponent(differences), judged)
    notes += _against_offset(verdict, differences)
    return Comparison(
        a=a.name,
        b=b.name,
        law=laws[0].name,
        law_b=laws[1].name,
        objective=refitted.objective,
        count=a.count,
        pairing=refitted.pairing,
        paired=refitted.paired,
        n_matched=refitted.matching.n_matched,
        n_runs=refitted.matching.n_runs,
        interval="; ".join(dict.fromkeys(s.method for s in refitted.sides)),
        shared_e=refitted.shared_e,
        differences=differences,
        budgets=budgets,
        verdict=verdict,
        verdict_shared_e=judge(_exponent(_differences(shared)), judged, shared=True) if shared and judged else None,
        rule=RULE,
        notes=(*notes, *_notes(a, b, refitted.sides)),
    )


def _exponent(differences: Sequence[Difference]) -> Difference:
    return next(d for d in differences if d.name == "exponent")


def _against_offset(verdict: Verdict, differences: Sequence[Difference]) -> list[str]:
    """A steeper fall towards a higher floor may be a worse recipe: the two are fitted together."""
    offset = next((d for d in differences if d.name == "E"), None)
    if verdict.kind != "better exponent" or offset is None or offset.change.ci95 is None:
        return []
    low, high = offset.change.ci95
    if (low > 0) if verdict.better == "B" else (high < 0):
        return [
            f"{verdict.better} falls faster but to a higher irreducible loss E: read the losses at each budget first"
        ]
    return []


def _notes(a: Arm, b: Arm, sides: Sequence[Side]) -> list[str]:
    said = []
    for letter, arm, side in zip("AB", (a, b), sides, strict=True):
        if arm.published:
            said.append(
                f"{letter} is published without draws: its numbers count as exact here, so intervals are too narrow"
            )
        elif not arm.points:
            said.append(
                f"{letter} has no points beside its fit: its own draws are used, independent of the other arm's"
            )
        if side.unpinned:
            reasons = dict.fromkeys(side.unpinned.values())
            names = ", ".join(side.unpinned)
            said.append(f"{letter}'s points do not pin down {names}: {'; '.join(reasons)}")
    return said
