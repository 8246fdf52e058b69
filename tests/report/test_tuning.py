"""The section on tuned rates: its numbers are those of lr.json and of a fit with the tuned rungs put back."""

import math
from dataclasses import replace

import pytest

from homelab_scaling import codec
from homelab_scaling.batch.bracket import (
    Bracket,
    BracketRung,
    RateTrial,
    best_rate,
    bracket_file,
    fit_rates,
    tuned_rung,
    tuning_effect,
)
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.ladder import LrTable
from homelab_scaling.plan.tuned import TunedRates
from homelab_scaling.report.collect import collect
from homelab_scaling.report.page import write_report
from homelab_scaling.report.tuning import tuning
from homelab_scaling.runs import to_point

LOST = 0.3 * math.log(2) ** 2
"""Nats above the best, a factor of 2 beside it."""


def bracketed(synthetic) -> Bracket:
    """A lab whose smallest rungs are the winners at half the rule's rate."""
    synthetic.all_rungs()
    view = collect(synthetic.lab)
    rungs = []
    for run in view.runs[:2]:
        losses = tuple(row.loss_nats for row in run.rows)
        off = {0.25: LOST, 0.5: 0.0, 1.0: LOST}
        trials = tuple(
            RateTrial(
                factor=f,
                lr_peak=6e-3 * f,
                run_ids=(run.run_id if f == 0.5 else f"{run.run_id}-x{f:g}",),
                losses=tuple(loss + off[f] for loss in losses),
            )
            for f in off
        )
        rungs.append(
            BracketRung(
                name=run.rung,
                shape=run.spec.science.shape,
                n_params=run.n_params,
                n_body=run.rows[0].n_body,
                batch_tokens=synthetic.batch,
                horizons_tokens=synthetic.horizons,
                trials=trials,
                best=best_rate({t.factor: t.final for t in trials}),
            )
        )
    log_factor, slope = fit_rates(rungs)
    rates = TunedRates(
        data_id="d", rule=LrTable(), rungs=tuple(map(tuned_rung, rungs)), log_factor=log_factor, slope=slope
    )
    bracket = Bracket(ladder="quickstart", rungs=tuple(rungs), rates=rates, effect=tuning_effect(rungs))
    codec.write_json(bracket_file(synthetic.lab), bracket)
    return bracket


def test_what_was_tried_and_what_it_did_are_tables(synthetic) -> None:
    bracket = bracketed(synthetic)
    _, words, tried, effect, exponents, bullets = tuning(collect(synthetic.lab))
    assert words.text.startswith("Best rates over the rule's: 67k 0.50")
    assert tried.head == ("rung", "× 0.25", "× 0.5", "× 1", "taken", "best") and len(tried.rows) == 2
    assert tried.rows[0][-2:-1] == ("3.00e-03",) and tried.rows[0][-1].startswith("× 0.50 (×/÷ ")
    assert "by the noise of seeds" in effect.text
    horizon = bracket.effect.horizons[-1]
    assert exponents.rows[-1][1:3] == (f"{horizon.exponent_rule:.3f}", f"{horizon.exponent_best:.3f}")
    assert exponents.rows[-1][-1] == f"{LOST:.3f}"
    assert "over the whole ladder" in bullets.items[0].lower()


def test_the_exponent_with_the_tuned_rungs_put_back_is_that_of_such_a_fit(synthetic) -> None:
    bracket = bracketed(synthetic)
    view = collect(synthetic.lab)
    winners = {run_id for rung in bracket.rungs for run_id in rung.winner.run_ids}
    back = [
        replace(point, loss_nats=point.loss_nats + LOST) if point.run_id in winners else point
        for point in map(to_point, view.rows)
    ]
    fit = fit_points(back, laws=("power-n",), n_bootstrap=0).get("power-n")
    assert fit is not None
    (said,) = [item for item in tuning(view)[-1].items if "L(N)" in item]
    assert f"would be {fit.derived['exponent'].value:.3f}" in said


def test_begun_rungs_and_doubtful_rates_are_told(synthetic) -> None:
    plain = bracketed(synthetic)
    kept = replace(plain, rates=replace(plain.rates, kept={"874k": 7e-4}))
    codec.write_json(bracket_file(synthetic.lab), kept)
    said = " ".join(tuning(collect(synthetic.lab))[-1].items)
    assert "874k had begun before the rates were tuned and kept 7.00e-04" in said


def test_a_lab_without_tuned_rates_has_no_section(synthetic) -> None:
    synthetic.all_rungs()
    assert tuning(collect(synthetic.lab)) == []


def test_a_damaged_file_is_said_and_the_report_is_written(synthetic) -> None:
    synthetic.all_rungs()
    codec.write_text(bracket_file(synthetic.lab), '{"ladder": 3}')
    assert "tuned rates cannot be read: lr.json" in tuning(collect(synthetic.lab))[1].text


@pytest.mark.slow
def test_the_page_holds_the_section(synthetic) -> None:
    bracketed(synthetic)
    assert "Learning rate" in write_report(synthetic.lab).read_text(encoding="utf-8")
