"""A Ray cluster that is there already: how to reach it, and what its machines are."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from homelab_scaling import __version__
from homelab_scaling.box import Box
from homelab_scaling.errors import MachineError
from homelab_scaling.ladder import TrainTable
from homelab_scaling.sweep.node import NodeFacts, look_around
from homelab_scaling.sweep.prepare import Experiment

Folders = Literal["auto", "shared", "sent"]
Say = Callable[[str], None]

ANSWER_S = 60.0
"""For a machine's answer to what it is."""
CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines that can train."""

    nodes: tuple[NodeFacts, ...]
    box: Box
    """What one run gets, by the least of them."""
    n_cpus: float
    """Of Ray's CPU resource, for each run."""
    shared: bool
    """All of them mount the lab."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, as a driver of the cluster at this address; what ray prints goes to stderr, whose stdout is the user's.

    Raises:
        MachineError: ray is not installed, or nobody answers.
    """
    try:
        import ray
    except ImportError:
        raise MachineError("--engine ray: ray is not installed; pip install 'homelab_scaling[cluster]'") from None
    remedy = "start one with `ray start --head`, or name the right HOST:PORT with --address"
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise MachineError(
                f"--address {address}: wants HOST:PORT of a Ray cluster's head, or auto, on a machine of that cluster"
            )
        try:
            _greet(host, int(port))
        except OSError as error:
            raise MachineError(f"--address {address}: no Ray cluster answers there ({error}); {remedy}") from None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:  # ray raises what it likes here
            said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise MachineError(f"--address {address}: no Ray cluster answers there ({said}); {remedy}") from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _greet(host: str, port: int) -> None:
    """Makes sure that something like a head listens there: ray itself would try for minutes.

    Raises:
        OSError: nobody does, or not in HTTP/2, which a head speaks.
    """
    preface, settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    with socket.create_connection((host, port), timeout=CONNECT_S) as talk:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        talk.sendall(preface + settings)
        answer = b""
        while len(answer) < 4 and (more := talk.recv(64)):
            answer += more
    if answer[3:4] != settings[3:4]:
        raise OSError("something else listens there")


def survey(ray: Any, experiment: Experiment, folders: Folders) -> Cluster:
    """What the cluster has, after asking each of its machines.

    Raises:
        MachineError: a machine lacks this package, has another version of it, does not answer, or does not see a lab
            or shards that are to be shared.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    gpus = any(node["Resources"].get("GPU", 0) for node in alive)
    n_gpus = experiment.ladder.train.processes or 1
    able = [node for node in alive if can_take(node, {"CPU": 1, "GPU": n_gpus} if gpus else {"CPU": 1})]
    if not able:
        what = f" and {n_gpus} GPU{'s' * (n_gpus > 1)}" if gpus else ""
        raise MachineError(f"none of the {len(alive)} machines of this Ray cluster has a CPU{what} to give; add one")
    with _made(experiment.lab) as token:
        # Shards of the lab's own lie in it; others may be anywhere.
        paths = [str(token), *([str(experiment.shards)] if experiment.ladder.data.shards is not None else [])]
        look = ray.remote(num_cpus=0, max_retries=0)(look_around)
        asked = {
            node["NodeID"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(paths, gpus)
            for node in able
        }
        answers = [(node, _answer(ray, node, asked[node["NodeID"]])) for node in able]
    able = [node for node, answer in answers if answer is not None]
    facts = tuple(answer for _, answer in answers if answer is not None)
    if not facts:
        raise MachineError("every machine of this Ray cluster died while it was asked what it is; add a node to it")
    blind = sorted({fact.host for fact in facts if not fact.sees_lab})
    if folders == "shared" and blind:
        raise MachineError(
            f"{', '.join(blind)} does not see {' or '.join([str(experiment.lab), *paths[1:]])}; put it on a file "
            "system that all machines mount, or use --folders sent"
        )
    return Cluster(
        nodes=facts,
        box=_least(facts, gpus, experiment.ladder.train),
        n_cpus=1.0 if gpus else min(node["Resources"]["CPU"] for node in able),
        shared=folders != "sent" and not blind,
    )


def can_take(node: dict[str, Any], wants: Mapping[str, float]) -> bool:
    """Whether one of `ray.nodes()` lives and has so much of each resource, free or not."""
    return bool(node["Alive"]) and all(node["Resources"].get(kind, 0) >= n for kind, n in wants.items())


@contextlib.contextmanager
def _made(lab: Path) -> Iterator[Path]:
    """A file in the lab, for as long as machines look for it; a lab that was not there before goes with it."""
    made = [folder for folder in (lab, *lab.parents) if not folder.exists()]
    lab.mkdir(parents=True, exist_ok=True)
    token = lab / f".seen-{time.time_ns()}"
    token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: somebody else has begun there
            for folder in made:
                folder.rmdir()


def _answer(ray: Any, node: dict[str, Any], asked: Any) -> NodeFacts | None:
    """What a machine says of itself; None where it has died since it was listed, which Ray may notice late."""
    where = node["NodeManagerHostname"]
    try:
        facts: NodeFacts = ray.get(asked, timeout=ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        raise MachineError(f"{where} has not answered for {ANSWER_S:.0f} s; remove it from the cluster") from None
    except Exception as error:
        gone = isinstance(error, ray.exceptions.TaskUnschedulableError | ray.exceptions.NodeDiedError)
        if gone or not any(one["Alive"] for one in ray.nodes() if one["NodeID"] == node["NodeID"]):
            return None
        said = str(error).strip().splitlines()[-1][:200]
        raise MachineError(
            f"{where} cannot run homelab_scaling ({said}); install version {__version__} in the Python that Ray uses"
        ) from None
    if facts.version != __version__:
        raise MachineError(f"{where} has homelab_scaling {facts.version}, this is {__version__}; install the same")
    return facts


def _least(facts: Sequence[NodeFacts], gpus: bool, train: TrainTable) -> Box:
    """A box that every machine can stand in for: one GPU of the smallest, unless the ladder asks for more."""
    boxes = [fact.box for fact in facts if fact.box.on_gpu == gpus]
    if len(boxes) < len(facts):
        raise MachineError(
            "Ray counts GPUs on this cluster, but a machine's driver lists none; run `homelab doctor` there"
        )
    least = min(boxes, key=lambda box: box.vram_bytes or 0)
    n_gpus = 0 if not gpus else 1 if train.processes is None else min(box.n_gpus for box in boxes)
    shares = 1 if not gpus else max(1, min(box.n_gpus for box in boxes) // max(1, n_gpus))
    return replace(
        least,
        n_gpus=n_gpus,
        computes_bf16=all(box.computes_bf16 for box in boxes),
        has_compiler=all(box.has_compiler for box in boxes),
        n_cores=max(1, min(box.n_cores for box in boxes) // shares),
    )


def words(cluster: Cluster) -> str:
    """The cluster in a line."""
    n = len(cluster.nodes)
    kinds = sorted({fact.box.device for fact in cluster.nodes})
    how = "which all mount the lab" if cluster.shared else "to which shards and run folders are sent"
    return f"Ray cluster: {n} machine{'s' * (n > 1)} ({', '.join(kinds)}), {how}"
