"""Run folders that travel: the lab's half takes in and gives out files, a node's half sends what has changed.

Only for clusters whose nodes do not mount the lab. The lab's copy is the truth: a node begins from it and sends
metrics, events and whole checkpoints as they come, so that a node that dies takes half a minute of files and the work
since the last checkpoint with it. A checkpoint appears in the lab whole or not at all, and the record, which names
rows, comes after the rows' weights.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.runs import RunFolder

RECORD = "record.json"
HIDDEN = ".arriving-"


class Depot:
    """The lab's half, one for a command.

    Args:
        lab: LAB/<ladder>; runs are named by their path within it.
    """

    def __init__(self, lab: str) -> None:
        self.lab = Path(lab)
        self._stopping = False

    def ask_to_stop(self) -> None:
        """Every node that asks hears of it."""
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def contents(self, run: str) -> Iterator[tuple[str, bytes]]:
        """Every file of a run's folder, as a node needs it to go on."""
        folder = self.lab / run
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                yield str(name), path.read_bytes()

    def put(self, run: str, name: str, data: bytes) -> None:
        """Replaces one file of a run."""
        path = self.lab / run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        codec.write_bytes(path, data)

    def put_part(self, run: str, checkpoint: str, name: str, data: bytes) -> None:
        """One file of a checkpoint, which does not count until `complete`."""
        folder = RunFolder(self.lab / run).checkpoints / (HIDDEN + checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        codec.write_bytes(folder / name, data)

    def complete(self, run: str, checkpoint: str) -> None:
        """All its files are here."""
        checkpoints = RunFolder(self.lab / run).checkpoints
        shutil.rmtree(checkpoints / checkpoint, ignore_errors=True)
        os.replace(checkpoints / (HIDDEN + checkpoint), checkpoints / checkpoint)

    def keep_only(self, run: str, checkpoints: list[str]) -> None:
        """The node has deleted the others."""
        folder = RunFolder(self.lab / run).checkpoints
        for old in folder.iterdir() if folder.is_dir() else ():
            if old.name not in checkpoints:
                shutil.rmtree(old, ignore_errors=True)


class Sender:
    """The node's half, one for a launch.

    Args:
        folder: of the run, here.
        tell: `tell(method, *arguments)` calls a Depot and waits.
        run: how the depot names it.
    """

    def __init__(self, folder: RunFolder, tell: Callable[..., object], run: str) -> None:
        self.folder, self.tell, self.run = folder, tell, run
        self._sent: dict[str, tuple[int, int]] = {}
        self._checkpoints: set[str] = set()

    def send(self) -> None:
        """Whatever is new; the record last, because it names what must be there."""
        checkpoints = self._whole_checkpoints()  # looked for first: their metrics are written by now
        for path in sorted(self.folder.path.rglob("*")):
            name = str(path.relative_to(self.folder.path))
            if path.is_file() and not name.startswith(("checkpoints/", ".")) and name != RECORD:
                self._send_file(path, name)
        for checkpoint in checkpoints:
            if checkpoint not in self._checkpoints:
                self._send_checkpoint(checkpoint)
        self.tell("keep_only", self.run, checkpoints)
        self._send_file(self.folder.record, RECORD)

    def _whole_checkpoints(self) -> list[str]:
        folder = self.folder.checkpoints
        names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        return sorted(name for name in names if not name.startswith("."))

    def _send_file(self, path: Path, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(name) != stamp:
                self.tell("put", self.run, name, path.read_bytes())
                self._sent[name] = stamp

    def _send_checkpoint(self, checkpoint: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # the trainer has deleted it since
            for path in sorted((self.folder.checkpoints / checkpoint).iterdir()):
                self.tell("put_part", self.run, checkpoint, path.name, path.read_bytes())
            self.tell("complete", self.run, checkpoint)
            self._checkpoints.add(checkpoint)


def unpack(files: Iterator[tuple[str, bytes]], folder: Path) -> None:
    """Replaces a folder by these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
