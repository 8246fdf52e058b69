"""Quantities that a fit is asked for, by name: `d-opt:1e9`, `n-opt:1e18`, `loss:1e9,2e10`, `a`, `alpha`, `E`.

Each is a function of a law's natural parameters, so it can be drawn, differentiated and simulated. C = 6 N D here.

Legend:  N parameters, D training tokens, C training FLOPs
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import Terms, loss_at, split_budget, tokens_for
from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.words import short

SIZES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
EXAMPLES = (
    "d-opt:1e9 (tokens for a model of 1e9), n-opt:1e18 (size for a budget), loss:1e9,2e10 (N, D), a, alpha, beta, E"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One quantity."""

    name: str
    """As asked for."""
    words: str
    """For a table: `D_opt at N = 1.00B`."""
    unit: str
    """tokens, parameters, nats or nothing."""
    in_log: bool
    """Whether its interval is taken on the logarithm."""
    n_params: float | None = None
    """The size it is about, to tell how far it lies beyond the rows; None where it names none."""
    of: Callable[[Law, Array], Array]
    """Its value from natural parameters (..., parameter)."""

    def scaled(self, law: Law, values: Array) -> Array:
        """The value, or its logarithm where the interval is taken there."""
        value = self.of(law, values)
        return np.asarray(np.log(value) if self.in_log else value)


def parse_target(text: str, law: Law) -> Target:
    """The quantity that `text` names.

    Raises:
        SpecError: the law has no such quantity, or its numbers cannot be read.
    """
    kind, colon, rest = text.strip().partition(":")
    form = kind.lower().replace("_", "-")
    if form in ("d-opt", "n-opt", "loss") and not law.splits:
        raise SpecError(f"--target {text}: {law.name} is no law of N and D; choose chinchilla")
    if form == "d-opt":
        (n,) = _numbers(text, rest, 1)
        return Target(
            name=text,
            words=f"D_opt at N = {short(n)}",
            unit="tokens",
            in_log=True,
            n_params=n,
            of=lambda w, v: tokens_for(Terms.of(w, v), n),
        )
    if form == "n-opt":
        (c,) = _numbers(text, rest, 1)
        words = f"N_opt at C = {c:.3g}"
        return Target(
            name=text, words=words, unit="parameters", in_log=True, of=lambda w, v: split_budget(Terms.of(w, v), c)[0]
        )
    if form == "loss":
        n, d = _numbers(text, rest, 2)
        words = f"loss at N = {short(n)}, D = {short(d)}"
        return Target(name=text, words=words, unit="nats", in_log=True, n_params=n, of=lambda w, v: loss_at(w, v, n, d))
    if colon or not (kind in law.names or kind == "exponent" or (kind in ("a", "b") and law.splits)):
        raise SpecError(f"--target {text}: {law.name} has no such quantity; choose for example {EXAMPLES}")
    if kind in law.fixed:
        raise SpecError(f"--target {text}: {kind} is given in {law.name}, not measured; choose another")
    return Target(name=text, words=kind, unit="", in_log=False, of=_named(kind))


def _named(name: str) -> Callable[[Law, Array], Array]:
    def of(law: Law, values: Array) -> Array:
        return law.by_name(values)[name] if name in law.names else law.derived(values)[name]

    return of


def _numbers(text: str, rest: str, n_wanted: int) -> list[float]:
    cells = [cell for cell in rest.split(",") if cell.strip()]
    found = [parse_count(cell) for cell in cells]
    if len(cells) != n_wanted or any(value is None for value in found):
        raise SpecError(
            f"--target {text}: wants {'a number' if n_wanted == 1 else f'{n_wanted} numbers'}; for example {EXAMPLES}"
        )
    return [value for value in found if value is not None]


def parse_count(text: str) -> float | None:
    """A positive number as people write it (1e9, 124M, 20b); None where it is not one."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKmMbBgGtT]?)\s*", text)
    if not match:
        return None
    try:
        value = float(match[1]) * SIZES.get(match[2].lower(), 1.0)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
