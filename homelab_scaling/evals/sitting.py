"""Asks a model its tasks, a piece at a time; whatever was answered before, by the same model and settings, is kept."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from homelab_scaling.codec import stable_hash
from homelab_scaling.errors import DataError, Stopped
from homelab_scaling.evals.bpb import nats_per_token
from homelab_scaling.evals.intervals import bits_per_byte, mean, share
from homelab_scaling.evals.price import LapMeter, Tariff, price_of
from homelab_scaling.evals.results import Document, Kind, Outcome, Part, Score, Setting, Task
from homelab_scaling.evals.store import About, Line, Store

PIECE_S = 5.0
"""Asking that an interruption may cost."""
MAX_GROWTH = 4
"""Of a piece against the one before: the first ones tell how fast the model is."""
FIRST_PIECE = 8
KEY_CHARS = 12
CUT = "cut"
"""Beside a score: whether a document's prompt was longer than the model's context, and lost its beginning."""
BOOTSTRAP_SEED = 0
MODEL_SETTINGS = ("tokenizer", "context_tokens", "dtype")
"""Of a score's settings, those that belong to the model and not to the question."""


class Overlap(Protocol):
    """See evals.contamination."""

    @property
    def overlap_frac(self) -> float | None: ...
    @property
    def unknown(self) -> str | None: ...
    def clean(self, outcomes: Sequence[Outcome]) -> list[Outcome]: ...


class TrainingText(Protocol):
    """See evals.contamination."""

    def overlap(self, documents: Sequence[Document]) -> Overlap: ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a task is."""

    task: str
    n_done: int
    n_documents: int
    n_kept: int
    """Of these, answered in an earlier sitting."""
    seconds: float
    """Of this sitting."""


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """One model, ready to be asked."""

    model: Any
    """An export.convert.Portable."""
    about: About
    store: Store
    tariff: Tariff
    meter: LapMeter | None = None
    training_text: TrainingText | None = None
    overlap_unknown: str | None = None
    """Why there is no `training_text`."""
    stopped: Callable[[], str | None] = lambda: None
    """Why to stop, as soon as there is a reason."""
    report: Callable[[Progress], None] = lambda _: None
    cautions: Callable[[Score], tuple[str, ...]] = lambda _: ()
    clock: Callable[[], float] = time.monotonic
    _known: dict[tuple[str, str], dict[str, Line]] = field(default_factory=dict, init=False)

    def evaluate(self, task: Task) -> Score:
        """The score of a task, written to <task>.json; only what is not in samples.jsonl is asked.

        Raises:
            Stopped: asked to stop; what was answered is kept.
            DataError: the task has no documents or two of one name, or the model's answer is no number.
        """
        settings = task.settings | self._own_settings()
        key = settings_key(task.name, task.metric, settings, self.about.weights)
        documents = task.documents()
        _check_documents(task, documents)
        if not self._known:
            self._known.update(self.store.lines())
        known = self._known.setdefault((task.name, key), {})
        self._ask(task, key, documents, known)
        lines = [known[document.doc_id] for document in documents]
        score = self._score(task, settings, documents, lines)
        self.store.write_score(score)
        return score

    def _own_settings(self) -> dict[str, Setting]:
        about = self.about
        return {"tokenizer": about.tokenizer, "context_tokens": about.context_tokens, "dtype": about.dtype}

    def _ask(self, task: Task, key: str, documents: Sequence[Document], known: dict[str, Line]) -> None:
        """Asks what is not known, in pieces of about PIECE_S, each on disk before the next is asked."""
        todo = [document for document in documents if document.doc_id not in known]
        n_kept, n_next, began = len(documents) - len(todo), FIRST_PIECE, self.clock()
        self._tell(task, len(documents), len(todo), n_kept, 0.0)
        while todo:
            if (why := self.stopped()) is not None:
                left = f"{len(todo)} of {len(documents)} documents left"
                raise Stopped(f"{why} in {task.name}, {left}; the same command goes on from here")
            piece, todo = todo[:n_next], todo[n_next:]
            lines = self._piece(task, key, piece)
            self.store.append(lines)
            known.update((line.doc_id, line) for line in lines)
            seconds = sum(line.seconds for line in lines)
            fits = int(PIECE_S * len(piece) / seconds) if seconds > 0 else MAX_GROWTH * n_next
            n_next = max(1, min(fits, MAX_GROWTH * n_next))
            self._tell(task, len(documents), len(todo), n_kept, self.clock() - began)

    def _tell(self, task: Task, n_documents: int, n_left: int, n_kept: int, seconds: float) -> None:
        n_done = n_documents - n_left
        self.report(Progress(task=task.name, n_done=n_done, n_documents=n_documents, n_kept=n_kept, seconds=seconds))

    def _piece(self, task: Task, key: str, documents: Sequence[Document]) -> list[Line]:
        began = self.clock()
        if self.meter is not None:
            self.meter.lap()
        outcomes = task.ask(self.model, documents)
        lap = self.meter.lap() if self.meter is not None else None
        seconds = self.clock() - began
        _check_outcomes(task, documents, outcomes)
        source = self.meter.source if self.meter is not None else None
        n = len(documents)
        return [
            Line(
                task=task.name,
                key=key,
                doc_id=outcome.doc_id,
                value=outcome.value,
                weight=outcome.weight,
                n_tokens=outcome.n_tokens,
                also=outcome.also,
                seconds=seconds / n,
                joules=None if lap is None or source is None else lap.joules / n,
                unseen_s=0.0 if lap is None or source is None else lap.unseen_s / n,
                energy_from=source,
            )
            for outcome in outcomes
        ]

    def _score(
        self, task: Task, settings: dict[str, Setting], documents: Sequence[Document], lines: list[Line]
    ) -> Score:

        outcomes = [line.outcome for line in lines]
        price = price_of(lines, self.tariff)
        overlap = self.training_text.overlap(documents) if self.training_text is not None else None
        score = Score(
            task=task.name,
            metric=task.metric,
            kind=task.kind,
            higher_is_better=task.higher_is_better,
            chance=task.chance,
            settings=settings,
            whole=part_of(task.kind, outcomes),
            clean=part_of(task.kind, overlap.clean(outcomes)) if overlap is not None else None,
            overlap_frac=overlap.overlap_frac if overlap is not None else None,
            overlap_unknown=overlap.unknown if overlap is not None else self.overlap_unknown,
            also=also_of(task.kind, outcomes),
            seconds=price.seconds,
            n_tokens=price.n_tokens,
            kwh=price.kwh,
            kwh_from=price.kwh_from,
            usd=price.usd,
            unknown=price.unknown,
        )
        return replace(score, warnings=(*self.cautions(score), *_about_prompts(score)))


def settings_key(task: str, metric: str, settings: dict[str, Setting], weights: str) -> str:
    """Equal for outcomes that may stand for one another."""
    return stable_hash([task, metric, settings, weights], n_chars=KEY_CHARS)


def _about_prompts(score: Score) -> tuple[str, ...]:
    """What was not seen because the model's context is short."""
    cut = score.also.get(CUT)
    if cut is None or not cut.score:
        return ()
    shots = score.settings.get("shots")
    lost = f", so not all of the {shots} examples were seen" if shots else ""
    return (
        f"{cut.score:.0%} of the prompts are longer than the context of {score.settings['context_tokens']} tokens and "
        f"lost their beginning{lost}",
    )


def part_of(kind: Kind, outcomes: Sequence[Outcome]) -> Part:
    """Outcomes as a score with its interval."""
    values = [outcome.value for outcome in outcomes]
    if kind == "share":
        return share(values)
    if kind == "mean":
        return mean(values)
    return bits_per_byte(values, [outcome.weight for outcome in outcomes], seed=BOOTSTRAP_SEED)


def also_of(kind: Kind, outcomes: Sequence[Outcome]) -> dict[str, Part]:
    """The other metrics that every outcome has; shares where all are right or wrong, means otherwise.

    Bits per byte are also said as nats per token of the model's own tokenizer.
    """
    if kind == "bits per byte":
        per_token = nats_per_token(outcomes, seed=BOOTSTRAP_SEED)
        return {} if per_token is None else {"nats_per_token": per_token}
    names = [name for name in outcomes[0].also if all(name in outcome.also for outcome in outcomes)]
    found = {}
    for name in names:
        values = [outcome.also[name] for outcome in outcomes]
        found[name] = share(values) if set(values) <= {0.0, 1.0} else mean(values)
    return found


def _check_documents(task: Task, documents: Sequence[Document]) -> None:
    if not documents:
        raise DataError(f"{task.name} has no documents; raise --limit or give it some")
    seen: set[str] = set()
    for document in documents:
        if document.doc_id in seen:
            raise DataError(f"{task.name}: two documents are called {document.doc_id!r}; give each an id of its own")
        seen.add(document.doc_id)


def _check_outcomes(task: Task, documents: Sequence[Document], outcomes: Sequence[Outcome]) -> None:
    asked, answered = [d.doc_id for d in documents], [o.doc_id for o in outcomes]
    assert asked == answered, f"{task.name} was asked {asked} and answered {answered}"
    for outcome in outcomes:
        if not all(map(math.isfinite, (outcome.value, outcome.weight, *outcome.also.values()))):
            raise DataError(
                f"{task.name}: the model's answer to document {outcome.doc_id} is no finite number; its weights are "
                "damaged or it was trained into divergence"
            )
