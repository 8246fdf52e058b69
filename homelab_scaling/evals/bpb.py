"""Bits per byte, the loss that compares across tokenizers: - sum of log2 p over sum of UTF-8 bytes.

Each document is asked alone: the end-of-text token, then windows of the model's context that do not overlap, the last
one aligned right so that its new tokens see all the context there is (the rolling log likelihood of
lm-evaluation-harness). The end-of-text token itself is not scored. A training loss also scores it, and its windows run
across documents, so the two differ a little also on the same text.

Source: Gao et al. 2020 (The Pile), section 3.1.
"""

import math
from collections.abc import Sequence
from typing import Any

from homelab_scaling.errors import DataError
from homelab_scaling.evals.intervals import ratio
from homelab_scaling.evals.results import Document, Kind, Outcome, Part, Setting
from homelab_scaling.evals.scorer import score
from homelab_scaling.evals.texts import MAX_DOCUMENT_BYTES, HeldDocument, HeldOut
from homelab_scaling.export.convert import Portable
from homelab_scaling.specs import CorpusManifest, Split

N_DOCUMENTS = 500
TOKENS = "tokens"
"""In `Outcome.also`: tokens of the document that were scored."""
MOST_BYTES = 600_000
"""Of text: 100 to 200 thousand tokens, which a model of 5M parameters reads in about a minute on two CPU cores."""


class BitsPerByte:
    """Bits per byte over held-out documents; a `Task`."""

    name = "bpb"
    metric = "bits_per_byte"
    kind: Kind = "bits per byte"
    higher_is_better = False
    chance: float | None = None

    def __init__(self, text: HeldOut, *, limit: int | None = None, most_bytes: int = MOST_BYTES) -> None:
        """Takes documents in the order of their hashes until `limit` (500) or `most_bytes` is reached, one at least."""
        wanted = sorted(text.documents, key=lambda document: document.doc_id)[: limit or N_DOCUMENTS]
        taken: list[HeldDocument] = []
        n_bytes = 0
        for document in wanted:
            if taken and n_bytes + document.n_bytes > most_bytes:
                break
            taken.append(document)
            n_bytes += document.n_bytes
        self._documents = {document.doc_id: document for document in taken}
        self.n_bytes = n_bytes
        self.settings: dict[str, Setting] = {
            "text": text.source,
            "text_id": text.fingerprint,
            "documents": len(taken),
            "bytes": n_bytes,
            "most_bytes_of_a_document": MAX_DOCUMENT_BYTES,
            "windows": "disjoint, of the model's context; end-of-text before each document",
        }

    def documents(self) -> Sequence[Document]:
        return [Document(doc_id=document.doc_id, text=document.text) for document in self._documents.values()]

    def ask(self, model: Any, documents: Sequence[Document]) -> list[Outcome]:
        """Nats and bytes of each document.

        Raises:
            DataError: the tokenizer has no token to begin with, or ids that the model does not know.
        """
        asked = [self._documents[document.doc_id] for document in documents]
        prefix = [prefix_id(model)]
        scored = score(model, [(prefix, ids_of(model, document)) for document in asked])
        return [
            Outcome(
                doc_id=document.doc_id,
                value=found.nats,
                weight=float(document.n_bytes),
                n_tokens=found.n_tokens,
                also={TOKENS: float(found.n_scored)},
            )
            for document, found in zip(asked, scored, strict=True)
        ]


def nats_per_token(outcomes: Sequence[Outcome], *, seed: int) -> Part | None:
    """The same outcomes as nats per token of the model's own tokenizer; None where they are no outcomes of `bpb`."""
    if not outcomes or any(TOKENS not in outcome.also for outcome in outcomes):
        return None
    return ratio([outcome.value for outcome in outcomes], [outcome.also[TOKENS] for outcome in outcomes], seed=seed)


def ids_of(model: Portable, document: HeldDocument) -> list[int]:
    """The tokens of a document: as in the shards where it lies there, else as the model's tokenizer cuts it."""
    if document.ids is not None:
        return [int(i) for i in document.ids]
    return encode(model, document.text)


def encode(model: Portable, text: str) -> list[int]:
    """The tokens of a text, no special one added."""
    ids: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prefix_id(model: Portable) -> int:
    """What stands before a document: the beginning-of-text token where there is one, else the end-of-text token.

    Raises:
        DataError: the tokenizer has neither.
    """
    begin: int | None = model.tokenizer.bos_token_id
    found = begin if begin is not None else model.eot_id
    if found is None:
        raise DataError(
            f"{model.name}: its tokenizer has no token that begins or ends a text, so the first token of a document "
            "cannot be scored; set eos_token in tokenizer_config.json"
        )
    return found


def nats_per_token_to_bits_per_byte(loss_nats: float, of: CorpusManifest | Split) -> float:
    """A mean loss over tokens as bits per byte of the text behind them (of a manifest: of its held-out half).

    Raises:
        DataError: the manifest does not know the bytes.
    """
    return loss_nats / math.log(2) / bytes_per_token(of)


def bits_per_byte_to_nats_per_token(bits_per_byte: float, of: CorpusManifest | Split) -> float:
    """Bits per byte as a mean loss over tokens.

    Raises:
        DataError: the manifest does not know the bytes.
    """
    return bits_per_byte * math.log(2) * bytes_per_token(of)


def bytes_per_token(of: CorpusManifest | Split) -> float:
    """UTF-8 bytes of text per token, end-of-text tokens included.

    Raises:
        DataError: a foreign manifest, which counts tokens only.
    """
    split = of.val if isinstance(of, CorpusManifest) else of
    if not split.n_bytes or not split.n_tokens:
        raise DataError(
            "the manifest of these shards does not say how many bytes of text their tokens stand for (they were taken "
            "over from elsewhere); measure bits per byte with `homelab eval RUN --tasks bpb`, or build the shards from "
            "the text with `homelab corpus`"
        )
    return split.n_bytes / split.n_tokens
