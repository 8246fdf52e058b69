"""manifest.json of a corpus folder: read, and held against the files it names."""

from pathlib import Path
from typing import Literal

import numpy as np

from homelab_scaling import codec
from homelab_scaling.data.batches import TokenStream
from homelab_scaling.data.foreign import check_file, map_tokens
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.specs import CorpusManifest, ShardFile

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> CorpusManifest:
    """manifest.json, checked against itself and the files' sizes.

    Raises:
        DataError: it is damaged, contradicts itself, or a file is missing or of another size.
    """
    path = folder / MANIFEST
    try:
        manifest = codec.read_json(path, CorpusManifest)
    except SpecError as error:
        raise DataError(f"{folder}: {error}") from None
    if manifest.n_vocab < 2 or not 0 <= (manifest.eot_id or 0) < manifest.n_vocab:
        raise DataError(f"{path}: n_vocab {manifest.n_vocab} and eot_id {manifest.eot_id} do not fit; build it again")
    for half, split in (("train", manifest.train), ("val", manifest.val)):
        said = sum(file.n_tokens for file in split.files)
        if said != split.n_tokens or not split.n_tokens:
            raise DataError(f"{path}: {half} has {split.n_tokens} tokens, its files {said}; build it again")
        for file in split.files:
            _check_size(folder, manifest, file)
    return manifest


def _check_size(folder: Path, manifest: CorpusManifest, file: ShardFile) -> None:
    path = folder / file.name
    if Path(file.name).name != file.name or not path.is_file():
        raise DataError(
            f"{path}: named by {MANIFEST} but not there; restore it, or delete the folder and build it again"
        )
    wanted = manifest.header_bytes + file.n_tokens * np.dtype(manifest.dtype).itemsize
    found = path.stat().st_size
    if found != wanted:
        what = "torn" if found < wanted else "not the one"
        raise DataError(
            f"{path}: {found} bytes, {MANIFEST} says {wanted}; the file is {what}: restore it, or delete the folder "
            "and build it again"
        )


def verify_files(folder: Path, manifest: CorpusManifest) -> None:
    """Reads every token: raises DataError if a hash differs or an id is out of range."""
    for file in (*manifest.train.files, *manifest.val.files):
        path = folder / file.name
        if check_file(path, manifest.header_bytes, manifest.dtype, manifest.n_vocab) != file.sha256:
            raise DataError(f"{path}: its SHA-256 is not the one in {MANIFEST}; the file was changed, restore it")


def open_stream(folder: Path, manifest: CorpusManifest, half: Literal["train", "val"]) -> TokenStream:
    """The tokens of one half, read in place."""
    files = manifest.train.files if half == "train" else manifest.val.files
    return TokenStream([map_tokens(folder / file.name, manifest.header_bytes, manifest.dtype) for file in files])
