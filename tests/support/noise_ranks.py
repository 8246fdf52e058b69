"""One rank of a gloo group that measures the noise of a toy model under DDP, beside separate backward passes."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from homelab_scaling.batch.noise import NoiseHook
from homelab_scaling.specs import ModelShape
from homelab_scaling.train.model import LanguageModel, LossPath, build_model
from homelab_scaling.train.session import leave_group

N_VOCAB, CONTEXT, SEQS = 100, 16, 4


def toy_model(*, tied: bool = True, loss_path: LossPath = "chunked") -> LanguageModel:
    """A GPT-2 of 30 thousand parameters."""
    shape = ModelShape(n_layer=2, d_model=32, n_head=2, context_tokens=CONTEXT, tied=tied)
    return build_model(shape, N_VOCAB, seed=0, loss_path=loss_path)


def micro_batches(k: int, seqs: int = SEQS) -> Tensor:
    """(k, seqs, CONTEXT + 1) tokens."""
    return torch.randint(0, N_VOCAB, (k, seqs, CONTEXT + 1), generator=torch.Generator().manual_seed(1))


def norms_by_separate_passes(model: nn.Module, batches: Tensor) -> tuple[float, float]:
    """q and Q the slow way: every micro-gradient kept, in double precision."""
    gradients = []
    for batch in batches:
        model.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.square().sum(1).mean()), float(stacked.mean(0).square().sum())


def main(rank: int, world_size: int, accumulation: int, static_graph: bool, folder: str) -> None:
    """Writes what the hook measured on two successive steps to rank-N.json."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    model = toy_model()
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=static_graph)

    def summed(vector: Tensor) -> Tensor:
        torch.distributed.all_reduce(vector)
        return vector

    hook = NoiseHook(ddp, world_size=world_size, sum_over_ranks=summed)
    batches = micro_batches(world_size * accumulation)[rank::world_size]
    # A static graph is learnt in the first backward pass, which torch (2.11) wants synchronised.
    ddp(batches[0][:, :-1], batches[0][:, 1:]).backward()
    model.zero_grad()
    for _ in range(2):
        with hook.listening(n_passes=accumulation, seqs_per_pass=SEQS):
            for i, batch in enumerate(batches):
                ddp.require_backward_grad_sync = i == accumulation - 1
                (ddp(batch[:, :-1], batch[:, 1:]) / accumulation).backward()
        hook.note()
        model.zero_grad()
    found = [(m.k, m.mean_sq_norm, m.sq_norm_of_mean) for m in hook.drain()]
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    del ddp, hook
    leave_group(together=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "static", sys.argv[5])
