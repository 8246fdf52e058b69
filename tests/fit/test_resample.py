"""Resamples keep the design: budgets stay whole, trunks stay together, the same stream gives the same draws."""

import numpy as np
import pytest

from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.resample import WEBB, budget_strata, draw, pair_counts
from homelab_scaling.fit.solve import solve


def design(n_budgets=4, per_budget=5):
    flops = np.repeat(np.geomspace(1e17, 1e20, n_budgets), per_budget) * np.tile(
        np.linspace(0.99, 1.01, per_budget), n_budgets
    )
    return flops, np.arange(len(flops))


def test_budgets_of_an_isoflop_design_are_strata():
    flops, runs = design()
    shuffled = np.random.default_rng(0).permutation(20)
    strata = budget_strata(flops[shuffled], runs)
    assert np.bincount(strata).tolist() == [5, 5, 5, 5]
    assert (strata == shuffled // 5).all()


def test_other_designs_have_none():
    flops, runs = design()
    assert budget_strata(np.repeat(flops, 2), np.repeat(runs, 2)).max() == 0  # trunks with several rows
    assert budget_strata(np.geomspace(1e17, 1e20, 20), runs).max() == 0  # every run its own budget
    assert budget_strata(flops[:5], runs[:5]).max() == 0  # one budget
    assert budget_strata(flops[:-3], runs[:-3]).max() == 0  # a budget of two runs


def pose(runs):
    rng = np.random.default_rng(1)
    n = np.geomspace(1e6, 1e9, len(runs))
    losses = (1.7 + 300 * n**-0.3) * np.exp(0.01 * rng.normal(size=len(runs)))
    law = get_law("power-n-offset")
    posed = law.pose({"n_params": n}, losses)
    y = np.log(losses)
    return posed, y, solve(posed.model, y, posed.starts(64), parse_objective("l2-log"), bounds=posed.bounds)


def test_pairs_keep_each_budget_whole_and_each_run_together():
    runs = np.repeat(np.arange(15), 2)
    posed, y, optimum = pose(runs)
    strata = np.repeat(np.arange(3), 5)
    found = draw(
        posed.model, y, runs=runs, strata=strata, theta=optimum.theta, n_draws=50, rng=np.random.default_rng(0)
    )
    assert found.method == "pairs bootstrap over 15 runs within 3 budgets"
    assert (found.y == y).all()
    assert (found.weights[:, ::2] == found.weights[:, 1::2]).all()
    per_budget = found.weights[:, ::2].reshape(50, 3, 5).sum(axis=2)
    assert (per_budget == 4).all(), "one run less than there are, as the rescaled bootstrap wants"
    assert len(np.unique(found.weights, axis=0)) > 45


def test_budgets_of_unlike_size_keep_their_weight_and_their_variance():
    """Mean weight 1 for every run; the variance of a budget's mean is that of its sample, (1 / m) S^2 with m - 1."""
    strata = np.repeat([0, 1], [3, 8])
    counts = pair_counts(strata, 40_000, np.random.default_rng(0))
    assert counts.mean(axis=0) == pytest.approx(np.ones(11), abs=0.02)
    noise = np.random.default_rng(1).normal(size=11)
    for stratum, m in ((0, 3), (1, 8)):
        of = strata == stratum
        means = counts[:, of] @ noise[of] / m
        assert means.var() == pytest.approx(noise[of].var(ddof=1) / m, rel=0.03)


def test_one_stratum_is_the_plain_bootstrap():
    counts = pair_counts(np.zeros(9, dtype=int), 200, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 9).all() and (counts == counts.round()).all()


def test_wild_signs_are_shared_within_a_trunk():
    runs = np.repeat(np.arange(5), 3)
    posed, y, optimum = pose(runs)
    one = np.zeros(5, dtype=np.int64)
    found = draw(posed.model, y, runs=runs, strata=one, theta=optimum.theta, n_draws=40, rng=np.random.default_rng(0))
    f = posed.model.value(optimum.theta[None])[0][0]
    sizes = (found.y - f) / (found.y - f)[0]
    for run in range(5):
        rows = sizes[:, runs == run]
        assert np.allclose(rows, rows[:, :1])  # all rows of a run are stretched by the same weight
    ratios = np.unique(np.round(np.abs(sizes), 6))
    allowed = np.unique(np.round(np.abs(WEBB[:, None] / WEBB[None]), 6))
    assert set(ratios) <= set(allowed)
    again = draw(posed.model, y, runs=runs, strata=one, theta=optimum.theta, n_draws=40, rng=np.random.default_rng(0))
    assert (again.y == found.y).all()
