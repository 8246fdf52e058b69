"""The whole watchdog over the real bindings and a stand-in driver: hung, crashed and lost cards, and card settings."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nvml_stub.nvml_stub import StubDriver

from homelab_scaling import codec
from homelab_scaling.watch import link
from homelab_scaling.watch.link import MachineFolder, Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in driver is a Linux library")

Dog = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[StubDriver]:
    with StubDriver(tmp_path / "driver", cards=2) as driver:
        yield driver


@pytest.fixture
def machine(tmp_path: Path) -> MachineFolder:
    return MachineFolder(tmp_path / "machine")


@pytest.fixture
def dog(driver: StubDriver, machine: MachineFolder) -> Iterator[Dog]:
    """`homelab watchdog`, polling five times a second."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "homelab_scaling", "watchdog", "--interval-s", "0.2", *words]
        environment = driver.env(**{link.MACHINE_VARIABLE: str(machine.path)})
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for card in (0, 1):
        driver.release(card)
    for process in started:
        process.kill()
        process.wait()


def wait_for(machine: MachineFolder, true: Callable[[Status], Any], timeout_s: float = 20.0) -> Status:
    deadline = time.monotonic() + timeout_s
    while True:
        status = machine.read_status()
        if status is not None and time.time() - status.t_s < 2 and true(status):
            return status
        assert time.monotonic() < deadline, f"not in time; last: {status}"
        time.sleep(0.02)


def state(status: Status, card: int) -> str:
    uuid = StubDriver.uuid(card)
    return next((r.state for r in status.readings if r.uuid == uuid), "none")


@pytest.mark.slow
def test_a_hung_driver_call_leaves_the_watchdog_talking(dog: Dog, driver: StubDriver, machine: MachineFolder) -> None:
    dog()
    wait_for(machine, lambda s: [state(s, 0), state(s, 1)] == ["ok", "ok"])
    driver.hang(0)
    wait_for(machine, lambda s: state(s, 0) == "error" and s.cards[StubDriver.uuid(0)].health == "stale", 30)
    kinds = [e["reason"] for e in codec.read_jsonl(machine.events) if e["kind"] == "sensors"]
    assert "has hung" in kinds[0]
    driver.release(0)
    wait_for(machine, lambda s: [state(s, 0), state(s, 1)] == ["ok", "ok"], 30)


def test_a_crash_inside_the_driver_is_survived(dog: Dog, driver: StubDriver, machine: MachineFolder) -> None:
    process = dog()
    wait_for(machine, lambda s: state(s, 0) == "ok")
    driver.crash(0)
    wait_for(machine, lambda s: state(s, 0) == "error")
    driver.crash(0, on=False)
    status = wait_for(machine, lambda s: state(s, 0) == "ok")
    assert status.pid == process.pid
    assert any("SIGABRT" in e.get("reason", "") for e in codec.read_jsonl(machine.events))


def test_a_card_that_fills_up_names_who_fills_it(dog: Dog, driver: StubDriver, machine: MachineFolder) -> None:
    dog()
    status = wait_for(machine, lambda s: state(s, 0) == "ok")
    driver.set_processes(0, {os.getpid(): 15 * 2**30})
    total = status.facts[0].vram_bytes
    driver.set(0, used_bytes=int(0.97 * total))
    wait_for(machine, lambda s: "VRAM" in s.cards[StubDriver.uuid(0)].reason)
    needle = f" {os.getpid()} (15.0 GiB)"
    wait_for(machine, lambda _: any(needle in e.get("reason", "") for e in codec.read_jsonl(machine.events)))


def test_one_lost_card_stops_its_own_runs_only(dog: Dog, driver: StubDriver, machine: MachineFolder) -> None:
    dog()
    wait_for(machine, lambda s: [state(s, 0), state(s, 1)] == ["ok", "ok"])
    driver.lose(1)
    wait_for(machine, lambda s: state(s, 1) == "lost" and state(s, 0) == "ok")
    control = machine.read_control()
    assert control is not None
    assert control.cards[StubDriver.uuid(1)].level == "stop"
    assert control.cards[StubDriver.uuid(0)].level == "ok"


@pytest.mark.slow
def test_heat_is_paused_in_control_and_lifted_at_the_end(dog: Dog, driver: StubDriver, machine: MachineFolder) -> None:
    process = dog()
    status = wait_for(machine, lambda s: state(s, 0) == "ok")
    limit = status.facts[0].slowdown_c
    assert limit is not None
    for celsius in (60, 75, limit - 2):  # no jump that a policy would not believe
        driver.set(0, temperature_c=int(celsius))
        time.sleep(1.1)
    wait_for(machine, lambda s: s.cards[StubDriver.uuid(0)].level == "pause")
    control = machine.read_control()
    assert control is not None
    assert control.cards[StubDriver.uuid(0)].level == "pause"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    after = machine.read_control()
    assert after is not None
    assert (after.id > control.id, after.cards) == (True, {})


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="settings of a card want root")

SETTINGS = ("--power-limit-w", "250", "--target-temperature-c", "75")


def settings_of(driver: StubDriver) -> tuple[float, float, int]:
    return driver.get(0, "limit_w"), driver.get(1, "limit_w"), driver.get(0, "acoustic_c")


@needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_card_settings_are_put_back(
    dog: Dog, driver: StubDriver, machine: MachineFolder, number: signal.Signals
) -> None:
    driver.set(1, limit_w=300.0)
    process = dog(*SETTINGS)
    wait_for(machine, lambda s: state(s, 0) == "ok")
    assert settings_of(driver) == (250.0, 250.0, 75)
    process.send_signal(number)
    assert process.wait(timeout=20) == 0
    assert settings_of(driver) == (320.0, 300.0, 83)
    assert not (machine.path / "actuators.json").exists()


@needs_root
def test_after_sigkill_the_next_watchdog_puts_card_settings_back(
    dog: Dog, driver: StubDriver, machine: MachineFolder
) -> None:
    process = dog(*SETTINGS)
    wait_for(machine, lambda s: state(s, 0) == "ok")
    process.kill()
    process.wait()
    assert settings_of(driver) == (250.0, 250.0, 75)
    second = dog()
    wait_for(machine, lambda s: s.pid == second.pid and state(s, 0) == "ok")
    assert settings_of(driver) == (320.0, 320.0, 83)
