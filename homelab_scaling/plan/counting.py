"""Exact counts of a GPT-2: parameters by group, FLOPs by matmul.

Legend: L layers, d width, T context, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from homelab_scaling.specs import ModelShape

VOCAB_MULTIPLE = 64

AttentionCount = Literal["causal", "full"]


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Parameters of one model by group; real ones only, the padded vocabulary rows apart."""

    n_body: int
    """Blocks and the final layer norm: matrices, biases, norms."""
    n_pos: int
    n_embed: int
    """Token embedding, V * d."""
    n_head: int
    """V * d as used by the output head, also when it shares the embedding's matrix."""
    n_padding: int
    """Parameters of padded rows: in memory, never counted in N."""
    tied: bool

    @property
    def n_params(self) -> int:
        """N: every real parameter, each once."""
        return self.n_body + self.n_pos + self.n_embed + (0 if self.tied else self.n_head)

    @property
    def n_stored(self) -> int:
        """What `sum(p.numel())` over the real module gives."""
        return self.n_params + self.n_padding


def pad_vocab(n_vocab: int) -> int:
    """The next multiple of 64, the row count that matmul kernels like."""
    return -(-n_vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def count_params(shape: ModelShape, n_vocab: int) -> ParamCount:
    """Parameters of Hugging Face's GPT2LMHeadModel of this shape.

    A block has 12 d^2 + 13 d: attention 4 d^2 + 4 d, feed-forward 8 d^2 + 5 d, two layer norms 4 d.
    """
    d = shape.d_model
    rows_padded = pad_vocab(n_vocab) - n_vocab
    return ParamCount(
        n_body=shape.n_layer * (12 * d * d + 13 * d) + 2 * d,
        n_pos=shape.context_tokens * d,
        n_embed=n_vocab * d,
        n_head=n_vocab * d,
        n_padding=rows_padded * d * (1 if shape.tied else 2),
        tied=shape.tied,
    )


def matmul_params(shape: ModelShape, n_vocab: int, *, padded: bool = False) -> int:
    """Weights that multiply every token: 12 L d^2 + V d. No lookup, no bias, no norm; the head counts, tied or not."""
    vocab = pad_vocab(n_vocab) if padded else n_vocab
    return 12 * shape.n_layer * shape.d_model**2 + vocab * shape.d_model


def flops_per_token(
    shape: ModelShape, n_vocab: int, *, attention: AttentionCount = "causal", padded: bool = False
) -> float:
    """Training FLOPs per token, exact over every matmul: 6 P_matmul + 12 L d T_mean (backward = 2 x forward).

    Args:
        attention: `causal` counts the (T + 1) / 2 positions a token attends to on average, which is the work that has
            to be done; `full` counts the T x T square (PaLM, nanoGPT).
        padded: counts the head's padded columns too: what the hardware is asked to do.

    Source: Kaplan et al. 2020 table 1 (forward 2N + 2 L T d), Chowdhery et al. 2022 appendix B (12 L d T).
    """
    attended = (shape.context_tokens + 1) / 2 if attention == "causal" else shape.context_tokens
    return 6 * matmul_params(shape, n_vocab, padded=padded) + 12 * shape.n_layer * shape.d_model * attended


def flops_6nd_per_token(n_params: int) -> float:
    """Kaplan's 6N, for comparison with published budgets."""
    return 6.0 * n_params


def flops_chinchilla_appendix_f(
    *,
    n_layer: int,
    d_model: int,
    d_ff: int,
    n_head: int,
    d_head: int,
    context_tokens: int,
    n_vocab: int | None = None,
) -> float:
    """Training FLOPs per token as Hoffmann et al. count them: the full attention square, its softmax, backward 2 x.

    Args:
        n_vocab: counts the embedding and the final logits as dense products, as the text says; None leaves both out,
            which is how the ratios of their table A4 come out.

    Source: Hoffmann et al. 2022 appendix F; tests/plan/test_counting.py reproduces table A4.
    """
    d, t, inner = d_model, context_tokens, n_head * d_head
    attention = 2 * 3 * d * inner + 2 * t * inner + 3 * n_head * t + 2 * t * inner + 2 * inner * d
    dense = 2 * (d * d_ff + d_ff * d)
    ends = 0 if n_vocab is None else 2 * (2 * n_vocab * d)
    return 3.0 * (n_layer * (attention + dense) + ends)
