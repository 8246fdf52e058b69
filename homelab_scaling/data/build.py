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
from homelab_scaling.data.sources import Source
from homelab_scaling.data.survey import DROPPED, TRAIN, VAL, Choice, Survey
from homelab_scaling.data.tokenizers import Tokenizer, bpe_size, load_tokenizer, train_bpe
from homelab_scaling.errors import DataError
from homelab_scaling.specs import CorpusManifest, ShardFile, Split

RULES = 1
"""Raised whenever the same request would give other shards."""
TOKENIZER = "tokenizer.json"
MAX_UINT16_VOCAB = 65_535

Stage = Literal["copying the stream", "reading", "learning the tokenizer", "encoding"]


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
    sources = [source.local(spool, request.max_bytes, tick) for source in sources]
    found = survey_sources(sources, report)
    choice = surveys.choose(found, val_frac=request.val_frac, max_bytes=request.max_bytes)
    tokenizer = _make_tokenizer(request, sources, choice, report)
    dtype: Dtype = "uint16" if tokenizer.n_vocab <= MAX_UINT16_VOCAB else "uint32"
    batches = _batches(sources, found, choice)
    encoded = encode_batches(batches, tokenizer, dtype, choose_workers(n_workers, tokenizer, choice.n_bytes))
    with BinWriter(building / "train.bin") as train, BinWriter(building / "val.bin") as val:
        n_bytes = 0
        for batch in encoded:
            train.write(batch.train)
            val.write(batch.val)
            n_bytes += batch.n_bytes
            n_tokens = train.n_tokens + val.n_tokens
            report(Progress(stage="encoding", n_bytes=n_bytes, total_bytes=choice.n_bytes, n_tokens=n_tokens))
    has_file = tokenizer.save(building / TOKENIZER)
    shutil.rmtree(spool)
    manifest = CorpusManifest(
        tokenizer=request.tokenizer,
        tokenizer_file=TOKENIZER if has_file else None,
        tokenizer_hash=tokenizer.hash,
        n_vocab=tokenizer.n_vocab,
        eot_id=tokenizer.eot_id,
        dtype=dtype,
        train=_split_of(train, found, choice.part == TRAIN),
        val=_split_of(val, found, choice.part == VAL),
        sources=request.sources,
        held_out_rule=f"{surveys.RULE}; val_frac {request.val_frac}",
        n_duplicates_dropped=choice.n_duplicates,
    )
    rule = "as given"
    if bpe_size(request.tokenizer):
        n_sample_bytes = int(found.sizes_bytes[choice.in_sample].sum())
        rule = (
            f"byte-level BPE learnt from {n_sample_bytes} bytes in {int(choice.in_sample.sum())} training documents "
            f"(those with the lowest hash, at most {surveys.TOKENIZER_SAMPLE_BYTES} bytes)"
        )
    return manifest, BuildRecord(request=request, state_hash=state, text_hash=found.text_hash, tokenizer_rule=rule)


def survey_sources(sources: Sequence[Source], report: Report) -> Survey:
    """The first reading: every document's hash, size and group."""
    return surveys.read_survey(_documents(sources), _Ticker("reading", None, report).add)


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

    def __init__(self, path: Path) -> None:
        self.path = path
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
        data = ids.astype(ids.dtype.newbyteorder("<"), copy=False).tobytes()
        self._file.write(data)
        self._hasher.update(data)
        self.n_tokens += len(ids)

    @property
    def shard(self) -> ShardFile:
        return ShardFile(name=self.path.name, n_tokens=self.n_tokens, sha256=self._hasher.hexdigest())


def _split_of(writer: BinWriter, found: Survey, mine: npt.NDArray[np.bool_]) -> Split:
    return Split(
        files=(writer.shard,),
        n_tokens=writer.n_tokens,
        n_bytes=int(found.sizes_bytes[mine].sum()),
        n_documents=int(mine.sum()),
    )
