"""Batches as a pure function of (seed, epoch, global sequence index), and the fixed windows of validation.

A token stream is cut into windows of `context` inputs that do not overlap; a window is read with one token more, its
last target. Training visits the windows in an order that depends on the seed and the epoch alone: ranks, micro-batches,
rungs and horizons slice one sequence of windows, so a shorter run sees a prefix of a longer one, and a checkpoint needs
to store nothing but the number of sequences consumed.
"""

import bisect
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from homelab_scaling.errors import DataError

Tokens = npt.NDArray[Any]
Index = npt.NDArray[np.int64]

_FEISTEL_ROUNDS = 8
_SCAN_TOKENS = 16 * 1024**2


class TokenStream:
    """The tokens of one or more files, end to end, read in place: memory maps behind a length and a slice."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        # np.asarray drops the memmap class (slow to slice) and keeps the mapping.
        self._parts = [np.asarray(part) for part in parts]
        self._starts = [0, *itertools.accumulate(len(part) for part in self._parts)]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._parts[0].dtype if self._parts else np.dtype(np.uint16)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> Tokens:
        """The tokens of a slice with step 1; a view where it lies inside one file."""
        start, stop, step = span.indices(len(self))
        assert step == 1, "a token stream is read forwards"
        first = bisect.bisect_right(self._starts, start) - 1
        pieces = []
        while start < stop:
            offset = start - self._starts[first]
            piece = self._parts[first][offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
            first += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)


def n_windows(stream_len: int, context: int) -> int:
    """Windows of `context` inputs that a stream holds; the last target must exist too."""
    return max(0, (stream_len - 1) // context)


def read_windows(stream: TokenStream, window_ids: npt.ArrayLike, context: int) -> Tokens:
    """(n, context + 1) tokens in the files' dtype: inputs are [:, :-1], targets [:, 1:].

    Slices are copied one by one: np.take on a strided view of a memory map would read the whole file first.
    """
    ids = np.asarray(window_ids, dtype=np.int64)
    out = np.empty((len(ids), context + 1), dtype=stream.dtype)
    for row, start in zip(out, (ids * context).tolist(), strict=True):
        row[:] = stream[start : start + context + 1]
    return out


class BatchOrder:
    """The order in which training visits windows: a keyed permutation per epoch, computed and never stored.

    A Feistel network over pairs (left, right), left < a, right < b, permutes the a b >= n_windows places of a rectangle
    that is nearly square and hardly larger than needed; a value outside is sent through again until it falls inside
    (cycle walking), which leaves a permutation of the windows.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3; tests/data/test_batches.py.
    """

    def __init__(self, n_windows: int, seed: int) -> None:
        """Raises DataError if there is no window to visit."""
        if n_windows < 1:
            raise DataError("the training text is shorter than one window; give more text or a smaller context")
        self.n_windows = n_windows
        self.seed = seed
        side = math.isqrt(n_windows - 1) + 1
        self._a, self._b = np.uint64(side), np.uint64(-(-n_windows // side))

    def windows(self, first_sequence: int, n: int) -> Index:
        """Window indices of the sequences first_sequence, ..., first_sequence + n - 1 of the run."""
        parts = []
        while n > 0:
            epoch, place = divmod(first_sequence, self.n_windows)
            n_here = min(n, self.n_windows - place)
            parts.append(self._permute(np.arange(place, place + n_here, dtype=np.uint64), epoch))
            first_sequence, n = first_sequence + n_here, n - n_here
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permute(self, values: npt.NDArray[np.uint64], epoch: int) -> Index:
        keys = self._round_keys(epoch)
        values = self._feistel(values, keys)
        while (outside := np.flatnonzero(values >= self.n_windows)).size:
            values[outside] = self._feistel(values[outside], keys)
        return values.astype(np.int64)

    def _feistel(self, values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values % self._a, values // self._a
        size, other = self._a, self._b  # of left and right; they change places with them
        for key in keys:
            left, right = right, (left + _mix(right ^ key) % size) % size
            size, other = other, size
        return right * self._a + left

    def _round_keys(self, epoch: int) -> npt.NDArray[np.uint64]:
        digest = hashlib.shake_256(f"window order, seed {self.seed}, epoch {epoch}".encode()).digest(
            8 * _FEISTEL_ROUNDS
        )
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A 64-bit avalanche: every input bit changes every output bit half of the time.

    Source: Stafford 2011, "Better bit mixing", variant 13 (the finaliser of SplitMix64).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def validation_windows(stream_len: int, context: int, n_tokens: int) -> Index:
    """Windows holding about `n_tokens` targets, spread evenly over the whole stream; all of them if it is shorter.

    Raises:
        DataError: the held-out text is shorter than one window.
    """
    have = n_windows(stream_len, context)
    if have == 0:
        raise DataError(
            f"the held-out text has {stream_len} tokens, one window wants {context + 1}; raise val_frac, give more "
            "text or take a smaller context"
        )
    want = min(have, max(1, n_tokens // context))
    return np.arange(want, dtype=np.int64) * have // want


def document_ids(stream: TokenStream, window_ids: npt.ArrayLike, context: int, eot_id: int) -> Index:
    """(n, context): for each target, the number of the document it belongs to, counted from the stream's beginning.

    An end-of-text token is the last token of the document it ends. Losses summed by these numbers give the standard
    error over documents.
    """
    targets = np.asarray(window_ids, dtype=np.int64)[:, None] * context + np.arange(1, context + 1)
    ends = [
        start + np.flatnonzero(stream[start : start + _SCAN_TOKENS] == eot_id)
        for start in range(0, len(stream), _SCAN_TOKENS)
    ]
    borders = np.concatenate(ends) if ends else np.empty(0, np.int64)
    return np.searchsorted(borders, targets, side="left").astype(np.int64)
