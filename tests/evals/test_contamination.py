"""13-grams of evaluation documents in the training shards: planted shares, and naive sets of words."""

import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import corpus, model_on, portable

from homelab_scaling.data.shards import open_shards
from homelab_scaling.errors import DataError
from homelab_scaling.evals import contamination, ngrams
from homelab_scaling.evals.contamination import TrainingText, unknown_because
from homelab_scaling.evals.decode import Decoder
from homelab_scaling.evals.ngrams import Sought, WordStream, gram_hashes, word_hashes
from homelab_scaling.evals.results import Document, Outcome

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"]


def sentence(rng: random.Random, n: int) -> list[str]:
    return [rng.choice(VOCABULARY) for _ in range(n)]


def documents(*texts: str) -> list[Document]:
    return [Document(doc_id=str(i), text=text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def training() -> list[list[str]]:
    rng = random.Random(0)
    return [sentence(rng, rng.randrange(30, 200)) for _ in range(60)]


@pytest.fixture(scope="module")
def model(training: list[list[str]], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("contamination")
    return model_on(corpus(folder, [" ".join(words) for words in training], tokenizer="bpe:400", val_frac=0.05))


@pytest.fixture(scope="module")
def trained_on(model) -> list[list[str]]:
    """The training documents, in the order of the shards."""
    shards = open_shards(model.shards)
    text = shards.tokenizer().decode(shards.train[: len(shards.train)])
    return [part.split() for part in text.split("<|endoftext|>") if part]


# ---------------------------------------------------------------------------------------------------------- what counts


def test_planted_share(model, trained_on: list[list[str]]) -> None:
    """Every third document quotes 13 words in other case and with marks: those, and no others, are found."""
    rng = random.Random(1)
    texts = []
    for i in range(30):
        words = sentence(rng, 40)
        if i % 3 == 0:
            source = trained_on[i]
            at = rng.randrange(len(source) - 13)
            words[10:23] = [w.upper() + rng.choice([",", "!", "", " --"]) for w in source[at : at + 13]]
        texts.append(" ".join(words))
    found = TrainingText(model, cache=None).overlap(documents(*texts))
    assert [frac > 0 for frac in found.found_frac.values()] == [i % 3 == 0 for i in range(30)]
    assert found.overlap_frac == pytest.approx(1 / 3)
    assert found.found_frac["0"] == pytest.approx(1 / 28)
    assert found.unknown is None


def test_twelve_words_are_not_thirteen(model, trained_on: list[list[str]]) -> None:
    rng = random.Random(2)
    quoted = trained_on[3][5:17]
    found = TrainingText(model, cache=None).overlap(documents(" ".join(["xx", *quoted, "yy", *sentence(rng, 10)])))
    assert found.found_frac == {"0": 0.0}


def test_a_run_across_two_training_documents_does_not_count(model, trained_on: list[list[str]]) -> None:
    across = [*trained_on[4][-7:], *trained_on[5][:7]]
    found = TrainingText(model, cache=None).overlap(documents(" ".join(across), " ".join(trained_on[5][:14])))
    assert found.found_frac == {"0": 0.0, "1": 1.0}


def test_short_documents(model, trained_on: list[list[str]]) -> None:
    """8 to 12 words count in one run; fewer are unknown, and are counted."""
    words = trained_on[7]
    swapped = [*words[3:10], words[11], words[10]]
    texts = [" ".join(words[3:12]), " ".join(swapped), " ".join(words[3:10]), "", " ".join(words[0:8])]
    text = TrainingText(model, cache=None)
    found = text.overlap(documents(*texts))
    assert found.found_frac == {"0": 1.0, "1": 0.0, "4": 1.0}
    assert found.too_short == ("2", "3")
    assert found.unknown == "2 of 5 documents have fewer than 8 words"
    assert found.overlap_frac == pytest.approx(2 / 3)
    assert text.of(documents(*texts)) == {"0": True, "1": False, "2": None, "3": None, "4": True}
    outcomes = [Outcome(doc_id=str(i), value=1.0, n_tokens=1) for i in range(5)]
    assert [outcome.doc_id for outcome in found.clean(outcomes)] == ["1"]


def test_nothing_long_enough(model) -> None:
    found = TrainingText(model, cache=None).overlap(documents("a b", "c"))
    assert (found.overlap_frac, found.n_overlapping, found.mb_per_s) == (None, 0, None)


def test_long_documents_overlap_from_a_fifth_on(model, trained_on: list[list[str]]) -> None:
    """A phrase in common is nothing in a book; in a passage it is."""
    rng = random.Random(4)
    passages = [sentence(rng, n) for n in (480, 520, 520)]
    for words, n_quoted in zip(passages, (1, 1, 3), strict=True):
        for i in range(n_quoted):
            words[i * 60 : i * 60 + 50] = trained_on[i][:50] if len(trained_on[i]) >= 50 else trained_on[8 + i][:50]
    found = TrainingText(model, cache=None).overlap(documents(*map(" ".join, passages)))
    assert found.long == ("1", "2")
    assert 0 < found.found_frac["1"] < 0.2 < found.found_frac["2"] < 0.4
    assert found.by_document() == {"0": True, "1": False, "2": True}
    assert [o.doc_id for o in found.clean([Outcome(doc_id=str(i), value=1.0, n_tokens=1) for i in range(3)])] == ["1"]


def test_held_out_words_are_not_training_words(model) -> None:
    shards = open_shards(model.shards)
    text = shards.tokenizer().decode(shards.val[: len(shards.val)])
    held = [part for part in text.split("<|endoftext|>") if part]
    assert TrainingText(model, cache=None).overlap(documents(*held)).n_overlapping == 0


def test_code_counts_operators(tmp_path: Path) -> None:
    code = "def area(width, height):\n    return width * height + offset[0]\n"
    model = model_on(corpus(tmp_path, [code * 3, *(f"x_{i} = f(y)\n" * 20 for i in range(20))], val_frac=0.1))
    shards = open_shards(model.shards)
    assert "area" in shards.tokenizer().decode(shards.train[: len(shards.train)])
    other = code.replace("*", "-").replace("+", "/").replace("(", "[").replace(")", "]")
    found = TrainingText(model, cache=None).overlap(documents(code, other))
    assert found.words == "code"
    assert found.found_frac == {"0": 1.0, "1": 0.0}


# ----------------------------------------------------------------------------------------------------- once, and cached


def test_several_tasks_are_one_reading_and_the_second_time_none(
    model, trained_on: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [documents(" ".join(trained_on[i][:20])) for i in range(3)] + [documents("f(x)[0] = {y: z}; " * 5)]
    told: list[tuple[int, int]] = []
    said: list[str] = []
    text = TrainingText(
        model, cache=tmp_path / "evals", report=lambda done, total: told.append((done, total)), say=said.append
    )
    found = text.overlaps(tasks)
    n_tokens = len(open_shards(model.shards).train)
    assert set(told) == {(n_tokens, n_tokens)}
    assert len(told) == 2  # one piece, and the end
    assert said[0].startswith(f"training text: {n_tokens:,} tokens are read once")
    assert said[1].startswith("training text: 0 MB read in ")
    assert [f.n_overlapping for f in found] == [1, 1, 1, 0]
    assert len(list((tmp_path / "evals").glob("overlap-*.json"))) == 4

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(contamination, "_training_text", fail)
    assert TrainingText(model, cache=tmp_path / "evals").overlaps(tasks) == found
    with pytest.raises(AssertionError, match="read again"):
        TrainingText(model, cache=tmp_path / "evals").overlap(documents("another text " * 9))


def test_a_reading_that_is_stopped_leaves_nothing(model, trained_on: list[list[str]], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_done: int, _all: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        TrainingText(model, cache=tmp_path, report=stop).overlap(documents(" ".join(trained_on[0][:20])))
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_measured_again(model, trained_on: list[list[str]], tmp_path: Path) -> None:
    task = documents(" ".join(trained_on[0][:20]))
    first = TrainingText(model, cache=tmp_path).overlap(task)
    (path,) = tmp_path.glob("overlap-*.json")
    path.write_text('{"data_id": 3')
    again = TrainingText(model, cache=tmp_path).overlap(task)
    assert again.found_frac == first.found_frac
    assert TrainingText(model, cache=tmp_path).overlap(task) == again


def test_small_pieces_give_the_same(model, trained_on: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    texts = [" ".join([*sentence(rng, 9), *words[: rng.randrange(10, 40)], *sentence(rng, 9)]) for words in trained_on]
    whole = TrainingText(model, cache=None).overlap(documents(*texts))
    monkeypatch.setattr(contamination, "_TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(ngrams, "_BLOCK_CHARS", 64)
    pieces = TrainingText(model, cache=None).overlap(documents(*texts))
    assert pieces.found_frac == whole.found_frac
    assert 0 < whole.n_overlapping < len(texts)


def test_other_tokenizers_are_decoded_by_their_own_method(model, trained_on: list[list[str]]) -> None:
    """One that is not of bytes takes the slow way to the same answer."""
    text = TrainingText(model, cache=None)
    task = documents(" ".join(trained_on[0][:20]), "xx yy zz " * 9, " ".join([*trained_on[4][-7:], *trained_on[5][:7]]))
    fast = text.overlap(task)

    class Opaque:
        def __init__(self, inner) -> None:
            self.inner, self.n_calls = inner, 0

        def convert_ids_to_tokens(self, ids):
            return [f"▁{i}" for i in ids]

        def decode(self, ids, **settings):
            self.n_calls += 1
            return self.inner.decode(ids, **settings)

    opaque = Opaque(model.tokenizer)
    slow = TrainingText(replace(model, tokenizer=opaque), cache=None).overlap(task)
    assert opaque.n_calls > 50
    assert slow.found_frac == fast.found_frac == {"0": 1.0, "1": 0.0, "2": 0.0}


def test_foreign_models_are_unknown_with_a_reason(model, tmp_path: Path) -> None:
    assert unknown_because(model) is None
    assert unknown_because(portable()) == "nothing is known of the text this model was trained on"
    gone = replace(model, shards=tmp_path / "gone")
    assert "not there any more" in (unknown_because(gone) or "")
    with pytest.raises(DataError, match="not there any more"):
        TrainingText(gone, cache=None)


# --------------------------------------------------------------------------------------------------------------- hashes


def naive_words(text: str, language: str) -> list[str]:
    pattern = r"[^\W_]+" + (r"|[!-/:-@\[-^`{-~]" if language == "code" else "") + "|\0"
    return re.findall(pattern, text.casefold())


TEXTS = st.text(st.sampled_from("abAB ._=(\n\0\u00e9\u00df\u4e16\U0001f600-1"), max_size=300)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(TEXTS, st.sampled_from(["code", "prose"]), st.integers(1, 5), st.lists(st.integers(0, 300), max_size=6))
def test_hashes_are_equal_where_the_words_are(text: str, language, n: int, cuts: list[int]) -> None:
    """Against tuples of words, with the text in one piece and in several."""
    words = naive_words(text, language)
    hashes = word_hashes(text, language)
    assert len(hashes) == len(words)
    assert len({*hashes.tolist()}) == len({*words})
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    hashed = gram_hashes(hashes, n).tolist()
    assert len(hashed) == len(grams)
    assert len(set(zip(hashed, grams, strict=True))) == len(set(hashed)) == len(set(grams))
    stream = WordStream(language, n)
    borders = [0, *sorted(cuts), len(text)]
    fed = [stream.feed(text[a:b]) for a, b in pairwise(borders)]
    seen = {gram for part in [*fed, stream.end()] for gram in gram_hashes(part, n).tolist()}
    assert seen == set(hashed)


def test_long_words_and_long_texts() -> None:
    """Longer than the blocks of prefix sums, the same words at any place have the same hash."""
    text = "alpha beta " * 60_000 + "x" * 600_000 + " alpha beta"
    hashes = word_hashes(text, "prose")
    assert set(hashes[:120_000:2].tolist()) == {int(hashes[-2])}
    assert len({*gram_hashes(hashes[:120_000], 13).tolist()}) == 2


def test_sought() -> None:
    rng = np.random.default_rng(0)
    grams = rng.integers(0, 2**63, 1000, dtype=np.uint64)
    sought = Sought(grams)
    sought.look(np.concatenate([grams[:300], rng.integers(0, 2**63, 100_000, dtype=np.uint64)]))
    sought.look(np.empty(0, np.uint64))
    assert sought.n_seen(grams) == 300
    assert sought.n_seen(grams[300:]) == 0
    Sought(np.empty(0, np.uint64)).look(grams)


def test_decoder_is_exact(model) -> None:
    shards = open_shards(model.shards)
    ids = shards.train[: len(shards.train)]
    decoder = Decoder(model.tokenizer, model.n_vocab)
    assert decoder.exact
    assert decoder.to_bytes(ids).decode("utf-8", errors="replace") == shards.tokenizer().decode(ids)
    assert decoder.to_bytes(ids[:0]) == b""
