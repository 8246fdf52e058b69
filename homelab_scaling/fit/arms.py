"""The two sides of a comparison: opened, checked against each other, matched run by run and refitted alike.

    open_arm -> check_comparable -> match_runs -> shared_multipliers -> refit_arms -> Refitted

Legend:  R resample, P parameter
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.fit import diagnose
from homelab_scaling.fit.catalogue import CATALOGUE, joint_fit, must_be_as_trained, open_fit
from homelab_scaling.fit.laws import Law, Posed, get_law, pin
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import Objective, ObjectiveName, parse_objective
from homelab_scaling.fit.points import Count, apply_count, read_points
from homelab_scaling.fit.resample import (
    FEW_RUNS,
    MIN_CLUSTERS,
    WEBB,
    Resampling,
    budget_strata,
    clusters,
    draw,
    pair_counts,
)
from homelab_scaling.fit.result import Draws, Estimate
from homelab_scaling.fit.slices import levels, tabulate
from homelab_scaling.fit.solve import Optimum, minimise, refit, solve
from homelab_scaling.runs import LossPoint

N_STARTS = 1024
MIN_REST = 3
"""Unmatched runs of an arm below which resampling them by themselves would hide their noise."""
E_GRID = 60
MIN_DRAWS = 20
NO_INTERVAL = "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One side, as it was given."""

    name: str
    count: str
    """Which parameters its N counts."""
    points: tuple[LossPoint, ...]
    """Empty where only a law is known."""
    law: str | None
    """The law of its own fit; None for bare points."""
    drawn: Draws | None
    largest_flops: float
    """6 N D of its largest point, or of the end of a published range."""
    published: bool


def open_arm(source: str, count: str | None = None) -> Arm:
    """A catalogue name, a fit, a lab, or a points CSV.

    Args:
        count: which parameters N is to count; None takes what its fit did, and all of them for a CSV.

    Raises:
        SpecError: none of these.
        DataError: rows that are no points.
    """
    published = source in CATALOGUE
    path = Path(source)
    if not published and (path.suffix == ".csv" or ((path / "runs").is_dir() and not (path / "fit").is_dir())):
        points = apply_count(read_points(path).points, _checked_count(count or "total"))
        return _arm(source, count or "total", points, law=None, drawn=None)
    report = open_fit(source)
    must_be_as_trained(report)
    fit, law, drawn = joint_fit(report)
    rows = tuple(report.points)
    if not rows and (path / "runs").is_dir():  # a fit from before points were kept beside it
        rows = read_points(path).points
    if rows:
        wanted = count or report.count
        return _arm(source, wanted, apply_count(rows, _checked_count(wanted)), law=law.name, drawn=drawn)
    largest = 6 * fit.ranges["n_params"][1] * fit.ranges["n_tokens"][1]
    return Arm(
        name=source,
        count=report.count,
        points=(),
        law=law.name,
        drawn=drawn,
        largest_flops=largest,
        published=published,
    )


def _arm(name: str, count: str, points: tuple[LossPoint, ...], *, law: str | None, drawn: Draws | None) -> Arm:
    largest = max(6 * p.n_params * p.n_tokens for p in points)
    return Arm(name=name, count=count, points=points, law=law, drawn=drawn, largest_flops=largest, published=False)


def _checked_count(count: str) -> Count:
    for known in ("total", "body", "body+head"):
        if count == known:
            return known
    raise SpecError(f"count {count!r}: choose total, body or body+head")


def check_comparable(a: Arm, b: Arm, *, bpb: bool) -> list[str]:
    """Refuses what does not compare and returns what must be said of what does."""
    if a.count != b.count:
        remedy = (
            f"give --count {b.count if a.points else a.count}" if a.points or b.points else "choose two of one count"
        )
        raise SpecError(
            f"A counts N as {a.count}, B as {b.count}: exponents under different counts do not compare; {remedy}"
        )
    texts = [{p.data_id for p in arm.points if p.data_id is not None} for arm in (a, b)]
    said = []
    if texts[0] and texts[1] and texts[0] != texts[1] and not bpb:
        raise DataError(
            f"A's losses are of text {', '.join(sorted(texts[0]))}, B's of {', '.join(sorted(texts[1]))} (data_id): "
            "nats per token of different texts or tokenizers do not compare; measure both on one text, or give --bpb "
            "if only the tokenizer differs"
        )
    if bpb:
        said.append("losses are bits per byte: they compare only if the held-out text is the same")
    elif a.points and b.points and not (texts[0] and texts[1]):
        said.append("not every row names its text (data_id): the same text and tokenizer are assumed")
    return said


def in_bpb(arm: Arm) -> Arm:
    missing = next((p.row_id or f"point {i + 1}" for i, p in enumerate(arm.points) if p.bpb is None), None)
    if missing is not None or not arm.points:
        raise DataError(
            f"{arm.name}: {missing or 'a law without points'} has no bpb, and --bpb needs it on every row; "
            "compare in nats on one text instead"
        )
    points = tuple(replace(p, loss_nats=p.bpb) for p in arm.points if p.bpb is not None)
    return replace(arm, points=points)


# ------------------------------------------------------------------------------------------------------ matching runs


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """Both arms' rows with matched runs first, in one order."""

    a: tuple[LossPoint, ...]
    b: tuple[LossPoint, ...]
    n_matched: int
    n_runs: tuple[int, int]

    @property
    def is_full(self) -> bool:
        return self.n_matched == self.n_runs[0] == self.n_runs[1]


def match_runs(a: Sequence[LossPoint], b: Sequence[LossPoint]) -> Matching:
    """Runs of A and B with the same N, D (within 1 %) and seed at every row."""
    both = [*a, *b]
    marks: list[list[int]] = []
    for values in ([p.n_params for p in both], [p.n_tokens for p in both]):
        mark = [0] * len(both)
        for index, rows in enumerate(levels(np.array(values, dtype=np.float64))):
            for row in rows:
                mark[row] = index
        marks.append(mark)
    runs: list[dict[str, list[int]]] = [defaultdict(list), defaultdict(list)]
    for row, point in enumerate(both):
        runs[row >= len(a)][point.run_id or f"run of {point.row_id or row}"].append(row)
    for side in runs:
        for members in side.values():
            members.sort(key=lambda row: (marks[0][row], marks[1][row]))

    def signature(members: list[int]) -> tuple[object, ...]:
        return tuple((marks[0][row], marks[1][row], both[row].seed) for row in members)

    waiting: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, members in runs[1].items():
        waiting[signature(members)].append(name)
    pairs = [(name, found.pop(0)) for name, members in runs[0].items() if (found := waiting[signature(members)])]
    order_a = [*(x for x, _y in pairs), *(name for name in runs[0] if name not in {x for x, _y in pairs})]
    order_b = [*(y for _x, y in pairs), *(name for name in runs[1] if name not in {y for _x, y in pairs})]
    return Matching(
        a=tuple(both[row] for name in order_a for row in runs[0][name]),
        b=tuple(both[row] for name in order_b for row in runs[1][name]),
        n_matched=len(pairs),
        n_runs=(len(runs[0]), len(runs[1])),
    )


# ----------------------------------------------------------------------------------------------------------- refitting


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One arm under the law of the comparison."""

    law: Law
    point: Array
    """(P,)."""
    values: Array
    """(R, P); R is 0 without resamples."""
    method: str
    unpinned: dict[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fitted:
    """An arm's points under a law, and the optimum there."""

    law: Law
    losses: Array
    columns: dict[str, Array]
    runs: NDArray[np.int64]
    strata: NDArray[np.int64]
    posed: Posed
    optimum: Optimum

    @property
    def y(self) -> Array:
        return np.log(self.losses)


def _fit(arm: Arm, law: Law, name: ObjectiveName) -> _Fitted:
    table = tabulate(arm.points)
    fault = diagnose.too_few(law, table, np.arange(len(arm.points)))
    if fault is not None:
        raise DataError(f"{arm.name}: {law.title} cannot be fitted: {fault}")
    columns = {axis: table.columns[axis] for axis in law.axes}
    posed = law.pose(columns, table.losses)
    runs = clusters(table.run_ids)
    return _Fitted(
        law=law,
        losses=table.losses,
        columns=columns,
        runs=runs,
        strata=budget_strata(table.columns["flops"], runs),
        posed=posed,
        optimum=solve(posed.model, np.log(table.losses), posed.starts(N_STARTS), name, bounds=posed.bounds),
    )


def _side(fitted: _Fitted, name: ObjectiveName, again: Resampling | None) -> Side:
    """The optimum and its resamples; a resample that did not converge is a row of NaN, to be left out of both arms."""
    law, posed, optimum = fitted.law, fitted.posed, fitted.optimum
    point = posed.natural(optimum.theta)
    values, method = np.zeros((0, len(law.names))), NO_INTERVAL
    if again is not None:
        found = refit(posed.model, again.y, again.weights, optimum, name, bounds=posed.bounds)
        good = np.isfinite(found.value) & np.isfinite(found.theta).all(axis=1)
        values, method = np.where(good[:, None], posed.natural(found.theta), np.nan), again.method
    estimates = {one: Estimate(value=float(point[i]), ci95=interval95(values[:, i])) for i, one in enumerate(law.names)}
    unpinned = diagnose.unpinned_parameters(law, posed.full(optimum.theta), estimates, fitted.losses)
    return Side(law=law, point=point, values=values, method=method, unpinned=unpinned)


@dataclass(frozen=True, kw_only=True, eq=False)
class Refitted:
    """Both arms under one law and the same resamples."""

    sides: tuple[Side, Side]
    shared: tuple[Side, Side] | None
    """With one irreducible loss for both; None where an arm has no points or the law no E to share."""
    shared_e: float | None
    objective: str
    matching: Matching
    paired: bool
    pairing: str
    """In words."""


def refit_arms(
    a: Arm, b: Arm, laws: tuple[Law, Law], *, objective: str, n_draws: int, seed: int, pin_e: float | None
) -> Refitted:
    """Refits the arms that have points; a law without points stands as it was given.

    Raises:
        DataError: rows that cannot carry the law.
    """
    matching = match_runs(a.points, b.points)
    both = bool(a.points and b.points)
    if both:
        a, b = replace(a, points=matching.a), replace(b, points=matching.b)
    name = parse_objective(objective)
    if name.kind == "adaptive" and any(0 < n < FEW_RUNS for n in matching.n_runs):
        name = parse_objective("l2-log")  # one objective for both arms, and outliers need many runs to be told
    fitted = [_fit(arm, law, name) if arm.points else None for arm, law in zip((a, b), laws, strict=True)]
    multipliers = None
    if fitted[0] and fitted[1] and n_draws:
        n_rows = len(a.points), len(b.points)
        multipliers = shared_multipliers(matching, fitted[0].strata, n_rows, n_draws, seed)
    again: list[Resampling | None] = [None, None]
    for index, one in enumerate(fitted):
        if one is not None and n_draws:
            again[index] = draw(
                one.posed.model,
                one.y,
                runs=one.runs,
                strata=one.strata,
                theta=one.optimum.theta,
                n_draws=n_draws,
                rng=np.random.default_rng([seed, 11 + index]),
                multipliers=multipliers[index] if multipliers else None,
            )
    left, right = (
        _side(one, name, drawn) if one else _as_given(arm, law)
        for one, drawn, arm, law in zip(fitted, again, (a, b), laws, strict=True)
    )
    shared, shared_e = None, None
    if fitted[0] and fitted[1] and "E" in laws[0].free:
        shared_e = pin_e or shared_offset(laws[0], (fitted[0], fitted[1]))
        pinned = pin(laws[0], {**laws[0].fixed, "E": shared_e})
        shared = (
            _side(_fit(a, pinned, name), name, again[0]),
            _side(_fit(b, pinned, name), name, again[1]),
        )
    paired = multipliers is not None
    alone = "not paired: " + ("only one arm is resampled" if any(fitted) else "neither arm has points to resample")
    pairing = _pairing_words(matching, paired=paired) if both else alone
    return Refitted(
        sides=(left, right),
        shared=shared,
        shared_e=shared_e,
        objective=name.name,
        matching=matching,
        paired=paired,
        pairing=pairing if n_draws else "not paired: no resamples were asked for",
    )


def shared_multipliers(
    matching: Matching, strata: NDArray[np.int64], n_rows: tuple[int, int], n_draws: int, seed: int
) -> tuple[Array, Array] | None:
    """Resampling multipliers of both arms, equal for matched runs; None where the arms must be drawn independently.

    Args:
        strata: of A's runs, used where every run is matched.
        n_rows: of A and of B.
    """
    (n_a, n_b), n_same = matching.n_runs, matching.n_matched
    together, own_a, own_b = (np.random.default_rng([seed, stream]) for stream in range(3))
    if (n_a >= FEW_RUNS) != (n_b >= FEW_RUNS) or n_same < MIN_CLUSTERS <= max(n_a, n_b):
        return None
    if n_a >= FEW_RUNS:
        if matching.is_full:
            counts = pair_counts(strata, n_draws, together)
            return counts, counts
        if any(0 < n - n_same < MIN_REST for n in (n_a, n_b)):
            return None
        same = pair_counts(np.zeros(n_same, dtype=np.int64), n_draws, together)
        rest = [
            pair_counts(np.zeros(n - n_same, dtype=np.int64), n_draws, rng) if n > n_same else np.zeros((n_draws, 0))
            for n, rng in ((n_a, own_a), (n_b, own_b))
        ]
    else:
        if min(n_a, n_b) < MIN_CLUSTERS:  # rows are the unit
            if not (matching.is_full and n_rows[0] == n_rows[1]):
                return None
            n_a = n_b = n_same = n_rows[0]
        same = together.choice(WEBB, size=(n_draws, n_same))
        rest = [rng.choice(WEBB, size=(n_draws, n - n_same)) for n, rng in ((n_a, own_a), (n_b, own_b))]
    return np.concatenate([same, rest[0]], axis=1), np.concatenate([same, rest[1]], axis=1)


def _pairing_words(matching: Matching, *, paired: bool) -> str:
    n_a, n_b = matching.n_runs
    if paired and matching.is_full:
        return f"paired: all {n_a} runs match in N, D and seed"
    which = f"{matching.n_matched} of A's {n_a} and B's {n_b} runs match in N, D and seed"
    if paired:
        return f"paired where they match: {which}; the rest is drawn independently, which widens the intervals"
    return f"independent draws: {which}, too few to pair; the intervals are wider for it"


def shared_offset(law: Law, arms: tuple[_Fitted, _Fitted]) -> float:
    """The one E that fits both arms best: squared log residuals in units of each arm's own noise, summed over arms.

    Each trial E is held by equal bounds, so that one batch per arm answers for the whole grid.
    """
    objective = Objective(kind="huber")
    at = law.free.index("E")
    grid = min(float(arm.losses.min()) for arm in arms) * np.geomspace(0.01, 0.98, E_GRID)
    for _ in range(3):  # coarse, fine, finest
        total = np.zeros(len(grid))
        for arm in arms:
            weights = np.ones(len(arm.y))
            starts = np.repeat(arm.optimum.theta[None], len(grid), axis=0)
            low, high = (np.repeat(bound[None], len(grid), axis=0) for bound in arm.posed.bounds)
            starts[:, at] = low[:, at] = high[:, at] = np.log(grid)
            found = minimise(arm.posed.model, arm.y, weights, starts, objective=objective, bounds=(low, high))
            residuals = arm.posed.model.value(arm.optimum.theta[None])[0][0] - arm.y
            variance = float((residuals**2).sum()) / max(1, len(arm.y) - len(law.free))
            total += found.value / max(variance, 1e-16)
        best = int(total.argmin())
        answer = float(grid[best])
        grid = np.geomspace(grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)], 11)
    return answer


def interval95(draws: Array) -> tuple[float, float] | None:
    kept = draws[np.isfinite(draws)]
    if len(kept) < MIN_DRAWS:
        return None
    low, high = np.quantile(kept, (0.025, 0.975))
    return float(low), float(high)


def choose_laws(a: Arm, b: Arm, law: str | None) -> tuple[Law, Law]:
    """The law of each arm: one for both, except between two laws as they stand."""
    bare = [arm.law for arm in (a, b) if not arm.points and arm.law]
    if law is not None:
        chosen = get_law(law)
        if not chosen.splits:
            raise SpecError(f"--law {law}: a comparison at a budget needs a law of N and D; choose chinchilla")
        wrong = next((arm for arm in (a, b) if not arm.points and arm.law != chosen.name), None)
        if wrong is not None:
            raise SpecError(f"--law {law}: {wrong.name} is {wrong.law} and has no points to refit; leave --law out")
        return chosen, chosen
    if len(bare) == 2:
        return get_law(bare[0]), get_law(bare[1])
    same = a.law if a.law == b.law else None
    one = get_law(bare[0] if bare else same or "chinchilla")
    return one, one


def _as_given(arm: Arm, law: Law) -> Side:
    assert arm.drawn is not None
    method = "its own draws" if len(arm.drawn.values) else NO_INTERVAL
    return Side(law=law, point=arm.drawn.point, values=arm.drawn.values, method=method, unpinned={})
