"""Token files that other projects wrote: nanoGPT's bare .bin and llm.c's .bin with a header.

    nanoGPT  uint16 tokens, nothing else; train.bin and val.bin
    llm.c    256 int32 (magic, version, n_tokens, ...), then tokens; any number of files

Neither says what the ids mean, so vocabulary, end-of-text id and tokenizer have to be told.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from homelab_scaling.codec import stable_hash
from homelab_scaling.data.tokenizers import KNOWN_FACTS
from homelab_scaling.errors import DataError
from homelab_scaling.specs import CorpusManifest, ShardFile, Split

Dtype = Literal["uint16", "uint32"]
LLMC_HEADER_BYTES = 1024
_LLMC_KINDS: dict[int, tuple[int, Dtype]] = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Magic -> (version, token type). Source: karpathy/llm.c, dev/data/data_common.py."""
_CHUNK_BYTES = 32 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a folder without a manifest cannot say about itself."""

    n_vocab: int | None = None
    eot_id: int | Literal["none"] | None = None
    """"none": the corpus has no end-of-text token; None: not told."""
    tokenizer: str | None = None
    """A name for the vocabulary; `gpt2` and `bytes` imply n_vocab and eot_id."""
    dtype: Dtype | None = None
    """Of bare files; uint16, as nanoGPT writes, if not told."""


def find_bins(folder: Path) -> dict[str, list[Path]]:
    """The folder's .bin files by half, told by `train` and `val` in their names; empty if it holds none of these."""
    bins = sorted(p for p in folder.glob("*.bin") if not p.name.startswith("."))
    halves = {half: [p for p in bins if half in p.name.lower()] for half in ("train", "val")}
    return halves if halves["train"] or halves["val"] else {}


def foreign_manifest(folder: Path, facts: Facts) -> CorpusManifest:
    """A manifest for a folder that has none; reads every token once, for hashes and the range of ids.

    Raises:
        DataError: no token files, a fact is missing, a file is torn, or an id is not below n_vocab.
    """
    halves = find_bins(folder)
    missing = [half for half in ("train", "val") if not halves.get(half)]
    if missing:
        raise DataError(f"{folder}: no manifest.json and no *{missing[0]}*.bin; name a folder that holds token shards")
    tokenizer, n_vocab, eot_id = _complete(folder, facts)
    kinds = {path: _kind_of(path, facts.dtype) for paths in halves.values() for path in paths}
    if len(set(kinds.values())) > 1:
        raise DataError(f"{folder}: its .bin files are of different kinds (bare, or with a header); keep one kind")
    header_bytes, dtype = next(iter(kinds.values()))
    splits = {half: _split(halves[half], header_bytes, dtype, n_vocab) for half in halves}
    return CorpusManifest(
        tokenizer=tokenizer,
        tokenizer_file=None,
        tokenizer_hash=stable_hash(["told, not read from a file", tokenizer, n_vocab, eot_id]),
        n_vocab=n_vocab,
        eot_id=eot_id,
        dtype=dtype,
        header_bytes=header_bytes,
        train=splits["train"],
        val=splits["val"],
        sources=(folder.name,),
        held_out_rule="as found: the files named val",
    )


def _complete(folder: Path, facts: Facts) -> tuple[str, int, int | None]:
    known = KNOWN_FACTS.get(facts.tokenizer or "")
    n_vocab = facts.n_vocab if facts.n_vocab is not None or known is None else known[0]
    eot_id = facts.eot_id if facts.eot_id is not None or known is None else known[1]
    told = {"--tokenizer": facts.tokenizer, "--n-vocab": n_vocab, "--eot-id": eot_id}
    missing = [flag for flag, value in told.items() if value is None]
    if facts.tokenizer is None or n_vocab is None or eot_id is None:
        raise DataError(
            f"{folder}: these token files have no manifest.json and do not say what their ids mean; add "
            f"{', '.join(missing)} (--tokenizer gpt2 implies the others; --eot-id none if no token ends a document)"
        )
    if n_vocab < 2 or (eot_id != "none" and not 0 <= eot_id < n_vocab):
        raise DataError(f"{folder}: n_vocab {n_vocab} and eot_id {eot_id} do not fit; wants 0 <= eot_id < n_vocab")
    return facts.tokenizer, n_vocab, None if eot_id == "none" else eot_id


def _kind_of(path: Path, told: Dtype | None) -> tuple[int, Dtype]:
    """(header bytes, token type) of one file."""
    if path.stat().st_size < LLMC_HEADER_BYTES:
        return 0, told or "uint16"
    magic, found, _n_tokens = _header(path)
    if magic not in _LLMC_KINDS:
        return 0, told or "uint16"
    version, dtype = _LLMC_KINDS[magic]
    if found != version:
        raise DataError(f"{path}: llm.c header version {found}, wants {version}; write it again")
    return LLMC_HEADER_BYTES, dtype


def _header(path: Path) -> tuple[int, int, int]:
    """Magic, version and number of tokens, if it is llm.c's."""
    with path.open("rb") as file:
        magic, version, n_tokens = np.frombuffer(file.read(12), dtype="<i4").tolist()
    return magic, version, n_tokens


def _split(paths: list[Path], header_bytes: int, dtype: Dtype, n_vocab: int) -> Split:
    files = tuple(_shard_file(path, header_bytes, dtype, n_vocab) for path in paths)
    return Split(files=files, n_tokens=sum(f.n_tokens for f in files), n_bytes=None, n_documents=None)


def _shard_file(path: Path, header_bytes: int, dtype: Dtype, n_vocab: int) -> ShardFile:
    size = path.stat().st_size - header_bytes
    n_tokens, torn = divmod(size, np.dtype(dtype).itemsize)
    if header_bytes:
        said = _header(path)[2]
        if said != n_tokens or torn:
            raise DataError(
                f"{path}: the header says {said} tokens, the file holds {n_tokens}; it is torn, copy it again"
            )
    if torn or not n_tokens:
        raise DataError(f"{path}: {size} bytes are not a whole number of {dtype} tokens; it is torn, copy it again")
    return ShardFile(name=path.name, n_tokens=n_tokens, sha256=check_file(path, header_bytes, dtype, n_vocab))


def map_tokens(path: Path, header_bytes: int, dtype: Dtype) -> npt.NDArray[Any]:
    """The file's tokens, read in place."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=header_bytes)


def check_file(path: Path, header_bytes: int, dtype: Dtype, n_vocab: int) -> str:
    """The file's SHA-256, having seen that every id is below n_vocab.

    Raises:
        DataError: an id is not.
    """
    hasher = hashlib.sha256()
    position = -header_bytes
    for chunk in _chunks(path, header_bytes):
        hasher.update(chunk)
        if position >= 0:
            ids = np.frombuffer(chunk, dtype=np.dtype(dtype).newbyteorder("<"))
            if (worst := int(ids.max())) >= n_vocab:
                at = position // ids.itemsize + int(ids.argmax())
                raise DataError(
                    f"{path}: token {at} is {worst}, but the vocabulary has {n_vocab} ids; give the right --n-vocab, "
                    "or restore the file"
                )
        position += len(chunk)
    return hasher.hexdigest()


def _chunks(path: Path, header_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if header_bytes:
            yield file.read(header_bytes)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
