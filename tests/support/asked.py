"""A task that notes every question, a sitting to ask it in, and a small model whose tokenizer was trained here."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from homelab_scaling.evals.price import Tariff
from homelab_scaling.evals.results import Document, Kind, Outcome, Setting
from homelab_scaling.evals.sitting import Sitting
from homelab_scaling.evals.store import About, Store
from homelab_scaling.specs import Money
from homelab_scaling.watch.energy import WallModel

CONTEXT, N_VOCAB = 64, 300
WORDS = "the cat dog house tree runs sees likes old green over seven stones and because river nobody walked blue"


@dataclass(kw_only=True)
class Noted:
    """A task whose answers follow from the document; every question is a line of `notes`."""

    n: int
    notes: Path
    name: str = "noted"
    metric: str = "acc"
    kind: Kind = "share"
    higher_is_better: bool = True
    chance: float | None = 0.5
    settings: dict[str, Setting] = field(default_factory=lambda: {"shots": 0})
    answers: Any = None
    """doc number -> value; digits of 7 n by default."""

    def documents(self) -> Sequence[Document]:
        return [Document(doc_id=f"d{i}", text=f"document {i}") for i in range(self.n)]

    def ask(self, model: Any, documents: Sequence[Document]) -> list[Outcome]:
        with open(self.notes, "a", encoding="utf-8") as file:
            file.write(json.dumps([document.doc_id for document in documents]) + "\n")
        return [self._answer(int(document.doc_id[1:])) for document in documents]

    def _answer(self, i: int) -> Outcome:
        if self.answers is not None:
            value = float(self.answers(i))
        else:
            value = float(i * 7 % 10 < 6) if self.kind == "share" else 10.0 + i * 7 % 10
        return Outcome(
            doc_id=f"d{i}", value=value, weight=100.0 + i if self.kind == "bits per byte" else 1.0, n_tokens=5
        )

    def asked(self) -> list[str]:
        """Every document that was asked, in order, as often as it was."""
        if not self.notes.exists():
            return []
        return [doc for line in self.notes.read_text(encoding="utf-8").splitlines() for doc in json.loads(line)]


def about(name: str = "m", **changes: Any) -> About:
    facts: dict[str, Any] = {
        "source": f"/models/{name}",
        "weights": "w0",
        "tokenizer": "t0",
        "context_tokens": CONTEXT,
        "n_vocab": N_VOCAB,
        "is_ours": False,
        "device": "cpu",
        "dtype": "float32",
    }
    return About(name=name, **facts | changes)


def sitting(folder: Path, *, facts: About | None = None, money: Money | None = None, **more: Any) -> Sitting:
    """A sitting of a model that no task of this file looks at."""
    tariff = Tariff(money=money or Money(), wall=WallModel(), why_no_meter="asked on a CPU, which no sensor meters")
    return Sitting(model=None, about=facts or about(), store=Store(folder), tariff=tariff, **more)


def sentences(n: int, seed: int = 0) -> list[str]:
    rng, words = random.Random(seed), WORDS.split()
    return [" ".join(rng.choice(words) for _ in range(rng.randint(5, 30))).capitalize() + "." for _ in range(n)]


def tiny_model(folder: Path, *, seed: int = 0, context: int = CONTEXT) -> Any:
    """A Portable of a random GPT-2 with a byte-level BPE of N_VOCAB tokens, trained on sentences of WORDS."""
    from tiny_models import corpus, portable, random_gpt2

    from homelab_scaling.data.shards import open_shards

    tokenizer = open_shards(corpus(folder, sentences(40), tokenizer=f"bpe:{N_VOCAB}")).tokenizer()
    return portable(random_gpt2(tokenizer.n_vocab, context, seed), tokenizer=tokenizer, context=context)
