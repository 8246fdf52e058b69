"""Round trips, determinism, and the tokenizers that cannot be had."""

import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.data.tokenizers import (
    EOT,
    BytesTokenizer,
    FileTokenizer,
    Tokenizer,
    bpe_size,
    load_tokenizer,
    train_bpe,
)
from homelab_scaling.errors import DataError, MachineError

props = settings(derandomize=True, deadline=None, max_examples=150)
no_surrogates = st.text(st.characters(exclude_categories=["Cs"]))
SOURCE = Path(os.__file__).read_text(encoding="utf-8")
BPE = train_bpe("bpe:400", [SOURCE])


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), BPE], ids=["bytes", "bpe"])
@props
@given(texts=st.lists(st.one_of(no_surrogates, st.text("ab \n\t<|>endoftx", max_size=60)), max_size=4))
def test_decode_undoes_encode(tokenizer: Tokenizer, texts: list[str]) -> None:
    texts = [*texts, f"a{EOT}b", " ", "\r\n\0"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint32
        assert tokenizer.eot_id not in ids  # a text that spells the marker does not end
        assert ids.size == 0 or ids.max() < tokenizer.n_vocab
        assert tokenizer.decode(ids) == text


def test_facts() -> None:
    assert (BytesTokenizer().n_vocab, BytesTokenizer().eot_id) == (257, 256)
    assert BPE.n_vocab == 400 and 0 <= BPE.eot_id < 400
    assert BytesTokenizer().decode([104, 105, 256, 33]) == f"hi{EOT}!"
    assert BPE.decode([BPE.eot_id]) == EOT
    n_bytes, n_tokens = len(SOURCE.encode()), len(BPE.encode_batch([SOURCE])[0])
    assert 1.3 < n_bytes / n_tokens < 5  # it learnt something


def test_the_same_text_gives_the_same_merges_in_another_process_with_other_threads() -> None:
    code = (
        "import os, pathlib; from homelab_scaling.data.tokenizers import train_bpe;"
        "print(train_bpe('bpe:400', [pathlib.Path(os.__file__).read_text(encoding='utf-8')]).hash)"
    )
    for threads in ("1", "3"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.strip() == BPE.hash


def test_a_saved_or_pickled_tokenizer_is_the_same(tmp_path: Path) -> None:
    assert BPE.save(tmp_path / "tokenizer.json") and not BytesTokenizer().save(tmp_path / "x.json")
    for other in (
        load_tokenizer(str(tmp_path / "tokenizer.json")),
        load_tokenizer(str(tmp_path)),
        pickle.loads(pickle.dumps(BPE)),
    ):
        assert (other.hash, other.n_vocab, other.eot_id) == (BPE.hash, BPE.n_vocab, BPE.eot_id)
        assert np.array_equal(other.encode_batch([SOURCE])[0], BPE.encode_batch([SOURCE])[0])
    assert train_bpe("bpe:399", [SOURCE]).hash != BPE.hash


def test_settings_that_would_change_texts_are_ignored() -> None:
    """A published tokenizer.json may truncate, pad, or add a beginning-of-text id; a corpus wants none of it."""
    plain = json.loads(BPE.to_json())
    plain["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    plain["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {EOT: {"id": EOT, "ids": [BPE.eot_id], "tokens": [EOT]}},
    }
    odd = FileTokenizer("odd", json.dumps(plain))
    assert np.array_equal(odd.encode_batch([SOURCE])[0], BPE.encode_batch([SOURCE])[0])


@pytest.mark.parametrize("asked", ["bpe:", "bpe:257", "bpe:-300", "bpe:4k", "bpe:1e4", "bpe:2000000"])
def test_sizes_that_make_no_tokenizer(asked: str) -> None:
    with pytest.raises(DataError, match="wants bpe:N"):
        bpe_size(asked)


def test_too_little_text_says_what_it_would_do_for() -> None:
    with pytest.raises(DataError, match=r"yields only 2\d\d ids; ask for bpe:2\d\d or less"):
        train_bpe("bpe:1000", ["hello hello hello"])


@pytest.mark.parametrize("asked", ["gpt5", "nowhere/tokenizer.json", "bpe:1000"])
def test_unknown_tokenizers(asked: str) -> None:
    with pytest.raises(DataError, match="no such tokenizer or file; wants `bytes`"):
        load_tokenizer(asked)


def test_damaged_tokenizer_files(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content, said in ((b"{}", "not a tokenizer.json"), (b"\xff", "cannot be read as UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_tokenizer(str(path))
    path.write_text(BPE.to_json().replace(EOT, "<|start|>"))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(str(path))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache on a machine that may not use the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_gpt2_without_cache_and_network_is_one_sentence(hub_cache: Path) -> None:
    with pytest.raises(MachineError, match=r"HF_HUB_OFFLINE is set.*set HF_HOME"):
        load_tokenizer("gpt2")


def test_gpt2_comes_from_the_cache(hub_cache: Path) -> None:
    """A stand-in with GPT-2's size in the cache's layout; a smaller one is not taken for GPT-2."""
    snapshot = hub_cache / "models--openai-community--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").write_text(BPE.to_json())
    with pytest.raises(DataError, match="gpt2 has 50257 ids"):
        load_tokenizer("gpt2")
    (snapshot / "tokenizer.json").write_text(_engine([bytes([b]) for b in range(256)], 50_257).to_str())
    tokenizer = load_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_id) == ("gpt2", 50257, 50256)
    assert tokenizer.decode(tokenizer.encode_batch(["héllo\n"])[0]) == "héllo\n"


def test_real_gpt2_merges() -> None:
    """GPT-2's published ids for known strings, from the ranks that the mlx-whisper package carries."""
    import base64
    import importlib.util

    spec = importlib.util.find_spec("mlx_whisper")
    if spec is None or spec.origin is None:
        pytest.skip("mlx-whisper, which carries GPT-2's ranks, is not installed")
    lines = (Path(spec.origin).parent / "assets" / "gpt2.tiktoken").read_text().split("\n")
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
    tokens = sorted(ranks, key=ranks.__getitem__)
    tokenizer = FileTokenizer("gpt2", _engine(tokens, len(tokens) + 1).to_str())
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (50257, 50256)
    # Source: openai/gpt-2's encoder; the first two are in the tests of tiktoken and transformers.
    assert tokenizer.encode_batch(["hello world"])[0].tolist() == [31373, 995]
    assert tokenizer.encode_batch(["Hello, my dog is cute"])[0].tolist() == [15496, 11, 616, 3290, 318, 13779]
    assert tokenizer.decode(tokenizer.encode_batch([SOURCE])[0]) == SOURCE


def _engine(tokens: list[bytes], n_vocab: int):
    """A byte-level BPE from tiktoken ranks: a token's merge is the last one that its own BPE would make."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printable = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    rest = (b for b in range(256) if b not in printable)
    as_char = printable | {b: chr(256 + i) for i, b in enumerate(rest)}
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token: bytes) -> str:
        return "".join(as_char[b] for b in token)

    merges = []
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts))]
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((spell(parts[0]), spell(parts[1])))
    vocab = {spell(token): rank for token, rank in ranks.items()}
    vocab |= {f"unused {i}": i for i in range(len(tokens), n_vocab - 1)} | {EOT: n_vocab - 1}
    engine = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([EOT])
    return engine
