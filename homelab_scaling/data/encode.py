"""Documents to token ids over worker processes: results in order, a bounded number of batches in flight.

The workers are plain Python processes that talk pickle over their stdin and stdout. multiprocessing is not used: its
start methods run the caller's main module again or fork a process that has Rust threads, and its pool hangs when a
worker dies while a batch is on its way.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
    lengths: npt.NDArray[np.int64]
    """Ids of each document, its end of text included."""
    n_bytes: int


def choose_workers(n_workers: int | None, tokenizer: Tokenizer, n_bytes: int) -> int:
    """Worker processes worth starting; 1 means this process does it."""
    if n_bytes < MIN_BYTES_FOR_WORKERS or isinstance(tokenizer, BytesTokenizer):
        return 1
    return n_workers or len(os.sched_getaffinity(0))


def encode_batches(
    batches: Iterable[Batch], tokenizer: Tokenizer, dtype: npt.DTypeLike, n_workers: int
) -> Iterator[Encoded]:
    """Each batch encoded, in order; at most 2 n_workers + 1 batches are in memory.

    Raises:
        MachineError: a worker died.
    """
    if n_workers == 1:
        for batch in batches:
            yield _encode(batch, tokenizer, np.dtype(dtype))
        return
    workers = [_Worker() for _ in range(n_workers)]
    pending: deque[_Worker] = deque()
    try:
        for worker in workers:
            worker.send((tokenizer, np.dtype(dtype)))
        for number, batch in enumerate(batches):
            pending.append(workers[number % n_workers])
            pending[-1].send(batch)
            if len(pending) > 2 * n_workers:
                yield pending.popleft().receive()
        while pending:
            yield pending.popleft().receive()
    finally:
        for worker in workers:
            worker.close()


def _encode(batch: Batch, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Encoded:
    ids = tokenizer.encode_batch(batch.texts)
    end = np.array([tokenizer.eot_id], dtype=dtype)
    halves: tuple[list[npt.NDArray[Any]], list[npt.NDArray[Any]]] = ([], [])
    for document, held_out in zip(ids, batch.held_out, strict=True):
        halves[held_out].extend((document.astype(dtype), end))
    train, val = (np.concatenate(half) if half else np.empty(0, dtype) for half in halves)
    lengths = np.array([len(document) + 1 for document in ids], dtype=np.int64)
    return Encoded(train=train, val=val, lengths=lengths, n_bytes=batch.n_bytes)


class _Worker:
    """One process that runs `serve`; it ends when we close its stdin, or die."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # the processes are the parallelism
            process_group=0,  # Ctrl-C is for us; we end the workers
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def send(self, item: Any) -> None:
        try:
            pickle.dump(item, self._in, protocol=pickle.HIGHEST_PROTOCOL)
            self._in.flush()
        except BrokenPipeError:
            raise self._died() from None

    def receive(self) -> Encoded:
        try:
            encoded: Encoded = pickle.load(self._out)
        except (EOFError, pickle.UnpicklingError):
            raise self._died() from None
        return encoded

    def _died(self) -> MachineError:
        code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return MachineError(
            f"a worker process that encodes text died ({how}; signal 9 is often a lack of memory); run again, with "
            "fewer --workers if it repeats"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            with suppress(BrokenPipeError):
                pipe.close()


def serve() -> None:
    """A worker's life: a tokenizer and a dtype, then batches in and ids out, until stdin ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the pickles
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(inbox,), daemon=True).start()
    tokenizer, dtype = inbox.get()
    while True:
        pickle.dump(_encode(inbox.get(), tokenizer, dtype), out, protocol=pickle.HIGHEST_PROTOCOL)
        out.flush()


def _receive(inbox: "queue.SimpleQueue[Any]") -> None:
    """Takes batches in while others are encoded, so that the parent's writing never waits for its own reading."""
    try:
        while True:
            inbox.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        os._exit(0)  # the parent is done with us, or gone
