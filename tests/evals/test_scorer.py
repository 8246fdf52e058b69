"""Batched scores against one forward pass per token, at the context's border and in small pieces."""

import random

import pytest
import torch
from tiny_models import Planted, portable, random_gpt2

from homelab_scaling.errors import DataError
from homelab_scaling.evals import scorer
from homelab_scaling.evals.scorer import choose, score, windows

CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    return portable(context=CONTEXT)


def one_by_one(network, inputs: list[int], target: int) -> tuple[float, bool]:
    """Log probability of a token after others, in a pass of its own."""
    with torch.no_grad():
        last = network(torch.tensor([inputs])).logits[0, -1].double()
    return float(last.log_softmax(0)[target]), int(last.argmax()) == target


def rolling(tokens: list[int], prefix: int, n: int) -> list[tuple[list[int], list[int]]]:
    """lm-evaluation-harness 0.4.13, utils.get_rolling_token_windows with context_len 1, then make_disjoint_window."""
    pairs = []
    first = min(n, len(tokens))
    pairs.append(([prefix, *tokens[: first - 1]], tokens[:first]))
    predicted = first
    while predicted < len(tokens):
        n_new = min(len(tokens) - predicted, n)
        end = predicted + n_new
        pairs.append((tokens[end - n - 1 : end - 1], tokens[end - n_new : end]))
        predicted += n_new
    return pairs


@pytest.mark.parametrize("length", [1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 2 * CONTEXT + 1, 50])
def test_windows_are_the_rolling_ones(length: int) -> None:
    tokens = list(range(100, 100 + length))
    found = list(windows([7], tokens, CONTEXT))
    wanted = rolling(tokens, 7, CONTEXT)
    assert [(w.ids[:-1], w.ids[-w.n_new :]) for w in found] == wanted


@pytest.mark.parametrize(
    ("before", "after"), [(1, 1), (5, 3), (15, 1), (16, 1), (17, 2), (40, 5), (10, 6), (10, 7), (3, 40)]
)
def test_scores_each_token_once_with_all_the_context_that_fits(model, before: int, after: int) -> None:
    rng = random.Random(before * 100 + after)
    ids = [rng.randrange(257) for _ in range(before + after)]
    (found,) = score(model, [(ids[:before], ids[before:])])
    total, greedy, n_tokens = 0.0, True, 0
    for window in windows(ids[:before], ids[before:], CONTEXT):
        n_tokens += len(window.ids) - 1
        for place in range(len(window.ids) - window.n_new, len(window.ids)):
            logprob, best = one_by_one(model.model, list(window.ids[:place]), window.ids[place])
            total += logprob
            greedy &= best
    assert found.nats == pytest.approx(-total, rel=1e-5)
    assert (found.greedy, found.n_scored, found.n_tokens) == (greedy, after, n_tokens)


def test_context_is_cut_from_the_left(model) -> None:
    long = list(range(60))
    (cut,), (whole,) = score(model, [(long, [9])]), score(model, [(long[-CONTEXT:], [9])])
    assert cut == whole


def test_batches_and_padding_change_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    requests = [
        (
            [rng.randrange(257) for _ in range(rng.randrange(1, 20))],
            [rng.randrange(257) for _ in range(rng.randrange(1, 25))],
        )
        for _ in range(40)
    ]
    alone = [score(model, [request])[0] for request in requests]
    together = score(model, requests)
    monkeypatch.setitem(scorer.BATCH_TOKENS, "cpu", 33)
    monkeypatch.setattr(scorer, "_SOFTMAX_BYTES", 4 * 257 * 3)
    in_pieces = score(model, requests)
    for a, b, c in zip(alone, together, in_pieces, strict=True):
        assert b.nats == pytest.approx(a.nats, rel=1e-5)
        assert c.nats == pytest.approx(a.nats, rel=1e-5)
        assert a.greedy == b.greedy == c.greedy
        assert a.n_tokens == b.n_tokens == c.n_tokens


def test_batches_hold_few_logits(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on the logits' bytes bounds every forward pass of more than one sequence."""
    seen = []
    forward = model.model.forward

    def watched(*, input_ids, attention_mask, logits_to_keep=0):
        seen.append(input_ids.numel())
        return forward(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(model.model, "forward", watched)
    monkeypatch.setitem(scorer.LOGITS_BYTES, "cpu", 4 * 257 * 40)
    score(model, [([1] * n, [2]) for n in range(1, 30)])
    assert len(seen) > 5
    assert max(seen) <= 40


def test_a_model_that_cannot_keep_the_last_logits_alone_gives_the_same() -> None:
    network = random_gpt2(257, CONTEXT)

    class All(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return network(input_ids=input_ids, attention_mask=attention_mask)

    requests = [([1, 2, 3], [4]), ([5], [6, 7, 8, 9]), ([1] * 30, [2, 3])]
    kept, whole = score(portable(network, context=CONTEXT), requests), score(portable(All(), context=CONTEXT), requests)
    assert [s.nats for s in kept] == pytest.approx([s.nats for s in whole], rel=1e-6)


def test_greedy_wants_every_token_to_be_the_best() -> None:
    model = portable(Planted(257, lambda seen: (seen[-1] + 1) % 257), context=CONTEXT)
    found = score(model, [([1, 2], [3, 4]), ([1, 2], [3, 5]), ([1, 2], [4, 5])])
    assert [s.greedy for s in found] == [True, False, False]


def test_chooses_the_most_probable_candidate_and_the_first_of_equals() -> None:
    model = portable(Planted(257, lambda seen: (seen[-1] + 1) % 257), context=CONTEXT)
    assert choose(model, [[5], [9, 8], [1] * 40], [[7, 6, 5], [9, 10], [0, 3, 2]]) == [1, 0, 2]


def test_no_requests(model) -> None:
    assert score(model, []) == []
    assert choose(model, [], []) == []


def test_an_id_that_the_model_lacks_is_one_sentence(model) -> None:
    with pytest.raises(DataError, match="the text has token 257, the model knows 257"):
        score(model, [([1], [2, 257])])
    with pytest.raises(DataError, match="the text has token 300"):
        choose(model, [[1]], [[2, 300]])
