"""Run folders that travel: the lab's half takes in and gives out files, a node's half sends what has changed.

Only for clusters whose nodes do not mount the lab. The lab's copy is the truth: a node begins from it and sends
metrics, events and whole checkpoints as they come, so that a node that dies takes half a minute of files and the work
since the last checkpoint with it. A checkpoint appears in the lab whole or not at all, older ones go when it is there,
and a record comes after everything that was there when it was written. Only the node that took a run last may send.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.errors import MachineError
from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep.launch import is_locked

RECORD, SPEC, CHECKPOINTS = "record.json", "spec.json", "checkpoints"
HIDDEN = ".arriving-"
PIECE_BYTES = 64 * 2**20
"""No more of a file is in memory at once: a checkpoint of 1B parameters takes 12 GB."""

Pieces = Iterator[tuple[str, bytes]]
"""Names within a folder and what is in the files; the same name again goes on with the same file."""


class Depot:
    """The lab's half, one for a command.

    Args:
        lab: LAB/<ladder>; runs are named by their path within it.
    """

    def __init__(self, lab: str) -> None:
        self.lab = Path(lab)
        self._stopping = False
        self._holders: dict[str, str] = {}

    def ask_to_stop(self) -> None:
        """Every node that asks hears of it."""
        self._stopping = True

    def stopping(self) -> bool:
        return self._stopping

    def held(self, run: str) -> bool:
        """Whether a trainer has the run's folder in the lab itself."""
        return is_locked(RunFolder(self.lab / run))

    def take(self, run: str, holder: str) -> None:
        """From now on nobody else may send files of this run."""
        self._holders[run] = holder
        checkpoints = RunFolder(self.lab / run).checkpoints
        for left in checkpoints.glob(f"{HIDDEN}*"):
            shutil.rmtree(left, ignore_errors=True)

    def contents(self, run: str) -> Pieces:
        """Every file of a run's folder, as a node needs it to go on."""
        yield from pieces_of(self.lab / run)

    def put(self, run: str, holder: str, name: str, data: bytes) -> None:
        """Replaces one file of a run."""
        self._check(run, holder)
        codec.write_bytes(self.lab / run / name, data)

    def put_piece(self, run: str, holder: str, name: str, data: bytes, *, first: bool) -> None:
        """Of a file of a checkpoint (`CHECKPOINT/FILE`), which does not count until `complete`."""
        self._check(run, holder)
        checkpoint, _, file = name.partition("/")
        folder = RunFolder(self.lab / run).checkpoints / (HIDDEN + checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / file, "wb" if first else "ab") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())

    def complete(self, run: str, holder: str, checkpoint: str) -> None:
        """All its files are here."""
        self._check(run, holder)
        checkpoints = RunFolder(self.lab / run).checkpoints
        shutil.rmtree(checkpoints / checkpoint, ignore_errors=True)
        os.replace(checkpoints / (HIDDEN + checkpoint), checkpoints / checkpoint)
        codec.sync_folder(checkpoints)

    def keep_only(self, run: str, holder: str, checkpoints: list[str]) -> None:
        """The node has deleted the others."""
        self._check(run, holder)
        folder = RunFolder(self.lab / run).checkpoints
        for old in folder.iterdir() if folder.is_dir() else ():
            if old.name not in checkpoints:
                shutil.rmtree(old, ignore_errors=True)

    def _check(self, run: str, holder: str) -> None:
        if self._holders.get(run) != holder:
            raise MachineError(f"{run}: another machine trains it now; what this one still sends is left out")


class Sender:
    """The node's half, one for a run that was just brought here.

    Args:
        folder: of the run, here, as the lab has it.
        tell: `tell(method, *arguments)` calls a Depot and waits.
        run: how the depot names it.
        holder: as whom it was taken.
    """

    def __init__(self, folder: RunFolder, tell: Callable[..., object], run: str, holder: str) -> None:
        self.folder, self.run, self.holder = folder, run, holder
        self._tell = tell
        self._sent = {name: stamp for name in self._names() if (stamp := self._stamp(name)) is not None}
        self._checkpoints = set(self._whole_checkpoints())

    def tell(self, method: str, *arguments: object, **more: object) -> None:
        """Calls a method of the depot that is about this run."""
        self._tell(method, self.run, self.holder, *arguments, **more)

    def send(self) -> None:
        """Whatever is new; the record is read before all else, so that what it names is there, and sent last."""
        stamp = self._stamp(RECORD)
        record = self.folder.record.read_bytes() if stamp is not None else b""
        checkpoints = self._whole_checkpoints()  # looked for before their metrics, which are written by now
        for name in self._names():
            if name not in (RECORD, SPEC):  # the spec names shards as they lie here
                self._send_file(name)
        arrived = [self._send_checkpoint(checkpoint) for checkpoint in checkpoints]
        if all(arrived):  # else the trainer has replaced one meanwhile: the next time, with the newer one
            self.tell("keep_only", checkpoints)
        if stamp is not None and self._sent.get(RECORD) != stamp:
            self.tell("put", RECORD, record)
            self._sent[RECORD] = stamp

    def _names(self) -> list[str]:
        return [name for name in names_of(self.folder.path) if not name.startswith(f"{CHECKPOINTS}/")]

    def _stamp(self, name: str) -> tuple[int, int, int] | None:
        try:
            stat = (self.folder.path / name).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _whole_checkpoints(self) -> list[str]:
        folder = self.folder.checkpoints
        names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        return sorted(name for name in names if not name.startswith("."))

    def _send_file(self, name: str) -> None:
        stamp = self._stamp(name)
        if stamp is not None and self._sent.get(name) != stamp:
            with contextlib.suppress(FileNotFoundError):
                self.tell("put", name, (self.folder.path / name).read_bytes())
                self._sent[name] = stamp

    def _send_checkpoint(self, checkpoint: str) -> bool:
        """Whether the lab has it, as it is here."""
        if checkpoint in self._checkpoints:
            return True
        folder = self.folder.checkpoints / checkpoint
        try:
            before = folder.stat().st_ino
            last = None
            for name, piece in pieces_of(folder):
                self.tell("put_piece", f"{checkpoint}/{name}", piece, first=name != last)
                last = name
            if folder.stat().st_ino != before:
                return False
        except FileNotFoundError:  # the trainer has deleted it since
            return False
        self.tell("complete", checkpoint)
        self._checkpoints.add(checkpoint)
        return True


def names_of(folder: Path) -> list[str]:
    """Every file below a folder, but for hidden ones; what vanishes while one looks is left out."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str(Path(here, name).relative_to(folder)) for name in files if not name.startswith(".")]
    return sorted(found)


def pieces_of(folder: Path) -> Pieces:
    """Every file below a folder, but for hidden ones."""
    for name in names_of(folder):
        with open(folder / name, "rb") as file:
            piece = file.read(PIECE_BYTES)
            yield name, piece
            while piece := file.read(PIECE_BYTES):
                yield name, piece


def unpack(pieces: Pieces, folder: Path) -> None:
    """Replaces a folder by these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    last = None
    for name, piece in pieces:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab" if name == last else "wb") as file:
            file.write(piece)
        last = name
