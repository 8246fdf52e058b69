"""The text that our own tasks are made of: a run's held-out documents, or any text that is named.

The choice of documents depends on the text alone, never on the model, so that every model is asked the same.
"""

import hashlib
import heapq
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from homelab_scaling.codec import stable_hash
from homelab_scaling.data.shards import Shards, open_shards
from homelab_scaling.errors import DataError
from homelab_scaling.evals.decode import Decoder
from homelab_scaling.export.convert import Portable

Language = Literal["code", "prose"]

MAX_DOCUMENTS = 1000
MAX_DOCUMENT_BYTES = 16 * 1024
"""Of a longer document the beginning is taken, so that one book, or one large file, is not the whole evaluation."""
_PIECE_TOKENS = 2048
"""A document of shards whose documents cannot be told apart."""
_SAMPLE_CHARS, _CODE_FRAC = 2000, 0.04
_MARKS = re.compile(r"[{}\[\]=<>_/\\+*#&|]|\w\(|;$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldDocument:
    """One document that no rung was trained on."""

    doc_id: str
    """Begins its SHA-256: the same for every model and every order of the text."""
    text: str
    n_bytes: int
    """UTF-8 bytes."""
    ids: npt.NDArray[Any] | None
    """As in the shards; None where the text came as text, or is the beginning of a longer document."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """The documents that tasks are made of."""

    source: str
    """In words, for settings: equal source and fingerprint, equal tasks."""
    documents: tuple[HeldDocument, ...]
    n_in_all: int
    """Documents of the source before the choice."""
    language: Language

    @property
    def fingerprint(self) -> str:
        """Short name of the chosen text."""
        return stable_hash([document.doc_id for document in self.documents], n_chars=12)


def held_out(model: Portable, text: str | Path | None = None, *, text_field: str = "text") -> HeldOut:
    """At most MAX_DOCUMENTS documents of `text`, or else of the held-out half of the model's own shards.

    Args:
        model: whose tokenizer reads the shards.
        text: a .txt, .jsonl or .parquet file, a folder of them, or `python`.
        text_field: of .jsonl and .parquet.

    Raises:
        DataError: neither is there, or no document in it.
    """
    if text is not None:
        return _of_text(str(text), text_field)
    shards = open_own_shards(model)
    return _of_shards(shards, Decoder(model.tokenizer, shards.manifest.n_vocab))


def why_no_shards(model: Portable) -> str | None:
    """In words why the text a model was trained on cannot be looked at; None if it can."""
    if model.run is None:
        return "nothing is known of the text this model was trained on"
    if model.shards is None or not model.shards.is_dir():
        where = f" ({model.shards})" if model.shards is not None else ""
        return f"the shards this model was trained on are not there any more{where}"
    return None


def open_own_shards(model: Portable) -> Shards:
    """The corpus of the model's run.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    reason = why_no_shards(model)
    if reason is not None or model.shards is None:
        raise DataError(f"{model.name}: {reason}; name a text with --text FILE")
    facts: dict[str, Any] = {}
    if not (model.shards / "manifest.json").exists():  # bare .bin files of another project: the run knew what they mean
        eot = "none" if model.eot_id is None else model.eot_id
        facts = {"n_vocab": model.n_vocab, "eot_id": eot, "tokenizer": "as exported"}
    return open_shards(model.shards, **facts)


def language_of(texts: Sequence[str]) -> Language:
    """Code or prose, by the share of brackets, operators and underscores among what is not blank."""
    sample = "".join(text[:_SAMPLE_CHARS] for text in texts)
    n_seen = sum(not char.isspace() for char in sample)
    return "code" if len(_MARKS.findall(sample)) > _CODE_FRAC * n_seen else "prose"


def document_spans(shards: Shards) -> npt.NDArray[np.int64]:
    """(n, 2): where each held-out document begins and ends, its end-of-text token excluded, empty ones left out."""
    stream, eot = shards.val, shards.manifest.eot_id
    if eot is None:
        ends = np.append(np.arange(_PIECE_TOKENS, len(stream), _PIECE_TOKENS), len(stream))
        starts = np.concatenate(([0], ends[:-1]))
    else:
        step = 16 * 1024**2
        found = [start + np.flatnonzero(stream[start : start + step] == eot) for start in range(0, len(stream), step)]
        ends = np.append(np.concatenate(found), len(stream))
        starts = np.concatenate(([0], ends[:-1] + 1))
    spans = np.stack([starts, ends], axis=1).astype(np.int64)
    return spans[spans[:, 1] > spans[:, 0]]


def _of_shards(shards: Shards, decoder: Decoder) -> HeldOut:
    spans = document_spans(shards)
    chosen = np.unique(np.linspace(0, len(spans) - 1, min(MAX_DOCUMENTS, len(spans))).round().astype(np.int64))
    documents = []
    for start, end in spans[chosen].tolist():
        ids = shards.val[start : min(end, start + MAX_DOCUMENT_BYTES)]  # no token is shorter than a byte
        raw = decoder.to_bytes(ids)
        whole = end - start == len(ids) and len(raw) <= MAX_DOCUMENT_BYTES
        text = (raw if whole else raw[:MAX_DOCUMENT_BYTES]).decode("utf-8", errors="replace" if whole else "ignore")
        n_bytes = len(raw) if whole else len(text.encode())
        documents.append(HeldDocument(doc_id=_doc_id(text), text=text, n_bytes=n_bytes, ids=ids if whole else None))
    source = "held-out documents of the run"
    if shards.manifest.eot_id is None:
        source += f", in pieces of {_PIECE_TOKENS} tokens because nothing marks where a document ends"
    return _make(source, documents, len(spans))


def _of_text(asked: str, text_field: str) -> HeldOut:
    """Documents with the lowest hashes, so that memory is bounded and their order does not matter."""
    from homelab_scaling.data.sources import make_source

    lowest: list[tuple[int, int, str]] = []  # a heap of (minus hash, minus place, text): its head is the highest hash
    count = itertools.count()
    for document in make_source(asked, text_field).documents():
        text = document.text.encode(errors="replace")[:MAX_DOCUMENT_BYTES].decode(errors="ignore")
        if not text:
            continue
        key = (-int(_doc_id(text), 16), -next(count), text)
        if len(lowest) < MAX_DOCUMENTS:
            heapq.heappush(lowest, key)
        else:
            heapq.heappushpop(lowest, key)
    texts = [text for _hash, _place, text in sorted(lowest, reverse=True)]
    documents = [HeldDocument(doc_id=_doc_id(t), text=t, n_bytes=len(t.encode()), ids=None) for t in texts]
    name = asked if asked == "python" or asked.startswith("hf:") else Path(asked).name
    return _make(f"the text {name}", documents, next(count))


def _make(source: str, documents: list[HeldDocument], n_in_all: int) -> HeldOut:
    if not documents:
        raise DataError(f"{source}: no document in it; give a text that is not empty with --text FILE")
    unique = {document.doc_id: document for document in documents}
    kept = tuple(unique.values())
    return HeldOut(
        source=source, documents=kept, n_in_all=n_in_all, language=language_of([document.text for document in kept])
    )


def _doc_id(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]
