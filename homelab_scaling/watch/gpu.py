"""What NVML says about the cards of this machine. The only importer of `pynvml` (from nvidia-ml-py).

`open_sensors()` is for the watchdog's loop, `list_cards()` for whoever only wants to know what is plugged in.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from homelab_scaling.watch.meter import LONGEST_GAP_S, EnergyMeter, PollTimes
from homelab_scaling.watch.nvml import Fault, Nvml
from homelab_scaling.watch.probe import CLOCK_REASONS, Quantity, decode_reasons, probe_card
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample

__all__ = ["CLOCK_REASONS", "Card", "Fault", "SensorSource", "Sensors", "decode_reasons", "list_cards", "open_sensors"]

PROCESS_CALLS: tuple[tuple[Literal["compute", "graphics"], str], ...] = (
    ("compute", "nvmlDeviceGetComputeRunningProcesses"),
    ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
)


def bindings() -> Any:
    """The module `pynvml` of nvidia-ml-py.

    Raises:
        ImportError: it is not installed, or another module of that name stands before it.
    """
    module = importlib.import_module("pynvml")
    if not hasattr(module, "_nvmlGetFunctionPointer"):
        raise ImportError("the module pynvml is not nvidia-ml-py's; reinstall nvidia-ml-py")
    return module


# -------------------------------------------------------------------------------------------------------- what is here


@dataclass(frozen=True, kw_only=True)
class Card:
    """One NVIDIA GPU, as the driver names it."""

    index: int
    """NVML's order (PCI bus), which is CUDA's only with CUDA_DEVICE_ORDER=PCI_BUS_ID."""
    uuid: str
    name: str
    vram_bytes: int
    capability: tuple[int, ...]
    """CUDA compute capability, for example (8, 9)."""

    @property
    def computes_bf16(self) -> bool:
        """bf16 matmul in hardware: Ampere (8.0) and later."""
        return self.capability >= (8, 0)


def list_cards() -> list[Card]:
    """Every card that answers; empty without a driver or a card. A lost card never hides the others."""
    cards = []
    try:
        with open_nvml() as nvml:
            for index in range(nvml.call("nvmlDeviceGetCount")):
                with contextlib.suppress(Fault):
                    cards.append(_describe(nvml, index))
    except Fault:
        return []
    return cards


def _describe(nvml: Nvml, index: int) -> Card:
    handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
    return Card(
        index=index,
        uuid=nvml.call("nvmlDeviceGetUUID", handle),
        name=nvml.call("nvmlDeviceGetName", handle),
        vram_bytes=nvml.call("nvmlDeviceGetMemoryInfo", handle).total,
        capability=tuple(nvml.call("nvmlDeviceGetCudaComputeCapability", handle)),
    )


@contextlib.contextmanager
def open_nvml(api: Any = None) -> Iterator[Nvml]:
    """NVML for a few questions.

    Raises:
        Fault: there is no driver, or it does not answer.
        ImportError: no usable bindings.
    """
    nvml = Nvml(api or bindings())
    nvml.call("nvmlInit")
    try:
        yield nvml
    finally:
        with contextlib.suppress(Fault):
            nvml.call("nvmlShutdown")


# ------------------------------------------------------------------------------------------------------------- sensors


class SensorSource(Protocol):
    """Where samples come from: the driver, a recording, or a test."""

    source: str
    """nvml, or the file that is replayed."""

    @property
    def interval_s(self) -> float:
        """Wanted between two polls now."""

    @property
    def facts(self) -> tuple[CardFacts, ...]: ...
    @property
    def error(self) -> str | None: ...
    @property
    def poll_p50_s(self) -> float: ...
    @property
    def poll_p99_s(self) -> float: ...
    def poll(self, now_s: float) -> Sample: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class CardProcess:
    """A process that holds memory on a card."""

    pid: int
    kind: Literal["compute", "graphics"]
    vram_bytes: int | None
    """None where the driver does not say (containers)."""


class _Watched:
    """One card in the loop."""

    def __init__(self, handle: Any, facts: CardFacts, quantities: list[Quantity]) -> None:
        self.handle, self.facts = handle, facts
        self.lost: str | None = None
        """Why it must not be asked any more."""
        self._quantities = quantities
        self._meter = EnergyMeter()

    def read(self, now_s: float, interval_s: float) -> CardReading:
        if self.lost is None:
            try:
                for quantity in self._quantities:
                    quantity.refresh(now_s)
            except Fault as fault:
                self.lose(fault)
        values: dict[str, Any] = {}
        if self.lost is None:
            values = {field: v for q in self._quantities for field, v in zip(q.fields, q.values, strict=True)}
        counter_j, power_w = values.pop("counter_j", None), values.get("power_w")
        gap_s = max(LONGEST_GAP_S, 1.5 * interval_s)  # the slow interval is itself 5 s
        self._meter.add(now_s, counter_j=counter_j, power_w=power_w, longest_gap_s=gap_s)
        energy_j = self._meter.total_j
        energy: dict[str, Any] = {}
        if energy_j is not None:
            energy = {"energy_j": energy_j, "energy_gap_s": self._meter.gap_s}
            counted = counter_j is not None or (self.lost is not None and self.facts.has_energy_counter)
            energy["energy_from"] = "counter" if counted else "integrated"
        if self.lost is not None:
            return CardReading(uuid=self.facts.uuid, state="lost", error=self.lost, **energy)
        failing = {field: q.error for q in self._quantities for field in q.fields if q.error is not None}
        blind = "temperature_c" in failing or (failing and all(v is None for v in values.values()))
        return CardReading(
            uuid=self.facts.uuid,
            state="error" if blind else "ok",
            error="; ".join(f"{field}: {why}" for field, why in failing.items()) or None,
            **values,
            **energy,
        )

    def lose(self, fault: Fault) -> None:
        self.lost, self.handle = str(fault), None

    def current_facts(self) -> CardFacts:
        """The facts, with what was given up since the probe among the missing."""
        given_up = {
            field: f"{q.n_failed} polls in a row failed: {q.error}"
            for q in self._quantities
            if q.given_up
            for field in q.fields
        }
        return replace(self.facts, missing={**self.facts.missing, **given_up}) if given_up else self.facts


class Sensors:
    """Every card of this machine, asked once per poll. Made by `open_sensors`."""

    source = "nvml"

    def __init__(
        self, *, interval_s: float = 1.0, api: Any = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.error: str | None = None
        """Why there are no readings at all."""
        self.absent: dict[int, str] = {}
        """NVML index -> why a card that the driver counts could not be opened."""
        self._cards: dict[str, _Watched] = {}
        self._clock, self._times = clock, PollTimes(interval_s)
        self._nvml: Nvml | None = None
        try:
            nvml = Nvml(api or bindings())
            nvml.call("nvmlInit")
            self._nvml = nvml
            n_cards = nvml.call("nvmlDeviceGetCount")
        except (ImportError, Fault) as error:
            self.error = f"NVML does not answer: {error}"
            return
        for index in range(n_cards):
            try:
                handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
                facts, quantities = probe_card(nvml, index, handle)
            except Fault as fault:
                self.absent[index] = str(fault)
                continue
            self._cards[facts.uuid] = _Watched(handle, facts, quantities)
        if not self._cards:
            absent = "; ".join(f"card {index}: {why}" for index, why in self.absent.items())
            self.error = absent or "the driver lists no card"

    @property
    def facts(self) -> tuple[CardFacts, ...]:
        """In NVML's order; `missing` also names what stopped answering since the start."""
        return tuple(card.current_facts() for card in self._cards.values())

    @property
    def interval_s(self) -> float:
        """Between polls: what was wished, or 5 s while the driver is slow."""
        return self._times.interval_s

    @property
    def poll_p50_s(self) -> float:
        return self._times.p50_s

    @property
    def poll_p99_s(self) -> float:
        return self._times.p99_s

    def poll(self, now_s: float) -> Sample:
        """One reading of every card; never raises for what a driver says.

        Args:
            now_s: Unix time that the sample gets.
        """
        if not self._cards:
            return Sample(t_s=now_s, poll_s=0.0, cards=())
        started = self._clock()
        readings = tuple(card.read(now_s, self.interval_s) for card in self._cards.values())
        poll_s = self._clock() - started
        self._times.add(now_s, poll_s)
        return Sample(t_s=now_s, poll_s=poll_s, cards=readings)

    def processes(self) -> dict[str, tuple[CardProcess, ...]]:
        """Who holds memory on which card; some milliseconds a card, so for the start and for surprises only.

        A card that does not say is left out.
        """
        found = {}
        for uuid in self._cards:
            with contextlib.suppress(Fault):
                found[uuid] = tuple(
                    CardProcess(pid=p.pid, kind=kind, vram_bytes=p.usedGpuMemory)
                    for kind, name in PROCESS_CALLS
                    for p in self.call(uuid, name)
                )
        return found

    def call(self, uuid: str, name: str, *args: Any) -> Any:
        """An NVML function on one card: the way to its settings, which need root.

        Raises:
            Fault: the driver refuses, or the card is or just went lost.
        """
        card = self._cards.get(uuid)
        if card is None or self._nvml is None:
            raise Fault("unsupported", f"no card {uuid} here")
        if card.lost is not None:
            raise Fault("lost", card.lost)
        try:
            return self._nvml.call(name, card.handle, *args)
        except Fault as fault:
            if fault.kind == "lost":
                card.lose(fault)
            raise

    def close(self) -> None:
        """Lets go of the driver; the sensors say nothing after it."""
        nvml, self._nvml, self._cards = self._nvml, None, {}
        if nvml is not None:
            with contextlib.suppress(Fault):
                nvml.call("nvmlShutdown")


def open_sensors(interval_s: float = 1.0) -> Sensors:
    """The cards of this machine, probed; without a driver `error` says why and polls are empty.

    Args:
        interval_s: wished between polls [s].
    """
    return Sensors(interval_s=interval_s)
