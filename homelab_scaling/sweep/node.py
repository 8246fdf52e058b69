"""What a machine of a cluster does for one run: bring it here if need be, train it, say how it ended. Without ray."""

import contextlib
import os
import shutil
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
from homelab_scaling.sweep.depot import SPEC, Sender, unpack
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
    """And shards that lie elsewhere."""


def look_around(paths: list[str], gpus: bool) -> NodeFacts:
    """Facts of this machine.

    Args:
        paths: a file that was just made in the lab, and shards that lie elsewhere.
        gpus: whether the cluster trains on its GPUs.
    """
    return NodeFacts(
        host=socket.gethostname(),
        version=__version__,
        box=describe_box(list_cards() if gpus else []),
        sees_lab=all(Path(path).exists() for path in paths),
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
    folder = RunFolder((Path(order.lab) if order.shared else _own_place(order)) / order.run)
    if (why := _wait_until_free(order, folder, tell)) is not None:
        return why, host
    if order.shared:
        return _train(order, order.spec, folder, tell, None), host
    holder = f"{host}-{os.getpid()}-{time.time_ns()}"
    tell("take", order.run, holder)
    spec = _bring_here(order, folder, run_files, shard_files)
    ended = _train(order, spec, folder, tell, Sender(folder, tell, order.run, holder))
    shutil.rmtree(folder.path, ignore_errors=True)  # the lab has it all
    return ended, host


def _train(order: Order, spec: RunSpec, folder: RunFolder, tell: Tell, sender: Sender | None) -> Ended:
    """Launches until it is over."""
    record = folder.read_record()
    if record is not None and record.status in ("finished", "diverged"):  # by a launch whose machine died right after
        return Ended(status=record.status, reason=record.reason)
    box = replace(detect_box(), n_cores=order.n_cores)
    spec = keep_smaller(_with_share(spec, box), folder)
    tries = 0
    while True:
        codec.write_json(folder.spec, spec)
        if sender is not None:
            sender.tell("put", SPEC, codec.dumps(replace(spec, shards=order.spec.shards)).encode())
        launch = _launch(spec, folder, box)
        try:
            ended = _wait_for(launch, tell, sender, order.send_every_s)
        except BaseException:
            _end(launch)  # the process of a task that fails lives on, and would leave a trainer to nobody
            raise
        if sender is not None:
            sender.send()
        if ended.stopped_by == "memory":
            smaller = keep_smaller(spec, folder)
            if smaller == spec:
                return Ended(status="failed", reason=ended.reason, final=True)
            spec = smaller
        elif ended.status == "failed" and not ended.final and not tries and not tell("stopping"):
            tries += 1
        else:
            return ended


def _with_share(spec: RunSpec, box: Box) -> RunSpec:
    """Which part of this machine the run is billed for."""
    share = box.n_gpus / len(list_cards()) if box.on_gpu else box.n_cores / len(os.sched_getaffinity(0))
    return replace(spec, execution=replace(spec.execution, machine_frac=min(1.0, share)))


def _launch(spec: RunSpec, folder: RunFolder, box: Box) -> Launch:
    """Starts it, so that it ends when this process does."""
    labs, more = link.lab_of(folder), {}
    if box.on_gpu:
        machine = labs / f"machine-{socket.gethostname()}"  # a lab that several machines share has one for each
        os.environ[link.MACHINE_VARIABLE] = more[link.MACHINE_VARIABLE] = str(machine)
        more["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # Ray counts cards as nvidia-smi does, CUDA by speed unless told
        see_to_watchdog(labs, spec.watch, on_gpu=True, say=print)
    launch = launching.start(spec, folder, box, more=more, output=folder.path / OUTPUT)
    tie(launch, os.getpid())
    return launch


def _wait_for(launch: Launch, tell: Tell, sender: Sender | None, send_every_s: float) -> Ended:
    asked_s = sent_s = began_s = time.monotonic()
    while (ended := launch.poll()) is None:
        now = time.monotonic()
        if now - asked_s >= ASK_EVERY_S:
            asked_s = now
            if tell("stopping"):
                launch.ask_to_stop()
        # Often at first, so that the lab soon shows that the run is under way.
        if sender is not None and now - sent_s >= min(send_every_s, max(1.0, sent_s - began_s)):
            sender.send()
            sent_s = time.monotonic()
        time.sleep(POLL_S)
    return ended


def _end(launch: Launch) -> None:
    launch.ask_to_stop()
    with contextlib.suppress(Exception):  # the first error is the one to be told
        while launch.poll() is None:
            time.sleep(POLL_S)


def _wait_until_free(order: Order, folder: RunFolder, tell: Tell) -> Ended | None:
    """None as soon as nobody trains the run, here or in the lab; else why it is not begun."""
    deadline = time.monotonic() + 2 * GIVE_UP_S
    while True:
        if tell("stopping"):
            return Ended(status="stopped", reason="not started", stopped_by="signal")
        if not launching.is_locked(folder) and not tell("held", order.run):
            return None
        if time.monotonic() > deadline:
            reason = f"another trainer has had {order.run} for {2 * GIVE_UP_S:.0f} s; stop it, or wait for it"
            return Ended(status="failed", reason=reason, final=True)
        time.sleep(ASK_EVERY_S)


def _own_place(order: Order) -> Path:
    """What stands for LAB/<ladder> on this machine's own disk."""
    return Path(tempfile.gettempdir()) / f"homelab-{os.getuid()}-{codec.stable_hash(order.lab, 8)}" / order.ladder


def _bring_here(order: Order, folder: RunFolder, run_files: Files, shard_files: Files) -> RunSpec:
    """The run's folder and its shards on this machine's own disk, as the lab has them."""
    unpack(run_files(), folder.path)
    science = order.spec.science
    name = codec.stable_hash([science.tokenizer_hash, science.train_fingerprint, science.val_fingerprint], 12)
    shards = _own_place(order) / "shards" / name
    if not (shards / "manifest.json").exists():
        arriving = shards.with_name(f".{name}-{os.getpid()}")
        unpack(shard_files(), arriving)
        try:
            arriving.rename(shards)
        except OSError:  # two runs have brought it at once
            shutil.rmtree(arriving, ignore_errors=True)
    return replace(order.spec, shards=str(shards))
