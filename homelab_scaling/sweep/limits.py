"""When `homelab run` stops by itself: after so many hours, at a time of day, at a sum of money."""

import contextlib
import datetime
import math
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError, Stopped
from homelab_scaling.specs import Money


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What ends a command that is not done; runs are stopped with a checkpoint, and the same command goes on."""

    ends_at_s: float | None = None
    """Unix time."""
    max_usd: float | None = None
    """Over all runs of the ladder, those of earlier commands too."""

    def reached(self, now_s: float, usd: float | None) -> str | None:
        """Which limit is reached, in words; None before."""
        if self.ends_at_s is not None and now_s >= self.ends_at_s:
            return f"it is {datetime.datetime.fromtimestamp(self.ends_at_s):%H:%M}, the end that was asked for"
        if self.max_usd is not None and usd is not None and usd >= self.max_usd:
            return f"the ladder has cost ${usd:.2f} of the ${self.max_usd:.2f} it may"
        return None


def make_limits(
    *, max_hours: float | None = None, until: str | None = None, max_usd: float | None = None, now_s: float
) -> Limits:
    """Limits from flags, counted from now.

    Args:
        until: a time of day, 24 hours, local: `07:00` is the next one.

    Raises:
        SpecError: a number that is not positive, or a time that is none.
    """
    for flag, value in (("--max-hours", max_hours), ("--max-usd", max_usd)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise SpecError(f"{flag} {value:g}: wants a positive number")
    ends = [now_s + 3600 * max_hours] if max_hours is not None else []
    ends += [next_time(until, now_s)] if until is not None else []
    return Limits(ends_at_s=min(ends, default=None), max_usd=max_usd)


def next_time(until: str, now_s: float) -> float:
    """Unix time of the next HH:MM on this machine's clock.

    Raises:
        SpecError: not a time of day.
    """
    found = re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", until.strip())
    if found is None:
        raise SpecError(f"--until {until}: wants a time of day from 00:00 to 23:59, such as 07:00")
    now = datetime.datetime.fromtimestamp(now_s)
    then = now.replace(hour=int(found[1]), minute=int(found[2]), second=0, microsecond=0)
    if then <= now:
        then += datetime.timedelta(days=1)  # of the calendar: the clock may be changed tonight
    return then.timestamp()


@contextlib.contextmanager
def alarmed(limits: Limits) -> Iterator[None]:
    """While the block runs, the end in time is heard outside of training too: what builds or measures is stopped.

    Raises:
        Stopped: it came while nothing was launched.
    """
    if limits.ends_at_s is None:
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(f"{limits.reached(time.time(), None) or 'the time is up'}; the same command goes on from here")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, limits.ends_at_s - time.time()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refuse_unknown_money(limits: Limits, money: Money, box: Box) -> None:
    """A limit in money wants a price, and something to multiply it by.

    Raises:
        SpecError: [money] does not say what a run costs on this machine.
    """
    if limits.max_usd is None or money.usd_per_machine_hour is not None:
        return
    if money.usd_per_kwh is None:
        raise SpecError(
            f"--max-usd {limits.max_usd:g}: the ladder's [money] states no price; add usd_per_kwh or "
            "usd_per_machine_hour"
        )
    if money.watts is None and not box.on_gpu:
        raise SpecError(
            f"--max-usd {limits.max_usd:g}: nothing measures the energy of {box.device}; add watts or "
            "usd_per_machine_hour to the ladder's [money]"
        )
