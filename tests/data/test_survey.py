"""What is chosen depends on the documents' content alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.data import survey
from homelab_scaling.data.files import Document
from homelab_scaling.data.survey import DROPPED, TRAIN, VAL, Choice, choose, read_survey
from homelab_scaling.errors import DataError

props = settings(derandomize=True, deadline=None, max_examples=150)
texts = st.lists(st.text("abcé", min_size=1, max_size=12), min_size=3, max_size=60)


def pick(texts: list[str], groups: list[str] | None = None, **choice: object) -> Choice:
    names = groups or [None] * len(texts)
    documents = [Document(text=t, name=str(i), group=g) for i, (t, g) in enumerate(zip(texts, names, strict=True))]
    return choose(read_survey([documents], lambda _: None), **{"val_frac": 0.3, "max_bytes": None} | choice)


def by_text(texts: list[str], choice: Choice) -> dict[str, int]:
    return {text: int(part) for text, part in zip(texts, choice.part, strict=True) if part != DROPPED}


@props
@given(texts=texts, data=st.data())
def test_order_and_copies_do_not_matter(texts: list[str], data: st.DataObject) -> None:
    if len(set(texts)) < 3:
        return
    try:
        chosen = by_text(texts, pick(texts))
    except DataError:
        return
    shuffled = data.draw(st.permutations([*texts, *texts[:5]]))
    assert by_text(shuffled, pick(shuffled)) == chosen
    assert set(chosen) == set(texts)
    assert {TRAIN, VAL} == set(chosen.values())


@props
@given(texts=texts)
def test_the_first_copy_stays_and_the_count_is_right(texts: list[str]) -> None:
    if len(set(texts)) < 3:
        return
    choice = pick(texts, val_frac=0.01)
    kept = [i for i, part in enumerate(choice.part) if part != DROPPED]
    assert kept == [i for i, text in enumerate(texts) if text not in texts[:i]]
    assert choice.n_duplicates == len(texts) - len(set(texts))
    assert choice.n_bytes == sum(len(text.encode()) for text in set(texts))


def test_held_out_is_the_rule_in_words() -> None:
    texts = [f"document {i}" for i in range(2000)]
    choice = pick(texts, val_frac=0.1)
    for text, part in zip(texts, choice.part, strict=True):
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16], "big") / 2**64
        assert part == (VAL if share < 0.1 else TRAIN)
    assert 0.08 < np.mean(choice.part == VAL) < 0.12


def test_held_out_stays_held_out_when_the_corpus_grows_or_is_capped() -> None:
    texts = [f"document {i}" for i in range(3000)]
    few, many = by_text(texts[:1000], pick(texts[:1000])), by_text(texts, pick(texts))
    assert all(many[text] == part for text, part in few.items())
    capped = by_text(texts, pick(texts, max_bytes=9_000))
    assert all(many[text] == part for text, part in capped.items())
    assert 0.2 < np.mean([part == VAL for part in capped.values()]) < 0.4  # the cap is not the validation rule


@pytest.mark.parametrize("max_bytes", [1000, 7_777, 20_000])
def test_a_cap_is_a_spread_sample_that_grows(max_bytes: int) -> None:
    texts = [f"document {i:05d}" for i in range(3000)]  # 14 bytes each
    capped = by_text(texts, pick(texts, max_bytes=max_bytes))
    assert len(capped) == max_bytes // 14
    places = [int(text.split()[1]) for text in capped]
    assert 1000 < np.mean(places) < 2000
    assert set(capped) <= set(by_text(texts, pick(texts, max_bytes=2 * max_bytes)))


def test_one_document_is_held_out_even_of_a_few() -> None:
    choice = pick(["one", "two", "three"], val_frac=1e-9)
    assert sorted(choice.part) == [TRAIN, TRAIN, VAL]


def test_groups_are_held_out_whole_and_near_the_share() -> None:
    rng = np.random.default_rng(0)
    groups = [f"package/{g}" for g in rng.integers(0, 80, 2000)]
    texts = [f"{i} " * int(n) for i, n in enumerate(rng.integers(1, 200, 2000))]
    choice = pick(texts, groups, val_frac=0.05)
    halves = {half: {g for g, part in zip(groups, choice.part, strict=True) if part == half} for half in (TRAIN, VAL)}
    assert not halves[TRAIN] & halves[VAL]
    sizes = np.array([len(text) for text in texts])
    assert 0.05 <= sizes[choice.part == VAL].sum() / sizes.sum() <= 0.05 * 1.5


def test_a_group_that_is_too_large_is_passed_over() -> None:
    texts = [f"{i}" * 50 for i in range(100)]
    groups = ["large" if i >= 4 else f"small{i}" for i in range(100)]
    for val_frac in (0.01, 0.02, 0.04):
        choice = pick(texts, groups, val_frac=val_frac)
        held = {g for g, part in zip(groups, choice.part, strict=True) if part == VAL}
        assert held and "large" not in held
    only = pick(texts, ["a"] * 60 + ["b"] * 40, val_frac=0.01)  # nothing fits: the smaller one
    assert (only.part == VAL).sum() == 40


def test_the_tokenizer_learns_from_training_documents_only_and_from_a_bounded_sample(monkeypatch) -> None:
    texts = [f"document {i:05d}" for i in range(3000)]
    assert (pick(texts).in_sample == (pick(texts).part == TRAIN)).all()
    monkeypatch.setattr(survey, "TOKENIZER_SAMPLE_BYTES", 1000)
    choice = pick(texts)
    assert choice.in_sample.sum() == 1000 // 14
    assert set(choice.part[choice.in_sample]) == {TRAIN}


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, "no text at all"),
        (["only"], {}, "found 1 different document;"),
        (["same", "same"], {}, "found 1 different document;"),
        (["one", "two", "three"], {"max_bytes": 2}, "found 0 different documents under max_bytes = 2"),
        (["a" * 9, "b" * 9, "c" * 9], {"groups": ["g"] * 3}, "leaves nothing for training"),
    ],
)
def test_what_cannot_be_split(texts: list[str], options: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        pick(texts, **options)
