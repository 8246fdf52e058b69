"""SIGTERM and Ctrl-C as a wish, which the loop obeys at its next boundary."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

PATIENCE_S = 5.0


class StopWish:
    """Catches both signals while entered; a second one after a while kills the process.

    Not at once: on Ctrl-C a launcher passes on a SIGTERM to ranks that have the terminal's SIGINT already.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._asked_s = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopWish":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason, self._asked_s = f"stopped by {signal.Signals(number).name}", time.monotonic()
        elif time.monotonic() - self._asked_s > PATIENCE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
