"""The sensors through the real pynvml, ctypes and dlopen, with a stand-in driver; each in a process of its own."""

import contextlib
import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nvml_stub.nvml_stub import (
    FUNCTION_NOT_FOUND,
    GIB,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RTX_3090,
    RTX_4080,
    UNKNOWN,
    VERSION_MISMATCH,
    StubDriver,
)

ASK = """
import json, sys
from homelab_scaling import codec
from homelab_scaling.watch.gpu import open_sensors
sensors = open_sensors()
for line in sys.stdin:  # a line asks for something and is answered by a line
    what = json.loads(line)
    if what == "facts":
        said = {"facts": codec.to_plain(sensors.facts), "error": sensors.error, "absent": sensors.absent}
    elif what == "processes":
        said = codec.to_plain(sensors.processes())
    elif what == "times":
        said = [sensors.poll_p50_s, sensors.poll_p99_s, sensors.interval_s]
    else:
        said = codec.to_plain(sensors.poll(what))
    print(json.dumps(said), flush=True)
sensors.close()
"""


class Asked:
    """Sensors in another process, asked step by step."""

    def __init__(self, driver: StubDriver) -> None:
        command = [sys.executable, "-c", ASK]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=driver.env(), stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def ask(self, what: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"the process ended: {self.process.communicate()[1]}")
        return json.loads(line)

    def end(self) -> int:
        try:
            self.process.communicate(timeout=10)
        finally:
            self.process.kill()
        return self.process.wait()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[StubDriver]:
    with StubDriver(tmp_path / "driver", [RTX_4080, RTX_3090], energy_runs=False) as one:
        yield one


@pytest.fixture
def start() -> Iterator[Callable[[StubDriver], Asked]]:
    """Starts sensors; all are ended with the test."""
    with contextlib.ExitStack() as stack:

        def one(driver: StubDriver) -> Asked:
            started = Asked(driver)
            stack.callback(lambda: started.process.stdin.closed or started.end())
            return started

        yield one


@pytest.fixture
def asked(driver: StubDriver, start: Callable[[StubDriver], Asked]) -> Asked:
    return start(driver)


def test_every_structure_arrives_whole(driver: StubDriver, start: Callable[..., Asked]) -> None:
    driver.set(
        0, temperature_c=71, power_w=287.5, sm_mhz=2610, utilisation_pct=98, reasons=("power cap", "display clock")
    )
    driver.set(0, used_bytes=11 * GIB, reserved_bytes=300 * 1024**2, fan_pct=(40, 55), limit_w=300)
    asked = start(driver)
    said = asked.ask("facts")
    ada, ampere = said["facts"]
    assert (said["error"], said["absent"]) == (None, {})
    assert (ada["uuid"], ada["name"], ada["pci_bus_id"]) == (
        driver.uuid(0),
        "NVIDIA GeForce RTX 4080",
        "00000000:01:00.0",
    )
    assert (ada["capability"], ada["vram_bytes"], ada["n_fans"], ada["sm_clock_max_mhz"]) == ([8, 9], 16 * GIB, 2, 3105)
    assert (ada["slowdown_c"], ada["shutdown_c"], ada["limits_from"]) == (90, 95, "margins")
    assert (ampere["slowdown_c"], ampere["shutdown_c"], ampere["limits_from"]) == (95, 98, "thresholds")
    assert (ada["power_limit_w"], ada["power_limit_default_w"], ada["power_limit_range_w"]) == (300, 320, [150, 355])
    assert ada["missing"] == ampere["missing"] == {}
    one, _two = asked.ask(1000.0)["cards"]
    assert {k: v for k, v in one.items() if k not in ("uuid", "error")} == {
        "state": "ok",
        "temperature_c": 71,
        "power_w": 287.5,
        "power_limit_w": 300,
        "energy_j": 0,
        "energy_from": "counter",
        "energy_gap_s": 0,
        "vram_used_bytes": 11 * GIB,
        "vram_reserved_bytes": 300 * 1024**2,
        "sm_clock_mhz": 2610,
        "utilisation_frac": 0.98,
        "fan_frac": 0.55,
        "reasons": ["power cap", "display clock"],
    }
    assert asked.end() == 0


def test_instant_power_is_preferred_where_the_driver_offers_it(driver: StubDriver, start: Callable[..., Asked]) -> None:
    driver.set(0, instant_w=321.5, power_w=250)
    asked = start(driver)
    assert asked.ask(1.0)["cards"][0]["power_w"] == 321.5


def test_a_lost_card_is_lost_alone_and_never_asked_again(driver: StubDriver, asked: Asked) -> None:
    assert [c["state"] for c in asked.ask(1.0)["cards"]] == ["ok", "ok"]
    driver.lose(0)
    for t_s in range(2, 6):
        lost, other = asked.ask(float(t_s))["cards"]
        assert (lost["state"], lost["error"], lost["temperature_c"]) == ("lost", "GPU is lost", None)
        assert (lost["energy_j"], lost["energy_gap_s"]) == (0, t_s - 1), "what it used stays known, and since when not"
        assert (other["state"], other["temperature_c"]) == ("ok", 45)
    driver.find_again(0)  # its handle is stale all the same
    assert asked.ask(6.0)["cards"][0]["state"] == "lost"
    assert list(asked.ask("processes")) == [driver.uuid(1)]
    assert driver.stale_calls(0) == 1


def test_a_card_lost_before_the_start_hides_no_other(driver: StubDriver, start: Callable[..., Asked]) -> None:
    driver.lose(0)
    asked = start(driver)
    said = asked.ask("facts")
    assert [f["index"] for f in said["facts"]] == [1]
    assert said["absent"] == {"0": "GPU is lost"}
    assert [c["uuid"] for c in asked.ask(1.0)["cards"]] == [driver.uuid(1)]
    assert asked.end() == 0
    assert driver.stale_calls(0) == 0


def test_what_is_not_supported_is_none_with_its_reason(driver: StubDriver, start: Callable[..., Asked]) -> None:
    for function in ("fan_v2", "fan", "clock", "utilisation", "default_limit", "limit_range", "margin", "max_clock"):
        driver.fail(0, function, NOT_SUPPORTED)
    for function in ("event_reasons", "throttle_reasons", "enforced_limit"):
        driver.fail(0, function, NO_PERMISSION)
    asked = start(driver)
    facts = asked.ask("facts")["facts"][0]
    reading = asked.ask(1.0)["cards"][0]
    for field in ("fan_frac", "sm_clock_mhz", "utilisation_frac", "reasons", "power_limit_w"):
        assert reading[field] is None
        assert facts["missing"][field] in ("Not Supported", "Insufficient Permissions")
    assert (reading["state"], reading["error"], reading["temperature_c"]) == ("ok", None, 45)
    assert (facts["slowdown_c"], facts["limits_from"], facts["sm_clock_max_mhz"]) == (None, None, None)
    assert facts["missing"]["slowdown_c"] == "margins: Not Supported; thresholds: Not Supported"
    assert facts["power_limit_range_w"] == [] and "power_limit_range_w" in facts["missing"]


def test_an_older_driver_is_asked_the_older_way(driver: StubDriver, start: Callable[..., Asked]) -> None:
    for function in ("temperature_v", "event_reasons", "energy", "fields", "margin"):
        driver.fail(0, function, FUNCTION_NOT_FOUND)
    driver.fail(0, "memory_v2", VERSION_MISMATCH)
    driver.set(0, reasons=("software thermal",), power_w=200, slowdown_c=96, shutdown_c=99)
    asked = start(driver)
    facts = asked.ask("facts")["facts"][0]
    assert not facts["has_energy_counter"]
    assert facts["missing"] == {
        "vram_reserved_bytes": "stand-in error 25",
        "energy_counter": "Function Not Found",
    }
    assert (facts["slowdown_c"], facts["limits_from"]) == (96, "thresholds")
    asked.ask(100.0)
    driver.set(0, power_w=300)
    reading = asked.ask(102.0)["cards"][0]
    assert (reading["temperature_c"], reading["reasons"], reading["power_w"]) == (45, ["software thermal"], 300)
    assert (reading["vram_used_bytes"], reading["vram_reserved_bytes"]) == (GIB + GIB // 4, None)
    assert (reading["energy_j"], reading["energy_from"], reading["energy_gap_s"]) == (500, "integrated", 0)
    reading = asked.ask(110.0)["cards"][0]
    assert (reading["energy_j"], reading["energy_gap_s"]) == (500, 8), "a gap is flagged, not bridged"


def test_a_counter_reset_does_not_take_energy_back(driver: StubDriver, asked: Asked) -> None:
    energy_j = []
    for t_s, counter_j in ((10, 5000), (11, 5300), (12, 20), (13, 320)):
        driver.set(0, energy_j=counter_j, power_w=300)
        energy_j.append(asked.ask(float(t_s))["cards"][0]["energy_j"])
    assert energy_j == [0, 300, 600, 900], "the second of the reset is bridged with the power"


def test_a_stumbling_sensor_comes_back_and_a_dead_one_is_named(driver: StubDriver, asked: Asked) -> None:
    asked.ask(1.0)
    driver.fail(0, "temperature_v", UNKNOWN)
    reading = asked.ask(2.0)["cards"][0]
    assert (reading["state"], reading["temperature_c"], reading["power_w"]) == ("error", None, 30)
    assert reading["error"] == "temperature_c: Unknown Error"
    assert asked.ask("facts")["facts"][0]["missing"] == {}
    asked.ask(3.0), asked.ask(4.0)
    assert "3 polls in a row" in asked.ask("facts")["facts"][0]["missing"]["temperature_c"]
    n_calls = driver.calls(0, "temperature_v")
    asked.ask(5.0), asked.ask(6.0)
    assert driver.calls(0, "temperature_v") == n_calls, "given up"
    driver.mend(0, "temperature_v")
    assert asked.ask(65.0)["cards"][0]["temperature_c"] == 45, "asked again after a minute"
    assert asked.ask("facts")["facts"][0]["missing"] == {}


def test_the_loop_asks_fans_seldom_and_pcie_and_processes_never(driver: StubDriver, asked: Asked) -> None:
    asked.ask("facts")
    before = driver.calls(0, "fan_v2")
    for t_s in range(30):
        asked.ask(1000.0 + t_s)
    assert driver.calls(0, "fan_v2") - before == 3 * 2
    for function in ("pcie_throughput", "pcie_link", "compute_processes", "graphics_processes"):
        assert driver.calls(0, function) == 0
    driver.set_processes(0, {4321: 3 * GIB, 99: 2**64 - 1})
    assert asked.ask("processes")[driver.uuid(0)] == [
        {"pid": 4321, "kind": "compute", "vram_bytes": 3 * GIB},
        {"pid": 99, "kind": "compute", "vram_bytes": None},
    ]


def test_a_poll_of_two_cards_costs_microseconds(driver: StubDriver, asked: Asked) -> None:
    for n in range(300):
        asked.ask(float(n))
    p50_s, p99_s, interval_s = asked.ask("times")
    print(f"poll of two cards: p50 {p50_s * 1e6:.0f} us, p99 {p99_s * 1e6:.0f} us")
    assert 0 < p50_s < 2e-3
    assert interval_s == 1.0


def test_a_slow_driver_is_asked_less_often(driver: StubDriver, asked: Asked) -> None:
    asked.ask(0.0)
    driver.slow_down(0.01)
    for n in range(1, 4):
        assert asked.ask(float(n))["poll_s"] > 0.05
    assert asked.ask("times")[2] == 5.0


def test_a_driver_that_hangs_or_crashes_takes_its_caller_along(driver: StubDriver, asked: Asked) -> None:
    """Why the watchdog keeps the sensors in a process of their own."""
    asked.ask("facts")
    driver.hang(1)
    assert asked.process.stdin is not None and asked.process.stdout is not None
    asked.process.stdin.write("1.0\n")
    asked.process.stdin.flush()
    assert select.select([asked.process.stdout], [], [], 0.3)[0] == []
    driver.release(1)
    assert json.loads(asked.process.stdout.readline())["cards"][1]["state"] == "ok"
    driver.crash(0)
    asked.process.stdin.write("2.0\n")
    asked.process.stdin.flush()
    assert asked.end() == -signal.SIGABRT


def test_a_script_changes_values_while_the_block_runs(driver: StubDriver, asked: Asked) -> None:
    asked.ask("facts")
    with driver.script([(0.0, 0, {"temperature_c": 80}), (0.1, 0, {"temperature_c": 60, "power_w": 99.0})]) as done:
        assert done.wait(5)
    reading = asked.ask(1.0)["cards"][0]
    assert (reading["temperature_c"], reading["power_w"]) == (60, 99)


def test_the_counter_of_the_stand_in_runs_with_its_power(tmp_path: Path, start: Callable[..., Asked]) -> None:
    with StubDriver(tmp_path / "running") as driver:
        driver.set(0, power_w=2000.0)
        asked = start(driver)
        began, _ = time.monotonic(), asked.ask(1000.0)
        time.sleep(0.2)
        energy_j = asked.ask(1001.0)["cards"][0]["energy_j"]
        assert 0.2 * 2000 <= energy_j <= (time.monotonic() - began) * 2000
        assert asked.end() == 0


def test_a_refusing_driver_is_said(driver: StubDriver, start: Callable[..., Asked]) -> None:
    driver.fail_init()
    asked = start(driver)
    said = asked.ask("facts")
    assert (said["facts"], said["error"]) == ([], "NVML does not answer: Driver Not Loaded")
    assert asked.ask(5.0) == {"t_s": 5.0, "poll_s": 0.0, "cards": []}
    assert asked.end() == 0


@pytest.mark.parametrize("cards", [1, 3])
def test_list_cards_is_built_on_the_same(tmp_path: Path, cards: int) -> None:
    with StubDriver(tmp_path / "driver", cards) as driver:
        driver.lose(cards - 1)
        code = "from homelab_scaling.watch.gpu import list_cards; print([c.index for c in list_cards()])"
        said = subprocess.run(
            [sys.executable, "-c", code], env=driver.env(), check=True, capture_output=True, text=True
        )
        assert json.loads(said.stdout) == list(range(cards - 1))
