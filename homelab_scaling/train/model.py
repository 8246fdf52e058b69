"""The model that every rung trains: Hugging Face's GPT-2 blocks and weights, our own way through them.

Legend: B sequences, T tokens of a sequence, D width, V vocabulary (padded).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2Model

from homelab_scaling.plan.counting import pad_vocab
from homelab_scaling.plan.memory import MIN_CHUNK_ROWS, loss_chunk_rows
from homelab_scaling.specs import CompileMode, ModelShape
from homelab_scaling.train import loss as losses

LossPath = Literal["chunked", "plain"]

CPU_CHUNK_BYTES = 96 * 2**20
"""Of fp32 logits on a CPU, where thin matmuls cost nothing: 512 rows at V = 50,304 took as long as 1,024 at d = 96 to
512 (6 % more at 768)."""


class LanguageModel(nn.Module):
    """GPT-2 that maps tokens and their successors to a loss and keeps no logits.

    The parameters have the names and shapes of `GPT2LMHeadModel`, a tied head stored once as the token embedding, so
    `state_dict()` loads into Hugging Face's model as it is.

    Args:
        recompute: each block keeps its input alone and is computed again in the backward pass.
    """

    def __init__(self, config: GPT2Config, *, n_vocab: int, loss_path: LossPath, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.n_vocab = n_vocab
        self.loss_path = loss_path
        self.recompute = recompute
        self.sharded = False
        """Whether each rank holds a part of every parameter; train/sharded.py makes it so."""
        self.transformer = GPT2Model(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self._compiled_backbone: Callable[[Tensor], Tensor] | None = None
        self._plain_loss = losses.plain_cross_entropy
        self._replays = False
        """Whether CUDA graphs are replayed."""

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix: the token embedding itself when tied."""
        weight: Tensor = self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight
        return weight

    def forward(self, x_BT: Tensor, y_BT: Tensor, *, per_token: bool = False) -> Tensor:
        """Mean loss in nats per token, an fp32 scalar; or `token_losses`, where a wrapper gathers parts of weights."""
        if per_token:
            return LanguageModel.token_losses(self, x_BT, y_BT)
        hidden_ND, targets_N = self.hidden_states(x_BT).flatten(0, 1), y_BT.flatten()
        if self.loss_path == "plain":
            return self._plain_loss(hidden_ND, self.head_weight, targets_N, self.n_vocab)
        return losses.chunked_cross_entropy(
            hidden_ND,
            self.head_weight,
            targets_N,
            self.n_vocab,
            self._chunk_rows(hidden_ND),
            compiled=self.compiled and not hidden_ND.is_cpu,  # on CPU the kernel's own blocks beat the compiler
        )

    @torch.no_grad()
    def token_losses(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Loss of every token in nats, (B, T) in fp32, without gradients."""
        hidden_ND, targets_N = self.hidden_states(x_BT).flatten(0, 1), y_BT.flatten()
        chunk_rows = self._chunk_rows(hidden_ND)
        return losses.token_losses(hidden_ND, self.head_weight, targets_N, self.n_vocab, chunk_rows).view(y_BT.shape)

    def _chunk_rows(self, hidden_ND: Tensor) -> int:
        """Rows of logits that exist at a time: by the memory budget of plan/memory.py, on a CPU by a smaller one."""
        n_tokens, n_vocab = len(hidden_ND), self.config.vocab_size
        rows = loss_chunk_rows(n_tokens, n_vocab)
        return min(rows, max(MIN_CHUNK_ROWS, CPU_CHUNK_BYTES // (4 * n_vocab))) if hidden_ND.is_cpu else rows

    def compile_in_place(self, mode: CompileMode = "default") -> None:
        """Compiles the blocks and the softmax; no module is wrapped, so parameter names stay as they are.

        Under `reduce-overhead` what a pass returns, gradients too, lies in memory that the next pass writes over: the
        optimizer must keep gradients of its own (`MaskedAdamW.keep_gradients`), into which each pass then adds.
        """
        self._replays = mode == "reduce-overhead"
        self._compiled_backbone = torch.compile(self._hidden_states, mode=mode)
        self._plain_loss = torch.compile(losses.plain_cross_entropy, mode=mode)

    def compile_blocks(self) -> None:
        """Compiles every block by itself instead, where something has to happen between them (FSDP)."""
        for block in self.transformer.h:
            block.compile()
        self._compiled_backbone = self._hidden_states

    @property
    def compiled(self) -> bool:
        """Whether `compile_in_place` was called."""
        return self._compiled_backbone is not None

    def hidden_states(self, x_BT: Tensor) -> Tensor:
        """What the blocks make of the tokens, (B, T, D), compiled or not: all but head and loss."""
        if self._replays:
            # What an earlier pass returned is not needed any more.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return (self._compiled_backbone or self._hidden_states)(x_BT)

    def _hidden_states(self, x_BT: Tensor) -> Tensor:
        """What GPT2Model.forward computes, less its search for packed sequences.

        That search reads a device flag on the host in every forward pass, and under torch.compile it builds a 4-D mask,
        which rules out SDPA's flash kernel on GPUs; without a mask the blocks pass is_causal instead. Positions are a
        slice of the table, whose gradient is a plain sum and not a scatter.
        """
        gpt2 = self.transformer
        hidden_BTD = gpt2.wte(x_BT) + gpt2.wpe.weight[: x_BT.shape[1]]
        recompute = self.recompute and torch.is_grad_enabled()
        for block in gpt2.h:
            if recompute:  # there is no dropout, so no random state to put back
                hidden_BTD = checkpoint(block, hidden_BTD, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_BTD = block(hidden_BTD)
        normed_BTD: Tensor = gpt2.ln_f(hidden_BTD)
        return normed_BTD


def gpt2_config(shape: ModelShape, n_vocab: int) -> GPT2Config:
    """Hugging Face's configuration of a shape: padded vocabulary, tanh GELU in one kernel, no dropout, no cache."""
    return GPT2Config(
        vocab_size=pad_vocab(n_vocab),
        n_positions=shape.context_tokens,
        n_embd=shape.d_model,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )


def build_model(
    shape: ModelShape, n_vocab: int, *, seed: int, loss_path: LossPath, recompute: bool = False
) -> LanguageModel:
    """An initialised model in fp32 on the CPU, the same bits for the same seed whatever device it moves to."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        config = gpt2_config(shape, n_vocab)
        model = LanguageModel(config, n_vocab=n_vocab, loss_path=loss_path, recompute=recompute)
    _init_weights(model, seed)
    return model


@torch.no_grad()
def _init_weights(model: LanguageModel, seed: int) -> None:
    """GPT-2's initialisation, drawn here so that it does not depend on the version of transformers.

    Normal with sigma 0.02, residual projections with 0.02 / sqrt(2 L), biases and padded rows zero, norms one.
    Source: Radford et al. 2019, section 2.3; GPT2PreTrainedModel._init_weights.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    std: float = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            depth = 2 * model.config.n_layer if name.endswith("c_proj.weight") else 1
            parameter.normal_(0.0, std / math.sqrt(depth), generator=generator)
    model.transformer.wte.weight[model.n_vocab :] = 0.0
    model.head_weight[model.n_vocab :] = 0.0


def sdpa_backend(model: LanguageModel, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Which attention kernel torch picks for this model, as `flash_attention`, `efficient_attention`, `math`, ..."""
    config = model.config
    shape = (1, config.n_head, config.n_positions, config.n_embd // config.n_head)
    query = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    choice = torch._fused_sdp_choice(query, query, query, is_causal=True)
    return SDPBackend(choice).name.lower()
