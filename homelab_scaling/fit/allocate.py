"""What a law of N and D says to buy: the split of a budget, tokens for a size, and when more tokens stop paying.

Everything takes natural parameters (..., P), one law or a batch of draws, and returns arrays (...).

Legend:  N parameters, D tokens, C FLOPs; the law's part that N and D remove is a rising function of A N^-alpha +
         B D^-beta, which `Law.split_terms` gives for every law of N and D (Kaplan's joint one too)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.laws import KaplanJoint, Law
from homelab_scaling.fit.models import Array

MAX_LOG = 150.0
"""Results are kept within e^-150 .. e^150: a draw with an exponent near 0, and products with it, stay finite."""
FLOPS_PER_PARAM_TOKEN = 6.0
RULE_TOKENS_PER_PARAM = 20.0
N_BISECTIONS = 70


class Terms(NamedTuple):
    """The law as a split of a budget sees it, each (...)."""

    log_a: Array
    log_b: Array
    alpha: Array
    beta: Array

    @classmethod
    def of(cls, law: Law, values: Array) -> "Terms":
        """Terms of natural parameters (..., P).

        Raises:
            SpecError: not a law of N and D.
        """
        a, b, alpha, beta = law.split_terms(values)
        with np.errstate(divide="ignore"):
            return cls(np.maximum(np.log(a), -700.0), np.maximum(np.log(b), -700.0), alpha, beta)


def bounded_exp(log: Array) -> Array:
    """exp, kept finite and above 0."""
    return np.asarray(np.exp(np.clip(log, -MAX_LOG, MAX_LOG)))


def fresh(law: Law, n: Array | float, d: Array | float) -> dict[str, Array | float]:
    """The law's columns at (n, d) where every token is new."""
    columns: dict[str, Array | float] = {"n_params": n, "n_tokens": d}
    return columns | ({"n_tokens_unique": d} if "n_tokens_unique" in law.axes else {})


def loss_at(law: Law, values: Array, n: Array | float, d: Array | float) -> Array:
    """Loss [nats] at n parameters and d new tokens; all three broadcast."""
    return law.loss(values, fresh(law, n, d))


def split_budget(terms: Terms, flops: float | Array) -> tuple[Array, Array]:
    """N and D of lowest loss at 6 N D = flops.

    Source: Hoffmann et al. 2022 eq. 4, with G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """
    log_a, log_b, alpha, beta = terms
    log_nd = np.log(flops) - np.log(FLOPS_PER_PARAM_TOKEN)
    log_n = (np.log(alpha) + log_a - np.log(beta) - log_b + beta * log_nd) / (alpha + beta)
    log_n = np.clip(log_n, -MAX_LOG, MAX_LOG)
    return np.asarray(np.exp(log_n)), bounded_exp(log_nd - log_n)


def best_loss(law: Law, values: Array, flops: float | Array) -> Array:
    """Loss [nats] at the best split of 6 N D = flops."""
    return loss_at(law, values, *split_budget(Terms.of(law, values), flops))


def tokens_for(terms: Terms, n_params: float | Array, elasticity: float | Array = 1.0) -> Array:
    """D for which n_params is the best size: alpha A N^-alpha elasticity = beta B D^-beta.

    Args:
        elasticity: d log(FLOPs per token) / d log N; 1 where C = 6 N D.
    """
    log_a, log_b, alpha, beta = terms
    log_share = np.log(beta) + log_b - np.log(alpha) - log_a + alpha * np.log(n_params) + np.log(elasticity)
    return bounded_exp(log_share / beta)


def params_for(terms: Terms, n_tokens: float | Array) -> Array:
    """N for which n_tokens is the best number of tokens at C = 6 N D."""
    log_a, log_b, alpha, beta = terms
    return bounded_exp((np.log(alpha) + log_a - np.log(beta) - log_b + beta * np.log(n_tokens)) / alpha)


def split_by_rule(flops: float, tokens_per_param: float = RULE_TOKENS_PER_PARAM) -> tuple[float, float]:
    """N and D with D = 20 N and 6 N D = flops."""
    n = (flops / (FLOPS_PER_PARAM_TOKEN * tokens_per_param)) ** 0.5
    return float(n), float(tokens_per_param * n)


# ------------------------------------------------------------------------------------------------- what loss is left


def reducible(law: Law, values: Array, loss: float | Array) -> Array:
    """A N^-alpha + B D^-beta wherever the law gives this loss; 0 or less where no N and D do, not even infinite ones.

    Raises:
        SpecError: not a law of N and D.
    """
    p = law.by_name(values)
    if isinstance(law, KaplanJoint):
        return np.asarray(np.exp(np.log(loss) / p["alpha_D"]))
    law.split_terms(values)
    return np.asarray(loss - p["E"] if law.offset else loss + 0 * p["alpha"])


def reducible_at(terms: Terms, n: float | Array, d: float | Array) -> Array:
    """A N^-alpha + B D^-beta at (n, d)."""
    return bounded_exp(terms.log_a - terms.alpha * np.log(n)) + bounded_exp(terms.log_b - terms.beta * np.log(d))


def tokens_to_reach(terms: Terms, left: Array, n_params: float | Array) -> Array:
    """D at which n_params reaches the level `left` = A N^-alpha + B D^-beta; NaN where no number of tokens does.

    Source: Sardana et al. 2023, D(N) = (B / (l - E - A N^-alpha))^(1 / beta).
    """
    over = left - bounded_exp(terms.log_a - terms.alpha * np.log(n_params))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(over > 0, bounded_exp((terms.log_b - np.log(over)) / terms.beta), np.nan))


# -------------------------------------------------------------------------------------------------- tokens worth buying


@dataclass(frozen=True, kw_only=True)
class Worth:
    """The least that a doubling of the tokens has to gain: nats, or a share of the loss before it."""

    amount: float
    is_share: bool

    def __post_init__(self) -> None:
        limit = 1.0 if self.is_share else np.inf
        if not 0 < self.amount < limit:
            raise SpecError(f"a doubling worth {self.words}: wants more than 0 nats, or between 0 and 100 %")

    @property
    def words(self) -> str:
        return f"{100 * self.amount:g} %" if self.is_share else f"{self.amount:g} nats"


def parse_worth(text: str) -> Worth:
    """`1%` or `0.02` (nats).

    Raises:
        SpecError: neither.
    """
    number, is_share = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        return Worth(amount=float(number) / (100 if is_share else 1), is_share=is_share)
    except ValueError:
        raise SpecError(f"--worth {text}: wants a share such as 1% or nats such as 0.02") from None


def doubling_gain(law: Law, values: Array, n: float | Array, d: float | Array) -> Array:
    """Loss [nats] that doubling the tokens of a model of n parameters trained on d removes."""
    return loss_at(law, values, n, d) - loss_at(law, values, n, 2 * np.asarray(d))


def worth_until(law: Law, values: Array, n: float, worth: Worth) -> Array:
    """D beyond which another doubling gains less than `worth`; 1 where none ever gains as much.

    The gain falls with D for every law here, in nats and as a share of the loss, so there is one such D.
    """

    def surplus(log_d: Array) -> Array:
        d = np.exp(log_d)
        gain = doubling_gain(law, values, n, d)
        return gain - worth.amount * (loss_at(law, values, n, d) if worth.is_share else 1.0)

    low = np.zeros(values.shape[:-1])
    return np.exp(_last_positive(surplus, low, np.full_like(low, MAX_LOG)))


def beats_fresh(law: Law, values: Array, n: float) -> tuple[Array, Array]:
    """The D between which doubling the tokens of a model of n parameters beats a fresh model for the same compute.

    A doubling from D costs 6 N D. A new model at the best split of 6 N D reaches best_loss(6 N D); the old one reaches
    loss(N, 2 D). At D_opt(N) the old one wins, since before the doubling both are equal; far below it N is too large,
    far above too small for its tokens.
    """
    middle = np.log(tokens_for(Terms.of(law, values), n))

    def surplus(log_d: Array) -> Array:
        d = bounded_exp(log_d)
        return best_loss(law, values, FLOPS_PER_PARAM_TOKEN * n * d) - loss_at(law, values, n, 2 * d)

    end = np.full_like(middle, MAX_LOG)
    until = _last_positive(surplus, middle, np.maximum(middle, end))
    since = -_last_positive(lambda x: surplus(-x), -middle, np.maximum(-middle, end))
    return bounded_exp(since), bounded_exp(until)


def _last_positive(f: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where f, falling through 0 between low and high, does so (elementwise bisection); low where it starts below."""
    for _ in range(N_BISECTIONS):
        middle = (low + high) / 2
        positive = f(middle) > 0
        low, high = np.where(positive, middle, low), np.where(positive, high, middle)
    return np.asarray(low)
