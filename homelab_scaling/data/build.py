"""One build: read the sources twice, choose, learn a tokenizer if asked, encode, write; all inside one folder."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from homelab_scaling import codec
from homelab_scaling.data import survey as surveys
from homelab_scaling.data.encode import BATCH_BYTES, Batch, choose_workers, encode_batches
from homelab_scaling.data.files import Document, utf8
from homelab_scaling.data.foreign import Dtype
from homelab_scaling.data.mixture import Wish, by_source
from homelab_scaling.data.near_duplicates import NearDuplicates
from homelab_scaling.data.sources import Source
from homelab_scaling.data.survey import DROPPED, VAL, Choice, Survey
from homelab_scaling.data.tokenizers import Tokenizer, bpe_size, load_tokenizer, train_bpe
from homelab_scaling.errors import DataError
from homelab_scaling.specs import CorpusManifest, ShardFile, SourceShare, Split

RULES = 1
"""Raised whenever the same request would give other shards."""
TOKENIZER = "tokenizer.json"
MAX_UINT16_VOCAB = 65_535

Stage = Literal[
    "copying the stream", "reading", "comparing documents", "learning the tokenizer", "encoding", "repeating"
]
_COPY_TOKENS = 4 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a build is."""

    stage: Stage
    n_bytes: int
    """Of text, in this stage."""
    total_bytes: int | None
    n_tokens: int = 0


Report = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Everything that decides a corpus; equal requests over equal text give equal shards."""

    sources: tuple[str, ...]
    tokenizer: str
    text_field: str
    val_frac: float
    max_bytes: int | None
    n_vocab: int | None
    eot_id: str | None
    """As a flag says it: a number or none."""
    weights: tuple[float, ...] = ()
    epochs: tuple[float, ...] = ()
    near_duplicates: float | None = None
    rules: int = RULES


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """build.json: what was asked for, and what the text was like."""

    request: BuildRequest
    state_hash: str | None
    """Over cheap facts of the sources: names, sizes, times, versions; None as below."""
    text_hash: str | None
    """Over every document's hash; None for token files taken over as they are."""
    tokenizer_rule: str


def build_corpus(
    request: BuildRequest, sources: Sequence[Source], building: Path, n_workers: int | None, report: Report
) -> tuple[CorpusManifest, BuildRecord]:
    """Token files and tokenizer of the request inside `building`; the manifest and the record are still to be written.

    Raises:
        DataError: the text is not what it should be, too little, or changed while it was read.
        MachineError: a worker died, a package is missing, the hub cannot be reached.
    """
    spool = building / "spool"
    spool.mkdir()
    state = state_hash(sources)
    tick = _Ticker("copying the stream", request.max_bytes, report).add
    wish = Wish(names=request.sources, weights=request.weights, epochs=request.epochs)
    limits = wish.limits_bytes(request.max_bytes, request.val_frac)
    sources = [source.local(_folder(spool, i), limits[i], tick) for i, source in enumerate(sources)]
    found, choice = _look(request, wish, sources, spool, report)
    tokenizer = _make_tokenizer(request, sources, choice, report)
    dtype: Dtype = "uint16" if tokenizer.n_vocab <= MAX_UINT16_VOCAB else "uint32"
    batches = _batches(sources, found, choice)
    encoded = encode_batches(batches, tokenizer, dtype, choose_workers(n_workers, tokenizer, choice.n_bytes))
    with BinWriter(building / "train.bin", dtype) as train, BinWriter(building / "val.bin", dtype) as val:
        n_bytes = 0
        lengths = []
        for batch in encoded:
            train.write(batch.train)
            val.write(batch.val)
            lengths.append(batch.lengths)
            n_bytes += batch.n_bytes
            n_tokens = train.n_tokens + val.n_tokens
            report(Progress(stage="encoding", n_bytes=n_bytes, total_bytes=choice.n_bytes, n_tokens=n_tokens))
        n_tokens_each = np.zeros(len(choice.part), dtype=np.int64)
        n_tokens_each[choice.part != DROPPED] = np.concatenate(lengths)
        _repeat(train, n_tokens_each, choice, report)
    has_file = tokenizer.save(building / TOKENIZER)
    shutil.rmtree(spool)
    manifest = CorpusManifest(
        tokenizer=request.tokenizer,
        tokenizer_file=TOKENIZER if has_file else None,
        tokenizer_hash=tokenizer.hash,
        n_vocab=tokenizer.n_vocab,
        eot_id=tokenizer.eot_id,
        dtype=dtype,
        train=_split_of(train, found, choice.copies),
        val=_split_of(val, found, choice.part == VAL),
        sources=request.sources,
        held_out_rule=f"{surveys.RULE}; val_frac {request.val_frac}{'' if wish.is_plain else surveys.MIXED_RULE}",
        n_duplicates_dropped=choice.n_duplicates,
        near_duplicates=request.near_duplicates,
        mixture=_shares(wish, found, choice, n_tokens_each),
    )
    rule = "as given"
    if bpe_size(request.tokenizer):
        n_sample_bytes = int(found.sizes_bytes[choice.in_sample].sum())
        rule = (
            f"byte-level BPE learnt from {n_sample_bytes} bytes in {int(choice.in_sample.sum())} training documents "
            f"(those with the lowest hash, at most {surveys.TOKENIZER_SAMPLE_BYTES} bytes)"
        )
    return manifest, BuildRecord(request=request, state_hash=state, text_hash=found.text_hash, tokenizer_rule=rule)


def _folder(spool: Path, number: int) -> Path:
    """A source's own folder, so that two streams do not write the same files."""
    folder = spool / str(number)
    folder.mkdir()
    return folder


def _look(
    request: BuildRequest, wish: Wish, sources: Sequence[Source], spool: Path, report: Report
) -> tuple[Survey, Choice]:
    """The first reading, and what follows from it."""
    if request.near_duplicates is None:
        found = survey_sources(sources, report)
        return found, surveys.choose(found, val_frac=request.val_frac, max_bytes=request.max_bytes, wish=wish)
    with NearDuplicates(spool / "shingles.bin", request.near_duplicates) as near:
        seen = (near.watch(source.documents()) for source in sources)
        found = surveys.read_survey(seen, _Ticker("reading", None, report).add)
        report(Progress(stage="comparing documents", n_bytes=0, total_bytes=None))
        choice = surveys.choose(
            found, val_frac=request.val_frac, max_bytes=request.max_bytes, wish=wish, near=near.find
        )
    return found, choice


def survey_sources(sources: Sequence[Source], report: Report) -> Survey:
    """The first reading: every document's hash, size and group."""
    return surveys.read_survey((source.documents() for source in sources), _Ticker("reading", None, report).add)


def _documents(sources: Sequence[Source]) -> Iterator[Document]:
    for source in sources:
        yield from source.documents()


def state_hash(sources: Sequence[Source]) -> str:
    """Changes with the names, sizes, times or versions behind the sources; cheap."""
    return codec.stable_hash([source.state() for source in sources])


def _make_tokenizer(request: BuildRequest, sources: Sequence[Source], choice: Choice, report: Report) -> Tokenizer:
    if bpe_size(request.tokenizer) is None:
        return load_tokenizer(request.tokenizer)
    report(Progress(stage="learning the tokenizer", n_bytes=0, total_bytes=None))
    sampled = zip(_documents(sources), choice.in_sample.tolist(), strict=False)
    return train_bpe(request.tokenizer, (document.text for document, wanted in sampled if wanted))


def _batches(sources: Sequence[Source], found: Survey, choice: Choice) -> Iterator[Batch]:
    """The chosen documents, in order, checked to be those of the survey."""
    batch = Batch()
    surveyed = found.digests.astype(">u8").tobytes()
    n = -1
    for n, document in enumerate(_documents(sources)):
        part = choice.part[n] if n < len(choice.part) else DROPPED
        text = utf8(document.text, document.name)
        if surveys.content_digest(text) != surveyed[16 * n : 16 * n + 16]:
            raise DataError(f"{document.name}: the text changed while it was read; leave it alone and run again")
        if part == DROPPED:
            continue
        batch.add(document.text, len(text), held_out=bool(part == VAL))
        if batch.n_bytes >= BATCH_BYTES:
            yield batch
            batch = Batch()
    if n + 1 != len(choice.part):
        raise DataError(f"the sources lost {len(choice.part) - n - 1} documents while they were read; run again")
    if batch.texts:
        yield batch


def _repeat(train: "BinWriter", n_tokens_each: npt.NDArray[np.int64], choice: Choice, report: Report) -> None:
    """Appends the further copies: pass after pass over all documents that have another one, so that two copies of a
    document hardly ever meet in one window, where the second could be read off the first."""
    if choice.copies.max() == 1:
        return
    copies, sizes = choice.copies[choice.copies > 0], n_tokens_each[choice.copies > 0]
    ends = np.cumsum(sizes)
    once = train.written()
    for n_before in range(1, int(copies.max())):
        again = np.concatenate(([False], copies > n_before, [False]))
        borders = np.flatnonzero(again[1:] != again[:-1]).reshape(-1, 2)  # of runs of documents: [first, last)
        for first, last in borders.tolist():
            stop = int(ends[last - 1])
            for start in range(int(ends[first] - sizes[first]), stop, _COPY_TOKENS):
                train.write(once[start : min(start + _COPY_TOKENS, stop)])
        report(Progress(stage="repeating", n_bytes=0, total_bytes=None, n_tokens=train.n_tokens))


def _shares(wish: Wish, found: Survey, choice: Choice, n_tokens_each: npt.NDArray[np.int64]) -> tuple[SourceShare, ...]:
    """The table of the mixture."""
    n = len(wish.names)
    trained, held_out = choice.copies > 0, choice.part == VAL

    def total(values: npt.NDArray[Any]) -> list[int]:
        sums: list[int] = by_source(values.astype(np.int64), found.sources, n).tolist()
        return sums

    n_bytes = total(found.sizes_bytes * choice.copies)
    n_tokens, n_unique = total(n_tokens_each * choice.copies), total(n_tokens_each * trained)
    n_documents, n_val, n_val_tokens = total(trained), total(held_out), total(n_tokens_each * held_out)
    return tuple(
        SourceShare(
            name=name,
            weight=wish.shares[i] if wish.weights else None,
            epochs_asked=wish.epochs[i] if wish.epochs else None,
            epochs=n_bytes[i] / choice.have_bytes[i] if choice.have_bytes[i] else 0.0,
            n_documents=n_documents[i],
            n_bytes=n_bytes[i],
            n_tokens=n_tokens[i],
            n_tokens_unique=n_unique[i],
            n_val_documents=n_val[i],
            n_val_tokens=n_val_tokens[i],
            n_exact_duplicates=choice.n_exact[i],
            n_near_duplicates=choice.n_near[i],
        )
        for i, name in enumerate(wish.names)
    )


class _Ticker:
    """Adds up bytes and reports each whole mebibyte."""

    def __init__(self, stage: Stage, total_bytes: int | None, report: Report) -> None:
        self._stage, self._total, self._report = stage, total_bytes, report
        self._n = self._reported = 0

    def add(self, n_bytes: int) -> None:
        self._n += n_bytes
        if self._n - self._reported >= 2**20:
            self._reported = self._n
            self._report(Progress(stage=self._stage, n_bytes=self._n, total_bytes=self._total))


class BinWriter:
    """Appends tokens to a file, hashing as it goes; on the disk when closed."""

    def __init__(self, path: Path, dtype: Dtype) -> None:
        self.path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self.n_tokens = 0
        self._hasher = hashlib.sha256()
        self._file = path.open("wb")

    def __enter__(self) -> "BinWriter":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, ids: npt.NDArray[Any]) -> None:
        data = ids.astype(self._dtype, copy=False).tobytes()
        self._file.write(data)
        self._hasher.update(data)
        self.n_tokens += len(ids)

    def written(self) -> npt.NDArray[Any]:
        """The tokens so far, read in place."""
        self._file.flush()
        return np.asarray(np.memmap(self.path, dtype=self._dtype, mode="r"))

    @property
    def shard(self) -> ShardFile:
        return ShardFile(name=self.path.name, n_tokens=self.n_tokens, sha256=self._hasher.hexdigest())


def _split_of(writer: BinWriter, found: Survey, copies: npt.NDArray[Any]) -> Split:
    return Split(
        files=(writer.shard,),
        n_tokens=writer.n_tokens,
        n_bytes=int((found.sizes_bytes * copies).sum()),
        n_documents=int(copies.sum()),
    )
