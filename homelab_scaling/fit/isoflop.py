"""Approach 2: the best size of each compute budget from a parabola through its runs, then a line in logs.

Legend:  R batch member (a resample), n row, k row of one budget, g budget

The parabola is of loss against log N, and again against log D. A budget counts only where its minimum is bracketed:
positive curvature and a vertex between the smallest and the largest size. C is 6 N D throughout, so that the exponents
compare with those of a law of N and D; on a table whose budgets are exactly that, it is the budget.

Source: Hoffmann et al. 2022 section 3.2; the bias: Open-Athena's scaling-law-analysis.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.growth import Growth, Mask, grow
from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.slices import levels

SAME_BUDGET = 0.05
"""Rows within 5 % of a budget's middle belong to it."""
MIN_SIZES = 4
DRAWN_SIZES = 3
"""A parabola goes through any three points: drawn, but no evidence."""
MIN_BUDGETS = 2
WIDE = 8.0
"""Sizes further than this factor from the best one bend the parabola."""
AKIMA_SIZES = 6
AKIMA_GRID = 2001


@dataclass(frozen=True, kw_only=True, eq=False)
class Budget:
    """The rows of one compute budget."""

    flops: float
    """Geometric middle of its rows."""
    rows: NDArray[np.int64]
    """By rising N."""
    n_sizes: int

    @property
    def counts(self) -> bool:
        """Whether a parabola through it is more than three points joined."""
        return self.n_sizes >= MIN_SIZES


@dataclass(frozen=True, kw_only=True, eq=False)
class Vertex:
    """The minima of one budget's parabolas."""

    budget: Budget
    log_n: Array
    """(R,) where the parabola in log N is lowest; NaN where it has no bracketed minimum."""
    log_d: Array
    """(R,) the same in log D."""
    fault: str | None
    """Why the first member (the rows as measured) has none, in words."""


def find_budgets(flops: Array, n_params: Array) -> list[Budget]:
    """The budgets that three sizes or more share, ascending: the fullest window of 10 % first, then of what is left."""
    left = np.argsort(flops, kind="stable")
    found = []
    while len(left) >= DRAWN_SIZES:
        ends = np.searchsorted(flops[left], flops[left] * (1 + 2 * SAME_BUDGET), side="right")
        first = int(np.argmax(ends - np.arange(len(left))))
        rows = left[first : ends[first]]
        if len(rows) < DRAWN_SIZES:
            break
        left = np.delete(left, slice(first, int(ends[first])))
        n_sizes = len(levels(n_params[rows]))
        if n_sizes >= DRAWN_SIZES:
            middle = float(np.exp(np.log(flops[rows]).mean()))
            found.append(Budget(flops=middle, rows=rows[np.argsort(n_params[rows], kind="stable")], n_sizes=n_sizes))
    return sorted(found, key=lambda b: b.flops)


def parabola_minimum(x: Array, y: Array, weights: Array) -> tuple[Array, Array, Mask]:
    """Curvature and vertex of the weighted parabola through each member's points, and whether it is bracketed.

    Args:
        x: (k,).
        y: (R, k).
        weights: (R, k).
    """
    centre, scale = float(x.mean()), max(float(np.ptp(x)), 1e-12)
    z = (x - centre) / scale
    powers = np.stack([np.ones_like(z), z, z * z], axis=-1)
    normal = np.einsum("rk,kp,kq->rpq", weights, powers, powers)
    middle = (weights * y).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-300)
    right = np.einsum("rk,kp,rk->rp", weights, powers, y - middle[:, None])
    present = weights > 0
    # Three different sizes are needed; equal neighbours (seeds of one size) count once.
    groups = [present[:, rows].any(axis=1) for rows in levels(np.exp(x))]
    solvable = np.sum(groups, axis=0) >= DRAWN_SIZES
    normal[~solvable] = np.eye(3)
    _c0, c1, c2 = np.linalg.solve(normal, right[..., None])[..., 0].T
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -c1 / (2 * c2)
    low = np.where(present, z, np.inf).min(axis=1)
    high = np.where(present, z, -np.inf).max(axis=1)
    bracketed = solvable & (c2 > 0) & (vertex > low) & (vertex < high)
    return c2 / scale**2, centre + scale * vertex, bracketed


def vertex_interval(x: Array, y: Array) -> tuple[float, float] | None:
    """The 95 % interval of where the parabola through one budget's points is lowest, from their scatter around it.

    Fieller's: every place where the slope is not told apart from zero. It knows nothing of losses being no parabola.

    Args:
        x: log size (k,).
        y: loss (k,).

    Returns:
        The interval in x; None below four sizes, where a parabola always fits, or where the curvature is not sure.
    """
    from scipy.stats import t as student

    if len(levels(np.exp(x))) < MIN_SIZES:
        return None
    centre, scale = float(x.mean()), float(np.ptp(x))
    z = (x - centre) / scale
    design = np.stack([np.ones_like(z), z, z * z], axis=1)
    (_c0, c1, c2), *_ = np.linalg.lstsq(design, y, rcond=None)
    spare = len(z) - 3
    variance = float(((y - design @ np.array([_c0, c1, c2])) ** 2).sum()) / spare
    v = np.linalg.inv(design.T @ design) * variance * float(student.ppf(0.975, spare)) ** 2
    # (c1 + 2 c2 z)^2 <= t^2 var(c1 + 2 c2 z) is a quadratic in z.
    two, one, zero = 4 * (c2**2 - v[2, 2]), 4 * (c1 * c2 - v[1, 2]), c1**2 - v[1, 1]
    if c2 <= 0 or two <= 0:
        return None
    half = np.sqrt(max(0.0, one**2 - 4 * two * zero)) / (2 * two)
    middle = -one / (2 * two)
    return centre + scale * float(middle - half), centre + scale * float(middle + half)


def vertices(budgets: list[Budget], columns: dict[str, Array], losses: Array, weights: Array) -> list[Vertex]:
    """The best N and D of each budget in every batch member.

    Args:
        columns: n_params and n_tokens (n,).
        losses, weights: (R, n).
    """
    found = []
    for budget in budgets:
        y, w = losses[:, budget.rows], weights[:, budget.rows]
        logs, faults = [], []
        for axis, letter in (("n_params", "N"), ("n_tokens", "D")):
            curvature, at, good = parabola_minimum(np.log(columns[axis][budget.rows]), y, w)
            logs.append(np.where(good, at, np.nan))
            if not good[0]:
                bent = "its parabola opens downwards" if not curvature[0] > 0 else "its minimum is at or beyond an end"
                faults.append(f"{bent} in log {letter}")
        either = np.isnan(logs[0]) | np.isnan(logs[1])
        log_n, log_d = (np.where(either, np.nan, log) for log in logs)
        found.append(Vertex(budget=budget, log_n=log_n, log_d=log_d, fault=faults[0] if faults else None))
    return found


def growth(found: list[Vertex], *, flops: float) -> Growth:
    """N_opt and D_opt as power laws of C through the vertices; a member needs two budgets with one."""
    log_n, log_d = (np.stack([getattr(v, name) for v in found], axis=1) for name in ("log_n", "log_d"))
    there = np.isfinite(log_n)
    log_c = np.log(6) + log_n + log_d
    return grow(log_c, log_n, log_d, there.astype(float), flops=flops, usable=there.sum(axis=1) >= MIN_BUDGETS)


def fit_isoflop(
    budgets: list[Budget], columns: dict[str, Array], losses: Array, weights: Array, *, flops: float
) -> Growth:
    """Approach 2 on every batch member at once: losses and weights (R, n), N_opt and D_opt read off at `flops`."""
    return growth(vertices(budgets, columns, losses, weights), flops=flops)


@dataclass(frozen=True, kw_only=True)
class Bias:
    """What the parabolas alone get wrong on losses without noise."""

    a: float
    """Estimated minus true exponent of N_opt."""
    n_opt_frac: float
    """Estimated over true N_opt, minus 1."""
    d_opt_frac: float


def bias(law: Law, values: Array, budgets: list[Budget], columns: dict[str, Array], *, flops: float) -> Bias | None:
    """Approach 2's error at this design, were a fitted surface the truth and nothing noisy; None where it fails there.

    Args:
        values: natural parameters of the law (P,).
        flops: where N_opt and D_opt are compared.
    """
    exact = np.asarray(law.loss(values, dict(columns)))[None]
    found = fit_isoflop(budgets, columns, exact, np.ones_like(exact), flops=flops)
    if not np.isfinite(found.a[0]):
        return None
    a, log_n, log_d = best_split(law, values, flops)
    return Bias(
        a=float(found.a[0] - a),
        n_opt_frac=float(np.exp(found.log_n[0] - log_n) - 1),
        d_opt_frac=float(np.exp(found.log_d[0] - log_d) - 1),
    )


def best_split(law: Law, values: Array, flops: float) -> tuple[Array, Array, Array]:
    """a, log N_opt and log D_opt of a law of N and D at 6 N D = flops, from natural parameters (..., P).

    Source: Hoffmann et al. 2022 eq. 4.
    """
    big_a, big_b, alpha, beta = law.split_terms(values)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(alpha * big_a) - np.log(beta * big_b)
    log_c = np.log(flops / 6)
    log_n = (log_ratio + beta * log_c) / (alpha + beta)
    return beta / (alpha + beta), log_n, log_c - log_n


def akima_minimum(x: Array, y: Array) -> float | None:
    """Where Akima's curve through the points is lowest; None at an end or with fewer than six sizes.

    Source: Porian et al. 2024 (log loss against log N, lowest loss of each size).
    """
    from scipy.interpolate import Akima1DInterpolator

    groups = levels(np.exp(x))
    if len(groups) < AKIMA_SIZES:
        return None
    nodes = np.array([x[rows].mean() for rows in groups])
    lowest = np.array([y[rows].min() for rows in groups])
    fine = np.linspace(nodes[0], nodes[-1], AKIMA_GRID)
    best = int(np.argmin(Akima1DInterpolator(nodes, lowest)(fine)))
    return float(fine[best]) if 0 < best < len(fine) - 1 else None


def akima_growth(budgets: list[Budget], columns: dict[str, Array], losses: Array, *, flops: float) -> Growth | None:
    """Approach 2 with Akima's interpolation in place of parabolas, from losses (n,); None below two usable budgets."""
    pairs = []
    for budget in budgets:
        y = np.log(losses[budget.rows])
        best = [akima_minimum(np.log(columns[axis][budget.rows]), y) for axis in ("n_params", "n_tokens")]
        if best[0] is not None and best[1] is not None:
            pairs.append(best)
    if len(pairs) < MIN_BUDGETS:
        return None
    log_n, log_d = np.array(pairs, dtype=np.float64).T[:, None]
    ones = np.ones_like(log_n)
    return grow(np.log(6) + log_n + log_d, log_n, log_d, ones, flops=flops, usable=np.array([True]))
