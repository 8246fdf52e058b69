"""What a build learns in its first reading, and what it chooses: duplicates out, cap, held-out half, tokenizer sample.

Every choice depends on the documents' content, never on their order or on the file system. The two 64-bit halves of a
document's hash play separate parts: the first orders documents (cap, tokenizer sample), the second decides what is held
out, so that a capped corpus is not all validation.

Memory: 28 bytes per document while reading, about three times that while choosing; 10 GB of web pages, 2 million
documents, want under 200 MB.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homelab_scaling.data.files import Document, utf8
from homelab_scaling.errors import DataError

DROPPED, TRAIN, VAL = 0, 1, 2
TOKENIZER_SAMPLE_BYTES = 32 * 1024**2
_GROUP_OVERSHOOT = 1.5
"""Held-out groups may exceed the share asked for by this factor; a larger group is passed over."""

RULE = (
    "a document is held out if the second 64 bits of its SHA-256, as a share of 2^64, are below val_frac (the lowest "
    "document if none is); sources that come in groups (python: folder or module below a package) hold out whole "
    "groups in the order of their names' SHA-256, until val_frac of the bytes is reached, passing over groups that "
    "would exceed 1.5 times that"
)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One line per document, in source order."""

    digests: npt.NDArray[np.uint64]
    """(n, 2): the first 128 bits of the content's SHA-256."""
    sizes_bytes: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int32]
    """Index into group_names; -1 for a document on its own."""
    group_names: tuple[str, ...]

    @property
    def text_hash(self) -> str:
        """Equal for the same documents in the same order."""
        return hashlib.sha256(self.digests.astype(">u8").tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What becomes of each surveyed document."""

    part: npt.NDArray[np.uint8]
    """DROPPED, TRAIN or VAL."""
    in_sample: npt.NDArray[np.bool_]
    """Training documents that a tokenizer is trained on."""
    n_duplicates: int
    n_bytes: int
    """Of text, both halves."""


def content_digest(text: bytes) -> bytes:
    """The 16 bytes that stand for a document."""
    return hashlib.sha256(text).digest()[:16]


def read_survey(documents: Iterable[Document], tick: Callable[[int], None]) -> Survey:
    """Hash, size and group of every document."""
    digests, sizes, groups = bytearray(), array("q"), array("i")
    names: dict[str, int] = {}
    for document in documents:
        text = utf8(document.text, document.name)
        digests += content_digest(text)
        sizes.append(len(text))
        groups.append(-1 if document.group is None else names.setdefault(document.group, len(names)))
        tick(len(text))
    return Survey(
        digests=np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2),
        sizes_bytes=np.asarray(sizes, dtype=np.int64),
        groups=np.asarray(groups, dtype=np.int32),
        group_names=tuple(names),
    )


def choose(survey: Survey, *, val_frac: float, max_bytes: int | None) -> Choice:
    """Duplicates out (the first stays), cap by hash order, then the two halves.

    Raises:
        DataError: there is no text, or one of the halves would be empty.
    """
    n = len(survey.sizes_bytes)
    if n == 0:
        raise DataError("the sources hold no text at all; give others")
    high, low = survey.digests[:, 0], survey.digests[:, 1]
    order = np.lexsort((low, high))  # stable: equal documents stay in source order
    fresh = np.ones(n, dtype=np.bool_)
    fresh[1:] = (survey.digests[order[1:]] != survey.digests[order[:-1]]).any(axis=1)
    kept = order[fresh]
    n_duplicates = n - len(kept)
    if max_bytes is not None:
        fits = np.cumsum(survey.sizes_bytes[kept]) <= max_bytes
        kept = kept[fits]
    if len(kept) < 2:
        cap = f" under max_bytes = {max_bytes}" if max_bytes is not None and len(kept) < n - n_duplicates else ""
        raise DataError(
            f"found {len(kept)} different document{'s' if len(kept) != 1 else ''}{cap}; at least two are wanted, one "
            "to train on and one to hold out for validation, so give more text"
        )
    part = np.full(n, DROPPED, dtype=np.uint8)
    part[kept] = TRAIN
    part[_held_out(survey, kept, val_frac)] = VAL
    for half, name in ((TRAIN, "training"), (VAL, "validation")):
        if not (part == half).any():
            raise DataError(f"val_frac = {val_frac} leaves nothing for {name}; change it or give more text")
    by_hash = kept[part[kept] == TRAIN]
    in_sample = np.zeros(n, dtype=np.bool_)
    n_sample = int(np.searchsorted(np.cumsum(survey.sizes_bytes[by_hash]), TOKENIZER_SAMPLE_BYTES, side="right"))
    in_sample[by_hash[: max(1, n_sample)]] = True
    return Choice(
        part=part, in_sample=in_sample, n_duplicates=n_duplicates, n_bytes=int(survey.sizes_bytes[kept].sum())
    )


def _held_out(survey: Survey, kept: npt.NDArray[np.int64], val_frac: float) -> npt.NDArray[np.int64]:
    """Those of the kept documents that are held out (RULE)."""
    low = survey.digests[kept, 1]
    single = survey.groups[kept] < 0
    held = single & (low < np.uint64(min(int(val_frac * 2.0**64), 2**64 - 1)))
    if single.any() and not held.any():
        alone = np.flatnonzero(single)
        held[alone[np.argmin(low[alone])]] = True
    held |= np.isin(survey.groups[kept], _held_out_groups(survey, kept, val_frac))
    held_out: npt.NDArray[np.int64] = kept[held]
    return held_out


def _held_out_groups(survey: Survey, kept: npt.NDArray[np.int64], val_frac: float) -> list[int]:
    groups = survey.groups[kept]
    grouped = groups >= 0
    if not grouped.any():
        return []
    sizes = np.bincount(groups[grouped], weights=survey.sizes_bytes[kept][grouped], minlength=len(survey.group_names))
    target = val_frac * sizes.sum()
    present = [g for g in range(len(sizes)) if sizes[g] > 0]
    present.sort(key=lambda g: hashlib.sha256(survey.group_names[g].encode()).digest())
    held: list[int] = []
    taken = 0.0
    for group in present:
        if taken < target and taken + sizes[group] <= _GROUP_OVERSHOOT * target:
            held.append(group)
            taken += sizes[group]
    return held or [min(present, key=lambda g: float(sizes[g]))]
