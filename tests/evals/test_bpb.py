"""Bits per byte against its definition and lm-evaluation-harness, over shards and text files, and in other units."""

import json
import math
import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import corpus, model_on, portable

from homelab_scaling.data.shards import open_shards
from homelab_scaling.errors import DataError
from homelab_scaling.evals.bpb import (
    BitsPerByte,
    bits_per_byte_to_nats_per_token,
    ids_of,
    nats_per_token,
    nats_per_token_to_bits_per_byte,
    prefix_id,
)
from homelab_scaling.evals.intervals import bits_per_byte
from homelab_scaling.evals.results import Outcome
from homelab_scaling.evals.texts import held_out

CONTEXT = 32
PASSAGE = "the a of to and house river old stone walks sings under über naïve 世界 (x) = y_1; return"
WORDS = PASSAGE.split()


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randrange(3, 60))) + f" {i}.\n" for i in range(n)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("bpb"), texts(60), tokenizer="bpe:300")


@pytest.fixture(scope="module")
def model(shards: Path):
    return model_on(shards, context=CONTEXT)


def by_definition(model, text: str) -> float:
    """Nats of a text in disjoint windows of the context, the last aligned right: one pass per token."""
    ids = [prefix_id(model), *model.tokenizer(text)["input_ids"]]
    total = 0.0
    for place in range(1, len(ids)):
        n_before = len(ids) - 1
        window = (place - 1) // CONTEXT
        start = window * CONTEXT
        if n_before > CONTEXT and (window + 1) * CONTEXT > n_before:
            start = n_before - CONTEXT
        with torch.no_grad():
            last = model.model(torch.tensor([ids[start:place]])).logits[0, -1].double()
        total -= float(last.log_softmax(0)[ids[place]])
    return total


def test_held_out_documents_of_the_shards_by_definition(model, shards: Path) -> None:
    task = BitsPerByte(held_out(model))
    documents = task.documents()
    outcomes = task.ask(model, documents)
    assert len(documents) == open_shards(shards).manifest.val.n_documents
    assert [(o.doc_id, o.weight) for o in outcomes] == [(d.doc_id, len(d.text.encode())) for d in documents]
    lengths = sorted((outcome.n_tokens, i) for i, outcome in enumerate(outcomes))
    assert lengths[0][0] < CONTEXT < 2 * CONTEXT < lengths[-1][0]
    for _length, i in (lengths[0], lengths[len(lengths) // 2], lengths[-1]):
        assert outcomes[i].value == pytest.approx(by_definition(model, documents[i].text), rel=1e-5)


def test_documents_are_those_of_the_corpus(model, shards: Path) -> None:
    """Every held-out text in whole, bytes as in the manifest, ids as in the file."""
    held = held_out(model)
    split = open_shards(shards).manifest.val
    assert {document.text for document in held.documents} < set(texts(60))
    assert sum(document.n_bytes for document in held.documents) == split.n_bytes
    assert sum(len(document.ids) + 1 for document in held.documents) == split.n_tokens
    for document in held.documents:
        assert ids_of(model, replace(document, ids=None)) == document.ids.tolist()


def test_text_files_give_what_shards_give(model, shards: Path, tmp_path: Path) -> None:
    task = BitsPerByte(held_out(model))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in reversed(task.documents())))
    other = BitsPerByte(held_out(model, path))
    ours, theirs = task.ask(model, task.documents()), other.ask(model, other.documents())
    assert [(o.doc_id, o.value, o.weight) for o in theirs] == [
        (o.doc_id, pytest.approx(o.value, rel=1e-6), o.weight) for o in ours
    ]


def test_the_same_text_whatever_the_tokenizer(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents, also those that are cut, and ids of the task do not depend on who is asked."""
    monkeypatch.setattr("homelab_scaling.evals.texts.MAX_DOCUMENT_BYTES", 101)
    bpe, raw = model_on(shards), model_on(corpus(tmp_path, texts(60)))
    ours, theirs = BitsPerByte(held_out(bpe)), BitsPerByte(held_out(raw))
    assert ours.documents() == theirs.documents()
    assert ours.settings == theirs.settings
    assert max(o.weight for o in ours.ask(bpe, ours.documents())) <= 101


def test_agrees_with_lm_eval(model, tmp_path: Path) -> None:
    if find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed (pip install 'homelab_scaling[eval]')")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    documents = BitsPerByte(held_out(model)).documents()
    harness = HFLM(pretrained=model.model, tokenizer=model.tokenizer, max_length=CONTEXT, device="cpu", batch_size=4)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document.text,), idx=0)
        for document in documents
    ]
    theirs = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    n_bytes = sum(len(document.text.encode()) for document in documents)
    wanted = -sum(theirs) / n_bytes / math.log(2)
    task = BitsPerByte(held_out(model))
    outcomes = task.ask(model, task.documents())
    found = bits_per_byte([o.value for o in outcomes], [o.weight for o in outcomes], seed=0).score
    assert found == pytest.approx(wanted, abs=1e-4)


def test_limits(model) -> None:
    held = held_out(model)
    assert len(BitsPerByte(held, limit=3).documents()) == 3
    few = BitsPerByte(held, most_bytes=900)
    assert 1 < len(few.documents()) < len(held.documents)
    assert few.n_bytes <= 900
    assert few.documents() == BitsPerByte(held).documents()[: len(few.documents())]
    assert len(BitsPerByte(held, most_bytes=1).documents()) == 1


def test_shards_without_a_mark_between_documents(shards: Path, tmp_path: Path) -> None:
    """Pieces of the stream stand for documents, and the settings say so."""
    tokens = np.concatenate([np.random.default_rng(0).integers(0, 250, 5000)]).astype(np.uint16)
    for half in ("train", "val"):
        (tmp_path / f"{half}.bin").write_bytes(tokens.tobytes())
    model = replace(portable(), eot_id=None, shards=tmp_path, run=tmp_path)
    held = held_out(model)
    assert [len(d.ids) for d in held.documents] == [2048, 2048, 904]
    assert "pieces of 2048 tokens" in held.source


def test_units_there_and_back(shards: Path) -> None:
    manifest = open_shards(shards).manifest
    split = manifest.val
    bits = nats_per_token_to_bits_per_byte(3.2, manifest)
    assert bits == pytest.approx(3.2 * split.n_tokens / split.n_bytes / math.log(2))
    assert bits_per_byte_to_nats_per_token(bits, split) == pytest.approx(3.2)
    assert nats_per_token_to_bits_per_byte(3.2, manifest.train) != bits


def test_a_manifest_that_does_not_know_its_bytes_is_one_sentence(shards: Path) -> None:
    manifest = open_shards(shards).manifest
    foreign = replace(manifest, val=replace(manifest.val, n_bytes=None))
    for convert in (nats_per_token_to_bits_per_byte, bits_per_byte_to_nats_per_token):
        with pytest.raises(DataError, match="does not say how many bytes"):
            convert(3.0, foreign)


def test_both_units_of_a_score(model) -> None:
    """Nats per token are of the tokens that were scored, and the two units convert by bytes per token of this text."""
    held = held_out(model)
    task = BitsPerByte(held)
    outcomes = task.ask(model, task.documents())
    n_tokens = sum(len(ids_of(model, document)) for document in held.documents)
    n_bytes = sum(document.n_bytes for document in held.documents)
    part = nats_per_token(outcomes, seed=0)
    assert part is not None
    assert part.score == pytest.approx(sum(o.value for o in outcomes) / n_tokens)
    bits = bits_per_byte([o.value for o in outcomes], [o.weight for o in outcomes], seed=0)
    assert part.score == pytest.approx(bits.score * math.log(2) * n_bytes / n_tokens)
    assert part.low < part.score < part.high
    assert nats_per_token([Outcome(doc_id="0", value=1.0, n_tokens=1)], seed=0) is None
    assert nats_per_token([], seed=0) is None


def test_a_foreign_model_needs_a_text() -> None:
    with pytest.raises(DataError, match="nothing is known of the text this model was trained on; name a text"):
        held_out(portable())


def test_shards_that_are_gone(tmp_path: Path) -> None:
    model = replace(portable(), run=tmp_path, shards=tmp_path / "gone")
    with pytest.raises(DataError, match="are not there any more"):
        held_out(model)


def test_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document in it"):
        held_out(portable(), tmp_path / "empty.jsonl")


def test_a_tokenizer_without_any_end_is_one_sentence(model) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no token that begins or ends a text"):
        prefix_id(replace(model, tokenizer=bare, eot_id=None))
