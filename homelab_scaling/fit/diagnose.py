"""What is weak about a design or a fit, in sentences."""

import math

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.laws import AXIS_LETTER, AXIS_UNIT, KaplanJoint, Law, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.resample import FEW_RUNS, MIN_CLUSTERS
from homelab_scaling.fit.result import Estimate, FitReport
from homelab_scaling.fit.slices import Table, levels
from homelab_scaling.fit.words import between, listed, number, short

Rows = NDArray[np.int64]

POINTS_PER_PARAMETER = 3
COLLINEAR = 0.9
MAX_EXPONENT_WIDTH = 1.0
MAX_EXPONENT_RATIO = 10.0
MAX_PREFACTOR_RATIO = 1000.0
MAX_OFFSET_WIDTH = 0.8
MAX_SHARE_WIDTH = 0.6
ZERO_OFFSET = 0.01
MAX_NAMED_RISES = 6


def too_few(law: Law, table: Table, rows: Rows) -> str | None:
    """Why these rows cannot carry the law at all, naming its parameters; None if they can."""
    named = listed(list(law.free))
    n_points, n_params = len(rows), len(law.free)
    if n_points < n_params + 1:
        return (
            f"{n_points} point{'s' * (n_points != 1)} for {n_params} parameters ({named}): nothing is left over to "
            f"tell them apart; measure at least {n_params + 1} points, better {POINTS_PER_PARAMETER * n_params}"
        )
    places = len(set(zip(*(np.round(np.log(table.columns[axis][rows]), 2) for axis in law.axes), strict=True)))
    if places < n_params:
        letters = listed([AXIS_LETTER[axis] for axis in law.axes])
        return (
            f"{n_points} points at {places} different ({letters}) for {n_params} parameters ({named}): "
            f"repeats show the noise, not the law; measure at {n_params} or more"
        )
    for axis, exponent in zip(law.axes, law.exponents, strict=True):
        found = len(levels(table.columns[axis][rows]))
        if found < law.levels_needed:
            prefactor = law.prefactors[law.axes.index(axis)]
            confused = [prefactor, exponent, *(["E"] if law.offset else [])]
            return (
                f"{found} distinct value{'s' if found > 1 else ''} of {AXIS_LETTER[axis]} where {law.levels_needed} "
                f"are needed: {listed(confused)} cannot be told apart; add rungs at other {AXIS_LETTER[axis]}"
            )
    return None


def design_warnings(law: Law, table: Table, rows: Rows, n_runs: int) -> list[str]:
    """What the choice of rows makes weak, whatever the losses are."""
    said = []
    n_points, n_params = len(rows), len(law.free)
    if n_points < POINTS_PER_PARAMETER * n_params:
        said.append(
            f"{n_points} points for {n_params} parameters, fewer than {POINTS_PER_PARAMETER} each: "
            "R^2 says little here, trust the intervals only"
        )
    for axis in law.axes:
        values = table.columns[axis][rows]
        decades = float(np.log10(values.max() / values.min()))
        if decades < 1:
            said.append(
                f"{AXIS_LETTER[axis]} spans a factor of {number(values.max() / values.min())} ({decades:.2f} decades), "
                "less than one decade: the exponent is local, do not extrapolate far with it"
            )
    if len(law.axes) == 2:
        x, z = (np.log(table.columns[a][rows]) for a in law.axes)
        if x.std() > 0 and z.std() > 0:
            corr = float(np.corrcoef(x, z)[0, 1])
            if abs(corr) > COLLINEAR:
                said.append(
                    f"log N and log D move together (correlation {corr:.2f}): their effects cannot be told apart well; "
                    "train each size at several token counts (isoFLOP or WSD horizons)"
                )
    if n_runs < MIN_CLUSTERS:
        said.append(
            f"all rows come from {n_runs} training run{'s' if n_runs > 1 else ''} and share its noise: the interval "
            "treats rows as independent and is too narrow; add seeds"
        )
    elif n_runs < FEW_RUNS:
        said.append(
            f"the interval is from few runs ({n_runs}): it rests on Student's t and on normal-like noise; "
            f"{FEW_RUNS} or more runs (seeds, sizes) would make it sturdy"
        )
    return said


def unpinned_parameters(law: Law, theta: Array, estimates: dict[str, Estimate], losses: Array) -> dict[str, str]:
    """Parameter -> why these points do not pin it down.

    Args:
        theta: the law's whole theta at the optimum.
    """
    found = _at_bounds(law, theta, losses) if not isinstance(law, KaplanJoint) else {}
    lowest = float(losses.min())
    for parameter in law.parameters:
        interval = estimates[parameter.name].ci95
        if parameter.name in found or interval is None:
            continue
        too_wide = wide(parameter.kind, interval, lowest)
        if too_wide:
            found[parameter.name] = too_wide
    for prefactor, exponent in zip(law.prefactors, law.exponents, strict=True):
        if exponent in found:  # they trade off along a ridge: digits of one alone would be invented
            found.setdefault(prefactor, found[exponent])
    return {name: why for name, why in found.items() if name not in law.fixed}


def _at_bounds(law: Law, theta: Array, losses: Array) -> dict[str, str]:
    found: dict[str, str] = {}
    low, high = law.bounds(losses)
    k, first = len(law.axes), 1 if law.offset else 0
    for t, (prefactor, exponent) in enumerate(zip(law.prefactors, law.exponents, strict=True)):
        log_term, slope = theta[first + t], theta[first + k + t]
        letter = AXIS_LETTER[law.axes[t]]
        if log_term <= low[first + t] + 1e-6:
            reason = f"the {letter} term vanished: over this range the loss does not depend on {letter}"
            found[prefactor] = found[exponent] = reason
        elif slope <= low[first + k + t] * 2:
            reason = f"{exponent} went to its lower bound 0: over this range the loss does not fall with {letter}"
            found[prefactor] = found[exponent] = reason
            if law.offset:
                found["E"] = reason
        elif slope >= high[first + k + t] * 0.999:
            found[prefactor] = found[exponent] = f"{exponent} went to its upper bound {number(high[first + k + t])}"
    if law.offset and "E" not in found and float(np.exp(theta[0])) < ZERO_OFFSET * losses.min():
        found["E"] = "E went to its lower bound 0: these losses show no sign of levelling off"
    return found


def wide(kind: str, interval: tuple[float, float], lowest_loss: float) -> str | None:
    """Why an interval is too wide to call its parameter known; None if it is not."""
    low, high = interval
    shown = f"its 95 % interval is {between(low, high)}"
    if kind == "exponent":
        if high - low > MAX_EXPONENT_WIDTH:
            return f"{shown}, wider than {number(MAX_EXPONENT_WIDTH)}"
        if high > MAX_EXPONENT_RATIO * max(low, 1e-12):
            return f"{shown}, a factor of more than {MAX_EXPONENT_RATIO:.0f}"
    if kind == "prefactor" and high > MAX_PREFACTOR_RATIO * max(low, 1e-300):
        return f"{shown}, a factor of more than {MAX_PREFACTOR_RATIO:,.0f}"
    if kind == "offset" and high - low > MAX_OFFSET_WIDTH * lowest_loss:
        return f"{shown}, wider than {100 * MAX_OFFSET_WIDTH:.0f} % of the lowest loss"
    if kind == "share" and high - low > MAX_SHARE_WIDTH:
        return f"{shown}, most of 0 to 1"
    return None


def fit_warnings(law: Law, estimates: dict[str, Estimate], unpinned: dict[str, str]) -> list[str]:
    """What the fitted numbers themselves make suspect."""
    said = []
    if unpinned:
        reasons = dict.fromkeys(unpinned.values())
        for reason in reasons:
            names = [name for name, why in unpinned.items() if why == reason]
            said.append(f"the data do not pin down {listed(names)}: {reason}")
    for exponent in law.exponents:
        value = estimates[exponent].value
        if value is not None and value > 1 and exponent not in unpinned:
            said.append(
                f"{exponent} = {number(value)} is above 1, steeper than any published language-model law: look for "
                "under-trained small models, repeated data or a rung with an unsuitable learning rate"
            )
    return said


def table_warnings(table: Table) -> list[str]:
    """What the losses of the whole table show: a loss that rises with size or with data, by name."""
    said = _rises(
        table, fixed="n_tokens", varied="n_params", cause="its learning rate or batch suits it badly, or noise"
    )
    said += _rises(table, fixed="n_params", varied="n_tokens", cause="repeated data, an unfinished decay, or noise")
    if len(said) > MAX_NAMED_RISES:
        said = [*said[:MAX_NAMED_RISES], f"and {len(said) - MAX_NAMED_RISES} more places where the loss rises"]
    return said


def _rises(table: Table, *, fixed: str, varied: str, cause: str) -> list[str]:
    said = []
    for rows in levels(table.columns[fixed]):
        steps = levels(table.columns[varied][rows])
        means = [float(table.losses[rows[step]].mean()) for step in steps]
        for i in range(1, len(steps)):
            if means[i] <= means[i - 1]:
                continue
            below, above = rows[steps[i - 1]], rows[steps[i]]
            at = short(float(table.columns[fixed][rows[0]]))
            lower, higher = (short(float(table.columns[varied][r[0]])) for r in (below, above))
            said.append(
                f"at {AXIS_LETTER[fixed]} = {at} {AXIS_UNIT[fixed]} the loss rises from {means[i - 1]:.4f} "
                f"({AXIS_LETTER[varied]} = {lower}) to {means[i]:.4f} ({AXIS_LETTER[varied]} = {higher}, "
                f"{table.names[int(above[0])]}){_against_noise(table, below, above, means[i] - means[i - 1])}: {cause}"
            )
    return said


def _against_noise(table: Table, below: Rows, above: Rows, rise: float) -> str:
    errors = [table.points[int(i)].loss_se_nats for i in (below[0], above[0])]
    known = [e for e in errors if e]
    if len(known) < 2:
        return ""
    return f", {rise / math.hypot(*known):.1f} standard errors of the held-out text"


def about_fits(report: FitReport) -> list[str]:
    """What is weak about the main fits, each sentence once with the laws it is about."""
    fits = report.main
    about: dict[str, list[str]] = {}
    loose = []
    for fit in fits:
        title = get_law(fit.law).title
        for warning in fit.warnings:
            if not warning.startswith(("the data do not pin down", f"{title} is not fitted")):
                about.setdefault(warning, []).append(title)
        names = [name for name in fit.parameters if name in fit.unpinned]
        if names and fit.is_fitted:
            reasons = dict.fromkeys(fit.unpinned[name] for name in names if "interval" not in fit.unpinned[name])
            loose.append(f"{listed(names)} of {title}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    said = [f"{get_law(fit.law).title} is {fit.status}" for fit in fits if not fit.is_fitted]
    if loose:
        said.append(f"not pinned down by these data (see their intervals): {'; '.join(loose)}")
    return said + [f"{listed(where)}: {warning}" for warning, where in about.items()]
