"""Each caution appears where it matters and nowhere else."""

from dataclasses import replace

import pytest

from homelab_scaling.evals.cautions import cautions
from homelab_scaling.evals.intervals import share
from homelab_scaling.evals.results import Part, Score


def score(n_right: int = 400, n: int = 500, **changes) -> Score:
    whole = share([1.0] * n_right + [0.0] * (n - n_right))
    plain = Score(
        task="copy",
        metric="acc",
        kind="share",
        higher_is_better=True,
        chance=0.25,
        settings={"tokenizer": "a", "items": n},
        whole=whole,
        overlap_frac=0.0,
        clean=whole,
        seconds=1.0,
        n_tokens=10,
    )
    return replace(plain, **changes)


def only(found: tuple[str, ...]) -> str:
    assert len(found) == 1, found
    return found[0]


def test_a_sound_score_needs_no_caution() -> None:
    assert cautions(score()) == ()


def test_near_chance() -> None:
    assert only(cautions(score(130))).startswith("not distinguishable from guessing (0.25): the interval is 0.2")
    assert cautions(score(170)) == ()
    assert cautions(score(130, chance=None)) == ()


def test_below_chance() -> None:
    assert only(cautions(score(50))).startswith("worse than guessing (0.25): the interval is 0.07")
    assert "template" in only(cautions(score(50)))
    assert only(cautions(score(104))).startswith("not better than guessing (0.25): the interval is 0.17")
    loss = Part(n_documents=200, score=3.0, se=0.05, low=2.9, high=3.1)
    down = score(kind="mean", higher_is_better=False, whole=loss, clean=loss)
    assert cautions(replace(down, chance=3.2)) == ()
    assert only(cautions(replace(down, chance=2.8))).startswith("not better")
    assert only(cautions(replace(down, chance=2.6))).startswith("worse")


def test_few_documents() -> None:
    assert (
        only(cautions(score(40, 50)))
        == "only 50 documents: +/- 0.11; tell models apart by their paired differences, not by these intervals"
    )
    one = Part(n_documents=1, score=1.0, se=None, low=None, high=None)
    assert only(cautions(score(whole=one))) == "1 document: no interval can be given"


def test_contamination_of_a_foreign_model_is_unknown() -> None:
    why = "nothing is known of the text this model was trained on"
    found = cautions(score(clean=None, overlap_frac=None, overlap_unknown=why))
    assert only(found) == f"contamination unknown: {why}"


def test_contamination_partly_unknown() -> None:
    """Said only where it is many documents."""
    why = "200 of 500 documents have fewer than 8 words"
    found = cautions(score(overlap_unknown=why, overlap_frac=0.0, clean=share([1.0] * 240 + [0.0] * 60)))
    assert only(found) == f"contamination partly unknown: {why}"
    few = score(overlap_unknown="5 of 500 documents ...", overlap_frac=0.0, clean=share([1.0] * 400 + [0.0] * 95))
    assert cautions(few) == ()


@pytest.mark.parametrize(
    ("clean", "said"),
    [
        (share([1.0] * 160 + [0.0] * 40), "; the clean part (200 documents) scores 0.8"),
        (share([1.0] * 100 + [0.0] * 100), ": believe the clean part, 0.5 on 200 documents"),
        (share([]), ", and no clean part is left"),
    ],
)
def test_large_overlap(clean: Part, said: str) -> None:
    found = only(cautions(score(overlap_frac=0.6, clean=clean)))
    assert found == f"60% of the documents overlap with the training text (13-grams){said}"


def test_a_small_overlap_is_said_only_where_it_matters() -> None:
    assert cautions(score(overlap_frac=0.1, clean=share([1.0] * 360 + [0.0] * 90))) == ()
    assert "believe the clean part" in only(cautions(score(overlap_frac=0.1, clean=share([1.0] * 300 + [0.0] * 150))))


def test_large_overlap_of_a_loss_is_worse_where_the_clean_part_is_higher() -> None:
    whole = Part(n_documents=200, score=1.0, se=0.01, low=0.98, high=1.02)
    clean = Part(n_documents=100, score=1.3, se=0.02, low=1.26, high=1.34)
    bits = score(kind="bits per byte", higher_is_better=False, chance=None, whole=whole, overlap_frac=0.5, clean=clean)
    assert "believe the clean part, 1.3" in only(cautions(bits))
    assert "believe" not in only(cautions(replace(bits, clean=replace(clean, score=0.8, low=0.7, high=0.9))))


@pytest.mark.parametrize("metric", ["exact_match", "exact_match,strict-match", "em"])
def test_exact_match_undercounts(metric: str) -> None:
    assert only(cautions(score(metric=metric))).startswith("exact match undercounts")
