"""Simulated experiments: the truth where there is no noise, noise shared within runs, the same world every time."""

import numpy as np
import pytest

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import Terms, split_budget
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.worlds import (
    Design,
    Noise,
    as_points,
    columns_of,
    isoflop_design,
    ladder_design,
    log_losses,
    noise_of,
    runs_of,
    simulate_world,
)

LAW = get_law("chinchilla")
TRUTH = np.array([1.7, 60.0, 900.0, 0.35, 0.37])
SILENT = Noise(run_sd=0, row_sd=0)


def test_without_noise_a_world_is_the_law():
    design = ladder_design((1e5, 1e6), (1e7, 1e8))
    points = simulate_world(design, LAW, TRUTH, SILENT)
    assert [p.loss_nats for p in points] == pytest.approx(
        [1.7 + 60 * n**-0.35 + 900 * d**-0.37 for n in (1e5, 1e6) for d in (1e7, 1e8)], rel=1e-12
    )
    assert [p.run_id for p in points] == ["100000-s0"] * 2 + ["1000000-s0"] * 2
    assert len({p.row_id for p in points}) == 4
    assert points[0].flops == pytest.approx(6e12)


def test_a_fit_of_a_silent_world_gives_the_truth_back():
    points = simulate_world(ladder_design((1e5, 1e6, 1e7, 1e8), (1e7, 1e8, 1e9)), LAW, TRUTH, SILENT)
    fit = fit_points(points, laws=["chinchilla"], n_bootstrap=0).get("chinchilla")
    assert [fit.parameters[n].value for n in LAW.names] == pytest.approx(TRUTH, rel=1e-6)


def test_rows_of_a_run_share_its_noise_and_rows_have_their_own():
    design = ladder_design((1e5, 1e6), (1e7, 1e8, 1e9), seeds=(0, 1))
    assert runs_of(design).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    noise = noise_of(design, Noise(run_sd=0.004, row_sd=0.003), 4000)
    cov = np.cov(noise.T)
    assert np.sqrt(np.diag(cov)) == pytest.approx(0.005, rel=0.05)
    assert np.sqrt(cov[0, 1]) == pytest.approx(0.004, rel=0.05)
    assert abs(cov[0, 3]) < 0.05 * 0.005**2, "seeds of one size are independent"


def test_outliers_are_upward_and_as_frequent_as_asked():
    design = ladder_design((1e5,), np.geomspace(1e7, 1e9, 50).tolist())
    noise = noise_of(design, Noise(run_sd=0, row_sd=0, outlier_frac=0.15, outlier_sd=0.03), 400)
    assert (noise >= 0).all()
    assert (noise > 0).mean() == pytest.approx(0.15, abs=0.01)
    assert noise[noise > 0].mean() == pytest.approx(0.03 * np.sqrt(2 / np.pi), rel=0.05)


def test_a_world_does_not_depend_on_how_many_there_are():
    design = ladder_design((1e5, 1e6), (1e7,))
    noise = Noise(seed=3)
    many = log_losses(design, LAW, TRUTH, noise, 5)
    assert np.array_equal(many[:2], log_losses(design, LAW, TRUTH, noise, 2))
    assert [np.log(p.loss_nats) for p in simulate_world(design, LAW, TRUTH, noise, world=4)] == pytest.approx(many[4])
    assert not np.allclose(many[0], log_losses(design, LAW, TRUTH, Noise(seed=4), 1)[0])


def test_isoflop_curves_are_centred_on_the_optimum_and_cost_their_budget():
    design = isoflop_design(LAW, TRUTH, (1e16, 1e17), n_sizes=7, width=8)
    assert len(design) == len({row.run for row in design}) == 14
    assert columns_of(design)["flops"] == pytest.approx(np.repeat([1e16, 1e17], 7))
    best, _d = split_budget(Terms.of(LAW, TRUTH), 1e16)
    assert design[3].n_params == pytest.approx(float(best))
    assert design[6].n_params / design[0].n_params == pytest.approx(64)
    losses = np.exp(log_losses(design, LAW, TRUTH, SILENT, 1)[0])
    assert losses[:7].argmin() == losses[7:].argmin() == 3


def test_stated_flops_are_kept():
    (point,) = as_points([Design(n_params=1e6, n_tokens=1e7, run="a", flops=9e13)], np.log([3.0]))
    assert (point.flops, point.loss_nats) == (9e13, pytest.approx(3.0))


@pytest.mark.parametrize(("key", "value"), [("run_sd", -0.1), ("row_sd", 1.0), ("outlier_frac", 1.0)])
def test_impossible_noise_is_refused(key, value):
    with pytest.raises(SpecError, match=key):
        Noise(**{key: value})
