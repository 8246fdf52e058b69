"""How fast text becomes tokens, beside `tokenizers` itself, and how fast tokens become batches."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from homelab_scaling.data.batches import BatchOrder, TokenStream, n_windows, read_windows
from homelab_scaling.data.build import BinWriter
from homelab_scaling.data.encode import BATCH_BYTES, Batch, choose_workers, encode_batches
from homelab_scaling.data.sources import PythonSource
from homelab_scaling.data.tokenizers import FileTokenizer, train_bpe

TOKENIZER = "bpe:4096"
TEXT_BYTES = 10_000_000
TARGET_RATIO = 0.80
_BATCH_SEQS, _N_BATCHES = 32, 400


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One contestant over all rounds."""

    name: str
    mb_per_s: tuple[float, ...]

    @property
    def median_mb_per_s(self) -> float:
        return statistics.median(self.mb_per_s)


@dataclass(frozen=True, kw_only=True)
class DataBench:
    """Encoding in rounds, every contestant once a round; reading at two context lengths."""

    n_bytes: int
    n_tokens: int
    n_cores: int
    tokenizers_version: str
    ours: Rate
    peer: Rate
    peer_fast: Rate
    ratios: tuple[float, ...]
    """Ours over `encode_batch`, round by round."""
    target_ratio: float
    read_tokens_per_s: dict[str, float]
    """By context length: batches of 32 sequences in training order."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def summary(self) -> str:
        """For a person."""
        lines = [
            f"{self.n_bytes / 1e6:.1f} MB of Python source, {TOKENIZER}, {self.n_tokens:,} tokens, "
            f"{self.n_cores} cores, tokenizers {self.tokenizers_version}, {len(self.ratios)} rounds "
            "(median, lowest to highest)",
            *(
                f"  {rate.name:<58} {rate.median_mb_per_s:6.2f} MB/s  ({min(rate.mb_per_s):.2f} to "
                f"{max(rate.mb_per_s):.2f})"
                for rate in (self.ours, self.peer, self.peer_fast)
            ),
            f"  ours / encode_batch, per round: {self.ratio:.2f}  ({min(self.ratios):.2f} to {max(self.ratios):.2f}), "
            f"wanted {self.target_ratio:.2f}: {'reached' if self.ratio >= self.target_ratio else 'MISSED'}",
            *(
                f"  reading batches, context {context}: {rate / 1e6:,.0f} M tokens/s"
                for context, rate in self.read_tokens_per_s.items()
            ),
        ]
        return "\n".join(lines)


def run(*, n_rounds: int, say: Callable[[str], None], text_bytes: int | None = None) -> DataBench:
    """Times our encoder (worker start, hashing and writing included) against `tokenizers` on the same text.

    Args:
        n_rounds: each runs every contestant once, in alternating order.
        say: told what is going on.
        text_bytes: of the Python standard library [bytes]; None takes 10 MB.
    """
    import tokenizers

    texts = _texts(text_bytes or TEXT_BYTES)
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f"learning {TOKENIZER} from {n_bytes / 1e6:.1f} MB")
    tokenizer = train_bpe(TOKENIZER, texts)
    engine: Any = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "train.bin")
            contestants: dict[str, Callable[[], Any]] = {
                "ours: text to a hashed file of ids, worker processes": lambda: _ours(texts, tokenizer, path),
                "tokenizers encode_batch, its own threads, ids left inside": lambda: engine.encode_batch(texts),
                "tokenizers encode_batch_fast (no offsets)": lambda: engine.encode_batch_fast(texts),
            }
            rates = _race(contestants, n_bytes, n_rounds, say)
            tokens = np.memmap(path, dtype=np.uint16, mode="r")
            reading = {str(context): _read_rate(tokens, context) for context in (128, 1024)}
            n_tokens = len(tokens)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    ours, peer, peer_fast = (Rate(name=name, mb_per_s=tuple(rates[name])) for name in contestants)
    return DataBench(
        n_bytes=n_bytes,
        n_tokens=n_tokens,
        n_cores=len(os.sched_getaffinity(0)),
        tokenizers_version=tokenizers.__version__,
        ours=ours,
        peer=peer,
        peer_fast=peer_fast,
        ratios=tuple(a / b for a, b in zip(ours.mb_per_s, peer.mb_per_s, strict=True)),
        target_ratio=TARGET_RATIO,
        read_tokens_per_s=reading,
    )


def _texts(text_bytes: int) -> list[str]:
    texts: list[str] = []
    n_bytes = 0
    for document in PythonSource().documents():
        texts.append(document.text)
        n_bytes += len(document.text.encode())
        if n_bytes >= text_bytes:
            break
    return texts


def _race(
    contestants: dict[str, Callable[[], Any]], n_bytes: int, n_rounds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """MB/s of each contestant, round by round; every other round in reverse order."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(n_rounds):
        names = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for name in names:
            began_s = time.perf_counter()
            result = contestants[name]()
            rates[name].append(n_bytes / 1e6 / (time.perf_counter() - began_s))
            del result  # freeing a million tokens' strings is not the next one's time
        say(f"round {number + 1} of {n_rounds}: " + ", ".join(f"{rates[n][-1]:.2f}" for n in contestants) + " MB/s")
    return rates


def _ours(texts: list[str], tokenizer: FileTokenizer, path: Path) -> int:
    def batches() -> Any:
        batch = Batch()
        for text in texts:
            batch.add(text, len(text.encode()), held_out=False)
            if batch.n_bytes >= BATCH_BYTES:
                yield batch
                batch = Batch()
        yield batch

    n_workers = choose_workers(None, tokenizer, sum(map(len, texts)))
    with BinWriter(path, "uint16") as file:
        for encoded in encode_batches(batches(), tokenizer, np.uint16, n_workers):
            file.write(encoded.train)
    return file.n_tokens


def _read_rate(tokens: Any, context: int) -> float:
    """Tokens per second of shuffled batches, in the order that training reads them."""
    stream = TokenStream([tokens])
    order = BatchOrder(n_windows(len(stream), context), seed=0)
    began_s = time.perf_counter()
    for step in range(_N_BATCHES):
        read_windows(stream, order.windows(step * _BATCH_SEQS, _BATCH_SEQS), context)
    return _N_BATCHES * _BATCH_SEQS * context / (time.perf_counter() - began_s)
