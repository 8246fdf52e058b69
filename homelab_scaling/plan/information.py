"""What rows tell about a fitted law before they are measured: the delta method over its Jacobian.

With J over all rows and S the covariance of their noise, theta has covariance (J'J)^-1 J'SJ (J'J)^-1, and a target t
the standard error sqrt(g' Cov g), g = dt/dtheta. Rows of one run share its noise.

Legend:  n row, P free parameter of the law, R batch member
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import loss_at
from homelab_scaling.fit.laws import Law, Posed
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.resample import FEW_RUNS, clusters, student_widening
from homelab_scaling.fit.slices import Table
from homelab_scaling.fit.solve import solve
from homelab_scaling.fit.targets import Target

N_STARTS = 256
RATIOS = np.concatenate([[0.0], np.geomspace(0.05, 100, 25)])
"""Run variance over row variance that is tried."""


@dataclass(frozen=True, kw_only=True)
class NoiseParts:
    """What a log loss scatters by."""

    row_sd: float
    run_sd: float
    """Shared by the rows of one run."""
    basis: str


def estimate_noise(residuals: Array, jacobian: Array, runs: NDArray[np.int64]) -> NoiseParts:
    """Row and run noise by restricted maximum likelihood over their ratio, on the law's tangent plane.

    Residuals beyond three robust standard deviations are pulled in: a design is not planned for accidents.

    Source: Patterson and Thompson 1971.
    """
    n_rows, n_params = jacobian.shape
    spare = n_rows - n_params
    if spare < 1:
        raise SpecError(f"{n_rows} rows for {n_params} parameters leave nothing to tell the noise from; add rows first")
    robust = 1.4826 * float(np.median(np.abs(residuals))) * math.sqrt(n_rows / spare)
    r = np.clip(residuals, -3 * robust, 3 * robust) if n_rows >= 3 * n_params else residuals
    x = jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
    size = np.asarray(np.bincount(runs), dtype=np.float64)
    x_sum, r_sum = _by_run(x, runs), _by_run(r[:, None], runs)[:, 0]
    ratios = RATIOS.tolist() if size.max() > 1 and len(size) > 1 else [0.0]
    best = (-math.inf, 0.0, 0.0)
    for ratio in ratios:
        pull = ratio / (1 + ratio * size)
        xx = x.T @ x - (x_sum * pull[:, None]).T @ x_sum + 1e-12 * np.eye(n_params)
        xr = x.T @ r - x_sum.T @ (pull * r_sum)
        rr = float(r @ r - (pull * r_sum**2).sum() - xr @ np.linalg.solve(xx, xr))
        variance = max(rr / spare, 1e-16)
        fit = -0.5 * (
            float(np.log1p(ratio * size).sum()) + float(np.linalg.slogdet(xx)[1]) + spare * math.log(variance)
        )
        if fit > best[0]:
            best = (float(fit), variance, ratio)
    _fit, variance, ratio = best
    row, run = math.sqrt(variance), math.sqrt(variance * ratio)
    shared = f", {100 * run:.2g} % shared within a run" if size.max() > 1 else ""
    return NoiseParts(row_sd=row, run_sd=run, basis=f"from the fit's residuals: {100 * row:.2g} % per row{shared}")


def _by_run(rows: Array, runs: NDArray[np.int64]) -> Array:
    out = np.zeros((int(runs.max()) + 1, rows.shape[1]))
    np.add.at(out, runs, rows)
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Information:
    """What a set of runs tells about theta: sums over runs, so that adding a run adds its matrices."""

    rows: Array
    """J'J (P, P)."""
    runs: Array
    """Sum over runs of (sum of J)(sum of J)'."""

    def __add__(self, other: "Information") -> "Information":
        return Information(rows=self.rows + other.rows, runs=self.runs + other.runs)

    def standard_error(self, slope: Array, noise: NoiseParts) -> float:
        """Of a target with this gradient (P,), as the fitter's least squares will have it."""
        scale = np.sqrt(np.maximum(np.diag(self.rows), 1e-300))
        h = self.rows / np.outer(scale, scale) + 1e-13 * np.eye(len(scale))
        lever = np.linalg.solve(h, slope / scale) / scale
        rows, runs = float(lever @ self.rows @ lever), float(lever @ self.runs @ lever)
        return math.sqrt(max(noise.row_sd**2 * rows + noise.run_sd**2 * runs, 0.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Tangent:
    """A fitted law at its optimum, ready to tell what any row would add."""

    law: Law
    posed: Posed
    theta: Array
    """Free theta (P,)."""
    noise: NoiseParts
    so_far: Information
    n_runs: int

    def of_run(self, n_params: float, horizons: Sequence[float]) -> Information:
        """What one further run with these rows adds."""
        j = self.jacobian(np.full(len(horizons), float(n_params)), np.array(horizons, dtype=np.float64))
        return information(j, np.zeros(len(j), dtype=np.int64))

    def jacobian(self, n_params: Array, n_tokens: Array) -> Array:
        """d log L / d theta (n, P) of rows of new tokens."""
        return _slopes(
            lambda theta: np.log(loss_at(self.law, self.posed.natural(theta)[:, None, :], n_params, n_tokens)),
            self.theta,
        )

    def slope(self, target: Target) -> Array:
        """d target / d theta (P,), of its logarithm where its interval is taken there."""
        return np.asarray(
            _slopes(lambda theta: target.scaled(self.law, self.posed.natural(theta))[:, None], self.theta)[0]
        )

    @property
    def widening(self) -> float:
        """Student's factor of the fit's interval; kept as it is for later runs, so that only the design is judged."""
        return student_widening(self.n_runs - 1) if self.n_runs < FEW_RUNS else 1.0


def _slopes(f: Callable[[Array], Array], theta: Array) -> Array:
    """df/dtheta (n, P) of f: theta (R, P) -> (R, n), by central differences."""
    step = 1e-5 * np.maximum(1.0, np.abs(theta))
    above, below = f(theta + np.diag(step)), f(theta - np.diag(step))
    return np.asarray(((above - below) / (2 * step[:, None])).T)


def information(jacobian: Array, runs: NDArray[np.int64]) -> Information:
    """Of rows with this Jacobian (n, P) and these runs (n,)."""
    sums = _by_run(jacobian, runs)
    return Information(rows=jacobian.T @ jacobian, runs=sums.T @ sums)


def tangent_of(table: Table, law: Law, objective: str) -> Tangent:
    """The law at its optimum on these rows, found again by the objective it was fitted with.

    Raises:
        SpecError: not a law of N and D, or no rows left over to tell the noise from.
    """
    if not law.splits:
        raise SpecError(f"{law.name} is no law of N and D; choose --law chinchilla")
    columns = {axis: table.columns[axis] for axis in law.axes}
    posed = law.pose(columns, table.losses)
    runs = clusters(table.run_ids)
    n_runs = int(runs.max()) + 1
    name = parse_objective(objective)
    if name.kind == "adaptive" and n_runs < FEW_RUNS:
        name = parse_objective("l2-log")  # as the fitter does
    theta = solve(posed.model, np.log(table.losses), posed.starts(N_STARTS), name, bounds=posed.bounds).theta
    f, state = posed.model.value(theta[None])
    jacobian = posed.model.jacobian(state)[0]
    return Tangent(
        law=law,
        posed=posed,
        theta=theta,
        noise=estimate_noise(np.log(table.losses) - f[0], jacobian, runs),
        so_far=information(jacobian, runs),
        n_runs=n_runs,
    )
