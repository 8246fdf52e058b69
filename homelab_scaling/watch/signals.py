"""Signals as wishes: noted when they come, obeyed when there is time."""

import contextlib
import os
import select
import signal
import time
from types import FrameType


class Signals:
    """SIGTERM, SIGINT and SIGHUP as a wish; `sleep` ends early when one comes."""

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        """The last one."""
        self.n_caught = 0
        self._n_known = 0  # to whoever sleeps: each signal ends one sleep

    def asked(self) -> bool:
        return self.caught is not None

    def sleep(self, seconds: float) -> None:
        """Sleeps, unless a signal comes, or came since the last sleep."""
        deadline = time.monotonic() + seconds
        while self.n_caught == self._n_known and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(BlockingIOError):
                if select.select([self._read], [], [], left)[0]:
                    os.read(self._read, 64)
        self._n_known = self.n_caught

    def __enter__(self) -> "Signals":
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in self.CAUGHT}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.caught = signal.Signals(number)
        self.n_caught += 1

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)
