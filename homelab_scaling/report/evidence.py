"""The evidence beside the laws: other roads to the same numbers, the hold-out, counts of N, intervals side by side."""

import re

from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.result import Approach, CrossCheck, Evidence, FitReport, HoldOut
from homelab_scaling.fit.words import listed, number, short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.words import COUNTS, interval_text, sentence, value_text

APPROACHES = {
    "1": "1: envelope of the curves",
    "2": "2: isoFLOP parabolas",
    "3-free": "3: L(N, D)",
    "3-tied": "3 with alpha = beta",
}


def evidence(view: LabView) -> list[Block]:
    """What supports the laws and what speaks against them."""
    if view.fit is None:
        return []
    blocks: list[Block] = []
    if (unknown := _nothing_known(view.fit)) is not None:
        blocks.append(Paragraph(text=unknown))
    if view.fit.evidence is not None:
        blocks += _approaches(view.fit.evidence)
        blocks += _holdouts(view.fit.evidence)
        blocks += _notes(view.fit.evidence)
        blocks += _counts(view.fit.evidence)
    blocks += _reconciliation(view)
    blocks += _intervals(view, view.fit)
    return [Heading(text="Evidence"), *blocks] if blocks else []


def _nothing_known(report: FitReport) -> str | None:
    """The sentence for too few points: everything fits, so no interval is narrower than all there is."""
    joint = report.get("chinchilla")
    if joint is None or joint.is_fitted:
        return None
    why = joint.status.removeprefix("not fitted: ")
    return (
        f"These {report.n_points} points do not carry a law of size and data together: {why}. Every exponent a from 0 "
        "to 1 is compatible with them, so nothing is claimed about how a growing budget should be split."
    )


def _approaches(found: Evidence) -> list[Block]:
    rows = tuple(_approach(one) for one in found.approaches)
    blocks: list[Block] = [
        Grid(
            head=("approach", "a", "95 % interval", "best N", "95 %", "notes"),
            rows=rows,
            left=frozenset({"approach", "notes"}),
            caption=f"Four roads to the same exponent, N_opt ∝ C^a; best N at C = {found.budget_flops:.2e} FLOPs. "
            "Intervals are from the same resamples, so that differences between the roads are not noise.",
        )
    ]
    told = [_difference(d.first, d.second, d.a_difference.value, d.p_value) for d in found.disagreements]
    items = tuple(text for text in told if text)
    return [*blocks, Bullets(items=items)] if items else blocks


def _notes(found: Evidence) -> list[Block]:
    """What the comparison assumed, with laws by their titles."""
    titles = {one.law: get_law(one.law).title for one in found.holdouts}
    said = []
    for note in found.notes:
        text = note
        for name in sorted(titles, key=len, reverse=True):
            text = re.sub(rf"(?<![\w:-]){re.escape(name)}(?![\w:-])", titles[name], text)
        said.append(sentence(text))
    return [Bullets(items=tuple(said))] if said else []


def _approach(one: Approach) -> tuple[str, ...]:
    notes = "; ".join([*([one.why_not] if one.why_not else []), *one.notes]) or "–"
    size = "–" if one.n_opt.value is None else short(one.n_opt.value)
    reach = "–" if one.n_opt.ci95 is None else f"[{_size(one.n_opt.ci95[0])}, {_size(one.n_opt.ci95[1])}]"
    a = "–" if one.why_not else value_text(one.a)
    return (APPROACHES[one.name], a, interval_text(one.a), size, reach, notes)


def _size(value: float) -> str:
    return short(value) if 1e-3 < value < 1e15 else f"{value:.0e}"


def _difference(first: str, second: str, difference: float | None, p_value: float | None) -> str | None:
    """A pair that the resamples tell apart."""
    if p_value is None or p_value >= 0.05 or difference is None:
        return None
    return None if "3-tied" in (first, second) else f"Approaches {first} and {second} differ in a by {difference:+.3f}."


def _holdouts(found: Evidence) -> list[Block]:
    judged = [one for one in found.holdouts if one.windows]
    if not judged:
        reasons = dict.fromkeys(one.why_not for one in found.holdouts if one.why_not)
        return [Paragraph(text=f"Nothing could be held out: {'; '.join(reasons)}.")] if reasons else []
    laws = list(dict.fromkeys(one.law for one in found.holdouts))
    by = {(one.law, one.along): one for one in found.holdouts}
    rows = []
    for name in laws:
        n, c = by.get((name, "n_params")), by.get((name, "flops"))
        chosen = "chosen" if name == found.chosen_law else ""
        rows.append((get_law(name).title, _error(n), _bias(n), _error(c), _bias(c), chosen))
    windows = {along: len(by[laws[0], along].windows) for along in ("n_params", "flops") if (laws[0], along) in by}
    counted = listed([f"{k} in {'N' if along == 'n_params' else 'C'}" for along, k in windows.items() if k])
    return [
        Grid(
            head=("law", "error in N", "bias in N", "error in C", "bias in C", "choice"),
            rows=tuple(rows),
            left=frozenset({"law", "choice"}),
            caption="Hold-out: each law is fitted to the smaller runs and judged on all larger ones, in windows that "
            f"expand{f' ({counted})' if counted else ''}. Error is root mean square of predicted over measured loss, "
            "bias its mean at the widest window; above 0 the law was too gloomy.",
        )
    ]


def _error(one: HoldOut | None) -> str:
    return "–" if one is None or one.rms_frac is None else f"{100 * one.rms_frac:.2f} %"


def _bias(one: HoldOut | None) -> str:
    return "–" if one is None or not one.windows else f"{100 * one.windows[-1].bias_frac:+.2f} %"


def _counts(found: Evidence) -> list[Block]:
    rows = tuple(
        (
            COUNTS.get(row.count, row.count),
            "–" if row.a.value is None and row.a.ci95 is None else value_text(row.a),
            interval_text(row.a),
            "–" if row.alpha.value is None and row.alpha.ci95 is None else value_text(row.alpha),
            interval_text(row.alpha),
            row.why_not or "",
        )
        for row in found.counts
    )
    if not rows:
        return []
    told = any(row[-1] for row in rows)
    head = ("N counts", "a", "95 % interval", "alpha of L(N)", "95 %", "note")
    return [
        Grid(
            head=head if told else head[:-1],
            rows=rows if told else tuple(row[:-1] for row in rows),
            left=frozenset({"N counts", "note"}),
            caption="The same rows under three counts of N, each with C = 6 N D of its own count. Exponents of studies "
            "that count differently do not compare. Intervals come from the resamples that the approaches share.",
        )
    ]


def _reconciliation(view: LabView) -> list[Block]:
    found = view.study.reconciliation
    if found is None:
        return []
    rows = []
    for step in found.steps:
        points = f"{step.n_points}" + (f", {step.n_unfinished} before decay" if step.n_unfinished else "")
        value = "–" if step.a.value is None and step.a.ci95 is None else value_text(step.a)
        rows.append((step.name, points, value, interval_text(step.a), step.why_not or ""))
    return [
        Paragraph(text=found.summary),
        Grid(
            head=("step", "points", "a", "95 % interval", "note"),
            rows=tuple(rows),
            left=frozenset({"step", "note"}),
            caption="From Kaplan's way to Chinchilla's on these points, one change at a time. Each step is its own fit "
            "with C = 6 N D of its count; the first three fit L = A N^-alpha + B D^-beta, the last one adds E. Points "
            "before decay are the trunks' validation losses where a finished row lies.",
        ),
    ]


def _intervals(view: LabView, report: FitReport) -> list[Block]:
    """Bootstrap, profile and delta-method intervals of the laws that the report speaks of."""
    rows = []
    joint = view.study.joint
    kept = {"power-n", "chinchilla", *([joint.fit.law] if joint else [])}
    for fit in (fit for fit in report.main if fit.law in kept):
        for index, (name, check) in enumerate(fit.cross_checks.items()):
            law = get_law(fit.law).title if index == 0 else ""
            rows.append((law, name, *_roads(check), "differ" if check.disagreement else ""))
    if not rows:
        return []
    return [
        Grid(
            head=("law", "quantity", "bootstrap", "profile", "delta method", "agreement"),
            rows=tuple((*row[:-1], row[-1] or "agree") for row in rows),
            left=frozenset({"law", "quantity", "agreement"}),
            caption="95 % intervals by three methods. They differ where widths are more than a factor of two apart or "
            "the profile never closes (0 or ∞): few runs, outliers or a ridge; believe the widest. The other laws' are "
            "in fit/fit.json.",
        )
    ]


def _roads(check: CrossCheck) -> tuple[str, str, str]:
    shown = []
    for ends in (check.bootstrap95, check.profile95, check.delta95):
        if ends is None:
            shown.append("–")
            continue
        low, high = ends
        left = "0" if low is None else number(low)  # none of these quantities can be negative
        shown.append(f"[{left}, {'∞' if high is None else number(high)}]")
    return shown[0], shown[1], shown[2]


def live(view: LabView) -> list[Block]:
    """Runs that have not finished, and whether they are on the law."""
    checks = view.study.checks
    if not checks:
        return []
    rungs = {run.run_id: run for run in view.runs}
    rows = tuple(
        (
            rungs[check.run_id].rung,
            rungs[check.run_id].status,
            check.verdict,
            "–" if check.since_tokens is None else short(check.since_tokens),
            "–" if check.z is None else f"{check.z:+.1f}",
            sentence(check.sentence),
        )
        for check in checks
    )
    notes = dict.fromkeys(note for check in checks for note in check.notes)
    text = f" {sentence('; '.join(notes))}" if notes else ""
    return [
        Grid(
            head=("rung", "status", "verdict", "since", "z", "in words"),
            rows=rows,
            left=frozenset({"rung", "status", "verdict", "in words"}),
            caption="Unfinished runs against the law of the finished ones, at the last validation. Before its decay a "
            "run lies above that law; how far is read off the finished runs' own trunks at the same tokens. "
            f"`homelab report LAB --check` says the same at any time.{text}",
        )
    ]


def card(view: LabView) -> list[Block]:
    """The fit card as a table."""
    found = view.study.card
    if found is None:
        return []
    rows, part = [], ""
    for item in found.items:
        answer = item.answer if item.answer is not None else f"unknown: {item.why_unknown}"
        rows.append(("" if item.part == part else item.part, item.question, answer))
        part = item.part
    return [
        Heading(text="Fit card"),
        Grid(
            head=("part", "question", "answer"),
            rows=tuple(rows),
            left=frozenset({"part", "question", "answer"}),
            caption="The checklist of Li et al. 2025, (Mis)Fitting, for whoever wants to judge or repeat this fit; as "
            "JSON in report/fit_card.json.",
        ),
    ]
