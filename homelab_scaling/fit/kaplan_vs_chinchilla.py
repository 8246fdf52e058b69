"""Why Kaplan's exponents differ from Chinchilla's: one loss surface seen through two parameter counts.

Legend:  N all parameters, N_e those outside the embeddings, D tokens, C = 6 N D, C_e = 6 N_e D
"""

from dataclasses import dataclass

import numpy as np

from homelab_scaling.fit.allocate import loss_at
from homelab_scaling.fit.laws import CHINCHILLA, Law
from homelab_scaling.fit.models import Array

OMEGA = 47_491.0
"""N = N_e + omega N_e^(1/3), fitted to Chinchilla's shapes: vocabulary 32k at a width of 39.2 layers."""
N_SIZES, N_BUDGETS = 20, 100
SIZES_LOG10 = (2.9, 9.2)
"""Kaplan's 768 to 1.5e9 parameters outside the embeddings."""
BUDGETS_LOG10 = {"body": (12.95, 20.7), "total": (14.0, 20.7)}
PUBLISHED_TOKEN_GRID = np.logspace(6, 25, 1000)
"""The training curves of the published simulation are sampled at these D."""


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Straight log-log lines through the best of the sizes at each budget."""

    n_exponent: float
    """Of the best N against C, both by the same count."""
    loss_exponent: float
    """Of the best loss against C."""
    reducible_exponent: float
    """Of the best loss less E against C."""


@dataclass(frozen=True, kw_only=True)
class Reconciliation:
    """The same surface by both counts."""

    body: Frontier
    """N_e and C_e, as Kaplan counted."""
    total: Frontier
    """N and C, as Hoffmann did."""


def reconcile_pearce_song(
    values: Array, law: Law = CHINCHILLA, *, omega: float = OMEGA, token_grid: Array | None = None
) -> Reconciliation:
    """Exponents that Kaplan's study would have found on a Chinchilla surface, and those of a study over all parameters.

    20 sizes span Kaplan's range; at each of 100 budgets the best of them is taken; a line is fitted to the choices.

    Args:
        values: natural parameters (P,) of the law, whose N counts all parameters.
        token_grid: training curves are read at the nearest of these D, as in the published simulation
            (PUBLISHED_TOKEN_GRID), instead of at the exact one.

    Raises:
        SpecError: not a law of N and D.

    Source: Pearce & Song 2024, sections 3 and 4.
    """
    law.split_terms(values)
    n_body = np.logspace(*SIZES_LOG10, N_SIZES)
    n_total = n_body + omega * np.cbrt(n_body)
    floor = float(law.by_name(values)["E"]) if law.offset else 0.0
    found = {}
    for count, n in (("body", n_body), ("total", n_total)):
        flops = np.logspace(*BUDGETS_LOG10[count], N_BUDGETS)
        tokens = flops[:, None] / (6 * n)
        if token_grid is not None:
            tokens = token_grid[np.abs(tokens[..., None] - token_grid).argmin(axis=-1)]
        losses = loss_at(law, values, n_total, tokens)
        best = losses.argmin(axis=1)
        lowest = losses.min(axis=1)
        found[count] = Frontier(
            n_exponent=_slope(flops, n[best]),
            loss_exponent=_slope(flops, lowest),
            reducible_exponent=_slope(flops, lowest - floor),
        )
    return Reconciliation(body=found["body"], total=found["total"])


def body_exponent(values: Array, n_body: Array, law: Law = CHINCHILLA, *, omega: float = OMEGA) -> Array:
    """d log N_e / d log C_e of the best N_e at each size, exactly.

    It goes from beta / (alpha/3 + beta), where all is embedding, over a hump near 1, down to the law's own a: at the
    optimum of a fixed C_e, alpha A N^-alpha d log N / d log N_e = beta B D^-beta.

    Source: Pearce & Song 2024, section 3.
    """
    _a, _b, alpha, beta = law.split_terms(values)
    embeddings = omega * np.cbrt(n_body)
    n = n_body + embeddings
    slope = (n_body + embeddings / 3) / n
    # d log slope / d log N_e, since log D = (alpha log N - log slope) / beta + const along the optimum
    bend = (n_body + embeddings / 9) / (n_body + embeddings / 3) - slope
    return np.asarray(1 / (1 + (alpha * slope - bend) / beta))


def _slope(x: Array, y: Array) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
