"""One look for every figure: colours ordered by size, thin grids, labels at the lines, a light and a dark theme."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from homelab_scaling.fit.words import short


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a page's scheme."""

    name: str
    background: str
    text: str
    faint: str
    grid: str
    ramp: tuple[float, float]
    """Part of the viridis scale that has contrast on this background."""


LIGHT = Theme(name="light", background="#ffffff", text="#1c2330", faint="#5b6575", grid="#e3e7ee", ramp=(0.0, 0.80))
DARK = Theme(name="dark", background="#161b23", text="#e6eaf0", faint="#9aa5b5", grid="#2b333f", ramp=(0.42, 1.0))

DPI = 144
Form = Literal["count", "power", "plain"]
"""How ticks are written: 3M, 3x10^6 or 3."""


@contextmanager
def themed(theme: Theme) -> Iterator[Any]:
    """pyplot with our settings, on the Agg canvas, restored afterwards."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "font.size": 10.5,
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "legend.facecolor": theme.background,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.8,
        "legend.fontsize": 9.5,
        "lines.linewidth": 1.6,
        "figure.dpi": DPI,
        "font.family": "DejaVu Sans",
        "path.simplify": True,
    }
    with mpl.rc_context(settings):
        yield plt
        plt.close("all")


def ordered_colours(keys: Sequence[float], theme: Theme, scale: str = "viridis") -> dict[float, Any]:
    """A colour per distinct value, dark to bright with its rank."""
    import matplotlib as mpl

    distinct = sorted(set(keys))
    low, high = theme.ramp
    span = max(1, len(distinct) - 1)
    return {key: mpl.colormaps[scale](low + (high - low) * rank / span) for rank, key in enumerate(distinct)}


def log_axis(axis: Any, low: float, high: float, *, form: Form) -> None:
    """A log axis whose ticks are numbers people read, however short its range."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    ticks = nice_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, form)))


def _tick(value: float, form: Form) -> str:
    if form == "count" and value < 1e15:
        return _trim(short(value))
    if form == "plain":
        return f"{value:.10g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if float(mantissa) == 1 else f"${float(mantissa):g}\\times{power}$"


def _trim(text: str) -> str:
    """1.50M to 1.5M, 3.00M to 3M, 100k as it is."""
    return re.sub(r"\.?0+(?=[kMBT]?$)", "", text) if "." in text else text


def nice_ticks(low: float, high: float, wanted: int = 7) -> list[float]:
    """At most `wanted` round values of a log axis between low and high, at least two."""
    decades = math.log10(high / low)
    steps: list[tuple[float, ...]]
    if decades > 0.9:
        steps = [(1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)]
        for mantissas in steps:
            ticks = _powers(low, high, mantissas)
            if len(ticks) <= wanted:
                return ticks if len(ticks) >= 2 else [low, high]
        return _powers(low, high, (1,))[:: math.ceil(decades / wanted)]
    raw = (high - low) / (wanted - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(i * step, 12) for i in range(first, int(high / step + 1e-9) + 1)]
    return ticks if len(ticks) >= 2 else [low, high]


def _powers(low: float, high: float, mantissas: tuple[float, ...]) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in mantissas]
    return [t for t in ticks if low * 0.999 <= t <= high * 1.001]


def label_lines(axes: Any, labels: Sequence[tuple[float, float, str, Any]], *, gap_points: float = 12.5) -> None:
    """Writes (x, y, text, colour) labels right of their points, moved apart vertically where they would overlap."""
    from matplotlib.patheffects import withStroke

    if not labels:
        return
    figure = axes.figure
    axes.autoscale_view()  # settles pending autoscaling, so that transData is final
    points = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    order = sorted(range(len(labels)), key=lambda i: points[i][1])
    gap = gap_points * figure.dpi / 72
    at = spread([points[i][1] for i in order], gap)
    for place, index in zip(at, order, strict=True):
        x, y, text, colour = labels[index]
        shift = (place - points[index][1]) * 72 / figure.dpi
        axes.annotate(
            text,
            (x, y),
            xytext=(8, shift),
            textcoords="offset points",
            va="center",
            ha="left",
            color=colour,
            fontsize=9.5,
            annotation_clip=False,
            zorder=8,
            path_effects=[withStroke(linewidth=3, foreground=axes.get_facecolor())],
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Ascending `values` moved as little as possible so that neighbours are `gap` apart."""
    groups: list[tuple[float, int]] = []  # (mean centre, size) of runs of touching labels
    for value in values:
        groups.append((value, 1))
        while len(groups) > 1 and _top(groups[-2], gap) > _bottom(groups[-1], gap):
            (c2, n2), (c1, n1) = groups.pop(), groups.pop()
            groups.append(((c1 * n1 + c2 * n2) / (n1 + n2), n1 + n2))
    return [centre + gap * (i - (n - 1) / 2) for centre, n in groups for i in range(n)]


def _top(group: tuple[float, int], gap: float) -> float:
    return group[0] + gap * group[1] / 2


def _bottom(group: tuple[float, int], gap: float) -> float:
    return group[0] - gap * group[1] / 2
