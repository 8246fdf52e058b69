"""The table "Beyond one box" of recipes/README.md, recomputed from the planner's own counting."""

from pathlib import Path

import pytest

from homelab_scaling.batch.priors import priors_for
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.plan.rules import nearest_shape

README = (Path(__file__).resolve().parents[2] / "recipes" / "README.md").read_text(encoding="utf-8")
N_VOCAB, TOKENS_PER_PARAM, N_RUNGS = 50_257, 20, 5
DECAYS_FRAC = 0.2 * (0.25 + 0.5)
"""Of the longest horizon: the decays at a quarter and a half of it, beside the trunk."""
H100_FLOPS = 0.37 * 989e12
"""What llm.c measured on 8 x H100 (37 % of 989 TFLOP/s)."""
TOKENS_PER_GPU = 8_192
"""Per update: with less, a card waits for its neighbours."""
CLUSTERS = (8, 64, 512)


def _ladder(top: float, context: int) -> list[tuple[float, float]]:
    """GPU-hours and the most GPUs that are of use, for each of five sizes a factor of two apart."""
    rungs = []
    for k in range(N_RUNGS):
        shape = nearest_shape(round(top / 2**k), N_VOCAB, context, tied=True)
        params = count_params(shape, N_VOCAB)
        tokens = TOKENS_PER_PARAM * params.n_params
        flops = tokens * (1 + DECAYS_FRAC) * flops_per_token(shape, N_VOCAB)
        priors = priors_for(n_params=params.n_params, n_body=params.n_body, n_tokens=tokens, context_tokens=context)
        critical = next(p.tokens for p in priors if "Zhang" in p.name)
        rungs.append((flops / H100_FLOPS / 3600, critical / TOKENS_PER_GPU))
    return rungs


def _hours(rungs: list[tuple[float, float]], n_gpus: int) -> float:
    """No schedule is faster: all cards busy all the time, and no run on more cards than its critical batch feeds."""
    return max(sum(h for h, _ in rungs) / n_gpus, *(h / min(n_gpus, most) for h, most in rungs))


def _said(hours: float) -> str:
    return f"{hours / 24:.1f} d" if hours >= 72 else f"{hours:.1f} h"


@pytest.mark.parametrize(("name", "top", "context"), [("1B", 1e9, 1024), ("7B", 7e9, 2048)])
def test_the_table_says_what_the_planner_counts(name: str, top: float, context: int) -> None:
    rungs = _ladder(top, context)
    total = sum(h for h, _ in rungs)
    cells = [_said(_hours(rungs, n)) for n in CLUSTERS]
    row = f"| to {name} | {total:,.0f} | {' | '.join(cells)} | {rungs[0][1]:.0f} |"
    assert row in README, row
