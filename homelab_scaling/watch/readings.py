"""What the sensors say, as plain data: facts of a card, one reading, one sample of all cards.

Unknown is None, and `missing` (facts) or `error` (readings) says why; nothing here is ever 0 for want of a sensor.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What does not change while the driver is loaded; probed once."""

    uuid: str
    index: int
    """NVML's order."""
    name: str
    vram_bytes: int
    capability: tuple[int, ...] = ()
    pci_bus_id: str | None = None
    slowdown_c: float | None = None
    """Temperature at which the hardware slows itself down."""
    shutdown_c: float | None = None
    limits_from: Literal["thresholds", "margins"] | None = None
    """`thresholds`: absolute, Ampere and earlier; `margins`: current temperature plus margin, Ada and later, within
    about 2 C."""
    power_limit_w: float | None = None
    """Enforced now."""
    power_limit_default_w: float | None = None
    power_limit_range_w: tuple[float, ...] = ()
    """Lowest and highest that may be set; empty where unknown."""
    sm_clock_max_mhz: float | None = None
    has_energy_counter: bool = False
    n_fans: int | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Quantity -> why it is not there."""


@dataclass(frozen=True, kw_only=True)
class CardReading:
    """One card at one moment."""

    uuid: str
    state: Literal["ok", "lost", "error"] = "ok"
    """`lost`: the driver says it is gone; `error`: this poll failed, the next may not."""
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    """Counter since the watchdog started: resets and driver reloads taken out. Integrated where there is no counter."""
    energy_from: Literal["counter", "integrated"] | None = None
    energy_gap_s: float | None = None
    """Seconds since the start that `energy_j` does not cover (gaps of over 5 s, and unknown ones around a reset)."""
    vram_used_bytes: int | None = None
    vram_reserved_bytes: int | None = None
    sm_clock_mhz: float | None = None
    utilisation_frac: float | None = None
    """Share of the last moment in which some kernel ran; not efficiency."""
    fan_frac: float | None = None
    reasons: tuple[str, ...] | None = None
    """Why the clock is not higher: words of gpu.CLOCK_REASONS; None where the driver does not say."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """All cards at one moment; one line of gpu.jsonl."""

    t_s: float
    """Unix time."""
    poll_s: float
    """What reading it took."""
    cards: tuple[CardReading, ...]

    def card(self, uuid: str) -> CardReading | None:
        return next((c for c in self.cards if c.uuid == uuid), None)


CLOCK_REASONS: dict[int, str] = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
"""NVML's clock-event bits in words. A power cap is normal for a card at its limit; the thermal ones and the brake are
not."""
