"""Token ids to the bytes they stand for, fast and exact where the tokenizer works on bytes (GPT-2's kind, and ours).

A byte-level vocabulary is a table of byte strings, so a stretch of tokens is decoded by one gather. Any other tokenizer
decodes by its own method.
"""

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from homelab_scaling.export.hf_tokenizer import letters_of_bytes

Bytes = npt.NDArray[np.uint8]
_N_PROBES, _PROBE_TOKENS = 4, 256


class Decoder:
    """Ids of one tokenizer to text.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`.
        n_vocab: of the ids that will be given.
        replace: id -> the bytes to write for it, such as a mark between documents.
    """

    def __init__(self, tokenizer: Any, n_vocab: int, replace: dict[int, bytes] | None = None) -> None:
        self._tokenizer = tokenizer
        self._replace = replace or {}
        strings = _byte_strings(tokenizer, n_vocab)
        self.exact = strings is not None
        """Whether ids become bytes by a table; otherwise by the tokenizer's `decode`, which may lose some."""
        if strings is not None:
            strings = [self._replace.get(i, string) for i, string in enumerate(strings)]
            self._lengths = np.array([len(string) for string in strings], dtype=np.int64)
            self._starts = np.cumsum(self._lengths) - self._lengths
            self._flat: Bytes = np.frombuffer(b"".join(strings), dtype=np.uint8)

    def to_bytes(self, ids: npt.NDArray[Any]) -> bytes:
        """The text of the ids in UTF-8; it may begin or end inside a character if the ids do."""
        if not self.exact:
            return self._slowly(ids)
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        shift = np.repeat(self._starts[ids] - ends + lengths, lengths)
        return self._flat[shift + np.arange(len(shift))].tobytes()

    def _slowly(self, ids: npt.NDArray[Any]) -> bytes:
        borders = np.flatnonzero(np.isin(ids, list(self._replace)))
        out, start = b"", 0
        for border in [*borders.tolist(), len(ids)]:
            out += _plain(self._tokenizer, ids[start:border].tolist()).encode()
            out += self._replace[int(ids[border])] if border < len(ids) else b""
            start = border + 1
        return out


def _plain(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _byte_strings(tokenizer: Any, n_vocab: int) -> list[bytes] | None:
    """What each id stands for, or None if the vocabulary is not of bytes; tried against the tokenizer itself."""
    byte_of = _byte_of_letter()
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    strings = []
    for token in tokenizer.convert_ids_to_tokens(list(range(n_vocab))):
        if token is None:  # ids without a token: a padded vocabulary
            strings.append(b"")
        elif token in added:
            strings.append(token.encode())
        elif all(letter in byte_of for letter in token):
            strings.append(bytes(byte_of[letter] for letter in token))
        else:
            return None
    known = [i for i, string in enumerate(strings) if string]
    rng = np.random.default_rng(0)
    for _ in range(_N_PROBES if known else 0):
        ids = rng.choice(known, _PROBE_TOKENS).tolist()
        if b"".join(strings[i] for i in ids).decode("utf-8", errors="replace") != _plain(tokenizer, ids):
            return None
    return strings


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(letters_of_bytes())}
