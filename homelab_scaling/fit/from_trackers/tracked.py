"""A run as every tracker shows it: a name, curves, and what its configuration says."""

import math
import re
import urllib.error
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

PROBE_S = 10.0
"""How long a server may take to say anything at all."""
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: each step once, in order."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def pick(self, which: Literal["last", "min"]) -> tuple[int, float] | None:
        """The step and value of the end, or of the lowest finite value."""
        if not self.steps:
            return None
        if which == "last":
            return self.steps[-1], self.values[-1]
        finite = [(value, step) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return min(finite)[::-1] if finite else (self.steps[-1], math.nan)

    def until(self, step: int) -> float | None:
        """The newest value at a step or before it."""
        index = bisect_right(self.steps, step)
        return self.values[index - 1] if index else None

    def exactly(self, step: int) -> float | None:
        """The value of that very step."""
        index = bisect_right(self.steps, step)
        return self.values[index - 1] if index and self.steps[index - 1] == step else None


def make_series(pairs: Iterable[tuple[int, float]]) -> Series:
    """The curve of (step, value) in the order they were written; of a step written twice, the later one holds.

    A run that was killed and resumed writes the steps since its checkpoint again.
    """
    found = dict(pairs)
    steps = tuple(sorted(found))
    return Series(steps=steps, values=tuple(float(found[s]) for s in steps))


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """One event folder, MLflow run or W&B run."""

    name: str
    tags: tuple[str, ...]
    """Its curves."""
    read: Callable[[str], Series]
    """The curve of a tag; may ask a server, so only what is needed is read."""
    facts: Mapping[str, object]
    """Configuration, flat; `run` and what the tracker knows of it (`status`, `experiment`, `project`) among it."""
    aliases: tuple[str, ...] = ()
    """Other names by which a table may call it."""
    broken: str | None = None
    """Why nothing of it can be read."""
    unfinished: str | None = None
    """Why it may not be what its schedule meant it to become."""


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_number(value: object) -> float | None:
    """A number, or text that is one: 124e6, "124M", "1,000,000"; None otherwise."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    if not isinstance(value, str):
        return None
    text = value.strip().replace("_", "")
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([kmbgt]?)", text, flags=re.IGNORECASE)
    return float(match[1]) * UNITS[match[2].lower()] if match else None


def as_truth(value: object) -> bool | None:
    """True, "true", 1 and their opposites; None for anything else."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    return known.get(str(value).strip().lower())


def why_silent(url: str) -> str | None:
    """Why a server cannot be reached, in words; None where it says anything, even no.

    Trackers' own clients try again for minutes.
    """
    try:
        with urllib.request.urlopen(url, timeout=PROBE_S):
            return None
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, ValueError) as error:
        return str(error)
