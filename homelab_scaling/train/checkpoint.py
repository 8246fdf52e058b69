"""Checkpoints that are whole or absent.

    checkpoints/u00000123/{model.safetensors, optim.safetensors, checkpoint.json}    resume state after 123 updates
    checkpoints/row-3000000/{model.safetensors, checkpoint.json}                     the finished model of a row

A checkpoint is written to a hidden folder, flushed, hashed and renamed; older ones go only afterwards. There is no
loader or random state to save: batches are a function of the number of sequences consumed, and there is no dropout.
"""

import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from homelab_scaling import codec
from homelab_scaling.errors import CheckpointError, SpecError

START, PAUSED = "start", "paused"
"""Names beside those of phases under which a Clock books energy."""

MODEL, OPTIM, MANIFEST = "model.safetensors", "optim.safetensors", "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds and joules spent so far, by phase name: what a row costs, across interruptions."""

    train_s: dict[str, float] = field(default_factory=dict)
    validate_s: dict[str, float] = field(default_factory=dict)
    checkpoint_s: dict[str, float] = field(default_factory=dict)
    paused_s: dict[str, float] = field(default_factory=dict)
    """Waited on the watchdog's order; in none of the above."""
    slept_s: dict[str, float] = field(default_factory=dict)
    """Slept between steps on the watchdog's order; in none of the above."""
    energy_j: dict[str, float] = field(default_factory=dict)
    """Measured on the run's cards, also under the names START and PAUSED."""
    metered_s: dict[str, float] = field(default_factory=dict)
    """Seconds that `energy_j` covers, by the same names; the rest of the time was not seen."""
    energy_from: Literal["counter", "integrated"] | None = None
    start_s: float = 0.0
    """Process start to first update, over all segments."""
    rated_tokens: int = 0
    """Tokens trained outside each segment's first (warming-up) interval, and the seconds they took: the honest rate."""
    rated_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """checkpoint.json: what the tensors beside it are."""

    update: int
    """Global updates done."""
    step: int
    tokens: int
    sequences: int
    phase: str
    science_hash: str
    data_id: str
    clock: Clock
    batch_halvings: int = 0
    """How often the full batch was still halved, in a batch warm-up."""
    counters: dict[str, int] = field(default_factory=dict)
    """The optimizer's plain counters."""
    sha256: dict[str, str] = field(default_factory=dict)
    """File name -> hash."""


def save(folder: Path, manifest: Checkpoint, files: dict[str, dict[str, Tensor]]) -> Checkpoint:
    """Writes a checkpoint so that `folder` is either absent or whole.

    Args:
        folder: its final place; replaced if it exists.
        files: file name -> tensors.

    Returns:
        The manifest with the files' hashes.

    Raises:
        CheckpointError: the disk refused; nothing older was touched.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        hashes = {}
        for name, tensors in files.items():
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial / name)
            _flush(partial / name)
            hashes[name] = _sha256(partial / name)
        whole = codec.from_plain({**codec.to_plain(manifest), "sha256": hashes}, Checkpoint, MANIFEST)
        codec.write_json(partial / MANIFEST, whole)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        codec.sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: the checkpoint could not be written ({error}); free disk space and run again, the previous "
            "checkpoint is intact"
        ) from error
    return whole


def sweep(checkpoints: Path) -> None:
    """Removes what a killed launch left half written or half deleted; no other launch may be writing there."""
    for pattern in (".*.partial", ".*.gone"):
        for left in checkpoints.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Checkpoint:
    """The manifest of a whole checkpoint, after checking every file against its hash.

    Raises:
        CheckpointError: torn, edited or incomplete, and how.
    """
    try:
        manifest = codec.read_json(folder / MANIFEST, Checkpoint)
    except SpecError as error:
        raise CheckpointError(f"{folder.name}: {error}") from None
    for name, wanted in manifest.sha256.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder.name}: {name} cannot be read ({error.strerror})") from None
        if found != wanted:
            raise CheckpointError(f"{folder.name}: {name} does not match its hash")
    return manifest


def update_folder(checkpoints: Path, update: int) -> Path:
    """Where the resume state after `update` updates lies."""
    return checkpoints / f"u{update:08d}"


def row_folder(checkpoints: Path, n_tokens: int) -> Path:
    """Where the finished model of a row lies."""
    return checkpoints / f"row-{n_tokens}"


def resume_folders(checkpoints: Path) -> list[Path]:
    """Every resume state, newest first, whole or not."""
    return sorted((p for p in checkpoints.glob("u[0-9]*") if p.is_dir()), reverse=True)


def newest_valid(checkpoints: Path, science_hash: str) -> tuple[Path | None, Checkpoint | None, list[str]]:
    """The newest checkpoint that can be resumed from, its manifest, and a sentence for each newer one skipped."""
    skipped = []
    for folder in resume_folders(checkpoints):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if manifest.science_hash != science_hash:
            skipped.append(f"{folder.name}: belongs to another run (science {manifest.science_hash[:8]})")
            continue
        return folder, manifest, skipped
    return None, None, skipped


def load_tensors(folder: Path, name: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint."""
    # Accelerate calls a CPU rank "cpu:0", which safetensors does not know.
    return load_file(folder / name, device="cpu" if device.type == "cpu" else str(device))


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes, the identity of a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
