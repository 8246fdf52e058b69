"""Simulated experiments whose truth is known: a design of rows, a law with its numbers, and noise by run and by row.

A world is one set of losses that the design could have measured. Rows of one run share the run's noise (seed, data
order), as the horizons of one trunk do.

Legend:  R world, n row
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.allocate import Terms, split_budget
from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.runs import LossPoint


@dataclass(frozen=True, kw_only=True)
class Design:
    """One row to be measured."""

    n_params: float
    n_tokens: float
    run: str
    """Rows of one run share its noise."""
    flops: float | None = None
    """Exact training FLOPs; None takes 6 N D."""
    seed: int | None = None

    @property
    def compute(self) -> float:
        return 6 * self.n_params * self.n_tokens if self.flops is None else self.flops


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a measured loss differs by from the law, as logarithms of a factor."""

    run_sd: float = 0.003
    """Shared by the rows of a run. Seeds of one model differ by .02 to .3 % in published reruns."""
    row_sd: float = 0.001
    """Of each row alone."""
    outlier_frac: float = 0.0
    """Share of rows that went wrong and came out too high."""
    outlier_sd: float = 0.03
    """By |normal| times this."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("run_sd", "row_sd", "outlier_sd"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise SpecError(
                    f"noise: {name} = {value:g}, wants a share of the loss from 0 to below 1, such as 0.003"
                )
        if not 0 <= self.outlier_frac < 1:
            raise SpecError(f"noise: outlier_frac = {self.outlier_frac:g}, wants a share of the rows, 0 to below 1")

    @property
    def total_sd(self) -> float:
        """Of one row, outliers apart."""
        return float(np.hypot(self.run_sd, self.row_sd))


def ladder_design(sizes: Sequence[float], horizons: Sequence[float], seeds: Sequence[int] = (0,)) -> list[Design]:
    """Trunks: one run per size and seed, a row at each horizon [tokens]."""
    return [Design(n_params=n, n_tokens=d, run=f"{n:.0f}-s{s}", seed=s) for n in sizes for s in seeds for d in horizons]


def isoflop_design(
    law: Law, values: Array, budgets: Sequence[float], *, n_sizes: int, width: float, seeds: Sequence[int] = (0,)
) -> list[Design]:
    """Independent runs on isoFLOP curves (C = 6 N D), `n_sizes` from 1 / width to width times the law's own N_opt."""
    found = []
    for c in budgets:
        best = float(split_budget(Terms.of(law, values), c)[0])
        for n in best * np.geomspace(1 / width, width, n_sizes):
            found += [
                Design(n_params=float(n), n_tokens=float(c / 6 / n), run=f"{c:.3g}-{n:.4g}-s{s}", seed=s) for s in seeds
            ]
    return found


def columns_of(design: Sequence[Design]) -> dict[str, Array]:
    """The design as the columns that laws take; every token is new."""
    tokens = np.array([row.n_tokens for row in design], dtype=np.float64)
    return {
        "n_params": np.array([row.n_params for row in design], dtype=np.float64),
        "n_tokens": tokens,
        "n_tokens_unique": tokens,
        "flops": np.array([row.compute for row in design], dtype=np.float64),
    }


def runs_of(design: Sequence[Design]) -> NDArray[np.int64]:
    """Run of each row as a number, in order of appearance."""
    order = {run: index for index, run in enumerate(dict.fromkeys(row.run for row in design))}
    return np.array([order[row.run] for row in design], dtype=np.int64)


def log_losses(design: Sequence[Design], law: Law, values: Array, noise: Noise, n_worlds: int) -> Array:
    """Log losses (R, n) of worlds 0 .. n_worlds - 1; world k is the same whatever the number of worlds.

    Args:
        values: natural parameters of the truth, in the order of law.names (P,).
    """
    truth = np.log(law.loss(np.asarray(values, dtype=np.float64), dict(columns_of(design))))
    return truth + noise_of(design, noise, n_worlds)


def noise_of(design: Sequence[Design], noise: Noise, n_worlds: int) -> Array:
    """What is added to the log losses (R, n)."""
    runs = runs_of(design)
    n_rows, n_runs = len(design), int(runs.max()) + 1
    out = np.empty((n_worlds, n_rows))
    for world in range(n_worlds):
        rng = np.random.default_rng([noise.seed, world])
        shared = noise.run_sd * rng.standard_normal(n_runs)
        out[world] = shared[runs] + noise.row_sd * rng.standard_normal(n_rows)
        if noise.outlier_frac:
            wrong = rng.random(n_rows) < noise.outlier_frac
            out[world] += wrong * noise.outlier_sd * np.abs(rng.standard_normal(n_rows))
    return out


def simulate_world(
    design: Sequence[Design], law: Law, values: Array, noise: Noise, *, world: int = 0
) -> tuple[LossPoint, ...]:
    """One world as points that the fitter takes, the same as row `world` of `log_losses`."""
    return as_points(design, log_losses(design, law, values, noise, world + 1)[world])


def as_points(design: Sequence[Design], log_loss: Array) -> tuple[LossPoint, ...]:
    """A design and its log losses (n,) as points."""
    return tuple(
        LossPoint(
            n_params=row.n_params,
            n_tokens=row.n_tokens,
            loss_nats=float(np.exp(y)),
            row_id=f"{row.run}@{row.n_tokens:.6g}",
            run_id=row.run,
            seed=row.seed,
            flops=row.compute,
        )
        for row, y in zip(design, log_loss, strict=True)
    )
