"""The runs of a ladder as tasks of a Ray cluster: `homelab run LADDER --engine ray`.

Ray decides where a task runs, holds its GPUs and starts it again elsewhere when its machine dies. How a run is trained
there is `node`, the same launch as on one's own box; where machines do not mount the lab, files travel (`depot`). All
truth stays in the lab's folders, so the same command goes on after anything, on another cluster or on none.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from homelab_scaling.errors import SpecError
from homelab_scaling.plan.parts import Plan
from homelab_scaling.sweep.depot import Depot, pieces_of
from homelab_scaling.sweep.launch import Ended
from homelab_scaling.sweep.limits import Limits, refuse_unknown_money
from homelab_scaling.sweep.local import Outcome, Run
from homelab_scaling.sweep.node import Order, train_here
from homelab_scaling.sweep.placing import flops_of
from homelab_scaling.sweep.prepare import Experiment
from homelab_scaling.sweep.purse import Purse
from homelab_scaling.sweep.ray_cluster import Cluster, Folders, Say, can_take, survey, words
from homelab_scaling.sweep.recipe import StopRequest
from homelab_scaling.sweep.room import need_of_run, needs_of_plan, refuse_what_fits_no_card
from homelab_scaling.watch import link

TRIES = 3
"""How often Ray starts a run again whose machine died."""
LONELY_S = 120.0
"""With no machine left that could take a run, how long one is waited for."""
WAIT_S = 1.0


class RayEngine:
    """A Ray cluster in place of this box.

    Args:
        ray: from `ray_cluster.connected`.
    """

    def __init__(self, ray: Any, experiment: Experiment, folders: Folders, limits: Limits, say: Say) -> None:
        self.ray, self.limits, self.say = ray, limits, say
        self.cluster = survey(ray, experiment, folders)
        self.own_box = experiment.box
        self.experiment = replace(experiment, box=self.cluster.box)
        say(words(self.cluster))

    def refuse_early(self, plan: Plan) -> None:
        """Beside what fits no card: batches are measured here, so this must be a machine like those that train."""
        refuse_what_fits_no_card(needs_of_plan(plan, self.experiment.ladder))
        refuse_unknown_money(self.limits, self.experiment.ladder.money, self.cluster.box)
        measures = plan.measuring is not None and bool(plan.measuring.rungs)
        if measures and self.own_box.device != self.cluster.box.device:
            raise SpecError(
                f"this ladder's batches are measured here, on {self.own_box.device}, but it is trained on "
                f"{self.cluster.box.device}; run `homelab batch-size` on one of those machines first, or write [batch] "
                "tokens"
            )

    def run_all(self, runs: list[Run]) -> Outcome:
        """Trains every run that is not finished somewhere on the cluster, the longest first.

        Ray starts a run again whose machine died, up to three times; it goes on from its last checkpoint. A failed run
        is tried once more on the same machine, then recorded; the others go on.
        """
        todo, outcome = [], Outcome(finished=(), failed={}, stopped=False)
        for spec, folder in runs:
            record = folder.read_record()
            if record is None or record.status not in ("finished", "diverged"):
                todo.append((spec, folder))
                continue
            self.say(f"{spec.run_id}: {record.status} before, not repeated")
            good = record.status == "finished"
            done = (spec.run_id,) if good else ()
            bad = {} if good else {spec.run_id: f"diverged: {record.reason}"}
            outcome = outcome.then(Outcome(finished=done, failed=bad, stopped=False))
        refuse_what_fits_no_card(need_of_run(spec, self.cluster.box.vram_bytes) for spec, _ in todo)
        if not todo:
            return outcome
        tasks = _Tasks(self.ray, self.cluster, self.experiment.lab, self.limits, self.say)
        tasks.give(sorted(todo, key=lambda run: -flops_of(run[0])), self.experiment.shards)
        self.say(f"{len(todo)} run{'s' * (len(todo) > 1)} given to Ray, the longest first")
        with StopRequest() as stop:
            tasks.wait(stop)
        return outcome.then(tasks.outcome)


def _train_on_node(order: Order, depot: Any, shards: list[tuple[str, Any]]) -> tuple[Ended, str]:
    """The body of a task; each piece of a shard is fetched when it is wanted."""
    import ray

    def tell(method: str, *arguments: object, **more: object) -> object:
        return ray.get(getattr(depot, method).remote(*arguments, **more))

    def run_files() -> Iterator[tuple[str, bytes]]:
        for ref in depot.contents.options(num_returns="streaming").remote(order.run):
            yield ray.get(ref)

    return train_here(order, tell, run_files, lambda: ((name, ray.get(ref)) for name, ref in shards))


def _start_depot(ray: Any, lab: Path) -> Any:
    """The depot beside us, where the lab is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Depot).options(scheduling_strategy=here, max_concurrency=1).remote(str(lab))


class _Tasks:
    """Runs in Ray's hands.

    Args:
        lab: LAB/<ladder>.
    """

    def __init__(self, ray: Any, cluster: Cluster, lab: Path, limits: Limits, say: Say) -> None:
        self.ray, self.cluster, self.lab, self.limits, self.say = ray, cluster, lab, limits, say
        self.purse = Purse(lab, lab.parent) if limits.max_usd is not None else None
        self.depot = _start_depot(ray, lab)
        self.wants: dict[str, float] = {}
        """Of Ray's resources, at the most that one of the runs does."""
        self.by_ref: dict[Any, str] = {}
        self.n_given = 0
        self.outcome = Outcome(finished=(), failed={}, stopped=False)
        self._told = False

    def give(self, runs: Sequence[Run], shards: Path) -> None:
        """Tasks in this order, each with the GPUs or the CPU of one machine that it wants."""
        pieces = () if self.cluster.shared else pieces_of(shards)
        files = [(name, self.ray.put(piece)) for name, piece in pieces]
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
            self.wants = {"CPU": self.cluster.n_cpus, **({"GPU": n_gpus} if n_gpus else {})}
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
            if any(can_take(node, self.wants) for node in self.ray.nodes()):
                able_s = time.monotonic()
            elif time.monotonic() - able_s > LONELY_S:
                wanted = " and ".join(f"{n:g} {kind}" for kind, n in self.wants.items())
                self._end(stopped=True, limit=f"no machine of the cluster has had {wanted} for {LONELY_S:.0f} s")
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
