"""Predictions from a fit: loss at a size and token count, the best split of a budget, each with interval and reach."""

from dataclasses import dataclass

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.result import Draws, Estimate, FitReport, ScalingFit


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A loss at a point of the law's variables."""

    at: dict[str, float]
    """Variable -> value."""
    loss_nats: float
    ci95: tuple[float, float] | None
    """Of the law itself; a single run scatters around it by the fit's sigma_log as well."""
    extrapolation: float
    """How far outside the fitted range, as the largest factor over the variables; 1 inside it."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The N and D that a law prefers for a budget, with C = 6 N D."""

    flops: float
    n_params: Estimate
    n_tokens: Estimate
    loss_nats: Estimate
    extrapolation: float
    """How far the budget, N or D, whichever is worst, lies outside the fitted range; 1 inside it."""


def draws_of(report: FitReport, fit: ScalingFit) -> Draws:
    """The draws of one fit.

    Raises:
        SpecError: the fit has none, because it was not fitted or its draws file is gone.
    """
    drawn = report.draws.get(fit.draws_file or "")
    if drawn is None:
        raise SpecError(f"{fit.law}: no draws to predict from ({fit.status}); run `homelab fit` again")
    return drawn


def predict_loss(fit: ScalingFit, drawn: Draws, **at: float) -> Forecast:
    """The fitted loss at n_params=..., n_tokens=... or flops=..., whichever the law takes.

    Raises:
        SpecError: a variable of the law is missing or not positive.
    """
    law = get_law(fit.law)
    missing = [axis for axis in law.axes if not at.get(axis, 0.0) > 0]
    if missing:
        raise SpecError(f"{law.name} needs a positive {missing[0]}; give one")
    value = float(law.loss(drawn.point, dict(at)))
    return Forecast(
        at={axis: at[axis] for axis in law.axes},
        loss_nats=value,
        ci95=interval(law.loss(drawn.values, dict(at))),
        extrapolation=max(_beyond(at[axis], fit.ranges[axis]) for axis in law.axes),
    )


def loss_band(fit: ScalingFit, drawn: Draws, columns: dict[str, Array]) -> tuple[Array, Array | None, Array | None]:
    """The fitted curve over arrays of the law's variables, and the 95 % band of the law (None without draws)."""
    law = get_law(fit.law)
    line = law.loss(drawn.point, dict(columns))
    if len(drawn.values) < 2:
        return line, None, None
    each = law.loss(drawn.values[:, None, :], dict(columns))
    low, high = np.quantile(each, (0.025, 0.975), axis=0)
    return line, low, high


def predict_split(fit: ScalingFit, drawn: Draws, flops: float) -> Split:
    """N_opt, D_opt and the loss there for a budget of C = 6 N D; intervals are taken in log space.

    Raises:
        SpecError: not a law of N and D.

    Source: Hoffmann et al. 2022 eq. 4, with G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """
    law = get_law(fit.law)
    if law.axes != ("n_params", "n_tokens"):
        raise SpecError(f"{law.name} has no best split of a budget; use the chinchilla law")
    n, d = optimal_split(drawn.point, flops)
    n_all, d_all = optimal_split(drawn.values, flops)
    loss = law.loss(drawn.point, {"n_params": n, "n_tokens": d})
    losses = law.loss(drawn.values, {"n_params": n_all, "n_tokens": d_all})
    low, high = (6 * fit.ranges["n_params"][i] * fit.ranges["n_tokens"][i] for i in (0, 1))
    return Split(
        flops=flops,
        n_params=Estimate(value=float(n), ci95=interval(n_all)),
        n_tokens=Estimate(value=float(d), ci95=interval(d_all)),
        loss_nats=Estimate(value=float(loss), ci95=interval(losses)),
        extrapolation=max(
            _beyond(flops, (low, high)),
            _beyond(float(n), fit.ranges["n_params"]),
            _beyond(float(d), fit.ranges["n_tokens"]),
        ),
    )


def optimal_split(values: Array, flops: float) -> tuple[Array, Array]:
    """N and D minimising E + A N^-alpha + B D^-beta at 6 N D = flops, from natural parameters (..., parameter)."""
    _e, a, b, alpha, beta = np.moveaxis(values, -1, 0)
    log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
    log_n = log_g + beta / (alpha + beta) * np.log(flops / 6)
    log_n = np.clip(log_n, -300, 300)
    return np.exp(log_n), np.exp(np.clip(np.log(flops / 6) - log_n, -300, 300))


def interval(draws: Array) -> tuple[float, float] | None:
    """2.5 % and 97.5 % of the draws; None without any."""
    if len(draws) < 2:
        return None
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _beyond(value: float, known: tuple[float, float]) -> float:
    return max(value / known[1], known[0] / value, 1.0)
