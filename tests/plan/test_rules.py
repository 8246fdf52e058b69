"""The arithmetic between wishes and whole batches, at hand-computed values."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import LrTable, Rung, Validation
from homelab_scaling.plan import rules
from homelab_scaling.plan.counting import count_params


def test_step_law_at_its_own_centre() -> None:
    """N = 1B, D = 20B: worked out by hand from lr = 1.79 N^-0.713 D^0.307 and B = 0.58 D^0.571."""
    assert rules.step_law_lr(1e9, 2e10) == pytest.approx(1.79 * 3.827e-7 * 1454.7, rel=1e-3)
    assert rules.step_law_batch(2e10) == pytest.approx(0.58 * 10 ** (0.571 * math.log10(2e10)), rel=1e-9)
    assert 400_000 < rules.step_law_batch(2e10) < 500_000


def test_learning_rate_rules() -> None:
    rung = Rung(name="r", n_params_target=1)
    power = LrTable(rule="power", peak=4e-3, at_body_params=1e6, exponent=-0.25)
    assert rules.choose_lr(rung, power, 16_000_000, 10**9).value == pytest.approx(2e-3)
    assert rules.choose_lr(rung, LrTable(rule="fixed", peak=1e-3), 7, 10**9).value == 1e-3
    law = rules.choose_lr(rung, LrTable(rule="step-law"), 85_000_000, 10**9)
    assert law == rules.Choice(value=rules.step_law_lr(85e6, 1e9), source="Step Law")
    own = Rung(name="r", n_params_target=1, lr_peak=5e-4)
    assert rules.choose_lr(own, power, 16_000_000, 10**9) == rules.Choice(value=5e-4, source="rung")


@pytest.mark.parametrize(
    ("wanted", "ranks", "derived", "seqs"),
    [
        (4096, 1, False, 32),
        (4100, 1, False, 32),
        (1, 1, False, 1),
        (7 * 128, 2, False, 8),
        (137 * 128, 1, False, 137),
        (137 * 128, 1, True, 136),  # 128 to 255: multiples of 8
        (31 * 128, 1, True, 31),
        (137 * 128, 3, True, 144),  # lcm(8, 3) = 24
    ],
)
def test_batches_in_whole_sequences_and_ranks(wanted: int, ranks: int, derived: bool, seqs: int) -> None:
    assert rules.round_batch(wanted, 128, n_ranks=ranks, derived=derived) == seqs * 128


@settings(derandomize=True, deadline=None)
@given(st.floats(1e3, 1e8), st.sampled_from([64, 128, 1024]))
def test_a_derived_batch_moves_little_and_has_divisors(wanted: float, context: int) -> None:
    batch = rules.round_batch(wanted, context, derived=True)
    seqs = batch // context
    assert batch % context == 0
    if wanted > 32 * context:
        assert abs(batch / wanted - 1) <= 1 / 32 + 1e-9
        assert seqs % 2 == 0, "it splits over two ranks"


def test_horizons_are_the_nearest_whole_batches() -> None:
    assert rules.round_horizon(750_000, 4096, "r") == 183 * 4096
    with pytest.raises(SpecError, match="less than one batch"):
        rules.round_horizon(2000, 4096, "r")


@pytest.mark.parametrize(("frac", "steps", "expected"), [(0.05, 183, 9), (0.1, 183, 18), (0.1, 9, 0), (0.0, 500, 0)])
def test_warm_up_never_exceeds_a_tenth(frac: float, steps: int, expected: int) -> None:
    assert rules.warmup_tokens(frac, steps * 64, 64) == expected * 64


def test_tokens_of_a_trunk_with_three_decays() -> None:
    """Horizons of 100, 200 and 400 steps, a fifth decayed: the trunk's 400 and the two shorter decays, 20 and 40."""
    assert rules.tokens_trained((6400, 12_800, 25_600), 64, 0.2) == (400 + 20 + 40) * 64
    assert rules.tokens_trained((6400,), 64, 0.2) == 6400


@pytest.mark.parametrize(
    ("table", "horizons", "every_steps", "stretched"),
    [
        (Validation(curve_points_per_row=10), (1000, 2000), 100, False),
        (Validation(curve_points_per_row=10), (1000, 4000), 200, False),  # the long row is capped at 20
        (Validation(curve_every_steps=50), (500,), 50, False),
        (Validation(curve_every_steps=10), (500,), 25, True),
    ],
)
def test_curve_cadence(table: Validation, horizons: tuple[int, ...], every_steps: int, stretched: bool) -> None:
    tokens = tuple(64 * h for h in horizons)
    assert rules.curve_cadence(table, tokens, 64) == (64 * every_steps, stretched)


def test_no_curve_when_no_points_are_wanted() -> None:
    assert rules.curve_cadence(Validation(curve_points_per_row=0), (6400,), 64) == (None, False)


@pytest.mark.parametrize("wanted", [5_300_000, 12_500_000, 24_000_000, 51_000_000, 124_000_000, 350_000_000])
def test_the_nearest_shape_is_near_and_well_proportioned(wanted: int) -> None:
    shape = rules.nearest_shape(wanted, 50_257, 1024, tied=True)
    assert count_params(shape, 50_257).n_params == pytest.approx(wanted, rel=0.06)
    assert shape.d_model % 32 == 0
    assert shape.d_model // shape.n_head in (32, 64)
    assert 16 <= shape.d_model / shape.n_layer <= 100


def test_the_nearest_shape_to_gpt2_small_is_gpt2_small() -> None:
    shape = rules.nearest_shape(124_439_808, 50_257, 1024, tied=True)
    assert (shape.n_layer, shape.d_model, shape.n_head) == (12, 768, 12)
