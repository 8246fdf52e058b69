"""C_min as the compute axis, in a world where it is exact: what a batch costs is known, and the laws are of C_min."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from homelab_scaling import cli
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.fit.answers import Questions, predict
from homelab_scaling.fit.catalogue import must_be_as_trained
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.points import apply_compute, points_csv, read_points, with_c_min
from homelab_scaling.fit.result import load_fit, save_fit
from homelab_scaling.report.story import KAPLAN_C_MIN
from homelab_scaling.runs import LossPoint

E, A, B, ALPHA, BETA = 1.7, 400.0, 900.0, 0.34, 0.30
GAMMA = 0.05
SIZES = np.geomspace(1e6, 3e8, 7)
RATIOS = (0.05, 0.3, 1.5, 0.6, 0.1, 0.9, 0.2)
"""B / B_crit by size: no pattern, so that the compute that was spent obeys no law."""


def row(n, d_min, ratio, loss, name):
    """A run that reached a loss which d_min tokens reach at a tiny batch."""
    d = d_min * (1 + ratio)
    return LossPoint(
        n_params=float(n),
        n_tokens=float(d),
        loss_nats=float(loss),
        row_id=name,
        run_id=name,
        flops=float(6 * n * d),
        c_min_flops=float(6 * n * d_min),
        s_min_steps=float(1e3 * (d_min / 1e9) ** 0.5),
    )


@pytest.fixture(scope="module")
def on_the_surface():
    """Rows on L(N, D_min); D itself is off by each size's own batch."""
    rows = []
    for n, ratio in zip(SIZES, RATIOS, strict=True):
        for d_min in np.geomspace(2e7, 2e10, 6):
            rows.append(row(n, d_min, ratio, E + A * n**-ALPHA + B * d_min**-BETA, f"{n:.3g}@{d_min:.3g}"))
    return tuple(rows)


@pytest.fixture(scope="module")
def on_the_frontier():
    """One row per compute, on L = K C_min^-gamma exactly."""
    rows = []
    for i, (n, ratio) in enumerate(zip(SIZES, RATIOS, strict=True)):
        c_min = 1e15 * 10**i
        rows.append(row(n, c_min / (6 * n), ratio, 30.0 * c_min**-GAMMA, f"r{i}"))
    return tuple(rows)


def test_the_exponent_of_c_min_is_exact_and_that_of_c_is_not(on_the_frontier):
    report = fit_points(on_the_frontier, laws=("power-c", "power-c-min"), n_bootstrap=0)
    assert report.get("power-c-min").parameters["gamma"].value == pytest.approx(GAMMA, rel=1e-6)
    assert report.get("power-c-min").sigma_log < 1e-9 < report.get("power-c").sigma_log
    assert report.get("power-c-min").ranges["c_min_flops"] == pytest.approx((1e15, 1e21))


def test_it_is_fitted_by_itself_where_every_row_has_it(on_the_frontier):
    named = {fit.law for fit in fit_points(on_the_frontier, n_bootstrap=0, with_evidence=False).fits}
    assert {"power-c", "power-c-min", "kaplan-s"} <= named
    some = (*on_the_frontier[:-1], _without(on_the_frontier[-1]))
    named = {fit.law for fit in fit_points(some, n_bootstrap=0, with_evidence=False).fits}
    assert "power-c-min" not in named and "power-c" in named


def _without(point):
    return replace(point, c_min_flops=None, s_min_steps=None)


def test_the_joint_law_and_the_split_follow_the_flag(on_the_surface):
    exact = fit_points(on_the_surface, laws=("chinchilla",), compute="c_min", n_bootstrap=0)
    law = exact.get("chinchilla")
    for name, value in (("E", E), ("alpha", ALPHA), ("beta", BETA)):
        assert law.parameters[name].value == pytest.approx(value, rel=1e-4)
    assert law.derived["a"].value == pytest.approx(BETA / (ALPHA + BETA), rel=1e-4)
    as_spent = fit_points(on_the_surface, laws=("chinchilla",), n_bootstrap=0).get("chinchilla")
    assert as_spent.sigma_log > 100 * law.sigma_log
    assert exact.compute == "c_min" and any("far below critical" in note for note in exact.notes)


def test_the_roads_follow_the_flag(on_the_surface):
    found = fit_points(on_the_surface, laws=("chinchilla",), compute="c_min", n_bootstrap=0, with_evidence=True)
    roads = {one.name: one.a.value for one in found.evidence.approaches if not one.why_not}
    assert roads["3-free"] == pytest.approx(BETA / (ALPHA + BETA), rel=1e-3)
    # The envelope wins on a grid of seven sizes: near, and nearer than by the compute that was spent.
    assert roads["1"] == pytest.approx(roads["3-free"], abs=0.03)
    largest = max(p.c_min_flops for p in on_the_surface)
    assert found.evidence.budget_flops == pytest.approx(10 * largest)


def test_laws_of_one_variable_keep_what_was_trained(on_the_surface):
    laws = ("power-d", "power-c")
    plain = fit_points(on_the_surface, laws=laws, n_bootstrap=0)
    flagged = fit_points(on_the_surface, laws=laws, compute="c_min", n_bootstrap=0)
    assert [fit.parameters for fit in plain.fits] == [fit.parameters for fit in flagged.fits]


def test_tokens_and_compute_are_corrected_together(on_the_surface):
    for before, after in zip(on_the_surface, apply_compute(on_the_surface, "c_min"), strict=True):
        assert after.flops == before.c_min_flops
        assert 6 * after.n_params * after.n_tokens == pytest.approx(before.c_min_flops)
    assert apply_compute(on_the_surface, "c") is on_the_surface


def test_a_prediction_says_what_its_tokens_are(on_the_surface, tmp_path):
    report = fit_points(on_the_surface, laws=("chinchilla", "power-c-min"), compute="c_min", n_bootstrap=0)
    made = predict(load_fit(save_fit(report, tmp_path)), Questions(flops=1e20))
    assert any("far below critical" in said for said in made.assumes)
    _low, high = made.budget_range_flops
    assert high == pytest.approx(max(p.c_min_flops for p in on_the_surface))
    one = predict(report, Questions(flops=1e20), law="power-c-min")
    gamma = report.get("power-c-min").parameters
    assert one.loss.loss_nats == pytest.approx(gamma["K"].value * 1e20 ** -gamma["gamma"].value, rel=1e-6)
    assert not any("far below critical" in said for said in one.assumes)
    with pytest.raises(SpecError, match="fit again without --compute"):
        must_be_as_trained(report)


# ------------------------------------------------------------------------------------------------------ the command


def test_no_row_has_it_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "points.csv"
    path.write_text(
        "n_params,n_tokens,loss_nats\n" + "".join(f"{n},{20 * n},{9 * n**-0.07}\n" for n in (1e6, 1e7, 1e8))
    )
    with pytest.raises(DataError, match=r"no row knows its C_min \(its columns have no c_min_flops\).*--verify"):
        with_c_min(read_points(path))
    assert cli.main(["fit", str(path), "--compute", "c_min"]) == 2
    said = capsys.readouterr().err.strip()
    assert "homelab batch-size LADDER --verify" in said and "Traceback" not in said


def test_rows_without_it_are_left_out_and_listed(on_the_frontier, tmp_path, capsys):
    path = tmp_path / "points.csv"
    path.write_text(points_csv((*on_the_frontier[:-1], _without(on_the_frontier[-1]))))
    arguments = ["fit", str(path), "--compute", "c_min", "--law", "power-c-min", "--bootstrap", "0", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compute"] == "c_min" and found["n_points"] == 6
    assert [one["row_id"] for one in found["excluded"]] == ["r6"]
    assert found["fits"][0]["parameters"]["gamma"]["value"] == pytest.approx(GAMMA, rel=1e-6)


def test_kaplans_own_axis_is_near_its_exponent_when_the_world_is_his():
    """C_min^-0.050 with Kaplan's prefactor: the fit gives the number that the report sets beside ours."""
    c = np.geomspace(1e15, 1e20, 6)
    rows = [
        row(1e6 * 3**i, x / (6e6 * 3**i), 0.2 * i, (3.1e8 * 8.64e19 / x) ** KAPLAN_C_MIN, f"k{i}")
        for i, x in enumerate(c)
    ]
    found = fit_points(rows, laws=("power-c-min",), n_bootstrap=0).get("power-c-min")
    assert found.parameters["gamma"].value == pytest.approx(0.050, rel=1e-6)
    assert math.isclose(found.derived["exponent"].value, 0.05, rel_tol=1e-6)
