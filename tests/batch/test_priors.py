"""The published batches, against the numbers their studies print."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.batch import priors
from homelab_scaling.plan.rules import step_law_batch


@pytest.mark.parametrize(("loss", "tokens"), [(5.0, 94e3), (4.0, 272e3), (3.5, 513e3), (3.0, 1.07e6)])
def test_kaplan_prints_these(loss: float, tokens: float) -> None:
    assert priors.kaplan_critical_tokens(loss) == pytest.approx(tokens, rel=0.005)


@pytest.mark.parametrize(("n_tokens", "tokens"), [(0.1e9, 102e3), (0.3e9, 171e3), (1.2e9, 328e3), (2.4e9, 455e3)])
def test_zhang_prints_these(n_tokens: float, tokens: float) -> None:
    assert priors.zhang_critical_tokens(n_tokens) == pytest.approx(tokens, rel=0.005)


def test_zhangs_two_laws_meet_at_twenty_tokens_per_parameter() -> None:
    by_size, by_tokens = priors.zhang_critical_tokens_by_size(85e6), priors.zhang_critical_tokens(20 * 85e6)
    assert by_size == pytest.approx(by_tokens, rel=0.01)


def test_power_lines_pass_through_their_anchor() -> None:
    assert priors.power_lines_tokens(1.16e9) == pytest.approx(2**19)
    assert priors.power_lines_tokens(2 * 1.16e9) / 2**19 == pytest.approx(1.304, abs=1e-3)


def rung(**changes: float) -> tuple[priors.Prior, ...]:
    given = {"n_params": 0.5e9, "n_body": 0.4e9, "n_tokens": 9e9, "context_tokens": 2048, "loss_nats": 3.0}
    return priors.priors_for(**(given | changes))  # type: ignore[arg-type]


def by_name(found: tuple[priors.Prior, ...], name: str) -> priors.Prior:
    return next(p for p in found if p.name.startswith(name))


def test_a_critical_batch_is_brought_to_twenty_percent() -> None:
    kaplan = by_name(rung(), "Kaplan")
    assert kaplan.tokens == pytest.approx(0.2 * kaplan.published_tokens)
    step_law = by_name(rung(), "Step Law")
    assert step_law.tokens == step_law.published_tokens == step_law_batch(9e9)


def test_without_a_loss_kaplan_is_silent() -> None:
    assert not [p for p in rung(loss_nats=None) if p.name.startswith("Kaplan")]  # type: ignore[arg-type]


def test_the_domain_is_held_against_each() -> None:
    found = rung()
    assert by_name(found, "Step Law").outside == ()
    assert by_name(found, "Kaplan").outside == ("N 400M (measured 3.00M to 85.0M)",)
    assert by_name(rung(n_body=50e6, context_tokens=1024), "Kaplan").outside == ()
    assert by_name(found, "Zhang CBS(D)").outside == ("context 2048 (measured 512)",)
    assert by_name(found, "Power Lines").outside == ("optimizer AdamW (measured Muon and AdamW)",)
    sentence = priors.band(found).sentence
    assert sentence.startswith("from Step Law; outside") and "Zhang CBS(D) (context)" in sentence


def test_a_small_rung_is_told_that_nobody_measured_there() -> None:
    found = rung(n_params=54e3, n_body=10e3, n_tokens=2.4e6, context_tokens=128, loss_nats=6.0)
    assert all(p.outside for p in found)
    band = priors.band(found)
    assert band.n_inside == 0 and "no prior was measured at runs like this one" in band.sentence
    assert (band.low_tokens, band.high_tokens) == (min(p.tokens for p in found), max(p.tokens for p in found))


@settings(derandomize=True, deadline=None)
@given(st.floats(1e6, 1e12), st.floats(1.01, 10))
def test_more_tokens_never_want_a_smaller_batch(n_tokens: float, factor: float) -> None:
    for law in (priors.zhang_critical_tokens, priors.power_lines_tokens):
        assert law(n_tokens * factor) > law(n_tokens)
