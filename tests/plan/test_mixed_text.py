"""A plan counts different tokens: text that stands there twice is no more text."""

import dataclasses
from collections.abc import Callable

import pytest

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import BatchTable, DataTable, Horizons, Ladder, Rung
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.specs import CorpusManifest, SourceShare


def _mixed(corpus: CorpusManifest, *shares: tuple[str, int, int]) -> CorpusManifest:
    """The corpus as a mixture of sources: (name, tokens, different tokens)."""
    rows = tuple(
        SourceShare(
            name=name,
            epochs=n_tokens / n_unique,
            n_documents=9,
            n_bytes=4 * n_tokens,
            n_tokens=n_tokens,
            n_tokens_unique=n_unique,
            n_val_documents=1,
            n_val_tokens=100,
            n_exact_duplicates=0,
        )
        for name, n_tokens, n_unique in shares
    )
    return dataclasses.replace(corpus, mixture=rows)


def _ladder(n_tokens: int, max_epochs: float) -> Ladder:
    return Ladder(
        name="test",
        rungs=(Rung(name="r", n_layer=2, d_model=64, n_head=2),),
        horizons=Horizons(tokens=(n_tokens,)),
        context_tokens=128,
        batch=BatchTable(tokens=4096),
        data=DataTable(max_epochs=max_epochs),
    )


def test_epochs_are_passes_over_different_tokens(make_corpus: Callable[..., CorpusManifest], cpu: Box) -> None:
    plain = make_corpus(n_train=4_096_000)
    mixed = _mixed(plain, ("/text/web", 2_048_000, 2_048_000), ("/text/books", 2_048_000, 341_333))
    ladder = _ladder(4_096_000, max_epochs=2)
    once = plan_ladder(ladder, plain, cpu)
    assert once.rungs[0].training.horizons[0].n_epochs == 1 and once.n_train_tokens == 4_096_000
    assert not any("nearly as good" in w or "passes over" in w for w in once.warnings)
    plan = plan_ladder(ladder, mixed, cpu)
    assert plan.rungs[0].training.horizons[0].n_epochs == pytest.approx(12 / 7, rel=1e-4)
    assert plan.n_train_tokens == 2_048_000 + 341_333
    (said,) = (w for w in plan.warnings if "nearly as good" in w)
    assert "4,096,000 tokens read books 6.0 times" in said
    with pytest.raises(SpecError, match=r"1\.7 passes over the 2,389,333 tokens .* data.max_epochs allows 1\.5"):
        plan_ladder(_ladder(4_096_000, max_epochs=1.5), mixed, cpu)


def test_a_run_that_meets_a_source_seldom_is_not_warned_of_it(make_corpus: Callable, cpu: Box) -> None:
    mixed = _mixed(make_corpus(n_train=40_960_000), ("web", 20_480_000, 20_480_000), ("hf:a/b", 20_480_000, 3_413_333))
    assert not any("nearly as good" in w for w in plan_ladder(_ladder(4_096_000, 4), mixed, cpu).warnings)
    (said,) = (w for w in plan_ladder(_ladder(40_960_000, 4), mixed, cpu).warnings if "nearly as good" in w)
    assert "read hf:a/b 6.0 times" in said
