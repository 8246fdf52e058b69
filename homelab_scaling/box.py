"""What this machine is, as far as planning needs it, without importing torch."""

import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path


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
    """A C compiler and the Python headers: what torch.compile needs."""

    @property
    def on_gpu(self) -> bool:
        return self.n_gpus > 0


def detect_box() -> Box:
    """This machine, from NVML, /proc and the PATH."""
    from homelab_scaling.watch.gpu import list_cards

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = list_cards() if visible != "" else []
    if visible:
        wanted = [v.strip() for v in visible.split(",")]
        cards = [c for c in cards if str(c.index) in wanted or any(w and c.uuid.startswith(w) for w in wanted)]
    n_cores = len(os.sched_getaffinity(0))
    if cards:
        return Box(
            device=cards[0].name,
            n_gpus=len(cards),
            vram_bytes=min(c.vram_bytes for c in cards),
            computes_bf16=all(c.computes_bf16 for c in cards),
            n_cores=n_cores,
            has_compiler=has_compiler(),
        )
    return Box(
        device="cpu",
        n_gpus=0,
        vram_bytes=None,
        computes_bf16=_cpu_computes_bf16(),
        n_cores=n_cores,
        has_compiler=has_compiler(),
    )


def has_compiler() -> bool:
    """A C compiler and Python.h are here."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    return compiler is not None and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _cpu_computes_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
