"""What a fit minimises: robust or plain sums over points of log-loss residuals, by name.

Legend:  R batch member (a start or a resample), n point
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.models import Array


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is summed over the points: Huber of log-loss residuals, or plain squares of loss."""

    kind: Literal["huber", "l2"]
    delta: float = np.inf
    """Huber's threshold on |log prediction - log loss|; infinity is least squares of log loss."""

    def value(self, f: Array, y: Array, weights: Array) -> Array:
        """Sum over points, (R, n) to (R,)."""
        if self.kind == "l2":
            with np.errstate(over="ignore"):
                return np.asarray((weights * 0.5 * (np.exp(f) - np.exp(y)) ** 2).sum(axis=-1))
        r = np.abs(f - y)
        inner = np.minimum(r, self.delta)
        return np.asarray((weights * inner * (r - 0.5 * inner)).sum(axis=-1))

    def slopes(self, f: Array, y: Array) -> tuple[Array, Array, Array]:
        """First derivative in f, its majorising second derivative, its exact second derivative, each (R, n)."""
        if self.kind == "l2":
            p = np.exp(f)
            r = p - np.exp(y)
            return r * p, p * p, p * p + r * p
        r = f - y
        size = np.abs(r)
        inside = size <= self.delta
        majoriser = np.where(inside, 1.0, self.delta / np.where(inside, 1.0, size))
        return r * majoriser, majoriser, inside.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class ObjectiveName:
    """A parsed `--objective`."""

    name: str
    kind: Literal["huber", "lad", "l2-log", "l2", "adaptive"]
    delta: float | None = None


def parse_objective(name: str) -> ObjectiveName:
    """The objective called `name`.

    `huber:1e-3` is the literature's; `lad` least absolute deviations of log loss; `l2-log` and `l2` least squares of
    log loss and of loss; `adaptive` Huber with delta = 1.345 robust standard deviations.

    Raises:
        SpecError: no such objective.
    """
    if name in ("lad", "l2-log", "l2", "adaptive"):
        return ObjectiveName(name=name, kind=name)  # type: ignore[arg-type]
    match = re.fullmatch(r"huber:([0-9.]+(?:e[+-]?[0-9]+)?)", name)
    delta = 0.0
    if match:
        try:
            delta = float(match[1])
        except ValueError:
            delta = 0.0
    if not 1e-9 <= delta <= 10:
        raise SpecError(
            f"no objective {name!r}; choose adaptive, lad, l2-log, l2 or huber:DELTA with DELTA from 1e-9 to 10"
        )
    return ObjectiveName(name=name, kind="huber", delta=delta)
