"""The engine: minimises robust objectives of log loss over many starts or resamples at once, and certifies the optimum.

Legend:  R batch member (a start or a resample), n point, T term, P parameter

A member's step solves (H + damping) step = -gradient. H is first the iteratively reweighted Gauss-Newton matrix (a
majoriser of the Huber objective: safe far away), then, once it slows down, the exact Hessian (quadratic convergence);
a rejected step raises the damping. Everything is a few matrix products over the batch, no Python loop over members.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.laws import Array

GRADIENT_DONE = 1e-11
GRADIENT_CERTIFIED = 1e-6
RESIDUAL_FLOOR = 1e-13
SAME_BASIN = 1e-6
LAD_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11)


# ---------------------------------------------------------------------------------------------------------- objectives


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is summed over the points: Huber of log-loss residuals, or plain squares of loss."""

    kind: Literal["huber", "l2"]
    delta: float = np.inf
    """Huber's threshold on |log prediction - log loss|; infinity is least squares of log loss."""

    def value(self, f: Array, y: Array, weights: Array) -> Array:
        """Sum over points, (R, n) to (R,)."""
        if self.kind == "l2":
            with np.errstate(over="ignore"):
                return np.asarray((weights * 0.5 * (np.exp(f) - np.exp(y)) ** 2).sum(axis=-1))
        r = np.abs(f - y)
        inner = np.minimum(r, self.delta)
        return np.asarray((weights * inner * (r - 0.5 * inner)).sum(axis=-1))

    def slopes(self, f: Array, y: Array) -> tuple[Array, Array, Array]:
        """First derivative in f, its majorising second derivative, its exact second derivative, each (R, n)."""
        if self.kind == "l2":
            p = np.exp(f)
            r = p - np.exp(y)
            return r * p, p * p, p * p + r * p
        r = f - y
        size = np.abs(r)
        inside = size <= self.delta
        majoriser = np.where(inside, 1.0, self.delta / np.where(inside, 1.0, size))
        return r * majoriser, majoriser, inside.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class ObjectiveName:
    """A parsed `--objective`."""

    name: str
    kind: Literal["huber", "lad", "l2-log", "l2", "adaptive"]
    delta: float | None = None


def parse_objective(name: str) -> ObjectiveName:
    """The objective called `name`.

    `huber:1e-3` is the literature's; `lad` least absolute deviations of log loss; `l2-log` and `l2` least squares of
    log loss and of loss; `adaptive` Huber with delta = 1.345 robust standard deviations.

    Raises:
        SpecError: no such objective.
    """
    if name in ("lad", "l2-log", "l2", "adaptive"):
        return ObjectiveName(name=name, kind=name)  # type: ignore[arg-type]
    match = re.fullmatch(r"huber:([0-9.]+(?:e[+-]?[0-9]+)?)", name)
    delta = 0.0
    if match:
        try:
            delta = float(match[1])
        except ValueError:
            delta = 0.0
    if not 1e-9 <= delta <= 10:
        raise SpecError(
            f"no objective {name!r}; choose adaptive, lad, l2-log, l2 or huber:DELTA with DELTA from 1e-9 to 10"
        )
    return ObjectiveName(name=name, kind="huber", delta=delta)


# --------------------------------------------------------------------------------------------------------------- model


class LogSum:
    """f_n(theta) = log sum_T exp(basis[T, n] . theta), with its derivatives, over a batch of theta."""

    def __init__(self, basis: Array) -> None:
        self.basis = basis
        n_terms, n_points, n_params = basis.shape
        self._pairs = [(s, t) for s in range(n_terms) for t in range(s, n_terms)]
        self._outer = {}
        for s, t in self._pairs:
            product = basis[s][:, :, None] * basis[t][:, None, :]
            both = product if s == t else product + product.swapaxes(1, 2)
            self._outer[s, t] = both.reshape(n_points, n_params * n_params)

    def value(self, theta: Array) -> tuple[Array, Array]:
        """f (R, n) and each term's share of the loss (T, R, n)."""
        logs = np.einsum("tnp,rp->trn", self.basis, theta)
        top = logs.max(axis=0)
        shares = np.exp(logs - top)
        total = shares.sum(axis=0)
        shares /= total
        return np.asarray(top + np.log(total)), shares

    def jacobian(self, shares: Array) -> Array:
        """df/dtheta (R, n, P)."""
        return np.asarray(np.einsum("trn,tnp->rnp", shares, self.basis))

    def gradient(self, shares: Array, slope: Array) -> tuple[Array, Array]:
        """sum_n slope df/dtheta (R, P), and the same sum of absolute contributions, its natural scale."""
        gradient = sum(((slope * s) @ b for s, b in zip(shares, self.basis, strict=True)), start=np.zeros(1))
        size = np.abs(slope)
        scale = sum(((size * s) @ np.abs(b) for s, b in zip(shares, self.basis, strict=True)), start=np.zeros(1))
        return np.asarray(gradient), np.asarray(scale)

    def hessian(self, shares: Array, outer: Array, slope: Array | None) -> Array:
        """sum_n outer df df' [+ slope d2f] (R, P, P); d2f = sum_T share b b' - df df'."""
        n_params = self.basis.shape[2]
        weight = outer if slope is None else outer - slope
        flat = np.zeros((shares.shape[1], n_params * n_params))
        for s, t in self._pairs:
            part = weight * shares[s] * shares[t]
            if slope is not None and s == t:
                part = part + slope * shares[t]
            flat += part @ self._outer[s, t]
        return flat.reshape(-1, n_params, n_params)


# --------------------------------------------------------------------------------------------------------------- solver


@dataclass(frozen=True, kw_only=True)
class Minima:
    """Where each batch member ended."""

    theta: Array
    """(R, P)."""
    value: Array
    """(R,) objective."""
    gradient: Array
    """(R,) largest |gradient| over its sum of absolute contributions: 0 is perfect balance, 1 none at all."""


def minimise(
    model: LogSum,
    y: Array,
    weights: Array,
    starts: Array,
    *,
    objective: Objective,
    bounds: tuple[Array, Array],
    max_steps: int = 200,
) -> Minima:
    """A local minimum from each start.

    Args:
        y: log losses, (n,) or (R, n).
        weights: multiplicity of each point, (n,) or (R, n); integers for a bootstrap.
        starts: (R, P).
        bounds: lowest and highest theta, (P,) each.
    """
    n_batch, n_points = starts.shape[0], model.basis.shape[1]
    y = np.broadcast_to(y, (n_batch, n_points))
    weights = np.broadcast_to(weights, (n_batch, n_points))
    theta = np.clip(starts, *bounds)
    f, shares = model.value(theta)
    value = objective.value(f, y, weights)
    damping = np.full(n_batch, 1e-3)
    exact = np.zeros(n_batch, dtype=bool)
    gradient_norm = np.full(n_batch, np.inf)
    active = np.arange(n_batch)
    for _ in range(max_steps):
        step, norm = _step(
            model,
            objective,
            shares=shares,
            f=f,
            y=y[active],
            weights=weights[active],
            theta=theta[active],
            damping=damping[active],
            exact=exact[active],
            bounds=bounds,
        )
        gradient_norm[active] = norm
        trial = np.clip(theta[active] + step, *bounds)
        trial_f, trial_shares = model.value(trial)
        trial_value = objective.value(trial_f, y[active], weights[active])
        better = trial_value < value[active]  # NaN compares false: a wild step is a rejected step
        gain = np.where(better, (value[active] - trial_value) / np.maximum(value[active], 1e-300), 0.0)
        taken = active[better]
        theta[taken], value[taken] = trial[better], trial_value[better]
        f[better], shares[:, better] = trial_f[better], trial_shares[:, better]
        damping[active] = np.clip(np.where(better, damping[active] / 5, damping[active] * 6), 1e-12, 1e15)
        # Exact Hessian once the majoriser crawls; back to the majoriser after a rejected step.
        exact[active] = np.where(better, exact[active] | (gain < 0.05), ~exact[active])
        going = (norm > GRADIENT_DONE) & (damping[active] < 1e14)
        active, f, shares = active[going], f[going], shares[:, going]
        if len(active) == 0:
            break
    return Minima(theta=theta, value=value, gradient=gradient_norm)


def _step(
    model: LogSum,
    objective: Objective,
    *,
    shares: Array,
    f: Array,
    y: Array,
    weights: Array,
    theta: Array,
    damping: Array,
    exact: Array,
    bounds: tuple[Array, Array],
) -> tuple[Array, Array]:
    """The damped step of every member and its scaled gradient norm; parameters held by a bound do not move."""
    slope, majoriser, curvature = objective.slopes(f, y)
    slope = slope * weights
    gradient, scale = model.gradient(shares, slope)
    held = ((theta <= bounds[0]) & (gradient > 0)) | ((theta >= bounds[1]) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    norm = np.max(np.abs(gradient) / (scale + 1e-300), axis=1)
    # Where the residuals are rounding noise, noise over noise would never look balanced.
    norm = np.where(np.abs(slope).max(axis=1) < RESIDUAL_FLOOR, 0.0, norm)
    hessian = model.hessian(shares, weights * majoriser, None)
    size = np.maximum(np.einsum("rpp->rp", hessian), 1e-14 * np.einsum("rpp->r", hessian)[:, None]) + 1e-30
    if exact.any():
        newton = model.hessian(shares[:, exact], (weights * curvature)[exact], slope[exact])
        hessian[exact] = newton
    eye = np.eye(theta.shape[1])
    hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, hessian)
    root = np.sqrt(size)
    scaled = hessian / root[:, :, None] / root[:, None, :] + eye * (damping[:, None, None] + 1e-15 + held[:, :, None])
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
    model: LogSum, y: Array, starts: Array, name: ObjectiveName, *, bounds: tuple[Array, Array], n_polish: int = 24
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
    coarse = minimise(model, y, weights, starts, objective=objective, bounds=bounds, max_steps=40)
    best = np.argsort(coarse.value, kind="stable")[:n_polish]
    found = minimise(model, y, weights, coarse.theta[best], objective=objective, bounds=bounds, max_steps=400)
    reached = np.concatenate([coarse.value, found.value]).min()
    # What still crawls after the coarse descent is judged by where it was going.
    in_basin = int((coarse.value <= reached * (1 + SAME_BASIN) + 1e-18).sum())
    if name.kind == "adaptive":
        deltas = (1e-3, adaptive_delta(model, found.theta[int(np.argmin(found.value))], y))
    for delta in deltas[1:]:
        objective = Objective(kind="huber", delta=delta)
        found = minimise(model, y, weights, found.theta, objective=objective, bounds=bounds, max_steps=400)
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


def adaptive_delta(model: LogSum, theta: Array, y: Array) -> float:
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
    model: LogSum, y: Array, weights: Array, optimum: Optimum, name: ObjectiveName, *, bounds: tuple[Array, Array]
) -> Minima:
    """The minimum of every resample, started from the optimum and its runners-up.

    Args:
        y: (n,) or (R, n) log losses of the resamples.
        weights: (n,) or (R, n).
    """
    n_batch = max(y.shape[0] if y.ndim == 2 else 1, weights.shape[0] if weights.ndim == 2 else 1)
    best: Minima | None = None
    deltas = LAD_DELTAS if name.kind == "lad" else (optimum.objective.delta,)
    for start in optimum.candidates:
        theta = np.repeat(start[None], n_batch, axis=0)
        for delta in deltas:
            objective = Objective(kind=optimum.objective.kind, delta=delta)
            found = minimise(model, y, weights, theta, objective=objective, bounds=bounds)
            theta = found.theta
        if best is None:
            best = found
        else:
            take = found.value < best.value
            best = Minima(
                theta=np.where(take[:, None], found.theta, best.theta),
                value=np.where(take, found.value, best.value),
                gradient=np.where(take, found.gradient, best.gradient),
            )
    assert best is not None
    return best
