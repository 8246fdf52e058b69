"""What a ladder would find, before a kWh is spent: its rows measured many times over in a world whose law is known.

Every world has the law's losses with noise by run (seeds, data order; shared by the horizons of one trunk) and by row.
All worlds share the design, so one batch of refits answers for all of them, and the spread over the worlds is the
interval to expect.

Legend:  R world, n row
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit import diagnose
from homelab_scaling.fit.catalogue import CATALOGUE, joint_fit, must_be_as_trained, open_fit
from homelab_scaling.fit.laws import Law, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.points import Count
from homelab_scaling.fit.resample import FEW_RUNS
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.slices import tabulate
from homelab_scaling.fit.solve import refit, solve
from homelab_scaling.fit.targets import Target, parse_target
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.fit.worlds import Design, Noise, as_points, columns_of, log_losses, runs_of
from homelab_scaling.ladder import Horizons, Ladder, Rung
from homelab_scaling.plan.budget import counted
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.seeds import with_seeds

FITTED = ("chinchilla", "chinchilla-tied")
N_STARTS = 100
MAX_WORLDS = 5000
MIN_WORLDS = 20
WIDE_A = 0.2
"""An interval of a wider than this tells data-hungry from parameter-hungry at best."""
WIDE_FACTOR = 4.0
"""An interval of D_opt or N_opt whose ends are farther apart than this does not size a run."""
OFTEN_LOOSE = 0.10
NAMED = ("a", "alpha", "beta", "E")

Planner = Callable[[Ladder], Plan]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The law that the worlds obey."""

    source: str
    law: str
    values: dict[str, float]
    count: Count
    """Which parameters its N counts."""
    ranges: dict[str, tuple[float, float]]
    published: bool


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One quantity over the worlds."""

    name: str
    words: str
    truth: float | None
    """None where the law of the worlds has no such quantity."""
    median: float
    ci95: tuple[float, float]
    in_log: bool

    @property
    def width(self) -> float:
        """Of the interval; the factor between its ends where it is taken in logarithms."""
        low, high = self.ci95
        return high / max(low, 1e-300) if self.in_log else high - low

    @property
    def misses(self) -> bool:
        """Whether the interval leaves the truth out."""
        return self.truth is not None and not self.ci95[0] <= self.truth <= self.ci95[1]


@dataclass(frozen=True, kw_only=True)
class LawOutlook:
    """What fitting one law to the worlds gives."""

    law: str
    why_not: str | None
    """Why the rows cannot carry it; None where they do."""
    objective: str
    expected: tuple[Expected, ...]
    loose_frac: float | None
    """Share of the worlds in which a parameter ends at a bound."""

    def get(self, name: str) -> Expected | None:
        return next((one for one in self.expected if one.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """Hoffmann's Approach 2 at one budget: the size of lowest loss by a parabola in log N."""

    flops: float
    without_noise: float | None
    """N_opt by the parabola through the law itself; None where its minimum is not between the sizes."""
    ci95: tuple[float, float] | None
    found_frac: float
    """Share of the worlds with a minimum between the smallest and the largest size."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The ladder as written, or one change to it."""

    name: str
    why_not: str | None
    """Why it cannot be planned; None where it can."""
    n_runs: int
    n_rows: int
    seconds: float | None
    kwh: float | None
    flops: float
    laws: tuple[LawOutlook, ...]
    parabolas: tuple[Parabola, ...]

    def law(self, name: str) -> LawOutlook | None:
        return next((one for one in self.laws if one.law == name), None)


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to expect of a ladder and of three changes to it."""

    truth: Truth
    n_worlds: int
    noise: Noise
    targets: tuple[str, ...]
    variants: tuple[Variant, ...]
    """The ladder as written first."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def open_truth(source: str, law: str | None = None) -> Truth:
    """The law to simulate from: a catalogue name, a fit or a lab.

    Raises:
        SpecError: none of these, or no law of N and D.
    """
    if source in CATALOGUE and not get_law(CATALOGUE[source].law).splits:
        raise SpecError(f"--simulate {source}: {CATALOGUE[source].law} is no law of N and D; choose hoffmann-2022")
    report = open_fit(source)
    must_be_as_trained(report)
    fit, chosen, drawn = joint_fit(report, law)
    count: Count = report.count  # type: ignore[assignment]
    return Truth(
        source=source,
        law=chosen.name,
        values={name: float(value) for name, value in zip(drawn.names, drawn.point, strict=True)},
        count=count,
        ranges=fit.ranges,
        published=source in CATALOGUE,
    )


def design_of(plan: Plan, n_seeds: int, count: Count) -> list[Design]:
    """The rows that a plan will measure, with N as the law counts it."""
    return [
        Design(
            n_params=counted(rung.size.params, count),
            n_tokens=tokens,
            run=f"{rung.name}-{index}-s{seed}",
            flops=tokens * rung.size.flops_per_token.causal,
            seed=seed,
        )
        for rung in plan.rungs
        for seed in range(n_seeds)
        for index, launch in enumerate(rung.launches)
        for tokens in launch.horizons_tokens
    ]


def simulate(
    ladder: Ladder,
    planner: Planner,
    truth: Truth,
    *,
    noise: Noise | None = None,
    n_worlds: int = 200,
    targets: Sequence[str] = (),
) -> Simulation:
    """The intervals to expect of a ladder, warnings where it cannot answer its question, and what would.

    Args:
        planner: plans a ladder on the machine meant; it is asked for three changed ones too.
        targets: quantities beside a, alpha, beta and E; none takes D_opt at 1e9 and, on an isoFLOP ladder, N_opt at its
            largest budget.

    Raises:
        SpecError: a target the law has not, or too few or too many worlds.
    """
    if not MIN_WORLDS <= n_worlds <= MAX_WORLDS:
        raise SpecError(f"--worlds {n_worlds}: wants {MIN_WORLDS} to {MAX_WORLDS:,}")
    noise = noise or Noise()
    wanted = tuple(targets) or _usual_targets(ladder)
    for name in wanted:
        for law in FITTED:
            parse_target(name, get_law(law))
    variants = [
        _simulate_one(name, changed, planner, truth, noise=noise, n_worlds=n_worlds, targets=wanted)
        for name, changed in (("as written", ladder), *_changes(ladder))
    ]
    return Simulation(
        truth=truth,
        n_worlds=n_worlds,
        noise=noise,
        targets=wanted,
        variants=tuple(variants),
        warnings=tuple(_warnings(ladder, variants, targets)),
        notes=(*_notes(planner(ladder), truth), *_about_first(variants[0], wanted)),
    )


def _usual_targets(ladder: Ladder) -> tuple[str, ...]:
    budgets = ladder.horizons.flops if ladder.horizons.mode == "exact" else ()
    return ("d-opt:1e9", *([f"n-opt:{max(budgets):g}"] if budgets else []))


# ---------------------------------------------------------------------------------------------------------- variants


def _changes(ladder: Ladder) -> list[tuple[str, Ladder | str]]:
    """Three ways to make a ladder say more; a sentence where one is not possible."""
    return [
        ("size x 2", ladder),
        ("horizon x 2", _longer(ladder)),
        (_seeds_name(ladder), _more_seeds(ladder)),
    ]


def _longer(ladder: Ladder) -> Ladder | str:
    h = ladder.horizons
    if h.mode == "nominal":
        return "nominal horizons are one per rung"
    for name in ("tokens", "tokens_per_param", "flops", "steps"):
        values = getattr(h, name)
        if values:
            return replace(ladder, horizons=_with(h, name, (*values, 2 * max(values))))
    return "no horizons to lengthen"


def _with(horizons: Horizons, name: str, values: tuple[float, ...]) -> Horizons:
    changes: dict[str, Any] = {name: values}
    return replace(horizons, **changes)


def _seeds_name(ladder: Ladder) -> str:
    return "three seeds" if len(ladder.seeds) < 3 else f"{2 * len(ladder.seeds)} seeds"


def _more_seeds(ladder: Ladder) -> Ladder:
    return with_seeds(ladder, 3 if len(ladder.seeds) < 3 else 2 * len(ladder.seeds))


def _larger(ladder: Ladder, plan: Plan) -> Ladder:
    largest = max(plan.rungs, key=lambda rung: rung.size.n_params)
    like = next(rung for rung in ladder.rungs if rung.name == largest.name)
    names = {rung.name for rung in ladder.rungs}
    name = next(f"larger{k}" for k in range(len(names) + 1) if f"larger{k}" not in names)
    more = Rung(
        name=name,
        n_params_target=2 * largest.size.n_params,
        batch_tokens=like.batch_tokens,
        nominal_tokens=like.nominal_tokens,
    )
    return replace(ladder, rungs=(*ladder.rungs, more))


def _simulate_one(
    name: str,
    changed: Ladder | str,
    planner: Planner,
    truth: Truth,
    *,
    noise: Noise,
    n_worlds: int,
    targets: Sequence[str],
) -> Variant:
    """One variant planned and simulated; what cannot be planned says why."""
    try:
        if isinstance(changed, str):
            raise SpecError(changed)
        if name == "size x 2":
            changed = _larger(changed, planner(changed))
        plan = planner(changed)
    except SpecError as error:
        return Variant(
            name=name, why_not=str(error), n_runs=0, n_rows=0, seconds=None, kwh=None, flops=0.0, laws=(), parabolas=()
        )
    design = design_of(plan, len(changed.seeds), truth.count)
    law = get_law(truth.law)
    values = np.array([truth.values[n] for n in law.names])
    y = log_losses(design, law, values, noise, n_worlds)
    totals = plan.totals
    return Variant(
        name=name,
        why_not=None,
        n_runs=totals.n_runs,
        n_rows=totals.n_rows,
        seconds=totals.seconds,
        kwh=totals.kwh,
        flops=totals.flops,
        laws=tuple(_outlook(get_law(fitted), design, y, truth, noise=noise, targets=targets) for fitted in FITTED),
        parabolas=tuple(_parabolas(changed, plan, design, law, values=values, y=y)),
    )


def _outlook(
    law: Law, design: Sequence[Design], y: Array, truth: Truth, *, noise: Noise, targets: Sequence[str]
) -> LawOutlook:
    """One law fitted to every world."""
    true_law = get_law(truth.law)
    true_values = np.array([truth.values[n] for n in true_law.names])
    columns = columns_of(design)
    silent = true_law.loss(true_values, dict(columns))
    why_not = diagnose.too_few(law, tabulate(as_points(design, np.log(silent))), np.arange(len(design)))
    n_runs = int(runs_of(design).max()) + 1
    objective = "l2-log" if n_runs < FEW_RUNS or noise.total_sd < 1e-8 else f"huber:{1.345 * noise.total_sd:.6g}"
    if why_not is not None:
        return LawOutlook(law=law.name, why_not=why_not, objective=objective, expected=(), loose_frac=None)
    name = parse_objective(objective)
    posed = law.pose({axis: columns[axis] for axis in law.axes}, silent)
    optimum, noisy = (
        solve(posed.model, one, posed.starts(N_STARTS), name, bounds=posed.bounds) for one in (np.log(silent), y[0])
    )
    starts = np.concatenate([optimum.candidates[:2], noisy.candidates[:2]])
    found = refit(posed.model, y, np.ones(len(design)), replace(optimum, candidates=starts), name, bounds=posed.bounds)
    values = posed.natural(found.theta)
    whole = posed.full(found.theta)
    bare = {n: Estimate(value=None) for n in law.names}
    loose = [bool(diagnose.unpinned_parameters(law, theta, bare, silent)) for theta in whole]
    wanted = [parse_target(n, law) for n in (*NAMED, *targets)]
    return LawOutlook(
        law=law.name,
        why_not=None,
        objective=objective,
        expected=tuple(_expected(t, law, values, true_law, true_values) for t in wanted),
        loose_frac=float(np.mean(loose)),
    )


def _expected(target: Target, law: Law, values: Array, true_law: Law, true_values: Array) -> Expected:
    found = np.clip(np.nan_to_num(target.of(law, values), nan=0.0, posinf=1e300), -1e300, 1e300)
    known = target.name not in NAMED or target.name in (*true_law.names, *true_law.derived(true_values))
    low, high = (float(q) for q in np.quantile(found, (0.025, 0.975)))
    return Expected(
        name=target.name,
        words=target.words,
        truth=float(target.of(true_law, true_values)) if known else None,
        median=float(np.median(found)),
        ci95=(low, high),
        in_log=target.in_log,
    )


def _parabolas(
    ladder: Ladder, plan: Plan, design: Sequence[Design], law: Law, *, values: Array, y: Array
) -> list[Parabola]:
    """Approach 2 at every budget of an isoFLOP ladder with three sizes or more."""
    if not ladder.horizons.flops or ladder.horizons.mode != "exact" or len(plan.rungs) < 3:
        return []
    log_c = np.log([row.compute for row in design])
    silent = np.log(law.loss(values, dict(columns_of(design))))
    x = np.log([row.n_params for row in design])
    found = []
    for budget in sorted(ladder.horizons.flops):
        rows = np.flatnonzero(np.abs(log_c - math.log(budget)) < 0.2)
        if len(np.unique(x[rows])) < 3:
            continue
        minima = _lowest(x[rows], np.vstack([silent[rows], y[:, rows]]))
        inside = minima[1:][np.isfinite(minima[1:])]
        ends = np.exp(np.quantile(inside, (0.025, 0.975))) if len(inside) >= MIN_WORLDS else None
        found.append(
            Parabola(
                flops=budget,
                without_noise=float(np.exp(minima[0])) if np.isfinite(minima[0]) else None,
                ci95=None if ends is None else (float(ends[0]), float(ends[1])),
                found_frac=float(np.isfinite(minima[1:]).mean()),
            )
        )
    return found


def _lowest(x: Array, y: Array) -> Array:
    """Where the parabola through each row of y (R, n) is lowest; NaN where that is not between the ends of x."""
    middle = x.mean()
    c2, c1, _c0 = np.polyfit(x - middle, y.T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = middle - c1 / (2 * c2)
    return np.where((c2 > 0) & (at > x.min()) & (at < x.max()), at, np.nan)


# ---------------------------------------------------------------------------------------------------------- judgement


def shortcomings(variant: Variant, targets: Sequence[str]) -> list[str]:
    """Why a design cannot answer questions about exponents, optima and these targets; empty where it can."""
    if variant.why_not is not None:
        return [variant.why_not]
    free = variant.law("chinchilla")
    assert free is not None
    if free.why_not is not None:
        if variant.parabolas and all(_is_sharp(p) for p in variant.parabolas):
            return []  # a single budget asks for the best size there, and gets it
        return [f"L(N, D) cannot be fitted: {free.why_not}"]
    said = []
    a = free.get("a")
    if a is not None and a.width > WIDE_A:
        said.append(f"the interval of a is {a.width:.2f} wide ({a.ci95[0]:.2f} to {a.ci95[1]:.2f}), more than {WIDE_A}")
    if free.loose_frac is not None and free.loose_frac > OFTEN_LOOSE:
        said.append(f"in {100 * free.loose_frac:.0f} % of the worlds a parameter ends at a bound")
    return said + [
        _too_wide(one) for name in targets if (one := free.get(name)) and one.in_log and one.width > WIDE_FACTOR
    ]


def _too_wide(one: Expected) -> str:
    return f"the ends of the interval of {one.words} are a factor of {brief(one.width)} apart"


def _is_sharp(parabola: Parabola) -> bool:
    """Whether it finds its minimum in nearly every world, and nearly the same one."""
    often = parabola.found_frac > 1 - OFTEN_LOOSE
    return often and parabola.ci95 is not None and parabola.ci95[1] < WIDE_FACTOR * parabola.ci95[0]


def _warnings(ladder: Ladder, variants: Sequence[Variant], asked: Sequence[str]) -> list[str]:
    """What the design cannot answer, and which change would.

    Args:
        asked: targets that the user named; the usual ones are judged in the notes, for no ladder promised them.
    """
    first, *others = variants
    missing = shortcomings(first, asked)
    if not missing:
        return []
    about = f'as far as "{ladder.question}" is about exponents or optima, ' if ladder.question else ""
    said = [f"{about}this design cannot answer it: {missing[0]}" if about else f"this design is too weak: {missing[0]}"]
    said += [f"and {reason}" for reason in missing[1:]]
    enough = [v for v in others if v.why_not is None and not shortcomings(v, asked)]
    if enough:
        cheapest = min(enough, key=lambda v: v.flops)
        said.append(f"what would: {cheapest.name} ({cheapest.flops / first.flops:.1f} times the compute)")
        return said
    usable = [v for v in others if _width_of_a(v) < math.inf]
    if not usable:
        fitted = (law := first.law("chinchilla")) is not None and law.why_not is None
        remedy = (
            "it takes several of them at once" if fitted else "give at least three sizes, each at three token counts"
        )
        return [*said, f"none of the three changes does: {remedy}"]
    best = min(usable, key=_width_of_a)
    said.append(
        f"none of the three changes alone does; {best.name} comes nearest (a {_width_of_a(best):.2f} wide at "
        f"{best.flops / first.flops:.1f} times the compute): combine them, or spread sizes and horizons over a "
        "decade each"
    )
    return said


def _width_of_a(variant: Variant) -> float:
    """Infinite where the free law cannot be fitted or is rarely pinned down."""
    law = variant.law("chinchilla")
    a = law.get("a") if law else None
    return a.width if a and law and (law.loose_frac or 0.0) <= OFTEN_LOOSE else math.inf


def _about_first(first: Variant, targets: Sequence[str]) -> list[str]:
    """What the widths of the ladder as written mean."""
    free, tied = first.law("chinchilla"), first.law("chinchilla-tied")
    assert free is not None and tied is not None
    said = []
    if free.why_not is not None and first.parabolas:
        said.append("rows at so few budgets give the size of lowest loss at each, but no exponent and no law")
    for name in targets:
        one = free.get(name)
        if one is not None and one.in_log and one.width > WIDE_FACTOR:
            said.append(f"{_too_wide(one)}: too wide to size a run by")
    for law in (free, tied):
        asked = (*([] if law is tied else ["a"]), *targets)
        lost = [one.words for n in asked if (one := law.get(n)) and one.misses]
        if lost:
            why = "these worlds obey another law" if law is free else "narrow, but biased where alpha and beta differ"
            said.append(f"{law.law} misses the truth of {listed(lost)}: {why}")
    return said


def _notes(plan: Plan, truth: Truth) -> list[str]:
    """How far the law is from where it was measured, and what does not carry over."""
    said = []
    if truth.published:
        said.append(
            f"{truth.source} holds for its own text and tokenizer: only the shape carries over; read widths, not values"
        )
    law = get_law(truth.law)
    values = np.array([truth.values[n] for n in law.names])
    design = design_of(plan, 1, truth.count)
    columns = columns_of(design)
    beyond = []
    for axis, letter in (("n_params", "N"), ("n_tokens", "D")):
        low, high = truth.ranges[axis]
        smallest, largest = float(columns[axis].min()), float(columns[axis].max())
        if smallest < low / 1.01:
            beyond.append(f"{letter} = {short(smallest)} is {brief(low / smallest)} times below its smallest")
        if largest > high * 1.01:
            beyond.append(f"{letter} = {short(largest)} is {brief(largest / high)} times above its largest")
    if beyond:
        said.append(f"outside the range of {truth.source}: {listed(beyond)}")
    top, chance = float(law.loss(values, dict(columns)).max()), math.log(plan.n_vocab)
    if top > chance:
        said.append(
            f"there the law gives {top:.1f} nats, more than guessing among {plan.n_vocab:,} tokens ({chance:.1f}): "
            "real losses vary less, so real intervals will be wider; simulate from a fit of a pilot when there is one"
        )
    return said
