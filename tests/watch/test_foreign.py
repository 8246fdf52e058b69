"""Guarding a foreign command: paced, paused and stopped by signals, and never left standing still."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import codec
from homelab_scaling.watch import link, processes
from homelab_scaling.watch.foreign import cards_of
from homelab_scaling.watch.link import Control, MachineFolder, Order, Status
from homelab_scaling.watch.readings import CardFacts

A, B = "GPU-aaaa", "GPU-bbbb"
FACTS = tuple(CardFacts(uuid=u, index=i, name="Fake", vram_bytes=1) for i, u in enumerate((A, B)))

# Two processes, the second in a session of its own as torchrun's ranks are; their pids go to a file.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
open("pids.new", "w").write(f"{os.getpid()} {child.pid}")
os.rename("pids.new", "pids")
time.sleep(float(sys.argv[1]))
child.kill(); child.wait()
sys.exit(int(sys.argv[2]))
"""

POLITE = """
import os, sys, time
open("pids.new", "w").write(str(os.getpid()))
os.rename("pids.new", "pids")
try:
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(42)
"""


class Boss:
    """Plays the watchdog: a status that is fresh for ever, and orders."""

    def __init__(self, machine: MachineFolder) -> None:
        self.machine, self.id = machine, 0
        now = time.time()
        status = Status(
            pid=os.getpid(),
            started_s=now,
            t_s=now + 1e6,
            interval_s=1.0,
            poll_p50_s=0.0,
            poll_p99_s=0.0,
            facts=FACTS,
        )
        codec.write_json(machine.status, status)

    def order(self, level: Any = "ok", duty: float = 1.0, uuid: str = A) -> None:
        self.id += 1
        order = Order(level=level, duty=duty, reason="88 C")
        codec.write_json(self.machine.control, Control(id=self.id, t_s=time.time(), cards={uuid: order}))


@pytest.fixture
def boss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Boss:
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "machine"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Boss(MachineFolder(tmp_path / "machine"))


Guard = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def guard(boss: Boss, tmp_path: Path) -> Iterator[Guard]:
    """`homelab watchdog -- CMD`, started."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "homelab_scaling", "watchdog", "--lab", "lab", "--", *command],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        known = [int(pid) for pid in (tmp_path / "pids").read_text().split()] if (tmp_path / "pids").exists() else []
        for pid in [*processes.family(process.pid), *known]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def family(seconds: float = 60, code: int = 0) -> tuple[str, ...]:
    return (sys.executable, "-c", FAMILY, str(seconds), str(code))


def until(true: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    return found


def pids(folder: Path) -> list[int]:
    until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def states(of: list[int]) -> str:
    return "".join(p.state if (p := processes.look_up(pid)) else "-" for pid in of)


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (7, 7)])
def test_passes_the_exit_code_through(guard: Guard, code: int, seen: int) -> None:
    assert guard(*family(0, code)).wait(timeout=30) == seen


def test_a_death_by_signal_is_told_as_a_shell_tells_it(guard: Guard) -> None:
    assert guard("/bin/sh", "-c", "kill -9 $$").wait(timeout=30) == 128 + 9


def test_a_program_that_is_not_there_is_one_sentence(guard: Guard) -> None:
    process = guard("/no/such/program")
    _out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "/no/such/program" in err
    assert "Traceback" not in err


def test_it_is_registered_with_its_cards_while_it_runs(
    guard: Guard, boss: Boss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    process = guard(*family())
    root, _child = pids(tmp_path)
    (one,) = until(lambda: [r for r in boss.machine.registrations() if r.cards])
    assert (one.pids, one.cards, one.foreign) == ((root,), (B,), True)
    os.kill(root, signal.SIGKILL)
    process.wait(timeout=20)
    assert boss.machine.registrations() == []


@pytest.mark.slow
def test_pacing_lets_it_run_for_its_share_of_the_time(guard: Guard, boss: Boss, tmp_path: Path) -> None:
    boss.order("slow", 0.5)
    guard(*family())
    both = pids(tmp_path)
    until(lambda: states(both) == "TT")
    begun, stopped, n = time.monotonic(), 0, 0
    while time.monotonic() - begun < 6.0:  # three turns of 2 s
        stopped += "T" in states(both)
        n += 1
        time.sleep(0.02)
    assert 0.4 < stopped / n < 0.6


def test_a_pause_stops_every_process_and_goes_on_after_it(guard: Guard, boss: Boss, tmp_path: Path) -> None:
    process = guard(*family())
    both = pids(tmp_path)
    boss.order("pause")
    until(lambda: states(both) == "TT")
    time.sleep(0.5)
    assert states(both) == "TT"
    boss.order("ok")
    until(lambda: "T" not in states(both))
    assert process.poll() is None


def test_an_order_for_another_card_is_none_of_its_business(
    guard: Guard, boss: Boss, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    guard(*family())
    both = pids(tmp_path)
    until(lambda: [r for r in boss.machine.registrations() if r.cards])
    boss.order("pause", uuid=A)
    time.sleep(1.5)
    assert "T" not in states(both)


def test_a_stop_ends_it_and_says_so(guard: Guard, boss: Boss, tmp_path: Path) -> None:
    process = guard(*family())
    both = pids(tmp_path)
    boss.order("pause")
    until(lambda: states(both) == "TT")
    boss.order("stop")
    assert process.wait(timeout=20) == 3
    assert states(both) == "--", "the rank in a session of its own is ended too"
    assert process.stderr is not None
    assert "stopped (88 C)" in process.stderr.read()


def test_one_that_ignores_sigterm_is_killed_after_the_grace(boss: Boss, tmp_path: Path) -> None:
    from homelab_scaling.watch.foreign import Manners, guard_command
    from homelab_scaling.watch.signals import Signals

    boss.order("stop")
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    said: list[str] = []
    with Signals() as signals:
        begun = time.monotonic()
        code = guard_command(
            [sys.executable, "-c", deaf], boss.machine, signals=signals, say=said.append, manners=Manners(grace_s=1.0)
        )
    assert code == 3
    assert time.monotonic() - begun < 20
    assert "SIGKILL after 1 s" in said[0]


def test_ctrl_c_goes_to_the_command_even_while_it_is_paused(guard: Guard, boss: Boss, tmp_path: Path) -> None:
    process = guard(sys.executable, "-c", POLITE)
    mine = pids(tmp_path)
    boss.order("pause")
    until(lambda: states(mine) == "T")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 42


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_standing_still_however_the_guard_ends(
    guard: Guard, boss: Boss, tmp_path: Path, number: signal.Signals
) -> None:
    process = guard(*family())
    both = pids(tmp_path)
    boss.order("pause")
    until(lambda: states(both) == "TT")
    process.send_signal(number)
    process.wait(timeout=20)
    until(lambda: "T" not in states(both))
    for pid in both:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("environment", "cards"),
    [
        ({}, (A, B)),
        ({"CUDA_VISIBLE_DEVICES": "0"}, (A,)),
        ({"CUDA_VISIBLE_DEVICES": "1, 0"}, (A, B)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, (B,)),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({link.CARDS_VARIABLE: "all", "CUDA_VISIBLE_DEVICES": "0"}, (A, B)),
        ({link.CARDS_VARIABLE: A}, (A,)),
    ],
)
def test_which_cards_a_command_uses(environment: dict[str, str], cards: tuple[str, ...]) -> None:
    assert cards_of(environment, FACTS) == cards


def test_a_number_names_no_card_for_sure_among_unlike_ones() -> None:
    unlike = (FACTS[0], CardFacts(uuid=B, index=1, name="Other", vram_bytes=1))
    assert cards_of({"CUDA_VISIBLE_DEVICES": "0"}, unlike) == (A, B)
    assert cards_of({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, unlike) == (A,)
