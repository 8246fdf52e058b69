"""The slots of this box: its GPUs, or shares of its CPU, and whether a GPU is still there."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from homelab_scaling.box import Box, visible_cards
from homelab_scaling.errors import SpecError
from homelab_scaling.plan.timetable import SlotNow
from homelab_scaling.watch import link
from homelab_scaling.watch.gpu import Card, list_cards

ASK_DRIVER_S = 30.0
"""A driver that has lost a card may never answer."""
UUIDS = (
    "import json; from homelab_scaling.watch.gpu import list_cards; print(json.dumps([c.uuid for c in list_cards()]))"
)


def parse_gpus(text: str | None) -> tuple[int, ...] | None:
    """Indices from `0,1`; None from None.

    Raises:
        SpecError: not a list of different whole numbers.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise SpecError(f"--gpus {text}: wants different GPU indices as nvidia-smi counts them, such as 0,1")
    return tuple(int(part) for part in parts)


def use_gpus(text: str | None) -> None:
    """Lets this process, and whatever it starts, see these GPUs only.

    Args:
        text: `0,1`, as nvidia-smi counts them; None leaves everything as it is.

    Raises:
        SpecError: not a list of GPUs, or one of them is not there.
    """
    wanted = parse_gpus(text)
    if wanted is None:
        return
    by_index = {card.index: card for card in visible_cards(list_cards())}
    if not by_index:
        raise SpecError(f"--gpus {text}: this machine has no GPU that can be used; leave it out to train on the CPU")
    missing = [index for index in wanted if index not in by_index]
    if missing:
        known = ", ".join(f"{index} ({card.name})" for index, card in by_index.items())
        raise SpecError(f"--gpus {text}: there is no GPU {missing[0]}; this machine has {known}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(by_index[index].uuid for index in wanted)


def slots_of(box: Box, n_cpu_slots: int = 1, *, cards: Sequence[Card] | None = None) -> tuple[SlotNow, ...]:
    """The slots to run on: every GPU of the box, or shares of its CPU.

    Args:
        n_cpu_slots: without a GPU, how many runs share the CPU.
        cards: None asks the driver.

    Raises:
        SpecError: shares that there are no cores for.
    """
    if not box.on_gpu:
        if not 1 <= n_cpu_slots <= box.n_cores:
            raise SpecError(f"--slots {n_cpu_slots}: wants 1 to {box.n_cores}, the CPU cores of this machine")
        names = ["CPU"] if n_cpu_slots == 1 else [f"CPU {i}" for i in range(n_cpu_slots)]
        return tuple(SlotNow(index=i, name=name) for i, name in enumerate(names))
    if n_cpu_slots != 1:
        raise SpecError(f"--slots {n_cpu_slots}: shares a CPU, and this machine trains on its GPUs; use --gpus")
    listed = visible_cards(list_cards() if cards is None else cards)
    if len(listed) < box.n_gpus:  # a box that was described rather than found
        return tuple(SlotNow(index=i, name=f"GPU {i}") for i in range(box.n_gpus))
    return tuple(SlotNow(index=c.index, name=f"GPU {c.index}", uuid=c.uuid) for c in listed[: box.n_gpus])


def environment_of(used: Sequence[SlotNow]) -> dict[str, str]:
    """What makes a launch see these GPUs and no other."""
    names = [slot.uuid if slot.uuid is not None else str(slot.index) for slot in used]
    # CUDA counts by speed unless it is told to count as nvidia-smi does.
    return {"CUDA_VISIBLE_DEVICES": ",".join(names), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def why_lost(slot: SlotNow, lab: Path, seen: frozenset[str] | None) -> str | None:
    """Why a GPU is not there any more, by the watchdog's word or the driver's; None while it is.

    Args:
        lab: the folder of labs.
        seen: UUIDs that the driver lists now; None where it was not asked or did not say.
    """
    if slot.uuid is None:
        return None
    status = link.machine_folder(lab).read_status()
    if status is not None and status.is_fresh(link.now_s()):
        card = status.cards.get(slot.uuid)
        if card is not None and card.health == "lost":
            return card.reason or "the watchdog says that the driver has lost it"
    if seen and slot.uuid not in seen:
        return "the driver no longer lists it"
    return None


def ask_driver() -> frozenset[str] | None:
    """UUIDs of the GPUs that answer now, asked in a process of its own; None where nobody answers."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        asked = subprocess.run(
            [sys.executable, "-c", UUIDS], capture_output=True, text=True, timeout=ASK_DRIVER_S, check=True
        )
        return frozenset(json.loads(asked.stdout)) or None
    return None


def threads_of(box: Box, n_shares: float) -> Box:
    """The box with one of so many equal shares of its cores."""
    return dataclasses.replace(box, n_cores=max(1, int(box.n_cores / n_shares)))
