"""Squared gradient norms of every micro-batch while a model trains: no second backward pass, no copy of a gradient.

A hook on a leaf tensor fires once per backward pass with that pass's own gradient, before it is added to `.grad` and
before DDP averages it: a tied weight comes once, summed. The squared norms add up on the device to q; Q is the squared
norm of what is in `.grad` after the last pass, which DDP has averaged over ranks and which clipping must read anyway.
Together they give one `NoiseMeasurement` (estimator.py has the algebra). While nothing is measured there are no hooks.

    hook = NoiseHook(model, world_size=2, sum_over_ranks=sum_over_ranks)
    with hook.listening(n_passes=accumulation, seqs_per_pass=b):
        ...                       # the update's backward passes, the loss divided by n_passes
    hook.note(grad_norm)          # of all gradients together, before clipping; no host sync
    hook.drain()                  # at a log boundary: waits for the device, one all-reduce

Source: McCandlish et al. 2018 appendix A; tests/batch/test_noise.py compares with separate backward passes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from homelab_scaling.batch.estimator import NoiseMeasurement
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.plan.noise import SHARDED


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the single micro-batch of an update is cut, so that there is something to compare."""

    parts: int = 1
    copies: int = 1
    """Each part stands this often in its pass: same mean gradient, same shape as before, `copies` times the work."""

    def pieces(self, x_BT: Tensor, y_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of a batch, one backward pass each."""
        for x, y in zip(x_BT.chunk(self.parts), y_BT.chunk(self.parts), strict=True):
            yield (x, y) if self.copies == 1 else (self._fill(x, x_BT), self._fill(y, y_BT))

    def _fill(self, part: Tensor, whole: Tensor) -> Tensor:
        """The part over and over, with the whole's strides, which a compiled graph is guarded by."""
        return whole.new_empty_strided(whole.shape, whole.stride()).copy_(part.repeat(self.copies, 1))

    @property
    def words(self) -> str:
        """What a measuring step does differently."""
        if self.parts == 1:
            return "as trained"
        what = f"its only micro-batch in {self.parts} parts"
        return what + (f", each {self.copies} times over: the compiled shape is kept" if self.copies > 1 else "")


def choose_cut(*, n_passes: int, world_size: int, seqs_per_pass: int, compiled: bool) -> Cut:
    """How to get two or more micro-batches: as they are, or the only one cut into as few equal parts as it allows.

    Cutting costs no FLOPs, but a compiled model would be compiled once more for the smaller shape. So there each part
    is repeated up to the old shape, which costs that step's FLOPs again; the cadence accounts for it.

    Raises:
        DataError: one sequence per update cannot be cut.
    """
    if n_passes * world_size > 1:
        return Cut()
    parts = next((p for p in range(2, seqs_per_pass + 1) if seqs_per_pass % p == 0), None)
    if parts is None:
        raise DataError(
            "found 1 micro-batch of 1 sequence an update, wants 2 or more: noise shows only between micro-batches; "
            "train with a batch of at least 2 sequences"
        )
    return Cut(parts=parts, copies=parts if compiled else 1)


class NoiseHook:
    """Collects measuring steps of one model; makes no host sync until `drain`.

    Args:
        model: bare or wrapped by DDP, compiled or not; its parameters in their final place.
        world_size: ranks, which all measure the same steps.
        sum_over_ranks: adds a tensor over all ranks, in place.

    Raises:
        SpecError: the parameters are sharded (FSDP).
    """

    def __init__(
        self, model: nn.Module, *, world_size: int = 1, sum_over_ranks: Callable[[Tensor], Tensor] = lambda t: t
    ) -> None:
        refuse_sharded(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]  # a tied one is listed once
        self.world_size, self.sum_over_ranks = world_size, sum_over_ranks
        self._norms: list[Tensor] = []
        self._open: tuple[int, int] | None = None
        self._pending: list[tuple[int, int, Tensor, Tensor]] = []

    @contextmanager
    def listening(self, *, n_passes: int, seqs_per_pass: int) -> Iterator[None]:
        """Hooks for one update's backward passes of this rank; they are gone when the block ends, however it ends.

        Args:
            n_passes: backward passes of this rank, by which the loss of each was divided.
            seqs_per_pass: different sequences in each.

        Raises:
            DataError: fewer than two passes over all ranks.
        """
        k = n_passes * self.world_size
        if k < 2:
            raise DataError(f"found {k} micro-batch, wants 2 or more to compare; cut the batch (`choose_cut`)")
        self._norms, self._open = [], None
        handles = [p.register_hook(self._note_gradient) for p in self.parameters]  # type: ignore[no-untyped-call]
        try:
            yield
            self._sum = torch.stack(self._norms).double().square().sum() * n_passes**2
            self._open = (k, seqs_per_pass)
        finally:
            for handle in handles:
                handle.remove()
            self._norms = []

    def _note_gradient(self, grad: Tensor) -> None:
        # Returns nothing: whatever a hook returns replaces the gradient.
        self._norms.append(torch.linalg.vector_norm(grad.detach(), dtype=torch.float32))

    def note(self, grad_norm: Tensor | None = None) -> None:
        """Closes a measuring step.

        Args:
            grad_norm: of all gradients together after the last pass, before clipping; None reads the gradients.
        """
        assert self._open is not None, "note() follows a finished listening() block"
        if grad_norm is None:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(grads)
        k, seqs = self._open
        self._pending.append((k, seqs, self._sum, grad_norm.detach().double().square()))
        self._open = None

    def drain(self) -> list[NoiseMeasurement]:
        """The steps noted since the last time, the same on every rank.

        Raises:
            DataError: one of them had gradients that are not finite.
        """
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        sums = self.sum_over_ranks(torch.stack([total for _, _, total, _ in pending])).tolist()
        return [
            NoiseMeasurement(k=k, microbatch_seqs=seqs, mean_sq_norm=total / k, sq_norm_of_mean=float(q_mean))
            for (k, seqs, _, q_mean), total in zip(pending, sums, strict=True)
        ]


def refuse_sharded(model: nn.Module) -> None:
    """SpecError if a rank holds only a part of each parameter."""
    from torch.distributed.tensor import DTensor

    wrapped = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if wrapped or any(isinstance(p, DTensor) for p in model.parameters()):
        raise SpecError(SHARDED)
