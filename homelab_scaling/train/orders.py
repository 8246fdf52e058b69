"""What the watchdog wants of a run, and what it knows of it: one process a machine registers, reads and listens.

A run that uses no NVIDIA card is not watched, unless HOMELAB_WATCH_CARDS or HOMELAB_MACHINE says so.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch

from homelab_scaling.errors import HomelabError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.train.ranks import Ranks
from homelab_scaling.watch import link
from homelab_scaling.watch.energy import EnergyMeter
from homelab_scaling.watch.link import MachineFolder, Order, Registration, Status
from homelab_scaling.watch.start import ensure_alive, start_watchdog

READ_EVERY_S = 1.0
STARTING_S = 20.0
"""How long a watchdog may take to be heard for the first time."""
REVIVE_EVERY_S = 10.0
ORPHANED_S = 300.0
"""A pause whose watchdog is silent for longer than this becomes pacing: no run waits for the dead."""

Event = Callable[..., None]


class Orders:
    """The orders in force for one run; registered with the watchdog while entered.

    Orders of a watchdog that has gone silent stay in force (a pause for `ORPHANED_S`); what an earlier watchdog left
    behind counts for nothing.

    Args:
        machine: the watchdog's files.
        registration: of the run; `cards` may be ("all",), which becomes the cards that the watchdog sees.
        event: writes a line of the run's events.jsonl.
        now: Unix time.
    """

    def __init__(
        self,
        machine: MachineFolder,
        registration: Registration,
        *,
        event: Event,
        now: Callable[[], float] = link.now_s,
    ) -> None:
        self.machine, self.event, self.now = machine, event, now
        self.takes_all = registration.cards == ("all",)
        self.registration = replace(registration, cards=()) if self.takes_all else registration
        self.path = machine.runs / f"{registration.run_id}.json"
        self.order = Order()
        self._read_s = float("-inf")
        self._heard_s = now()
        self._was_heard = False
        self._revived_s = float("-inf")
        self._said: str | None = None

    def __enter__(self) -> "Orders":
        self.path = self.machine.register(self.registration)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def read(self) -> Order:
        """The order for this run now; looks at the files at most once a second."""
        now = self.now()
        if 0 <= now - self._read_s < READ_EVERY_S:
            return self.order
        self._read_s = now
        status = self.machine.read_status()
        if status is not None and status.is_fresh(now):
            self._heard(status, now)
        else:
            self._silence(now)
        return self.order

    def _heard(self, status: Status, now: float) -> None:
        if self._said is not None:
            self.event("watchdog", state="heard again", pid=status.pid)
        self._heard_s, self._was_heard, self._said = now, True, None
        cards = self.registration.cards
        if self.takes_all:
            cards = tuple(f.uuid for f in status.facts) or tuple(r.uuid for r in status.readings)
        if cards != self.registration.cards or not self.path.exists():
            self.registration = replace(self.registration, cards=cards)
            self.machine.register(self.registration)
        control = self.machine.read_control()
        if control is None or control.t_s < status.started_s:
            self.order = Order()
        else:
            self.order = link.worst([control.cards[uuid] for uuid in cards if uuid in control.cards])

    def _silence(self, now: float) -> None:
        """Warns once, and sees to it that there is a watchdog; the run goes on."""
        silent_s = now - self._heard_s
        if not self._was_heard and silent_s < STARTING_S:
            return
        if self.order.level == "pause" and silent_s > ORPHANED_S:
            self.order = replace(self.order, level="slow", reason=f"{self.order.reason}; then its watchdog fell silent")
        if now - self._revived_s < REVIVE_EVERY_S:
            return
        self._revived_s = now
        try:
            done = ensure_alive(self.machine) or "another one is starting"
        except (HomelabError, OSError) as error:
            done = f"and cannot be started ({error})"
        if self._said is None:
            print(
                f"{self.registration.run_id}: the watchdog is silent: {done}; training goes on",
                file=sys.stderr,
                flush=True,
            )
        if done != self._said:
            self.event("watchdog", state="silent", silent_s=round(silent_s, 1), done=done)
        self._said = done


@dataclass(frozen=True, kw_only=True)
class Watched:
    """How a run is connected to its machine's watchdog, in this process."""

    orders: Orders | None
    """On the local main rank of a watched run."""
    meter: EnergyMeter | None
    """On the main rank of a watched run."""
    machine: MachineFolder
    why_not: str | None
    """Why no energy is measured, where it is not."""


def connect(spec: RunSpec, folder: RunFolder, accelerator: Any, ranks: Ranks, event: Event) -> Watched:
    """Registers nothing yet: starts the watchdog if it must, and tells who reads its orders. Every rank calls this."""
    lab = link.lab_of(folder)
    why_not = link.why_not_watched(spec.watch, on_gpu=accelerator.device.type == "cuda")
    host = socket.gethostname()
    about = ranks.gather((host, os.getpid(), own_cards(accelerator.device)))
    if why_not is not None:
        if accelerator.is_main_process:
            event("watchdog", state="none", why=why_not)
        return Watched(orders=None, meter=None, machine=MachineFolder(lab / "machine"), why_not=why_not)
    if host != about[0][0]:  # a lab that several machines share has room for the files of one
        os.environ.setdefault(link.MACHINE_VARIABLE, str(lab / f"machine-{host}"))
    if accelerator.is_local_main_process:
        try:
            start_watchdog(lab)
        except (HomelabError, OSError) as error:
            event("watchdog", state="not started", why=str(error))
    machine = link.machine_folder(lab)
    if not accelerator.is_local_main_process:
        return Watched(orders=None, meter=None, machine=machine, why_not=None)
    here = [(pid, cards) for where, pid, cards in about if where == host]
    registration = Registration(
        run_id=spec.run_id,
        folder=str(folder.path.resolve()),
        pids=tuple(pid for pid, _ in here),
        cards=tuple(dict.fromkeys(uuid for _, cards in here for uuid in cards)),
        started_s=link.now_s(),
        limits=spec.watch,
    )
    orders = Orders(machine, registration, event=event)
    meter, n_hosts = None, len({where for where, _, _ in about})
    if n_hosts > 1:
        why_not = f"trained on {n_hosts} machines, and each meters its own cards alone"
    elif accelerator.is_main_process:
        meter = EnergyMeter(machine, "all" if orders.takes_all else registration.cards)
    return Watched(orders=orders, meter=meter, machine=machine, why_not=why_not)


def own_cards(device: torch.device) -> tuple[str, ...]:
    """UUIDs of this rank's cards as NVML writes them; ("all",) for all that the watchdog sees."""
    given = os.environ.get(link.CARDS_VARIABLE, "")
    if given.strip():
        return tuple(uuid.strip() for uuid in given.split(",") if uuid.strip())
    if device.type != "cuda":
        return ()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return (uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}",)
