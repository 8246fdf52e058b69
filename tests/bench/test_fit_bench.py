"""`homelab bench fit` on a small problem: every contestant judged by the same objective, the JSON whole."""

import dataclasses
import json

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.bench import fit
from homelab_scaling.errors import MachineError
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.objectives import Objective


@pytest.fixture(scope="module")
def small():
    said = []
    result = fit.run(n_rounds=1, say=said.append, n_points=60, every=409, n_resamples=12, n_timed=5)
    return result, said


def test_every_contestant_is_timed_and_judged(small):
    result, said = small
    assert result.n_points == 60 and result.n_starts == 12 and result.n_distinct_starts <= 12
    assert len(said) == len(result.grid) + len(result.refits) >= 6
    for one in (*result.grid, *result.refits):
        assert one.wall_s > 0 and one.cpu_s >= 0 and one.gap_frac >= 0, one.name
    peers = {one.name for one in (*result.grid, *result.refits) if not one.name.startswith("ours")}
    assert {race.peer for race in result.races if not race.peer.startswith(" ")} == peers
    assert (any("chinchilla" in why for why in result.missing)) == ("chinchilla" not in result.versions)


def test_ours_is_at_the_lowest_objective_and_within_1e_9_on_every_resample(small):
    result, _said = small
    ours = [one for one in (*result.grid, *result.refits) if one.name.startswith("ours")]
    assert len(ours) == 3
    assert all(one.worst_gap_frac <= fit.EXACT for one in ours)
    assert "exact optimum everywhere (gap <= 1e-09): yes" in result.summary()


def test_part_of_a_job_is_scaled_up_and_said(small):
    result, _said = small
    bfgs = result.refits[1]
    assert (bfgs.n_timed, bfgs.n_total) == (5, 12)
    assert "timed on 5 of 12, scaled" in result.summary()
    race = next(one for one in result.races if one.peer == bfgs.name)
    assert race.ratio == pytest.approx(bfgs.wall_s / result.refits[0].wall_s)
    assert json.loads(codec.dumps(result))["refits"][1]["n_timed"] == 5


def test_the_summary_says_whether_a_target_was_reached(small):
    result, _said = small
    for ratio, word in ((12.1, "reached"), (11.9, "MISSED")):
        race = fit.Race(peer="p", ratio=ratio, cpu_ratio=1.0, target_ratio=12)
        assert f"wanted 12x: {word}" in dataclasses.replace(result, races=(race,)).summary()
    worse = dataclasses.replace(result.grid[0], worst_gap_frac=1e-8)
    assert "everywhere (gap <= 1e-09): NO" in dataclasses.replace(result, grid=(worse,)).summary()


def test_the_peers_minimise_what_ours_minimises():
    """Value and gradient as scipy gets them, against the engine's own objective on the same points."""
    n, d, loss, _words = fit._points(60)
    theta = np.array([6.0, 7.0, 0.5, 0.34, 0.3])
    law = get_law("chinchilla")
    predicted = law.loss(np.array([np.exp(0.5), np.exp(6), np.exp(7), 0.34, 0.3]), {"n_params": n, "n_tokens": d})
    wanted = Objective(kind="huber", delta=fit.DELTA).value(np.log(predicted), np.log(loss), np.ones(len(n)))
    logs = (np.log(n), np.log(d), np.log(loss))
    assert fit.objective(theta[None], n, d, loss)[0] == pytest.approx(float(wanted), rel=1e-12)
    assert fit._value(theta, *logs) == pytest.approx(float(wanted), rel=1e-12)
    value, slope = fit._value_and_slope(theta, *logs, 1.0)
    assert value == pytest.approx(1e3 * float(wanted), rel=1e-12)
    for p in range(5):
        step = np.eye(5)[p] * 1e-6
        up, down = (fit._value_and_slope(theta + s, *logs, 1.0)[0] for s in (step, -step))
        assert (up - down) / 2e-6 == pytest.approx(slope[p], rel=1e-5)


def test_without_the_published_table_the_points_are_simulated_and_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(fit, "TABLE", tmp_path / "nothing.csv")
    n, _d, loss, words = fit._points(None)
    assert len(n) == 240 and (loss > 1.8).all()
    assert words.startswith("simulated from the besiroglu-2024 law")


def test_a_contestant_that_dies_is_named(tmp_path):
    with pytest.raises(MachineError, match=r"scipy BFGS.*failed"):
        fit._in_own_process("bfgs", tmp_path / "nothing.npz")
