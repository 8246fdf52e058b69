"""The figure of a ladder of equal steps: held-out loss on the way, against steps and against compute."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from homelab_scaling.report.collect import LabView, RunView
from homelab_scaling.report.equal_steps import Way, equal_steps, model_slopes, signed, way_of
from homelab_scaling.report.parts import COMPUTE, LOSS, Nothing, dot, twice
from homelab_scaling.report.style import Theme, label_lines, log_axis, nice_ticks, ordered_colours

PUBLISHED = "#d1495b"


def equal_steps_curves(plt: Any, view: LabView, theme: Theme) -> Any:
    """Left: held-out loss against steps. Right: against each model's compute in log-log, with its slope."""
    n_steps = equal_steps(view)
    if n_steps is None:
        raise Nothing("")
    ways = [(run, way) for run in view.runs if (way := way_of(run)) is not None]
    if not ways:
        raise Nothing("no run has measured enough of its validation curve yet")
    slopes = {one.rung: signed(one.value) for one in model_slopes(view)}
    colours = ordered_colours([run.n_params for run in view.runs], theme)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.5), constrained_layout=True)
    ends: dict[str, tuple[float, float, str, Any]] = {}
    for run, way in ways:
        name = None if run.rung in ends else f"{run.rung}: slope {slopes[run.rung]}"  # one label for all its seeds
        end = _draw(left, right, run, way, colour=colours[run.n_params], theme=theme, label=name)
        ends.setdefault(run.rung, (*end, run.rung, colours[run.n_params]))
    rows = [row for run, _ in ways for row in run.rows]
    flops = np.concatenate([*(way.flops for _, way in ways), [row.flops for row in rows]])
    losses = np.concatenate([*(way.losses for _, way in ways), [row.loss_nats for row in rows]])
    _published(right, view, ways)
    left.set_xlim(0, 1.02 * n_steps)
    left.margins(y=0.06)
    left.set_xlabel("Optimizer step")
    left.set_ylabel(LOSS)
    left.set_title("Loss against steps")
    _log_log(right, flops, losses)
    label_lines(left, list(ends.values()))
    return figure


def _draw(
    left: Any, right: Any, run: RunView, way: Way, *, colour: Any, theme: Theme, label: str | None
) -> tuple[float, float]:
    """One run on both sides; where it ends on the left."""
    assert run.spec is not None
    steps = way.tokens / run.spec.science.batch_tokens_global
    dots = {"ms": 5, "mec": theme.background, "mew": 0.8, "color": colour}
    left.plot(steps, way.losses, "o-", lw=1.3, **dots)
    right.plot(way.flops, way.losses, "o", zorder=4, **dots)
    x = np.log(way.flops)
    right.plot(
        way.flops,
        np.exp(np.log(way.losses).mean() + way.slope() * (x - x.mean())),
        color=colour,
        lw=1.3,
        label=label,
    )
    end = (float(steps[-1]), float(way.losses[-1]))
    for row in run.rows:
        ringed = {"yerr": twice(row.loss_se_nats), **dot(colour, theme, 7.5), "mec": theme.text}
        left.errorbar(row.n_steps, row.loss_nats, **ringed)
        right.errorbar(row.flops, row.loss_nats, **ringed)
        end = (float(row.n_steps), row.loss_nats)
    return end


def _log_log(axes: Any, flops: Any, losses: Any) -> None:
    from matplotlib.ticker import FixedLocator

    low, high = float(flops.min()) / 1.4, float(flops.max()) * 1.4
    bottom, top = float(losses.min()) * 0.93, float(losses.max()) * 1.03
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, top)
    log_axis(axes.xaxis, low, high, form="power")
    axes.xaxis.set_major_locator(FixedLocator(nice_ticks(low, high, wanted=4)))  # half a page is narrow
    log_axis(axes.yaxis, bottom, top, form="plain")
    axes.set_xlabel(COMPUTE)
    axes.set_title("Loss against compute")
    axes.legend(loc="lower left", fontsize=8.5, borderaxespad=0.4)


def _published(axes: Any, view: LabView, ways: Sequence[tuple[RunView, Way]]) -> None:
    """The published slopes through the middle of the model they are of, else of the one that comes nearest."""
    for slope in (figure for figure in view.reference.figures if figure.of == "slope_c") if view.reference else ():
        named = [way for run, way in ways if run.rung == slope.rung]
        if slope.rung is not None and not named:
            continue
        way = named[0] if named else min((w for _, w in ways), key=lambda w: abs(w.slope() - slope.value))
        x = np.log(way.flops[[0, -1]]) + np.array([-0.25, 0.25])
        y = np.log(way.losses).mean() + slope.value * (x - np.log(way.flops).mean())
        whose = f" ({slope.rung})" if slope.rung else ""
        label = f"published: {signed(slope.value)}{whose}"
        axes.plot(np.exp(x), np.exp(y), color=PUBLISHED, lw=1.2, ls=(0, (5, 3)), zorder=5, label=label)
