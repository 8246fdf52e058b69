"""Two models on the same documents: the difference with a paired interval, or why the two do not compare.

Pairing takes out what the documents have in common: the interval of a difference is often several times narrower than
the two scores' own intervals lead to expect.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from homelab_scaling.evals.intervals import CONFIDENCE, N_RESAMPLES
from homelab_scaling.evals.results import Kind, Outcome, Score, Setting
from homelab_scaling.evals.sitting import MODEL_SETTINGS, settings_key
from homelab_scaling.evals.store import About, Store

Floats = npt.NDArray[np.float64]
FEWEST_PAIRS = 2
SEED = 0
_DRAWS_AT_ONCE = 4_000_000
NOTED = {
    "tokenizer": "different tokenizers",
    "context_tokens": "contexts of {a} and {b} tokens",
    "dtype": "computed in {a} and {b}",
}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model and what it scored."""

    about: About
    scores: Mapping[str, Score]
    """By task."""
    outcomes: Mapping[str, Mapping[str, Outcome]]
    """By task and document, of exactly those scores."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """How much more the second model scores than the first in one task."""

    task: str
    metric: str
    kind: Kind
    higher_is_better: bool
    first: str
    second: str
    n_documents: int
    """That both were asked."""
    delta: float | None
    low: float | None
    high: float | None
    """95 %, paired by document."""
    p_value: float | None
    """Of no difference; None for bits per byte."""
    method: str | None
    refused: str | None = None
    """Why there is no difference to tell."""
    notes: tuple[str, ...] = ()
    """What differs between the models themselves, besides their weights."""

    @property
    def is_better(self) -> bool | None:
        """Whether the interval leaves zero out, and on the good side; None where it holds zero."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return None
        return (self.low > 0) == self.higher_is_better


def read_evaluated(store: Store, tasks: Sequence[str] | None = None) -> Evaluated:
    """A model's folder; `tasks` leaves out what is not named."""
    found = store.about()
    assert found is not None, f"{store.folder} has no model.json"
    scores = {score.task: score for score in store.scores() if tasks is None or score.task in tasks}
    lines = store.lines()
    outcomes = {
        name: {
            doc_id: line.outcome
            for doc_id, line in lines.get(
                (name, settings_key(name, score.metric, score.settings, found.weights)), {}
            ).items()
        }
        for name, score in scores.items()
    }
    return Evaluated(about=found, scores=scores, outcomes=outcomes)


def against_first(models: Sequence[Evaluated]) -> list[Delta]:
    """Every model against the first."""
    return [delta for model in models[1:] for delta in deltas(models[0], model)]


def against_previous(models: Sequence[Evaluated]) -> list[Delta]:
    """Every model against the one before it."""
    return [delta for first, second in itertools.pairwise(models) for delta in deltas(first, second)]


def deltas(first: Evaluated, second: Evaluated) -> list[Delta]:
    """The differences in every task that both have a score of."""
    return [_delta(name, first, second) for name in first.scores if name in second.scores]


def _delta(task: str, first: Evaluated, second: Evaluated) -> Delta:
    a, b = first.scores[task], second.scores[task]
    both = [doc_id for doc_id in first.outcomes[task] if doc_id in second.outcomes[task]]
    pairs = [(first.outcomes[task][doc_id], second.outcomes[task][doc_id]) for doc_id in both]
    refused = why_not(a, b) or _why_not_pairs(a.kind, pairs)
    found = None if refused else paired(a.kind, pairs)
    return Delta(
        task=task,
        metric=a.metric,
        kind=a.kind,
        higher_is_better=a.higher_is_better,
        first=first.about.name,
        second=second.about.name,
        n_documents=len(both),
        delta=found.delta if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        p_value=found.p_value if found else None,
        method=found.method if found else None,
        refused=refused,
        notes=() if refused else _notes(a, b),
    )


def why_not(a: Score, b: Score) -> str | None:
    """Why two scores of a task do not compare; None where they do."""
    if (a.metric, a.kind) != (b.metric, b.kind):
        return f"one is {a.metric}, the other {b.metric}"
    differ = [
        f"{name} {_said(a.settings.get(name))} against {_said(b.settings.get(name))}"
        for name in dict.fromkeys([*a.settings, *b.settings])
        if name not in MODEL_SETTINGS and a.settings.get(name) != b.settings.get(name)
    ]
    return f"asked with different settings: {', '.join(differ)}" if differ else None


def _why_not_pairs(kind: Kind, pairs: Sequence[tuple[Outcome, Outcome]]) -> str | None:
    if len(pairs) < FEWEST_PAIRS:
        return f"only {len(pairs)} documents were asked of both"
    if kind == "bits per byte" and any(a.weight != b.weight for a, b in pairs):
        return "their documents have the same names and not the same length"
    return None


def _notes(a: Score, b: Score) -> tuple[str, ...]:
    differ = [name for name in MODEL_SETTINGS if a.settings.get(name) != b.settings.get(name)]
    if a.kind == "bits per byte":  # which is made to compare across tokenizers
        differ = [name for name in differ if name != "tokenizer"]
    notes = [NOTED[name].format(a=a.settings.get(name), b=b.settings.get(name)) for name in differ]
    if "tokenizer" in differ and a.kind == "mean" and not a.higher_is_better:
        notes.append("a loss per token does not compare between tokenizers, bits per byte does (--tasks bpb)")
    return tuple(notes)


def _said(value: Setting) -> str:
    return "none" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------------ intervals


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A difference between two models' outcomes on the same documents."""

    delta: float
    low: float
    high: float
    p_value: float | None
    method: str


def paired(kind: Kind, pairs: Sequence[tuple[Outcome, Outcome]]) -> Paired:
    """Second less first, over two documents or more."""
    a = np.array([one.value for one, _ in pairs], dtype=np.float64)
    b = np.array([other.value for _, other in pairs], dtype=np.float64)
    if kind == "share":
        return paired_share(a, b)
    if kind == "mean":
        return paired_mean(a, b)
    return paired_bits(a, b, np.array([one.weight for one, _ in pairs], dtype=np.float64))


def paired_share(a: Floats, b: Floats) -> Paired:
    """Of zeros and ones: Wald's interval with half a document added to each cell, and McNemar's exact test.

    Without the halves, two models that agree on every document would differ by 0 with an interval of no width.

    Source: Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions".
    """
    from scipy.stats import binomtest, norm

    gained, lost = int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum())
    n, up, down = len(a) + 2, gained + 0.5, lost + 0.5
    centre = (up - down) / n
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt((up + down) - (up - down) ** 2 / n) / n
    return Paired(
        delta=(gained - lost) / len(a),
        low=centre - half,
        high=centre + half,
        p_value=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        method="matched pairs (Agresti-Min), McNemar's exact test",
    )


def paired_mean(a: Floats, b: Floats) -> Paired:
    """The mean difference, with Student's interval and test of it."""
    from scipy.stats import ttest_rel

    difference = b - a
    if np.ptp(difference) == 0:
        only = float(difference[0])
        return Paired(delta=only, low=only, high=only, p_value=None, method="every document differs by the same")
    test: Any = ttest_rel(b, a)
    interval = test.confidence_interval(CONFIDENCE)
    return Paired(
        delta=math.fsum(difference) / len(difference),
        low=float(interval.low),
        high=float(interval.high),
        p_value=float(test.pvalue),
        method="paired t",
    )


def paired_bits(a: Floats, b: Floats, n_bytes: Floats) -> Paired:
    """Of sums of nats over sums of bytes: a bootstrap that draws documents, both models' outcomes together."""
    bits = (b - a) / math.log(2)
    rng, n = np.random.default_rng(SEED), len(bits)
    at_once = max(1, _DRAWS_AT_ONCE // n)
    drawn: list[Floats] = []
    for first in range(0, N_RESAMPLES, at_once):
        rows = rng.integers(0, n, size=(min(at_once, N_RESAMPLES - first), n))
        drawn.append(bits[rows].sum(axis=1) / n_bytes[rows].sum(axis=1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Paired(
        delta=math.fsum(bits) / float(n_bytes.sum()),
        low=float(low),
        high=float(high),
        p_value=None,
        method="bootstrap over documents",
    )
