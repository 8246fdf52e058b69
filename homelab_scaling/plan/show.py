"""A plan as rich tables that read well at 100 columns, and its budget in one line."""

from typing import TYPE_CHECKING

from homelab_scaling.plan.memory import CONTEXT_BYTES, RESERVE_FRAC
from homelab_scaling.plan.parts import HorizonPlan, Plan, RungPlan
from homelab_scaling.plan.rules import gap
from homelab_scaling.plan.seeds import seeds_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def number(n: float) -> str:
    """Three digits and a letter: 66.7k, 1.07M, 2.49B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:
            return f"{n / size:.3g}{letter}" if abs(n) < 999.5 * size else f"{n / size:,.0f}{letter}"
    return f"{n:.3g}"


def tokens(n: float) -> str:
    """Five digits, enough to see what rounding to whole batches did: 749.57k, 1.1744B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.5g}{letter}"
    return f"{n:.0f}"


def flops(n: float) -> str:
    """1.35e17 written so."""
    return f"{n:.2e}".replace("e+", "e")


def duration(seconds: float | None) -> str:
    """54 s, 9.3 min, 8.6 h or 3.1 days; a question mark where unknown."""
    if seconds is None:
        return "?"
    for size, unit in ((86_400 * 2, "days"), (3600, "h"), (60 * 2, "min")):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"


def money(usd: float | None) -> str:
    """Dollars to the cent, or to the last useful digit below one."""
    if usd is None:
        return "?"
    return f"${usd:,.2f}" if usd >= 0.1 else f"${usd:.4f}"


def energy(kwh: float | None) -> str:
    return "?" if kwh is None else f"{kwh:.3g}"


_SOURCES = {
    "[lr]": "the batch of [lr].at_batch_tokens",
    "Step Law": "Step Law's batch",
    "forecast": "a forecast from the rungs that are measured",
    "bound": "a lower bound of the noise scale",
    "prior": "the ladder's own batch",
}


def budget_line(plan: Plan) -> str:
    """What the whole ladder will take, in one sentence; `homelab run` says it first."""
    t = plan.totals
    basis = sorted({r.bill.rate.basis.split(" ")[0] for r in plan.rungs if r.bill.rate})
    ground = f" ({' and '.join(basis)} speeds)" if basis else ""
    runs = f"{t.n_runs} runs" + (f" of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "")
    parts = [
        f"{runs}, {t.n_rows} rows, {number(t.tokens_trained)} tokens, {flops(t.flops)} FLOPs",
        f"about {duration(t.seconds)} one after the other{ground}" if t.seconds is not None else "time unknown",
    ]
    if t.kwh is not None:
        parts.append(f"{energy(t.kwh)} kWh")
    if t.usd is not None:
        parts.append(money(t.usd))
    line = ", ".join(parts)
    if plan.measuring is not None and plan.measuring.rungs:
        m = plan.measuring
        many = f"{len(m.rungs)} batch{'es' * (len(m.rungs) > 1)}"
        line += f"; measuring {many} comes on top: {flops(m.flops)} FLOPs, about {duration(m.seconds)}"
    return line


def measuring_notes(plan: Plan) -> list[str]:
    """What is measured before training, when, and what the plan counts with until then."""
    m = plan.measuring
    if m is None:
        return []
    by_source: dict[str, list[str]] = {}
    for rung in plan.rungs:
        if rung.name in m.rungs:
            by_source.setdefault(_SOURCES.get(rung.training.batch_source, rung.training.batch_source), []).append(
                rung.name
            )
    notes = []
    if m.rungs:
        when = "all in one launch before the first run" if m.together else "each before its rung is trained"
        branches = f", and {m.calibrated_on} is branched at several batches" if m.calibrated_on else ""
        until = "; ".join(f"{', '.join(names)} {source}" for source, names in by_source.items())
        notes.append(
            f"the batch of {', '.join(m.rungs)} is measured by `homelab run`, {when}: a probe trains "
            f"{m.burn_in_frac:.0%} of the longest horizon{branches}; {flops(m.flops)} FLOPs and about "
            f"{duration(m.seconds)} together; until then the plan counts with {until}"
        )
    notes += [f"the batch of {name} cannot be measured: {why}" for name, why in m.kept.items()]
    return notes


def lab_seeds_words(plan: Plan) -> str | None:
    """Which seeds are trained though nobody asked for them now, and why; None where there are none."""
    if not plan.lab_seeds:
        return None
    named = ", ".join(map(str, plan.lab_seeds))
    kind = f"seed{'s' * (len(plan.lab_seeds) > 1)} {named}"
    return f"{kind}: this lab has runs of {'them' if len(plan.lab_seeds) > 1 else 'it'} already, so they go on"


def plan_page(plan: Plan, packed: str | None = None) -> "list[RenderableType]":
    """The whole page: heading, five tables, the budget, notes and warnings.

    Args:
        packed: when everything is done on all cards at once, in words.
    """
    from rich.table import Table
    from rich.text import Text

    def item(mark: str, text: str, style: str) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(mark, Text(text, style=style))
        return grid

    head = f"{plan.ladder}: {plan.question}" if plan.question else plan.ladder
    page: list[RenderableType] = [Text(head, style="bold"), Text(_machine(plan)), Text("")]
    page += [_sizes(plan), _flops(plan), _training(plan), _rows(plan), _cost(plan)]
    page.append(Text(f"Total: {budget_line(plan)}", style="bold"))
    page += [item(" ", packed, "bold")] if packed else []
    page += [item(" ", note, "dim") for note in _notes(plan)]
    page += [item("!", warning, "yellow") for warning in plan.warnings]
    return page


def _machine(plan: Plan) -> str:
    box = plan.box
    where = f"{box.n_gpus} x {box.device}" if box.on_gpu else f"CPU, {box.n_cores} cores"
    if box.vram_bytes:
        where += f", {box.vram_bytes / 2**30:.0f} GiB"
    text = "no shards yet" if plan.n_train_tokens is None else f"{number(plan.n_train_tokens)} training tokens"
    return f"{where}; {text}; vocabulary {plan.n_vocab:,} ({plan.vocab_basis})"


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    table.caption_justify = "left"
    return table


def _shape(rung: RungPlan) -> str:
    s = rung.size.shape
    return f"L{s.n_layer} d{s.d_model} h{s.n_head}"


def _sizes(plan: Plan) -> "Table":
    table = _table(
        "Parameters", "rung", "shape", "body", "position", "embedding", "head", "padding", "total N", "wanted"
    )
    for rung in plan.rungs:
        p, wanted = rung.size.params, rung.size.n_params_wanted
        table.add_row(
            rung.name,
            _shape(rung),
            number(p.n_body),
            number(p.n_pos),
            number(p.n_embed),
            f"{number(p.n_head)}{' tied' if p.tied else ''}",
            number(p.n_padding),
            f"{rung.size.n_params:,}",
            "-" if wanted is None else f"{number(wanted)} ({gap(wanted, rung.size.n_params):+.0%})",
        )
    table.caption = "body = non-embedding: blocks and norms; a tied head and the padding are not counted in N\n"
    return table


def _flops(plan: Plan) -> "Table":
    table = _table(
        "Training FLOPs per token", "rung", "exact (causal)", "full attention", "causal, padded", "full, padded", "6N",
        "6N / exact",
    )  # fmt: skip
    for rung in plan.rungs:
        f = rung.size.flops_per_token
        cells = [flops(x) for x in (f.causal, f.full, f.causal_padded, f.full_padded, f.six_n)]
        table.add_row(rung.name, *cells, f"{f.six_n / f.causal:.2f}")
    return table


def _training(plan: Plan) -> "Table":
    table = _table(
        "Training", "rung", "wanted batch", "batch", "from", "split", "loss", "peak lr", "by", "warm-up", "dtype"
    )
    for rung in plan.rungs:
        t, p = rung.training, rung.placement
        table.add_row(
            rung.name,
            f"{t.batch_tokens_wanted:,}",
            f"{rung.batch_warmup.from_tokens:,} to {t.batch_tokens:,}" if rung.batch_warmup else f"{t.batch_tokens:,}",
            t.batch_source,
            f"{p.microbatch_seqs_per_rank}x{p.accumulation_steps}x{p.n_processes}",
            p.loss_path,
            f"{t.lr_peak:.2e}",
            t.lr_source,
            number(t.warmup_tokens),
            t.precision,
        )
    table.caption = "split = sequences of a micro-batch x accumulation x ranks; batch and warm-up in tokens\n"
    return table


def _rows(plan: Plan) -> "Table":
    table = _table(
        "Rows", "rung", "wanted tokens", "tokens", "steps", "tokens/N", "epochs", "FLOPs", "6ND", "6ND / FLOPs"
    )
    for rung in plan.rungs:
        for index, horizon in enumerate(rung.training.horizons):
            table.add_row(rung.name if index == 0 else "", *_row_cells(horizon))
        other = rung.training.other
        if other is not None:
            table.add_row(f"  ({other.mode})", *_row_cells(other.row), style="dim")
        table.add_section()
    if any(rung.training.other for rung in plan.rungs):
        table.caption = "in brackets: what the other horizons.mode would train (nominal = the published D)\n"
    if len(plan.seeds) > 1:
        table.title = f"Rows of one seed; there are {seeds_words(plan.seeds)}"
    return table


def _row_cells(horizon: HorizonPlan) -> list[str]:
    return [
        tokens(horizon.wanted_tokens),
        tokens(horizon.tokens),
        f"{horizon.n_steps:,}",
        f"{horizon.tokens_per_param:.3g}",
        "?" if horizon.n_epochs is None else f"{horizon.n_epochs:.2f}",
        flops(horizon.flops),
        flops(horizon.flops_6nd),
        f"{horizon.flops_6nd / horizon.flops:.2f}",
    ]


def _cost(plan: Plan) -> "Table":
    """Every line over all seeds, and their sum."""
    card, many = plan.box.vram_bytes, len(plan.seeds) > 1
    over = f" of {seeds_words(plan.seeds)} together" if many else ""
    table = _table(
        f"Memory in GiB, time, money{over}", "rung", "runs", "AdamW8bit", "AdamW", "allocated", "card", "tokens/s",
        "time", "kWh", "USD",
    )  # fmt: skip
    for rung in plan.rungs:
        vram, bill = rung.placement.vram_bytes, rung.bill
        table.add_row(
            rung.name,
            str(bill.n_runs),
            f"{vram['adamw8bit'] / 2**30:.2f}",
            f"{vram['adamw'] / 2**30:.2f}",
            f"{rung.placement.memory[0].allocated_bytes / 2**30:.2f}",
            "-" if card is None else f"{card / 2**30:.0f} {'ok' if rung.placement.fits else 'NO'}",
            "?" if bill.rate is None else number(bill.rate.tokens_per_s),
            duration(bill.seconds),
            energy(bill.kwh),
            money(bill.usd),
        )
    t = plan.totals
    table.add_section()
    table.add_row("all", str(t.n_runs), *[""] * 5, duration(t.seconds), energy(t.kwh), money(t.usd))
    if many:
        n = len(plan.seeds)
        one = [None if value is None else value / n for value in (t.seconds, t.kwh, t.usd)]
        cells = (duration(one[0]), energy(one[1]), money(one[2]))
        table.add_row("one seed", str(t.n_runs // n), *[""] * 5, *cells, style="dim")
    return table


def memory_notes(plan: Plan) -> list[str]:
    """What the memory columns hold, and how they did where rows have measured it."""
    optimizer = plan.rungs[0].placement.memory[0].optimizer
    notes = [
        f"memory is that of a GPU: what torch allocates at its peak (shown for {optimizer}), "
        f"{CONTEXT_BYTES / 2**30:.2f} GiB of CUDA context and {RESERVE_FRAC:.0%} that its allocator holds in reserve; "
        "the latter two are assumed"
    ]
    for rung in plan.rungs:
        seen, predicted = rung.placement.peak_vram_bytes, rung.placement.memory[0].allocated_bytes
        if seen is not None:
            notes.append(
                f"{rung.name}: {seen / 2**30:.2f} GiB allocated at the peak of finished rows, predicted "
                f"{predicted / 2**30:.2f} ({predicted / seen - 1:+.1%})"
            )
    return notes


def _notes(plan: Plan) -> list[str]:
    """Grounds of the guesses, each once."""
    optimizer = plan.rungs[0].placement.memory[0].optimizer
    notes = [words] if (words := lab_seeds_words(plan)) is not None else []
    notes += measuring_notes(plan)
    notes += [f"this ladder trains with {optimizer}", *memory_notes(plan)]
    rates: dict[str, list[str]] = {}
    for rung in plan.rungs:
        if rung.bill.rate:
            rates.setdefault(rung.bill.rate.basis, []).append(rung.name)
    notes += [f"speed of {', '.join(names) if len(rates) > 1 else 'all'}: {basis}" for basis, names in rates.items()]
    notes.append(f"energy: {plan.energy_basis}")
    if plan.totals.usd_energy is not None and plan.totals.usd_machine is not None:
        notes.append(f"USD: {money(plan.totals.usd_energy)} energy, {money(plan.totals.usd_machine)} machine time")
    if plan.totals.kwh is None and plan.totals.usd is not None:
        notes.append("USD counts machine hours only, because the energy is unknown")
    reasons = dict.fromkeys(reason for r in plan.rungs for reason in r.bill.unknown.values())
    notes.extend(f"unknown: {reason}" for reason in reasons if reason not in plan.energy_basis)
    if not plan.runs:
        notes.append("no shards yet, so epochs are unknown and no run has an identity; `homelab run` builds them")
    return notes
