"""Figures of the batch: noise scales against loss and tokens, speed against batch, the law of B_crit, the sweep."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.priors import OVERHEAD_FRAC
from homelab_scaling.fit.words import short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.noise import Noise, RungBatch
from homelab_scaling.report.parts import Nothing
from homelab_scaling.report.style import Theme, label_lines, log_axis, ordered_colours

BATCH = "Batch (tokens)"
SIMPLE = r"Noise scale $B_{simple}$ (tokens)"
LINES = ((0, (5, 3)), (0, (2, 2)), (0, (7, 2, 1.5, 2)), (0, (1, 1.6)), (0, (4, 1, 1, 1, 1, 1)))
"""One dash for each published rule."""


def noise_against_progress(plt: Any, view: LabView, theme: Theme) -> Any:
    """B_simple against loss and against tokens, rung by rung, beside the batch each rung was trained with."""
    rungs = [r for r in view.batches.rungs if r.noise]
    if not rungs:
        raise Nothing("")
    colours = ordered_colours([r.n_params for r in rungs], theme)
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 4.3), sharey=True, constrained_layout=True)
    with_loss = [p for r in rungs for p in r.noise if p.loss is not None]
    for axes, of_loss in zip(panels, (True, False), strict=True):
        for r in rungs:
            for points, style in _groups(r):
                _points(
                    axes, [p for p in points if p.loss is not None or not of_loss], of_loss, colours[r.n_params], style
                )
            axes.axhline(r.batch_tokens, color=colours[r.n_params], lw=1.1, ls=(0, (5, 3)), alpha=0.9, zorder=2)
            if not of_loss:
                _warm_up(axes, r, colours[r.n_params])
    bottom, top = _noise_reach(rungs)
    for axes in panels:
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.set_xscale("log")
    log_axis(panels[0].yaxis, bottom, top, form="count")
    losses = [p.loss for p in with_loss if p.loss is not None] or [1.0, 2.0]
    high, low = max(losses) * 1.02, min(losses) / 1.02
    panels[0].set_xlim(high, low)  # training runs to the right
    log_axis(panels[0].xaxis, low, high, form="plain")
    panels[0].set_xlabel("Training loss (nats per token), falling")
    panels[0].set_ylabel(SIMPLE)
    tokens = [p.tokens for r in rungs for p in r.noise]
    reach = (min(tokens) / 1.15, max([*tokens, *(r.n_tokens for r in rungs)]) * 1.05)
    panels[1].set_xlim(*reach)
    log_axis(panels[1].xaxis, *reach, form="count")
    panels[1].set_xlabel("Tokens trained")
    _legend_of_noise(figure, rungs, colours, theme)
    figure.suptitle("Noise scale on the way, and the batch", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _groups(r: RungBatch) -> list[tuple[Sequence[Noise], str]]:
    """Points by how they are drawn: windows of the trunk, of decays, probes."""
    inside = [p for run in r.runs for p in run.noise]
    return [
        ([p for p in inside if not p.is_decay], "trunk"),
        ([p for p in inside if p.is_decay], "decay"),
        (r.probe, "probe"),
    ]


def _points(axes: Any, points: Sequence[Noise], of_loss: bool, colour: Any, style: str) -> None:
    marker, filled = {"trunk": ("o", True), "decay": ("o", False), "probe": ("D", False)}[style]
    for known in (True, False):
        shown = [p for p in points if (p.b_simple is not None) == known]
        if not shown:
            continue
        x = [p.loss if of_loss else p.tokens for p in shown]
        y = np.array([p.shown for p in shown], dtype=np.float64)
        errors = None
        if known:
            ends = [p.ci95 or (p.b_simple, p.b_simple) for p in shown]
            low, high = np.array(ends, dtype=np.float64).T
            errors = np.array([np.maximum(y - low, 0), np.maximum(high - y, 0)])
        axes.errorbar(
            x,
            y,
            yerr=errors,
            fmt=marker if known else "^",
            ms=4.6,
            color=colour,
            mfc=colour if filled else "none",
            mec=colour,
            elinewidth=0.8,
            alpha=0.95,
            zorder=5,
        )


def _warm_up(axes: Any, r: RungBatch, colour: Any) -> None:
    """The batch as it grew, as steps."""
    run = next((run for run in r.runs if run.batches), None)
    if run is None:
        return
    x = [one.tokens for one in run.batches] + [max(r.n_tokens, run.batches[-1].tokens)]
    y = [one.batch_tokens for one in run.batches]
    axes.step([max(1, at) for at in x], [*y, y[-1]], where="post", color=colour, lw=1.8, zorder=3)


def _noise_reach(rungs: Sequence[RungBatch]) -> tuple[float, float]:
    values = [p.shown or 1.0 for r in rungs for p in r.noise]
    ends = [end for r in rungs for p in r.noise if p.ci95 for end in p.ci95]
    batches = [float(r.batch_tokens) for r in rungs] + [
        float(one.batch_tokens) for r in rungs for run in r.runs for one in run.batches
    ]
    low, high = min([*values, *batches]), max([*values, *batches])
    # An interval may reach far; it is cut rather than that the points are squeezed.
    return max(min([low, *ends]), low / 4) / 1.25, min(max([high, *ends]), high * 4) * 1.25


def _legend_of_noise(figure: Any, rungs: Sequence[RungBatch], colours: dict[float, Any], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    dots: dict[str, Any] = {"ls": "none", "ms": 5, "color": theme.faint}
    handles = [Line2D([], [], ls="none", marker="s", ms=7, color=colours[r.n_params], label=r.rung) for r in rungs]
    inside = [p for r in rungs for run in r.runs for p in run.noise]
    if any(not p.is_decay and p.b_simple is not None for p in inside):
        handles.append(Line2D([], [], marker="o", label="in the run", **dots))
    if any(p.is_decay and p.b_simple is not None for p in inside):
        handles.append(Line2D([], [], marker="o", mfc="none", label="in a decay", **dots))
    if any(r.probe for r in rungs):
        handles.append(Line2D([], [], marker="D", mfc="none", label="by a probe", **dots))
    if any(p.b_simple is None for r in rungs for p in r.noise):
        handles.append(Line2D([], [], marker="^", label="at least", **dots))
    handles.append(Line2D([], [], color=theme.faint, lw=1.1, ls=(0, (5, 3)), label="batch"))
    if any(run.batches for r in rungs for run in r.runs):
        handles.append(Line2D([], [], color=theme.faint, lw=1.8, label="warm-up"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), handletextpad=0.3)


# --------------------------------------------------------------------------------------------------------------- speed


def speed_against_batch(plt: Any, view: LabView, theme: Theme) -> Any:
    """Measured tokens per second against the batch, and what the trade-off table reckons with."""
    rungs = [r for r in view.batches.rungs if r.rates]
    if not rungs:
        raise Nothing("")
    colours = ordered_colours([r.n_params for r in rungs], theme)
    figure, axes = plt.subplots(figsize=(8.4, 4.6))
    labels, every = [], []
    for r in rungs:
        colour, context = colours[r.n_params], r.rates[0].shape.context_tokens
        rows = [
            (row.batch_tokens, row.tokens_per_s)
            for row in (r.advice.rows if r.advice else ())
            if row.tokens_per_s is not None and not row.rate_basis.startswith("measured")
        ]
        measured = [(rate.batch_seqs * context, rate.tokens_per_s) for rate in r.rates]
        if rows:
            x, y = zip(*rows, strict=True)
            axes.plot(x, y, color=colour, lw=1.3, zorder=3)
        axes.plot(*zip(*measured, strict=True), "o", ms=6, color=colour, mec=theme.background, mew=0.9, zorder=5)
        here = next((rate for batch, rate in [*measured, *rows] if batch == r.batch_tokens), None)
        if here is not None:
            axes.plot(r.batch_tokens, here, "o", ms=12, mfc="none", mec=colour, mew=1.2, zorder=6)
        end = max(rows or measured)
        labels.append((*end, r.rung, colour))
        every += [*rows, *measured]
    batches, rates = zip(*every, strict=True)
    axes.set_xscale("log")
    axes.set_yscale("log")
    reach = (min(batches) / 1.25, max(batches) * 1.25)
    heights = (min(rates) / 1.2, max(rates) * 1.2)
    axes.set_xlim(*reach)
    axes.set_ylim(*heights)
    log_axis(axes.xaxis, *reach, form="count")
    log_axis(axes.yaxis, *heights, form="count")
    axes.set_xlabel(BATCH)
    axes.set_ylabel("Tokens per second")
    axes.set_title("Speed against batch")
    label_lines(axes, labels)
    return figure


# ----------------------------------------------------------------------------------------------------------------- law


def critical_batch_law(plt: Any, view: LabView, theme: Theme) -> Any:
    """The batch of 20 % overhead of each measured rung against loss or tokens, its law, and the published ones."""
    law = view.batches.advice.law if view.batches.advice else None
    measured = [r for r in view.batches.rungs if r.advice is not None and r.advice.basis == "measured" and r.b_crit]
    of = law.of if law else "D"
    found = [(x, r) for r in measured if (x := _abscissa(r, of)) is not None]
    if len(found) < 2:
        raise Nothing("")
    found.sort(key=lambda pair: pair[0])
    colours = ordered_colours([r.n_params for _, r in found], theme)
    figure, axes = plt.subplots(figsize=(8.4, 4.9))
    low, high = found[0][0] / 1.12, found[-1][0] * 1.12
    tops: list[float] = []
    labels: list[tuple[float, float, str, Any]] = []
    for index, (name, points) in enumerate(_published(found).items()):
        axes.plot(*zip(*points, strict=True), color=theme.faint, lw=1.2, ls=LINES[index % len(LINES)], zorder=2)
        tops += [tokens for _, tokens in points]
        end = points[0] if of == "L" else points[-1]
        labels.append((*end, name.replace("B_crit", "$B_{crit}$"), theme.faint))
    if law is not None:
        grid = np.geomspace(low, high, 80)
        told = [law.predict(float(at)) for at in grid]
        band = OVERHEAD_FRAC * np.array([(e.value, e.low, e.high) for e in told])
        name = f"this ladder, {law.of}^{law.exponent.value:.2f}"
        axes.plot(grid, band[:, 0], color=theme.text, lw=1.5, zorder=4, label=name.replace("^", r"$^{") + "}$")
        axes.fill_between(grid, band[:, 1], band[:, 2], color=theme.text, alpha=0.1, lw=0, zorder=1)
    for x, r in found:
        assert r.b_crit is not None
        e = _scaled(r.b_crit, OVERHEAD_FRAC)
        bars = [[e.value - e.low], [e.high - e.value]]
        axes.errorbar(x, e.value, yerr=bars, fmt="o", ms=7, color=colours[r.n_params], mec=theme.background, zorder=6)
        axes.annotate(
            r.rung, (x, e.value), xytext=(7, -11), textcoords="offset points", color=colours[r.n_params], fontsize=9.5
        )
        tops += [e.low, e.high]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim((high, low) if of == "L" else (low, high))
    bottom, top = min(tops) / 1.5, max(tops) * 1.5
    axes.set_ylim(bottom, top)
    log_axis(axes.xaxis, low, high, form="plain" if of == "L" else "count")
    log_axis(axes.yaxis, bottom, top, form="count")
    axes.set_xlabel("Loss at the middle of the run (nats per token), falling" if of == "L" else "Training tokens D")
    axes.set_ylabel("Batch of 20 % more tokens (tokens)")
    axes.set_title("How the critical batch grows")
    if law is not None:
        axes.legend(loc="lower right")
    label_lines(axes, labels)
    return figure


def _abscissa(r: RungBatch, of: str) -> float | None:
    assert r.advice is not None
    if of == "D":
        return float(r.advice.n_tokens)
    return r.advice.measured.loss_nats if r.advice.measured else None


def _published(found: Sequence[tuple[float, RungBatch]]) -> dict[str, list[tuple[float, float]]]:
    """Each study's batch at the rungs, as (x, tokens), where it speaks of two or more."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for x, r in found:
        for prior in r.advice.priors if r.advice else ():
            lines.setdefault(prior.name, []).append((x, prior.tokens))
    return {name: points for name, points in lines.items() if len(points) > 1}


def _scaled(e: Estimate, by: float) -> Estimate:
    return Estimate(value=by * e.value, low=by * e.low, high=by * e.high)


# --------------------------------------------------------------------------------------------------------------- sweep


def steps_against_tokens(plt: Any, view: LabView, theme: Theme) -> Any:
    """What each batch of the sweep needed to the same loss, in steps and in tokens, on its hyperbola."""
    sweep = view.batches.advice.sweep if view.batches.advice else None
    if sweep is None:
        raise Nothing("")
    fit = sweep.trade_off
    steps = np.array([t.n_steps for t in sweep.best], dtype=np.float64)
    batches = np.array([t.batch_tokens for t in sweep.best], dtype=np.float64)
    colours = ordered_colours([float(b) for b in batches], theme, scale="plasma")
    figure, axes = plt.subplots(figsize=(8.4, 4.6))
    for trial in sweep.trials:
        if trial.n_steps is not None:
            at = (trial.n_steps, trial.n_steps * trial.batch_tokens)
            axes.plot(*at, "o", ms=3.6, color=theme.faint, alpha=0.6, zorder=3)
    line = np.geomspace(batches.min() / 4, batches.max() * 4, 200)
    curve = np.array([(fit.steps(float(b)), fit.examples(float(b))) for b in line])
    axes.plot(curve[:, 0], curve[:, 1], color=theme.text, lw=1.4, zorder=2)
    axes.axvspan(fit.s_min.low, fit.s_min.high, color=theme.faint, alpha=0.13, lw=0)
    axes.axhspan(fit.e_min.low, fit.e_min.high, color=theme.faint, alpha=0.13, lw=0)
    axes.axvline(fit.s_min.value, color=theme.faint, lw=1, ls=(0, (3, 2)))
    axes.axhline(fit.e_min.value, color=theme.faint, lw=1, ls=(0, (3, 2)))
    for batch, n in zip(batches, steps, strict=True):
        axes.plot(n, n * batch, "o", ms=7, color=colours[float(batch)], mec=theme.background, zorder=5)
        axes.annotate(
            f"{batch:,.0f}",
            (n, n * batch),
            xytext=(8, 5),
            textcoords="offset points",
            fontsize=9.5,
            color=colours[float(batch)],
        )
    knee = fit.b_crit.value
    axes.plot(fit.steps(knee), fit.examples(knee), "*", ms=13, color=theme.text, mec=theme.background, zorder=6)
    axes.annotate(
        rf"$B_{{crit}}$ {short(knee)}",
        (fit.steps(knee), fit.examples(knee)),
        xytext=(-8, -14),
        textcoords="offset points",
        ha="right",
    )
    tokens = steps * batches
    across = (min(float(steps.min()), fit.s_min.value) / 1.4, float(steps.max()) * 1.5)
    up = (min(float(tokens.min()), fit.e_min.value) / 1.4, float(tokens.max()) * 1.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*across)
    axes.set_ylim(*up)
    log_axis(axes.xaxis, *across, form="count")
    log_axis(axes.yaxis, *up, form="count")
    axes.set_xlabel(f"Optimizer steps S to {sweep.target_nats:.2f} nats")
    axes.set_ylabel("Tokens E to the same loss")
    axes.set_title(f"Steps against tokens over batches, {sweep.rung}")
    return figure


def branches_against_batch(plt: Any, view: LabView, theme: Theme) -> Any:
    """How many tokens each branch needed for one of the smallest batch's, and what the fitted B_crit expects."""
    found = view.batches.advice.branch if view.batches.advice else None
    shown = [b for b in found.branches if b.token_ratio is not None] if found else []
    if found is None or len(shown) < 2:
        raise Nothing("")
    figure, axes = plt.subplots(figsize=(8.4, 4.2))
    batches = np.array([b.batch_tokens for b in shown], dtype=np.float64)
    ratios = np.array([b.token_ratio for b in shown], dtype=np.float64)
    colours = ordered_colours([float(b) for b in batches], theme, scale="plasma")
    reach = (float(batches.min()) / 1.3, float(batches.max()) * 1.3)
    x = np.geomspace(*reach, 120)
    first = float(found.branches[0].batch_tokens)
    heights = [*ratios, 1.0]
    if found.b_crit is not None:
        ends = [(1 + x / b) / (1 + first / b) for b in (found.b_crit.value, found.b_crit.low, found.b_crit.high)]
        label = rf"$B_{{crit}}$ {short(found.b_crit.value)} [{short(found.b_crit.low)}, {short(found.b_crit.high)}]"
        axes.plot(x, ends[0], color=theme.text, lw=1.4, zorder=2, label=label)
        axes.fill_between(x, ends[2], ends[1], color=theme.faint, alpha=0.15, lw=0, zorder=1)
        heights += [float(ends[0].max())]
        axes.legend(loc="upper left")
    for batch, ratio in zip(batches, ratios, strict=True):
        axes.plot(batch, ratio, "o", ms=7.5, color=colours[float(batch)], mec=theme.background, zorder=5)
    axes.axhline(1, color=theme.faint, lw=1, ls=(0, (3, 2)))
    axes.set_xscale("log")
    axes.set_xlim(*reach)
    axes.set_ylim(min(heights) - 0.1, max(heights) * 1.12)
    log_axis(axes.xaxis, *reach, form="count")
    axes.set_xlabel(BATCH)
    axes.set_ylabel("Tokens for one of the smallest batch's")
    axes.set_title(f"Branches of one checkpoint, {found.rung}")
    return figure
