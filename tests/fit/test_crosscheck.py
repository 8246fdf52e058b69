"""Profile and delta method against exact answers, against the bootstrap, and where they must disagree."""

import math

import numpy as np
import pytest

from homelab_scaling.fit.crosscheck import cross_checks, profile, spread
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.solve import solve
from homelab_scaling.runs import LossPoint


def straight_line(noise=0.01, n=20, seed=0):
    """L(N) without E: a linear regression in logs, whose intervals have a closed form."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(1e5, 1e8, n)
    losses = 20 * sizes**-0.1 * np.exp(noise * rng.normal(size=n))
    law = get_law("power-n")
    posed = law.pose({"n_params": sizes}, losses)
    name = parse_objective("l2-log")
    return law, posed, solve(posed.model, np.log(losses), posed.starts(50), name, bounds=posed.bounds), sizes, losses


def test_l2_covariance_is_the_heteroscedastic_one_of_a_linear_regression():
    _law, posed, optimum, sizes, losses = straight_line()
    around = spread(posed, optimum.objective, optimum.theta, np.log(losses), np.arange(len(sizes)))
    x = np.stack([np.ones(20), -(np.log(sizes) - np.log(sizes).mean())], axis=1)
    residual = np.log(losses) - x @ np.linalg.lstsq(x, np.log(losses), rcond=None)[0]
    bread = np.linalg.inv(x.T @ x)
    leverage = np.einsum("np,pq,nq->n", x, bread, x)
    freed = residual / (1 - leverage)
    assert around.covariance == pytest.approx(bread @ (x.T * freed**2) @ x @ bread, rel=1e-6)
    assert around.naive == pytest.approx(bread, rel=1e-9)
    assert around.student == pytest.approx(2.100922, rel=1e-6)  # t(18)


def test_the_profile_of_a_parabola_is_the_delta_interval():
    _law, posed, optimum, sizes, losses = straight_line()
    around = spread(posed, optimum.objective, optimum.theta, np.log(losses), np.arange(len(sizes)))
    low, high = profile(posed, optimum, np.log(losses), 1, around)
    half = around.student * math.sqrt(around.covariance[1, 1])
    assert (low, high) == pytest.approx((optimum.theta[1] - half, optimum.theta[1] + half), rel=1e-6)


def worlds(run_noise=0.0, row_noise=0.003, seed=0, n_sizes=8):
    rng = np.random.default_rng(seed)
    points = []
    for n in np.geomspace(1e6, 1e9, n_sizes):
        shared = run_noise * rng.normal()
        for d in (1e8, 1e9, 1e10):
            loss = (1.8 + 480 * n**-0.35 + 2100 * d**-0.37) * math.exp(shared + row_noise * rng.normal())
            points.append(
                LossPoint(n_params=n, n_tokens=d, loss_nats=loss, row_id=f"{n:.0f}@{d:.0f}", run_id=f"{n:.0f}")
            )
    return points


def test_three_roads_agree_on_a_good_design():
    points = [
        LossPoint(n_params=p.n_params, n_tokens=p.n_tokens, loss_nats=p.loss_nats, row_id=p.row_id) for p in worlds()
    ]
    fit = fit_points(points, laws=["chinchilla"], n_bootstrap=500).get("chinchilla")
    assert set(fit.cross_checks) == {"E", "alpha", "beta", "a"}
    for name, check in fit.cross_checks.items():
        widths = [high - low for low, high in (check.bootstrap95, check.delta95)]
        assert max(widths) < 2 * min(widths), name
        assert check.disagreement is None
    profiled = fit.cross_checks["alpha"].profile95
    assert profiled[0] < fit.parameters["alpha"].value < profiled[1]


def test_an_open_profile_is_said():
    """Half a decade of N cannot bound E from below."""
    points = [
        LossPoint(n_params=n, n_tokens=1e9, loss_nats=2 + 9 * n**-0.1 * math.exp(e), row_id=str(n))
        for n, e in zip(np.geomspace(1e6, 1e7, 9), 0.01 * np.random.default_rng(2).normal(size=9), strict=True)
    ]
    fit = fit_points(points, laws=["power-n-offset"], n_bootstrap=200).get("power-n-offset")
    check = fit.cross_checks.get("E")
    assert check is not None and check.profile95[0] is None
    assert "open below" in check.disagreement
    assert check.disagreement in fit.warnings


def test_roads_that_differ_are_named():
    _law, posed, optimum, sizes, losses = straight_line()
    told = Estimate(value=0.1, se=0.1, ci95=(-0.4, 0.6))
    found = cross_checks(
        get_law("power-n"), posed, optimum, np.log(losses), runs=np.arange(len(sizes)), estimates={"alpha": told}
    )
    assert "differ by a factor of" in found["alpha"].disagreement
    skipped = cross_checks(
        get_law("power-n"),
        posed,
        optimum,
        np.log(losses),
        runs=np.arange(len(sizes)),
        estimates={"alpha": told},
        skip=["alpha"],
    )
    assert skipped == {}
