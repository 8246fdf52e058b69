"""The "oom" events of a run: who ran out of memory, and with which micro-batch it goes on. Imports no torch."""

from dataclasses import replace
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError, RunFailed, Stopped
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec


class OutOfMemory(Stopped):
    """No room for the micro-batch; the same command goes on with a smaller one."""


class NoRoom(RunFailed):
    """No room for a single sequence."""


def smaller(microbatch: int) -> int | None:
    """The largest divisor of a micro-batch that is at most half of it; None below 1."""
    return next((m for m in range(microbatch // 2, 0, -1) if microbatch % m == 0), None)


def with_microbatch(spec: RunSpec, microbatch: int) -> RunSpec:
    """The same run with another micro-batch."""
    return replace(spec, execution=replace(spec.execution, microbatch_seqs_per_rank=microbatch))


def keep_smaller(spec: RunSpec, folder: RunFolder) -> RunSpec:
    """The spec with at most the micro-batch that this run came down to on as many processes, if it ever ran out."""
    microbatch, ranks = spec.execution.microbatch_seqs_per_rank, spec.execution.n_processes
    came_down_to = [n["next"] for n in _notes(folder) if n["next"] is not None and n["n_processes"] == ranks]
    return with_microbatch(spec, min((m for m in came_down_to if microbatch % m == 0), default=microbatch))


def write_note(spec: RunSpec, folder: RunFolder, *, update: int, step: int, said: str) -> dict[str, Any]:
    """Notes the smaller micro-batch in spec.json, and returns the fields of the "oom" event to write."""
    execution = spec.execution
    following = smaller(execution.microbatch_seqs_per_rank)
    on_disk = folder.read_spec()
    if following is not None and on_disk.execution.n_processes == execution.n_processes:
        codec.write_json(folder.spec, with_microbatch(on_disk, following))
    return {
        "update": update,
        "step": step,
        "n_processes": execution.n_processes,
        "microbatch_seqs_per_rank": execution.microbatch_seqs_per_rank,
        "next": following,
        "said": said,
    }


def error_of(note: dict[str, Any]) -> HomelabError:
    """What a rank raises that cannot go on in place."""
    if note["next"] is None:
        return NoRoom(
            f"out of memory at step {note['step']} with one sequence a micro-batch; shorten context_tokens, narrow the "
            'model, use [optim] name = "adamw8bit" or free the card of other programs'
        )
    return OutOfMemory(f"out of memory at step {note['step']}: relaunch with micro-batch {note['next']}")


def end_of_segment(folder: RunFolder) -> HomelabError | None:
    """What ended the last segment, if one of its ranks noted that it ran out of memory."""
    notes = _notes(folder, of_last_segment=True)
    return error_of(notes[-1]) if notes else None


def _notes(folder: RunFolder, *, of_last_segment: bool = False) -> list[dict[str, Any]]:
    events = codec.read_jsonl(folder.events)
    if of_last_segment:
        last = max((i for i, e in enumerate(events) if e["kind"] == "segment"), default=-1)
        events = events[last + 1 :]
    return [e for e in events if e["kind"] == "oom"]
