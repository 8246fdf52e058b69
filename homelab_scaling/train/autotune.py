"""Which micro-batch, compile mode and loss path are fastest here: tried for a minute, remembered for this machine.

`homelab run --autotune` asks before the first rung of each shape. The trials run in a process of its own
(autotune_trials.py), one after the other: the stated rule's choice first, then one setting at a time is changed and
kept if it pays. A trial that runs out of memory, or dies, is out. What was found lies in the user's cache folder, one
readable file for each shape, vocabulary, batch, precision, device and version of torch.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.box import Box, cpu_name, missing_for_compile
from homelab_scaling.plan.memory import (
    MAX_MICROBATCH_TOKENS_CPU,
    MAX_MICROBATCH_TOKENS_GPU,
    LossPath,
    choose_loss_path,
)
from homelab_scaling.specs import ExecutionSpec, RunSpec
from homelab_scaling.train.findings import Finding, Key, Mode, Setting, Trial, cache_file, cache_folder, read_finding

BUDGET_S = 60.0
"""No trial is begun after this; the one under way may take as long again."""

# ------------------------------------------------------------------------------------------------------- what to try


def key_of(spec: RunSpec, box: Box, *, fixed_microbatch: bool = False) -> Key:
    """What a finding for this run holds for."""
    from importlib.metadata import version

    science, execution = spec.science, spec.execution
    held = {
        f"microbatch {execution.microbatch_seqs_per_rank}": fixed_microbatch,
        f"compile {execution.compile}": execution.compile != "auto",
        f"loss {execution.loss}": execution.loss != "auto",
        "no CUDA graphs": not _may_replay(execution),
    }
    on_gpu = box.on_gpu and execution.device != "cpu"
    return Key(
        shape=science.shape,
        n_vocab=science.n_vocab,
        seqs_per_rank=science.batch_seqs_global // execution.n_processes,
        precision=science.precision,
        optimizer=science.optim.name,
        recompute=execution.activation_checkpointing,
        device=box.device if on_gpu else cpu_name(),
        n_threads=None if on_gpu else max(1, box.n_cores // execution.n_processes),
        torch=version("torch"),
        held=tuple(what for what, is_held in held.items() if is_held),
    )


def _may_replay(execution: ExecutionSpec) -> bool:
    """Whether CUDA graphs are to be thought of: not under DDP or FSDP, whose hooks act in the middle of a pass."""
    return execution.sharding == "none" and execution.n_processes == 1


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings that may be tried."""

    first: Setting
    """The stated rule's."""
    microbatches: tuple[int, ...]
    """Ascending."""
    modes: tuple[Mode, ...]
    losses: tuple[LossPath, ...]


def space_of(spec: RunSpec, box: Box, *, fixed_microbatch: bool = False) -> Space:
    """What may be tried for a run; what its ladder or a flag has settled stays as it is."""
    science, execution = spec.science, spec.execution
    on_gpu = box.on_gpu and execution.device != "cpu"
    context, planned = science.shape.context_tokens, execution.microbatch_seqs_per_rank
    seqs = science.batch_seqs_global // execution.n_processes
    most = (MAX_MICROBATCH_TOKENS_GPU if on_gpu else MAX_MICROBATCH_TOKENS_CPU) * 2 // context
    sizes = [s for s in range(1, seqs + 1) if seqs % s == 0 and (s <= max(most, planned))]
    modes: tuple[Mode, ...] = ("off", "default", "reduce-overhead") if on_gpu else ("off", "default")
    if missing_for_compile() or execution.compile == "off":
        modes = ("off",)
    elif execution.compile == "on":
        modes = tuple(mode for mode in modes if mode != "off")
    if not _may_replay(execution):
        modes = tuple(mode for mode in modes if mode != "reduce-overhead")
    rule = choose_loss_path(planned * context, science.n_vocab, on_gpu=on_gpu)
    loss: LossPath = rule if execution.loss == "auto" else execution.loss
    other: LossPath = "plain" if loss == "chunked" else "chunked"
    return Space(
        first=Setting(microbatch_seqs=planned, mode="default" if "default" in modes else modes[0], loss=loss),
        microbatches=(planned,) if fixed_microbatch else tuple(sizes),
        modes=modes,
        losses=(loss, other) if execution.loss == "auto" else (loss,),
    )


Measure = Callable[[Setting], Trial | None]
"""None where there is no time left."""


def search(space: Space, seqs_per_rank: int, measure: Measure) -> tuple[Trial, ...]:
    """Trials by changing one thing at a time and keeping what pays; the stated rule's choice is the first."""
    trials: dict[Setting, Trial] = {}

    def step_s(setting: Setting) -> float | None:
        """None where it is out, or there is no time."""
        if setting not in trials:
            trial = measure(setting)
            if trial is None:
                return None
            trials[setting] = trial
        trial = trials[setting]
        if trial.micro_s is None or trial.update_s is None:
            return None
        return seqs_per_rank / setting.microbatch_seqs * trial.micro_s + trial.update_s

    best, best_s = space.first, step_s(space.first)

    def better(setting: Setting) -> bool:
        nonlocal best, best_s
        seconds = step_s(setting)
        if seconds is None or (best_s is not None and seconds >= best_s):
            return False
        best, best_s = setting, seconds
        return True

    before = None
    while best != before:  # what one choice is worth may depend on another; nothing is measured twice
        before = best
        for mode in space.modes:
            better(replace(best, mode=mode))
        for loss in space.losses:
            better(replace(best, loss=loss))
        at = space.microbatches.index(best.microbatch_seqs)
        for size in space.microbatches[at + 1 :]:
            if not better(replace(best, microbatch_seqs=size)):
                break
        for size in reversed(space.microbatches[:at]):
            if best.microbatch_seqs > space.microbatches[at]:
                break
            if not better(replace(best, microbatch_seqs=size)) and best_s is not None:
                break
    return tuple(trials.values())


# ------------------------------------------------------------------------------------------------------- doing it


class Rehearser:
    """The process that tries settings; a new one is started when one has died."""

    def __init__(self, spec: RunSpec, folder: Path, n_threads: int | None) -> None:
        self.folder, self.n_threads = folder, n_threads
        self.job = folder / "spec.json"
        codec.write_json(self.job, spec)
        self.process: subprocess.Popen[str] | None = None

    def try_setting(self, setting: Setting, limit_s: float) -> Trial:
        """The trial, out if its process says so, dies or takes longer than `limit_s`."""
        process = self.process if self.process is not None and self.process.poll() is None else self._start()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(codec.to_plain(setting)), file=process.stdin, flush=True)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(limit_s) else None
        if line:
            return codec.from_plain(json.loads(line), Trial, "a trial")
        why = f"took longer than {limit_s:.0f} s" if line is None else f"its process died ({self._last_words()})"
        self.end()
        return Trial(setting=setting, micro_s=None, update_s=None, first_s=None, peak_bytes=None, why_out=why)

    def _start(self) -> "subprocess.Popen[str]":
        self.end()
        threads = {} if self.n_threads is None else {"OMP_NUM_THREADS": str(self.n_threads)}
        with (self.folder / "errors.txt").open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "homelab_scaling.train.autotune_trials", str(self.job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # as `homelab run` launches its ranks: threads that spin long lose a busy box's time
                env={"GOMP_SPINCOUNT": "10000", **os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
            )
        return self.process

    def _last_words(self) -> str:
        assert self.process is not None
        code = self.process.wait()
        said = [line for line in (self.folder / "errors.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
        return f"signal {-code}" if code < 0 else said[-1] if said else f"exit code {code}"

    def end(self) -> None:
        """Ends the process, if there is one."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.process = None


@contextlib.contextmanager
def rehearsing(spec: RunSpec, n_threads: int | None) -> Iterator[Rehearser]:
    """A rehearser with a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="homelab-autotune-") as folder:
        rehearser = Rehearser(spec, Path(folder), n_threads)
        try:
            yield rehearser
        finally:
            rehearser.end()


def autotune(
    spec: RunSpec,
    box: Box,
    say: Callable[[str], None],
    *,
    folder: Path | None = None,
    budget_s: float = BUDGET_S,
    fixed_microbatch: bool = False,
) -> Finding:
    """What is known of this run's settings on this machine, measured now unless it was before.

    Args:
        folder: of the cache; None takes the user's.
        budget_s: no trial is begun after so long.
        fixed_microbatch: keep the plan's micro-batch.
    """
    key, folder = key_of(spec, box, fixed_microbatch=fixed_microbatch), folder or cache_folder()
    known = read_finding(key, folder, say)
    if known is not None:
        return known
    shape = key.shape
    say(f"autotune: L{shape.n_layer} d{shape.d_model}, {key.seqs_per_rank} sequences a step, about {budget_s:.0f} s")
    began = time.monotonic()
    with rehearsing(spec, key.n_threads) as rehearser:

        def measure(setting: Setting) -> Trial | None:
            spent = time.monotonic() - began
            if spent > budget_s and setting != space.first:
                return None
            trial = rehearser.try_setting(setting, max(2 * budget_s - spent, budget_s))
            found = trial.why_out or f"{_rate(trial, key):,.0f} tokens/s"
            say(f"autotune:   {setting}: {found}")
            return trial

        space = space_of(spec, box, fixed_microbatch=fixed_microbatch)
        trials = search(space, key.seqs_per_rank, measure)
    finding = Finding(key=key, trials=trials, seconds=time.monotonic() - began)
    if any(trial.micro_s is not None for trial in trials):
        folder.mkdir(parents=True, exist_ok=True)
        codec.write_json(cache_file(key, folder), finding)
    return finding


def _rate(trial: Trial, key: Key) -> float:
    step_s = Finding(key=key, trials=(trial,), seconds=0.0).step_s(trial)
    return key.seqs_per_rank * key.shape.context_tokens / step_s if step_s else 0.0


def tuned_execution(spec: RunSpec, finding: Finding) -> ExecutionSpec:
    """The run's execution settings with the best of what was tried; as they were where nothing worked."""
    science, execution = spec.science, spec.execution
    n_steps = science.horizons_tokens[-1] // science.batch_tokens_global
    best = finding.best(n_steps)
    if best is None:
        return execution
    setting = best.setting
    changed: dict[str, Any] = {
        "microbatch_seqs_per_rank": setting.microbatch_seqs,
        "compile": "off" if setting.mode == "off" else "on",
        "compile_mode": "default" if setting.mode == "off" else setting.mode,
        "loss": setting.loss,
    }
    return replace(execution, **changed)


class Tuner:
    """Tunes the specs of a ladder, each shape once.

    Args:
        fixed_microbatch: the ladder states its own micro-batch.
    """

    def __init__(self, box: Box, say: Callable[[str], None], *, fixed_microbatch: bool, folder: Path | None = None):
        self.box, self.say, self.fixed_microbatch, self.folder = box, say, fixed_microbatch, folder
        self.known: dict[Key, Finding] = {}

    def __call__(self, spec: RunSpec) -> RunSpec:
        """The spec with the settings that are fastest here; its science is untouched."""
        key = key_of(spec, self.box, fixed_microbatch=self.fixed_microbatch)
        if key not in self.known:
            self.known[key] = autotune(
                spec, self.box, self.say, folder=self.folder, fixed_microbatch=self.fixed_microbatch
            )
        return replace(spec, execution=tuned_execution(spec, self.known[key]))
