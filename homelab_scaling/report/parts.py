"""What figures share: axes with units, dots, and the reason why there is no figure."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from homelab_scaling.fit.result import Draws, FitReport, ScalingFit
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.style import Theme, log_axis
from homelab_scaling.runs import Row

SIZE = "Model size N (parameters)"
TOKENS = "Training tokens D"
COMPUTE = "Training compute C (FLOPs)"
LOSS = "Held-out loss (nats per token)"

Draw = Callable[[Any, LabView, Theme], Any]


class Nothing(Exception):
    """A figure has nothing to show; the text says why."""


def twice(se: float | None) -> float | None:
    return None if se is None else 2 * se


def dot(colour: Any, theme: Theme, size: float = 6.5) -> dict[str, Any]:
    return {
        "fmt": "o",
        "ms": size,
        "color": colour,
        "mec": theme.background,
        "mew": 1.0,
        "elinewidth": 1.1,
        "zorder": 5,
    }


def columns_of(rows: Sequence[Row]) -> tuple[Any, Any, Any, Any]:
    """N, D, C and loss of the rows."""
    if not rows:
        raise Nothing("no run has finished a row yet")
    names = ("n_params", "n_tokens", "flops", "loss_nats")
    n, d, flops, losses = (np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names)
    return n, d, flops, losses


def log_log(axes: Any, reach: tuple[float, float], losses: Any, extra: Sequence[float] = ()) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    bottom, top = min(*losses, *extra) * 0.97, max(*losses, *extra) * 1.03
    axes.set_xlim(*reach)
    axes.set_ylim(bottom, top)
    log_axis(axes.xaxis, *reach, form="count")
    log_axis(axes.yaxis, bottom, top, form="plain")


def drawn_of(report: FitReport | None, fit: ScalingFit | None) -> Draws | None:
    if report is None or fit is None or not fit.is_fitted:
        return None
    return report.draws.get(fit.draws_file or "")
