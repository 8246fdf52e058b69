"""The noise scale of a run: what its measuring steps heard, on disk until their window gives a number.

    noise.jsonl      one line per measured update; a resume drops what lies past its checkpoint, as for metrics
    metrics.jsonl    one line of kind "noise" per window, written at the boundary where the window ends

The norms stay on the device until a log boundary. Where nothing is measured there is no hook.
"""

import contextlib
import json
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from homelab_scaling import codec
from homelab_scaling.batch.estimator import NoiseMeasurement, NoiseScale, noise_scale
from homelab_scaling.batch.noise import Cut, NoiseHook, choose_cut
from homelab_scaling.plan.counting import count_params
from homelab_scaling.plan.noise import SHARDED
from homelab_scaling.specs import RunSpec, ScienceSpec
from homelab_scaling.train.hooks import Line
from homelab_scaling.train.noise_windows import Window, run_windows, warmup_windows
from homelab_scaling.train.schedule import Phase
from homelab_scaling.train.session import sum_over_ranks

Windows = Callable[[Phase, int], tuple[Window, ...]]
"""Of a phase, with the full batch halved so often."""
MEASURED = ("k", "microbatch_seqs", "mean_sq_norm", "sq_norm_of_mean")


class NoiseLog:
    """Measurements of a run's own updates, window by window.

    Args:
        path: noise.jsonl.
        hook: on the model in training; None measures nothing.
        windows: which steps measure.
        is_main: the rank that writes. All ranks know all measurements.
    """

    def __init__(
        self, science: ScienceSpec, path: Path, *, hook: NoiseHook | None, windows: Windows, is_main: bool
    ) -> None:
        self.science, self.path, self.hook, self.windows_of, self.is_main = science, path, hook, windows, is_main
        self.phase: Phase | None = None
        self.windows: tuple[Window, ...] = ()
        self.lines: list[Line] = []
        """Measurements of the phase that no window has used up."""
        self._noted: list[Line] = []

    def enter(self, phase: Phase, halvings: int) -> None:
        """A phase begins or goes on, at this batch."""
        self.phase = phase
        self.windows = self.windows_of(phase, halvings) if self.hook is not None else ()
        self.lines = [line for line in self.lines if line["update"] >= phase.first_update]

    def measures(self, step: int) -> bool:
        """Whether the update(s) that take the model from `step` to the next are measured."""
        window = self._window(step)
        return window is not None and step in window.steps

    def ends_at(self, step: int) -> bool:
        """Whether a window ends when `step` steps are done."""
        window = self._window(step - 1)
        return window is not None and window.end_step == step

    def _window(self, step: int) -> Window | None:
        index = bisect_right(self.windows, step, key=lambda window: window.first_step) - 1
        return self.windows[index] if index >= 0 and step < self.windows[index].end_step else None

    def listening(self, *, n_passes: int, seqs_per_pass: int) -> contextlib.AbstractContextManager[None]:
        """Hears one update's backward passes."""
        assert self.hook is not None, "nothing is measured without a hook"
        return self.hook.listening(n_passes=n_passes, seqs_per_pass=seqs_per_pass)

    def note(self, norm: Tensor, *, update: int, step: int, batch_tokens: int) -> None:
        """Closes a measured update with the norm of its gradient before clipping; no host sync."""
        assert self.hook is not None
        self.hook.note(norm)
        self._noted.append({"update": update, "step": step, "batch_tokens": batch_tokens})

    def collect(self, steps: list[Line]) -> None:
        """Waits for the device: what was noted since the last time goes to disk.

        Args:
            steps: metrics of these steps, for their loss.
        """
        if self.hook is None or not self._noted:
            return
        noted, self._noted = self._noted, []
        losses = {line["update"]: line["loss"] for line in steps}
        measured = self.hook.drain()
        lines = [
            {**note, "loss": losses[note["update"]], **codec.to_plain(one)}
            for note, one in zip(noted, measured, strict=True)
        ]
        self.lines += lines
        if self.is_main:
            codec.append_jsonl(self.path, lines)

    def finish(self, step: int, update: int) -> Line | None:
        """The metrics line of the window that ends here; None where none does, or where not all of it was measured."""
        if self.phase is None or not self.ends_at(step):
            return None
        window = self._window(step - 1)
        assert window is not None
        own = [line for line in self.lines if line["step"] in window.steps]
        self.lines = [line for line in self.lines if line["step"] >= step]
        if {line["step"] for line in own} != set(window.steps) or len({line["batch_tokens"] for line in own}) > 1:
            return None  # the batch or the cadence changed on the way
        tokens = step * self.science.batch_tokens_global
        scale = scale_of(own, self.science, tokens_trained=tokens)
        low, high = scale.ci95_tokens or (None, None)
        return {
            "kind": "noise",
            "update": update,
            "phase": self.phase.name,
            "step": step,
            "tokens": tokens,
            "loss": scale.loss_nats,
            "batch_tokens": own[-1]["batch_tokens"],
            "noise_scale_tokens": scale.b_simple_tokens,
            "noise_low_tokens": low if scale.b_simple_tokens is not None else None,
            "noise_high_tokens": high,
            "noise_at_least_tokens": scale.at_least_tokens,
            "why": scale.why_no_number,
            "n_steps": scale.n_steps,
            "k": scale.k,
            "microbatch_seqs": scale.microbatch_seqs,
        }

    def take_up(self, update: int, wait: Callable[[], None]) -> None:
        """After a resume at `update`: the measurements before it, on every rank; those after it are made again."""
        self.lines = [line for line in codec.read_jsonl(self.path) if line["update"] < update]
        wait()
        if self.is_main and self.path.exists():
            # At once: a kill half-way through would leave windows that nothing can complete any more.
            codec.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def scale_of(lines: list[Line], science: ScienceSpec, *, tokens_trained: int, **more: Any) -> NoiseScale:
    """The noise scale of measured updates, as noise.jsonl has them."""
    return noise_scale(
        [NoiseMeasurement(**{name: line[name] for name in MEASURED}) for line in lines],
        context_tokens=science.shape.context_tokens,
        loss_nats=sum(line["loss"] for line in lines) / len(lines),
        tokens_trained=tokens_trained,
        n_params=count_params(science.shape, science.n_vocab).n_params,
        **more,
    )


def log_of_run(spec: RunSpec, path: Path, model: nn.Module, *, world_size: int, is_main: bool) -> NoiseLog:
    """What an ordinary run measures: its own cadence at full batch, and all that a batch warm-up needs.

    Raises:
        SpecError: it is to measure sharded parameters.
        DataError: it is to measure a batch of one sequence.
    """
    science, every = spec.science, spec.execution.noise_every_steps

    def windows(phase: Phase, halvings: int) -> tuple[Window, ...]:
        return warmup_windows(phase) if halvings else run_windows(science, phase, every)

    hook = None
    if every is not None or science.batch_warmup is not None:
        hook = NoiseHook(model, world_size=world_size, sum_over_ranks=sum_over_ranks)
        if every is not None:
            cut_of(spec, compiled=False)
    return NoiseLog(science, path, hook=hook, windows=windows, is_main=is_main)


def cut_of(spec: RunSpec, *, compiled: bool) -> Cut:
    """How a measuring update at full batch is cut."""
    execution = spec.execution
    return choose_cut(
        n_passes=execution.accumulation_steps(spec.science),
        world_size=execution.n_processes,
        seqs_per_pass=execution.microbatch_seqs_per_rank,
        compiled=compiled,
    )


def said_of(spec: RunSpec, *, compiled: bool) -> str:
    """What a segment measures, or why nothing, for its entry in events.jsonl."""
    every = spec.execution.noise_every_steps
    if every is not None:
        return f"every {every} updates, {cut_of(spec, compiled=compiled).words}"
    return f"off: {SHARDED}" if spec.execution.sharding != "none" else "off"
