"""Nominal 95 % intervals hold the truth as often as they say; the slow test is the whole study and prints its table."""

import numpy as np
import pytest

from homelab_scaling.fit import coverage
from homelab_scaling.fit.allocate import Terms, split_budget
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.worlds import simulate_world


@pytest.mark.slow
def test_intervals_of_a_and_n_opt_hold_the_truth_in_92_to_99_of_100_worlds(capsys):
    """500 worlds: the standard error of a coverage of 95 % is 1 %."""
    results = coverage.study(say=lambda line: None)
    with capsys.disabled():
        print(f"\n{coverage.table(results)}")
    assert [one.n_worlds for one in results] == [500] * 5
    low, high = coverage.ALLOWED
    for one in results:
        for quantity in coverage.PROMISED:
            assert low <= one.get(quantity).held_frac <= high, (one.setting, quantity)


def test_the_settings_are_those_that_are_promised():
    found = coverage.settings()
    assert [len(one.design) for one in found] == [35, 35, 35, 20, 15]
    assert [len({row.run for row in one.design}) for one in found] == [35, 35, 35, 20, 5]
    budgets = sorted({round(row.compute, -13) for row in found[0].design})
    assert budgets[0] == pytest.approx(3e15) and budgets[-1] == pytest.approx(3e18) and len(budgets) == 5
    assert [one.noise.outlier_frac for one in found] == [0, 0, 0.15, 0.1, 0]
    law, values = coverage.truth()
    best, _tokens = split_budget(Terms.of(law, values), found[0].design[0].compute)
    assert found[0].design[0].n_params == pytest.approx(float(best) / 8)
    assert law.name == "chinchilla"


def test_a_world_is_fitted_as_fit_points_does():
    """The study's shortcut (fewer starts) ends where the whole fit of the same world ends."""
    for setting in (coverage.settings()[2], coverage.settings()[4]):
        law, values = coverage.truth()
        points = simulate_world(setting.design, law, values, setting.noise, world=3)
        fit = fit_points(points, laws=["chinchilla"], n_bootstrap=1500).get("chinchilla")
        one = coverage.measure_world(setting, 3, n_draws=1500)
        assert one.method == fit.interval
        for quantity in ("a", "alpha", "E"):
            whole = (fit.derived | fit.parameters)[quantity]
            assert one.point[quantity] == pytest.approx(whole.value, rel=1e-6)
            assert np.diff(one.ends[quantity])[0] == pytest.approx(np.ptp(whole.ci95), rel=0.15)


def test_quantities_at_the_truth():
    law, values = coverage.truth()
    found = coverage.quantities(law, values, 3e19)
    assert found["a"] == pytest.approx(0.5138994929)
    assert np.exp(found["ln N_opt"]) == pytest.approx(float(split_budget(Terms.of(law, values), 3e19)[0]))
    assert found["E"] == pytest.approx(1.8172181)


def test_coverage_counts_the_worlds_that_hold_the_truth():
    setting = coverage.settings()[0]
    result = coverage.measure(setting, n_worlds=6, n_draws=60)
    again = [coverage.measure_world(setting, world, n_draws=60) for world in range(6)]
    a = result.get("a")
    held = [one.ends["a"][0] <= a.truth <= one.ends["a"][1] for one in again]
    assert a.held_frac == np.mean(held)
    assert a.rmse == pytest.approx(np.sqrt(np.mean([(one.point["a"] - a.truth) ** 2 for one in again])))
    assert a.width == pytest.approx(np.median([np.diff(one.ends["a"])[0] for one in again]))
    text = coverage.table([result])
    assert "6 worlds of 60 resamples" in text and f"{a.held_frac:.3f}" in text
