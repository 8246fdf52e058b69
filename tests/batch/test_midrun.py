"""The noise scale at the middle of a run from early points: what is used, what the interval covers."""

import math
from dataclasses import replace

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.batch.estimator import Z95, NoiseScale
from homelab_scaling.batch.midrun import SCATTER_LN, MidRun, middle_of_run


def point(tokens: int, b_simple: float, *, sd_log: float = 0.1, loss: float = 4.0) -> NoiseScale:
    half = math.exp(Z95 * sd_log)
    return NoiseScale(
        b_simple_seqs=b_simple / 10,
        b_simple_tokens=b_simple,
        ci95_tokens=(b_simple / half, b_simple * half),
        at_least_tokens=None,
        why_no_number=None,
        grad_sq=1.0,
        trace=b_simple / 10,
        loss_nats=loss,
        tokens_trained=tokens,
        n_params=1000,
        context_tokens=10,
        n_steps=50,
        k=8,
        microbatch_seqs=1,
    )


def drowned(tokens: int, at_least: float) -> NoiseScale:
    why = "|G|^2 is not significantly above zero"
    return replace(
        point(tokens, 1.0),
        b_simple_seqs=None,
        b_simple_tokens=None,
        ci95_tokens=None,
        at_least_tokens=at_least,
        why_no_number=why,
    )


TOKENS = (100_000, 200_000, 400_000)


def test_exact_points_on_a_power_law_are_continued() -> None:
    points = [point(t, 5000 * (t / 1e6) ** 0.5, sd_log=0.01, loss=4.0 * (t / 1e6) ** -0.1) for t in TOKENS]
    found = middle_of_run(points, horizon_tokens=2e6)
    assert found.at_tokens == 1e6 and found.n_points == 3
    assert found.b_simple_tokens == pytest.approx(5000, rel=1e-6)
    assert found.exponent == pytest.approx(0.5)
    assert found.loss_nats == pytest.approx(4.0)
    assert "95 %" in found.words
    assert codec.from_plain(codec.to_plain(found), MidRun, "x") == found


@pytest.mark.parametrize("exponent", [0.2, 0.5, 0.8])
def test_the_interval_covers_a_fluctuating_run_of_any_published_exponent(exponent: float) -> None:
    rng = np.random.default_rng(0)
    covered, n, sd = 0, 1000, 0.12
    for _ in range(n):
        points = [
            point(
                t,
                5000
                * (t / 1e6) ** exponent
                * math.exp(sd * rng.standard_normal() + SCATTER_LN * rng.standard_normal()),
                sd_log=sd,
            )
            for t in TOKENS
        ]
        truth = 5000 * math.exp(SCATTER_LN * rng.standard_normal())
        found = middle_of_run(points, horizon_tokens=2e6)
        assert found.ci95_tokens is not None
        covered += found.ci95_tokens[0] <= truth <= found.ci95_tokens[1]
    assert covered / n >= 0.93


def test_further_away_is_less_sure_and_more_points_are_surer() -> None:
    def width(points: list[NoiseScale], horizon: float) -> float:
        found = middle_of_run(points, horizon_tokens=horizon)
        assert found.ci95_tokens is not None
        return math.log(found.ci95_tokens[1] / found.ci95_tokens[0])

    points = [point(t, 5000 * (t / 1e6) ** 0.5) for t in TOKENS]
    assert width(points, 1e6) < width(points, 4e6) < width(points, 4e7)
    assert width(points, 4e6) < width(points[1:], 4e6) < width(points[2:], 4e6)


def test_points_without_a_number_or_on_untrained_weights_do_not_count() -> None:
    good = [point(t, 5000 * (t / 1e6) ** 0.5) for t in TOKENS]
    wild = replace(point(20_000, 1e6), why_not_informative="untrained")
    alone = middle_of_run(good, horizon_tokens=2e6)
    assert middle_of_run([wild, *good], horizon_tokens=2e6) == alone
    with_bound = middle_of_run([drowned(50_000, 10.0), *good], horizon_tokens=2e6)
    assert (with_bound.b_simple_tokens, with_bound.n_points) == (alone.b_simple_tokens, 3)


def test_lower_bounds_alone_give_a_lower_bound_and_nothing_gives_the_reason() -> None:
    found = middle_of_run([drowned(100_000, 700.0), drowned(200_000, 500.0)], horizon_tokens=2e6)
    assert found.b_simple_tokens is None and found.at_least_tokens == 700.0
    assert "at least 700 tokens (|G|^2 is not" in found.words
    wild = replace(point(20_000, 1e6), why_not_informative="untrained weights say nothing")
    found = middle_of_run([wild], horizon_tokens=2e6)
    assert found.b_simple_tokens is None and found.at_least_tokens is None
    assert found.words == "B_simple unknown (untrained weights say nothing)"
