"""Whether an exported folder is the model that was trained: same loss, same ids, and it speaks.

The folder is loaded as anybody would (AutoModelForCausalLM, AutoTokenizer) and held against our own model with our own
weights, rounded as the file rounds them, on the windows of held-out text that training validates on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from homelab_scaling.data.batches import read_windows, validation_windows
from homelab_scaling.data.shards import open_shards
from homelab_scaling.data.tokenizers import Tokenizer
from homelab_scaling.errors import CheckpointError
from homelab_scaling.export.convert import load_tokenizer, load_weights
from homelab_scaling.export.hf_tokenizer import PROBES, check_same_ids, quiet_transformers
from homelab_scaling.export.trained import Trained
from homelab_scaling.train.checkpoint import MODEL, load_tensors
from homelab_scaling.train.model import LanguageModel, build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids = npt.NDArray[Any]
Losses = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets (B, T) to losses of each token."""

TOLERANCE_NATS = 1e-5
FORWARD_FLOPS = {"cpu": 1e12, "cuda": 1e14}
"""How much a check may compute: some ten seconds."""
LOGITS_BYTES = 64 * 2**20
SEED = 0
TEMPERATURE, TOP_K = 0.8, 50
PROMPT_TOKENS, NEW_TOKENS = 16, 64


@dataclass(frozen=True, kw_only=True)
class Check:
    """The loss of the exported folder beside that of our own model, on the same windows."""

    loss_nats: float
    """Of the exported folder, computed in fp32."""
    loss_own_nats: float
    """Of our model with the same weights; the two agree to 1e-5."""
    loss_fp32_nats: float
    """Of our model with the weights as they were trained."""
    bpb: float | None
    """Bits per byte of `loss_nats`, where the windows are text whose bytes are known."""
    n_tokens: int
    on: str
    """Which tokens, in words."""
    whole: bool
    """The full validation set of the run, as the record's loss."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the exported model says."""

    how: str
    """greedy, or the temperature, the cut and the seed."""
    prompt: str
    """From the held-out text; empty where the model started from end of text."""
    text: str
    """What it made of it, without the prompt."""


def check_folder(
    folder: Path, trained: Trained, cutter: Tokenizer, *, dtype: str, device: str
) -> tuple[Check, tuple[Sample, ...]]:
    """The proof that an exported folder is the trained model, and two samples of it.

    Args:
        cutter: the run's own tokenizer.
        dtype: of the weights in the file.

    Raises:
        CheckpointError: its loss differs.
        DataError: its tokenizer gives other ids than the run's.
    """
    windows, on, whole = held_out_windows(trained, device)
    model, tokenizer = load_weights(folder), load_tokenizer(folder)
    text = trained.corpus is not None
    with quiet_transformers():  # about texts longer than the context
        check_same_ids(cutter, tokenizer, (*PROBES, *([cutter.decode(windows[0])] if text else [])))
    model.to(device)
    loss = _mean_loss(lambda x_BT, y_BT: _foreign_losses(model, x_BT, y_BT), windows, trained, device)
    exact = _own_loss(trained, windows, device, None)
    own = exact if dtype == "fp32" else _own_loss(trained, windows, device, torch.bfloat16)
    if not abs(loss - own) <= TOLERANCE_NATS:  # NaN is not near anything
        raise CheckpointError(
            f"{trained.name}: the exported folder gives a loss of {loss:.6f} nats where the trained model gives "
            f"{own:.6f}, so nothing was written; please report this with the versions that `homelab doctor` prints"
        )
    check = Check(
        loss_nats=loss,
        loss_own_nats=own,
        loss_fp32_nats=exact,
        bpb=_bpb(trained, loss),
        n_tokens=windows.shape[0] * (windows.shape[1] - 1),
        on=on,
        whole=whole,
    )
    return check, samples_of(model, tokenizer, windows[0] if text else None, trained)


# ----------------------------------------------------------------------------------------------------------------- loss


def held_out_windows(trained: Trained, device: str) -> tuple[Ids, str, bool]:
    """Windows (n, T + 1) of the run's validation set, in words which, and whether they are all of it.

    As many as the check may compute on; where the text is gone, random tokens, on which two models that are the same
    give the same loss as well.
    """
    science = trained.spec.science
    context = science.shape.context_tokens
    most = max(1, int(FORWARD_FLOPS[device.partition(":")[0]] / (2 * trained.n_params * context)))
    if trained.corpus is None:
        rng = np.random.default_rng(SEED)
        ids = rng.integers(0, science.n_vocab, size=(min(most, 64), context + 1))
        return ids, "random tokens (the held-out text is not there any more)", False
    stream = open_shards(trained.shards).val
    starts = validation_windows(len(stream), context, science.val_tokens)
    chosen = starts[:most]
    whole = len(chosen) == len(starts)
    on = "the run's full validation set" if whole else f"the first {len(chosen)} of {len(starts)} validation windows"
    return read_windows(stream, chosen, context).astype(np.int64), on, whole


def _mean_loss(losses: Losses, windows: Ids, trained: Trained, device: str) -> float:
    science = trained.spec.science
    size = max(1, LOGITS_BYTES // (4 * science.shape.context_tokens * science.n_vocab))
    total = 0.0
    with torch.inference_mode():
        for first in range(0, len(windows), size):
            ids = torch.from_numpy(windows[first : first + size]).to(device)
            total += float(losses(ids[:, :-1], ids[:, 1:]).double().sum())
    n_tokens: int = windows.shape[0] * (windows.shape[1] - 1)
    return total / n_tokens


def _foreign_losses(model: "PreTrainedModel", x_BT: Tensor, y_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=x_BT).logits.float()
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten(), reduction="none")


def _own_loss(trained: Trained, windows: Ids, device: str, rounded_to: torch.dtype | None) -> float:
    model = own_model(trained, rounded_to).to(device).eval()
    return _mean_loss(model.token_losses, windows, trained, device)


def own_model(trained: Trained, rounded_to: torch.dtype | None = None) -> LanguageModel:
    """The model as training has it, padded vocabulary and all; its weights rounded to another type and back."""
    science = trained.spec.science
    model = build_model(science.shape, science.n_vocab, seed=science.seed, loss_path="plain")
    weights = load_tensors(trained.folder, MODEL, torch.device("cpu"))
    if rounded_to is not None:
        weights = {name: tensor.to(rounded_to).float() for name, tensor in weights.items()}
    model.load_state_dict(weights)
    return model


def _bpb(trained: Trained, loss_nats: float) -> float | None:
    val = trained.corpus.val if trained.corpus is not None else None
    if val is None or not val.n_bytes:
        return None
    return loss_nats / math.log(2) * val.n_tokens / val.n_bytes


# -------------------------------------------------------------------------------------------------------------- samples


def samples_of(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", window: Ids | None, trained: Trained
) -> tuple[Sample, ...]:
    """What the model makes of the first held-out tokens (of end of text where there is no text): greedy, and drawn."""
    context = trained.spec.science.shape.context_tokens
    n_prompt = min(PROMPT_TOKENS, context // 4)
    ids = [tokenizer.eos_token_id] if window is None else window[:n_prompt].tolist()
    prompt = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": min(NEW_TOKENS, context - len(ids)),
        "pad_token_id": tokenizer.eos_token_id,
    }
    drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
    found = []
    for how, choice in (
        ("greedy", {"do_sample": False}),
        (f"drawn at temperature {TEMPERATURE}, top-k {TOP_K}, seed {SEED}", drawn),
    ):
        devices = [model.device] if model.device.type == "cuda" else []
        with quiet_transformers(), torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(SEED)
            out: Any = model.generate(prompt, **options, **choice)
        text = tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=False)
        shown = "" if window is None else tokenizer.decode(ids, skip_special_tokens=False)
        found.append(Sample(how=how, prompt=str(shown), text=str(text)))
    return tuple(found)
