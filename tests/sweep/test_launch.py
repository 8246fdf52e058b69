"""A launch whose ranks have sessions of their own, as torchrun gives them: stopped, killed, outliving its launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from homelab_scaling.box import describe_box
from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep import launch as launching
from homelab_scaling.sweep.launch import Launch, find_orphan
from homelab_scaling.watch import processes

RANK = """
import fcntl, json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
lock = open(folder / ".lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, lambda *_: ((folder / "told").touch(), os._exit(0)))
with open(folder / "events.jsonl", "a") as file:
    file.write(json.dumps({"kind": "segment", "pids": [os.getpid()]}) + chr(10))
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
raise SystemExit(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True).wait())
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def launch(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    command = [sys.executable, "-c", LAUNCHER, RANK, str(folder.path)]
    monkeypatch.setattr(launching, "launch_command", lambda *_: command)
    made = launching.start(None, folder, describe_box([]), more={}, output=folder.path / "output.log")  # type: ignore[arg-type]
    until(made.ranks)
    yield made
    for pid, _ in launching.ranks_of(folder):
        os.kill(pid, signal.SIGKILL)
    assert isinstance(made.process, subprocess.Popen)
    made.process.kill()
    made.process.wait()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_request_to_stop_reaches_ranks_in_sessions_of_their_own(launch: Launch, folder: RunFolder) -> None:
    (rank,) = launch.ranks()
    assert os.getsid(rank) == rank != launch.session
    launch.ask_to_stop()
    until(lambda: launch.poll() is not None)
    assert (folder.path / "told").exists(), "the launcher was told instead, which kills ranks that take their time"


def test_ranks_that_outlive_their_launcher_are_not_over(launch: Launch, folder: RunFolder) -> None:
    (rank,), launcher = launch.ranks(), launch.launcher
    assert launcher is not None and launch.process is not None
    launch.process.kill()
    launch.process.wait()
    assert launch.poll() is None, "a second trainer would be started beside it"
    again = find_orphan(None, folder, launcher)  # type: ignore[arg-type]
    assert again is not None and again.is_ours and again.ranks() == [rank]
    again.kill()
    until(lambda: not processes.is_alive(rank))


def test_killing_a_launch_leaves_no_rank(launch: Launch) -> None:
    (rank,) = launch.ranks()
    launch.kill()
    until(lambda: not processes.is_alive(rank))
    assert not launch.ranks()
