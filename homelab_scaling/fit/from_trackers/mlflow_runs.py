"""Runs of an MLflow store: a server, a database, or a folder of files."""

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from homelab_scaling.errors import DataError, MachineError
from homelab_scaling.fit.from_trackers.tracked import Series, TrackedRun, make_series, why_silent

PAGE = 1000
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
ALLOW_FILES = {"MLFLOW_ALLOW_FILE_STORE": "true"}


def read_mlflow(where: str) -> list[TrackedRun]:
    """Every run of every experiment, newest last.

    Args:
        where: a tracking URI, a folder of MLflow's files (mlruns), an mlflow.db, or a folder that holds one of them.

    Raises:
        DataError: nothing there that MLflow can read, or no runs in it.
        MachineError: MLflow is not installed, or what it needs for this kind of store.
    """
    uri = store_uri(where)
    try:
        import mlflow
    except ImportError:
        raise MachineError("--from-mlflow needs MLflow; pip install 'homelab_scaling[mlflow]'") from None
    if uri.startswith(("http://", "https://")) and (why := why_silent(uri)):
        raise DataError(f"--from-mlflow {where}: the server does not answer ({why}); check the address and start it")
    if uri.split(":")[0].split("+")[0] in DATABASES and importlib.util.find_spec("sqlalchemy") is None:
        raise MachineError(f"--from-mlflow {where}: a database wants the whole of MLflow; pip install mlflow")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with _environment(PATIENCE | ALLOW_FILES):
        try:
            client = mlflow.MlflowClient(tracking_uri=uri)
            found = list(_runs(client))
        except Exception as error:  # MLflow's, requests' and the database's errors have no common root
            said = str(error).strip().splitlines()
            raise DataError(
                f"--from-mlflow {where}: MLflow cannot read it ({said[0][:200] if said else type(error).__name__}); "
                "give a tracking URI, a folder of mlruns or an mlflow.db"
            ) from None
    if not found:
        raise DataError(f"--from-mlflow {where}: a store without runs; name the one your training logged to")
    return found


def store_uri(where: str) -> str:
    """The tracking URI of what a user names.

    Raises:
        DataError: it is neither a URI nor there.
    """
    if "://" in where:
        return where
    path = Path(where)
    if path.is_file():
        return f"sqlite:///{path.resolve()}"
    if not path.is_dir():
        raise DataError(f"--from-mlflow {where}: no such folder or file, and no URI such as http://localhost:5000")
    for inner in (path / "mlflow.db", path / "mlruns"):
        if inner.exists():
            return store_uri(str(inner))
    if not any(path.glob("*/meta.yaml")):
        raise DataError(
            f"--from-mlflow {where}: neither MLflow's files nor an mlflow.db in it; name the folder mlruns, the "
            "database or the server's URI"
        )
    return path.resolve().as_uri()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets what the user has not set, for a while, in which MLflow's warnings about itself are not shown."""
    mine = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _runs(client: Any) -> Iterator[TrackedRun]:
    names = {e.experiment_id: e.name for e in _pages(client.search_experiments)}
    runs = list(_pages(partial(client.search_runs, sorted(names)))) if names else []
    for run in sorted(runs, key=lambda r: r.info.start_time or 0):
        yield _tracked(client, run, names[run.info.experiment_id])


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _tracked(client: Any, run: Any, experiment: str) -> TrackedRun:
    info, data = run.info, run.data
    name = info.run_name or info.run_id
    tags = {key: value for key, value in data.tags.items() if not key.startswith("mlflow.")}
    known = {"run": name, "status": info.status, "experiment": experiment}
    finished = info.status == "FINISHED"
    return TrackedRun(
        name=name,
        tags=tuple(data.metrics),
        read=partial(_history, client, info.run_id),
        facts={**tags, **data.params, **known},
        aliases=(info.run_id,),
        unfinished=None if finished else f"MLflow says {info.status}: it has not finished",
    )


def _history(client: Any, run_id: str, tag: str) -> Series:
    with _environment(PATIENCE | ALLOW_FILES):
        found = sorted(client.get_metric_history(run_id, tag), key=lambda metric: metric.timestamp)
    return make_series((metric.step, metric.value) for metric in found)
