"""The memory of a training step, allocation by allocation, without the memory: torch's fake tensors, counted.

Operations on fake tensors have shapes and lifetimes and no data, so that a step of any size is run in a second. They
live on the CPU, where the loss would work in blocks of the cache's size: here it takes all rows at once, as on a GPU.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from homelab_scaling.plan.memory import LossPath
from homelab_scaling.specs import ModelShape, Optim
from homelab_scaling.train import loss, model
from homelab_scaling.train.model import LanguageModel, gpt2_config
from homelab_scaling.train.optim import MaskedAdamW

BLOCK_BYTES = 512
"""What torch's CUDA allocator rounds up to."""


class Allocations(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._seen:
            return
        n_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._seen[storage] = n_bytes
        self.live += n_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, n_bytes)

    def _free(self, n_bytes: int) -> None:
        self.live -= n_bytes


def _one_kernel(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates what the compiled softmax allocates: its statistics."""
    max_R1 = logits_RV.amax(1, keepdim=True).float()
    return max_R1, max_R1.clone()


UNBOUNDED = 1 << 60
CPU_LIMITS = ((loss, "CPU_BLOCK_BYTES"), (loss, "CPU_GRADIENT_ROWS"), (model, "CPU_CHUNK_BYTES"))
"""Constants that cut the loss's work to a CPU's caches."""


@contextmanager
def as_on_a_gpu(*, fused_softmax: bool) -> Iterator[None]:
    """The chunked loss without a CPU's limits, its softmax as one kernel or not."""
    with ExitStack() as stack:
        for module, name in CPU_LIMITS:
            stack.enter_context(patch.object(module, name, UNBOUNDED))
        if fused_softmax:
            stack.enter_context(patch.object(loss, "_softmax_", _one_kernel))
        yield


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step."""

    shape: ModelShape
    n_vocab: int = 50_257
    microbatch_seqs: int = 8
    loss_path: LossPath = "chunked"
    bf16: bool = True
    recompute: bool = False
    accumulation: int = 1
    fused_softmax: bool = False


def peak_of_step(job: Job) -> int:
    """The most bytes that are alive during the second step, as `torch.cuda.max_memory_allocated` would count them."""
    count = Allocations()
    with as_on_a_gpu(fused_softmax=job.fused_softmax), FakeTensorMode(allow_non_fake_inputs=True), count:
        with torch.device("cpu"):
            config = gpt2_config(job.shape, job.n_vocab)
            gpt2 = LanguageModel(config, n_vocab=job.n_vocab, loss_path=job.loss_path, recompute=job.recompute)
        optimizer = MaskedAdamW(gpt2, Optim())
        for _ in range(2):  # the first step makes the optimizer's states
            count.peak = count.live
            for _ in range(job.accumulation):
                x_BT = torch.zeros(job.microbatch_seqs, job.shape.context_tokens, dtype=torch.long)
                with torch.autocast("cpu", torch.bfloat16, enabled=job.bf16):
                    mean = gpt2(x_BT, torch.zeros_like(x_BT))
                mean.backward()
                del mean
            norm = optimizer.clip()
            optimizer.step(1e-3, torch.isfinite(norm))
            optimizer.zero_grad()
        return count.peak
