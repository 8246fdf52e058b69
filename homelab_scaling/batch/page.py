"""Batch advice as rich tables that read well at 100 columns."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from homelab_scaling.batch.advice import BatchAdvice, RungAdvice
from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.priors import OVERHEAD_FRAC, Prior, band
from homelab_scaling.batch.table import Row
from homelab_scaling.plan.show import duration, energy, flops, money, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from homelab_scaling.batch.probe import ProbePlan
    from homelab_scaling.batch.verify import SweepPlan

SHOWN_SMALLER, SHOWN_LARGER = 8, 16
"""The table shows batches down to an eighth of the chosen one and up to 16 times it."""


def advice_page(advice: BatchAdvice, plan_batches: dict[str, tuple[int, str]]) -> "list[RenderableType]":
    """Everything that batch.json holds, for people.

    Args:
        plan_batches: by rung, the batch that a run would take now and where it comes from.
    """
    from rich.text import Text

    page: list[RenderableType] = [
        _summary(advice),
        Text(f"c = {advice.calibration.c:.3g}: {advice.calibration.sentence}"),
    ]
    if advice.sweep is not None:
        page += [Text(""), _sweep(advice)]
    page += [Text(""), _priors({r.rung: r.priors for r in advice.rungs}, {r.rung: r.b_crit for r in advice.rungs})]
    page += _bands({r.rung: r.band.sentence for r in advice.rungs})
    for rung in advice.rungs:
        page += [Text(""), _rows(rung, plan_batches.get(rung.rung))]
        page.append(Text(f"takes {rung.batch_tokens:,} tokens: {rung.why}", style="bold"))
        page += [Text(note, style="dim") for note in _notes(rung, plan_batches.get(rung.rung))]
    page.append(Text(""))
    page.append(Text(advice.law.compare() if advice.law else f"no law of B_crit over the ladder: {advice.why_no_law}"))
    return page


def dry_page(
    probes: "Sequence[ProbePlan]",
    sweep: "SweepPlan | None",
    priors: dict[str, tuple[Prior, ...]],
    notes: list[str],
) -> "list[RenderableType]":
    """What would be measured and what it costs, beside what published work would take."""
    from rich.text import Text

    from homelab_scaling.batch.measure import bill_of

    bill = bill_of(probes)
    page: list[RenderableType] = [_probes(probes)] if probes else [Text("nothing is left to measure")]
    if probes:
        page.append(Text(f"Total: {flops(bill.flops)} FLOPs, about {duration(bill.seconds)}", style="bold"))
    if sweep is not None:
        page.append(Text(sweep.words))
    page += [Text(note, style="dim") for note in notes]
    page += [Text(""), _priors(priors, {})]
    sentences = {name: band(found).sentence for name, found in priors.items()}
    return page + _bands(sentences)


def _probes(probes: "Sequence[ProbePlan]") -> "Table":
    table = _table(
        "To be measured",
        *("rung", "burn-in", "of horizon", "steps", "K x b", "exact to 20 % up to", "FLOPs", "time"),
    )
    for p in probes:
        table.add_row(
            p.rung,
            f"{p.burn_in_tokens:,}",
            f"{p.burn_in_tokens / p.horizon_tokens:.0%}",
            "+".join(str(len(window.steps)) for window in p.windows),
            f"{p.k} x {p.microbatch_seqs}",
            f"B_simple {number(p.measurable_tokens)}",
            flops(p.flops),
            duration(p.seconds),
        )
    table.caption = (
        "K micro-batches of b sequences are compared on every measuring step; a larger B_simple comes out less "
        "exactly, or as a lower bound; start-up is not counted\n"
    )
    return table


def _bands(sentences: dict[str, str]) -> "list[RenderableType]":
    """Each sentence once, with the rungs it is about."""
    from rich.text import Text

    found: list[RenderableType] = []
    for sentence in dict.fromkeys(sentences.values()):
        names = [name for name, said in sentences.items() if said == sentence]
        found.append(Text(f"{', '.join(names)}: {sentence}", style="dim"))
    return found


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    table.caption_justify = "left"
    return table


def _interval(x: Estimate) -> str:
    return f"{number(x.value)} [{number(x.low)}, {number(x.high)}]"


def _summary(advice: BatchAdvice) -> "Table":
    table = _table(
        f"Batch advice for {advice.ladder} on {advice.device}",
        *("rung", "N", "B_simple, mid-run", "B_crit", "from", "batch", "seqs", "split", "peak lr", "Step Law lr"),
    )
    for r in advice.rungs:
        context = r.shape.context_tokens
        own = r.measured.b_simple if r.measured else None
        table.add_row(
            r.rung,
            number(r.n_params),
            "-" if own is None else _interval(own),
            _interval(r.b_crit),
            r.basis,
            f"{r.batch_tokens:,}",
            f"{r.batch_tokens // context}",
            f"{r.microbatch_seqs_per_rank}x{r.accumulation_steps}x{r.n_processes}",
            f"{r.lr_peak:.2e}",
            f"{r.lr_step_law:.2e}",
        )
    table.caption = (
        "batches in tokens, with 95 % intervals; split = sequences of a micro-batch x accumulation x ranks; at B_crit "
        "a run needs twice the tokens of a small batch\n"
    )
    return table


def _sweep(advice: BatchAdvice) -> "Table":
    assert advice.sweep is not None
    sweep, fit = advice.sweep, advice.sweep.trade_off
    table = _table(
        f"Sweep on {sweep.rung} to a held-out loss of {sweep.target_nats:.3f} nats",
        *("batch", "best lr", "steps", "hyperbola", "tokens", "hyperbola"),
    )
    for trial in sweep.best:
        assert trial.n_steps is not None
        table.add_row(
            f"{trial.batch_tokens:,}",
            f"{trial.lr_peak:.2e}",
            f"{trial.n_steps:,.0f}",
            f"{fit.steps(trial.batch_tokens):,.0f}",
            number(trial.n_steps * trial.batch_tokens),
            number(fit.examples(trial.batch_tokens)),
        )
    bend = fit.bend
    judged = "too few batches to judge it" if bend.p is None else f"F test that it is 1: p = {bend.p:.2g}"
    table.caption = (
        f"S_min {_interval(fit.s_min)} steps, E_min {_interval(fit.e_min)} tokens, B_crit {_interval(fit.b_crit)}; "
        f"scatter {fit.rms:.1%}; with a free exponent {bend.exponent:.2f} it is {bend.rms:.1%} ({judged})\n"
        + "".join(f"{note}\n" for note in sweep.notes)
    )
    return table


def _priors(priors: dict[str, tuple[Prior, ...]], b_crit: dict[str, Estimate]) -> "Table":
    table = _table("Published batches at 20 % overhead, tokens", "prior", *priors, "from")
    names = dict.fromkeys(p.name for found in priors.values() for p in found)
    for name in names:
        by_rung = [next((p for p in found if p.name == name), None) for found in priors.values()]
        source = next(p.source for p in by_rung if p is not None)
        cells = ["-" if p is None else number(p.tokens) + ("?" if p.outside else "") for p in by_rung]
        table.add_row(name, *cells, source)
    if b_crit:
        table.add_section()
        table.add_row("this ladder, 0.2 B_crit", *(number(OVERHEAD_FRAC * b_crit[name].value) for name in priors), "")
    table.caption = "? = outside the study's domain\n"
    return table


def _rows(rung: RungAdvice, planned: tuple[int, str] | None) -> "Table":
    table = _table(
        f"{rung.rung}: to the loss of {number(rung.n_tokens)} tokens at a small batch",
        *("batch", "seqs", "split", "steps", "tokens", "overhead", "tokens/s", "time", "kWh", "USD"),
    )
    for row in rung.rows:
        chosen = row.batch_tokens == rung.batch_tokens
        now = planned is not None and row.batch_tokens == planned[0]
        if not (chosen or now or _shown(row, rung)):
            continue
        table.add_row(
            f"{'> ' if chosen else '* ' if now else '  '}{row.batch_tokens:,}",
            f"{row.batch_seqs}",
            f"{row.microbatch_seqs_per_rank}x{row.accumulation_steps}x{row.n_processes}",
            f"{row.n_steps:,.0f}",
            number(row.tokens),
            f"{row.overhead_frac:.1%}" if row.overhead_frac < 0.1 else f"{row.overhead_frac:.0%}",
            "?" if row.tokens_per_s is None else number(row.tokens_per_s),
            duration(row.seconds),
            energy(row.kwh),
            money(row.usd),
            style="bold" if chosen else None,
        )
    table.caption = "> = advised, * = what the plan takes without this advice\n"
    return table


def _shown(row: Row, rung: RungAdvice) -> bool:
    """Powers of two around the chosen batch."""
    near = rung.batch_tokens / SHOWN_SMALLER <= row.batch_tokens <= rung.batch_tokens * SHOWN_LARGER
    return near and math.log2(row.batch_seqs).is_integer()


def _notes(rung: RungAdvice, planned: tuple[int, str] | None) -> list[str]:
    chosen = next(row for row in rung.rows if row.batch_tokens == rung.batch_tokens)
    notes = [f"lr {rung.lr_peak:.2e}: {rung.lr_source}; speed: {chosen.rate_basis}"]
    if rung.beta2 is not None:
        notes.append(f"beta2 {rung.beta2:.4f}, so that it forgets after as many tokens as before")
    if rung.basis == "forecast" and rung.forecast is not None:
        why = f" ({rung.measured.why_no_number})" if rung.measured and rung.measured.why_no_number else ""
        notes.append(f"not measured{why}; B_crit {rung.forecast.words}")
    if rung.surprise:
        notes.append(rung.surprise)
    if planned is not None and planned[1] in ("ladder", "rung"):
        notes.append(
            f"the ladder fixes {planned[0]:,} tokens (*), and that is what is run; take the line out to follow this"
        )
    return notes
