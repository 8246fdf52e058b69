"""A watchdog in name only: writes status.json and control.json by hand."""

import time
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.watch.link import Control, MachineFolder, Order, Status
from homelab_scaling.watch.readings import CardFacts, CardReading

CARD = "GPU-11111111-2222-3333-4444-555555555555"
FOREVER_S = 1e6


class HandWatchdog:
    """Orders for one card, in a machine folder; fresh for a long time unless told otherwise."""

    def __init__(self, path: Path, *, started_s: float = 0.0) -> None:
        self.machine = MachineFolder(path)
        self.started_s = started_s
        self.orders = 0
        path.mkdir(parents=True, exist_ok=True)
        self.status()

    def status(self, *, t_s: float | None = None, energy_j: float | None = None, **reading: Any) -> None:
        now = time.time()
        one = CardReading(uuid=CARD, energy_j=energy_j, energy_from=None if energy_j is None else "counter", **reading)
        status = Status(
            pid=1,
            started_s=self.started_s,
            t_s=now + FOREVER_S if t_s is None else t_s,
            interval_s=1.0,
            poll_p50_s=0.0,
            poll_p99_s=0.0,
            facts=(CardFacts(uuid=CARD, index=0, name="toy", vram_bytes=1),),
            readings=(one,),
        )
        codec.write_json(self.machine.status, status)

    def order(self, level: str, *, duty: float = 1.0, reason: str = "it is hot", t_s: float | None = None) -> None:
        self.orders += 1
        one = Order(level=level, duty=duty, reason=reason)  # type: ignore[arg-type]
        control = Control(id=self.orders, t_s=time.time() if t_s is None else t_s, cards={CARD: one})
        codec.write_json(self.machine.control, control)
