"""The isoFLOP study of a ladder: its section of the report, and four files beside the lab's own.

LAB/<ladder>/lab_runs.csv    run_id, N, D, val_loss, usd
LAB/<ladder>/lab_fit.json    E, A, alpha, B, beta: point and ci95, or null with a reason
LAB/<ladder>/iso-flop.png    loss against N at each budget
LAB/<ladder>/prediction.md   D_opt for 1e9 parameters, and how much to trust it
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from homelab_scaling import codec
from homelab_scaling.errors import MachineError
from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.isoflop import MIN_SIZES
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.predict_page import flops
from homelab_scaling.fit.underdetermined import SEED_NOISE_LOG
from homelab_scaling.fit.words import between, listed, short
from homelab_scaling.plan.nominal import not_one_budget
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Image, Paragraph, to_markdown
from homelab_scaling.report.figures import NoPicture, Picture
from homelab_scaling.report.isoflop_plots import (
    Budget,
    is_nominal,
    isoflop_curves,
    measured_budgets,
    minimum_of,
    passing_laws,
)
from homelab_scaling.report.target import TARGET_PARAMS, target_blocks, why_no_law
from homelab_scaling.report.words import plural, sentence

RUNS_FILE, FIT_FILE, PICTURE_FILE, PREDICTION_FILE = "lab_runs.csv", "lab_fit.json", "iso-flop.png", "prediction.md"
RUNS_COLUMNS = ("run_id", "N", "D", "val_loss", "usd")
PARAMETERS = ("E", "A", "alpha", "B", "beta")
ROUNDED = "hoffmann-2022-rounded"
FIGURE = isoflop_curves.__name__


@dataclass(frozen=True, kw_only=True)
class LabParameter:
    """One parameter of lab_fit.json."""

    point: float | None
    ci95: tuple[float, float] | None
    reason: str | None
    """Why `point` or `ci95` is null."""


def is_isoflop(view: LabView) -> bool:
    """Whether the ladder has compute budgets, or the published tokens of one."""
    return view.horizons is not None and (bool(view.horizons.flops) or view.horizons.mode == "nominal")


# -------------------------------------------------------------------------------------------------------------- section


def isoflop_study(view: LabView, pictures: Sequence[Picture | NoPicture]) -> list[Block]:
    """The section of the report; empty for other ladders."""
    if not is_isoflop(view):
        return []
    blocks: list[Block] = [Heading(text="The isoFLOP study"), Paragraph(text=_design(view))]
    blocks += [_image(view, picture, f"{picture.name}.png") for picture in _figure(pictures)]
    budgets = [one for one in measured_budgets(view) if one.flops is not None]
    if budgets:
        blocks.append(_minima(budgets))
    blocks += target_blocks(view)
    blocks += _published(view)
    return [*blocks, Paragraph(text=_files_words(view))]


def _figure(pictures: Sequence[Picture | NoPicture]) -> list[Picture]:
    return [one for one in pictures if isinstance(one, Picture) and one.name == FIGURE]


def other_pictures(view: LabView, pictures: Sequence[Picture | NoPicture]) -> list[Picture | NoPicture]:
    """The figures without the one that stands in the study's own section, which is the answer of such a ladder."""
    if not is_isoflop(view):
        return list(pictures)
    own = {one.name for one in _figure(pictures)}
    return [
        replace(one, section="figures") if isinstance(one, Picture) and one.section == "answer" else one
        for one in pictures
        if one.name not in own
    ]


def best_sizes(view: LabView) -> str | None:
    """The answer to an isoFLOP ladder's question; None for other ladders and before there is one."""
    found = measured_budgets(view) if is_isoflop(view) else []
    if not found:
        return None
    if found[0].flops is None:
        at = int(np.argmin(found[0].losses))
        return (
            "The published tokens are not one budget, so no size can be called best for its compute; the lowest loss, "
            f"{found[0].losses[at]:.3f}, is that of N = {short(float(found[0].sizes[at]))}."
        )
    return " ".join(_best_size(one) for one in found)


def _best_size(budget: Budget) -> str:
    at = int(np.argmin(budget.losses))
    trained = f"of the sizes trained N = {short(float(budget.sizes[at]))} is best ({budget.losses[at]:.3f})"
    best, c = minimum_of(budget), flops(budget.flops or 0.0)
    if best is None:
        return f"At {c} FLOPs {trained}, and no minimum lies between them."
    if best.ci95 is not None:
        sure = f"95 % interval [{short(best.ci95[0])}, {short(best.ci95[1])}]"
    else:
        few = budget.n_sizes < MIN_SIZES
        sure = f"{'a parabola through three sizes' if few else 'its curvature is not sure'}, so without an interval"
    return f"At {c} FLOPs the loss is lowest near N = {short(best.n_params)} ({sure}); {trained}."


def _image(view: LabView, picture: Picture, file: str) -> Image:
    return Image(
        file=file,
        title=picture.title,
        caption=_caption(view),
        light_png=picture.light_png,
        dark_png=picture.dark_png,
    )


def _caption(view: LabView) -> str:
    """How to read the figure of this very lab."""
    budgets = measured_budgets(view)
    text = "Dots are finished rows"
    if not budgets:
        return f"{text}, read between the rows of a size where no budget was run at several."
    text += ", dotted a parabola through them in log N"
    if budgets[0].flops is None:
        text += "; above each dot stands what it cost, so the curve is no isoFLOP curve and has no minimum to report"
    elif not any(minimum_of(one) for one in budgets):
        text += ", which has no minimum between the sizes"
    elif any(one.n_sizes < MIN_SIZES for one in budgets):
        text += " with its minimum; through three sizes a parabola always fits, so that minimum has no interval"
    elif any(best.ci95 for one in budgets if (best := minimum_of(one)) is not None):
        text += " with its minimum and, where its curvature is sure, the 95 % interval of that"
    else:
        text += " with its minimum; no curvature is sure, so no minimum has an interval"
    if view.study.joint is not None:
        return f"{text}. Solid is {view.study.joint.law.title} fitted to all rows, its star the best size."
    if passing_laws(view) is not None and budgets[0].flops is not None:
        text += f". Shaded lies every L(N, D) that passes within {100 * SEED_NOISE_LOG:g} % of all points"
    if view.study.left_open is not None:
        text += (
            ". On the right the profile of L(N, D): how near it can come to all points at each value of an exponent "
            "with everything else at its best; what lies in the grey is not ruled out"
        )
    return f"{text}."


def _design(view: LabView) -> str:
    assert view.horizons is not None
    listed_budgets = view.horizons.flops
    if is_nominal(view):
        budget = listed_budgets[0] if len(listed_budgets) == 1 else None
        said = not_one_budget(view.published, budget)
        text = "Every size was trained on its published number of tokens (horizons.mode = nominal). "
        return text + (sentence(said) if said else "By exact count these are one budget.")
    many = f"{len(listed_budgets)} budgets" if len(listed_budgets) > 1 else "one budget"
    return (
        f"Every size was trained to {many}, {listed([flops(c) for c in listed_budgets])} FLOPs counted over every "
        "matmul of its shape, so that sizes differ in how they split the same compute between parameters and tokens."
    )


def _minima(budgets: Sequence[Budget]) -> Grid:
    rows = []
    for one in budgets:
        best = minimum_of(one)
        at = int(np.argmin(one.losses))
        if best is None:
            end = "smallest" if one.sizes[at] <= np.median(one.sizes) else "largest"
            cells = ("–", "–", f"no minimum between the sizes: the loss is lowest towards the {end}")
        elif one.n_sizes < MIN_SIZES:
            cells = (short(best.n_params), "none", "a parabola goes through any three sizes, so it has no interval")
        elif best.ci95 is None:
            cells = (short(best.n_params), "none", "its curvature is not sure, so it has no interval")
        else:
            cells = (short(best.n_params), f"[{short(best.ci95[0])}, {short(best.ci95[1])}]", "–")
        lowest = f"{one.losses[at]:.4f} at {short(float(one.sizes[at]))}"
        rows.append((flops(one.flops or 0.0), str(one.n_sizes), lowest, *cells))
    return Grid(
        head=("FLOPs", "sizes", "lowest measured loss", "parabola's best N", "95 %", "note"),
        rows=tuple(rows),
        left=frozenset({"lowest measured loss", "note"}),
        caption="The best size of each budget by a parabola in log N; its interval is Fieller's, from the scatter of "
        "four or more sizes around it, and knows nothing of losses being no parabola.",
    )


def _published(view: LabView) -> list[Block]:
    """The published design, what its tokens cost, and what Hoffmann's rounded law says of it."""
    if not view.published:
        return []
    printed = {f.rung: f.value for f in view.reference.figures if f.of == "loss_nats"} if view.reference else {}
    law = rounded_losses(view)
    rows = []
    for index, rung in enumerate(view.published):
        ours = [row for row in view.rows if row.rung == rung.name]
        mean = "–" if not ours else f"{np.mean([row.loss_nats for row in ours]):.3f}"
        length = "–" if not ours else listed(list(dict.fromkeys(short(row.n_tokens) for row in ours)))
        rows.append(
            (
                rung.name,
                "–" if rung.n_params is None else short(rung.n_params),
                short(rung.n_tokens),
                flops(rung.flops_full),
                flops(rung.flops_causal),
                f"{law[index]:.2f}" if law else "–",
                f"{printed[rung.name]:.2f}" if rung.name in printed else "–",
                length,
                mean,
            )
        )
    heads = ("rung", "N", "D", "FLOPs, full", "causal", "Hoffmann's law", "printed", "our D", "our loss")
    kept = [i for i, _head in enumerate(heads) if i == 0 or any(row[i] != "–" for row in rows)]
    grid = Grid(
        head=tuple(heads[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in rows),
        left=frozenset({"rung"}),
        caption="The published design: N = C / (6 D), and the FLOPs of its tokens counted over every matmul of the "
        "shape that stands for each size, with the full attention square and with its causal half.",
    )
    said = hoffmann_words(view, law, printed) if law else None
    return [grid, Paragraph(text=said)] if said else [grid]


def rounded_losses(view: LabView) -> list[float]:
    """What Hoffmann's law as its text rounds it gives at the published N and D; empty where N is not known."""
    one = CATALOGUE[ROUNDED]
    law = get_law(one.law)
    values = np.array([one.values[name] for name in law.names])
    at = [(rung.n_params, rung.n_tokens) for rung in view.published if rung.n_params is not None]
    if len(at) < len(view.published):
        return []
    return [float(law.loss(values, {"n_params": n, "n_tokens": float(d)})) for n, d in at]


def hoffmann_words(view: LabView, law: Sequence[float], printed: dict[str | None, float]) -> str:
    """The rounded law beside a published table, and why neither is a yardstick for our losses."""
    v = CATALOGUE[ROUNDED].values
    constants = f"{v['E']:g}, {v['A']:g}, {v['alpha']:g}, {v['B']:g}, {v['beta']:g}"
    runs = f"the {len(law)} run{plural(len(law))}"
    text = (
        f"Hoffmann et al.'s rounded constants (E, A, alpha, B, beta = {constants}) give "
        f"{listed([f'{x:.2f}' for x in law])} nats for {runs} at the published N and D."
    )
    theirs = [printed.get(rung.name) for rung in view.published]
    if all(x is not None for x in theirs):
        known = [x for x in theirs if x is not None]
        off = listed([f"{x - y:+.2f}" for x, y in zip(known, law, strict=True)])
        text += f" The published table prints {listed([f'{x:.2f}' for x in known])}, {off} from that law"
        text += "; both are lowest at the same size." if np.argmin(known) == np.argmin(law) else "."
    return (
        f"{text} Neither is measured on this text or with this tokenizer, so our losses need not equal them; what can "
        "be compared is which size wins."
    )


def _files_words(view: LabView) -> str:
    gone = [f"{one.row_id} ({one.reason})" for one in view.excluded]
    left_out = f" Left out of all of them: {'; '.join(gone)}." if gone else ""
    return (
        f"The same numbers lie in the lab's folder: `{RUNS_FILE}`, `{FIT_FILE}`, `{PICTURE_FILE}` and "
        f"`{PREDICTION_FILE}`.{left_out}"
    )


# ---------------------------------------------------------------------------------------------------------------- files


def write_isoflop_study(view: LabView, pictures: Sequence[Picture | NoPicture]) -> None:
    """Replaces the four files, each atomically; does nothing for other ladders. A picture that cannot be drawn goes.

    Raises:
        MachineError: the lab's folder cannot be written.
    """
    if not is_isoflop(view):
        return
    codec.write_text(view.path / RUNS_FILE, lab_runs(view))
    codec.write_json(view.path / FIT_FILE, lab_fit(view))
    drawn = _figure(pictures)
    for picture in drawn:
        codec.write_bytes(view.path / PICTURE_FILE, picture.light_png)
    if not drawn:
        _remove(view.path / PICTURE_FILE)
    codec.write_text(view.path / PREDICTION_FILE, prediction(view, pictures))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: could not be removed ({error.strerror}); fix its rights") from None


def lab_runs(view: LabView) -> str:
    """lab_runs.csv: one line per finished row, by size and tokens; an unknown cost is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(RUNS_COLUMNS)
    for row in view.rows:
        usd = "" if row.usd is None else row.usd
        writer.writerow([row.run_id, row.n_params, row.n_tokens, row.loss_nats, usd])
    return out.getvalue()


def lab_fit(view: LabView) -> dict[str, LabParameter]:
    """lab_fit.json: the five parameters of L = E + A N^-alpha + B D^-beta, in this order."""
    fit = view.fit.get("chinchilla") if view.fit else None
    if fit is None:
        return {name: LabParameter(point=None, ci95=None, reason=why_no_law(view)) for name in PARAMETERS}
    found = {}
    for name in PARAMETERS:
        one = fit.parameters[name]
        if not fit.is_fitted:
            span = "" if one.ci95 is None else f"; laws through all points have {name} in {between(*one.ci95)}"
            found[name] = LabParameter(point=None, ci95=None, reason=why_no_law(view) + span)
            continue
        reason = fit.unpinned.get(name)
        if one.ci95 is None and reason is None:
            reason = "no interval: fitted without resamples"
        found[name] = LabParameter(point=one.value, ci95=one.ci95, reason=reason)
    return found


def prediction(view: LabView, pictures: Sequence[Picture | NoPicture]) -> str:
    """prediction.md."""
    blocks = [Paragraph(text=_design(view)), *target_blocks(view)]
    blocks += [_image(view, picture, PICTURE_FILE) for picture in _figure(pictures)]
    blocks += [Bullets(items=tuple(_grounds(view, pictures)))]
    return to_markdown(f"{view.name}: how many tokens for {short(TARGET_PARAMS)} parameters?", blocks)


def _grounds(view: LabView, pictures: Sequence[Picture | NoPicture]) -> list[str]:
    """What the numbers stand on."""
    n_runs = len({row.run_id for row in view.rows})
    items = [
        f"From {len(view.rows)} row{plural(len(view.rows))} of {n_runs} run{plural(n_runs)} (`{RUNS_FILE}`; usd as if "
        f"each row had been run alone); parameters in `{FIT_FILE}`, everything else in `report/report.html`."
    ]
    if view.fit is not None and (fit := view.fit.get("chinchilla")) is not None and fit.is_fitted:
        items.append(sentence(f"Intervals: {fit.interval}"))
        apart = {name: check.disagreement for name, check in fit.cross_checks.items() if check.disagreement}
        items += [sentence(warning) for warning in fit.warnings if warning not in apart.values()]
        if apart:
            items.append(
                f"Bootstrap, profile and delta method differ by more than a factor of two in the width of intervals "
                f"(of {listed(list(apart))}): trust the widest, in `fit/fit.json`."
            )
    absent = next((one for one in pictures if isinstance(one, NoPicture) and one.name == FIGURE), None)
    if absent is not None:
        items.append(f"There is no {PICTURE_FILE}, because {absent.reason}.")
    return items + [f"Left out: {one.row_id} ({one.reason})." for one in view.excluded]
