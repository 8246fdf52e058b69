"""The hyperbola of steps and examples, on problems whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.batch import critical
from homelab_scaling.errors import DataError
from homelab_scaling.runs import corrected

SWEEP = ([4, 8, 16, 32, 64, 128], [1536, 832, 596, 398, 242, 274])
"""A 0.24M GPT-2, context 64, Python source: steps to validation loss 4.6, rate tuned per batch, one seed."""


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(10, 1e5), st.floats(0.5, 500), st.floats(0.25, 4))
def test_exact_steps_give_their_parameters_back(s_min: float, b_crit: float, smallest: float) -> None:
    batches = [smallest * 2**k for k in range(9)]
    found = critical.fit_trade_off(batches, [s_min * (1 + b_crit / b) for b in batches])
    if not 0.1 * batches[0] < b_crit < 10 * batches[-1]:
        return
    assert found.s_min.value == pytest.approx(s_min, rel=1e-4)
    assert found.b_crit.value == pytest.approx(b_crit, rel=1e-4)
    assert found.e_min.value == pytest.approx(s_min * b_crit, rel=1e-4)
    assert (found.steps(b_crit), found.examples(b_crit)) == pytest.approx((2 * s_min, 2 * s_min * b_crit), rel=1e-3)


def test_the_measured_sweep() -> None:
    found = critical.fit_trade_off(*SWEEP)
    assert found.s_min.value == pytest.approx(208, abs=0.5)
    assert found.e_min.value == pytest.approx(5.4e3, rel=0.01)
    assert found.b_crit.value == pytest.approx(25.8, abs=0.05)
    assert found.rms == pytest.approx(0.099, abs=0.002)
    # A standard error of 0.198 in log B_crit, widened for four degrees of freedom.
    assert found.b_crit.high / found.b_crit.value == pytest.approx(np.exp(2.776 * 0.198), rel=0.01)
    assert not found.bend.doubted


def steps_of_quadratic(batch: float, rates: np.ndarray) -> int:
    """Fewest steps of a noisy quadratic to 5 % of its first loss, over constant rates; exact, nothing is sampled.

    1,000 modes with h = 1 / i, gradient noise of covariance H: m(t + 1) = (1 - eps h)^2 m(t) + eps^2 h / B.
    """
    h = 1 / np.arange(1, 1001)
    best = np.inf
    for rate in rates:
        shrink = (1 - rate * h) ** 2
        rest = rate**2 * h / batch / (1 - shrink)

        def loss(t: float, shrink: np.ndarray = shrink, rest: np.ndarray = rest) -> float:
            return float(h @ (shrink**t * (1 - rest) + rest)) / h.sum()

        if float(h @ rest) / h.sum() >= 0.05 or loss(min(best, 1e7)) > 0.05:
            continue
        low, high = 0, int(min(best, 1e7))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if loss(middle) > 0.05 else (low, middle)
        best = min(best, high)
    return int(best)


@pytest.fixture(scope="module")
def quadratic() -> critical.TradeOff:
    batches = [2.0**k for k in range(-3, 13)]
    rates = np.geomspace(1e-4, 1.999, 200)
    return critical.fit_trade_off(batches, [steps_of_quadratic(b, rates) for b in batches])


def test_the_noisy_quadratic(quadratic: critical.TradeOff) -> None:
    assert quadratic.s_min.value == pytest.approx(179.6, rel=0.01)
    assert quadratic.b_crit.value == pytest.approx(53.3, rel=0.01)
    assert quadratic.rms == pytest.approx(0.04, abs=0.005)


def test_its_knee_is_sharper_than_the_hyperbola_and_the_test_says_so(quadratic: critical.TradeOff) -> None:
    assert quadratic.bend.exponent == pytest.approx(1.21, abs=0.03)
    assert quadratic.bend.rms == pytest.approx(0.018, abs=0.003)
    assert quadratic.bend.doubted


def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    batches = np.array([2.0**k for k in range(1, 8)])
    held = 0
    for _ in range(200):
        steps = 300 * (1 + 20 / batches) * np.exp(rng.normal(0, 0.1, len(batches)))
        found = critical.fit_trade_off(list(batches), list(steps))
        held += found.b_crit.low <= 20 <= found.b_crit.high
    assert 0.90 <= held / 200 <= 0.99


def test_scatter_alone_is_seldom_taken_for_a_bend() -> None:
    rng = np.random.default_rng(6)
    batches = np.array([2.0**k for k in range(1, 8)])
    noisy = [300 * (1 + 20 / batches) * np.exp(rng.normal(0, 0.05, len(batches))) for _ in range(200)]
    doubted = sum(critical.fit_trade_off(list(batches), list(steps)).bend.doubted for steps in noisy)
    assert doubted <= 200 * 0.12


def test_four_batches_leave_nothing_to_judge_the_bend_by() -> None:
    assert critical.fit_trade_off([1, 4, 16, 64], [100, 40, 22, 20]).bend.p is None


@pytest.mark.parametrize(
    ("batches", "steps", "said"),
    [
        ([1, 2, 64], [9, 5, 2], "3 batch sizes over a factor of 64"),
        ([1, 2, 4, 8], [9, 5, 3, 2], "4 batch sizes over a factor of 8"),
        ([], [], "0 batch sizes"),
        ([1, 2, 4, 16], [9, 5, 3], "4 batches but 3 step counts"),
        ([1, 2, 4, 16], [9, 5, 3, 0], "not a positive number"),
    ],
)
def test_too_little_is_refused_in_a_sentence(batches: list[float], steps: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        critical.fit_trade_off(batches, steps)


def test_a_law_over_a_ladder_and_the_published_one_beside_it() -> None:
    tokens = [0.1e9, 0.3e9, 1.2e9, 2.4e9]
    law = critical.fit_batch_law("D", tokens, [102e3, 171e3, 328e3, 455e3])
    assert law.exponent.value == pytest.approx(0.47, abs=0.003)
    assert "Zhang 2024's 0.47 is inside" in law.compare()
    assert law.predict(1e9).value == pytest.approx(102e3 * 10**0.47, rel=0.02)
    steep = critical.fit_batch_law("D", tokens, [1.01e5, 2.9e5, 1.22e6, 2.4e6])
    assert "Zhang 2024's 0.47 is outside" in steep.compare()


def test_a_laws_prediction_holds_the_next_rung_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    x = np.array([1.0, 2, 4, 8, 16])
    held = 0
    for _ in range(400):
        y = 100 * x**0.4 * np.exp(rng.normal(0, 0.2, len(x)))
        next_rung = critical.fit_batch_law("N", list(x[:-1]), list(y[:-1])).predict(16.0)
        held += next_rung.low <= y[-1] <= next_rung.high
    assert 0.92 <= held / 400 <= 0.98


def test_a_law_needs_three_rungs_that_differ() -> None:
    with pytest.raises(DataError, match="2 rungs"):
        critical.fit_batch_law("D", [1, 2], [1, 2])
    with pytest.raises(DataError, match="differ in D"):
        critical.fit_batch_law("D", [5, 5, 5], [1, 2, 3])


@settings(derandomize=True, deadline=None)
@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(1, 1e6))
def test_corrections_undo_the_hyperbola(s_min: float, b_crit: float, batch: float) -> None:
    steps, flops = s_min * (1 + b_crit / batch), 1e3 * (1 + batch / b_crit)
    row = SimpleNamespace(n_steps=steps, flops=flops, batch_tokens=batch)
    assert corrected(row, b_crit) == pytest.approx({"c_min_flops": 1e3, "s_min_steps": s_min})
