"""A checkpoint is whole or absent, and a damaged one is never resumed from."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from homelab_scaling.errors import CheckpointError
from homelab_scaling.train import checkpoint as ckpt


def manifest(update: int = 7, science: str = "abc") -> ckpt.Checkpoint:
    return ckpt.Checkpoint(
        update=update,
        step=update,
        tokens=update * 10,
        sequences=update,
        phase="trunk",
        science_hash=science,
        data_id="d",
        clock=ckpt.Clock(train_s={"0:trunk": 1.5}),
        counters={"w/step": update},
    )


TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(3.0)}


def save(checkpoints: Path, update: int = 7, science: str = "abc") -> Path:
    folder = ckpt.update_folder(checkpoints, update)
    ckpt.save(folder, manifest(update, science), {ckpt.MODEL: TENSORS})
    return folder


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path)
    found, read, skipped = ckpt.newest_valid(tmp_path, "abc")
    assert found == folder and skipped == []
    assert read is not None and read.counters == {"w/step": 7} and read.clock.train_s == {"0:trunk": 1.5}
    loaded = ckpt.load_tensors(folder, ckpt.MODEL, torch.device("cpu"))
    assert all(torch.equal(loaded[k], TENSORS[k]) for k in TENSORS)
    assert sorted(p.name for p in folder.iterdir()) == [ckpt.MANIFEST, ckpt.MODEL]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda f: (f / ckpt.MODEL).write_bytes(b"x"), "does not match its hash", id="overwritten"),
        pytest.param(lambda f: os.truncate(f / ckpt.MODEL, 20), "does not match its hash", id="truncated"),
        pytest.param(lambda f: (f / ckpt.MODEL).unlink(), "cannot be read", id="file gone"),
        pytest.param(lambda f: (f / ckpt.MANIFEST).unlink(), "no such file", id="manifest gone"),
        pytest.param(lambda f: os.truncate(f / ckpt.MANIFEST, 30), "cannot be read", id="manifest torn"),
    ],
)
def test_the_newest_valid_one_is_taken_and_damage_is_named(tmp_path: Path, damage, said: str) -> None:
    older, newer = save(tmp_path, 7), save(tmp_path, 9)
    damage(newer)
    found, read, skipped = ckpt.newest_valid(tmp_path, "abc")
    assert found == older and read is not None and read.update == 7
    assert len(skipped) == 1 and said in skipped[0] and newer.name in skipped[0]
    with pytest.raises(CheckpointError):
        ckpt.read_manifest(newer)


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 7, science="other")
    found, _, skipped = ckpt.newest_valid(tmp_path, "abc")
    assert found is None and "another run" in skipped[0]


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    older = save(tmp_path, 7)
    before = json.loads((older / ckpt.MANIFEST).read_text())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writes fail with EFBIG, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="previous checkpoint is intact"):
            ckpt.save(ckpt.update_folder(tmp_path, 9), manifest(9), {ckpt.MODEL: {"w": torch.zeros(10_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == [older.name]
    assert json.loads((older / ckpt.MANIFEST).read_text()) == before
    assert ckpt.newest_valid(tmp_path, "abc")[0] == older


def test_weights_hash_sees_every_bit() -> None:
    a = ckpt.tensors_hash(TENSORS)
    changed = {**TENSORS, "w": TENSORS["w"].clone()}
    changed["w"][2, 3] = torch.nextafter(changed["w"][2, 3], torch.tensor(100.0))
    assert ckpt.tensors_hash(TENSORS) == a != ckpt.tensors_hash(changed)
