"""Shapes by width: counts at every width, the exact optimum, where a lab's vocabulary comes from."""

import time

import numpy as np
import pytest

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import Terms, loss_at, split_budget, tokens_for
from homelab_scaling.fit.family import OutsideFamily, ShapeFamily, best_real_shape, lab_family, optimal_shape
from homelab_scaling.fit.laws import CHINCHILLA
from homelab_scaling.plan.rules import nearest_shape

HOFFMANN = np.array([1.69337368, 406.401018, 410.722827, 0.33917084, 0.2849083])
GPT2 = ShapeFamily(n_vocab=50_257, context_tokens=1024)


@pytest.mark.parametrize("count", ["total", "body", "body+head"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_between_shapes_are_exact_at_shapes(count, tied):
    family = ShapeFamily(n_vocab=2048, context_tokens=128, count=count, tied=tied)
    for width in (32, 128, 192, 256, 512, 768, 1600, 8192):
        shape = family.shape(width)
        if shape.n_layer == max(4, width / 64):
            assert float(family.n_at(np.array(float(width)))) == pytest.approx(family.n_of(shape), rel=1e-12)
            assert float(family.flops_at(np.array(float(width)))) == pytest.approx(family.flops_of(shape), rel=1e-12)


def test_shapes_are_those_of_the_planner():
    small = GPT2.shape(768)
    assert (small.n_layer, small.n_head, GPT2.n_of(small)) == (12, 12, 124_439_808)
    assert small == nearest_shape(124_439_808, 50_257, 1024, tied=True) == GPT2.nearest(124e6)
    assert GPT2.shape(64).n_head == 2


@pytest.mark.parametrize("flops", [1e16, 1e19, 1e22])
@pytest.mark.parametrize("count", ["total", "body"])
def test_optimum_over_shapes_beats_every_other_width(flops, count):
    family = ShapeFamily(n_vocab=50_257, context_tokens=1024, count=count)
    best = optimal_shape(CHINCHILLA, HOFFMANN, flops, family)
    widths = np.exp(np.linspace(np.log(16), np.log(60_000), 200_001))
    losses = loss_at(CHINCHILLA, HOFFMANN, family.n_at(widths), flops / family.flops_at(widths))
    assert float(best.loss_nats) <= losses.min() * (1 + 1e-9)
    assert float(best.width) == pytest.approx(widths[losses.argmin()], rel=1e-3)
    shape, d, loss = best_real_shape(CHINCHILLA, HOFFMANN, flops, family)
    assert loss >= float(best.loss_nats)
    assert d * family.flops_of(shape) == pytest.approx(flops, rel=1e-12)


def test_exact_optimum_goes_over_into_6nd_where_the_head_is_small():
    family = ShapeFamily(n_vocab=64, context_tokens=8)
    best = optimal_shape(CHINCHILLA, HOFFMANN, 1e22, family)
    n, _d = split_budget(Terms.of(CHINCHILLA, HOFFMANN), 1e22)
    assert float(best.n_params) == pytest.approx(float(n), rel=2e-3)


def test_a_count_without_the_head_wants_larger_models():
    """6 N_body D leaves out the head, whose cost a larger model spreads over more parameters."""
    by_body = ShapeFamily(n_vocab=50_257, context_tokens=1024, count="body")
    small = optimal_shape(CHINCHILLA, HOFFMANN, 1e17, by_body)
    n_small, _d = split_budget(Terms.of(CHINCHILLA, HOFFMANN), 1e17)
    assert float(small.n_params) > 1.2 * float(n_small)


def test_elasticity_makes_a_size_its_own_optimum():
    """The D for which a size is best by exact FLOPs, put back as a budget, gives that size."""
    for n in (2e7, 4e8, 1e10):
        d = tokens_for(Terms.of(CHINCHILLA, HOFFMANN), n, GPT2.elasticity(n))
        flops = float(d) * float(GPT2.flops_at(np.array(GPT2.width_for(n))))
        assert float(optimal_shape(CHINCHILLA, HOFFMANN, flops, GPT2).n_params) == pytest.approx(n, rel=1e-3)


def test_draws_are_searched_together_and_fast():
    draws = HOFFMANN * np.exp(0.02 * np.random.default_rng(0).normal(size=(4000, 5)))
    start = time.perf_counter()
    found = optimal_shape(CHINCHILLA, draws, 1e19, GPT2)
    assert time.perf_counter() - start < 1
    for index in (0, 1234, 3999):
        alone = optimal_shape(CHINCHILLA, draws[index], 1e19, GPT2)
        assert float(found.n_params[index]) == pytest.approx(float(alone.n_params), rel=1e-9)


def test_outside_the_family_is_a_sentence():
    with pytest.raises(OutsideFamily, match="outside"):
        GPT2.width_for(1e30)
    with pytest.raises(OutsideFamily, match="narrower"):
        optimal_shape(CHINCHILLA, HOFFMANN, 10.0, GPT2)
    with pytest.raises(SpecError, match="vocabulary of 1"):
        ShapeFamily(n_vocab=1, context_tokens=8)
    assert GPT2.holds(124e6)
    assert not GPT2.holds(1e20)


def test_a_folder_that_is_no_lab_says_nothing(tmp_path):
    assert lab_family("hoffmann-2022", "total") is None
    (tmp_path / "runs" / "broken").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "spec.json").write_text("{}")
    assert lab_family(str(tmp_path), "total") is None
