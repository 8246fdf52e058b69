"""Pieces of a text screen of known width: lines that give up their least important parts, bars, sparklines, boxes.

Everything is a `rich.text.Text` of one line. Nothing here cuts a number: a part that does not fit is left out whole.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"
ELLIPSIS = "…"
MIN_TAIL = 12
DROP = 2
_ASCII = str.maketrans(
    {
        **dict(zip("━╸─│┃╭╮╰╯", "=--|!++++", strict=True)),
        **dict(zip(SPARKS, "_.:-=+*#@"[:8], strict=True)),
        **dict(zip("±·–…≥", "~--~>", strict=True)),
        **{chr(0x2800 + bits): " .::+++##"[bits.bit_count()] for bits in range(256)},
    }
)


def to_ascii(line: Text) -> Text:
    """The same line for terminals that know no more; every sign becomes one sign, so widths stay."""
    line.plain = line.plain.translate(_ASCII).encode("ascii", "replace").decode()
    return line


@dataclass(frozen=True)
class Part:
    """A piece of a line.

    Attributes:
        keep: importance; the lowest gives way first.
        forms: from the longest to the shortest.
    """

    keep: int
    forms: tuple[Text, ...]


Piece = str | tuple[str, str]
"""Words, or words and their style."""


def part(keep: int, *forms: str | Text | Sequence[Piece]) -> Part:
    """A part from words, texts or pieces, longest form first."""
    return Part(keep, tuple(form if isinstance(form, Text) else Text.assemble(*_pieces(form)) for form in forms))


def _pieces(form: str | Sequence[Piece]) -> Sequence[Piece]:
    return [form] if isinstance(form, str) else form


def fit(parts: Sequence[Part | None], width: int, *, gap: str = "   ") -> Text:
    """The parts in one line of at most `width`: first each gives up words, then the least important ones go.

    The last one left is cut after a word where even it is too long.
    """
    shown = [p for p in parts if p is not None and p.forms[0].cell_len]
    form = [0] * len(shown)

    def length() -> int:
        return sum(p.forms[f].cell_len for p, f in zip(shown, form, strict=True)) + cell_len(gap) * (len(shown) - 1)

    def line() -> Text:
        return Text(gap).join(p.forms[f] for p, f in zip(shown, form, strict=True))

    while shown and length() > width:
        # Words of a part go before a part that matters a little less does, and after one that matters much less.
        prices = [p.keep if f + 1 < len(p.forms) else p.keep + DROP for p, f in zip(shown, form, strict=True)]
        i = min(range(len(shown)), key=lambda i: (prices[i], -i))
        if form[i] + 1 < len(shown[i].forms):
            form[i] += 1
        elif len(shown) > 1:
            del shown[i], form[i]
        else:
            return cut(line(), width)
    return line()


def cut(line: Text, width: int) -> Text:
    """At most `width` cells; what is too long ends at a word, with an ellipsis."""
    if line.cell_len <= width:
        return line
    if width < 1:
        return Text()
    plain = line.plain
    end = len(plain)
    while end > 0 and cell_len(plain[:end]) > width - 1:
        end -= 1
    if end < len(plain) and not plain[end].isspace():  # not inside a word or a number
        end = max(plain.rfind(" ", 0, end), 0)
    shown = line[:end] if end else Text()
    shown.rstrip()
    return shown.append(ELLIPSIS)


def padded(line: Text, width: int) -> Text:
    """Exactly `width` cells."""
    line = cut(line, width).copy()
    line.append(" " * (width - line.cell_len))
    return line


def wrapped(text: str, width: int, most: int, style: str = "") -> list[Text]:
    """Words over at most `most` lines; the last one is cut where there are more."""
    lines: list[str] = []
    for word in text.split():
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines[most - 1 :] = [" ".join(lines[most - 1 :])]
    return [cut(Text(line, style), width) for line in lines]


# --------------------------------------------------------------------------------------------------------- bars


def bar(frac: float, width: int, style: str) -> Text:
    """A bar of `width` cells, filled to half a cell."""
    halves = round(max(0.0, min(1.0, frac)) * 2 * width)
    full, half = divmod(halves, 2)
    drawn = Text("━" * full + "╸" * half, style)
    return drawn.append("─" * (width - full - half), "dim")


def spark(values: Sequence[float | None], low: float, high: float, style: Callable[[float], str]) -> Text:
    """One sign per value; a blank where there is none."""
    signs = []
    for value in values:
        share = 0.5 if value is None or high <= low else (value - low) / (high - low)
        signs.append((" ", "") if value is None else (SPARKS[max(0, min(7, int(share * 8)))], style(value)))
    return styled(signs)


def styled(signs: Iterable[tuple[str, str]]) -> Text:
    """One text from single signs; neighbours of one style share a span."""
    drawn = Text()
    for style, run in groupby(signs, key=lambda sign: sign[1]):
        drawn.append("".join(sign for sign, _ in run), style)
    return drawn


def binned(points: Sequence[tuple[float, float]], low: float, high: float, n: int) -> list[float | None]:
    """Means of y over `n` equal stretches of x; None where nothing lies."""
    cells: list[list[float]] = [[] for _ in range(n)]
    for x, y in points:
        if low <= x <= high:
            at = 0 if high <= low else int((x - low) / (high - low) * n)
            cells[min(n - 1, at)].append(y)
    return [sum(cell) / len(cell) if cell else None for cell in cells]


@dataclass(frozen=True)
class Series:
    """Points of a chart and their style; `joined` draws lines between neighbours."""

    points: Sequence[tuple[float, float]]
    style: str
    joined: bool = True


def chart(
    series: Sequence[Series], width: int, height: int, x: tuple[float, float], y: tuple[float, float]
) -> list[Text]:
    """Braille dots, 2 x 4 to a cell; later series lie over earlier ones, and what is outside `y` is left out."""
    dots: dict[tuple[int, int], tuple[int, str]] = {}

    def put(column: int, row: int, style: str) -> None:
        if 0 <= column < 2 * width and 0 <= row < 4 * height:
            cell = (column // 2, row // 4)
            bit = (0x01, 0x02, 0x04, 0x40)[row % 4] if column % 2 == 0 else (0x08, 0x10, 0x20, 0x80)[row % 4]
            dots[cell] = (dots.get(cell, (0, ""))[0] | bit, style)

    def place(point: tuple[float, float]) -> tuple[int, int]:
        across = (point[0] - x[0]) / (x[1] - x[0]) if x[1] > x[0] else 0.0
        up = (point[1] - y[0]) / (y[1] - y[0]) if y[1] > y[0] else 0.5
        return round(across * (2 * width - 1)), round((1 - up) * (4 * height - 1))

    for one in series:
        before: tuple[int, int] | None = None
        for point in one.points:
            if not (math.isfinite(point[0]) and y[0] <= point[1] <= y[1]):
                before = None
                continue
            at = place(point)
            if before is not None and one.joined and 0 <= at[0] - before[0] <= width:
                n = max(abs(at[0] - before[0]), abs(at[1] - before[1]), 1)
                for i in range(1, n):
                    put(
                        round(before[0] + (at[0] - before[0]) * i / n),
                        round(before[1] + (at[1] - before[1]) * i / n),
                        one.style,
                    )
            put(*at, one.style)
            before = at
    blank = (0, "")
    cells = [[dots.get((column, row), blank) for column in range(width)] for row in range(height)]
    return [styled((chr(0x2800 + bits) if bits else " ", style) for bits, style in row) for row in cells]


# -------------------------------------------------------------------------------------------------------- boxes


def boxed(lines: Sequence[Text], width: int, title: Text, right: Text | None = None, style: str = "dim") -> list[Text]:
    """The lines in a box of exactly `width`; the title gives way to nothing, what stands right of it does."""
    inner = width - 4
    head = fit([Part(1, (title,)), Part(0, (right,)) if right else None], width - 6, gap="  ")
    if right is not None and title.cell_len + right.cell_len + 4 <= width - 6:
        filling = Text("─" * (width - 8 - title.cell_len - right.cell_len), style)
        head = Text.assemble(title, " ", filling, " ", right)
    top = Text.assemble(("╭─ ", style), head, (" " + "─" * (width - 5 - head.cell_len) + "╮", style))
    body = [Text.assemble(("│ ", style), padded(line, inner), (" │", style)) for line in lines]
    return [top, *body, Text("╰" + "─" * (width - 2) + "╯", style)]


def ruled(lines: Sequence[Text], width: int, title: Text, right: Text | None = None, style: str = "dim") -> list[Text]:
    """The lines under a heading, without a box."""
    head = fit([Part(1, (title,)), Part(0, (right,)) if right else None], width, gap="  ")
    if right is None or title.cell_len + right.cell_len + 2 <= width:
        n = width - title.cell_len - 1 - (right.cell_len + 1 if right else 0)
        head = Text.assemble(title, " ", ("─" * max(0, n), style), " " if right else "", right or "")
    return [padded(head, width), *(padded(line, width) for line in lines)]


def beside(columns: Sequence[Sequence[Text]], widths: Sequence[int]) -> list[Text]:
    """Blocks next to one another; shorter ones are filled up with blanks."""
    height = max(len(column) for column in columns)
    return [
        Text().join(
            padded(column[row], width) if row < len(column) else Text(" " * width)
            for column, width in zip(columns, widths, strict=True)
        )
        for row in range(height)
    ]
