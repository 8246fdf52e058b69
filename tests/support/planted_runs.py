"""Finished runs as trackers store them, without a training: a known law, in each tracker's own format."""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Curve = Sequence[tuple[int, float]]


def law(n_params: float, n_tokens: float) -> float:
    """Nats per token."""
    return 1.7 + 400 / n_params**0.34 + 410 / n_tokens**0.28


def plant_events(
    home: Path,
    curves: Mapping[str, Curve],
    *,
    texts: Mapping[str, str] | None = None,
    hparams: Mapping[str, object] | None = None,
    as_tensors: bool = False,
    suffix: str = "",
    wall_time: float = 1.0,
) -> Path:
    """An event file by TensorBoard's own writer; returns its path."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    def tensor(tag: str, value: object, plugin: str) -> Any:
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
        return Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(value))

    writer = EventFileWriter(str(home), filename_suffix=suffix)
    if hparams:
        writer.add_event(Event(wall_time=wall_time, summary=hparams_pb(dict(hparams))))
    for name, text in (texts or {}).items():
        value = tensor(f"{name}/text_summary", [text.encode()], "text")
        writer.add_event(Event(wall_time=wall_time, summary=Summary(value=[value])))
    for tag, curve in curves.items():
        for step, number in curve:
            value = tensor(tag, number, "scalars") if as_tensors else Summary.Value(tag=tag, simple_value=number)
            writer.add_event(Event(step=step, wall_time=wall_time, summary=Summary(value=[value])))
    writer.flush()
    writer.close()
    return max(home.glob(f"*tfevents*{suffix}"), key=lambda p: p.stat().st_mtime_ns)


def descent(n_params: float, n_tokens: float, *, n_steps: int = 100) -> tuple[Curve, Curve]:
    """The curves of loss and tokens of a run that ends on the law."""
    steps = [n_steps // 4, n_steps // 2, n_steps]
    tokens = [(s, n_tokens * s / n_steps) for s in steps]
    return [(s, law(n_params, d) + (0.0 if s == n_steps else 0.2)) for s, d in tokens], tokens


SIZES = ((1e6, 2e7), (2e6, 4e7), (4e6, 4e7), (8e6, 1.6e8), (1.6e7, 1.6e8))


def plant_ladder(top: Path) -> list[tuple[float, float]]:
    """Five runs with everything said: hyperparameters, a curve of tokens, the loss beside another one."""
    for index, (n_params, n_tokens) in enumerate(SIZES):
        loss, tokens = descent(n_params, n_tokens)
        curves = {"val/loss": loss, "train/loss": [(s, v - 0.1) for s, v in loss], "train/tokens": tokens}
        plant_events(top / f"run-{index}", curves, hparams={"n_params": n_params, "seed": index})
    return list(SIZES)


NANOGPT = {
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 8,
    "batch_size": 12,
    "block_size": 256,
    "n_head": 4,
    "bias": False,
    "max_iters": 400,
}
NANOGPT_SHAPES = ((2, 128), (3, 192), (4, 256))
"""(n_layer, n_embd) of three models."""


def nanogpt_config(n_layer: int, n_embd: int) -> dict[str, object]:
    """What nanoGPT's train.py gives wandb.init as config, as far as it matters."""
    return {**NANOGPT, "n_layer": n_layer, "n_embd": n_embd}


def nanogpt_rows(n_layer: int) -> list[dict[str, float]]:
    """What nanoGPT's train.py logs at each evaluation: without a step, so that W&B counts the calls."""
    return [
        {"iter": i, "train/loss": 4 - i / 200 - n_layer / 10, "val/loss": 4.1 - i / 200 - n_layer / 10, "lr": 1e-3}
        for i in range(0, 401, 100)
    ]


def plant_wandb(
    home: Path,
    run_id: str,
    config: Mapping[str, object],
    rows: Sequence[Mapping[str, object]],
    *,
    name: str = "",
    first_step: int = 0,
    began: int = 1_700_000_000,
    exit_code: int | None = 0,
) -> Path:
    """A .wandb file of these rows; returns its path."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record()]
    run = records[0].run
    run.run_id, run.display_name, run.project = run_id, name or run_id, "owt"
    run.start_time.seconds = began
    for key, value in config.items():
        item = run.config.update.add()
        item.key, item.value_json = key, json.dumps(value)
    for step, row in enumerate(rows, start=first_step):
        record = Record()
        record.history.step.num = step
        for key, value in {**row, "_step": step}.items():
            item = record.history.item.add()
            item.nested_key.append(key)
            item.value_json = json.dumps(value)
        records.append(record)
    if exit_code is not None:
        records.append(Record())
        records[-1].exit.exit_code = exit_code
        records[-1].exit.SetInParent()
    folder = home / f"offline-run-{began}-{run_id}"
    folder.mkdir(parents=True)
    path = folder / f"run-{run_id}.wandb"
    write_records(path, [record.SerializeToString() for record in records])
    return path


def write_records(path: Path, records: Sequence[bytes]) -> None:
    """A .wandb file, cut into pieces and blocks as LevelDB's log format wants them."""
    out = bytearray(struct.pack("<4sHB", b":W&B", 0xBEE1, 0))
    for record in records:
        rest, first = record, True
        while first or rest:
            left = 32768 - len(out) % 32768
            if left < 7:
                out += bytes(left)
                left = 32768
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            checksum = zlib.crc32(bytes([kind]) + piece)
            out += struct.pack("<IHB", checksum, len(piece), kind) + piece
            first = False
    path.write_bytes(bytes(out))
