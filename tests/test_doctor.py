"""The doctor's judgements on boxes written by hand, and the command on this one."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import doctor
from homelab_scaling.box import PATH_WITHOUT_SPACES, Box, describe_box, missing_for_compile, visible_cards
from homelab_scaling.doctor import GIB, Facts, Finding, TorchProbe
from homelab_scaling.watch.gpu import Card


def card(index: int = 0, name: str = "NVIDIA GeForce RTX 4080", capability: tuple[int, int] = (8, 9)) -> Card:
    return Card(index=index, uuid=f"GPU-{index}aa", name=name, vram_bytes=16 * GIB, capability=capability)


def box_of(*cards: Card) -> Box:
    return dataclasses.replace(describe_box(cards), n_cores=8, computes_bf16=all(c.computes_bf16 for c in cards))


TWO_CARDS = (card(0), card(1))
GOOD = Facts(
    box=box_of(*TWO_CARDS),
    cards=TWO_CARDS,
    driver_loaded=True,
    card_on_bus=True,
    python=(3, 12, 1),
    versions=dict.fromkeys(doctor.PACKAGES, "2.13.0"),
    pins=dict.fromkeys(doctor.PACKAGES, "2.13.0"),
    lower_bounds=dict.fromkeys(doctor.PACKAGES, "2.6"),
    torch=TorchProbe(cuda_build="12.8", n_usable=2),
    lab="lab",
    disk_free_bytes=100 * GIB,
    memory_bytes=64 * GIB,
    memory_free_bytes=60 * GIB,
)
NO_CARD = dataclasses.replace(
    GOOD, box=box_of(), cards=(), driver_loaded=False, card_on_bus=False, torch=TorchProbe(), n_cards_hidden=0
)
CPU_TORCH = TorchProbe(cuda_build=None)
OLD_CARD = card(0, "NVIDIA GeForce RTX 2080", (7, 5))


def finding(topic: str, facts: Facts) -> Finding:
    (found,) = [f for f in doctor.judge(facts) if f.topic == topic]
    return found


def test_a_good_box_has_nothing_to_mend() -> None:
    findings = doctor.judge(GOOD)
    assert {f.status for f in findings} == {"ok"}
    assert finding("device", GOOD).found.count("RTX 4080 (16.0 GiB)") == 2
    assert finding("torch", GOOD).found == "2.13.0, built for CUDA 12.8"


def test_a_box_without_a_card_is_warned_and_not_failed() -> None:
    findings = doctor.judge(NO_CARD)
    assert [f.topic for f in findings if f.status != "ok"] == ["device"]
    assert finding("device", NO_CARD).status == "warn"


@pytest.mark.parametrize(
    ("base", "change", "topic", "status", "found", "remedy"),
    [
        (GOOD, {"python": (3, 10, 4)}, "python", "fail", "3.10.4", "3.11"),
        (GOOD, {"versions": GOOD.versions | {"accelerate": None}}, "accelerate", "fail", "not installed", "quickstart"),
        (GOOD, {"versions": GOOD.versions | {"torch": "2.5.1+cu121"}}, "torch", "fail", "wanted 2.6", "constraints"),
        (GOOD, {"versions": GOOD.versions | {"torch": "2.14.0rc1"}}, "torch", "warn", "tested with 2.13.0", "install"),
        (GOOD, {"versions": GOOD.versions | {"torch": "2.13.0+cu128"}}, "torch", "ok", "2.13.0+cu128", None),
        (GOOD, {"pins": {}}, "torch", "ok", "2.13.0", None),
        (GOOD, {"pynvml_version": "13.0.1"}, "pynvml", "warn", "13.0.1", "pip uninstall -y pynvml"),
        (GOOD, {"torch": CPU_TORCH}, "device", "fail", "built for CPU only", "reinstall torch"),
        (GOOD, {"torch": TorchProbe(error="boom")}, "device", "fail", "torch fails: boom", "constraints"),
        (
            GOOD,
            {"torch": TorchProbe(cuda_build="13.0", error="The NVIDIA driver is too old")},
            "device",
            "fail",
            "0 of 2: The NVIDIA driver is too old",
            "CUDA 13.0",
        ),
        (
            GOOD,
            {"torch": TorchProbe(cuda_build="12.8", n_usable=1, error="lost")},
            "device",
            "fail",
            "1 of 2",
            "reboot",
        ),
        (NO_CARD, {"driver_loaded": True, "nvml_error": "mismatch"}, "device", "fail", "mismatch", "nvidia-smi"),
        (NO_CARD, {"card_on_bus": True}, "device", "warn", "driver is not loaded", "install the NVIDIA driver"),
        (NO_CARD, {"n_cards_hidden": 2}, "device", "warn", "hides all 2 cards", "unset CUDA_VISIBLE_DEVICES"),
        (GOOD, {"cards": (OLD_CARD,), "box": box_of(OLD_CARD)}, "bf16", "warn", "RTX 2080 (7.5)", "precision"),
        (GOOD, {"bitsandbytes_error": "no library"}, "adamw8bit", "fail", "no library", "[optim]"),
        (NO_CARD, {"bitsandbytes_error": "no library"}, "adamw8bit", "warn", "no library", "[optim]"),
        (GOOD, {"missing_for_compile": ("Python.h",)}, "compile", "warn", "Python.h missing", "python3.12-dev"),
        (
            GOOD,
            {"missing_for_compile": (PATH_WITHOUT_SPACES,)},
            "compile",
            "warn",
            "without spaces",
            "clone the project",
        ),
        (GOOD, {"disk_free_bytes": 5 * GIB}, "disk", "warn", "5.0 GiB free for lab", "free some space"),
        (GOOD, {"disk_free_bytes": GIB // 2}, "disk", "fail", "0.5 GiB", "free some space"),
        (GOOD, {"memory_free_bytes": GIB}, "memory", "warn", "1.0 of 64.0", "close"),
        (GOOD, {"omp_threads": "64"}, "cores", "warn", "OMP_NUM_THREADS=64", "unset"),
        (GOOD, {"omp_threads": "1"}, "cores", "ok", "OMP_NUM_THREADS=1", None),
        (NO_CARD, {"omp_threads": "1"}, "cores", "warn", "OMP_NUM_THREADS=1", "unset"),
        (NO_CARD, {"omp_threads": "many"}, "cores", "warn", "OMP_NUM_THREADS=many", "unset"),
    ],
)
def test_each_fault_is_named_with_its_remedy(
    base: Facts, change: dict[str, Any], topic: str, status: str, found: str, remedy: str | None
) -> None:
    said = finding(topic, dataclasses.replace(base, **change))
    assert said.status == status
    assert found in said.found
    assert (remedy is None and said.remedy is None) or (remedy is not None and remedy in str(said.remedy))


def test_a_warning_without_a_remedy_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="remedy"):
        Finding(topic="disk", status="warn", found="little")


def test_a_probe_that_crashes_hangs_or_chatters_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with doctor._Probe("print('noise'); print('{\"a\": 1}')") as probe:
        assert probe.answer() == ({"a": 1}, None)
    with doctor._Probe("raise OSError('libcudart.so.12: not found')") as probe:
        assert probe.answer() == ({}, "OSError: libcudart.so.12: not found")
    with doctor._Probe("import os; os.abort()") as probe:
        assert probe.answer() == ({}, "ended with exit code -6")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.2)
    with doctor._Probe("import time; time.sleep(60)") as probe:
        assert probe.answer() == ({}, "no answer in 0 s")


def test_a_card_on_the_bus_is_seen_without_a_driver(tmp_path: Path) -> None:
    audio, display = tmp_path / "0000:01:00.1", tmp_path / "0000:01:00.0"
    for folder, kind in ((audio, "0x040300"), (display, "0x030000")):
        folder.mkdir()
        (folder / "vendor").write_text("0x10de\n")
        assert not doctor._card_on_bus(tmp_path)
        (folder / "class").write_text(f"{kind}\n")
    assert doctor._card_on_bus(tmp_path)


def test_pins_are_read_from_the_constraints_file(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    assert doctor.read_pins(constraints) == {}
    constraints.write_text("# text with == inside\ntorch==2.13.0\nnumpy==2.4.6\n")
    assert doctor.read_pins(constraints) == {"torch": "2.13.0", "numpy": "2.4.6"}


@pytest.mark.parametrize(
    ("visible", "left"), [(None, [0, 1]), ("", []), ("1", [1]), ("1,0", [0, 1]), ("GPU-1a", [1]), ("-1", [])]
)
def test_cuda_visible_devices_hides_cards(
    visible: str | None, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [c.index for c in visible_cards(TWO_CARDS)] == left


def test_a_compiler_is_looked_for_where_cc_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert missing_for_compile()[:2] == ["a C compiler", "a C++ compiler"]
    for name in ("ccache", "clang++"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("CC", "ccache gcc")
    monkeypatch.setenv("CXX", "clang++")
    assert "compiler" not in " ".join(missing_for_compile())


def test_the_command_prints_one_json_document(homelab: Callable[..., Any], tmp_path: Path) -> None:
    said = homelab("doctor", "--json", "--lab", tmp_path / "not" / "yet")
    checkup = json.loads(said.out)
    statuses = {f["topic"]: f["status"] for f in checkup["findings"]}
    assert said.code == (2 if "fail" in statuses.values() else 0)
    assert {"python", "torch", "device", "bf16", "adamw8bit", "compile", "disk", "memory", "cores"} <= set(statuses)
    assert statuses["torch"] in ("ok", "warn")
    assert checkup["box"]["n_cores"] >= 1


def test_the_command_prints_a_line_per_finding(
    homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda lab: dataclasses.replace(GOOD, disk_free_bytes=0, lab=str(lab)))
    said = homelab("doctor", "--lab", tmp_path)
    lines = said.out.splitlines()
    assert said.code == 2
    assert len(lines) == len(doctor.judge(GOOD)) + 1
    assert sum(line.startswith("fail  disk") for line in lines) == 1
    assert lines[-1] == "1 to mend first, 0 warnings"
