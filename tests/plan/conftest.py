"""Machines and corpora to plan for."""

from collections.abc import Callable

import pytest

from homelab_scaling.box import Box
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.specs import CorpusManifest, ShardFile, Split

MakeCorpus = Callable[..., CorpusManifest]


def _split(name: str, n_tokens: int) -> Split:
    file = ShardFile(name=f"{name}.bin", n_tokens=n_tokens, sha256=f"{name}-{n_tokens}")
    return Split(files=(file,), n_tokens=n_tokens, n_bytes=4 * n_tokens, n_documents=max(1, n_tokens // 1000))


@pytest.fixture(scope="session")
def make_corpus() -> MakeCorpus:
    """`make_corpus(n_train=..., n_val=..., tokenizer=..., n_vocab=...)`: a manifest without its shards."""

    def make(
        *, n_train: int = 10**12, n_val: int = 10**7, tokenizer: str = "bpe:2048", n_vocab: int = 2048
    ) -> CorpusManifest:
        return CorpusManifest(
            tokenizer=tokenizer,
            tokenizer_file="tokenizer.json",
            tokenizer_hash="a" * 64,
            n_vocab=n_vocab,
            eot_id=0,
            dtype="uint16",
            train=_split("train", n_train),
            val=_split("val", n_val),
            sources=("python",),
            held_out_rule="by content hash",
        )

    return make


@pytest.fixture(scope="session")
def cpu() -> Box:
    """Two cores without a card."""
    return Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=True)


@pytest.fixture(scope="session")
def two_4080() -> Box:
    """The reference machine."""
    return box_with("RTX 4080", 2)
