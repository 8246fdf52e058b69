"""Numbers and moments as the monitor writes them. Unknown is a dash, zero is a zero."""

from datetime import datetime

from homelab_scaling.fit.words import short
from homelab_scaling.watch.ahead import duration
from homelab_scaling.watch.frame import Span

UNKNOWN = "–"
GIB = 2**30


def tokens(n: float) -> str:
    return short(n)


def count(n: int) -> str:
    return f"{n:,}"


def whole(value: float | None, unit: str = "") -> str:
    """2,520 MHz, or a dash."""
    return UNKNOWN if value is None else f"{value:,.0f}{unit}"


def percent(frac: float | None) -> str:
    if frac is None:
        return UNKNOWN
    shown = 100 * frac
    return f"{shown:.1f} %" if 0 < shown < 1 else f"{shown:.0f} %"


def loss(nats: float | None) -> str:
    return UNKNOWN if nats is None else f"{nats:.3f}"


def step(seconds: float | None) -> str:
    """84 ms, 1.07 s."""
    if seconds is None:
        return UNKNOWN
    return (
        f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s" if seconds < 99.5 else f"{seconds:.0f} s"
    )


def gib(n_bytes: float | None) -> str:
    """10.4, 16: in GiB, without a decimal that says nothing."""
    return UNKNOWN if n_bytes is None else f"{n_bytes / GIB:.1f}".removesuffix(".0")


def kwh(amount: float) -> str:
    """2.31 kWh, 8.4 Wh."""
    if amount != 0 and amount < 0.0095:
        return f"{1000 * amount:.2g} Wh" if amount >= 1e-4 else f"{1000 * amount:.1g} Wh"
    digits = 3 if amount < 0.0995 else 2 if amount < 9.995 else 1
    return f"{amount:.{digits}f} kWh" if 0 < amount < 99.95 else f"{amount:,.0f} kWh"


def usd(amount: float) -> str:
    """$12.30, $0.0041, $0."""
    if amount == 0:
        return "$0"
    return f"${amount:,.2f}" if amount >= 0.095 else f"${amount:.2g}" if amount >= 1e-4 else "under $0.0001"


def span(left: Span) -> str:
    """2 h 30 min to 3 h 5 min."""
    low, high = duration(left.low), duration(left.high)
    return low if low == high else f"{low} to {high}"


def ago(seconds: float) -> str:
    """0.8 s, 12 s, 3 min."""
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def clock(t_s: float, *, seconds: bool = True) -> str:
    """Local time."""
    return datetime.fromtimestamp(t_s).strftime("%H:%M:%S" if seconds else "%H:%M")


def when(t_s: float, now_s: float) -> str:
    """16:43, Sun 03:12 or 2027-01-05 03:12: a moment to come, as precise as it is near."""
    moment = datetime.fromtimestamp(t_s)
    if t_s - now_s < 20 * 3600:
        return moment.strftime("%H:%M")
    return moment.strftime("%a %H:%M" if t_s - now_s < 6 * 86_400 else "%Y-%m-%d")
