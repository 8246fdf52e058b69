"""What a build learns in its first reading, and what it chooses: duplicates out, cap or mixture, held-out half,
tokenizer sample.

Every choice depends on the documents' content, never on their order or on the file system. The two 64-bit halves of a
document's hash play separate parts: the first orders documents (cap, tokenizer sample), the second decides what is held
out, so that a capped corpus is not all validation.

Memory: 32 bytes per document while reading, about three times that while choosing; 10 GB of web pages, 2 million
documents, want under 200 MB.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homelab_scaling.data import mixture
from homelab_scaling.data.files import Document, utf8
from homelab_scaling.data.mixture import Wish
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
MIXED_RULE = (
    "; of every source so much that the held-out text has the shares of the mixture, nothing of it twice and nothing "
    "of it trained on"
)

Drop = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
"""Documents in the order in which they are preferred -> which of them are nearly another one's."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One line per document, in source order."""

    digests: npt.NDArray[np.uint64]
    """(n, 2): the first 128 bits of the content's SHA-256."""
    sizes_bytes: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int32]
    """Index into group_names; -1 for a document on its own."""
    group_names: tuple[str, ...]
    sources: npt.NDArray[np.int32]
    """Which source each document came from."""

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
    copies: npt.NDArray[np.int32]
    """How often a training document is trained on per pass; 0 for all others."""
    n_exact: tuple[int, ...]
    """Exact duplicates dropped, by source."""
    n_near: tuple[int, ...]
    """Near duplicates dropped, by source."""
    have_bytes: tuple[int, ...]
    """Text that could be trained on, by source: neither dropped as a duplicate nor held out."""
    n_bytes: int
    """Of text, both halves, each document once."""

    @property
    def n_duplicates(self) -> int:
        """Exact duplicates."""
        return sum(self.n_exact)


def content_digest(text: bytes) -> bytes:
    """The 16 bytes that stand for a document."""
    return hashlib.sha256(text).digest()[:16]


def read_survey(sources: Iterable[Iterable[Document]], tick: Callable[[int], None]) -> Survey:
    """Hash, size, group and source of every document.

    Args:
        sources: the documents of each.
        tick: called with the bytes of each document.
    """
    digests, sizes, groups, numbers = bytearray(), array("q"), array("i"), array("i")
    names: dict[str, int] = {}
    for number, documents in enumerate(sources):
        for document in documents:
            text = utf8(document.text, document.name)
            digests += content_digest(text)
            sizes.append(len(text))
            groups.append(-1 if document.group is None else names.setdefault(document.group, len(names)))
            numbers.append(number)
            tick(len(text))
    return Survey(
        digests=np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2),
        sizes_bytes=np.asarray(sizes, dtype=np.int64),
        groups=np.asarray(groups, dtype=np.int32),
        group_names=tuple(names),
        sources=np.asarray(numbers, dtype=np.int32),
    )


def choose(
    survey: Survey, *, val_frac: float, max_bytes: int | None, wish: Wish | None = None, near: Drop | None = None
) -> Choice:
    """Duplicates out (of equal documents the first stays), near duplicates too, cap by hash order, then the two halves.

    Args:
        wish: how sources are mixed; None takes every document once.
        near: finds near duplicates; None looks for none.

    Raises:
        DataError: there is no text, one of the halves would be empty, or the mixture cannot be made of it.
    """
    n = len(survey.sizes_bytes)
    if n == 0:
        raise DataError("the sources hold no text at all; give others")
    n_sources = len(wish.names) if wish else int(survey.sources.max()) + 1
    kept, exact = _without_copies(survey)
    is_near = near(kept) if near else np.zeros(len(kept), dtype=np.bool_)
    n_near = np.bincount(survey.sources[kept[is_near]], minlength=n_sources)
    kept = different = kept[~is_near]
    mixed = wish is not None and not wish.is_plain
    if max_bytes is not None and not mixed:
        kept = kept[np.cumsum(survey.sizes_bytes[kept]) <= max_bytes]
    if len(kept) < 2:
        cap = f" under max_bytes = {max_bytes}" if len(kept) < len(different) else ""
        raise DataError(
            f"found {len(kept)} different document{'s' if len(kept) != 1 else ''}{cap}; at least two are wanted, one "
            "to train on and one to hold out for validation, so give more text"
        )
    part = np.full(n, DROPPED, dtype=np.uint8)
    part[kept] = TRAIN
    if mixed and wish is not None:
        copies = _mix(survey, kept, part=part, wish=wish, val_frac=val_frac, max_bytes=max_bytes)
    else:
        part[_held_out(survey, kept, val_frac)] = VAL
        copies = (part == TRAIN).astype(np.int32)
    for half, name in ((TRAIN, "training"), (VAL, "validation")):
        if not (part == half).any():
            raise DataError(f"val_frac = {val_frac} leaves nothing for {name}; change it or give more text")
    by_hash = kept[part[kept] == TRAIN]
    in_sample = np.zeros(n, dtype=np.bool_)
    n_sample = int(np.searchsorted(np.cumsum(survey.sizes_bytes[by_hash]), TOKENIZER_SAMPLE_BYTES, side="right"))
    in_sample[by_hash[: max(1, n_sample)]] = True
    could_be_trained_on = different[part[different] != VAL]
    return Choice(
        part=part,
        in_sample=in_sample,
        copies=copies,
        n_exact=tuple(np.bincount(survey.sources[exact], minlength=n_sources).tolist()),
        n_near=tuple(n_near.tolist()),
        have_bytes=tuple(_bytes_by_source(survey, could_be_trained_on, n_sources).tolist()),
        n_bytes=int(survey.sizes_bytes[part != DROPPED].sum()),
    )


def _without_copies(survey: Survey) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The first of each set of equal documents, in the order of their hashes; and which documents are not such."""
    order = np.lexsort((survey.digests[:, 1], survey.digests[:, 0]))  # stable: equal documents stay in source order
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = (survey.digests[order[1:]] != survey.digests[order[:-1]]).any(axis=1)
    copies = np.ones(len(order), dtype=np.bool_)
    copies[order[fresh]] = False
    return order[fresh], copies


def _bytes_by_source(survey: Survey, documents: npt.NDArray[np.int64], n_sources: int) -> npt.NDArray[np.int64]:
    return mixture.by_source(survey.sizes_bytes[documents], survey.sources[documents], n_sources)


def _mix(
    survey: Survey,
    kept: npt.NDArray[np.int64],
    *,
    part: npt.NDArray[np.uint8],
    wish: Wish,
    val_frac: float,
    max_bytes: int | None,
) -> npt.NDArray[np.int32]:
    """Copies of every document; `part` gets what is held out, and loses what no copy of is wanted."""
    n_sources = len(wish.names)
    have = _bytes_by_source(survey, kept, n_sources)
    mixed = mixture.mixed_bytes(wish, have, val_frac, max_bytes)
    sources = survey.sources[kept]
    for source in range(n_sources):
        part[_held_out(survey, kept[sources == source], float(val_frac * mixed[source] / have[source]))] = VAL
    train = kept[part[kept] == TRAIN]
    have = _bytes_by_source(survey, train, n_sources)
    if not have.all():
        name = wish.names[int(np.argmin(have))]
        raise DataError(f"{name}: val_frac = {val_frac} leaves nothing of it for training; give it more documents")
    copies = np.zeros(len(part), dtype=np.int32)
    for source, epochs in enumerate(mixture.wanted_epochs(wish, have, mixed, val_frac, max_bytes)):
        mine = train[survey.sources[train] == source]
        copies[mine] = mixture.copies(epochs, survey.sizes_bytes[mine])
    part[(part == TRAIN) & (copies == 0)] = DROPPED
    mixture.check_copies(wish, _bytes_by_source(survey, np.flatnonzero(copies), n_sources).tolist())
    return copies


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
