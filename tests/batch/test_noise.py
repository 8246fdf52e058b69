"""The hook's squared norms against separate backward passes: accumulation, ranks, tied weights, losses, precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from noise_ranks import SEQS, micro_batches, norms_by_separate_passes, toy_model
from torch import nn

from homelab_scaling.batch.noise import Cut, NoiseHook, choose_cut
from homelab_scaling.box import missing_for_compile
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.plan.noise import every_steps
from homelab_scaling.train.model import LanguageModel

RANKS = Path(__file__).resolve().parents[1] / "support" / "noise_ranks.py"
EXACT = 1e-5


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def measure(hook: NoiseHook, model: nn.Module, batches: torch.Tensor) -> None:
    """One measuring step as the training loop would make it."""
    with hook.listening(n_passes=len(batches), seqs_per_pass=batches.shape[1]):
        for batch in batches:
            (model(batch[:, :-1], batch[:, 1:]) / len(batches)).backward()


def assert_exact(hook: NoiseHook, model: nn.Module, batches: torch.Tensor) -> None:
    q, of_mean = norms_by_separate_passes(model, batches)
    measure(hook, model, batches)
    hook.note()
    (found,) = hook.drain()
    assert found.k == len(batches) and found.microbatch_seqs == batches.shape[1]
    assert found.mean_sq_norm == pytest.approx(q, rel=EXACT)
    assert found.sq_norm_of_mean == pytest.approx(of_mean, rel=EXACT)
    model.zero_grad()


@pytest.mark.parametrize("loss_path", ["chunked", "plain"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulation", [2, 3])
def test_norms_are_those_of_separate_passes(accumulation: int, tied: bool, loss_path: str) -> None:
    model = toy_model(tied=tied, loss_path=loss_path)
    assert_exact(NoiseHook(model), model, micro_batches(accumulation))


@pytest.mark.parametrize(("seqs", "parts"), [(4, 2), (3, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_single_micro_batch_is_cut_and_its_gradient_stays_what_it_was(seqs: int, parts: int, compiled: bool) -> None:
    model = toy_model()
    (batch,) = micro_batches(1, seqs)
    cut = choose_cut(n_passes=1, world_size=1, seqs_per_pass=seqs, compiled=compiled)
    assert cut == Cut(parts=parts, copies=parts if compiled else 1)
    assert ("the compiled shape is kept" in cut.words) == compiled
    pieces = list(cut.pieces(batch[:, :-1], batch[:, 1:]))
    assert all((x.shape == batch[:, 1:].shape) == compiled for x, _ in pieces)
    q, of_mean = norms_by_separate_passes(model, torch.stack(batch.chunk(parts)))
    hook = NoiseHook(model)
    with hook.listening(n_passes=parts, seqs_per_pass=seqs // parts):
        for x, y in pieces:
            (model(x, y) / parts).backward()
    hook.note()
    (found,) = hook.drain()
    assert found.mean_sq_norm == pytest.approx(q, rel=EXACT)
    assert found.sq_norm_of_mean == pytest.approx(of_mean, rel=EXACT)
    cut_up = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(batch[:, :-1], batch[:, 1:]).backward()
    for p, gradient in zip(model.parameters(), cut_up, strict=True):
        torch.testing.assert_close(gradient, p.grad)


def test_bf16_weights_and_bf16_arithmetic_are_summed_in_fp32() -> None:
    model, batches = toy_model(), micro_batches(4)  # dividing the loss by a power of two leaves bf16's rounding alone
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(NoiseHook(model), model, batches)
    model = toy_model(loss_path="plain").bfloat16()
    q, _ = norms_by_separate_passes(model, batches)
    hook = NoiseHook(model)
    measure(hook, model, batches)
    hook.note()
    (found,) = hook.drain()
    assert found.mean_sq_norm == pytest.approx(q, rel=EXACT)


def test_the_norm_before_clipping_can_be_handed_in() -> None:
    model, batches = toy_model(), micro_batches(3)
    _, of_mean = norms_by_separate_passes(model, batches)
    hook = NoiseHook(model)
    for _ in range(2):
        measure(hook, model, batches)
        hook.note(nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
        model.zero_grad()
    assert [m.sq_norm_of_mean for m in hook.drain()] == pytest.approx([of_mean, of_mean], rel=EXACT)
    assert hook.drain() == []


def test_hooks_replace_no_gradient_and_are_gone_afterwards_even_after_an_error() -> None:
    model, batches = toy_model(), micro_batches(2)
    measure(NoiseHook(model), model, batches)
    listened = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for batch in batches:
        (model(batch[:, :-1], batch[:, 1:]) / 2).backward()
    for p, gradient in zip(model.parameters(), listened, strict=True):
        assert torch.equal(p.grad, gradient)
    hook = NoiseHook(model)
    assert hook._note_gradient(torch.ones(2)) is None
    with pytest.raises(ZeroDivisionError), hook.listening(n_passes=2, seqs_per_pass=1):
        assert all(p._backward_hooks for p in model.parameters())
        raise ZeroDivisionError
    assert not any(p._backward_hooks for p in model.parameters())
    assert hook.drain() == []


def test_no_hook_runs_while_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = toy_model(), micro_batches(2)
    calls = []
    monkeypatch.setattr(NoiseHook, "_note_gradient", lambda self, grad: calls.append(grad.shape))
    NoiseHook(model)
    model(batches[0][:, :-1], batches[0][:, 1:]).backward()
    assert calls == []


def test_non_finite_gradients_too_few_micro_batches_and_sharded_weights_are_refused() -> None:
    model = toy_model()
    hook = NoiseHook(model)
    with torch.no_grad():
        model.transformer.wpe.weight[0] = float("nan")
    measure(hook, model, micro_batches(2))
    hook.note()
    with pytest.raises(DataError, match="gradients that are not finite"):
        hook.drain()
    with pytest.raises(DataError, match="found 1 micro-batch, wants 2"), hook.listening(n_passes=1, seqs_per_pass=1):
        pass
    with pytest.raises(DataError, match="1 micro-batch of 1 sequence"):
        choose_cut(n_passes=1, world_size=1, seqs_per_pass=1, compiled=False)

    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs a process group to be made."""

    with pytest.raises(SpecError, match=r"found sharded parameters \(FSDP\)"):
        NoiseHook(nn.Sequential(FullyShardedDataParallel(), nn.Linear(1, 1)))


def test_the_cadence_keeps_the_mean_overhead_below_three_percent() -> None:
    assert every_steps(0.0) == every_steps(0.03) == 1
    for overhead in (0.05, 0.2, 1.0):
        assert overhead / every_steps(overhead) <= 0.03 < overhead / (every_steps(overhead) - 1)


def compiled_model(backend: str, loss_path: str) -> LanguageModel:
    model = toy_model(loss_path=loss_path)
    torch._dynamo.reset()
    model._compiled_backbone = torch.compile(model._hidden_states, backend=backend)
    model._plain_loss = torch.compile(model._plain_loss, backend=backend)
    return model


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals
@pytest.mark.parametrize("loss_path", ["chunked", "plain"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_measured_without_being_compiled_again(
    backend: str, loss_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # leaves no pool of processes behind
    if backend == "inductor" and missing_for_compile():
        pytest.skip(f"torch.compile lacks {' and '.join(missing_for_compile())}")
    model, batches = compiled_model(backend, loss_path), micro_batches(3)
    norms_by_separate_passes(model, batches)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert_exact(NoiseHook(model), model, batches)
    (batch,) = micro_batches(1)
    cut = choose_cut(n_passes=1, world_size=1, seqs_per_pass=SEQS, compiled=True)
    for x, y in cut.pieces(batch[:, :-1], batch[:, 1:]):
        model(x, y).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("graph", ["static", "dynamic"])
def test_two_ranks_agree_with_separate_passes(tmp_path: Path, accumulation: int, graph: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), "2", str(accumulation), graph, str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    q, of_mean = norms_by_separate_passes(toy_model(), micro_batches(2 * accumulation))
    for rank in range(2):
        for k, mean_sq_norm, sq_norm_of_mean in json.loads((tmp_path / f"rank-{rank}.json").read_text()):
            assert k == 2 * accumulation
            assert mean_sq_norm == pytest.approx(q, rel=EXACT)
            assert sq_norm_of_mean == pytest.approx(of_mean, rel=EXACT)
