"""Batches on their way to the device: which windows a rank's micro-batch holds, and the shards they come from.

Shapes: B sequences of one micro-batch, T context.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from homelab_scaling.data.batches import BatchOrder, n_windows, read_windows
from homelab_scaling.data.shards import Shards, open_shards
from homelab_scaling.errors import SpecError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec


class Feed:
    """Micro-batches of one rank, a pure function of step, micro-step and size."""

    def __init__(self, shards: Shards, spec: RunSpec, *, rank: int, world_size: int, device: torch.device) -> None:
        self.stream, self.context = shards.train, spec.science.shape.context_tokens
        self.batch_seqs = spec.science.batch_seqs_global
        self.order = BatchOrder(n_windows(len(shards.train), self.context), spec.science.seed)
        self.rank, self.world_size, self.device = rank, world_size, device
        self.first_sequence = 0
        """Of the order of windows; a branch reads on where its checkpoint was."""

    def micro_batch(self, step: int, micro: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each, of this rank's `micro`-th slice of `size` sequences of the step's batch."""
        first = self.first_sequence + step * self.batch_seqs + (micro * self.world_size + self.rank) * size
        window = read_windows(self.stream, self.order.windows(first, size), self.context)
        tokens = torch.from_numpy(window.astype(np.int32))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        tokens = tokens.long()
        return tokens[:, :-1], tokens[:, 1:]


def open_matching_shards(spec: RunSpec, folder: RunFolder) -> Shards:
    """The run's shards, after checking that they are the ones its science names.

    Raises:
        SpecError: they are others.
    """
    path = Path(spec.shards)
    shards = open_shards(path if path.is_absolute() else (folder.path / path).resolve())
    found = (shards.manifest.tokenizer_hash, shards.manifest.train.fingerprint, shards.manifest.val.fingerprint)
    wanted = (spec.science.tokenizer_hash, spec.science.train_fingerprint, spec.science.val_fingerprint)
    if found != wanted:
        raise SpecError(
            f"{shards.folder}: these shards are not the ones {spec.run_id} was planned on; restore them or plan again"
        )
    return shards
