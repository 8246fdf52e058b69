"""The loss kernel against float64 autograd, whatever the chunks, the padding, the dtype and the number of ranks.

Run as a script it is one rank of the two-process test at the end.
"""

import gc
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from homelab_scaling.box import missing_for_compile
from homelab_scaling.train import loss as loss_module
from homelab_scaling.train.loss import chunked_cross_entropy, plain_cross_entropy, token_losses

needs_compiler = pytest.mark.skipif(bool(missing_for_compile()), reason=f"no {' or '.join(missing_for_compile())}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make(n: int, d: int, n_vocab: int, n_padding: int = 0, *, seed: int = 0, scale: float = 0.5) -> tuple[Tensor, ...]:
    """Hidden states, weights (padded rows not zero, so that a missing mask shows) and targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator)
    weight = torch.randn(n_vocab + n_padding, d, generator=generator) * scale
    targets = torch.randint(0, n_vocab, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Loss and gradients by autograd in float64, without the padded rows."""

    loss: float
    hidden: Tensor
    weight: Tensor
    hidden_scale: float
    """Largest sum of absolute terms behind an entry of the gradient: what rounding errors are a share of."""
    weight_scale: float


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Exact:
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = h @ w[:n_vocab].T
    logits.retain_grad()
    loss = cross_entropy(logits, targets)
    loss.backward()
    assert h.grad is not None and w.grad is not None and logits.grad is not None
    return Exact(
        loss=loss.item(),
        hidden=h.grad,
        weight=w.grad,
        hidden_scale=float((logits.grad.abs() @ w.detach()[:n_vocab].abs()).max()),
        weight_scale=float((logits.grad.abs().T @ h.detach().abs()).max()),
    )


def check_gradients(hidden: Tensor | None, weight: Tensor | None, wanted: Exact, times: float = 1.0) -> None:
    """Within a few units in the last place of fp32, of the largest sum of absolute terms."""
    if hidden is not None:
        assert float((hidden - times * wanted.hidden).abs().max()) < 1e-6 * times * wanted.hidden_scale
    if weight is not None:
        assert float((weight - times * wanted.weight).abs().max()) < 1e-6 * times * wanted.weight_scale


def check(inputs: tuple[Tensor, ...], n_vocab: int, chunk_rows: int | None) -> None:
    """Loss and gradients of one path in fp32; chunk_rows None takes the plain path."""
    hidden, weight, targets = inputs
    if chunk_rows is None:
        loss = plain_cross_entropy(hidden, weight, targets, n_vocab)
    else:
        loss = chunked_cross_entropy(hidden, weight, targets, n_vocab, chunk_rows)
    grads = torch.autograd.grad(loss, (hidden, weight))
    wanted = exact(hidden, weight, targets, n_vocab)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(wanted.loss, rel=1e-6)
    check_gradients(*grads, wanted)
    assert not grads[1][n_vocab:].any(), "padded rows must get no gradient at all"


@pytest.mark.parametrize("n_padding", [0, 23])
@pytest.mark.parametrize("chunk_rows", [1, 7, 128, 10_000, None])
def test_loss_and_gradients_are_those_of_float64_autograd(chunk_rows: int | None, n_padding: int) -> None:
    check(make(300, 24, 201, n_padding), 201, chunk_rows)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    n_vocab=st.integers(2, 70),
    n_padding=st.integers(0, 5),
    chunk_rows=st.integers(1, 50),
    seed=st.integers(0, 10_000),
)
def test_any_shape(n: int, d: int, n_vocab: int, n_padding: int, chunk_rows: int, seed: int) -> None:
    check(make(n, d, n_vocab, n_padding, seed=seed), n_vocab, chunk_rows)


def test_small_cache_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_BLOCK_BYTES", 3 * 4 * 224)  # three rows at a time
    check(make(100, 24, 201, 23), 201, 40)


def check_bf16(inputs: tuple[Tensor, ...], n_vocab: int, chunk_rows: int, wanted: Exact) -> tuple[float, float]:
    """Relative deviation of both gradients' norms under bf16 autocast; the loss must be right to 1e-4."""
    hidden, weight, targets = inputs
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, n_vocab, chunk_rows)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [x.dtype for x in (loss, *grads)] == [torch.float32] * 3
    assert loss.item() == pytest.approx(wanted.loss, rel=1e-4)
    pairs = zip(grads, (wanted.hidden, wanted.weight), strict=True)
    first, second = (float((found - want).norm() / want.norm()) for found, want in pairs)
    return first, second


def test_bf16_loss_is_accurate_at_gpt2_vocabulary() -> None:
    """Where torch's own linear_cross_entropy sums the loss in bf16 and errs by up to 15 %."""
    inputs = make(512, 16, 50_257, 47, scale=0.05)
    wanted = exact(*inputs, 50_257)
    for chunk_rows in (64, 200, 512):
        assert max(check_bf16(inputs, 50_257, chunk_rows, wanted)) < 6e-3


def test_bf16_chunks_add_up_in_fp32() -> None:
    """Sixty-four bf16 chunks summed in bf16 would lose far more than one chunk's rounding."""
    inputs = make(1024, 16, 64)
    wanted = exact(*inputs, 64)
    one, many = (check_bf16(inputs, 64, chunk_rows, wanted)[1] for chunk_rows in (1024, 16))
    assert many < 1.5 * one


def test_slices_of_the_gradient_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for rows in (7, 100_000):
        monkeypatch.setattr(loss_module, "CPU_GRADIENT_ROWS", rows)
        hidden, weight, targets = make(64, 16, 201, 23)
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked_cross_entropy(hidden, weight, targets, 201, 40)
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert torch.allclose(*grads, rtol=0, atol=2**-8 * float(grads[1].abs().max())), "bf16 rounds either once"
    assert not grads[0][201:].any()


def test_bf16_keeps_the_gradient_of_a_token_that_is_predicted_well() -> None:
    """softmax - 1 of 0.9999 is exact from the loss, and 0 when formed in bf16."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[9.2], [0.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        chunked_cross_entropy(hidden, weight, torch.tensor([0]), 2, 1).backward()
    wanted = exact(hidden.bfloat16(), weight.bfloat16(), torch.tensor([0]), 2)
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(float(wanted.hidden), rel=1e-2)


def test_non_contiguous_inputs() -> None:
    hidden, weight, _ = make(24, 60, 53)
    targets = torch.arange(120)[::2] % 53
    check((hidden.detach().T.requires_grad_(), weight.detach()[:, ::2][:, :24].requires_grad_(), targets), 53, 7)


def test_a_view_of_a_longer_batch() -> None:
    """Validation cuts x and y out of one (B, T + 1) block; flattening them is left to the caller."""
    hidden, weight, targets = make(40, 8, 30)
    padded = torch.cat((hidden.detach(), hidden.detach()), dim=1)[:, :8].requires_grad_()
    check((padded, weight, targets), 30, 9)


@pytest.mark.parametrize("chunk_rows", [3, None])
def test_padded_columns_have_no_probability(chunk_rows: int | None) -> None:
    hidden, weight, targets = make(10, 4, 11, 5)
    loud = weight.detach().clone()
    loud[11:] = 1e4
    losses = []
    for w in (weight.detach(), loud):
        if chunk_rows is None:
            losses.append(plain_cross_entropy(hidden, w, targets, 11))
        else:
            losses.append(chunked_cross_entropy(hidden, w, targets, 11, chunk_rows))
            assert torch.equal(token_losses(hidden, w, targets, 11, 3).mean(), losses[-1])
    assert losses[0].item() == losses[1].item()
    assert torch.equal(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_large_logits_do_not_overflow(scale: float) -> None:
    check(make(40, 8, 30, scale=scale), 30, 7)


def test_token_losses_are_the_terms_of_the_mean() -> None:
    hidden, weight, targets = make(50, 8, 30, 2)
    losses = token_losses(hidden, weight, targets, 30, 7)
    wanted = cross_entropy((hidden @ weight[:30].T).double(), targets, reduction="none")
    assert losses.shape == (50,) and losses.dtype == torch.float32 and not losses.requires_grad
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make(20, 8, 30)
    wanted = chunked_cross_entropy(hidden, weight, targets, 30, 7).item()

    def refuse(*_: Any) -> None:
        raise AssertionError("made a gradient under no_grad")

    monkeypatch.setattr(loss_module, "_logits_to_gradient_", refuse)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 30, 7)
    assert loss.item() == wanted and not loss.requires_grad


def test_a_frozen_side_gets_none() -> None:
    hidden, weight, targets = make(20, 8, 30)
    chunked_cross_entropy(hidden, weight.detach(), targets, 30, 7).backward()
    chunked_cross_entropy(hidden.detach(), weight, targets, 30, 7).backward()
    check_gradients(hidden.grad, weight.grad, exact(hidden, weight, targets, 30))


def test_the_outer_gradient_scales_and_nan_poisons() -> None:
    hidden, weight, targets = make(20, 8, 30)
    (chunked_cross_entropy(hidden, weight, targets, 30, 7) * 2.5).backward()
    check_gradients(hidden.grad, weight.grad, exact(hidden, weight, targets, 30), times=2.5)
    hidden.grad = weight.grad = None
    (chunked_cross_entropy(hidden, weight, targets, 30, 7) * float("nan")).backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()
    assert weight.grad is not None and weight.grad.isnan().all()


def test_a_nan_inside_reaches_the_loss() -> None:
    hidden, weight, targets = make(20, 8, 30)
    with torch.no_grad():
        hidden[13, 2] = float("nan")
    loss = chunked_cross_entropy(hidden, weight, targets, 30, 7)
    loss.backward()
    assert loss.isnan()
    assert weight.grad is not None and weight.grad.isnan().any()


def test_a_second_backward_says_what_to_do() -> None:
    loss = chunked_cross_entropy(*make(20, 8, 30), 30, 7)  # type: ignore[misc]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused() -> None:
    hidden, weight, targets = make(20, 8, 30)
    loss = chunked_cross_entropy(hidden, weight, targets, 30, 7)
    with pytest.raises(RuntimeError, match="gradient of its gradient"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("target", [-1, 30])
def test_a_target_outside_the_weight_is_an_error(target: int) -> None:
    hidden, weight, targets = make(20, 8, 30)
    targets[4] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(hidden, weight, targets, 30, 7)


class Watch(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, and every operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for value in result if isinstance(result, list | tuple) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def test_only_a_chunk_of_logits_is_alive_and_the_host_never_waits() -> None:
    hidden, weight, targets = make(256, 8, 500, 12)
    with Watch() as chunked:
        chunked_cross_entropy(hidden, weight, targets, 500, 32).backward()
    with Watch() as plain:
        plain_cross_entropy(hidden, weight, targets, 500).backward()
    assert chunked.largest == 32 * 512
    assert plain.largest == 256 * 512
    assert "aten::_local_scalar_dense" not in chunked.names | plain.names


def test_chunks_are_equal_where_they_can_be() -> None:
    sizes = [len(chunk[0]) for chunk in loss_module._chunks(640, torch.zeros(2048))]
    assert sizes == [512] * 4


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals
def test_the_compiled_kernel_agrees(dtype: torch.dtype, device: str) -> None:
    hidden, weight, targets = (x.detach().to(device) for x in make(100, 16, 201, 23))
    hidden.requires_grad_(), weight.requires_grad_()
    found = {}
    for compiled in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = chunked_cross_entropy(hidden, weight, targets, 201, 40, compiled=compiled)
        found[compiled] = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # one unit in the last place of a bf16 logit's gradient
    assert float(found[True][0]) == pytest.approx(float(found[False][0]), rel=1e-6)
    for a, b in zip(found[True][1:], found[False][1:], strict=True):
        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())
    assert not found[True][2][201:].any()


# ------ two processes


class TiedHead(torch.nn.Module):
    """An embedding used twice, as GPT-2's: at the bottom by lookup, at the top by the chunked loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.wte = torch.nn.Embedding(72, 16)
        self.mix = torch.nn.Linear(16, 16)
        for p in self.parameters():
            p.data.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return chunked_cross_entropy(self.mix(self.wte(x)).tanh(), self.wte.weight, y, 67, 5)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randint(0, 67, (2, 48), generator=generator)
    return x, y


def run_rank(rank: int, folder: Path) -> None:
    """One of two ranks: half of the batch, two accumulated passes of which only the second synchronises."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(TiedHead(), gradient_as_bucket_view=True)
    x, y = (half.chunk(2)[rank].chunk(2) for half in batch())
    with model.no_sync():
        (model(x[0], y[0]) / 2).backward()
    (model(x[1], y[1]) / 2).backward()
    torch.save([p.grad for p in model.parameters()], folder / f"grads{rank}.pt")
    del model  # its reducer's threads must be gone before the group is, or the process may abort on its way out
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    model = TiedHead()
    model(*batch()).backward()
    of_ranks = [torch.load(tmp_path / f"grads{rank}.pt", weights_only=True) for rank in (0, 1)]
    for parameter, first, second in zip(model.parameters(), *of_ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, parameter.grad, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
