"""One rank of a gloo group that trains a toy model in parts, beside the same training whole."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from homelab_scaling.batch.noise import NoiseHook
from homelab_scaling.errors import SpecError
from homelab_scaling.specs import ModelShape, Optim
from homelab_scaling.train import sharded
from homelab_scaling.train.model import LanguageModel, build_model
from homelab_scaling.train.optim import MaskedAdamW
from homelab_scaling.train.session import leave_group

N_VOCAB, CONTEXT = 101, 16
LR = 1e-2
OPTIM = Optim(grad_clip=0.5, eps=1e-3)
"""A large eps: with the usual one Adam turns the rounding of a gradient of zero (a key's bias) into a whole step."""


def toy_model(*, recompute: bool = False) -> LanguageModel:
    """Odd sizes, so that no cut is even."""
    shape = ModelShape(n_layer=2, d_model=35, n_head=5, context_tokens=CONTEXT - 1)
    return build_model(shape, N_VOCAB, seed=0, loss_path="chunked", recompute=recompute)


def batch(n: int) -> Tensor:
    """(8, CONTEXT) tokens of step n."""
    return torch.randint(0, N_VOCAB, (8, CONTEXT), generator=torch.Generator().manual_seed(n))


def update(model: nn.Module, optimizer: MaskedAdamW, tokens: Tensor, *, poison: float = 1.0) -> float:
    """One optimizer update on this rank's tokens; the gradients' norm."""
    (model(tokens[:, :-1], tokens[:, 1:]) * poison).backward()
    norm = optimizer.clip()
    optimizer.step(LR, torch.isfinite(norm))
    optimizer.zero_grad()
    return norm.item()


def whole(n_updates: int) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Norms, weights and token losses of the same training in one process."""
    model = toy_model()
    optimizer = MaskedAdamW(model, OPTIM)
    norms = [update(model, optimizer, batch(n)) for n in range(n_updates)]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return norms, weights, model.token_losses(batch(9)[:, :-1], batch(9)[:, 1:])


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors with the same names and shapes."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) if a[name].shape == b[name].shape else math.inf for name in a)


def check(rank: int, world_size: int, version: str, sharding: str) -> dict[str, Any]:
    """Everything a sharded run relies on, as numbers to assert on."""
    accelerator: Any = SimpleNamespace(
        num_processes=world_size, device=torch.device("cpu"), prepare_model=lambda model, evaluation_mode: model
    )
    execution = SimpleNamespace(sharding=sharding, n_processes=world_size)
    spec: Any = SimpleNamespace(execution=execution, science=SimpleNamespace(optim=Optim()))
    model = toy_model(recompute=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped, parts = sharded.wrap(accelerator, model, spec, {"FSDP_VERSION": version})
    optimizer = MaskedAdamW(model, OPTIM, parts)

    def own(n: int) -> Tensor:
        return batch(n)[rank::world_size]

    def weights() -> dict[str, Tensor]:
        return {name: parts.full(name, p).clone() for name, p in parts.parameters.items()}

    def states() -> dict[str, Tensor]:
        return {name: value.clone() for name, value in optimizer.states()}

    def losses() -> Tensor:
        with torch.no_grad():
            return model.token_losses(batch(9)[:, :-1], batch(9)[:, 1:])

    found: dict[str, Any] = {"no_states_yet": states() == {}, "start": apart(weights(), start)}
    at_start = losses()
    norms, trained, trained_losses = whole(3)
    found["norms"] = [[update(wrapped, optimizer, own(n)), norms[n]] for n in range(3)]
    found["weights"] = apart(weights(), trained)
    found["losses"] = float((losses() - trained_losses).abs().max())

    before, states_before = weights(), states()
    norm = update(wrapped, optimizer, own(3), poison=math.nan if rank == 1 else 1.0)
    found["bad_norm_is_finite"] = math.isfinite(norm)
    found["weights_moved_by_a_bad_update"] = apart(weights(), before)
    found["states_moved_by_a_bad_update"] = apart(states(), states_before)

    losses()  # leaves gathered weights behind
    parts.load_weights(start)
    found["reloaded"] = apart(weights(), start)
    found["losses_reloaded"] = float((losses() - at_start).abs().max())
    parts.load_weights(before)
    optimizer.load_state_dict(states_before, optimizer.counters())
    found["states_reloaded"] = apart(states(), states_before)
    found["step"] = {float(v) for k, v in states().items() if k.endswith("/step")} == {3.0}
    one = update(wrapped, optimizer, own(3))
    after = weights()
    parts.load_weights(before)
    optimizer.load_state_dict(states_before, optimizer.counters())
    found["same_again"] = [update(wrapped, optimizer, own(3)) == one, apart(weights(), after)]
    found["state_bytes"] = optimizer.state_bytes()
    found["state_bytes_whole"] = 8 * sum(p.numel() for p in start.values())
    try:
        NoiseHook(wrapped)
    except SpecError as error:
        found["noise"] = str(error)
    return found


def main(rank: int, world_size: int, version: str, sharding: str, folder: str) -> None:
    """Writes what was found to rank-N.json."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(check(rank, world_size, version, sharding)))
    leave_group(together=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5])
