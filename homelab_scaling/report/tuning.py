"""The section on the learning rate: what was tried on the smallest rungs, what was taken, what that did to the law."""

import math
from collections.abc import Sequence
from dataclasses import replace

from homelab_scaling.batch.bracket import PUBLISHED_MOVE, SEED_SD_NATS, Bracket, BracketRung, read_bracket
from homelab_scaling.errors import HomelabError
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.result import FitReport
from homelab_scaling.fit.words import short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.words import main_fit, sentence
from homelab_scaling.runs import LossPoint, to_point

LAWS = (
    ("power-n", "exponent", "L(N) ~ N^-x"),
    ("chinchilla", "a", "N_opt ~ C^x"),
    ("chinchilla-tied", "a", "N_opt ~ C^x"),
)
"""Law, what follows from it, and how it is said; the first law of N and D that both fits have is taken."""


def tuning(view: LabView) -> list[Block]:
    """Tables of the tuned rungs; nothing where no rate was tuned."""
    try:
        bracket = read_bracket(view.path)
    except HomelabError as error:
        return [Heading(text="Learning rate"), Paragraph(text=sentence(f"The tuned rates cannot be read: {error}"))]
    if bracket is None or not bracket.rungs:
        return []
    blocks: list[Block] = [Heading(text="Learning rate"), Paragraph(text=sentence(bracket.rates.words))]
    blocks.append(_tried(bracket.rungs))
    blocks.append(Paragraph(text=sentence(bracket.effect.words)))
    if bracket.effect.horizons:
        blocks.append(_exponents(bracket))
    said = [f"{rung.name}: {rung.best.note}" for rung in bracket.rungs if rung.best.note]
    said += [
        f"{name} had begun before the rates were tuned and kept {lr:.2e}" for name, lr in bracket.rates.kept.items()
    ]
    said += _whole_law(view, bracket)
    return [*blocks, Bullets(items=tuple(map(sentence, said)))] if said else blocks


def _tried(rungs: Sequence[BracketRung]) -> Grid:
    factors = sorted({trial.factor for rung in rungs for trial in rung.trials})
    rows = []
    for rung in rungs:
        losses = {trial.factor: trial for trial in rung.trials}
        cells = [_loss(losses[f].final) if f in losses else "" for f in factors]
        sd = "" if rung.best.sd_log is None else f" (×/÷ {math.exp(rung.best.sd_log):.2f})"
        rows.append((rung.name, *cells, f"{rung.winner.lr_peak:.2e}", f"× {rung.best.vertex:.2f}{sd}"))
    return Grid(
        head=("rung", *(f"× {f:g}" for f in factors), "taken", "best"),
        rows=tuple(rows),
        left=frozenset({"rung"}),
        caption=(
            "Loss at the longest horizon by multiples of the rule's rate (first seed); taken is that of the lowest. "
            f"Best is the vertex of a parabola in log rate, its error by the {SEED_SD_NATS:g} nats that seeds do."
        ),
    )


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.3f}"


def _exponents(bracket: Bracket) -> Grid:
    names = bracket.effect.rungs
    rows = tuple(
        (
            " / ".join(dict.fromkeys(short(tokens) for tokens in horizon.horizons_tokens)),
            f"{horizon.exponent_rule:.3f}",
            f"{horizon.exponent_best:.3f}",
            f"± {horizon.sd:.3f}",
            *(f"{gain:.3f}" for gain in horizon.gains_nats),
        )
        for horizon in bracket.effect.horizons
    )
    return Grid(
        head=("D", "x at the rule's rate", "x tuned", "by seeds", *(f"gain of {name}" for name in names)),
        rows=rows,
        left=frozenset(),
        caption=f"L ~ N^-x over the tuned rungs, and nats gained by the better rate. Elsewhere, {PUBLISHED_MOVE}.",
    )


def _whole_law(view: LabView, bracket: Bracket) -> list[str]:
    """The exponents of the whole ladder as it is, and with the tuned rungs put back to the rule's rate."""
    plain = [back for row in view.rows if (back := _at_rule(to_point(row), bracket)) is not None]
    if not bracket.effect.horizons or len(plain) < len(view.rows):
        return []
    tuned, untuned = _fitted([to_point(row) for row in view.rows]), _fitted(plain)
    said, seen = [], set[str]()
    for law, key, words in LAWS:
        before, after = _exponent(untuned, law, key), _exponent(tuned, law, key)
        if before is not None and after is not None and words not in seen:
            seen.add(words)
            names = " and ".join(bracket.effect.rungs)
            said.append(
                f"over the whole ladder {words} has x = {after:.3f} ({law}); with {names} put back to the rule's rate "
                f"it would be {before:.3f} (larger rungs at the rates they were trained with)"
            )
    return said


def _at_rule(point: LossPoint, bracket: Bracket) -> LossPoint | None:
    """The point with its loss at the rule's rate; itself where its rung was not tuned, None where that is unknown."""
    rung = next((r for r in bracket.rungs if point.run_id in r.winner.run_ids), None)
    if rung is None:
        return point
    rule = rung.trial(1.0)
    losses = dict(zip(rung.horizons_tokens, rule.losses, strict=True)) if rule else {}
    loss = losses.get(round(point.n_tokens))
    return None if loss is None else replace(point, loss_nats=loss)


def _fitted(points: Sequence[LossPoint]) -> FitReport | None:
    try:
        return fit_points(points, laws=[law for law, _, _ in LAWS], n_bootstrap=0)
    except HomelabError:
        return None


def _exponent(report: FitReport | None, law: str, key: str) -> float | None:
    fit = main_fit(report, law)
    return fit.derived[key].value if fit is not None and key in fit.derived else None
