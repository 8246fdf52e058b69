"""Documents to token ids over worker processes: results in order, a bounded number of batches in flight."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from homelab_scaling.data.tokenizers import BytesTokenizer, Tokenizer
from homelab_scaling.errors import MachineError

BATCH_BYTES = 256 * 1024
MIN_BYTES_FOR_WORKERS = 4 * 1024**2
"""Below this, starting workers (0.4 s) costs more than they save."""


@dataclass(slots=True)
class Batch:
    """Documents on their way to a worker."""

    texts: list[str] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    n_bytes: int = 0

    def add(self, text: str, n_bytes: int, *, held_out: bool) -> None:
        self.texts.append(text)
        self.held_out.append(held_out)
        self.n_bytes += n_bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch's ids by half, every document followed by the end-of-text id, in the order of the documents."""

    train: npt.NDArray[Any]
    val: npt.NDArray[Any]
    n_bytes: int


def choose_workers(n_workers: int | None, tokenizer: Tokenizer, n_bytes: int) -> int:
    """Worker processes worth starting; 1 means this process does it."""
    if n_bytes < MIN_BYTES_FOR_WORKERS or isinstance(tokenizer, BytesTokenizer):
        return 1
    return n_workers or len(os.sched_getaffinity(0))


def encode_batches(
    batches: Iterable[Batch], tokenizer: Tokenizer, dtype: npt.DTypeLike, n_workers: int
) -> Iterator[Encoded]:
    """Each batch encoded, in order; at most 2 n_workers + 2 batches are in memory.

    Raises:
        MachineError: a worker died.
    """
    if n_workers == 1:
        for batch in batches:
            yield _encode(batch, tokenizer, np.dtype(dtype))
        return
    pool = ProcessPoolExecutor(
        n_workers,
        mp_context=multiprocessing.get_context("spawn"),  # a fork of a process with Rust threads may hang
        initializer=_start_worker,
        initargs=(tokenizer, np.dtype(dtype)),
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) > 2 * n_workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise MachineError(
            "a worker process that encodes text died (killed, or out of memory); run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(batch: Batch, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Encoded:
    ids = tokenizer.encode_batch(batch.texts)
    end = np.array([tokenizer.eot_id], dtype=dtype)
    halves: tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]] = ([], [])
    for document, held_out in zip(ids, batch.held_out, strict=True):
        halves[held_out].extend((document.astype(dtype), end))
    train, val = (np.concatenate(half) if half else np.empty(0, dtype) for half in halves)
    return Encoded(train=train, val=val, n_bytes=batch.n_bytes)


_worker: tuple[Tokenizer, np.dtype[Any]] | None = None  # one per worker process, set once by its initializer


def _start_worker(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    global _worker  # noqa: PLW0603
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = tokenizer, dtype


def _die_with_parent() -> None:
    """A pool's workers wait forever if their parent is killed; these end with it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(batch: Batch) -> Encoded:
    assert _worker is not None
    return _encode(batch, *_worker)
