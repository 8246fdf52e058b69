"""How ranks agree on what to do next, and how they wait: save, pace, pause, stop, all at the same update.

Every few updates (about every 2 s) each rank says what it wants as integers, and the largest wish holds for all: a
signal may reach any rank, the clock and the watchdog's orders are read by one. The same exchange tells when the next
one is and how long to sleep after each update, so that ranks never sleep differently: each would wait for the others'
longer sleep, take that for a slower step, and sleep longer still.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch

from homelab_scaling.errors import HomelabError, Stopped, StoppedByWatchdog
from homelab_scaling.train.orders import Orders
from homelab_scaling.train.ranks import Ranks
from homelab_scaling.train.stop import StopWish
from homelab_scaling.train.timing import Timing
from homelab_scaling.watch.link import Order

LOOK_EVERY_S = 2.0
RENDEZVOUS_S = 30.0
"""Between two meetings of sleeping ranks: far below any communication timeout."""
DOZE_S = 0.25
FRESH_CHECKPOINT_S = 60.0
"""A pause saves first unless the last checkpoint is younger."""
MIN_DUTY_PERCENT = 5


class Code(IntEnum):
    """What to do, by urgency."""

    GO_ON = 0
    PAUSE = 1
    STOP_BY_SIGNAL = 2
    STOP_BY_WATCHDOG = 3


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks do now."""

    code: Code
    save: bool
    reason: str = ""

    @property
    def acts(self) -> bool:
        return self.save or self.code > Code.GO_ON

    @property
    def stops(self) -> bool:
        return self.code >= Code.STOP_BY_SIGNAL

    def error(self, step: int) -> HomelabError:
        """What to raise to stop."""
        if self.code == Code.STOP_BY_WATCHDOG:
            return StoppedByWatchdog(
                f"stopped by the watchdog at step {step}: {self.reason}; checkpointed, run again when the card is well"
            )
        return Stopped(f"{self.reason} at step {step}; run again to go on")


class Obey:
    """This rank's part in the agreement.

    Args:
        orders: on a local main rank of a watched run, what the watchdog wants.
        stop: this rank's signals.
        timing: told of every sleep.
        is_main: the one rank that looks at the clock.
        log_every_steps: the longest way between two exchanges, in updates.
        event: writes a line of events.jsonl.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        orders: Orders | None,
        stop: StopWish,
        timing: Timing,
        device: torch.device,
        is_main: bool,
        log_every_steps: int,
        checkpoint_every_s: float,
        event: Callable[..., None],
    ) -> None:
        self.ranks, self.orders, self.stop, self.timing = ranks, orders, stop, timing
        self.device, self.is_main, self.event = device, is_main, event
        self.log_every_steps, self.checkpoint_every_s = log_every_steps, checkpoint_every_s
        self.rest_s = 0.0
        self._duty_percent = 100
        self._next = 1
        self._saved_s = time.monotonic()
        self._busy_s, self._n_busy = 0.0, 0
        self._step_s: float | None = None

    # ------------------------------------------------------------------------------------------- between updates

    def after_update(self, began: float) -> None:
        """Sleeps as agreed; `began` is `time.monotonic()` before the update."""
        if self.rest_s > 0:
            self._synchronize()
        self._busy_s += time.monotonic() - began
        self._n_busy += 1
        left = self.rest_s
        while left > 0 and self.stop.reason is None:
            self.timing.rest(min(DOZE_S, left))
            left -= DOZE_S

    def note_step(self, step_s: float) -> None:
        """An update's seconds, measured where the device was waited for."""
        self._step_s = step_s

    def note_saved(self) -> None:
        """A checkpoint was written."""
        self._saved_s = time.monotonic()

    def due(self, update: int) -> bool:
        """Whether ranks meet after this update."""
        return update >= self._next

    # ------------------------------------------------------------------------------------------------- agreement

    def look(self, update: int, *, save: bool = False) -> Agreed:
        """What all ranks do now; every rank calls this after the same update.

        Args:
            save: a checkpoint is due here anyway.
        """
        order = self.orders.read() if self.orders is not None else Order()
        wish = self._wish(order)
        words = order.reason if wish != Code.STOP_BY_SIGNAL else self.stop.reason or ""
        undone = 100 - max(MIN_DUTY_PERCENT, min(100, round(100 * order.duty)))
        step_us = every = 0
        if self.is_main:
            age = time.monotonic() - self._saved_s
            save = save or age > (FRESH_CHECKPOINT_S if wish == Code.PAUSE else self.checkpoint_every_s)
            step_s = self._measured_step_s()
            step_us = round(1e6 * step_s)
            every = round(LOOK_EVERY_S / max(1e-6, step_s / (1 - undone / 100)))
        agreed, saves, undone, step_us, every = self.ranks.max([wish, int(save), undone, step_us, every])
        self._next = update + max(1, min(every, self.log_every_steps))
        self.rest_s = 1e-6 * step_us * undone / (100 - undone)
        if undone != 100 - self._duty_percent:
            self._duty_percent = 100 - undone
            if self.is_main:
                self.event("paced", update=update, duty=self._duty_percent / 100, reason=order.reason)
        reason = ""
        if agreed > Code.GO_ON:
            reason = next(said for other, said in self.ranks.gather((int(wish), words)) if other == agreed)
        return Agreed(code=Code(agreed), save=bool(saves), reason=reason)

    def _wish(self, order: Order) -> Code:
        if order.level == "stop":
            return Code.STOP_BY_WATCHDOG
        if self.stop.reason is not None:
            return Code.STOP_BY_SIGNAL
        return Code.PAUSE if order.level == "pause" else Code.GO_ON

    def _measured_step_s(self) -> float:
        """Of the last stretch, if each update was waited for; else of the last log interval; else the host's view."""
        busy_s, n = self._busy_s, self._n_busy
        self._busy_s, self._n_busy = 0.0, 0
        if n and (self.rest_s > 0 or self._step_s is None):
            self._step_s = busy_s / n
        return self._step_s or 0.0

    # ------------------------------------------------------------------------------------------------------ pause

    def pause(self, update: int, reason: str) -> Agreed:
        """Sleeps with all other ranks until the order is lifted or becomes a stop, and says which."""
        self._synchronize()
        if self.is_main:
            self.event("paused", update=update, reason=reason)
        began = time.monotonic()
        while True:
            self._doze()
            agreed = self.look(update)
            if agreed.code != Code.PAUSE:
                break
        if self.is_main:
            seconds = round(time.monotonic() - began, 3)
            self.event("resumed", update=update, paused_s=seconds, stops=agreed.stops)
        return agreed

    def _doze(self) -> None:
        """Until the next meeting, or until this rank knows that the pause is over; then it waits for the others."""
        deadline = time.monotonic() + RENDEZVOUS_S
        while (left := deadline - time.monotonic()) > 0 and self.stop.reason is None:
            if self.orders is not None and self.orders.read().level != "pause":
                return
            time.sleep(min(DOZE_S, left))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
