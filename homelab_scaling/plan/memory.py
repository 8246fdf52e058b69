"""Predicted GPU memory of one rank, term by term, and the largest micro-batch that fits.

Legend: N stored parameters, L layers, d width, V padded vocabulary, b tokens of one micro-batch on one rank.

    weights 4N + gradients 4N + optimizer + autocast copies 2N (bf16) + DDP buckets + A b d L + 8 b d + head + context

A was counted with saved-tensor hooks on Hugging Face's GPT-2 with tanh GELU and SDPA; the head's bytes are the measured
slope of peak memory. torch.compile saves a little more than this; nothing here assumes it.
"""

from dataclasses import dataclass
from typing import Literal

from homelab_scaling.plan.counting import count_params, pad_vocab
from homelab_scaling.specs import ModelShape, OptimizerName, Precision

LossPath = Literal["chunked", "plain"]

LOSS_CHUNK_BYTES = 256 * 2**20
"""Memory for the fp32 logits that the loss keeps alive; the one constant behind rows and loss path."""
MIN_CHUNK_ROWS = 512
"""Fewer rows make the head's matmuls too thin: 16 rows cost 4 to 5 times the time of 256 (measured, CPU)."""
CHUNK_ROWS_MULTIPLE = 128
MAX_CHUNKS = 16
"""Of one micro-batch: each adds to the head's whole fp32 gradient, which with 50 chunks would be a tenth of a step."""

ACTIVATION_BYTES: dict[Precision, float] = {"bf16": 32.1, "fp32": 64.0}
"""A: saved activations per token, width and layer."""
CHECKPOINTED_BYTES = 4.0
OUTSIDE_BLOCKS_BYTES = 8.0
"""Saved per token and width outside the blocks: the embedding sum and the final norm."""
CHUNKED_LOGIT_BYTES = 10.0
PLAIN_LOGIT_BYTES = 12.5
HIDDEN_GRAD_BYTES = 6.0
"""Chunked only: the hidden states' gradient, made in the forward, with its bf16 source."""
EIGHT_BIT_STATE_BYTES = 2.03
"""Two 8-bit moments and their block scales, per parameter."""
CONTEXT_BYTES = 500_000_000
"""CUDA context, cuBLAS workspaces, allocator slack."""

CARD_SHARE = 0.9
MAX_MICROBATCH_TOKENS_GPU = 65_536
"""A larger micro-batch is no faster: kernels are saturated and launches are paid for long before."""
MAX_MICROBATCH_TOKENS_CPU = 16_384


@dataclass(frozen=True, kw_only=True)
class VramEstimate:
    """Bytes on one card at the worst moment of a step."""

    optimizer: OptimizerName
    microbatch_seqs: int
    loss_path: LossPath
    weights_bytes: int
    grads_bytes: int
    optimizer_bytes: int
    autocast_bytes: int
    ddp_bytes: int
    activations_bytes: int
    head_bytes: int
    context_bytes: int

    @property
    def states_bytes(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights_bytes + self.grads_bytes + self.optimizer_bytes + self.autocast_bytes + self.ddp_bytes

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator will report as its peak: everything but the context."""
        return self.states_bytes + self.activations_bytes + self.head_bytes

    @property
    def total_bytes(self) -> int:
        """What the driver will show as used."""
        return self.allocated_bytes + self.context_bytes


def loss_chunk_rows(n_tokens: int, n_vocab: int) -> int:
    """Rows of logits that the chunked loss keeps alive, never more than there are.

    By memory budget, at least 512, and at least a sixteenth of a micro-batch, little beside its activations.
    """
    affordable = LOSS_CHUNK_BYTES // (4 * n_vocab) // CHUNK_ROWS_MULTIPLE * CHUNK_ROWS_MULTIPLE
    return min(max(MIN_CHUNK_ROWS, affordable, -(-n_tokens // MAX_CHUNKS)), n_tokens)


def choose_loss_path(n_tokens_microbatch: int, n_vocab: int, *, on_gpu: bool) -> LossPath:
    """The stated rule for `loss = "auto"`.

    On a CPU always `chunked`: its softmax stays in cache (measured 1.15 to 3 times the speed of all rows at once). On a
    GPU `chunked` when one micro-batch's fp32 logits exceed the memory budget; below it, one chunk would hold them all.
    """
    if not on_gpu:
        return "chunked"
    return "chunked" if 4 * n_tokens_microbatch * pad_vocab(n_vocab) > LOSS_CHUNK_BYTES else "plain"


def predict_vram(
    shape: ModelShape,
    n_vocab: int,
    *,
    optimizer: OptimizerName,
    microbatch_seqs: int,
    n_processes: int,
    precision: Precision,
    loss_path: LossPath,
    checkpointing: bool = False,
    gradient_as_bucket_view: bool = True,
) -> VramEstimate:
    """Peak memory of one rank, by term.

    Args:
        microbatch_seqs: sequences of one forward pass on one rank.
        checkpointing: gradient checkpointing of every block.
        gradient_as_bucket_view: DDP keeps the gradients inside its buckets (ours does), so they exist once.

    Source: saved activations as counted for this model; the shape of the formula is Korthikanti et al. 2022
    (arXiv 2205.05198), section 4.
    """
    n_stored = count_params(shape, n_vocab).n_stored
    vocab = pad_vocab(n_vocab)
    d, tokens = shape.d_model, microbatch_seqs * shape.context_tokens
    per_layer = CHECKPOINTED_BYTES if checkpointing else ACTIVATION_BYTES[precision]
    return VramEstimate(
        optimizer=optimizer,
        microbatch_seqs=microbatch_seqs,
        loss_path=loss_path,
        weights_bytes=4 * n_stored,
        grads_bytes=4 * n_stored,
        optimizer_bytes=_optimizer_bytes(optimizer, n_stored, n_embed=vocab * d),
        autocast_bytes=2 * n_stored if precision == "bf16" else 0,
        ddp_bytes=4 * n_stored if n_processes > 1 and not gradient_as_bucket_view else 0,
        activations_bytes=round(tokens * d * (per_layer * shape.n_layer + OUTSIDE_BLOCKS_BYTES)),
        head_bytes=_head_bytes(loss_path, tokens, vocab, d),
        context_bytes=CONTEXT_BYTES,
    )


def _optimizer_bytes(optimizer: OptimizerName, n_stored: int, *, n_embed: int) -> int:
    if optimizer == "adamw":
        return 8 * n_stored
    return round(EIGHT_BIT_STATE_BYTES * (n_stored - n_embed) + 8 * n_embed)  # the embedding keeps 32-bit states


def _head_bytes(loss_path: LossPath, tokens: int, vocab: int, d: int) -> int:
    if loss_path == "plain":
        return round(PLAIN_LOGIT_BYTES * tokens * vocab)
    rows = loss_chunk_rows(tokens, vocab)
    return round(CHUNKED_LOGIT_BYTES * rows * vocab + 4 * vocab * d + HIDDEN_GRAD_BYTES * tokens * d)


def largest_microbatch(
    shape: ModelShape,
    n_vocab: int,
    *,
    seqs_per_rank: int,
    optimizer: OptimizerName,
    n_processes: int,
    precision: Precision,
    card_bytes: int | None,
    loss_path: LossPath | None = None,
) -> int | None:
    """The largest divisor of the per-rank batch that fits 90 % of the card, or None where not even one sequence does.

    Args:
        seqs_per_rank: sequences per rank and optimizer step.
        card_bytes: the card's memory; None on CPU, where only a modest cap on tokens applies.
        loss_path: None lets each candidate choose its own.
    """
    cap_tokens = MAX_MICROBATCH_TOKENS_CPU if card_bytes is None else MAX_MICROBATCH_TOKENS_GPU
    for seqs in (s for s in range(seqs_per_rank, 0, -1) if seqs_per_rank % s == 0):
        tokens = seqs * shape.context_tokens
        if tokens > cap_tokens and seqs > 1:
            continue
        if card_bytes is None:
            return seqs
        need = predict_vram(
            shape,
            n_vocab,
            optimizer=optimizer,
            microbatch_seqs=seqs,
            n_processes=n_processes,
            precision=precision,
            loss_path=loss_path or choose_loss_path(tokens, n_vocab, on_gpu=True),
        )
        if need.total_bytes <= CARD_SHARE * card_bytes:
            return seqs
    return None
