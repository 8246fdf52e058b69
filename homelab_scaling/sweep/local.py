"""Launches runs on this box, one after the other, each under `accelerate launch`.

A launcher turns every exit code into 1 and passes on no SIGTERM, so how a run ended is read from its record.json, and a
request to stop goes straight to the trainer's ranks, whose pids the run's events.jsonl names.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import HomelabError, Stopped
from homelab_scaling.runs import RunFolder, RunRecord, RunStatus, StoppedBy
from homelab_scaling.specs import RunSpec, WatchLimits
from homelab_scaling.train.oom_notes import OutOfMemory, end_of_segment, keep_smaller
from homelab_scaling.watch import link
from homelab_scaling.watch.start import start_watchdog

Run = tuple[RunSpec, RunFolder]

RECORD_TELLS = "HOMELAB_RECORD_TELLS"
"""Set for ranks we launch: an end that record.json tells needs no exit code, which launchers answer with tracebacks."""

GIVE_UP_S = 300.0
"""After a request to stop, how long ranks may take to write a checkpoint before the group is killed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a ladder ended."""

    finished: tuple[str, ...]
    failed: dict[str, str]
    """run_id -> why."""
    stopped: bool
    """A signal or the watchdog ended it; the rest was not started."""
    watchdog: str | None = None
    """Why the watchdog ended it."""

    def then(self, other: "Outcome") -> "Outcome":
        """Both, one after the other."""
        return Outcome(
            finished=(*self.finished, *other.finished),
            failed=self.failed | other.failed,
            stopped=self.stopped or other.stopped,
            watchdog=self.watchdog or other.watchdog,
        )

    @property
    def exit_code(self) -> int:
        return 3 if self.watchdog else 75 if self.stopped else 1 if self.failed else 0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one launch ended."""

    status: RunStatus
    reason: str | None
    stopped_by: StoppedBy | None = None


def run_all(runs: list[Run], box: Box, say: Callable[[str], None]) -> Outcome:
    """Runs everything that is not finished, in order; a failed run does not stop the others.

    A diverged run is not started again: the same spec would diverge the same way. A run that ran out of memory is, with
    a smaller micro-batch, from its last checkpoint. When the watchdog stops a run, nothing follows: cards need rest.
    """
    _see_to_watchdog(runs, box, say)
    finished: list[str] = []
    failed: dict[str, str] = {}
    with _StopRequest() as stop:
        for number, (spec, folder) in enumerate(runs, start=1):
            record = folder.read_record()
            if record is not None and record.status in ("finished", "diverged"):
                say(f"[{number}/{len(runs)}] {spec.run_id}: {record.status} before, not repeated")
                ended = Ended(status=record.status, reason=record.reason)
            else:
                say(f"[{number}/{len(runs)}] {spec.run_id}")
                ended = _launch_until_it_fits(spec, folder, box, stop, say)
            if ended.status == "finished":
                finished.append(spec.run_id)
            elif ended.status == "stopped":
                watchdog = ended.reason if ended.stopped_by == "watchdog" else None
                return Outcome(finished=tuple(finished), failed=failed, stopped=True, watchdog=watchdog)
            else:
                failed[spec.run_id] = f"{ended.status}: {ended.reason}"
                say(f"{spec.run_id}: {failed[spec.run_id]}")
    return Outcome(finished=tuple(finished), failed=failed, stopped=False)


def _see_to_watchdog(runs: list[Run], box: Box, say: Callable[[str], None]) -> None:
    """Starts the watchdog before the first card gets warm."""
    for spec, folder in runs[:1]:
        if link.why_not_watched(spec.watch, on_gpu=box.on_gpu and spec.execution.device != "cpu") is None:
            try:
                start_watchdog(link.lab_of(folder))
            except (HomelabError, OSError) as error:
                say(f"  ! the watchdog could not be started ({error}); nothing guards the cards")


def _launch_until_it_fits(
    spec: RunSpec, folder: RunFolder, box: Box, stop: "_StopRequest", say: Callable[[str], None]
) -> Ended:
    while True:
        ended = launch(spec, folder, box, stop)
        if ended.stopped_by != "memory" or stop.asked():
            return ended
        fitting = keep_smaller(spec, folder)
        if fitting == spec:
            return Ended(status="failed", reason=ended.reason)
        spec = fitting
        codec.write_json(folder.spec, spec)
        say(f"{spec.run_id}: {ended.reason}")


def launch_command(spec: RunSpec, folder: RunFolder, box: Box) -> list[str]:
    """The `accelerate launch` line of one run."""
    on_gpu = box.on_gpu and spec.execution.device != "cpu"
    return recipe_command("pretrain", ["--spec", str(folder.spec)], spec.execution.n_processes, box, on_gpu=on_gpu)


def recipe_command(recipe: str, arguments: Sequence[str], ranks: int, box: Box, *, on_gpu: bool) -> list[str]:
    """The `accelerate launch` line of a recipe; every default is spelt out, so nothing depends on the user's config."""
    # --multi_gpu also starts several CPU ranks; `--cpu --num_processes 2` would silently start one process.
    mode = ["--multi_gpu"] if ranks > 1 else [] if on_gpu else ["--cpu"]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *mode,
        "--quiet",  # its own traceback about a child's exit code says nothing that the record does not
        *("--num_processes", str(ranks), "--num_machines", "1", "--machine_rank", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", str(max(1, box.n_cores // ranks))),
        *(["--main_process_port", str(_free_port())] if ranks > 1 else []),
        *(str(Path(str(_recipes())) / f"{recipe}.py"), *arguments),
    ]


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
    if link.why_not_watched(watch, on_gpu=on_gpu) is None:
        try:
            start_watchdog(lab)
        except (HomelabError, OSError) as error:
            say(f"  ! the watchdog could not be started ({error}); nothing guards the cards")
    command = recipe_command(recipe, arguments, n_processes, box, on_gpu=on_gpu)
    # Its folders may lie deeper in the lab than a run's; on CPU the variable would ask for a watchdog.
    machine = {link.MACHINE_VARIABLE: str(link.machine_folder(lab).path)} if on_gpu else {}
    with _StopRequest() as stop:
        process = subprocess.Popen(command, start_new_session=True, stdout=sys.stderr, env=_environment() | machine)
        told_at: float | None = None
        while process.poll() is None or (told_at is not None and _group_lives(process.pid)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.2)
            if stop.asked() and told_at is None:
                told_at = time.monotonic()
                _kill_group(process.pid, signal.SIGTERM)
            elif told_at is not None and (stop.asked(2) or time.monotonic() - told_at > GIVE_UP_S):
                _kill_group(process.pid, signal.SIGKILL)
            if told_at is not None:
                time.sleep(0.2)
        if stop.asked():
            raise Stopped("stopped; the same command goes on from here")
    return process.returncode


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _recipes() -> object:
    from importlib.resources import files

    return files("homelab_scaling.recipes")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class _StopRequest:
    """Remembers SIGTERM and Ctrl-C while runs are launched, instead of dying from them."""

    def __init__(self) -> None:
        self._times = 0

    def asked(self, at_least: int = 1) -> bool:
        """Whether it was asked for, and that often (a second Ctrl-C means now)."""
        return self._times >= at_least

    def __enter__(self) -> "_StopRequest":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._times += 1

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def launch(spec: RunSpec, folder: RunFolder, box: Box, stop: _StopRequest) -> Ended:
    """Launches one run and waits for it; a trainer that died without a word is recorded as failed."""
    if stop.asked():
        return Ended(status="stopped", reason="not started")
    before, began_s = folder.read_record(), link.now_s()
    # Its own session: the terminal's Ctrl-C reaches us alone, and we tell the ranks.
    process = subprocess.Popen(
        launch_command(spec, folder, box), start_new_session=True, stdout=sys.stderr, env=_environment()
    )
    told_at: float | None = None
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        if stop.asked() and told_at is None:
            told_at = time.monotonic()
            _ask_to_stop(process.pid, folder)
        elif told_at is not None and (stop.asked(2) or time.monotonic() - told_at > GIVE_UP_S):
            _kill_group(process.pid, signal.SIGKILL)
    _wait_for_ranks(process.pid, folder)
    return _settle(folder, before, process.returncode, stop.asked(), began_s)


def _environment() -> dict[str, str]:
    chosen = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", RECORD_TELLS: "1"}
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        # How long a CPU thread spins at a barrier before it sleeps. libgomp's 300,000 turns are 3 to 11 % faster on an
        # idle box and up to 6 times slower as soon as something else wants a core (2 cores, recipes/LOG.md).
        chosen["GOMP_SPINCOUNT"] = "10000"
    return {**os.environ, **chosen}


def _ranks(session: int, folder: RunFolder) -> Iterator[int]:
    """Pids of the trainer's ranks that are alive and belong to this launch."""
    segments = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"]
    for pid in segments[-1]["pids"] if segments else []:
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session:
                yield pid


def _ask_to_stop(session: int, folder: RunFolder) -> None:
    ranks = list(_ranks(session, folder))
    if not ranks:  # still importing: nothing of this segment can be lost
        _kill_group(session, signal.SIGTERM)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _kill_group(session: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def _wait_for_ranks(session: int, folder: RunFolder) -> None:
    """A launcher can die before its ranks; they still hold the run's folder and may be writing a checkpoint."""
    deadline = time.monotonic() + GIVE_UP_S
    while any(True for _ in _ranks(session, folder)):
        if time.monotonic() > deadline:
            _kill_group(session, signal.SIGKILL)
            return
        time.sleep(0.2)


def _settle(folder: RunFolder, before: RunRecord | None, returncode: int, asked: bool, began_s: float) -> Ended:
    """What the record says, with a "running" that nobody runs any more put right."""
    record = folder.read_record()
    if record is None or (record == before and returncode):  # refused before it began: nothing was written
        if asked:
            return Ended(status="stopped", reason="stopped before it began")
        return Ended(status="failed", reason=f"the launch ended with exit code {returncode} before training began")
    ended = Ended(status=record.status, reason=record.reason, stopped_by=record.stopped_by)
    if record.status in ("running", "failed"):
        ended = _ended_by_watchdog(folder, record, began_s) or ended
    if ended.status == "running":
        ended = _died(folder, returncode, asked)
    if ended.status != record.status:
        changed = replace(record, status=ended.status, reason=ended.reason, stopped_by=ended.stopped_by)
        codec.write_json(folder.record, changed)
    return ended


def _ended_by_watchdog(folder: RunFolder, record: RunRecord, began_s: float) -> Ended | None:
    """A run that could not end by itself after its card was lost: the watchdog left word."""
    word = link.machine_folder(link.lab_of(folder)).read_ended(record.run_id)
    if word is None or word.t_s < began_s:
        return None
    kept = f"goes on from {word.last_checkpoint}" if word.last_checkpoint else "there is no checkpoint yet"
    return Ended(status="stopped", reason=f"ended by the watchdog: {word.reason}; {kept}", stopped_by="watchdog")


def _died(folder: RunFolder, returncode: int, asked: bool) -> Ended:
    """A trainer that left no last word."""
    if asked:
        reason = "stopped before this launch's first checkpoint"
        return Ended(status="stopped", reason=reason, stopped_by="signal")
    cause = end_of_segment(folder)
    if isinstance(cause, OutOfMemory):
        return Ended(status="stopped", reason=str(cause), stopped_by="memory")
    if cause is not None:
        return Ended(status="failed", reason=str(cause))
    reason = f"the trainer died (launcher exit code {returncode}); run again to go on from its last checkpoint"
    return Ended(status="failed", reason=reason)
