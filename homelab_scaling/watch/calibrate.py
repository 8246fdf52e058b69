"""What the wall plug draws for what the cards draw: P_wall = a + c sum(P_gpu), from a few readings of a smart plug."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from homelab_scaling.errors import MachineError, UserError
from homelab_scaling.watch.energy import WallModel
from homelab_scaling.watch.link import MachineFolder

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PlugReading:
    """What plug and cards drew at the same time."""

    wall_w: float
    cards_w: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted model and how far each reading lies from it."""

    model: WallModel
    readings: tuple[PlugReading, ...]
    residuals_w: tuple[float, ...]


def parse_readings(pairs: Sequence[str]) -> list[PlugReading]:
    """`WALL:CARDS` in watts, one per word.

    Raises:
        UserError: a word is not such a pair.
    """
    found = []
    for pair in pairs:
        try:
            wall, cards = (float(word) for word in pair.split(":"))
        except ValueError:
            raise UserError(f"reading {pair!r}: wants WALL:CARDS in watts, for example 410:331") from None
        if not 0 <= cards < wall:
            raise UserError(
                f"reading {pair!r}: the plug draws {wall:g} W, less than the cards' {cards:g} W; swap them?"
            )
        found.append(PlugReading(wall_w=wall, cards_w=cards))
    return found


def fit_wall(readings: Sequence[PlugReading]) -> Calibration:
    """P_wall = a + c * sum(P_gpu) by least squares.

    Raises:
        UserError: fewer than two readings, or all at the same load.
        SpecError: a slope or a base that no machine has.
    """
    cards = np.array([one.cards_w for one in readings])
    wall = np.array([one.wall_w for one in readings])
    if len(cards) < 2 or np.ptp(cards) < 0.1 * max(1.0, float(cards.max())):
        raise UserError(
            f"found {len(cards)} readings between {cards.min(initial=np.inf) if len(cards) else 0:g} and "
            f"{cards.max(initial=0):g} W of card power; take one with idle, one with half and one with fully busy cards"
        )
    slope, base = (float(v) for v in np.polyfit(cards, wall, 1))
    residuals = wall - (base + slope * cards)
    spare = len(cards) - 2
    se = float(np.sqrt(np.sum(residuals**2) / spare)) if spare else None
    return Calibration(
        model=WallModel(base_w=base, slope=slope, se_w=se, n=len(cards)),
        readings=tuple(readings),
        residuals_w=tuple(float(r) for r in residuals),
    )


LOADS = ("the cards idle", "the cards about half busy", "the cards fully busy")


def ask_readings(ask: Callable[[str], str], cards_w: Callable[[], float], say: Say) -> list[PlugReading]:
    """Asks for the plug's watts at several loads while it reads the cards' itself; an empty answer ends it.

    Args:
        ask: shows a question and returns the answer.
        cards_w: power of all cards now, averaged over some seconds.
    """
    say("Let each load run for half a minute before you answer; an empty line ends it (three readings or more).")
    found: list[PlugReading] = []
    while True:
        load = LOADS[len(found)] if len(found) < len(LOADS) else "any other load"
        answer = ask(f"With {load}: what does the plug show, in watts? ").strip()
        if not answer:
            return found
        drawn = cards_w()
        try:
            found += parse_readings([f"{answer.removesuffix('W').strip()}:{drawn:.1f}"])
            say(f"  {found[-1].wall_w:g} W at the plug, {drawn:.0f} W in the cards")
        except UserError as error:
            say(f"  {error}")


def mean_cards_w(machine: MachineFolder, *, seconds: float = 5.0, sleep: Callable[[float], None] = time.sleep) -> float:
    """Power of all cards, averaged over the watchdog's next polls.

    Raises:
        MachineError: there is no watchdog, or some card does not tell its power.
    """
    found: dict[float, float] = {}
    waited = 0.0
    while waited < seconds or not found:
        status = machine.read_status()
        if status is None or not status.is_fresh(time.time()) or not status.readings:
            why = status.sensor_error if status is not None else None
            raise MachineError(
                f"no card is read ({why or 'no watchdog'}); give pairs instead: --readings WALL:CARDS ..."
            )
        watts = [one.power_w for one in status.readings]
        known = [one for one in watts if one is not None]
        if len(known) < len(watts):
            raise MachineError("a card does not tell its power; give pairs instead: --readings WALL:CARDS ...")
        found[status.t_s] = sum(known)
        sleep(0.5)
        waited += 0.5
    return sum(found.values()) / len(found)
