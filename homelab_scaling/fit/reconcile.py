"""From Kaplan's exponent to Chinchilla's on one's own points, one change at a time.

Kaplan et al. found N_opt ~ C^0.73, Hoffmann et al. C^0.50. On equal points most of the distance is made by what N and
C count, by losses read off unfinished schedules, and by a law without an irreducible term. Each step here changes one
of these and refits, so that a user sees which of them matters at the sizes of this ladder.

Source: Porian et al. 2024 (counting, schedules), Pearce and Song 2024 (counting, the irreducible term).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from homelab_scaling.errors import HomelabError
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.points import Count
from homelab_scaling.fit.result import Estimate, ScalingFit
from homelab_scaling.fit.words import between, brief
from homelab_scaling.runs import LossPoint

NO_OFFSET, WITH_OFFSET = "chinchilla:E=0", "chinchilla"
KAPLAN_A, CHINCHILLA_A = 0.73, 0.50
"""Kaplan et al. 2020 (N_opt ~ C_min^0.73); Hoffmann et al. 2022, Approach 1."""
N_DRAWS = 1000
WITHIN_HORIZON = (0.25, 0.5)
"""Shares of a single-horizon schedule at which it is read as if it were finished."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One fit on the way."""

    name: str
    """What it is, or what it changes."""
    count: Count
    law: str
    n_points: int
    n_unfinished: int
    """Of the points, measured before the learning rate had decayed."""
    a: Estimate
    """Exponent of N_opt(C) by this fit, with C = 6 N D of this count."""
    why_not: str | None = None
    """Why there is no number, or why the step changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """The steps in order, and what they add up to."""

    steps: tuple[Step, ...]
    summary: str


def reconcile(
    points: Sequence[LossPoint],
    unfinished: Sequence[LossPoint] = (),
    *,
    objective: str = "adaptive",
    n_bootstrap: int = N_DRAWS,
    seed: int = 0,
) -> Reconciliation:
    """The exponent of N_opt(C) step by step: body only, + head, + only finished decays, + irreducible term.

    Args:
        points: finished rows.
        unfinished: losses read before the learning rate had decayed; one with the run and D of a finished row stands in
            its place in the first two steps, as when one long run per size is read on its way.
    """
    done = [p for p in points if p.decayed is not False]
    early = [*unfinished, *(p for p in points if p.decayed is False)]
    replaced = {(p.run_id, p.n_tokens) for p in early if p.run_id is not None}
    read_on_the_way = [*(p for p in done if (p.run_id, p.n_tokens) not in replaced), *early]
    plan: tuple[tuple[str, Count, Sequence[LossPoint], str], ...] = (
        ("body parameters only", "body", read_on_the_way, NO_OFFSET),
        ("+ output head", "body+head", read_on_the_way, NO_OFFSET),
        ("+ only finished decays", "body+head", done, NO_OFFSET),
        ("+ irreducible term", "body+head", done, WITH_OFFSET),
    )
    steps: list[Step] = []
    for name, count, rows, law in plan:
        if name == "+ only finished decays" and not early:
            why = "changes nothing: every row has decayed already, and no loss on the way is known"
            steps.append(replace(steps[-1], name=name, why_not=steps[-1].why_not or why))
            continue
        step = Step(
            name=name,
            count=count,
            law=law,
            n_points=len(rows),
            n_unfinished=sum(p.decayed is False for p in rows),
            a=Estimate(value=None),
        )
        steps.append(_fitted(step, rows, objective=objective, n_bootstrap=n_bootstrap, seed=seed))
    return Reconciliation(steps=tuple(steps), summary=_summary(steps))


def _fitted(step: Step, rows: Sequence[LossPoint], *, objective: str, n_bootstrap: int, seed: int) -> Step:
    try:
        report = fit_points(
            rows, laws=(step.law,), objective=objective, n_bootstrap=n_bootstrap, seed=seed, count=step.count
        )
    except HomelabError as error:
        return replace(step, why_not=str(error))
    (fit,) = report.fits
    if not fit.is_fitted:
        return replace(step, why_not=fit.status)
    a = fit.derived["a"]
    return replace(step, a=a, why_not=_loose(fit) if a.value is None else None)


def _loose(fit: ScalingFit) -> str:
    return f"not pinned down: {fit.unpinned.get('a', fit.status)}"


def _summary(steps: Sequence[Step]) -> str:
    """What moved the exponent most, and where it ends between the two papers."""
    known = [(i, s) for i, s in enumerate(steps) if s.a.value is not None]
    if len(known) < 2:
        why = next((s.why_not for s in steps if s.why_not), "no step gave an exponent")
        return f"Kaplan and Chinchilla cannot be reconciled on these points: {why}."
    values = [s.a.value for _, s in known if s.a.value is not None]
    said = (
        f"Counted and read as Kaplan et al. did, these points give N_opt ∝ C^{brief(values[0])}; with every step taken "
        f"C^{brief(values[-1])}"
        if known[0][0] == 0 and known[-1][0] == len(steps) - 1
        else f"Between the steps that can be taken the exponent goes from {brief(values[0])} to {brief(values[-1])}"
    )
    moves = [
        (abs(after - before), after - before, s.name.removeprefix("+ "))
        for (before, after, (_, s)) in zip(values, values[1:], known[1:], strict=False)
    ]
    size, signed, name = max(moves)
    said += f" (Kaplan et al. {KAPLAN_A}, Hoffmann et al. {CHINCHILLA_A:.2f}). "
    if size < 5e-3:
        return said + "No step moves it by more than 0.005 at these sizes."
    said += f"The largest move, {signed:+.2f}, comes from the step “{name}”"
    return said + _against_width(known[-1][1], size) + "."


def _against_width(last: Step, size: float) -> str:
    if last.a.ci95 is None:
        return ""
    low, high = last.a.ci95
    if high - low < size:
        return ""
    return f", but the last exponent's own interval {between(low, high)} is wider than that"


def on_the_way(rows: Sequence[LossPoint], tokens: Sequence[float], losses: Sequence[float]) -> list[LossPoint]:
    """What one run's trunk would have given as rows: its validation loss where its horizons lie, before any decay.

    Args:
        rows: of one run.
        tokens, losses: its validation curve before decay, by rising tokens.
    """
    if len(tokens) < 2 or not rows:
        return []
    last = max(rows, key=lambda p: p.n_tokens)
    wanted = {p.n_tokens: p for p in rows if p is not last}
    if not wanted:
        wanted = {round(share * last.n_tokens): last for share in WITHIN_HORIZON}
    found = []
    for d, row in wanted.items():
        if not tokens[0] <= d <= tokens[-1]:
            continue
        loss = float(np.exp(np.interp(np.log(d), np.log(tokens), np.log(losses))))
        flops = None if row.flops is None else row.flops * d / row.n_tokens
        name = f"{row.run_id or row.row_id} before decay at {d:.0f}"
        found.append(
            replace(
                row,
                n_tokens=float(d),
                loss_nats=loss,
                row_id=name,
                decayed=False,
                flops=flops,
                loss_se_nats=None,
                bpb=None,
            )
        )
    return found
