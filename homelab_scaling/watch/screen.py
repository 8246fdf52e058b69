"""A frame on a text screen of any size from 80 x 24 up (smaller ones get what fits).

Boxes ask for lines in the order of what matters (`WISHES`) until the height is used up; from `TWO_COLUMNS` on the cards
stand beside the run. Every line comes out exactly as wide as the screen; what does not fit is left out whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from homelab_scaling.watch import words
from homelab_scaling.watch.bars import beside, boxed, cut, padded, ruled, to_ascii
from homelab_scaling.watch.cardbox import (
    card_line,
    card_lines,
    card_title,
    dog_lines,
    dog_right,
    dog_title,
    rung_lines,
    rung_title,
)
from homelab_scaling.watch.frame import Frame
from homelab_scaling.watch.gantt import gantt, queue_line
from homelab_scaling.watch.runbox import loss_chart, run_lines, run_title

TWO_COLUMNS = 132
CARD_WIDTH = 38
"""A card's box is at least so wide."""
MIN_WIDTH = 20


@dataclass(frozen=True)
class Sizes:
    """Lines of each box; 0 leaves it out."""

    run: int = 3
    chart: int = 0
    card: int = 0
    """Of each card's box; 0 shows each card as one line of one box."""
    dog: int = 1
    rungs: int = 0
    slots: int = 0
    """Of the timetable, if there is one."""
    framed: bool = True
    spare: int = 0
    """Blank lines at the end of the column's last box."""


WISHES: tuple[tuple[str, int], ...] = (
    *(
        ("run", 5),
        ("slots", 9),
        ("rungs", 2),
        ("card", 3),
        ("run", 6),
        ("rungs", 3),
        ("dog", 2),
        ("card", 4),
        ("rungs", 4),
        ("run", 7),
    ),
    *(("card", 5), ("rungs", 5), ("dog", 3), ("chart", 5), ("rungs", 6), ("dog", 4), ("chart", 7), ("card", 6)),
    *(("rungs", 8), ("dog", 6), ("chart", 10), ("rungs", 14), ("run", 9), ("dog", 8), ("chart", 16)),
    *(("rungs", 200), ("chart", 24), ("card", 11), ("dog", 31)),
)
"""What a taller screen is used for, step by step."""
ENOUGH = Sizes(run=9, chart=8, card=5, dog=6, rungs=30, slots=9)
"""Without a height to fill."""


def draw(frame: Frame, width: int, height: int | None = None, *, ascii_only: bool = False) -> list[Text]:
    """The screen, line by line, each exactly `width` cells.

    Args:
        height: most lines; None takes what there is to say.
        ascii_only: for terminals without box-drawing signs.
    """
    width = max(MIN_WIDTH, width)
    lines = _two_columns(frame, width, height) if width >= TWO_COLUMNS else _one_column(frame, width, height)
    lines = [padded(line, width) for line in (lines if height is None else lines[:height])]
    return [to_ascii(line) for line in lines] if ascii_only else lines


class Column:
    """Boxes over one another; each is drawn once per size."""

    def __init__(self, frame: Frame, width: int, names: Sequence[str]) -> None:
        self.frame, self.width, self.names = frame, width, names
        self._drawn: dict[tuple[object, ...], list[Text]] = {}

    def lines(self, sizes: Sizes) -> list[Text]:
        return [line for name in self.names for line in self._box(name, sizes)]

    def height(self, sizes: Sizes) -> int:
        return sum(len(self._box(name, sizes)) for name in self.names)

    def grown(self, sizes: Sizes, height: int | None) -> Sizes:
        """The sizes after every wish that fits."""
        if height is None:
            return ENOUGH
        for name, wanted in WISHES:
            for target in _steps(sizes, name, wanted):
                before = self.height(sizes)
                if self.height(target) > height:
                    break
                sizes = target
                if self.height(sizes) == before:  # it has no more to say
                    break
        return sizes

    def _box(self, name: str, sizes: Sizes) -> list[Text]:
        asked = (sizes.run, sizes.chart) if name == "run" else (getattr(sizes, name),)
        key = (name, sizes.framed, *asked)
        if key not in self._drawn:
            self._drawn[key] = BOXES[name](self.frame, self.width, sizes)
        drawn = self._drawn[key]
        if sizes.spare and sizes.framed and name == self.names[-1]:
            last = drawn or self._box(self.names[-2], replace(sizes, spare=0))
            blank = boxed([Text()], self.width, Text())[1]
            return [*drawn[:-1], *[blank] * sizes.spare, last[-1]] if drawn else []
        return drawn


def _steps(sizes: Sizes, name: str, wanted: int) -> list[Sizes]:
    """A wish one line at a time, so that part of it may come true; a card's box and a chart come whole."""
    now = getattr(sizes, name)
    if name in ("card", "chart", "slots"):
        return [_with(sizes, name, wanted)] if wanted > now else []
    return [_with(sizes, name, n) for n in range(now + 1, wanted + 1)]


def _with(sizes: Sizes, name: str, n: int) -> Sizes:
    changed: dict[str, Any] = {name: n}
    return replace(sizes, **changed)


def _one_column(frame: Frame, width: int, height: int | None) -> list[Text]:
    notes = _notes(frame, width, 1)
    column = Column(frame, width, ("run", "slots", "card", "dog", "rungs"))
    room = None if height is None else height - len(notes)
    sizes = Sizes()
    if room is not None and column.height(sizes) > room:
        sizes = replace(sizes, framed=False)
        for name, n in (("run", 2), ("run", 1), ("dog", 0)):
            if column.height(sizes) > room:
                sizes = _with(sizes, name, n)
        return column.lines(sizes) + notes
    return column.lines(column.grown(sizes, room)) + notes


def _two_columns(frame: Frame, width: int, height: int | None) -> list[Text]:
    right = max(54, min(76, round(0.4 * width)))
    widths = (width - right, right)
    notes = _notes(frame, width, 1)
    room = None if height is None else height - len(notes)
    columns = [Column(frame, widths[0], ("run", "slots", "rungs")), Column(frame, widths[1], ("card", "dog"))]
    sizes = [column.grown(Sizes(), room) for column in columns]
    if room is None:
        tallest = max(column.height(own) for column, own in zip(columns, sizes, strict=True))
        sizes = [column.grown(own, tallest) for column, own in zip(columns, sizes, strict=True)]
        room = tallest
    filled = [
        column.lines(replace(own, spare=max(0, room - column.height(own))))
        for column, own in zip(columns, sizes, strict=True)
    ]
    return beside(filled, widths) + notes


# ---------------------------------------------------------------------------------------------------------- boxes


def _frame(lines: Sequence[Text], width: int, title: Text, sizes: Sizes, right: Text | None = None) -> list[Text]:
    return (boxed if sizes.framed else ruled)(lines, width, title, right)


def _inner(width: int, sizes: Sizes) -> int:
    return width - 4 if sizes.framed else width


def _run_box(frame: Frame, width: int, sizes: Sizes) -> list[Text]:
    inner = _inner(width, sizes)
    with_chart = sizes.chart > 0 and frame.run is not None and len(frame.run.curve) > 1
    lines = run_lines(frame, inner, with_spark=not with_chart, most=sizes.run)
    kept = sorted(sorted(range(len(lines)), key=lambda i: (lines[i].rank, i))[: sizes.run])
    shown = [lines[i].text for i in kept]
    if with_chart and frame.run is not None:
        shown += loss_chart(frame.run, inner, sizes.chart)
    now = words.clock(frame.t_s)
    right = Text.assemble((f"{frame.replay}  " if frame.replay else "", "yellow"), (now, "dim"))
    return _frame(shown, width, run_title(frame), sizes, right)


def _cards_box(frame: Frame, width: int, sizes: Sizes) -> list[Text]:
    cards = frame.cards
    if not cards:
        why = frame.watchdog.sensor_error
        said = (
            f"no card is known: {why}"
            if why
            else "no card is known: no watchdog has looked"
            if frame.watchdog.state == "none"
            else "no NVIDIA card here"
        )
        return _frame([cut(Text(said), _inner(width, sizes))], width, Text("cards", "bold"), sizes)
    if sizes.card == 0:
        lines = [card_line(card, _inner(width, sizes)) for card in cards]
        return _frame(lines, width, Text("cards", "bold"), sizes)
    per_row = max(1, min(len(cards), width // CARD_WIDTH))
    if len(cards) > per_row > 1:  # rows of equal length
        per_row = -(-len(cards) // -(-len(cards) // per_row))
    drawn: list[Text] = []
    for first in range(0, len(cards), per_row):
        row = cards[first : first + per_row]
        widths = [width // len(row) + (1 if i < width % len(row) else 0) for i in range(len(row))]
        blocks = []
        for card, own in zip(row, widths, strict=True):
            lines = card_lines(card, _inner(own, sizes), sizes.card)
            lines += [Text()] * (sizes.card - len(lines))
            style = (
                "dim"
                if card.level in ("ok", "warn") and card.state != "lost"
                else "red"
                if card.level == "stop"
                else "yellow"
            )
            blocks.append(
                boxed(lines, own, card_title(card, frame.watchdog), None, style)
                if sizes.framed
                else ruled(lines, own, card_title(card, frame.watchdog))
            )
        drawn += beside(blocks, widths)
    return drawn


def _dog_box(frame: Frame, width: int, sizes: Sizes) -> list[Text]:
    if not sizes.dog:
        return []
    lines = dog_lines(frame, _inner(width, sizes), sizes.dog)
    return _frame(lines, width, dog_title(frame.watchdog), sizes, dog_right(frame.watchdog))


def _slots_box(frame: Frame, width: int, sizes: Sizes) -> list[Text]:
    table, inner = frame.timetable, _inner(width, sizes)
    if not sizes.slots or table is None:
        return []
    lines = gantt(table, frame.t_s, inner) or [queue_line(table, inner)]
    waiting = sum(turn.state == "waiting" for turn in table.turns)
    title = Text.assemble(("slots", "bold"), f"  {len(table.slots)}, {waiting} waiting" if waiting else "")
    right = None if table.ends_at_s is None else Text(f"stops at {words.when(table.ends_at_s, frame.t_s)}", "yellow")
    return _frame(lines[: sizes.slots], width, title, sizes, right)


def _rungs_box(frame: Frame, width: int, sizes: Sizes) -> list[Text]:
    if not sizes.rungs or not frame.rungs:
        return []
    return _frame(rung_lines(frame, _inner(width, sizes), sizes.rungs), width, rung_title(frame), sizes)


BOXES: dict[str, Callable[[Frame, int, Sizes], list[Text]]] = {
    "run": _run_box,
    "slots": _slots_box,
    "card": _cards_box,
    "dog": _dog_box,
    "rungs": _rungs_box,
}


def _notes(frame: Frame, width: int, most: int) -> list[Text]:
    if not frame.notes:
        return []
    more = f" (and {len(frame.notes) - most} more)" if len(frame.notes) > most else ""
    return [cut(Text(f"! {note}{more}", "yellow"), width) for note in frame.notes[:most]]


# ---------------------------------------------------------------------------------------------------------- one line


def one_line(frame: Frame) -> str:
    """The frame in a sentence, for logs: one a minute where there is no terminal."""
    said = [words.clock(frame.t_s)]
    run = frame.run
    if run is None:
        said.append("no run" if not frame.rungs else f"{len(frame.rungs)} runs wait")
    else:
        said += [
            f"{run.run_id} {run.state}",
            f"step {words.count(run.update)}" if run.done_frac is None else f"{100 * run.done_frac:.1f} %",
        ]
        if run.loss_nats is not None:
            said.append(f"loss {words.loss(run.loss_nats)}")
        if run.held is not None:
            said.append(f"val {words.loss(run.held.loss_nats)}")
        if run.speed.tokens_per_s is not None and run.state != "finished":
            said.append(f"{words.whole(run.speed.tokens_per_s)} tok/s")
        if run.left_s is not None:
            said.append(f"{words.span(run.left_s)} left")
        if run.cost.kwh is not None:
            said.append(words.kwh(run.cost.kwh))
        if run.reason:
            said.append(run.reason)
    for card in frame.cards:
        name = f"GPU {card.index}" if card.index is not None else card.uuid[:12]
        heat = "temperature unknown" if card.temperature_c is None else f"{card.temperature_c:.0f} C"
        said.append(
            f"{name} {'lost' if card.state == 'lost' else heat}" + (f" {card.level}" if card.level != "ok" else "")
        )
    dog = frame.watchdog
    if dog.state == "silent":
        said.append(f"watchdog silent for {words.ago(dog.age_s or 0.0)}")
    elif dog.state in ("none", "direct") and frame.cards:
        said.append("no watchdog running")
    return "  ".join(said)
