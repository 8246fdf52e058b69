"""Starts the watchdog where none is alive: cheap enough to be called every few seconds by whoever trains."""

import contextlib
import fcntl
import subprocess
import sys
import time
from pathlib import Path

from homelab_scaling.watch import link, processes
from homelab_scaling.watch.link import MachineFolder

STARTING_S = 10.0
"""How long one that was just started is given to write its first status."""
LOG_LIMIT_BYTES = 1_000_000


def start_watchdog(lab: Path) -> None:
    """A watchdog for this machine, if none is alive: a process of its own that ends some time after the last run.

    Args:
        lab: the folder that holds the labs; the watchdog's files go to LAB/machine.
    """
    ensure_alive(link.machine_folder(lab))


def ensure_alive(machine: MachineFolder) -> str | None:
    """Starts a watchdog if the machine has none.

    Returns:
        None while one is alive or starting; else a sentence that says what was wrong and what was done.
    """
    status = machine.read_status()
    now = link.now_s()
    if status is not None and status.is_fresh(now) and processes.is_alive(status.pid):
        return None
    if _starting(machine, status, now):
        return None
    if _locked(machine):
        if status is None or status.is_fresh(now):
            return None  # it holds the lock and is about to write its first status
        return (
            f"the watchdog (pid {status.pid}) has said nothing for {now - status.t_s:.0f} s but is there; "
            f"end it with `kill -9 {status.pid}` and another one starts"
        )
    _spawn(machine)
    if status is None:
        return "started a watchdog"
    return f"the watchdog was gone (last heard of {max(0.0, now - status.t_s):.0f} s ago); started another"


def _starting(machine: MachineFolder, status: link.Status | None, now: float) -> bool:
    """Whether one was started a moment ago and has not had its say yet."""
    with contextlib.suppress(OSError):
        begun = _stamp(machine).stat().st_mtime
        return 0 <= now - begun < STARTING_S and (status is None or status.t_s < begun)
    return False


def _stamp(machine: MachineFolder) -> Path:
    return machine.path / ".starting"


def _locked(machine: MachineFolder) -> bool:
    """Whether some watchdog holds this machine's lock."""
    path = link.lock_path(machine)
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _spawn(machine: MachineFolder) -> None:
    """Starts it in a session of its own, so that no Ctrl-C meant for a run ends it; its words go to watchdog.log."""
    machine.path.mkdir(parents=True, exist_ok=True)
    _stamp(machine).touch()
    with contextlib.suppress(OSError):
        if machine.log.stat().st_size > LOG_LIMIT_BYTES:
            machine.log.unlink()
    command = [
        *(sys.executable, "-m", "homelab_scaling", "watchdog"),
        *("--lab", str(machine.path.parent), "--while-runs"),
    ]
    with open(machine.log, "a", encoding="utf-8") as log:
        # The shell leaves at once, so that the watchdog is nobody's child: no zombie, and no run waits for it.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            check=False,
        )


def wait_for_status(machine: MachineFolder, timeout_s: float) -> link.Status | None:
    """The first fresh status, or None if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        status = machine.read_status()
        if status is not None and status.is_fresh(link.now_s()) and processes.is_alive(status.pid):
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
