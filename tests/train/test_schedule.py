"""Learning rates at hand-computed tokens, and the phases of a run."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.errors import SpecError
from homelab_scaling.specs import ModelShape, Optim, Schedule, ScienceSpec
from homelab_scaling.train.schedule import lr_at, phases


def science(*, horizons: tuple[int, ...], batch: int = 100, warmup: int = 0, name: str = "wsd", **over) -> ScienceSpec:
    schedule = Schedule(
        name=name,
        lr_peak=over.pop("lr_peak", 1.0),
        warmup_tokens=warmup,
        decay_frac=over.pop("decay_frac", 0.2),
        lr_final_frac=over.pop("lr_final_frac", 0.0),
    )
    return ScienceSpec(
        shape=ModelShape(n_layer=1, d_model=8, n_head=1, context_tokens=10),
        n_vocab=64,
        tokenizer_hash="t",
        train_fingerprint="a",
        val_fingerprint="b",
        horizons_tokens=horizons,
        batch_tokens_global=batch,
        schedule=schedule,
        optim=Optim(),
        precision="fp32",
        seed=0,
        val_tokens=100,
    )


def test_wsd_phases_of_three_horizons() -> None:
    plan = phases(science(horizons=(1_000, 2_000, 4_000)))
    assert [(p.name, p.first_update, p.start_step, p.end_step) for p in plan] == [
        ("trunk", 0, 0, 8),
        ("decay@1000", 8, 8, 10),
        ("trunk", 10, 8, 16),
        ("decay@2000", 18, 16, 20),
        ("trunk", 22, 16, 32),
        ("decay@4000", 38, 32, 40),
    ]


def test_wsd_rates_by_hand() -> None:
    spec = science(horizons=(1_000, 2_000), warmup=100, lr_peak=0.5)
    trunk, decay = phases(spec)[:2]
    assert lr_at(spec, trunk, 0) == pytest.approx(0.5 * 50 / 100)  # the middle of the first batch is at 50 tokens
    assert lr_at(spec, trunk, 1) == 0.5
    assert lr_at(spec, trunk, 7) == 0.5
    # The decay runs from 800 to 1,000 tokens; its steps' middles are 1/4 and 3/4 of the way.
    assert lr_at(spec, decay, 8) == pytest.approx(0.5 * (1 - math.sqrt(0.25)))
    assert lr_at(spec, decay, 9) == pytest.approx(0.5 * (1 - math.sqrt(0.75)))


def test_cosine_rates_by_hand() -> None:
    spec = science(horizons=(1_000,), name="cosine", warmup=100, lr_final_frac=0.1)
    (phase,) = phases(spec)
    assert phase.earns_row and phase.n_updates == 10
    assert lr_at(spec, phase, 0) == pytest.approx(0.5)
    middle = (550 - 100) / 900  # step 5
    assert lr_at(spec, phase, 5) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * middle)))
    last = (950 - 100) / 900
    assert lr_at(spec, phase, 9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * last)))


@settings(derandomize=True, deadline=None)
@given(
    steps=st.lists(st.integers(10, 2_000), min_size=1, max_size=5, unique=True),
    decay_frac=st.floats(0.05, 0.8),
)
def test_every_row_is_reached_and_updates_are_contiguous(steps: list[int], decay_frac: float) -> None:
    horizons = tuple(100 * s for s in sorted(steps))
    spec = science(horizons=horizons, decay_frac=decay_frac, warmup=100)
    plan = phases(spec)
    assert [p.horizon_tokens for p in plan if p.earns_row] == list(horizons)
    assert all(p.end_step * 100 == p.horizon_tokens for p in plan if p.earns_row)
    update = trunk_step = 0
    for p in plan:
        assert p.first_update == update and p.n_updates > 0
        assert p.start_step == trunk_step, "a phase begins at the trunk's state, never at a decayed one"
        update = p.end_update
        if p.kind == "trunk":
            trunk_step = p.end_step
        rates = [lr_at(spec, p, s) for s in range(p.start_step, p.end_step)]
        assert all(0 < r <= 1 for r in rates)
        if p.kind == "decay" and p.start_step > 1:
            assert rates == sorted(rates, reverse=True)


def test_a_decay_that_begins_within_the_warm_up_is_refused() -> None:
    with pytest.raises(SpecError, match="before the warm-up"):
        phases(science(horizons=(1_000,), batch=100, warmup=200, decay_frac=0.9))
