"""Everything the doctor's judgements read, and where it comes from."""

import importlib.metadata
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from homelab_scaling import box as this_box
from homelab_scaling.box import Box
from homelab_scaling.doctor.driver import Driver, survey
from homelab_scaling.doctor.measure import (
    TRY_BITSANDBYTES,
    TRY_TORCH,
    DiskSpeed,
    Matmul,
    Probe,
    TorchProbe,
    measure_disk,
    measure_matmul,
)
from homelab_scaling.watch.gpu import Card, list_cards

PACKAGES = ("torch", "accelerate", "transformers", "bitsandbytes", "nvidia-ml-py")
GIB = 1024**3

LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by a launcher for its processes; left over in a shell they make one process wait for others."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything the judgements read; tests write one by hand for each kind of box."""

    box: Box
    cards: tuple[Card, ...] = ()
    """Those CUDA_VISIBLE_DEVICES leaves."""
    n_cards_hidden: int = 0
    driver: Driver = field(default_factory=Driver)
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
    matmul: tuple[Matmul, ...] = ()
    missing_for_compile: tuple[str, ...] = ()
    lab: str
    disk_free_bytes: int
    disk_speed: DiskSpeed = field(default_factory=DiskSpeed)
    memory_bytes: int
    memory_free_bytes: int
    swap_bytes: int | None = None
    swap_used_bytes: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    """The variables that change what a launch does."""
    accelerate_config: dict[str, str] = field(default_factory=dict)
    """Top-level keys of Accelerate's default config file; empty without one."""
    accelerate_config_path: str = ""

    @property
    def omp_threads(self) -> str | None:
        return self.environment.get("OMP_NUM_THREADS")


def gather(lab: Path) -> Facts:
    """What this machine says about itself; takes some seconds, most of them torch's import."""
    driver, cards = survey(), _cards()
    visible = tuple(this_box.visible_cards(cards))
    box = this_box.describe_box(visible)
    folder = next(p for p in (lab.absolute(), *lab.absolute().parents) if p.is_dir())
    free_bytes = shutil.disk_usage(folder).free
    disk_speed = measure_disk(folder, free_bytes)
    with Probe(TRY_TORCH) as torch_probe, Probe(TRY_BITSANDBYTES) as bitsandbytes_probe:
        torch_said, torch_error = torch_probe.answer()
        _said, bitsandbytes_error = bitsandbytes_probe.answer()
    memory, config_path = _memory_bytes(), _accelerate_config_path()
    return Facts(
        box=box,
        cards=visible,
        n_cards_hidden=len(cards) - len(visible),
        driver=driver,
        driver_loaded=Path("/proc/driver/nvidia/version").exists(),
        card_on_bus=_card_on_bus(Path("/sys/bus/pci/devices")),
        python=sys.version_info[:3],
        versions={name: _version(name) for name in PACKAGES},
        pins=read_pins(Path(__file__).resolve().parents[2] / "constraints.txt"),
        lower_bounds=_lower_bounds(),
        pynvml_version=_version("pynvml"),
        torch=TorchProbe(**torch_said) if torch_said else TorchProbe(error=torch_error),
        bitsandbytes_error=bitsandbytes_error,
        matmul=measure_matmul(computes_bf16=box.computes_bf16) if torch_said else (),
        missing_for_compile=tuple(this_box.missing_for_compile()),
        lab=str(lab),
        disk_free_bytes=free_bytes,
        disk_speed=disk_speed,
        memory_bytes=memory["MemTotal"],
        memory_free_bytes=memory["MemAvailable"],
        swap_bytes=memory.get("SwapTotal"),
        swap_used_bytes=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
        environment=_environment(),
        accelerate_config=read_flat_yaml(config_path),
        accelerate_config_path=str(config_path),
    )


def _cards() -> list[Card]:
    """NVML's cards; none where its bindings are wrong or missing (the driver's survey says so)."""
    try:
        return list_cards()
    except ImportError:
        return []


def _environment() -> dict[str, str]:
    names = {*LAUNCH_VARIABLES, "OMP_NUM_THREADS", "CUDA_DEVICE_ORDER", "NCCL_P2P_DISABLE"}
    return {k: v for k, v in os.environ.items() if k in names or k.startswith("ACCELERATE_")}


def _accelerate_config_path() -> Path:
    """Where Accelerate looks for the defaults of `accelerate launch`."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return home.expanduser() / "accelerate" / "default_config.yaml"


def read_flat_yaml(path: Path) -> dict[str, str]:
    """The top-level `key: value` pairs of a small YAML file, as text; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (re.match(r"(\w+):\s*(.*?)\s*$", line) for line in lines)
    return {pair[1]: pair[2].strip("'\"") for pair in pairs if pair}


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
