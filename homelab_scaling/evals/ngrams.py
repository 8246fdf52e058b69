"""Runs of n words as 64-bit numbers, made by numpy at tens of MB/s.

A word is a run of letters and digits, case-folded; marks and blanks only part words. In code every operator and bracket
is a word of its own, and an underscore parts the words of an identifier. A word's hash is a polynomial over its
characters, an n-gram's one over its words, both modulo 2^64 and taken from prefix sums; each character and each word is
mixed first, so that the polynomial has no structure to fail on. One false hit in 10^9 training words is expected for
some 2 x 10^10 n-grams looked for.

Legend: N characters, W words, G n-grams.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from homelab_scaling.evals.texts import Language

Hashes = npt.NDArray[np.uint64]

BARRIER = "\0"
"""Between training documents: a word that no evaluation document holds, so no n-gram crosses it."""
_PARTS, _LETTER, _ALONE = 0, 1, 2
_N_CODEPOINTS = sys.maxunicode + 1
_BLOCK_CHARS = 1 << 18
"""Of prefix sums: small enough for the cache."""
_OF_CHARS, _OF_WORDS = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_BUCKETS = 1 << 22


def word_hashes(text: str, language: Language) -> Hashes:
    """(W,) one number per word of a text."""
    return np.concatenate([np.empty(0, np.uint64), *_blocks(text.casefold(), language)])


def gram_hashes(words_W: Hashes, n: int) -> Hashes:
    """(W - n + 1,) one number per run of n words; none if there are fewer."""
    if len(words_W) < n:
        return np.empty(0, np.uint64)
    powers, inverses = _powers(_OF_WORDS, _BLOCK_CHARS)
    parts = []
    for first in range(0, len(words_W) - n + 1, _BLOCK_CHARS - n):
        block = words_W[first : first + _BLOCK_CHARS - 1]  # overlaps the next by n - 1 words
        sums = np.zeros(len(block) + 1, np.uint64)
        np.cumsum(block * powers[: len(block)], out=sums[1:])
        parts.append((sums[n:] - sums[:-n]) * inverses[: len(block) - n + 1])
    return _mix(np.concatenate(parts) + np.uint64(n))


class WordStream:
    """The words of a text that comes in pieces; no word is cut in two, no run of n_most words is missed."""

    def __init__(self, language: Language, n_most: int) -> None:
        self._language: Language = language
        self._n_kept = n_most - 1
        self._rest = ""
        self._tail = np.empty(0, np.uint64)

    def feed(self, piece: str) -> Hashes:
        """The words that the piece completes, after the last n_most - 1 of those before."""
        text = self._rest + piece
        cut = _last_parting(text)
        self._rest = text[cut:]
        return self._words(text[:cut])

    def end(self) -> Hashes:
        """The same of what was left."""
        rest, self._rest = self._rest, ""
        return self._words(rest)

    def _words(self, text: str) -> Hashes:
        words = np.concatenate([self._tail, word_hashes(text, self._language)])
        self._tail = words[max(0, len(words) - self._n_kept) :]
        return words


class Sought:
    """A set of n-grams to be looked for, and which of them were seen."""

    def __init__(self, grams: Hashes) -> None:
        self.grams = np.unique(grams)
        self.seen = np.zeros(len(self.grams), dtype=bool)
        # Most n-grams of a text are not sought: one byte of a table says so, without the search in the sorted array.
        self._bucket = np.zeros(_BUCKETS, dtype=bool)
        self._bucket[self._bucket_of(self.grams)] = True

    def look(self, grams: Hashes) -> None:
        """Marks those of the sought that are among `grams`."""
        if not len(self.grams):
            return
        maybe = grams[self._bucket[self._bucket_of(grams)]]
        places = np.minimum(np.searchsorted(self.grams, maybe), len(self.grams) - 1)
        self.seen[places[self.grams[places] == maybe]] = True

    def n_seen(self, grams: Hashes) -> int:
        """How many of `grams`, which must be among the sought, were seen."""
        return int(self.seen[np.searchsorted(self.grams, grams)].sum())

    @staticmethod
    def _bucket_of(grams: Hashes) -> npt.NDArray[np.intp]:
        return (grams & np.uint64(_BUCKETS - 1)).astype(np.intp)


def _last_parting(text: str) -> int:
    """Where a text may be cut so that no word is: at its last blank; 0 if it has none, its length if that is absurd."""
    cut = max(text.rfind(" "), text.rfind("\n"), text.rfind(BARRIER))
    return cut if cut > 0 else 0 if len(text) < _BLOCK_CHARS else len(text)


def _blocks(text: str, language: Language) -> Iterator[Hashes]:
    start = 0
    while start < len(text):
        end = min(len(text), start + _BLOCK_CHARS - 1)
        if end < len(text):
            end = start + (_last_parting(text[start:end]) or end - start)
        yield _hash_block(text[start:end], language)
        start = end


def _hash_block(text: str, language: Language) -> Hashes:
    if text.isascii():
        chars_N: npt.NDArray[Any] = np.frombuffer(text.encode("ascii"), np.uint8)
    else:
        chars_N = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    kind_N = _kinds(language)[chars_N]
    letter_N = kind_N == _LETTER
    before_N = np.concatenate(([False], letter_N[:-1]))
    after_N = np.concatenate((letter_N[1:], [False]))
    alone_N = kind_N == _ALONE
    starts_W = np.flatnonzero((letter_N & ~before_N) | alone_N)
    ends_W = np.flatnonzero((letter_N & ~after_N) | alone_N) + 1
    powers, inverses = _powers(_OF_CHARS, _BLOCK_CHARS)
    sums = np.zeros(len(chars_N) + 1, np.uint64)
    np.cumsum(_mixed_codepoints()[chars_N] * powers[: len(chars_N)], out=sums[1:])
    return _mix((sums[ends_W] - sums[starts_W]) * inverses[starts_W])


@functools.cache
def _kinds(language: Language) -> npt.NDArray[np.uint8]:
    """What each character is to a word: a letter of it, a word alone, or what parts words."""
    kinds = _letters().copy()
    for code in range(33, 127) if language == "code" else ():
        if not chr(code).isalnum() and chr(code) != "_":
            kinds[code] = _ALONE
    kinds[ord(BARRIER)] = _ALONE
    return kinds


@functools.cache
def _letters() -> npt.NDArray[np.uint8]:
    letters = (chr(code).isalnum() for code in range(_N_CODEPOINTS))
    return np.fromiter(letters, np.bool_, _N_CODEPOINTS) * np.uint8(_LETTER)


@functools.cache
def _mixed_codepoints() -> Hashes:
    return _mix(np.arange(1, _N_CODEPOINTS + 1, dtype=np.uint64))


@functools.cache
def _powers(base: int, n: int) -> tuple[Hashes, Hashes]:
    """(base^i, base^-i) modulo 2^64 for i < n; base is odd."""
    powers = []
    for factor in (base, pow(base, -1, 2**64)):
        steps = np.full(n, factor, np.uint64)
        steps[0] = 1
        powers.append(np.cumprod(steps, dtype=np.uint64))
    return powers[0], powers[1]


def _mix(x: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Stafford 2011, variant 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
