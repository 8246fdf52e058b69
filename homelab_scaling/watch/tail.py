"""The new lines of a JSON-lines file that others append to, rewrite, rotate and tear; no byte is read twice."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_BYTES = 16 * 2**20
"""Of a file met for the first time, at most so much of its end is read."""
WITNESS_BYTES = 64
"""The last bytes read, looked at again: if they changed, it is another file."""


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """What came since the last look."""

    lines: list[dict[str, Any]]
    restarted: bool = False
    """The file is another one now (rewritten, rotated, truncated); `lines` are from its beginning."""


class Tail:
    """Reads on where it stopped. A last line without its newline waits; a line that is not an object is skipped.

    Args:
        path: may be absent, now or later.
        first_bytes: how much of the end is read first; None reads all.
    """

    def __init__(self, path: Path, *, first_bytes: int | None = FIRST_BYTES) -> None:
        self.path, self.first_bytes = path, first_bytes
        self.changed_s: float | None = None
        """When the file was last written to (Unix time); None while it is not there."""
        self.skipped_start = False
        """Whether the beginning of the file was never read."""
        self._inode: int | None = None
        self._offset = 0
        self._witness = b""

    def read(self) -> Fresh:
        """Every whole line since the last call; nothing where there is no file."""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                self.changed_s = stat.st_mtime
                known = self._inode is not None
                same = known and stat.st_ino == self._inode and stat.st_size >= self._offset
                if same and self._witness:
                    file.seek(self._offset - len(self._witness))
                    same = file.read(len(self._witness)) == self._witness
                if not same:
                    self._inode, self._offset, self._witness = stat.st_ino, 0, b""
                    self._skip_to_end(stat.st_size)
                file.seek(self._offset)
                text = file.read()
        except OSError:
            self.changed_s = None
            return Fresh(lines=[])
        if not same and self.skipped_start:
            cut = text.find(b"\n") + 1
            text, self._offset = text[cut:], self._offset + cut
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._witness = (self._witness + whole)[-WITNESS_BYTES:]
        return Fresh(
            lines=[line for line in map(_parse, whole.splitlines()) if line is not None], restarted=known and not same
        )

    def _skip_to_end(self, size: int) -> None:
        self.skipped_start = self.first_bytes is not None and size > self.first_bytes
        if self.skipped_start and self.first_bytes is not None:
            self._offset = size - self.first_bytes


def _parse(line: bytes) -> dict[str, Any] | None:
    """An object, or None; NaN and infinity, which our files never hold, are unknown."""
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
