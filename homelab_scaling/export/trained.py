"""Which checkpoint of which run is meant, and what the run's files say of it.

Nothing here loads weights; every file of the checkpoint is held against its hash.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.data.manifest import MANIFEST as CORPUS
from homelab_scaling.data.tokenizers import KNOWN_FACTS, BytesTokenizer, Tokenizer, load_tokenizer
from homelab_scaling.errors import CheckpointError, DataError, MachineError, SpecError, UserError
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.runs import Row, RunFolder, RunRecord
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.train.checkpoint import MANIFEST, MODEL, Checkpoint, read_manifest

_FOLDER = re.compile(r"row-\d+|u\d{8,}")
"""Names of checkpoints."""
At = int | str | None
"""A horizon in tokens, the name of a checkpoint's folder, or None for the largest finished row."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A whole checkpoint of one of our runs."""

    run: RunFolder
    folder: Path
    spec: RunSpec
    checkpoint: Checkpoint
    record: RunRecord | None
    row: Row | None
    """None for a state between rows, or where the record does not know the row."""
    shards: Path
    """Where the run's text is, or was."""
    corpus: CorpusManifest | None
    """None where the text is not there any more."""

    @property
    def name(self) -> str:
        """<run_id>@<tokens> of a row, <run_id>@u00000123 of a state between rows."""
        return f"{self.spec.run_id}@{self.folder.name.removeprefix('row-')}"

    @property
    def is_row(self) -> bool:
        """Whether it is the end of a decay."""
        return self.folder.name.startswith("row-")

    @property
    def n_params(self) -> int:
        """Real ones, padding excluded."""
        return count_params(self.spec.science.shape, self.spec.science.n_vocab).n_params

    @property
    def flops(self) -> float:
        """Of training it, as if alone."""
        return self.checkpoint.tokens * flops_per_token(self.spec.science.shape, self.spec.science.n_vocab)


def is_run(source: Path) -> bool:
    """A run's folder, or a checkpoint folder inside one."""
    return (source / "spec.json").is_file() or _FOLDER.fullmatch(source.name) is not None


def find_trained(source: Path, at: At = None) -> Trained:
    """The checkpoint meant by a run's folder and a horizon, or by its own folder.

    Raises:
        SpecError: no such row; which there are.
        CheckpointError: the checkpoint is torn, or of another run.
    """
    source = source.expanduser().absolute()
    if (source / "spec.json").is_file():
        run = RunFolder(source)
        folder = _choose(run, at)
    else:
        run, folder = RunFolder(source.parent.parent), source
        if not folder.is_dir() or not run.spec.is_file():
            raise SpecError(
                f"{source}: no checkpoint of a run; give LAB/LADDER/runs/RUN or a folder of its checkpoints"
            )
        if at is not None:
            raise SpecError(f"{source}: this is one checkpoint already; leave --at out, or give the run's folder")
    spec = run.read_spec()
    try:
        checkpoint = read_manifest(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{run.path.name}: torn checkpoint {error}; copy it again or choose another") from None
    if MODEL not in checkpoint.sha256:
        raise CheckpointError(f"{folder}: {MANIFEST} names no {MODEL}; copy it again or choose another")
    if checkpoint.science_hash != spec.science.hash:
        raise CheckpointError(f"{folder}: belongs to another run than the spec.json above it; restore the run's folder")
    record = run.read_record()
    rows = record.rows if record is not None and folder.name.startswith("row-") else ()
    shards = Path(spec.shards) if Path(spec.shards).is_absolute() else (run.path / spec.shards).resolve()
    return Trained(
        run=run,
        folder=folder,
        spec=spec,
        checkpoint=checkpoint,
        record=record,
        row=next((row for row in rows if row.n_tokens == checkpoint.tokens), None),
        shards=shards,
        corpus=_corpus(shards, spec),
    )


def _choose(run: RunFolder, at: At) -> Path:
    names = [p.name for p in run.checkpoints.glob("*") if p.is_dir() and _FOLDER.fullmatch(p.name)]
    rows = sorted(int(name.removeprefix("row-")) for name in names if name.startswith("row-"))
    states = sorted(name for name in names if name.startswith("u"))
    if isinstance(at, str) and at in names:
        return run.checkpoints / at
    if at is not None and str(at).isdecimal() and int(at) in rows:
        return run.checkpoints / f"row-{int(at)}"
    there = "; ".join(
        [f"rows: {', '.join(map(str, rows))}"] * bool(rows) + [f"states between: {', '.join(states)}"] * bool(states)
    )
    if at is not None:
        raise SpecError(f"{run.path.name} has no checkpoint at {at}; {there or 'it has none at all, train it first'}")
    if not rows:
        other = f"name a state between rows instead ({', '.join(states)})" if states else "train it first"
        raise SpecError(f"{run.path.name} has no finished row; {other}")
    return run.checkpoints / f"row-{rows[-1]}"


def _corpus(shards: Path, spec: RunSpec) -> CorpusManifest | None:
    """The manifest of the run's text; None where other text or none is there."""
    try:
        corpus = codec.read_json(shards / CORPUS, CorpusManifest)
    except SpecError:
        return None
    science = spec.science
    found = (corpus.tokenizer_hash, corpus.train.fingerprint, corpus.val.fingerprint)
    wanted = (science.tokenizer_hash, science.train_fingerprint, science.val_fingerprint)
    return corpus if found == wanted else None


# ----------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_of(trained: Trained, told: Path | None = None) -> Tokenizer:
    """What cut the run's text, from its shards, or as told where they have none.

    Raises:
        DataError: there is none, or it is not the one the run was trained with.
        MachineError: it is GPT-2's, and neither in the cache nor to be had from the hub.
    """
    science, corpus = trained.spec.science, trained.corpus
    if told is not None:
        tokenizer = load_tokenizer(str(told))
    elif corpus is None:
        if science.tokenizer_hash != BytesTokenizer.hash:
            raise DataError(
                f"{trained.spec.run_id}: its shards with the tokenizer are not at {trained.shards}; restore them or "
                "give --tokenizer FILE"
            )
        tokenizer = BytesTokenizer()
    elif corpus.tokenizer_file is not None:
        tokenizer = load_tokenizer(str(trained.shards / corpus.tokenizer_file))
    elif corpus.tokenizer in KNOWN_FACTS:
        try:
            tokenizer = load_tokenizer(corpus.tokenizer)
        except MachineError as error:
            raise MachineError(f"{error} with --tokenizer FILE") from None
    else:
        raise DataError(
            f"{trained.spec.run_id}: its shards came without a tokenizer (they were called {corpus.tokenizer!r}); give "
            "--tokenizer FILE, the tokenizer.json that cut them"
        )
    _check(trained, tokenizer)
    return tokenizer


def _check(trained: Trained, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that would give other ids; of foreign shards only numbers can be compared."""
    science, corpus = trained.spec.science, trained.corpus
    said_only = corpus is not None and corpus.tokenizer_file is None and corpus.tokenizer_hash != BytesTokenizer.hash
    if said_only and corpus is not None:
        fits = tokenizer.n_vocab <= science.n_vocab and corpus.eot_id in (None, tokenizer.eot_id)
        what = (
            f"{science.n_vocab} ids and end of text {corpus.eot_id}, it has {tokenizer.n_vocab} and {tokenizer.eot_id}"
        )
    else:
        fits = tokenizer.hash == science.tokenizer_hash
        what = f"tokenizer {science.tokenizer_hash[:8]}, this is {tokenizer.hash[:8]} with {tokenizer.n_vocab} ids"
    if not fits:
        raise DataError(
            f"{trained.spec.run_id}: {tokenizer.name} is not the tokenizer it was trained with (wants {what}); give "
            "the tokenizer.json that cut its shards"
        )


def refuse_lab(source: Path) -> None:
    """UserError for a lab's folder, naming its runs."""
    if (source / "runs").is_dir():
        names = sorted(p.name for p in (source / "runs").iterdir() if p.is_dir() and not p.name.startswith("."))
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise UserError(f"{source} is a whole lab; name one of its runs in {source / 'runs'} ({shown or 'none yet'})")


def public_source(source: str) -> str:
    """A source of text as a stranger may read it: of a path only its last part."""
    return Path(source).name if "/" in source and not source.startswith("hf:") else source
