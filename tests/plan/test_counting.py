"""Parameters and FLOPs against published tables, an independent sum of matmuls, and the real modules."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.plan.counting import (
    count_params,
    flops_6nd_per_token,
    flops_chinchilla_appendix_f,
    flops_per_token,
    matmul_params,
    pad_vocab,
)
from homelab_scaling.plan.ladder import read_ladder, shipped_ladders
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.specs import ModelShape

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "counting.json").read_text(encoding="utf-8"))


def _shape(n_layer: int, d_model: int, n_head: int = 1, context: int = 1024, *, tied: bool = True) -> ModelShape:
    return ModelShape(n_layer=n_layer, d_model=d_model, n_head=n_head, context_tokens=context, tied=tied)


@pytest.mark.parametrize("row", GOLDEN["gpt2"], ids=lambda row: row["name"])
def test_gpt2_sizes_are_exact(row: dict[str, int]) -> None:
    counted = count_params(_shape(row["n_layer"], row["d_model"], row["n_head"]), 50_257)
    assert counted.n_params == row["n_params"]
    assert counted.n_padding == (50_304 - 50_257) * row["d_model"]


def test_gpt2_small_by_group() -> None:
    counted = count_params(_shape(12, 768, 12), 50_257)
    assert (counted.n_body, counted.n_pos, counted.n_embed) == (85_056_000, 786_432, 38_597_376)
    assert counted.n_head == counted.n_embed, "the head's matmul counts although its matrix is the embedding's"
    untied = count_params(_shape(12, 768, 12, tied=False), 50_257)
    assert untied.n_params - counted.n_params == counted.n_head
    assert untied.n_padding == 2 * counted.n_padding


@pytest.mark.parametrize("row", GOLDEN["flops"], ids=lambda row: f"L{row['n_layer']} d{row['d_model']}")
def test_flop_conventions_keep_their_known_ratios(row: dict[str, float]) -> None:
    shape = _shape(int(row["n_layer"]), int(row["d_model"]))
    full = flops_per_token(shape, 50_304, attention="full")
    counted = count_params(shape, 50_304)
    body = 12 * shape.n_layer * shape.d_model**2
    assert full == 6 * (body + 50_304 * shape.d_model) + 12 * shape.n_layer * shape.d_model * 1024
    assert flops_6nd_per_token(body) / full == pytest.approx(row["six_n_nonemb"], abs=5e-4)
    matrices_and_positions = matmul_params(shape, 50_304) + counted.n_pos
    assert flops_6nd_per_token(matrices_and_positions) / full == pytest.approx(row["six_n_total"], abs=5e-4)
    assert flops_per_token(shape, 50_304) / full == pytest.approx(row["causal"], abs=5e-4)
    assert 6 * counted.n_head / full == pytest.approx(row["head_share"], abs=5e-3)


def test_causal_attention_is_the_sum_over_positions() -> None:
    shape = _shape(3, 48, context=37)
    attention = sum(12 * 3 * 48 * attended for attended in range(1, 38)) / 37
    assert flops_per_token(shape, 100) == pytest.approx(6 * matmul_params(shape, 100) + attention, rel=1e-12)


def test_chinchilla_shapes_give_their_reported_sizes(shared_data: Path) -> None:
    """Table A9 counts blocks, one 32,000-row embedding and the relative-position matrix (d^2) of every layer."""
    with open(shared_data / "chinchilla_table_a9_models.csv", encoding="utf-8") as file:
        rows = [{k: int(v) for k, v in row.items()} for row in csv.DictReader(file)]
    usual = [r for r in rows if r["kv_size"] * r["n_heads"] == r["d_model"] and r["ffw_size"] == 4 * r["d_model"]]
    assert len(usual) >= 40, "the table was cut"
    for row in usual:
        shape = _shape(row["n_layers"], row["d_model"])
        ours = matmul_params(shape, 32_000) + row["n_layers"] * row["d_model"] ** 2
        assert ours == pytest.approx(row["params_reported"], rel=0.02), row


TABLE_A4 = {73e6: 1.03, 305e6: 1.10, 552e6: 1.08, 1.1e9: 1.04, 1.6e9: 1.03, 6.8e9: 0.99}
"""Hoffmann et al. 2022: parameters -> their FLOPs over 6 N D."""


def test_appendix_f_gives_the_ratios_of_table_a4(shared_data: Path) -> None:
    """Without embedding and final logits; with both, small models come out far above 6 N D."""
    with open(shared_data / "chinchilla_table_a9_models.csv", encoding="utf-8") as file:
        models = [{k: int(v) for k, v in row.items()} for row in csv.DictReader(file)]
    found = []
    for wanted, ratio in TABLE_A4.items():
        row = min(models, key=lambda m: abs(m["params_reported"] - wanted))
        assert row["params_reported"] == pytest.approx(wanted, rel=0.04)
        shape = {
            "n_layer": row["n_layers"],
            "d_model": row["d_model"],
            "d_ff": row["ffw_size"],
            "n_head": row["n_heads"],
            "d_head": row["kv_size"],
            "context_tokens": 2048,
        }
        counted = matmul_params(_shape(row["n_layers"], row["d_model"]), 32_000) + row["n_layers"] * row["d_model"] ** 2
        assert counted == pytest.approx(row["params_reported"], rel=0.02)
        ours = flops_chinchilla_appendix_f(**shape) / flops_6nd_per_token(counted)
        assert ours == pytest.approx(ratio, abs=0.0051), "the table prints two decimals"
        found.append(flops_chinchilla_appendix_f(**shape, n_vocab=32_000) / flops_6nd_per_token(counted))
    assert found == pytest.approx([1.58, 1.32, 1.23, 1.14, 1.12, 1.03], abs=0.0051), "with embedding and logits"


def _real_size(shape: ModelShape, n_vocab: int) -> int:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=pad_vocab(n_vocab),
        n_positions=shape.context_tokens,
        n_embd=shape.d_model,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return sum(p.numel() for p in GPT2LMHeadModel(config).parameters())


@pytest.mark.parametrize("name", shipped_ladders())
def test_shipped_rungs_store_what_the_real_modules_store(name: str) -> None:
    from homelab_scaling.plan.ladder import plan_ladder

    ladder, _path = read_ladder(name)
    plan = plan_ladder(ladder, None, box_with("RTX 4080", 2))
    assert len(plan.rungs) == len(ladder.rungs) >= 3
    for rung in plan.rungs:
        assert _real_size(rung.size.shape, plan.n_vocab) == rung.size.params.n_stored
        assert rung.size.n_params == rung.size.params.n_stored - rung.size.params.n_padding


def test_an_untied_real_module_stores_two_padded_matrices() -> None:
    shape = _shape(2, 32, 2, 16, tied=False)
    assert _real_size(shape, 100) == count_params(shape, 100).n_stored


@settings(derandomize=True, deadline=None)
@given(st.integers(2, 10**6))
def test_padding_is_the_next_multiple_of_64(n_vocab: int) -> None:
    padded = pad_vocab(n_vocab)
    assert padded % 64 == 0
    assert 0 <= padded - n_vocab < 64
