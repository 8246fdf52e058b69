"""The engine: minimises robust objectives of log loss over many starts or resamples at once, and certifies the optimum.

Legend:  R batch member (a start or a resample), n point, P parameter

A member's step solves (H + damping) step = -gradient. H is first the iteratively reweighted Gauss-Newton matrix (a
majoriser of the Huber objective: safe far away), then, once it slows down, the exact Hessian (quadratic convergence);
a rejected step raises the damping. Everything is a few matrix products over the batch, no Python loop over members;
the batch is cut so that its arrays stay in a core's cache, and members that are done leave it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.models import Array, Model
from homelab_scaling.fit.objectives import Objective, ObjectiveName

GRADIENT_DONE = 1e-11
GRADIENT_CLOSE = 1e-8
"""Enough for one of many: steps are quadratic by then, and further ones only move rounding noise (gap 1e-14)."""
GRADIENT_CERTIFIED = 1e-6
RESIDUAL_FLOOR = 1e-13
SAME_BASIN = 1e-6
LAD_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11)
REFIT_LAD_DELTAS = (1e-3, 1e-5, 1e-7)
"""A resample's spread needs no twelfth digit."""
CACHED = 32_768
"""Numbers per array of a cut (256 KiB): a dozen of them are in use at a time."""
ROUND_STEPS = 8
"""Steps of a cut before the members that are left are gathered into fuller ones."""
COARSE_STEPS = 40
POLISH_STEPS = 400


@dataclass(frozen=True, kw_only=True)
class Minima:
    """Where each batch member ended."""

    theta: Array
    """(R, P)."""
    value: Array
    """(R,) objective."""
    gradient: Array
    """(R,) largest |gradient| over its sum of absolute contributions: 0 is perfect balance, 1 none at all."""

    def better(self, other: "Minima") -> "Minima":
        """The lower of the two, member by member."""
        take = other.value < self.value
        return Minima(
            theta=np.where(take[:, None], other.theta, self.theta),
            value=np.where(take, other.value, self.value),
            gradient=np.where(take, other.gradient, self.gradient),
        )


def minimise(
    model: Model,
    y: Array,
    weights: Array,
    starts: Array,
    *,
    objective: Objective,
    bounds: tuple[Array, Array],
    max_steps: int = 200,
    done: float = GRADIENT_DONE,
) -> Minima:
    """A local minimum from each start.

    Args:
        y: log losses, (n,) or (R, n).
        weights: multiplicity of each point, (n,) or (R, n); integers for a bootstrap.
        starts: (R, P).
        bounds: lowest and highest theta, (P,) or (R, P) each; equal ones hold a parameter.
        done: scaled gradient at which a member stops.
    """
    batch = _Batch(model, objective, y=y, weights=weights, starts=starts, bounds=bounds, done=done)
    active = np.arange(len(starts))
    size = max(1, CACHED // model.n_points)
    taken = 0
    while taken < max_steps and len(active):
        n_steps = min(ROUND_STEPS, max_steps - taken)
        left = [batch.descend(active[i : i + size], n_steps) for i in range(0, len(active), size)]
        active = np.concatenate(left)
        taken += n_steps
    return Minima(theta=batch.theta, value=batch.value, gradient=batch.gradient)


class _Batch:
    """Every member's state between cuts."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        *,
        y: Array,
        weights: Array,
        starts: Array,
        bounds: tuple[Array, Array],
        done: float,
    ) -> None:
        n_batch = len(starts)
        self.model, self.objective, self.done = model, objective, done
        self.y = np.broadcast_to(y, (n_batch, model.n_points))
        self.weights = np.broadcast_to(weights, (n_batch, model.n_points))
        self.low, self.high = (np.broadcast_to(b, starts.shape) for b in bounds)
        self.theta = np.clip(starts, self.low, self.high)
        self.value = np.full(n_batch, np.inf)
        self.gradient = np.full(n_batch, np.inf)
        self.damping = np.full(n_batch, 1e-3)
        self.exact = np.zeros(n_batch, dtype=bool)

    def descend(self, members: NDArray[np.int64], n_steps: int) -> NDArray[np.int64]:
        """Takes some steps with these members and returns those that are not done."""
        y, weights, low, high = self.y[members], self.weights[members], self.low[members], self.high[members]
        theta, damping, exact = self.theta[members], self.damping[members], self.exact[members]
        f, state = self.model.value(theta)
        value = self.objective.value(f, y, weights)
        for _ in range(n_steps):
            step, norm = _step(
                self.model,
                self.objective,
                state=state,
                f=f,
                y=y,
                weights=weights,
                theta=theta,
                damping=damping,
                exact=exact,
                bounds=(low, high),
            )
            self.gradient[members] = norm
            trial = np.clip(theta + step, low, high)
            trial_f, trial_state = self.model.value(trial)
            trial_value = self.objective.value(trial_f, y, weights)
            better = trial_value < value  # NaN compares false: a wild step is a rejected step
            gain = np.where(better, (value - trial_value) / np.maximum(value, 1e-300), 0.0)
            damping = np.clip(np.where(better, damping / 5, damping * 6), 1e-12, 1e15)
            # Exact Hessian once the majoriser crawls; back to the majoriser after a rejected step.
            exact = np.where(better, exact | (gain < 0.05), ~exact)
            if better.all():
                theta, value, f, state = trial, trial_value, trial_f, trial_state
            else:
                theta[better], value[better] = trial[better], trial_value[better]
                f[better], state[:, better] = trial_f[better], trial_state[:, better]
            self.theta[members], self.value[members] = theta, value
            going = (norm > self.done) & (damping < 1e14)
            if not going.all():
                members, exact, y, weights = members[going], exact[going], y[going], weights[going]
                low, high, theta, value = low[going], high[going], theta[going], value[going]
                damping, f, state = damping[going], f[going], state[:, going]
                if len(members) == 0:
                    break
        self.damping[members], self.exact[members] = damping, exact
        return members


def _curvature(
    model: Model, state: Array, *, weights: Array, slopes: tuple[Array, Array, Array], exact: NDArray[np.bool_]
) -> Array:
    """The majoriser's matrix, or the exact Hessian for the members that are near enough for it, (R, P, P)."""
    slope, majoriser, curvature = slopes
    if not exact.any():
        return model.hessian(state, weights * majoriser, None)
    if exact.all():
        return model.hessian(state, weights * curvature, slope)
    both = np.where(exact[:, None], curvature, majoriser)
    return model.hessian(state, weights * both, np.where(exact[:, None], slope, 0.0))


def _step(
    model: Model,
    objective: Objective,
    *,
    state: Array,
    f: Array,
    y: Array,
    weights: Array,
    theta: Array,
    damping: Array,
    exact: NDArray[np.bool_],
    bounds: tuple[Array, Array],
) -> tuple[Array, Array]:
    """The damped step of every member and its scaled gradient norm; parameters held by a bound do not move."""
    slope, majoriser, curvature = objective.slopes(f, y)
    slope = slope * weights
    gradient, scale = model.gradient(state, slope)
    held = ((theta <= bounds[0]) & (gradient > 0)) | ((theta >= bounds[1]) & (gradient < 0)) | (bounds[0] == bounds[1])
    gradient = np.where(held, 0.0, gradient)
    norm = np.max(np.abs(gradient) / (scale + 1e-300), axis=1)
    # Where the residuals are rounding noise, noise over noise would never look balanced.
    norm = np.where(np.abs(slope).max(axis=1) < RESIDUAL_FLOOR, 0.0, norm)
    hessian = _curvature(model, state, weights=weights, slopes=(slope, majoriser, curvature), exact=exact)
    diagonal = np.abs(np.einsum("rpp->rp", hessian))
    size = np.maximum(diagonal, 1e-14 * diagonal.sum(axis=1)[:, None]) + 1e-30
    hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, hessian)
    root = np.sqrt(size)
    scaled = hessian / root[:, :, None] / root[:, None, :]
    np.einsum("rpp->rp", scaled)[...] += damping[:, None] + 1e-15 + held
    step = np.linalg.solve(scaled, -(gradient / root)[..., None])[..., 0] / root
    return np.clip(np.nan_to_num(step, posinf=0.0, neginf=0.0), -3.0, 3.0), norm


# ---------------------------------------------------------------------------------------------------- named objectives


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best minimum over all starts, certified."""

    theta: Array
    value: float
    """The named objective, summed over the points."""
    gradient: float
    n_starts: int
    starts_in_basin: int
    """Starts that ended within 1e-6 (relative) of the best value, at the same exponents."""
    objective: Objective
    """As resolved: with the delta that `adaptive` chose."""
    candidates: Array
    """(K, P) the best distinct minima, best first: where resamples start from."""

    @property
    def converged(self) -> bool:
        return self.gradient <= GRADIENT_CERTIFIED


def solve(
    model: Model, y: Array, starts: Array, name: ObjectiveName, *, bounds: tuple[Array, Array], n_polish: int = 24
) -> Optimum:
    """The global minimum of a named objective, as far as the starts can tell.

    Args:
        y: log losses (n,).
        starts: (S, P); all take a coarse descent, the best `n_polish` a full one.
    """
    weights = np.ones(len(y))
    deltas: tuple[float, ...] = LAD_DELTAS if name.kind == "lad" else (name.delta or np.inf,)
    if name.kind == "adaptive":
        deltas = (1e-3,)
    objective = Objective(kind="l2" if name.kind == "l2" else "huber", delta=deltas[0])
    # Wide published grids are mostly outside the bounds: brought inside, three of four starts are the same.
    distinct, times = np.unique(np.clip(starts, *bounds), axis=0, return_counts=True)
    coarse = minimise(
        model, y, weights, distinct, objective=objective, bounds=bounds, max_steps=COARSE_STEPS, done=GRADIENT_CLOSE
    )
    best = np.argsort(coarse.value, kind="stable")[:n_polish]
    found = minimise(model, y, weights, coarse.theta[best], objective=objective, bounds=bounds, max_steps=POLISH_STEPS)
    reached = np.concatenate([coarse.value, found.value]).min()
    # What still crawls after the coarse descent is judged by where it was going.
    in_basin = int(times[coarse.value <= reached * (1 + SAME_BASIN) + 1e-18].sum())
    if name.kind == "adaptive":
        deltas = (1e-3, adaptive_delta(model, found.theta[int(np.argmin(found.value))], y))
    for delta in deltas[1:]:
        objective = Objective(kind="huber", delta=delta)
        found = minimise(model, y, weights, found.theta, objective=objective, bounds=bounds, max_steps=POLISH_STEPS)
    order = np.argsort(found.value, kind="stable")
    top = int(order[0])
    value = float(found.value[top])
    if name.kind == "lad":
        f, _shares = model.value(found.theta[top : top + 1])
        value = float(np.abs(f[0] - y).sum())
    return Optimum(
        theta=found.theta[top],
        value=value,
        gradient=float(found.gradient[top]),
        n_starts=len(starts),
        starts_in_basin=max(1, in_basin),
        objective=objective,
        candidates=_distinct(found.theta[order])[:4],
    )


def adaptive_delta(model: Model, theta: Array, y: Array) -> float:
    """1.345 robust standard deviations of the residuals at theta, at least 1e-6.

    Source: Huber 1981 (95 % efficiency under normal noise); sigma = 1.4826 MAD sqrt(n / (n - p)).
    """
    f, _shares = model.value(theta[None])
    n_points, n_params = len(y), len(theta)
    sigma = 1.4826 * float(np.median(np.abs(f[0] - y))) * np.sqrt(n_points / max(1, n_points - n_params))
    return float(max(1.345 * sigma, 1e-6))


def _distinct(theta: Array) -> Array:
    kept = [theta[0]]
    for candidate in theta[1:]:
        if all(np.max(np.abs(candidate - k)) > 0.05 for k in kept):
            kept.append(candidate)
    return np.array(kept)


def refit(
    model: Model, y: Array, weights: Array, optimum: Optimum, name: ObjectiveName, *, bounds: tuple[Array, Array]
) -> Minima:
    """The minimum of every resample, started from the optimum and its runners-up.

    Args:
        y: (n,) or (R, n) log losses of the resamples.
        weights: (n,) or (R, n).
    """
    n_batch = max(y.shape[0] if y.ndim == 2 else 1, weights.shape[0] if weights.ndim == 2 else 1)
    best: Minima | None = None
    deltas = REFIT_LAD_DELTAS if name.kind == "lad" else (optimum.objective.delta,)
    for start in optimum.candidates:
        theta = np.repeat(start[None], n_batch, axis=0)
        for delta in deltas:
            objective = Objective(kind=optimum.objective.kind, delta=delta)
            found = minimise(model, y, weights, theta, objective=objective, bounds=bounds, done=GRADIENT_CLOSE)
            theta = found.theta
        best = found if best is None else best.better(found)
    assert best is not None
    return best
