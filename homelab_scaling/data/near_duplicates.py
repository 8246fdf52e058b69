"""Documents that say nearly what another one says: found by MinHash, confirmed by counting.

A document is the set of its shingles: five words in a row, where a word is a run of letters, digits and underscores,
in lower case (all of its words, if it has fewer). Two documents are near duplicates if the Jaccard similarity of their
sets, what they share over what either has, is at least the threshold.

MinHash (128 permutations) only proposes pairs: documents that agree in one of several bands of their signatures. Each
proposal is then counted exactly, so nothing is dropped that is less similar. A pair at the very threshold is proposed
with a probability above 1 - 1e-4, a more similar one is practically never missed.

The documents are gone through in a fixed order, that of their hashes, and one is dropped if it is a near duplicate of
one that stays. So no two of those that stay are near duplicates, on either side of the border to the held-out text, and
every dropped one has a near duplicate that stays; chains of small changes do not drag each other out.

Below a threshold of 0.5 ever more pairs are proposed only to be refused, and the comparison gets slow (below 0.07 more
than 1e-4 are missed, too). The same is true of large families that stay just below the threshold, pair by pair.

Memory: 8 bytes per band and document, 25 bands at 0.8; with what is needed to sort them, 250 MB per million documents.
Shingles lie on the disk while the corpus is built, 8 bytes for each different one of a document: 0.7 times the text
of Python source, up to 1.5 times prose. Reading costs one core a second for 16 MB.
"""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from homelab_scaling.data.files import Document
from homelab_scaling.errors import MachineError

SHINGLE_WORDS = 5
N_PERMUTATIONS = 128
MAX_MISSED = 1e-4
"""Chance that a pair at the threshold itself is not proposed."""
_SEED = 5
_WORD = re.compile(r"\w+")
_MAX_WORDS_KNOWN = 2**18
_BATCH_SHINGLES, _BATCH_DOCUMENTS = 2**18, 2**12
_ODD = np.uint64(0x9E3779B97F4A7C15)

Hashes = npt.NDArray[np.uint64]


class _WordHashes(dict[str, int]):
    """64 bits of BLAKE2b for each word; forgets what it knows when that becomes too much."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_WORDS_KNOWN:
            self.clear()
        found = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = found
        return found


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows of each) of the signature: the most rows with which a pair at the threshold is still proposed."""
    rows = N_PERMUTATIONS
    while rows > 1 and (1 - threshold**rows) ** (N_PERMUTATIONS // rows) > MAX_MISSED:
        rows -= 1
    return N_PERMUTATIONS // rows, rows


def jaccard(a: Hashes, b: Hashes) -> float:
    """Similarity of two sorted sets."""
    if not len(a) or not len(b):
        return 0.0
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    places = np.minimum(np.searchsorted(large, small), len(large) - 1)
    n_both = int(np.count_nonzero(large[places] == small))
    return n_both / (len(a) + len(b) - n_both)


class NearDuplicates:
    """Watches documents go by, then says which of them are near duplicates."""

    def __init__(self, spool: Path, threshold: float) -> None:
        """Shingles go to the file `spool`.

        Raises:
            MachineError: the library is not installed.
        """
        self._sketch = load_minhash()
        self._threshold = threshold
        self._n_bands, self._n_rows = bands_for(threshold)
        self._known = _WordHashes()
        self._path = spool
        self._file = spool.open("wb")
        self._ends = array("q", [0])
        self._bands = bytearray()
        self._waiting: list[Hashes] = []
        self._n_waiting = 0

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The same documents, each noted as it passes."""
        for document in documents:
            self._note(self.shingles(document.text))
            yield document

    def shingles(self, text: str) -> Hashes:
        """The sorted set of a text's shingles, 64 bits for each; empty if it has no word."""
        words = _WORD.findall(text.lower())
        hashes = np.fromiter(map(self._known.__getitem__, words), dtype=np.uint64, count=len(words))
        length = min(SHINGLE_WORDS, len(words))
        n = len(words) - length + 1 if length else 0
        found = np.zeros(n, dtype=np.uint64)
        for place in range(length):
            found = found * _ODD + hashes[place : place + n]
        return np.unique(found)

    def _note(self, shingles: Hashes) -> None:
        self._file.write(shingles.tobytes())
        self._ends.append(self._ends[-1] + len(shingles))
        self._waiting.append(shingles)
        self._n_waiting += len(shingles)
        if self._n_waiting >= _BATCH_SHINGLES or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        """Signatures of the documents that wait, folded into one number for each band."""
        signatures = self._sketch(self._waiting)[:, : self._n_bands * self._n_rows].astype(np.uint64)
        rows = signatures.reshape(len(self._waiting), self._n_bands, self._n_rows)
        folded = np.zeros(rows.shape[:2], dtype=np.uint64)
        for row in range(self._n_rows):
            folded = (folded ^ rows[:, :, row]) * _ODD
            folded ^= folded >> np.uint64(29)
        self._bands += folded.tobytes()
        self._waiting, self._n_waiting = [], 0

    def find(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For each document of `order`, whether it is a near duplicate of one before it that stays.

        Args:
            order: numbers of documents as they went by, the preferred first; others do not count.
        """
        if self._waiting:
            self._flush()
        self._file.flush()
        dropped = np.zeros(len(order), dtype=np.bool_)
        if not self._ends[-1]:
            return dropped
        all_shingles = np.memmap(self._path, dtype=np.uint64, mode="r")
        ends = np.asarray(self._ends)

        def of(place: int) -> Hashes:
            document = order[place]
            return np.asarray(all_shingles[ends[document] : ends[document + 1]])

        n_shingles = (ends[1:] - ends[:-1])[order]
        staying: dict[int, list[int]] = {}  # bucket -> those of its documents that stay so far
        for place, buckets in self._proposals(order, n_shingles > 0):
            seen = Counter(other for bucket in buckets for other in staying.get(bucket, ()))
            if self._is_near(place, seen, n_shingles, of):
                dropped[place] = True
            else:
                for bucket in buckets:
                    staying.setdefault(bucket, []).append(place)
        return dropped

    def _is_near(self, place: int, seen: Counter[int], n_shingles: npt.NDArray[np.int64], of: Any) -> bool:
        """Whether a document is near one of those that it met in some band, the most promising first."""
        mine, n_mine = None, int(n_shingles[place])
        for other, _bands in seen.most_common():
            n_other = int(n_shingles[other])
            if min(n_mine, n_other) < self._threshold * max(n_mine, n_other):
                continue  # even if one held the other
            mine = of(place) if mine is None else mine
            if jaccard(mine, of(other)) >= self._threshold:
                return True
        return False

    def _proposals(
        self, order: npt.NDArray[np.int64], has_shingles: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[int, list[int]]]:
        """(place in `order`, its buckets) of each document that shares a bucket, in order."""
        bands = np.frombuffer(self._bands, dtype=np.uint64).reshape(-1, self._n_bands)
        places: list[npt.NDArray[np.int64]] = []
        buckets: list[npt.NDArray[np.int64]] = []
        n_buckets = 0
        candidates = np.flatnonzero(has_shingles)
        for band in range(self._n_bands):
            values = bands[order[candidates], band]
            by_value = np.argsort(values, kind="stable")
            same = values[by_value][1:] == values[by_value][:-1]
            shared = np.concatenate((same, [False])) | np.concatenate(([False], same))
            begins = np.concatenate(([True], ~same))
            places.append(candidates[by_value[shared]])
            buckets.append(n_buckets + np.cumsum(begins)[shared])
            n_buckets += len(values) + 1
        place, bucket = np.concatenate(places), np.concatenate(buckets)
        by_place = np.lexsort((bucket, place))
        place, bucket = place[by_place], bucket[by_place]
        borders = np.flatnonzero(place[1:] != place[:-1]) + 1
        for mine, of_it in zip(place[np.r_[0, borders]] if len(place) else (), np.split(bucket, borders), strict=False):
            yield int(mine), of_it.tolist()


def load_minhash() -> Any:
    """A function from sets of shingles to their signatures, (n, N_PERMUTATIONS).

    Raises:
        MachineError: the library is not installed.
    """
    try:
        from rensa import RMinHash
    except ModuleNotFoundError:
        raise MachineError(
            "near_duplicates wants the package rensa, which is not installed; pip install 'homelab_scaling[dedup]', or "
            "leave it out"
        ) from None

    def sketch(sets: list[Hashes]) -> npt.NDArray[np.uint32]:
        offsets = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), offsets, N_PERMUTATIONS, _SEED)
        return np.array(matrix.to_rows(), dtype=np.uint32)

    return sketch
