"""Our value of every figure that an experiment can publish, how it was measured, or why it is not known."""

from collections.abc import Callable
from dataclasses import dataclass

from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.ladder import FigureName, PublishedFigure
from homelab_scaling.report.bills import SOURCES
from homelab_scaling.report.collect import LabView, Span
from homelab_scaling.report.equal_steps import ModelSlope, model_slopes, signed
from homelab_scaling.report.states import largest_memory
from homelab_scaling.report.words import (
    COUNTS,
    duration,
    gigabytes,
    in_brackets,
    main_fit,
    money,
    percent,
    plural,
    r2_text,
)
from homelab_scaling.runs import Row
from homelab_scaling.watch.recording import Hottest, hottest

LOOSE = "not pinned down"


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A figure of this lab."""

    how: str
    """How it was measured; why it is not known."""
    value: float | None = None
    ci95: tuple[float, float] | None = None
    range_of: tuple[float, float] | None = None
    """What it depends on how one looks, where there is no interval."""
    text: str | None = None
    """Instead of the value's own."""
    nearest: str | None = None
    """The rung that the value is of, where it was chosen among several because it comes nearest."""


# ------------------------------------------------------------------------------------------------------------- the laws


def _exponent_n(view: LabView, _figure: PublishedFigure) -> Ours:
    fit = view.study.size_law
    if fit is None:
        return Ours(how=_no_fit(view))
    if not fit.is_fitted:
        return Ours(how=fit.status.removeprefix("not fitted: "))
    e = fit.derived["exponent"]
    if e.value is None:
        return Ours(text=LOOSE, how=next(iter(fit.unpinned.values()), fit.status))
    counted = COUNTS.get(view.fit.count if view.fit else "", "")
    how = f"power law through {fit.n_points} points at {fit.rows}, N of {counted or 'the fit'}; {fit.interval}"
    if fit.rows.endswith(" N"):
        how += "; tokens grow with size there, so it is not of N alone"
    return Ours(value=e.value, ci95=e.ci95, text=brief(e.value) + in_brackets(e), how=how)


def _r2(view: LabView, _figure: PublishedFigure) -> Ours:
    fit = view.study.size_law
    e = fit.derived.get("r2_log") if fit is not None and fit.is_fitted else None
    if fit is None or e is None or e.value is None:
        return Ours(how=_no_fit(view) if fit is None else fit.status.removeprefix("not fitted: "))
    return Ours(value=e.value, text=r2_text(fit), how=f"of log loss on log N, {fit.n_points} points at {fit.rows}")


def _exponent_c(view: LabView, _figure: PublishedFigure) -> Ours:
    fit = main_fit(view.fit, "power-c")
    if fit is None:
        one = view.fit.get("power-c") if view.fit else None
        return Ours(how=_no_fit(view) if one is None else one.status.removeprefix("not fitted: "))
    e = fit.derived["exponent"]
    if e.value is None:
        return Ours(text=LOOSE, how=next(iter(fit.unpinned.values()), fit.status))
    how = f"along the frontier of {fit.n_points} rows that no cheaper row beats; {fit.interval}"
    return Ours(value=e.value, ci95=e.ci95, text=brief(e.value) + in_brackets(e), how=how)


def _no_fit(view: LabView) -> str:
    return "no fit has been made: run `homelab fit`" if view.rows else "no run has finished a row yet"


# ----------------------------------------------------------------------------------------------------------- the models


def _slope_c(view: LabView, figure: PublishedFigure) -> Ours:
    found = model_slopes(view)
    if not found:
        return Ours(how="no run has measured enough of its validation curve for a slope")
    if figure.rung is not None:
        one = next((s for s in found if s.rung == figure.rung), None)
        if one is None:
            return Ours(how=f"there is no curve of a rung {figure.rung} here, but of {listed([s.rung for s in found])}")
    else:
        one = min(found, key=lambda s: abs(s.value - figure.value))
    every = ", ".join(f"{s.rung} {_slope_text(s)}" for s in found)
    listing = _slope_text(one) if figure.rung is not None else every
    constant = any(run.spec is not None and run.spec.science.schedule.name == "wsd" for run in view.runs)
    how = (
        f"least squares through {one.n_points} held-out losses of each run after its warm-up"
        + (", before any decay" if constant else "")
        + (f"; 95 % over {one.n_seeds} seeds" if one.ci95 else "; one seed, so no interval")
        + f"; {one.rung}: {signed(one.reach[0])} to {signed(one.reach[1])} over stretches of half its points"
    )
    return Ours(
        value=one.value,
        ci95=one.ci95,
        range_of=one.reach,
        text=listing,
        nearest=None if figure.rung or len(found) < 2 else one.rung,
        how=how,
    )


def _slope_text(slope: ModelSlope) -> str:
    ci = slope.ci95
    return signed(slope.value) + ("" if ci is None else f" [{signed(ci[0])}, {signed(ci[1])}]")


def _loss_nats(view: LabView, figure: PublishedFigure) -> Ours:
    rows = [row for row in view.rows if row.rung == figure.rung]
    if not rows:
        run = next((run for run in view.runs if run.rung == figure.rung), None)
        known = dict.fromkeys(r.rung for r in view.rows)
        if run is None:
            return Ours(how=f"there is no rung {figure.rung} here" + (f", but {listed(list(known))}" if known else ""))
        return Ours(how=f"its run is {run.status} and has no row")
    largest = max(row.n_tokens for row in rows)
    rows = [row for row in rows if row.n_tokens == largest]
    loss = sum(row.loss_nats for row in rows) / len(rows)
    se = max((row.loss_se_nats for row in rows if row.loss_se_nats is not None), default=None)
    seeds = f", mean of {len(rows)} seeds" if len(rows) > 1 else ""
    return Ours(
        value=loss,
        ci95=None if se is None else (loss - 1.96 * se, loss + 1.96 * se),
        text=f"{loss:.3f}" + ("" if se is None else f" ± {se:.3f}"),
        how=f"held-out nats per token after {short(largest)} tokens{seeds}"
        + ("" if se is None else "; the error is of the held-out text, not of the seed"),
    )


# --------------------------------------------------------------------------------------------------------- what it took


def _tokens_total(view: LabView, _figure: PublishedFigure) -> Ours:
    if not view.rows:
        return Ours(how="no run has finished a row yet")
    tokens = sum(row.flops_marginal / row.flops * row.n_tokens for row in view.rows)
    return Ours(value=tokens, how=f"trained for {_n_rows(view)}, each trunk once")


def _flops_total(view: LabView, _figure: PublishedFigure) -> Ours:
    if not view.rows:
        return Ours(how="no run has finished a row yet")
    lost = sum(not run.rows for run in view.runs)
    how = f"counted exactly, the head and the causal half of attention with it, over {_n_rows(view)}, each trunk once"
    how += f"; {lost} run{plural(lost)} without a row not counted" if lost else ""
    return Ours(value=sum(row.flops_marginal for row in view.rows), how=how)


def _hours(view: LabView, _figure: PublishedFigure) -> Ours:
    spans = joined([span for run in view.runs for span in run.spans])
    seconds = sum(end - start for start, end in spans)
    if seconds > 0:
        how = "by the clock, while at least one run was going; shards, measuring and the fit not counted"
    else:
        known = [row.seconds_marginal for row in view.rows if row.seconds_marginal is not None]
        if not known:
            return Ours(how="no run has finished a row yet" if not view.rows else "no row knows its time")
        seconds, how = sum(known), "machine time of the rows; runs that went side by side are counted each"
    return Ours(value=seconds / 3600, text=duration(seconds), how=how)


def joined(spans: list[Span]) -> list[Span]:
    """The same stretches of time without overlaps, ascending."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _kwh(view: LabView, _figure: PublishedFigure) -> Ours:
    plug = [row.kwh_wall_marginal for row in view.rows if row.kwh_wall_marginal is not None]
    if not plug:
        return Ours(how=_why_unknown(view, "kwh_marginal", "kwh"))
    cards = [row.kwh_marginal for row in view.rows if row.kwh_marginal is not None and row.kwh_from != "stated watts"]
    source = listed([SOURCES[s] for s in dict.fromkeys(row.kwh_from for row in view.rows) if s is not None])
    how = f"at the plug, from {source}" + (f"; the cards alone {brief(sum(cards))} kWh" if cards else "")
    if len(plug) < len(view.rows):
        text = f"{brief(sum(plug))} kWh of {len(plug)} rows"
        return Ours(text=text, how=f"{how}; {len(view.rows) - len(plug)} of {len(view.rows)} rows do not know theirs")
    err = max((row.kwh_wall_err_frac for row in view.rows if row.kwh_wall_err_frac is not None), default=None)
    value = sum(plug)
    text = f"{brief(value)} kWh" + ("" if err is None else f" ± {100 * err:.0f} %")
    return Ours(value=value, ci95=None if err is None else (value * (1 - err), value * (1 + err)), text=text, how=how)


def _usd(view: LabView, _figure: PublishedFigure) -> Ours:
    known = [row.usd_marginal for row in view.rows if row.usd_marginal is not None]
    if not known:
        return Ours(how=_why_unknown(view, "usd_marginal", "usd"))
    parts = [
        words
        for words, name in (("energy", "usd_energy_marginal"), ("machine time", "usd_machine_marginal"))
        if any(getattr(row, name) is not None for row in view.rows)
    ]
    return Ours(value=sum(known), text=money(sum(known)), how=f"by the ladder's prices of {listed(parts) or 'a run'}")


def _why_unknown(view: LabView, *columns: str) -> str:
    reasons = [
        why
        for run in view.runs
        if run.record
        for column, why in run.record.unknown.items()
        if column in columns
    ]  # fmt: skip
    return "; ".join(dict.fromkeys(reasons)) or ("no run has finished a row yet" if not view.rows else "not recorded")


def _n_rows(view: LabView) -> str:
    return f"{len(view.rows)} row{plural(len(view.rows))} of {len({row.run_id for row in view.rows})} runs"


# ------------------------------------------------------------------------------------------------------------ the cards


def _temperature_c(view: LabView, _figure: PublishedFigure) -> Ours:
    devices = {run.record.machine.device for run in view.runs if run.record}
    if devices and all(device.startswith("cpu") for device in devices):
        return Ours(how="trained on a CPU: there was no card, and only cards are watched")
    spans = joined([span for run in view.runs for span in run.spans])
    if not spans:
        return Ours(how="no run says when it was in progress")
    found: list[Hottest] = []
    for folder in sorted(view.path.resolve().parent.glob("machine*")):
        found += hottest(folder / "gpu.jsonl", spans)
    if not found:
        return Ours(how="the watchdog's recording beside the lab holds nothing of that time")
    found.sort(key=lambda card: -card.temperature_c)
    each = ", ".join(f"{_card(card)} {card.temperature_c:.0f} °C" for card in found[:4])
    return Ours(value=found[0].temperature_c, how=f"highest of the watchdog's readings while runs were going: {each}")


def _card(card: Hottest) -> str:
    return card.name if card.index is None else f"card {card.index} ({card.name})"


def _peak_vram_bytes(view: LabView, _figure: PublishedFigure) -> Ours:
    known = [(row.peak_vram_bytes, row) for row in view.rows if row.peak_vram_bytes is not None]
    if not known:
        why = _why_unknown(view, "peak_vram_bytes")
        memory = largest_memory(view)
        if memory is None:
            return Ours(how=why)
        plan = memory.estimates[memory.optimizer]
        return Ours(how=f"{why}; for {memory.rung} a card would need {gigabytes(plan.allocated_bytes)} {memory.at}")
    peak, row = max(known, key=lambda found: found[0])
    return Ours(
        value=float(peak),
        how=f"torch's highest allocation, {row.rung} with {_optimizer(row)}; the driver shows the context and the "
        "allocator's reserve on top",
    )


def _optimizer(row: Row) -> str:
    return {"adamw": "AdamW", "adamw8bit": "AdamW8bit"}.get(row.optimizer, row.optimizer)


def _optimizer_saving_frac(view: LabView, _figure: PublishedFigure) -> Ours:
    memory = largest_memory(view)
    if memory is None:
        return Ours(how="no run and no plan says what the largest model is")
    peak = "measured" if memory.measured_bytes is not None else f"predicted {memory.at}"
    return Ours(
        value=memory.saved_of_state_frac,
        text=f"{percent(memory.saved_of_state_frac)} of model state, {percent(memory.saved_of_peak_frac)} of the peak",
        how=f"for {memory.rung}: weights, gradients and moments counted (the embedding's moments stay in 32 bit), the "
        f"peak of {gigabytes(memory.peak_bytes)} with AdamW {peak}",
    )


OURS: dict[FigureName, Callable[[LabView, PublishedFigure], Ours]] = {
    "exponent_n": _exponent_n,
    "exponent_c": _exponent_c,
    "r2": _r2,
    "slope_c": _slope_c,
    "loss_nats": _loss_nats,
    "tokens_total": _tokens_total,
    "flops_total": _flops_total,
    "hours": _hours,
    "kwh": _kwh,
    "usd": _usd,
    "temperature_c": _temperature_c,
    "peak_vram_bytes": _peak_vram_bytes,
    "optimizer_saving_frac": _optimizer_saving_frac,
}
