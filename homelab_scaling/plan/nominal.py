"""A published isoFLOP design held against an exact count: its tokens cost what 6 N D says only by 6 N D.

Legend:  N parameters, D tokens, C FLOPs
"""

from collections.abc import Sequence

from homelab_scaling.fit.words import listed, short
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.parts import PublishedRung, Size

SAME_BUDGET = 1.05
"""Budgets further apart than this factor are different ones."""


def published_rungs(ladder: Ladder, sizes: Sequence[Size]) -> tuple[PublishedRung, ...]:
    """The rungs whose published D the ladder states.

    Args:
        sizes: of the ladder's rungs, in its order.
    """
    budget = ladder.horizons.flops[0] if len(ladder.horizons.flops) == 1 else None
    return tuple(
        PublishedRung(
            name=rung.name,
            n_tokens=rung.nominal_tokens,
            n_params=None if budget is None else budget / (6 * rung.nominal_tokens),
            flops_causal=rung.nominal_tokens * size.flops_per_token.causal,
            flops_full=rung.nominal_tokens * size.flops_per_token.full,
        )
        for rung, size in zip(ladder.rungs, sizes, strict=True)
        if rung.nominal_tokens is not None
    )


def not_one_budget(rungs: Sequence[PublishedRung], budget: float | None) -> str | None:
    """That the published tokens are not one budget, in a sentence; None where they are."""
    causal = [rung.flops_causal for rung in rungs]
    if len(rungs) < 2 or max(causal) <= SAME_BUDGET * min(causal):
        return None
    said = f" ({budget:.3g} FLOPs each by 6 N D with the published sizes)" if budget is not None else ""
    return (
        f"the published {listed([short(rung.n_tokens) for rung in rungs])} tokens{said.replace('e+', 'e')} are not one "
        f"budget: counted over every matmul they cost {costs([rung.flops_full for rung in rungs])} FLOPs, or "
        f"{costs(causal)} with the causal half of attention alone, which every other figure here counts; a minimum "
        "over these sizes is no best size for any compute"
    )


def costs(flops: Sequence[float]) -> str:
    """5.6e17, 2.7e17 and 2.3e17."""
    return listed([f"{c:.1e}".replace("e+", "e") for c in flops])
