"""How long an exact fit takes beside scipy from each start and the `chinchilla` package, all on one BLAS thread each.

Two jobs on one table of 240 points. The grid: the law fitted from the 4,500 starts of Besiroglu et al. 2024. The
refits: 4,000 bootstrap resamples of it. Every contestant runs in a process of its own, with one BLAS thread; imports
are not timed. Slow ones are timed on part of the job and scaled up, and the summary says on how much.

Legend:  n point, P parameter (a, b, e, alpha, beta) with a = log A, b = log B, e = log E
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from homelab_scaling.errors import MachineError
from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.solve import refit, solve

DELTA = 1e-3
GRID = {
    "alpha": np.arange(0, 2.5, 0.5),
    "beta": np.arange(0, 2.5, 0.5),
    "e": np.arange(-1, 1.5, 0.5),
    "a": np.arange(0, 30, 5.0),
    "b": np.arange(0, 30, 5.0),
}
"""Besiroglu et al. 2024, data_analysis.ipynb cell 18."""
THINNED = {"alpha": (0, 2, 4), "beta": (0, 2, 4), "e": (0, 2, 4), "a": (0, 2, 3, 5), "b": (0, 2, 3, 5)}
"""Levels of the grid on which `chinchilla` is timed: it takes only whole grids, and scales by their range."""
EVERY = 7
"""Starts that scipy is timed on; shares no factor with the grid's 5 and 6 levels, so every level is met."""
N_RESAMPLES = 4000
N_TIMED_RESAMPLES = 400
EXACT = 1e-9
CPU_TICK_S = 0.01
"""The kernel counts a process's CPU time in steps of this; less reads as none."""
TABLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "chinchilla_figure4_points.csv"
SINGLE = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do a job, median over the rounds."""

    name: str
    wall_s: float
    """Of the whole job, scaled up where only part of it was timed."""
    cpu_s: float
    """All processes together, scaled like the wall time."""
    gap_frac: float
    """Objective over the lowest that anybody found, minus 1; of refits the median over the resamples."""
    worst_gap_frac: float
    """Of refits that of the worst resample; of the grid the same as `gap_frac`."""
    n_timed: int
    n_total: int


@dataclass(frozen=True, kw_only=True)
class Race:
    """Ours against one peer."""

    peer: str
    ratio: float
    """Peer's wall time over ours."""
    cpu_ratio: float
    target_ratio: float | None
    """None where nothing was promised."""


@dataclass(frozen=True, kw_only=True)
class FitBench:
    """Both jobs."""

    points: str
    """In words, which table."""
    n_points: int
    n_starts: int
    n_distinct_starts: int
    """Left of the grid once brought inside the bounds of the law: ours descends from equal starts once."""
    optimum: float
    """Lowest objective that anybody found."""
    grid: tuple[Contestant, ...]
    refits: tuple[Contestant, ...]
    races: tuple[Race, ...]
    missing: tuple[str, ...]
    """Peers that were not timed, and why."""
    versions: dict[str, str]
    n_cores: int
    n_rounds: int

    def summary(self) -> str:
        """For a person."""
        lines = [
            f"{self.n_points} points ({self.points}), sum of Huber {DELTA:g} on log loss, lowest {self.optimum:.13g}",
            f"{self.n_cores} cores, one BLAS thread each, {', '.join(f'{n} {v}' for n, v in self.versions.items())}, "
            f"median of {self.n_rounds} round{'s' if self.n_rounds > 1 else ''}",
            f"the grid: {self.n_starts:,} starts ({self.n_distinct_starts:,} differ inside our bounds)",
            *(_line(one) for one in self.grid),
            f"the refits: {self.refits[0].n_total:,} bootstrap resamples",
            *(_line(one) for one in self.refits),
            "ours is faster by",
            *(_race_line(one) for one in self.races),
            *(f"  not timed: {why}" for why in self.missing),
        ]
        ours = [one for one in (*self.grid, *self.refits) if one.name.startswith("ours")]
        exact = all(one.worst_gap_frac <= EXACT for one in ours)
        lines.append(f"ours is at the exact optimum everywhere (gap <= {EXACT:g}): {'yes' if exact else 'NO'}")
        return "\n".join(lines)


def _line(one: Contestant) -> str:
    part = f"; timed on {one.n_timed:,} of {one.n_total:,}, scaled" if one.n_timed < one.n_total else ""
    worst = f", worst {one.worst_gap_frac:.0e}" if one.worst_gap_frac != one.gap_frac else ""
    return f"  {one.name:<56} {one.wall_s:8.2f} s wall {one.cpu_s:8.2f} s CPU  gap {one.gap_frac:.0e}{worst}{part}"


def _race_line(one: Race) -> str:
    wanted = ""
    if one.target_ratio is not None:
        wanted = f", wanted {one.target_ratio:g}x: {'reached' if one.ratio >= one.target_ratio else 'MISSED'}"
    return f"  {one.peer:<56} {one.ratio:8.1f}x wall {one.cpu_ratio:8.1f}x CPU{wanted}"


def run(
    *,
    n_rounds: int,
    say: Callable[[str], None],
    n_points: int | None = None,
    every: int | None = None,
    n_resamples: int | None = None,
    n_timed: int | None = None,
) -> FitBench:
    """Times both jobs.

    Args:
        n_rounds: each runs every contestant once, in alternating order.
        say: told what is going on.
        n_points: leave all but so many points out; None takes 240.
        every: the grid keeps every Kth start, K this number, for everybody; None keeps all.
        n_resamples: of the refits; None takes 4,000.
        n_timed: resamples that scipy is timed on; None takes 400.

    Raises:
        MachineError: a contestant's process died.
    """
    n, d, loss, words = _points(n_points)
    starts = np.array(list(itertools.product(*GRID.values())))[:: every or 1, [3, 4, 2, 0, 1]]
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(n), np.full(len(n), 1 / len(n)), size=n_resamples or N_RESAMPLES).astype(np.float64)
    scipy_every = EVERY if every is None else 1
    timed = min(n_timed or N_TIMED_RESAMPLES, len(counts))
    names = [name for name in CONTESTANTS if name != "kyo" or _version("chinchilla")]
    missing = () if "kyo" in names else ("chinchilla: not installed (pip install chinchilla==0.2.0)",)
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder, "problem.npz")
        np.savez(problem, n=n, d=d, loss=loss, starts=starts, every=scipy_every, counts=counts, timed=timed)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(n_rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                found[name].append(_in_own_process(name, problem))
                last = found[name][-1]
                say(f"round {number + 1} of {n_rounds}: {CONTESTANTS[name].title}: {last['wall_s']:.2f} s")
    grid = _judge_grid(found, n=n, d=d, loss=loss)
    refits = _judge_refits(found, n=n, d=d, loss=loss, counts=counts)
    posed = get_law("chinchilla").pose({"n_params": n, "n_tokens": d}, loss)
    inside = np.clip(_centred(starts, n, d), *posed.bounds)
    return FitBench(
        points=words,
        n_points=len(n),
        n_starts=len(starts),
        n_distinct_starts=len(np.unique(inside, axis=0)),
        optimum=_lowest(found, n=n, d=d, loss=loss),
        grid=grid,
        refits=refits,
        races=(*_races(grid), *_races(refits)),
        missing=missing,
        versions={name: v for name in ("numpy", "scipy", "chinchilla") if (v := _version(name))},
        n_cores=len(os.sched_getaffinity(0)),
        n_rounds=n_rounds,
    )


def _points(n_points: int | None) -> tuple[Array, Array, Array, str]:
    """N, D, loss and what they are: the digitised table where it is beside the checkout, else simulated ones."""
    if TABLE.exists():
        table = np.genfromtxt(TABLE, delimiter=",", names=True)
        kept = np.argsort(table["loss_nats"])[:-5]
        n, loss = table["n_params"][kept], table["loss_nats"][kept]
        d = table["flops"][kept] / 6 / n
        words = "Chinchilla's figure 4 as digitised by Besiroglu et al., 5 highest losses dropped"
    else:
        rng = np.random.default_rng(0)
        n = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), size=240))
        d = np.exp(rng.uniform(np.log(3e8), np.log(3e11), size=240))
        one = CATALOGUE["besiroglu-2024"]
        law = get_law(one.law)
        loss = law.loss(np.array([one.values[p] for p in law.names]), {"n_params": n, "n_tokens": d})
        loss = loss * np.exp(0.006 * rng.standard_t(3, size=240))
        words = "simulated from the besiroglu-2024 law with .6 % heavy-tailed noise"
    keep = slice(None) if n_points is None else slice(None, None, max(1, len(n) // n_points))
    return n[keep], d[keep], loss[keep], words


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# -------------------------------------------------------------------------------------------------------- the judging


def objective(theta: Array, n: Array, d: Array, loss: Array, weights: Array | None = None) -> Array:
    """What everybody minimises, (R,) for theta (R, P) and weights (R, n)."""
    a, b, e, alpha, beta = (column[:, None] for column in theta.T)
    with np.errstate(over="ignore"):
        f = np.log(np.exp(a - alpha * np.log(n)) + np.exp(b - beta * np.log(d)) + np.exp(e))
    size = np.abs(f - np.log(loss))
    inner = np.minimum(size, DELTA)
    each = inner * (size - 0.5 * inner)
    return np.asarray((each if weights is None else weights * each).sum(axis=1))


def _lowest(found: dict[str, list[dict[str, Any]]], **table: Array) -> float:
    ends = [
        np.array([one["theta"]]) for name, rounds in found.items() if CONTESTANTS[name].job == "grid" for one in rounds
    ]
    return float(min(objective(theta, **table)[0] for theta in ends))


def _judge_grid(found: dict[str, list[dict[str, Any]]], **table: Array) -> tuple[Contestant, ...]:
    lowest = _lowest(found, **table)
    judged = []
    for name, rounds in found.items():
        if CONTESTANTS[name].job == "grid":
            worst = max(float(objective(np.array([one["theta"]]), **table)[0]) for one in rounds)
            gap = worst / lowest - 1
            judged.append(_contestant(name, rounds, gap, gap))
    return tuple(judged)


def _judge_refits(found: dict[str, list[dict[str, Any]]], *, counts: Array, **table: Array) -> tuple[Contestant, ...]:
    """Resample by resample against the lower of all contestants that did it."""
    ends = {name: np.array(rounds[-1]["theta"]) for name, rounds in found.items() if CONTESTANTS[name].job == "refits"}
    values = {name: objective(theta, weights=counts[: len(theta)], **table) for name, theta in ends.items()}
    lowest = np.full(len(counts), np.inf)
    for value in values.values():
        lowest[: len(value)] = np.minimum(lowest[: len(value)], value)
    judged = []
    for name, value in values.items():
        gaps = value / lowest[: len(value)] - 1
        judged.append(_contestant(name, found[name], float(np.median(gaps)), float(gaps.max())))
    return tuple(judged)


def _contestant(name: str, rounds: list[dict[str, Any]], gap: float, worst: float) -> Contestant:
    scale = rounds[0]["n_total"] / rounds[0]["n_timed"]
    return Contestant(
        name=CONTESTANTS[name].title,
        wall_s=scale * statistics.median(one["wall_s"] for one in rounds),
        cpu_s=scale * statistics.median(one["cpu_s"] for one in rounds),
        gap_frac=gap,
        worst_gap_frac=worst,
        n_timed=rounds[0]["n_timed"],
        n_total=rounds[0]["n_total"],
    )


def _races(job: tuple[Contestant, ...]) -> list[Race]:
    """Ours against each peer: the first of ours with its target, others of ours as a second opinion."""
    targets = {c.title: c.target_ratio for c in CONTESTANTS.values()}
    mine = [one for one in job if one.name.startswith("ours")]
    return [
        Race(
            peer=one.name if ours is mine[0] else f"  ({ours.name.removeprefix('ours, ')})",
            ratio=one.wall_s / ours.wall_s,
            cpu_ratio=one.cpu_s / max(ours.cpu_s, CPU_TICK_S),
            target_ratio=targets[one.name] if ours is mine[0] else None,
        )
        for one in job
        if one not in mine
        for ours in mine
    ]


# --------------------------------------------------------------------------------------------------- the contestants


@dataclass(frozen=True, kw_only=True)
class _Entry:
    job: str
    title: str
    does: Callable[[dict[str, Any]], tuple[Array, int, int]]
    """Problem to theta (P,) of a grid or (R, P) of refits, and how much of how much it did."""
    target_ratio: float | None = None


def _centred(starts: Array, n: Array, d: Array) -> Array:
    """(a, b, e, alpha, beta) as the engine's theta: E first, prefactors centred."""
    a, b, e, alpha, beta = starts.T
    return np.stack([e, a - alpha * np.log(n).mean(), b - beta * np.log(d).mean(), alpha, beta], axis=1)


def _plain(natural: Array) -> Array:
    """Natural parameters (E, A, B, alpha, beta) as (a, b, e, alpha, beta)."""
    e, a, b, alpha, beta = np.moveaxis(natural, -1, 0)
    return np.stack([np.log(a), np.log(b), np.log(e), alpha, beta], axis=-1)


def _ours(problem: dict[str, Any], *, separately: bool) -> tuple[Array, int, int]:
    n, d, loss = problem["n"], problem["d"], problem["loss"]
    posed = get_law("chinchilla").pose({"n_params": n, "n_tokens": d}, loss)
    starts = _centred(problem["starts"], n, d)
    low, high = posed.bounds
    if separately:
        low, high = np.minimum(low, starts.min(axis=0) - 1), np.maximum(high, starts.max(axis=0) + 1)
    found = solve(posed.model, np.log(loss), starts, parse_objective(f"huber:{DELTA:g}"), bounds=(low, high))
    return _plain(posed.natural(found.theta)), len(starts), len(starts)


def _ours_refits(problem: dict[str, Any]) -> tuple[Array, int, int]:
    n, d, loss = problem["n"], problem["d"], problem["loss"]
    posed = get_law("chinchilla").pose({"n_params": n, "n_tokens": d}, loss)
    name = parse_objective(f"huber:{DELTA:g}")
    counts = problem["counts"]
    began = _clock()
    optimum = solve(posed.model, np.log(loss), posed.starts(1024), name, bounds=posed.bounds)
    problem["untimed"] = tuple(now - then for now, then in zip(_clock(), began, strict=True))
    again = refit(posed.model, np.log(loss), counts, optimum, name, bounds=posed.bounds)
    return _plain(posed.natural(again.theta)), len(counts), len(counts)


def _value(x: Array, log_n: Array, log_d: Array, y: Array) -> float:
    """The objective as the published notebook writes it."""
    a, b, e, alpha, beta = x
    with np.errstate(over="ignore"):
        r = np.log(np.exp(a - alpha * log_n) + np.exp(b - beta * log_d) + np.exp(e)) - y
        size = np.abs(r)
        return float(np.sum(np.where(size <= DELTA, 0.5 * r**2, DELTA * (size - 0.5 * DELTA))))


def _value_and_slope(x: Array, log_n: Array, log_d: Array, y: Array, weights: Array | float) -> tuple[float, Array]:
    """The objective and its gradient, both times 1e3."""
    a, b, e, alpha, beta = x
    with np.errstate(over="ignore", invalid="ignore"):
        in_n, in_d, floor = np.exp(a - alpha * log_n), np.exp(b - beta * log_d), np.exp(e)
        total = in_n + in_d + floor
        r = np.log(total) - y
        clipped = np.clip(r, -DELTA, DELTA)
        slope = weights * clipped / total
        by_n, by_d = slope * in_n, slope * in_d
        value = (weights * clipped * (r - 0.5 * clipped)).sum()
        gradient = np.array([by_n.sum(), by_d.sum(), slope.sum() * floor, -(by_n @ log_n), -(by_d @ log_d)])
    return 1e3 * float(value), 1e3 * gradient


def _scipy_grid(problem: dict[str, Any], *, analytic: bool) -> tuple[Array, int, int]:
    from scipy.optimize import minimize

    log_n, log_d, y = (np.log(problem[key]) for key in ("n", "d", "loss"))
    starts = problem["starts"][:: int(problem["every"])]
    best, at = np.inf, starts[0]
    with np.errstate(all="ignore"):
        for start in starts:
            found = (
                minimize(_value_and_slope, start, args=(log_n, log_d, y, 1.0), jac=True, method="L-BFGS-B")
                if analytic
                else minimize(_value, start, args=(log_n, log_d, y), method="L-BFGS-B")
            )
            if found.fun < best:
                best, at = found.fun, found.x
    return at, len(starts), len(problem["starts"])


def _scipy_refits(problem: dict[str, Any]) -> tuple[Array, int, int]:
    from scipy.optimize import minimize

    log_n, log_d, y = (np.log(problem[key]) for key in ("n", "d", "loss"))
    posed = get_law("chinchilla").pose({"n_params": problem["n"], "n_tokens": problem["d"]}, problem["loss"])
    name = parse_objective(f"huber:{DELTA:g}")
    began = _clock()
    optimum = solve(posed.model, y, posed.starts(1024), name, bounds=posed.bounds)
    start = _plain(posed.natural(optimum.theta))
    problem["untimed"] = tuple(now - then for now, then in zip(_clock(), began, strict=True))
    counts = problem["counts"][: int(problem["timed"])]
    ends = [
        minimize(_value_and_slope, start, args=(log_n, log_d, y, weights), jac=True, method="BFGS").x
        for weights in counts
    ]
    return np.array(ends), len(counts), len(problem["counts"])


def _kyo(problem: dict[str, Any]) -> tuple[Array, int, int]:
    """The package as it is called by its users, on a thinned grid; its plot of the fit is left out."""
    from chinchilla import Chinchilla  # type: ignore[import-not-found]
    from chinchilla._metrics import log_huber  # type: ignore[import-not-found]

    grid = {name: [float(GRID[name][i]) for i in levels] for name, levels in THINNED.items()}
    grid = {name: grid[name] for name in ("e", "a", "b", "alpha", "beta")}
    with tempfile.TemporaryDirectory() as folder:
        fitter = Chinchilla(project_dir=folder, param_grid=grid, loss_fn=partial(log_huber, delta=DELTA), log_level=50)
        table = fitter.database.df.__class__(
            {"C": 6 * problem["n"] * problem["d"], "N": problem["n"], "D": problem["d"], "loss": problem["loss"]}
        )
        fitter.database.df = table
        fitter.visualizer.optim = lambda *args, **kwargs: None
        with np.errstate(all="ignore"):
            fitter.fit(parallel=True)
    p = fitter.get_params()
    theta = np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])
    return theta, int(np.prod([len(levels) for levels in grid.values()])), len(problem["starts"])


CONTESTANTS: dict[str, _Entry] = {
    "ours": _Entry(job="grid", title="ours, equal starts once", does=partial(_ours, separately=False)),
    "separately": _Entry(
        job="grid", title="ours, bounds opened: each start by itself", does=partial(_ours, separately=True)
    ),
    "lbfgsb": _Entry(
        job="grid",
        title="scipy L-BFGS-B from each start (the notebook's)",
        does=partial(_scipy_grid, analytic=False),
        target_ratio=25,
    ),
    "lbfgsb-slope": _Entry(
        job="grid", title="scipy L-BFGS-B, analytic gradient, times 1e3", does=partial(_scipy_grid, analytic=True)
    ),
    "kyo": _Entry(job="grid", title="chinchilla, log_huber, all cores", does=_kyo, target_ratio=40),
    "refits": _Entry(job="refits", title="ours, batched", does=_ours_refits),
    "bfgs": _Entry(
        job="refits",
        title="scipy BFGS per resample, analytic gradient, times 1e3",
        does=_scipy_refits,
        target_ratio=12,
    ),
}
"""In the order of the summary; the first of each job is the one that the others are compared with."""


def _clock() -> tuple[float, float]:
    """Wall and CPU seconds, ended children included."""
    t = os.times()
    return time.perf_counter(), t.user + t.system + t.children_user + t.children_system


def _in_own_process(name: str, problem: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "homelab_scaling.bench.fit", name, str(problem)],
        env={**os.environ, **SINGLE, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MachineError(f"bench fit: {CONTESTANTS[name].title} failed ({last[0]}); mend or uninstall that package")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _contend(name: str, path: Path) -> None:
    """In a contestant's process: does the job and prints what came of it as one line of JSON."""
    import scipy.optimize  # noqa: F401 (not the first contestant's time)

    with np.load(path) as file:
        problem: dict[str, Any] = dict(file)
    if name == "kyo":
        import chinchilla  # noqa: F401
    began = _clock()
    theta, n_timed, n_total = CONTESTANTS[name].does(problem)
    wall_s, cpu_s = (now - then for now, then in zip(_clock(), began, strict=True))
    spared = problem.get("untimed", (0.0, 0.0))  # finding the optimum that refits start from is the other job
    print(
        json.dumps(
            {
                "theta": np.asarray(theta, dtype=np.float64).tolist(),
                "wall_s": wall_s - spared[0],
                "cpu_s": cpu_s - spared[1],
                "n_timed": n_timed,
                "n_total": n_total,
            }
        )
    )


if __name__ == "__main__":
    _contend(sys.argv[1], Path(sys.argv[2]))
