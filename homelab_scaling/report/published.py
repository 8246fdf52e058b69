"""Ours beside a published experiment, point by point: the number, how it was measured, why it differs, what follows."""

from collections.abc import Callable
from dataclasses import dataclass

from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.ladder import FigureName, PublishedFigure, Reference
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.equal_steps import signed
from homelab_scaling.report.follows import KAPLAN_N, not_said, what_follows
from homelab_scaling.report.ours import LOOSE, OURS, Ours
from homelab_scaling.report.states import largest_memory
from homelab_scaling.report.words import flops_text, gigabytes, machine_words, money, percent, plural

SAME_FRAC = 0.05
"""Totals closer than this are the same."""
SAME_SIZE_FRAC = 0.1
UNKNOWN = "unknown"
MANY = 1e9
"""Ratios from here on are written as powers of ten."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A figure as a report shows it."""

    title: str
    form: Callable[[float], str]
    moved_by: tuple[str, ...]
    """Which differences (`differences`) can move it."""
    is_total: bool = False
    """Grows with what was trained, so that ours is told as a share of theirs."""


def _times(value: float) -> str:
    return f"{value:.3g}"


RUN = ("machine", "text", "sizes", "compute", "schedule", "rungs")
KINDS: dict[FigureName, Kind] = {
    "exponent_n": Kind(
        title="exponent of L(N)", form=brief, moved_by=("sizes", "text", "compute", "schedule", "rungs")
    ),
    "exponent_c": Kind(title="exponent of L(C)", form=brief, moved_by=("sizes", "text", "schedule", "rungs")),
    "r2": Kind(title="R² of L(N)", form=_times, moved_by=("sizes", "rungs")),
    "slope_c": Kind(title="slope against compute", form=signed, moved_by=("sizes", "text", "schedule")),
    "loss_nats": Kind(title="loss, nats per token", form=_times, moved_by=("text", "compute", "schedule")),
    "tokens_total": Kind(title="tokens in all", form=short, moved_by=("sizes", "rungs"), is_total=True),
    "flops_total": Kind(title="FLOPs in all", form=flops_text, moved_by=("sizes", "rungs"), is_total=True),
    "hours": Kind(title="time", form=lambda v: f"{v:.3g} h", moved_by=("machine", "compute"), is_total=True),
    "kwh": Kind(title="energy", form=lambda v: f"{v:.3g} kWh", moved_by=("machine", "compute"), is_total=True),
    "usd": Kind(title="money", form=money, moved_by=("machine", "compute"), is_total=True),
    "temperature_c": Kind(title="hottest card", form=lambda v: f"{v:.0f} °C", moved_by=("machine",)),
    "peak_vram_bytes": Kind(
        title="peak memory of a card", form=gigabytes, moved_by=("machine", "sizes"), is_total=True
    ),
    "optimizer_saving_frac": Kind(title="AdamW8bit saves of memory", form=percent, moved_by=("sizes",)),
}


def published(view: LabView) -> list[Block]:
    """The section; nothing for a ladder that names no published experiment."""
    reference = view.reference
    if reference is None:
        return []
    other = differences(view, reference)
    blocks: list[Block] = [
        Heading(text="Beside the published experiment"),
        Paragraph(text=f"{_opening(reference)}{not_said(reference)}"),
        *_side_by_side(view, reference, other),
    ]
    if other:
        blocks += [
            Paragraph(text="What differs between the two experiments, or was not said, by the words of the table:"),
            Bullets(items=tuple(f"{name}: {said}" for name, said in other.items())),
        ]
    follows = what_follows(reference, largest_memory(view))
    if follows:
        blocks += [Paragraph(text="What follows from the published figures alone:"), Bullets(items=follows)]
    return blocks


def _opening(reference: Reference) -> str:
    n = len(reference.figures)
    machine = f", on {reference.machine}" if reference.machine and reference.machine not in reference.source else ""
    source = reference.source[0].upper() + reference.source[1:]
    return f"{source}{machine}: {n} published figure{plural(n)}, ours beside {'it' if n == 1 else 'them'}. "


def _side_by_side(view: LabView, reference: Reference, other: dict[str, str]) -> list[Block]:
    """The table, and line by line where ours comes from."""
    rows, how = [], []
    for figure in reference.figures:
        kind, ours = KINDS[figure.of], OURS[figure.of](view, figure)
        theirs = kind.form(figure.value) + (f" ({figure.note})" if figure.note else "")
        title = kind.title + (f", {figure.rung}" if figure.rung else "")
        known = UNKNOWN if ours.value is None else kind.form(ours.value)
        rows.append((title, theirs, ours.text or known, _why(figure, kind, ours, other)))
        how.append(f"{title}: {'not known; ' if (ours.text or known) == UNKNOWN else ''}{ours.how}.")
    head = ("figure", "published", "ours", "why they differ")
    return [
        Grid(
            head=head,
            rows=tuple(rows),
            left=frozenset(head),
            wraps=True,
            caption="Published figures as they were published, without errors where none were given.",
        ),
        Paragraph(text="How ours were measured, or why they are not known:"),
        Bullets(items=tuple(how)),
    ]


# ------------------------------------------------------------------------------------------------------ why they differ


def _why(figure: PublishedFigure, kind: Kind, ours: Ours, other: dict[str, str]) -> str:
    """The verdict on the two numbers, and which of the differences can have moved ours."""
    if ours.value is None:
        return {None: "ours is not known", LOOSE: "our points do not say"}.get(
            ours.text, "ours is not known as a whole"
        )
    said = (f"{ours.nearest} comes nearest: " if ours.nearest else "") + _verdict(figure, kind, ours)
    if figure.of == "exponent_n":
        said += f"; {_kaplan(ours)}"
    causes = [name for name in kind.moved_by if name in other]
    if causes:
        said += f"; different, or not said: {listed(causes)}"
    elif not other:
        said += "; nothing that was published differs"
    return said


def _verdict(figure: PublishedFigure, kind: Kind, ours: Ours) -> str:
    value, theirs = ours.value, figure.value
    assert value is not None
    if kind.is_total:
        said = _share(value / theirs)
        within = ours.ci95 is not None and ours.ci95[0] <= theirs <= ours.ci95[1]
        return f"{said}, the same within its error" if within else said
    if ours.ci95 is not None:
        low, high = ours.ci95
        form = kind.form(theirs)
        if low <= theirs <= high:
            return f"our interval contains {form}"
        return f"our interval does not contain {form}: ours is {'higher' if low > theirs else 'lower'}"
    if ours.range_of is not None:
        low, high = ours.range_of
        inside = "lies between" if low <= theirs <= high else "does not lie between"
        return f"{kind.form(theirs)} {inside} the slopes of stretches of half its points; no interval"
    return _without_interval(figure, value)


def _without_interval(figure: PublishedFigure, value: float) -> str:
    apart = value - figure.value
    if figure.of == "temperature_c":
        return "the same" if round(apart) == 0 else f"ours is {abs(apart):.0f} °C {'hotter' if apart > 0 else 'cooler'}"
    if figure.of == "optimizer_saving_frac":
        return "theirs does not say of what; ours is of both"
    return "the same" if apart == 0 else f"ours is {'higher' if apart > 0 else 'lower'}"


def _share(ratio: float) -> str:
    """1/1,740 of theirs; 2.3 times theirs."""
    if ratio <= 0:
        return "ours is nothing"
    if abs(ratio - 1) <= SAME_FRAC:
        return "the same within 5 %"
    times = float(f"{max(ratio, 1 / ratio):.3g}")
    words = f"{times:,.0f}" if times < MANY else flops_text(times)
    words = words if times >= 100 else brief(times)
    return f"ours is 1/{words} of theirs" if ratio < 1 else f"ours is {words} times theirs"


def _kaplan(ours: Ours) -> str:
    """Beside the exponent that such figures are usually compared with."""
    if ours.ci95 is None:
        return f"Kaplan et al. 2020: {KAPLAN_N:g}"
    inside = "inside" if ours.ci95[0] <= KAPLAN_N <= ours.ci95[1] else "outside"
    return f"Kaplan's {KAPLAN_N:g} (body parameters) is {inside} it"


# -------------------------------------------------------------------------------------------------------- what differs


def differences(view: LabView, reference: Reference) -> dict[str, str]:
    """What is different in this lab, by name; what the published experiment does not say is not guessed."""
    found = {
        "machine": _machine(view, reference),
        "text": _text(view, reference),
        "sizes": _sizes(view, reference),
        "compute": _compute(view, reference),
        "schedule": _schedule(view, reference),
        "rungs": _rungs(view),
    }
    return {name: said for name, said in found.items() if said}


def _machine(view: LabView, reference: Reference) -> str:
    theirs, devices = reference.machine, {run.record.machine.device for run in view.runs if run.record}
    if not devices:
        return ""
    if theirs is None:
        return f"theirs was not said; ours is {machine_words(view)}."
    ranks = max(run.record.machine.n_processes for run in view.runs if run.record)
    n_cards = max(ranks, view.n_cards_planned or 0)  # two runs side by side have one each
    same_card = reference.card is not None and all(reference.card.lower() in device.lower() for device in devices)
    if same_card and n_cards == reference.n_cards:
        return ""
    ours = machine_words(view)
    if all(device.startswith("cpu") for device in devices):
        ours += ", without any card: no card's temperature, memory or energy is there to be measured"
    elif same_card:
        ours = f"{n_cards} x {listed(sorted(devices))}"
    return f"theirs was {theirs}, ours is {ours}."


def _text(view: LabView, reference: Reference) -> str:
    if view.corpus is None:
        return ""
    sources = listed(list(view.corpus.sources))
    ours = f"{sources} (tokenizer {view.corpus.tokenizer}, {view.corpus.n_vocab:,} ids)"
    if reference.text is None:
        return f"theirs was not said; ours is {ours}. Losses on different text or tokens do not compare."
    wanted = _letters(reference.text)
    if wanted and all(wanted in _letters(source) for source in view.corpus.sources):
        return ""
    return f"theirs was {reference.text}, ours is {ours}. Losses on different text or tokens do not compare."


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def _sizes(view: LabView, reference: Reference) -> str:
    body = reference.count == "body"
    sizes, ours = reference.n_params, sorted({(row.n_body if body else None) or row.n_params for row in view.rows})
    if not sizes or not ours:
        return ""
    count = f"{reference.n_models} models " if reference.n_models else ""
    ends = ((sizes[0], ours[0]), (sizes[-1], ours[-1]))
    as_many = reference.n_models is None or reference.n_models == len(ours)
    if as_many and all(abs(a / b - 1) <= SAME_SIZE_FRAC for a, b in ends):
        return ""
    what = "parameters in their bodies" if body else "parameters"
    said = f"theirs were {count}from {short(sizes[0])} to {short(sizes[-1])} {what}, ours are {len(ours)} from "
    said += f"{short(ours[0])} to {short(ours[-1])}"
    if ours[-1] < sizes[0]:
        said += f", the largest 1/{brief(sizes[0] / ours[-1])} of their smallest"
    return f"{said}. An exponent holds in the range it was measured in."


def _compute(view: LabView, reference: Reference) -> str:
    theirs, ours = reference.value("flops_total"), sum(row.flops_marginal for row in view.rows)
    if theirs is None or not ours or abs(ours / theirs - 1) <= SAME_FRAC:
        return ""
    return f"theirs took {flops_text(theirs)} FLOPs, ours {flops_text(ours)}; {_share(ours / theirs)}."


def _schedule(view: LabView, reference: Reference) -> str:
    schedules = {row.schedule for row in view.rows}
    if not schedules or schedules == {reference.schedule}:
        return ""
    theirs = "was not said" if reference.schedule is None else f"was {reference.schedule}"
    return f"theirs {theirs}, ours is {listed(sorted(schedules))}, every row decayed to its final rate."


def _rungs(view: LabView) -> str:
    """Sizes of the ladder without a row, and why."""
    done = {row.rung for row in view.rows}
    names = dict.fromkeys([*(name for name, _ in view.planned_shapes), *(run.rung for run in view.runs)])
    status = {run.rung: run.status for run in view.runs}
    gone = [f"{name} ({status.get(name, 'not started')})" for name in names if name not in done]
    if not gone:
        return ""
    return f"{len(gone)} of our {len(names)} sizes {'has' if len(gone) == 1 else 'have'} no row: {listed(gone)}."
