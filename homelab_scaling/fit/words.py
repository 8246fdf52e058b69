"""Numbers as people read them."""

import math


def short(value: float) -> str:
    """3 significant digits with k, M, B or T: 3.00M, 124M, 67.1k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{_digits(value / size)}{letter}" if abs(value) < 1e15 else f"{value:.2e}"
    return _digits(value)


def _digits(value: float) -> str:
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")  # 999.9M is 1.00B, not 1.000B
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:.{min(decimals, 6)}f}"


def number(value: float) -> str:
    """4 significant digits, scientific only where plain digits would be long."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def brief(value: float) -> str:
    """3 significant digits, for exponents and in running text."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def between(low: float, high: float) -> str:
    """An interval: [0.31, 0.37]."""
    return f"[{number(low)}, {number(high)}]"


def listed(names: list[str]) -> str:
    """a; a and b; a, b and c; nothing for nothing."""
    if not names:
        return ""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
