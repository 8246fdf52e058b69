"""Blocks that are computed again on the way back: the same gradients, less kept, whatever they are combined with."""

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_run import steps_of, train_here

from homelab_scaling.batch.noise import NoiseHook
from homelab_scaling.box import missing_for_compile
from homelab_scaling.specs import ModelShape
from homelab_scaling.train.model import LossPath, build_model

N_VOCAB = 201
SHAPE = ModelShape(n_layer=3, d_model=48, n_head=4, context_tokens=32)


def tokens(n_seqs: int = 4) -> tuple[Tensor, Tensor]:
    block = torch.randint(0, N_VOCAB, (n_seqs, 33), generator=torch.Generator().manual_seed(3))
    return block[:, :-1], block[:, 1:]


def gradients(*, recompute: bool, loss_path: LossPath, bf16: bool = False, compiled: bool = False) -> dict[str, Tensor]:
    model = build_model(SHAPE, N_VOCAB, seed=0, loss_path=loss_path, recompute=recompute)
    if compiled:
        model.compile_in_place()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(*tokens())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("loss_path", ["chunked", "plain"])
def test_gradients_are_the_same_bits(loss_path: LossPath, bf16: bool) -> None:
    kept = gradients(recompute=False, loss_path=loss_path, bf16=bf16)
    again = gradients(recompute=True, loss_path=loss_path, bf16=bf16)
    assert kept.keys() == again.keys()
    for name, grad in kept.items():
        assert torch.equal(again[name], grad), name


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_compile()), reason=f"no {' or '.join(missing_for_compile())}")
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_gradients_agree(bf16: bool) -> None:
    kept = gradients(recompute=False, loss_path="chunked", bf16=bf16, compiled=True)
    again = gradients(recompute=True, loss_path="chunked", bf16=bf16, compiled=True)
    for name, grad in kept.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-6, atol=1e-6 * grad.abs().max().item(), msg=name)


def saved_bytes(model: Any) -> int:
    """Bytes that autograd keeps of the blocks between forward and backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(tokens()[0])
    total = sum(kept.values())
    del hidden
    return total


def test_four_bytes_of_each_layers_token_are_kept() -> None:
    """Per token and width: the fp32 residual stream before each block, and what the ends of the model keep."""
    found = []
    for n_layer in (2, 4):
        shape = ModelShape(n_layer=n_layer, d_model=48, n_head=4, context_tokens=32)
        found.append(saved_bytes(build_model(shape, N_VOCAB, seed=0, loss_path="chunked", recompute=True)))
    assert (found[1] - found[0]) / (2 * 4 * 32 * 48) == pytest.approx(4.0, abs=0.1)


def test_the_noise_scale_is_measured_as_without() -> None:
    found = []
    for recompute in (False, True):
        model = build_model(SHAPE, N_VOCAB, seed=0, loss_path="chunked", recompute=recompute)
        hook = NoiseHook(model)
        x, y = tokens()
        with hook.listening(n_passes=2, seqs_per_pass=2):
            for part in (slice(0, 2), slice(2, 4)):
                (model(x[part], y[part]) / 2).backward()
        hook.note()
        found.append(hook.drain())
    assert found[0] == found[1]


def test_a_run_with_it_is_the_run_without_it(make_run) -> None:
    """The same folder, too: recomputing is execution, not science, so segments may differ in it."""
    spec, kept = make_run(lab="kept")
    record = train_here(spec, kept)
    other, again = make_run(lab="again", activation_checkpointing=True)
    assert other.run_id == spec.run_id
    assert train_here(other, again).rows[-1].loss_nats == record.rows[-1].loss_nats
    assert steps_of(again) == steps_of(kept)
