"""Passes on what a trainer prints to a file, line by line; the trainer does not depend on anybody reading it."""

from collections.abc import Callable
from pathlib import Path

MOST_BYTES = 1 << 20


class Relay:
    """Follows one file.

    Args:
        path: what the trainer prints to.
        run_id: put before lines that do not begin with it.
        from_end: leave out what is there already.
    """

    def __init__(self, path: Path, run_id: str, say: Callable[[str], None], *, from_end: bool = True) -> None:
        self.path, self.run_id, self.say = path, run_id, say
        self._at = path.stat().st_size if from_end and path.exists() else 0
        self._rest = b""

    def pass_on(self, *, last: bool = False) -> None:
        """Says every whole line that is new; with `last`, the unfinished one too."""
        with open(self.path, "rb") as file:
            file.seek(self._at)
            new = file.read(MOST_BYTES)
        self._at += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        if last and self._rest:
            whole.append(self._rest)
        for line in whole:
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self.say(text if text.startswith(("pretrain: ", self.run_id)) else f"{self.run_id}: {text}")
