"""Whether cards read each other's memory, as the driver says, and what NCCL must be told where they do not.

GeForce cards from the RTX 40 series on have no peer-to-peer transfers: gradients go through host memory. Where the
driver says so, NCCL finds that way by itself, and NCCL_P2P_DISABLE=1 only spares it the search. Drivers before
550.40.07 claim peer-to-peer for RTX 40 cards all the same, and what is sent never arrives: there the switch is needed,
and Accelerate refuses to start without it and NCCL_IB_DISABLE=1 (which `accelerate launch` sets, `torchrun` does not).
InfiniBand lies between machines, so switching it off costs one machine nothing. Cards that do read each other's memory,
and cards of which the driver says nothing, are left to NCCL. `homelab ddp` measures both ways.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from homelab_scaling.watch.gpu import open_nvml
from homelab_scaling.watch.nvml import Fault, Nvml

T = TypeVar("T")

P2P_READ, P2P_WRITE = 0, 1
P2P_YES = "yes"
P2P_WORDS = {
    0: P2P_YES,
    1: "not by this chipset",
    2: "not by these cards",
    3: "not across this topology",
    4: "disabled in the driver",
    5: "not supported",
}
HONEST_DRIVER = (550, 40, 7)
"""The first one that does not claim peer-to-peer for RTX 40 cards."""
UNTRUE_SERIES = "RTX 40"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The way from one card to another one (NVML indices)."""

    first: int
    second: int
    p2p: str
    """`yes`, or why one card cannot read and write the other's memory."""


def ask_pair(nvml: Nvml, first: Any, second: Any) -> str:
    """`yes` if both cards read and write each other, else the first reason why not."""
    for a, b in ((first, second), (second, first)):
        for kind in (P2P_READ, P2P_WRITE):
            try:
                status = nvml.call("nvmlDeviceGetP2PStatus", a, b, kind)
            except Fault as fault:
                return f"unknown ({fault})"
            if status != 0:
                return P2P_WORDS.get(status, "unknown")
    return P2P_YES


def claims_untruly(names: Sequence[str], driver_version: str | None) -> bool:
    """Whether this driver says yes to peer-to-peer on these cards and means no."""
    version = tuple(int(n) for n in (driver_version or "").split(".") if n.isdigit())
    return any(UNTRUE_SERIES in name for name in names) and bool(version) and version < HONEST_DRIVER


def needed_switches(names: Sequence[str], pairs: Sequence[Pair], driver_version: str | None) -> dict[str, str]:
    """The NCCL variables that these cards need under this driver; none where the driver's word can be taken."""
    if not pairs:
        return {}
    missing = [pair for pair in pairs if pair.p2p in P2P_WORDS.values() and pair.p2p != P2P_YES]
    if missing or claims_untruly(names, driver_version):
        return {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    return {}


def nccl_environment(environ: Mapping[str, str] | None = None, *, api: Any = None) -> dict[str, str]:
    """What a launch on this machine's visible cards adds to its environment; what the user set stays as it is.

    Args:
        environ: None is this process's.
        api: the bindings; None is the driver's.
    """
    given = os.environ if environ is None else environ
    try:
        with open_nvml(api) as nvml:
            names, pairs, version = _look(nvml, given)
    except (ImportError, Fault):
        return {}
    return {key: value for key, value in needed_switches(names, pairs, version).items() if key not in given}


def _look(nvml: Nvml, environ: Mapping[str, str]) -> tuple[list[str], list[Pair], str | None]:
    """Names, pairs and driver, of the cards that CUDA_VISIBLE_DEVICES leaves."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [v.strip() for v in visible.split(",") if v.strip()]
    cards = {}
    for index in range(nvml.call("nvmlDeviceGetCount")):
        try:
            handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
            uuid, name = nvml.call("nvmlDeviceGetUUID", handle), nvml.call("nvmlDeviceGetName", handle)
        except Fault:
            continue
        if wanted is None or str(index) in wanted or any(uuid.startswith(w) for w in wanted):
            cards[index] = handle, name
    pairs = [
        Pair(first=a, second=b, p2p=ask_pair(nvml, cards[a][0], cards[b][0])) for a in cards for b in cards if a < b
    ]
    return [name for _, name in cards.values()], pairs, _ask(lambda: str(nvml.call("nvmlSystemGetDriverVersion")))


def _ask(way: Callable[[], T]) -> T | None:
    try:
        return way()
    except Fault:
        return None
