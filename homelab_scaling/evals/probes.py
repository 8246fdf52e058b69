"""Small questions that models of five million parameters can answer better than by guessing.

`copy`: a sequence of random tokens, then some of it again: which token comes next?
`last-word`: the beginning of a passage; does the model go on with the word that stands there?
`minimal-pairs`: is a real line more probable than its corrupted twin?

All are made from a seed, and but for `copy` from text alone, so that models with different tokenizers get the same
questions. `chance` is what the best guess gets that needs no model: see each task.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from random import Random
from typing import Any, TypeVar

from homelab_scaling.errors import DataError
from homelab_scaling.evals.bpb import encode, ids_of, prefix_id
from homelab_scaling.evals.pairs import IN_COUPLES, Twins, corrupt, direction, n_lines, rules_of
from homelab_scaling.evals.results import Document, Kind, Outcome, Setting
from homelab_scaling.evals.scorer import choose, score
from homelab_scaling.evals.texts import HeldDocument, HeldOut, Language
from homelab_scaling.export.convert import Portable

N_ITEMS = 500
N_CANDIDATES, CUE_TOKENS = 8, 3
CONTEXT_CHARS = 400
PAIR_CONTEXT_CHARS = 200
FEWEST_BEFORE_CHARS = 60
_WORD = re.compile(r"[^\W\d_]\w{2,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\s]+|\n+")
_ALPHABET_DOCUMENTS = 200

T = TypeVar("T")


class Probe:
    """What the tasks of this file have in common; outcomes are right (1) or wrong (0)."""

    name: str
    metric = "acc"
    kind: Kind = "share"
    higher_is_better = True

    def __init__(self, *, limit: int | None, seed: int) -> None:
        self.n_items = limit or N_ITEMS
        self.seed = seed


def _about(text: HeldOut) -> dict[str, Setting]:
    return {"text": text.source, "text_id": text.fingerprint, "language": text.language}


# ----------------------------------------------------------------------------------------------------------------- copy


@dataclass(frozen=True, kw_only=True)
class CopyItem:
    """`context` ends with the first tokens of one block of `candidates`' sequence; `answer` is its place among them."""

    context: list[int]
    candidates: list[int]
    answer: int


class Copy(Probe):
    """Induction: k blocks of random tokens, all different, then the beginning of one block again.

    The k candidates are the blocks' last tokens. Each has stood there once, at an equal distance from the others, and
    the block that is asked for is drawn: whoever does not use the repeated tokens gets 1/k, whatever it prefers.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads (repeated random sequences).
    """

    name = "copy"

    def __init__(self, model: Portable, text: HeldOut | None, *, limit: int | None = None, seed: int = 0) -> None:
        super().__init__(limit=limit, seed=seed)
        self._model, self._text = model, text
        self.n_candidates = min(N_CANDIDATES, (model.context_tokens - 1 - CUE_TOKENS) // (CUE_TOKENS + 1))
        self.chance: float | None = 1 / self.n_candidates if self.n_candidates else None

    @property
    def settings(self) -> dict[str, Setting]:
        where = "the vocabulary" if self._text is None else f"{self._text.source} ({self._text.fingerprint})"
        return {
            "items": self.n_items,
            "seed": self.seed,
            "candidates": self.n_candidates,
            "cue_tokens": CUE_TOKENS,
            "tokens_from": where,
            "chance_is": f"one of {self.n_candidates} candidates",
        }

    @cached_property
    def items(self) -> dict[str, CopyItem]:
        """Every question.

        Raises:
            DataError: the context or the vocabulary is too small for one.
        """
        k, block = self.n_candidates, CUE_TOKENS + 1
        alphabet = self._alphabet()
        if k < 2 or len(alphabet) < k * block:
            raise DataError(
                f"{self.name} wants a context of {2 * block + CUE_TOKENS + 1} tokens and {max(2, k) * block} different "
                f"ones; {self._model.name} has a context of {self._model.context_tokens} and {len(alphabet)} tokens"
            )
        rng = Random(f"{self.name} {self.seed}")
        items = {}
        for i in range(self.n_items):
            sequence = rng.sample(alphabet, k * block)
            answer = rng.randrange(k)
            cue = sequence[answer * block : answer * block + CUE_TOKENS]
            items[f"{self.name}-{i:05d}"] = CopyItem(
                context=[prefix_id(self._model), *sequence, *cue],
                candidates=sequence[CUE_TOKENS::block],
                answer=answer,
            )
        return items

    def _alphabet(self) -> list[int]:
        """Tokens that the text has, so that no token is asked for that was never trained; else the vocabulary."""
        model = self._model
        special = {*model.tokenizer.all_special_ids, model.eot_id, prefix_id(model)}
        if self._text is None:
            return [i for i in range(min(model.n_vocab, len(model.tokenizer))) if i not in special]
        found: set[int] = set()
        for document in self._text.documents[:_ALPHABET_DOCUMENTS]:
            found.update(ids_of(model, document))
        return sorted(found - special)

    def documents(self) -> Sequence[Document]:
        return [
            Document(doc_id=doc_id, text=self._model.tokenizer.decode(item.context[1:]))
            for doc_id, item in self.items.items()
        ]

    def ask(self, model: Any, documents: Sequence[Document]) -> list[Outcome]:
        asked = [self.items[document.doc_id] for document in documents]
        chosen = choose(model, [item.context for item in asked], [item.candidates for item in asked])
        return [
            Outcome(doc_id=document.doc_id, value=float(place == item.answer), n_tokens=len(item.context))
            for document, item, place in zip(documents, asked, chosen, strict=True)
        ]


# ------------------------------------------------------------------------------------------------------------ last word


@dataclass(frozen=True, kw_only=True)
class WordItem:
    """A passage and the word after it."""

    context: str
    blank: str
    """The blank before the word, if any: it belongs to the word's tokens."""
    word: str


class LastWord(Probe):
    """The word after a passage (in code the identifier), where it has stood in the passage before; right if greedy
    decoding gives all of its tokens, as in LAMBADA.

    `chance` is the best of three guesses that need no model: always the most frequent answer, the passage's most
    frequent word, its latest word.

    Source: Paperno et al. 2016 (LAMBADA); whole-word greedy match as in lm-evaluation-harness.
    """

    name = "last-word"

    def __init__(self, text: HeldOut, *, limit: int | None = None, seed: int = 0) -> None:
        super().__init__(limit=limit, seed=seed)
        self.text = text

    @property
    def settings(self) -> dict[str, Setting]:
        return _about(self.text) | {
            "items": self.n_items,
            "seed": self.seed,
            "passage_chars": CONTEXT_CHARS,
            "chance_is": "best of: the commonest answer, the passage's commonest word, its latest word",
        }

    @cached_property
    def items(self) -> dict[str, WordItem]:
        """Every question.

        Raises:
            DataError: no passage in it repeats a word.
        """
        per_document = -(-self.n_items // len(self.text.documents))
        found: dict[str, WordItem] = {}
        for document in self.text.documents:
            rng = Random(f"{self.name} {self.seed} {document.doc_id}")
            found |= dict(_word_items(document, 2 * per_document, rng))
        if not found:
            raise DataError(
                f"{self.name}: no passage of {self.text.source} repeats a word; give longer text with --text"
            )
        return _spread(found, self.n_items)

    @cached_property
    def chance(self) -> float | None:
        answers = [item.word for item in self.items.values()]
        n_right = [Counter(answers).most_common(1)[0][1], 0, 0]
        for item in self.items.values():
            words = _WORD.findall(item.context)
            counts = Counter(reversed(words))  # of equals the latest
            n_right[1] += counts.most_common(1)[0][0] == item.word
            n_right[2] += words[-1] == item.word
        return max(n_right) / len(answers)

    def documents(self) -> Sequence[Document]:
        return [Document(doc_id=i, text=item.context + item.blank + item.word) for i, item in self.items.items()]

    def ask(self, model: Any, documents: Sequence[Document]) -> list[Outcome]:
        requests = []
        for document in documents:
            item = self.items[document.doc_id]
            before = encode(model, item.context)
            whole = encode(model, item.context + item.blank + item.word)
            border = min(_common(before, whole), len(whole) - 1)
            requests.append((whole[:border], whole[border:]) if border else ([prefix_id(model)], whole))
        return [
            Outcome(doc_id=document.doc_id, value=float(found.greedy), n_tokens=found.n_tokens)
            for document, found in zip(documents, score(model, requests), strict=True)
        ]


def _word_items(document: HeldDocument, n: int, rng: Random) -> Iterator[tuple[str, WordItem]]:
    """At most n places of a document, no two passages overlapping by more than half."""
    text = document.text
    places = [m for m in _WORD.finditer(text) if m.start() >= FEWEST_BEFORE_CHARS]
    rng.shuffle(places)
    taken: list[int] = []
    for place in places:
        start = place.start()
        if len(taken) == n:
            return
        if any(abs(start - other) < CONTEXT_CHARS // 2 for other in taken):
            continue
        blank = " " if text[start - 1] == " " else ""
        first = _border_after(text, max(0, start - CONTEXT_CHARS))
        context = text[first : start - len(blank)]
        words = _WORD.findall(context)
        if place.group() in words[:-1] and context.strip():
            taken.append(start)
            yield f"{document.doc_id}-{start}", WordItem(context=context, blank=blank, word=place.group())


# -------------------------------------------------------------------------------------------------------- minimal pairs


@dataclass(frozen=True, kw_only=True)
class PairItem:
    """The text before, and the line with its twin."""

    before: str
    twins: Twins


class MinimalPairs(Probe):
    """A line of real text against its corrupted twin (evals.pairs), after the text that stands before both; right if
    the real one has the higher probability.

    A corrupted line often needs more tokens, so that even a model that knows nothing but how many there are prefers
    the real one. `chance` is what that gets: the share of pairs whose real line has fewer tokens, and half of the equal
    ones; 1/2 at least.

    Source: Warstadt et al. 2020 (BLiMP), whole-sentence probabilities.
    """

    name = "minimal-pairs"

    def __init__(self, model: Portable, text: HeldOut, *, limit: int | None = None, seed: int = 0) -> None:
        super().__init__(limit=limit, seed=seed)
        self._model, self.text = model, text

    @property
    def settings(self) -> dict[str, Setting]:
        return _about(self.text) | {
            "items": self.n_items,
            "seed": self.seed,
            "rules": ", ".join(rules_of(self.text.language)),
            "before_chars": PAIR_CONTEXT_CHARS,
            "chance_is": "the line of fewer tokens",
        }

    @cached_property
    def items(self) -> dict[str, PairItem]:
        """Every question, the rules in turn; its id begins with its rule.

        Raises:
            DataError: no rule fits any of its lines.
        """
        language = self.text.language
        rules = rules_of(language)
        per_document = -(-2 * self.n_items // (len(rules) * len(self.text.documents)))
        by_rule = {}
        for rule in rules:
            found: dict[str, PairItem] = {}
            for document in self.text.documents:
                rng = Random(f"{self.name} {self.seed} {rule} {document.doc_id}")
                found |= dict(_pair_items(document, rule, language, per_document, rng))
            names = Random(f"{self.name} {self.seed} {rule}").sample(sorted(found), len(found))
            mixed = {doc_id: found[doc_id] for doc_id in names}
            by_rule[rule] = _in_couples(mixed) if rule in IN_COUPLES else mixed
        taken = _share_of(by_rule, self.n_items)
        if not taken:
            raise DataError(
                f"{self.name}: no line of {self.text.source} can be corrupted by a rule; give longer text with --text"
            )
        return dict(sorted(taken.items(), key=lambda pair: pair[0].rsplit("-", 2)[::-1]))

    @cached_property
    def chance(self) -> float | None:
        points = 0.0
        for item in self.items.values():
            real, other = (len(encode(self._model, item.before + line)) for line in _lines(item))
            points += 1.0 if real < other else 0.5 if real == other else 0.0
        return max(0.5, points / len(self.items))

    def documents(self) -> Sequence[Document]:
        return [Document(doc_id=doc_id, text=item.before + item.twins.real) for doc_id, item in self.items.items()]

    def ask(self, model: Any, documents: Sequence[Document]) -> list[Outcome]:
        requests = []
        prefix = prefix_id(model)
        for document in documents:
            item = self.items[document.doc_id]
            real, other = ([prefix, *encode(model, item.before + line)] for line in _lines(item))
            border = min(_common(real, other), len(real) - 1, len(other) - 1)  # what is equal before it cancels out
            requests += [(real[:border], real[border:]), (other[:border], other[border:])]
        scored = score(model, requests)
        return [
            Outcome(
                doc_id=document.doc_id, value=float(real.nats < other.nats), n_tokens=real.n_tokens + other.n_tokens
            )
            for document, real, other in zip(documents, scored[::2], scored[1::2], strict=True)
        ]


def _lines(item: PairItem) -> tuple[str, str]:
    return item.twins.real, item.twins.corrupted


def _pair_items(
    document: HeldDocument, rule: str, language: Language, n: int, rng: Random
) -> Iterator[tuple[str, PairItem]]:
    """At most n pairs of a document by one rule."""
    spans = list(_units(document.text, language, n_lines(rule)))
    rng.shuffle(spans)
    n_found = 0
    for start, end in spans:
        if n_found == n:
            return
        twins = corrupt(document.text[start:end], rule, language, rng)
        if twins is not None:
            n_found += 1
            before = document.text[_border_after(document.text, max(0, start - PAIR_CONTEXT_CHARS)) : start]
            yield f"{rule.replace(' ', '-')}-{document.doc_id}-{start}", PairItem(before=before, twins=twins)


def _units(text: str, language: Language, n: int) -> Iterator[tuple[int, int]]:
    """Where the lines (of code, n at a time) or sentences (of prose) of a text begin and end."""
    borders = re.compile(r"\n") if language == "code" else _SENTENCE_END
    ends = [(m.start(), m.end()) for m in borders.finditer(text)]
    starts = [0, *(end for _start, end in ends)]
    stops = [*(start for start, _end in ends), len(text)]
    yield from zip(starts, stops[n - 1 :], strict=False)


def _in_couples(found: dict[str, PairItem]) -> dict[str, PairItem]:
    """Pairs with a -> b and with b -> a in turn, as many of each: the commoner word does not win by being common."""
    by_direction: dict[tuple[str, str], list[str]] = {}
    for doc_id, item in found.items():
        by_direction.setdefault(direction(item.twins), []).append(doc_id)
    couples = [
        list(zip(ids, by_direction.get((b, a), []), strict=False)) for (a, b), ids in by_direction.items() if a < b
    ]
    in_turn = [couple for row in zip_longest(*couples) for couple in row if couple is not None]
    return {doc_id: found[doc_id] for couple in in_turn for doc_id in couple}


def _share_of(by_rule: dict[str, dict[str, PairItem]], n: int) -> dict[str, PairItem]:
    """The first of each rule, n in all, shared as equally as what was found allows; those IN_COUPLES by couples."""
    taken: dict[str, PairItem] = {}
    for i, rule in enumerate(sorted(by_rule, key=lambda rule: len(by_rule[rule]))):
        wanted = (n - len(taken)) // (len(by_rule) - i)
        wanted -= wanted % 2 if rule in IN_COUPLES else 0
        taken |= dict(islice(by_rule[rule].items(), wanted))
    return taken


# --------------------------------------------------------------------------------------------------------------- common


def _spread(items: dict[str, T], n: int) -> dict[str, T]:
    """n of the items, evenly over them, so that every document keeps its share."""
    names = list(items)
    if len(names) <= n:
        return items
    return {names[i * len(names) // n]: items[names[i * len(names) // n]] for i in range(n)}


def _border_after(text: str, place: int) -> int:
    """The first place from `place` on where a line or a word begins."""
    if place == 0:
        return 0
    newline = text.find("\n", place - 1, place + 80)
    if newline >= 0:
        return newline + 1
    blank = text.find(" ", place - 1, place + 80)
    return blank if blank >= 0 else place


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
