"""Runs in a folder of TensorBoard event files, through TensorBoard's own reader."""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.fit.from_trackers.tracked import Series, TrackedRun, flatten, make_series
from homelab_scaling.plan.describe import describe_run
from homelab_scaling.specs import RunSpec

MARK = "tfevents"
KEEP_ALL = {"scalars": 0, "tensors": 0, "images": 1, "audio": 1, "histograms": 1, "compressedHistograms": 1}
OURS = re.compile(r"(.+)/tensorboard/[^/]+")
"""Where our own runs keep their events: RUN_ID/tensorboard/LADDER."""


def read_tensorboard(folder: Path) -> list[TrackedRun]:
    """Every folder of event files under `folder`, each one run, in name order.

    Hyperparameters that lie in a folder of their own below a run, as torch's add_hparams writes them, go to that run.

    Raises:
        DataError: no such folder, or no event files in it.
    """
    if folder.is_file():
        raise DataError(f"--from-tensorboard {folder}: a file; name the folder that it lies in")
    if not folder.is_dir():
        raise DataError(f"--from-tensorboard {folder}: no such folder; name the one you give to tensorboard --logdir")
    homes = sorted({p.parent for p in folder.rglob(f"*{MARK}*") if p.is_file()})
    if not homes:
        raise DataError(
            f"--from-tensorboard {folder}: no event files (*{MARK}*) in it; name the folder you give to tensorboard "
            "--logdir"
        )
    found = {home: _read_home(home, folder) for home in homes}
    for home in homes:
        above = found.get(home.parent)
        if above is not None and found[home].broken is None and _only_hparams(found[home]):
            found[home.parent] = _with_facts(above, found.pop(home).facts)
    return list(found.values())


def _read_home(home: Path, top: Path) -> TrackedRun:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = home.relative_to(top).as_posix()
    plain = home.resolve().name if plain == "." else plain
    match = OURS.fullmatch(plain)
    name = match[1].removeprefix("runs/") if match else plain
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(home), size_guidance=KEEP_ALL)
    try:
        events.Reload()
        curves = dict(_curves(events))
        facts = _facts(events)
    except Exception as error:  # its protocol buffers have many ways to be broken
        return TrackedRun(
            name=name,
            tags=(),
            read=lambda tag: make_series(()),
            facts={"run": name},
            broken=f"its event files cannot be read ({type(error).__name__})",
        )
    if match:
        facts = {**_spec_beside(home), **facts}
        name = str(facts.get("run_id", name))
    return TrackedRun(
        name=name,
        tags=tuple(curves),
        read=curves.__getitem__,
        facts={**facts, "run": name},
        aliases=tuple(dict.fromkeys(other for other in (plain, home.resolve().name) if other != name)),
    )


def _spec_beside(home: Path) -> dict[str, object]:
    """What the run's spec.json says: runs from before trackers were told have no hyperparameters."""
    try:
        return dict(describe_run(codec.read_json(home.parent.parent / "spec.json", RunSpec)))
    except SpecError:
        return {}


def _curves(events: Any) -> Iterator[tuple[str, Series]]:
    """Scalars as torch writes them, and as TensorFlow 2 and JAX do (tensors of rank 0)."""
    from tensorboard.util.tensor_util import make_ndarray

    tags = events.Tags()
    for tag in tags["scalars"]:
        yield tag, make_series((e.step, e.value) for e in _by_time(events.Scalars(tag)))
    for tag in tags["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            pairs = ((e.step, make_ndarray(e.tensor_proto).item()) for e in _by_time(events.Tensors(tag)))
            yield tag, make_series(pairs)


def _by_time(events: list[Any]) -> list[Any]:
    return sorted(events, key=lambda event: event.wall_time)


def _facts(events: Any) -> dict[str, object]:
    """Hyperparameters of the HParams plugin, and texts that hold a JSON object (as Hugging Face's Trainer writes)."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    facts: dict[str, object] = {}
    for tag in events.Tags()["tensors"]:
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "text":
            for text in make_ndarray(events.Tensors(tag)[-1].tensor_proto).ravel().tolist():
                facts |= _json_object(text)
    try:
        sessions = events.PluginTagToContent("hparams").values()
    except KeyError:
        sessions = ()
    for content in sessions:
        for name, value in HParamsPluginData.FromString(content).session_start_info.hparams.items():
            kind = value.WhichOneof("kind")
            held = getattr(value, kind) if kind else None
            facts[name] = None if isinstance(held, float) and math.isnan(held) else held
    return facts


def _json_object(text: object) -> dict[str, object]:
    plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    start, end = plain.find("{"), plain.rfind("}")
    if start < 0 or end < start:
        return {}
    try:
        found = json.loads(plain[start : end + 1])
    except ValueError:
        return {}
    return flatten(found) if isinstance(found, dict) else {}


def _only_hparams(run: TrackedRun) -> bool:
    return len(run.facts) > 1 and all(tag.startswith("hparam") for tag in run.tags)


def _with_facts(run: TrackedRun, facts: Mapping[str, object]) -> TrackedRun:
    import dataclasses

    return dataclasses.replace(run, facts={**facts, **run.facts})
