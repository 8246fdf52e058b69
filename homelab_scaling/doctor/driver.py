"""What the NVIDIA driver says about itself, its cards and the way between them; asked once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from homelab_scaling.watch.gpu import open_nvml
from homelab_scaling.watch.nvml import Fault, Nvml
from homelab_scaling.watch.p2p import Pair, ask_pair
from homelab_scaling.watch.probe import probe_card
from homelab_scaling.watch.readings import CardFacts

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A card's PCI Express link; None where the driver does not say."""

    generation: int | None = None
    generation_max: int | None = None
    width: int | None = None
    width_max: int | None = None


@dataclass(frozen=True, kw_only=True)
class DriverCard:
    """One card with its link."""

    facts: CardFacts
    link: Link = field(default_factory=Link)
    persistence: bool | None = None
    """The driver stays loaded while nobody uses the card."""


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Everything that NVML tells a visitor."""

    version: str | None = None
    nvml_version: str | None = None
    cuda_version: str | None = None
    """The newest that this driver can run."""
    cards: tuple[DriverCard, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    """Index -> why a card that the driver counts does not answer."""
    pairs: tuple[Pair, ...] = ()
    error: str | None = None
    """Why NVML says nothing at all."""


def survey(api: Any = None) -> Driver:
    """The driver and every card, or why there is nothing to ask; never raises for what a driver says."""
    try:
        with open_nvml(api) as nvml:
            return _survey(nvml)
    except (ImportError, Fault) as error:
        return Driver(error=str(error))


def _survey(nvml: Nvml) -> Driver:
    cards: dict[int, tuple[Any, DriverCard]] = {}
    absent: dict[str, str] = {}
    for index in range(nvml.call("nvmlDeviceGetCount")):
        try:
            handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
            facts, _quantities = probe_card(nvml, index, handle)
            cards[index] = handle, _card(nvml, handle, facts)
        except Fault as fault:
            absent[str(index)] = str(fault)
    cuda = _ask(lambda: nvml.call("nvmlSystemGetCudaDriverVersion"))
    return Driver(
        version=_ask(lambda: nvml.call("nvmlSystemGetDriverVersion")),
        nvml_version=_ask(lambda: nvml.call("nvmlSystemGetNVMLVersion")),
        cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        cards=tuple(card for _, card in cards.values()),
        absent=absent,
        pairs=tuple(
            Pair(first=a, second=b, p2p=ask_pair(nvml, cards[a][0], cards[b][0])) for a in cards for b in cards if a < b
        ),
    )


def _card(nvml: Nvml, handle: Any, facts: CardFacts) -> DriverCard:
    def ask(name: str) -> int | None:
        return _ask(lambda: int(nvml.call(name, handle)))

    persistence = ask("nvmlDeviceGetPersistenceMode")
    return DriverCard(
        facts=facts,
        link=Link(
            generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            generation_max=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
            width_max=ask("nvmlDeviceGetMaxPcieLinkWidth"),
        ),
        persistence=None if persistence is None else bool(persistence),
    )


def _ask(way: Callable[[], T]) -> T | None:
    try:
        return way()
    except Fault as fault:
        if fault.kind == "lost":
            raise
        return None
