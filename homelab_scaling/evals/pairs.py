"""A line of real text and its corrupted twin, made by rules that need no grammar of any language.

Most rules exchange two pieces of the line, so that both twins hold the same characters, a model that only counts gains
nothing, and neither is longer. What the text is decides the rules.

Code:   `brackets` an opening bracket and the one that closes it; `identifiers` two names of the line; `neighbours` two
        adjacent pieces, one of them a name; `indentation` of two consecutive lines.
Prose:  `word order` two adjacent words; `far words` two words with others between; `agreement` one word of a closed
        pair (is/are, was/were, ...) by the other, taken as often in one direction as in the other.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from homelab_scaling.evals.texts import Language

AGREEMENT = (("is", "are"), ("was", "were"), ("has", "have"), ("this", "these"))
MOST_LINE_CHARS, FEWEST_LINE_CHARS = 200, 8
_FEWEST_WORDS = 5
_PIECES = re.compile(r"\w+|[^\w\s]+")
_NAMES = re.compile(r"[^\W\d]\w*")
_WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_COMMENT = re.compile(r"\s*(#|//|\*|\"\"\"|''')")


@dataclass(frozen=True, kw_only=True)
class Twins:
    """The same place of a text, as it is and corrupted."""

    real: str
    corrupted: str
    rule: str


Rule = Callable[[str, Random], str | None]
"""A line to its corrupted twin, or None where the rule has nothing to take hold of."""


def rules_of(language: Language) -> tuple[str, ...]:
    """The names of the rules for a kind of text, in the order in which they take turns."""
    return tuple(_RULES[language])


def corrupt(piece: str, rule: str, language: Language, rng: Random) -> Twins | None:
    """A piece of text (one line, or two for `indentation`) and its twin; None where the rule does not fit it."""
    body = piece.strip()
    if not FEWEST_LINE_CHARS <= len(body) <= MOST_LINE_CHARS or "\0" in piece or "\ufffd" in piece:
        return None
    made = _RULES[language][rule](piece, rng)
    return Twins(real=piece, corrupted=made, rule=rule) if made is not None and made != piece else None


def n_lines(rule: str) -> int:
    """Lines that a rule looks at."""
    return 2 if rule == "indentation" else 1


def agreement_direction(twins: Twins) -> tuple[str, str]:
    """(word that was there, word put in its place)."""
    real, other = _WORDS.findall(twins.real), _WORDS.findall(twins.corrupted)
    return next((a.lower(), b.lower()) for a, b in zip(real, other, strict=True) if a != b)


def _brackets(line: str, rng: Random) -> str | None:
    """f(x) -> f)x(: a matched pair that is not empty of choice, exchanged."""
    if _COMMENT.match(line):
        return None
    open_at: list[int] = []
    matched = []
    for i, char in enumerate(line):
        if char in _CLOSES:
            open_at.append(i)
        elif open_at and char == _CLOSES[line[open_at[-1]]]:
            matched.append((open_at.pop(), i))
    return _exchange(line, *_spans(rng.choice(matched), 1)) if matched else None


def _identifiers(line: str, rng: Random) -> str | None:
    """total = count(items) -> count = total(items): two different names."""
    if _COMMENT.match(line):
        return None
    names = [m.span() for m in _NAMES.finditer(line) if m.end() - m.start() >= 2]
    fitting = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if line[slice(*a)] != line[slice(*b)]]
    return _exchange(line, *rng.choice(fitting)) if fitting else None


def _neighbours(line: str, rng: Random) -> str | None:
    """for x in y -> for in x y: two adjacent pieces, at least one a name or number."""
    if _COMMENT.match(line):
        return None
    found = [m.span() for m in _PIECES.finditer(line)]
    fitting = [
        (a, b)
        for a, b in pairwise(found)
        if line[slice(*a)] != line[slice(*b)] and (line[a[0]].isalnum() or line[b[0]].isalnum())
    ]
    return _exchange(line, *rng.choice(fitting)) if fitting else None


def _indentation(lines: str, _rng: Random) -> str | None:
    """Two consecutive lines get each other's indentation."""
    first, newline, second = lines.partition("\n")
    if not newline or not first.strip() or not second.strip():
        return None
    ours, theirs = (line[: len(line) - len(line.lstrip())] for line in (first, second))
    return None if ours == theirs else theirs + first.lstrip() + "\n" + ours + second.lstrip()


def _word_order(line: str, rng: Random) -> str | None:
    """the old house stood -> the house old stood: adjacent words, not the first, nothing but a blank between."""
    words = [m.span() for m in _WORDS.finditer(line)]
    if len(words) < _FEWEST_WORDS:
        return None
    fitting = [
        (a, b)
        for a, b in pairwise(words[1:])
        if line[a[1] : b[0]] == " " and line[slice(*a)].lower() != line[slice(*b)].lower()
    ]
    return _exchange(line, *rng.choice(fitting)) if fitting else None


def _far_words(line: str, rng: Random) -> str | None:
    """Two words of four letters or more with at least one word between them exchanged, not the first."""
    words = [m.span() for m in _WORDS.finditer(line)]
    if len(words) < _FEWEST_WORDS:
        return None
    fitting = [
        (a, b)
        for i, a in enumerate(words)
        for b in words[i + 2 :]
        if i > 0 and min(a[1] - a[0], b[1] - b[0]) >= 4 and line[slice(*a)].lower() != line[slice(*b)].lower()
    ]
    return _exchange(line, *rng.choice(fitting)) if fitting else None


def _agreement(line: str, rng: Random) -> str | None:
    """One word of a closed pair by the other, in its own case."""
    if len(_WORDS.findall(line)) < _FEWEST_WORDS:
        return None
    other = {a: b for pair in AGREEMENT for a, b in (pair, pair[::-1])}
    found = [m for m in _WORDS.finditer(line) if m.group() in other]
    if not found:
        return None
    chosen = rng.choice(found)
    return line[: chosen.start()] + other[chosen.group()] + line[chosen.end() :]


_RULES: dict[Language, dict[str, Rule]] = {
    "code": {
        "brackets": _brackets,
        "identifiers": _identifiers,
        "neighbours": _neighbours,
        "indentation": _indentation,
    },
    "prose": {"word order": _word_order, "far words": _far_words, "agreement": _agreement},
}


def _exchange(line: str, a: tuple[int, int], b: tuple[int, int]) -> str:
    return line[: a[0]] + line[slice(*b)] + line[a[1] : b[0]] + line[slice(*a)] + line[b[1] :]


def _spans(places: tuple[int, int], n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (places[0], places[0] + n), (places[1], places[1] + n)
