"""AdamW, in 32 or 8 bit, whose update can be masked on the device.

A non-finite gradient must never reach the weights, and finding out must not stop the device. So the update is masked
where it happens: torch's fused AdamW takes a `found_inf` flag; bitsandbytes' 8-bit CUDA kernel leaves every weight
alone whose gradient is NaN. That is why the 8-bit optimizer is two: the large matrices go to bitsandbytes, the token
embedding (unstable in 8 bit, transformers#14819) and everything small keep 32-bit states in torch's AdamW.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from homelab_scaling.errors import MachineError
from homelab_scaling.specs import Optim
from homelab_scaling.train.parts import Parts

MIN_8BIT_ELEMENTS = 4096
"""Below this bitsandbytes itself keeps 32-bit states."""

Named = tuple[str, nn.Parameter]


class MaskedAdamW:
    """AdamW over a model's parameters, with decoupled decay on matrices only.

    Args:
        model: its parameters in their final place.
        optim: names and constants.
        parts: where they lie, if not whole on every rank.
    """

    def __init__(self, model: nn.Module, optim: Optim, parts: Parts | None = None) -> None:
        self.parts = parts or Parts(model)
        named = list(self.parts.parameters.items())
        self.names = {p: name for name, p in named}
        eight = [(n, p) for n, p in named if optim.name == "adamw8bit" and _takes_8bit(n, p)]
        in_eight = {n for n, _ in eight}
        self.grad_clip = optim.grad_clip
        self.on_cuda = named[0][1].is_cuda
        self._keeps = False
        self._torch = torch.optim.AdamW(
            _groups([(n, p) for n, p in named if n not in in_eight], optim, self.parts.ndim),
            lr=0.0,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self._eight_bit: Any = _eight_bit_adamw(_groups(eight, optim, self.parts.ndim), optim) if eight else None

    @property
    def _optimizers(self) -> list[Any]:
        return [self._torch] if self._eight_bit is None else [self._torch, self._eight_bit]

    def clip(self) -> Tensor:
        """Scales all gradients to at most `grad_clip` together; returns their norm before that, on the device."""
        return self.parts.clip(self.grad_clip)

    @torch.no_grad()
    def step(self, lr: float, finite: Tensor) -> None:
        """One update at rate `lr`, or none at all where `finite` (a bool scalar on the device) is false."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        self._torch.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._torch.step()
        if self._eight_bit is not None:
            self._step_8bit(finite)

    def _step_8bit(self, finite: Tensor) -> None:
        optimizer: Any = self._eight_bit
        if not self.on_cuda and not bool(finite):  # the CPU kernel has no mask, and reading the flag there is free
            return
        if not optimizer.initialized:
            optimizer.check_overrides()
            optimizer.initialized = True
        # Optimizer8bit.step() synchronises the device after every tensor; its parts do not.
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if not optimizer.state[p]:
                    optimizer.init_state(group, p, g, i)
                if self.on_cuda:
                    p.grad.masked_fill_(~finite, float("nan"))
                optimizer.update_step(group, p, g, i)

    def keep_gradients(self) -> None:
        """From now on gradients stay in the memory they have: backward passes add to them, nothing takes their place.

        A backward pass leaves a parameter without a gradient the very tensor that it made. Of a replayed CUDA graph
        that lies in the graph's own memory, and the next micro-batch would write over the sum so far.
        """
        self._keeps = True
        for p in self.names:
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)

    def zero_grad(self) -> None:
        """Gradients to nothing: None, or zeros where they are kept."""
        if self._keeps:
            torch._foreach_zero_([p.grad for p in self.names if p.grad is not None])
            return
        for p in self.names:
            p.grad = None

    def states(self) -> Iterator[tuple[str, Tensor]]:
        """Every state tensor, whole, as "parameter name/state name"; under FSDP all ranks go through them together."""
        if self.parts.is_sharded:
            yield from self._gathered()
            return
        for optimizer in self._optimizers:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    # qmap: bitsandbytes' fixed code books, shared by all tensors
                    if isinstance(value, Tensor) and not key.startswith("qmap"):
                        yield f"{self.names[p]}/{key}", value

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """The states of torch's AdamW from all ranks; one of them may hold nothing of a small parameter."""
        state = self._torch.state
        if not self.parts.any_rank(len(state) > 0):
            return
        step = next((of_one["step"] for of_one in state.values()), torch.zeros(()))
        for name, p in self.parts.parameters.items():
            yield f"{name}/step", step
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{name}/{key}", self.parts.full(name, state.get(p, {}).get(key))

    def counters(self) -> dict[str, int]:
        """Every plain counter, as "parameter name/state name"."""
        return {
            f"{self.names[p]}/{key}": int(value)
            for optimizer in self._optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
            if not isinstance(value, Tensor)
        }

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Every state tensor and every plain counter."""
        return dict(self.states()), self.counters()

    def load_state_dict(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Puts back what `state_dict` gave; a parameter without an entry starts fresh."""
        by_name = {name: p for p, name in self.names.items()}
        owner = {p: o for o in self._optimizers for group in o.param_groups for p in group["params"]}
        for optimizer in self._optimizers:
            optimizer.state.clear()
        saved: dict[str, Tensor | int] = {**tensors, **counters}
        for key, value in saved.items():
            name, entry = key.rsplit("/", 1)
            p = by_name[name]
            owner[p].state.setdefault(p, {})[entry] = self._own_state(name, p, entry, value)
        if self._eight_bit is not None:
            self._restore_code_books()

    def _own_state(self, name: str, p: nn.Parameter, entry: str, value: Tensor | int) -> Tensor | int:
        """This rank's part of a saved state."""
        if not isinstance(value, Tensor):
            return value
        if not self.parts.is_sharded or entry == "step":
            return value.clone().to(p.device)
        own = torch.zeros_like(p, requires_grad=False)
        self.parts.fill(name, own, value)
        return own

    def _restore_code_books(self) -> None:
        optimizer: Any = self._eight_bit
        if "dynamic" not in optimizer.name2qmap:
            optimizer.fill_qmap()
        for p, state in optimizer.state.items():
            for key, book in (("qmap1", "dynamic"), ("qmap2", "udynamic")):
                optimizer.name2qmap[book] = optimizer.name2qmap[book].to(p.device)
                state[key] = optimizer.name2qmap[book]

    def state_bytes(self) -> int:
        """Memory of the optimizer's states on this rank, measured; bitsandbytes' shared code books aside."""
        own = [
            value.to_local() if isinstance(value, DTensor) else value
            for optimizer in self._optimizers
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, Tensor) and not key.startswith("qmap")
        ]
        seen = {t.data_ptr(): t.numel() * t.element_size() for t in own}
        return sum(seen.values())


def _takes_8bit(name: str, p: nn.Parameter) -> bool:
    return p.ndim >= 2 and p.numel() >= MIN_8BIT_ELEMENTS and not name.endswith(("wte.weight", "lm_head.weight"))


def _groups(named: list[Named], optim: Optim, ndim: dict[str, int]) -> list[dict[str, Any]]:
    """Matrices decay, vectors (biases, norms) do not."""
    matrices = [p for name, p in named if ndim[name] >= 2]
    vectors = [p for name, p in named if ndim[name] < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _eight_bit_adamw(groups: list[dict[str, Any]], optim: Optim) -> Any:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise MachineError(
            f'bitsandbytes does not load here ({error}); install it, or set [optim] name = "adamw"'
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
