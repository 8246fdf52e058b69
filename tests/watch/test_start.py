"""Starting a watchdog, noticing that it died, and starting another: with the real command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from homelab_scaling import codec
from homelab_scaling.watch import link, processes
from homelab_scaling.watch.link import MachineFolder, Status
from homelab_scaling.watch.start import ensure_alive, start_watchdog, wait_for_status


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineFolder]:
    """A machine folder whose watchdog is ended with the test."""
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "lab" / "machine"))
    folder = MachineFolder(tmp_path / "lab" / "machine")
    yield folder
    for pid in watchdogs(folder):
        os.kill(pid, signal.SIGKILL)


def watchdogs(machine: MachineFolder) -> list[int]:
    """Pids of the watchdogs that serve this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = b"watchdog" in words and str(machine.path.parent).encode() in words
        if mine and words[0] != b"/bin/sh" and processes.is_alive(int(entry.name)):
            found.append(int(entry.name))
    return found


def wait_until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def alive(machine: MachineFolder) -> Status:
    status = wait_for_status(machine, 20)
    assert status is not None, machine.log.read_text() if machine.log.exists() else "no log"
    return status


def test_starts_one_however_often_it_is_asked(machine: MachineFolder) -> None:
    lab = machine.path.parent
    for _ in range(5):
        start_watchdog(lab)
    status = alive(machine)
    begun = time.perf_counter()
    for _ in range(50):
        start_watchdog(lab)
    assert (time.perf_counter() - begun) / 50 < 0.02, "not cheap enough to be called every few seconds"
    assert watchdogs(machine) == [status.pid]
    assert os.getsid(status.pid) != os.getsid(0)
    process = processes.look_up(status.pid)
    assert process is not None
    assert process.parent != os.getpid()


def test_a_killed_watchdog_is_noticed_and_replaced(machine: MachineFolder) -> None:
    assert ensure_alive(machine) == "started a watchdog"
    first = alive(machine)
    assert ensure_alive(machine) is None
    control = machine.read_control()
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not processes.is_alive(first.pid))
    assert "was gone" in str(ensure_alive(machine))
    assert ensure_alive(machine) is None, "one that is starting is not started again"

    def replaced() -> bool:
        status = machine.read_status()
        return status is not None and status.pid != first.pid

    wait_until(replaced)
    assert len(watchdogs(machine)) == 1
    wait_until(lambda: machine.read_control() != control)
    after = machine.read_control()
    assert control is not None
    assert after is not None
    assert after.id > control.id


def test_a_torn_status_is_no_watchdog(machine: MachineFolder) -> None:
    machine.path.mkdir(parents=True)
    machine.status.write_text('{"pid": 1, "started')
    assert ensure_alive(machine) == "started a watchdog"
    alive(machine)


def test_a_status_left_by_a_dead_pid_is_no_watchdog(machine: MachineFolder) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    now = time.time()
    status = Status(pid=process.pid, started_s=now, t_s=now, interval_s=1.0, poll_p50_s=0.0, poll_p99_s=0.0)
    codec.write_json(machine.status, status)
    assert "was gone" in str(ensure_alive(machine))
    assert alive(machine).pid != process.pid


def test_one_that_hangs_is_named_and_left_alone(machine: MachineFolder) -> None:
    ensure_alive(machine)
    status = alive(machine)
    os.kill(status.pid, signal.SIGSTOP)
    old = json.loads(machine.status.read_text())
    machine.status.write_text(json.dumps({**old, "t_s": old["t_s"] - 60}))
    os.utime(machine.path / ".starting", (old["t_s"] - 90, old["t_s"] - 90))
    said = str(ensure_alive(machine))
    assert f"kill -9 {status.pid}" in said
    assert watchdogs(machine) == [status.pid]


def test_a_second_one_says_where_the_first_is_and_leaves(machine: MachineFolder) -> None:
    ensure_alive(machine)
    status = alive(machine)
    command = [sys.executable, "-m", "homelab_scaling", "watchdog", "--lab", str(machine.path.parent)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode == 0
    assert f"pid {status.pid}" in second.stderr
    assert str(machine.path) in second.stderr
    os.kill(status.pid, 0)


def test_sigterm_ends_it_cleanly(machine: MachineFolder) -> None:
    ensure_alive(machine)
    status = alive(machine)
    os.kill(status.pid, signal.SIGTERM)
    wait_until(lambda: not processes.is_alive(status.pid))
    kinds = [(e["kind"], e.get("reason")) for e in codec.read_jsonl(machine.events)]
    assert kinds[-1] == ("stop", "asked to stop")
