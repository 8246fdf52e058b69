"""Guards a trainer that knows nothing of us: `homelab watchdog -- CMD ...`.

CMD runs in a process group of its own and is registered like a run of ours. It is slowed by stopping and continuing all
its processes in turn (SIGSTOP, SIGCONT), paused by stopping them, and stopped by SIGTERM. Whatever ends the guard, even
SIGKILL, its processes are continued.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from homelab_scaling.errors import HomelabError, MachineError, StoppedByWatchdog
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch import link, processes
from homelab_scaling.watch.link import MachineFolder, Order, Registration
from homelab_scaling.watch.readings import CardFacts
from homelab_scaling.watch.signals import Signals
from homelab_scaling.watch.start import ensure_alive

LOOK_EVERY_S = 0.5
REVIVE_EVERY_S = 5.0
NAP_S = 0.2
"""The longest between two looks at the command itself."""
ORPHANED_S = 300.0
"""A pause whose watchdog is silent for longer becomes pacing: nothing waits for the dead."""

# Continues what is stopped when its input ends, which it does however the guard ends.
KEEPER = 'pids=; while read -r line; do pids=$line; done; test -z "$pids" || kill -CONT $pids 2>/dev/null'


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How a foreign command is treated."""

    period_s: float = 2.0
    """Of one turn of running and standing still; long against a step, so that work queued on a card runs out."""
    grace_s: float = 60.0
    """Between SIGTERM and SIGKILL."""


def guard_command(
    command: Sequence[str],
    machine: MachineFolder,
    *,
    signals: Signals,
    say: Callable[[str], None],
    limits: WatchLimits | None = None,
    manners: Manners | None = None,
) -> int:
    """Runs a command to its end under the machine's watchdog, which is started where there is none.

    Args:
        signals: entered by the caller; what is caught goes on to the command.
        say: told what is done to it, and why.

    Returns:
        Its exit code (128 + n where signal n ended it), or 3 where the watchdog stopped it.

    Raises:
        MachineError: there is no such program.
    """
    with contextlib.suppress(HomelabError, OSError):
        ensure_alive(machine)
    # A background group that reads a terminal is stopped by it for ever: better no input.
    stdin = subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None
    try:
        process = subprocess.Popen(list(command), process_group=0, stdin=stdin)
    except OSError as error:
        raise MachineError(f"{command[0]}: {error.strerror}; give a program that can be started") from None
    with _Reins(process, machine, say, limits or WatchLimits(), manners or Manners()) as reins:
        while process.poll() is None:
            reins.turn(signals)
            signals.sleep(reins.nap_s())
    if reins.stopped_by_watchdog:
        return StoppedByWatchdog.exit_code
    code = process.returncode
    return 128 - code if code < 0 else code


def cards_of(environment: Mapping[str, str], facts: Sequence[CardFacts]) -> tuple[str, ...]:
    """The cards that a command started in this environment can use; all where that is not sure."""
    everything = tuple(one.uuid for one in facts)
    named = environment.get(link.CARDS_VARIABLE) or environment.get("CUDA_VISIBLE_DEVICES")
    if named is None or named.strip() == "all":
        return everything
    words = [word.strip() for word in named.split(",") if word.strip()]
    if not any(word.isdigit() for word in words):
        return tuple(uuid for uuid in everything if any(uuid.startswith(word) for word in words))
    # CUDA numbers the fastest card first unless told otherwise: with unlike cards a number may mean any of them.
    alike = len({one.name for one in facts}) <= 1
    if not alike and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return everything
    return tuple(one.uuid for one in facts if str(one.index) in words or any(map(one.uuid.startswith, words)))


class _Reins:
    """Holds the command: running, standing still, or asked to end."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        machine: MachineFolder,
        say: Callable[[str], None],
        limits: WatchLimits,
        manners: Manners,
    ) -> None:
        self.process, self.machine, self.say, self.manners = process, machine, say, manners
        self.stopped_by_watchdog = False
        self._listener = _Listener(machine, say, process.pid, limits)
        self._held: list[int] = []
        self._begun = time.monotonic()
        self._ended_s: float | None = None
        self._everyone: dict[int, int] = {}  # when it was asked to end
        self._last = Order()
        self._forwarded = 0
        self._keeper = subprocess.Popen(["/bin/sh", "-c", KEEPER], stdin=subprocess.PIPE, start_new_session=True)

    def __enter__(self) -> "_Reins":
        self._listener.register()
        return self

    def __exit__(self, kind: object, _error: object, _trace: object) -> None:
        self._run()
        if kind is not None:  # a bug of ours: the command is not left behind without its guard
            processes.end(self.process.pid, signal.SIGTERM)
            self.process.wait()
        if self.stopped_by_watchdog:
            self._end_orphans()
        self._listener.forget()
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()

    def turn(self, signals: Signals) -> None:
        """Does what is ordered now."""
        self._forward(signals)
        if self._ended_s is not None:
            if time.monotonic() - self._ended_s > self.manners.grace_s:
                processes.send(processes.family(self.process.pid), signal.SIGKILL)
            return
        order = self._listener.order()
        self._mention(order)
        if order.level == "stop":
            self.stopped_by_watchdog, self._ended_s = True, time.monotonic()
            self._everyone = processes.identified(processes.family(self.process.pid))
            self._end(signal.SIGTERM)
        elif self._forwarded:
            self._run()  # on its way out: saving must not be stretched
        elif order.level == "pause" or self._rests(order):
            self._hold()
        else:
            self._run()

    def nap_s(self) -> float:
        """Until something may have to change."""
        if self._last.duty >= 1 or self._last.level in ("pause", "stop"):
            return NAP_S
        at, period = self._place(), self.manners.period_s
        edge = self._last.duty * period
        return max(0.001, min(NAP_S, (edge if at < edge else period) - at))

    def _place(self) -> float:
        return (time.monotonic() - self._begun) % self.manners.period_s

    def _rests(self, order: Order) -> bool:
        return order.duty < 1 and self._place() >= order.duty * self.manners.period_s

    def _mention(self, order: Order) -> None:
        """One sentence for each change."""
        if _act(order) != _act(self._last):
            self.say(
                {
                    "pause": f"paused ({order.reason})",
                    "stop": f"stopped ({order.reason}): SIGTERM, then SIGKILL after {self.manners.grace_s:g} s",
                    "slow": f"slowed to {order.duty:.0%} ({order.reason})",
                }.get(_act(order)[0], "goes on")
            )
        self._last = order

    def _forward(self, signals: Signals) -> None:
        """The caller's signals are the command's; a third one is SIGKILL."""
        if signals.n_caught == self._forwarded or signals.caught is None:
            return
        self._forwarded = signals.n_caught
        self._end(signals.caught if self._forwarded < 3 else signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if number == signal.SIGKILL:
            processes.send(processes.family(self.process.pid), number)
        else:
            processes.end(self.process.pid, number)
        self._run()  # what stands still hears nothing

    def _end_orphans(self) -> None:
        """Ranks in sessions of their own, whose launcher left without them, still heat the card."""
        deadline = (self._ended_s or time.monotonic()) + self.manners.grace_s
        processes.send(processes.still(self._everyone), signal.SIGTERM)
        while processes.still(self._everyone) and time.monotonic() < deadline:
            time.sleep(0.05)
        processes.send(processes.still(self._everyone), signal.SIGKILL)

    def _hold(self) -> None:
        """Stops the whole family, until a look finds nobody new."""
        if self._held:
            return
        while new := [pid for pid in processes.family(self.process.pid) if pid not in self._held]:
            self._held.extend(new)
            self._keep(self._held)
            processes.send(new, signal.SIGSTOP)

    def _run(self) -> None:
        held, self._held = self._held, []
        if held:
            processes.send(held, signal.SIGCONT)
            self._keep([])

    def _keep(self, pids: Iterable[int]) -> None:
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):
            self._keeper.stdin.write((" ".join(map(str, pids)) + "\n").encode())
            self._keeper.stdin.flush()


def _act(order: Order) -> tuple[str, float]:
    """What an order means for a command."""
    if order.level in ("pause", "stop"):
        return order.level, 0.0
    return ("slow" if order.duty < 1 else "go on"), order.duty


class _Listener:
    """What the watchdog wants of the command."""

    def __init__(self, machine: MachineFolder, say: Callable[[str], None], pid: int, limits: WatchLimits) -> None:
        self.machine, self.say = machine, say
        now = link.now_s()
        self._registration = Registration(
            run_id=f"command-{pid}", folder="", pids=(pid,), cards=(), started_s=now, limits=limits, foreign=True
        )
        self._order = Order()
        self._looked_s = self._revived_s = float("-inf")
        self._heard_s = now
        self._silent = False

    def register(self) -> None:
        """Makes the command known; its cards follow when the watchdog says which there are."""
        with contextlib.suppress(HomelabError):
            self.machine.register(self._registration)

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            (self.machine.runs / f"{self._registration.run_id}.json").unlink()

    def order(self) -> Order:
        """The order in force; that of a silent watchdog stays, a pause for a while only."""
        now = link.now_s()
        if 0 <= now - self._looked_s < LOOK_EVERY_S:
            return self._order
        self._looked_s = now
        status = self.machine.read_status()
        if status is None or not status.is_fresh(now):
            self._revive(now)
            if self._order.level == "pause" and now - self._heard_s > ORPHANED_S:
                self._order = replace(self._order, level="slow")
            return self._order
        self._heard_s, self._silent = now, False
        cards = cards_of(os.environ, status.facts)
        path = self.machine.runs / f"{self._registration.run_id}.json"
        if cards != self._registration.cards or not path.exists():
            self._registration = replace(self._registration, cards=cards)
            self.register()
        control = self.machine.read_control()
        if control is not None and control.t_s >= status.started_s:
            self._order = link.worst([control.cards[uuid] for uuid in cards if uuid in control.cards])
        return self._order

    def _revive(self, now: float) -> None:
        if now - self._revived_s < REVIVE_EVERY_S:
            return
        self._revived_s = now
        done = None
        with contextlib.suppress(HomelabError, OSError):
            done = ensure_alive(self.machine)
        if done is not None and not self._silent:
            self.say(done)
            self._silent = True
