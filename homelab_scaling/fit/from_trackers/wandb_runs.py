"""Runs of Weights & Biases: folders it wrote on this machine, or a project on its server."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from homelab_scaling.errors import DataError, MachineError
from homelab_scaling.fit.from_trackers.tracked import Series, TrackedRun, flatten, make_series, why_silent
from homelab_scaling.fit.from_trackers.wandb_file import read_records

PROJECT = re.compile(r"[\w.-]+/[\w. -]+")
SERVER = "https://api.wandb.ai"
TIMEOUT_S = 30
INTERNAL = "_"
"""First character of the names W&B keeps for itself."""


def read_wandb(where: str) -> list[TrackedRun]:
    """Every run of a folder that W&B wrote (`wandb`, or any above it), or of ENTITY/PROJECT on its server.

    Raises:
        DataError: no such folder or project, no runs in it, or the server does not answer.
        MachineError: W&B's package is not installed.
    """
    if Path(where).is_dir():
        files = sorted({p.resolve() for p in Path(where).rglob("run-*.wandb")})
        if not files:
            raise DataError(
                f"--from-wandb {where}: no run-*.wandb in this folder; name the folder `wandb` beside the training, or "
                "ENTITY/PROJECT"
            )
        return _offline(files)
    if not PROJECT.fullmatch(where):
        raise DataError(f"--from-wandb {where}: no such folder, and no ENTITY/PROJECT; give one of the two")
    return _online(where)


def _package() -> Any:
    try:
        import wandb
    except ImportError:
        raise MachineError("--from-wandb needs W&B's package; pip install 'homelab_scaling[wandb]'") from None
    return wandb


# -------------------------------------------------------------------------------------------------------------- folders


@dataclass
class _Segment:
    """One .wandb file: what one process logged of a run."""

    path: Path
    run_id: str = ""
    name: str = ""
    project: str = ""
    began: float = 0.0
    config: dict[str, object] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    exit_code: int | None = None
    broken: str | None = None


def _offline(files: list[Path]) -> list[TrackedRun]:
    _package()
    by_run: dict[str, list[_Segment]] = {}
    for segment in sorted(map(_read_segment, files), key=lambda s: s.began):
        by_run.setdefault(segment.run_id or segment.path.stem, []).append(segment)
    return [_joined(run_id, segments) for run_id, segments in by_run.items()]


def _joined(run_id: str, segments: list[_Segment]) -> TrackedRun:
    """A run that was resumed wrote several files; the later ones hold where they overlap."""
    whole = [s for s in segments if s.broken is None]
    last = (whole or segments)[-1]
    pairs: dict[str, list[tuple[int, float]]] = {}
    facts: dict[str, object] = {}
    for segment in whole:
        facts |= segment.config
        for tag, points in segment.curves.items():
            pairs.setdefault(tag, []).extend(points)
    curves = {tag: make_series(points) for tag, points in pairs.items()}
    name = last.name or run_id
    ended = "finished" if last.exit_code == 0 else "crashed" if last.exit_code else "running"
    return TrackedRun(
        name=name,
        tags=tuple(curves),
        read=curves.__getitem__,
        facts={**facts, "run": name, "project": last.project, "status": ended},
        aliases=(run_id,),
        broken=None if whole else last.broken,
        unfinished=None if ended == "finished" else f"W&B's file says {_OFFLINE[ended]}: it has not finished",
    )


_OFFLINE = {"crashed": "that it ended in error", "running": "nothing of its end"}


def _read_segment(path: Path) -> _Segment:
    """Everything up to the end, or to the first damage, which is where a killed process stopped writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    segment = _Segment(path=path)
    try:
        for data in read_records(path):
            _take(segment, Record.FromString(data))
    except Exception as error:  # protocol buffers have many ways to be broken
        segment.broken = f"{path.name} cannot be read ({type(error).__name__})"
    if not segment.run_id and segment.broken is None:
        segment.broken = f"{path.name} ends before it says which run it is"
    return segment


def _take(segment: _Segment, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        segment.run_id, segment.name, segment.project = run.run_id, run.display_name, run.project
        segment.began = run.start_time.seconds + run.start_time.nanos / 1e9
        segment.config |= _values(run.config.update)
    elif kind == "config":
        segment.config |= _values(record.config.update)
    elif kind == "history":
        values = _values(record.history.item)
        step = values.get("_step", record.history.step.num)
        for tag, value in _numbers(values):
            segment.curves.setdefault(tag, []).append((int(step), value))  # type: ignore[call-overload]
    elif kind == "exit":
        segment.exit_code = record.exit.exit_code


def _values(items: Any) -> dict[str, object]:
    nested = {item.key or ".".join(item.nested_key): _loads(item.value_json) for item in items}
    return flatten({key: value for key, value in nested.items() if not key.startswith("_wandb")})


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _numbers(values: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """What can be a curve; W&B writes what JSON lacks as text."""
    odd = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
    for tag, value in values.items():
        if tag.startswith(INTERNAL) or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield tag, float(value)
        elif isinstance(value, str) and value in odd:
            yield tag, odd[value]


# --------------------------------------------------------------------------------------------------------------- server


def _online(project: str) -> list[TrackedRun]:
    server = os.environ.get("WANDB_BASE_URL", SERVER)
    if why := why_silent(server):
        raise DataError(
            f"--from-wandb {project}: no such folder here, and {server} does not answer ({why}); check the network, or "
            "name a folder of offline runs"
        )
    wandb = _package()
    if not (os.environ.get("WANDB_API_KEY") or _key_in_netrc(server)):
        raise DataError(f"--from-wandb {project}: no such folder here, and no API key for {server}; run `wandb login`")
    try:
        with contextlib.redirect_stdout(None):
            found = [_remote(run) for run in wandb.Api(timeout=TIMEOUT_S).runs(project, order="+created_at")]
    except Exception as error:  # ValueError, CommError and requests' own, by version
        said = str(error).strip().splitlines()
        raise DataError(
            f"--from-wandb {project}: W&B refuses ({said[0][:200] if said else type(error).__name__}); check the "
            "project's name and `wandb login`"
        ) from None
    if not found:
        raise DataError(f"--from-wandb {project}: a project without runs; name the one your training logged to")
    return found


def _key_in_netrc(server: str) -> bool:
    import netrc
    from urllib.parse import urlparse

    try:
        return netrc.netrc().authenticators(urlparse(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _remote(run: Any) -> TrackedRun:
    last = dict(_numbers(flatten(dict(run.summary))))
    return TrackedRun(
        name=run.name,
        tags=tuple(last),
        read=partial(_scan, run),
        facts={**flatten(run.config), "run": run.name, "project": run.project, "status": run.state},
        aliases=(run.id,),
        unfinished=None if run.state == "finished" else f"W&B says {run.state}: it has not finished",
    )


def _scan(run: Any, tag: str) -> Series:
    """Every logged value; `history()` alone would be a sample of 500."""
    rows = run.scan_history(keys=[tag, "_step"])
    return make_series((int(row["_step"]), value) for row in rows for _tag, value in _numbers({tag: row.get(tag)}))
