"""The section "What the seed alone does": the spread of repeats, and which claimed differences are smaller than it."""

import math
from collections.abc import Sequence

from homelab_scaling import codec
from homelab_scaling.batch.bracket import SEED_SD_NATS, read_bracket
from homelab_scaling.errors import HomelabError
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.plan.seeds import seeds_words
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.repeats import SAME_ORDER_P, Effect, Repeats, Spread
from homelab_scaling.report.words import duration, in_brackets, ladder_file, main_fit, money, plural, sentence

TITLE = "What the seed alone does"
KINDS = {
    "rungs": "neighbouring sizes",
    "horizons": "neighbouring horizons",
    "rates": "better rates",
    "published": "published losses",
}
ADVISED_SEEDS = 3
MAX_NAMED = 6
"""Differences smaller than what seeds do that are named one by one."""


def seeds(view: LabView) -> list[Block]:
    """The section; nothing where nothing was measured yet."""
    if not view.rows:
        return []
    repeats = Repeats(view)
    spread = repeats.spread
    if spread is None:
        text = _one_seed(view, repeats) if not repeats.repeated else _nothing_differs(repeats)
        return [Heading(text=TITLE), Paragraph(text=text)]
    effects = _effects(view, repeats)
    blocks: list[Block] = [
        Heading(text=TITLE),
        Paragraph(text=_lead(repeats, spread, effects)),
        _spread_table(repeats, spread),
    ]
    if effects:
        blocks.append(_effect_table(_shown(effects), spread))
    said = [*_small(effects), *_unlike(repeats), *_residual(view, spread), *_exponent(view, repeats)]
    said += [*_common(repeats), *_clusters(view)]
    return [*blocks, Bullets(items=tuple(map(sentence, said)))] if said else blocks


# ------------------------------------------------------------------------------------------------------------- one seed


def _one_seed(view: LabView, repeats: Repeats) -> str:
    """What is not known, what it would likely be, and what it costs to know."""
    gaps = [abs(a.mean - b.mean) for a, b in (*repeats.rung_pairs, *repeats.horizon_pairs)]
    beside = f"; the smallest difference between neighbours in this report is {min(gaps):.3f}" if gaps else ""
    return (
        "Every rung was trained with one seed, so nothing here says what the seed alone does: it moves small models by "
        f"about {SEED_SD_NATS:g} nats (standard deviation; 0.006 to 0.013 on small GPT-2s){beside}. To measure it "
        f"here: `homelab run {ladder_file(view.name)} --seeds {ADVISED_SEEDS}`{_price(view)}."
    )


def _price(view: LabView) -> str:
    """What more seeds cost by the plan."""
    try:
        plan = codec.read_plain_json(view.path / "plan.json")
        n_seeds = len(plan.get("seeds") or [0])
        totals = {key: plan["totals"].get(key) for key in ("seconds", "kwh", "usd")}
        more = {k: (ADVISED_SEEDS - n_seeds) * float(v) / n_seeds for k, v in totals.items() if v is not None}
    except (HomelabError, KeyError, TypeError, ValueError, AttributeError):
        return ""  # collect says what is wrong with plan.json
    known = [
        *([f"about {duration(more['seconds'])} one run after the other"] if "seconds" in more else []),
        *([f"{more['kwh']:.3g} kWh"] if "kwh" in more else []),
        *([money(more["usd"])] if "usd" in more else []),
    ]
    return f", by the plan {listed(known)} more" if known and more.get("seconds", 1.0) > 0 else ""


def _nothing_differs(repeats: Repeats) -> str:
    n = len(repeats.repeated)
    return (
        f"{n} row{plural(n)} were measured with several seeds ({seeds_words(repeats.seeds)}), and their losses are "
        "equal to the last digit: these are copies of one run, not repeats."
    )


# -------------------------------------------------------------------------------------------------------------- spread


def _lead(repeats: Repeats, spread: Spread, effects: Sequence[Effect]) -> str:
    text = (
        f"Runs that differ in the seed alone (weights at the start, order of the text) end with losses that spread by "
        f"{spread.sd:.4f} nats (standard deviation, 95 % interval [{spread.ci95[0]:.4f}, {spread.ci95[1]:.4f}], "
        f"{spread.dof} degree{plural(spread.dof)} of freedom, {seeds_words(repeats.seeds)})."
    )
    if not effects:
        return text
    beyond = sum(effect.is_beyond for effect in effects)
    kinds = [words for kind, words in KINDS.items() if any(effect.kind == kind for effect in effects)]
    verdict = "all" if beyond == len(effects) else "none" if beyond == 0 else str(beyond)
    return (
        f"{text} Of the {len(effects)} difference{plural(len(effects))} that this report shows ({listed(kinds)}), "
        f"{verdict} {'is' if beyond == 1 else 'are'} larger than what seeds do."
    )


def _spread_table(repeats: Repeats, spread: Spread) -> Grid:
    rows = [
        (
            cell.rung,
            short(cell.n_tokens),
            str(len(cell.rows)),
            f"{cell.mean:.4f}",
            f"{min(cell.losses):.4f} to {max(cell.losses):.4f}",
            f"{cell.sd:.4f}",
            "",
            str(len(cell.rows) - 1),
        )
        for cell in repeats.repeated
    ]
    horizons = repeats.by_horizon()
    if len(horizons) > 1:
        for cells, one in horizons:
            tokens = sorted({cell.n_tokens for cell in cells})
            at = short(tokens[0]) if len(tokens) == 1 else f"{short(tokens[0])} to {short(tokens[-1])}"
            rows.append((f"{len(cells)} rungs", at, "", "", "", *_spread_cells(one)))
    if len(repeats.repeated) > 1:
        rows.append(("all", "", "", "", "", *_spread_cells(spread)))
    alone = [cell for cell in repeats.cells if len(cell.rows) == 1]
    once = f" {len(alone)} row{plural(len(alone))} with one seed alone {'is' if len(alone) == 1 else 'are'} left out."
    return Grid(
        head=("rung", "D", "seeds", "mean loss", "lowest to highest", "SD", "95 % interval", "dof"),
        rows=tuple(rows),
        left=frozenset({"rung"}),
        caption="Losses in nats per token. SD is the standard deviation between seeds, pooled over rungs in the lower "
        "lines, with its interval by chi-square; dof are its degrees of freedom. Rows of one run share its noise, so "
        f"the last line counts every run once.{once if alone else ''}",
    )


def _spread_cells(spread: Spread) -> tuple[str, str, str]:
    return f"{spread.sd:.4f}", f"[{spread.ci95[0]:.4f}, {spread.ci95[1]:.4f}]", str(spread.dof)


# -------------------------------------------------------------------------------------------------------------- effects


def _effects(view: LabView, repeats: Repeats) -> list[Effect]:
    """Everything that a report shows as a difference, measured in seeds."""
    figures = view.reference.figures if view.reference else ()
    losses = [(figure.rung, figure.value) for figure in figures if figure.of == "loss_nats" and figure.rung]
    published = [effect for rung, loss in losses if (effect := repeats.of_published(rung, loss)) is not None]
    return [*repeats.between_rungs, *repeats.between_horizons, *repeats.of_rates(_gains(view)), *published]


def _gains(view: LabView) -> list[tuple[str, float]]:
    """What the better rate gained on each tuned rung, at the longest horizon."""
    try:
        bracket = read_bracket(view.path)
    except HomelabError:
        return []  # the section on the learning rate says so
    if bracket is None or not bracket.effect.horizons:
        return []
    return list(zip(bracket.effect.rungs, bracket.effect.horizons[-1].gains_nats, strict=False))


def _shown(effects: Sequence[Effect]) -> list[Effect]:
    """Rungs at their last horizon, the least of the horizons of each rung, all of the rates."""
    last = {effect.name.split(" at ")[0]: effect for effect in effects if effect.kind == "rungs"}
    least: dict[str, Effect] = {}
    for effect in (e for e in effects if e.kind == "horizons"):
        rung = effect.name.split(":")[0]
        if rung not in least or effect.nats < least[rung].nats:
            least[rung] = effect
    return [*last.values(), *least.values(), *(e for e in effects if e.kind in ("rates", "published"))]


def _effect_table(effects: Sequence[Effect], spread: Spread) -> Grid:
    rows = tuple(
        (
            effect.name,
            f"{effect.nats:+.4f}",
            f"{effect.sds:+.1f}",
            f"± {effect.noise95:.4f}",
            "yes" if effect.is_beyond else "no",
        )
        for effect in effects
    )
    return Grid(
        head=("difference", "nats", "in SDs of the seed", "seeds alone", "beyond seeds"),
        rows=rows,
        left=frozenset({"difference", "beyond seeds"}),
        caption="What the larger model, the longer training or the better rate gains, by the means over seeds, and the "
        f"reach of other seeds 95 times in 100 (Student's t with {spread.dof} degrees of freedom; for two horizons of "
        "one run, whose noise they share, by the spread of the gain itself). Shown are rungs at the last horizon that "
        "they share, and of each rung the horizons that differ least.",
    )


def _small(effects: Sequence[Effect]) -> list[str]:
    small = [effect for effect in effects if not effect.is_beyond]
    if not small:
        return []
    named = [f"{e.name} ({e.nats:+.4f} nats, ± {e.noise95:.4f} by seeds)" for e in small[:MAX_NAMED]]
    rest = f" and {len(small) - MAX_NAMED} more" if len(small) > MAX_NAMED else ""
    return [f"smaller than what seeds do, so not to be claimed from these runs: {'; '.join(named)}{rest}"]


def _residual(view: LabView, spread: Spread) -> list[str]:
    """What the law leaves, beside what seeds leave."""
    joint = view.study.joint
    if joint is None or not joint.fit.sigma_log:
        return []
    mean = math.fsum(row.loss_nats for row in view.rows) / len(view.rows)
    left = joint.fit.sigma_log * mean
    text = f"residuals of {joint.law.title} are {left:.4f} nats, {left / spread.sd:.1f} SDs of the seed: "
    if left <= spread.ci95[1]:
        return [text + "what seeds alone would leave, so these runs cannot tell a better law from this one"]
    own = math.sqrt(left**2 - spread.sd**2)
    return [
        text + f"more than seeds leave; about {own:.4f} nats are the law's own misfit, which more seeds do not cure"
    ]


def _exponent(view: LabView, repeats: Repeats) -> list[str]:
    """The exponent of L(N) seed by seed, beside the interval of the fit."""
    if repeats.exponents is None:
        return []
    tokens, found = repeats.exponents
    values = list(found.values())
    mean = math.fsum(values) / len(values)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))
    each = listed([f"{x:.4f}" for x in values])
    fit = main_fit(view.fit, "power-n")
    exponent = fit.derived["exponent"] if fit is not None else None
    beside = ""
    if exponent is not None and exponent.value is not None and exponent.ci95 is not None:
        beside = f"; the fit over all runs says {brief(exponent.value)}{in_brackets(exponent)}"
    theirs = view.reference.value("exponent_n") if view.reference else None
    if theirs is not None and sd > 0:
        beside += f"; the published {theirs:g} is {abs(mean - theirs) / sd:.1f} such SDs from their mean"
    return [f"the exponent of L(N) at D = {short(tokens)} seed by seed is {each} (SD {sd:.4f}){beside}"]


def _unlike(repeats: Repeats) -> list[str]:
    """Whether one rung spreads more than chance lets it."""
    if repeats.unlike is None:
        return []
    rung, own, rest = repeats.unlike
    return [
        f"seeds move {rung} by {own.sd:.4f} nats and the other rungs by {rest.sd:.4f} (standard deviations), which is "
        "not chance: its rate may be too high, and the pooled number is that of neither"
    ]


def _common(repeats: Repeats) -> list[str]:
    """Whether a seed does the same to all rungs."""
    if repeats.common is None or repeats.common[1] >= SAME_ORDER_P:
        return []
    share, _ = repeats.common
    return [
        f"a seed gives every rung the same order of the text, and that shows: {100 * share:.0f} % of the seeds' "
        "variance is common to all rungs, so gaps between rungs of equal seeds are surer than the table says, and the "
        "level of all losses is less sure"
    ]


def _clusters(view: LabView) -> list[str]:
    """How the fit treats repeats."""
    if view.fit is None:
        return []
    n_sizes = len({row.n_params for row in view.rows})
    return [
        f"the fit counts every seed as a run of its own: its resamples are of {view.fit.n_runs} runs of {n_sizes} "
        "sizes, each run with all its horizons"
    ]
