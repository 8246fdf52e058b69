"""How many tokens a model far larger than those of the lab is worth, and how much that answer can be trusted.

Legend:  N parameters, D tokens, C FLOPs; D_opt the D for which N is the best size, with C = 6 N D
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from homelab_scaling.errors import HomelabError
from homelab_scaling.fit import allocate
from homelab_scaling.fit.advice import BestPartner, predict_budget, predict_partner
from homelab_scaling.fit.allocate import RULE_TOKENS_PER_PARAM, Terms
from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.joint import solve_joint
from homelab_scaling.fit.laws import CHINCHILLA, get_law
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.predict import Range, budgets_of, draws_of
from homelab_scaling.fit.predict_page import UNSURE_RATIO, flops
from homelab_scaling.fit.resample import FEW_RUNS
from homelab_scaling.fit.result import Draws, Estimate, HoldOut, ScalingFit
from homelab_scaling.fit.slices import levels
from homelab_scaling.fit.underdetermined import SEED_NOISE_LOG
from homelab_scaling.fit.words import listed, number, short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Facts, Grid, Paragraph
from homelab_scaling.report.isoflop_plots import passing_laws
from homelab_scaling.report.words import COUNTS, plural

TARGET_PARAMS = 1e9
FEW_POINTS = 2 * len(CHINCHILLA.free)
NO_LIMIT = 1e18
"""Tokens beyond which a range is called open."""
PUBLISHED = {
    "hoffmann-2022": "Hoffmann et al.'s own law",
    "hoffmann-2022-rounded": "the same with its constants as the text rounds them",
    "besiroglu-2024": "Besiroglu et al.'s refit of the same runs",
}
TINY = 1e-4
"""Nats that nobody could measure."""
NO_RIVAL = 0.05
"""A law that misses held-out losses by more than this share does not count where laws disagree."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """D_opt of `TARGET_PARAMS` by one law of the lab's fit."""

    fit: ScalingFit
    draws: Draws
    best: BestPartner

    @property
    def is_pinned(self) -> bool:
        """Whether its interval says anything."""
        ends = self.best.n_tokens.ci95
        return ends is None or ends[1] <= UNSURE_RATIO * ends[0]


def target_by(view: LabView, law: str) -> Target | None:
    """D_opt by one law; None where it was not fitted."""
    fit = view.fit.get(law) if view.fit else None
    if view.fit is None or fit is None or not fit.is_fitted:
        return None
    try:
        draws = draws_of(view.fit, fit)
        best = predict_partner(fit, draws, n_params=TARGET_PARAMS, budgets=budgets_of(view.fit, fit))
    except HomelabError:  # the draws file is gone
        return None
    return Target(fit=fit, draws=draws, best=best)


def targets(view: LabView) -> list[Target]:
    """D_opt by every fitted law of N and D, the five-parameter law first."""
    laws = [fit.law for fit in view.fit.main if get_law(fit.law).axes == CHINCHILLA.axes] if view.fit else []
    return [one for law in laws if (one := target_by(view, law)) is not None]


def target_blocks(view: LabView) -> list[Block]:
    """D_opt and D/N with their intervals, held against 20 tokens per parameter, and what may be wrong with them."""
    main = target_by(view, CHINCHILLA.name)
    found = targets(view)
    said = [_answer(view, main), _against_the_rule(view, main), _risk(view, main, found)]
    blocks: list[Block] = [_facts(view, main), Paragraph(text=said[0])]
    if found:
        blocks.append(_laws(view, found))
    return [*blocks, *(Paragraph(text=text) for text in said[1:])]


# ---------------------------------------------------------------------------------------------------------- the answer


def _facts(view: LabView, main: Target | None) -> Facts:
    size = short(TARGET_PARAMS)
    if main is None:
        why = "too few points for five parameters" if view.rows else "nothing has been measured"
        return Facts(items=(("unknown", f"D_opt for N = {size}: {why}"), ("unknown", "D/N, tokens per parameter")))
    d, ratio = main.best.n_tokens, main.best.tokens_per_param
    return Facts(
        items=(
            (_shown(main, d), f"D_opt for N = {size}, tokens; 95 % interval {_ends(d.ci95)}"),
            (_shown(main, ratio), f"D/N, tokens per parameter; 95 % interval {_ends(ratio.ci95, ratio_text)}"),
        )
    )


def _shown(main: Target, e: Estimate) -> str:
    return tokens(e.value or 0.0) if main.is_pinned else "not pinned down"


def _answer(view: LabView, main: Target | None) -> str:
    size = short(TARGET_PARAMS)
    if main is None:
        return f"No D_opt for N = {size} follows from this lab: {why_no_law(view)}.{_range_of_laws(view)}"
    best, ratio = main.best, main.best.tokens_per_param
    assert best.n_tokens.value is not None and ratio.value is not None and best.flops.value is not None
    counted = COUNTS.get(view.fit.count, view.fit.count) if view.fit else ""
    text = (
        f"By L = E + A N^-alpha + B D^-beta fitted to the {main.fit.n_points} rows of this lab, a model of {size} "
        f"parameters is compute-optimal at D_opt = {tokens(best.n_tokens.value)} tokens (95 % interval "
        f"{_ends(best.n_tokens.ci95)}), which is D/N = {tokens(ratio.value)} tokens per parameter (95 % interval "
        f"{_ends(ratio.ci95, ratio_text)}) and C = 6 N D = {flops(best.flops.value)} FLOPs; N counts {counted}."
    )
    if not main.is_pinned:
        text += (
            f" An interval wider than a factor of {UNSURE_RATIO:.0f} is no prediction: these rows do not pin D_opt "
            "down, and the value is only where the fit happened to end."
        )
    elif best.n_tokens.ci95 is not None and main.fit.n_points < FEW_POINTS:
        text += (
            f" With {main.fit.n_points} points of {main.fit.n_runs} runs for {len(CHINCHILLA.free)} parameters hardly "
            "anything is left over to measure the noise by: do not rely on the width of this interval."
        )
    if best.n_tokens.ci95 is None:
        text += " There is no interval because the fit was made without resamples; run `homelab fit` with --bootstrap."
    if view.fit is not None and view.fit.compute == "c_min":
        text += " Tokens are those of a batch far below critical, as the fit was asked to count them."
    return text


def why_no_law(view: LabView) -> str:
    """Why there is no fitted five-parameter law, in a clause."""
    if not view.rows:
        return "no run has finished a row yet"
    if view.fit is None:
        few = len(view.rows) < 2
        return "one row is no law" if few else "there is no fit; run `homelab fit` on the lab, then `homelab report`"
    fit = view.fit.get(CHINCHILLA.name)
    if fit is None:
        return "the fit holds no L(N, D); run `homelab fit` on the lab without --law, then `homelab report`"
    if fit.is_fitted:
        return "the draws of the fit are gone; run `homelab fit` on the lab again"
    return fit.status.removeprefix("not fitted: ")


def range_of_laws(view: LabView) -> tuple[Range, Range, int] | None:
    """D_opt and D/N over every law that passes through rows too few to fit one, and how many such laws were tried."""
    through = passing_laws(view)
    if through is None:
        return None
    d = allocate.tokens_for(Terms.of(CHINCHILLA, through.values), TARGET_PARAMS)
    low, high = float(d.min()), float(d.max())
    return (low, high), (low / TARGET_PARAMS, high / TARGET_PARAMS), len(d)


def _range_of_laws(view: LabView) -> str:
    found = range_of_laws(view)
    if found is None:
        return ""
    d, ratio, n_laws = found
    return (
        f" Of {n_laws:,} laws that pass within {100 * SEED_NOISE_LOG:g} % of every point (assumed seed noise) "
        f"the lowest D_opt is {tokens(d[0])} tokens and the highest {tokens(d[1])} (D/N {_span(ratio)}): that is the "
        f"range the points leave open, not an interval, and nothing in them prefers one end of it.{_profile(view)}"
    )


def _profile(view: LabView) -> str:
    """Which exponents the points do not rule out."""
    found = view.study.left_open
    if found is None:
        return ""
    said = []
    for name, grid in found.exponents.items():
        kept = grid[found.miss_frac[name] <= SEED_NOISE_LOG]
        if len(kept):
            said.append(f"{name} from {kept.min():.2g} to {kept.max():.2g}")
    return (
        f" The profile of the law says the same: {listed(said)} all fit, everything else at its best." if said else ""
    )


# ------------------------------------------------------------------------------------------------ tokens per parameter


def _against_the_rule(view: LabView, main: Target | None) -> str:
    rule, size = RULE_TOKENS_PER_PARAM, short(TARGET_PARAMS)
    others = listed([f"{_published_ratio(name):.0f} by {words}" for name, words in PUBLISHED.items()])
    published = f"Published laws disagree as well: at N = {size} it is {others}."
    start = f"Against {rule:g} tokens per parameter: "
    if main is None:
        found = range_of_laws(view)
        inside = found is not None and found[1][0] <= rule <= found[1][1]
        why = f"laws on either side of it pass through the points (D/N {_span(found[1])})" if inside and found else ""
        return (
            f"{start}these runs neither support the rule nor speak against it{': ' + why if why else ''}. {published}"
        )
    assert view.fit is not None
    ratio, fit = main.best.tokens_per_param, main.fit
    assert ratio.value is not None and main.best.flops.value is not None
    text = start + _beside(rule, ratio, is_pinned=main.is_pinned)
    cost = predict_budget(fit, main.draws, main.best.flops.value).rule.above_best_nats
    text += (
        f" At the compute of that optimum, {rule:g} tokens per parameter instead would cost {_nats(cost)} by this law."
    )
    text += _drift(main)
    return f"{text} {published} Their text and tokenizer are not these."


def _beside(rule: float, ratio: Estimate, *, is_pinned: bool = True) -> str:
    if ratio.ci95 is None:
        side = "more" if (ratio.value or 0.0) > rule else "fewer"
        return f"the law asks for {side}, {tokens(ratio.value or 0.0)}, without an interval to judge the difference by."
    low, high = ratio.ci95
    if not is_pinned:
        return f"an interval of D/N as wide as {_span(ratio.ci95)} neither supports the rule nor speaks against it."
    if low <= rule <= high:
        return f"the interval of D/N, {_span(ratio.ci95)}, holds it, so these runs do not speak against the rule."
    side = "more" if low > rule else "fewer"
    return (
        f"it lies outside the interval of D/N, {_span(ratio.ci95)}: taken this far, these runs ask for {side} tokens."
    )


def _drift(main: Target) -> str:
    """D/N where it was measured, and which way it goes with size: D_opt grows as N^(alpha/beta)."""
    largest = main.fit.ranges["n_params"][1]
    law = get_law(main.fit.law)
    here = float(allocate.tokens_for(Terms.of(law, main.draws.point), largest)) / largest
    power = main.fit.derived["b"].value, main.fit.derived["a"].value
    if power[0] is None or power[1] is None:
        return f" At {short(largest)} parameters, the largest size here, the law's own ratio is {tokens(here)}."
    way = "rises" if power[0] > power[1] else "falls"
    return (
        f" The law knows no fixed ratio: at {short(largest)} parameters, the largest size here, it is {tokens(here)}, "
        f"and it {way} with size as N^{number(power[0] / power[1] - 1)}."
    )


def _published_ratio(name: str) -> float:
    one = CATALOGUE[name]
    law = get_law(one.law)
    values = np.array([one.values[n] for n in law.names])
    return float(allocate.tokens_for(Terms.of(law, values), TARGET_PARAMS)) / TARGET_PARAMS


# ---------------------------------------------------------------------------------------------------- how far to trust


def _risk(view: LabView, main: Target | None, found: list[Target]) -> str:
    text = "Extrapolation risk: " + _how_far(view, main)
    text += _held_out(view, main) if view.fit is not None else ""
    if main is not None:
        text += _without_largest(view, main) + _choice_of_law(view, main, found)
        text += (
            " The interval carries the noise of these runs through this law; it does not know whether the law goes on "
            "out there, nor other text, another tokenizer or a learning rate that no longer suits."
        )
    return text


def _how_far(view: LabView, main: Target | None) -> str:
    size = short(TARGET_PARAMS)
    if not view.rows:
        return f"N = {size} cannot be compared with anything, because nothing has been measured."
    table = view.study.table
    sizes = table.columns["n_params"] if table is not None else np.array([float(r.n_params) for r in view.rows])
    far = [f"N = {size} is {_beyond(TARGET_PARAMS, float(sizes.max()))} the largest size here ({short(sizes.max())})"]
    if main is not None and view.fit is not None:
        d, c = main.best.n_tokens.value or 0.0, main.best.flops.value or 0.0
        far.append(f"D_opt is {_beyond(d, main.fit.ranges['n_tokens'][1])} the longest run")
        far.append(f"C is {_beyond(c, budgets_of(view.fit, main.fit)[1])} the largest budget")
    return f"{listed(far)}."


def _beyond(value: float, known: float) -> str:
    decades = math.log10(value / known)
    return f"{decades:.1f} decades beyond" if decades >= 0.05 else "not beyond"


def _held_out(view: LabView, main: Target | None) -> str:
    """What the hold-out says, and that it did not test a step this long."""
    evidence, table = view.fit.evidence if view.fit else None, view.study.table
    if evidence is None or table is None:
        return " Nothing was held out: there is no fitted law of N and D to hold anything against."
    law = main.fit.law if main is not None else evidence.chosen_law
    along = [one for one in evidence.holdouts if one.along == "n_params"]
    held = next((one for one in along if one.law == law and one.windows), None)
    if held is None or held.rms_frac is None:
        reasons = [one.why_not for one in along if one.why_not and law in (one.law, None)]
        return f" Nothing could be held out: {reasons[0] if reasons else 'there are too few sizes'}."
    largest = float(table.columns["n_params"].max())
    step = math.log10(largest / min(window.largest for window in held.windows))
    wanted = math.log10(TARGET_PARAMS / largest)
    text = (
        f" Held out: fitted to the smaller sizes alone, {get_law(held.law).title} predicts the larger ones to "
        f"{100 * held.rms_frac:.2f} % of the loss (root mean square over {len(held.windows)} "
        f"window{plural(len(held.windows))}; on average {_bias(held)}), over steps of up to {step:.1f} decades in N."
    )
    return text + (f" No hold-out here tests a step of {wanted:.1f} decades." if wanted > step else "")


def _bias(held: HoldOut) -> str:
    mean = float(np.mean([window.bias_frac for window in held.windows]))
    return f"{100 * abs(mean):.2f} % too {'high' if mean > 0 else 'low'}"


def _without_largest(view: LabView, main: Target) -> str:
    """The same law without the largest size: an answer that moves far hangs on one run."""
    table, report = view.study.table, view.fit
    if table is None or report is None:
        return ""
    rest = np.concatenate([*levels(table.columns["n_params"])[:-1], np.zeros(0, dtype=np.int64)]).astype(np.int64)
    smaller = replace(
        table,
        points=tuple(table.points[i] for i in rest),
        columns={axis: column[rest] for axis, column in table.columns.items()},
        losses=table.losses[rest],
        run_ids=[table.run_ids[i] for i in rest],
    )
    name = parse_objective(report.objective)
    if name.kind == "adaptive" and len(set(smaller.run_ids)) < FEW_RUNS:
        name = parse_objective("l2-log")
    joint = solve_joint(CHINCHILLA, smaller, name) if len(rest) else None
    if joint is None:
        return " Without its largest size the lab could not carry this law at all."
    d = float(allocate.tokens_for(Terms.of(CHINCHILLA, joint.values), TARGET_PARAMS))
    factor = max(d / (main.best.n_tokens.value or d), (main.best.n_tokens.value or d) / d)
    return f" Without the largest size the same law says D_opt = {tokens(d)}, a factor of {number(factor)} away."


def _choice_of_law(view: LabView, main: Target, found: list[Target]) -> str:
    errors = _held_out_errors(view)
    rivals = [one for one in found if one.fit.law != main.fit.law and (errors.get(one.fit.law) or 0.0) <= NO_RIVAL]
    values = [one.best.n_tokens.value or 0.0 for one in (main, *rivals)]
    if len(values) < 2:
        return ""
    return (
        f" The {len(values)} laws of these rows that hold-out does not discard put D_opt from {tokens(min(values))} to "
        f"{tokens(max(values))}, a factor of {number(max(values) / min(values))} that no interval holds."
    )


def _held_out_errors(view: LabView) -> dict[str, float | None]:
    """Law -> its root mean square error on larger sizes than it was fitted to."""
    evidence = view.fit.evidence if view.fit else None
    return {one.law: one.rms_frac for one in evidence.holdouts if one.along == "n_params"} if evidence else {}


def _laws(view: LabView, found: list[Target]) -> Grid:
    evidence = view.fit.evidence if view.fit else None
    errors = _held_out_errors(view)
    chosen = evidence.chosen_law if evidence else None
    rows = []
    for one in found:
        d, ratio, error = one.best.n_tokens, one.best.tokens_per_param, errors.get(one.fit.law)
        title = get_law(one.fit.law).title + (" (chosen by hold-out)" if one.fit.law == chosen else "")
        known = "–" if error is None else f"{100 * error:.2f} %"
        cells = (
            tokens(d.value or 0.0),
            _ends(d.ci95),
            tokens(ratio.value or 0.0),
            _ends(ratio.ci95, ratio_text),
            known,
        )
        rows.append((title, *cells))
    return Grid(
        head=("law", "D_opt", "95 %", "D/N", "95 % ", "held out in N"),
        rows=tuple(rows),
        left=frozenset({"law"}),
        caption=f"Tokens for which {short(TARGET_PARAMS)} parameters are the best size, by every law fitted to these "
        "rows, with the error of each on larger sizes than it was fitted to.",
    )


# --------------------------------------------------------------------------------------------------------------- words


def tokens(value: float) -> str:
    """22.6B, 0.61, 3e+16; beyond 1e18 no number means anything."""
    if value > NO_LIMIT:
        return f"beyond {NO_LIMIT:.0e}".replace("e+", "e")
    return short(value) if 1e-3 < value < 1e15 else f"{value:.0e}"


def _ends(ends: Range | None, form: Callable[[float], str] | None = None) -> str:
    shown = form or tokens
    return "none" if ends is None else f"[{shown(ends[0])}, {shown(ends[1])}]"


def _span(ends: Range) -> str:
    return f"{ratio_text(ends[0])} to {ratio_text(ends[1])}"


def ratio_text(value: float) -> str:
    """Tokens per parameter, open where `tokens` is."""
    limit = NO_LIMIT / TARGET_PARAMS
    return f"beyond {limit:.0e}".replace("e+0", "e") if value > limit else tokens(value)


def _nats(e: Estimate) -> str:
    value = e.value or 0.0
    shown = f"less than {TINY:g}" if value < TINY else f"{value:.4f}"
    return f"{shown} nats" + (f" (95 %: up to {max(TINY, e.ci95[1]):.4f})" if e.ci95 is not None else "")
