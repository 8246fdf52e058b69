"""What the rows cost: energy at the cards and at the plug, money apart and together, with stated errors."""

from homelab_scaling.fit.words import listed, short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Grid
from homelab_scaling.report.words import duration, known, money
from homelab_scaling.runs import Row

SOURCES = {
    "counter": "the cards' energy counters",
    "integrated": "the cards' power, integrated",
    "stated watts": "the watts that [money] states for the whole machine: an estimate, nothing was measured",
}


def energy_and_money(view: LabView) -> list[Block]:
    """A line per row and the bill of all of them; nothing where no row knows its energy."""
    rows = [row for row in view.rows if row.kwh is not None]
    if not rows:
        return []
    priced = any(row.usd is not None for row in rows)
    prices = ("energy", "machine", "together") if priced else ()
    head = ("rung", "D", "kWh, cards", "kWh, plug", "J/token", "kWh/Mtoken", *prices)
    lines = [_line(row, priced) for row in rows]
    lines.append(_total(rows, priced))
    return [
        Grid(head=head, rows=tuple(lines), left=frozenset({"rung"}), caption=_caption(view, rows)),
    ]


def _line(row: Row, priced: bool) -> tuple[str, ...]:
    measured = row.kwh_from != "stated watts"
    cells = (
        row.rung,
        short(row.n_tokens),
        _with_error(row.kwh, row.kwh_err_frac) if measured else "–",
        _with_error(row.kwh_wall, row.kwh_wall_err_frac),
        known(row.joules_per_token, ".3g"),
        known(row.kwh_per_mtoken, ".3g"),
    )
    return cells + (tuple(map(_dollars, (row.usd_energy, row.usd_machine, row.usd))) if priced else ())


def _total(rows: list[Row], priced: bool) -> tuple[str, ...]:
    measured = [row.kwh_marginal for row in rows if row.kwh_from != "stated watts"]
    cells = ("the bill", "", _sum(measured), _sum([row.kwh_wall_marginal for row in rows]), "", "")
    if not priced:
        return cells
    parts = ("usd_energy_marginal", "usd_machine_marginal", "usd_marginal")
    return cells + tuple(_dollars(_added([getattr(row, part) for row in rows])) for part in parts)


def _added(values: list[float | None]) -> float | None:
    known_values = [v for v in values if v is not None]
    return sum(known_values) if known_values else None


def _sum(values: list[float | None]) -> str:
    return known(_added(values), ".3g")


def _dollars(usd: float | None) -> str:
    return "–" if usd is None else money(usd)


def _with_error(kwh: float | None, err_frac: float | None) -> str:
    return known(kwh, ".3g") + ("" if kwh is None or err_frac is None else f" ± {100 * err_frac:.0f} %")


def _caption(view: LabView, rows: list[Row]) -> str:
    sources = listed([SOURCES[s] for s in dict.fromkeys(row.kwh_from for row in rows) if s is not None])
    text = (
        f"Energy from {sources}. The plug's is a model of the cards' (base load and the power supply's losses); energy "
        "is priced at the plug. Each line is as if the row had been run alone; the bill adds what each row added."
    )
    filled = [row for row in rows if row.kwh_unmetered_frac and row.kwh_unmetered_frac >= 0.005]
    if filled:
        share = max(row.kwh_unmetered_frac or 0.0 for row in filled)
        text += (
            f" In {len(filled)} of {len(rows)} rows no sensor saw up to {100 * share:.0f} % of the time; it is filled "
            "in at the mean power of the rest and is part of the error."
        )
    records = [run.record for run in view.runs if run.record]
    paused = sum((r.seconds_paused or 0.0) + (r.seconds_paced or 0.0) for r in records)
    if paused >= 1:
        text += f" The watchdog made the runs wait for {duration(paused)} to cool the cards; that is in no figure here."
    return text
