"""Where text comes from: files, folders, `python` (the embedded default) and `hf:NAME[:CONFIG]`.

A source yields its documents in one fixed order, whatever the file system's, and can be read again: a build reads it
once to see what is there (hashes, sizes), and again to encode what it chose.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from homelab_scaling.data.files import READERS, Document, text_of, utf8
from homelab_scaling.data.tokenizers import quiet_hub
from homelab_scaling.errors import DataError, MachineError

PYTHON_PACKAGES = ("torch", "numpy", "scipy")
_NO_SOURCE_FOLDERS = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "lib-dynload"}
_MACHINE_MADE = {"version.py", "_version.py", "__config__.py", "sitecustomize.py", "usercustomize.py"}
"""Written by the build or the distribution: they differ between two installs of one version."""
_SPOOL_FILE_BYTES = 256 * 1024**2
_SPOOL_GROUP_BYTES = 8 * 1024**2

Tick = Callable[[int], None]
"""Called with the UTF-8 bytes just read."""


class Source(Protocol):
    """Somewhere text comes from."""

    def local(self, spool: Path, max_bytes: int | None, tick: Tick) -> "Source":
        """A source that can be read twice for nothing: itself, or a copy of the stream inside `spool`."""
        ...

    def documents(self) -> Iterator[Document]:
        """Every document that is not empty, always in the same order."""
        ...

    def state(self) -> list[str]:
        """Cheap facts (names, sizes, times, versions) that change when the text changes."""
        ...


def make_source(asked: str, text_field: str) -> Source:
    """The source behind a SOURCE argument.

    Raises:
        DataError: it does not exist, is empty, or is of a kind that cannot be read.
    """
    if asked == "python":
        return PythonSource()
    if asked.startswith("hf:"):
        return HubSource(asked=asked, text_field=text_field)
    path = Path(asked).expanduser()
    if path.is_dir():
        return FilesSource(files=tuple(_files_below(path)), text_field=text_field)
    if not path.is_file():
        raise DataError(
            f"{asked}: no such file or folder; a source is a .txt, .jsonl or .parquet file, a folder of them, "
            "`python` or `hf:NAME[:CONFIG]`"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{asked}: cannot read {path.suffix or 'a file without suffix'}; wants {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{asked}: the file is empty; leave it out or restore it")
    return FilesSource(files=((path.name, path),), text_field=text_field)


def _files_below(folder: Path) -> list[tuple[str, Path]]:
    """Readable files below a folder in the order of their relative names; hidden ones are left out."""
    found = []
    for here, subfolders, names in os.walk(folder):
        subfolders[:] = [s for s in subfolders if not s.startswith(".")]
        paths = [Path(here, n) for n in names if not n.startswith(".")]
        found += [(p.relative_to(folder).as_posix(), p) for p in paths if p.suffix.lower() in READERS]
    if not found:
        raise DataError(f"{folder}: no {', '.join(READERS)} file in it; name a folder that holds text")
    return sorted(found)


@dataclass(frozen=True, kw_only=True)
class FilesSource:
    """Files in a fixed order."""

    files: tuple[tuple[str, Path], ...]
    """(name for messages, path)."""
    text_field: str

    def local(self, spool: Path, max_bytes: int | None, tick: Tick) -> "FilesSource":
        return self

    def documents(self) -> Iterator[Document]:
        for name, path in self.files:
            try:
                for document in READERS[path.suffix.lower()](path, name, self.text_field):
                    if document.text:
                        yield document
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); mend that and run again") from None

    def state(self) -> list[str]:
        try:
            stats = [(name, path.stat()) for name, path in self.files]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); mend or remove it") from None
        return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]


@dataclass(frozen=True, kw_only=True)
class PythonSource:
    """The Python standard library, torch, numpy and scipy as installed here, without their tests.

    One document per .py file, ordered by package and path. A group is the first folder or module below the package
    (`torch/distributed`, `stdlib/asyncio`, `stdlib/argparse`): code repeats within it, so it is held out as a whole.
    With the same Python and the same pinned packages everybody has the same text.
    """

    def local(self, spool: Path, max_bytes: int | None, tick: Tick) -> "PythonSource":
        return self

    def documents(self) -> Iterator[Document]:
        for package, root in self._roots():
            for name, path in sorted(_python_files(root)):
                try:
                    with tokenize.open(path) as file:  # obeys the file's own coding line
                        text = file.read()
                except (SyntaxError, UnicodeDecodeError):  # ... which may be wrong: then Python cannot read it either
                    continue
                if text:
                    group = f"{package}/{name.split('/')[0].removesuffix('.py')}"
                    yield Document(text=text, name=f"{package}/{name}", group=group)

    def state(self) -> list[str]:
        versions = [f"{name} {importlib.metadata.version(name)}" for name, _root in self._roots()[1:]]
        return [f"python {platform.python_version()}", *versions]

    @staticmethod
    def _roots() -> list[tuple[str, Path]]:
        roots = [("stdlib", Path(sysconfig.get_paths()["stdlib"]))]
        for package in PYTHON_PACKAGES:
            spec = importlib.util.find_spec(package)  # finds, does not import
            if spec is None or spec.origin is None:
                raise MachineError(
                    f"the source `python` reads {package}, which is not installed; pip install {package}"
                )
            roots.append((package, Path(spec.origin).parent))
        return roots


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for here, subfolders, names in os.walk(root):
        subfolders[:] = [
            s for s in subfolders if s not in _NO_SOURCE_FOLDERS and not s.startswith((".", "__pycache__", "config-"))
        ]
        for name in names:
            if name.endswith(".py") and name not in _MACHINE_MADE and not name.startswith("_sysconfigdata"):
                path = Path(here, name)
                yield path.relative_to(root).as_posix(), path


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """The train split of a data set on the Hugging Face hub (or a local folder), streamed through `datasets`.

    The stream is copied once to Parquet in the build's own folder, because a build reads text more than once; with
    `max_bytes` it ends there, so the cap is a prefix of the stream and not, as for files, a sample spread by hash.
    """

    asked: str
    text_field: str

    def local(self, spool: Path, max_bytes: int | None, tick: Tick) -> FilesSource:
        rows = self._rows()
        files: list[tuple[str, Path]] = []
        n_bytes = n_rows = 0
        while max_bytes is None or n_bytes < max_bytes:
            room = _SPOOL_FILE_BYTES if max_bytes is None else min(_SPOOL_FILE_BYTES, max_bytes - n_bytes)
            path = spool / f"{len(files):05d}.parquet"
            n_new, n_new_bytes = _spool(rows, path, room, tick)
            if not n_new:
                break
            files.append((f"{self.asked} (rows from {n_rows})", path))
            n_rows, n_bytes = n_rows + n_new, n_bytes + n_new_bytes
        if not files:
            raise DataError(f"{self.asked}: the stream holds no text; choose another data set or configuration")
        return FilesSource(files=tuple(files), text_field="text")

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self._rows()):
            yield Document(text=text, name=f"{self.asked}: row {number}")

    def state(self) -> list[str]:
        return []  # asking the hub for a revision would want the network; a finished build is not streamed again

    def _rows(self) -> Iterator[str]:
        name, _, config = self.asked.removeprefix("hf:").partition(":")
        try:
            import datasets
        except ModuleNotFoundError:
            raise MachineError(
                f"{self.asked}: streaming from the hub wants `datasets`; pip install 'homelab_scaling[hub]'"
            ) from None
        number = 0
        try:
            with quiet_hub():
                stream: Any = datasets.load_dataset(name, config or None, split="train", streaming=True)
            for number, row in enumerate(stream, start=1):
                where = f"{self.asked}: row {number}"
                text = text_of(row, self.text_field, where)
                if text:
                    utf8(text, where)
                    yield text
        except DataError:
            raise
        except Exception as error:  # datasets raises anything: connection, parsing, missing name, missing configuration
            detail = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise DataError(
                f"{self.asked}: `datasets` gave up after {number} rows ({detail}); check the name, the configuration "
                "(hf:NAME:CONFIG) and the network, then run again"
            ) from error


def _spool(rows: Iterator[str], path: Path, max_bytes: int, tick: Tick) -> tuple[int, int]:
    """Copies rows to one Parquet file until it holds `max_bytes` of text; (rows, bytes) copied."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.large_string())])
    n_rows = n_bytes = 0
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        group: list[str] = []
        group_bytes = 0
        for text in rows:
            size = len(text.encode())
            group.append(text)
            n_rows, n_bytes, group_bytes = n_rows + 1, n_bytes + size, group_bytes + size
            tick(size)
            if group_bytes >= _SPOOL_GROUP_BYTES:
                writer.write_table(pyarrow.table([group], schema=schema))
                group, group_bytes = [], 0
            if n_bytes >= max_bytes:
                break
        writer.write_table(pyarrow.table([group], schema=schema))
    return n_rows, n_bytes
