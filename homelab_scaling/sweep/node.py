"""What a machine of a cluster does for one run: bring it here if need be, train it, say how it ended. Without ray."""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import __version__, codec
from homelab_scaling.box import Box, describe_box, detect_box
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.sweep import launch as launching
from homelab_scaling.sweep.depot import Sender, unpack
from homelab_scaling.sweep.launch import Ended, Launch
from homelab_scaling.sweep.recipe import GIVE_UP_S, see_to_watchdog
from homelab_scaling.sweep.tether import tie
from homelab_scaling.train.oom_notes import keep_smaller
from homelab_scaling.watch import link
from homelab_scaling.watch.gpu import list_cards

POLL_S = 0.2
ASK_EVERY_S = 1.0
"""How soon a request to stop is heard."""
OUTPUT = "output.log"

Tell = Callable[..., object]
Files = Callable[[], Iterator[tuple[str, bytes]]]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One run for one machine."""

    spec: RunSpec
    ladder: str
    """Of the lab's folder LAB/<ladder>."""
    lab: str
    """LAB/<ladder> where the command was given."""
    run: str
    """The run's folder within it."""
    shared: bool
    """This machine mounts the lab; else files travel."""
    n_cores: int
    send_every_s: float = 30.0
    """How much of a run's files a machine that dies may take with it."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a machine says of itself."""

    host: str
    version: str
    box: Box
    """With all its GPUs."""
    sees_lab: bool


def look_around(token: str) -> NodeFacts:
    """Facts of this machine.

    Args:
        token: a file that was just made in the lab.
    """
    return NodeFacts(
        host=socket.gethostname(), version=__version__, box=describe_box(list_cards()), sees_lab=Path(token).exists()
    )


def train_here(order: Order, tell: Tell, run_files: Files, shard_files: Files) -> tuple[Ended, str]:
    """Trains a run to its end, a failure or a request to stop; how it ended, and on which machine.

    A failure is tried once more, here; memory that runs out, with smaller micro-batches. A run that somebody still
    holds, such as the dying launch of a machine that was lost, is waited for.

    Args:
        tell: calls the command's Depot.
        run_files: of the run's folder in the lab.
        shard_files: of the lab's shards.
    """
    host = socket.gethostname()
    spec, folder = order.spec, RunFolder(Path(order.lab) / order.run)
    if tell("stopping") or not _wait_for_lock(folder, tell):
        return Ended(status="stopped", reason="not started", stopped_by="signal"), host
    sender = None
    if not order.shared:
        spec, folder = _bring_here(order, run_files, shard_files)
        sender = Sender(folder, tell, order.run)
    record = folder.read_record()
    if record is not None and record.status in ("finished", "diverged"):  # by a launch whose machine died right after
        return Ended(status=record.status, reason=record.reason), host
    box = replace(detect_box(), n_cores=order.n_cores)
    tries = 0
    while True:
        codec.write_json(folder.spec, spec)
        launch = _launch(spec, folder, box)
        try:
            ended = _wait_for(launch, tell, sender, order.send_every_s)
        finally:
            if sender is not None:
                sender.send()
        if ended.stopped_by == "memory":
            smaller = keep_smaller(spec, folder)
            if smaller == spec:
                return Ended(status="failed", reason=ended.reason, final=True), host
            spec = smaller
        elif ended.status == "failed" and not ended.final and not tries and not tell("stopping"):
            tries += 1
        else:
            return ended, host


def _launch(spec: RunSpec, folder: RunFolder, box: Box) -> Launch:
    """Starts it, so that it ends when this process does."""
    labs, more = link.lab_of(folder), {}
    if box.on_gpu:
        machine = labs / f"machine-{socket.gethostname()}"  # a lab that several machines share has one for each
        os.environ[link.MACHINE_VARIABLE] = more[link.MACHINE_VARIABLE] = str(machine)
        see_to_watchdog(labs, spec.watch, on_gpu=True, say=print)
    launch = launching.start(spec, folder, box, more=more, output=folder.path / OUTPUT)
    tie(launch, os.getpid())
    return launch


def _wait_for(launch: Launch, tell: Tell, sender: Sender | None, send_every_s: float) -> Ended:
    asked_s = sent_s = time.monotonic()
    while (ended := launch.poll()) is None:
        now = time.monotonic()
        if now - asked_s >= ASK_EVERY_S:
            asked_s = now
            if tell("stopping"):
                launch.ask_to_stop()
        if sender is not None and now - sent_s >= send_every_s:
            sender.send()
            sent_s = time.monotonic()
        time.sleep(POLL_S)
    return ended


def _wait_for_lock(folder: RunFolder, tell: Tell) -> bool:
    """Whether the run is free; False after a request to stop."""
    deadline = time.monotonic() + 2 * GIVE_UP_S
    while launching.is_locked(folder) and time.monotonic() < deadline:
        if tell("stopping"):
            return False
        time.sleep(ASK_EVERY_S)
    return True  # if it is held still, the trainer says by whom


def _bring_here(order: Order, run_files: Files, shard_files: Files) -> tuple[RunSpec, RunFolder]:
    """The run's folder and its shards on this machine's own disk, as the lab has them."""
    here = Path(tempfile.gettempdir()) / f"homelab-{os.getuid()}-{codec.stable_hash(order.lab, 8)}" / order.ladder
    folder = RunFolder(here / order.run)
    unpack(run_files(), folder.path)
    science = order.spec.science
    name = codec.stable_hash([science.tokenizer_hash, science.train_fingerprint, science.val_fingerprint], 12)
    shards = here / "shards" / name
    if not (shards / "manifest.json").exists():
        arriving = shards.with_name(f".{name}-{os.getpid()}")
        unpack(shard_files(), arriving)
        if not shards.exists():  # two runs may have brought it at once
            arriving.rename(shards)
    return replace(order.spec, shards=str(shards)), folder
