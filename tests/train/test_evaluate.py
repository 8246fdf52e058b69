"""The held-out loss: against a sum by hand, over ranks, with a standard error that means something."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_run import CONTEXT, EOT, N_VOCAB, write_shards

from homelab_scaling.data.shards import Shards, open_shards
from homelab_scaling.specs import ModelShape
from homelab_scaling.train.evaluate import Evaluator, summarize
from homelab_scaling.train.model import build_model


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    write_shards(tmp_path / "shards")
    return open_shards(tmp_path / "shards")


def evaluator(shards: Shards, *, rank: int = 0, world: int = 1, batch: int = 7, sums: list | None = None) -> Evaluator:
    def collect(vector: torch.Tensor) -> torch.Tensor:
        if sums is not None:
            sums.append(vector.clone())
        return vector

    return Evaluator(
        shards,
        context_tokens=CONTEXT,
        n_tokens=10**9,
        rank=rank,
        world_size=world,
        batch_seqs=batch,
        device=torch.device("cpu"),
        sum_over_ranks=collect,
    )


@pytest.fixture
def model():
    shape = ModelShape(n_layer=1, d_model=16, n_head=2, context_tokens=CONTEXT)
    return build_model(shape, N_VOCAB, seed=3, loss_path="chunked")


def test_it_is_the_mean_over_every_window_and_documents_are_told_apart(shards: Shards, model) -> None:
    tokens = np.fromfile(Path(shards.folder) / "val.bin", dtype=np.uint16).astype(np.int64)
    n = (len(tokens) - 1) // CONTEXT
    x = torch.from_numpy(tokens[: n * CONTEXT].reshape(n, CONTEXT))
    y = torch.from_numpy(tokens[1 : n * CONTEXT + 1].reshape(n, CONTEXT))
    by_hand = model.token_losses(x, y).double()
    found = evaluator(shards).measure(model)
    assert found.n_tokens == n * CONTEXT
    assert found.loss_nats == pytest.approx(float(by_hand.mean()), rel=1e-6)
    assert found.bpb == pytest.approx(found.loss_nats / math.log(2) / 3)
    # A target belongs to the document that it ends or continues: one more than the end marks before it.
    borders = np.cumsum(tokens[: n * CONTEXT] == EOT)
    assert found.n_documents == len(set(borders))


@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_the_batch_it_is_measured_in_does_not_matter(shards: Shards, model, batch: int) -> None:
    one, other = evaluator(shards).measure(model), evaluator(shards, batch=batch).measure(model)
    assert other.n_tokens == one.n_tokens and other.n_documents == one.n_documents
    assert other.loss_nats == pytest.approx(one.loss_nats, rel=1e-6)
    assert other.loss_se_nats == pytest.approx(one.loss_se_nats, rel=1e-4)


def test_ranks_measure_interleaved_parts_that_add_up(shards: Shards, model) -> None:
    sums: list[torch.Tensor] = []
    whole = evaluator(shards).measure(model)
    for rank in range(3):
        evaluator(shards, rank=rank, world=3, sums=sums).measure(model)
    loss, tokens = sum(sums).numpy()
    together = summarize(loss, tokens, 3.0)
    assert together.n_tokens == whole.n_tokens
    assert together.loss_nats == pytest.approx(whole.loss_nats, rel=1e-6)
    assert together.loss_se_nats == pytest.approx(whole.loss_se_nats, rel=1e-4)


def test_the_standard_error_covers_the_spread_over_documents() -> None:
    """400 draws of 50 documents from a population: the stated error is the spread of the means."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = rng.integers(20, 200, size=50).astype(float)
        loss = tokens * rng.normal(3.0, 0.5, size=50)
        found = summarize(loss, tokens, None)
        means.append(found.loss_nats)
        errors.append(found.loss_se_nats)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert found.bpb is None


def test_one_document_has_no_standard_error() -> None:
    assert summarize(np.array([30.0]), np.array([10.0]), None).loss_se_nats is None
