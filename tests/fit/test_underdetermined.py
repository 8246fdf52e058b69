"""Fewer points than parameters: wide intervals that hold the truth, no digits, and a sentence."""

import math

import pytest

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.catalogue import joint_fit
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.result import load_fit, save_fit
from homelab_scaling.runs import LossPoint

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def three(shift=(0.0, 0.0, 0.0)):
    """The three isoFLOP runs of a published home-lab table, by Hoffmann's rounded constants."""
    points = []
    for (n, d), s in zip([(5e6, 4.5e9), (25e6, 9e8), (100e6, 2.25e8)], shift, strict=True):
        loss = (TRUTH["E"] + TRUTH["A"] * n**-0.34 + TRUTH["B"] * d**-0.28) * math.exp(s)
        points.append(LossPoint(n_params=n, n_tokens=d, loss_nats=loss, row_id=f"{n:.0f}", run_id=f"{n:.0f}"))
    return points


def test_hoffmanns_constants_give_these_losses():
    assert [p.loss_nats for p in three()] == pytest.approx([4.65, 4.21, 4.35], abs=5e-3)


@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), (0.002, -0.002, 0.001)])
def test_three_points_leave_nearly_every_exponent_open(shift):
    fit = fit_points(three(shift), laws=["chinchilla"]).get("chinchilla")
    assert fit.status.startswith("not fitted: 3 points for 5 parameters")
    assert fit.objective_value is None
    for name, truth in TRUTH.items():
        one = fit.parameters[name]
        assert one.value is None and one.se is None
        assert one.ci95[0] <= truth <= one.ci95[1], name
    low, high = fit.derived["a"].ci95
    assert low < 0.1 and high > 0.85
    assert low <= 0.28 / 0.62 <= high
    assert "laws that pass within 0.3 %" in fit.interval
    assert set(fit.unpinned) >= set(TRUTH) | {"a", "b"}


def test_their_range_survives_the_disk_and_predicts_nothing(tmp_path):
    report = fit_points(three())
    save_fit(report, tmp_path)
    back = load_fit(tmp_path)
    assert back == report
    assert report.get("chinchilla-tied").derived["a"].value == 0.5
    assert report.evidence is None or report.evidence.chosen_law is None
    with pytest.raises(SpecError, match="no fitted"):
        joint_fit(back)


def test_two_points_have_no_interval_at_all():
    fit = fit_points(three()[:2], laws=["chinchilla"]).get("chinchilla")
    assert fit.parameters["alpha"].ci95 is None
    assert fit.draws_file is None


def test_points_that_no_such_law_passes_through_get_none():
    points = three()
    rising = [
        LossPoint(n_params=p.n_params, n_tokens=1e9, loss_nats=3.0 + i, row_id=str(i)) for i, p in enumerate(points)
    ]
    fit = fit_points(rising, laws=["chinchilla"]).get("chinchilla")
    assert fit.parameters["alpha"].ci95 is None
