"""One launch: its command and environment, its way to be stopped, and how it ended.

A launcher turns every exit code into 1 and passes on no SIGTERM, so how a run ended is read from its record.json, and a
request to stop goes straight to the trainer's ranks, whose pids the run's events.jsonl names and whose environment says
which launcher they are from (torchrun gives each a session of its own). A launch outlives the driver that made it; the
next driver knows it again by its launcher's pid and start, or by the lock on the run's folder.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import MachineError
from homelab_scaling.runs import RunFolder, RunRecord, RunStatus, StoppedBy
from homelab_scaling.specs import RunSpec
from homelab_scaling.sweep.recipe import GIVE_UP_S, environment, recipe_command
from homelab_scaling.train.oom_notes import NoRoom, OutOfMemory, end_of_segment
from homelab_scaling.watch import link, processes

Stamp = tuple[int, int]

LAUNCHER_VARIABLE = "HOMELAB_LAUNCHER"
"""In the environment of everything that a launch starts: the pid of its launcher."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one launch ended."""

    status: RunStatus
    reason: str | None
    stopped_by: StoppedBy | None = None
    final: bool = False
    """Another launch would end the same way."""


def launch_command(spec: RunSpec, folder: RunFolder, box: Box) -> list[str]:
    """The `accelerate launch` line of one run."""
    on_gpu = box.on_gpu and spec.execution.device != "cpu"
    return recipe_command("pretrain", ["--spec", str(folder.spec)], spec.execution.n_processes, box, on_gpu=on_gpu)


# ------------------------------------------------------------------------------------------------------- while it runs


class Launch:
    """A launch in progress; `poll` it until it has ended.

    Args:
        process: None for one that an earlier driver, or somebody else, started.
        session: of its launcher, which is the launcher's pid; None where nobody wrote it down. Without it the launch
            is not ours to stop: it is waited for.
        before: stamp of record.json when it began.
        began_s: Unix time.
    """

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        *,
        process: "subprocess.Popen[bytes] | None",
        session: int | None,
        before: Stamp | None,
        began_s: float,
    ) -> None:
        self.spec, self.folder, self.process, self.session = spec, folder, process, session
        self.began_s, self.before = began_s, before
        self.told_s: float | None = None
        """time.monotonic() of the request to stop."""
        self._gone_s: float | None = None

    @property
    def is_adopted(self) -> bool:
        return self.process is None

    @property
    def is_ours(self) -> bool:
        return self.session is not None

    @property
    def launcher(self) -> tuple[int, int] | None:
        """Pid and start of the launcher, for schedule.json."""
        one = processes.look_up(self.session) if self.session is not None else None
        return (one.pid, one.start_ticks) if one is not None else None

    def poll(self) -> Ended | None:
        """How it ended; None while any of its processes is there."""
        if self._launcher_lives() or self.ranks():
            self._mind_the_clock()
            return None
        if self.is_adopted and is_locked(self.folder):
            return None
        returncode = 0 if self.process is None else self.process.returncode
        return settle(self.folder, self.before, returncode, self.told_s is not None, self.began_s)

    def _launcher_lives(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return self.session is not None and processes.is_alive(self.session)

    def _mind_the_clock(self) -> None:
        """Ranks that do not end after a request, or after their launcher died, are killed in the end."""
        if self._gone_s is None and not self._launcher_lives():
            self._gone_s = time.monotonic()  # ranks still hold the run's folder and may be writing a checkpoint
        since = [at for at in (self.told_s, self._gone_s) if at is not None]
        if since and time.monotonic() - min(since) > GIVE_UP_S:
            self.kill()

    def ranks(self) -> list[int]:
        """Pids of the trainer's ranks that are alive and belong to this launch."""
        return [pid for pid, launcher in ranks_of(self.folder) if launcher == self.session]

    def ask_to_stop(self) -> None:
        """The ranks save and leave; asked once."""
        if self.told_s is not None or not self.is_ours:
            return
        self.told_s = time.monotonic()
        ranks = self.ranks()
        if not ranks:  # still importing: nothing of this segment can be lost
            self._signal_group(signal.SIGTERM)
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """Everything it started, at once."""
        self._signal_group(signal.SIGKILL)
        for rank in self.ranks():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(os.getpgid(rank), signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        if self.session is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.session, number)


def start(spec: RunSpec, folder: RunFolder, box: Box, *, more: Mapping[str, str], output: Path | None) -> Launch:
    """Starts a run in a session of its own: the terminal's Ctrl-C reaches us alone, and we tell the ranks.

    Args:
        box: with the launch's share of the cores.
        more: environment beside the usual one.
        output: a file for what it prints; None prints here.
    """
    before, began_s = record_stamp(folder), link.now_s()
    command = ["/bin/sh", "-c", f'export {LAUNCHER_VARIABLE}=$$; exec "$@"', "sh", *launch_command(spec, folder, box)]
    env = {**environment(), **more}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(output, "ab")) if output is not None else None
        process = subprocess.Popen(command, start_new_session=True, stdout=file or sys.stderr, stderr=file, env=env)
    return Launch(spec, folder, process=process, session=process.pid, before=before, began_s=began_s)


def find_orphan(spec: RunSpec, folder: RunFolder, launcher: tuple[int, int] | None) -> Launch | None:
    """A launch of this run that is in progress without us, if there is one.

    Args:
        launcher: pid and start of its launcher, as an earlier driver wrote them to schedule.json.
    """
    session = None
    if launcher is not None:
        lives = bool(processes.still(dict([launcher])))
        session = launcher[0] if lives or any(found == launcher[0] for _, found in ranks_of(folder)) else None
    if session is None and not is_locked(folder):
        return None
    return Launch(spec, folder, process=None, session=session, before=record_stamp(folder), began_s=0.0)


def ranks_of(folder: RunFolder) -> Iterator[tuple[int, int]]:
    """Of every process of the run's last segment that is alive: its pid, and its launcher's.

    One that was launched by hand has no word of its launcher; its session stands for it.
    """
    segments = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"]
    for pid in segments[-1]["pids"] if segments else []:
        with contextlib.suppress(OSError):
            if processes.is_alive(pid):
                yield pid, _launcher_of(pid) or os.getsid(pid)


def everyone_of(launcher: int) -> list[int]:
    """Pids of all that a launch started and that is alive, ranks that no event names yet included."""
    found = []
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with contextlib.suppress(OSError):
            if _launcher_of(pid) == launcher and processes.is_alive(pid):
                found.append(pid)
    return found


def _launcher_of(pid: int) -> int | None:
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == LAUNCHER_VARIABLE.encode() and value.isdigit():
            return int(value)
    return None


def is_locked(folder: RunFolder) -> bool:
    """Whether some trainer holds the run's folder."""
    if not folder.path.exists():
        return False
    try:
        with folder.lock():
            return False
    except MachineError:
        return True


# ------------------------------------------------------------------------------------------------------- how it ended


def record_stamp(folder: RunFolder) -> Stamp | None:
    """Changes whenever record.json is written, if only with what it said before."""
    with contextlib.suppress(FileNotFoundError):
        stat = folder.record.stat()
        return stat.st_mtime_ns, stat.st_ino
    return None


def settle(folder: RunFolder, before: Stamp | None, returncode: int, asked: bool, began_s: float) -> Ended:
    """What the record says, with a "running" that nobody runs any more put right.

    Args:
        before: `record_stamp` when it was launched.
        asked: it was asked to stop.
        began_s: Unix time of the launch.
    """
    record = folder.read_record()
    if record is None or (record_stamp(folder) == before and returncode):  # refused before it began
        if asked:
            return Ended(status="stopped", reason="stopped before it began", stopped_by="signal")
        return Ended(status="failed", reason=f"the launch ended with exit code {returncode} before training began")
    ended = Ended(status=record.status, reason=record.reason, stopped_by=record.stopped_by)
    if record.status in ("running", "failed"):
        ended = _ended_by_watchdog(folder, record, began_s) or ended
    if ended.status == "running":
        ended = _died(folder, returncode, asked)
    if ended.status != record.status:
        changed = replace(record, status=ended.status, reason=ended.reason, stopped_by=ended.stopped_by)
        codec.write_json(folder.record, changed)
    if ended.status == "failed" and isinstance(end_of_segment(folder), NoRoom):
        return replace(ended, final=True)
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
