"""What the asking cost: seconds, energy at the cards and at the plug, money; by the rules that bill a training run."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from homelab_scaling.errors import HomelabError
from homelab_scaling.evals.store import Line
from homelab_scaling.specs import Money, WatchLimits
from homelab_scaling.watch import link
from homelab_scaling.watch.energy import EnergyMeter, Lap, WallModel, read_wall_model
from homelab_scaling.watch.link import MachineFolder, Registration
from homelab_scaling.watch.start import ensure_alive, wait_for_status

PATIENCE_S = 10.0
"""For a watchdog's first word."""

Source = Literal["counter", "integrated", "stated watts"]


class LapMeter(Protocol):
    """`watch.energy.EnergyMeter`, or a test's."""

    source: Literal["counter", "integrated"] | None

    def lap(self) -> Lap: ...


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """What energy and time cost here, and how the cards' energy becomes the plug's."""

    money: Money
    wall: WallModel
    why_no_meter: str
    """Why no sensor looks on, where none does."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """Of one task; unknown is None, and `unknown` says why."""

    seconds: float
    """Of asking, over all sittings; loading the model and the data is not in it."""
    n_tokens: int
    kwh: float | None
    """Of the cards, measured; of the whole machine where it is computed from stated watts."""
    kwh_from: Source | None
    usd: float | None
    """Energy at the plug and machine time together, as far as they have a price."""
    unknown: dict[str, str]


def price_of(lines: Sequence[Line], tariff: Tariff) -> Price:
    """The price of outcomes, from the shares that their lines hold."""
    from homelab_scaling.train.bill import MIN_METERED_FRAC, make_bill
    from homelab_scaling.train.checkpoint import Clock

    seconds = sum(line.seconds for line in lines)
    metered = [line for line in lines if line.joules is not None]
    sources = {line.energy_from for line in metered} - {None}
    source: Literal["counter", "integrated"] | None = None
    if sources:
        source = "counter" if sources == {"counter"} else "integrated"
    seen_s = sum(line.seconds - line.unseen_s for line in metered)
    clock = Clock(
        train_s={"asked": seconds},
        energy_j={"asked": sum(line.joules or 0.0 for line in metered)},
        metered_s={"asked": max(0.0, seen_s)},
        energy_from=source,
    )
    bill = make_bill(clock, ["asked"], tariff.money, tariff.wall)
    unknown = {}
    if bill.kwh is None:
        why = tariff.why_no_meter if seen_s <= 0 else f"less than {MIN_METERED_FRAC:.0%} of the time was metered"
        unknown["kwh"] = f"{why}; --watts gives an estimate"
    if bill.usd is None:
        unpriced = tariff.money.usd_per_kwh is None and tariff.money.usd_per_machine_hour is None
        unknown["usd"] = (
            "neither the run's [money] nor --usd-per-kwh and --usd-per-hour give a price"
            if unpriced
            else "the energy is unknown, and machine time has no price"
        )
    return Price(
        seconds=seconds,
        n_tokens=sum(line.n_tokens for line in lines),
        kwh=bill.kwh,
        kwh_from=bill.kwh_from,
        usd=bill.usd,
        unknown=unknown,
    )


@dataclass(frozen=True, kw_only=True)
class Metered:
    """How this process is connected to the machine's watchdog."""

    meter: EnergyMeter | None
    wall: WallModel
    why_not: str
    """Why there is no meter, where there is none."""


@contextlib.contextmanager
def metered(labs: Path, device: str, say: Callable[[str], None]) -> Iterator[Metered]:
    """Starts the watchdog if there is a card to watch and it must, and lets it guard and meter this process.

    Args:
        labs: the folder that holds the labs.
        device: as torch calls it.
    """
    why_not = link.why_not_watched(WatchLimits(), on_gpu=device.startswith("cuda"))
    if why_not is not None:
        yield Metered(meter=None, wall=WallModel(), why_not="asked on a CPU, which no sensor meters")
        return
    machine = link.machine_folder(labs)
    with contextlib.suppress(HomelabError, OSError):
        if (done := ensure_alive(machine)) is not None:
            say(done)
    status = wait_for_status(machine, PATIENCE_S)
    cards = _own_cards(device, machine)
    if status is None or not status.readings or not cards:
        why_not = (status.sensor_error if status else None) or "no watchdog has measured these cards"
        yield Metered(meter=None, wall=read_wall_model(machine), why_not=why_not)
        return
    registration = Registration(
        run_id=f"eval-{os.getpid()}",
        folder="",
        pids=(os.getpid(),),
        cards=cards,
        started_s=link.now_s(),
        foreign=True,
    )
    path = machine.register(registration)
    try:
        meter = EnergyMeter(machine, cards)
        yield Metered(meter=meter, wall=read_wall_model(machine), why_not=meter.why_not or "")
    finally:
        path.unlink(missing_ok=True)


def _own_cards(device: str, machine: MachineFolder) -> tuple[str, ...]:
    """UUIDs of the cards that are metered, as the watchdog writes them."""
    import torch

    from homelab_scaling.train.orders import own_cards

    cards = own_cards(torch.device(device))
    if cards != ("all",):
        return cards
    status = machine.read_status()
    return tuple(reading.uuid for reading in status.readings) if status is not None else ()
