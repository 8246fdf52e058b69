"""What this machine is, as far as planning needs it, without importing torch."""

import contextlib
import os
import shlex
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from homelab_scaling.watch.gpu import Card, list_cards

PATH_WITHOUT_SPACES = "a path without spaces"  # Inductor hands torch's own folder to the linker unquoted


@dataclass(frozen=True, kw_only=True)
class Box:
    """One workstation."""

    device: str
    """"cpu" or the card's name, for example "NVIDIA GeForce RTX 4080"."""
    n_gpus: int
    vram_bytes: int | None
    """Of the smallest card; None on CPU."""
    computes_bf16: bool
    n_cores: int
    has_compiler: bool
    """C and C++ compilers and the Python headers: what torch.compile needs."""

    @property
    def on_gpu(self) -> bool:
        return self.n_gpus > 0


def detect_box() -> Box:
    """This machine, from NVML, /proc and the PATH."""
    return describe_box(visible_cards(list_cards()))


def describe_box(cards: Sequence[Card]) -> Box:
    """This machine with `cards` as its GPUs."""
    return Box(
        device=cards[0].name if cards else "cpu",
        n_gpus=len(cards),
        vram_bytes=min(card.vram_bytes for card in cards) if cards else None,
        computes_bf16=all(card.computes_bf16 for card in cards) if cards else _cpu_computes_bf16(),
        n_cores=len(os.sched_getaffinity(0)),
        has_compiler=has_compiler(),
    )


def visible_cards(cards: Sequence[Card]) -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves (by NVML index or the beginning of a UUID)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(cards)
    wanted = [v.strip() for v in visible.split(",") if v.strip()]
    return [c for c in cards if str(c.index) in wanted or any(c.uuid.startswith(w) for w in wanted)]


def has_compiler() -> bool:
    """Everything torch.compile needs from the system is here."""
    return not missing_for_compile()


def missing_for_compile() -> list[str]:
    """What torch.compile would miss: Triton builds C against Python.h, Inductor on CPU builds C++ with $CXX or g++."""
    missing = []
    if not any(_program(c) for c in (os.environ.get("CC"), "gcc", "cc", "clang")):
        missing.append("a C compiler")
    if not _program(os.environ.get("CXX") or "g++"):
        missing.append("a C++ compiler")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        missing.append("Python.h")
    if " " in sysconfig.get_paths()["purelib"]:
        missing.append(PATH_WITHOUT_SPACES)
    return missing


def _program(command: str | None) -> str | None:
    """Path of the program in a setting such as CC="ccache gcc"."""
    words = shlex.split(command or "")
    return shutil.which(words[0]) if words else None


def cpu_name() -> str:
    """`cpu (Intel(R) ...)`, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return "cpu"


def _cpu_computes_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
