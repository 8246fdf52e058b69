"""Where common trainings keep their loss, size and tokens, so that few flags are needed; whatever is taken is said."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.from_trackers.tracked import TrackedRun, as_number, as_truth
from homelab_scaling.plan.counting import ParamCount, count_params, flops_per_token
from homelab_scaling.specs import ModelShape

OURS = re.compile(r"(?:decay-(\d+)|train)-val-full/loss")
"""Our own full validation at the end of a decay (whose tokens the tag says) or of a cosine schedule."""

LOSS_NAMES = frozenset(
    [f"{half}{mark}loss" for half in ("val", "eval", "valid", "validation", "dev") for mark in "/_"]
    + [f"loss/{half}" for half in ("val", "eval", "valid", "validation", "dev")]
    + ["val/lm_loss", "eval/lm_loss", "validation/lm_loss", "lm_loss_validation", "val/loss_epoch", "val_loss_epoch"]
)
PARAM_NAMES = (
    *("n_params", "num_params", "n_parameters", "num_parameters", "model_num_parameters", "total_params"),
    *("param_count", "model_params", "params", "parameters", "trainable_params", "num_trainable_params"),
)
TOKEN_NAMES = (
    *("n_tokens", "tokens_seen", "num_tokens", "total_tokens", "train_tokens", "tokens"),
    *("consumed_tokens", "tokens_processed", "num_input_tokens_seen"),
)
PER_STEP_NAMES = (
    *("tokens_per_step", "tokens_per_iter", "tokens_per_update", "tokens_per_batch"),
    *("batch_tokens", "batch_tokens_global", "global_batch_tokens", "batch_size_tokens"),
)
STEP_NAMES = ("iter", "iteration", "step", "global_step", "train/global_step", "trainer/global_step")
"""Curves that count optimizer steps where a tracker's own axis counts calls, as W&B's does."""
NANOGPT_BATCH = ("gradient_accumulation_steps", "batch_size", "block_size")
"""Their product is nanoGPT's tokens per iteration over all of its GPUs. Source: karpathy/nanoGPT, train.py."""
NANOGPT_VOCAB = {"openwebtext": 50257, "shakespeare": 50257, "shakespeare_char": 65}
"""What nanoGPT's configuration does not say, by its `dataset`. Its 47 padded rows are no parameters of a law."""


def looks_like_loss(tag: str) -> bool:
    """Whether a curve is a held-out loss by its name."""
    return tag.lower().replace(" ", "_").replace(".", "/") in LOSS_NAMES


def named(names: Iterable[str], among: Iterable[str]) -> Iterator[str]:
    """Those among the second whose last part is one of the first, in the first's order."""
    by_last: dict[str, list[str]] = {}
    for full in among:
        by_last.setdefault(re.split(r"[/.]", full)[-1].lower(), []).append(full)
    for name in names:
        yield from sorted(by_last.get(name, ()), key=len)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A GPT-2's parameters, and the training FLOPs of one token."""

    params: ParamCount
    n_biases_absent: int
    flops_per_token: float
    how: str

    @property
    def n_params(self) -> int:
        return self.params.n_params - self.n_biases_absent

    @property
    def n_body(self) -> int:
        return self.params.n_body - self.n_biases_absent


def count_gpt2(facts: Mapping[str, object], n_vocab: int | None) -> Counted | str:
    """The parameters of a configuration in the words of nanoGPT, Hugging Face's GPT-2 or our own; or why not."""
    kind = facts.get("model_type")
    if kind is not None and "gpt2" not in str(kind).lower():
        return f"model_type {kind} is not counted here"
    n_layer, d_model = _first(facts, "n_layer"), _first(facts, "n_embd", "d_model")
    context = _first(facts, "block_size", "n_positions", "n_ctx", "context_tokens")
    if n_layer is None or d_model is None or context is None:
        return "no n_layer, n_embd and block_size to count it from"
    inner = _first(facts, "n_inner")
    if inner not in (None, 4 * d_model):
        return f"n_inner {inner} is not 4 n_embd, and only that is counted here"
    vocab, where = n_vocab or _first(facts, "vocab_size", "n_vocab"), ""
    if vocab is None and "block_size" in facts:
        vocab = NANOGPT_VOCAB.get(str(facts.get("dataset")))
        where = f" with the {vocab:,} words of {facts.get('dataset')}" if vocab else ""
    if vocab is None:
        return "no vocab_size to count its embeddings with; add --n-vocab"
    tied = as_truth(facts.get("tie_word_embeddings", facts.get("tied"))) is not False
    try:
        shape = ModelShape(n_layer=n_layer, d_model=d_model, n_head=1, context_tokens=context, tied=tied)
    except SpecError as error:
        return f"its shape is none ({error})"
    no_bias = as_truth(facts.get("bias")) is False
    return Counted(
        params=count_params(shape, vocab),
        n_biases_absent=(11 * n_layer + 1) * d_model if no_bias else 0,
        flops_per_token=flops_per_token(shape, vocab),
        how=f"counted from the configuration's layers, width and context{where}",
    )


def _first(facts: Mapping[str, object], *names: str) -> int | None:
    for name in names:
        value = as_number(facts.get(name))
        if value is not None:
            return round(value)
    return None


def tokens_per_step(facts: Mapping[str, object]) -> tuple[float, str] | None:
    """Tokens of one optimizer step as a configuration says them, and where it does."""
    for name in named(PER_STEP_NAMES, facts):
        value = as_number(facts[name])
        if value:
            return value, name
    if "max_iters" not in facts:
        return None
    factors = [as_number(facts.get(name)) for name in NANOGPT_BATCH]
    product = 1.0
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product, " x ".join(NANOGPT_BATCH)


def optimizer_step(run: TrackedRun, step: int) -> tuple[float, str]:
    """The optimizer steps done at a step of the tracker's axis, and whose count that is."""
    for tag in STEP_NAMES:
        value = run.read(tag).exactly(step) if tag in run.tags else None
        if value is not None:
            return value, tag
    return step, "the step axis"
