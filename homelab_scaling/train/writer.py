"""Checkpoints are written beside the training: the loop waits for a copy in host memory, not for the disk."""

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor


class Writer:
    """Does one piece of work at a time in a thread; its error comes out where it is waited for.

    The thread is no daemon: a process that ends in good order ends after it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.background_s = 0.0
        """Seconds that the finished pieces took, of which the caller only saw what `wait` blocked."""

    def submit(self, work: Callable[[], object]) -> None:
        """Begins `work` once the piece before it is done.

        Raises:
            Exception: what the piece before it raised; then `work` is not begun.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint-writer")
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        began = time.monotonic()
        try:
            work()
        except Exception as error:  # told to whoever waits
            self._error = error
        finally:
            self.background_s += time.monotonic() - began

    @property
    def busy(self) -> bool:
        """Whether a piece is under way."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises the error of a piece that has ended; does not wait for one that has not."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is under way; raises what the last piece raised, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


class HostCopies:
    """Copies of tensors in host memory that is kept for the next time, pinned where the tensors are on a GPU.

    A checkpoint of AdamW in 32 bit takes 12 bytes per parameter of it: 1.5 GB at 124M, 4.3 GB at 350M. Torch rounds
    each pinned block up to a power of two, so that a GPU's copies may take up to twice that.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._copying = False

    def take(self, key: str, tensor: Tensor) -> Tensor:
        """The copy, whole after `finish`."""
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[key] = _host_memory(tensor)
        kept.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        self._copying |= tensor.is_cuda
        return kept

    def finish(self) -> None:
        """Returns when every copy is whole."""
        if self._copying:
            torch.cuda.synchronize()
            self._copying = False


def _host_memory(like: Tensor) -> Tensor:
    try:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
    except RuntimeError:  # no more memory may be pinned: pageable memory is slower, and does
        return torch.empty(like.shape, dtype=like.dtype, device="cpu")
