"""How DDP is set up for a run: buckets, static graph, and what gradients travel as, each with its reason.

tests/train/test_parallel.py holds these choices against one process, on gloo.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.plan.ddp import choose_bucket_mib
from homelab_scaling.specs import GradientComm, RunSpec


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The settings of torch's DistributedDataParallel, logged with the segment."""

    bucket_mib: int
    """So that the token embedding's gradient, the last one ready, travels alone (plan/ddp.py)."""
    static_graph: bool
    static_graph_reason: str
    comm: GradientComm

    def kwargs_handler(self) -> Any:
        """What Accelerate's constructor takes."""
        from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

        hook = DDPCommunicationHookType.BF16 if self.comm == "bf16" else DDPCommunicationHookType.NO
        return DistributedDataParallelKwargs(
            bucket_cap_mb=self.bucket_mib,
            # Gradients live in the communication buckets: 4 bytes per parameter saved (accelerate's default copies).
            gradient_as_bucket_view=True,
            static_graph=self.static_graph,
            comm_hook=hook,
        )

    def wrap(self, model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
        """The model under DDP with these settings, as Accelerate would wrap it."""
        handler = self.kwargs_handler()
        options: dict[str, Any] = handler.to_kwargs()
        if device.type == "cuda":
            options |= {"device_ids": [device.index], "output_device": device.index}
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        handler.register_comm_hook(wrapped)
        return wrapped


def choose_parallel(spec: RunSpec, *, on_gpu: bool) -> Parallel:
    """DDP's settings for a launch of this run.

    Raises:
        SpecError: bf16 gradients for an fp32 run.
        MachineError: bf16 gradients where nothing can add them up.
    """
    science, execution = spec.science, spec.execution
    if execution.ddp_comm == "bf16" and execution.n_processes > 1:
        if science.precision != "bf16":
            raise SpecError(
                f'ddp_comm = "bf16" would round the gradients of a {science.precision} run; set ddp_comm = "fp32"'
            )
        if not on_gpu:
            raise MachineError('ddp_comm = "bf16" needs NCCL, and CPU ranks speak gloo; set ddp_comm = "fp32"')
    static, why = choose_static_graph(
        n_passes=execution.accumulation_steps(science), batch_warmup=science.batch_warmup is not None
    )
    return Parallel(
        bucket_mib=choose_bucket_mib(science.shape, science.n_vocab),
        static_graph=static,
        static_graph_reason=why,
        comm=execution.ddp_comm,
    )


def choose_static_graph(*, n_passes: int, batch_warmup: bool) -> tuple[bool, str]:
    """Whether DDP may take the first backward pass as the pattern of all others, and why.

    torch (2.6 to 2.13) learns the pattern in the first backward pass and fails an internal assertion if that one is not
    synchronised, as under accumulation. Synchronising it would round the first update differently from the same update
    after a resume.
    """
    if batch_warmup:
        return False, "the batch warm-up changes how many passes an update has"
    if n_passes > 1:
        return False, "the first of an update's backward passes is not synchronised, which torch cannot learn from"
    return True, "every update is one pass"
