"""A line of real text and its corrupted twin, made by rules that need no grammar of any language.

Most rules exchange two pieces of the line, so that both twins hold the same characters, a model that only counts gains
nothing, and neither is longer. The others put one word of a closed pair for the other, as often in one direction as in
the other. What the text is decides the rules.

Code:   `brackets` two pairs of different kinds get each other's kind; `identifiers` two names of the line exchanged;
        `indentation` two consecutive lines get each other's; `opposites` one of a closed pair (==/!=, and/or, ...).
Prose:  `word order` two adjacent words exchanged; `far words` two words with others between; `agreement` one of a
        closed pair (is/are, was/were, ...).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from homelab_scaling.evals.texts import Language

AGREEMENT = (("is", "are"), ("was", "were"), ("has", "have"), ("this", "these"))
OPPOSITES = (
    *(("==", "!="), ("<", ">"), ("<=", ">="), ("+", "-"), ("&&", "||"), ("and", "or"), ("0", "1")),
    *(("True", "False"), ("true", "false"), ("min", "max"), ("start", "end"), ("first", "last")),
)
IN_COUPLES = ("agreement", "opposites")
"""Rules whose two directions must be taken equally often."""
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


def direction(twins: Twins) -> tuple[str, str]:
    """(piece that was there, piece put in its place) of a rule IN_COUPLES."""
    real, other = _PIECES.findall(twins.real), _PIECES.findall(twins.corrupted)
    return next((a, b) for a, b in zip(real, other, strict=True) if a != b)


def _brackets(line: str, rng: Random) -> str | None:
    """f(x[0]) -> f[x(0)]: the kinds of two matched pairs exchanged."""
    if _COMMENT.match(line):
        return None
    open_at: list[int] = []
    matched = []
    for i, char in enumerate(line):
        if char in _CLOSES:
            open_at.append(i)
        elif open_at and char == _CLOSES[line[open_at[-1]]]:
            matched.append((open_at.pop(), i))
    fitting = [(a, b) for i, a in enumerate(matched) for b in matched[i + 1 :] if line[a[0]] != line[b[0]]]
    if not fitting:
        return None
    chars, (a, b) = list(line), rng.choice(fitting)
    for (mine, other), (yours, another) in ((a, b), (b, a)):
        chars[mine], chars[other] = line[yours], line[another]
    return "".join(chars)


def _identifiers(line: str, rng: Random) -> str | None:
    """total = count(items) -> count = total(items): two different names."""
    if _COMMENT.match(line):
        return None
    names = [m.span() for m in _NAMES.finditer(line) if m.end() - m.start() >= 2]
    fitting = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if line[slice(*a)] != line[slice(*b)]]
    return _exchange(line, *rng.choice(fitting)) if fitting else None


def _opposites(line: str, rng: Random) -> str | None:
    """if a == b and c: -> if a != b and c:, one piece by the other of its pair."""
    return None if _COMMENT.match(line) else _other_of_pair(line, OPPOSITES, rng)


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
    """The old houses were cold. -> The old houses was cold."""
    return _other_of_pair(line, AGREEMENT, rng) if len(_WORDS.findall(line)) >= _FEWEST_WORDS else None


def _other_of_pair(line: str, pairs: tuple[tuple[str, str], ...], rng: Random) -> str | None:
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    found = [m for m in _PIECES.finditer(line) if m.group() in other]
    if not found:
        return None
    chosen = rng.choice(found)
    return line[: chosen.start()] + other[chosen.group()] + line[chosen.end() :]


_RULES: dict[Language, dict[str, Rule]] = {
    "code": {
        "brackets": _brackets,
        "identifiers": _identifiers,
        "indentation": _indentation,
        "opposites": _opposites,
    },
    "prose": {"word order": _word_order, "far words": _far_words, "agreement": _agreement},
}


def _exchange(line: str, a: tuple[int, int], b: tuple[int, int]) -> str:
    return line[: a[0]] + line[slice(*b)] + line[a[1] : b[0]] + line[slice(*a)] + line[b[1] :]
