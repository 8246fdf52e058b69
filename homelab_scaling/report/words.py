"""Small phrases that every part of a report uses."""

import importlib.resources
from pathlib import Path

from homelab_scaling.fit.result import Estimate, FitReport, ScalingFit
from homelab_scaling.fit.words import between, brief, listed, number
from homelab_scaling.report.collect import LabView
from homelab_scaling.runs import Row

COUNTS = {"total": "all parameters", "body": "body only", "body+head": "body and head"}
"""What N counts, in a word or two."""


def main_fit(report: FitReport | None, law: str) -> ScalingFit | None:
    """The main fit of a law, where it was fitted at all."""
    fit = report.get(law) if report else None
    return fit if fit is not None and fit.is_fitted else None


def in_brackets(e: Estimate) -> str:
    """ " [low, high]", or nothing where there is no interval."""
    return f" [{brief(e.ci95[0])}, {brief(e.ci95[1])}]" if e.ci95 else ""


def r2_text(fit: ScalingFit) -> str:
    e = fit.derived.get("r2_log")
    return "–" if e is None or e.value is None else f"{e.value:.4f}" if e.value > 0.99 else f"{e.value:.3f}"


def loss_text(row: Row) -> str:
    return f"{row.loss_nats:.4f}" + ("" if row.loss_se_nats is None else f" ± {row.loss_se_nats:.4f}")


def known(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def plural(count: int) -> str:
    return "" if count == 1 else "s"


def sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def duration(seconds: float) -> str:
    """12 s, 3.4 min, 2.1 h, 5.0 days."""
    for size, unit in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def money(dollars: float) -> str:
    """$12.30, $0.0041."""
    return f"${dollars:,.2f}" if dollars >= 0.1 or dollars == 0 else f"${dollars:.2g}"


def percent(share: float) -> str:
    """3.6 %, 35 %, 0.0021 %."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 10 else f"{value:.1f} %" if abs(value) >= 1 else f"{value:.2g} %"


def flops_text(flops: float) -> str:
    """1.2e18."""
    return f"{flops:.3g}".replace("e+", "e")


def gigabytes(n_bytes: float) -> str:
    """14.2 GB, 34.1 MB."""
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.3g} MB"


def rows_words(fit: ScalingFit) -> str:
    return fit.rows.split(":")[0]


def value_text(e: Estimate) -> str:
    return "not pinned down" if e.value is None else number(e.value)


def interval_text(e: Estimate) -> str:
    return "–" if e.ci95 is None else between(*e.ci95)


def ladder_file(name: str) -> str:
    """Of which file a lab was made: a shipped one, or the user's own by its name."""
    shipped = Path(str(importlib.resources.files("homelab_scaling.recipes"))) / "ladders" / f"{name}.toml"
    return f"recipes/ladders/{name}.toml" if shipped.is_file() else f"{name}.toml"


def machine_words(view: LabView) -> str:
    machines = {(r.record.machine.device, r.record.machine.n_processes) for r in view.runs if r.record}
    if not machines:
        return "this machine"
    named = []
    for device, n in sorted(machines):
        one = "a CPU" if device == "cpu" else device
        named.append(f"{n} x {device}" if n > 1 and device != "cpu" else one)
    return listed(named)
