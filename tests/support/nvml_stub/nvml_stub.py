"""A driver without a card: builds the stand-in for libnvidia-ml.so.1 and plays its cards.

    from nvml_stub.nvml_stub import StubDriver

    with StubDriver(tmp_path / "driver", cards=2) as driver:        # skips the test where there is no C compiler
        driver.set(0, temperature_c=83, power_w=300, reasons=("software thermal",))
        subprocess.run([sys.executable, "-c", code], env=driver.env(), ...)
        driver.lose(1)                          # GpuIsLost from every call on that card
        driver.fail(0, "fan_v2", NOT_SUPPORTED) # one function, one return code; driver.mend(0, "fan_v2")
        driver.hang(0); driver.release(0)       # calls on card 0 block until released
        driver.crash(0)                         # the next call on card 0 aborts the calling process
        with driver.script([(0.0, 0, {"temperature_c": 80}), (2.0, 0, {"temperature_c": 60})]):
            ...                                 # a thread changes values while this block runs
        assert driver.calls(0, "pcie_throughput") == 0

What is set shows in every process at once (a shared mapping of FOLDER/state.bin); settings that a process makes as root
would (power limit, fan, target temperature) can be read back with `get`. `env()` hides the cards from CUDA, so that a
training on the CPU stays there; HOMELAB_WATCH_CARDS=all makes it count them as its own. Names of functions are those of
FUNCTIONS in nvml_stub.c, names of values the members of its card_t, in the units of `UNITS`. With `energy_runs` (the
default) the energy counter grows by the card's power; without, it stands at what was set.
"""

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest

SOURCE = Path(__file__).with_suffix(".c")
MAX_CARDS, MAX_PROCESSES, MAX_FANS = 8, 8, 4
FUNCTIONS = tuple(re.findall(r"X\((\w+)\)", SOURCE.read_text(encoding="utf-8").split("#define FUNCTIONS(X)")[1]))
FUNCTIONS = FUNCTIONS[: FUNCTIONS.index("reset_clocks") + 1]

NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST, VERSION_MISMATCH, UNKNOWN = 3, 4, 13, 15, 25, 999
DRIVER_NOT_LOADED = 9

REASON_BITS = {
    "idle": 0x1,
    "application clocks": 0x2,
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "sync boost": 0x10,
    "software thermal": 0x20,
    "hardware thermal": 0x40,
    "power brake": 0x80,
    "display clock": 0x100,
}
GIB = 1024**3
RTX_4080: Mapping[str, Any] = {
    "name": "NVIDIA GeForce RTX 4080",
    "capability": (8, 9),
    "temperature_c": 45,
    "acoustic_c": 83,
    "margin_c": 90,  # the temperature at which the margin is used up
    "margin_slowdown_c": -2,
    "margin_shutdown_c": -7,
    "power_w": 30.0,
    "limit_w": 320.0,
    "limit_default_w": 320.0,
    "limit_min_w": 150.0,
    "limit_max_w": 355.0,
    "sm_mhz": 2505,
    "sm_max_mhz": 3105,
    "utilisation_pct": 0,
    "n_fans": 2,
    "fan_pct": 30,
    "pcie_gen": 1,
    "pcie_gen_max": 4,
    "pcie_width": 8,
    "pcie_width_max": 16,
    "p2p": 5,
    "energy_j": 1000.0,
    "total_bytes": 16 * GIB,
    "reserved_bytes": GIB // 4,
    "used_bytes": GIB,
    "reasons": (),
}
RTX_3090: Mapping[str, Any] = {
    **RTX_4080,
    "name": "NVIDIA GeForce RTX 3090",
    "capability": (8, 6),
    "slowdown_c": 95,
    "shutdown_c": 98,
    "limit_w": 350.0,
    "limit_default_w": 350.0,
    "limit_min_w": 100.0,
    "limit_max_w": 385.0,
    "total_bytes": 24 * GIB,
}

UNITS = {  # name in `set` and `get` -> member, factor
    "power_w": ("power_mw", 1000),
    "instant_w": ("instant_mw", 1000),
    "limit_w": ("limit_mw", 1000),
    "limit_default_w": ("limit_default_mw", 1000),
    "limit_min_w": ("limit_min_mw", 1000),
    "limit_max_w": ("limit_max_mw", 1000),
    "energy_j": ("energy_mj", 1000),
}

_U32, _I32, _U64 = ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64


class _Card(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_char * size) for name, size in (("uuid", 48), ("name", 96), ("bus", 32))),
        ("capability", _I32 * 2),
        *((n, _I32) for n in ("temperature_c", "slowdown_c", "shutdown_c", "acoustic_c")),
        *((n, _I32) for n in ("margin_c", "margin_slowdown_c", "margin_shutdown_c")),
        *(
            (n, _U32)
            for n in ("power_mw", "instant_mw", "limit_mw", "limit_default_mw", "limit_min_mw", "limit_max_mw")
        ),
        *((n, _U32) for n in ("sm_mhz", "sm_max_mhz", "locked_mhz", "utilisation_pct", "n_fans")),
        ("fan_pct", _U32 * MAX_FANS),
        ("fan_is_set", _U32 * MAX_FANS),
        *((n, _U32) for n in ("persistence", "pcie_gen", "pcie_gen_max", "pcie_width", "pcie_width_max", "p2p")),
        ("n_processes", _U32),
        ("pids", _U32 * MAX_PROCESSES),
        *((n, _U32) for n in ("lost", "hang", "crash", "n_stale_calls")),
        ("codes", _U32 * len(FUNCTIONS)),
        ("calls", _U32 * len(FUNCTIONS)),
        *(
            (n, _U64)
            for n in ("energy_mj", "energy_since_ns", "total_bytes", "reserved_bytes", "used_bytes", "reasons")
        ),
        ("process_bytes", _U64 * MAX_PROCESSES),
    )


class _State(ctypes.Structure):
    _fields_ = (
        *((n, _U32) for n in ("size", "n_cards", "init_code", "delay_us")),
        ("driver", ctypes.c_char * 80),
        ("nvml", ctypes.c_char * 80),
        ("cards", _Card * MAX_CARDS),
    )


class StubDriver:
    """The stand-in, built into `folder`, with its cards; see the module's docstring."""

    def __init__(
        self,
        folder: Path,
        cards: int | Iterable[Mapping[str, Any]] = 1,
        *,
        energy_runs: bool = True,
        driver: str = "550.120",
    ) -> None:
        models = [RTX_4080] * cards if isinstance(cards, int) else list(cards)
        assert len(models) <= MAX_CARDS
        compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
        if compiler is None:
            pytest.skip("no C compiler to build the stand-in for libnvidia-ml.so.1 with")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        self._energy_runs = energy_runs
        self._lock = threading.Lock()
        with open(folder / "state.bin", "w+b") as file:
            file.truncate(ctypes.sizeof(_State))
            self._map = mmap.mmap(file.fileno(), ctypes.sizeof(_State))
        self._state: Any = _State.from_buffer(self._map)
        self._state.size, self._state.n_cards = ctypes.sizeof(_State), len(models)
        self._state.driver, self._state.nvml = driver.encode(), f"12.{driver}".encode()
        for index, model in enumerate(models):
            self.set(index, uuid=self.uuid(index), bus=f"00000000:{index + 1:02X}:00.0", **model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases whoever hangs, and the mapping; the files stay."""
        if self._state is not None:
            for index in range(MAX_CARDS):
                self._state.cards[index].hang = 0
            self._state = None
            self._map.close()

    @staticmethod
    def uuid(card: int) -> str:
        return f"GPU-{card:08x}-0000-0000-0000-00000000000{card}"

    def env(self, **extra: str) -> dict[str, str]:
        """This process's environment with the stand-in in front, its cards hidden from CUDA, and `extra`."""
        paths = [str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", **extra}

    # --------------------------------------------------------------------------------------------------- the cards

    def set(self, card: int, **values: Any) -> None:
        """Sets values of one card: `temperature_c=80, power_w=300, reasons=("power cap",), fan_pct=55`."""
        with self._lock:
            one = self._state.cards[card]
            if self._energy_runs and "power_w" in values:
                one.energy_mj, one.energy_since_ns = self._energy_mj(one), time.time_ns()
            for name, value in values.items():
                self._set_one(one, name, value)
            if self._energy_runs and "energy_j" in values:
                one.energy_since_ns = time.time_ns()

    @staticmethod
    def _energy_mj(one: Any) -> int:
        if not one.energy_since_ns:
            return int(one.energy_mj)
        return int(one.energy_mj + (time.time_ns() - one.energy_since_ns) / 1e9 * one.power_mw)

    @staticmethod
    def _set_one(one: Any, name: str, value: Any) -> None:
        member, factor = UNITS.get(name, (name, 1))
        if member not in {field[0] for field in _Card._fields_}:
            raise KeyError(f"the stand-in's cards have no {name}")
        if name == "reasons" and not isinstance(value, int):
            value = sum(REASON_BITS[word] for word in value)
        if name == "processes":
            raise KeyError("use set_processes")
        if isinstance(value, str):
            setattr(one, member, value.encode())
        elif isinstance(value, tuple):
            getattr(one, member)[: len(value)] = value
        elif member == "fan_pct":
            one.fan_pct[:] = [value] * MAX_FANS
        else:
            setattr(one, member, round(value * factor) if factor != 1 else value)

    def set_processes(self, card: int, bytes_by_pid: Mapping[int, int]) -> None:
        """Who computes on a card; 2**64 - 1 bytes means that the driver does not say."""
        one = self._state.cards[card]
        for n, (pid, n_bytes) in enumerate(bytes_by_pid.items()):
            one.pids[n], one.process_bytes[n] = pid, n_bytes
        one.n_processes = len(bytes_by_pid)

    def get(self, card: int, name: str) -> Any:
        """A value as it is now, in the unit of `set`; arrays as tuples."""
        member, factor = UNITS.get(name, (name, 1))
        value = getattr(self._state.cards[card], member)
        if isinstance(value, ctypes.Array):
            return tuple(value)
        return value / factor if factor != 1 else value

    def lose(self, card: int) -> None:
        """The card falls off the bus: every call on it says GpuIsLost."""
        self._state.cards[card].lost = 1

    def find_again(self, card: int) -> None:
        """A lost card answers again (as after a reboot)."""
        self._state.cards[card].lost = 0

    def fail(self, card: int, function: str, code: int = NOT_SUPPORTED) -> None:
        """One function of one card returns this code from now on."""
        self._state.cards[card].codes[FUNCTIONS.index(function)] = code

    def mend(self, card: int, function: str) -> None:
        self.fail(card, function, 0)

    def hang(self, card: int) -> None:
        """Calls on the card block until `release`, `close`, or the caller is killed."""
        self._state.cards[card].hang = 1

    def release(self, card: int) -> None:
        self._state.cards[card].hang = 0

    def crash(self, card: int, on: bool = True) -> None:
        """Calls on the card abort the process that makes them."""
        self._state.cards[card].crash = int(on)

    # -------------------------------------------------------------------------------------------------- the driver

    def fail_init(self, code: int = DRIVER_NOT_LOADED) -> None:
        """nvmlInit returns this code; 0 mends it."""
        self._state.init_code = code

    def slow_down(self, seconds: float) -> None:
        """Every call on a card takes this much longer."""
        self._state.delay_us = round(seconds * 1e6)

    def calls(self, card: int, function: str | None = None) -> int:
        """How often a function was called on a card; all of them without a name."""
        counts = self._state.cards[card].calls
        return sum(counts) if function is None else int(counts[FUNCTIONS.index(function)])

    def stale_calls(self, card: int) -> int:
        """Calls that used the handle of a lost card, the one that learnt of it included."""
        return int(self._state.cards[card].n_stale_calls)

    @contextlib.contextmanager
    def script(self, steps: Iterable[tuple[float, int, Mapping[str, Any]]]) -> Iterator[threading.Event]:
        """Runs (after_s, card, values) in a thread while the block runs; the event is set when all are done."""
        done, stop = threading.Event(), threading.Event()

        def play() -> None:
            started = time.monotonic()
            for after_s, card, values in steps:
                if stop.wait(max(0.0, started + after_s - time.monotonic())):
                    return
                self.set(card, **values)
            done.set()

        thread = threading.Thread(target=play)
        thread.start()
        try:
            yield done
        finally:
            stop.set()
            thread.join()
