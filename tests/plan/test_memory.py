"""The memory model against the published breakdown of a 124M model, and the choice of micro-batch and loss path."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.plan import memory
from homelab_scaling.plan.counting import count_params
from homelab_scaling.plan.memory import choose_loss_path, largest_microbatch, loss_chunk_rows, predict_vram
from homelab_scaling.specs import ModelShape

GPT2_SMALL = ModelShape(n_layer=12, d_model=768, n_head=12, context_tokens=1024)
VOCAB = 50_257
GIB = 2**30


def _predict(**changes: object) -> memory.VramEstimate:
    usual = {"optimizer": "adamw", "microbatch_seqs": 8, "n_processes": 2, "precision": "bf16", "loss_path": "chunked"}
    return predict_vram(GPT2_SMALL, VOCAB, **{**usual, **changes})


# 124M, 8 x 1024 tokens, in GB without context and reserve, by hand from what was counted: activations 2.72 (36 bytes
# per token, width and layer; 0.30 where blocks are computed again), states 16N 1.99, bf16 copies of the blocks 0.17;
# the head with a chunk of 1,171 rows 0.66 (logits 0.12, their fp32 copy 0.24, weight copy and gradient 0.23, hidden
# states and their gradient 0.05, the norm's input 0.03), or the plain loss's three fp32 logits 4.95.
BY_HAND = [
    (5.56, {}),
    (5.06, {"n_processes": 1, "accumulates": False}),
    (6.06, {"gradient_as_bucket_view": False}),
    (9.95, {"loss_path": "plain"}),
    (5.06, {"optimizer": "adamw8bit"}),
    (3.13, {"checkpointing": True}),
    (5.40, {"compiled": True}),
]


@pytest.mark.parametrize(("gb", "changes"), BY_HAND)
def test_the_known_rows_of_a_124m_model(gb: float, changes: dict[str, object]) -> None:
    assert _predict(**changes).allocated_bytes / 1e9 == pytest.approx(gb, abs=0.02)


def test_124m_needs_less_than_6_gb_at_8_sequences() -> None:
    assert _predict().allocated_bytes < 6e9


def test_terms_add_up_and_have_the_known_sizes() -> None:
    estimate = _predict(optimizer="adamw8bit")
    n = count_params(GPT2_SMALL, VOCAB).n_stored
    assert estimate.weights_bytes == 4 * n
    assert estimate.moment == "head"
    embedding = 4 * 50_304 * 768
    assert estimate.grads_bytes == 4 * n + embedding, "those that wait, and the head's"
    assert estimate.ddp_bytes == 0, "gradients live in the buckets"
    parts = (estimate.states_bytes, estimate.activations_bytes, estimate.head_bytes, estimate.workspace_bytes)
    assert estimate.allocated_bytes == sum(parts)
    assert estimate.total_bytes == estimate.allocated_bytes + estimate.context_bytes + estimate.reserve_bytes
    assert estimate.context_bytes > 0 < estimate.reserve_bytes
    assert _predict(precision="fp32").autocast_bytes == 0
    assert _predict(precision="fp32").activations_bytes > 1.7 * _predict().activations_bytes


def test_sharding_splits_the_states_and_gathers_what_a_step_needs() -> None:
    whole, halves = _predict(), _predict(sharding="full")
    assert halves.optimizer_bytes == whole.optimizer_bytes // 2
    assert halves.allocated_bytes < _predict(sharding="grad-op").allocated_bytes < whole.allocated_bytes
    assert _predict(sharding="full", n_processes=1) == _predict(n_processes=1), "one rank shares nothing"
    deep = ModelShape(n_layer=48, d_model=1600, n_head=25, context_tokens=1024)  # 1.6B
    usual = {"optimizer": "adamw", "microbatch_seqs": 1, "n_processes": 8, "precision": "bf16", "loss_path": "chunked"}
    eighth = predict_vram(deep, VOCAB, sharding="full", checkpointing=True, **usual)
    assert eighth.states_bytes < 0.3 * predict_vram(deep, VOCAB, checkpointing=True, **usual).states_bytes


def test_chunk_rows_follow_the_budget_and_the_micro_batch_and_nothing_else() -> None:
    assert loss_chunk_rows(16_384, 50_304) == 1280, "256 MiB of fp32 logits, in multiples of 128"
    assert loss_chunk_rows(16_384, 50_304) * 50_304 * 4 <= memory.LOSS_CHUNK_BYTES
    assert loss_chunk_rows(65_536, 50_304) == 4096, "a sixteenth of a large micro-batch"
    assert loss_chunk_rows(8192, 10**6) == memory.MIN_CHUNK_ROWS, "never thinner, whatever the vocabulary"
    assert loss_chunk_rows(300, 50_304) == 300, "never more rows than there are"
    assert "d_model" not in loss_chunk_rows.__code__.co_varnames


def test_the_loss_path_changes_where_the_logits_outgrow_the_budget() -> None:
    at_most = memory.LOSS_CHUNK_BYTES // (4 * 2048)
    assert choose_loss_path(at_most, 2048, on_gpu=True) == "plain"
    assert choose_loss_path(at_most + 1, 2048, on_gpu=True) == "chunked"
    assert choose_loss_path(8 * 1024, VOCAB, on_gpu=True) == "chunked"
    assert choose_loss_path(128, 257, on_gpu=False) == "chunked", "on a CPU it is the faster one at any size"


@settings(derandomize=True, deadline=None)
@given(
    seqs=st.integers(1, 600),
    card_gib=st.sampled_from([None, 4, 8, 16, 80]),
    d_model=st.sampled_from([64, 256, 768]),
    optimizer=st.sampled_from(["adamw", "adamw8bit"]),
)
def test_the_micro_batch_divides_fits_and_is_the_largest(
    seqs: int, card_gib: int | None, d_model: int, optimizer: str
) -> None:
    shape = ModelShape(n_layer=6, d_model=d_model, n_head=4, context_tokens=1024)
    card = None if card_gib is None else card_gib * GIB
    common = {"optimizer": optimizer, "n_processes": 1, "precision": "bf16"}
    best = largest_microbatch(shape, VOCAB, seqs_per_rank=seqs, card_bytes=card, **common)
    assert best is not None, "one sequence of this model fits 4 GiB"
    assert seqs % best == 0

    def allowed(micro: int) -> bool:
        tokens = micro * 1024
        cap = memory.MAX_MICROBATCH_TOKENS_CPU if card is None else memory.MAX_MICROBATCH_TOKENS_GPU
        if tokens > cap and micro > 1:
            return False
        path = choose_loss_path(tokens, VOCAB, on_gpu=True)
        need = predict_vram(shape, VOCAB, microbatch_seqs=micro, loss_path=path, accumulates=micro < seqs, **common)
        return card is None or need.total_bytes <= 0.9 * card

    assert allowed(best)
    assert not any(allowed(larger) for larger in range(best + 1, seqs + 1) if seqs % larger == 0)


def test_no_micro_batch_where_not_even_one_sequence_fits() -> None:
    best = largest_microbatch(
        GPT2_SMALL,
        VOCAB,
        seqs_per_rank=8,
        optimizer="adamw",
        n_processes=1,
        precision="bf16",
        card_bytes=2 * GIB,
    )
    assert best is None
