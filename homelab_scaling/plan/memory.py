"""Predicted GPU memory of one rank, moment by moment and term by term, and the largest micro-batch that fits.

Legend: N stored parameters, P of them in the blocks' matrices (12 L d^2), L layers, h heads, d width, V padded
vocabulary, t tokens of one micro-batch on one rank, R rows of logits that exist at a time.

Always there: weights 4N, optimizer states, and gradients 4N where they add up over micro-batches or ranks. On top of
that come, at the worst of a few moments:

    head          the end of the forward pass: what the blocks saved, bf16 copies of their matrices 2P, and the loss
    softmax       the plain loss's backward pass, with three fp32 tensors of logits
    blocks        the last block, first on the way back: its gradients; computed again, if it saved nothing
    first block   the same at the other end, with the gradients of all the others
    tail          the embedding, whose gradient has two sources

Every term was checked against a step of this model under torch's fake tensors, allocation by allocation
(tests/train/test_peak_memory.py); that is arithmetic, not a GPU. The context and the allocator's reserve are apart, and
assumed: no torch counter holds the one, and `max_memory_allocated` not the other.
"""

from dataclasses import dataclass
from typing import Literal

from homelab_scaling.plan.counting import count_params, pad_vocab
from homelab_scaling.specs import ModelShape, OptimizerName, Precision, Sharding

LossPath = Literal["chunked", "plain"]
Moment = Literal["head", "softmax", "blocks", "first block", "tail"]

LOSS_CHUNK_BYTES = 256 * 2**20
"""Memory for the fp32 logits that the loss keeps alive; the one constant behind rows and loss path."""
MIN_CHUNK_ROWS = 512
"""Fewer rows make the head's matmuls too thin: 16 rows cost 4 to 5 times the time of 256 (measured, CPU)."""
CHUNK_ROWS_MULTIPLE = 128
MAX_CHUNKS = 16
"""Of one micro-batch: each adds to the head's whole fp32 gradient, which with 50 chunks would be a tenth of a step."""

ACTIVATION_BYTES: dict[Precision, int] = {"bf16": 36, "fp32": 64}
"""Saved per token, width and layer: two fp32 residual streams 8, and in the precision two normed ones, queries, keys,
values and the attention's output (6 in all), and the feed-forward's 4d before and after its GELU."""
SAVED_PER_TOKEN_BYTES = 16
"""And per token and layer: two norms' mean and scale; 4 more per head, the attention's log-sum."""
RECOMPUTED_BYTES = 4
"""Saved per token, width and layer where blocks are computed again: their input."""
BLOCK_BACKWARD_BYTES: dict[Precision, int] = {"bf16": 14, "fp32": 16}
"""Per token and width: gradients inside one block on the way back."""
PLAIN_BYTES: dict[Precision, tuple[int, int]] = {"bf16": (10, 12), "fp32": (8, 12)}
"""Per token and vocabulary, in the plain loss's forward and backward: logits in the precision and in fp32, log-softmax;
log-softmax, its gradient and that of the logits."""
PLAIN_COMPILED_BYTES: dict[Precision, tuple[int, int]] = {"bf16": (2, 2), "fp32": (4, 4)}
"""The same where torch.compile makes one kernel of it, which writes the gradient over the logits (measured on CPU)."""
EIGHT_BIT_STATE_BYTES = 2.03
"""Two 8-bit moments and their block scales, per parameter."""
WORKSPACE_BYTES = 9 * 2**20
"""Of cuBLAS, through torch's allocator (32 MiB on Hopper)."""
CONTEXT_BYTES = 450_000_000
"""CUDA context and loaded kernels: the driver shows them, torch does not. Assumed."""
RESERVE_FRAC = 0.05
"""Of what is allocated: blocks that torch's allocator holds and cannot use. Assumed."""

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
    moment: Moment
    """When the peak is."""
    weights_bytes: int
    grads_bytes: int
    """Gradients that are there at that moment, of all parameters or of the last ones."""
    optimizer_bytes: int
    autocast_bytes: int
    ddp_bytes: int
    activations_bytes: int
    head_bytes: int
    """Logits, their gradients and what else the loss needs."""
    workspace_bytes: int
    context_bytes: int
    reserve_bytes: int

    @property
    def states_bytes(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights_bytes + self.grads_bytes + self.optimizer_bytes + self.autocast_bytes + self.ddp_bytes

    @property
    def allocated_bytes(self) -> int:
        """What torch will report as `max_memory_allocated`."""
        return self.states_bytes + self.activations_bytes + self.head_bytes + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        """What the driver will show as used: context and the allocator's reserve on top."""
        return self.allocated_bytes + self.context_bytes + self.reserve_bytes


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
    accumulates: bool = True,
    compiled: bool = False,
    checkpointing: bool = False,
    sharding: Sharding = "none",
    gradient_as_bucket_view: bool = True,
) -> VramEstimate:
    """Peak memory of one rank, by term.

    Args:
        microbatch_seqs: sequences of one forward pass on one rank.
        accumulates: gradients of earlier micro-batches wait while one is computed.
        compiled: torch.compile; it makes one kernel of the softmax, and copies of weights are not kept.
        checkpointing: every block is computed again on the way back.
        sharding: FSDP over the ranks.
        gradient_as_bucket_view: DDP keeps the gradients inside its buckets (ours does), so they exist once.

    Source: counted for this model, see the head of this file; the shape of the formula is Korthikanti et al. 2022
    (arXiv 2205.05198), section 4.
    """
    step = _Step(shape=shape, n_vocab=n_vocab, tokens=microbatch_seqs * shape.context_tokens, precision=precision)
    parts = n_processes if sharding != "none" else 1
    n = step.n_stored
    ddp = n_processes > 1 and sharding == "none"
    always = {
        "weights": _gathered(step, n_processes, sharding),
        "optimizer": _optimizer_bytes(optimizer, n, n_embed=step.vocab * shape.d_model) // parts,
        "ddp": 4 * n if ddp and not gradient_as_bucket_view else 0,
    }
    held = 4 * n // parts if accumulates or ddp else 0
    moments = step.moments(loss_path, checkpointing=checkpointing, compiled=compiled, held=held, parts=parts)
    moment, worst = max(moments.items(), key=lambda found: found[1].total)
    allocated = sum(always.values()) + worst.total + WORKSPACE_BYTES
    return VramEstimate(
        optimizer=optimizer,
        microbatch_seqs=microbatch_seqs,
        loss_path=loss_path,
        moment=moment,
        weights_bytes=always["weights"],
        grads_bytes=worst.grads,
        optimizer_bytes=always["optimizer"],
        autocast_bytes=worst.autocast,
        ddp_bytes=always["ddp"],
        activations_bytes=worst.activations,
        head_bytes=worst.head,
        workspace_bytes=WORKSPACE_BYTES,
        context_bytes=CONTEXT_BYTES,
        reserve_bytes=round(RESERVE_FRAC * allocated),
    )


@dataclass(frozen=True, kw_only=True)
class _At:
    """Bytes of one moment that are not always there."""

    grads: int = 0
    autocast: int = 0
    activations: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.grads + self.autocast + self.activations + self.head


@dataclass(frozen=True, kw_only=True)
class _Step:
    """Sizes of one micro-batch."""

    shape: ModelShape
    n_vocab: int
    tokens: int
    precision: Precision

    @property
    def n_stored(self) -> int:
        return count_params(self.shape, self.n_vocab).n_stored

    @property
    def vocab(self) -> int:
        return pad_vocab(self.n_vocab)

    @property
    def width(self) -> int:
        """Bytes of one number in the precision of the matmuls."""
        return 2 if self.precision == "bf16" else 4

    @property
    def copies(self) -> int:
        """bf16 copies of one block's matrices."""
        return 2 * 12 * self.shape.d_model**2 if self.precision == "bf16" else 0

    @property
    def head_copy(self) -> int:
        return 2 * self.vocab * self.shape.d_model if self.precision == "bf16" else 0

    def block(self) -> int:
        """What one block saves."""
        per_token = ACTIVATION_BYTES[self.precision] * self.shape.d_model
        return self.tokens * (per_token + SAVED_PER_TOKEN_BYTES + 4 * self.shape.n_head)

    def moments(
        self, loss_path: LossPath, *, checkpointing: bool, compiled: bool, held: int, parts: int
    ) -> dict[Moment, _At]:
        """Each moment's bytes; `held` of them are gradients of earlier micro-batches."""
        layers, d, t, embedding = (
            self.shape.n_layer,
            self.shape.d_model,
            self.tokens,
            4 * self.vocab * self.shape.d_model,
        )
        blocks = layers * (RECOMPUTED_BYTES * t * d if checkpointing else self.block())
        saved = blocks + 4 * t * d  # and the final norm's input
        # Autocast keeps its copies to the end of the forward pass, autograd those of blocks that are not recomputed.
        copies = 0 if compiled and checkpointing else layers * self.copies
        in_block = (self.block() if checkpointing else 0) + BLOCK_BACKWARD_BYTES[self.precision] * t * d
        every = 4 * self.n_stored // parts
        found: dict[Moment, _At] = {
            "blocks": _At(
                grads=held + embedding,
                autocast=self.copies if checkpointing else copies,
                activations=saved + in_block,
            ),
            "first block": _At(
                grads=max(every, held + embedding),
                autocast=self.copies,
                activations=in_block + RECOMPUTED_BYTES * t * d,
            ),
            "tail": _At(grads=every + 2 * embedding, activations=8 * t * d),
        }
        if loss_path == "chunked":
            rows = -(-t // -(-t // loss_chunk_rows(t, self.vocab)))
            softmax = 0 if compiled or self.precision == "fp32" else 4 * rows * self.vocab
            # The product for the head's gradient is made in the precision before it is added in fp32.
            logits = self.width * rows * self.vocab + max(softmax, self.head_copy)
            found["head"] = _At(
                grads=held + embedding,
                autocast=copies + self.head_copy,
                activations=saved + 8 * t * d,  # hidden states and their gradient
                head=logits,
            )
            return found
        forward, backward = (PLAIN_COMPILED_BYTES if compiled else PLAIN_BYTES)[self.precision]
        hidden = saved + self.width * t * d
        found["head"] = _At(
            grads=held, autocast=copies + self.head_copy, activations=hidden, head=forward * t * self.vocab
        )
        found["softmax"] = _At(
            grads=held,
            autocast=(0 if checkpointing else copies) + self.head_copy,
            activations=hidden,
            head=backward * t * self.vocab,
        )
        return found


def _gathered(step: _Step, n_processes: int, sharding: Sharding) -> int:
    """Weights on one rank: whole, or its part and those that are gathered at the peak.

    FSDP keeps embeddings gathered through a step; of the blocks it gathers all (grad-op), or two at a time (full).
    """
    n = step.n_stored
    if sharding == "none" or n_processes == 1:
        return 4 * n
    block = (count_params(step.shape, step.n_vocab).n_body - 2 * step.shape.d_model) // step.shape.n_layer
    in_blocks = block * step.shape.n_layer
    gathered = n if sharding == "grad-op" else n - in_blocks + min(2, step.shape.n_layer) * block
    return 4 * (n // n_processes + gathered)


def _optimizer_bytes(optimizer: OptimizerName, n_stored: int, *, n_embed: int) -> int:
    if optimizer == "adamw":
        return 8 * n_stored
    return round(EIGHT_BIT_STATE_BYTES * (n_stored - n_embed) + 8 * n_embed)  # the embedding keeps 32-bit states


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
    compiled: bool = False,
    checkpointing: bool = False,
    sharding: Sharding = "none",
) -> int | None:
    """The largest divisor of the per-rank batch that fits 90 % of the card, or None where not even one sequence does.

    Args:
        seqs_per_rank: sequences per rank and optimizer step.
        card_bytes: the card's memory; None on CPU, where only a modest cap on tokens applies.
        loss_path: None lets each candidate choose its own.
        compiled, checkpointing, sharding: as the run will be; blocks are never recomputed unless asked for.
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
            accumulates=seqs < seqs_per_rank,
            compiled=compiled,
            checkpointing=checkpointing,
            sharding=sharding,
        )
        if need.total_bytes <= CARD_SHARE * card_bytes:
            return seqs
    return None
