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
    usual = {"optimizer": "adamw", "microbatch_seqs": 8, "n_processes": 2, "precision": "bf16", "loss_path": "plain"}
    return predict_vram(GPT2_SMALL, VOCAB, **{**usual, **changes})


# 124M, 8 x 1024 tokens, tanh GELU, in GB without the context: gradients in the buckets or copied, plain or chunked head
# of 1,024 rows, AdamW or 8-bit with a 32-bit embedding, gradient checkpointing. Measured and derived for this model.
PUBLISHED = [
    (10.4, {"gradient_as_bucket_view": False}),
    (9.9, {}),
    (5.4, {"loss_path": "chunked"}),
    (4.9, {"loss_path": "chunked", "optimizer": "adamw8bit"}),
    (3.3, {"loss_path": "chunked", "checkpointing": True}),
    (7.9, {"loss_path": "chunked", "microbatch_seqs": 16}),
]


@pytest.mark.parametrize(("gb", "changes"), PUBLISHED)
def test_the_known_rows_of_a_124m_model(gb: float, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOSS_CHUNK_BYTES", 4 * 50_304 * 1024)
    assert _predict(**changes).allocated_bytes / 1e9 == pytest.approx(gb, abs=0.06)


def test_terms_add_up_and_have_the_known_sizes() -> None:
    estimate = _predict(optimizer="adamw8bit")
    n = count_params(GPT2_SMALL, VOCAB).n_stored
    assert estimate.weights_bytes == estimate.grads_bytes == 4 * n
    assert estimate.states_bytes / 1e9 == pytest.approx(1.73, abs=0.01)
    assert _predict().states_bytes / 1e9 == pytest.approx(2.24, abs=0.01)
    assert estimate.ddp_bytes == 0, "gradients live in the buckets"
    assert estimate.total_bytes == (
        estimate.states_bytes + estimate.activations_bytes + estimate.head_bytes + estimate.context_bytes
    )
    assert _predict(precision="fp32").autocast_bytes == 0
    assert _predict(precision="fp32").activations_bytes > 1.9 * _predict().activations_bytes


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
        need = predict_vram(shape, VOCAB, microbatch_seqs=micro, loss_path=path, **common)
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
