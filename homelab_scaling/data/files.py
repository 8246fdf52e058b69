"""Documents out of .txt, .jsonl and .parquet files, streamed: no file is ever held in memory as a whole.

.txt    UTF-8. A line `<|endoftext|>` ends a document (as in TinyStories). A longer stretch is cut into documents of at
        most 64 KiB: at the last blank line of the second half of the window, or else the last line end there, or else
        between two characters. Nothing but the marker and the line end on either side of it is dropped.
.jsonl  one JSON object per line, one document per line.
.parquet one document per row.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from homelab_scaling.errors import DataError, MachineError

MAX_TXT_DOCUMENT_BYTES = 64 * 1024
EOT_MARK = b"<|endoftext|>"
_BLOCK_BYTES = 1024 * 1024
_SLACK_BYTES = 64
"""Read ahead of a window, so that a marker and the line ends beside it are never split."""
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text that the model may learn to begin and to end."""

    text: str
    name: str
    """Where it came from, for messages."""
    group: str | None = None
    """Documents of a group are held out together; None: on its own."""


def read_txt(path: Path, name: str, _field: str) -> Iterator[Document]:
    """The documents of a text file (see the module for where it is cut).

    Raises:
        DataError: a UTF-16 byte-order mark, a NUL byte, or a byte that is not UTF-8.
    """
    with path.open("rb") as file:
        _skip_bom(file, name)
        for offset, piece in _txt_pieces(file):
            yield Document(text=_decode(piece, name, offset), name=f"{name} (byte {offset})")


def _skip_bom(file: BinaryIO, name: str) -> None:
    head = file.read(len(_UTF8_BOM))
    if head.startswith(_UTF16_BOMS):
        raise DataError(f"{name}: begins with a UTF-16 byte-order mark; convert it: iconv -f UTF-16 -t UTF-8")
    file.seek(len(_UTF8_BOM) if head == _UTF8_BOM else 0)


def _txt_pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(offset in the file, bytes) of each document; holds at most two blocks."""
    start = file.tell()
    buffer, pos, final = b"", 0, False
    while True:
        if not final and len(buffer) - pos < MAX_TXT_DOCUMENT_BYTES + _SLACK_BYTES:
            block = file.read(_BLOCK_BYTES)
            start, buffer, pos, final = start + pos, buffer[pos:] + block, 0, not block
            continue
        if pos == len(buffer):
            return
        mark = buffer.find(EOT_MARK, pos, pos + MAX_TXT_DOCUMENT_BYTES + len(EOT_MARK))
        if mark >= 0:
            piece = buffer[pos:mark].removesuffix(b"\n").removesuffix(b"\r")
            end = mark + len(EOT_MARK)
            end += next((len(line_end) for line_end in (b"\r\n", b"\n") if buffer.startswith(line_end, end)), 0)
        else:
            end = len(buffer) if len(buffer) - pos <= MAX_TXT_DOCUMENT_BYTES else pos + _cut(buffer, pos)
            piece = buffer[pos:end]
        yield start + pos, piece
        pos = end


def _cut(buffer: bytes, pos: int) -> int:
    """Length of the document that begins at `pos`, where no marker ends it."""
    half, end = pos + MAX_TXT_DOCUMENT_BYTES // 2, pos + MAX_TXT_DOCUMENT_BYTES
    for border in (b"\n\n", b"\n\r\n", b"\n"):
        found = buffer.rfind(border, half, end)
        if found >= 0:
            return found + len(border) - pos
    while end > half and buffer[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end - pos


def _decode(piece: bytes, name: str, offset: int) -> str:
    nul = piece.find(b"\0")
    if nul >= 0:
        raise DataError(
            f"{name}: byte {offset + nul} is NUL, so this is not UTF-8 text (UTF-16, or no text at all); convert it "
            "with iconv or leave it out"
        )
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: byte {offset + error.start} (0x{piece[error.start]:02x}) is not UTF-8; convert the file, for "
            "example with iconv -f LATIN1 -t UTF-8"
        ) from None


def read_jsonl(path: Path, name: str, field: str) -> Iterator[Document]:
    """One document per line: the text under `field`.

    Raises:
        DataError: a line that is not UTF-8, not a JSON object, or has no text under `field`.
    """
    with path.open("rb") as file:
        _skip_bom(file, name)
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{name}: line {number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                raise DataError(f"{where} is not UTF-8; convert the file with iconv") from None
            except ValueError as error:
                raise DataError(f"{where} is not JSON ({error}); mend or remove that line") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} is not a JSON object; wants one like {{{field!r}: ...}}")
            yield Document(text=text_of(row, field, where), name=where)


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    """The text under `field` of a row, or DataError naming the fields there are."""
    if field not in row:
        known = ", ".join(sorted(map(str, row))) or "none"
        raise DataError(f"{where} has no field {field!r} (fields: {known}); name the right one with --text-field")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} holds {type(text).__name__}, wants text; choose another --text-field"
        )
    return text


def utf8(text: str, where: str) -> bytes:
    """The UTF-8 bytes of a text, or DataError: JSON can hold half a surrogate pair, UTF-8 cannot."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair, which no UTF-8 text can hold; mend or "
            "remove that document"
        ) from None


def read_parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    """One document per row: the text of the column `field`.

    Raises:
        DataError: no Parquet file, no such column, or a row without text.
        MachineError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise MachineError(
            f"{name}: reading Parquet wants pyarrow; install it with pip install 'homelab_scaling[parquet]'"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if field not in columns:
            text_of(dict.fromkeys(columns), field, name)
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                where = f"{name}: row {number}"
                yield Document(text=text_of({field: value}, field, where), name=where)
    except (pyarrow.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{name}: cannot be read as Parquet ({detail}); restore the file") from None


READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
