"""Tries settings for autotune.py, in a process of its own: one setting a line in, one trial a line out.

    python -m homelab_scaling.train.autotune_trials spec.json

Each trial is the trainer's own step on random tokens, with at most two micro-batches, so that a step of half a million
tokens takes no longer to judge than a small one.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.plan.memory import CARD_SHARE
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.train import oom
from homelab_scaling.train.findings import Setting, Trial
from homelab_scaling.train.rehearsal import LR, make_spec, rehearse, write_random_shards
from homelab_scaling.train.step import Stepper

TIMED_S = 1.0
"""Of steps, at least two and at most ten, whose median counts; two untimed ones come first."""


def trial_spec(spec: RunSpec, setting: Setting, shards: Path) -> RunSpec:
    """The run with this setting and a batch of at most two micro-batches."""
    science, execution = spec.science, spec.execution
    context, seqs = science.shape.context_tokens, setting.microbatch_seqs
    n_micro = min(2, science.batch_seqs_global // execution.n_processes // seqs)
    if not (shards / "manifest.json").exists():
        longest = max(64, 4 * science.batch_seqs_global // execution.n_processes)
        write_random_shards(shards, science.n_vocab, min(longest, 4096) * context + 1)
    return make_spec(
        science.shape,
        codec.read_json(shards / "manifest.json", CorpusManifest),
        shards=shards,
        batch_seqs=seqs * n_micro,
        precision=science.precision,
        optim=science.optim,
        execution=replace(
            execution,
            n_processes=1,
            microbatch_seqs_per_rank=seqs,
            compile="off" if setting.mode == "off" else "on",
            compile_mode="default" if setting.mode == "off" else setting.mode,
            loss=setting.loss,
            sharding="none",
            noise_every_steps=None,
            trackers=(),
        ),
    )


def try_setting(spec: RunSpec, setting: Setting, folder: Path) -> Trial:
    """How long a micro-batch and an update take; or why the setting is out."""
    forget()
    began = time.perf_counter()
    try:
        trial = _time(trial_spec(spec, setting, folder / "shards"), setting, folder, began)
    except (RuntimeError, HomelabError) as error:
        first_line = (str(error).splitlines() or ["no message"])[0]
        said = oom.complaint(error) if isinstance(error, RuntimeError) else first_line
        trial = out(setting, said or f"{type(error).__name__}: {first_line}")
    return trial


def out(setting: Setting, why: str) -> Trial:
    """A trial that ended badly."""
    return Trial(setting=setting, micro_s=None, update_s=None, first_s=None, peak_bytes=None, why_out=why)


def forget() -> None:
    """Leaves nothing of an earlier trial: compiled code, memory, peaks."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _time(spec: RunSpec, setting: Setting, folder: Path, began: float) -> Trial:
    stepper = rehearse(spec, folder)
    device = stepper.device
    _median_s(lambda: stepper.do_update(LR), device, at_most=1)
    first_s = time.perf_counter() - began
    stepper.do_update(LR)
    if stepper.execution.microbatch_seqs_per_rank != setting.microbatch_seqs:  # as a run would, it has made room
        return out(setting, "memory ran out")
    step_s = _median_s(lambda: stepper.do_update(LR), device)
    update_s = _median_s(lambda: _update_alone(stepper), device)
    peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        room = CARD_SHARE * torch.cuda.get_device_properties(device).total_memory
        if peak > room:
            return out(setting, f"holds {peak / 2**30:.1f} GiB, more than {CARD_SHARE:.0%} of the card")
    micro_s = max(step_s - update_s, 1e-9) / stepper.accumulation
    return Trial(setting=setting, micro_s=micro_s, update_s=update_s, first_s=first_s, peak_bytes=peak)


def _update_alone(stepper: Stepper) -> None:
    """Clipping and the optimizer on gradients of zero."""
    for p in stepper.optimizer.names:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    norm = stepper.optimizer.clip()
    stepper.optimizer.step(0.0, torch.isfinite(norm))


def _median_s(does: Callable[[], None], device: torch.device, at_most: int = 10) -> float:
    """Seconds of one call, the device's work included."""
    seconds: list[float] = []
    while len(seconds) < min(2, at_most) or (sum(seconds) < TIMED_S and len(seconds) < at_most):
        began = time.perf_counter()
        does()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main(path: str) -> None:
    """Answers settings until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    spec = codec.read_json(Path(path), RunSpec)
    for line in sys.stdin:
        setting = codec.from_plain(json.loads(line), Setting, "a setting")
        trial = try_setting(spec, setting, Path(path).parent)
        print(json.dumps(codec.to_plain(trial)), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
