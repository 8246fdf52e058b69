"""Tuned rates from losses: the vertex, edges, the noise of seeds, the power law, what tuning did to the exponent."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.batch.bracket import (
    Bracket,
    BracketRung,
    RateTrial,
    best_rate,
    fit_rates,
    next_factor,
    tuned_rung,
    tuning_effect,
)
from homelab_scaling.box import Box
from homelab_scaling.errors import DataError
from homelab_scaling.ladder import Ladder, LrTable
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.tuned import TunedRates, rungs_to_tune
from homelab_scaling.specs import ModelShape

BOX = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=False)
SHAPE = ModelShape(n_layer=2, d_model=32, n_head=2, context_tokens=64)


def bowl(factor: float, best: float, *, floor: float = 3.0, width: float = 0.2) -> float:
    """Loss, a parabola in log rate."""
    return floor + width * math.log(factor / best) ** 2


@settings(derandomize=True, deadline=None)
@given(st.floats(0.55, 1.8), st.floats(0.05, 2.0))
def test_the_vertex_is_found_wherever_it_lies_between(best: float, width: float) -> None:
    found = best_rate({f: bowl(f, best, width=width) for f in (0.5, 1.0, 2.0, 0.25, 4.0)})
    assert found.vertex == pytest.approx(best, rel=1e-6)
    assert found.factor == min((0.25, 0.5, 1.0, 2.0, 4.0), key=lambda f: abs(math.log(f / best)))


def test_its_error_is_what_the_noise_of_seeds_makes_of_it() -> None:
    rng = np.random.default_rng(0)
    clean = {f: bowl(f, 1.2, width=0.3) for f in (0.5, 1.0, 2.0)}
    told = best_rate(clean).sd_log
    drawn = [
        math.log(best_rate({f: loss + rng.normal(0, 0.01) for f, loss in clean.items()}).vertex) for _ in range(400)
    ]
    assert told == pytest.approx(np.std(drawn), rel=0.15)


def test_losses_within_the_noise_of_seeds_are_said_to_be_equal() -> None:
    assert "any of them is as good" in (best_rate({0.5: 3.004, 1: 3.0, 2: 3.009}).note or "")
    assert best_rate({0.5: 3.1, 1: 3.0, 2: 3.2}).note is None


def test_a_best_rate_at_the_edge_is_taken_and_said() -> None:
    found = best_rate({0.5: 3.3, 1: 3.2, 2: 3.0})
    assert (found.factor, found.vertex, found.sd_log) == (2, 2, None) and "highest tried" in (found.note or "")
    assert "lowest tried" in (best_rate({0.5: 3.0, 1: 3.2, 2: 3.4}).note or "")
    assert "too few" in (best_rate({0.5: 3.0, 1: 3.2, 2: None}).note or "")
    with pytest.raises(DataError, match=r"every rate diverged, from 0\.5 x"):
        best_rate({0.5: None, 1: None})


def test_one_more_factor_is_tried_beyond_an_edge_twice_at_most() -> None:
    assert next_factor({0.5: 3.1, 1: 3.0, 2: 3.2}, 3) is None
    assert next_factor({0.5: 3.3, 1: 3.2, 2: 3.1}, 3) == 4
    assert next_factor({0.5: 3.0, 1: 3.2, 2: None}, 3) == 0.25
    assert next_factor({0.5: 3.3, 1: 3.2, 2: 3.1, 4: 3.0}, 3) == 8
    assert next_factor({0.5: 3.3, 1: 3.2, 2: 3.1, 4: 3.0, 8: 2.9}, 3) is None
    assert next_factor({1: 3.0, 3: 2.9}, 2) == 9, "the list's own spacing"
    assert next_factor({0.5: None, 1: None, 2: None}, 3) is None
    assert next_factor({0.5: 3.2, 1: 3.1, 2: None}, 3) is None, "beyond is a rate that diverged"


# --------------------------------------------------------------------------------------------------------- the ladder


def make_rung(name: str, n: int, best: float, *, floors: tuple[float, ...] = (3.4, 3.0)) -> BracketRung:
    trials = tuple(
        RateTrial(
            factor=f,
            lr_peak=1e-3 * f,
            run_ids=(f"{name}-{f:g}",),
            losses=tuple(bowl(f, best, floor=floor, width=0.3) for floor in floors),
        )
        for f in (0.5, 1.0, 2.0)
    )
    return BracketRung(
        name=name,
        shape=SHAPE,
        n_params=2 * n,
        n_body=n,
        batch_tokens=512,
        horizons_tokens=(10_000, 20_000)[-len(floors) :],
        trials=trials,
        best=best_rate({t.factor: t.final for t in trials}),
    )


def rates(*rungs: BracketRung, **changes: object) -> TunedRates:
    log_factor, slope = fit_rates(rungs)
    plain = TunedRates(
        data_id="d", rule=LrTable(), rungs=tuple(map(tuned_rung, rungs)), log_factor=log_factor, slope=slope
    )
    return replace(plain, **changes)


def test_a_power_law_in_the_best_rates_comes_back_through_two_and_three_rungs() -> None:
    law = lambda n: 1.4 * (n / 10_000) ** -0.1  # noqa: E731
    for sizes in ((10_000, 40_000), (10_000, 40_000, 90_000)):
        found = rates(*(make_rung(str(n), n, law(n)) for n in sizes))
        assert found.slope == pytest.approx(-0.1, abs=1e-6)
        assert found.factor(1_000_000) == pytest.approx(law(1_000_000), rel=1e-5)
    assert "exactly through two" in rates(make_rung("a", 10_000, 1.2), make_rung("b", 40_000, 1.0)).words
    one = rates(make_rung("a", 10_000, 1.2))
    assert one.slope == 0 and one.factor(10**9) == pytest.approx(1.2) and "same factor" in one.words


def test_the_law_is_not_followed_beyond_the_factors_tried() -> None:
    free = rates(make_rung("a", 10_000, 1.9), make_rung("b", 40_000, 0.8))
    assert free.factor(10**7) < 0.1
    held = replace(free, tried=(0.5, 1.0, 2.0))
    assert held.factor(10**7) == 0.5 and held.factor(40_000) == pytest.approx(0.8) and "0.5 to 2 at most" in held.words


def test_the_rung_whose_best_rate_is_vague_counts_less() -> None:
    sharp = [make_rung("a", 10_000, 1.0), make_rung("b", 20_000, 1.0)]
    vague = make_rung("c", 40_000, 1.0)
    vague = replace(vague, best=replace(vague.best, vertex=2.0, sd_log=2.0))
    assert abs(fit_rates([*sharp, vague])[1]) < 0.05


def test_what_tuning_did_to_the_exponent_is_exact() -> None:
    small = make_rung("a", 10_000, 1.0, floors=(3.6, 3.2))  # tuned as it was
    large = make_rung("b", 40_000, 0.5, floors=(3.0, 2.8))  # the rule's rate is twice the best
    effect = tuning_effect([small, large])
    lost = 0.3 * math.log(2) ** 2
    for horizon, (low, high) in zip(effect.horizons, ((3.6, 3.0), (3.2, 2.8)), strict=True):
        assert horizon.exponent_best == pytest.approx(math.log(low / high) / math.log(4))
        assert horizon.exponent_rule == pytest.approx(math.log(low / (high + lost)) / math.log(4))
        assert horizon.gains_nats == pytest.approx((0, lost))
        assert horizon.sd == pytest.approx(0.01 * math.hypot(1 / low, 1 / high) / math.log(4))
    assert "more than its error" in effect.words
    assert tuning_effect([small]).why_none is not None and tuning_effect([]).horizons == ()


def test_a_rule_that_diverged_leaves_nothing_to_compare_with() -> None:
    rung = make_rung("a", 10_000, 1.0)
    lost = replace(rung, trials=tuple(replace(t, losses=(None, None)) if t.factor == 1 else t for t in rung.trials))
    assert "rule's own rate" in (tuning_effect([lost, make_rung("b", 40_000, 1.0)]).why_none or "")


def test_lr_json_comes_back_as_it_was_written() -> None:
    rungs = (make_rung("a", 10_000, 1.2), make_rung("b", 40_000, 1.0))
    bracket = Bracket(ladder="t", rungs=rungs, rates=rates(*rungs), effect=tuning_effect(rungs))
    assert codec.from_plain(codec.to_plain(bracket), Bracket, "lr.json") == bracket


# ----------------------------------------------------------------------------------------------------------- the plan


def quickstart(**lr: object) -> Ladder:
    ladder, _ = read_ladder("quickstart")
    return replace(ladder, lr=replace(ladder.lr, bracket=(0.5, 1.0, 2.0), **lr))


def planned(ladder: Ladder, tuned: TunedRates | None) -> dict[str, tuple[float, str]]:
    plan = plan_ladder(ladder, None, BOX, tuned=tuned)
    return {r.name: (r.training.lr_peak, r.training.lr_source) for r in plan.rungs}


def test_the_plan_takes_tuned_rates_and_scales_those_of_larger_rungs() -> None:
    ladder = quickstart()
    plan = plan_ladder(ladder, None, BOX)
    rule = {r.name: r.training.lr_peak for r in plan.rungs}
    small, larger = rungs_to_tune(ladder, plan.rungs)
    own = tuple(
        replace(
            tuned_rung(make_rung(r.name, r.size.params.n_body, best)),
            shape=r.size.shape,
            batch_tokens=r.training.batch_tokens,
            lr_peak=rule[r.name] * taken,
        )
        for r, best, taken in ((small, 1.5, 2.0), (larger, 1.2, 1.0))
    )
    log_factor, slope = np.polynomial.polynomial.polyfit(
        np.log([r.n_body for r in own]), np.log([r.factor for r in own]), 1
    )
    tuned = TunedRates(data_id="d", rule=ladder.lr, rungs=own, log_factor=log_factor, slope=slope)
    found = planned(ladder, tuned)
    assert found[small.name] == (pytest.approx(2 * rule[small.name]), "tuned")
    assert found[larger.name] == (pytest.approx(rule[larger.name]), "tuned")
    n_body = plan.rungs[-1].size.params.n_body
    rate, source = found["874k"]
    assert rate == pytest.approx(rule["874k"] * tuned.factor(n_body)) and source.endswith("tuned on 54k, 110k")
    begun = planned(ladder, replace(tuned, kept={"874k": 7e-4}))
    assert begun["874k"] == (7e-4, "begun before tuning")
    other = plan_ladder(quickstart(peak=1e-3), None, BOX, tuned=tuned)
    assert other.rungs[0].training.lr_source.startswith("power") and "another [lr] rule" in " ".join(other.warnings)
    assert planned(replace(ladder, lr=replace(ladder.lr, bracket=())), tuned)["54k"][0] == rule["54k"]


def test_a_rate_of_a_rungs_own_is_neither_tuned_nor_changed() -> None:
    ladder = quickstart()
    ladder = replace(ladder, rungs=(replace(ladder.rungs[0], lr_peak=5e-3), *ladder.rungs[1:]))
    plan = plan_ladder(ladder, None, BOX)
    assert [r.name for r in rungs_to_tune(ladder, plan.rungs)] == ["110k", "238k"]
    tuned = rates(make_rung("110k", 10_000, 1.3), rule=ladder.lr)
    assert planned(ladder, tuned)["54k"] == (5e-3, "rung")


def test_the_plan_says_what_tuning_costs_beside_its_totals() -> None:
    said = [w for w in plan_ladder(quickstart(), None, BOX).warnings if "lr.bracket" in w]
    assert len(said) == 1 and "tunes the rate on 54k, 110k: 2 more rates each" in said[0]
    tuned = rates(make_rung("54k", 10_000, 1.3), make_rung("110k", 30_000, 1.3), rule=quickstart().lr)
    assert not [w for w in plan_ladder(quickstart(), None, BOX, tuned=tuned).warnings if "tunes" in w]
