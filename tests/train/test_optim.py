"""AdamW in both widths: the right update, no update from a non-finite gradient, and a state that comes back exactly."""

import pytest
import torch
from torch import nn

from homelab_scaling.specs import Optim
from homelab_scaling.train.optim import MaskedAdamW


class Toy(nn.Module):
    """A token embedding, a matrix large enough for 8 bit, a small one and a bias."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wte = nn.Embedding(64, 80)
        self.large = nn.Linear(80, 96)
        self.small = nn.Linear(8, 8, bias=False)
        for p in self.parameters():
            p.data.normal_(0, 0.1, generator=generator)


def set_gradients(model: nn.Module, seed: int, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 0.01 if value is None else torch.full_like(p, value)


def snapshot(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_masked_step_changes_no_weight(name: str, poison: float) -> None:
    model = Toy()
    optimizer = MaskedAdamW(model, Optim(name=name))
    set_gradients(model, 1)
    optimizer.step(1e-2, YES)
    before = snapshot(model)
    set_gradients(model, 2, poison)
    norm = optimizer.clip()
    optimizer.step(1e-2, torch.isfinite(norm))
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    set_gradients(model, 3)
    optimizer.step(1e-2, YES)
    assert all(torch.isfinite(p).all() for p in model.parameters()), "the states are clean too"
    assert not torch.equal(before[0], snapshot(model)[0])


def test_adamw_is_torch_adamw_with_decay_on_matrices_only() -> None:
    ours, theirs = Toy(), Toy()
    optim = Optim(weight_decay=0.3, grad_clip=1e9)
    optimizer = MaskedAdamW(ours, optim)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        optimizer.clip()
        optimizer.step(1e-2, YES)
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_eight_bit_covers_large_matrices_but_not_the_token_embedding() -> None:
    model = Toy()
    optimizer = MaskedAdamW(model, Optim(name="adamw8bit"))
    set_gradients(model, 1)
    optimizer.step(1e-2, YES)
    tensors, _ = optimizer.state_dict()
    assert tensors["large.weight/state1"].dtype == torch.uint8
    for name in ("wte.weight", "small.weight", "large.bias"):
        assert tensors[f"{name}/exp_avg"].dtype == torch.float32
    wide = MaskedAdamW(Toy(), Optim())
    set_gradients(next(iter([m for m in [model]])), 1)
    for p in wide.names:
        p.grad = torch.ones_like(p)
    wide.step(1e-2, YES)
    assert optimizer.state_bytes() < 0.65 * wide.state_bytes()


def test_eight_bit_follows_32_bit_closely() -> None:
    wide, narrow = Toy(), Toy()
    a, b = MaskedAdamW(wide, Optim()), MaskedAdamW(narrow, Optim(name="adamw8bit"))
    start = snapshot(wide)[1]
    for seed in range(20):
        for model, optimizer in ((wide, a), (narrow, b)):
            set_gradients(model, seed)
            optimizer.clip()
            optimizer.step(1e-3, YES)
    moved = (wide.large.weight - start).norm()
    apart = (wide.large.weight - narrow.large.weight).norm()
    assert apart < 0.1 * moved


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_state_comes_back_exactly(name: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = Toy()
    optimizer = MaskedAdamW(model, Optim(name=name))
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step(1e-2, YES)
    tensors, counters = optimizer.state_dict()
    save_file(tensors, tmp_path / "o.safetensors")
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    restored = MaskedAdamW(twin, Optim(name=name))
    restored.load_state_dict(load_file(tmp_path / "o.safetensors"), counters)
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (twin, restored)):
            set_gradients(m, seed)
            o.step(1e-2, YES)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
