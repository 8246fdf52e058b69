"""The runs of a ladder as tasks of a Ray cluster that is there already: `homelab run LADDER --engine ray`.

Ray decides where a task runs, holds its GPUs and starts it again elsewhere when its machine dies. How a run is trained
there is `node`, the same launch as on one's own box; where machines do not mount the lab, files travel (`depot`). All
truth stays in the lab's folders, so the same command goes on after anything, on another cluster or on none.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from homelab_scaling import __version__
from homelab_scaling.box import Box
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.ladder import TrainTable
from homelab_scaling.sweep.depot import Depot
from homelab_scaling.sweep.launch import Ended
from homelab_scaling.sweep.limits import Limits
from homelab_scaling.sweep.local import Outcome, Run
from homelab_scaling.sweep.node import NodeFacts, Order, look_around, train_here
from homelab_scaling.sweep.placing import flops_of
from homelab_scaling.sweep.purse import Purse
from homelab_scaling.sweep.recipe import StopRequest
from homelab_scaling.sweep.room import need_of_run, refuse_what_fits_no_card
from homelab_scaling.watch import link

Folders = Literal["auto", "shared", "sent"]
Say = Callable[[str], None]

ANSWER_S = 60.0
"""For a machine's answer to what it is."""
CONNECT_S = 5.0
TRIES = 3
"""How often Ray starts a run again whose machine died."""
LONELY_S = 120.0
"""With no machine left that could take a run, how long one is waited for."""
WAIT_S = 1.0


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


def connect(address: str) -> Any:
    """Ray, as a driver of the cluster at this address.

    Raises:
        MachineError: ray is not installed, or nobody answers.
    """
    try:
        import ray
    except ImportError:
        raise MachineError("--engine ray: ray is not installed; pip install 'homelab_scaling[cluster]'") from None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    remedy = "start one with `ray start --head`, or name the right HOST:PORT with --address"
    if address != "auto":
        if not host or not port.isdecimal():
            raise MachineError(f"--address {address}: wants HOST:PORT of a Ray cluster's head, or auto")
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise MachineError(f"--address {address}: no Ray cluster answers there ({error}); {remedy}") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    except Exception as error:  # ray raises what it likes here
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MachineError(f"--address {address}: no Ray cluster answers there ({said}); {remedy}") from None
    return ray


def survey(ray: Any, lab: Path, folders: Folders, train: TrainTable) -> Cluster:
    """What the cluster has, after asking each of its machines.

    Args:
        lab: LAB/<ladder>.

    Raises:
        MachineError: a machine lacks this package, has another version of it, does not answer, or does not see a lab
            that is to be shared.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    gpus = any(node["Resources"].get("GPU", 0) for node in alive)
    kind = "GPU" if gpus else "CPU"
    able = [node for node in alive if node["Resources"].get(kind, 0) >= 1]
    if not able:
        raise MachineError(f"this Ray cluster of {len(alive)} machines has no CPU or GPU to give; add a node to it")
    lab.mkdir(parents=True, exist_ok=True)
    token = lab / f".seen-{time.time_ns()}"
    token.touch()
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(look_around)
        asked = {
            node["NodeID"]: look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(token))
            for node in able
        }
        facts = tuple(_answer(ray, node, asked[node["NodeID"]]) for node in able)
    finally:
        token.unlink(missing_ok=True)
    blind = sorted({fact.host for fact in facts if not fact.sees_lab})
    if folders == "shared" and blind:
        raise MachineError(
            f"{', '.join(blind)} does not see {lab}; put the lab on a file system that all machines mount, or use "
            "--folders sent"
        )
    return Cluster(
        nodes=facts,
        box=_least(facts, gpus, train),
        n_cpus=1.0 if gpus else min(node["Resources"]["CPU"] for node in able),
        shared=folders != "sent" and not blind,
    )


def _answer(ray: Any, node: dict[str, Any], asked: Any) -> NodeFacts:
    where = node["NodeManagerHostname"]
    try:
        facts: NodeFacts = ray.get(asked, timeout=ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        raise MachineError(f"{where} has not answered for {ANSWER_S:.0f} s; remove it from the cluster") from None
    except Exception as error:
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
    if not boxes:
        raise MachineError("Ray counts GPUs on this cluster, but no driver lists one; run `homelab doctor` there")
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


def refuse_to_measure_elsewhere(cluster: Cluster, own: Box, measures: bool) -> None:
    """Batches are measured where the command is given, which must be a machine like those that train.

    Raises:
        SpecError: it is not.
    """
    if measures and own.device != cluster.box.device:
        raise SpecError(
            f"this ladder's batches are measured here, on {own.device}, but it is trained on {cluster.box.device}; run "
            "`homelab batch-size` on one of those machines first, or write [batch] tokens"
        )


# -------------------------------------------------------------------------------------------------------------- running


def run_all(
    ray: Any, cluster: Cluster, runs: Sequence[Run], *, lab: Path, shards: Path, limits: Limits, say: Say
) -> Outcome:
    """Trains every run that is not finished somewhere on the cluster, the longest first.

    Ray starts a run again whose machine died, up to three times; it goes on from its last checkpoint. A failed run is
    tried once more on the same machine, then recorded; the others go on.

    Args:
        lab: LAB/<ladder>.
        shards: the folder of the text.
    """
    todo, outcome = [], Outcome(finished=(), failed={}, stopped=False)
    for spec, folder in runs:
        record = folder.read_record()
        if record is not None and record.status in ("finished", "diverged"):
            say(f"{spec.run_id}: {record.status} before, not repeated")
            good = record.status == "finished"
            done = (spec.run_id,) if good else ()
            bad = {} if good else {spec.run_id: f"diverged: {record.reason}"}
            outcome = outcome.then(Outcome(finished=done, failed=bad, stopped=False))
        else:
            todo.append((spec, folder))
    refuse_what_fits_no_card(need_of_run(spec, cluster.box.vram_bytes) for spec, _ in todo)
    if not todo:
        return outcome
    tasks = _Tasks(ray, cluster, lab, limits, say)
    tasks.give(sorted(todo, key=lambda run: -flops_of(run[0])), shards)
    say(f"{len(todo)} run{'s' * (len(todo) > 1)} given to Ray, the longest first")
    with StopRequest() as stop:
        tasks.wait(stop)
    return outcome.then(tasks.outcome)


def _train_on_node(order: Order, depot: Any, shards: list[tuple[str, bytes]] | None) -> tuple[Ended, str]:
    """The body of a task."""
    import ray

    def tell(method: str, *arguments: object) -> object:
        return ray.get(getattr(depot, method).remote(*arguments))

    def run_files() -> Iterator[tuple[str, bytes]]:
        for ref in depot.contents.options(num_returns="streaming").remote(order.run):
            yield ray.get(ref)

    return train_here(order, tell, run_files, lambda: iter(shards or ()))


def _start_depot(ray: Any, lab: Path) -> Any:
    """The depot beside us, where the lab is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Depot).options(scheduling_strategy=here, max_concurrency=1).remote(str(lab))


def _files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield path.name, path.read_bytes()


class _Tasks:
    """Runs in Ray's hands.

    Args:
        lab: LAB/<ladder>.
    """

    def __init__(self, ray: Any, cluster: Cluster, lab: Path, limits: Limits, say: Say) -> None:
        self.ray, self.cluster, self.lab, self.limits, self.say = ray, cluster, lab, limits, say
        self.purse = Purse(lab, lab.parent) if limits.max_usd is not None else None
        self.depot = _start_depot(ray, lab)
        self.kind = "GPU" if cluster.box.on_gpu else "CPU"
        self.by_ref: dict[Any, str] = {}
        self.n_given = 0
        self.outcome = Outcome(finished=(), failed={}, stopped=False)
        self._told = False

    def give(self, runs: Sequence[Run], shards: Path) -> None:
        """Tasks in this order, each with the GPUs or the CPU of one machine that it wants."""
        files = None if self.cluster.shared else self.ray.put(list(_files_of(shards)))
        remote = self.ray.remote(max_retries=TRIES)(_train_on_node)
        for spec, folder in runs:
            order = Order(
                spec=spec,
                ladder=self.lab.name,
                lab=str(self.lab),
                run=str(folder.path.resolve().relative_to(self.lab)),
                shared=self.cluster.shared,
                n_cores=self.cluster.box.n_cores,
            )
            n_gpus = spec.execution.n_processes if self.cluster.box.on_gpu else 0
            demand = {"name": spec.run_id, "num_cpus": self.cluster.n_cpus, "num_gpus": n_gpus}
            self.by_ref[remote.options(**demand).remote(order, self.depot, files)] = spec.run_id
        self.n_given = len(self.by_ref)

    def wait(self, stop: StopRequest) -> None:
        """Until every task has ended, or has been stopped."""
        able_s = time.monotonic()
        while self.by_ref:
            for ref in self.ray.wait(list(self.by_ref), timeout=WAIT_S)[0]:
                self._take_in(ref, self.by_ref.pop(ref))
            self._heed(stop)
            if self.ray.cluster_resources().get(self.kind, 0) >= 1:
                able_s = time.monotonic()
            elif time.monotonic() - able_s > LONELY_S:
                self._end(stopped=True, limit=f"no machine of the cluster has had a {self.kind} for {LONELY_S:.0f} s")
                self._cancel()
                return

    def _heed(self, stop: StopRequest) -> None:
        """A stop, whoever wants it, is for all: first with a checkpoint, at the second Ctrl-C at once."""
        if not self.outcome.stopped:
            now = link.now_s()
            limit = None if stop.asked() else self.limits.reached(now, self.purse.spent(now) if self.purse else None)
            if stop.asked() or limit is not None:
                self._end(stopped=True, limit=limit)
        if self.outcome.stopped and not self._told:
            self._told = True
            self.ray.get(self.depot.ask_to_stop.remote())
        if stop.asked(2):
            self._cancel()

    def _cancel(self) -> None:
        for ref in self.by_ref:
            self.ray.cancel(ref, force=True)

    def _end(self, **changes: Any) -> None:
        self.outcome = self.outcome.then(replace(Outcome(finished=(), failed={}, stopped=False), **changes))

    def _take_in(self, ref: Any, run_id: str) -> None:
        number = f"[{self.n_given - len(self.by_ref)}/{self.n_given}] {run_id}"
        try:
            ended, host = self.ray.get(ref)
        except Exception as error:  # cancelled, or the task itself broke, or its machines died too often
            if not self.outcome.stopped:
                said = str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
                self.say(f"{number}: failed: {said}")
                self._end(failed={run_id: f"failed: {said}"})
            return
        self.say(f"{number}: {ended.status} on {host}{f' ({ended.reason})' if ended.reason else ''}")
        if ended.status == "finished":
            self._end(finished=(run_id,))
        elif ended.status == "stopped":
            self._end(stopped=True, watchdog=ended.reason if ended.stopped_by == "watchdog" else None)
        else:
            self._end(failed={run_id: f"{ended.status}: {ended.reason}"})
