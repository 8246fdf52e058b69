"""Two small trained runs on real text: byte-level BPE with a tied head, bytes with a head of its own."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_run import make_toy_run, train_here

from homelab_scaling.data.shards import build_shards
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import ModelShape, RunSpec

TEXTS = [
    f"Chapter {i}. " + f"the {i} cats sat on the {i * 7} mats; wörld \U0001f600. " * (3 + i % 5) for i in range(90)
]
SHAPES = {
    "bpe:300": ModelShape(n_layer=2, d_model=32, n_head=2, context_tokens=32),
    "bytes": ModelShape(n_layer=1, d_model=32, n_head=4, context_tokens=32, tied=False),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run and its text."""

    spec: RunSpec
    folder: RunFolder
    shards: Path


def make_run(root: Path, tokenizer: str, **changes: object) -> Run:
    """Trains for 20 steps with rows at 10 and 20, and keeps the last resume state."""
    source = root / "text.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    manifest = build_shards([str(source)], tokenizer, root / "shards", val_frac=0.2)
    settings = {"shape": SHAPES[tokenizer], "n_vocab": manifest.n_vocab, "horizons": (10, 20), "trackers": ()} | changes
    spec, folder = make_toy_run(root, manifest, checkpoint_every_steps=4, **settings)
    train_here(spec, folder)
    return Run(spec=spec, folder=folder, shards=root / "shards")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """By tokenizer; nobody may change them."""
    return {name: make_run(tmp_path_factory.mktemp(name.replace(":", "")), name) for name in SHAPES}


@pytest.fixture
def run(runs: dict[str, Run]) -> Run:
    """The one with BPE and a tied head."""
    return runs["bpe:300"]
