"""How a recipe is started on this box: the `accelerate launch` line, its environment, and the watchdog beside it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from homelab_scaling.box import Box
from homelab_scaling.errors import HomelabError, Stopped
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch import link, processes
from homelab_scaling.watch.p2p import nccl_environment
from homelab_scaling.watch.start import start_watchdog

RECORD_TELLS = "HOMELAB_RECORD_TELLS"
"""Set for ranks we launch: an end that record.json tells needs no exit code, which launchers answer with tracebacks."""

GIVE_UP_S = 300.0
"""After a request to stop, how long ranks may take to write a checkpoint before the group is killed."""


def recipe_command(recipe: str, arguments: Sequence[str], ranks: int, box: Box, *, on_gpu: bool) -> list[str]:
    """The `accelerate launch` line of a recipe; every default is spelt out, so nothing depends on the user's config."""
    # --multi_gpu also starts several CPU ranks; `--cpu --num_processes 2` would silently start one process.
    mode = ["--multi_gpu"] if ranks > 1 else [] if on_gpu else ["--cpu"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *mode,
        "--quiet",  # its own traceback about a child's exit code says nothing that the record does not
        *("--num_processes", str(ranks), "--num_machines", "1", "--machine_rank", "0", "--gpu_ids", "all"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", str(max(1, box.n_cores // ranks))),
        *(["--main_process_port", str(_free_port())] if ranks > 1 else []),
        *(str(Path(str(_recipes())) / f"{recipe}.py"), *arguments),
    ]


def _recipes() -> object:
    from importlib.resources import files

    return files("homelab_scaling.recipes")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment() -> dict[str, str]:
    """What every launch gets."""
    chosen = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", RECORD_TELLS: "1"}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        # How long a CPU thread spins at a barrier before it sleeps. libgomp's 300,000 turns are 3 to 11 % faster on an
        # idle box and up to 6 times slower as soon as something else wants a core (2 cores, recipes/LOG.md).
        chosen["GOMP_SPINCOUNT"] = "10000"
    return {**os.environ, **chosen, **nccl_environment()}


def see_to_watchdog(lab: Path, watch: WatchLimits, *, on_gpu: bool, say: Callable[[str], None]) -> None:
    """Starts the watchdog before the first card gets warm, where there is something to watch.

    Args:
        lab: the folder of labs.
    """
    if link.why_not_watched(watch, on_gpu=on_gpu) is None:
        try:
            start_watchdog(lab)
        except (HomelabError, OSError) as error:
            say(f"  ! the watchdog could not be started ({error}); nothing guards the cards")


class StopRequest:
    """Remembers SIGTERM, Ctrl-C and a time limit's alarm while something is launched, instead of dying from them."""

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)

    def __init__(self) -> None:
        self._times = 0
        self.time_is_up = False

    def asked(self, at_least: int = 1) -> bool:
        """Whether somebody asked for it, and that often (a second Ctrl-C means now)."""
        return self._times >= at_least

    def __enter__(self) -> "StopRequest":
        self._before = {n: signal.signal(n, self._note) for n in self.CAUGHT}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            self.time_is_up = True
        else:
            self._times += 1

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_recipe(
    recipe: str,
    arguments: Sequence[str],
    *,
    n_processes: int,
    box: Box,
    on_gpu: bool,
    lab: Path,
    watch: WatchLimits,
    say: Callable[[str], None],
) -> int:
    """Launches a recipe that leaves no record of its own and waits for it; returns the launcher's exit code.

    Args:
        lab: the folder of labs, whose watchdog guards the cards.

    Raises:
        Stopped: it was asked to stop, and did.
    """
    see_to_watchdog(lab, watch, on_gpu=on_gpu, say=say)
    command = recipe_command(recipe, arguments, n_processes, box, on_gpu=on_gpu)
    # Its folders may lie deeper in the lab than a run's; on CPU the variable would ask for a watchdog.
    machine = {link.MACHINE_VARIABLE: str(link.machine_folder(lab).path)} if on_gpu else {}
    with StopRequest() as stop:
        process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr, env=environment() | machine)
        told_at: float | None = None
        while process.poll() is None or (told_at is not None and _group_lives(process.pid)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            if (stop.asked() or stop.time_is_up) and told_at is None:
                told_at = time.monotonic()
                _signal_group(process.pid, signal.SIGTERM)
            elif told_at is not None and (stop.asked(2) or time.monotonic() - told_at > GIVE_UP_S):
                processes.send(processes.family(process.pid), signal.SIGKILL)  # ranks have groups of their own
            if told_at is not None:
                time.sleep(0.2)
        if stop.asked() or stop.time_is_up:
            raise Stopped("stopped; the same command goes on from here")
    return process.returncode


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
