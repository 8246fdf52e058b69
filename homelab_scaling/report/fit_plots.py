"""Figures of the fits: residuals, draws of the exponents, predictions of what was held out."""

from typing import Any

import numpy as np

from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.onlaw import JointLaw
from homelab_scaling.fit.reconcile import CHINCHILLA_A, KAPLAN_A
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.slices import Table
from homelab_scaling.fit.words import brief, short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.parts import SIZE, TOKENS, Nothing, dot, drawn_of
from homelab_scaling.report.style import Theme, label_lines, log_axis, ordered_colours
from homelab_scaling.report.words import COUNTS

MAX_BUDGETS = 5
SHARED_SIZES = 2
MIN_APART = 1.5
"""Factor between budgets that are read between rows."""
SHOWN_DRAWS = 1200
MARKS = {"hoffmann-2022": ("D", "Hoffmann 2022"), "besiroglu-2024": ("s", "Besiroglu 2024")}
"""Published laws drawn beside the draws: marker and label."""
OURS, THEIRS = "#2f8f9d", "#d1495b"


def residuals(plt: Any, view: LabView, theme: Theme) -> Any:
    """What L(N, D) leaves unexplained, against N and against D."""
    joint, table = _joint_and_table(view, "there are no residuals")
    n, d = table.columns["n_params"], table.columns["n_tokens"]
    off = 100 * (np.log(table.losses) - _log_loss(joint, n, d))
    by_size = ordered_colours([float(x) for x in n], theme)
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.0), sharey=True, constrained_layout=True)
    for axes, x, other, label in zip(panels, (n, d), (d, n), (SIZE, TOKENS), strict=True):
        rank = np.searchsorted(np.unique(other), other) - (len(np.unique(other)) - 1) / 2
        beside = x * (x.max() / x.min()) ** (0.011 * rank) if x.max() > x.min() else x  # side by side, not on top
        axes.axhspan(-200 * joint.scatter, 200 * joint.scatter, color=theme.faint, alpha=0.13, lw=0)
        axes.axhline(0, color=theme.faint, lw=1)
        for i, point in enumerate(table.points):
            se = None if point.loss_se_nats is None else 200 * point.loss_se_nats / point.loss_nats
            axes.errorbar(beside[i], off[i], yerr=se, **dot(by_size[float(n[i])], theme))
        low, high = float(x.min()) / 1.3, float(x.max()) * 1.3
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        log_axis(axes.xaxis, low, high, form="count")
        axes.set_xlabel(label)
    panels[0].set_ylabel("Measured above fitted loss (%)")
    _above_panels(figure, f"Residuals of {joint.law.title}")
    return figure


# ------------------------------------------------------------------------------------------------------------ exponents


def alpha_and_beta(plt: Any, view: LabView, theme: Theme) -> Any:
    """Every resample's exponents of size and data, and the exponent of the best size that follows."""
    fit = view.fit.get("chinchilla") if view.fit else None
    drawn = drawn_of(view.fit, fit)
    if fit is None or drawn is None:
        reason = "no free L(N, D) was asked for" if fit is None else fit.status
        raise Nothing(f"{reason}, so there are no draws of alpha and beta")
    if len(drawn.values) < 2:
        raise Nothing("no resamples were drawn (--bootstrap 0)")
    at = (drawn.names.index("alpha"), drawn.names.index("beta"))
    alpha, beta = (drawn.values[:, i] for i in at)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(8.4, 4.2), constrained_layout=True, gridspec_kw={"width_ratios": (1.25, 1)}
    )
    some = np.linspace(0, len(alpha) - 1, min(SHOWN_DRAWS, len(alpha))).astype(int)
    left.plot(alpha[some], beta[some], "o", ms=2.6, color=OURS, alpha=0.28, mew=0, zorder=2, label="resamples")
    published = {name: (CATALOGUE[name].values["alpha"], CATALOGUE[name].values["beta"]) for name in MARKS}
    high = [_reach(draws, [p[i] for p in published.values()]) for i, draws in enumerate((alpha, beta))]
    left.plot([0, 9], [0, 9], color=theme.faint, lw=0.9, ls=(0, (4, 3)), zorder=1)
    for name, (a, b) in published.items():
        shape, text = MARKS[name]
        left.plot(a, b, shape, ms=7, color=THEIRS, mec=theme.background, zorder=5, label=text)
    left.plot(*drawn.point[list(at)], "o", ms=9, color=OURS, mec=theme.text, mew=1.2, zorder=6, label="this lab")
    left.set_xlim(0, high[0])
    left.set_ylim(0, high[1])
    left.set_xlabel("alpha: exponent of size")
    left.set_ylabel("beta: exponent of data")
    left.legend(loc="best", handletextpad=0.3)
    share = beta / (alpha + beta)
    right.hist(share[np.isfinite(share)], bins=np.linspace(0, 1, 51).tolist(), color=OURS, alpha=0.75, lw=0)
    _published_lines(right, theme)
    right.set_xlim(0, 1)
    right.set_yticks([])
    right.set_xlabel("a = beta / (alpha + beta)")
    _above_panels(figure, "Where the exponents could lie")
    return figure


def _reach(draws: Array, others: list[float]) -> float:
    """Upper end of an axis: most of the draws and every published value."""
    usual = float(np.quantile(draws[np.isfinite(draws)], 0.97))
    return 1.15 * max(min(usual, 3.0), *others)


def exponents(plt: Any, view: LabView, theme: Theme) -> Any:
    """The exponent a of the best size against compute by every road, with intervals."""
    groups = _roads(view)
    if not any(e.value is not None for _, rows in groups for _, e in rows):
        raise Nothing("no road leads to the exponent of the best size")
    height = 1.0 + 0.31 * sum(len(rows) + 1 for _, rows in groups)
    figure, axes = plt.subplots(figsize=(8.4, height))
    figure.subplots_adjust(left=0.3, right=0.98)
    y, ticks = 0.0, []
    colours = ordered_colours([float(i) for i in range(len(groups))], theme)
    for index, (title, rows) in enumerate(groups):
        ticks.append((y, title, True))
        for label, e in rows:
            y -= 1
            ticks.append((y, label, False))
            _whisker(axes, y, e, colours[float(index)], theme)
        y -= 1.25
    _published_lines(axes, theme)
    axes.set_ylim(y + 0.6, 0.7)
    axes.set_xlim(0, 1)
    axes.set_yticks([at for at, _, _ in ticks], [text for _, text, _ in ticks])
    for text, (_, _, bold) in zip(axes.get_yticklabels(), ticks, strict=True):
        text.set(fontweight="bold" if bold else "normal", color=theme.text, fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(r"a, with the best size growing as $N \propto C^a$")
    axes.set_title("How a growing budget should be split, by every road")
    return figure


def _roads(view: LabView) -> list[tuple[str, list[tuple[str, Estimate]]]]:
    groups: list[tuple[str, list[tuple[str, Estimate]]]] = []
    evidence = view.fit.evidence if view.fit else None
    if evidence is not None:
        named = {"1": "1, envelope", "2": "2, isoFLOP", "3-free": "3, L(N, D)", "3-tied": "3, alpha = beta"}
        groups.append(("Approaches", [(named[one.name], one.a) for one in evidence.approaches]))
        groups.append(("Counting N as", [(COUNTS[row.count], row.a) for row in evidence.counts]))
    found = view.study.reconciliation
    if found is not None:
        groups.append(("From Kaplan to Chinchilla", [(step.name, step.a) for step in found.steps]))
    return [(title, rows) for title, rows in groups if rows]


def _whisker(axes: Any, y: float, e: Estimate, colour: Any, theme: Theme) -> None:
    from matplotlib.patheffects import withStroke

    if e.ci95 is not None:
        axes.plot(e.ci95, (y, y), color=colour, lw=3, alpha=0.45, solid_capstyle="round", zorder=3)
    if e.value is not None:
        axes.plot(e.value, y, "o", ms=7, color=colour, mec=theme.background, zorder=4)
        axes.annotate(
            brief(e.value),
            (e.value, y),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            path_effects=[withStroke(linewidth=3, foreground=theme.background)],
        )
    else:
        text = "no number" if e.ci95 is None else "not pinned down"
        at = 0.02 if e.ci95 is None else e.ci95[0]
        shift = (0, 0) if e.ci95 is None else (0, 8)
        style = {"ha": "left", "va": "center", "fontsize": 8.5, "color": theme.faint}
        axes.annotate(text, (at, y), xytext=shift, textcoords="offset points", **style)


def _published_lines(axes: Any, theme: Theme) -> None:
    for value, name, side in ((KAPLAN_A, "Kaplan", "left"), (CHINCHILLA_A, "Hoffmann", "right")):
        axes.axvline(value, color=THEIRS, lw=1, ls=(0, (3, 2)), zorder=1)
        axes.annotate(
            f"{name} {value:.2f}",
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3 if side == "left" else -3, -3),
            textcoords="offset points",
            va="top",
            ha=side,
            fontsize=8.5,
            color=THEIRS,
        )


def on_the_law(plt: Any, view: LabView, theme: Theme) -> Any:
    """How far each unfinished run lies from what the law leads to expect, with the band of a single run."""
    shown = [check for check in view.study.checks if len(check.points) > 1]
    if not shown:
        raise Nothing("")
    runs = {run.run_id: run for run in view.runs}
    colours = ordered_colours([runs[check.run_id].n_params for check in shown], theme)
    figure, axes = plt.subplots(figsize=(8.4, 3.6))
    labels: list[tuple[float, float, str, Any]] = []
    for check in shown:
        colour = colours[runs[check.run_id].n_params]
        tokens = np.array([p.tokens for p in check.points])
        off = np.array([100 * (p.loss_nats / p.expected_nats - 1) for p in check.points])
        band = np.array([[100 * (end / p.expected_nats - 1) for end in p.band95] for p in check.points])
        axes.fill_between(tokens, band[:, 0], band[:, 1], color=colour, alpha=0.16, lw=0, zorder=1)
        axes.plot(tokens, off, "-", color=colour, lw=1.3, zorder=3)
        outside = np.array([p.side != 0 for p in check.points])
        axes.plot(tokens[~outside], off[~outside], "o", ms=5, color=colour, mec=theme.background, zorder=4)
        axes.plot(tokens[outside], off[outside], "X", ms=7, color=THEIRS, mec=theme.background, zorder=5)
        labels.append((float(tokens[-1]), float(off[-1]), runs[check.run_id].rung, colour))
    axes.axhline(0, color=theme.faint, lw=1, zorder=2)
    low, high = float(min(p.tokens for c in shown for p in c.points)), max(label[0] for label in labels)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.03, high * 1.03)
    log_axis(axes.xaxis, low, high, form="count")
    axes.set_xlabel(TOKENS)
    axes.set_ylabel("Loss above expected (%)")
    axes.set_title("Unfinished runs against the law")
    label_lines(axes, labels)
    return figure


# -------------------------------------------------------------------------------------------------------------- heldout


def predicted_against_measured(plt: Any, view: LabView, theme: Theme) -> Any:
    """What the law fitted to the smaller runs said of the larger ones, and what they did."""
    held, folds = view.study.held_out, view.study.folds
    if held is None or not folds:
        raise Nothing("nothing could be held out: too few sizes")
    colours = ordered_colours([fold.largest for fold in folds], theme)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 4.2), constrained_layout=True)
    every = np.concatenate([np.concatenate([f.measured, f.predicted]) for f in folds])
    low, high = float(every.min()) * 0.985, float(every.max()) * 1.015
    left.plot((low, high), (low, high), color=theme.faint, lw=1, zorder=1)
    right.axhline(0, color=theme.faint, lw=1, zorder=1)
    farthest = 1.0
    for fold in folds:
        style = {"ms": 6.5, "color": colours[fold.largest], "mec": theme.background, "mew": 0.9, "zorder": 4}
        left.plot(fold.measured, fold.predicted, "o", **style, label=f"N to {short(fold.largest)}")
        reach = fold.n_params / fold.largest
        right.plot(reach, 100 * np.log(fold.predicted / fold.measured), "o", **style)
        farthest = max(farthest, float(reach.max()))
    for axis in (left.xaxis, left.yaxis):
        log_axis(axis, low, high, form="plain")
    left.set_xscale("log")
    left.set_yscale("log")
    for axis in (left.xaxis, left.yaxis):
        log_axis(axis, low, high, form="plain")
    left.set_xlim(low, high)
    left.set_ylim(low, high)
    left.set_xlabel("Measured loss (nats per token)")
    left.set_ylabel("Predicted loss")
    left.legend(loc="upper left", title="fitted to", handletextpad=0.2)
    right.set_xscale("log")
    right.set_xlim(0.95, farthest * 1.15)
    log_axis(right.xaxis, 0.95, farthest * 1.15, form="plain")
    right.set_xlabel("Size over the largest fitted size")
    right.set_ylabel("Predicted above measured (%)")
    _above_panels(figure, f"Predicted against measured on what was held out: {get_law(held.law).title}")
    return figure


# ---------------------------------------------------------------------------------------------------------------- parts


def _joint_and_table(view: LabView, so: str) -> tuple[JointLaw, Table]:
    joint, table = view.study.joint, view.study.table
    if joint is None or table is None:
        fit = view.fit.get("chinchilla") if view.fit else None
        reason = "no L(N, D) has been fitted" if fit is None or fit.is_fitted else fit.status
        raise Nothing(f"{reason}, so {so}")
    return joint, table


def _log_loss(joint: JointLaw, n: Array, d: Array) -> Array:
    return np.asarray(np.log(joint.law.loss(joint.draws.point, {"n_params": n, "n_tokens": d})))


def _above_panels(figure: Any, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
