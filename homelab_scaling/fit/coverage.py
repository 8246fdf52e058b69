"""How often a nominal 95 % interval holds the truth: ladders simulated many times, each fitted and resampled as always.

Every world goes the way that `homelab fit` goes: the same objective, the same resamples, the same strata. Only the
starts are fewer, since the truth is known to lie inside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.laws import Law, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.resample import FEW_RUNS, budget_strata, resample
from homelab_scaling.fit.solve import solve
from homelab_scaling.fit.worlds import (
    Design,
    Noise,
    columns_of,
    isoflop_design,
    ladder_design,
    log_losses,
    runs_of,
)

TRUTH = "besiroglu-2024"
N_WORLDS = 500
N_DRAWS = 400
N_STARTS = 49
N_POLISH = 4
BEYOND = 10.0
"""N_opt is asked for at this many times the largest budget."""
BUDGETS = tuple(np.geomspace(3e15, 3e18, 5).tolist())
PROMISED = ("a", "ln N_opt")
"""Quantities whose coverage is held to `ALLOWED`."""
ALLOWED = (0.92, 0.99)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A design and what goes wrong when it is measured."""

    name: str
    design: tuple[Design, ...]
    noise: Noise

    @property
    def flops(self) -> float:
        """The budget that N_opt is asked for."""
        return BEYOND * max(row.compute for row in self.design)


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """One quantity in one setting."""

    quantity: str
    truth: float
    held_frac: float
    """Share of the worlds whose interval holds the truth."""
    width: float
    """Median width of the interval."""
    rmse: float
    """Root mean square error of the estimate."""


@dataclass(frozen=True, kw_only=True)
class SettingCoverage:
    """One setting."""

    setting: str
    n_points: int
    n_runs: int
    n_worlds: int
    n_draws: int
    method: str
    """In words, how the intervals were made."""
    found: tuple[Coverage, ...]

    def get(self, quantity: str) -> Coverage:
        """By name."""
        return next(one for one in self.found if one.quantity == quantity)


def settings() -> list[Setting]:
    """The four noise settings of our kind of ladder, and five trunks of three correlated rows each."""
    law, values = truth()

    def isoflop(n_sizes: int, width: float) -> tuple[Design, ...]:
        return tuple(isoflop_design(law, values, BUDGETS, n_sizes=n_sizes, width=width))

    def noise(sd: float, outlier_frac: float = 0.0) -> Noise:
        return Noise(run_sd=sd, row_sd=0.0, outlier_frac=outlier_frac)

    wide, narrow = isoflop(7, 8), isoflop(4, 4)
    trunks = ladder_design(np.geomspace(2e6, 1e8, 5).tolist(), (4e8, 8e8, 1.6e9))
    return [
        Setting(name=".3 %", design=wide, noise=noise(0.003)),
        Setting(name="1 %", design=wide, noise=noise(0.01)),
        Setting(name=".3 % + 15 % outliers", design=wide, noise=noise(0.003, 0.15)),
        Setting(name=".5 % + 10 % outliers, 20 points, x4", design=narrow, noise=noise(0.005, 0.10)),
        Setting(name="5 trunks of 3 rows, .3 % shared + .1 %", design=tuple(trunks), noise=Noise()),
    ]


def truth() -> tuple[Law, Array]:
    """The law that all worlds obey, and its natural parameters."""
    one = CATALOGUE[TRUTH]
    law = get_law(one.law)
    return law, np.array([one.values[name] for name in law.names])


def quantities(law: Law, values: Array, flops: float) -> dict[str, Array]:
    """What is judged, from natural parameters (..., parameter)."""
    a, b, alpha, beta = law.split_terms(values)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        share = beta / (alpha + beta)
        found = {"a": share, "ln N_opt": log_g + share * np.log(flops / 6)}
    return found | {name: law.by_name(values)[name] for name in ("alpha", "beta", "E")}


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """One world's fit."""

    ends: dict[str, Array]
    """Quantity -> its interval (2,)."""
    point: dict[str, float]
    method: str
    """In words, how the intervals were made."""


def measure_world(setting: Setting, world: int, *, n_draws: int = N_DRAWS, objective: str = "adaptive") -> World:
    """Intervals from the losses of one world."""
    law, values = truth()
    y = log_losses(setting.design, law, values, setting.noise, world + 1)[world]
    return _fit(setting, y, world, n_draws, objective)


def _fit(setting: Setting, y: Array, world: int, n_draws: int, objective: str) -> World:
    law, _values = truth()
    columns, runs = columns_of(setting.design), runs_of(setting.design)
    few = objective == "adaptive" and int(runs.max()) + 1 < FEW_RUNS
    name = parse_objective("l2-log" if few else objective)
    posed = law.pose(columns, np.exp(y))
    optimum = solve(posed.model, y, posed.starts(N_STARTS), name, bounds=posed.bounds, n_polish=N_POLISH)
    again = resample(
        posed.model,
        y,
        runs=runs,
        strata=budget_strata(columns["flops"], runs),
        optimum=optimum,
        name=name,
        bounds=posed.bounds,
        n_draws=n_draws,
        rng=np.random.default_rng([7, world]),
    )
    flops = setting.flops
    drawn = quantities(law, posed.natural(again.theta), flops)
    point = quantities(law, posed.natural(optimum.theta), flops)
    return World(
        ends={key: np.quantile(values, (0.025, 0.975)) for key, values in drawn.items()},
        point={key: float(value) for key, value in point.items()},
        method=again.method,
    )


def measure(
    setting: Setting, *, n_worlds: int = N_WORLDS, n_draws: int = N_DRAWS, objective: str = "adaptive"
) -> SettingCoverage:
    """Coverage of every quantity in one setting."""
    law, values = truth()
    losses = log_losses(setting.design, law, values, setting.noise, n_worlds)
    worlds = [_fit(setting, y, world, n_draws, objective) for world, y in enumerate(losses)]
    found = []
    for key, value in quantities(law, values, setting.flops).items():
        low, high = np.array([one.ends[key] for one in worlds]).T
        off = np.array([one.point[key] for one in worlds]) - value
        found.append(
            Coverage(
                quantity=key,
                truth=float(value),
                held_frac=float(((low <= value) & (value <= high)).mean()),
                width=float(np.median(high - low)),
                rmse=float(np.sqrt((off**2).mean())),
            )
        )
    return SettingCoverage(
        setting=setting.name,
        n_points=len(setting.design),
        n_runs=int(runs_of(setting.design).max()) + 1,
        n_worlds=n_worlds,
        n_draws=n_draws,
        method=worlds[0].method,
        found=tuple(found),
    )


def study(*, n_worlds: int = N_WORLDS, n_draws: int = N_DRAWS, say: Callable[[str], None]) -> list[SettingCoverage]:
    """All settings, each told when it is done."""
    done = []
    for setting in settings():
        done.append(measure(setting, n_worlds=n_worlds, n_draws=n_draws))
        say(f"{setting.name}: {', '.join(f'{c.quantity} {c.held_frac:.3f}' for c in done[-1].found)}")
    return done


def table(results: Sequence[SettingCoverage]) -> str:
    """The study for a person: coverage, and in brackets the median width of the interval."""
    names = [c.quantity for c in results[0].found]
    first = results[0]
    lines = [
        f"coverage of nominal 95 % intervals, {first.n_worlds} worlds of {first.n_draws} resamples, truth {TRUTH}",
        f"{'setting':<42}" + "".join(f"{name:>18}" for name in names),
    ]
    for one in results:
        cells = "".join(f"{c.held_frac:>9.3f} ({c.width:>6.3g})" for c in one.found)
        lines.append(f"{one.setting:<42}{cells}")
    return "\n".join(lines)
