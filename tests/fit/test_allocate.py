"""What a law tells to buy, against brute force and published figures."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import (
    Terms,
    Worth,
    beats_fresh,
    best_loss,
    doubling_gain,
    loss_at,
    params_for,
    parse_worth,
    reducible,
    reducible_at,
    split_budget,
    split_by_rule,
    tokens_for,
    tokens_to_reach,
    worth_until,
)
from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.kaplan_vs_chinchilla import PUBLISHED_TOKEN_GRID, body_exponent, reconcile_pearce_song
from homelab_scaling.fit.laws import CHINCHILLA, get_law

HOFFMANN = np.array([1.69337368, 406.401018, 410.722827, 0.33917084, 0.2849083])
ROUNDED = np.array([1.69, 406.4, 410.7, 0.34, 0.28])
ROUNDED_EXPONENTS = np.array([*HOFFMANN[:3], 0.34, 0.28])
EPOCH = np.array([1.8172181, 477.82587, 2143.41736, 0.3473105, 0.3671724])
EPOCH_LAD = np.array([1.8168641, 482.0061, 2085.4362, 0.3478131, 0.3658542])
EPOCH_PRINTED = np.array([1.8172, 482.01, 2085.43, 0.3478, 0.3658])
KAPLAN = np.array([6.4e13, 1.8e13, 0.076, 0.103])
laws = st.tuples(
    st.floats(0.5, 3), st.floats(10, 1e4), st.floats(10, 1e4), st.floats(0.15, 0.8), st.floats(0.15, 0.8)
).map(np.array)


def published(name):
    one = CATALOGUE[name]
    law = get_law(one.law)
    return law, np.array([one.values[n] for n in law.names])


def brute_split(law, values, flops):
    n = np.exp(np.linspace(np.log(1e2), np.log(1e16), 2_000_001))
    losses = law.loss(values, {"n_params": n, "n_tokens": flops / 6 / n})
    return n[losses.argmin()]


@pytest.mark.parametrize(
    ("values", "n_opt", "ratio"),
    [(HOFFMANN, 40.4e9, 58.9), (ROUNDED_EXPONENTS, 32.2e9, 92.7), (EPOCH, 73.2e9, 17.9), (EPOCH_LAD, 72.4e9, 18.3)],
    ids=["hoffmann", "rounded", "epoch", "epoch-lad"],
)
def test_published_optima_at_chinchillas_budget(values, n_opt, ratio):
    n, d = split_budget(Terms.of(CHINCHILLA, values), 5.76e23)
    assert float(n) == pytest.approx(n_opt, abs=0.05e9)
    assert float(d / n) == pytest.approx(ratio, abs=0.05)
    assert 6 * float(n) * float(d) == pytest.approx(5.76e23, rel=1e-12)


def test_muennighoffs_tied_optimum():
    law, values = published("muennighoff-2023")
    n, _d = split_budget(Terms.of(law, values), 5.76e23)
    assert float(n) == pytest.approx(69.962e9, rel=1e-5)


@pytest.mark.parametrize("name", ["hoffmann-2022", "besiroglu-2024", "muennighoff-2023", "kaplan-2020"])
@pytest.mark.parametrize("flops", [1e15, 1e19, 6e22])
def test_split_is_the_lowest_loss_on_a_fine_grid(name, flops):
    law, values = published(name)
    n, _d = split_budget(Terms.of(law, values), flops)
    assert float(n) == pytest.approx(brute_split(law, values, flops), rel=2e-5)


def test_rounded_constants_give_the_three_isoflop_losses():
    """Sizes 5M, 25M and 100M on 4.5e9, 9e8 and 2.25e8 tokens: 4.65, 4.21 and 4.35 nats by Hoffmann's rounded law."""
    got = loss_at(CHINCHILLA, ROUNDED, np.array([5e6, 25e6, 100e6]), np.array([4.5e9, 9e8, 2.25e8]))
    assert got == pytest.approx([4.65, 4.21, 4.35], abs=0.005)


def test_twenty_tokens_per_parameter():
    n, d = split_by_rule(6e22)
    assert n == pytest.approx(22.4e9, abs=0.05e9)
    assert d == pytest.approx(447e9, abs=0.5e9)
    assert 6 * n * d == pytest.approx(6e22, rel=1e-12)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(laws, st.floats(1e6, 1e11))
def test_tokens_for_a_size_and_back(values, n):
    terms = Terms.of(CHINCHILLA, values)
    d = tokens_for(terms, n)
    if 1e3 < d < 1e40:
        assert float(params_for(terms, d)) == pytest.approx(n, rel=1e-9)
        n_again, d_again = split_budget(terms, 6 * n * float(d))
        assert (float(n_again), float(d_again)) == pytest.approx((n, float(d)), rel=1e-9)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(laws, st.floats(1e7, 1e10), st.floats(1e8, 1e12))
def test_levels_lead_back_to_their_sizes_and_tokens(values, n, d):
    terms = Terms.of(CHINCHILLA, values)
    left = reducible_at(terms, n, d)
    assert float(reducible(CHINCHILLA, values, loss_at(CHINCHILLA, values, n, d))) == pytest.approx(left, rel=1e-9)
    if float(values[2] * d ** -values[4]) > 1e-6 * float(left):
        assert float(tokens_to_reach(terms, left, n)) == pytest.approx(d, rel=1e-6)
    cheapest = float(best_loss(CHINCHILLA, values, 6 * n * d))
    assert cheapest <= float(loss_at(CHINCHILLA, values, n, d)) * (1 + 1e-9), "no split of a budget beats the best one"


def test_kaplans_joint_law_has_levels_too():
    law = get_law("kaplan")
    terms = Terms.of(law, KAPLAN)
    loss = loss_at(law, KAPLAN, 1e9, 1e11)
    left = reducible(law, KAPLAN, loss)
    assert float(left) == pytest.approx(float(reducible_at(terms, 1e9, 1e11)), rel=1e-9)
    assert float(tokens_to_reach(terms, left, 1e9)) == pytest.approx(1e11, rel=1e-9)


def test_unreachable_levels_are_nan():
    terms = Terms.of(CHINCHILLA, HOFFMANN)
    floor = HOFFMANN[1] * 1e8 ** -HOFFMANN[3]
    assert np.isnan(tokens_to_reach(terms, np.array(0.999 * floor), 1e8))
    assert float(reducible(CHINCHILLA, HOFFMANN, 1.6)) < 0


@pytest.mark.parametrize("name", ["hoffmann-2022", "besiroglu-2024", "kaplan-2020"])
@pytest.mark.parametrize("text", ["1%", "0.3%", "0.02"])
def test_worth_until_is_where_a_doubling_gains_just_that(name, text):
    law, values = published(name)
    worth = parse_worth(text)
    d = worth_until(law, values, 1e9, worth)
    share = float(loss_at(law, values, 1e9, d)) if worth.is_share else 1.0
    assert float(doubling_gain(law, values, 1e9, d)) == pytest.approx(worth.amount * share, rel=1e-9)
    if not worth.is_share and name != "kaplan-2020":  # closed form
        p = law.by_name(values)
        closed = (p["B"] * (1 - 2 ** -p["beta"]) / worth.amount) ** (1 / p["beta"])
        assert float(d) == pytest.approx(float(closed), rel=1e-9)


def test_a_share_that_no_doubling_gains_is_one_token():
    assert float(worth_until(CHINCHILLA, HOFFMANN, 1e9, Worth(amount=0.9, is_share=True))) == pytest.approx(1)


@pytest.mark.parametrize("name", ["hoffmann-2022", "besiroglu-2024", "kaplan-2020"])
def test_a_doubling_and_a_new_model_are_equal_at_both_ends(name):
    law, values = published(name)
    low, high = beats_fresh(law, values, 1e9)
    best = tokens_for(Terms.of(law, values), 1e9)
    assert low < best < high
    for end in (low, high):
        new = best_loss(law, values, 6e9 * end)
        assert float(loss_at(law, values, 1e9, 2 * end)) == pytest.approx(float(new), rel=1e-9)
    assert loss_at(law, values, 1e9, 2 * best) < best_loss(law, values, 6e9 * best)
    assert loss_at(law, values, 1e9, 4 * high) > best_loss(law, values, 12e9 * high)


@pytest.mark.parametrize("text", ["", "x", "0", "-1%", "100%", "nan", "inf%"])
def test_worth_says_what_it_wants(text):
    with pytest.raises(SpecError, match="wants"):
        parse_worth(text)


def test_laws_of_one_variable_cannot_split():
    with pytest.raises(SpecError, match="no best split"):
        Terms.of(get_law("power-c"), np.array([1.0, 0.05]))
    with pytest.raises(SpecError, match="no best split"):
        reducible(get_law("power-n"), np.array([1.0, 0.05]), 2.0)


def test_four_thousand_draws_within_a_second():
    draws = EPOCH * np.exp(0.03 * np.random.default_rng(0).normal(size=(4000, 5)))
    terms = Terms.of(CHINCHILLA, draws)
    start = time.perf_counter()
    split_budget(terms, 1e21)
    tokens_for(terms, 1e9)
    worth_until(CHINCHILLA, draws, 1e9, parse_worth("1%"))
    beats_fresh(CHINCHILLA, draws, 1e9)
    assert time.perf_counter() - start < 1


def test_draws_with_an_exponent_of_nothing_stay_numbers():
    draws = np.array([[1.8, 400.0, 2000.0, 1e-5, 0.3], [1.8, 400.0, 2000.0, 0.3, 1e-5], [1.8, 1e-300, 2000.0, 0.3, 5]])
    terms = Terms.of(CHINCHILLA, draws)
    for found in (
        *split_budget(terms, 1e20),
        tokens_for(terms, 1e9),
        params_for(terms, 1e9),
        worth_until(CHINCHILLA, draws, 1e9, parse_worth("1%")),
        *beats_fresh(CHINCHILLA, draws, 1e9),
    ):
        assert np.isfinite(found).all()
        assert (found > 0).all()


# --------------------------------------------------------------------------------------------------- Kaplan, Chinchilla


@pytest.mark.parametrize(
    ("values", "body", "total"), [(EPOCH_PRINTED, 0.7805, 0.5154), (HOFFMANN, 0.7388, None)], ids=["epoch", "hoffmann"]
)
def test_kaplans_exponent_comes_out_of_a_chinchilla_surface(values, body, total):
    """Pearce & Song's simulation: .7805 (Epoch) and .7388 (Hoffmann) by Kaplan's count; .5154 by all parameters."""
    found = reconcile_pearce_song(values, token_grid=PUBLISHED_TOKEN_GRID)
    assert found.body.n_exponent == pytest.approx(body, abs=5e-5)
    if total is not None:
        assert found.total.n_exponent == pytest.approx(total, abs=5e-5)
        assert found.body.loss_exponent == pytest.approx(-0.069, abs=5e-4)
        assert found.total.reducible_exponent == pytest.approx(-0.178, abs=5e-4)


def test_without_the_published_token_grid_the_exponents_hardly_move():
    sampled = reconcile_pearce_song(EPOCH, token_grid=PUBLISHED_TOKEN_GRID)
    exact = reconcile_pearce_song(EPOCH)
    assert exact.body.n_exponent == pytest.approx(sampled.body.n_exponent, abs=0.01)
    assert exact.total.n_exponent == pytest.approx(EPOCH[4] / (EPOCH[3] + EPOCH[4]), abs=0.005)
    assert exact.body.n_exponent - exact.total.n_exponent > 0.2


def test_body_exponent_is_the_slope_of_the_optimum():
    n = np.geomspace(1e3, 1e10, 4001)
    n_total = n + 47_491 * np.cbrt(n)
    slope = np.gradient(np.log(n_total), np.log(n), edge_order=2)
    d = tokens_for(Terms.of(CHINCHILLA, EPOCH), n_total, 1 / slope)
    numeric = np.gradient(np.log(n), np.log(6 * n * d), edge_order=2)
    assert body_exponent(EPOCH, n)[5:-5] == pytest.approx(numeric[5:-5], abs=1e-4)
    assert float(body_exponent(EPOCH, np.array(1e18))) == pytest.approx(EPOCH[4] / (EPOCH[3] + EPOCH[4]), abs=1e-4)
