"""What a simulated ladder would find, as rich tables that read well at 100 columns."""

from typing import TYPE_CHECKING

from homelab_scaling.fit.words import number, short
from homelab_scaling.plan.show import duration, energy, flops

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from homelab_scaling.plan.simulate import Expected, LawOutlook, Simulation, Variant


def simulation_page(simulation: "Simulation") -> "list[RenderableType]":
    """Heading, the intervals to expect, what three changes would do, notes and warnings."""
    from rich.table import Table
    from rich.text import Text

    def item(mark: str, text: str, style: str) -> Table:
        grid = Table.grid(padding=(0, 1))
        grid.add_row(mark, Text(text, style=style))
        return grid

    truth, noise = simulation.truth, simulation.noise
    head = (
        f"Simulated from {truth.source} ({truth.law}, N counts {truth.count}): {simulation.n_worlds} worlds, noise of "
        f"{100 * noise.run_sd:.2g} % per run and {100 * noise.row_sd:.2g} % per row"
    )
    page: list[RenderableType] = [Text(""), Text(head, style="bold")]
    first = simulation.variants[0]
    if any(law.expected for law in first.laws):
        page.append(_expected(first))
    page += [item(" ", line, "dim") for line in _lost(first)]
    page += [_parabolas(first)] if first.parabolas else []
    page.append(_variants(simulation))
    page += [item(" ", note, "dim") for note in simulation.notes]
    page += [item("!", warning, "yellow") for warning in simulation.warnings]
    return page


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    table.caption_justify = "left"
    return table


def _value(one: "Expected", value: float | None) -> str:
    if value is None:
        return "-"
    if not one.in_log:
        return number(value if abs(value) > 1e-4 else 0.0)
    return short(value) if one.name.split(":")[0].lower() != "loss" else number(value)


def interval(one: "Expected | None") -> str:
    """0.46 to 0.55, or 11B to 50B."""
    return "-" if one is None else f"{_value(one, one.ci95[0])} to {_value(one, one.ci95[1])}"


def _short_interval(one: "Expected | None") -> str:
    return "-" if one is None else f"{one.ci95[0]:.3f} to {one.ci95[1]:.3f}"


def _expected(variant: "Variant") -> "Table":
    table = _table("What this ladder would find (95 % of the worlds)", "quantity", "truth", *_titles(variant))
    for one in max((law.expected for law in variant.laws), key=len):
        cells = [_cell(law, one.name) for law in variant.laws]
        table.add_row(one.words, _value(one, one.truth), *cells)
    return table


def _lost(variant: "Variant") -> list[str]:
    """Laws that the rows cannot carry, or often do not pin down."""
    lost = [f"{law.law}: not fitted, {law.why_not}" for law in variant.laws if law.why_not]
    return lost + [
        f"{law.law}: a parameter ends at a bound in {100 * law.loose_frac:.0f} % of the worlds"
        for law in variant.laws
        if law.loose_frac
    ]


def _titles(variant: "Variant") -> list[str]:
    return [law.law for law in variant.laws]


def _cell(law: "LawOutlook", name: str) -> str:
    one = law.get(name)
    if law.law.endswith("-tied") and name in ("a", "beta"):
        return "0.5 by assumption" if name == "a" else "= alpha"
    return interval(one)


def _parabolas(variant: "Variant") -> "Table":
    table = _table(
        "Size of lowest loss by a parabola at each budget", "C", "without noise", "95 % of the worlds", "found in"
    )
    for one in variant.parabolas:
        table.add_row(
            flops(one.flops),
            "not inside" if one.without_noise is None else short(one.without_noise),
            "-" if one.ci95 is None else f"{short(one.ci95[0])} to {short(one.ci95[1])}",
            f"{100 * one.found_frac:.0f} %",
        )
    return table


def _variants(simulation: "Simulation") -> "Table":
    target = simulation.targets[0]
    named = [found for v in simulation.variants for law in v.laws if (found := law.get(target))]
    words = named[0].words if named else target
    table = _table("As written, and three changes", "ladder", "runs", "FLOPs", "time", "kWh", "a", words, "at a bound")
    for one in simulation.variants:
        if one.why_not is not None:
            table.add_row(one.name, "-", "-", "-", "-", "-", "-", "-")
            continue
        law = one.law("chinchilla")
        table.add_row(
            one.name,
            str(one.n_runs),
            flops(one.flops),
            duration(one.seconds),
            energy(one.kwh),
            _short_interval(law.get("a") if law else None),
            interval(law.get(target) if law else None),
            "-" if law is None or law.loose_frac is None else f"{100 * law.loose_frac:.0f} %",
        )
    impossible = [f"{one.name}: not possible, {one.why_not}" for one in simulation.variants if one.why_not]
    caption = ["a and optima by the free law L(N, D) with C = 6 N D", *impossible]
    table.caption = "\n".join(caption) + "\n"
    return table
