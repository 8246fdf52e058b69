"""Approach 1: which size is lowest at each compute, over the loss curves of all sizes, then a line in logs.

Legend:  R batch member (a resample), n row, s size, k place on a size's curve, g compute on the envelope's grid

A size's curve joins its rows by straight lines in log C and log loss. It may only hold losses that a run ending there
would have had: rows of decayed WSD branches, of constant-rate runs, or of cosine runs at their own horizon. At each of
1,500 compute values the winner counts only where a smaller and a larger size have a curve too: a smallest or largest
winner says only that the true one lies outside.

Source: Hoffmann et al. 2022 section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.growth import Growth, grow
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.slices import levels
from homelab_scaling.runs import LossPoint

GRID = 1500
MIN_ROWS = 3
MIN_SIZES = 3
CHUNK = 250
"""Resamples at a time: their curves on the grid are the largest arrays here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """The loss curve of one size."""

    log_n: float
    log_c: Array
    """(k,) log of 6 N D, ascending."""
    log_d: Array
    """(k,)."""
    rows: tuple[NDArray[np.int64], ...]
    """Rows (seeds) at each place."""


def mid_schedule(points: Sequence[LossPoint]) -> str | None:
    """Why the rows' schedules forbid an envelope, naming a run; None where each row could be a run's end."""
    by_run: dict[str, list[LossPoint]] = {}
    for point in points:
        if point.run_id is not None and "cosine" in (point.schedule or "").lower():
            by_run.setdefault(point.run_id, []).append(point)
    several = [run for run, rows in by_run.items() if len({p.n_tokens for p in rows}) > 1]
    if several:
        more = f" (and {len(several) - 1} more runs)" if len(several) > 1 else ""
        return (
            f"run {several[0]}{more} has {len(by_run[several[0]])} rows under one cosine schedule, and before its end "
            "such a loss is higher than that of a run that ends there; keep its last row, or use WSD horizons"
        )
    return None


def loss_curves(columns: dict[str, Array]) -> list[Curve]:
    """A curve for every size with three token counts or more, by rising N."""
    n, d = columns["n_params"], columns["n_tokens"]
    found = []
    for rows in levels(n):
        places = [rows[group] for group in levels(d[rows])]
        if len(places) >= MIN_ROWS:
            log_n = float(np.log(n[rows]).mean())
            log_d = np.array([np.log(d[place]).mean() for place in places])
            found.append(Curve(log_n=log_n, log_c=np.log(6) + log_n + log_d, log_d=log_d, rows=tuple(places)))
    return found


def too_few_curves(curves: list[Curve]) -> str | None:
    """Why there is no envelope to speak of, None if there is."""
    if len(curves) < MIN_SIZES + 2:
        return (
            f"{len(curves)} size{'s' if len(curves) != 1 else ''} with {MIN_ROWS} or more token counts, wants "
            f"{MIN_SIZES + 2}: the smallest and the largest only bracket the others; add horizons to more sizes"
        )
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Envelope:
    """The winners on the grid."""

    log_c: Array
    """(g,)."""
    winner: NDArray[np.int64]
    """(R, g) index of the lowest curve; -1 where the winner has no smaller or no larger rival."""


def envelope(curves: list[Curve], log_losses: Array, weights: Array) -> Envelope:
    """Which curve is lowest on 1,500 log-spaced C, in every batch member: log losses and weights (R, n)."""
    log_c = np.linspace(min(c.log_c[0] for c in curves), max(c.log_c[-1] for c in curves), GRID)
    n_batch = len(log_losses)
    best = np.full((n_batch, GRID), np.inf)
    winner = np.full((n_batch, GRID), -1, dtype=np.int64)
    smallest = np.full((n_batch, GRID), len(curves), dtype=np.int64)
    largest = np.full((n_batch, GRID), -1, dtype=np.int64)
    for s, curve in enumerate(curves):
        first, last = np.searchsorted(log_c, (curve.log_c[0], curve.log_c[-1] + 1e-12))
        at = slice(int(first), int(last))
        values = _on_grid(curve, log_c[at], log_losses, weights)
        there = np.isfinite(values)
        smallest[:, at] = np.where(there, np.minimum(smallest[:, at], s), smallest[:, at])
        largest[:, at] = np.where(there, s, largest[:, at])
        lower = there & (values < best[:, at])
        best[:, at] = np.where(lower, values, best[:, at])
        winner[:, at] = np.where(lower, s, winner[:, at])
    winner[(winner == smallest) | (winner == largest)] = -1
    return Envelope(log_c=log_c, winner=winner)


def _on_grid(curve: Curve, grid: Array, log_losses: Array, weights: Array) -> Array:
    """One curve at the grid's C (R, g), NaN where the member has no rows on both sides."""
    w = np.stack([weights[:, rows].sum(axis=1) for rows in curve.rows], axis=1)
    y = np.stack([(weights[:, rows] * log_losses[:, rows]).sum(axis=1) for rows in curve.rows], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        y = y / w
    y = _bridged(curve.log_c, y, w > 0)
    right = np.clip(np.searchsorted(curve.log_c, grid), 1, len(curve.log_c) - 1)
    share = np.clip((grid - curve.log_c[right - 1]) / (curve.log_c[right] - curve.log_c[right - 1]), 0.0, 1.0)
    return np.asarray(y[:, right - 1] * (1 - share) + y[:, right] * share)


def _bridged(x: Array, y: Array, there: NDArray[np.bool_]) -> Array:
    """y (R, k) with gaps between known places filled by straight lines; NaN stays at the ends."""
    if there.all():
        return y
    k = len(x)
    places = np.arange(k)
    before = np.maximum.accumulate(np.where(there, places, -1), axis=1)
    after = np.minimum.accumulate(np.where(there, places, k)[:, ::-1], axis=1)[:, ::-1]
    inside = (before >= 0) & (after < k)
    left, right = np.clip(before, 0, k - 1), np.clip(after, 0, k - 1)
    span = np.where(right > left, x[right] - x[left], 1.0)
    share = (x - x[left]) / span
    filled = (1 - share) * np.take_along_axis(y, left, 1) + share * np.take_along_axis(y, right, 1)
    return np.where(there, y, np.where(inside, filled, np.nan))


def fit_envelope(curves: list[Curve], log_losses: Array, weights: Array, *, flops: float) -> Growth:
    """Approach 1 on every batch member at once; a member needs three bracketed sizes on its envelope."""
    parts = [
        _fit_chunk(curves, log_losses[i : i + CHUNK], weights[i : i + CHUNK], flops)
        for i in range(0, len(log_losses), CHUNK)
    ]
    joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("a", "b", "log_n", "log_d")}
    return Growth(**joined, flops=flops)


def _fit_chunk(curves: list[Curve], log_losses: Array, weights: Array, flops: float) -> Growth:
    found = envelope(curves, log_losses, weights)
    usable = np.sum([(found.winner == s).any(axis=1) for s in range(len(curves))], axis=0) >= MIN_SIZES
    kept = found.winner >= 0
    log_n = np.where(kept, np.array([c.log_n for c in curves])[found.winner], 0.0)
    log_c = np.broadcast_to(found.log_c, log_n.shape)
    # C = 6 N D, so the place on the envelope gives D as well.
    log_d = log_c - np.log(6) - log_n
    return grow(log_c, log_n, log_d, kept.astype(float), flops=flops, usable=usable)
