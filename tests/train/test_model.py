"""The model is Hugging Face's GPT-2 by weights, names and losses, and keeps what the plan counted on."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from homelab_scaling.box import missing_for_compile
from homelab_scaling.plan.counting import count_params
from homelab_scaling.specs import ModelShape
from homelab_scaling.train.model import LanguageModel, LossPath, build_model, gpt2_config, sdpa_backend

N_VOCAB = 201
SHAPE = ModelShape(n_layer=3, d_model=48, n_head=4, context_tokens=32)
UNTIED = ModelShape(n_layer=3, d_model=48, n_head=4, context_tokens=32, tied=False)
PATHS: tuple[LossPath, ...] = ("chunked", "plain")


def build(shape: ModelShape = SHAPE, *, seed: int = 0, loss_path: LossPath = "chunked", loud: bool = False) -> Any:
    """A model; `loud` weights are far from their initial values, so that every part matters to the loss."""
    model = build_model(shape, N_VOCAB, seed=seed, loss_path=loss_path)
    if loud:
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def tokens(n_seqs: int = 4, length: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    block = torch.randint(0, N_VOCAB, (n_seqs, length + 1), generator=generator)
    return block[:, :-1], block[:, 1:]


# ------ counts


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    d_head=st.integers(1, 9),
    context=st.integers(1, 40),
    n_vocab=st.integers(2, 200),
    tied=st.booleans(),
)
def test_parameters_are_those_the_plan_counts(
    n_layer: int, n_head: int, d_head: int, context: int, n_vocab: int, tied: bool
) -> None:
    shape = ModelShape(n_layer=n_layer, d_model=n_head * d_head, n_head=n_head, context_tokens=context, tied=tied)
    model = build_model(shape, n_vocab, seed=0, loss_path="plain")
    assert sum(p.numel() for p in model.parameters()) == count_params(shape, n_vocab).n_stored


def test_gpt2_small_has_its_published_size() -> None:
    shape = ModelShape(n_layer=12, d_model=768, n_head=12, context_tokens=1024)
    with torch.device("meta"):
        model = LanguageModel(gpt2_config(shape, 50_257), n_vocab=50_257, loss_path="plain")
    padding = 47 * 768
    assert sum(p.numel() for p in model.parameters()) - padding == 124_439_808


# ------ initial bits


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = build(seed=7).state_dict()
    before = torch.get_rng_state()
    second = build(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "building a model must not draw from the global generator"
    other = build(seed=8).state_dict()
    for name, weight in first.items():
        assert weight.dtype == torch.float32 and weight.device.type == "cpu"
        assert torch.equal(weight, second[name])
        assert weight.ndim == 1 or not torch.equal(weight, other[name])


@pytest.mark.parametrize("shape", [SHAPE, UNTIED])
def test_initial_weights_follow_hugging_faces_scheme(shape: ModelShape) -> None:
    """Same spread as GPT2LMHeadModel(config), parameter by parameter; padded rows are zero."""
    model, theirs = build(shape), GPT2LMHeadModel(gpt2_config(shape, N_VOCAB)).state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 1:
            assert torch.equal(weight, theirs[name])
            continue
        real = weight[:N_VOCAB] if name in ("transformer.wte.weight", "lm_head.weight") else weight
        assert real.std().item() == pytest.approx(theirs[name].std().item(), rel=0.08), name
        assert abs(real.mean().item()) < 4 * real.std().item() / math.sqrt(real.numel())
        assert not weight[len(real) :].any()


def test_the_untrained_model_knows_nothing() -> None:
    """Its loss is ln V of the real vocabulary: padded columns take no probability."""
    with torch.no_grad():
        assert build()(*tokens()).item() == pytest.approx(math.log(N_VOCAB), abs=0.05)


# ------ Hugging Face's model


@pytest.mark.parametrize("shape", [SHAPE, UNTIED])
@pytest.mark.parametrize("loss_path", PATHS)
def test_hugging_face_computes_the_same_loss_from_our_weights(shape: ModelShape, loss_path: LossPath) -> None:
    model = build(shape, loss_path=loss_path, loud=True)
    theirs = GPT2LMHeadModel(model.config)
    found = theirs.load_state_dict(model.state_dict(), strict=False)
    assert found.missing_keys == (["lm_head.weight"] if shape.tied else []) and not found.unexpected_keys
    x, y = tokens()
    logits = theirs(x).logits[..., :N_VOCAB]
    wanted = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    assert model(x, y).item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    torch.testing.assert_close(model.token_losses(x, y), wanted.detach(), rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_stored_once_and_the_keys_are_hugging_faces() -> None:
    for shape in (SHAPE, UNTIED):
        theirs = set(GPT2LMHeadModel(gpt2_config(shape, N_VOCAB)).state_dict())
        assert set(build(shape).state_dict()) == theirs - ({"lm_head.weight"} if shape.tied else set())


@pytest.mark.parametrize("shape", [SHAPE, UNTIED])
def test_both_loss_paths_give_the_same_gradients(shape: ModelShape) -> None:
    """The tied embedding too, whose gradient is the sum of the lookup's and the head's."""
    grads = []
    for loss_path in PATHS:
        model = build(shape, loss_path=loss_path, loud=True)
        model(*tokens()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, chunked in grads[0].items():
        torch.testing.assert_close(chunked, grads[1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_bf16_autocast_stays_near_fp32() -> None:
    x, y = tokens()
    for loss_path in PATHS:
        model = build(loss_path=loss_path, loud=True)
        wanted = model(x, y).item()
        with torch.autocast("cpu", torch.bfloat16):
            loss, losses = model(x, y), model.token_losses(x, y)
        assert loss.dtype == losses.dtype == torch.float32
        assert loss.item() == pytest.approx(wanted, rel=3e-3)
        assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-3)


# ------ behaviour


def test_no_token_sees_its_future() -> None:
    model = build(loud=True)
    x, y = tokens()
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % N_VOCAB
    before, after = model.token_losses(x, y), model.token_losses(changed, y)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=1e-6, atol=1e-6)
    assert (before[:, 20:] != after[:, 20:]).any()


def test_a_sequence_may_be_shorter_than_the_context() -> None:
    model = build(loud=True)
    x, y = tokens()
    torch.testing.assert_close(model.token_losses(x[:, :9], y[:, :9]), model.token_losses(x, y)[:, :9])


def test_training_leaves_the_padded_rows_at_zero() -> None:
    model = build(UNTIED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(*tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert not model.transformer.wte.weight[N_VOCAB:].any()
    assert not model.lm_head.weight[N_VOCAB:].any()


class Watch(TorchDispatchMode):
    """Names of all operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every scaled_dot_product_attention."""
    calls: list[dict[str, Any]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    yield calls


@pytest.mark.parametrize("loss_path", PATHS)
def test_the_hot_path_has_no_mask_and_no_host_sync(loss_path: LossPath, attention_calls: list[dict[str, Any]]) -> None:
    """Hugging Face's own forward reads a flag on the host each time; see LanguageModel._hidden_states."""
    model = build(loss_path=loss_path)
    with Watch() as ours:
        model(*tokens()).backward()
    assert "aten::_local_scalar_dense" not in ours.names
    assert len(attention_calls) == SHAPE.n_layer
    assert all(call["attn_mask"] is None and call["is_causal"] for call in attention_calls)
    assert any("flash_attention" in name for name in ours.names)


def test_the_recorded_attention_kernel_is_the_one_that_runs() -> None:
    model = build()
    with Watch() as watch:
        model(*tokens())
    ran = any("flash_attention" in name for name in watch.names)
    assert (sdpa_backend(model, torch.device("cpu")) == "flash_attention") == ran


# ------ compile


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals
def test_compiling_renames_nothing() -> None:
    model = build()
    names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    model.compile_in_place()
    assert model.compiled
    assert (list(model.state_dict()), [name for name, _ in model.named_parameters()]) == names


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_for_compile()), reason=f"no {' or '.join(missing_for_compile())}")
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals
@pytest.mark.parametrize("loss_path", PATHS)
def test_the_compiled_model_agrees_and_still_flashes(loss_path: LossPath) -> None:
    x, y = tokens()
    found = []
    for compiled in (False, True):
        model = build(loss_path=loss_path, loud=True)
        if compiled:
            model.compile_in_place()
        loss = model(x, y)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}, model.token_losses(x, y)))
    (loss, grads, losses), (loss_c, grads_c, losses_c) = found
    assert loss_c == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(losses_c, losses, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_c[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    with torch.profiler.profile() as profile:
        model(x, y)
    assert any("flash_attention" in event.key for event in profile.key_averages())
