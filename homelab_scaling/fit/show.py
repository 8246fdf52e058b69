"""A fit as a person reads it on a terminal: laws with intervals, then what stands beside them, then what is weak."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from homelab_scaling.fit.diagnose import about_fits
from homelab_scaling.fit.result import CrossCheck, Estimate, Evidence, FitReport
from homelab_scaling.fit.words import between, number, short

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_EXCLUDED = 20
WORDS = {"r2_log": "R^2 (log-log)"}
ALONG = {"n_params": "N", "flops": "C"}


def fit_page(report: FitReport) -> Iterator["Table | str"]:
    """Tables and lines of a fit, in reading order."""
    yield (
        f"{report.source}: {report.n_points} points from {report.n_runs} runs; N counts {report.count}; "
        f"objective {report.objective}; {report.n_bootstrap:,} resamples"
        + ("; C is C_min" if report.compute == "c_min" else "")
    )
    yield _laws(report)
    siblings = _siblings(report)
    if siblings is not None:
        yield ""
        yield siblings
    yield from _certificates(report)
    if report.evidence is not None:
        yield from _evidence(report.evidence)
    weak = [*report.warnings, *about_fits(report)]
    if weak:
        yield "\nWhat is weak"
    for line in weak:
        yield f"  ! {line}"
    for line in report.notes:
        yield f"  note: {line}"
    if report.excluded:
        yield f"{len(report.excluded)} excluded:"
    for gone in report.excluded[:SHOWN_EXCLUDED]:
        yield f"  - {gone.row_id}: {gone.reason}"
    if len(report.excluded) > SHOWN_EXCLUDED:
        yield f"  - and {len(report.excluded) - SHOWN_EXCLUDED} more (--json lists all)"


def _laws(report: FitReport) -> "Table":
    """Main fits with every parameter; under a law's name, the rows it was fitted to."""
    table = _new_table("law and its rows", "quantity", "value>", "95 % bootstrap", "95 % profile")
    for fit in report.main:
        quantities = dict(fit.parameters)
        quantities |= {name: one for name, one in fit.derived.items() if name in ("a", "b", "r2_log")}
        if not any(one.value is not None or one.ci95 for one in quantities.values()):
            table.add_row(fit.law, "not fitted")  # its sentence stands below
            continue
        margin = [fit.law, f"  {fit.n_points} of {report.n_points} rows", f"  {fit.rows.split(':')[0]}"]
        for index, (name, one) in enumerate(quantities.items()):
            value = "not pinned" if one.value is None else number(one.value)
            profiled = _profile(fit.cross_checks.get(name))
            table.add_row(
                margin[index] if index < len(margin) else "", WORDS.get(name, name), value, _interval(one), profiled
            )
        for line in margin[len(quantities) :]:
            table.add_row(line)
        table.add_row()
    return table


def _siblings(report: FitReport) -> "Table | None":
    """The laws of one variable at the other token counts and sizes: the exponent alone."""
    main = report.main
    others = [fit for fit in report.fits if fit not in main]
    if not others:
        return None
    table = _new_table("at other D or N", "rows", "points>", "exponent>", "95 % bootstrap")
    for fit in others:
        one = fit.derived["exponent"]
        value = "not pinned" if one.value is None else number(one.value)
        table.add_row(fit.law, fit.rows.split(":")[0], str(fit.n_points), value, _interval(one))
    return table


def _profile(check: CrossCheck | None) -> str:
    if check is None or check.profile95 is None:
        return ""
    low, high = ("open" if end is None else number(end) for end in check.profile95)
    return f"[{low}, {high}]"


def _certificates(report: FitReport) -> Iterator[str]:
    fitted = [fit for fit in report.fits if fit.is_fitted]
    poor = [fit for fit in fitted if not fit.status.startswith("converged (")]
    yield f"{len(fitted) - len(poor)} of {len(fitted)} fits reached a certified optimum"
    for fit in poor:
        yield f"  ! {fit.law} at {fit.rows}: {fit.status}"


def _evidence(evidence: Evidence) -> Iterator["Table | str"]:
    yield f"\nThe exponent a of N_opt = C^a by four roads, and N_opt at C = {evidence.budget_flops:.2e} FLOPs"
    table = _new_table("approach", "a>", "95 %", "N_opt>", "95 % ")
    reasons = []
    for road in evidence.approaches:
        n_opt = "" if road.n_opt.value is None else short(road.n_opt.value)
        around = "" if road.n_opt.ci95 is None else f"[{_big(road.n_opt.ci95[0])}, {_big(road.n_opt.ci95[1])}]"
        table.add_row(road.name, _value(road.a), _interval(road.a), n_opt, around)
        reasons += [f"  {road.name}: {text}" for text in ((road.why_not,) if road.why_not else road.notes)]
    yield table
    yield from reasons
    for pair in evidence.disagreements:
        if pair.p_value is not None and pair.p_value < 0.05:
            apart = f"by {_value(pair.a_difference)} (p = {pair.p_value:.3f})"
            yield f"  ! {pair.first} and {pair.second} disagree on a: {apart}"
    if any(one.windows for one in evidence.holdouts):
        yield "\nFitted to the smaller, judged on the larger: error of the predicted loss"
        table = _new_table("law", "along", "windows>", "RMS>", "bias>", "")
        for one in evidence.holdouts:
            if one.rms_frac is not None:
                bias = sum(w.bias_frac * w.n_test for w in one.windows) / sum(w.n_test for w in one.windows)
                mark = "chosen" if one.law == evidence.chosen_law and one.along == "n_params" else ""
                table.add_row(
                    one.law,
                    ALONG[one.along],
                    str(len(one.windows)),
                    f"{100 * one.rms_frac:.2f} %",
                    f"{100 * bias:+.2f} %",
                    mark,
                )
        yield table
    if any(row.why_not is None for row in evidence.counts):
        yield "\nThe same rows under three parameter counts (C = 6 N D of each; intervals from shared resamples)"
        table = _new_table("N counts", "a>", "95 %", "L(N) exponent>", "95 % ")
        for row in evidence.counts:
            table.add_row(row.count, _value(row.a), _interval(row.a), _value(row.alpha), _interval(row.alpha))
        yield table
    for note in evidence.notes:
        yield f"  note: {note}"


def _value(one: Estimate) -> str:
    return "–" if one.value is None else number(one.value)


def _interval(one: Estimate) -> str:
    return between(*one.ci95) if one.ci95 else ""


def _big(value: float) -> str:
    return short(value) if 1e-3 < value < 1e15 else f"{value:.0e}"


def _new_table(*headings: str) -> "Table":
    """A plain table; a heading that ends in > is right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading.rstrip(">"), justify="right" if heading.endswith(">") else "left", no_wrap=True)
    return table
