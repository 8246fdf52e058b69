"""What MinHash proposes and counting confirms, held against counting everything; and that no border leaks."""

import json
import re
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import cli
from homelab_scaling.data import near_duplicates
from homelab_scaling.data.files import Document
from homelab_scaling.data.near_duplicates import NearDuplicates, bands_for, jaccard
from homelab_scaling.data.shards import build_shards, open_shards

pytest.importorskip("rensa", reason="rensa is not installed; pip install 'homelab_scaling[dedup]'")

THRESHOLD = 0.8
RNG = np.random.default_rng(0)
VOCABULARY = [f"w{i}" for i in range(5000)]


def words(n: int, rng: np.random.Generator = RNG) -> list[str]:
    return [VOCABULARY[i] for i in rng.integers(0, len(VOCABULARY), n)]


@cache
def shingles_by_hand(text: str) -> frozenset[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    return frozenset(tuple(found[i : i + 5]) for i in range(max(1, len(found) - 4)) if found)


def similarity(a: str, b: str) -> float:
    one, other = shingles_by_hand(a), shingles_by_hand(b)
    return len(one & other) / len(one | other) if one | other else 0.0


def edited(text: list[str], n_changes: int, rng: np.random.Generator = RNG) -> list[str]:
    """The text with so many words replaced: each change costs five shingles."""
    out = list(text)
    for place in rng.choice(len(text), n_changes, replace=False):
        out[place] = f"new{rng.integers(10**9)}"
    return out


def find(texts: list[str], tmp_path: Path, threshold: float = THRESHOLD, order: list[int] | None = None) -> list[bool]:
    with NearDuplicates(tmp_path / "spool", threshold) as near:
        assert [d.text for d in near.watch(Document(text=t, name="") for t in texts)] == texts
        return near.find(np.array(order if order is not None else range(len(texts)), dtype=np.int64)).tolist()


def counted(texts: list[str], threshold: float) -> list[bool]:
    """The rule itself: one after the other, against all that stay."""
    stay: list[str] = []
    dropped = []
    for text in texts:
        dropped.append(any(similarity(text, other) >= threshold for other in stay))
        if not dropped[-1]:
            stay.append(text)
    return dropped


def planted(n_families: int, rng: np.random.Generator) -> list[str]:
    """Families of a text and its edits, from nearly equal to clearly different; and short texts."""
    texts = []
    for _ in range(n_families):
        base = words(int(rng.integers(60, 200)), rng)
        texts.append(" ".join(base))
        texts += [" ".join(edited(base, int(n), rng)) for n in rng.integers(1, 9, 4)]
        texts.append(" ".join(words(int(rng.integers(1, 8)), rng)))
    return [texts[i] for i in rng.permutation(len(texts))]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_it_finds_what_counting_every_pair_finds(tmp_path: Path, threshold: float) -> None:
    texts = planted(40, np.random.default_rng(7))
    found, wanted = find(texts, tmp_path, threshold), counted(texts, threshold)
    assert found == wanted
    if threshold < 1:
        assert 5 < sum(wanted) < len(texts) - 40


def test_the_threshold_is_exact_on_both_sides(tmp_path: Path) -> None:
    """96 words are 92 shingles; k words cut off the end leave J = (92 - k) / 92."""
    base = words(96)
    for cut in (17, 18, 19, 20):
        texts = [" ".join(base), " ".join(base[:-cut])]
        j = similarity(*texts)
        assert j == (92 - cut) / 92
        assert find(texts, tmp_path) == [False, j >= 0.8]
    five = words(8), words(9)
    assert len(shingles_by_hand(" ".join(five[0]))) == 4
    exact = [" ".join(five[1]), " ".join(five[1][:-1])]  # 4 of 5 shingles: 0.8 is near, and not a rounding below it
    assert similarity(*exact) == 0.8 and find(exact, tmp_path) == [False, True]


def test_wording_counts_and_not_case_or_signs(tmp_path: Path) -> None:
    text = " ".join(words(50))
    assert find([text, text.upper().replace(" ", ",\n")], tmp_path) == [False, True]
    assert find(["Hello, world!", "hello world", "world hello"], tmp_path) == [False, True, False]
    assert find(["!?", "...", "", "!?"], tmp_path) == [False] * 4, "without a word there is nothing to compare"
    assert find(["größe eins zwei", "GRÖSSE eins zwei", "größe  EINS zwei."], tmp_path) == [False, False, True]


def test_chains_do_not_drag_each_other_out(tmp_path: Path) -> None:
    """a ~ b ~ c, but a and c differ: with a first, b goes and c stays; with b first, both others go."""
    base = words(100)
    a, b, c = (" ".join(base[start : start + 80]) for start in (0, 8, 16))
    assert similarity(a, b) >= THRESHOLD <= similarity(b, c) and similarity(a, c) < THRESHOLD
    assert find([a, b, c], tmp_path) == [False, True, False]
    assert find([a, b, c], tmp_path, order=[1, 0, 2]) == [False, True, True]


def test_documents_outside_the_order_do_not_count(tmp_path: Path) -> None:
    text = " ".join(words(50))
    assert find([text, text, "something else altogether, in these very words"], tmp_path, order=[1, 2]) == [
        False,
        False,
    ]


def test_batches_and_a_forgetful_dictionary_change_nothing(tmp_path: Path, monkeypatch) -> None:
    texts = planted(10, np.random.default_rng(3))
    once = find(texts, tmp_path)
    monkeypatch.setattr(near_duplicates, "_BATCH_SHINGLES", 50)
    monkeypatch.setattr(near_duplicates, "_MAX_WORDS_KNOWN", 20)
    assert find(texts, tmp_path) == once
    monkeypatch.setattr(near_duplicates, "_BATCH_DOCUMENTS", 1)
    assert find(texts, tmp_path) == once


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert find([], tmp_path) == []
    assert find(["one text only"], tmp_path) == [False]
    assert find(["!", "?"], tmp_path) == [False, False]


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_miss_almost_nothing_at_the_threshold(threshold: float) -> None:
    n_bands, n_rows = bands_for(threshold)
    assert n_bands * n_rows <= near_duplicates.N_PERMUTATIONS
    missed = (1 - threshold**n_rows) ** n_bands
    assert missed <= near_duplicates.MAX_MISSED or n_rows == 1
    assert bands_for(0.8) == (25, 5)


def test_the_librarys_signatures_agree_as_often_as_the_sets_do(tmp_path: Path) -> None:
    """MinHash's promise, J = P(two signatures agree in a row), within 4 standard errors over many pairs."""
    sketch = near_duplicates.load_minhash()
    with NearDuplicates(tmp_path / "spool", THRESHOLD) as near:
        errors = []
        for n_changes in (1, 2, 4, 8, 16) * 12:
            base = words(150)
            sets = [near.shingles(" ".join(text)) for text in (base, edited(base, n_changes))]
            j = jaccard(*sets)
            assert j == similarity(" ".join(base), " ".join(base)) * j  # a number, not NaN
            one, other = sketch(sets)
            errors.append((np.mean(one == other) - j) / np.sqrt(max(j * (1 - j), 1e-3) / len(one)))
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))
    assert np.std(errors) < 1.5


@settings(derandomize=True, deadline=None, max_examples=100)
@given(a=st.sets(st.integers(0, 40)), b=st.sets(st.integers(0, 40)))
def test_jaccard_is_the_definition(a: set[int], b: set[int]) -> None:
    sets = [np.array(sorted(s), dtype=np.uint64) for s in (a, b)]
    assert jaccard(*sets) == (len(a & b) / len(a | b) if a and b else 0.0)


# --------------------------------------------------------------------------------------------------- in a corpus


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(stream: np.ndarray) -> list[str]:
    ends = np.flatnonzero(stream == 256)
    return [bytes(p[p < 256].astype(np.uint8)).decode() for p in np.split(stream, ends + 1)[:-1]]


def test_nothing_held_out_has_a_near_duplicate_in_training(tmp_path: Path) -> None:
    texts = planted(40, np.random.default_rng(11))
    sources = [write(tmp_path / "a.jsonl", texts[:140]), write(tmp_path / "b.jsonl", texts[140:])]
    options = {"val_frac": 0.3, "epochs": (1, 2)}

    def leaks(folder: Path) -> int:
        shards = open_shards(folder)
        train, val = set(texts_of(shards.train[:])), texts_of(shards.val[:])
        assert train and val
        return sum(any(similarity(one, other) >= THRESHOLD for other in train) for one in val)

    plain = build_shards(sources, "bytes", tmp_path / "plain", **options)
    clean = build_shards(sources, "bytes", tmp_path / "clean", near_duplicates=THRESHOLD, **options)
    assert leaks(tmp_path / "plain") > 5, "the test plants what is to be found"
    assert leaks(tmp_path / "clean") == 0
    assert plain.near_duplicates is None and clean.near_duplicates == THRESHOLD
    assert plain.data_id != clean.data_id
    kept = [*set(texts_of(open_shards(tmp_path / "clean").train[:])), *texts_of(open_shards(tmp_path / "clean").val[:])]
    assert len(kept) == len(set(kept))
    for text in set(texts) - set(kept):
        assert any(similarity(text, other) >= THRESHOLD for other in kept), "dropped, and nothing stands for it"
    n_gone = sum(share.n_near_duplicates + share.n_exact_duplicates for share in clean.mixture)
    assert n_gone == len(texts) - len(kept) and sum(s.n_near_duplicates for s in clean.mixture) > 50
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == [
        "build.json",
        "manifest.json",
        "train.bin",
        "val.bin",
    ]


def test_the_order_of_sources_does_not_decide_who_stays(tmp_path: Path) -> None:
    texts = planted(30, np.random.default_rng(5))
    a, b = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[::-1])
    kept = []
    for number, source in enumerate((a, b)):
        build_shards([source], "bytes", tmp_path / str(number), near_duplicates=0.7)
        shards = open_shards(tmp_path / str(number))
        kept.append((set(texts_of(shards.train[:])), set(texts_of(shards.val[:]))))
    assert kept[0] == kept[1]


def test_a_corpus_without_near_duplicates_keeps_its_name(tmp_path: Path) -> None:
    """Looking and finding nothing gives the same shards, so the same data_id."""
    source = write(tmp_path / "a.jsonl", [" ".join(words(40)) for _ in range(50)])
    made = [build_shards([source], "bytes", tmp_path / str(t), near_duplicates=t) for t in (None, 0.8)]
    assert made[0].data_id == made[1].data_id


def test_without_the_package_it_is_one_sentence(tmp_path: Path, monkeypatch, capfd) -> None:
    source = write(tmp_path / "a.jsonl", ["one text", "another one"])
    monkeypatch.setitem(sys.modules, "rensa", None)
    argv = ["corpus", source, "--tokenizer", "bytes", "--out", str(tmp_path / "out")]
    assert cli.main([*argv, "--near-duplicates", "0.8"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "near_duplicates wants the package rensa" in err and "homelab_scaling[dedup]" in err
    assert not (tmp_path / "out").exists()
    assert cli.main(argv) == 0, "only those who ask for it need it"


def test_what_the_pages_call_it(tmp_path: Path, capfd) -> None:
    base = [" ".join(words(60)) for _ in range(20)]
    nearly = [f"{text} and one more" for text in base[:7]]
    source = write(tmp_path / "a.jsonl", base + nearly)
    argv = ["corpus", source, "--tokenizer", "bytes", "--out", str(tmp_path / "out"), "--near-duplicates", "0.8"]
    assert cli.main(argv) == 0
    assert "0 exact duplicates dropped, 7 near duplicates (Jaccard 0.8 or more)" in capfd.readouterr().out


def test_a_thousand_copies_are_compared_with_what_stays_only(tmp_path: Path, monkeypatch) -> None:
    """Large families are the rule on the web; comparing all pairs of one would never end."""
    base = words(80)
    texts = [" ".join([*base, str(i)]) for i in range(1000)]
    counts = []
    real = near_duplicates.jaccard
    monkeypatch.setattr(near_duplicates, "jaccard", lambda a, b: counts.append(1) or real(a, b))
    assert find(texts, tmp_path) == [False] + [True] * 999
    assert len(counts) == 999
    assert all(similarity(x, y) > 0.95 for x, y in pairwise(texts[:5]))
