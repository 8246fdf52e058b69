"""Approach 1: recovers a known exponent from loss curves, refuses mid-schedule rows and unbracketed winners."""

import numpy as np
import pytest

from homelab_scaling.fit.envelope import envelope, fit_envelope, loss_curves, mid_schedule, too_few_curves
from homelab_scaling.fit.isoflop import best_split
from homelab_scaling.fit.laws import CHINCHILLA
from homelab_scaling.runs import LossPoint

VALUES = np.array([1.8172181, 477.82587, 2143.41736, 0.3473105, 0.3671724])


def grid(sizes, tokens):
    n, d = np.meshgrid(sizes, tokens, indexing="ij")
    return {"n_params": n.ravel(), "n_tokens": d.ravel()}


def log_losses(columns):
    return np.log(CHINCHILLA.loss(VALUES, columns))[None]


def test_dense_curves_give_the_exponent_of_the_surface():
    """The staircase of winners narrows with the spacing of sizes: 40 sizes come within .002 of a, 8 within .02."""
    true_a, log_n, _log_d = best_split(CHINCHILLA, VALUES, 1e20)
    for n_sizes, tolerance in ((8, 0.02), (40, 0.002)):
        columns = grid(np.geomspace(1e6, 1e10, n_sizes), np.geomspace(1e7, 1e12, 30))
        y = log_losses(columns)
        found = fit_envelope(loss_curves(columns), y, np.ones_like(y), flops=1e20)
        assert found.a[0] == pytest.approx(true_a, abs=tolerance)
        assert found.b[0] == pytest.approx(1 - found.a[0], abs=1e-9)
        assert found.log_n[0] == pytest.approx(log_n, abs=0.1)


def test_smallest_and_largest_winners_do_not_count():
    columns = grid(np.geomspace(1e6, 1e8, 6), np.geomspace(1e7, 1e11, 9))
    y = log_losses(columns)
    curves = loss_curves(columns)
    found = envelope(curves, y, np.ones_like(y))
    assert found.winner.shape == (1, 1500)
    assert set(found.winner[0].tolist()) == {-1, 1, 2, 3, 4}
    assert found.winner[0, 0] == found.winner[0, -1] == -1


def test_curves_that_do_not_overlap_give_nothing():
    """Sizes a decade apart over one octave of tokens: at each C there is one curve, so no choice was made."""
    columns = grid(np.geomspace(1e6, 1e11, 6), [1e9, 1.4e9, 2e9])
    y = log_losses(columns)
    assert np.isnan(fit_envelope(loss_curves(columns), y, np.ones_like(y), flops=1e20).a[0])


def test_sizes_with_two_rows_have_no_curve_and_five_curves_are_needed():
    columns = grid(np.geomspace(1e6, 1e8, 6), np.geomspace(1e7, 1e10, 4))
    assert len(loss_curves(columns)) == 6
    assert too_few_curves(loss_curves(columns)) is None
    few = {name: v[:18] for name, v in columns.items()}  # the fifth size keeps two rows
    assert len(loss_curves(few)) == 4
    assert "wants 5" in too_few_curves(loss_curves(few))


def test_weights_of_zero_take_rows_away_and_curves_bridge_the_gap():
    columns = grid(np.geomspace(1e6, 1e9, 9), np.geomspace(1e7, 1e11, 9))
    y = log_losses(columns)
    curves = loss_curves(columns)
    weights = np.ones((3, y.shape[1]))
    weights[1, 40] = 0  # the middle of the middle size's curve
    weights[2, 36:45] = 0  # that size altogether
    found = fit_envelope(curves, np.repeat(y, 3, axis=0), weights, flops=1e20)
    for member, gone in ((1, [40]), (2, list(range(36, 45)))):
        rest = {name: np.delete(v, gone) for name, v in columns.items()}
        y_rest = log_losses(rest)
        alone = fit_envelope(loss_curves(rest), y_rest, np.ones_like(y_rest), flops=1e20)
        assert found.a[member] == pytest.approx(alone.a[0], rel=1e-9)
    assert len(set(found.a.tolist())) == 3


def test_seeds_of_one_size_are_averaged():
    columns = grid(np.geomspace(1e6, 1e9, 7), np.geomspace(1e7, 1e11, 6))
    y = log_losses(columns)
    twice = {name: np.concatenate([v, v]) for name, v in columns.items()}
    noise = np.random.default_rng(0).normal(0, 0.01, y.shape)
    both = np.concatenate([y + noise, y - noise], axis=1)
    found = fit_envelope(loss_curves(twice), both, np.ones_like(both), flops=1e20)
    assert found.a[0] == pytest.approx(fit_envelope(loss_curves(columns), y, np.ones_like(y), flops=1e20).a[0])


def test_rows_in_the_middle_of_a_cosine_are_refused_and_named():
    def row(run, d, schedule):
        return LossPoint(n_params=1e6, n_tokens=d, loss_nats=3.0, run_id=run, schedule=schedule)

    middle = mid_schedule([row("r1", 1e6, "cosine"), row("r1", 2e6, "cosine"), row("r2", 2e6, "cosine")])
    assert "run r1 has 2 rows under one cosine schedule" in middle
    assert mid_schedule([row("r1", 1e6, "cosine"), row("r2", 2e6, "cosine")]) is None
    assert mid_schedule([row("r1", 1e6, "wsd"), row("r1", 2e6, "wsd")]) is None
    assert mid_schedule([row(None, 1e6, "cosine"), row(None, 2e6, "cosine")]) is None
