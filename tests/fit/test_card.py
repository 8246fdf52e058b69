"""The fit card answers every question of the checklist, or says why it cannot."""

import json
from dataclasses import replace

import pytest

from homelab_scaling import codec
from homelab_scaling.fit.card import FitCard, fit_card, write_card
from homelab_scaling.fit.catalogue import CATALOGUE, as_report
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.points import points_csv
from homelab_scaling.runs import Excluded, LossPoint


def points(**extra):
    return [
        LossPoint(
            n_params=n,
            n_tokens=d,
            loss_nats=1.8 + 400 * n**-0.34 + 400 * d**-0.28,
            row_id=f"{n}@{d}",
            run_id=str(n),
            **extra,
        )
        for n in (1e6, 3e6, 1e7, 3e7)
        for d in (1e8, 3e8, 1e9)
    ]


def answers(card):
    return {item.question: item for item in card.items}


def test_a_tables_card_says_what_the_table_does_not(tmp_path):
    gone = (Excluded(row_id="x", reason="diverged"), Excluded(row_id="y", reason="diverged"))
    report = fit_points(points(), gone, laws=("chinchilla", "power-n"), n_bootstrap=50, objective="huber:1e-3")
    card = fit_card(report)
    found = answers(card)
    assert {item.part for item in card.items} == {
        "form",
        "training",
        "points",
        "fitting",
        "uncertainty",
        "code and data",
    }
    assert all((item.answer is None) == (item.why_unknown is not None) for item in card.items)
    assert "4 runs of 4 sizes, 1.00M to 30.0M parameters (ratio 30)" in found["How many models, of which sizes?"].answer
    assert found["Which were left out, and why?"].answer == "2 x diverged"
    assert "huber:1e-3" in found["What was minimised?"].answer
    assert "50 resamples, seed 0" in found["How were intervals made?"].answer
    assert "chinchilla: E, A, B, alpha and beta" in found["Which parameters were fitted?"].answer
    unknown = found["Which learning-rate schedule?"]
    assert unknown.answer is None and "the points came from a table" in unknown.why_unknown
    path = write_card(report, tmp_path)
    assert codec.read_json(path, FitCard) == card
    assert json.loads(path.read_text())["items"][0]["part"] == "form"


def test_repeated_data_pins_and_counts_are_told():
    report = fit_points(points(n_tokens_unique=200_000_000), laws=("chinchilla:E=1.8",), n_bootstrap=0)
    found = answers(fit_card(report))
    assert found["Was data repeated within a run?"].answer == "yes: 8 of 12 rows"
    assert "given: chinchilla:E=1.8: E = 1.8" in found["Which parameters were fitted?"].answer
    assert found["How were intervals made?"].why_unknown == "no resamples were asked for (--bootstrap 0)"
    body = fit_points(points(n_body=1000), laws=("power-d",), n_bootstrap=0, count="body")
    assert "no output head" in answers(fit_card(body))["What does N count?"].answer


def test_a_fit_that_failed_and_a_published_law_have_a_card():
    report = fit_points(points()[:3], laws=("chinchilla",), n_bootstrap=50)
    found = answers(fit_card(report))
    assert "3 points for 5 parameters" in found["What was minimised, how?"].why_unknown
    assert found["How were intervals made?"].why_unknown == "no law could be fitted"
    published = as_report(CATALOGUE["hoffmann-2022"])
    card = answers(fit_card(published))
    assert card["How many models, of which sizes?"].answer is None
    assert card["How were intervals made?"].answer is None


def test_undecided_schedules_are_not_claimed_finished():
    report = fit_points(points(), laws=("power-n",), n_bootstrap=0)
    which = answers(fit_card(report))["Which measurements are points?"].answer
    assert "not said for every row" in which
    sure = fit_points(points(decayed=True), laws=("power-n",), n_bootstrap=0)
    assert "each after a finished decay" in answers(fit_card(sure))["Which measurements are points?"].answer
    assert answers(fit_card(replace(sure, seed=7)))["How were intervals made?"].answer is None


def test_homelab_fit_writes_the_card_beside_the_fit(tmp_path, homelab):
    table = tmp_path / "points.csv"
    table.write_text(points_csv(points()))
    said = homelab("fit", table, "--law", "power-n", "--bootstrap", "0", "--out", tmp_path / "fit")
    assert said.code == 0
    assert codec.read_json(tmp_path / "fit" / "fit_card.json", FitCard).source == "points.csv"


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_published_law_fills_the_form(name):
    assert answers(fit_card(as_report(CATALOGUE[name])))["Which forms were fitted?"].answer
