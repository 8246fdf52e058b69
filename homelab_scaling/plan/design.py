"""Which runs to do next: those that shrink the interval of what one wants to know most, for what they cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.points import Count, apply_count
from homelab_scaling.fit.result import Draws, FitReport, ScalingFit
from homelab_scaling.fit.slices import Table, levels, tabulate
from homelab_scaling.fit.targets import Target
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.plan.budget import Budget, Offer, Price, Pricer
from homelab_scaling.plan.information import Information, NoiseParts, Tangent, tangent_of

NORMAL95 = 1.959963984540054
SIZE_STEPS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""New sizes, as multiples of the largest there is; and half the smallest."""
TOKEN_STEPS = (2.0, 4.0, 8.0)
"""New longest horizons, as multiples of the longest there is; and half the shortest."""
RATIO_SLACK = 2.0
"""How far beyond the tokens per parameter of the rows there are a new row may go: farther out it is another regime."""
MAX_RUNS = 12
MAX_LEVELS = 8
N_SINGLES = 3
HELPS = 0.05
"""A gain below 5 % of the width is none."""
MAX_WIDTH = 20.0
"""Half an interval, on the target's own scale, beyond which there is none."""


# ------------------------------------------------------------------------------------------------------------- offers


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """A run that was done: what a repeat of it would be."""

    n_params: float
    horizons: tuple[float, ...]


def rows_of(report: FitReport) -> Table:
    """The rows behind a fit, with N as it counts it.

    Raises:
        SpecError: they are not known.
    """
    if not report.points:
        raise SpecError(
            f"{report.source}: the rows behind this fit are not known, so nothing can be added to them; run `homelab "
            "fit` again, or simulate a ladder with `homelab plan LADDER --simulate`"
        )
    count: Count = report.count  # type: ignore[assignment]
    return tabulate(apply_count(tuple(report.points), count))


def runs_done(table: Table) -> list[Done]:
    """The runs behind the rows."""
    found: dict[str, list[int]] = {}
    for row, run in enumerate(table.run_ids):
        found.setdefault(run, []).append(row)
    n, d = table.columns["n_params"], table.columns["n_tokens"]
    return [
        Done(n_params=float(n[rows[0]]), horizons=tuple(sorted({float(d[r]) for r in rows}))) for rows in found.values()
    ]


def offers(done: Sequence[Done], pricer: Pricer, budget: Budget) -> list[Offer]:
    """Runs within the budget: repeats, old sizes on more tokens, new sizes; each with the horizons of a usual run.

    Raises:
        SpecError: nothing has a price in the budget's unit, or nothing is as cheap as the budget.
    """
    why = pricer.why_not(budget.unit)
    if why is not None:
        raise SpecError(f"--budget: {why}")
    usual = max(done, key=lambda run: len(run.horizons))
    shares = tuple(h / usual.horizons[-1] for h in usual.horizons)
    longest = sorted({run.horizons[-1] for run in done})
    sizes = _spread([run.n_params for run in done])
    wished = [(run.n_params, run.horizons, True) for run in done]
    new_sizes = [sizes[0] / 2, *(sizes[-1] * step for step in SIZE_STEPS)]
    tokens = [longest[0] / 2, *_spread(longest), *(longest[-1] * step for step in TOKEN_STEPS)]
    for n in (*sizes, *new_sizes):
        wished += [(n, tuple(d * share for share in shares), False) for d in tokens]
        affordable = _affordable(pricer, n, shares, budget)
        if affordable is not None:
            wished.append((n, affordable, False))
    ratios = [h / run.n_params for run in done for h in run.horizons]
    lowest, highest = min(ratios) / RATIO_SLACK, max(ratios) * RATIO_SLACK
    found: dict[tuple[int, tuple[int, ...]], Offer] = {}
    cheapest = math.inf
    for n, horizons, is_repeat in wished:
        if not lowest <= min(horizons) / n <= max(horizons) / n <= highest:
            continue
        offer = pricer.offer(n, horizons)
        price = offer.price.of(budget.unit) if offer else None
        if offer is None or price is None:
            continue
        cheapest = min(cheapest, price)
        if price <= budget.amount * (1 + 1e-9):
            key = round(100 * math.log(offer.n_params)), tuple(round(100 * math.log(h)) for h in offer.horizons)
            found.setdefault(key, replace(offer, is_repeat=is_repeat))
    if not found:
        least = (
            f"the cheapest run costs {amount(cheapest, budget)}" if cheapest < math.inf else "no run fits the machine"
        )
        raise SpecError(f"--budget of {amount(budget.amount, budget)} buys no run: {least}; raise it")
    return list(found.values())


def _spread(values: Sequence[float]) -> list[float]:
    """At most eight of the distinct values, the ends among them."""
    distinct = [values[int(rows[0])] for rows in levels(np.array(values))]
    if len(distinct) <= MAX_LEVELS:
        return distinct
    return [distinct[round(i)] for i in np.linspace(0, len(distinct) - 1, MAX_LEVELS)]


def _affordable(pricer: Pricer, n: float, shares: tuple[float, ...], budget: Budget) -> tuple[float, ...] | None:
    """Horizons that spend about the whole budget on one run of this size; None where a token has no price."""
    d = 1e6
    for _ in range(4):
        trial = pricer.offer(n, tuple(d * share for share in shares))
        price = trial.price.of(budget.unit) if trial else None
        if price is None:
            d *= 0.5 if d > 1e6 else 100
            continue
        if price <= budget.amount and price > 0.9 * budget.amount:
            break
        d *= min(1e4, max(1e-4, 0.95 * budget.amount / price))
    return tuple(d * share for share in shares)


def amount(value: float, budget: Budget) -> str:
    """3.2 h, 4.0e+16 FLOPs, 1.5 kWh."""
    if budget.unit == "FLOPs":
        return f"{value:.2g} FLOPs"
    if budget.unit == "hours":
        return f"{value * 60:.3g} min" if value < 1 else f"{value:.3g} h"
    return f"{value:.3g} kWh"


# ------------------------------------------------------------------------------------------------------------ options


@dataclass(frozen=True, kw_only=True)
class Option:
    """Something to do with the budget, and what is to be expected of it."""

    kind: Literal["one run", "several runs", "same sizes again", "one more seed of all"]
    runs: tuple[Offer, ...]
    price: Price
    within_budget: bool
    ci95: tuple[float, float] | None
    """Expected interval of the target; None where it would still not be pinned."""
    width_frac: float
    """Width of the interval (of the logarithm, where it is taken there) over what it is now."""
    gain_per_unit: float | None
    """log of the width lost, per hour, FLOP or kWh."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do next."""

    source: str
    law: str
    target: str
    target_words: str
    target_unit: str
    value: float
    ci95_now: tuple[float, float] | None
    """By the delta method, which the others are compared with."""
    ci95_resampled: tuple[float, float] | None
    """From the fit's own draws; None without any."""
    noise: NoiseParts
    budget: Budget
    basis: str
    options: tuple[Option, ...]
    """The most useful first."""
    verdict: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """Judges sets of runs by the target's standard error."""

    tangent: Tangent
    slope: Array
    budget: Budget

    def se(self, information: Information) -> float:
        return self.tangent.widening * information.standard_error(self.slope, self.tangent.noise)

    def price(self, offer: Offer) -> float:
        value = offer.price.of(self.budget.unit)
        assert value is not None
        return value


def greedy(bench: _Bench, choices: Sequence[tuple[Offer, Information]], *, per_cost: bool) -> list[int]:
    """Which of the choices to take, again and again the one that helps most (per cost), until the budget is spent."""
    left, have = bench.budget.amount * (1 + 1e-9), bench.tangent.so_far
    taken: list[int] = []
    while len(taken) < MAX_RUNS:
        now = bench.se(have)
        best, best_score = None, 0.0
        for index, (offer, adds) in enumerate(choices):
            price = bench.price(offer)
            if price > left:
                continue
            gain = math.log(now / max(bench.se(have + adds), 1e-300))
            score = gain / price if per_cost else gain
            if score > best_score and gain > 1e-4:
                best, best_score = index, score
        if best is None:
            break
        taken.append(best)
        have = have + choices[best][1]
        left -= bench.price(choices[best][0])
    return taken


def advise(
    report: FitReport,
    fit: ScalingFit,
    law: Law,
    drawn: Draws,
    *,
    target: Target,
    budget: Budget,
    pricer: Pricer,
) -> Advice:
    """The runs that shrink the target's interval most within a budget, beside more seeds of the runs there are.

    Raises:
        SpecError: no rows, no price in the budget's unit, a budget below the cheapest run, or a target that the fitted
            law's parameters do not move.
    """
    table = rows_of(report)
    tangent = tangent_of(table, law, report.objective)
    bench = _Bench(tangent=tangent, slope=tangent.slope(target), budget=budget)
    done = runs_done(table)
    found = offers(done, pricer, budget)
    choices = [(offer, tangent.of_run(offer.n_params, offer.horizons)) for offer in found]
    se_now = bench.se(tangent.so_far)
    if se_now <= 0:
        raise SpecError(
            f"{target.words}: by this fit of {law.name} it stays where it is whatever further runs would tell, so none "
            "can be recommended for it; fit more sizes and horizons first, or ask for another --target"
        )
    point = float(target.scaled(law, tangent.posed.natural(tangent.theta)))

    def option(kind: str, picked: Sequence[tuple[Offer, Information]]) -> Option:
        have = tangent.so_far
        for _offer, adds in picked:
            have = have + adds
        se, total = bench.se(have), _total([offer.price for offer, _adds in picked])
        spent = total.of(budget.unit)
        return Option(
            kind=kind,  # type: ignore[arg-type]
            runs=tuple(offer for offer, _adds in picked),
            price=total,
            within_budget=spent is not None and spent <= budget.amount * (1 + 1e-9),
            ci95=_interval(target, point, se),
            width_frac=se / se_now,
            gain_per_unit=math.log(se_now / se) / spent if spent else None,
        )

    several = [
        option("several runs", [choices[i] for i in greedy(bench, choices, per_cost=by)]) for by in (True, False)
    ]
    again = [c for c in choices if c[0].is_repeat]
    same = [option("same sizes again", [again[i] for i in greedy(bench, again, per_cost=by)]) for by in (True, False)]
    best = min(several, key=lambda o: o.width_frac)
    options = [best] if len(best.runs) > 1 else []
    singles = sorted((option("one run", [c]) for c in choices if not c[0].is_repeat), key=lambda o: o.width_frac)
    efficient = max(
        (o for o in singles if o.width_frac < 1 - HELPS), key=lambda o: o.gain_per_unit or 0.0, default=None
    )
    sizes: set[int] = set()
    for single in singles:  # the best of each size, then the three best sizes
        size = round(10 * math.log(single.runs[0].n_params))
        if size not in sizes and len(sizes) < N_SINGLES:
            sizes.add(size)
            options.append(single)
    if efficient is not None and efficient not in options:
        options.append(efficient)
    options.sort(key=lambda o: o.width_frac)
    if any(o.runs for o in same):
        options.append(min((o for o in same if o.runs), key=lambda o: o.width_frac))
    every = _one_more_of_all(tangent, pricer, done)
    if every:
        options.append(option("one more seed of all", every))
    resampled = target.of(law, drawn.values) if len(drawn.values) >= 100 else np.zeros(0)
    ci95_resampled = tuple(float(q) for q in np.quantile(resampled, (0.025, 0.975))) if len(resampled) else None
    ci95_now = _interval(target, point, se_now)
    return Advice(
        source=report.source,
        law=law.name,
        target=target.name,
        target_words=target.words,
        target_unit=target.unit,
        value=float(np.exp(point)) if target.in_log else point,
        ci95_now=ci95_now,
        ci95_resampled=ci95_resampled,  # type: ignore[arg-type]
        noise=tangent.noise,
        budget=budget,
        basis=pricer.basis,
        options=tuple(options),
        verdict=_verdict(options, target, budget),
        notes=tuple(
            _beyond(target, table) + _notes(fit, target, ci95_now, ci95_resampled)  # type: ignore[arg-type]
        ),
    )


def _one_more_of_all(tangent: Tangent, pricer: Pricer, done: Sequence[Done]) -> list[tuple[Offer, Information]]:
    """Another seed of every distinct run, whatever it costs; empty where one of them cannot be priced."""
    distinct = {(round(100 * math.log(r.n_params)), *(round(100 * math.log(h)) for h in r.horizons)): r for r in done}
    found = [pricer.offer(run.n_params, run.horizons) for run in distinct.values()]
    if any(offer is None for offer in found):
        return []
    return [(offer, tangent.of_run(offer.n_params, offer.horizons)) for offer in found if offer is not None]


def _total(prices: Sequence[Price]) -> Price:
    def total(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) if len(known) == len(values) else None

    return Price(
        flops=sum(p.flops for p in prices), hours=total([p.hours for p in prices]), kwh=total([p.kwh for p in prices])
    )


def _interval(target: Target, point: float, se: float) -> tuple[float, float] | None:
    half = NORMAL95 * se
    if not half < MAX_WIDTH:
        return None
    ends = point - half, point + half
    return (math.exp(ends[0]), math.exp(ends[1])) if target.in_log else ends


def _verdict(options: Sequence[Option], target: Target, budget: Budget) -> str:
    """Which option, what it buys, and whether more seeds would have done as well."""
    spend = amount(budget.amount, budget)
    allowed = [o for o in options if o.within_budget and o.runs]
    best = min(allowed, key=lambda o: o.width_frac, default=None)
    same = next((o for o in allowed if o.kind == "same sizes again"), None)
    if best is None or best.width_frac > 1 - HELPS:
        return (
            f"no run within {spend} narrows the interval of {target.words} by more than {100 * HELPS:.0f} %; raise the "
            "budget"
        )
    what = run_words(best.runs)
    head = (
        f"{what} {'brings' if len(best.runs) == 1 else 'bring'} the interval of {target.words} to {shown_width(best)}"
    )
    if best.kind == "same sizes again":
        return f"{head}: here more seeds of the sizes there are do best"
    if same is None:
        return f"{head}; {spend} does not buy another seed of any run there is"
    if 1 - same.width_frac < HELPS:
        return f"{head}; more of the same sizes does not help: for the same budget it stays at {shown_width(same)}"
    share = math.log(same.width_frac) / math.log(best.width_frac)
    if share < 0.8:
        little = "helps little" if share < 0.4 else "gets part of the way"
        return f"{head}; more of the same sizes {little}: for the same budget {shown_width(same)}"
    return f"{head}; more seeds of the same sizes are nearly as good: {shown_width(same)}"


def shown_width(option: Option) -> str:
    return f"{option.width_frac:.2f} of its width"


def run_words(runs: Sequence[Offer]) -> str:
    """2 x 51M on 1.02B, 1 x 124M on 2.5B tokens."""
    counts: dict[str, int] = {}
    for run in sorted(runs, key=lambda r: (r.n_params, r.horizons)):
        what = f"{short(run.n_params)} on {short(run.horizons[-1])}"
        counts[what] = counts.get(what, 0) + 1
    return listed([f"{k} x {what}" if k > 1 else what for what, k in counts.items()]) + " tokens"


def _beyond(target: Target, table: Table) -> list[str]:
    largest = float(table.columns["n_params"].max())
    if target.n_params is None or target.n_params < 2 * largest:
        return []
    return [
        f"{target.words} lies {brief(target.n_params / largest)} times beyond the largest size there is "
        f"({short(largest)}): all of this holds only as far as the law does"
    ]


def _notes(
    fit: ScalingFit, target: Target, now: tuple[float, float] | None, resampled: tuple[float, float] | None
) -> list[str]:
    said = []
    if fit.unpinned:
        names = listed([name for name in fit.unpinned if name in fit.parameters])
        said.append(
            f"the fit does not pin down {names or 'its exponents'}: its slopes hold near the optimum only, so expect "
            "wider intervals than these, and fit again after the first run"
        )
    if now is None:
        said.append(
            f"the rows there are do not determine {target.words}; only the order of the options means something"
        )
    if now is not None and resampled is not None:
        widths = [
            math.log(h / l) if target.in_log else h - l for l, h in (now, resampled) if l > 0 or not target.in_log
        ]
        if len(widths) == 2 and min(widths) > 0 and not 0.5 < widths[0] / widths[1] < 2:
            said.append(
                f"the fit's resamples give an interval {brief(widths[1] / widths[0])} times as wide as the delta "
                "method: few runs, or a law far from linear in its parameters; trust the ratios more than the ends"
            )
    return said
