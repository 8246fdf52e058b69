"""What published studies would take as a batch here, each with the domain it was measured in.

Their definitions differ. Kaplan's B_crit is McCandlish's: there a run needs twice the tokens of a small batch. Zhang's
critical batch size needs 20 % more steps than linear scaling, which is 20 % more tokens, and is 0.2 of McCandlish's
where the hyperbola holds. Step Law and Power Lines give the batch of the lowest loss after D tokens. Shown side by
side, every prior is brought to the batch of about 20 % overhead.

Legend: B batch [tokens], L loss [nats per token], N parameters, D training tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

from homelab_scaling.fit.words import listed, short
from homelab_scaling.plan.rules import step_law_batch

Meaning = Literal["twice the tokens", "20 % overhead", "lowest loss"]

OVERHEAD_FRAC = 0.2
"""Tokens spent above those of a small batch: Zhang's definition of critical, and the most that our advice takes."""

KAPLAN_B_TOKENS, KAPLAN_ALPHA = 2e8, 0.21
KAPLAN_LOSS_EXPONENT = -1 / KAPLAN_ALPHA
ZHANG_D_SEQS, ZHANG_N_SEQS, ZHANG_EXPONENT = 22.91, 93.20, 0.47
ZHANG_CONTEXT = 512
ZHANG_TOKENS_PER_PARAM = 20
POWER_LINES_OPT_EXPONENT, POWER_LINES_CRIT_EXPONENT = 0.383, 0.462
POWER_LINES_ANCHOR_B, POWER_LINES_ANCHOR_D = 2**19, 1.16e9
"""The papers' prefactor is not used: these are nanochat's, where a 12-layer model did best with 2^19 tokens."""

WITHIN = 2.0
"""A context or ratio counts as the study's own within this factor."""


def kaplan_critical_tokens(loss_nats: float) -> float:
    """McCandlish's B_crit [tokens] at a loss: 2e8 L^(-1 / 0.21).

    Source: Kaplan et al. 2020 (arXiv 2001.08361), eq. 5.3; WebText2, vocabulary 50,257, context 1,024, Adam, models of
    3M and 85M parameters. A 0.24M model with context 64 had 80 times less (reference sweep, tests/batch).
    """
    return KAPLAN_B_TOKENS * math.pow(loss_nats, KAPLAN_LOSS_EXPONENT)


def zhang_critical_tokens(n_tokens: float) -> float:
    """Batch [tokens] of 20 % overhead from D: 22.91 (D / 1e6)^0.47 sequences of 512.

    Source: Zhang et al. 2024 (arXiv 2410.21676), D in millions (some copies print billions, which does not close); C4,
    context 512, Adam with averaged weights and a constant rate, 85M to 1.2B parameters at about 20 tokens each.
    """
    return ZHANG_D_SEQS * math.pow(n_tokens / 1e6, ZHANG_EXPONENT) * ZHANG_CONTEXT


def zhang_critical_tokens_by_size(n_params: float) -> float:
    """Batch [tokens] of 20 % overhead from N trained on about 20 N tokens: 93.20 (N / 1e6)^0.47 sequences of 512.

    Source: as `zhang_critical_tokens`; at fixed D the size hardly counts (exponent about 0.087).
    """
    return ZHANG_N_SEQS * math.pow(n_params / 1e6, ZHANG_EXPONENT) * ZHANG_CONTEXT


def power_lines_tokens(n_tokens: float) -> float:
    """Batch [tokens] of the lowest loss: 2^19 (D / 1.16e9)^0.383.

    Source: exponent from Bergsma et al. 2025 (arXiv 2505.13738; AdamW, independent of N; its B_crit grows as D^0.462);
    prefactor from nanochat (2^19 tokens for its 12-layer model; Muon and AdamW, context 2,048, D 0.4B to 10B).
    """
    return POWER_LINES_ANCHOR_B * math.pow(n_tokens / POWER_LINES_ANCHOR_D, POWER_LINES_OPT_EXPONENT)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Where a study measured; None is no bound stated."""

    n_params: tuple[float, float] | None
    n_tokens: tuple[float, float] | None
    context_tokens: int
    optimizer: str
    tokens_per_param: float | None = None

    def outside(self, *, n_params: float, n_tokens: float, context_tokens: int) -> tuple[str, ...]:
        """In which ways a rung lies outside, in words; empty inside."""
        found = []
        for letter, value, span in (("N", n_params, self.n_params), ("D", n_tokens, self.n_tokens)):
            if span is not None and not span[0] <= value <= span[1]:
                found.append(f"{letter} {short(value)} (measured {short(span[0])} to {short(span[1])})")
        if not 1 / WITHIN <= context_tokens / self.context_tokens <= WITHIN:
            found.append(f"context {context_tokens} (measured {self.context_tokens})")
        ratio = n_tokens / n_params
        if self.tokens_per_param is not None and not 1 / WITHIN <= ratio / self.tokens_per_param <= WITHIN:
            found.append(f"{short(ratio)} tokens per parameter (measured about {self.tokens_per_param:g})")
        if "Muon" in self.optimizer:
            found.append(f"optimizer AdamW (measured {self.optimizer})")
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """One study's batch for one rung."""

    name: str
    formula: str
    source: str
    meaning: Meaning
    published_tokens: float
    """As the study defines it."""
    tokens: float
    """Brought to about 20 % overhead: 0.2 of a B_crit, otherwise as published."""
    outside: tuple[str, ...]
    """In which ways the rung lies outside the study's domain."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Lowest and highest prior, of those whose domain holds the rung; of all where there is none."""

    low_tokens: float
    high_tokens: float
    n_inside: int
    sentence: str


KAPLAN = Domain(n_params=(3e6, 85e6), n_tokens=None, context_tokens=1024, optimizer="Adam")
ZHANG_D = Domain(n_params=(85e6, 1.2e9), n_tokens=(1.7e9, 24e9), context_tokens=512, optimizer="Adam")
ZHANG_N = Domain(
    n_params=(85e6, 1.2e9),
    n_tokens=None,
    context_tokens=512,
    optimizer="Adam",
    tokens_per_param=ZHANG_TOKENS_PER_PARAM,
)
STEP_LAW = Domain(n_params=(0.215e9, 1.07e9), n_tokens=(4e9, 100e9), context_tokens=2048, optimizer="AdamW")
POWER_LINES = Domain(n_params=None, n_tokens=(0.4e9, 10e9), context_tokens=2048, optimizer="Muon and AdamW")


def priors_for(
    *,
    n_params: float,
    n_body: float,
    n_tokens: float,
    context_tokens: int,
    loss_nats: float | None = None,
) -> tuple[Prior, ...]:
    """Every prior for one rung; Kaplan's only where a loss is known.

    Args:
        n_body: parameters outside the embeddings, by which Kaplan and Step Law count.
        loss_nats: the loss the batch is for, usually the middle of the run.
    """
    rows: list[tuple[str, str, str, Meaning, float, Domain, float]] = [
        ("Step Law", "0.58 D^0.571", "arXiv 2503.04715", "lowest loss", step_law_batch(n_tokens), STEP_LAW, n_body),
        (
            "Zhang CBS(D)",
            "22.91 D^0.47 sequences of 512, D in millions",
            "arXiv 2410.21676",
            "20 % overhead",
            zhang_critical_tokens(n_tokens),
            ZHANG_D,
            n_params,
        ),
        (
            "Zhang CBS(N)",
            "93.20 N^0.47 sequences of 512, N in millions",
            "arXiv 2410.21676",
            "20 % overhead",
            zhang_critical_tokens_by_size(n_params),
            ZHANG_N,
            n_params,
        ),
        (
            "Power Lines",
            "2^19 (D / 1.16e9)^0.383",
            "arXiv 2505.13738, nanochat's prefactor",
            "lowest loss",
            power_lines_tokens(n_tokens),
            POWER_LINES,
            n_params,
        ),
    ]
    if loss_nats is not None:
        value, formula = kaplan_critical_tokens(loss_nats), f"2e8 L^-4.76 at L = {loss_nats:.2f}"
        rows.append(("Kaplan B_crit(L)", formula, "arXiv 2001.08361", "twice the tokens", value, KAPLAN, n_body))
    return tuple(
        Prior(
            name=name,
            formula=formula,
            source=source,
            meaning=meaning,
            published_tokens=value,
            tokens=value * (OVERHEAD_FRAC if meaning == "twice the tokens" else 1.0),
            outside=domain.outside(n_params=n, n_tokens=n_tokens, context_tokens=context_tokens),
        )
        for name, formula, source, meaning, value, domain, n in rows
    )


def band(priors: tuple[Prior, ...]) -> Band:
    """The span of the priors that may speak here, and a sentence on those that may not."""
    inside = [p for p in priors if not p.outside]
    chosen = inside or list(priors)
    low, high = min(p.tokens for p in chosen), max(p.tokens for p in chosen)
    outside = [f"{p.name} ({', '.join(_in_short(way) for way in p.outside)})" for p in priors if p.outside]
    if inside and outside:
        sentence = f"from {listed([p.name for p in inside])}; outside their domain are {listed(outside)}"
    elif inside:
        sentence = "every prior was measured at runs like this one"
    else:
        sentence = f"no prior was measured at runs like this one, so this is the span of all: {listed(outside)}"
    return Band(low_tokens=low, high_tokens=high, n_inside=len(inside), sentence=sentence)


def _in_short(way: str) -> str:
    """`N 44k (measured ...)` -> N; `9.1 tokens per parameter (measured ...)` -> tokens per parameter."""
    return next(word for word in ("tokens per parameter", "context", "optimizer", "N", "D") if word in way)
