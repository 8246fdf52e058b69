"""What a lab's numbers say, sentence by sentence; every one of them follows from the data."""

import math
from collections import Counter
from collections.abc import Sequence

from homelab_scaling.fit.diagnose import about_fits
from homelab_scaling.fit.laws import AXIS_LETTER, AXIS_UNIT
from homelab_scaling.fit.result import FitReport, ScalingFit
from homelab_scaling.fit.slices import levels, tabulate
from homelab_scaling.fit.words import brief, listed, number, short
from homelab_scaling.report.batch import batches
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Commands, Facts, Grid, Heading, Image, Paragraph
from homelab_scaling.report.equal_steps import steps_study
from homelab_scaling.report.evals import evaluations
from homelab_scaling.report.evidence import card, evidence, live
from homelab_scaling.report.figures import NoPicture, Picture, Section
from homelab_scaling.report.isoflop_study import best_sizes, isoflop_study, other_pictures
from homelab_scaling.report.published import published
from homelab_scaling.report.seeds import seeds
from homelab_scaling.report.tables import laws, predictions, what_was_run
from homelab_scaling.report.tuning import tuning
from homelab_scaling.report.words import (
    duration,
    in_brackets,
    ladder_file,
    machine_words,
    main_fit,
    money,
    plural,
    r2_text,
    sentence,
)
from homelab_scaling.runs import to_point

KAPLAN_C_MIN = 0.050
"""Exponent of L(C_min), eq. 1.3."""
TIGHT, LOOSE = 0.10, 0.35
"""Half-width of a 95 % interval, as a share of the value: below is well, above is poorly determined."""


def tell(view: LabView, pictures: Sequence[Picture | NoPicture]) -> list[Block]:
    """The whole report, the answer first."""
    others = other_pictures(view, pictures)
    return [
        *answer(view),
        *images(others, "answer"),
        *isoflop_study(view, pictures),
        *what_was_run(view),
        *live(view),
        *laws(view),
        *published(view),
        *steps_study(view, images(pictures, "steps")),
        *evidence(view),
        *tuning(view),
        *seeds(view),
        *batches(view, images(pictures, "batch")),
        *evaluations(view, images(pictures, "evals")),
        *figures(others),
        *weaknesses(view),
        *predictions(view),
        *how_to_repeat(view),
        *card(view),
    ]


# ----------------------------------------------------------------------------------------------------------- the answer


def answer(view: LabView) -> list[Block]:
    """The law in words, its numbers, and how sure they are."""
    blocks: list[Block] = []
    sized = main_fit(view.fit, "power-n")
    if not view.rows:
        states = Counter(run.status for run in view.runs)
        said = listed([f"{count} {status}" for status, count in states.items()]) if states else "none was started"
        blocks.append(
            Paragraph(lead=True, text=f"No run has finished a row yet, so there is no law to report (runs: {said}).")
        )
    elif sized is None or sized.derived["exponent"].value is None:
        blocks.append(Paragraph(lead=True, text=_no_size_law(view)))
    else:
        blocks.append(Paragraph(lead=True, text=_size_law(view, sized)))
    if view.question:
        blocks.append(Paragraph(text=f"The question this ladder was built for: {view.question}"))
    facts = _facts(view, sized)
    if facts:
        blocks.append(Facts(items=tuple(facts)))
    findings = [
        text
        for text in (
            best_sizes(view),
            _order(view),
            _joint_law(view),
            _chosen_law(view),
            _compute_law(view),
            _small_batch_law(view),
            _how_sure(view, sized),
        )
        if text
    ]
    if findings:
        blocks.append(Bullets(items=tuple(findings)))
    return blocks


def _size_law(view: LabView, fit: ScalingFit) -> str:
    exponent, prefactor = fit.derived["exponent"], fit.parameters["A"]
    assert exponent.value is not None
    gain = 100 * (1 - 2**-exponent.value)
    formula = f" (L = {brief(prefactor.value)} N^-{brief(exponent.value)})" if prefactor.value is not None else ""
    return (
        f"On {machine_words(view)}, at {fit.rows}, the held-out loss falls as a power of model size with exponent "
        f"{brief(exponent.value)}{in_brackets(exponent)}{formula}: each doubling of the parameters lowers the loss by "
        f"{gain:.1f} %. The straight line through {fit.n_points} points in log-log has R² = {r2_text(fit)}."
    )


def _no_size_law(view: LabView) -> str:
    fit = view.fit.get("power-n") if view.fit else None
    if fit is None:
        why = "no fit has been made"
    elif not fit.is_fitted:
        why = fit.status.removeprefix("not fitted: ")
    else:
        why = f"its exponent is not pinned down ({next(iter(fit.unpinned.values()), fit.status)})"
    best = min(view.rows, key=lambda r: r.loss_nats)
    return (
        f"{len(view.rows)} row{plural(len(view.rows))} measured on {machine_words(view)}, the lowest loss "
        f"{best.loss_nats:.3f} nats per token at N = {short(best.n_params)}, D = {short(best.n_tokens)}. "
        f"There is no law of model size to report: {why}.{_along_a_ratio(view)}"
    )


def _along_a_ratio(view: LabView) -> str:
    """What stands in for the law of size where every size had its own tokens."""
    law = view.study.size_law
    e = law.derived["exponent"] if law is not None and law.is_fitted else None
    if law is None or e is None or e.value is None or not law.rows.endswith(" N"):
        return ""
    return (
        f" Where tokens grow with size, at {law.rows}, the loss falls with N as a power of {brief(e.value)}"
        f"{in_brackets(e)} (R² = {r2_text(law)}); that is of size and tokens together."
    )


def _facts(view: LabView, sized: ScalingFit | None) -> list[tuple[str, str]]:
    facts = []
    if sized is not None and sized.derived["exponent"].value is not None:
        exponent = sized.derived["exponent"]
        facts.append(
            (f"{brief(exponent.value or 0)}", f"exponent of L(N) at {sized.rows}, 95 %{in_brackets(exponent)}")
        )
        facts.append((r2_text(sized), f"R² of L(N) in log-log, {sized.n_points} points"))
    if view.rows:
        best = min(view.rows, key=lambda r: r.loss_nats)
        error = f" ± {best.loss_se_nats:.3f}" if best.loss_se_nats is not None else ""
        facts.append((f"{best.loss_nats:.3f}", f"lowest loss, nats per token{error} ({best.rung})"))
    if view.runs:
        finished = sum(run.status == "finished" for run in view.runs)
        planned = max(view.n_rungs_planned or 0, len(view.runs))
        facts.append((f"{finished} of {planned}", f"runs finished, {len(view.rows)} rows"))
    seconds = [row.seconds_marginal for row in view.rows if row.seconds_marginal is not None]
    if seconds:
        facts.append((duration(sum(seconds)), "of machine time for the rows"))
    dollars = [row.usd_marginal for row in view.rows if row.usd_marginal is not None]
    if dollars:
        facts.append((money(sum(dollars)), "by the ladder's prices"))
    return facts


def _order(view: LabView) -> str | None:
    """Whether loss falls with N at the largest D that several sizes share."""
    if not view.rows:
        return None
    table = tabulate(tuple(to_point(row) for row in view.rows))
    for group in reversed(levels(table.columns["n_tokens"])):
        sizes = levels(table.columns["n_params"][group])
        if len(sizes) < 2:
            continue
        losses = [float(table.losses[group[rows]].mean()) for rows in sizes]
        at = f"At D = {short(float(table.columns['n_tokens'][group[0]]))} tokens"
        rises = [i for i in range(1, len(losses)) if losses[i] > losses[i - 1]]
        if not rises:
            return (
                f"{at} the loss falls at every step in size, from {losses[0]:.3f} to {losses[-1]:.3f} nats per token."
            )
        names = listed([view.rows[int(group[sizes[i][0]])].rung for i in rises])
        return f"{at} the loss does not fall at every step in size: it rises at {names}."
    return None


def _joint_law(view: LabView) -> str | None:
    fit = view.fit.get("chinchilla") if view.fit else None
    if fit is None or not fit.is_fitted:
        return None if fit is None else f"L(N, D) is {fit.status}."
    named = [f"{name} = {number(e.value)}{in_brackets(e)}" for name, e in fit.parameters.items() if e.value is not None]
    loose = [name for name in fit.parameters if name in fit.unpinned]
    text = f"Size and data together, L = E + A N^-alpha + B D^-beta over {fit.n_points} rows (R² = {r2_text(fit)}): "
    text += listed(named) if named else "no single parameter is pinned down"
    if loose:
        text += f"; the data do not pin down {listed(loose)}"
    a = fit.derived["a"]
    if a.value is not None:
        text += f". For a growing budget the best size then grows as N ∝ C^{brief(a.value)}{in_brackets(a)}"
    else:
        text += ". How a growing budget should be split between size and data cannot be read off these points"
    return text + "."


def _chosen_law(view: LabView) -> str | None:
    """The law that hold-out prefers, where it is not the free one."""
    joint, evidence = view.study.joint, view.fit.evidence if view.fit else None
    if joint is None or evidence is None or evidence.chosen_law != joint.law.name or joint.law.name == "chinchilla":
        return None
    a = joint.fit.derived["a"]
    split = "" if a.value is None else f"; by it N ∝ C^{brief(a.value)}{in_brackets(a)}"
    errors = [f"{100 * one.rms_frac:.2f} %" for one in evidence.holdouts if one.law == joint.law.name and one.rms_frac]
    missed = f" (off by {listed(errors)} of the loss)" if errors else ""
    title = joint.law.title
    return f"Of the laws of size and data, {title} predicts what was held out best{missed}{split}. It is used below."


def _compute_law(view: LabView) -> str | None:
    fit = main_fit(view.fit, "power-c")
    if fit is None or fit.derived["exponent"].value is None:
        return None
    exponent = fit.derived["exponent"]
    assert exponent.value is not None
    return (
        f"Along the frontier of compute ({fit.n_points} rows that no cheaper row beats) the loss falls as "
        f"C^-{brief(exponent.value)} (exponent{in_brackets(exponent)}, R² = {r2_text(fit)}): ten times the compute "
        f"lowers it by {100 * (1 - 10**-exponent.value):.0f} %."
    )


def _small_batch_law(view: LabView) -> str | None:
    """Kaplan's axis beside ours, where the critical batch is known."""
    fit, spent = main_fit(view.fit, "power-c-min"), main_fit(view.fit, "power-c")
    if fit is None or fit.derived["exponent"].value is None:
        return None
    exponent = fit.derived["exponent"]
    beside = spent.derived["exponent"].value if spent else None
    against = "" if beside is None else f"; against the compute that was spent it is {brief(beside)}"
    return (
        f"Against C_min, what a batch far below critical would have needed for the same loss, the frontier falls as "
        f"C_min^-{brief(exponent.value or 0.0)} (exponent{in_brackets(exponent)}){against}. Kaplan et al. 2020 give "
        f"{KAPLAN_C_MIN:.3f} on this axis."
    )


def _how_sure(view: LabView, fit: ScalingFit | None) -> str | None:
    if fit is None or fit.derived["exponent"].value is None or fit.derived["exponent"].ci95 is None:
        return None
    exponent = fit.derived["exponent"]
    assert exponent.value is not None and exponent.ci95 is not None
    share = (exponent.ci95[1] - exponent.ci95[0]) / 2 / exponent.value
    grade = "well" if share < TIGHT else "roughly" if share < LOOSE else "poorly"
    decades = math.log10(fit.ranges["n_params"][1] / fit.ranges["n_params"][0])
    return (
        f"How sure: the exponent of L(N) is {grade} determined (95 % interval ± {100 * share:.0f} % of its value) from "
        f"{fit.n_runs} runs over {decades:.1f} decades of N; the interval covers noise between runs, not what happens "
        f"outside this range, on other text or with another recipe."
    )


# ----------------------------------------------------------------------------------------------------------- weaknesses


def weaknesses(view: LabView) -> list[Block]:
    """Every warning, everything excluded, everything missing."""
    blocks: list[Block] = [Heading(text="What is weak")]
    items = []
    if view.fit is not None:
        items += [sentence(w) for w in view.fit.warnings]
        items += [sentence(text) for text in about_fits(view.fit)]
        items += [sentence(f"Note: {note}") for note in view.fit.notes]
    items += [sentence(f"From the plan: {w}") for w in view.plan_warnings]
    items += [sentence(m) for m in view.missing]
    if items:
        blocks.append(Bullets(items=tuple(items)))
    gone = _excluded(view)
    if gone:
        blocks.append(
            Grid(
                head=("left out", "why"),
                rows=tuple(gone),
                left=frozenset({"left out", "why"}),
                caption="Runs and rows that no law uses.",
            )
        )
    if view.fit is not None and (ranges := _ranges(view.fit)):
        blocks.append(Paragraph(text=f"The laws were measured for {ranges}; everything outside is extrapolation."))
    if len(blocks) == 1:
        blocks.append(Paragraph(text="Nothing was flagged."))
    return blocks


def _excluded(view: LabView) -> list[tuple[str, str]]:
    gone = {(e.row_id, e.reason) for e in (*view.excluded, *(view.fit.excluded if view.fit else ()))}
    return sorted(gone)


def _ranges(report: FitReport) -> str:
    widest: dict[str, tuple[float, float]] = {}
    for fit in report.fits:
        for axis, (low, high) in fit.ranges.items():
            known = widest.get(axis, (low, high))
            widest[axis] = (min(low, known[0]), max(high, known[1]))
    words = {axis: ("{:.2e}".format if axis.endswith("flops") else short) for axis in widest}
    return listed(
        [f"{AXIS_LETTER[a]} from {words[a](lo)} to {words[a](hi)} {AXIS_UNIT[a]}" for a, (lo, hi) in widest.items()]
    )


# --------------------------------------------------------------------------------------------------------------- repeat


def how_to_repeat(view: LabView) -> list[Block]:
    """The commands that lead here, and from one row back to its run."""
    n_seeds = len({row.seed for row in view.rows})
    repeated = f" --seeds {n_seeds}" if n_seeds > 1 else ""
    command = f"homelab run {ladder_file(view.name)}{repeated}"
    lines = [f"{command}                # everything below in one; goes on where it stopped"]
    if view.fit is not None:
        f = view.fit
        lines.append(
            f"homelab fit LAB/{view.name} --objective {f.objective} --bootstrap {f.n_bootstrap} --seed {f.seed} "
            f"--count {f.count}" + (f" --compute {f.compute}" if f.compute != "c" else "")
        )
    lines.append(f"homelab report LAB/{view.name}")
    if view.runs:
        run = view.runs[-1].run_id
        lines.append(
            f"accelerate launch recipes/pretrain.py --spec LAB/{view.name}/runs/{run}/spec.json   # one run alone"
        )
    return [
        Heading(text="How to repeat this"),
        Paragraph(
            text="LAB is the folder of labs. Same specs on the same machine give the same numbers; runs.csv holds "
            "every row, fit/fit.json every number of the fits with their draws beside it, runs/*/metrics.jsonl every "
            "step."
        ),
        Commands(text="\n".join(lines)),
    ]


def figures(pictures: Sequence[Picture | NoPicture]) -> list[Block]:
    """Every figure that has no section of its own with its caption, or why it is missing."""
    blocks: list[Block] = [Heading(text="Figures"), *images(pictures, "figures")]
    # A figure that nobody misses gives no reason.
    absent = [p for p in pictures if isinstance(p, NoPicture) and p.reason]
    said = tuple(f"{picture.title}: not drawn, because {picture.reason}." for picture in absent)
    return [*blocks, Bullets(items=said)] if said else blocks


def images(pictures: Sequence[Picture | NoPicture], section: Section) -> list[Block]:
    """The pictures of a section."""
    return [
        Image(
            file=f"{picture.name}.png",
            title=picture.title,
            caption=picture.caption,
            light_png=picture.light_png,
            dark_png=picture.dark_png,
        )
        for picture in pictures
        if isinstance(picture, Picture) and picture.section == section
    ]
