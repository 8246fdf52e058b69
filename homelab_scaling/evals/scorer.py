"""Log probabilities of token sequences under a causal model, in batches of bounded memory.

A request is a context and its continuation. What fits the model is asked in one forward pass, with the context cut from
the left; a longer continuation is asked in windows: each as long as the model sees, none overlapping, the last one
aligned right so that its new tokens see all the context there is. With a context of one token this is the rolling
log likelihood of lm-evaluation-harness (`get_rolling_token_windows` with context_len 1, `make_disjoint_window`).

Sequences are padded on the right: positions are counted from the left, no real token ever sees padding, so the padding
changes nothing.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from homelab_scaling.errors import DataError
from homelab_scaling.export.convert import Portable

if TYPE_CHECKING:
    from torch import Tensor

Ids = Sequence[int]
BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Inputs of a forward pass, padding included."""
LOGITS_BYTES = {"cpu": 256 * 1024**2, "cuda": 2 * 1024**3}
"""Of a forward pass; one sequence may exceed it."""
_SOFTMAX_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a model thinks of one continuation."""

    nats: float
    """Minus log probability of the continuation, all its tokens together."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""
    n_scored: int
    """Tokens of the continuation."""
    n_tokens: int
    """Tokens that went through the model for it."""


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass of a sequence: `n_new` of its last targets count."""

    ids: Ids
    """Inputs and the last target."""
    n_new: int


def windows(context: Ids, continuation: Ids, n_ctx: int) -> Iterator[Window]:
    """The passes that score each token of a continuation once, `n_ctx` inputs at most each.

    The context must hold a token, or the first target has nothing to be predicted from; give the end-of-text token.
    """
    assert len(context), "the first token of a continuation is predicted from something"
    whole = [*context, *continuation]
    done = len(context)
    while done < len(whole):
        n_new = min(len(whole) - done, n_ctx)
        done += n_new
        yield Window(ids=whole[max(0, done - n_ctx - 1) : done], n_new=n_new)


def score(model: Portable, requests: Sequence[tuple[Ids, Ids]]) -> list[Scored]:
    """The log probability of each continuation after its context, in their order; float32 softmax, float64 sums.

    Raises:
        DataError: a token the model does not know.
    """
    owned = [(i, w) for i, (before, after) in enumerate(requests) for w in windows(before, after, model.context_tokens)]
    check_ids(model, (window.ids for _owner, window in owned))
    nats, greedy, passed = [0.0] * len(requests), [True] * len(requests), [0] * len(requests)
    for batch in _batches(model, owned):
        found = _forward(model, [window for _owner, window in batch])
        for (owner, window), (logprob, all_best) in zip(batch, found, strict=True):
            nats[owner] -= logprob
            greedy[owner] &= all_best
            passed[owner] += len(window.ids) - 1
    return [
        Scored(nats=n, greedy=g, n_scored=len(after), n_tokens=p)
        for n, g, p, (_before, after) in zip(nats, greedy, passed, requests, strict=True)
    ]


def choose(model: Portable, contexts: Sequence[Ids], candidates: Sequence[Ids]) -> list[int]:
    """For each context the place, among its candidate tokens, of the most probable next one (the first of equals)."""
    owned = [(i, Window(ids=[*ids[-model.context_tokens :], 0], n_new=1)) for i, ids in enumerate(contexts)]
    check_ids(model, [*contexts, *candidates])
    best = [0] * len(contexts)
    for batch in _batches(model, owned):
        logits = _logits(model, [window for _owner, window in batch])
        for (owner, _window), last in zip(batch, logits, strict=True):
            best[owner] = int(last[0, list(candidates[owner])].argmax())
    return best


def check_ids(model: Portable, sequences: Any) -> None:
    """Refuses token ids that the model has no row for.

    Raises:
        DataError: there is one; tokenizer and model do not belong together.
    """
    top = max((max(ids, default=0) for ids in sequences), default=0)
    if top >= model.n_vocab:
        raise DataError(
            f"{model.name}: the text has token {top}, the model knows {model.n_vocab}; its tokenizer is not the one it "
            "was trained with"
        )


def _batches(model: Portable, owned: list[tuple[int, Window]]) -> Iterator[list[tuple[int, Window]]]:
    """Windows of nearly equal length together, the longest first: too little memory shows at once."""
    kind = model.device.split(":", maxsplit=1)[0]
    most_tokens = BATCH_TOKENS.get(kind, BATCH_TOKENS["cuda"])
    most_tokens = min(most_tokens, LOGITS_BYTES.get(kind, LOGITS_BYTES["cuda"]) // (4 * model.n_vocab))
    ordered = sorted(owned, key=lambda pair: (-len(pair[1].ids), pair[1].n_new, pair[0]))
    first = 0
    while first < len(ordered):
        n = max(1, most_tokens // (len(ordered[first][1].ids) - 1))
        yield ordered[first : first + n]
        first += n


def _logits(model: Portable, batch: Sequence[Window]) -> "list[Tensor]":
    """(n_new, vocabulary) of each window, in the model's own precision."""
    import torch

    network: Any = model.model
    longest = max(len(window.ids) for window in batch) - 1
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, window in enumerate(batch):
        n = len(window.ids) - 1
        inputs[row, :n] = torch.tensor(window.ids[:-1], dtype=torch.long)
        mask[row, :n] = 1
    # The output head of the last positions alone, where the model can do that: it is most of a small model's work.
    keep = longest - min(len(window.ids) - 1 - window.n_new for window in batch)
    more = {"logits_to_keep": keep} if _can_keep(network) else {}
    with torch.inference_mode():
        logits = network(input_ids=inputs.to(model.device), attention_mask=mask.to(model.device), **more).logits
    cut = longest - logits.shape[1]
    ends = [len(window.ids) - 1 - cut for window in batch]
    return [row[end - window.n_new : end] for row, end, window in zip(logits, ends, batch, strict=True)]


def _can_keep(network: Any) -> bool:
    return "logits_to_keep" in inspect.signature(network.forward).parameters


def _forward(model: Portable, batch: Sequence[Window]) -> list[tuple[float, bool]]:
    """(log probability of the new targets, whether each was the best) of each window."""
    import torch

    rows = max(1, _SOFTMAX_BYTES // (4 * model.n_vocab))
    found = []
    for window, logits_TV in zip(batch, _logits(model, batch), strict=True):
        targets_T = torch.tensor(window.ids[-window.n_new :], dtype=torch.long, device=logits_TV.device)
        total, all_best = 0.0, True
        for first in range(0, window.n_new, rows):
            logits, targets = logits_TV[first : first + rows].float(), targets_T[first : first + rows]
            own = logits.gather(1, targets[:, None])[:, 0]
            total += float((own - logits.logsumexp(dim=1)).double().sum())
            all_best &= bool((logits.argmax(dim=1) == targets).all())
        found.append((total, all_best))
    return found
