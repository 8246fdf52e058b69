"""Other processes, by pid: whether they live, what they started, and how to signal all of them (Linux /proc)."""

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Process:
    """One line of /proc/PID/stat, as far as it is needed."""

    pid: int
    parent: int
    group: int
    state: str
    start_ticks: int
    """Since boot: with the pid, the identity of a process."""


def look_up(pid: int) -> Process | None:
    """The process with this pid; None if there is none, or only its unreaped remains."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything; the fields after it do not.
    state, parent, group, *rest = text.rpartition(")")[2].split()
    if state in "ZX":
        return None
    return Process(pid=pid, parent=int(parent), group=int(group), state=state, start_ticks=int(rest[16]))


def is_alive(pid: int) -> bool:
    return look_up(pid) is not None


def name_of(pid: int) -> str:
    """The program's name; "pid" for one that cannot be seen from here (another container's)."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip() or "pid"
    except OSError:
        return "pid"


def started_s(process: Process) -> float:
    """Unix time at which it was started, within a second or so."""
    with open("/proc/stat", encoding="utf-8") as file:
        boot = next(int(line.split()[1]) for line in file if line.startswith("btime"))
    return boot + process.start_ticks / os.sysconf("SC_CLK_TCK")


def family(root: int) -> list[int]:
    """Pids of `root`, of everything that descends from it, and of its process group; parents first."""
    everyone = [p for p in (look_up(int(e)) for e in os.listdir("/proc") if e.isdigit()) if p is not None]
    children: dict[int, list[int]] = {}
    for one in everyone:
        children.setdefault(one.parent, []).append(one.pid)
    found = dict.fromkeys([root, *(p.pid for p in everyone if p.group == root)])
    queue = list(found)
    while queue:
        for pid in children.get(queue.pop(0), ()):
            if pid not in found:
                found[pid] = None
                queue.append(pid)
    alive = {p.pid for p in everyone}
    return [pid for pid in found if pid in alive]


def identified(pids: Iterable[int]) -> dict[int, int]:
    """Pid -> when that process started: a pid used again is not taken for it."""
    return {pid: process.start_ticks for pid in pids if (process := look_up(pid)) is not None}


def still(known: Mapping[int, int]) -> list[int]:
    """Those of `identified` that are alive."""
    return [pid for pid, ticks in known.items() if (p := look_up(pid)) is not None and p.start_ticks == ticks]


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signals each; those that are gone, or not ours, are passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end(pid: int, number: signal.Signals) -> None:
    """Signals a process, with its whole group where it leads one."""
    one = look_up(pid)
    if one is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if one.group == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
