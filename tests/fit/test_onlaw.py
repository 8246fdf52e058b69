"""The live check: planted runs on and off the law, the offset of undecayed trunks, honest silence."""

import math
from dataclasses import replace

import numpy as np
import pytest

from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.onlaw import IN_A_ROW, JointLaw, TrunkCurve, check_curve, check_decayed
from homelab_scaling.fit.result import Draws, Estimate, ScalingFit

TRUTH = np.array([1.9, 40.0, 700.0, 0.31, 0.39])
SIZES = (67e3, 127e3, 289e3, 545e3)
TOKENS = np.geomspace(2e5, 2.4e6, 24)
GAP = 0.021
"""log of undecayed over decayed loss in these worlds."""


def joint(sigma=0.004, wobble=0.0):
    law = get_law("chinchilla")
    rng = np.random.default_rng(1)
    values = TRUTH * np.exp(wobble * rng.normal(size=(200, 5)))
    fit = ScalingFit(
        law=law.name,
        objective="adaptive",
        n_points=15,
        excluded=(),
        parameters={name: Estimate(value=float(v)) for name, v in zip(law.names, TRUTH, strict=True)},
        derived={},
        objective_value=1.0,
        gradient_norm=0.0,
        starts_in_basin=1,
        status="converged (planted)",
        warnings=(),
        draws_file="draws.npz",
        rows="all rows",
        n_runs=5,
        n_starts=1,
        interval="planted",
        unpinned={},
        ranges={"n_params": (67e3, 1.1e6), "n_tokens": (7.5e5, 3e6)},
        sigma_log=sigma,
    )
    return JointLaw(fit=fit, law=law, draws=Draws(names=law.names, point=TRUTH, values=values))


def trunk(n, rng, *, gap=GAP, shared=None, tokens=TOKENS, name=None):
    law = get_law("chinchilla").loss(TRUTH, {"n_params": n, "n_tokens": tokens})
    shared = 0.004 * rng.normal() if shared is None else shared
    noise = 0.001 * rng.normal(size=len(tokens))
    return TrunkCurve(
        run_id=name or f"run-{n:.0f}", n_params=n, tokens=tokens, losses=law * np.exp(gap + shared + noise)
    )


def finished(rng, **kwargs):
    return [trunk(n, rng, **kwargs) for n in SIZES]


def test_a_trunk_on_the_law_is_on_it_though_it_lies_above_the_decayed_law():
    rng = np.random.default_rng(0)
    curve = trunk(1.07e6, rng)
    found = check_curve(curve, joint(), finished(rng))
    assert found.verdict == "on the law"
    assert found.since_tokens is None
    assert len(found.points) == len(TOKENS)
    bare = get_law("chinchilla").loss(TRUTH, {"n_params": 1.07e6, "n_tokens": TOKENS[-1]})
    assert found.points[-1].expected_nats == pytest.approx(float(bare) * math.exp(GAP), rel=0.01)
    assert "4 finished runs" in found.notes[0]


@pytest.mark.parametrize(("factor", "verdict"), [(1.06, "above the law"), (0.94, "below the law")])
def test_a_run_that_leaves_the_law_is_named_with_side_and_start(factor, verdict):
    rng = np.random.default_rng(2)
    curve = trunk(1.07e6, rng, shared=0.0)
    start = 15
    losses = curve.losses.copy()
    losses[start:] *= factor
    found = check_curve(replace(curve, losses=losses), joint(), finished(rng))
    assert found.verdict == verdict
    assert found.since_tokens == pytest.approx(TOKENS[start])
    assert found.z is not None and math.copysign(1, found.z) == math.copysign(1, factor - 1)
    assert abs(found.z) > 3
    assert found.off_frac == pytest.approx(factor - 1, abs=0.015)
    assert found.sentence.startswith(f"{verdict} since")


def test_one_point_outside_is_not_yet_off():
    rng = np.random.default_rng(3)
    curve = trunk(1.07e6, rng, shared=0.0)
    losses = curve.losses.copy()
    losses[-(IN_A_ROW - 1) :] *= 1.1
    found = check_curve(replace(curve, losses=losses), joint(), finished(rng))
    assert found.verdict == "not clear yet"
    assert f"for {IN_A_ROW - 1} of the {IN_A_ROW} points" in found.sentence


def test_a_run_that_came_back_is_on_the_law_and_says_where_it_was():
    rng = np.random.default_rng(4)
    curve = trunk(1.07e6, rng, shared=0.0)
    losses = curve.losses.copy()
    losses[5:10] *= 1.1
    found = check_curve(replace(curve, losses=losses), joint(), finished(rng))
    assert found.verdict == "on the law"
    assert "it was above from" in found.sentence


def test_without_finished_trunks_only_decayed_losses_are_judged():
    rng = np.random.default_rng(5)
    curve = trunk(1.07e6, rng)
    found = check_curve(curve, joint())
    assert found.verdict == "cannot be judged"
    assert "only decayed losses can be judged" in found.sentence
    assert found.points == ()
    late = [replace(one, tokens=one.tokens * 100) for one in finished(rng)]
    assert "no finished run was measured at the tokens" in check_curve(curve, joint(), late).sentence
    assert check_curve(replace(curve, tokens=TOKENS[:0], losses=TOKENS[:0]), joint(), finished(rng)).points == ()


def test_warm_up_is_not_judged_and_a_run_is_not_its_own_witness():
    rng = np.random.default_rng(6)
    curve = trunk(1.07e6, rng)
    found = check_curve(curve, joint(), finished(rng), warmup_tokens=TOKENS[4])
    assert len(found.points) == len(TOKENS) - 5
    assert check_curve(curve, joint(), [curve]).verdict == "cannot be judged"


def test_cosine_runs_are_compared_at_the_same_share_of_their_schedule():
    rng = np.random.default_rng(7)
    share = np.linspace(0.1, 0.95, 18)

    def cosine(n, horizon):
        d = share * horizon
        law = get_law("chinchilla").loss(TRUTH, {"n_params": n, "n_tokens": d})
        losses = law * np.exp(0.08 * (1 - share) + 0.001 * rng.normal(size=len(d)))
        return TrunkCurve(run_id=f"c{n}", n_params=n, tokens=d, losses=losses, horizon_tokens=horizon)

    done = [cosine(n, h) for n, h in zip(SIZES, (1e6, 2e6, 1.5e6, 3e6), strict=True)]
    found = check_curve(cosine(1.07e6, 2.5e6), joint(), done)
    assert found.verdict == "on the law"
    assert len(found.points) == len(share)
    constant = trunk(1.07e6, rng)
    assert check_curve(constant, joint(), done).verdict == "cannot be judged"  # another schedule is no witness


def test_a_gap_that_drifts_with_size_is_followed():
    rng = np.random.default_rng(8)
    sizes = np.geomspace(67e3, 7e5, 7)

    def drifting(n):
        return trunk(n, rng, gap=0.02 + 0.02 * math.log(n / 67e3), shared=0.0)

    done = [drifting(n) for n in sizes]
    assert check_curve(drifting(1.4e6), joint(), done).verdict == "on the law"
    assert check_curve(trunk(1.4e6, rng, gap=0.02, shared=0.0), joint(), done).verdict == "below the law"


def test_false_alarms_are_rare_and_wider_draws_widen_the_band():
    alarms = 0
    for seed in range(60):
        rng = np.random.default_rng([9, seed])
        found = check_curve(trunk(1.07e6, rng), joint(), finished(rng))
        alarms += found.verdict != "on the law"
    assert alarms <= 6  # nominal 5 % of 60 is 3
    rng = np.random.default_rng(10)
    curve, done = trunk(1.07e6, rng), finished(rng)

    def width(law):
        low, high = check_curve(curve, law, done).points[-1].band95
        return high - low

    assert width(joint(wobble=0.1)) > width(joint())


def test_decayed_losses_are_judged_one_by_one():
    law = get_law("chinchilla")
    d = np.array([7.5e5, 1.5e6, 3e6])
    exact = law.loss(TRUTH, {"n_params": 1.07e6, "n_tokens": d})
    on = check_decayed("r", 1.07e6, d, exact * 1.002, joint(), in_fit=True)
    assert on.verdict == "on the law" and "fitted to these losses too" in on.notes[0]
    off = check_decayed("r", 1.07e6, d, exact * [1, 1.05, 1.05], joint())
    assert off.verdict == "above the law" and off.since_tokens == 1.5e6
    assert check_decayed("r", 1.07e6, [], [], joint()).verdict == "cannot be judged"
    far = check_decayed("r", 3.3e6, d * 2, law.loss(TRUTH, {"n_params": 3.3e6, "n_tokens": d * 2}), joint())
    assert far.notes == ("N is x 3 outside the fitted sizes", "D is x 2 beyond the fitted tokens")
