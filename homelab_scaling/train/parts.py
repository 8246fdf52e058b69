"""Where a model's parameters and optimizer states lie: whole on every rank here, in parts under FSDP (sharded.py).

Checkpoints hold whole tensors under Hugging Face's names, whatever the launch, so that any other launch can go on.
"""

import torch
from torch import Tensor, nn


class Parts:
    """Whole parameters, the same on every rank.

    Args:
        model: with its parameters in their final place.
    """

    is_sharded = False

    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.ndim = {name: p.ndim for name, p in self.parameters.items()}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    @property
    def load_device(self) -> torch.device:
        """Where a checkpoint's whole tensors are read to."""
        return self.device

    def full(self, name: str, own: Tensor | None) -> Tensor:
        """The whole of a tensor that belongs to a parameter, from what this rank has; every rank calls it."""
        assert own is not None, f"every rank has all of {name}"
        return own.detach()

    def fill(self, name: str, own: Tensor, full: Tensor) -> None:
        """Puts this rank's part of `full` into `own`."""
        own.copy_(full)

    def load_weights(self, full: dict[str, Tensor]) -> None:
        """Puts whole weights into the parameters."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                self.fill(name, p, full[name])

    def clip(self, max_norm: float) -> Tensor:
        """Scales all gradients to at most `max_norm` together; returns their norm before that, on the device."""
        return torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), max_norm)

    def any_rank(self, flag: bool) -> bool:
        """Whether it holds on one rank or more; the same answer on all."""
        return flag
