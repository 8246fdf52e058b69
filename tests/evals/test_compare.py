"""Differences on the same documents: who is compared with whom, on what, how sure, and when not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from asked import Noted, about, sitting
from scipy import stats

from homelab_scaling.evals.compare import (
    Evaluated,
    against_first,
    against_previous,
    deltas,
    paired_bits,
    paired_mean,
    paired_share,
    read_evaluated,
)
from homelab_scaling.evals.store import Store

N = 200


def evaluated(folder: Path, name: str, *, facts: dict[str, object] | None = None, **task: object) -> Evaluated:
    """A model's answers to a noted task, read back from its folder."""
    known = about(name, **facts or {})
    Store(folder / name).open_for(known)
    one = Noted(n=N, notes=folder / f"{name}.jsonl")
    sitting(folder / name, facts=known).evaluate(replace(one, **task))  # type: ignore[arg-type]
    return read_evaluated(Store(folder / name))


# ----------------------------------------------------------------------------------------------------------- intervals


def test_a_share_s_interval_covers_as_it_says() -> None:
    """Two models right with .5 and .6, their answers correlated; 95 % of the intervals should hold .1."""
    rng = np.random.default_rng(0)
    held = widths = 0.0
    for _ in range(800):
        luck = rng.random(120)
        a, b = (luck < 0.5).astype(float), (np.where(rng.random(120) < 0.7, luck, rng.random(120)) < 0.6).astype(float)
        found = paired_share(a, b)
        held += found.low <= 0.1 <= found.high
        widths += found.high - found.low
    assert 0.935 <= held / 800 <= 0.975
    apart = 2 * 1.96 * (2 * 0.25 / 120) ** 0.5
    assert widths / 800 < 0.75 * apart, "pairing is what makes it narrow"


def test_models_that_agree_on_everything_still_have_an_interval() -> None:
    same = paired_share(np.ones(50), np.ones(50))
    assert same.delta == 0 and same.low < -0.02 and same.high > 0.02 and same.p_value == 1.0


def test_a_share_s_p_is_mcnemar_s() -> None:
    a = np.array([1] * 30 + [0] * 20 + [1] * 3 + [0] * 15, dtype=float)
    b = np.array([1] * 30 + [0] * 20 + [0] * 3 + [1] * 15, dtype=float)
    found = paired_share(a, b)
    assert found.delta == pytest.approx(12 / 68) and found.p_value == pytest.approx(stats.binomtest(15, 18).pvalue)
    assert found.low > 0


def test_a_mean_s_interval_is_student_s_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(0, 10, 40)
    b = a + rng.normal(0.5, 1, 40)
    found = paired_mean(a, b)
    low, high = stats.t.interval(0.95, 39, loc=(b - a).mean(), scale=stats.sem(b - a))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high)) and found.low > 0
    constant = paired_mean(a, a)
    assert (constant.delta, constant.low, constant.high, constant.p_value) == (0, 0, 0, None)


def test_bits_are_summed_before_they_are_divided_and_drawn_in_pairs() -> None:
    rng = np.random.default_rng(2)
    n_bytes = rng.integers(50, 5000, 300).astype(float)
    hard = rng.normal(1.0, 0.3, 300)
    a = n_bytes * hard * np.log(2)
    b = n_bytes * (hard - 0.05 + rng.normal(0, 0.02, 300)) * np.log(2)
    found = paired_bits(a, b, n_bytes)
    assert found.delta == pytest.approx(((b - a) / np.log(2)).sum() / n_bytes.sum())
    assert found.low < -0.05 < found.high and found.high - found.low < 0.01, "the documents differ 30 times as much"


# --------------------------------------------------------------------------------------------------------- who and what


def test_a_difference_is_told_from_second_less_first(tmp_path: Path) -> None:
    a = evaluated(tmp_path, "a", answers=lambda i: i % 10 < 4)
    b = evaluated(tmp_path, "b", answers=lambda i: i % 10 < 6)
    (delta,) = deltas(a, b)
    assert (delta.first, delta.second, delta.n_documents) == ("a", "b", N)
    assert delta.delta == pytest.approx(0.2) and delta.is_better is True and delta.refused is None
    assert deltas(b, a)[0].is_better is False and deltas(a, a)[0].is_better is None


def test_where_less_is_more_a_fall_is_better(tmp_path: Path) -> None:
    bits = {"kind": "bits per byte", "metric": "bits_per_byte", "higher_is_better": False}
    a = evaluated(tmp_path, "a", answers=lambda i: 100.0 + i % 3, **bits)
    b = evaluated(tmp_path, "b", answers=lambda i: 90.0 + i % 3, **bits)
    (delta,) = deltas(a, b)
    assert delta.delta is not None and delta.delta < 0 and delta.is_better is True


def test_a_ladder_is_compared_step_by_step_and_named_models_with_the_first(tmp_path: Path) -> None:
    models = [evaluated(tmp_path, name) for name in "abc"]
    assert [(d.first, d.second) for d in against_first(models)] == [("a", "b"), ("a", "c")]
    assert [(d.first, d.second) for d in against_previous(models)] == [("a", "b"), ("b", "c")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"settings": {"shots": 5}}, "asked with different settings: shots 0 against 5"),
        ({"settings": {"shots": 0, "limit": 9}}, "asked with different settings: limit none against 9"),
        ({"metric": "acc_norm"}, "one is acc, the other acc_norm"),
        ({"n": 1}, "only 1 documents were asked of both"),
    ],
)
def test_what_was_asked_differently_is_not_compared(tmp_path: Path, change: dict[str, object], why: str) -> None:
    (delta,) = deltas(evaluated(tmp_path, "a"), evaluated(tmp_path, "b", **change))
    assert delta.refused == why and (delta.delta, delta.low, delta.p_value, delta.is_better) == (None,) * 4


def test_documents_of_one_name_and_other_length_are_not_compared(tmp_path: Path) -> None:
    a = evaluated(tmp_path, "a", kind="bits per byte")
    changed = {doc_id: replace(one, weight=one.weight + 1) for doc_id, one in a.outcomes["noted"].items()}
    (delta,) = deltas(a, replace(a, outcomes={"noted": changed}))
    assert delta.refused == "their documents have the same names and not the same length"


def test_what_belongs_to_the_models_is_noted_and_compared_all_the_same(tmp_path: Path) -> None:
    facts = {"tokenizer": "t1", "context_tokens": 32}
    a, b = evaluated(tmp_path, "a"), evaluated(tmp_path, "b", facts=facts)
    (delta,) = deltas(a, b)
    assert delta.delta == 0 and delta.notes == ("different tokenizers", "contexts of 64 and 32 tokens")
    losses = [replace(s, kind="mean", higher_is_better=False) for s in (a.scores["noted"], b.scores["noted"])]
    pair = [replace(one, scores={"noted": loss}) for one, loss in zip((a, b), losses, strict=True)]
    assert "bits per byte does" in deltas(*pair)[0].notes[-1], "losses per token do not"
    bits = {"kind": "bits per byte"}
    (delta,) = deltas(evaluated(tmp_path, "c", **bits), evaluated(tmp_path, "d", facts=facts, **bits))
    assert delta.notes == ("contexts of 64 and 32 tokens",), "bits per byte compare across tokenizers"


def test_only_the_outcomes_behind_the_score_are_compared(tmp_path: Path) -> None:
    """The file may hold the same task with other settings, or of weights that are no more."""
    evaluated(tmp_path, "a", settings={"shots": 5}, answers=lambda i: 0)
    a = evaluated(tmp_path, "a", answers=lambda i: 1)
    assert set(a.scores) == {"noted"} and all(one.value == 1 for one in a.outcomes["noted"].values())
    assert len(a.outcomes["noted"]) == N
