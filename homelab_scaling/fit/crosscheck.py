"""Other roads to an interval: the profiled objective and the delta method, beside the bootstrap.

Legend:  n point, P free parameter, J df/dtheta (n, P), H Hessian of the objective (P, P), V covariance of theta (P, P)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.laws import Law, Posed
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import Objective
from homelab_scaling.fit.resample import MIN_CLUSTERS, free_residuals
from homelab_scaling.fit.result import CrossCheck, Estimate
from homelab_scaling.fit.solve import Optimum, minimise
from homelab_scaling.fit.words import between, listed, number

PROFILE_STEPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 11.0, 16.0, 25.0, 40.0)
"""Distances from the optimum, in standard errors, at which the objective is profiled."""
DIFFERENT = 2.0
"""Intervals whose widths differ by more than this factor do not tell the same story."""


WINDOW = 2.0
"""In median absolute residuals: where their density near zero is measured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """How far theta could have been elsewhere, to first order."""

    covariance: Array
    """(P, P), robust to outliers and to rows of one run sharing their noise."""
    naive: Array
    """(P, P) inverse Hessian of the objective."""
    student: float
    """97.5 % point of Student's t at the degrees of freedom of the runs."""


def spread(posed: Posed, objective: Objective, theta: Array, y: Array, runs: NDArray[np.int64]) -> Spread | None:
    """The delta method's covariance at the optimum; None where the Hessian is singular.

    H^-1 (sum over runs of s s') H^-1 with s the score of a run, its residuals freed of the fit's pull.

    Source: Huber 1981 section 7.6; MacKinnon, Nielsen and Webb 2023 (CV3).
    """
    from scipy.special import stdtrit

    units = runs if int(runs.max()) + 1 >= MIN_CLUSTERS else np.arange(len(y))
    f, state = posed.model.value(theta[None])
    jacobian = posed.model.jacobian(state)[0]
    freed = free_residuals(y - f[0], jacobian, units)
    score = -objective.slopes(f[0], f[0] + freed)[0]
    bend = _mean_bend(objective, f[0], y)
    with np.errstate(all="ignore"):
        size = np.sqrt(np.einsum("np,np->p", jacobian, jacobian)) + 1e-300
        scaled = jacobian / size
        try:
            inverse = np.linalg.inv(np.einsum("np,nq,n->pq", scaled, scaled, bend))
        except np.linalg.LinAlgError:
            return None
        n_units = int(units.max()) + 1
        sums = np.zeros((n_units, len(size)))
        np.add.at(sums, units, scaled * score[:, None])
        naive = inverse / np.outer(size, size)
        covariance = inverse @ (sums.T @ sums) @ inverse / np.outer(size, size)
    if not (np.isfinite(covariance).all() and (np.diag(covariance) > 0).all() and (np.diag(naive) > 0).all()):
        return None
    dof = max(1, min(n_units - 1, len(y) - len(theta)))
    return Spread(covariance=covariance, naive=naive, student=float(stdtrit(dof, 0.975)))


def _mean_bend(objective: Objective, f: Array, y: Array) -> Array:
    """Expected second derivative of the objective at each point (n,).

    Huber's is 1 within delta and 0 outside; with a small delta hardly a point is inside, so the density of residuals
    near zero is taken over a wider window, point by point: the points of high leverage are often the noisy ones.

    Source: Powell 1991 (kernel sandwich of a median regression).
    """
    if objective.kind == "l2":
        return np.exp(2 * f)
    r = np.abs(y - f)
    window = max(objective.delta, WINDOW * float(np.median(r)), 1e-300)
    bend = np.where(r <= window, objective.delta / window, 0.0) if np.isfinite(window) else np.ones_like(r)
    return np.asarray(bend, dtype=np.float64)


def profile(posed: Posed, optimum: Optimum, y: Array, index: int, around: Spread) -> tuple[float | None, float | None]:
    """Where the objective, minimised over all other parameters, has risen by what noise explains at 95 %.

    Args:
        index: which free parameter.

    Returns:
        Its theta below and above; None for an end that no value reaches.
    """
    se = float(np.sqrt(around.covariance[index, index]))
    threshold = around.student**2 * around.covariance[index, index] / (2 * around.naive[index, index])
    lean = around.naive[:, index] / around.naive[index, index]  # how the others move along with it
    ends: list[float | None] = []
    for sign in (-1.0, 1.0):
        at = optimum.theta[index] + sign * se * np.array(PROFILE_STEPS)
        bound = (posed.low if sign < 0 else posed.high)[index]
        at = at[(at > posed.low[index]) & (at < posed.high[index])]
        at = np.append(at, bound)
        starts = optimum.theta + (at - optimum.theta[index])[:, None] * np.clip(lean, -1e6, 1e6)
        low, high = (np.repeat(b[None], len(at), axis=0) for b in posed.bounds)
        low[:, index] = high[:, index] = at
        rise = _lowest(posed, optimum, y, starts, (low, high)) - _value(posed, optimum, y)
        ends.append(_crossing(np.append(optimum.theta[index], at), np.append(0.0, rise), threshold))
    return ends[0], ends[1]


def _lowest(posed: Posed, optimum: Optimum, y: Array, starts: Array, bounds: tuple[Array, Array]) -> Array:
    """The lower of two descents for each held value: along the ridge, and from the optimum."""
    weights = np.ones(len(y))
    found = [
        minimise(posed.model, y, weights, s, objective=optimum.objective, bounds=bounds).value
        for s in (starts, np.repeat(optimum.theta[None], len(starts), axis=0))
    ]
    return np.minimum(*found)


def _value(posed: Posed, optimum: Optimum, y: Array) -> float:
    f, _state = posed.model.value(optimum.theta[None])
    return float(optimum.objective.value(f, y[None], np.ones((1, len(y))))[0])


def _crossing(at: Array, rise: Array, threshold: float) -> float | None:
    """Where the rise first passes the threshold, between the points around it; sqrt(rise) is nearly straight."""
    above = np.flatnonzero(rise >= threshold)
    if len(above) == 0:
        return None
    i = int(above[0])
    low, high = np.sqrt(np.maximum(rise[[i - 1, i]], 0.0))
    share = (np.sqrt(threshold) - low) / max(high - low, 1e-300)
    return float(at[i - 1] + share * (at[i] - at[i - 1]))


def cross_checks(
    law: Law,
    posed: Posed,
    optimum: Optimum,
    y: Array,
    *,
    runs: NDArray[np.int64],
    estimates: dict[str, Estimate],
    skip: Sequence[str] = (),
) -> dict[str, CrossCheck]:
    """Exponents, E and a by all three roads.

    Args:
        estimates: bootstrap estimates of parameters and derived quantities.
        skip: parameters at a bound, where none of this means anything.
    """
    around = spread(posed, optimum.objective, optimum.theta, y, runs)
    if around is None:
        return {}
    wanted = [p for p in law.parameters if p.name in posed.free and p.kind != "prefactor" and p.name not in skip]
    found = {}
    for p in wanted:
        index = posed.free.index(p.name)
        ends = profile(posed, optimum, y, index, around)
        half = around.student * float(np.sqrt(around.covariance[index, index]))
        theta = float(optimum.theta[index])
        delta: tuple[float, float] = (max(0.0, theta - half), theta + half)
        if p.kind == "offset":  # theta is log E
            level = float(np.exp(theta))
            delta = (max(0.0, level * (1 - half)), level * (1 + half))
            ends = tuple(None if end is None else float(np.exp(end)) for end in ends)  # type: ignore[assignment]
        found[p.name] = compare_roads(p.name, estimates[p.name], ends, delta)
    if "a" in estimates and law.splits and not law.tied and not set(law.exponents) & set(skip):
        half = around.student * _share_se(law, posed, optimum.theta, around)
        a = float(law.derived(posed.natural(optimum.theta))["a"])
        found["a"] = compare_roads("a", estimates["a"], None, (a - half, a + half))
    return found


def _share_se(law: Law, posed: Posed, theta: Array, around: Spread) -> float:
    """Standard error of a by its slope in theta."""
    step = 1e-5
    n_free = len(theta)
    moved = np.clip(theta + step * np.concatenate([np.eye(n_free), -np.eye(n_free)]), posed.low, posed.high)
    a = law.derived(posed.natural(moved))["a"]
    apart = np.maximum(np.diag(moved[:n_free] - moved[n_free:]), 1e-300)
    slope = (a[:n_free] - a[n_free:]) / apart
    return float(np.sqrt(slope @ around.covariance @ slope))


def compare_roads(
    name: str,
    one: Estimate,
    ends: tuple[float | None, float | None] | None,
    delta: tuple[float, float],
) -> CrossCheck:
    """Three intervals of one quantity, and a sentence where they do not tell the same story."""
    roads = {"bootstrap": one.ci95, "delta method": delta}
    if ends is not None and ends[0] is not None and ends[1] is not None:
        roads["profile"] = (ends[0], ends[1])
    widths = {road: end[1] - end[0] for road, end in roads.items() if end is not None}
    said = None
    if ends is not None and one.ci95 is not None and None in ends:
        side = "below" if ends[0] is None else "above"
        said = f"{name}: the profile is open {side}: no value there is ruled out by these points"
    elif len(widths) > 1 and max(widths.values()) > DIFFERENT * min(widths.values()) + 1e-12:
        shown = listed([f"{road} {between(*end)}" for road, end in roads.items() if end is not None])
        said = (
            f"{name}: the 95 % intervals differ by a factor of {number(max(widths.values()) / min(widths.values()))} "
            f"in width ({shown}): few runs, outliers or a ridge; trust the widest"
        )
    return CrossCheck(bootstrap95=one.ci95, profile95=ends, delta95=delta, disagreement=said)
