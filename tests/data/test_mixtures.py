"""Weights, epochs and their table: shares as asked, nothing held out trained on, old corpora as they were."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import cli, codec
from homelab_scaling.data import build, encode, shares
from homelab_scaling.data.batches import BatchOrder, n_windows, read_windows
from homelab_scaling.data.files import Document
from homelab_scaling.data.mixture import Wish, copies
from homelab_scaling.data.shards import build_shards, open_shards
from homelab_scaling.data.survey import DROPPED, TRAIN, VAL, choose, read_survey
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.ladder import DataTable
from homelab_scaling.specs import CorpusManifest, ShardFile, SourceShare, Split

PROSE = [f"Chapter {i}. " + f"the {i} cats sat on the {i * 7} mats. " * (5 + i % 9) for i in range(120)]
LOUD = [text.upper() for text in PROSE[:40]] + PROSE[:5]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """45 kB of prose, and a third of that in capitals; five documents of the second are in the first."""
    return [write(tmp_path / "a.jsonl", PROSE), write(tmp_path / "b.jsonl", LOUD)]


def documents(tokens: np.ndarray) -> Counter[bytes]:
    """How often each document stands in a stream of bytes tokens."""
    ends = np.flatnonzero(tokens == 256)
    return Counter(part[part < 256].astype(np.uint8).tobytes() for part in np.split(tokens, ends + 1)[:-1])


LONGEST = max(len(text) for text in PROSE)
MIXTURES = [
    {"weights": (0.7, 0.3)},
    {"weights": (1, 9)},
    {"weights": (50, 50), "max_bytes": 80_000},
    {"weights": (0.9, 0.1), "max_bytes": 20_000},
    {"epochs": (1, 2.5)},
    {"epochs": (0.5, 7)},
    {"epochs": (2, 4), "max_bytes": 30_000},
]


@pytest.mark.parametrize("asked", MIXTURES, ids=str)
def test_shares_and_epochs_are_exact_within_a_document(two: list[str], tmp_path: Path, asked: dict) -> None:
    manifest = build_shards(two, "bytes", tmp_path / "out", val_frac=0.1, **asked)
    n_bytes = [share.n_bytes for share in manifest.mixture]
    assert sum(n_bytes) == manifest.train.n_bytes and manifest.train.n_documents is not None
    if "weights" in asked:
        want = np.array(asked["weights"]) / sum(asked["weights"])
        assert [share.weight for share in manifest.mixture] == pytest.approx(want.tolist())
        whole = [share.epochs == 1 for share in manifest.mixture].index(True) if "max_bytes" not in asked else 0
        total = 0.9 * asked["max_bytes"] if "max_bytes" in asked else n_bytes[whole] / want[whole]
        assert np.abs(np.array(n_bytes) - want * total).max() <= LONGEST
        if "max_bytes" not in asked:  # the largest corpus in which nothing is repeated
            assert max(share.epochs for share in manifest.mixture) == 1
    elif "max_bytes" not in asked:
        for share, epochs in zip(manifest.mixture, asked["epochs"], strict=True):
            assert 0 <= epochs - share.epochs <= LONGEST / (share.n_bytes / share.epochs)
    if "max_bytes" in asked:
        assert sum(n_bytes) <= 0.9 * asked["max_bytes"]


@pytest.mark.parametrize("asked", MIXTURES, ids=str)
def test_the_table_is_what_lies_in_the_shards(two: list[str], tmp_path: Path, asked: dict) -> None:
    manifest = build_shards(two, "bytes", tmp_path / "out", val_frac=0.1, **asked)
    shards = open_shards(tmp_path / "out", verify=True)
    trained, held_out = documents(shards.train[:]), documents(shards.val[:])
    assert not set(trained) & set(held_out), "text is held out or trained on, not both"
    assert set(held_out.values()) == {1}
    assert sum(trained.values()) == manifest.train.n_documents
    sources = [{text.encode() for text in PROSE}, {text.upper().encode() for text in PROSE[:40]}]
    for share, texts in zip(manifest.mixture, sources, strict=True):
        mine = {text: n for text, n in trained.items() if text in texts}
        assert share.n_documents == len(mine)
        assert share.n_bytes == sum(n * len(text) for text, n in mine.items())
        assert share.n_tokens == sum(n * (len(text) + 1) for text, n in mine.items())
        assert share.n_tokens_unique == sum(len(text) + 1 for text in mine)
        assert share.n_val_documents == sum(text in texts for text in held_out)
        assert max(mine.values()) - min(mine.values()) <= 1, "whole passes, and a part of one more"
    assert manifest.n_tokens_unique == sum(len(text) + 1 for text in trained)
    assert [share.n_exact_duplicates for share in manifest.mixture] == [0, 5]


def test_copies_of_a_document_lie_a_pass_apart(two: list[str], tmp_path: Path) -> None:
    """Two copies in one window would teach copying; a pass over everything that is repeated lies between them."""
    build_shards(two, "bytes", tmp_path / "out", epochs=(3, 3))
    stream = open_shards(tmp_path / "out").train[:]
    assert len(stream) % 3 == 0
    first, second, third = np.split(stream, 3)
    assert np.array_equal(first, second) and np.array_equal(first, third)
    assert set(documents(first).values()) == {1}


def test_every_stretch_of_training_has_the_shares(tmp_path: Path) -> None:
    """Sources lie one after the other in the file; training visits windows in an order over all of it."""
    sources = [
        write(tmp_path / f"{c}.jsonl", [f"{c * 8}{i:05d}" * 12 for i in range(n)]) for c, n in (("a", 900), ("b", 300))
    ]
    manifest = build_shards(sources, "bytes", tmp_path / "out", epochs=(1, 3))
    stream = open_shards(tmp_path / "out").train
    order = BatchOrder(n_windows(len(stream), 64), seed=3)
    for first in range(0, 1600, 400):
        windows = read_windows(stream, order.windows(first, 400), 64)[:, :-1]
        share = np.count_nonzero(windows == ord("b")) / np.count_nonzero((windows == ord("a")) | (windows == ord("b")))
        assert share == pytest.approx(manifest.mixture[1].n_bytes / manifest.train.n_bytes, abs=0.1)


def test_the_held_out_half_has_the_shares_of_the_mixture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [f"{i} " + "word " * int(n) for i, n in enumerate(rng.integers(5, 50, 12_000))]
    sources = [write(tmp_path / "a.jsonl", texts[:10_000]), write(tmp_path / "b.jsonl", texts[10_000:])]
    manifest = build_shards(sources, "bytes", tmp_path / "out", val_frac=0.05, weights=(0.4, 0.6), max_bytes=1_300_000)
    a, b = manifest.mixture
    assert b.epochs > 2.5 and a.epochs < 0.4
    held_out = b.n_val_tokens / (a.n_val_tokens + b.n_val_tokens)
    assert held_out == pytest.approx(0.6, abs=0.05)
    assert manifest.val.n_tokens / (manifest.val.n_tokens + manifest.train.n_tokens) == pytest.approx(0.05, abs=0.005)


def test_a_larger_part_holds_out_what_a_smaller_one_did(two: list[str], tmp_path: Path) -> None:
    held = []
    for number, epochs in enumerate((0.5, 1.0, 4.0)):
        build_shards(two, "bytes", tmp_path / str(number), val_frac=0.2, epochs=(1, epochs))
        held.append(set(documents(open_shards(tmp_path / str(number)).val[:])))
    assert held[0] <= held[1] <= held[2] and len(held[0]) < len(held[2])


def test_workers_do_not_change_a_mixture(two: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode, "MIN_BYTES_FOR_WORKERS", 0)
    monkeypatch.setattr(build, "BATCH_BYTES", 2000)
    made = [
        build_shards(two, "bpe:300", tmp_path / str(n), n_workers=n, weights=(1, 2), max_bytes=60_000) for n in (1, 2)
    ]
    assert made[0] == made[1]


def test_two_streams_from_the_hub_are_mixed_by_their_parts(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("web", "books"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [f"{name} {i} " + "word " * 20 for i in range(2000)])
    asked = [f"hf:{tmp_path}/{name}" for name in ("web", "books")]
    told: list[build.Progress] = []
    options = {"weights": (0.75, 0.25), "max_bytes": 40_000, "val_frac": 0.1}
    manifest = build_shards(asked, "bytes", tmp_path / "out", progress=told.append, **options)
    web, books = manifest.mixture
    assert (web.weight, books.weight) == (0.75, 0.25)
    assert web.n_bytes / (web.n_bytes + books.n_bytes) == pytest.approx(0.75, abs=0.005)
    trained = documents(open_shards(tmp_path / "out").train[:])
    assert {text.split()[0] for text in trained} == {b"web", b"books"} and set(trained.values()) == {1}
    assert manifest.train.n_bytes > 0.97 * 36_000
    limits = Wish(names=tuple(asked), weights=(3, 1)).limits_bytes(40_000, 0.1)
    assert limits == [41_666, 13_888], "no more of a stream is copied than its part needs"
    assert Wish(names=tuple(asked)).limits_bytes(40_000, 0.1) == [40_000] * 2


@pytest.mark.parametrize("stage", ["comparing documents", "repeating"])
def test_an_interrupted_mixture_leaves_nothing(two: list[str], tmp_path: Path, stage: str) -> None:
    def interrupt(progress: build.Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    options = {"epochs": (1, 3), "near_duplicates": None if stage == "repeating" else 0.8}
    if stage != "repeating":
        pytest.importorskip("rensa")
    with pytest.raises(KeyboardInterrupt):
        build_shards(two, "bytes", tmp_path / "out", progress=interrupt, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert build_shards(two, "bytes", tmp_path / "out", **options).mixture[1].epochs == 3


def test_weights_are_of_any_unit(two: list[str], tmp_path: Path) -> None:
    shares_of = [build_shards(two, "bytes", tmp_path / str(w), weights=(w, 3 * w)).mixture for w in (0.25, 25.0)]
    assert shares_of[0] == shares_of[1]


@settings(derandomize=True, deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=40), epochs=st.floats(0.01, 20))
def test_copies_fill_the_epochs_and_never_exceed_them(sizes: list[int], epochs: float) -> None:
    each = np.array(sizes)
    found = copies(epochs, each)
    assert (np.diff(found) <= 0).all() and found.max() - found.min() <= 1
    short_by = epochs * each.sum() - (found * each).sum()
    assert -1e-6 * each.sum() <= short_by <= each.max()
    assert (copies(float(round(epochs) or 1), each) == (round(epochs) or 1)).all()


def test_groups_are_held_out_whole_in_a_mixture_too() -> None:
    rng = np.random.default_rng(1)
    grouped = [
        Document(text=f"{i} " * int(n), name="", group=f"g{i % 60}") for i, n in enumerate(rng.integers(1, 90, 900))
    ]
    single = [Document(text=f"alone {i} " * 9, name="") for i in range(900)]
    survey = read_survey([grouped, single], lambda _: None)
    choice = choose(survey, val_frac=0.05, max_bytes=None, wish=Wish(names=("a", "b"), epochs=(0.5, 2)))
    by_group: dict[int, set[int]] = {}
    for group, part in zip(survey.groups.tolist(), choice.part.tolist(), strict=True):
        if group >= 0 and part != DROPPED:
            by_group.setdefault(group, set()).add(part)
    assert {frozenset(parts) for parts in by_group.values()} == {frozenset({TRAIN}), frozenset({VAL})}
    assert (choice.part[900:] == VAL).any()


# ------------------------------------------------------------------------------------------------ what was there before

GOLDEN = {
    ("bytes", None): ("395f32d9216f", 46675, 2027),
    ("bytes", 30_000): ("b3abc1db5f03", 28674, 1215),
    ("bpe:300", None): ("f5ee145d30ee", 16982, 724),
    ("bpe:300", 30_000): ("6b99c882967e", 10449, 431),
}
"""data_id and tokens of both halves, made at e2e9560, before there were mixtures."""


@pytest.mark.parametrize(("tokenizer", "max_bytes"), GOLDEN)
def test_a_plain_request_gives_the_shards_it_always_gave(two: list[str], tmp_path: Path, tokenizer, max_bytes) -> None:
    m = build_shards(two, tokenizer, tmp_path / "out", max_bytes=max_bytes, val_frac=0.05)
    assert (m.data_id, m.train.n_tokens, m.val.n_tokens) == GOLDEN[tokenizer, max_bytes]
    assert m.n_tokens_unique == m.train.n_tokens and m.unique_tokens(1000) == 1000
    assert all(share.weight is None and share.epochs_asked is None for share in m.mixture)


def test_shards_from_before_mixtures_are_opened_and_used_again(two: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    new = build_shards(two, "bytes", out)
    manifest, record = (json.loads((out / name).read_text()) for name in ("manifest.json", "build.json"))
    del manifest["mixture"], manifest["near_duplicates"]
    for key in ("weights", "epochs", "near_duplicates"):
        del record["request"][key]
    assert record["request"]["rules"] == 1, "another number throws away every corpus there is"
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "build.json").write_text(json.dumps(record))
    before = (out / "train.bin").stat().st_mtime_ns
    old = build_shards(two, "bytes", out)
    assert old == dataclasses.replace(new, mixture=()) and old.data_id == new.data_id
    assert (out / "train.bin").stat().st_mtime_ns == before
    assert old.n_tokens_unique == old.train.n_tokens and old.unique_tokens(10**9) == old.train.n_tokens
    with pytest.raises(DataError, match=r"weights is \[\], asked for \[1.0, 1.0\]"):
        build_shards(two, "bytes", out, weights=(1, 1))


# -------------------------------------------------------------------------------------------------------- unique tokens


def manifest_of(*shares_: tuple[int, int]) -> CorpusManifest:
    """A manifest whose sources have (tokens, different tokens)."""
    rows = tuple(
        SourceShare(
            name=f"s{i}",
            epochs=n / unique,
            n_documents=1,
            n_bytes=n,
            n_tokens=n,
            n_tokens_unique=unique,
            n_val_documents=1,
            n_val_tokens=9,
            n_exact_duplicates=0,
        )
        for i, (n, unique) in enumerate(shares_)
    )
    total = sum(n for n, _ in shares_)
    split = Split(
        files=(ShardFile(name="t", n_tokens=total, sha256="x"),), n_tokens=total, n_bytes=None, n_documents=None
    )
    return CorpusManifest(
        tokenizer="bytes",
        tokenizer_file=None,
        tokenizer_hash="x",
        n_vocab=257,
        eot_id=256,
        dtype="uint16",
        train=split,
        val=split,
        sources=("s0",),
        held_out_rule="",
        mixture=rows,
    )


def test_unique_tokens_are_those_a_random_order_meets() -> None:
    """Against windows drawn at random: 600 windows once, 100 windows three times and half of them a fourth time."""
    manifest = manifest_of((600, 600), (350, 100))
    windows = np.r_[np.arange(600), np.tile(600 + np.arange(100), 3), 600 + np.arange(50)]
    rng = np.random.default_rng(0)
    for n in (1, 95, 475, 900, 949, 950, 2000):
        draws = [len(set(rng.permutation(windows)[:n].tolist())) for _ in range(300)]
        assert manifest.unique_tokens(n) == pytest.approx(np.mean(draws), abs=3)
    assert manifest.unique_tokens(950) == manifest.n_tokens_unique == 700


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    parts=st.lists(st.tuples(st.integers(1, 10**12), st.floats(1, 9)), min_size=1, max_size=4),
    n=st.integers(1, 10**13),
)
def test_unique_tokens_are_never_more_than_there_are(parts: list[tuple[int, float]], n: int) -> None:
    manifest = manifest_of(*((int(unique * epochs), unique) for unique, epochs in parts))
    found = manifest.unique_tokens(n)
    assert 0 < found <= min(n, manifest.n_tokens_unique)
    if manifest.n_tokens_unique == manifest.train.n_tokens:
        assert found == min(n, manifest.train.n_tokens)


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = [
    ("--weights 0.7", "weights = [0.7], wants one number for each of the 2 sources"),
    ("--epochs 1 2 3", "epochs = [1.0, 2.0, 3.0], wants one number for each of the 2 sources"),
    ("--weights 1 1 --epochs 1 1", "found both weights and epochs; give one of them"),
    ("--weights 1 -1", "weights = [1.0, -1.0], wants positive numbers"),
    ("--weights 0 0", "weights = [0.0, 0.0], wants positive numbers"),
    ("--epochs 1 nan", "epochs = [1.0, nan], wants positive numbers"),
    ("--epochs 1 inf", "epochs = [1.0, inf], wants positive numbers"),
    ("--weights 1 9 --max-bytes 900000", "b.jsonl: 137% of its 11,797 bytes would be held out"),
    ("--epochs 1 1000", "b.jsonl: 95% of its 11,797 bytes would be held out"),
    ("--weights 1 200", "a.jsonl: its part of the mixture is smaller than its first document"),
    ("--near-duplicates 0", "near_duplicates = 0.0, wants a Jaccard similarity above 0"),
    ("--near-duplicates 1.01", "near_duplicates = 1.01, wants a Jaccard"),
    ("--near-duplicates nan", "near_duplicates = nan, wants a Jaccard"),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=[flags for flags, _said in BAD])
def test_bad_mixtures_are_one_sentence_and_no_trace(
    two: list[str], tmp_path: Path, capfd, flags: str, said: str
) -> None:
    argv = ["corpus", *two, "--tokenizer", "bytes", "--out", str(tmp_path / "new"), *flags.split()]
    assert cli.main(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_source_whose_text_is_all_in_another_one(two: list[str], tmp_path: Path) -> None:
    copy = write(tmp_path / "c.jsonl", PROSE[:9])
    with pytest.raises(DataError, match=r"c\.jsonl: no text of its own is left"):
        build_shards([two[0], copy], "bytes", tmp_path / "new", weights=(1, 1))
    assert build_shards([two[0], copy], "bytes", tmp_path / "new").mixture[1].n_exact_duplicates == 9


def test_token_files_cannot_be_mixed(tmp_path: Path) -> None:
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
    for asked in ({"weights": (1,)}, {"epochs": (2,)}, {"near_duplicates": 0.8}):
        with pytest.raises(DataError, match="weights, epochs and near_duplicates are for text"):
            build_shards([str(tmp_path)], "gpt2", tmp_path / "out", **asked)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"sources": ["a", "b"], "weights": [1]}, r"data.weights = \[1.0\], wants one number for each of the 2"),
        ({"sources": ["a"], "epochs": [-2.0]}, r"data.epochs = \[-2.0\], wants positive"),
        ({"sources": ["a"], "epochs": [1], "weights": [1]}, "found both data.weights and data.epochs"),
        ({"near_duplicates": 8}, "data.near_duplicates = 8.0, wants a Jaccard"),
        ({"shards": "x", "epochs": [2]}, "data.shards names finished shards"),
        ({"weights": ["much"]}, "wants a number"),
    ],
)
def test_the_ladders_table_refuses_the_same(table: dict, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        codec.from_plain(table, DataTable, "x.toml")


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_says_what_the_manifest_says(two: list[str], tmp_path: Path, capfd) -> None:
    argv = ["corpus", *two, "--tokenizer", "bytes", "--out", str(tmp_path / "out"), "--epochs", "1", "6"]
    assert cli.main(argv) == 0
    printed = capfd.readouterr().out
    manifest = open_shards(tmp_path / "out").manifest
    for share in manifest.mixture:
        for said in (f"{share.n_documents:,}", f"{share.n_bytes:,}", f"{share.epochs:.2f}", f"{share.n_tokens:,}"):
            assert said in printed
    assert "1 epoch " in printed and "6 epochs" in printed and "5 exact duplicates dropped" in printed
    assert "near duplicates not looked for" in printed
    assert "b.jsonl is read 6.0 times" in printed
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["mixture"][1]["epochs_asked"] == 6
    for row in shares.rows(manifest):
        assert len(row) == len(shares.HEAD)


def test_one_source_read_once_needs_no_table(two: list[str], tmp_path: Path, capfd) -> None:
    assert cli.main(["corpus", two[0], "--tokenizer", "bytes", "--out", str(tmp_path / "out")]) == 0
    assert "by source" not in capfd.readouterr().out


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert shares.short_names(("/data/web/a.txt", "/data/code/a.txt", "python", "hf:allenai/c4:en")) == [
        "web/a.txt",
        "code/a.txt",
        "python",
        "hf:allenai/c4:en",
    ]
    assert shares.short_names(("/x/web/", "/x/code")) == ["web", "code"]
    assert shares.short_names(("a", "a")) == ["a", "a"]
