"""Text to token ids and back: `bytes`, `bpe:N` (trained here), `gpt2`, or any tokenizer.json.

Encoding never interprets text: a document that spells out `<|endoftext|>` gets the ids of those characters, and only
the shard writer places the end-of-text id. No beginning-of-text or other special id is ever added.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from homelab_scaling.errors import DataError, MachineError

Ids = npt.NDArray[np.uint32]

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Tokens that end a document in published tokenizers, the first one present wins."""
N_BYTES = 256
GPT2_N_VOCAB, GPT2_EOT_ID = 50257, 50256
GPT2_REPOS = ("openai-community/gpt2", "gpt2")
KNOWN_FACTS = {"gpt2": (GPT2_N_VOCAB, GPT2_EOT_ID), "bytes": (N_BYTES + 1, N_BYTES)}
"""(n_vocab, eot_id) of the tokenizers whose name says it."""
_FORMS = "`bytes`, `bpe:N` (such as bpe:4096), `gpt2` or the path of a tokenizer.json"


class Tokenizer(Protocol):
    """Text to ids and back."""

    name: str
    """As asked for."""
    n_vocab: int
    """Every id is below this."""
    eot_id: int
    """Ends a document; `encode_batch` never returns it."""
    hash: str
    """SHA-256 of what decides the ids: equal hash, equal ids."""

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        """The ids of each text, without any special id."""
        ...

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """The text behind ids; what is not UTF-8 becomes the replacement character."""
        ...

    def save(self, path: Path) -> bool:
        """Writes tokenizer.json; False where there is nothing to write."""
        ...


class BytesTokenizer:
    """One id per UTF-8 byte, 0 to 255, and 256 for end of text."""

    name = "bytes"
    n_vocab = N_BYTES + 1
    eot_id = N_BYTES
    hash = hashlib.sha256(b"one id per UTF-8 byte, 256 ends a document").hexdigest()

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        array = np.asarray(ids, dtype=np.int64)
        borders = np.flatnonzero(array == N_BYTES)
        documents = [part[part < N_BYTES].astype(np.uint8).tobytes() for part in np.split(array, borders)]
        return EOT.encode().join(documents).decode("utf-8", errors="replace")

    def save(self, path: Path) -> bool:
        return False


class FileTokenizer:
    """A tokenizer of the `tokenizers` library, from its JSON text; pickles as that text, for worker processes."""

    def __init__(self, name: str, json_text: str) -> None:
        """Reads the JSON.

        Raises:
            DataError: not a tokenizer.json, or one without an end-of-text token.
        """
        from tokenizers import Tokenizer as Engine

        try:
            self._engine: Any = Engine.from_str(json_text)
        except Exception as error:  # the Rust binding raises bare Exception
            raise DataError(
                f"{name}: not a tokenizer.json that `tokenizers` can read ({error}); give another"
            ) from None
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True  # <|endoftext|> inside a text is text
        vocab: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        ends = [end for end in EOT_NAMES if end in vocab]
        if not ends:
            raise DataError(f"{name}: the tokenizer has no end-of-text token; add one of {', '.join(EOT_NAMES)}")
        self.name = name
        self.eot_id = vocab[ends[0]]
        self.n_vocab = max(vocab.values()) + 1
        canonical = json.dumps(json.loads(self._engine.to_str()), sort_keys=True, separators=(",", ":"))
        self.hash = hashlib.sha256(canonical.encode()).hexdigest()

    def __reduce__(self) -> tuple[type["FileTokenizer"], tuple[str, str]]:
        return FileTokenizer, (self.name, self.to_json())

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        text: str = self._engine.to_str(pretty=True)
        return text

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        text: str = self._engine.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> bool:
        path.write_text(self.to_json(), encoding="utf-8")
        return True


def bpe_size(asked: str) -> int | None:
    """N of `bpe:N`; None for any other tokenizer.

    Raises:
        DataError: N is not a number, or leaves no room for a merge.
    """
    if not asked.startswith("bpe:"):
        return None
    digits = asked.removeprefix("bpe:").replace("_", "")
    if not digits.isdecimal() or not N_BYTES + 1 < int(digits) <= 1_000_000:
        raise DataError(f"tokenizer {asked}: wants bpe:N with N from {N_BYTES + 2} (every byte, the end) to 1000000")
    return int(digits)


def train_bpe(asked: str, texts: Iterable[str]) -> FileTokenizer:
    """A byte-level BPE with exactly N ids, learnt from texts; the same texts in the same order give the same merges.

    Raises:
        DataError: the texts hold too few repeated pairs for N ids.
    """
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers, trainers

    n_vocab = bpe_size(asked)
    assert n_vocab is not None
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[EOT],
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    learnt = engine.get_vocab_size()
    if learnt != n_vocab:
        raise DataError(
            f"tokenizer {asked}: the training text yields only {learnt} ids; ask for bpe:{learnt} or less, or give "
            "more text"
        )
    return FileTokenizer(asked, engine.to_str())


def load_tokenizer(asked: str) -> Tokenizer:
    """The tokenizer of that name or path; `bpe:N` is trained on a corpus and cannot be loaded.

    Raises:
        DataError: no such tokenizer, or its file is damaged.
        MachineError: gpt2 is not in the local cache and the hub cannot be reached.
    """
    if asked == "bytes":
        return BytesTokenizer()
    if asked == "gpt2":
        return _load_gpt2()
    path = Path(asked).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if bpe_size(asked) is not None or not path.is_file():
        raise DataError(f"tokenizer {asked}: no such tokenizer or file; wants {_FORMS}")
    return FileTokenizer(asked, _read_text(path))


def check_tokenizer(asked: str) -> None:
    """Raises what `load_tokenizer` would, now and not after an hour of reading."""
    if bpe_size(asked) is None:
        load_tokenizer(asked)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the hub client's five retry warnings off the screen; what it finally raises says it in one sentence."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); restore the file") from None


def _load_gpt2() -> FileTokenizer:
    """GPT-2's tokenizer from the Hugging Face cache (HF_HOME), or from the hub unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = (try_to_load_from_cache(repo, "tokenizer.json") for repo in GPT2_REPOS)
    found = next((path for path in cached if isinstance(path, str)), None)
    try:
        with quiet_hub():
            path = Path(found or hf_hub_download(GPT2_REPOS[0], "tokenizer.json"))
    except Exception as error:  # offline mode, DNS, proxies, HTTP: each library layer has its own exception
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise MachineError(
            f"tokenizer gpt2 is not in the local Hugging Face cache and the hub cannot be reached{offline}: connect "
            "once, set HF_HOME to a cache that has openai-community/gpt2, or give the path of its tokenizer.json"
        ) from error
    tokenizer = FileTokenizer("gpt2", _read_text(path))
    if (tokenizer.n_vocab, tokenizer.eot_id) != KNOWN_FACTS["gpt2"]:
        raise DataError(
            f"{path}: gpt2 has {GPT2_N_VOCAB} ids and ends a text with {GPT2_EOT_ID}, this file says "
            f"{tokenizer.n_vocab} and {tokenizer.eot_id}; delete it from the cache"
        )
    return tokenizer
