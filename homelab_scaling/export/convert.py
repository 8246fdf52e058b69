"""A trained row, or anybody's Hugging Face folder, as a causal language model with its tokenizer.

Ours are GPT-2 with a vocabulary padded to a multiple of 64 whose extra rows are masked in training. What leaves has the
real vocabulary only, so that no sampler can draw a token that does not exist, and the loss stays what it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class Portable:
    """A model as Hugging Face knows it, and where it comes from."""

    name: str
    """Short and fit for a folder's name: <run_id>@<tokens>, or the folder's own."""
    model: "PreTrainedModel"
    """In evaluation mode, on `device`."""
    tokenizer: "PreTrainedTokenizerBase"
    context_tokens: int
    n_vocab: int
    eot_id: int | None
    device: str
    run: Path | None = None
    """Our run's folder; None for a foreign model, of whose training text nothing is known."""
    shards: Path | None = None
    """The training text of our run, where it is still there."""
    n_params: int | None = None
    n_tokens: int | None = None
    flops: float | None = None
    loss_nats: float | None = None
    """Of the row, on its own held-out text."""
    tokenizer_hash: str | None = None
    facts: dict[str, Any] | None = None
    """What else the record says (data, energy, money); for the model card."""
