"""The report's figures and fitted numbers as TensorBoard events, through TensorBoard's own writer (no torch)."""

import struct
from collections.abc import Sequence
from pathlib import Path

from homelab_scaling.report.collect import LabView
from homelab_scaling.report.figures import Picture


def write_summaries(folder: Path, view: LabView, pictures: Sequence[Picture]) -> Path:
    """Replaces the events under `folder`/report with these figures and the fit's numbers, and returns that folder."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    target = folder / "report"
    for stale in target.glob("events.out.tfevents.*"):
        stale.unlink()
    values = []
    for picture in pictures:
        width, height = png_size(picture.light_png)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.light_png)
        values.append(Summary.Value(tag=f"report/{picture.name}", image=image))
    for tag, number in scalars(view).items():
        values.append(Summary.Value(tag=tag, simple_value=number))
    writer = EventFileWriter(str(target))
    writer.add_event(Event(step=0, wall_time=1.0, summary=Summary(value=values)))
    writer.flush()
    writer.close()
    return target


def scalars(view: LabView) -> dict[str, float]:
    """Tag -> number for every pinned parameter and derived quantity of the main fits, and for each rung's batch."""
    found: dict[str, float] = {}
    for rung in view.batches.rungs:
        found[f"batch/{rung.rung}/batch_tokens"] = rung.batch_tokens
        for name, estimate in (("b_simple_tokens", rung.b_simple), ("b_crit_tokens", rung.b_crit)):
            if estimate is not None:
                found[f"batch/{rung.rung}/{name}"] = estimate.value
    for fit in view.fit.fits if view.fit else ():
        for name, one in {**fit.parameters, **fit.derived}.items():
            if one.value is not None:
                found.setdefault(f"fit/{fit.law}/{name}", one.value)
    return found


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    width, height = struct.unpack(">II", png[16:24])
    return int(width), int(height)
