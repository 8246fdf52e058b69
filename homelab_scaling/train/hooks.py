"""The few moments of a run that others listen to: metrics.jsonl, the progress bar (trackers: see there).

A hook sees plain numbers at log cadence and never touches the device. Hooks run on the main process only, in order.
"""

import sys
import time
from typing import Any

from homelab_scaling import codec
from homelab_scaling.runs import Row, RunFolder, RunRecord

Line = dict[str, Any]


class Hooks:
    """Every moment, doing nothing."""

    def start(self, kept: list[Line], tokens: int, about: str) -> None:
        """Before the first step; `kept` are the metrics that survive, `about` says in a line what begins."""

    def steps(self, lines: list[Line], rate: Line | None) -> None:
        """After a log interval: one line per step, and the interval's rates."""

    def validated(self, line: Line) -> None:
        """After a validation."""

    def noise(self, line: Line) -> None:
        """At the end of a window of measuring updates: the noise scale."""

    def row(self, row: Row) -> None:
        """After a row is recorded."""

    def finished(self, record: RunRecord) -> None:
        """After the last row."""

    def end(self) -> None:
        """Always, at the end."""


def surviving(lines: list[Line], update: int) -> list[Line]:
    """The metrics that a resume after `update` updates keeps: what lies past the checkpoint is computed again."""
    return [ln for ln in lines if ln["update"] < update or (ln["kind"] != "step" and ln["update"] == update)]


class MetricsFile(Hooks):
    """metrics.jsonl: each step once, whatever happened in between."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.metrics

    def start(self, kept: list[Line], tokens: int, about: str) -> None:
        import json

        codec.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def steps(self, lines: list[Line], rate: Line | None) -> None:
        codec.append_jsonl(self.path, [*lines, *([rate] if rate else [])])

    def validated(self, line: Line) -> None:
        codec.append_jsonl(self.path, [line])

    def noise(self, line: Line) -> None:
        codec.append_jsonl(self.path, [line])


class Progress(Hooks):
    """A bar on a terminal, a line a minute elsewhere: loss, tokens/s, MFU, time left."""

    EVERY_S = 60.0

    def __init__(self, run_id: str, total_tokens: int) -> None:
        self.run_id = run_id
        self.total = total_tokens
        self.done = 0
        self.last = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def start(self, kept: list[Line], tokens: int, about: str) -> None:
        self.done = tokens
        print(about, file=sys.stderr, flush=True)
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %  {task.fields[say]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(self.run_id, total=self.total, completed=tokens, say="")
        self.bar.start()

    def steps(self, lines: list[Line], rate: Line | None) -> None:
        if rate is None or not lines:
            return
        self.done += rate["interval_tokens"]
        loss = "not finite" if lines[-1]["loss"] is None else f"{lines[-1]['loss']:.3f}"
        mfu = f"  MFU {rate['mfu']:.0%}" if rate["mfu"] is not None else ""
        say = f"loss {loss}  {rate['tokens_per_s']:,.0f} tok/s{mfu}"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, say=say)
        elif time.monotonic() - self.last >= self.EVERY_S:
            self.last = time.monotonic()
            left = (self.total - self.done) / rate["tokens_per_s"] / 60
            print(
                f"{self.run_id}: {self.done / self.total:.0%}  {say}  about {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )

    def row(self, row: Row) -> None:
        se = f" +- {row.loss_se_nats:.4f}" if row.loss_se_nats is not None else ""
        self._print(f"{row.row_id}: validation loss {row.loss_nats:.4f}{se} nats/token")

    def finished(self, record: RunRecord) -> None:
        spent = {
            "training": record.seconds_train,
            "validation": record.seconds_validate,
            "checkpoints": record.seconds_checkpoint,
        }
        total = sum(s or 0.0 for s in spent.values())
        shares = ", ".join(f"{name} {(s or 0.0) / total:.0%}" for name, s in spent.items())
        self._print(f"{self.run_id}: finished in {total:.0f} s: {shares}")

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
