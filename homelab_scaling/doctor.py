"""What this box is and whether it can do the job: facts are gathered once, then judged one by one by pure functions.

torch and bitsandbytes are tried in processes of their own, so that a broken one costs a line instead of the command.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from homelab_scaling import box as this_box
from homelab_scaling.box import Box
from homelab_scaling.watch.gpu import Card, list_cards

Status = Literal["ok", "warn", "fail"]

PYTHON_MIN = (3, 11)
PACKAGES = ("torch", "accelerate", "transformers", "bitsandbytes", "nvidia-ml-py")
PROBE_TIMEOUT_S = 180.0
GIB = 1024**3
DISK_WARN_BYTES, DISK_FAIL_BYTES = 10 * GIB, 1 * GIB
MEMORY_WARN_BYTES = 2 * GIB
REINSTALL = "run `bash tools/quickstart.sh` or `pip install -c constraints.txt -e .`"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, what was found, what to do about it."""

    topic: str
    status: Status
    found: str
    remedy: str | None = None
    """What to do; None only where nothing need be done."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.remedy, f"{self.topic}: a {self.status} without a remedy helps nobody"


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """`homelab doctor --json`."""

    box: Box
    findings: tuple[Finding, ...]

    @property
    def n_fail(self) -> int:
        return sum(f.status == "fail" for f in self.findings)

    @property
    def n_warn(self) -> int:
        return sum(f.status == "warn" for f in self.findings)


@dataclass(frozen=True, kw_only=True)
class TorchProbe:
    """What torch did when it was really asked."""

    cuda_build: str | None = None
    """CUDA version torch was built for; None for a CPU build."""
    n_usable: int = 0
    """Cards on which a matmul gave the right number."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything the judgements read; tests write one by hand for each kind of box."""

    box: Box
    cards: tuple[Card, ...] = ()
    """Those CUDA_VISIBLE_DEVICES leaves."""
    n_cards_hidden: int = 0
    nvml_error: str | None = None
    driver_loaded: bool = False
    card_on_bus: bool = False
    """An NVIDIA display device sits on the PCI bus, driver or not."""
    python: tuple[int, int, int]
    versions: dict[str, str | None]
    """Distribution -> installed version, None where it is missing."""
    pins: dict[str, str] = field(default_factory=dict)
    """Distribution -> tested version (constraints.txt); empty where the file is not here."""
    lower_bounds: dict[str, str] = field(default_factory=dict)
    pynvml_version: str | None = None
    """Of the deprecated distribution `pynvml`."""
    torch: TorchProbe
    bitsandbytes_error: str | None = None
    missing_for_compile: tuple[str, ...] = ()
    lab: str
    disk_free_bytes: int
    memory_bytes: int
    memory_free_bytes: int
    omp_threads: str | None = None


def examine(lab: Path) -> Checkup:
    """Every finding about this machine, with `lab` as the folder that will hold the runs."""
    facts = gather(lab)
    return Checkup(box=facts.box, findings=judge(facts))


# -------------------------------------------------------------------------------------------------------- judgements


def judge(facts: Facts) -> tuple[Finding, ...]:
    """The findings that follow from the facts, in the order they are shown."""
    return (
        judge_python(facts),
        *(judge_package(name, facts) for name in PACKAGES),
        *judge_pynvml(facts),
        *judge_device(facts),
        judge_bf16(facts),
        judge_optimizer(facts),
        judge_compile(facts),
        judge_disk(facts),
        judge_memory(facts),
        judge_threads(facts),
    )


def judge_python(facts: Facts) -> Finding:
    """Whether the interpreter is new enough."""
    found = ".".join(map(str, facts.python))
    if facts.python >= PYTHON_MIN:
        return Finding(topic="python", status="ok", found=found)
    return Finding(topic="python", status="fail", found=found, remedy="install Python 3.11 or later and remove .venv")


def judge_package(name: str, facts: Facts) -> Finding:
    """Whether a package is here, new enough and the tested version."""
    version, pin, bound = facts.versions.get(name), facts.pins.get(name), facts.lower_bounds.get(name)
    if version is None:
        return Finding(topic=name, status="fail", found="not installed", remedy=REINSTALL)
    if bound is not None and _release(version) < _release(bound):
        return Finding(topic=name, status="fail", found=f"{version}, wanted {bound} or later", remedy=REINSTALL)
    if pin is not None and _release(version) != _release(pin):
        return Finding(topic=name, status="warn", found=f"{version}, tested with {pin}", remedy=REINSTALL)
    if name == "torch" and facts.torch.error is None:
        built = f"built for CUDA {facts.torch.cuda_build}" if facts.torch.cuda_build else "built for CPU only"
        return Finding(topic=name, status="ok", found=f"{version}, {built}")
    return Finding(topic=name, status="ok", found=version)


def judge_pynvml(facts: Facts) -> tuple[Finding, ...]:
    """Says so where the deprecated package `pynvml` stands before the real bindings; nothing otherwise."""
    if facts.pynvml_version is None:
        return ()
    return (
        Finding(
            topic="pynvml",
            status="warn",
            found=f"the deprecated package pynvml {facts.pynvml_version} hides the bindings of nvidia-ml-py",
            remedy="run `pip uninstall -y pynvml` and `pip install --force-reinstall nvidia-ml-py`",
        ),
    )


def judge_device(facts: Facts) -> tuple[Finding, ...]:
    """What will compute: every card with its memory and whether torch can use it, or the CPU and why."""
    if facts.torch.error is not None and not facts.torch.cuda_build:
        return (Finding(topic="device", status="fail", found=f"torch fails: {facts.torch.error}", remedy=REINSTALL),)
    if not facts.cards:
        return (_judge_no_card(facts),)
    cards = ", ".join(f"{c.name} ({c.vram_bytes / GIB:.1f} GiB)" for c in facts.cards)
    if facts.torch.cuda_build is None:
        remedy = "reinstall torch from an index that is not CPU-only: `pip install --force-reinstall torch`"
        return (
            Finding(topic="device", status="fail", found=f"{cards}, but torch is built for CPU only", remedy=remedy),
        )
    if facts.torch.n_usable < len(facts.cards):
        why = facts.torch.error or "no reason given"
        found = f"{cards}, but torch computes on {facts.torch.n_usable} of {len(facts.cards)}: {why}"
        remedy = f"update the NVIDIA driver to one for CUDA {facts.torch.cuda_build} or later and reboot"
        return (Finding(topic="device", status="fail", found=found, remedy=remedy),)
    return (Finding(topic="device", status="ok", found=cards),)


def _judge_no_card(facts: Facts) -> Finding:
    if facts.n_cards_hidden:
        found = f"CUDA_VISIBLE_DEVICES hides all {facts.n_cards_hidden} cards: training runs on the CPU"
        return Finding(topic="device", status="warn", found=found, remedy="unset CUDA_VISIBLE_DEVICES")
    if facts.driver_loaded:
        found = f"the NVIDIA driver is loaded but no card answers ({facts.nvml_error or 'NVML lists none'})"
        remedy = "reboot; if it stays, `nvidia-smi` names the fault (often a driver updated but not reloaded)"
        return Finding(topic="device", status="fail", found=found, remedy=remedy)
    if facts.card_on_bus:
        found = "an NVIDIA card is in the machine but its driver is not loaded: training runs on the CPU"
        return Finding(topic="device", status="warn", found=found, remedy="install the NVIDIA driver and reboot")
    return Finding(
        topic="device",
        status="warn",
        found="no NVIDIA card: training runs on the CPU",
        remedy="nothing for the quickstart, which is made for it; the ladders from 5M parameters want a card",
    )


def judge_bf16(facts: Facts) -> Finding:
    """Whether bf16 is computed in hardware."""
    if facts.box.computes_bf16:
        return Finding(topic="bf16", status="ok", found="computed in hardware")
    if not facts.cards:
        return Finding(topic="bf16", status="ok", found="not in this CPU: runs train in fp32")
    old = ", ".join(f"{c.name} ({'.'.join(map(str, c.capability))})" for c in facts.cards if not c.computes_bf16)
    remedy = "leave precision = auto (fp32, slower), or hide the old card with CUDA_VISIBLE_DEVICES"
    return Finding(topic="bf16", status="warn", found=f"needs compute capability 8.0, found {old}", remedy=remedy)


def judge_optimizer(facts: Facts) -> Finding:
    """Whether AdamW8bit makes a step here."""
    if facts.bitsandbytes_error is None:
        return Finding(topic="adamw8bit", status="ok", found="makes a step")
    status: Status = "fail" if facts.cards else "warn"
    remedy = f'{REINSTALL}, or write name = "adamw" under [optim]'
    return Finding(topic="adamw8bit", status=status, found=facts.bitsandbytes_error, remedy=remedy)


def judge_compile(facts: Facts) -> Finding:
    """Whether torch.compile has what it needs from the system."""
    if not facts.missing_for_compile:
        return Finding(topic="compile", status="ok", found="C and C++ compilers and Python.h are here")
    remedy = f"run `sudo apt install build-essential python{facts.python[0]}.{facts.python[1]}-dev`"
    if this_box.PATH_WITHOUT_SPACES in facts.missing_for_compile:
        remedy = "clone the project into a folder without spaces in its name"
    return Finding(
        topic="compile",
        status="warn",
        found=f"{' and '.join(facts.missing_for_compile)} missing: runs train without torch.compile, slower",
        remedy=remedy,
    )


def judge_disk(facts: Facts) -> Finding:
    """Whether checkpoints will fit."""
    found = f"{facts.disk_free_bytes / GIB:.1f} GiB free for {facts.lab}"
    if facts.disk_free_bytes >= DISK_WARN_BYTES:
        return Finding(topic="disk", status="ok", found=found)
    status: Status = "fail" if facts.disk_free_bytes < DISK_FAIL_BYTES else "warn"
    remedy = "free some space or put the lab elsewhere (a 124M run keeps 3 GiB of checkpoints while it saves)"
    return Finding(topic="disk", status=status, found=found, remedy=remedy)


def judge_memory(facts: Facts) -> Finding:
    """Whether the host's memory is enough."""
    found = f"{facts.memory_free_bytes / GIB:.1f} of {facts.memory_bytes / GIB:.1f} GiB free"
    if facts.memory_free_bytes >= MEMORY_WARN_BYTES:
        return Finding(topic="memory", status="ok", found=found)
    return Finding(topic="memory", status="warn", found=found, remedy="close other programs; a run wants 2 GiB or more")


def judge_threads(facts: Facts) -> Finding:
    """How many of the cores torch will use."""
    n_cores, setting = facts.box.n_cores, facts.omp_threads
    if setting is None:
        return Finding(topic="cores", status="ok", found=f"{n_cores}, all used (OMP_NUM_THREADS is not set)")
    n_threads = int(setting) if setting.isdigit() else 0
    found = f"{n_cores}, but OMP_NUM_THREADS={setting}"
    if n_threads == n_cores or (facts.cards and 0 < n_threads <= n_cores):
        return Finding(topic="cores", status="ok", found=f"{n_cores}, OMP_NUM_THREADS={setting}")
    return Finding(topic="cores", status="warn", found=found, remedy="unset OMP_NUM_THREADS: torch takes every core")


def _release(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu": local labels and pre-release letters do not count."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


# ------------------------------------------------------------------------------------------------------------- facts


def gather(lab: Path) -> Facts:
    """What this machine says about itself; takes some seconds, most of them torch's import."""
    with _Probe(_TRY_TORCH) as torch_probe, _Probe(_TRY_BITSANDBYTES) as bitsandbytes_probe:
        cards, nvml_error = _cards()
        visible = tuple(this_box.visible_cards(cards))
        folder = next(p for p in (lab.absolute(), *lab.absolute().parents) if p.is_dir())
        memory = _memory_bytes()
        torch_said, torch_error = torch_probe.answer()
        _said, bitsandbytes_error = bitsandbytes_probe.answer()
    return Facts(
        box=this_box.describe_box(visible),
        cards=visible,
        n_cards_hidden=len(cards) - len(visible),
        nvml_error=nvml_error,
        driver_loaded=Path("/proc/driver/nvidia/version").exists(),
        card_on_bus=_card_on_bus(Path("/sys/bus/pci/devices")),
        python=sys.version_info[:3],
        versions={name: _version(name) for name in PACKAGES},
        pins=read_pins(Path(__file__).resolve().parents[1] / "constraints.txt"),
        lower_bounds=_lower_bounds(),
        pynvml_version=_version("pynvml"),
        torch=TorchProbe(**torch_said) if torch_said else TorchProbe(error=torch_error),
        bitsandbytes_error=bitsandbytes_error,
        missing_for_compile=tuple(this_box.missing_for_compile()),
        lab=str(lab),
        disk_free_bytes=shutil.disk_usage(folder).free,
        memory_bytes=memory["MemTotal"],
        memory_free_bytes=memory["MemAvailable"],
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
    )


_TRY_TORCH = """
import json, torch
said = {"cuda_build": torch.version.cuda, "n_usable": 0, "error": None}
try:
    for index in range(torch.cuda.device_count()):
        x = torch.ones(64, 64, device=f"cuda:{index}")
        said["n_usable"] += int(float((x @ x)[0, 0]) == 64.0)
    if torch.version.cuda and not said["n_usable"]:
        torch.cuda.init()
except Exception as error:
    said["error"] = str(error).splitlines()[0]
print(json.dumps(said))
"""

# 65,536 elements: below 4,096 bitsandbytes keeps 32-bit states and would prove nothing.
_TRY_BITSANDBYTES = """
import json, torch, bitsandbytes
p = torch.nn.Parameter(torch.ones(256, 256, device="cuda" if torch.cuda.is_available() else "cpu"))
p.grad = torch.ones_like(p)
optimizer = bitsandbytes.optim.AdamW8bit([p], lr=0.1)
optimizer.step()
assert optimizer.state[p]["state1"].dtype == torch.uint8, "the states are not 8-bit"
assert float(p.detach().max()) < 1.0, "a step changed nothing"
print(json.dumps({}))
"""


class _Probe:
    """A Python process that prints one JSON line, or fails in its own way."""

    def __init__(self, code: str) -> None:
        command = [sys.executable, "-P", "-c", code]  # -P: a torch.py in the current folder is not torch
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "_Probe":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def answer(self) -> tuple[dict[str, Any], str | None]:
        """What it said, and why it failed (its last line) if it did."""
        try:
            out, err = self._process.communicate(timeout=PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {}, f"no answer in {PROBE_TIMEOUT_S:.0f} s"
        if self._process.returncode == 0:
            return json.loads(out.splitlines()[-1]), None
        lines = err.strip().splitlines()
        return {}, lines[-1] if lines else f"ended with exit code {self._process.returncode}"


def _cards() -> tuple[list[Card], str | None]:
    """NVML's cards, and the fault of a wrong or missing `pynvml` module."""
    try:
        return list_cards(), None
    except (ImportError, AttributeError, TypeError) as error:  # an old or fake `pynvml` in nvidia-ml-py's place
        return [], str(error)


def _card_on_bus(devices: Path) -> bool:
    """An NVIDIA (vendor 10de) display controller (class 03) is plugged in."""
    for device in devices.glob("*"):
        try:
            vendor, kind = ((device / name).read_text(encoding="utf-8") for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lower_bounds() -> dict[str, str]:
    """Distribution -> the least version our own metadata asks for."""
    try:
        wanted = importlib.metadata.requires("homelab_scaling") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder that was never installed
        return {}
    found = (re.match(r"([\w.-]+).*?>=([\w.]+)", line) for line in wanted)
    return {match[1]: match[2] for match in found if match}


def read_pins(constraints: Path) -> dict[str, str]:
    """Distribution -> version of a constraints file; empty where there is none (an installed wheel)."""
    if not constraints.exists():
        return {}
    lines = constraints.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def _memory_bytes() -> dict[str, int]:
    """MemTotal and MemAvailable of /proc/meminfo, the latter cut to what a container's limit leaves."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    found = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        left = int(text) - int(used.read_text(encoding="utf-8"))
        found["MemTotal"] = min(found["MemTotal"], int(text))
        found["MemAvailable"] = max(0, min(found["MemAvailable"], left))
    return found
