"""How much of each source a corpus takes: weights or epochs to held-out shares and numbers of copies.

Sizes are bytes, as in the Pile's table, so a mixture does not depend on the tokenizer. With val_frac f, source i gives
the mixture m_i bytes: f m_i of them are held out, (1 - f) m_i are trained on, so both halves have the same shares.
Held-out text is never repeated, and what is held out of a source is gone for training: e_i passes over the rest of its
S_i bytes make up the training text.

    epochs asked   m_i = e_i S_i / (1 - f + f e_i)     from e_i (S_i - f m_i) = (1 - f) m_i; all shrunk to max_bytes
    weights asked  m_i = w_i M, with M = max_bytes, or else the least S_i / w_i: no source then has to be repeated

Source: Gao et al. 2020, "The Pile", table 1, for weights and epochs; tests/data/test_mixtures.py for the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homelab_scaling.errors import DataError

Sizes = npt.NDArray[np.int64]

MAX_HELD_OUT_FRAC = 0.5
"""Of a source; one that is repeated so often that more would have to be held out is refused."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What was asked for, checked; equal for every source where neither weights nor epochs are given."""

    names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Everything once, or as much of it as max_bytes allows."""
        return not self.weights and not self.epochs

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, with 1 as their sum."""
        return tuple(weight / sum(self.weights) for weight in self.weights)

    def limits_bytes(self, max_bytes: int | None, val_frac: float) -> list[int | None]:
        """How much of a stream from the hub is worth copying, by source: its part, and a quarter more for what is
        dropped and held out."""
        if max_bytes is None or not self.weights:
            return [max_bytes] * len(self.names)
        return [max(1, int(1.25 * share * max_bytes / (1 - val_frac))) for share in self.shares]


def mixed_bytes(wish: Wish, have_bytes: Sizes, val_frac: float, max_bytes: int | None) -> npt.NDArray[np.float64]:
    """Bytes that each source gives to both halves together, repetitions counted (m_i of the module).

    Args:
        have_bytes: of each source, duplicates gone.

    Raises:
        DataError: a source has no text, or has to be repeated so often that half of it would be held out.
    """
    for name, have in zip(wish.names, have_bytes.tolist(), strict=True):
        if not have:
            raise DataError(
                f"{name}: no text of its own is left after duplicates of other text were dropped; leave that source "
                "out, or name it before the source that holds the same text"
            )
    if wish.weights:
        shares = np.array(wish.shares)
        mixed = shares * (float(np.min(have_bytes / shares)) if max_bytes is None else max_bytes)
    else:
        epochs = np.array(wish.epochs)
        mixed = epochs * have_bytes / (1 - val_frac + val_frac * epochs)
        if max_bytes is not None:
            mixed *= min(1.0, max_bytes / mixed.sum())
    for name, have, takes in zip(wish.names, have_bytes.tolist(), mixed.tolist(), strict=True):
        if val_frac * takes > MAX_HELD_OUT_FRAC * have:
            raise DataError(
                f"{name}: {val_frac * takes / have:.0%} of its {have:,} bytes would be held out, because the held-out "
                "text has the shares of the mixture, and half is the limit; give it more text, or lower its weight, "
                "its epochs, max_bytes or val_frac"
            )
    return mixed


def wanted_epochs(
    wish: Wish, have_bytes: Sizes, mixed: npt.NDArray[np.float64], val_frac: float, max_bytes: int | None
) -> list[float]:
    """Passes over the training text of each source.

    Args:
        have_bytes: of training text, by source; what is held out is gone.
        mixed: of `mixed_bytes`.
    """
    if wish.epochs and (max_bytes is None or mixed.sum() < max_bytes * (1 - _ROUNDING)):
        return list(wish.epochs)
    target = (1 - val_frac) * mixed
    if wish.weights and max_bytes is None:  # what was held out is not exactly the share asked for
        shares = np.array(wish.shares)
        target = shares * float(np.min(have_bytes / shares))
    return [float(epochs) for epochs in target / have_bytes]


def copies(epochs: float, sizes_bytes: Sizes) -> npt.NDArray[np.int32]:
    """How often each document stands in the training half: the whole part of `epochs`, and once more for those that
    come first, while they fit its fraction of the bytes.

    Args:
        sizes_bytes: of one source's training documents, in the order of their hashes.
    """
    whole = int(epochs + _ROUNDING)
    frac = max(0.0, epochs - whole)
    total = np.cumsum(sizes_bytes)
    n_more = int(np.searchsorted(total, frac * total[-1] * (1 + _ROUNDING), side="right")) if len(total) else 0
    found = np.full(len(sizes_bytes), whole, dtype=np.int32)
    found[:n_more] += 1
    return found


def by_source(values: npt.NDArray[np.int64], sources: npt.NDArray[np.int32], n_sources: int) -> Sizes:
    """Sums of `values`, one per source; exact below 2^53."""
    return np.bincount(sources, weights=values, minlength=n_sources).astype(np.int64)


def check_copies(wish: Wish, n_bytes: Sequence[int]) -> None:
    """Raises DataError where a source's part is smaller than any document, so that nothing of it is trained on."""
    for name, size in zip(wish.names, n_bytes, strict=True):
        if not size:
            raise DataError(
                f"{name}: its part of the mixture is smaller than its first document; raise its weight, its epochs or "
                "max_bytes, or cut its text into smaller documents"
            )
