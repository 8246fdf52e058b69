"""What a stretch of a run costs: seconds, energy at the cards and at the plug, money."""

import math
from dataclasses import dataclass
from typing import Literal

from homelab_scaling.specs import Money
from homelab_scaling.train.checkpoint import START, Clock
from homelab_scaling.watch.energy import CARD_ERR_FRAC, JOULES_PER_KWH, WallModel

MIN_METERED_FRAC = 0.5
"""With less of the time measured, energy is unknown rather than filled in."""

EnergySource = Literal["counter", "integrated", "stated watts"]


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The price of a stretch; unknown is None.

    Machine time is what the run used the machine for: start-up, training, validation, checkpoints. Seconds in which
    the watchdog let it cool down are not on it, because they belong to the room and not to the run; whoever rents the
    machine adds the record's `seconds_paused` and `seconds_paced`.
    """

    seconds: float
    kwh: float | None
    kwh_from: EnergySource | None
    kwh_err_frac: float | None
    kwh_unmetered_frac: float | None
    kwh_wall: float | None
    kwh_wall_err_frac: float | None
    usd_energy: float | None
    usd_machine: float | None

    @property
    def usd(self) -> float | None:
        """Energy and machine time together, as far as they are known."""
        known = [part for part in (self.usd_energy, self.usd_machine) if part is not None]
        return sum(known) if known else None


def make_bill(clock: Clock, names: list[str], money: Money, wall: WallModel) -> Bill:
    """The bill of the named phases (and START).

    Energy that no sensor saw is filled in at the mean power of what was seen, if that is at least half of the time;
    else `money.watts` gives an estimate that is labelled so; else energy is unknown.
    """
    seconds = _sum(clock, names, "train_s", "validate_s", "checkpoint_s") + (clock.start_s if START in names else 0.0)
    whole_s = seconds + _sum(clock, names, "slept_s")
    joules, metered_s = _sum(clock, names, "energy_j"), min(whole_s, _sum(clock, names, "metered_s"))
    kwh = kwh_wall = err = unmetered = wall_err = None
    source: EnergySource | None = None
    if clock.energy_from is not None and metered_s > 0 and metered_s >= MIN_METERED_FRAC * whole_s:
        joules *= whole_s / metered_s
        wall_j = wall.joules(joules, whole_s)
        source, unmetered = clock.energy_from, 1 - metered_s / whole_s
        kwh, kwh_wall = joules / JOULES_PER_KWH, wall_j / JOULES_PER_KWH
        err, wall_err = CARD_ERR_FRAC + unmetered, wall.err_frac(wall_j / whole_s) + unmetered
    elif money.watts is not None:
        source, kwh = "stated watts", money.watts * seconds / JOULES_PER_KWH
        kwh_wall = kwh
    per_hour, per_kwh = money.usd_per_machine_hour, money.usd_per_kwh
    return Bill(
        seconds=seconds,
        kwh=kwh,
        kwh_from=source,
        kwh_err_frac=err,
        kwh_unmetered_frac=unmetered,
        kwh_wall=kwh_wall,
        kwh_wall_err_frac=wall_err,
        usd_energy=None if kwh_wall is None or per_kwh is None else kwh_wall * per_kwh,
        usd_machine=None if per_hour is None else seconds / 3600 * per_hour,
    )


def why_unknown(clock: Clock, money: Money, why_no_meter: str) -> dict[str, str]:
    """Column -> reason, for a row whose energy or money is unknown."""
    energy = why_no_meter
    if math.fsum(clock.metered_s.values()) > 0:
        energy = f"less than {MIN_METERED_FRAC:.0%} of the time was metered"
    energy += "; [money] watts would give an estimate"
    return {
        **dict.fromkeys(("kwh", "kwh_marginal", "kwh_wall", "kwh_wall_marginal"), energy),
        **dict.fromkeys(
            ("usd_energy", "usd_energy_marginal"),
            energy if money.usd_per_kwh is not None else "the ladder's [money] gives no usd_per_kwh",
        ),
        **dict.fromkeys(("usd_machine", "usd_machine_marginal"), "the ladder's [money] gives no usd_per_machine_hour"),
        **dict.fromkeys(("usd", "usd_marginal"), "neither energy nor machine time has both an amount and a price"),
    }


def _sum(clock: Clock, names: list[str], *books: str) -> float:
    return math.fsum(getattr(clock, book).get(name, 0.0) for book in books for name in names)
