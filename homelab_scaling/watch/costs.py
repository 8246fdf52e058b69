"""Energy and money of a run while it goes on: the last checkpoint's clock, the rates since, and what is left."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from homelab_scaling.specs import Money
from homelab_scaling.watch.energy import CARD_ERR_FRAC, JOULES_PER_KWH, WallModel
from homelab_scaling.watch.frame import Cost
from homelab_scaling.watch.runlog import Rate

MIN_METERED_FRAC = 0.5
"""With less of the time measured, energy is unknown (as in the ledger)."""
N_RECENT = 50
"""Log intervals that say what the rest will take."""


def cost_so_far(
    *,
    clock: dict[str, Any],
    clock_update: int,
    rates: Sequence[Rate],
    money: Money,
    wall: WallModel,
    left_s: float | None,
    why: str | None,
) -> Cost:
    """What a run that is not finished has taken, and will have taken if it goes on as it did lately.

    Args:
        clock: of the last checkpoint, as plain data; empty without one.
        clock_update: updates that it covers.
        left_s: seconds still to go; None where unknown.
        why: why no energy is measured, where the run says so.
    """
    since = [one for one in rates if one.update > clock_update]
    seconds = _total(clock, "train_s", "validate_s", "checkpoint_s") + _number(clock.get("start_s"))
    seconds += sum(one.interval_s for one in since)
    whole_s = seconds + (rates[-1].slept_s if rates else 0.0)
    usd_machine_end = None if left_s is None else _price((seconds + left_s) / 3600, money.usd_per_machine_hour)
    known = Cost(
        seconds=seconds,
        usd_machine=_price(seconds / 3600, money.usd_per_machine_hour),
        usd_machine_end=usd_machine_end,
        usd_why=_why_no_money(money),
    )
    metered_frac = _metered_frac(rates)
    if metered_frac >= MIN_METERED_FRAC:
        return _measured(known, clock, rates, money, wall, whole_s=whole_s, left_s=left_s)
    if money.watts is not None:
        kwh = money.watts * seconds / JOULES_PER_KWH
        end = None if left_s is None else money.watts * (seconds + left_s) / JOULES_PER_KWH
        return replace(
            known,
            kwh=kwh,
            kwh_end=end,
            kwh_from="stated watts",
            kwh_wall=kwh,
            kwh_wall_end=end,
            usd_energy=_price(kwh, money.usd_per_kwh),
            usd_energy_end=_price(end, money.usd_per_kwh),
        )
    if metered_frac > 0:
        why = f"only {100 * metered_frac:.0f} % of the time was metered"
    return replace(known, kwh_why=why or "no sensor has measured this run yet")


def _metered_frac(rates: Sequence[Rate]) -> float:
    """Share of the logged time that a sensor covered; 0 without any sensor."""
    if not rates or rates[-1].energy_j is None:
        return 0.0
    metered = sum(one.interval_s for one in rates if one.power_w is not None)
    return metered / sum(one.interval_s for one in rates)


def _measured(
    known: Cost,
    clock: dict[str, Any],
    rates: Sequence[Rate],
    money: Money,
    wall: WallModel,
    *,
    whole_s: float,
    left_s: float | None,
) -> Cost:
    """With the energy that the cards' sensors counted; what they did not see is filled in at the mean of the rest."""
    recent = [one for one in rates if one.power_w is not None][-N_RECENT:]
    metered_frac = _metered_frac(rates)
    paused = clock.get("energy_j")
    joules = (rates[-1].energy_j or 0.0) - (_number(paused.get("paused")) if isinstance(paused, dict) else 0.0)
    joules /= metered_frac
    power_w = sum((r.power_w or 0.0) * r.interval_s for r in recent) / sum(r.interval_s for r in recent)
    end = None if left_s is None else joules + power_w * left_s
    wall_j = wall.joules(joules, whole_s)
    wall_end = None if left_s is None or end is None else wall.joules(end, whole_s + left_s) / JOULES_PER_KWH
    busy = [one for one in recent if one.energy_j is not None]
    tokens = sum(one.interval_tokens for one in busy[1:])
    spent = (busy[-1].energy_j or 0.0) - (busy[0].energy_j or 0.0) if busy else 0.0
    return replace(
        known,
        kwh=joules / JOULES_PER_KWH,
        kwh_end=None if end is None else end / JOULES_PER_KWH,
        kwh_from=str(clock.get("energy_from") or "measured"),
        kwh_err_frac=CARD_ERR_FRAC + 1 - metered_frac,
        kwh_wall=wall_j / JOULES_PER_KWH,
        kwh_wall_end=wall_end,
        kwh_wall_err_frac=wall.err_frac(wall_j / whole_s) + 1 - metered_frac,
        joules_per_token=spent / tokens if tokens and spent > 0 else None,
        usd_energy=_price(wall_j / JOULES_PER_KWH, money.usd_per_kwh),
        usd_energy_end=_price(wall_end, money.usd_per_kwh),
    )


def cost_of_record(record: dict[str, Any], money: Money) -> Cost:
    """The bill of a run that has ended: the sum of its rows."""
    rows = [row for row in record.get("rows") or () if isinstance(row, dict)]
    unknown = record.get("unknown") if isinstance(record.get("unknown"), dict) else {}
    assert isinstance(unknown, dict)

    def total(name: str) -> float | None:
        values = [row.get(name) for row in rows]
        known = [float(v) for v in values if isinstance(v, int | float)]
        return sum(known) if rows and len(known) == len(rows) else None

    kwh, wall = total("kwh_marginal"), total("kwh_wall_marginal")
    usd_energy, usd_machine = total("usd_energy_marginal"), total("usd_machine_marginal")
    if usd_energy is None and usd_machine is None:
        usd_machine = total("usd_marginal")  # records from before the two were told apart
    tokens = sum(int(row.get("n_tokens") or 0) for row in rows)
    alone = [row.get("kwh") for row in rows]
    known = [float(v) for v in alone if isinstance(v, int | float)]
    last = rows[-1] if rows else {}
    return Cost(
        seconds=total("seconds_marginal"),
        kwh=kwh,
        kwh_end=kwh,
        kwh_from=last.get("kwh_from"),
        kwh_why=None if kwh is not None else str(unknown.get("kwh") or "it has no rows"),
        kwh_err_frac=last.get("kwh_err_frac"),
        kwh_wall=wall,
        kwh_wall_end=wall,
        kwh_wall_err_frac=last.get("kwh_wall_err_frac"),
        joules_per_token=sum(known) * JOULES_PER_KWH / tokens if tokens and len(known) == len(rows) else None,
        usd_energy=usd_energy,
        usd_energy_end=usd_energy,
        usd_machine=usd_machine,
        usd_machine_end=usd_machine,
        usd_why=None
        if usd_energy is not None or usd_machine is not None
        else str(unknown.get("usd") or _why_no_money(money)),
    )


def together(costs: Sequence[Cost], *, queued_s: float | None, money: Money) -> Cost:
    """The ladder's bill: what its runs took, and, for those not begun, their planned seconds at the price so far.

    Args:
        costs: of every run that has begun.
        queued_s: planned seconds of the others; None where the plan has no guess.
    """
    begun = [one for one in costs if one.kwh is not None or one.usd is not None]
    seconds = sum(one.seconds or 0.0 for one in begun)

    def now(name: str) -> float | None:
        known = [v for one in begun if (v := getattr(one, name)) is not None]
        return sum(known) if known else None

    def end(name: str) -> float | None:
        so_far, known = now(name), [getattr(one, f"{name}_end") for one in begun]
        if so_far is None or queued_s is None or any(v is None for v in known):
            return None
        if queued_s == 0:
            return float(sum(known))
        return float(sum(known)) + so_far / seconds * queued_s if seconds > 0 else None

    return Cost(
        seconds=seconds or None,
        kwh=now("kwh"),
        kwh_end=end("kwh"),
        kwh_why=None
        if now("kwh") is not None
        else next((c.kwh_why for c in costs if c.kwh_why), "nothing has run yet"),
        kwh_wall=now("kwh_wall"),
        kwh_wall_end=end("kwh_wall"),
        usd_energy=now("usd_energy"),
        usd_energy_end=end("usd_energy"),
        usd_machine=now("usd_machine"),
        usd_machine_end=end("usd_machine"),
        usd_why=_why_no_money(money),
    )


def _why_no_money(money: Money) -> str | None:
    if money.usd_per_kwh is None and money.usd_per_machine_hour is None:
        return "the ladder's [money] has no price"
    return None


def _price(amount: float | None, each: float | None) -> float | None:
    return None if amount is None or each is None else amount * each


def _total(clock: dict[str, Any], *books: str) -> float:
    """Over phases, pauses apart: they are in no row."""
    found = 0.0
    for name in books:
        book = clock.get(name)
        if isinstance(book, dict):
            found += sum(_number(value) for phase, value in book.items() if phase != "paused")
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
