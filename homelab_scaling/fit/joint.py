"""A law of N and D at its optimum on a table's rows, its resamples, and estimates from them."""

from dataclasses import dataclass

import numpy as np

from homelab_scaling.fit import diagnose
from homelab_scaling.fit.laws import Law, Posed
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import ObjectiveName
from homelab_scaling.fit.resample import Resampling, budget_strata, clusters, draw
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.slices import Table
from homelab_scaling.fit.solve import Optimum, refit, solve

N_STARTS = 256
MIN_DRAWS = 100
"""Below this many usable draws there is no interval."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Joint:
    """A law of N and D at its optimum on all rows."""

    law: Law
    posed: Posed
    optimum: Optimum

    @property
    def values(self) -> Array:
        """Natural parameters (P,)."""
        return self.posed.natural(self.optimum.theta)

    def with_draws(self, drawn: Resampling | None, name: ObjectiveName) -> Array:
        """Natural parameters (1 + R, P): at the optimum, then of every resample; NaN where one did not converge."""
        values = self.values[None]
        if drawn is None:
            return values
        again = refit(self.posed.model, drawn.y, drawn.weights, self.optimum, name, bounds=self.posed.bounds)
        theta = np.where(np.isfinite(again.value)[:, None], again.theta, np.nan)
        return np.concatenate([values, self.posed.natural(theta)])


def solve_joint(law: Law, table: Table, name: ObjectiveName) -> Joint | None:
    """The law fitted to every row; None where the rows cannot carry it."""
    if diagnose.too_few(law, table, np.arange(len(table.losses))):
        return None
    posed = law.pose({axis: table.columns[axis] for axis in law.axes}, table.losses)
    optimum = solve(posed.model, np.log(table.losses), posed.starts(N_STARTS), name, bounds=posed.bounds)
    return Joint(law=law, posed=posed, optimum=optimum)


def draw_joint(joint: Joint, table: Table, n_draws: int, seed: int) -> Resampling | None:
    """Resamples of the rows around that optimum; None when none are wanted."""
    if n_draws == 0:
        return None
    runs = clusters(table.run_ids)
    return draw(
        joint.posed.model,
        np.log(table.losses),
        runs=runs,
        strata=budget_strata(table.columns["flops"], runs),
        theta=joint.optimum.theta,
        n_draws=n_draws,
        rng=np.random.default_rng([seed, *b"evidence"]),
    )


def from_draws(value: float, draws: Array) -> Estimate:
    """A value with the standard deviation and 95 % interval of its draws, where there are enough."""
    if len(draws) < MIN_DRAWS:
        return Estimate(value=value)
    low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    return Estimate(value=value, se=float(np.std(draws)), ci95=(low, high))
