"""The records of a .wandb file: LevelDB's log format behind a header of W&B's own.

    file    7 bytes ":W&B", magic 0xBEE1 (uint16), version 0 (uint8); then blocks that end at multiples of 32 KiB
    block   pieces: CRC-32 of kind and data (uint32), length (uint16), kind (uint8), data; its last 6 bytes may be idle
    kind    1 a whole record, 2 its first piece, 3 a middle one, 4 its last

W&B's package wrote and read this in Python up to some version and keeps it to its binary since, so it is read here.

Source: google/leveldb, doc/log_format.md; wandb 0.19, sdk/internal/datastore.py.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

IDENT, MAGIC = b":W&B", 0xBEE1
BLOCK_BYTES = 32 * 1024
FILE_HEADER = struct.Struct("<4sHB")
PIECE_HEADER = struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class NotWandb(Exception):
    """The file does not begin as a .wandb file does."""


def read_records(path: Path) -> Iterator[bytes]:
    """Every whole record, up to the end or to the first damage, which is where a killed process stopped writing.

    Raises:
        NotWandb: the file's first bytes are others.
    """
    content = path.read_bytes()
    if len(content) < FILE_HEADER.size or FILE_HEADER.unpack_from(content)[:2] != (IDENT, MAGIC):
        raise NotWandb(path)
    record = b""
    for kind, piece in _pieces(content):
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield record


def _pieces(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = FILE_HEADER.size
    while True:
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < PIECE_HEADER.size:
            at += left
        if at + PIECE_HEADER.size > len(content):
            return
        checksum, length, kind = PIECE_HEADER.unpack_from(content, at)
        at += PIECE_HEADER.size
        data = content[at : at + length]
        if checksum != zlib.crc32(data, zlib.crc32(bytes([kind]))):
            return
        yield kind, data
        at += length
