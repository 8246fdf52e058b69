"""What an evaluation is: documents in, one outcome each, a score with its error and its price.

A task is asked in pieces and every outcome is on disk before the next piece is asked, so an interrupted evaluation goes
on where it stopped. Outcomes stay by document: paired comparisons, clean parts and bootstraps are made of them later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Setting = str | int | float | bool | None
Kind = Literal["share", "mean", "bits per byte"]
"""How outcomes become a score: right or wrong (Wilson interval), a mean (standard error), or sums over documents,
divided at the end (document bootstrap)."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One item of a task."""

    doc_id: str
    """The same in every evaluation of the task."""
    text: str
    """What contamination looks for in the training text: question and answer, or the passage."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model made of one document; a line of samples.jsonl."""

    doc_id: str
    value: float
    """`share`: 1 or 0. `mean`: the number. `bits per byte`: nats of the document, to be divided by `weight` ln 2."""
    weight: float = 1.0
    """`bits per byte`: UTF-8 bytes of the document; 1 otherwise."""
    n_tokens: int
    """Tokens that went through the model for it."""
    also: dict[str, float] = field(default_factory=dict)
    """Other metrics of the same answer, which cost nothing more: `acc` beside `acc_norm`."""


class Task(Protocol):
    """Something a model can be asked."""

    name: str
    metric: str
    """As reports call the score: `acc_norm`, `exact_match`, `bits_per_byte`, ..."""
    kind: Kind
    higher_is_better: bool

    @property
    def chance(self) -> float | None:
        """What guessing gets; None where guessing means nothing."""
        ...

    @property
    def settings(self) -> dict[str, Setting]:
        """What changes the number: shots, normalisation, template, limit, ...; equal settings, comparable scores."""
        ...

    def documents(self) -> Sequence[Document]:
        """Every item, in the order in which they are asked."""
        ...

    def ask(self, model: Any, documents: Sequence[Document]) -> list[Outcome]:
        """The outcomes of some of the documents, in their order; `model` is an `export.convert.Portable`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Part:
    """A score over some documents; all that is unknown is None."""

    n_documents: int
    score: float | None
    se: float | None
    """Standard error; of a share that of the binomial."""
    low: float | None
    high: float | None
    """95 %: Wilson's for a share, the normal one for a mean, a document bootstrap for bits per byte."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One task of one model: LAB/<ladder>/evals/<model>/<task>.json."""

    task: str
    metric: str
    kind: Kind
    higher_is_better: bool
    chance: float | None
    settings: dict[str, Setting]
    whole: Part
    clean: Part | None = None
    """Documents without an overlap with our training text; None where that is not known (`overlap_unknown`)."""
    overlap_frac: float | None = None
    """Share of the documents with an overlap."""
    overlap_unknown: str | None = None
    """Why, in words."""
    also: dict[str, Part] = field(default_factory=dict)
    """Other metrics of the same answers."""
    seconds: float
    """Over all sittings."""
    n_tokens: int
    kwh: float | None = None
    kwh_from: Literal["counter", "integrated", "stated watts"] | None = None
    usd: float | None = None
    unknown: dict[str, str] = field(default_factory=dict)
    """Field -> why it is None."""
    warnings: tuple[str, ...] = ()
