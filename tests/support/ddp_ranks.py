"""One rank of a gloo group: gradients of a toy model under our DDP settings, beside those of one process."""

import json
import sys
from pathlib import Path

import torch
from noise_ranks import N_VOCAB, SEQS, micro_batches

from homelab_scaling.specs import ModelShape
from homelab_scaling.train.model import LanguageModel, build_model
from homelab_scaling.train.parallel import Parallel
from homelab_scaling.train.session import leave_group

SHAPE = ModelShape(n_layer=3, d_model=192, n_head=2, context_tokens=16)
"""5 MiB of blocks, so that several buckets of 1 MiB are filled."""


def model() -> LanguageModel:
    return build_model(SHAPE, N_VOCAB, seed=0, loss_path="chunked")


def alone(n_batches: int) -> dict[str, torch.Tensor]:
    """Gradients of all micro-batches in one process."""
    net = model()
    for batch in micro_batches(n_batches):
        (net(batch[:, :-1], batch[:, 1:]) / n_batches).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def main(rank: int, world_size: int, accumulation: int, static: bool, hooks: bool, folder: str) -> None:
    """Writes the largest relative error of a gradient in each of four updates, and the buckets DDP made."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    net, wanted = model(), alone(world_size * accumulation)
    settings = Parallel(bucket_mib=1, static_graph=static, static_graph_reason="", comm="fp32")
    ddp = settings.wrap(net, torch.device("cpu"))
    batches = micro_batches(world_size * accumulation)[rank::world_size]
    errors, n_heard = [], 0

    def hear(_grad: torch.Tensor) -> None:
        nonlocal n_heard
        n_heard += 1

    for update in range(4):
        listening = [p.register_hook(hear) for p in net.parameters()] if hooks and update else []
        for i, batch in enumerate(batches):
            ddp.require_backward_grad_sync = i == accumulation - 1
            (ddp(batch[:, :-1], batch[:, 1:]) / accumulation).backward()
        for handle in listening:
            handle.remove()
        found = {name: p.grad for name, p in net.named_parameters()}
        errors.append(max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted))
        net.zero_grad()
    sizes = ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    answer = {"errors": errors, "n_heard": n_heard, "buckets": [int(size) for size in str(sizes).split(",")]}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(answer))
    del ddp
    leave_group(together=True)


if __name__ == "__main__":
    assert SEQS > 0
    main(
        int(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4] == "static",
        sys.argv[5] == "hooks",
        sys.argv[6],
    )
