"""Training with a model in parts: FSDP over the ranks of a launch, one path for GPUs and CPUs.

    grad-op   every rank keeps its part of weights, gradients and optimizer states; a step's weights are gathered once
    full      the weights of a block are there only while it computes, so they are gathered twice a step

We call torch's FSDP ourselves: Accelerate (1.15) knows it on GPUs only, and on CPU ranks quietly trains something else.
`accelerate launch` still starts the ranks, and the FSDP part of its config file is obeyed: version 2 (`fully_shard`,
parameters are DTensors; also what `homelab run` takes) or version 1 (`FullyShardedDataParallel` with use_orig_params).
Parameters, gradients and their sums stay fp32 and autocast does the rest, as without sharding, so that a run is the
same however it is launched. Gradients are reduced in every backward pass: keeping them whole until the last one of an
update would cost the memory that sharding saves.

Source: Zhao et al. 2023 (arXiv 2304.11277); Rajbhandari et al. 2020 (ZeRO stages 2 and 3).
"""

import contextlib
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from homelab_scaling.errors import SpecError
from homelab_scaling.specs import RunSpec, Sharding
from homelab_scaling.train.model import LanguageModel
from homelab_scaling.train.parts import Parts

FsdpVersion = Literal[1, 2]
WRAPPER = "_fsdp_wrapped_module."
"""What version 1 puts into the names of parameters."""
VERSION_1_STRATEGIES: dict[str, Sharding] = {
    "1": "full",
    "FULL_SHARD": "full",
    "2": "grad-op",
    "SHARD_GRAD_OP": "grad-op",
}
CLIP_EPS = 1e-6
"""As in torch.nn.utils.clip_grad_norm_."""


# -------------------------------------------------------------------------------------- what the launcher's config says


def of_launch(environ: Mapping[str, str]) -> dict[str, Any]:
    """The execution settings that an FSDP config of `accelerate launch` asks for; empty without one.

    Raises:
        SpecError: it asks for something that we do not do.
    """
    if not _wants_fsdp(environ):
        return {}
    settings: dict[str, Any] = {"sharding": _sharding(environ)}
    if environ.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
        raise SpecError("the launch asks for fsdp_offload_params, which is not supported; set it to false")
    if environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        settings["activation_checkpointing"] = True
    return settings


def _wants_fsdp(environ: Mapping[str, str]) -> bool:
    return environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def _sharding(environ: Mapping[str, str]) -> Sharding:
    reshard = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")
    if fsdp_version(environ) == 2:
        return "full" if reshard == "true" else "grad-op"
    if environ.get("FSDP_USE_ORIG_PARAMS", "true") != "true":
        raise SpecError(
            "the launch asks for fsdp_use_orig_params: false, which mixes decayed and undecayed parameters; "
            "set it to true"
        )
    strategy = (
        reshard.upper() if reshard.upper() in VERSION_1_STRATEGIES else environ.get("FSDP_SHARDING_STRATEGY", "1")
    )
    if strategy not in VERSION_1_STRATEGIES:
        raise SpecError(
            f"the launch asks for fsdp_sharding_strategy: {strategy}; use FULL_SHARD, SHARD_GRAD_OP or no FSDP config"
        )
    return VERSION_1_STRATEGIES[strategy]


def fsdp_version(environ: Mapping[str, str]) -> FsdpVersion:
    """Of the launch: 2 unless its config says 1."""
    return 1 if environ.get("FSDP_VERSION") == "1" else 2


def hide_from_accelerate(environ: MutableMapping[str, str]) -> None:
    """Lets Accelerate start plain ranks under an FSDP config; the sharding is done here."""
    environ.pop("ACCELERATE_USE_FSDP", None)


def refuse_optimizer(spec: RunSpec) -> None:
    """SpecError where a launch would cut 8-bit optimizer states."""
    if spec.science.optim.name == "adamw8bit" and spec.execution.sharding != "none" and spec.execution.n_processes > 1:
        raise SpecError(
            f'found [optim] name = "adamw8bit" with sharding = "{spec.execution.sharding}": its 8-bit blocks would be '
            'cut where the shards are and differ with the number of ranks; set name = "adamw", or sharding = "none"'
        )


# --------------------------------------------------------------------------------------------------------- the sharding


def wrap(accelerator: Any, model: LanguageModel, spec: RunSpec, environ: Mapping[str, str]) -> tuple[Any, Parts]:
    """The model to call, and where its parameters lie: as Accelerate prepares it, or sharded where the spec says so.

    One rank has nothing to share and trains whole, whatever the spec says.

    Raises:
        SpecError: 8-bit optimizer states are not sharded.
    """
    if spec.execution.sharding == "none" or accelerator.num_processes == 1:
        wrapped = accelerator.prepare(model)
        return wrapped, Parts(model)
    refuse_optimizer(spec)
    if model.compiled:
        model.compile_blocks()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model = accelerator.prepare_model(model, evaluation_mode=True)  # on its device, under autocast; no DDP
    version = fsdp_version(environ)
    reshard = spec.execution.sharding == "full"
    wrapped = (_version_1 if version == 1 else _version_2)(model, accelerator.device.type, reshard)
    model.sharded = True
    model.token_losses = lambda x_BT, y_BT: wrapped(x_BT, y_BT, per_token=True)  # type: ignore[method-assign]
    return wrapped, ShardedParts(model, wrapped, shapes, version=version)


def _version_2(model: LanguageModel, device_type: str, reshard: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    # The root holds the embeddings, which the tied head needs again at once.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def _version_1(model: LanguageModel, device_type: str, reshard: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    here = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy.FULL_SHARD if reshard else ShardingStrategy.SHARD_GRAD_OP,
        auto_wrap_policy=ModuleWrapPolicy([type(model.transformer.h[0])]),
        use_orig_params=True,
        device_id=here,
    )
    wrapped.no_sync = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    return wrapped


def _own(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedParts(Parts):
    """Parameters of which each rank holds a run of elements: cut by rows (version 2) or anywhere (version 1).

    Args:
        model: inside the wrapper.
        wrapped: the wrapper.
        shapes: of the whole parameters.
        version: of FSDP.
    """

    is_sharded = True

    def __init__(
        self, model: LanguageModel, wrapped: nn.Module, shapes: Mapping[str, torch.Size], *, version: FsdpVersion
    ) -> None:
        # Looked up now: after an evaluation, FSDP 2 shows gathered parameters under these names.
        self.parameters = {name.replace(WRAPPER, ""): p for name, p in model.named_parameters()}
        self.model, self.wrapped, self.version = model, wrapped, version
        self.shapes = dict(shapes)
        self.ndim = {name: len(shape) for name, shape in self.shapes.items()}
        self.rank = dist.get_rank()
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, [_own(p).numel() for p in self.parameters.values()])
        self.sizes = {name: [of_rank[i] for of_rank in counts] for i, name in enumerate(self.parameters)}

    @property
    def load_device(self) -> torch.device:
        """The host: a whole optimizer may not fit the device."""
        return torch.device("cpu")

    def full(self, name: str, own: Tensor | None) -> Tensor:
        """The whole tensor, gathered from all ranks, on each."""
        p = self.parameters[name]
        held = None if own is None else _own(own).detach().flatten()
        dtype = p.dtype if held is None else held.dtype
        sizes = self.sizes[name]
        piece = torch.zeros(max(sizes), dtype=dtype, device=_own(p).device)
        if held is not None:
            piece[: held.numel()] = held
        pieces = [torch.empty_like(piece) for _ in sizes]
        dist.all_gather(pieces, piece)
        return torch.cat([got[:n] for got, n in zip(pieces, sizes, strict=True)]).view(self.shapes[name])

    def fill(self, name: str, own: Tensor, full: Tensor) -> None:
        held, start = _own(own), sum(self.sizes[name][: self.rank])
        held.copy_(full.flatten()[start : start + held.numel()].view_as(held))

    @torch.no_grad()
    def load_weights(self, full: dict[str, Tensor]) -> None:
        """An evaluation leaves gathered weights behind, which would be used once more: both are replaced."""
        if self.version == 1:
            from torch.distributed.fsdp import FullyShardedDataParallel

            with FullyShardedDataParallel.summon_full_params(self.wrapped, writeback=True):
                for name, p in self.model.named_parameters():
                    p.copy_(full[name.replace(WRAPPER, "")])
            return
        for module in self.model.modules():
            if (reshard := getattr(module, "reshard", None)) is not None:
                reshard()
        super().load_weights(full)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Over the parts of all ranks, with one all-reduce of one number."""
        grads = [_own(p.grad) for p in self.parameters.values() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(grads).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + CLIP_EPS)).clamp(max=1.0))
        return norm

    def any_rank(self, flag: bool) -> bool:
        vector = torch.tensor([int(flag)], device=_own(next(iter(self.parameters.values()))).device)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        return bool(vector.item())
