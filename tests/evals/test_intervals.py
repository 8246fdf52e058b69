"""Scores and their intervals against the formulas written out, and at their edges."""

import math
import random

import numpy as np
import pytest

from homelab_scaling.evals.intervals import _tail, bits_per_byte, mean, share
from homelab_scaling.evals.results import Part

Z = 1.959963984540054


def wilson(k: int, n: int) -> tuple[float, float]:
    p = k / n
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 7), (7, 7), (3, 10), (250, 500)])
def test_share_is_wilsons(k: int, n: int) -> None:
    part = share([1.0] * k + [0.0] * (n - k))
    low, high = wilson(k, n)
    assert part.n_documents == n
    assert part.score == k / n
    assert part.low == pytest.approx(max(0.0, low), abs=1e-12)
    assert part.high == pytest.approx(min(1.0, high), abs=1e-12)


def test_share_of_all_right_has_no_binomial_error_but_an_interval() -> None:
    part = share([1.0] * 20)
    assert (part.score, part.se) == (1.0, None)
    assert part.low is not None
    assert 0.8 < part.low < 0.85
    assert share([1.0, 0.0, 0.0, 0.0]).se == pytest.approx(math.sqrt(0.25 * 0.75 / 4))


def test_nothing_of_nothing() -> None:
    nothing = Part(n_documents=0, score=None, se=None, low=None, high=None)
    assert share([]) == mean([]) == bits_per_byte([], [], seed=0) == nothing
    assert bits_per_byte([0.0, 0.0], [0, 0], seed=0) == nothing


def test_one_document_has_a_score_and_no_error() -> None:
    assert mean([3.5]) == Part(n_documents=1, score=3.5, se=None, low=None, high=None)
    one = bits_per_byte([2 * math.log(2)], [4], seed=0)
    assert (one.n_documents, one.score, one.se, one.low, one.high) == (1, 0.5, None, None, None)


def test_mean_is_the_normal_interval() -> None:
    part = mean([1.0, 2.0, 3.0, 6.0])
    se = math.sqrt(14 / 3 / 4)
    assert part.score == 3.0
    assert part.se == pytest.approx(se)
    assert (part.low, part.high) == (pytest.approx(3 - Z * se), pytest.approx(3 + Z * se))


def test_equal_values_have_an_error_of_zero() -> None:
    part = mean([2.0, 2.0, 2.0])
    assert (part.se, part.low, part.high) == (0.0, 2.0, 2.0)


def test_bits_per_byte_sums_before_it_divides() -> None:
    """A short document must not count as much as a long one."""
    part = bits_per_byte([10 * math.log(2), 1000 * math.log(2)], [1, 1000], seed=0)
    assert part.score == pytest.approx(1010 / 1001)


def test_bits_per_byte_against_naive_loops() -> None:
    rng = random.Random(0)
    n_bytes = [rng.randrange(10, 3000) for _ in range(60)]
    nats = [b * math.log(2) * rng.gauss(1.2, 0.2) for b in n_bytes]
    part = bits_per_byte(nats, n_bytes, seed=3)
    score = sum(nats) / sum(n_bytes) / math.log(2)
    residuals = [x / math.log(2) - score * b for x, b in zip(nats, n_bytes, strict=True)]
    se = math.sqrt(60 / 59 * sum(r * r for r in residuals)) / sum(n_bytes)
    assert part.score == pytest.approx(score, rel=1e-12)
    assert part.se == pytest.approx(se, rel=1e-12)
    ratios = []
    for _ in range(2000):
        drawn = [rng.randrange(60) for _ in range(60)]
        ratios.append(sum(nats[i] for i in drawn) / sum(n_bytes[i] for i in drawn) / math.log(2))
    # Hesterberg's expanded percentiles: for 60 documents (t = 2.001) 2.18 % at either end instead of 2.5 %.
    low, high = np.quantile(ratios, [0.0218, 1 - 0.0218])
    # The 2 % quantile of 2000 normal draws has an error of sqrt(.02 * .98 / 2000) / .048 = .065; 3 sqrt 2 of that.
    assert part.low == pytest.approx(low, abs=0.27 * se)
    assert part.high == pytest.approx(high, abs=0.27 * se)


def test_bootstrap_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nats, n_bytes = [math.sqrt(i + 2) for i in range(40)], list(range(3, 43))
    first = bits_per_byte(nats, n_bytes, seed=1)
    assert bits_per_byte(nats, n_bytes, seed=1) == first
    assert bits_per_byte(nats, n_bytes, seed=2) != first
    monkeypatch.setattr("homelab_scaling.evals.intervals._DRAWS_AT_ONCE", 400)  # pieces of 10 resamples
    assert bits_per_byte(nats, n_bytes, seed=1) == first


def test_few_documents_have_wide_intervals() -> None:
    """Of two documents every resample counts; of many the plain percentiles remain."""
    two = bits_per_byte([math.log(2), 3 * math.log(2)], [1, 1], seed=0)
    assert (two.low, two.high) == (pytest.approx(1.0), pytest.approx(3.0))
    assert _tail(60) == pytest.approx(0.0218, abs=2e-5)
    assert _tail(100_000) == pytest.approx(0.025, abs=1e-5)


def test_documents_without_bytes_change_nothing() -> None:
    assert bits_per_byte([3.0, 0.0, 5.0], [4, 0, 5], seed=1) == bits_per_byte([3.0, 5.0], [4, 5], seed=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: share([0.5]), "zeros and ones"),
        (lambda: mean([float("nan")]), "finite"),
        (lambda: bits_per_byte([1.0], [1, 2], seed=0), "1 documents have something to divide and 2"),
        (lambda: bits_per_byte([1.0], [0], seed=0), "no nats where it has none"),
        (lambda: bits_per_byte([1.0], [-1], seed=0), "0 or more bytes"),
    ],
)
def test_refuses_what_is_no_outcome(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
