"""The doctor's judgements on boxes written by hand, and the command on this one."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvml_stub.nvml_stub import RTX_3090, RTX_4080, StubDriver

from homelab_scaling import codec, doctor
from homelab_scaling.box import PATH_WITHOUT_SPACES, Box, describe_box, missing_for_compile, visible_cards
from homelab_scaling.doctor import GIB, DiskSpeed, Driver, Facts, Finding, Matmul, TorchProbe, measure
from homelab_scaling.doctor import facts as doctor_facts
from homelab_scaling.doctor.driver import DriverCard, Link, survey
from homelab_scaling.watch.gpu import Card
from homelab_scaling.watch.p2p import Pair
from homelab_scaling.watch.readings import CardFacts


def card(index: int = 0, name: str = "NVIDIA GeForce RTX 4080", capability: tuple[int, int] = (8, 9)) -> Card:
    return Card(index=index, uuid=f"GPU-{index}aa", name=name, vram_bytes=16 * GIB, capability=capability)


def box_of(*cards: Card) -> Box:
    return dataclasses.replace(describe_box(cards), n_cores=8, computes_bf16=all(c.computes_bf16 for c in cards))


def driver_card(index: int = 0, **changes: Any) -> DriverCard:
    link = Link(generation=4, generation_max=4, width=16, width_max=16)
    known = CardFacts(
        uuid=f"GPU-{index}aa",
        index=index,
        name=changes.pop("name", "NVIDIA GeForce RTX 4080"),
        vram_bytes=16 * GIB,
        slowdown_c=changes.pop("slowdown_c", 90.0),
        shutdown_c=95.0,
        limits_from="margins",
        power_limit_w=changes.pop("power_limit_w", 320.0),
        power_limit_default_w=320.0,
        power_limit_range_w=(150.0, 355.0),
        missing=changes.pop("missing", {}),
    )
    return DriverCard(facts=known, link=changes.pop("link", link), persistence=changes.pop("persistence", True))


def driver_of(*cards: DriverCard, p2p: str = "not supported", **changes: Any) -> Driver:
    pairs = (Pair(first=0, second=1, p2p=p2p),) if len(cards) > 1 else ()
    known = {"version": "550.120", "nvml_version": "12.550.120", "cuda_version": "12.4", "cards": cards, "pairs": pairs}
    return Driver(**{**known, **changes})


TWO_CARDS = (card(0), card(1))
GOOD = Facts(
    box=box_of(*TWO_CARDS),
    cards=TWO_CARDS,
    driver=driver_of(driver_card(0), driver_card(1)),
    driver_loaded=True,
    card_on_bus=True,
    python=(3, 12, 1),
    versions=dict.fromkeys(doctor.PACKAGES, "2.13.0"),
    pins=dict.fromkeys(doctor.PACKAGES, "2.13.0"),
    lower_bounds=dict.fromkeys(doctor.PACKAGES, "2.6"),
    torch=TorchProbe(cuda_build="12.8", n_usable=2),
    matmul=(Matmul(device="NVIDIA GeForce RTX 4080", bf16_flops_per_s=90e12, fp32_flops_per_s=40e12),),
    lab="lab",
    disk_speed=DiskSpeed(write_bytes_per_s=1e9, read_bytes_per_s=2e9),
    swap_bytes=8 * GIB,
    disk_free_bytes=100 * GIB,
    memory_bytes=64 * GIB,
    memory_free_bytes=60 * GIB,
)
NO_CARD = dataclasses.replace(
    GOOD,
    box=box_of(),
    cards=(),
    driver=Driver(error="NVML Shared Library Not Found"),
    driver_loaded=False,
    card_on_bus=False,
    torch=TorchProbe(),
    matmul=(Matmul(device="cpu", n_threads=1, fp32_flops_per_s=0.1e12),),
)
CPU_TORCH = TorchProbe(cuda_build=None)
CARDS = (driver_card(0), driver_card(1))
NARROW = driver_of(CARDS[0], driver_card(1, link=Link(generation=1, generation_max=4, width=4, width_max=16)))
OLD_DRIVER = driver_of(*CARDS, version="545.29.06")
UNLIKE = driver_of(CARDS[0], driver_card(1, name="NVIDIA GeForce RTX 3060"))
SLOW_DISK = DiskSpeed(write_bytes_per_s=10e6, read_bytes_per_s=20e6)
SLOW_CARD = Matmul(device="NVIDIA GeForce RTX 4080", bf16_flops_per_s=50e12, fp32_flops_per_s=25e12)
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
        (
            NO_CARD,
            {"driver_loaded": True, "driver": Driver(error="mismatch")},
            "device",
            "fail",
            "mismatch",
            "nvidia-smi",
        ),
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
        (GOOD, {"environment": {"OMP_NUM_THREADS": "64"}}, "cores", "warn", "OMP_NUM_THREADS=64", "unset"),
        (GOOD, {"environment": {"OMP_NUM_THREADS": "1"}}, "cores", "ok", "OMP_NUM_THREADS=1", None),
        (NO_CARD, {"environment": {"OMP_NUM_THREADS": "1"}}, "cores", "warn", "OMP_NUM_THREADS=1", "unset"),
        (NO_CARD, {"environment": {"OMP_NUM_THREADS": "many"}}, "cores", "warn", "OMP_NUM_THREADS=many", "unset"),
        (NO_CARD, {}, "driver", "ok", "none (NVML Shared Library Not Found)", None),
        (GOOD, {"driver": Driver(error="not nvidia-ml-py's")}, "driver", "warn", "not nvidia-ml-py's", "constraints"),
        (GOOD, {"swap_bytes": 0}, "swap", "ok", "none", None),
        (GOOD, {"swap_bytes": 0, "memory_bytes": 8 * GIB}, "swap", "warn", "none", "mkswap"),
        (GOOD, {"swap_used_bytes": 2 * GIB, "memory_free_bytes": GIB}, "swap", "warn", "2.0 of 8.0", "close"),
        (GOOD, {"swap_used_bytes": 2 * GIB}, "swap", "ok", "2.0 of 8.0", None),
        (GOOD, {"disk_speed": SLOW_DISK}, "disk speed", "warn", "at 10 MB/s", "takes 150 s"),
        (GOOD, {"disk_speed": DiskSpeed(error="Permission denied")}, "disk speed", "warn", "Permission", "writable"),
        (GOOD, {"matmul": (SLOW_CARD,)}, "matmul", "warn", "51% of the tabled 97.5", "throttles"),
        (GOOD, {"matmul": (Matmul(device="cpu", error="boom"),)}, "matmul", "warn", "cpu: boom", "constraints"),
        (
            GOOD,
            {"matmul": (Matmul(device="X9", bf16_flops_per_s=1e12),)},
            "matmul",
            "ok",
            "X9 is not in the table",
            None,
        ),
        (NO_CARD, {}, "matmul", "ok", "fp32 0.10 TFLOP/s on 1 thread (a CPU has no tabled peak)", None),
        (
            GOOD,
            {"driver": driver_of(driver_card(), absent={"1": "GPU is lost"})},
            "card 1",
            "fail",
            "GPU is lost",
            "reboot",
        ),
        (GOOD, {}, "card 0", "ok", "slows itself down at about 90 C, shuts down at about 95 C", None),
        (GOOD, {}, "card 1", "ok", "power limit 320 W (default 320, may be 150 to 355), PCIe gen 4 x16", None),
        (
            GOOD,
            {"driver": driver_of(driver_card(slowdown_c=None))},
            "card 0",
            "warn",
            "unknown",
            "slowdown_c under [watch]",
        ),
        (GOOD, {"driver": driver_of(driver_card(power_limit_w=None))}, "card 0", "ok", "power limit unknown", None),
        (GOOD, {"driver": driver_of(driver_card(persistence=False))}, "card 0", "ok", "mode off", "nvidia-smi -pm 1"),
        (GOOD, {"driver": NARROW}, "card 1", "warn", "x4 now of gen 4 x16", "8 or 16 lanes"),
        (GOOD, {"driver": driver_of(*NARROW.cards[1:])}, "card 1", "ok", "x4 now", None),
        (GOOD, {}, "p2p", "ok", "cards 0 and 1: not supported", "host memory"),
        (GOOD, {"driver": driver_of(*CARDS, p2p="yes")}, "p2p", "ok", "cards 0 and 1: yes", None),
        (GOOD, {"driver": OLD_DRIVER}, "p2p", "warn", "NCCL can hang", "NCCL_P2P_DISABLE=1"),
        (GOOD, {"driver": OLD_DRIVER, "environment": {"NCCL_P2P_DISABLE": "1"}}, "p2p", "ok", "DISABLE=1", None),
        (GOOD, {"driver": UNLIKE}, "card order", "warn", "by speed", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (GOOD, {}, "launch", "ok", "2 cards", "two_gpus.yaml"),
        (NO_CARD, {}, "launch", "ok", "one process only", "ACCELERATE_USE_CPU=true"),
        (
            GOOD,
            {"environment": {"RANK": "0", "WORLD_SIZE": "2"}},
            "ranks",
            "warn",
            "RANK=0, WORLD_SIZE=2",
            "unset RANK",
        ),
        (GOOD, {"environment": {"ACCELERATE_USE_CPU": "1"}}, "launch env", "warn", "USE_CPU=1", "unset ACCELERATE_USE"),
        (GOOD, {"accelerate_config": {"num_processes": "2"}}, "launch config", "ok", "applies", None),
        (GOOD, {"accelerate_config": {"use_cpu": "true"}}, "launch config", "warn", "cards idle", "two_gpus.yaml"),
        (GOOD, {"accelerate_config": {"num_processes": "4"}}, "launch config", "warn", "4 with 2 cards", "remove"),
        (NO_CARD, {"accelerate_config": {"num_processes": "2"}}, "launch config", "warn", "independently", "cpu.yaml"),
        (GOOD, {"accelerate_config": {"distributed_type": "FSDP"}}, "launch config", "warn", "FSDP", "remove"),
        (GOOD, {"accelerate_config": {"mixed_precision": "fp16"}}, "launch config", "warn", "fp16", "remove"),
        (GOOD, {"accelerate_config": {"dynamo_config": ""}}, "launch config", "warn", "second time", "remove"),
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
    with measure.Probe("print('noise'); print('{\"a\": 1}')") as probe:
        assert probe.answer() == ({"a": 1}, None)
    with measure.Probe("raise OSError('libcudart.so.12: not found')") as probe:
        assert probe.answer() == ({}, "OSError: libcudart.so.12: not found")
    with measure.Probe("import os; os.abort()") as probe:
        assert probe.answer() == ({}, "ended with exit code -6")
    monkeypatch.setattr(measure, "PROBE_TIMEOUT_S", 0.2)
    with measure.Probe("import time; time.sleep(60)") as probe:
        assert probe.answer() == ({}, "no answer in 0 s")


def test_a_card_on_the_bus_is_seen_without_a_driver(tmp_path: Path) -> None:
    audio, display = tmp_path / "0000:01:00.1", tmp_path / "0000:01:00.0"
    for folder, kind in ((audio, "0x040300"), (display, "0x030000")):
        folder.mkdir()
        (folder / "vendor").write_text("0x10de\n")
        assert not doctor_facts._card_on_bus(tmp_path)
        (folder / "class").write_text(f"{kind}\n")
    assert doctor_facts._card_on_bus(tmp_path)


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
    assert {"driver", "matmul", "disk speed", "swap", "launch"} <= set(statuses)
    assert checkup["box"]["n_cores"] >= 1
    assert checkup["matmul"][0]["fp32_flops_per_s"] > 1e8
    assert checkup["disk"]["write_bytes_per_s"] > 1e4
    assert list(tmp_path.iterdir()) == [], "the file that was timed is gone"


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


def test_the_driver_is_surveyed_whole(tmp_path: Path) -> None:
    with StubDriver(tmp_path / "driver", [RTX_4080, RTX_3090, RTX_4080], energy_runs=False) as stub:
        stub.set(0, pcie_gen=4, persistence=1, p2p=0)
        stub.set(1, p2p=2)
        stub.lose(2)
        code = "from homelab_scaling import codec; from homelab_scaling.doctor.driver import survey; "
        command = [sys.executable, "-c", code + "print(codec.dumps(survey()))"]
        said = subprocess.run(command, env=stub.env(), check=True, capture_output=True, text=True)
        found = codec.from_plain(json.loads(said.stdout), Driver, "survey")
        assert (found.version, found.nvml_version, found.cuda_version) == ("550.120", "12.550.120", "12.8")
        assert found.absent == {"2": "GPU is lost"}
        assert [c.facts.slowdown_c for c in found.cards] == [90, 95]
        assert found.cards[0].link == Link(generation=4, generation_max=4, width=8, width_max=16)
        assert [c.persistence for c in found.cards] == [True, False]
        assert [(p.first, p.second, p.p2p) for p in found.pairs] == [(0, 1, "not by these cards")]
        assert stub.calls(0, "pcie_throughput") == 0


def test_no_driver_is_one_sentence() -> None:
    class Refused(Exception):
        value = 9

    def refuse() -> None:
        raise Refused("Driver Not Loaded")

    assert survey(SimpleNamespace(NVMLError=Refused, nvmlInit=refuse)) == Driver(error="Driver Not Loaded")


def test_a_full_or_forbidden_disk_is_not_written_to(tmp_path: Path) -> None:
    assert measure.measure_disk(tmp_path, GIB).error == "too little is free to try"
    assert measure.measure_disk(tmp_path / "missing", 9 * GIB).error == "No such file or directory"


def test_the_defaults_of_accelerate_are_read_without_a_yaml_parser(tmp_path: Path) -> None:
    path = tmp_path / "default_config.yaml"
    assert doctor_facts.read_flat_yaml(path) == {}
    path.write_text("# made by hand\nuse_cpu: 'true'\ndynamo_config:\n  dynamo_backend: inductor\nnum_processes: 2\n")
    assert doctor_facts.read_flat_yaml(path) == {"use_cpu": "true", "dynamo_config": "", "num_processes": "2"}
