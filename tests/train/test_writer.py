"""Checkpoints beside the training: no waiting for a slow disk, word of a full one, one lost where it was killed."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_run import StopAt, in_own_process, steps_of, train_here

from homelab_scaling import codec
from homelab_scaling.errors import CheckpointError, Stopped
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.train import checkpoint as ckpt
from homelab_scaling.train.hooks import Hooks
from homelab_scaling.train.writer import HostCopies, Writer

# ------ the thread


def test_one_piece_at_a_time_and_in_order() -> None:
    writer, done, running = Writer(), [], threading.Semaphore(1)

    def piece(n: int) -> None:
        assert running.acquire(blocking=False), "two at once"
        time.sleep(0.02)
        done.append(n)
        running.release()

    for n in range(4):
        writer.submit(lambda n=n: piece(n))
    assert writer.busy
    writer.wait()
    assert done == [0, 1, 2, 3] and not writer.busy
    assert writer.background_s >= 4 * 0.02


def test_an_error_comes_out_once_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise CheckpointError("the disk is full")

    writer, done = Writer(), []
    writer.submit(fail)
    with pytest.raises(CheckpointError, match="full"):
        writer.wait()
    writer.wait()
    writer.submit(fail)
    with pytest.raises(CheckpointError):
        writer.submit(lambda: done.append(1))
    assert done == [], "nothing is begun after a failure"
    writer.submit(fail)
    while writer.busy:
        time.sleep(0.001)
    with pytest.raises(CheckpointError):
        writer.check()


def test_a_check_does_not_wait() -> None:
    writer, release = Writer(), threading.Event()
    writer.submit(release.wait)
    writer.check()
    assert writer.busy
    release.set()
    writer.wait()


def test_copies_do_not_follow_the_original_and_keep_their_memory() -> None:
    copies, weight = HostCopies(), torch.arange(6.0)
    first = copies.take("w", weight)
    copies.finish()
    weight += 1
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    second = copies.take("w", weight)
    assert second.data_ptr() == first.data_ptr() and second.tolist() == weight.tolist()
    assert copies.take("w", torch.zeros(2)).shape == (2,)


# ------ a run


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every checkpoint takes 0.2 s longer; the seconds that each took."""
    took: list[float] = []
    save = ckpt.save

    def slowly(*args: Any, **kwargs: Any) -> ckpt.Checkpoint:
        began = time.monotonic()
        time.sleep(0.2)
        found = save(*args, **kwargs)
        took.append(time.monotonic() - began)
        return found

    monkeypatch.setattr(ckpt, "save", slowly)
    return took


class SlowSteps(Hooks):
    """A training that leaves a slow disk the time it needs."""

    def steps(self, lines: list[dict[str, Any]], rate: dict[str, Any] | None) -> None:
        time.sleep(0.15)


def test_a_slow_disk_is_not_waited_for_and_changes_nothing(make_run, slow_disk: list[float]) -> None:
    spec, folder = make_run(horizons=(40,), checkpoint_every_steps=8)
    record = train_here(spec, folder, [SlowSteps()])
    assert record.status == "finished"
    n_rows = 1
    assert len(slow_disk) >= 4 + n_rows
    clock = ckpt.read_manifest(ckpt.resume_folders(folder.checkpoints)[0]).clock
    blocked = sum(clock.checkpoint_s.values())
    assert blocked < 0.5 * sum(slow_disk[: 3 + n_rows]), "only the copy is booked"
    quick, other = make_run(lab="quick", horizons=(40,), checkpoint_every_steps=8)
    train_here(quick, other)
    assert steps_of(other) == steps_of(folder)


def test_what_is_stopped_is_on_the_disk(make_run, slow_disk: list[float]) -> None:
    spec, folder = make_run(checkpoint_every_steps=None)
    with pytest.raises(Stopped):
        train_here(spec, folder, [StopAt(7)])
    assert [f.name for f in ckpt.resume_folders(folder.checkpoints)] == ["u00000008"]
    assert ckpt.read_manifest(folder.checkpoints / "u00000008").update == 8


def test_a_checkpoint_holds_the_moment_it_was_taken_at(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written late, when training is already further on: still the weights and clock of its own update."""
    spec, prompt = make_run(lab="prompt", horizons=(40,), checkpoint_every_steps=4)
    hashes: dict[str, dict[str, str]] = {}
    save, late = ckpt.save, [0.0]

    def noting(folder: Path, *args: Any, **kwargs: Any) -> ckpt.Checkpoint:
        time.sleep(late[0])
        whole = save(folder, *args, **kwargs)
        hashes.setdefault(folder.name, {})[f"{late[0]}"] = "".join(sorted(whole.sha256.values()))
        return whole

    monkeypatch.setattr(ckpt, "save", noting)
    train_here(spec, prompt)
    late[0] = 0.05
    spec, folder = make_run(lab="late", horizons=(40,), checkpoint_every_steps=4)
    train_here(spec, folder)
    both = {name: found for name, found in hashes.items() if len(found) == 2}
    assert len(both) >= 5
    assert all(len(set(found.values())) == 1 for found in both.values())


def test_a_full_disk_ends_the_run_at_the_next_boundary_and_keeps_the_older_one(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = make_run(lab="whole")
    train_here(spec, whole)
    spec, folder = make_run(lab="full", checkpoint_every_steps=4)
    write = ckpt.save_file

    def until_full(tensors: dict[str, Any], path: Path) -> None:
        assert threading.current_thread().name == "checkpoint-writer"
        if "u00000012" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    monkeypatch.setattr(ckpt, "save_file", until_full)
    with pytest.raises(CheckpointError, match=r"u00000012.*No space left.*previous checkpoint is intact"):
        train_here(spec, folder)
    record = folder.read_record()
    assert record is not None and record.status == "failed" and "No space left" in (record.reason or "")
    assert [f.name for f in ckpt.resume_folders(folder.checkpoints)] == ["u00000008"]
    assert steps_of(folder)[-1]["update"] < 20, "heard of soon"
    monkeypatch.setattr(ckpt, "save_file", write)
    assert train_here(spec, folder).status == "finished"
    assert steps_of(folder) == steps_of(whole)


# ------ killed in the middle


def _die_while_writing(spec_path: str, at: str) -> None:
    """Trains until the checkpoint after 12 updates is being written, and dies there."""
    flush, replace = ckpt._flush, os.replace

    def dying_flush(path: Path) -> None:
        if at in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    def dying_replace(source: Any, target: Any) -> None:
        if at == "replace" and str(target).endswith("u00000012"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    ckpt._flush, os.replace = dying_flush, dying_replace
    folder = RunFolder(Path(spec_path).parent)
    train_here(codec.read_json(folder.spec, RunSpec), folder)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["u00000012.partial/model", "u00000012.partial/optim", "replace"])
def test_killed_while_writing_the_older_one_is_whole(make_run, at: str) -> None:
    spec, whole = make_run(lab="whole", checkpoint_every_steps=4)
    train_here(spec, whole)
    spec, folder = make_run(lab="killed", checkpoint_every_steps=4)
    assert in_own_process(_die_while_writing, str(folder.spec), at) == -signal.SIGKILL
    assert [f.name for f in ckpt.resume_folders(folder.checkpoints)] == ["u00000008"]
    assert list(folder.checkpoints.glob(".*.partial")), "it was in the middle"
    assert train_here(spec, folder).status == "finished"
    assert not list(folder.checkpoints.glob(".*")), "what was half written is swept away"
    segments = [e for e in codec.read_jsonl(folder.events) if e["kind"] == "segment"]
    assert [s["update"] for s in segments] == [0, 8]
    assert steps_of(folder) == steps_of(whole)
