"""What fewer points than parameters still rule out: every law that passes through them, and how far those differ."""

import numpy as np

from homelab_scaling.fit.laws import Law, Posed
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import Objective
from homelab_scaling.fit.result import Draws, Estimate
from homelab_scaling.fit.solve import minimise

SEED_NOISE_LOG = 0.003
"""Assumed, because nothing is left over to measure it: what another seed would move a small model's loss."""
N_EXPONENTS = 1024
PLAUSIBLE_EXPONENT = 1.5
"""Steeper than any published language-model law; without a limit the set would have none."""


def compatible_laws(law: Law, posed: Posed, losses: Array) -> Draws | None:
    """A grid of exponents, each with the best of the other parameters, kept where all points lie within seed noise.

    Not a sample of anything likely: its range is an interval, its density means nothing.

    Returns:
        The set, its first member as the point; None where no member passes through the points.
    """
    starts = posed.starts(N_EXPONENTS)
    held = [i for i, name in enumerate(posed.free) if name in law.exponents]
    starts = starts[(starts[:, held] <= PLAUSIBLE_EXPONENT).all(axis=1)]
    low, high = (np.repeat(bound[None], len(starts), axis=0) for bound in posed.bounds)
    low[:, held] = high[:, held] = starts[:, held]
    y = np.log(losses)
    found = minimise(
        posed.model, y, np.ones(len(y)), starts, objective=Objective(kind="huber"), bounds=(low, high), max_steps=200
    )
    miss = np.abs(posed.model.value(found.theta)[0] - y).max(axis=1)
    kept = found.theta[miss <= SEED_NOISE_LOG]
    if len(kept) < 2:
        return None
    values = posed.natural(kept)
    return Draws(names=law.names, point=values[0], values=values)


def ranges(law: Law, drawn: Draws) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Parameters and derived quantities as intervals without a value: lowest and highest over the set."""

    def span(values: Array) -> Estimate:
        return Estimate(value=None, ci95=(float(values.min()), float(values.max())))

    parameters = {name: span(drawn.values[:, i]) for i, name in enumerate(law.names)}
    derived = {name: span(values) for name, values in law.derived(drawn.values).items()}
    if law.tied:
        derived |= {name: Estimate(value=0.5) for name in ("a", "b") if name in derived}  # by construction
    return parameters, derived


def words(n_points: int, drawn: Draws) -> str:
    """How these intervals were made."""
    return (
        f"the range of {len(drawn.values):,} laws that pass within {100 * SEED_NOISE_LOG:g} % (assumed seed noise) of "
        f"all {n_points} points, exponents up to {PLAUSIBLE_EXPONENT:g}; no bootstrap, since nothing is left over"
    )
