"""What has to be tried rather than asked: torch, bitsandbytes, matrix products, the disk."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBE_TIMEOUT_S = 180.0
DISK_TEST_BYTES = 64 * 1024**2
DISK_SPARE_BYTES = 1024**3
"""The disk is not written to when less than this would be left."""


@dataclass(frozen=True, kw_only=True)
class TorchProbe:
    """What torch did when it was really asked."""

    cuda_build: str | None = None
    """CUDA version torch was built for; None for a CPU build."""
    n_usable: int = 0
    """Cards on which a matmul gave the right number."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """The rate of large matrix products on one device."""

    device: str
    """cpu, or the card's name."""
    n_threads: int | None = None
    """On CPU."""
    fp32_flops_per_s: float | None = None
    bf16_flops_per_s: float | None = None
    """None where it is not computed in hardware."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class DiskSpeed:
    """One file of 64 MiB, written through to the disk and read back past the page cache."""

    write_bytes_per_s: float | None = None
    read_bytes_per_s: float | None = None
    error: str | None = None
    """Why it was not measured."""


TRY_TORCH = """
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
TRY_BITSANDBYTES = """
import json, torch, bitsandbytes
p = torch.nn.Parameter(torch.ones(256, 256, device="cuda" if torch.cuda.is_available() else "cpu"))
p.grad = torch.ones_like(p)
optimizer = bitsandbytes.optim.AdamW8bit([p], lr=0.1)
optimizer.step()
assert optimizer.state[p]["state1"].dtype == torch.uint8, "the states are not 8-bit"
assert float(p.detach().max()) < 1.0, "a step changed nothing"
print(json.dumps({}))
"""

# Random operands: ones would draw less power than training does. Sizes double until one product takes long enough.
MEASURE_MATMUL = """
import json, statistics, sys, time, torch

def rate(device, dtype, budget_s):
    def seconds():
        started = time.perf_counter()
        x @ x
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    n, least_s, most = (512, 0.02, 2048) if device == "cpu" else (2048, 0.002, 8192)
    end = time.perf_counter() + budget_s
    while True:
        x = torch.randn(n, n, device=device).to(dtype)
        seconds()
        if seconds() >= least_s or n == most:
            break
        n *= 2
    taken = [seconds()]
    while time.perf_counter() < end:
        taken.append(seconds())
    return 2 * n**3 / statistics.median(taken)

computes_bf16 = sys.argv[1] == "bf16"
torch.manual_seed(0)
n_cards = torch.cuda.device_count()
said = []
for index in range(max(1, n_cards)):
    device = f"cuda:{index}" if n_cards else "cpu"
    one = {"device": "cpu", "n_threads": torch.get_num_threads()}
    try:
        if n_cards:
            torch.cuda.set_device(index)
            one = {"device": torch.cuda.get_device_name(index)}
        budget_s = 1.2 / max(1, n_cards)
        if computes_bf16:
            one["bf16_flops_per_s"] = rate(device, torch.bfloat16, budget_s)
        one["fp32_flops_per_s"] = rate(device, torch.float32, budget_s)
    except Exception as error:
        one["error"] = str(error).splitlines()[0]
    said.append(one)
print(json.dumps({"rates": said}))
"""


class Probe:
    """A Python process that prints one JSON line, or fails in its own way."""

    def __init__(self, code: str, *args: str) -> None:
        command = [sys.executable, "-P", "-c", code, *args]  # -P: a torch.py in the current folder is not torch
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Probe":
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


def measure_matmul(*, computes_bf16: bool) -> tuple[Matmul, ...]:
    """What each card that torch sees computes, or the CPU; nothing else should be running."""
    with Probe(MEASURE_MATMUL, "bf16" if computes_bf16 else "fp32") as probe:
        said, error = probe.answer()
    if error is not None:
        return (Matmul(device="cpu", error=error),)
    return tuple(Matmul(**one) for one in said["rates"])


def measure_disk(folder: Path, free_bytes: int) -> DiskSpeed:
    """Writes a file of 64 MiB into `folder`, reads it back and removes it."""
    if free_bytes < DISK_SPARE_BYTES + DISK_TEST_BYTES:
        return DiskSpeed(error="too little is free to try")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".homelab-doctor-") as file:
            return _time_disk(file.fileno())
    except OSError as error:
        return DiskSpeed(error=error.strerror or str(error))


def _time_disk(descriptor: int) -> DiskSpeed:
    block = os.urandom(1024**2)  # a file system that compresses gets nothing for free
    started = time.perf_counter()
    for _ in range(DISK_TEST_BYTES // len(block)):
        os.write(descriptor, block)
    os.fsync(descriptor)
    written = time.perf_counter()
    with contextlib.suppress(OSError):  # some file systems have no cache to drop
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    began = time.perf_counter()
    while os.read(descriptor, len(block)):
        pass
    read_s = time.perf_counter() - began
    return DiskSpeed(write_bytes_per_s=DISK_TEST_BYTES / (written - started), read_bytes_per_s=DISK_TEST_BYTES / read_s)
