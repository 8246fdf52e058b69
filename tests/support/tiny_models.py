"""Models and corpora small enough to be evaluated in milliseconds, and networks that are planted to know one thing."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from homelab_scaling.data.shards import build_shards, open_shards
from homelab_scaling.data.tokenizers import BytesTokenizer, Tokenizer
from homelab_scaling.export.convert import Portable
from homelab_scaling.export.hf_tokenizer import to_hugging_face


def portable(
    network: Any = None, *, tokenizer: Tokenizer | None = None, context: int = 32, shards: Path | None = None
) -> Portable:
    """A model with its tokenizer (bytes if not told), as `open_model` gives them."""
    cutter = tokenizer or BytesTokenizer()
    return Portable(
        name="tiny",
        model=network if network is not None else random_gpt2(cutter.n_vocab, context),
        tokenizer=to_hugging_face(cutter, context),
        context_tokens=context,
        n_vocab=cutter.n_vocab,
        eot_id=cutter.eot_id,
        device="cpu",
        run=shards,
        shards=shards,
    )


def random_gpt2(n_vocab: int, context: int, seed: int = 0) -> Any:
    """Two layers of width 16 with weights large enough to have opinions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=n_vocab,
        n_positions=context,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=n_vocab - 1,
        eos_token_id=n_vocab - 1,
    )
    return GPT2LMHeadModel(config).eval()


class Planted(nn.Module):
    """A network whose next token is told by a rule: (tokens so far) -> token, or None for indifference."""

    def __init__(self, n_vocab: int, rule: Any, strength: float = 8.0) -> None:
        super().__init__()
        self.n_vocab, self.rule, self.strength = n_vocab, rule, strength

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, self.n_vocab)
        for row, (ids, seen) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for place in range(sum(seen)):
                told = self.rule(ids[: place + 1])
                if told is not None:
                    logits[row, place, told] = self.strength
        return SimpleNamespace(logits=logits)


def induction(seen: Sequence[int]) -> int | None:
    """What followed the latest earlier place that ends with the same two tokens."""
    for place in range(len(seen) - 2, 0, -1):
        if list(seen[place - 1 : place + 1]) == list(seen[-2:]):
            return seen[place + 1]
    return None


class Memory:
    """A rule that has read some texts: goes on as they do after the longest known run of up to 24 tokens."""

    def __init__(self, texts: Sequence[Sequence[int]], longest: int = 24) -> None:
        self.longest = longest
        self.after: dict[tuple[int, ...], int] = {}
        for ids in texts:
            for place in range(1, len(ids)):
                for n in range(1, min(longest, place) + 1):
                    self.after[tuple(ids[place - n : place])] = ids[place]

    def __call__(self, seen: Sequence[int]) -> int | None:
        for n in range(min(self.longest, len(seen)), 0, -1):
            found = self.after.get(tuple(seen[-n:]))
            if found is not None:
                return found
        return None


def corpus(folder: Path, texts: Sequence[str], *, tokenizer: str = "bytes", val_frac: float = 0.2) -> Path:
    """Shards of these documents."""
    source = folder / f"text-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}"
    source.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (source / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    out = folder / f"shards-{source.name}-{tokenizer.replace(':', '')}"
    build_shards([str(source)], tokenizer, out, val_frac=val_frac, n_workers=1)
    return out


def model_on(shards: Path, network: Any = None, context: int = 32) -> Portable:
    """A model that claims to be trained on these shards."""
    return portable(network, tokenizer=open_shards(shards).tokenizer(), context=context, shards=shards)
