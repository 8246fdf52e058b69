"""What makes a table or a fit bad science, each in a sentence with its remedy.

`diagnose` says what a design cannot resolve; this module says what the rows themselves betray: a line that is not
straight, counts that were mixed, schedules that were not finished, texts seen too often, one run that decides.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.fit.diagnose import too_few
from homelab_scaling.fit.envelope import mid_schedule
from homelab_scaling.fit.laws import AXIS_LETTER, Law, Posed
from homelab_scaling.fit.objectives import ObjectiveName
from homelab_scaling.fit.resample import clusters
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.slices import Table, levels
from homelab_scaling.fit.solve import Optimum, refit
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.runs import LossPoint

Rows = NDArray[np.int64]

CURVED_P = 0.01
MIN_BEND = 5e-4
"""Departure from a straight line, as a share of the loss, that is worth a word."""
MAX_LEFT_OUT = 500
MIN_LEVELS = 3
SAME_COUNT = 0.005
EXACTLY_6ND = 1e-4
NOT_6ND = 0.02
MANY_EPOCHS = 4.0
"""Muennighoff et al. 2023: up to about four epochs repeated tokens are worth nearly as much as fresh ones."""
RISE = 0.005
"""Rise of the loss, as a share, that noise of seeds (.02 to .1 %) does not make."""


# ------------------------------------------------------------------------------------------------------------- of a fit


def curvature(law: Law, table: Table, rows: Rows) -> str | None:
    """Where a straight log-log line was fitted to losses that bend: how much, which way and the likely causes.

    The test is Student's t of the quadratic term, two-sided at 1 %.
    """
    if law.offset or len(law.axes) != 1 or len(rows) < 4:
        return None
    (axis,) = law.axes
    x, y = np.log(table.columns[axis][rows]), np.log(table.losses[rows])
    if len(levels(table.columns[axis][rows])) < MIN_LEVELS + 1:
        return None
    z = (x - x.mean()) / np.ptp(x)
    design = np.stack([np.ones_like(z), z, z * z], axis=1)
    q, r = np.linalg.qr(design)
    coefficients = np.linalg.solve(r, q.T @ y)
    residuals = y - design @ coefficients
    variance = float((residuals**2).sum()) / (len(y) - 3)
    bend = float(coefficients[2]) / 4  # of the chord between the ends, at the middle
    p_value = _student(float(coefficients[2]), np.sqrt(variance) / abs(float(r[2, 2])), len(y) - 3)
    if abs(bend) < MIN_BEND or p_value > CURVED_P:
        return None
    straight = np.stack([np.ones_like(z), z], axis=1)
    off = y - straight @ np.linalg.lstsq(straight, y, rcond=None)[0]
    worst = table.names[int(rows[int(np.argmax(np.abs(off)))])]
    letter = AXIS_LETTER[axis]
    small, large = f"small {letter}", f"large {letter}"
    if bend > 0:
        causes = (
            f"a real irreducible loss (fit {law.name}-offset), an unfinished schedule or a learning rate untuned at "
            f"{large}, repeated data there, or a loader fault"
        )
    else:
        causes = (
            f"an unfinished schedule, a warm-up too long or a learning rate untuned at {small}, or a loader fault "
            f"(held-out text leaking into training) at {large}"
        )
    shape = "flattens" if bend > 0 else "steepens"
    return (
        f"log loss {shape} with log {letter} by {100 * abs(bend):.2g} % of the loss where a straight line is claimed "
        f"(p = {p_value:.1g}, furthest off: {worst}): {causes}; the exponent holds for these rows only"
    )


def _student(value: float, error: float, dof: int) -> float:
    """Two-sided p-value of value / error."""
    from scipy.special import stdtr

    if error == 0:
        return 0.0 if value else 1.0
    return float(2 * stdtr(dof, -abs(value) / error))


def influence(
    law: Law,
    posed: Posed,
    table: Table,
    rows: Rows,
    *,
    optimum: Optimum,
    name: ObjectiveName,
    derived: Mapping[str, Estimate],
) -> str | None:
    """The run whose omission moves a or the exponent most, where that is more than a standard error; else None.

    Args:
        rows: of the table, in the order the law was posed on.
        derived: the fit's estimates; those without a standard error are not judged.
    """
    run_ids = [table.run_ids[i] for i in rows]
    runs = clusters(run_ids)
    order = list(dict.fromkeys(run_ids))
    left = [k for k in range(len(order)) if too_few(law, table, rows[runs != k]) is None]
    if len(order) < MIN_LEVELS or not left or len(order) > MAX_LEFT_OUT:
        return None
    weights = (runs[None] != np.array(left)[:, None]).astype(np.float64)
    found = refit(posed.model, np.log(table.losses[rows]), weights, optimum, name, bounds=posed.bounds)
    without = law.derived(posed.natural(found.theta))
    worst: tuple[float, str, int] | None = None
    moved: set[int] = set()
    for quantity in ("a", "exponent"):
        one = derived.get(quantity)
        if one is None or one.value is None or not one.se or quantity not in without:
            continue
        steps = np.abs(without[quantity] - one.value) / one.se
        moved |= set(np.flatnonzero(steps > 1).tolist())
        top = int(np.nanargmax(steps)) if np.isfinite(steps).any() else 0
        if steps[top] > 1 and (worst is None or steps[top] > worst[0]):
            worst = (float(steps[top]), quantity, top)
    if worst is None:
        return None
    size, quantity, top = worst
    value = derived[quantity].value
    assert value is not None
    others = len(moved) - 1
    more = f" ({others} more run{'s move' if others > 1 else ' moves'} it by over one)" if others else ""
    return (
        f"one run carries the fit: leaving out {order[left[top]]} moves {quantity} from {brief(value)} to "
        f"{brief(float(without[quantity][top]))}, {size:.1f} standard errors{more}; repeat that run with another seed "
        "and look at its loss curve"
    )


# ----------------------------------------------------------------------------------------------------------- of a table


def table_checks(points: Sequence[LossPoint]) -> list[str]:
    """Everything the rows as given betray, before any law is fitted."""
    said = [mixed_counts(points), mixed_flops(points), unfinished(points), repeated(points), double_descent(points)]
    said.append(not_from_scratch(points))
    return [*few_levels(points), *(s for s in said if s is not None)]


def few_levels(points: Sequence[LossPoint]) -> list[str]:
    """Fewer than three sizes, or than three token counts."""
    said = []
    for column, what, remedy in (
        ("n_params", "sizes", "add rungs of other sizes"),
        ("n_tokens", "token counts", "add horizons"),
    ):
        found = len(levels(np.array([getattr(p, column) for p in points], dtype=np.float64)))
        if found < MIN_LEVELS:
            few = what if found > 1 else what[:-1]
            said.append(
                f"{found} {few} in the whole table: no curvature and no irreducible loss can be seen in "
                f"{AXIS_LETTER[column]}, and a law in it is two points joined; {remedy}"
            )
    return said


def not_from_scratch(points: Sequence[LossPoint]) -> str | None:
    """Rows of runs that began from another model's weights, whose tokens are not all the tokens behind the loss."""
    begun = [name for name, point in zip(_names(points), points, strict=True) if point.start is not None]
    if not begun:
        return None
    named = listed(begun) if len(begun) <= 3 else f"{begun[0]}, ..."
    return (
        f"{len(begun)} of {len(points)} rows ({named}) come from runs that began from another model's weights: the "
        "tokens and FLOPs behind those are not in D and C, so this is no law of training from random weights; fit the "
        "others alone, from a CSV without these"
    )


def mixed_counts(points: Sequence[LossPoint]) -> str | None:
    """Rows whose n_params counts other parts than other rows' n_params."""
    names = _names(points)
    kinds = {}
    for name, point in zip(names, points, strict=True):
        if point.n_body is not None and (point.n_embed is not None or point.n_head is not None):
            kinds[name] = _counted(point)
    if len(kinds) < 2 or set.intersection(*kinds.values()):
        return None
    none = [name for name, found in kinds.items() if not found]
    some = [name for name, found in kinds.items() if found]
    if not some and any(p.n_embed is None for p in points):
        return None  # without the embeddings nothing can be said of sums that include them
    if not some:
        return (
            f"n_params is no sum of the parts in any row (n_body, n_pos, n_embed, n_head; first {none[0]}): "
            "correct the columns, or --count body fits a count that is not the runs'"
        )
    if none:
        return (
            f"n_params of {none[0]}{_more(none)} is no sum of its parts, as it is in {some[0]} "
            f"({_either(kinds[some[0]])}): one count for all rows, or the exponent is that of the mixture"
        )
    first = some[0]
    other = next(name for name in some if not kinds[name] & kinds[first])
    return (
        f"n_params counts {_either(kinds[first])} in {first} and {_either(kinds[other])} in {other}: "
        "bring all rows to one count; mixed counts alone can move a by .1"
    )


def _counted(point: LossPoint) -> set[str]:
    """Which sums of parts give n_params."""
    body, head, embed, pos = (float(v or 0) for v in (point.n_body, point.n_head, point.n_embed, point.n_pos))
    sums = {"body": body}
    if point.n_head is not None:
        sums["body + head"] = body + head
    if point.n_embed is not None:
        sums["body + embeddings"] = body + pos + embed
        sums["body + embeddings + head"] = body + pos + embed + head
    return {what for what, total in sums.items() if abs(point.n_params / total - 1) < SAME_COUNT}


def mixed_flops(points: Sequence[LossPoint]) -> str | None:
    """FLOPs that are exactly 6 N D in some rows and counted otherwise in others."""
    names = _names(points)
    off = {
        name: abs(p.flops / (6 * p.n_params * p.n_tokens) - 1)
        for name, p in zip(names, points, strict=True)
        if p.flops is not None
    }
    plain = [name for name, o in off.items() if o < EXACTLY_6ND]
    counted = [name for name, o in off.items() if o > NOT_6ND]
    if len(plain) < 2 or not counted:
        return None
    return (
        f"flops is 6 N D to the digit in {len(plain)} rows ({plain[0]}{_more(plain)}) and differs by up to "
        f"{100 * max(off.values()):.0f} % in {len(counted)} ({counted[0]}{_more(counted)}): count all rows the same "
        "way, or leave the column out so that C is 6 N D for all"
    )


def unfinished(points: Sequence[LossPoint]) -> str | None:
    """Losses that may have been measured in the middle of a schedule."""
    middle = mid_schedule(points)
    if middle:
        return middle
    names = _names(points)
    unsaid = [name for name, p in zip(names, points, strict=True) if p.decayed is None]
    if unsaid and any(p.decayed for p in points):
        return (
            f"{len(unsaid)} of {len(points)} rows ({unsaid[0]}{_more(unsaid)}) do not tell whether their learning rate "
            "had decayed, as the others do: an undecayed loss is several percent high, so fill in the column decayed"
        )
    return None


def repeated(points: Sequence[LossPoint]) -> str | None:
    """Rows that saw their text more than four times."""
    names = _names(points)
    epochs = {name: p.n_tokens / p.n_tokens_unique for name, p in zip(names, points, strict=True) if p.n_tokens_unique}
    many = sorted((name for name, e in epochs.items() if e > MANY_EPOCHS), key=lambda name: -epochs[name])
    if not many:
        return None
    return (
        f"{len(many)} of {len(points)} rows saw their text more than {MANY_EPOCHS:.0f} times (up to "
        f"{brief(epochs[many[0]])}, {many[0]}): such tokens are worth less and less, so a law in D bends; add text, "
        "leave those rows out, or use a law of repeated data"
    )


def double_descent(points: Sequence[LossPoint]) -> str | None:
    """Where, on repeated text, a larger model ends higher than a smaller one with the same tokens."""
    names = _names(points)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, p in enumerate(points):
        if p.n_tokens_unique and p.n_tokens > 1.01 * p.n_tokens_unique:
            groups.setdefault((p.n_tokens_unique, round(np.log(p.n_tokens) * 100)), []).append(index)
    worst: tuple[float, int, int] | None = None
    places = 0
    for members in groups.values():
        members.sort(key=lambda i: points[i].n_params)
        for below, above in pairwise(members):
            rise = points[above].loss_nats / points[below].loss_nats - 1
            if points[above].n_params < 1.01 * points[below].n_params or rise < RISE:
                continue
            places += 1
            if worst is None or rise > worst[0]:
                worst = (rise, below, above)
    if worst is None:
        return None
    rise, below, above = worst
    low, high = points[below], points[above]
    assert high.n_tokens_unique is not None
    more = f" ({places - 1} more such places)" if places > 1 else ""
    return (
        f"on {short(high.n_tokens_unique)} tokens seen {brief(high.n_tokens / high.n_tokens_unique)} times the loss "
        f"rises with size, from {low.loss_nats:.3f} at N = {short(low.n_params)} to {high.loss_nats:.3f} at N = "
        f"{short(high.n_params)} ({names[above]}){more}: larger models overfit repeated text (double descent), which "
        "no power law describes; leave those rows out or add text"
    )


def _names(points: Sequence[LossPoint]) -> list[str]:
    return [p.row_id or f"point {i + 1}" for i, p in enumerate(points)]


def _either(kinds: set[str]) -> str:
    return " or ".join(sorted(kinds))


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
