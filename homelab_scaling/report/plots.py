"""Figures of what was measured: loss against steps, compute, size and tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from homelab_scaling.fit.predict import loss_band
from homelab_scaling.fit.result import FitReport, ScalingFit
from homelab_scaling.fit.slices import frontier, levels
from homelab_scaling.fit.words import brief, short
from homelab_scaling.report.collect import Curve, LabView
from homelab_scaling.report.parts import COMPUTE, LOSS, SIZE, TOKENS, Nothing, columns_of, dot, drawn_of, log_log, twice
from homelab_scaling.report.style import Theme, label_lines, log_axis, ordered_colours
from homelab_scaling.runs import Row

WARM_UP_HIDDEN = 0.04
"""Share of the steps whose steep start is cut off at the top of the loss axis."""


# ------------------------------------------------------------------------------------------------------------- training


def loss_against_steps(plt: Any, view: LabView, theme: Theme) -> Any:
    """Training loss of every run: trunk solid, decays branching off, the held-out loss of each row at its end."""
    runs = [run for run in view.runs if any(curve.losses for curve in run.training)]
    if not runs:
        raise Nothing("no run has logged a training step yet")
    colours = ordered_colours([run.n_params for run in view.runs], theme)
    figure, axes = plt.subplots(figsize=(8.4, 4.9))
    labels, visible = [], []
    longest = max(curve.steps[-1] for run in runs for curve in run.training if curve.steps)
    for run in runs:
        colour = colours[run.n_params]
        width = max(3, max(len(curve.steps) for curve in run.training) // 24)
        for curve in run.training:
            if not curve.steps:
                continue
            x, y = _smooth(curve, width)
            axes.plot(curve.steps, curve.losses, color=colour, alpha=0.13, lw=0.6, zorder=1)
            axes.plot(x, y, color=colour, lw=1.1 if curve.is_decay else 1.7, zorder=3)
            visible.extend(y[x >= WARM_UP_HIDDEN * longest])
        for row in run.rows:
            axes.errorbar(row.n_steps, row.loss_nats, yerr=twice(row.loss_se_nats), **dot(colour, theme))
            visible.append(row.loss_nats)
        last = max((c for c in run.training if c.steps), key=lambda c: c.steps[-1])
        end = (last.steps[-1], float(_smooth(last, width)[1][-1]))
        if run.rows:
            end = (run.rows[-1].n_steps, run.rows[-1].loss_nats)
        text = run.rung + (f" seed {run.seed}" if len({r.seed for r in runs}) > 1 else "")
        text += "" if run.status == "finished" else f" ({run.status})"
        if run.status == "diverged":
            axes.plot(*end, marker="X", ms=9, color="#d1495b", mec=theme.background, zorder=6)
        labels.append((*end, text, colour))
    spread = max(visible) - min(visible)
    axes.set_ylim(min(visible) - 0.06 * spread, max(visible) + 0.06 * spread)
    reached = max([longest, *(row.n_steps for run in runs for row in run.rows)])
    axes.set_xlim(0, reached * 1.012)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Loss (nats per token)")
    axes.set_title("Loss against steps")
    label_lines(axes, labels)
    return figure


def _smooth(curve: Curve, width: int) -> tuple[Any, Any]:
    """Steps and a moving average over `width` points, narrower towards the ends so that the line reaches them."""
    losses = np.array(curve.losses)
    total = np.concatenate([[0.0], np.cumsum(losses)])
    at, last = np.arange(len(losses)), len(losses) - 1
    half = np.clip(np.minimum(at, last - at), width // 5, width // 2)
    low, high = np.maximum(at - half, 0), np.minimum(at + half, last) + 1
    return np.array(curve.steps, dtype=np.float64), (total[high] - total[low]) / (high - low)


# -------------------------------------------------------------------------------------------------------------- compute


def loss_against_compute(plt: Any, view: LabView, theme: Theme) -> Any:
    """Held-out loss on the way (thin) and after each decay (dots) against FLOPs, and the frontier's power law."""
    from matplotlib.patheffects import withStroke

    if not view.rows:
        raise Nothing("no run has finished a row yet, so there is no loss to set against compute")
    colours = ordered_colours([run.n_params for run in view.runs], theme)
    figure, axes = plt.subplots(figsize=(8.4, 5.2))
    for run in view.runs:
        for curve in run.validation:
            flops = np.array(curve.tokens) * run.flops_per_token
            axes.plot(flops, curve.losses, color=colours[run.n_params], lw=0.9, alpha=0.45, zorder=2)
    flops, losses = columns_of(view.rows)[2:]
    for row in view.rows:
        axes.errorbar(row.flops, row.loss_nats, yerr=twice(row.loss_se_nats), **dot(colours[row.n_params], theme))
    best = frontier(flops, losses)
    axes.plot(flops[best], losses[best], "o", ms=10.5, mfc="none", mec=theme.text, mew=1.1, zorder=6, label="frontier")
    low, high = float(flops.min()) / 1.6, float(flops.max()) * 1.6
    _frontier_line(axes, view.fit, (low, high), theme)
    for size in sorted({row.n_params for row in view.rows}):
        last = max((row for row in view.rows if row.n_params == size), key=lambda r: (r.flops, -r.loss_nats))
        axes.annotate(
            last.rung,
            (last.flops, last.loss_nats),
            xytext=(9, 7),
            textcoords="offset points",
            color=colours[size],
            fontsize=9.5,
            zorder=7,
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    bottom, top = float(losses.min()) * 0.97, float(losses.max()) * 1.06
    axes.set_ylim(bottom, top)
    log_axis(axes.xaxis, low, high, form="power")
    log_axis(axes.yaxis, bottom, top, form="plain")
    axes.set_xlabel(COMPUTE)
    axes.set_ylabel(LOSS)
    axes.set_title("Loss against compute")
    axes.legend(loc="lower left", borderaxespad=0.8)
    return figure


def _frontier_line(axes: Any, report: FitReport | None, reach: tuple[float, float], theme: Theme) -> None:
    fit = report.get("power-c") if report else None
    drawn = drawn_of(report, fit)
    if fit is None or drawn is None:
        return
    x = np.geomspace(*reach, 120)
    line, low, high = loss_band(fit, drawn, {"flops": x})
    if low is not None:
        axes.fill_between(x, low, high, color=theme.faint, alpha=0.16, lw=0, zorder=0)
    exponent = fit.derived["exponent"]
    slope = "slope not pinned down" if exponent.value is None else f"slope −{brief(exponent.value)}"
    if exponent.value is not None and exponent.ci95:
        slope += f" [−{brief(exponent.ci95[1])}, −{brief(exponent.ci95[0])}]"
    axes.plot(x, line, color=theme.text, lw=1.3, ls=(0, (5, 3)), zorder=4, label=f"power law, {slope}")


# ----------------------------------------------------------------------------------------------------------- size, data


def loss_against_size(plt: Any, view: LabView, theme: Theme) -> Any:
    """Loss against N at each D, with the power law and the band of the largest D."""
    n, d, _flops, losses = columns_of(view.rows)
    if len(levels(n)) < 2:
        raise Nothing("fewer than two sizes have finished, so nothing can be said about size")
    groups = levels(d)
    colours = ordered_colours([float(d[g[0]]) for g in groups], theme, scale="plasma")
    figure, axes = plt.subplots(figsize=(8.4, 4.9))
    reach = (float(n.min()) / 1.25, float(n.max()) * 1.25)
    labels = []
    for group in groups:
        colour = colours[float(d[group[0]])]
        for i in group:
            axes.errorbar(n[i], losses[i], yerr=twice(view.rows[i].loss_se_nats), **dot(colour, theme))
        fit = _fit_of_level(view.fit, "power-n", "n_tokens", float(d[group[0]]), view.rows)
        drawn = drawn_of(view.fit, fit)
        right = (float(n[group].max()), float(losses[group][int(np.argmax(n[group]))]))
        if fit is not None and drawn is not None:
            x = np.geomspace(*reach, 100)
            line, low, high = loss_band(fit, drawn, {"n_params": x})
            axes.plot(x, line, color=colour, lw=1.5, zorder=3)
            if low is not None and group is groups[-1]:
                axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0, zorder=1)
            right = (reach[1], float(line[-1]))
        labels.append((*right, f"D = {short(float(d[group[0]]))}", colour))
        x = np.geomspace(*reach, 100)
        _joint_line(axes, view.fit, {"n_params": x, "n_tokens": np.full_like(x, d[group].mean())}, x, colour)
    log_log(axes, reach, losses, extra=[label[1] for label in labels])
    _key(axes, theme, "power law at this D alone, with the 95 % band of the largest D", view.fit)
    axes.set_xlabel(SIZE)
    axes.set_ylabel(LOSS)
    axes.set_title("Loss against model size at each number of tokens")
    label_lines(axes, labels)
    return figure


def loss_against_tokens(plt: Any, view: LabView, theme: Theme) -> Any:
    """Loss against D for each rung, with each rung's power law."""
    n, d, _flops, losses = columns_of(view.rows)
    if len(levels(d)) < 2:
        raise Nothing("fewer than two token counts have finished, so nothing can be said about data")
    colours = ordered_colours([run.n_params for run in view.runs], theme)
    figure, axes = plt.subplots(figsize=(8.4, 4.9))
    reach = (float(d.min()) / 1.15, float(d.max()) * 1.15)
    labels = []
    for group in levels(n):
        size = int(n[group[0]])
        for i in group:
            axes.errorbar(d[i], losses[i], yerr=twice(view.rows[i].loss_se_nats), **dot(colours[size], theme))
        last = group[int(np.argmax(d[group]))]
        right = (float(d[last]), float(losses[last]))
        fit = _fit_of_level(view.fit, "power-d", "n_params", float(size), view.rows)
        drawn = drawn_of(view.fit, fit)
        if fit is not None and drawn is not None:
            x = np.geomspace(float(d[group].min()) / 1.15, float(d[group].max()) * 1.15, 60)
            line, _low, _high = loss_band(fit, drawn, {"n_tokens": x})
            axes.plot(x, line, color=colours[size], lw=1.5, zorder=3)
            right = (float(x[-1]), float(line[-1]))
        labels.append((*right, view.rows[int(last)].rung, colours[size]))
        x = np.geomspace(*reach, 60)
        _joint_line(axes, view.fit, {"n_params": np.full_like(x, size), "n_tokens": x}, x, colours[size])
    log_log(axes, reach, losses, extra=[label[1] for label in labels])
    _key(axes, theme, "power law of this rung alone", view.fit)
    axes.set_xlabel(TOKENS)
    axes.set_ylabel(LOSS)
    axes.set_title("Loss against tokens for each rung")
    label_lines(axes, labels)
    return figure


def _joint_line(axes: Any, report: FitReport | None, columns: dict[str, Any], x: Any, colour: Any) -> None:
    """L(N, D) along a line through the table."""
    fit = report.get("chinchilla") if report and report.count == "total" else None
    drawn = drawn_of(report, fit)
    if fit is not None and drawn is not None:
        axes.plot(x, loss_band(fit, drawn, columns)[0], color=colour, lw=1.1, ls=(0, (4, 2.5)), alpha=0.8, zorder=2)


def _key(axes: Any, theme: Theme, solid: str, report: FitReport | None) -> None:
    """What solid and dashed lines are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=theme.faint, lw=1.5, label=solid)]
    if report and report.count == "total" and drawn_of(report, report.get("chinchilla")):
        handles.append(Line2D([], [], color=theme.faint, lw=1.1, ls=(0, (4, 2.5)), label="L(N, D) fitted to all rows"))
    axes.legend(handles=handles, loc="lower left", borderaxespad=0.8)


def _fit_of_level(
    report: FitReport | None, law: str, fixed: str, value: float, rows: Sequence[Row]
) -> ScalingFit | None:
    """The fit whose rows lie at this value of the fixed variable; only meaningful when N counts all parameters."""
    if report is None or (fixed == "n_params" and report.count != "total"):
        return None
    letter, unit = ("D", "tokens") if fixed == "n_tokens" else ("N", "parameters")
    at = [getattr(row, fixed) for row in rows if abs(getattr(row, fixed) / value - 1) < 0.01]
    words = f"{letter} = {short(sum(at) / len(at))} {unit}"
    return next((fit for fit in report.fits if fit.law == law and fit.rows == words), None)
