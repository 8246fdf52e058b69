"""The folder of one model's evaluations: who was asked, every outcome as it came, the scores.

    LAB/<ladder>/evals/<model>/{model.json, samples.jsonl, <task>.json}

samples.jsonl only grows, a piece at a time; whatever is in it is never asked again. A line holds an outcome, the key of
the settings it was asked with, and its share of the time and energy of its piece, so that a killed evaluation loses
neither answers nor their price.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from homelab_scaling import codec
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.evals.results import Outcome, Score
from homelab_scaling.runs import flock

SAMPLES = "samples.jsonl"
MODEL = "model.json"
EVALS = "evals"
"""Folder of LAB/<ladder> that holds a folder for each model."""


@dataclass(frozen=True, kw_only=True)
class About:
    """model.json: the model that was asked; what is not known of a foreign one is None."""

    name: str
    source: str
    """Folder, absolute."""
    weights: str
    """Fingerprint: outcomes of other weights are never reused."""
    tokenizer: str
    """Hash, or name, of what cuts its text."""
    context_tokens: int
    n_vocab: int
    is_ours: bool
    """Trained by one of our runs, whose text is known."""
    device: str
    dtype: str
    n_params: int | None = None
    n_tokens: int | None = None
    flops: float | None = None
    loss_nats: float | None = None
    data_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of samples.jsonl."""

    task: str
    key: str
    """Of the settings, the model's included."""
    doc_id: str
    value: float
    weight: float = 1.0
    n_tokens: int
    also: dict[str, float] = field(default_factory=dict)
    seconds: float
    """This document's share of its piece, as are the next two."""
    joules: float | None = None
    """Measured at the cards; None where no sensor looked on."""
    unseen_s: float = 0.0
    """Of the seconds, how many no sensor covered; negative where a counter made good an earlier gap."""
    energy_from: Literal["counter", "integrated"] | None = None

    @property
    def outcome(self) -> Outcome:
        return Outcome(doc_id=self.doc_id, value=self.value, weight=self.weight, n_tokens=self.n_tokens, also=self.also)


class Store:
    """Reads and writes one model's folder; write only inside `lock`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = folder / SAMPLES

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second evaluation out, and takes off the torn end that a killed one may have left.

        Raises:
            MachineError: another one is writing here.
        """
        message = f"{self.folder}: another evaluation is writing here; wait for it, or give another --out"
        with flock(self.folder / ".lock", message):
            self._mend()
            yield

    def _mend(self) -> None:
        if not self.samples.exists():
            return
        written = self.samples.read_bytes()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            os.truncate(self.samples, whole)

    def about(self) -> About | None:
        """model.json, where there is one."""
        path = self.folder / MODEL
        return codec.read_json(path, About) if path.exists() else None

    def open_for(self, about: About) -> None:
        """Says whose folder this is from now on; the scores of a model that was trained anew since are removed.

        Raises:
            SpecError: it is that of a model from another place.
        """
        before = self.about()
        if before is not None and before.source != about.source:
            raise SpecError(
                f"{self.folder}: holds the scores of {before.source}, not of {about.source}; give another --out"
            )
        if before is not None and before.weights != about.weights:
            for path in self._score_paths():
                path.unlink()
        codec.write_json(self.folder / MODEL, about)

    def append(self, lines: Sequence[Line]) -> None:
        """Adds a piece in one write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        codec.append_jsonl(self.samples, [_short(line) for line in lines])

    def lines(self) -> dict[tuple[str, str], dict[str, Line]]:
        """By task and key of the settings, then by document; of one that is there twice, the first.

        Raises:
            DataError: the file was edited or damaged.
        """
        found: dict[tuple[str, str], dict[str, Line]] = {}
        for plain in codec.read_jsonl(self.samples):
            try:
                line = codec.from_plain(plain, Line, self.samples.name)
            except SpecError as error:
                raise DataError(f"{self.folder}: {error}; remove that line, or evaluate into another --out") from None
            found.setdefault((line.task, line.key), {}).setdefault(line.doc_id, line)
        return found

    def write_score(self, score: Score) -> Path:
        path = self.folder / f"{file_name(score.task)}.json"
        codec.write_json(path, score)
        return path

    def scores(self) -> list[Score]:
        """Every finished task's score, in name order.

        Raises:
            SpecError: a file is not one of ours, or is damaged.
        """
        return [codec.read_json(path, Score) for path in self._score_paths()]

    def _score_paths(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.json") if p.name != MODEL and not p.name.startswith("."))


def file_name(task: str) -> str:
    """A task's name as a file's."""
    return re.sub(r"[^\w.@+-]+", "-", task).strip("-.") or "task"


def stores(evals: Path) -> list[Store]:
    """Every model's folder in a folder of evaluations, in name order."""
    if not evals.is_dir():
        return []
    return [Store(path) for path in sorted(evals.iterdir()) if (path / MODEL).is_file()]


def _short(line: Line) -> dict[str, object]:
    """Without what says nothing; there may be a hundred thousand of them."""
    plain = codec.to_plain(line)
    return {k: v for k, v in plain.items() if v is not None and v != {} and (k, v) not in _DEFAULTS}


_DEFAULTS = (("weight", 1.0), ("unseen_s", 0.0))
