"""Which evaluation documents have a run of 13 words in common with the text that a model was trained on.

The training shards are decoded and read once, whatever the number of tasks; memory holds the evaluation's n-grams and
nothing of the corpus. A document of 8 to 12 words counts as overlapping where all of it, in one run, is in the training
text; a shorter one says nothing, and is counted as unknown. A long document always shares some phrase: one of more than
500 words overlaps where more than a fifth of its 13-grams are found. All training shards count, also what a short run
did not reach.

Source: Brown et al. 2020 (GPT-3), appendix C: 13-grams of lower-case words without marks, never fewer than 8; Touvron
et al. 2023 (Llama 2), section A.6: less than 20 % of a sample is clean.
"""

import codecs
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from homelab_scaling import codec
from homelab_scaling.data.shards import Shards
from homelab_scaling.errors import SpecError
from homelab_scaling.evals.decode import Decoder
from homelab_scaling.evals.ngrams import BARRIER, Hashes, Sought, WordStream, gram_hashes, word_hashes
from homelab_scaling.evals.results import Document, Outcome
from homelab_scaling.evals.texts import Language, language_of, open_own_shards, why_no_shards
from homelab_scaling.export.convert import Portable

N_GRAM, FEWEST_WORDS = 13, 8
LONG_WORDS, LONG_FRAC = 500, 0.2
_VERSION = 2
"""Of words and rule: a cached answer of another one is not used."""
_TOKENS_AT_ONCE = 1 << 19

Report = Callable[[int, int], None]
"""Called with the training tokens read, and all of them."""
Say = Callable[[str], None]
_SAY_EVERY_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """overlap-<data_id>-<documents>.json: what of some documents is in a training text."""

    data_id: str
    words: Language
    """How the documents were cut: `code` counts operators and brackets as words."""
    n_gram: int
    found_frac: dict[str, float]
    """Document -> share of its n-grams that the training text has too."""
    too_short: tuple[str, ...]
    """Documents of fewer than FEWEST_WORDS words."""
    long: tuple[str, ...] = ()
    """Documents of more than LONG_WORDS words: these overlap from LONG_FRAC on."""
    seconds: float
    """Of reading the training text."""
    mb_per_s: float | None
    """Of its UTF-8 bytes."""

    @property
    def n_overlapping(self) -> int:
        """Documents that overlap."""
        return sum(map(bool, self.by_document().values()))

    @property
    def overlap_frac(self) -> float | None:
        """Share of the documents that are long enough; None where none is."""
        return self.n_overlapping / len(self.found_frac) if self.found_frac else None

    @property
    def unknown(self) -> str | None:
        """How many documents it says nothing of, in words."""
        if not self.too_short:
            return None
        n = len(self.too_short)
        return f"{n} of {n + len(self.found_frac)} documents have fewer than {FEWEST_WORDS} words"

    def clean(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Those of documents that were looked for and do not overlap."""
        overlaps = self.by_document()
        return [outcome for outcome in outcomes if overlaps.get(outcome.doc_id) is False]

    def by_document(self) -> dict[str, bool | None]:
        """Whether each document overlaps; None where that is unknown."""
        long = set(self.long)
        known: dict[str, bool | None] = {
            doc_id: frac > (LONG_FRAC if doc_id in long else 0) for doc_id, frac in self.found_frac.items()
        }
        return known | dict.fromkeys(self.too_short)


def unknown_because(model: Portable) -> str | None:
    """In words why overlap cannot be measured for a model; None if it can."""
    return why_no_shards(model)


class TrainingText:
    """The training text of a model's run, for `Overlap` of any documents with it.

    Args:
        model: one for which `unknown_because` has nothing to say.
        cache: folder of the answers; None keeps them in memory only.
        report: told how far the reading is; what it raises ends the reading.
        say: told in words when the reading begins and ends, and now and then between.
    """

    def __init__(
        self, model: Portable, *, cache: Path | None, report: Report | None = None, say: Say | None = None
    ) -> None:
        """Raises DataError if the shards are not there or cannot be read."""
        self._model = model
        self._shards = open_own_shards(model)
        self._cache = cache
        self._report: Report = report or (lambda _done, _all: None)
        self._say: Say = say or (lambda _text: None)
        self._known: dict[str, Overlap] = {}

    def overlap(self, documents: Sequence[Document]) -> Overlap:
        """What of the documents is in the training text: remembered, or measured now."""
        return self.overlaps([documents])[0]

    def overlaps(self, tasks: Sequence[Sequence[Document]]) -> list[Overlap]:
        """The same of several tasks, in one reading of the training text."""
        keys = [_key(documents) for documents in tasks]
        todo = {key: _Wanted(documents) for key, documents in zip(keys, tasks, strict=True) if not self._recall(key)}
        if todo:
            self._measure(todo)
        return [self._known[key] for key in keys]

    def of(self, documents: Sequence[Document]) -> dict[str, bool | None]:
        """Whether each document overlaps; None where it is too short to say."""
        return self.overlap(documents).by_document()

    def _path(self, key: str) -> Path | None:
        data_id = self._shards.manifest.data_id
        return None if self._cache is None else self._cache / f"overlap-{data_id}-{key}.json"

    def _recall(self, key: str) -> bool:
        path = self._path(key)
        if key not in self._known and path is not None and path.exists():
            try:
                self._known[key] = codec.read_json(path, Overlap)
            except SpecError:  # damaged, or of an older form: it is measured again and replaced
                return False
        return key in self._known

    def _measure(self, todo: "dict[str, _Wanted]") -> None:
        began = time.monotonic()
        sought = _sought(todo.values())
        n_bytes = self._look(sought)
        seconds = time.monotonic() - began
        if n_bytes:
            self._say(f"training text: {n_bytes / 1e6:,.0f} MB read in {seconds:.1f} s")
        for key, wanted in todo.items():
            found = Overlap(
                data_id=self._shards.manifest.data_id,
                words=wanted.language,
                n_gram=N_GRAM,
                found_frac={
                    doc_id: sought[wanted.language, n].n_seen(grams) / len(grams)
                    for doc_id, (n, grams) in wanted.grams.items()
                },
                too_short=tuple(wanted.too_short),
                long=tuple(wanted.long),
                seconds=seconds,
                mb_per_s=n_bytes / 1e6 / seconds if n_bytes and seconds > 0 else None,
            )
            self._known[key] = found
            path = self._path(key)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                codec.write_json(path, found)

    def _look(self, sought: "dict[tuple[Language, int], Sought]") -> int:
        """Marks what the training text has, in one reading of it; the bytes read."""
        if not sought:
            return 0
        streams = {language: WordStream(language, N_GRAM) for language, _n in sought}
        n_bytes, told = 0, time.monotonic()
        total = self._shards.manifest.train.n_tokens
        self._say(
            f"training text: {total:,} tokens are read once, for 13-grams that the tasks have in common with them"
        )
        for n_done, text, size in _training_text(self._shards, self._model):
            self._report(n_done, total)
            if time.monotonic() - told > _SAY_EVERY_S:
                told = time.monotonic()
                self._say(f"training text: {n_done / total:.0%} read")
            n_bytes += size
            for language, stream in streams.items():
                _mark(sought, language, stream.feed(text))
        for language, stream in streams.items():
            _mark(sought, language, stream.end())
        return n_bytes


class _Wanted:
    """The n-grams of one task's documents."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.language = language_of([document.text for document in documents])
        self.too_short: list[str] = []
        self.long: list[str] = []
        self.grams: dict[str, tuple[int, Hashes]] = {}
        """Document -> their length, and their hashes."""
        for document in documents:
            words = word_hashes(document.text.replace(BARRIER, " "), self.language)
            if len(words) < FEWEST_WORDS:
                self.too_short.append(document.doc_id)
            else:
                n = min(N_GRAM, len(words))
                self.long += [document.doc_id] * (len(words) > LONG_WORDS)
                self.grams[document.doc_id] = n, gram_hashes(words, n)


def _sought(tasks: Iterable[_Wanted]) -> dict[tuple[Language, int], Sought]:
    """All tasks' n-grams together, by how words are cut and by n."""
    parts: dict[tuple[Language, int], list[Hashes]] = {}
    for task in tasks:
        for n, grams in task.grams.values():
            parts.setdefault((task.language, n), []).append(grams)
    return {key: Sought(np.concatenate(grams)) for key, grams in parts.items()}


def _mark(sought: dict[tuple[Language, int], Sought], language: Language, words: Hashes) -> None:
    for (cut, n), grams in sought.items():
        if cut == language:
            grams.look(gram_hashes(words, n))


def _training_text(shards: Shards, model: Portable) -> Iterator[tuple[int, str, int]]:
    """(tokens so far, text, bytes) of the training documents in pieces, BARRIER between them."""
    eot = shards.manifest.eot_id
    replace = {} if eot is None else {eot: f" {BARRIER} ".encode()}
    decoder = Decoder(model.tokenizer, shards.manifest.n_vocab, replace)
    in_pieces = codecs.getincrementaldecoder("utf-8")(errors="replace")
    total = len(shards.train)
    for first in range(0, total, _TOKENS_AT_ONCE):
        raw = decoder.to_bytes(shards.train[first : first + _TOKENS_AT_ONCE])
        yield min(total, first + _TOKENS_AT_ONCE), in_pieces.decode(raw), len(raw)
    yield total, in_pieces.decode(b"", final=True), 0


def _key(documents: Sequence[Document]) -> str:
    return codec.stable_hash([_VERSION, N_GRAM, FEWEST_WORDS, [[d.doc_id, d.text] for d in documents]], n_chars=12)
