"""Which rows feed which law: L(N) the rows of one D, L(D) the rows of one N, L(C) the lower envelope, L(N, D) all."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.words import short
from homelab_scaling.runs import LossPoint

LEVEL_TOLERANCE = 0.01
"""Values within 1 % of each other are one level."""
MIN_LEVELS = 3
MAX_SLICES = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """Rows for one fit."""

    rows: NDArray[np.int64]
    words: str
    outside: str
    """Why a row that is not in it is not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Points as columns."""

    points: tuple[LossPoint, ...]
    columns: dict[str, Array]
    """n_params, n_tokens, flops; c_min_flops, s_min_steps and n_tokens_unique where every row has them."""
    losses: Array
    run_ids: list[str]
    flops_from: str
    """In words, what C is."""

    @property
    def names(self) -> list[str]:
        return [p.row_id or f"point {i + 1}" for i, p in enumerate(self.points)]


def tabulate(points: tuple[LossPoint, ...]) -> Table:
    """The points as arrays; C is the rows' exact FLOPs where every row has them, else 6 N D for all."""
    n = np.array([p.n_params for p in points], dtype=np.float64)
    d = np.array([p.n_tokens for p in points], dtype=np.float64)
    flops = _known(points, "flops")
    columns = {"n_params": n, "n_tokens": d, "flops": 6 * n * d if flops is None else flops}
    for name in ("c_min_flops", "s_min_steps", "n_tokens_unique"):
        column = _known(points, name)
        if column is not None:
            columns[name] = column
    return Table(
        points=points,
        columns=columns,
        losses=np.array([p.loss_nats for p in points], dtype=np.float64),
        run_ids=[p.run_id or f"run of {p.row_id or i}" for i, p in enumerate(points)],
        flops_from="6 N D, since not every row has its FLOPs" if flops is None else "each row's own FLOPs",
    )


def _known(points: tuple[LossPoint, ...], name: str) -> Array | None:
    """A column that every point has, or None."""
    values = [getattr(p, name) for p in points]
    return None if any(v is None for v in values) else np.array(values, dtype=np.float64)


def levels(values: Array) -> list[NDArray[np.int64]]:
    """Row numbers of each distinct value, ascending; values within 1 % of a level's smallest belong to it."""
    found: list[list[int]] = []
    for index in np.argsort(values, kind="stable"):
        if found and values[index] <= values[found[-1][0]] * (1 + LEVEL_TOLERANCE):
            found[-1].append(int(index))
        else:
            found.append([int(index)])
    return [np.array(sorted(group), dtype=np.int64) for group in found]


def slices_for(law: Law, table: Table) -> list[Slice]:
    """The sets of rows a law is fitted to, the main one first; empty where no rows fit its assumption."""
    if law.axes == ("n_params",):
        return _at_levels(table, fixed="n_tokens", varied="n_params", letter="D", unit="tokens")
    if law.axes == ("n_tokens",):
        return _at_levels(table, fixed="n_params", varied="n_tokens", letter="N", unit="parameters")
    if law.axes in (("flops",), ("c_min_flops",)):
        rows = frontier(table.columns[law.axes[0]], table.losses)
        return [
            Slice(
                rows=rows,
                words=f"the frontier: {len(rows)} rows that no cheaper row beats",
                outside="not on the frontier: a cheaper or equal row has a lower loss",
            )
        ]
    return [Slice(rows=np.arange(len(table.losses)), words="all rows", outside="")]


def _at_levels(table: Table, *, fixed: str, varied: str, letter: str, unit: str) -> list[Slice]:
    found = []
    for rows in reversed(levels(table.columns[fixed])):
        if len(levels(table.columns[varied][rows])) >= MIN_LEVELS:
            value = short(float(table.columns[fixed][rows].mean()))
            words = f"{letter} = {value} {unit}"
            found.append(Slice(rows=rows, words=words, outside=f"not at {words}"))
    return found[:MAX_SLICES]


def frontier(flops: Array, losses: Array) -> NDArray[np.int64]:
    """Rows, by rising C, whose loss no row of the same or less C reaches: the lower envelope of the table."""
    order = np.lexsort((losses, flops))
    best = np.inf
    kept = []
    for index in order:
        if losses[index] < best:
            best = losses[index]
            kept.append(int(index))
    return np.array(kept, dtype=np.int64)
