"""The isoFLOP figure: loss against size at each budget, and what a few points leave open about the law."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.isoflop import DRAWN_SIZES, MIN_SIZES, find_budgets, parabola_minimum, vertex_interval
from homelab_scaling.fit.laws import CHINCHILLA
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.onlaw import JointLaw
from homelab_scaling.fit.result import Draws
from homelab_scaling.fit.slices import Table, levels
from homelab_scaling.fit.underdetermined import SEED_NOISE_LOG, Profile
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.parts import LOSS, SIZE, Nothing, log_log
from homelab_scaling.report.style import Theme, label_lines, ordered_colours

MAX_BUDGETS = 5
SHARED_SIZES = 2
MIN_APART = 1.5
"""Factor between budgets that are read between rows."""
DOTTED = (0, (1.2, 1.6))
Reach = tuple[float, float]
EXPONENTS = {"alpha": "#2f8f9d", "beta": "#d1495b"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Budget:
    """One curve of the figure."""

    flops: float | None
    """None where the sizes cost different amounts: a nominal design."""
    sizes: Array
    losses: Array

    @property
    def n_sizes(self) -> int:
        return len(levels(self.sizes))


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where the parabola through one budget's rows is lowest."""

    n_params: float
    loss_nats: float
    ci95: tuple[float, float] | None
    """Of n_params; None through three sizes, where a parabola always fits, or where its curvature is not sure."""


def minimum_of(budget: Budget) -> Minimum | None:
    """The minimum of a budget's parabola; None where it is not bracketed by its sizes."""
    if budget.n_sizes < DRAWN_SIZES:
        return None
    x, y = np.log(budget.sizes), budget.losses
    _curvature, at, bracketed = parabola_minimum(x, y[None], np.ones((1, len(y))))
    if not bracketed[0]:
        return None
    ends = vertex_interval(x, y)
    return Minimum(
        n_params=float(np.exp(at[0])),
        loss_nats=float(np.polynomial.Polynomial.fit(x, y, 2)(at[0])),
        ci95=None if ends is None else (float(np.exp(ends[0])), float(np.exp(ends[1]))),
    )


def measured_budgets(view: LabView) -> list[Budget]:
    """The rows of each budget that was run at three sizes; of a nominal design all rows as one curve without a budget.

    Empty where no budget was.
    """
    table = view.study.table
    if table is None:
        return []
    n, flops, losses = table.columns["n_params"], table.columns["flops"], table.losses
    found = [Budget(flops=b.flops, sizes=n[b.rows], losses=losses[b.rows]) for b in find_budgets(flops, n)]
    if not found and is_nominal(view) and len(levels(n)) >= SHARED_SIZES:
        return [Budget(flops=None, sizes=n, losses=losses)]
    return found


def is_nominal(view: LabView) -> bool:
    """Whether the ladder trains published tokens instead of solving for its budget."""
    return view.horizons is not None and view.horizons.mode == "nominal"


# ---------------------------------------------------------------------------------------------------------- the figure


def isoflop_curves(plt: Any, view: LabView, theme: Theme) -> Any:
    """Loss against N at each compute budget: what was measured, its parabola, the fitted surface and its minimum.

    Where the points cannot hold the law, a second panel shows how well each value of its exponents can be had.
    """
    table, joint, open_ = view.study.table, view.study.joint, view.study.left_open
    if table is None:
        raise Nothing("there is no fit with its points")
    shown, interpolated = _budgets(view, table)
    if not shown:
        raise Nothing("no compute budget is shared by two sizes")
    through = None if joint is not None else passing_laws(view)
    if open_ is None or joint is not None:
        figure, axes = plt.subplots(figsize=(8.4, 5.0))
    else:
        figure, (axes, beside) = plt.subplots(
            1, 2, figsize=(8.4, 4.6), constrained_layout=True, gridspec_kw={"width_ratios": (1.45, 1)}
        )
        _profile_panel(beside, open_, theme)
    n = table.columns["n_params"]
    reach = (float(n.min()) / 1.6, float(n.max()) * 1.6)
    colours = ordered_colours([b.flops or 0.0 for b in shown], theme, scale="plasma")
    labels: list[tuple[float, float, str, Any]] = []
    seen: list[float] = []
    for budget in shown:
        colour = colours[budget.flops or 0.0]
        axes.plot(budget.sizes, budget.losses, "o", ms=6.5, color=colour, mec=theme.background, mew=1.0, zorder=5)
        seen.extend(budget.losses)
        if not interpolated:
            seen += _parabola(axes, budget, colour, theme)
        if budget.flops is None:
            _costs_of_sizes(axes, budget, table, colour)
        else:
            seen += _surface(axes, joint, table, budget.flops, reach=reach, colour=colour, theme=theme)
            _band(axes, through, table, budget.flops, reach=reach, colour=colour)
        labels += _labels(budget, colour)
    log_log(axes, reach, seen)
    axes.set_xlabel(SIZE)
    axes.set_ylabel(LOSS)
    axes.set_title("Loss at equal compute" if shown[0].flops else "Loss at the published tokens: not one budget")
    _key(axes, theme, shown, interpolated=interpolated, joint=joint, through=through)
    label_lines(axes, labels)
    return figure


def passing_laws(view: LabView) -> Draws | None:
    """Every law that passes through rows too few to fit it, as the fit kept them."""
    fit = view.fit.get(CHINCHILLA.name) if view.fit else None
    if view.fit is None or fit is None or fit.is_fitted:
        return None
    return view.fit.draws.get(fit.draws_file or "")


def _parabola(axes: Any, budget: Budget, colour: Any, theme: Theme) -> list[float]:
    """The curve and its minimum; returns losses that must be in sight."""
    if budget.n_sizes < DRAWN_SIZES:
        return []
    low, high = float(budget.sizes.min()), float(budget.sizes.max())
    x = np.geomspace(low, high, 80)
    curve = np.polynomial.Polynomial.fit(np.log(budget.sizes), budget.losses, 2)(np.log(x))
    axes.plot(x, curve, color=colour, lw=1.4, ls=DOTTED, zorder=3)
    best = minimum_of(budget)
    if best is not None and budget.flops is not None:  # sizes that cost different amounts have no best one
        if best.ci95 is not None:
            axes.plot(best.ci95, (best.loss_nats,) * 2, color=colour, lw=5, alpha=0.35, solid_capstyle="butt", zorder=2)
        axes.plot(best.n_params, best.loss_nats, "D", ms=6, mfc=theme.background, mec=colour, mew=1.4, zorder=6)
        if budget.n_sizes < MIN_SIZES:
            _aside(axes, best.n_params, best.loss_nats, "three sizes: no interval", theme)
    return [float(curve.min())]


def _aside(axes: Any, x: float, y: float, text: str, theme: Theme) -> None:
    """A remark below a point of a curve."""
    axes.annotate(
        text,
        (x, y),
        xytext=(0, -9),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        color=theme.faint,
        zorder=7,
    )


def _surface(
    axes: Any, joint: JointLaw | None, table: Table, flops: float, *, reach: Reach, colour: Any, theme: Theme
) -> list[float]:
    """The fitted law along the budget, a star at its lowest point."""
    if joint is None:
        return []
    x = np.geomspace(*reach, 240)
    surface = joint.law.loss(joint.draws.point, {"n_params": x, "n_tokens": flops / _flops_per_token(table, x)})
    axes.plot(x, surface, color=colour, lw=1.5, zorder=2)
    best = int(np.argmin(surface))
    if not 0 < best < len(x) - 1:
        return []
    axes.plot(x[best], surface[best], "*", ms=13, color=colour, mec=theme.background, mew=0.8, zorder=6)
    return [float(surface[best])]


def _band(axes: Any, through: Draws | None, table: Table, flops: float, *, reach: Reach, colour: Any) -> None:
    """From the lowest to the highest of the laws that pass through the points."""
    if through is None:
        return
    x = np.geomspace(*reach, 120)
    each = CHINCHILLA.loss(through.values[:, None, :], {"n_params": x, "n_tokens": flops / _flops_per_token(table, x)})
    axes.fill_between(x, each.min(axis=0), each.max(axis=0), color=colour, alpha=0.16, lw=0, zorder=0)


def _labels(budget: Budget, colour: Any) -> list[tuple[float, float, str, Any]]:
    """The budget beside its curve."""
    if budget.flops is None:
        return []
    last = int(np.argmax(budget.sizes))
    return [(float(budget.sizes[last]), float(budget.losses[last]), _cost(budget.flops), colour)]


def _costs_of_sizes(axes: Any, budget: Budget, table: Table, colour: Any) -> None:
    """What each size of a nominal design cost, above its dot."""
    for rows in levels(budget.sizes):
        axes.annotate(
            _cost(float(table.columns["flops"][rows].mean())),
            (float(budget.sizes[rows].mean()), float(budget.losses[rows].max())),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=colour,
            zorder=7,
        )


def _cost(flops: float) -> str:
    return f"{flops:.3g} FLOPs".replace("e+", "e")


def _profile_panel(axes: Any, found: Profile, theme: Theme) -> None:
    """How near the law can come to all points at each value of an exponent."""
    published = CATALOGUE["hoffmann-2022"].values
    ruled_out = 100 * SEED_NOISE_LOG
    for name, colour in EXPONENTS.items():
        if name not in found.exponents:
            continue
        letter = rf"$\{name}$"
        line = "-" if name == "alpha" else (0, (3, 2))  # they lie on top of each other where nothing is ruled out
        axes.plot(found.exponents[name], 100 * found.miss_frac[name], color=colour, lw=2, ls=line, label=letter)
        axes.axvline(published[name], color=colour, lw=1, ls=line, zorder=1)
    axes.axhspan(0, ruled_out, color=theme.faint, alpha=0.14, lw=0, zorder=0)
    axes.axhline(ruled_out, color=theme.faint, lw=1, ls=(0, (4, 3)))
    axes.set_xlim(left=0)
    axes.set_ylim(-0.04, max(1.0, 2.2 * ruled_out))
    axes.annotate(
        "not ruled out: within seed noise",
        (0.97, ruled_out),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color=theme.faint,
    )
    axes.set_xlabel("Exponent, everything else at its best")
    axes.set_ylabel("Largest miss of a point (%)")
    axes.set_title("Profile of L(N, D)")
    axes.legend(loc="upper right", title="thin: Hoffmann's", handletextpad=0.4)


# ------------------------------------------------------------------------------------------------------------- budgets


def _flops_per_token(table: Table, n: Array) -> Array:
    """Training FLOPs per token at sizes between (or beyond) the table's own."""
    c = table.columns
    own = [(float(c["n_params"][r].mean()), float((c["flops"][r] / c["n_tokens"][r]).mean())) for r in _sizes(table)]
    sizes, rates = np.array(own).T
    return np.asarray(6 * n * np.interp(np.log(n), np.log(sizes), rates / (6 * sizes)))


def _sizes(table: Table) -> list[Any]:
    return levels(table.columns["n_params"])


def _budgets(view: LabView, table: Table) -> tuple[list[Budget], bool]:
    """The measured budgets, at most five; where few rows share one, read between each size's rows (True)."""
    n, flops, losses = table.columns["n_params"], table.columns["flops"], table.losses
    found = measured_budgets(view)
    if 2 * sum(len(b.sizes) for b in found) >= len(n):
        return [found[i] for i in sorted({round(i) for i in np.linspace(0, len(found) - 1, MAX_BUDGETS)})], False
    curves = [rows[np.argsort(flops[rows], kind="stable")] for rows in _sizes(table)]
    ends = np.array([(flops[rows[0]] * 0.9999, flops[rows[-1]] * 1.0001) for rows in curves])
    grid = np.geomspace(ends.min(), ends.max(), 400)
    held = ((grid[:, None] >= ends[:, 0]) & (grid[:, None] <= ends[:, 1])).sum(axis=1)
    shared = grid[held >= SHARED_SIZES]
    if len(shared) == 0:
        return [], True
    apart = np.log(shared[-1] / shared[0]) / np.log(MIN_APART)
    result = []
    for c in np.geomspace(shared[0], shared[-1], int(np.clip(1 + apart, 1, MAX_BUDGETS))):
        inside = [rows for rows, (low, high) in zip(curves, ends, strict=True) if low <= c <= high]
        at = [np.exp(np.interp(np.log(c), np.log(flops[rows]), np.log(losses[rows]))) for rows in inside]
        if len(inside) >= SHARED_SIZES:
            result.append(
                Budget(flops=float(c), sizes=np.array([n[rows].mean() for rows in inside]), losses=np.array(at))
            )
    return result, True


def _key(
    axes: Any,
    theme: Theme,
    shown: list[Budget],
    *,
    interpolated: bool,
    joint: JointLaw | None,
    through: Draws | None,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(**style: Any) -> Any:
        return Line2D([], [], color=theme.faint, **style)

    handles: list[Any] = [mark(marker="o", ls="", label="between a size's own rows" if interpolated else "measured")]
    if not interpolated and any(b.n_sizes >= DRAWN_SIZES for b in shown):
        few = all(b.n_sizes < MIN_SIZES for b in shown)
        handles.append(mark(lw=1.4, ls=DOTTED, label="parabola (no interval)" if few else "parabola"))
        minima = [best for b in shown if b.flops is not None and (best := minimum_of(b)) is not None]
        if minima:
            text = "its minimum with 95 % interval" if any(m.ci95 for m in minima) else "its minimum"
            handles.append(mark(marker="D", ms=6, mfc=theme.background, ls="", label=text))
    if joint is not None:
        handles.append(mark(lw=1.5, label=f"fitted {joint.law.title}"))
        handles.append(mark(marker="*", ms=11, ls="", label="its best size"))
    if through is not None and shown[0].flops is not None:
        handles.append(Patch(color=theme.faint, alpha=0.25, lw=0, label="every L(N, D) through the points"))
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, borderaxespad=0)
