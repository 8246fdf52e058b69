"""What follows from the facts about the software and the host; `judge` puts every finding in order."""

import re

from homelab_scaling import box as this_box
from homelab_scaling.doctor.facts import GIB, PACKAGES, Facts
from homelab_scaling.doctor.judge_cards import (
    judge_bf16,
    judge_cards,
    judge_device,
    judge_driver,
    judge_matmul,
    judge_p2p,
)
from homelab_scaling.doctor.judge_launch import (
    judge_accelerate_config,
    judge_card_order,
    judge_launch,
    judge_left_over_ranks,
    judge_variables,
)
from homelab_scaling.doctor.report import Finding, Status

PYTHON_MIN = (3, 11)
DISK_WARN_BYTES, DISK_FAIL_BYTES = 10 * GIB, 1 * GIB
DISK_SLOW_BYTES_PER_S = 50e6
CHECKPOINT_124M_BYTES = 1.5e9
MEMORY_WARN_BYTES = 2 * GIB
SWAP_USED_WARN_BYTES = 1 * GIB
SWAP_NEEDED_BELOW_BYTES = 16 * GIB
REINSTALL = "run `bash tools/quickstart.sh` or `pip install -c constraints.txt -e .`"


def judge(facts: Facts) -> tuple[Finding, ...]:
    """The findings that follow from the facts, in the order they are shown."""
    return (
        judge_python(facts),
        *(judge_package(name, facts) for name in PACKAGES),
        *judge_pynvml(facts),
        *judge_driver(facts),
        *judge_device(facts),
        *judge_cards(facts),
        *judge_p2p(facts),
        *judge_card_order(facts),
        judge_bf16(facts),
        judge_optimizer(facts),
        judge_compile(facts),
        *judge_matmul(facts),
        judge_disk(facts),
        judge_disk_speed(facts),
        judge_memory(facts),
        *judge_swap(facts),
        judge_threads(facts),
        judge_launch(facts),
        *judge_left_over_ranks(facts),
        *judge_variables(facts),
        *judge_accelerate_config(facts),
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
            found=f"the deprecated package pynvml {facts.pynvml_version} warns in every torch process and may hide the "
            "bindings of nvidia-ml-py",
            remedy="run `pip uninstall -y pynvml` and `pip install --force-reinstall nvidia-ml-py`",
        ),
    )


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


def judge_disk_speed(facts: Facts) -> Finding:
    """How fast a checkpoint is written and read."""
    speed = facts.disk_speed
    if speed.error is not None:
        remedy = "make the folder writable or put the lab elsewhere"
        return Finding(topic="disk speed", status="warn", found=f"not measured: {speed.error}", remedy=remedy)
    if speed.write_bytes_per_s is None or speed.read_bytes_per_s is None:
        return Finding(topic="disk speed", status="ok", found="not measured")
    written, read = speed.write_bytes_per_s, speed.read_bytes_per_s
    found = f"64 MiB written through at {written / 1e6:,.0f} MB/s, read back at {read / 1e6:,.0f} MB/s"
    if written >= DISK_SLOW_BYTES_PER_S:
        return Finding(topic="disk speed", status="ok", found=found)
    seconds = CHECKPOINT_124M_BYTES / written
    remedy = f"put the lab on a local disk (a 124M checkpoint takes {seconds:.0f} s here), or save less often"
    return Finding(topic="disk speed", status="warn", found=found, remedy=remedy)


def judge_memory(facts: Facts) -> Finding:
    """Whether the host's memory is enough."""
    found = f"{facts.memory_free_bytes / GIB:.1f} of {facts.memory_bytes / GIB:.1f} GiB free"
    if facts.memory_free_bytes >= MEMORY_WARN_BYTES:
        return Finding(topic="memory", status="ok", found=found)
    return Finding(topic="memory", status="warn", found=found, remedy="close other programs; a run wants 2 GiB or more")


def judge_swap(facts: Facts) -> tuple[Finding, ...]:
    """Whether a moment of too little memory ends in a kill, or training already waits for the disk."""
    if facts.swap_bytes is None:
        return ()
    used = f"{facts.swap_used_bytes / GIB:.1f} of {facts.swap_bytes / GIB:.1f} GiB used"
    if facts.swap_used_bytes >= SWAP_USED_WARN_BYTES and facts.memory_free_bytes < MEMORY_WARN_BYTES:
        return (Finding(topic="swap", status="warn", found=used, remedy="close other programs: training waits for it"),)
    if facts.swap_bytes > 0:
        return (Finding(topic="swap", status="ok", found=used),)
    if facts.memory_bytes >= SWAP_NEEDED_BELOW_BYTES:
        return (Finding(topic="swap", status="ok", found="none, and memory enough without"),)
    remedy = (
        "`sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
        "sudo swapon /swapfile`, or a moment of too little memory kills the run"
    )
    return (Finding(topic="swap", status="warn", found="none", remedy=remedy),)


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
