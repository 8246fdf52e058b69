"""What `homelab ddp` found, as rich tables that read well at 100 columns; every efficiency names its scaling."""

import time
from typing import TYPE_CHECKING

from homelab_scaling.bench.ddp_job import mib
from homelab_scaling.plan.ddp_judge import Judgement
from homelab_scaling.plan.ddp_times import DdpMeasurement, Sweep
from homelab_scaling.plan.show import duration, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from homelab_scaling.bench.ddp import DdpReport


def ms(seconds: float) -> str:
    """Milliseconds in three digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def judgement_lines(j: Judgement) -> list[str]:
    """A judgement of step times, one figure a line."""
    cards = "two cards" if j.n_ranks == 2 else f"{j.n_ranks} cards"
    lines = [f"one card {ms_exact(j.t1_full_s)} ms a step, {cards} with DDP {ms_exact(j.t_ddp_s)} ms"]
    if j.compute_s is not None and j.communication_s is not None and j.overhead_frac is not None:
        lines.append(
            f"overhead: {j.overhead_frac:.1%} of the DDP step is communication ({ms_exact(j.communication_s)} of "
            f"{ms_exact(j.t_ddp_s)} ms; {ms_exact(j.compute_s)} compute)"
        )
    lines.append(
        f"strong scaling (the same batch, split): efficiency {j.strong_efficiency:.1%}, "
        f"speed-up {j.strong_speedup:.2f}x"
    )
    lines.append(
        f"weak scaling (the same batch per card): efficiency {j.weak_efficiency:.1%}, throughput {j.weak_speedup:.2f}x"
        + (f"; {j.why_two_weaks}" if j.why_two_weaks else "")
    )
    return [*lines, f"advice: {j.words}"]


def ms_exact(seconds: float) -> str:
    """Milliseconds as somebody gave them."""
    return f"{1e3 * seconds:.4g}"


def page(report: "DdpReport") -> "list[RenderableType]":
    """Everything, in reading order."""
    from rich.text import Text

    parts: list[RenderableType] = []
    m = report.measurement
    if m is not None:
        parts += [Text(_heading(m)), _sweeps(m), *(Text(line) for line in _links(m)), Text("")]
        if m.rungs:
            parts += [_times(m), Text(LEGEND, style="dim"), Text(""), _verdicts(report), Text("")]
        parts += [Text(f"rung {name}: {why}") for name, why in m.skipped.items()]
    parts += [_advice(report), *(Text(line) for line in _closing(report))]
    return parts


def as_text(report: "DdpReport", width: int = 100) -> str:
    """The page without colours."""
    import io

    from rich.console import Console

    console = Console(width=width, no_color=True, highlight=False, record=True, file=io.StringIO())
    for part in page(report):
        console.print(part)
    return console.export_text().rstrip()


def _heading(m: DdpMeasurement) -> str:
    who = f"{m.n_ranks} x {m.device}" if m.threads_per_rank is None else f"{m.n_ranks} CPU ranks"
    threads = "" if m.threads_per_rank is None else f" of {m.threads_per_rank} thread{'s' * (m.threads_per_rank > 1)}"
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.measured_s))
    return f"{who}{threads}, {m.backend}, torch {m.torch}, measured {day}"


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _sweeps(m: DdpMeasurement) -> "Table":
    """Seconds and bandwidth of each size, under each setting."""
    sweeps = [m.sweep, *([m.other_sweep] if m.other_sweep else [])]
    columns = [c for s in sweeps for c in (f"ms\n{s.setting}", "middle half", "GB/s")]
    table = _table("All-reduce of fp32 gradients", "size", *columns)
    sizes = sorted({t.n_bytes for s in sweeps for t in s.transfers})
    for size in sizes:
        table.add_row(mib(size), *(cell for s in sweeps for cell in _transfer(s, size, m.n_ranks)))
    for name, why in m.sweep.skipped.items():
        table.add_row(name, f"not tried: {why}")
    return table


def _transfer(sweep: Sweep, size: int, n_ranks: int) -> tuple[str, str, str]:
    from homelab_scaling.plan.ddp import ring_bytes

    found = next((t for t in sweep.transfers if t.n_bytes == size), None)
    if found is None:
        return "", "", ""
    t = found.timed
    return ms(t.seconds), f"{ms(t.low_s)} to {ms(t.high_s)}", f"{ring_bytes(size, n_ranks) / t.seconds / 1e9:.3g}"


def _links(m: DdpMeasurement) -> list[str]:
    if m.why_no_links is not None:
        return [f"PCIe and peer-to-peer: {m.why_no_links}"]
    lines = []
    for link in m.links:
        now = f"gen {link.generation or '?'} x{link.width or '?'}"
        most = f" of gen {link.generation_max} x{link.width_max}" if link.generation_max and link.width_max else ""
        lines.append(f"card {link.index} ({link.name}): PCIe {now}{most}")
    lines += [f"peer-to-peer, cards {p.first} and {p.second}: {p.p2p}" for p in m.pairs]
    return lines


LEGEND = (
    "whole: the whole batch on one rank; share: one rank's part of it. alone: the others wait; together: all compute, "
    "as independent runs do. DDP takes the share, without and with exchanging gradients. Spread: half of the middle "
    "half of the timings over their median, at its worst."
)
NOISE = "noise"
"""Where a difference of two timings came out below zero."""


def _times(m: DdpMeasurement) -> "Table":
    extra = [("DDP\n25 MiB", "sync_bucket_25"), ("DDP\nbf16", "sync_bf16")]
    extra = [(title, key) for title, key in extra if any(getattr(r, key) is not None for r in m.rungs)]
    table = _table(
        "One optimizer step, ms (medians)",
        *("rung", "tokens", "whole\nalone", "share\nalone", "whole\ntogether", "share\ntogether"),
        *("DDP\nno sync", "DDP\nsync", *(title for title, _ in extra), "spread"),
    )
    for r in m.rungs:
        kinds = (r.alone_full, r.alone_rank, r.together_full, r.together_rank, r.no_sync, r.sync)
        more = [getattr(r, key) for _, key in extra]
        spread = max(t.spread_frac for t in [*kinds, *(t for t in more if t)])
        table.add_row(
            r.rung,
            number(r.batch_tokens),
            *(ms(t.seconds) for t in kinds),
            *("" if t is None else ms(t.seconds) for t in more),
            f"{spread:.0%}",
        )
    return table


def _verdicts(report: "DdpReport") -> "Table":
    m = report.measurement
    assert m is not None
    cards, runs = words_of(m.n_ranks, on_cpu=m.threads_per_rank is not None)
    table = _table(
        f"What {cards} make of it",
        *("rung", "compute\nms", "exposed\ncomm. ms", "overhead", "wrapper\nms", "strong\neff."),
        *("strong\nspeed-up", "weak\neff.", "weak\ngain", f"{runs}\ngain"),
    )
    for verdict in report.verdicts:
        j = verdict.judgement
        table.add_row(
            verdict.rung,
            ms(j.compute_s or 0.0),
            ms(j.communication_s) if j.communication_s else NOISE,
            f"{j.overhead_frac:.1%}" if j.overhead_frac else NOISE,
            ms(j.wrapper_s) if j.wrapper_s and j.wrapper_s > 0 else NOISE,
            f"{j.strong_efficiency:.0%}",
            f"{j.strong_speedup:.2f}x",
            f"{j.weak_efficiency:.0%}",
            f"{j.weak_speedup:.2f}x",
            f"{j.runs_speedup:.2f}x",
        )
    return table


def words_of(n_ranks: int, *, on_cpu: bool) -> tuple[str, str]:
    """`two cards` and `two runs`."""
    n = "two" if n_ranks == 2 else str(n_ranks)
    return f"{n} {'CPU ranks' if on_cpu else 'cards'}", f"{n} runs"


def _advice(report: "DdpReport") -> "Table":
    m = report.measurement
    cards, runs = words_of(report.n_ranks, on_cpu=m is not None and m.threads_per_rank is not None)
    table = _table(
        f"Ladder {report.ladder} on {cards}",
        *("rung", "tokens\nper rank", "strong\neff.", "faster than\none from", f"90 % of\n{runs} from"),
        *("a run with\nnone beside", "in this ladder"),
    )
    for rung in report.advice.rungs:
        table.add_row(
            rung.rung,
            number(rung.tokens_per_rank),
            f"{rung.efficiency:.0%}",
            _tokens(rung.pays_from.at_all_tokens),
            _tokens(rung.pays_from.well_tokens),
            rung.alone,
            runs if rung.advice == "two independent runs" else rung.advice,
        )
    for column in table.columns[-2:]:
        column.justify = "left"
    return table


def _tokens(n: int | None) -> str:
    return "never" if n is None else number(n)


def _closing(report: "DdpReport") -> list[str]:
    mix = report.advice.mix
    grounds: dict[str, list[str]] = {}
    for rung in report.advice.rungs:
        grounds.setdefault(rung.basis, []).append(rung.rung)
    lines = ["Tokens are per rank between two syncs, efficiencies at the ladder's own batch. They stand on:"]
    lines += [f"  {', '.join(names)}: {basis}" for basis, names in grounds.items()]
    lines.append(f"The whole ladder: {report.advice.words}; earliest {duration(mix.seconds)}.")
    m = report.measurement
    if m is not None and m.threads_per_rank is not None:
        lines.append("CPU ranks show the method; on a CPU `homelab run` trains with one process of all cores.")
    if report.saved:
        used = "; `homelab plan` and `homelab run` reckon with it from now on"
        lines.append(f"saved: {report.saved}{used if m is None or m.threads_per_rank is None else ''}")
    return lines
