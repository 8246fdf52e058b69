"""nanoGPT's and llm.c's token files: read in place, facts told by flag, torn files refused."""

from pathlib import Path

import numpy as np
import pytest

from homelab_scaling.data.shards import build_shards, open_shards
from homelab_scaling.data.tokenizers import train_bpe
from homelab_scaling.errors import DataError

TRAIN, VAL = np.arange(1000, dtype=np.uint16) % 300, np.arange(77, dtype=np.uint16)


def nanogpt(folder: Path) -> Path:
    folder.mkdir()
    TRAIN.tofile(folder / "train.bin")
    VAL.tofile(folder / "val.bin")
    return folder


def llmc(path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, n_tokens: int | None = None) -> None:
    """As karpathy/llm.c's dev/data/data_common.py writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if n_tokens is None else n_tokens
    path.write_bytes(header.tobytes() + tokens.tobytes())


def fineweb(folder: Path) -> Path:
    folder.mkdir()
    llmc(folder / "fineweb_train_000001.bin", TRAIN[:600])
    llmc(folder / "fineweb_train_000002.bin", TRAIN[600:])
    llmc(folder / "fineweb_val_000000.bin", VAL)
    return folder


@pytest.mark.parametrize("make", [nanogpt, fineweb])
def test_both_kinds_are_read_whole_and_in_order(tmp_path: Path, make) -> None:
    shards = open_shards(make(tmp_path / "bins"), tokenizer="gpt2", verify=True)
    assert np.array_equal(shards.train[:], TRAIN) and np.array_equal(shards.val[:], VAL)
    assert np.array_equal(shards.train[590:610], TRAIN[590:610])
    manifest = shards.manifest
    assert (manifest.n_vocab, manifest.eot_id, manifest.dtype) == (50257, 50256, "uint16")
    assert (manifest.train.n_tokens, manifest.val.n_tokens, manifest.train.n_bytes) == (1000, 77, None)


def test_llama_files_of_llmc_have_wider_tokens(tmp_path: Path) -> None:
    tokens = np.array([100_000, 5, 128_000], dtype=np.uint32)
    for half in ("train", "val"):
        llmc(tmp_path / f"{half}.bin", tokens, magic=20240801, version=7)
    shards = open_shards(tmp_path, tokenizer="llama3", n_vocab=128_256, eot_id=128_001)
    assert shards.train[:].tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "add --tokenizer, --n-vocab, --eot-id"),
        ({"tokenizer": "mine"}, "add --n-vocab, --eot-id"),
        ({"tokenizer": "mine", "n_vocab": 300}, r"add --eot-id \("),
        ({"n_vocab": 300, "eot_id": 0}, r"add --tokenizer \("),
        ({"tokenizer": "mine", "n_vocab": 300, "eot_id": 300}, "n_vocab 300 and eot_id 300 do not fit"),
        (
            {"tokenizer": "mine", "n_vocab": 299, "eot_id": "none"},
            r"train.bin: token 299 is 299, but the vocabulary has",
        ),
    ],
)
def test_missing_and_wrong_facts(tmp_path: Path, facts: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        open_shards(nanogpt(tmp_path / "bins"), **facts)


def test_a_corpus_without_an_end_of_text(tmp_path: Path) -> None:
    shards = open_shards(nanogpt(tmp_path / "bins"), tokenizer="mine", n_vocab=300, eot_id="none")
    assert shards.manifest.eot_id is None


def damage_odd(folder: Path) -> None:
    with (folder / "fineweb_train_000002.bin").open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_odd, "000002.bin: the header says 400 tokens, the file holds 400; it is torn"),
        (
            lambda f: llmc(f / "fineweb_val_000000.bin", VAL, n_tokens=78),
            "the header says 78 tokens, the file holds 77",
        ),
        (lambda f: llmc(f / "fineweb_val_000000.bin", VAL, version=2), "llm.c header version 2, wants 1"),
        (lambda f: VAL.tofile(f / "fineweb_val_000000.bin"), "of different kinds"),
        (lambda f: (f / "fineweb_val_000000.bin").unlink(), r"no \*val\*.bin"),
    ],
)
def test_torn_and_mixed_files(tmp_path: Path, damage, said: str) -> None:
    folder = fineweb(tmp_path / "bins")
    damage(folder)
    with pytest.raises(DataError, match=said):
        open_shards(folder, tokenizer="gpt2")


@pytest.mark.parametrize("size", [0, 1, 153])
def test_torn_bare_files(tmp_path: Path, size: int) -> None:
    folder = nanogpt(tmp_path / "bins")
    (folder / "val.bin").write_bytes(b"\0" * size)
    with pytest.raises(DataError, match=f"val.bin: {size} bytes are not a whole number of uint16 tokens"):
        open_shards(folder, tokenizer="gpt2")


def test_taking_over_links_the_files_and_writes_the_manifest_beside_the_links(tmp_path: Path) -> None:
    bins, out = fineweb(tmp_path / "bins"), tmp_path / "out"
    before = {p.name: p.read_bytes() for p in bins.iterdir()}
    manifest = build_shards([str(bins)], "gpt2", out)
    shards = open_shards(out, verify=True)
    assert shards.manifest == manifest and np.array_equal(shards.train[:], TRAIN)
    assert {p.name: p.read_bytes() for p in bins.iterdir()} == before
    assert build_shards([str(bins)], "gpt2", out) == manifest
    assert manifest.data_id == open_shards(bins, tokenizer="gpt2").manifest.data_id
    with pytest.raises(DataError, match="already holds shards with a manifest"):
        build_shards([str(out)], "gpt2", tmp_path / "again")


def test_taking_over_with_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizer = train_bpe(
        "bpe:300", ["the cat sat on the mat and the rat sat on the cat. " * 4, Path(__file__).read_text()]
    )
    tokenizer.save(tmp_path / "tokenizer.json")
    manifest = build_shards([str(nanogpt(tmp_path / "bins"))], str(tmp_path / "tokenizer.json"), tmp_path / "out")
    assert (manifest.n_vocab, manifest.eot_id, manifest.tokenizer_hash) == (300, tokenizer.eot_id, tokenizer.hash)
    assert open_shards(tmp_path / "out").tokenizer().hash == tokenizer.hash
