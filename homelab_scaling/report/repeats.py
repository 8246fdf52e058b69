"""How far runs that differ in nothing but the seed lie apart, and how large that makes the effects of a lab.

    cells of (family, horizon) -> Spread (pooled standard deviation, chi-square interval) -> Effect in units of it

A family is a run and its repeats: one science but for the seed. The rows of one trunk share its noise, so they never
count as repeats of each other: degrees of freedom are those of runs.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from homelab_scaling.plan.seeds import but_for_seed
from homelab_scaling.runs import Row

if TYPE_CHECKING:
    from homelab_scaling.report.collect import LabView, RunView

MIN_SIZES = 3
"""For an exponent seed by seed."""
SAME_ORDER_P = 0.01
"""Below this, what seeds do is the same for all rungs."""
UNLIKE_P = 0.01
"""Below this, shared out over rungs, seeds move one rung more than the others."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One rung at one horizon."""

    family: object
    rung: str
    n_params: int
    n_tokens: int
    rank: int
    """Of the horizon among the rung's, from 0."""
    rows: tuple[Row, ...]
    """One for each seed, by seed."""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(row.loss_nats for row in self.rows)

    @property
    def mean(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def squares(self) -> float:
        """Sum of squared deviations from the mean."""
        return math.fsum((loss - self.mean) ** 2 for loss in self.losses)

    @property
    def sd(self) -> float:
        return math.sqrt(self.squares / (len(self.losses) - 1))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A pooled standard deviation of normal-like noise."""

    sd: float
    dof: int
    """Of runs: rows of one run count once."""
    ci95: tuple[float, float]
    n_cells: int

    @property
    def reach(self) -> float:
        """Student's t at 97.5 %: a difference below this times its standard error may be chance."""
        from scipy.special import stdtrit

        return float(stdtrit(self.dof, 0.975))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A difference that a report shows, against what seeds alone do to it."""

    name: str
    kind: str
    """`rungs`, `horizons`, `rates` or `published`."""
    nats: float
    sds: float
    """In standard deviations of one run's loss."""
    noise95: float
    """Nats by which it may differ with other seeds, 95 times in 100."""

    @property
    def is_beyond(self) -> bool:
        """Whether it is larger than what seeds do."""
        return abs(self.nats) > self.noise95


class Repeats:
    """Everything that a lab's seeds tell."""

    def __init__(self, view: "LabView") -> None:
        self.view = view

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """By size and tokens, whether they hold one row or several."""
        families = {run.run_id: _family(run) for run in self.view.runs}
        groups: dict[tuple[object, int], list[Row]] = {}
        for row in self.view.rows:
            groups.setdefault((families.get(row.run_id, row.run_id), row.n_tokens), []).append(row)
        horizons: dict[str, set[int]] = {}
        for row in self.view.rows:
            horizons.setdefault(row.rung, set()).add(row.n_tokens)
        found = [
            Cell(
                family=family,
                rung=rows[0].rung,
                n_params=rows[0].n_params,
                n_tokens=tokens,
                rank=sorted(horizons[rows[0].rung]).index(tokens),
                rows=tuple(sorted(rows, key=lambda row: row.seed)),
            )
            for (family, tokens), rows in groups.items()
        ]
        return tuple(sorted(found, key=lambda cell: (cell.n_params, cell.n_tokens)))

    @property
    def repeated(self) -> tuple[Cell, ...]:
        """The cells of two seeds or more."""
        return tuple(cell for cell in self.cells if len(cell.rows) > 1)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({row.seed for row in self.view.rows}))

    @cached_property
    def spread(self) -> Spread | None:
        """Over all rungs and horizons; None without a repeat."""
        return pooled(self.repeated)

    def by_horizon(self) -> list[tuple[tuple[Cell, ...], Spread]]:
        """The same for each horizon that several rungs repeat, from the shortest."""
        ranks: dict[int, list[Cell]] = {}
        for cell in self.repeated:
            ranks.setdefault(cell.rank, []).append(cell)
        found = [(tuple(cells), pooled(cells)) for _rank, cells in sorted(ranks.items()) if len(cells) > 1]
        return [(cells, spread) for cells, spread in found if spread is not None]

    # ------------------------------------------------------------------------------------------------------- effects

    @cached_property
    def rung_pairs(self) -> list[tuple[Cell, Cell]]:
        """Neighbours in size, the smaller one first, at each horizon that they share.

        At equal tokens where all rungs have some in common, else along the ladder: first horizons, second ones, ...
        """
        tokens = [{cell.n_tokens for cell in self.cells if cell.rung == rung} for rung in self._rungs]
        shared = set.intersection(*tokens) if tokens else set()
        ladders: dict[int, list[Cell]] = {}
        for cell in self.cells:
            if not shared or cell.n_tokens in shared:
                ladders.setdefault(cell.n_tokens if shared else cell.rank, []).append(cell)
        pairs = [pair for cells in ladders.values() for pair in itertools.pairwise(cells)]
        return [(small, large) for small, large in pairs if small.n_params < large.n_params]

    @cached_property
    def horizon_pairs(self) -> list[tuple[Cell, Cell]]:
        """Neighbours in tokens of one rung, the shorter one first."""
        pairs = itertools.pairwise(self.cells)
        return [(a, b) for a, b in pairs if a.rung == b.rung and a.n_tokens < b.n_tokens]

    @cached_property
    def between_rungs(self) -> list[Effect]:
        """What each size gains over the next smaller one."""
        if (spread := self.spread) is None:
            return []
        found = []
        for small, large in self.rung_pairs:
            noise = spread.reach * spread.sd * math.sqrt(1 / len(small.rows) + 1 / len(large.rows))
            found.append(_effect("rungs", (small, large), small.mean - large.mean, noise, spread))
        return found

    @cached_property
    def between_horizons(self) -> list[Effect]:
        """What longer training gains. Where one run has both rows, its own noise cancels in between."""
        if (spread := self.spread) is None:
            return []
        steps = [(pair, _steps(*pair)) for pair in self.horizon_pairs]
        within = _pooled([(pair[0].family, gaps) for pair, gaps in steps if len(gaps) > 1])
        found = []
        for (short, long), gaps in steps:
            if gaps and within is not None:
                noise = within.reach * within.sd / math.sqrt(len(gaps))
                gain = math.fsum(gaps) / len(gaps)
            else:
                noise = spread.reach * spread.sd * math.sqrt(1 / len(short.rows) + 1 / len(long.rows))
                gain = short.mean - long.mean
            found.append(_effect("horizons", (short, long), gain, noise, spread))
        return found

    def of_rates(self, gains: Iterable[tuple[str, float]]) -> list[Effect]:
        """What better rates gained on tuned rungs (name, nats), each told by one run at either rate."""
        if (spread := self.spread) is None:
            return []
        noise = spread.reach * spread.sd * math.sqrt(2)
        return [
            Effect(name=f"{rung}: best rate against the rule's", kind="rates", nats=gain, sds=gain / spread.sd,
                   noise95=noise)
            for rung, gain in gains
        ]  # fmt: skip

    def of_published(self, rung: str, theirs: float) -> Effect | None:
        """Our loss of a rung at its last horizon less a published one; None where it was not measured."""
        cell = next((cell for cell in reversed(self.cells) if cell.rung == rung), None)
        if (spread := self.spread) is None or cell is None:
            return None
        noise = spread.reach * spread.sd / math.sqrt(len(cell.rows))
        nats = cell.mean - theirs
        name = f"{rung}: ours against the published {theirs:g}"
        return Effect(name=name, kind="published", nats=nats, sds=nats / spread.sd, noise95=noise)

    @property
    def _rungs(self) -> list[str]:
        return list(dict.fromkeys(cell.rung for cell in self.cells))

    # ------------------------------------------------------------------------------------ what all rungs have in common

    @cached_property
    def exponents(self) -> tuple[int, dict[int, float]] | None:
        """D, and the exponent of L ~ N^-x there seed by seed; None where no two seeds have three sizes."""
        for tokens in sorted({cell.n_tokens for cell in self.cells}, reverse=True):
            cells = [cell for cell in self.cells if cell.n_tokens == tokens]
            found = {}
            for seed in self.seeds:
                points = [(c.n_params, r.loss_nats) for c in cells for r in c.rows if r.seed == seed]
                if len({n for n, _ in points}) >= MIN_SIZES:
                    x, y = np.log(np.array(points, dtype=np.float64)).T
                    found[seed] = -float(np.polyfit(x - x.mean(), y, 1)[0])
            if len(found) > 1:
                return tokens, found
        return None

    @cached_property
    def common(self) -> tuple[float, float] | None:
        """Share of the seeds' variance that all rungs have in common at the longest horizon, and its p-value.

        One seed gives every rung the same order of the text. None where fewer than three rungs have the same seeds.
        """
        last = [max((c for c in self.repeated if c.rung == rung), key=lambda c: c.rank, default=None)
                for rung in self._rungs]  # fmt: skip
        cells = [cell for cell in last if cell is not None]
        if len(cells) < MIN_SIZES or len({tuple(row.seed for row in cell.rows) for cell in cells}) > 1:
            return None
        from scipy.stats import f as fisher

        off = np.array([cell.losses for cell in cells])
        off -= off.mean(axis=1, keepdims=True)
        n_rungs, n_seeds = off.shape
        of_seed = n_rungs * float((off.mean(axis=0) ** 2).sum()) / (n_seeds - 1)
        rest = float(((off - off.mean(axis=0)) ** 2).sum()) / ((n_rungs - 1) * (n_seeds - 1))
        if rest <= 0:
            return None
        p_value = float(fisher.sf(of_seed / rest, n_seeds - 1, (n_rungs - 1) * (n_seeds - 1)))
        shared = max(0.0, (of_seed - rest) / n_rungs)
        return shared / (shared + rest), p_value

    @cached_property
    def unlike(self) -> tuple[str, Spread, Spread] | None:
        """The rung that seeds move most, its spread and that of all others; None where chance explains the difference.

        By Fisher's F of the largest against the rest, the level shared out over the rungs that could have been it.
        """
        by_rung = {rung: [c for c in self.repeated if c.rung == rung] for rung in self._rungs}
        spreads = {rung: found for rung, cells in by_rung.items() if (found := pooled(cells)) is not None}
        if len(spreads) < 2:
            return None
        most = max(spreads, key=lambda rung: spreads[rung].sd)
        rest = pooled([cell for cell in self.repeated if cell.rung != most])
        if rest is None:
            return None
        from scipy.stats import f as fisher

        p_value = float(fisher.sf((spreads[most].sd / rest.sd) ** 2, spreads[most].dof, rest.dof))
        return (most, spreads[most], rest) if p_value < UNLIKE_P / len(spreads) else None


# ---------------------------------------------------------------------------------------------------------------- parts


def pooled(cells: Sequence[Cell]) -> Spread | None:
    """The standard deviation within cells of two rows or more; None where there is none, or nothing differs."""
    return _pooled([(cell.family, cell.losses) for cell in cells])


def _pooled(groups: Sequence[tuple[object, Sequence[float]]]) -> Spread | None:
    """Of (family, values): variance over all groups, degrees of freedom over families."""
    kept = [(family, np.array(values)) for family, values in groups if len(values) > 1]
    n_spare = sum(len(values) - 1 for _, values in kept)
    squares = math.fsum(float(((values - values.mean()) ** 2).sum()) for _, values in kept)
    if n_spare == 0 or squares <= 0:
        return None
    most: dict[object, int] = {}
    for family, values in kept:
        most[family] = max(most.get(family, 0), len(values) - 1)
    sd, dof = math.sqrt(squares / n_spare), sum(most.values())
    return Spread(sd=sd, dof=dof, ci95=sd_interval(sd, dof), n_cells=len(kept))


def sd_interval(sd: float, dof: int) -> tuple[float, float]:
    """The 95 % interval of a standard deviation estimated with so many degrees of freedom, by chi-square."""
    from scipy.special import chdtri

    return sd * math.sqrt(dof / float(chdtri(dof, 0.025))), sd * math.sqrt(dof / float(chdtri(dof, 0.975)))


def _family(run: "RunView") -> object:
    """What repeats of a run share; another trainer's run says only what stands in its rows."""
    if run.spec is not None:
        return run.rung, but_for_seed(run.spec.science)
    row = run.rows[0] if run.rows else None
    if row is None:
        return run.run_id
    horizons = tuple(r.n_tokens for r in run.rows) if row.schedule == "cosine" else ()
    return (run.rung, row.n_params, row.batch_tokens, row.lr_peak, row.schedule, row.optimizer, row.data_id, horizons)


def _steps(short: Cell, long: Cell) -> list[float]:
    """What each run with a row in both cells gained."""
    after = {row.run_id: row.loss_nats for row in long.rows}
    return [row.loss_nats - after[row.run_id] for row in short.rows if row.run_id in after]


def _effect(kind: str, pair: tuple[Cell, Cell], nats: float, noise: float, spread: Spread) -> Effect:
    from homelab_scaling.fit.words import short

    first, second = pair
    if kind == "rungs":
        same = first.n_tokens == second.n_tokens
        at = short(second.n_tokens) if same else f"{short(first.n_tokens)} and {short(second.n_tokens)}"
        name = f"{second.rung} against {first.rung} at D = {at}"
    else:
        name = f"{first.rung}: D = {short(second.n_tokens)} against {short(first.n_tokens)}"
    return Effect(name=name, kind=kind, nats=nats, sds=nats / spread.sd, noise95=noise)
