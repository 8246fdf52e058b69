"""A training that goes on for as long as somebody measures it: one rung's own step, in a scratch folder."""

import shutil
from dataclasses import replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import ModelShape, RunSpec, make_run_id
from homelab_scaling.sweep.launch import launch_command
from homelab_scaling.sweep.prepare import ensure_corpus, make_plan, open_experiment

ENDLESS_STEPS = 100_000_000
OWN_SHAPE = ModelShape(n_layer=8, d_model=512, n_head=8, context_tokens=512)
"""Without a rung: 25M parameters, which keep any card busy and fit every one."""
OWN_BATCH_SEQS, OWN_MICROBATCH_SEQS = 64, 16


def endless_step(ladder: str, rung: str | None, labs: Path, scratch: Path) -> tuple[list[str], Path]:
    """The launch line of a training without end, and the metrics.jsonl that it writes.

    Args:
        ladder: a ladder file or a shipped one's name; its shards are built if they are not there.
        rung: whose step; None takes a built-in 25M one on the ladder's text.
        labs: the folder that holds the labs.
        scratch: emptied, and then the run's folder.

    Raises:
        SpecError: no such rung.
    """
    experiment = open_experiment(ladder, labs)
    corpus = ensure_corpus(experiment)
    runs = make_plan(experiment, corpus).runs
    chosen = [spec for spec in runs if rung in (None, spec.rung)]
    if not chosen:
        names = ", ".join(dict.fromkeys(spec.rung for spec in runs))
        raise SpecError(f"{experiment.ladder_file.name} has no rung {rung!r}; its rungs are {names}")
    spec = without_end(chosen[0], shards=experiment.shards, own=rung is None)
    shutil.rmtree(scratch, ignore_errors=True)
    folder = RunFolder(scratch.resolve())
    codec.write_json(folder.spec, spec)
    return launch_command(spec, folder, experiment.box), folder.metrics


def without_end(spec: RunSpec, *, shards: Path, own: bool) -> RunSpec:
    """The same step, for ever: no horizon in sight, no checkpoint, no validation.

    Args:
        own: replace shape and batch by the built-in ones.
    """
    science, execution = replace(spec.science, batch_warmup=None), spec.execution
    if own:
        ranks = execution.n_processes
        science = replace(
            science, shape=OWN_SHAPE, batch_tokens_global=ranks * OWN_BATCH_SEQS * OWN_SHAPE.context_tokens
        )
        execution = replace(execution, microbatch_seqs_per_rank=OWN_MICROBATCH_SEQS)
    batch = science.batch_tokens_global
    schedule = replace(science.schedule, name="wsd", warmup_tokens=10 * batch)
    science = replace(science, schedule=schedule, horizons_tokens=(ENDLESS_STEPS * batch,))
    execution = replace(
        execution,
        log_every_steps=5,
        checkpoint_every_s=1e9,
        checkpoint_every_steps=None,
        curve_every_tokens=None,
        noise_every_steps=None,
        trackers=(),
        predicted_s=None,
    )
    return replace(
        spec,
        run_id=make_run_id(spec.rung, science),
        science=science,
        execution=execution,
        shards=str(shards.resolve()),
    )
