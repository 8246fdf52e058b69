"""Models that will be served: published optima, brute force, money, the cache."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import Terms, reducible_at, tokens_for, tokens_to_reach
from homelab_scaling.fit.catalogue import joint_fit, open_fit
from homelab_scaling.fit.laws import CHINCHILLA
from homelab_scaling.fit.serving import (
    Machine,
    Quality,
    kv_cache,
    kv_cache_of,
    lifetime_flops,
    parse_peak,
    predict_serving,
    predict_tokens_to_reach,
    serve_optimum,
)
from homelab_scaling.specs import ModelShape

HOFFMANN = np.array([1.69337368, 406.401018, 410.722827, 0.33917084, 0.2849083])
SARDANA = np.array([1.69337368, 406.401018, 410.722827, 0.336, 0.283])
EPOCH = np.array([1.8172181, 477.82587, 2143.41736, 0.3473105, 0.3671724])


def like(values, n):
    terms = Terms.of(CHINCHILLA, values)
    d = tokens_for(terms, n)
    return terms, reducible_at(terms, n, d), d


@pytest.mark.parametrize(
    ("values", "n_opt", "saved"),
    [(SARDANA, 6.97e9, 0.174), (HOFFMANN, 7.12e9, 0.163), (EPOCH, 6.08e9, 0.292)],
    ids=["sardana", "hoffmann", "epoch"],
)
def test_thirteen_billion_quality_for_two_trillion_tokens(values, n_opt, saved):
    """Sardana et al. 2023: about 7B instead of 13B, 1.7e22 FLOPs and 17 % saved."""
    terms, left, d = like(values, 13e9)
    n_best, d_best = serve_optimum(terms, left, 2e12)
    before, after = lifetime_flops(13e9, d, 2e12), lifetime_flops(n_best, d_best, 2e12)
    assert float(n_best) == pytest.approx(n_opt, abs=0.005e9)
    assert float(1 - after / before) == pytest.approx(saved, abs=5e-4)
    if values is SARDANA:
        assert float(before - after) == pytest.approx(1.69e22, abs=0.005e22)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.tuples(st.floats(10, 1e4), st.floats(10, 1e4), st.floats(0.15, 0.8), st.floats(0.15, 0.8)),
    st.floats(1e7, 1e11),
    st.floats(1e6, 1e15),
    st.floats(0.05, 20),
)
def test_served_optimum_is_the_lowest_cost_on_a_fine_grid(law, n, load, weight):
    values = np.array([1.7, *law])
    terms, left, d = like(values, n)
    if not 1e5 < d < 1e25:
        return
    n_best, d_best = serve_optimum(terms, left, load, weight)
    best = float(lifetime_flops(n_best, d_best, load, weight))
    for grid in (n * np.exp(np.linspace(-12, 3, 4001)), float(n_best) * np.exp(np.linspace(-1e-3, 1e-3, 401))):
        costs = lifetime_flops(grid, tokens_to_reach(terms, left, grid), load, weight)
        assert best <= np.nanmin(costs) * (1 + 1e-12)
    assert float(reducible_at(terms, n_best, d_best)) == pytest.approx(float(left), rel=1e-9)


def test_no_load_is_the_compute_optimum_and_a_huge_one_the_smallest_model():
    terms, left, d = like(HOFFMANN, 13e9)
    n_best, d_best = serve_optimum(terms, left, 0.0)
    assert (float(n_best), float(d_best)) == pytest.approx((13e9, float(d)), rel=1e-9)
    n_huge, _ = serve_optimum(terms, left, 1e30)
    limit = (HOFFMANN[1] / left) ** (1 / HOFFMANN[3])
    assert limit < n_huge < 1.01 * limit
    assert np.isnan(serve_optimum(terms, np.array(-0.1), 1e12)[0])


@pytest.fixture
def hoffmann():
    fit, _law, drawn = joint_fit(open_fit("hoffmann-2022"))
    return fit, drawn


def test_equal_prices_change_nothing_and_dear_serving_shrinks_the_model(hoffmann):
    fast = Machine(peak_flops_per_s=312e12, mfu_frac=0.5, usd_per_hour=2)
    slow = Machine(peak_flops_per_s=312e12, mfu_frac=0.1, usd_per_hour=2)
    quality = Quality(n_params=13e9)
    same = predict_serving(*hoffmann, quality, 2e12, machines=(fast, fast))
    assert same.by_money.n_params.value == pytest.approx(same.by_flops.n_params.value, rel=1e-9)
    assert same.saved_usd_frac.value == pytest.approx(same.saved_flops_frac.value, rel=1e-9)
    hours = same.by_flops.flops.value / (312e12 * 0.5) / 3600
    assert same.by_flops.usd.value == pytest.approx(2 * hours, rel=1e-9)
    dear = predict_serving(*hoffmann, quality, 2e12, machines=(fast, slow))
    assert dear.by_money.n_params.value < dear.by_flops.n_params.value
    assert dear.by_money.usd.value < dear.by_flops.usd.value < dear.baseline.usd.value
    train, serve = 6 * dear.baseline.n_params.value * dear.baseline.n_tokens.value, 2 * 13e9 * 2e12
    by_hand = 2 / 3600 * (train / (312e12 * 0.5) + serve / (312e12 * 0.1))
    assert dear.baseline.usd.value == pytest.approx(by_hand, rel=1e-9)
    assert dear.saved_usd.value == pytest.approx(dear.baseline.usd.value - dear.by_money.usd.value, rel=1e-9)


def test_quality_by_loss_agrees_with_quality_by_model(hoffmann):
    by_model = predict_serving(*hoffmann, Quality(n_params=13e9), 2e12)
    by_loss = predict_serving(*hoffmann, Quality(loss_nats=by_model.quality_loss_nats.value), 2e12)
    assert by_loss.by_flops.n_params.value == pytest.approx(by_model.by_flops.n_params.value, rel=1e-9)
    assert by_loss.baseline.n_params.value == pytest.approx(13e9, rel=1e-9)


def test_a_quality_that_nothing_reaches_is_one_sentence(hoffmann):
    with pytest.raises(SpecError, match=r"no model reaches 1\.6 nats: the law's irreducible loss is 1\.693"):
        predict_serving(*hoffmann, Quality(loss_nats=1.6), 1e12)
    with pytest.raises(SpecError, match=r"never reach 2\.2 nats"):
        predict_tokens_to_reach(*hoffmann, 1e8, 2.2)
    with pytest.raises(SpecError, match="either"):
        Quality(n_params=1e9, loss_nats=2.0)


def test_tokens_to_reach_gives_that_loss(hoffmann):
    found = predict_tokens_to_reach(*hoffmann, 1e9, 2.5)
    loss = CHINCHILLA.loss(HOFFMANN, {"n_params": 1e9, "n_tokens": found.n_tokens.value})
    assert float(loss) == pytest.approx(2.5, rel=1e-9)
    assert found.n_tokens.ci95 is None


def test_machines_say_what_they_want():
    for wrong in ({"peak_flops_per_s": 0}, {"mfu_frac": 1.2}, {"mfu_frac": 0}, {"usd_per_hour": -1}):
        with pytest.raises(SpecError, match="wants"):
            Machine(**({"peak_flops_per_s": 1e14, "mfu_frac": 0.4, "usd_per_hour": 1} | wrong))
    assert parse_peak("97.5e12") == 97.5e12
    assert parse_peak("RTX 4080") == pytest.approx(97.5e12)
    for unknown in ("toaster", "T4"):
        with pytest.raises(SpecError, match="give FLOP/s"):
            parse_peak(unknown)


def test_cache_of_gpt2_small():
    shape = ModelShape(n_layer=12, d_model=768, n_head=12, context_tokens=1024)
    cache = kv_cache_of(shape, n_params=124_439_808)
    assert cache.bytes_per_token == 2 * 12 * 768 * 2 == 36_864
    assert cache.bytes_per_sequence == 36 * 2**20
    assert cache.sequences_as_weights == pytest.approx(124_439_808 * 2 / (36 * 2**20))
    assert kv_cache(12, 768, 1024, bytes_per_element=1).bytes_per_sequence == 18 * 2**20
    with pytest.raises(SpecError, match="width -1"):
        kv_cache(12, -1, 1024)
