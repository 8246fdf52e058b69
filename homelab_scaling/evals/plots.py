"""Scores against loss and against compute: two panels for each task, a dot with its interval for each model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.evals.compare import Evaluated
from homelab_scaling.evals.results import Part, Score
from homelab_scaling.fit.words import short

PICTURE = "scores.png"
FEWEST_MODELS = 2
MOST_TASKS = 8
HIGH, WIDE = 2.6, 9.6
"""Of a task's row [inches]."""
LEGEND = 0.35
"""Height of the legend above all rows [inches]."""
AXES = (("loss_nats", "Held-out loss (nats per token), falling"), ("flops", "Training compute C (FLOPs)"))


def why_not_drawn(models: Sequence[Evaluated]) -> str | None:
    """In words why there is nothing to draw; None if there is."""
    return None if drawn_tasks(models) else "fewer than two models with a known loss were asked the same task"


def drawn_tasks(models: Sequence[Evaluated]) -> list[str]:
    """Tasks that two models or more, whose loss and compute are known, have a score of."""
    known = [model for model in models if model.about.loss_nats is not None and model.about.flops is not None]
    names = dict.fromkeys(name for model in known for name in model.scores)
    return [name for name in names if sum(name in model.scores for model in known) >= FEWEST_MODELS][:MOST_TASKS]


def draw(plt: Any, models: Sequence[Evaluated], theme: Any) -> Any:
    """The figure, in a theme of report.style."""
    from matplotlib.ticker import PercentFormatter

    from homelab_scaling.report.style import ordered_colours

    tasks = drawn_tasks(models)
    known = [model for model in models if model.about.loss_nats is not None and model.about.flops is not None]
    colours = ordered_colours([model.about.n_params or 0 for model in known], theme)
    high = HIGH * len(tasks) + LEGEND
    figure, axes = plt.subplots(len(tasks), 2, figsize=(WIDE, high), squeeze=False, sharey="row")
    for row, task in enumerate(tasks):
        asked = [model for model in known if task in model.scores]
        for column, (axis, label) in enumerate(AXES):
            _panel(axes[row][column], task, asked, axis=axis, colours=colours, theme=theme)
            if row == len(tasks) - 1:
                axes[row][column].set_xlabel(label)
        axes[row][0].set_title(_title(asked[0].scores[task]))
        if asked[0].scores[task].kind == "share":
            axes[row][0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.tight_layout(rect=(0, 0, 1, 1 - LEGEND / high))
    _legend(figure, colours, theme)
    return figure


def _panel(
    axes: Any, task: str, models: Sequence[Evaluated], *, axis: str, colours: dict[float, Any], theme: Any
) -> None:
    from homelab_scaling.report.style import log_axis

    places = [float(getattr(model.about, axis)) for model in models]
    for run in dict.fromkeys(model.about.source for model in models):  # the rows of a run hang together
        rows = [(x, model) for x, model in zip(places, models, strict=True) if model.about.source == run]
        rows = sorted(rows, key=lambda row: row[0])
        line = [(x, whole.score) for x, model in rows if (whole := model.scores[task].whole).score is not None]
        colour = colours[rows[0][1].about.n_params or 0]
        axes.plot([x for x, _ in line], [score for _, score in line], color=colour, lw=1.1, zorder=3)
        for x, model in rows:
            _dot(axes, x, model.scores[task].whole, colour, theme)
    chance = models[0].scores[task].chance
    if chance is not None:
        axes.axhline(chance, color=theme.faint, lw=1.0, ls="--", zorder=2)
        axes.annotate(
            "chance",
            (0.99, chance),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=theme.faint,
            fontsize=8.5,
        )
    low, high = min(places), max(places)
    low, high = (low * 0.97, high * 1.03) if axis == "loss_nats" else (low / 1.5, high * 1.5)
    axes.set_xscale("log")
    axes.set_xlim((high, low) if axis == "loss_nats" else (low, high))
    log_axis(axes.xaxis, low, high, form="plain" if axis == "loss_nats" else "power")


def _dot(axes: Any, x: float, whole: Part, colour: Any, theme: Any) -> None:
    if whole.score is None:
        return
    if whole.low is not None and whole.high is not None:
        axes.plot([x, x], [whole.low, whole.high], color=colour, lw=1.1, zorder=4)
    axes.plot([x], [whole.score], "o", ms=6.5, color=colour, mec=theme.background, mew=1.0, zorder=5)


def _title(score: Score) -> str:
    better = "" if score.higher_is_better else ", lower is better"
    return f"{score.task} ({score.metric.replace('_', ' ')}{better})"


def _legend(figure: Any, colours: dict[float, Any], theme: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", ls="", color=colour, mec=theme.background, label=f"N = {short(size)}")
        for size, colour in colours.items()
        if size
    ]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="upper right", ncols=min(7, len(handles)), fontsize=9)


def write_picture(folder: Path, models: Sequence[Evaluated]) -> Path | None:
    """scores.png in a folder of evaluations; None, and no old one left, where there is nothing to draw."""
    from homelab_scaling.report.figures import to_png
    from homelab_scaling.report.style import LIGHT, themed

    path = folder / PICTURE
    if why_not_drawn(models) is not None:
        path.unlink(missing_ok=True)
        return None
    with themed(LIGHT) as plt:
        codec.write_bytes(path, to_png(draw(plt, models, LIGHT)))
    return path
