"""What fewer points than parameters still rule out: every law that passes through them, and how far those differ."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.laws import Law, Posed
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import Objective
from homelab_scaling.fit.result import Draws, Estimate
from homelab_scaling.fit.solve import minimise

SEED_NOISE_LOG = 0.003
"""Assumed, because nothing is left over to measure it: what another seed would move a small model's loss."""
FEWEST = 3
"""Two points rule out nothing at all."""
N_EXPONENTS = 1024
PLAUSIBLE_EXPONENT = 1.5
"""Steeper than any published language-model law; without a limit the set would have none."""

Places = list[NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """How near a law can come to all points at each value of an exponent, everything else at its best."""

    exponents: dict[str, Array]
    """Exponent -> its values (G,)."""
    miss_frac: dict[str, Array]
    """Exponent -> the largest distance to a point, as a share of its loss (G,); what lies below `SEED_NOISE_LOG` is
    not ruled out."""


def places_of(columns: dict[str, Array]) -> Places:
    """Row numbers that share their variables within a percent: seeds of one run, to be judged by their mean."""
    found: dict[tuple[float, ...], list[int]] = {}
    for row, place in enumerate(zip(*(np.round(np.log(c), 2) for c in columns.values()), strict=True)):
        found.setdefault(tuple(float(x) for x in place), []).append(row)
    return [np.array(rows, dtype=np.int64) for rows in found.values()]


def compatible_laws(law: Law, posed: Posed, losses: Array, places: Places | None = None) -> Draws | None:
    """A grid of exponents, each with the best of the other parameters, kept where all points lie within seed noise.

    Not a sample of anything likely: its range is an interval, its density means nothing.

    Args:
        places: rows that are seeds of one another (`places_of`); None where each stands alone.

    Returns:
        The set, its first member as the point; None where no member passes through the points.
    """
    _starts, theta, miss = _best_at_each(law, posed, losses, places)
    kept = theta[miss <= SEED_NOISE_LOG]
    if len(kept) < 2:
        return None
    values = posed.natural(kept)
    return Draws(names=law.names, point=values[0], values=values)


def profile(law: Law, posed: Posed, losses: Array, places: Places | None = None) -> Profile:
    """How well each value of each exponent can be had, where the points are too few to say more."""
    starts, _theta, miss = _best_at_each(law, posed, losses, places)
    exponents, nearest = {}, {}
    for index, name in _exponents(law, posed):
        grid, which = np.unique(np.round(starts[:, index], 9), return_inverse=True)
        best = np.full(len(grid), np.inf)
        np.minimum.at(best, which, miss)
        exponents[name], nearest[name] = grid, best
    return Profile(exponents=exponents, miss_frac=nearest)


def _exponents(law: Law, posed: Posed) -> list[tuple[int, str]]:
    return [(i, name) for i, name in enumerate(posed.free) if name in law.exponents]


def _best_at_each(law: Law, posed: Posed, losses: Array, places: Places | None) -> tuple[Array, Array, Array]:
    """The grid of exponents (S, P), the best theta at each (S, P), and its largest miss in log loss (S,)."""
    starts = posed.starts(N_EXPONENTS)
    held = [i for i, _name in _exponents(law, posed)]
    starts = starts[(starts[:, held] <= PLAUSIBLE_EXPONENT).all(axis=1)]
    low, high = (np.repeat(bound[None], len(starts), axis=0) for bound in posed.bounds)
    low[:, held] = high[:, held] = starts[:, held]
    y = np.log(losses)
    found = minimise(
        posed.model, y, np.ones(len(y)), starts, objective=Objective(kind="huber"), bounds=(low, high), max_steps=200
    )
    off = posed.model.value(found.theta)[0] - y
    if places is not None:
        off = np.stack([off[:, rows].mean(axis=1) for rows in places], axis=1)
    return starts, found.theta, np.abs(off).max(axis=1)


def ranges(law: Law, drawn: Draws) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Parameters and derived quantities as intervals without a value: lowest and highest over the set."""

    def span(values: Array) -> Estimate:
        return Estimate(value=None, ci95=(float(values.min()), float(values.max())))

    parameters = {name: span(drawn.values[:, i]) for i, name in enumerate(law.names)}
    derived = {name: span(values) for name, values in law.derived(drawn.values).items()}
    if law.tied:
        derived |= {name: Estimate(value=0.5) for name in ("a", "b") if name in derived}  # by construction
    return parameters, derived


def words(n_points: int, drawn: Draws, n_places: int | None = None) -> str:
    """How these intervals were made."""
    what = f"all {n_points} points" if n_places in (None, n_points) else f"the seed means of all {n_places} places"
    return (
        f"the range of {len(drawn.values):,} laws that pass within {100 * SEED_NOISE_LOG:g} % (assumed seed noise) of "
        f"{what}, exponents up to {PLAUSIBLE_EXPONENT:g}; no bootstrap, since nothing is left over"
    )
