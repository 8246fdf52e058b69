"""The figures of a report, each a function from a lab to a matplotlib figure, or to the reason why there is none."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.predict import loss_band
from homelab_scaling.fit.result import Draws, FitReport, ScalingFit
from homelab_scaling.fit.slices import frontier, levels
from homelab_scaling.fit.words import brief, short
from homelab_scaling.report.collect import Curve, LabView
from homelab_scaling.report.style import (
    DARK,
    DPI,
    LIGHT,
    Theme,
    label_lines,
    log_axis,
    ordered_colours,
    themed,
)
from homelab_scaling.runs import Row

SIZE = "Model size N (parameters)"
TOKENS = "Training tokens D"
COMPUTE = "Training compute C (FLOPs)"
LOSS = "Held-out loss (nats per token)"
WARM_UP_HIDDEN = 0.04
"""Share of the steps whose steep start is cut off at the top of the loss axis."""

Draw = Callable[[Any, LabView, Theme], Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A figure that a report can have."""

    draw: Draw
    """Its name is the figure's file name."""
    title: str
    caption: str
    """How to read it."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn figure in both schemes."""

    name: str
    """File name without .png."""
    title: str
    caption: str
    light_png: bytes
    dark_png: bytes


@dataclass(frozen=True, kw_only=True)
class NoPicture:
    """Why a figure is missing, in a sentence."""

    name: str
    title: str
    reason: str


class Nothing(Exception):
    """A figure has nothing to show; the text says why."""


def draw_all(view: LabView) -> list[Picture | NoPicture]:
    """Every figure of the report, drawn in both schemes, or the reason why it is missing."""
    return [_draw(kind, view) for kind in FIGURES]


def _draw(kind: Kind, view: LabView) -> Picture | NoPicture:
    name, pngs = kind.draw.__name__, []
    for theme in (LIGHT, DARK):
        with themed(theme) as plt:
            try:
                figure = kind.draw(plt, view, theme)
            except Nothing as reason:
                return NoPicture(name=name, title=kind.title, reason=str(reason))
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.12)
            pngs.append(buffer.getvalue())
    return Picture(name=name, title=kind.title, caption=kind.caption, light_png=pngs[0], dark_png=pngs[1])


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
            axes.errorbar(row.n_steps, row.loss_nats, yerr=_twice(row.loss_se_nats), **_dot(colour, theme))
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


def _twice(se: float | None) -> float | None:
    return None if se is None else 2 * se


def _dot(colour: Any, theme: Theme, size: float = 6.5) -> dict[str, Any]:
    return {
        "fmt": "o",
        "ms": size,
        "color": colour,
        "mec": theme.background,
        "mew": 1.0,
        "elinewidth": 1.1,
        "zorder": 5,
    }


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
    flops, losses = _columns(view.rows)[2:]
    for row in view.rows:
        axes.errorbar(row.flops, row.loss_nats, yerr=_twice(row.loss_se_nats), **_dot(colours[row.n_params], theme))
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
    drawn = _draws(report, fit)
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
    n, d, _flops, losses = _columns(view.rows)
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
            axes.errorbar(n[i], losses[i], yerr=_twice(view.rows[i].loss_se_nats), **_dot(colour, theme))
        fit = _fit_of_level(view.fit, "power-n", "n_tokens", float(d[group[0]]), view.rows)
        drawn = _draws(view.fit, fit)
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
    _log_log(axes, reach, losses, extra=[label[1] for label in labels])
    _key(axes, theme, "power law at this D alone, with the 95 % band of the largest D", view.fit)
    axes.set_xlabel(SIZE)
    axes.set_ylabel(LOSS)
    axes.set_title("Loss against model size at each number of tokens")
    label_lines(axes, labels)
    return figure


def loss_against_tokens(plt: Any, view: LabView, theme: Theme) -> Any:
    """Loss against D for each rung, with each rung's power law."""
    n, d, _flops, losses = _columns(view.rows)
    if len(levels(d)) < 2:
        raise Nothing("fewer than two token counts have finished, so nothing can be said about data")
    colours = ordered_colours([run.n_params for run in view.runs], theme)
    figure, axes = plt.subplots(figsize=(8.4, 4.9))
    reach = (float(d.min()) / 1.15, float(d.max()) * 1.15)
    labels = []
    for group in levels(n):
        size = int(n[group[0]])
        for i in group:
            axes.errorbar(d[i], losses[i], yerr=_twice(view.rows[i].loss_se_nats), **_dot(colours[size], theme))
        last = group[int(np.argmax(d[group]))]
        right = (float(d[last]), float(losses[last]))
        fit = _fit_of_level(view.fit, "power-d", "n_params", float(size), view.rows)
        drawn = _draws(view.fit, fit)
        if fit is not None and drawn is not None:
            x = np.geomspace(float(d[group].min()) / 1.15, float(d[group].max()) * 1.15, 60)
            line, _low, _high = loss_band(fit, drawn, {"n_tokens": x})
            axes.plot(x, line, color=colours[size], lw=1.5, zorder=3)
            right = (float(x[-1]), float(line[-1]))
        labels.append((*right, view.rows[int(last)].rung, colours[size]))
        x = np.geomspace(*reach, 60)
        _joint_line(axes, view.fit, {"n_params": np.full_like(x, size), "n_tokens": x}, x, colours[size])
    _log_log(axes, reach, losses, extra=[label[1] for label in labels])
    _key(axes, theme, "power law of this rung alone", view.fit)
    axes.set_xlabel(TOKENS)
    axes.set_ylabel(LOSS)
    axes.set_title("Loss against tokens for each rung")
    label_lines(axes, labels)
    return figure


def residuals(plt: Any, view: LabView, theme: Theme) -> Any:
    """What L(N, D) leaves unexplained, against N and against D."""
    fit = view.fit.get("chinchilla") if view.fit else None
    drawn = _draws(view.fit, fit)
    if fit is None or drawn is None or fit.sigma_log is None:
        reason = "no L(N, D) has been fitted" if fit is None else fit.status
        raise Nothing(f"{reason}, so there are no residuals")
    n, d, _flops, losses = _columns(view.rows)
    predicted = get_law(fit.law).loss(drawn.point, {"n_params": n, "n_tokens": d})
    off = 100 * np.log(losses / predicted)
    by_size = ordered_colours([run.n_params for run in view.runs], theme)
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.0), sharey=True, constrained_layout=True)
    for axes, x, other, label in zip(panels, (n, d), (d, n), (SIZE, TOKENS), strict=True):
        rank = np.searchsorted(np.unique(other), other) - (len(np.unique(other)) - 1) / 2
        beside = x * (x.max() / x.min()) ** (0.011 * rank) if x.max() > x.min() else x  # side by side, not on top
        axes.axhspan(-200 * fit.sigma_log, 200 * fit.sigma_log, color=theme.faint, alpha=0.13, lw=0)
        axes.axhline(0, color=theme.faint, lw=1)
        for i, row in enumerate(view.rows):
            se = None if row.loss_se_nats is None else 200 * row.loss_se_nats / row.loss_nats
            axes.errorbar(beside[i], off[i], yerr=se, **_dot(by_size[row.n_params], theme))
        low, high = float(x.min()) / 1.3, float(x.max()) * 1.3
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        log_axis(axes.xaxis, low, high, form="count")
        axes.set_xlabel(label)
    panels[0].set_ylabel("Measured above fitted loss (%)")
    figure.suptitle("Residuals of L(N, D)", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


# ---------------------------------------------------------------------------------------------------------------- parts


def _columns(rows: Sequence[Row]) -> tuple[Any, Any, Any, Any]:
    """N, D, C and loss of the rows."""
    if not rows:
        raise Nothing("no run has finished a row yet")
    names = ("n_params", "n_tokens", "flops", "loss_nats")
    n, d, flops, losses = (np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names)
    return n, d, flops, losses


def _log_log(axes: Any, reach: tuple[float, float], losses: Any, extra: Sequence[float] = ()) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    bottom, top = min(*losses, *extra) * 0.97, max(*losses, *extra) * 1.03
    axes.set_xlim(*reach)
    axes.set_ylim(bottom, top)
    log_axis(axes.xaxis, *reach, form="count")
    log_axis(axes.yaxis, bottom, top, form="plain")


def _joint_line(axes: Any, report: FitReport | None, columns: dict[str, Any], x: Any, colour: Any) -> None:
    """L(N, D) along a line through the table."""
    fit = report.get("chinchilla") if report and report.count == "total" else None
    drawn = _draws(report, fit)
    if fit is not None and drawn is not None:
        axes.plot(x, loss_band(fit, drawn, columns)[0], color=colour, lw=1.1, ls=(0, (4, 2.5)), alpha=0.8, zorder=2)


def _key(axes: Any, theme: Theme, solid: str, report: FitReport | None) -> None:
    """What solid and dashed lines are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=theme.faint, lw=1.5, label=solid)]
    if report and report.count == "total" and _draws(report, report.get("chinchilla")):
        handles.append(Line2D([], [], color=theme.faint, lw=1.1, ls=(0, (4, 2.5)), label="L(N, D) fitted to all rows"))
    axes.legend(handles=handles, loc="lower left", borderaxespad=0.8)


def _draws(report: FitReport | None, fit: ScalingFit | None) -> Draws | None:
    if report is None or fit is None:
        return None
    return report.draws.get(fit.draws_file or "")


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


FIGURES: tuple[Kind, ...] = (
    Kind(
        draw=loss_against_size,
        title="Loss against model size",
        caption="Each colour is one number of training tokens. Dots are finished rows with two standard errors of "
        "the held-out text (often smaller than the dot); straight solid lines are power laws at that D "
        "alone, the shaded band is where the law at the largest D lies with 95 % confidence. Dots leaving "
        "the line in one direction mean the power law bends; a dot far off alone means a rung trained "
        "badly.",
    ),
    Kind(
        draw=loss_against_compute,
        title="Loss against compute",
        caption="Thin lines are the held-out loss on the way, dots are finished rows, ringed where no cheaper row "
        "does better: that is the frontier. The dashed line is its power law with the 95 % band; below it "
        "there is nothing to be had on this machine with this recipe.",
    ),
    Kind(
        draw=loss_against_tokens,
        title="Loss against tokens",
        caption="Each colour is one rung. Solid lines are power laws through that rung's rows alone; where they "
        "flatten towards the right, the model is too small to use more text.",
    ),
    Kind(
        draw=residuals,
        title="Residuals of L(N, D)",
        caption="How far each row lies above (+) or below (-) the fitted L(N, D), in percent of the loss; dots of "
        "equal N or D are drawn side by side. The shaded band is two residual standard deviations. Dots "
        "should scatter around zero without a slope or a bend. The bars are two standard errors of the "
        "held-out text, which all rows share.",
    ),
    Kind(
        draw=loss_against_steps,
        title="Loss against steps",
        caption="Training loss of each run, smoothed (raw behind it). Thick lines are trunks at constant learning "
        "rate, thin ones the decays that branch off them; a dot is the held-out loss where a decay ended.",
    ),
)
