"""Card settings: written down before they are changed, read back, and put back by every exit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import codec
from homelab_scaling.errors import MachineError
from homelab_scaling.watch.actuators import Actuators, Journal, Kind, NvmlSettings, Setting, journal_path, left_behind
from homelab_scaling.watch.link import MachineFolder
from homelab_scaling.watch.nvml import Fault

A, B = "GPU-aaaa", "GPU-bbbb"


class FakeSettings:
    """Two cards; `journal` is looked at whenever something is set."""

    def __init__(self, journal: Path) -> None:
        self.values: dict[tuple[str, Kind], float | None] = {
            (uuid, kind): value
            for uuid in (A, B)
            for kind, value in (("power_limit_w", 320.0), ("target_temperature_c", 84.0), ("fan_percent", None))
        }
        self.journal = journal
        self.journal_at_set: list[tuple[Setting, ...]] = []
        self.refuses: set[str] = set()
        self.keeps: float | None = None

    def get(self, uuid: str, kind: Kind) -> float | None:
        return self.values[uuid, kind]

    def set(self, uuid: str, kind: Kind, value: float | None) -> None:
        if uuid in self.refuses:
            raise Fault("unsupported", "No Permission")
        self.journal_at_set.append(left_behind(self.journal))
        self.values[uuid, kind] = value if self.keeps is None else self.keeps

    def range(self, uuid: str, kind: Kind) -> tuple[float, float]:
        return {"power_limit_w": (100.0, 385.0), "target_temperature_c": (65.0, 91.0)}.get(kind, (30.0, 100.0))


@pytest.fixture
def machine(tmp_path: Path) -> MachineFolder:
    return MachineFolder(tmp_path / "machine")


@pytest.fixture
def settings(machine: MachineFolder) -> FakeSettings:
    return FakeSettings(journal_path(machine))


def make(settings: FakeSettings, machine: MachineFolder, *, is_root: bool = True) -> tuple[Actuators, list[str]]:
    said: list[str] = []
    return Actuators(settings, machine, said.append, is_root=is_root), said


def limit(uuid: str, watts: float) -> Setting:
    return Setting(uuid=uuid, kind="power_limit_w", value=watts)


def test_the_value_before_is_on_disk_before_it_is_changed_and_put_back_after(
    settings: FakeSettings, machine: MachineFolder
) -> None:
    settings.values[B, "power_limit_w"] = 300.0
    actuators, said = make(settings, machine)
    with actuators:
        actuators.apply([limit(A, 280.0), limit(B, 280.0)])
        assert settings.values[A, "power_limit_w"] == settings.values[B, "power_limit_w"] == 280.0
        assert settings.journal_at_set[0] == (limit(A, 320.0),)
        assert settings.journal_at_set[1] == (limit(A, 320.0), limit(B, 300.0))
    assert settings.values[A, "power_limit_w"] == 320.0
    assert settings.values[B, "power_limit_w"] == 300.0
    assert not journal_path(machine).exists()
    assert said[0] == f"{A}: power limit 280 W (was 320 W)"


def test_changed_twice_it_goes_back_to_the_first(settings: FakeSettings, machine: MachineFolder) -> None:
    actuators, _said = make(settings, machine)
    with actuators:
        for watts in (300.0, 250.0, 200.0):
            actuators.apply([limit(A, watts)])
    assert settings.values[A, "power_limit_w"] == 320.0


def test_an_automatic_fan_is_automatic_again(settings: FakeSettings, machine: MachineFolder) -> None:
    actuators, _said = make(settings, machine)
    with actuators:
        actuators.apply([Setting(uuid=A, kind="fan_percent", value=80.0)])
        assert settings.values[A, "fan_percent"] == 80.0
    assert settings.values[A, "fan_percent"] is None


def test_without_root_nothing_is_touched_and_a_sentence_says_so(settings: FakeSettings, machine: MachineFolder) -> None:
    actuators, _said = make(settings, machine, is_root=False)
    with actuators, pytest.raises(MachineError, match="power limit needs root; run it with sudo"):
        actuators.apply([limit(A, 280.0)])
    assert settings.journal_at_set == []


def test_out_of_range_names_the_range(settings: FakeSettings, machine: MachineFolder) -> None:
    actuators, _said = make(settings, machine)
    with actuators, pytest.raises(MachineError, match="choose 100 to 385 W"):
        actuators.apply([limit(A, 500.0)])
    assert settings.journal_at_set == []


def test_a_card_that_does_not_tell_its_range_is_asked_all_the_same(
    settings: FakeSettings, machine: MachineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untold(_uuid: str, _kind: Kind) -> tuple[float, float]:
        raise Fault("unsupported", "Not Supported")

    monkeypatch.setattr(settings, "range", untold)
    actuators, _said = make(settings, machine)
    with actuators:
        actuators.apply([Setting(uuid=A, kind="target_temperature_c", value=75.0)])
        assert settings.values[A, "target_temperature_c"] == 75.0
    assert settings.values[A, "target_temperature_c"] == 84.0


def test_a_card_that_keeps_another_value_is_noticed_and_everything_put_back(
    settings: FakeSettings, machine: MachineFolder
) -> None:
    actuators, _said = make(settings, machine)
    with actuators:
        settings.keeps = 310.0
        with pytest.raises(MachineError, match=r"310\.0 W is what the card keeps"):
            actuators.apply([limit(A, 280.0)])
        assert left_behind(journal_path(machine)) == (limit(A, 320.0),), "the card did not take the old value either"
        settings.keeps = None
    assert settings.values[A, "power_limit_w"] == 320.0
    assert not journal_path(machine).exists()


def test_one_refusal_puts_the_others_back(settings: FakeSettings, machine: MachineFolder) -> None:
    actuators, _said = make(settings, machine)
    settings.refuses = {B}
    with actuators, pytest.raises(MachineError, match="No Permission"):
        actuators.apply([limit(A, 280.0), limit(B, 280.0)])
    assert settings.values[A, "power_limit_w"] == 320.0


def test_what_cannot_be_put_back_stays_in_the_journal(settings: FakeSettings, machine: MachineFolder) -> None:
    actuators, said = make(settings, machine)
    with actuators:
        actuators.apply([limit(A, 280.0), limit(B, 280.0)])
        settings.refuses = {B}
    assert left_behind(journal_path(machine)) == (limit(B, 320.0),)
    assert any("could not be put back" in text for text in said)
    settings.refuses = set()
    again, _said = make(settings, machine)
    with again:
        pass
    assert settings.values[B, "power_limit_w"] == 320.0
    assert not journal_path(machine).exists()


def test_after_a_crash_the_next_one_puts_it_back(settings: FakeSettings, machine: MachineFolder) -> None:
    settings.values[A, "power_limit_w"] = 200.0  # left by the one that crashed
    codec.write_json(journal_path(machine), Journal(pid=1, t_s=0.0, previous=(limit(A, 320.0),)))
    actuators, said = make(settings, machine)
    with actuators:
        assert settings.values[A, "power_limit_w"] == 320.0
        actuators.apply([limit(A, 280.0)])
    assert settings.values[A, "power_limit_w"] == 320.0
    assert "without putting back 1 settings" in said[0]


def test_after_a_crash_and_without_root_it_says_how(settings: FakeSettings, machine: MachineFolder) -> None:
    codec.write_json(journal_path(machine), Journal(pid=1, t_s=0.0, previous=(limit(A, 320.0),)))
    actuators, said = make(settings, machine, is_root=False)
    with actuators:
        pass
    assert "sudo homelab watchdog" in said[0]
    assert left_behind(journal_path(machine)) == (limit(A, 320.0),)


# A card that is a file, changed by a process that then ends in some way.
PROCESS = """
import json, os, signal, sys, time
from pathlib import Path
from homelab_scaling.watch.actuators import Actuators, Setting
from homelab_scaling.watch.link import MachineFolder
from homelab_scaling.watch.signals import Signals

card, machine, way = Path(sys.argv[1]), MachineFolder(Path(sys.argv[2])), sys.argv[3]

class File:
    def get(self, uuid, kind): return json.loads(card.read_text())
    def set(self, uuid, kind, value): card.write_text(json.dumps(value))
    def range(self, uuid, kind): return 100.0, 400.0

wish = [Setting(uuid="GPU-a", kind="power_limit_w", value=250.0)]
actuators = Actuators(File(), machine, lambda text: None, is_root=True)
with Signals() as signals:
    if way == "atexit":
        actuators.__enter__()
        actuators.apply(wish)
        sys.exit(5)
    with actuators:
        actuators.apply([] if way == "restart" else wish)
        print("set", flush=True)
        if way == "raise": raise RuntimeError("a bug")
        if way != "restart": signals.sleep(60)
"""


@pytest.fixture
def change(tmp_path: Path, machine: MachineFolder) -> Callable[..., Any]:
    card = tmp_path / "card.json"
    card.write_text("320.0")

    def run(way: str, number: signal.Signals | None = None) -> str:
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(card), str(machine.path), way],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        if number is not None:
            process.stdout.readline()
            assert card.read_text() == "250.0"
            time.sleep(0.1)
            process.send_signal(number)
        process.communicate(timeout=30)
        return card.read_text()

    return run


@pytest.mark.parametrize(
    ("way", "number"),
    [("raise", None), ("atexit", None), ("wait", signal.SIGTERM), ("wait", signal.SIGINT), ("wait", signal.SIGHUP)],
)
def test_every_exit_puts_it_back(change: Callable[..., str], way: str, number: signal.Signals | None) -> None:
    assert change(way, number) == "320.0"


def test_sigkill_leaves_it_to_the_next_start(change: Callable[..., str]) -> None:
    assert change("wait", signal.SIGKILL) == "250.0"
    assert change("restart") == "320.0"


class FakeNvml:
    """What the settings ask NVML, in NVML's units."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"limit": 320_000, "target": 84, "policy": 0, "fans": [40, 40]}
        self.asked: list[str] = []

    def __call__(self, uuid: str, name: str, *args: Any) -> Any:  # noqa: PLR0911 (a table)
        self.asked.append(name)
        match name.removeprefix("nvmlDevice"), args:
            case "GetPowerManagementLimit", ():
                return self.state["limit"]
            case "SetPowerManagementLimit", (milliwatts,):
                self.state["limit"] = milliwatts
            case "GetPowerManagementLimitConstraints", ():
                return [100_000, 385_000]
            case "GetTemperatureThreshold", (kind,):
                return {4: 65, 5: self.state["target"], 6: 91}[kind]
            case "SetTemperatureThreshold", (5, celsius):
                self.state["target"] = celsius
            case "GetNumFans", ():
                return 2
            case "GetFanControlPolicy_v2", (0,):
                return self.state["policy"]
            case "GetTargetFanSpeed", (0,):
                return self.state["fans"][0]
            case "GetMinMaxFanSpeed", ():
                return [30, 100]
            case "SetFanSpeed_v2", (fan, percent):
                self.state["fans"][fan], self.state["policy"] = percent, 1
            case "SetDefaultFanSpeed_v2", (fan,):
                self.state["fans"][fan], self.state["policy"] = 40, 0
            case _:
                raise AssertionError((name, args))


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("power_limit_w", 280.0, {"limit": 280_000}),
        ("target_temperature_c", 75.0, {"target": 75}),
        ("fan_percent", 90.0, {"fans": [90, 90], "policy": 1}),
    ],
)
def test_settings_in_nvml_s_units_and_back(
    machine: MachineFolder, kind: Kind, value: float, expected: dict[str, Any]
) -> None:
    nvml = FakeNvml()
    before = {**nvml.state, "fans": list(nvml.state["fans"])}
    with Actuators(NvmlSettings(nvml), machine, lambda _: None, is_root=True) as actuators:
        actuators.apply([Setting(uuid=A, kind=kind, value=value)])
        assert {key: nvml.state[key] for key in expected} == expected
        assert NvmlSettings(nvml).get(A, kind) == value
    assert nvml.state == before


def test_the_system_says_who_is_root() -> None:
    actuators = Actuators(FakeSettings(Path("none")), MachineFolder(Path("none")), lambda _: None)
    assert actuators.is_root == (os.geteuid() == 0)
