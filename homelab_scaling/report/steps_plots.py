"""The figure of a ladder of equal steps: held-out loss on the way, against steps and against compute."""

from typing import Any

import numpy as np

from homelab_scaling.report.collect import LabView
from homelab_scaling.report.equal_steps import equal_steps, model_slopes, signed, way_of
from homelab_scaling.report.parts import COMPUTE, LOSS, Nothing
from homelab_scaling.report.style import Theme, label_lines, log_axis, ordered_colours

PUBLISHED = "#d1495b"


def equal_steps_curves(plt: Any, view: LabView, theme: Theme) -> Any:
    """Left: held-out loss against steps. Right: against each model's compute in log-log, with its slope."""
    if equal_steps(view) is None:
        raise Nothing("")
    ways = [(run, way) for run in view.runs if (way := way_of(run)) is not None]
    if not ways:
        raise Nothing("no run has measured enough of its validation curve yet")
    slopes = {one.rung: one for one in model_slopes(view)}
    colours = ordered_colours([run.n_params for run in view.runs], theme)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.5), constrained_layout=True)
    labels, named = [], set()
    for run, way in ways:
        assert run.spec is not None
        colour = colours[run.n_params]
        steps = way.tokens / run.spec.science.batch_tokens_global
        dots = {"ms": 5, "mec": theme.background, "mew": 0.8, "color": colour}
        left.plot(steps, way.losses, "o-", lw=1.3, **dots)
        right.plot(way.flops, way.losses, "o", zorder=4, **dots)
        line = np.exp(np.log(way.losses).mean() + way.slope() * (np.log(way.flops) - np.log(way.flops).mean()))
        slope = slopes[run.rung]
        fresh = run.rung not in named
        named.add(run.rung)
        right.plot(
            way.flops, line, color=colour, lw=1.3, label=f"{run.rung}: slope {signed(slope.value)}" if fresh else None
        )
        if fresh:
            labels.append((float(steps[-1]), float(way.losses[-1]), run.rung, colour))
    losses = np.concatenate([way.losses for _, way in ways])
    flops = np.concatenate([way.flops for _, way in ways])
    _published(right, view, flops, losses)
    left.set_xlim(0, max(float(way.tokens[-1] / run.spec.science.batch_tokens_global) for run, way in ways if run.spec))
    left.margins(y=0.06)
    left.set_xlabel("Optimizer step")
    left.set_ylabel(LOSS)
    left.set_title("Loss against steps")
    right.set_xscale("log")
    right.set_yscale("log")
    low, high = float(flops.min()) / 1.4, float(flops.max()) * 1.4
    bottom, top = float(losses.min()) * 0.95, float(losses.max()) * 1.03
    right.set_xlim(low, high)
    right.set_ylim(bottom, top)
    log_axis(right.xaxis, low, high, form="power")
    log_axis(right.yaxis, bottom, top, form="plain")
    right.set_xlabel(COMPUTE)
    right.set_title("Loss against compute")
    right.legend(loc="lower left", fontsize=8.5, borderaxespad=0.4)
    label_lines(left, labels)
    return figure


def _published(axes: Any, view: LabView, flops: Any, losses: Any) -> None:
    """The published slopes, through the middle of our points: their heights were not published."""
    figures = view.reference.figures if view.reference else ()
    for slope in (figure for figure in figures if figure.of == "slope_c"):
        x = np.geomspace(float(flops.min()), float(flops.max()), 2)
        middle = np.exp(np.log(flops).mean())
        y = np.exp(np.log(losses).mean()) * (x / middle) ** slope.value
        whose = f" ({slope.rung})" if slope.rung else ""
        axes.plot(
            x, y, color=PUBLISHED, lw=1.1, ls=(0, (5, 3)), zorder=2, label=f"published: {signed(slope.value)}{whose}"
        )
