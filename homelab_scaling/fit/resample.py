"""Resamples of a fit: what else the same experiment could have measured, with the run as the unit of chance.

All rows of one run are taken together: rows of one trunk share their noise, and checkpoints of one run are not repeats.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.models import Array, Model
from homelab_scaling.fit.objectives import ObjectiveName
from homelab_scaling.fit.solve import Optimum, refit

FEW_RUNS = 12
"""Below this many runs a pairs bootstrap is fiction and least squares with wild cluster resamples is used instead."""
MIN_CLUSTERS = 3
SAME_BUDGET = 0.05
MIN_PER_BUDGET = 3
MIN_SPARE = 0.05
"""Smallest share of a residual direction that the fit may leave free; below it, it tells nothing of the noise."""
WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])


@dataclass(frozen=True, kw_only=True, eq=False)
class Resamples:
    """Optima of the resamples that converged."""

    theta: Array
    """(R, P)."""
    method: str
    """In words, for the report."""
    n_failed: int


def clusters(run_ids: list[str]) -> NDArray[np.int64]:
    """Run ids as numbers 0 .. n_runs - 1, in order of appearance."""
    order = {run: index for index, run in enumerate(dict.fromkeys(run_ids))}
    return np.array([order[run] for run in run_ids], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Resampling:
    """What else the experiment could have measured; laws refitted to the same one give paired draws."""

    y: Array
    """Log losses, (n,) where the rows keep theirs, else (R, n)."""
    weights: Array
    """Multiplicity of each row, (n,) where every row counts once, else (R, n)."""
    method: str


def resample(
    model: Model,
    y: Array,
    *,
    runs: NDArray[np.int64],
    strata: NDArray[np.int64],
    optimum: Optimum,
    name: ObjectiveName,
    bounds: tuple[Array, Array],
    n_draws: int,
    rng: np.random.Generator,
) -> Resamples:
    """Refits of `n_draws` resamples (see `draw`)."""
    drawn = draw(model, y, runs=runs, strata=strata, theta=optimum.theta, n_draws=n_draws, rng=rng)
    found = refit(model, drawn.y, drawn.weights, optimum, name, bounds=bounds)
    good = np.isfinite(found.value) & np.isfinite(found.theta).all(axis=1)
    return Resamples(theta=found.theta[good], method=drawn.method, n_failed=int((~good).sum()))


def draw(
    model: Model,
    y: Array,
    *,
    runs: NDArray[np.int64],
    strata: NDArray[np.int64],
    theta: Array,
    n_draws: int,
    rng: np.random.Generator,
    multipliers: Array | None = None,
) -> Resampling:
    """`n_draws` resamples of the rows.

    At 12 runs or more: pairs bootstrap over runs (rows of a run together, as integer weights), within strata. Below:
    wild cluster bootstrap with Webb's six-point weights on residuals freed of the fit's pull (the jackknife correction)
    and widened by Student's t at n_runs - 1 degrees of freedom. With one or two runs the rows are the unit, and it
    says so.

    Args:
        model, y, theta: the fit whose residuals the wild bootstrap reuses.
        runs: run of each row (n,).
        strata: stratum of each run (n_runs,); see `budget_strata`.
        multipliers: (n_draws, unit) instead of drawn ones: how often each run counts, or the wild bootstrap's signs.

    Source: MacKinnon, Nielsen and Webb 2023 (jackknife-corrected wild clusters); Webb 2014 (six-point weights).
    """
    n_points, n_runs = len(y), int(runs.max()) + 1
    if n_runs >= FEW_RUNS:
        counts = pair_counts(strata, n_draws, rng) if multipliers is None else multipliers
        within = f" within {int(strata.max()) + 1} budgets" if strata.max() > 0 else ""
        method = f"pairs bootstrap over {n_runs} runs{within}"
        return Resampling(y=y, weights=counts[:, runs], method=method)
    units, unit = (runs, "runs") if n_runs >= MIN_CLUSTERS else (np.arange(n_points), "rows")
    n_units = int(units.max()) + 1
    f, state = model.value(theta[None])
    noise = free_residuals(y - f[0], model.jacobian(state)[0], units) * student_widening(n_units - 1)
    signs = rng.choice(WEBB, size=(n_draws, n_units)) if multipliers is None else multipliers
    method = f"wild cluster bootstrap over {n_units} {unit}, jackknife-corrected, Student t"
    return Resampling(y=f[0] + signs[:, units] * noise, weights=np.ones(n_points), method=method)


def pair_counts(strata: NDArray[np.int64], n_draws: int, rng: np.random.Generator) -> Array:
    """How often each run counts in each resample (n_draws, n_runs).

    With one stratum of n runs, n are drawn. Of several, each of m runs gives m - 1: drawing m would understate what
    chance did within a stratum by the factor (m - 1) / m, and intervals of isoFLOP ladders held the truth 92 to 93
    times in 100 instead of 95. Where strata differ in size their runs count m / (m - 1), so that none loses weight.

    Source: Rao and Wu 1988 (rescaled bootstrap of stratified samples); the coverage study of `fit.coverage`.
    """
    counts = np.zeros((n_draws, len(strata)))
    sizes = np.bincount(strata)
    for stratum, size in enumerate(sizes):
        n_drawn = size - 1 if len(sizes) > 1 and size > 1 else size
        drawn = rng.multinomial(n_drawn, np.full(size, 1 / size), size=n_draws)
        counts[:, strata == stratum] = drawn * (size / n_drawn if np.ptp(sizes) else 1)
    return counts


def budget_strata(flops: Array, runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Stratum of each run (n_runs,): its compute budget, where the design is isoFLOP; else all zeros.

    A design is isoFLOP when every run has one row and every budget (within 5 %) at least three runs, two budgets or
    more. Resampling within budgets then keeps every isoFLOP curve in every resample.
    """
    n_runs = int(runs.max()) + 1
    one = np.zeros(n_runs, dtype=np.int64)
    if len(flops) != n_runs:
        return one
    order = np.argsort(flops, kind="stable")
    strata = np.concatenate([[0], np.cumsum(flops[order][1:] > flops[order][:-1] * (1 + SAME_BUDGET))])
    if strata[-1] == 0 or np.bincount(strata).min() < MIN_PER_BUDGET:
        return one
    one[runs[order]] = strata
    return one


def free_residuals(residuals: Array, jacobian: Array, units: NDArray[np.int64]) -> Array:
    """Residuals as they would be had each unit not pulled the fit towards itself: (I - H_gg)^-1 r_g.

    Args:
        residuals: log loss minus its fit (n,).
        jacobian: of the fit (n, P).
        units: cluster of each row (n,).
    """
    q, _r = np.linalg.qr(jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300))
    out = np.empty_like(residuals)
    for unit in range(int(units.max()) + 1):
        rows = units == unit
        spare, axes = np.linalg.eigh(np.eye(int(rows.sum())) - q[rows] @ q[rows].T)
        out[rows] = axes @ ((axes.T @ residuals[rows]) / np.maximum(spare, MIN_SPARE))
    return out


def student_widening(dof: int) -> float:
    """The 97.5 % point of Student's t over the normal one: how much wider few degrees of freedom make an interval."""
    from scipy.special import stdtrit

    return float(stdtrit(max(dof, 1), 0.975) / 1.959963984540054)
