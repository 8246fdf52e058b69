"""The backward passes of one optimizer update, heard by the noise log where the update is measured."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from homelab_scaling.batch.noise import Cut, choose_cut
from homelab_scaling.train.batch_warmup import StepSplit
from homelab_scaling.train.feed import Feed
from homelab_scaling.train.noise_log import NoiseLog


class Passes:
    """Forward and backward through a model, micro-batch by micro-batch.

    Args:
        wrapped: the model as Accelerate prepared it.
        feed: this rank's share of the text.
        compiled: whether other shapes than the micro-batch's would be compiled anew.
    """

    def __init__(self, accelerator: Any, wrapped: nn.Module, feed: Feed, *, compiled: bool) -> None:
        self.accelerator, self.wrapped, self.feed, self.compiled = accelerator, wrapped, feed, compiled

    def backward(self, step: int, part: int, split: StepSplit, noise: NoiseLog | None) -> Tensor:
        """This rank's mean loss over a part of a step's batch, on the device; the gradients are in the parameters.

        Args:
            part: which of the step's optimizer updates.
            noise: hears every pass; an update of a single one is cut, so that there are two. None hears nothing.
        """
        size = split.microbatch_seqs
        cut = Cut()
        hearing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if noise is not None:
            ranks = self.accelerator.num_processes
            cut = choose_cut(n_passes=split.accumulation, world_size=ranks, seqs_per_pass=size, compiled=self.compiled)
            hearing = noise.listening(n_passes=split.accumulation * cut.parts, seqs_per_pass=size // cut.parts)
        n_passes = split.accumulation * cut.parts
        loss_sum = torch.zeros((), device=self.accelerator.device)
        with hearing:
            for i, (x_BT, y_BT) in enumerate(self._pieces(step, part, split, cut)):
                with contextlib.nullcontext() if i == n_passes - 1 else self.accelerator.no_sync(self.wrapped):
                    loss = self.wrapped(x_BT, y_BT)
                    # A loss that is not finite poisons its own gradients, so every rank sees it in the averaged norm.
                    poison = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)
                    self.accelerator.backward(loss * poison / n_passes)
                loss_sum += loss.detach() / n_passes
        return loss_sum

    def _pieces(self, step: int, part: int, split: StepSplit, cut: Cut) -> Iterator[tuple[Tensor, Tensor]]:
        for micro in range(part * split.accumulation, (part + 1) * split.accumulation):
            yield from cut.pieces(*self.feed.micro_batch(step, micro, split.microbatch_seqs))
