"""What one card can tell, found out once: its facts, and the readers that every poll goes through."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

from homelab_scaling.watch.nvml import Fault, Nvml, signed
from homelab_scaling.watch.readings import CardFacts

T = TypeVar("T")
Values = tuple[Any, ...]

CLOCK_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clock",
}
"""Bit of NVML's clock event reasons -> word. `power cap` is what a card does at its power limit all day."""

SLOWLY_S = 10.0
"""Fans (137 us a call) and the power limit are asked this often."""
RETRIES = 3
"""Failing polls in a row before a quantity is given up."""
GIVEN_UP_S = 60.0
"""A quantity given up is asked again after this long."""
PLAUSIBLE_LIMIT_C = (50.0, 125.0)
ADA = (8, 9)

SHUTDOWN_MARGIN_FIELD, SLOWDOWN_MARGIN_FIELD, INSTANT_POWER_FIELD, ENERGY_FIELD = 193, 194, 186, 83
GPU_SENSOR, SM_CLOCK, SHUTDOWN_THRESHOLD, SLOWDOWN_THRESHOLD = 0, 1, 0, 1


class Quantity:
    """One question asked in the loop, what it last gave, and since when it gives nothing."""

    def __init__(self, fields: tuple[str, ...], read: Callable[[], Values], every_s: float = 0.0) -> None:
        self.fields = fields
        self.values: Values = (None,) * len(fields)
        self.error: str | None = None
        """Of the last time it was asked."""
        self.n_failed = 0
        self._read, self._every_s = read, every_s
        self._asked_s = float("-inf")

    @property
    def given_up(self) -> bool:
        return self.n_failed >= RETRIES

    def refresh(self, now_s: float) -> None:
        """Asks if it is time to.

        Raises:
            Fault: the card is lost; other faults leave None and `error`.
        """
        every_s = GIVEN_UP_S if self.given_up else 0.0 if self.n_failed else self._every_s
        if 0 <= now_s - self._asked_s < every_s:
            return
        self._asked_s = now_s
        try:
            self.values, self.error, self.n_failed = self._read(), None, 0
        except Fault as fault:
            if fault.kind == "lost":
                raise
            self.values = (None,) * len(self.fields)
            self.error, self.n_failed = str(fault), self.n_failed + 1


def decode_reasons(bits: int) -> tuple[str, ...]:
    """Words for the bits that are set, a bit without one as `bit 0x800`."""
    set_bits = (1 << n for n in range(bits.bit_length()) if bits >> n & 1)
    return tuple(CLOCK_REASONS.get(bit, f"bit {bit:#x}") for bit in set_bits)


def probe_card(nvml: Nvml, index: int, handle: Any) -> tuple[CardFacts, list[Quantity]]:
    """The facts of a card, with the reason for each that it lacks, and the readers of what it has.

    Raises:
        Fault: the card is lost, or does not even tell its UUID, name and memory.
    """
    return _Probe(nvml, handle).run(index)


class _Probe:
    def __init__(self, nvml: Nvml, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.missing: dict[str, str] = {}

    def run(self, index: int) -> tuple[CardFacts, list[Quantity]]:
        call = self.call
        uuid, name = call("nvmlDeviceGetUUID"), call("nvmlDeviceGetName")
        vram_bytes = call("nvmlDeviceGetMemoryInfo").total
        capability = tuple(self.ask("capability", lambda: call("nvmlDeviceGetCudaComputeCapability")) or ())
        quantities = self._quantities()
        slowdown_c, shutdown_c, limits_from = self._thermal_limits(capability)
        watts = self.ask("power_limit_range_w", lambda: call("nvmlDeviceGetPowerManagementLimitConstraints"))
        has_counter = any("counter_j" in q.fields for q in quantities)
        if not has_counter and "power_w" in self.missing:
            self.missing["energy_j"] = f"no energy counter ({self.missing['energy_counter']}) and no power to integrate"
        facts = CardFacts(
            uuid=uuid,
            index=index,
            name=name,
            vram_bytes=vram_bytes,
            capability=capability,
            pci_bus_id=self.ask("pci_bus_id", lambda: _text(call("nvmlDeviceGetPciInfo").busId)),
            slowdown_c=slowdown_c,
            shutdown_c=shutdown_c,
            limits_from=limits_from,
            power_limit_w=_value_of(quantities, "power_limit_w"),
            power_limit_default_w=self.ask(
                "power_limit_default_w", lambda: call("nvmlDeviceGetPowerManagementDefaultLimit") / 1e3
            ),
            power_limit_range_w=tuple(w / 1e3 for w in watts or ()),
            sm_clock_max_mhz=self.ask("sm_clock_max_mhz", lambda: float(call("nvmlDeviceGetMaxClockInfo", SM_CLOCK))),
            has_energy_counter=has_counter,
            n_fans=self.ask("n_fans", lambda: int(call("nvmlDeviceGetNumFans"))),
            missing=dict(self.missing),
        )
        return facts, quantities

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.nvml.call(name, self.handle, *args, **options)

    def ask(self, quantity: str, *ways: Callable[[], T]) -> T | None:
        """The first answer of several ways to ask; None with the reason noted."""
        reasons = []
        for way in ways:
            try:
                return way()
            except Fault as fault:
                if fault.kind == "lost":
                    raise
                reasons.append(str(fault))
        self.missing[quantity] = "; ".join(dict.fromkeys(reasons))
        return None

    # ---------------------------------------------------------------------------------------------- what polls ask

    def _quantities(self) -> list[Quantity]:
        call, field = self.call, partial(self.nvml.field, self.handle)
        found = [
            self._quantity(
                ("temperature_c",),
                lambda: (float(call("nvmlDeviceGetTemperatureV", GPU_SENSOR)),),
                lambda: (float(call("nvmlDeviceGetTemperature", GPU_SENSOR)),),
            ),
            self._quantity(
                ("power_w",),
                lambda: (_positive(field(INSTANT_POWER_FIELD)) / 1e3,),
                lambda: (call("nvmlDeviceGetPowerUsage") / 1e3,),
            ),
            self._quantity(
                ("counter_j",),
                lambda: (call("nvmlDeviceGetTotalEnergyConsumption") / 1e3,),
                lambda: (field(ENERGY_FIELD) / 1e3,),
            ),
            self._memory(),
            self._quantity(("sm_clock_mhz",), lambda: (float(call("nvmlDeviceGetClockInfo", SM_CLOCK)),)),
            self._quantity(("utilisation_frac",), lambda: (call("nvmlDeviceGetUtilizationRates").gpu / 100,)),
            self._quantity(
                ("reasons",),
                lambda: (decode_reasons(call("nvmlDeviceGetCurrentClocksEventReasons")),),
                lambda: (decode_reasons(call("nvmlDeviceGetCurrentClocksThrottleReasons")),),
            ),
            self._quantity(
                ("power_limit_w",), lambda: (call("nvmlDeviceGetEnforcedPowerLimit") / 1e3,), every_s=SLOWLY_S
            ),
            self._quantity(("fan_frac",), self._fastest_fan, self._only_fan, every_s=SLOWLY_S),
        ]
        if "counter_j" in self.missing:
            self.missing["energy_counter"] = self.missing.pop("counter_j")
        return [q for q in found if q is not None]

    def _quantity(self, fields: tuple[str, ...], *ways: Callable[[], Values], every_s: float = 0.0) -> Quantity | None:
        """The first way that the driver knows; one that only stumbled now is kept, polls will try it again."""
        reasons = []
        for way in ways:
            quantity = Quantity(fields, way, every_s)
            try:
                quantity.values = way()
                return quantity
            except Fault as fault:
                if fault.kind == "lost":
                    raise
                if fault.kind == "transient":
                    return quantity
                reasons.append(str(fault))
        self.missing.update(dict.fromkeys(fields, "; ".join(dict.fromkeys(reasons))))
        return None

    def _memory(self) -> Quantity | None:
        """Version 2 tells used and reserved apart; version 1 counts the reserved as used since driver 510."""

        def version_2() -> Values:
            info = self.call("nvmlDeviceGetMemoryInfo", version=self.nvml.api.nvmlMemory_v2)
            return info.used, info.reserved

        found = self._quantity(("vram_used_bytes", "vram_reserved_bytes"), version_2)
        if found is not None:
            return found
        self.missing.pop("vram_used_bytes", None)
        return self._quantity(("vram_used_bytes",), lambda: (self.call("nvmlDeviceGetMemoryInfo").used,))

    def _fastest_fan(self) -> Values:
        n_fans = self.call("nvmlDeviceGetNumFans")
        if n_fans == 0:
            raise Fault("unsupported", "the card has no fan of its own")
        return (max(self.call("nvmlDeviceGetFanSpeed_v2", fan) for fan in range(n_fans)) / 100,)

    def _only_fan(self) -> Values:
        return (self.call("nvmlDeviceGetFanSpeed") / 100,)

    # ------------------------------------------------------------------------------------------------------ limits

    def _thermal_limits(
        self, capability: Sequence[int]
    ) -> tuple[float | None, float | None, Literal["thresholds", "margins"] | None]:
        """Slowdown and shutdown temperature, and where they come from.

        Ampere and earlier give them outright. Ada and later give margins: the distance to slowdown, and where shutdown
        lies against it. What the margin is counted from (slowdown, or the highest operating temperature 2 C below) the
        documentation leaves open: the lower of the two is taken.
        """
        ways: tuple[tuple[Literal["thresholds", "margins"], Callable[[], tuple[float, float | None]]], ...]
        ways = (("thresholds", self._by_thresholds), ("margins", self._by_margins))
        if tuple(capability) >= ADA:
            ways = ways[::-1]
        reasons = []
        for name, way in ways:
            try:
                slowdown_c, shutdown_c = way()
            except Fault as fault:
                if fault.kind == "lost":
                    raise
                reasons.append(f"{name}: {fault}")
                continue
            if shutdown_c is None:
                self.missing["shutdown_c"] = f"{name} tell only the slowdown"
            return slowdown_c, shutdown_c, name
        self.missing.update(dict.fromkeys(("slowdown_c", "shutdown_c"), "; ".join(reasons)))
        return None, None, None

    def _by_thresholds(self) -> tuple[float, float | None]:
        slowdown_c = _plausible_limit(self.call("nvmlDeviceGetTemperatureThreshold", SLOWDOWN_THRESHOLD))
        try:
            shutdown_c = _plausible_limit(self.call("nvmlDeviceGetTemperatureThreshold", SHUTDOWN_THRESHOLD))
        except Fault as fault:
            if fault.kind == "lost":
                raise
            return slowdown_c, None
        return slowdown_c, shutdown_c if shutdown_c >= slowdown_c else None

    def _by_margins(self) -> tuple[float, float | None]:
        margin_c = self.call("nvmlDeviceGetMarginTemperature")
        try:
            temperature_c = self.call("nvmlDeviceGetTemperatureV", GPU_SENSOR)
        except Fault as fault:
            if fault.kind == "lost":
                raise
            temperature_c = self.call("nvmlDeviceGetTemperature", GPU_SENSOR)
        slowdown_c = _plausible_limit(temperature_c + margin_c)
        try:
            shutdown, slowdown = self.nvml.fields(self.handle, (SHUTDOWN_MARGIN_FIELD, SLOWDOWN_MARGIN_FIELD))
        except Fault as fault:
            if fault.kind == "lost":
                raise
            return slowdown_c, None
        if isinstance(shutdown, Fault) or isinstance(slowdown, Fault):
            return slowdown_c, None
        beyond_c = signed(slowdown) - signed(shutdown)
        return slowdown_c, slowdown_c + beyond_c if beyond_c >= 0 else None


def _plausible_limit(value: float) -> float:
    low, high = PLAUSIBLE_LIMIT_C
    if not low <= value <= high:
        raise Fault("unsupported", f"the driver says {value:g} C, which no limit is")
    return float(value)


def _positive(value: float) -> float:
    if value <= 0:
        raise Fault("unsupported", "always 0")
    return value


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _value_of(quantities: Sequence[Quantity], field: str) -> Any:
    return next((q.values[q.fields.index(field)] for q in quantities if field in q.fields), None)
