"""Text to shards and back: `build_shards` writes a corpus folder, `open_shards` reads one.

    OUT/{train.bin, val.bin, tokenizer.json, build.json, manifest.json}

The .bin files are nanoGPT's: little-endian token ids, nothing else, every document followed by the end-of-text id, in
the order of the sources. manifest.json says what they hold; build.json says what was asked for, so that asking again
finds the finished corpus. A build happens in a hidden folder beside OUT and becomes OUT by one rename at its end, so
what is called OUT is whole; an interrupted build leaves the hidden folder, which the next one replaces.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from homelab_scaling import codec
from homelab_scaling.data.batches import TokenStream
from homelab_scaling.data.build import (
    TOKENIZER,
    BuildRecord,
    BuildRequest,
    Progress,
    Report,
    build_corpus,
    state_hash,
    survey_sources,
)
from homelab_scaling.data.foreign import Dtype, Facts, find_bins, foreign_manifest
from homelab_scaling.data.manifest import MANIFEST, open_stream, read_manifest, verify_files
from homelab_scaling.data.near_duplicates import load_minhash
from homelab_scaling.data.sources import make_source
from homelab_scaling.data.tokenizers import Tokenizer, check_tokenizer, load_tokenizer
from homelab_scaling.errors import DataError, MachineError
from homelab_scaling.runs import flock
from homelab_scaling.specs import CorpusManifest, check_mixture

__all__ = ["Progress", "Report", "Shards", "build_shards", "open_shards"]

BUILD = "build.json"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A corpus, open for reading."""

    folder: Path
    manifest: CorpusManifest
    train: TokenStream
    val: TokenStream

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of these tokens: the file beside the shards, or the one of that name."""
        name = self.manifest.tokenizer_file
        return load_tokenizer(str(self.folder / name) if name else self.manifest.tokenizer)


# ------------------------------------------------------------------------------------------------------------- building


def build_shards(
    sources: Sequence[str],
    tokenizer: str,
    out: Path,
    *,
    text_field: str = "text",
    val_frac: float = 0.02,
    max_bytes: int | None = None,
    weights: Sequence[float] = (),
    epochs: Sequence[float] = (),
    near_duplicates: float | None = None,
    n_workers: int | None = None,
    n_vocab: int | None = None,
    eot_id: int | Literal["none"] | None = None,
    progress: Report | None = None,
) -> CorpusManifest:
    """The manifest of the corpus in `out`, built now or found finished.

    Args:
        sources: files, folders, `python`, `hf:NAME[:CONFIG]`; or one folder of nanoGPT or llm.c token files, which is
            taken over by links.
        tokenizer: `bytes`, `bpe:N` (learnt from 32 MiB of the training documents, chosen by hash), `gpt2` or a path.
        out: the folder to make; a finished corpus of the same request and the same text is returned as it is.
        text_field: of .jsonl, .parquet and hub rows.
        val_frac: share of the documents held out (survey.RULE).
        max_bytes: cap on the text, repetitions counted [bytes]; files are sampled by content hash, a hub stream is cut.
        weights: parts of the training bytes, one per source in order; see data/mixture.py.
        epochs: or passes over each source; without either every document stands there once.
        near_duplicates: Jaccard similarity from which a document is dropped (data/near_duplicates.py).
        n_workers: encoding processes; None takes one per core.
        n_vocab: of token files that are taken over.
        eot_id: of token files that are taken over; "none" if they have none.
        progress: called after every batch.

    Raises:
        SpecError: weights, epochs or near_duplicates that cannot be.
        DataError: a source, the text or the tokenizer is not what it should be, or `out` holds something else.
        MachineError: another build is at work in `out`, no space, a missing package, the hub out of reach.
    """
    report: Report = progress or (lambda _: None)
    request = BuildRequest(
        sources=tuple(sources),
        tokenizer=tokenizer,
        text_field=text_field,
        val_frac=val_frac,
        max_bytes=max_bytes,
        n_vocab=n_vocab,
        eot_id=None if eot_id is None else str(eot_id),
        weights=tuple(map(float, weights)),
        epochs=tuple(map(float, epochs)),
        near_duplicates=near_duplicates,
    )
    _check_request(request, n_workers)
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: this is a file; name a folder for the shards")
    if (out / MANIFEST).exists():
        return _reuse(request, out, report)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: holds other files and no {MANIFEST}; choose another folder, or empty this one")
    foreign = _is_foreign(request)
    made = [] if foreign else [make_source(source, text_field) for source in request.sources]
    try:
        with _building_folder(out) as building:
            if (out / MANIFEST).exists():  # another process finished it while we looked
                return _reuse(request, out, report)
            if foreign:
                manifest, record = _take_over(request, building)
            else:
                manifest, record = build_corpus(request, made, building, n_workers, report)
            _finish(manifest, record, building, out)
    except OSError as error:
        raise MachineError(
            f"{out}: the shards could not be written ({error.strerror}); free space or choose another folder"
        ) from error
    return manifest


@contextmanager
def _building_folder(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, ours alone; nothing of it stays behind but what was renamed to `out`.

    Raises:
        MachineError: another process is building there.
    """
    building = out.parent / f".{out.name}.building"
    lock = building / ".lock"
    new_parents = [parent for parent in out.parents if not parent.exists()]
    with flock(lock, f"{out}: another process is building these shards; wait for it, then run again"):
        try:
            for leftover in building.iterdir():
                if leftover != lock:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)
            if not out.exists():
                for parent in new_parents:
                    with suppress(OSError):
                        parent.rmdir()


def _check_request(request: BuildRequest, n_workers: int | None) -> None:
    if not request.sources:
        raise DataError("no source given; name at least one file, folder, `python` or `hf:NAME`")
    if not 0 < request.val_frac < 0.5:
        raise DataError(f"val_frac = {request.val_frac}, wants a share between 0 and 0.5")
    for name, value in (("max_bytes", request.max_bytes), ("workers", n_workers)):
        if value is not None and value < 1:
            raise DataError(f"{name} = {value}, wants 1 or more")
    check_mixture(
        len(request.sources),
        weights=request.weights,
        epochs=request.epochs,
        near_duplicates=request.near_duplicates,
    )
    if not _is_foreign(request):
        check_tokenizer(request.tokenizer)
        if request.near_duplicates is not None:
            load_minhash()
    elif request.weights or request.epochs or request.near_duplicates is not None:
        raise DataError(
            f"{request.sources[0]}: weights, epochs and near_duplicates are for text, and this is a folder of finished "
            "token files; leave them out"
        )


def _is_foreign(request: BuildRequest) -> bool:
    """The one source is a folder of token files."""
    folder = Path(request.sources[0]).expanduser()
    return len(request.sources) == 1 and request.sources[0] != "python" and folder.is_dir() and bool(find_bins(folder))


def _take_over(request: BuildRequest, building: Path) -> tuple[CorpusManifest, BuildRecord]:
    """Links to another project's token files, and the manifest they lack."""
    folder = Path(request.sources[0]).expanduser().resolve()
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder}: already holds shards with a {MANIFEST}; use it as it is ([data] shards = ...)")
    n_vocab, eot = request.n_vocab, request.eot_id
    eot_id: int | Literal["none"] | None = "none" if eot == "none" else None if eot is None else int(eot)
    own = load_tokenizer(request.tokenizer) if Path(request.tokenizer).expanduser().exists() else None
    if own is not None:
        n_vocab, eot_id = n_vocab or own.n_vocab, own.eot_id if eot_id is None else eot_id
    facts = Facts(n_vocab=n_vocab, eot_id=eot_id, tokenizer=request.tokenizer)
    manifest = replace(foreign_manifest(folder, facts), sources=request.sources)
    if own is not None and own.save(building / TOKENIZER):
        manifest = replace(manifest, tokenizer_file=TOKENIZER, tokenizer_hash=own.hash)
    for file in (*manifest.train.files, *manifest.val.files):
        (building / file.name).symlink_to(folder / file.name)
    return manifest, BuildRecord(request=request, state_hash=None, text_hash=None, tokenizer_rule="as told")


def _finish(manifest: CorpusManifest, record: BuildRecord, building: Path, out: Path) -> None:
    """Makes the build visible, whole or not at all."""
    codec.write_json(building / BUILD, record)
    codec.write_json(building / MANIFEST, manifest)
    codec.sync_folder(building)
    os.replace(building, out)
    (out / ".lock").unlink(missing_ok=True)
    codec.sync_folder(out.parent)


def _reuse(request: BuildRequest, out: Path, report: Report) -> CorpusManifest:
    """The manifest of the finished corpus in `out`, or DataError if it is of another request or another text."""
    remedy = "delete that folder to build it anew, or choose another"
    if not (out / BUILD).exists():
        raise DataError(f"{out}: already holds shards, and no {BUILD} that says how they were made; {remedy}")
    record = codec.read_json(out / BUILD, BuildRecord)
    asked, made = codec.to_plain(request), codec.to_plain(record.request)
    differing = [f"{key} is {made[key]!r}, asked for {asked[key]!r}" for key in asked if asked[key] != made[key]]
    if differing:
        raise DataError(f"{out}: already holds other shards ({'; '.join(differing)}); {remedy}")
    shards = open_shards(out)
    if record.text_hash is None:
        return shards.manifest
    try:
        sources = [make_source(source, request.text_field) for source in request.sources]
    except DataError:  # the text is gone, its shards are here
        return shards.manifest
    if any(source.startswith("hf:") for source in request.sources) or record.state_hash == state_hash(sources):
        return shards.manifest
    found = survey_sources(sources, report)
    if found.text_hash != record.text_hash:
        raise DataError(f"{out}: its shards were built from other text than the sources hold now; {remedy}")
    return shards.manifest


# -------------------------------------------------------------------------------------------------------------- reading


def open_shards(
    folder: Path,
    *,
    n_vocab: int | None = None,
    eot_id: int | Literal["none"] | None = None,
    tokenizer: str | None = None,
    dtype: Dtype | None = None,
    verify: bool = False,
) -> Shards:
    """A corpus folder, mapped into memory; sizes are always checked.

    Args:
        folder: of `build_shards`, or of nanoGPT's or llm.c's .bin files.
        n_vocab: for a folder without a manifest; must agree with a manifest that is there, like the next three.
        eot_id: "none" if no token ends a document.
        tokenizer: a name for the vocabulary; `gpt2` and `bytes` imply n_vocab and eot_id.
        dtype: of bare files; uint16 if not told.
        verify: also reads every token: hashes, and the range of ids.

    Raises:
        DataError: no shards, a torn file, a manifest that disagrees with its files, an id out of range.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; make it with `homelab corpus SOURCE --out {folder}`")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        told = {"n_vocab": n_vocab, "eot_id": eot_id, "tokenizer": tokenizer, "dtype": dtype}
        for key, value in told.items():
            has = getattr(manifest, key)
            if value is not None and value != ("none" if has is None else has):
                raise DataError(f"{folder}: {MANIFEST} says {key} = {has}, you said {value}; leave that flag out")
        if verify:
            verify_files(folder, manifest)
    else:
        facts = Facts(n_vocab=n_vocab, eot_id=eot_id, tokenizer=tokenizer, dtype=dtype)
        manifest = foreign_manifest(folder, facts)
    return Shards(
        folder=folder,
        manifest=manifest,
        train=open_stream(folder, manifest, "train"),
        val=open_stream(folder, manifest, "val"),
    )
