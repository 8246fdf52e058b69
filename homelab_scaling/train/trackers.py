"""Curves of a run in TensorBoard, W&B and MLflow, through Accelerate: each update once, even after many stops."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import MachineError
from homelab_scaling.plan.describe import describe_run
from homelab_scaling.runs import RunFolder, RunRecord
from homelab_scaling.specs import RunSpec
from homelab_scaling.train.hooks import Hooks, Line

ABOUT = frozenset(["kind", "update", "phase", "step", "tokens", "set"])
"""Of a line of metrics: what says where its values belong."""
ABOUT_NOISE = frozenset(["loss", "n_steps", "k", "microbatch_seqs"])
"""Of a line of the noise scale: how it was measured."""


class Trackers(Hooks):
    """One tracked run per run; decays are curves of their own.

    What lies in the run's folder (TensorBoard's events, W&B's offline runs) is derived: a resumed segment writes it
    anew from the surviving metrics. A server and MLflow's store only ever append, so they are told what they lack.
    """

    def __init__(self, accelerator: Any, folder: RunFolder, spec: RunSpec) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.spec = spec
        self.trackers = spec.execution.trackers
        self.mlflow_has: set[tuple[str, int]] = set()
        """(tag, update)."""
        self.wandb_from = 0
        """The first update that W&B lacks."""
        self.begun = self.whole = False

    def start(self, kept: list[Line], tokens: int, about: str) -> None:
        if not self.trackers:
            return
        shutil.rmtree(self.folder.tensorboard, ignore_errors=True)
        run = self.spec.run_id
        kwargs: dict[str, dict[str, Any]] = {
            "wandb": {"name": run, "id": run, "resume": "allow", "dir": str(self.folder.path)},
            "mlflow": {"run_name": run},
        }
        try:
            if "mlflow" in self.trackers and (found := find_mlflow_run(self.spec, self.folder)) is not None:
                kwargs["mlflow"]["run_id"], self.mlflow_has = found
            # The ladder is the project, so that its runs stand side by side in every tracker.
            self.accelerator.init_trackers(self.spec.ladder, init_kwargs=kwargs)
        except Exception as error:  # each tracker has its own: no key, no server, no room
            said = str(error).strip().splitlines()
            raise MachineError(
                f"{' or '.join(self.trackers)} cannot be started ({said[0][:200] if said else type(error).__name__}); "
                "mend that (WANDB_MODE=offline needs no account), or choose others with --trackers"
            ) from error
        self.begun = True
        for tracker in self.accelerator.trackers:
            _describe(tracker, describe_run(self.spec))
            if tracker.name == "wandb":
                self.wandb_from = _first_missing(tracker.run, self.folder, self.spec)
        for line in kept:
            self._log(line)

    def steps(self, lines: list[Line], rate: Line | None) -> None:
        for line in [*lines, *([rate] if rate else [])]:
            self._log(line)

    def validated(self, line: Line) -> None:
        self._log(line)

    def noise(self, line: Line) -> None:
        self._log(line)

    def finished(self, record: RunRecord) -> None:
        self.whole = True

    def end(self) -> None:
        # Not accelerator.end_training(): that ends the process group too, and the next run may need it.
        for tracker in self.accelerator.trackers if self.begun else ():
            if tracker.name == "wandb":
                tracker.run.finish(exit_code=0 if self.whole else 1)
            elif tracker.name == "mlflow":
                import mlflow

                mlflow.end_run("FINISHED" if self.whole else "KILLED")
            else:
                tracker.finish()

    def _log(self, line: Line) -> None:
        if not self.trackers:
            return
        update = line["update"]
        for tracker in self.accelerator.trackers:
            values = curves_of(line)
            # TensorBoard takes steps in any order; the others drop what goes back, as a return to a fork does.
            if tracker.name == "tensorboard":
                tracker.log({tag: v for tag, v in values.items() if not tag.endswith("/step")}, step=line["step"])
                continue
            if tracker.name == "mlflow":
                values = {tag: value for tag, value in values.items() if (tag, update) not in self.mlflow_has}
            elif update < self.wandb_from:
                continue
            if values:
                tracker.log(values, step=update)


def curves_of(line: Line) -> dict[str, int | float]:
    """Tag -> value of a line of metrics, and under PREFIX/step the step along its path."""
    curve = "train" if line["phase"] == "trunk" else line["phase"].replace("@", "-")
    prefixes = {"step": curve, "val": f"{curve}-val-{line.get('set')}", "rate": "rate", "noise": f"{curve}-noise"}
    prefix = prefixes[line["kind"]]
    about = ABOUT | ABOUT_NOISE if line["kind"] == "noise" else ABOUT
    values = {f"{prefix}/{k}": v for k, v in line.items() if k not in about and isinstance(v, int | float)}
    return {**values, f"{prefix}/step": line["step"]}


def _describe(tracker: Any, facts: dict[str, str | int | float | bool]) -> None:
    if tracker.name == "tensorboard":  # Accelerate's way makes a second run, of no curves, named after the clock
        tracker.writer.add_hparams(facts, {}, run_name=".")
    else:
        tracker.store_init_configuration(facts)


def _first_missing(run: Any, folder: RunFolder, spec: RunSpec) -> int:
    """The first update that W&B lacks.

    Its server says where a resumed run goes on. Offline it cannot know, and a killed process leaves less than it was
    told; so the new offline run gets everything, and takes the place of older ones that were never synchronised.
    """
    if not run.offline:
        return int(run.starting_step)
    synced = False
    for older in (folder.path / "wandb").glob(f"offline-run-*-{spec.run_id}"):
        if older.resolve() == Path(run.dir).resolve().parent:
            continue
        if any(older.glob("*.synced")):
            synced = True
        else:
            shutil.rmtree(older, ignore_errors=True)
    return 1 + max((line["update"] for line in codec.read_jsonl(folder.metrics)), default=-1) if synced else 0


def find_mlflow_run(spec: RunSpec, folder: RunFolder) -> tuple[str, set[tuple[str, int]]] | None:
    """The id of this run in MLflow's store and the (tag, update) it holds, if an earlier segment logged to it.

    The store is MLFLOW_TRACKING_URI where that is set, and the lab's own otherwise.
    """
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(mlflow_store(folder.path.parent.parent))
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # what MLflow has where no database is installed
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", spec.ladder))
    if experiment is None:
        return None
    found = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"attributes.run_name = '{spec.run_id}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    for run in found:
        run_id, tags = str(run.info.run_id), run.data.metrics
        return run_id, {(tag, m.step) for tag in tags for m in client.get_metric_history(run_id, tag)}
    return None


def mlflow_store(lab: Path) -> str:
    """Where a lab's MLflow runs are kept: a database where MLflow brings what one needs, files otherwise."""
    from importlib.util import find_spec

    if find_spec("sqlalchemy") and find_spec("alembic"):
        return f"sqlite:///{(lab / 'mlflow.db').resolve()}"
    return (lab / "mlruns").resolve().as_uri()
