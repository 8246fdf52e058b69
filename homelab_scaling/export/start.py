"""A Hugging Face GPT-2 as the start of a run: found, judged and hashed when planning, loaded when training begins.

Only what computes the same in our model is taken: GPT-2's blocks with tanh GELU, the run's vocabulary, its context.
The hash of the weights is part of a run's identity; where they lie is not.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from homelab_scaling import codec
from homelab_scaling.data.shards import open_shards
from homelab_scaling.errors import DataError, HomelabError, MachineError, SpecError, UserError
from homelab_scaling.export.convert import check_hugging_face, cut_by, load_tokenizer, load_weights, read_facts
from homelab_scaling.export.hf_tokenizer import check_same_ids, quiet_transformers
from homelab_scaling.export.trained import is_run
from homelab_scaling.plan.parts import Start
from homelab_scaling.specs import CorpusManifest, ModelShape, RunSpec
from homelab_scaling.train.checkpoint import tensors_hash

if TYPE_CHECKING:
    from homelab_scaling.train.model import LanguageModel

FROM_HUB = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
)
SAME: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""Settings of config.json with which Hugging Face's GPT-2 computes what ours does."""
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


# -------------------------------------------------------------------------------------------------------- when planning


def find_start(name: str, here: Path, corpus: CorpusManifest | None, shards: Path) -> Start:
    """The start that a ladder names, after holding it against the corpus.

    Args:
        name: a folder, relative to `here`, or a model's name on the hub.
        corpus: None where there are no shards yet; then only `plan_ladder` compares the vocabulary's size.
        shards: where they lie.

    Raises:
        UserError: there is no such model, it is no GPT-2 as ours, or it cuts text into other ids.
    """
    folder = _folder_of(name, here)
    start = _read(name, folder, max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0))
    if corpus is not None and start.n_vocab == corpus.n_vocab:
        _refuse_other_ids(start, corpus, shards)
    return start


def _folder_of(name: str, here: Path) -> Path:
    folder = (here / Path(name).expanduser()).resolve()
    if folder.is_dir():
        if is_run(folder):
            raise SpecError(
                f"train.start = {name!r} is a run of ours; export it (`homelab export`) and name that folder"
            )
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SpecError(f"train.start = {name!r}: no such folder ({folder}); give a Hugging Face GPT-2")
    from huggingface_hub import snapshot_download

    from homelab_scaling.data.tokenizers import quiet_hub

    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=list(FROM_HUB)))
    except Exception as error:  # offline mode, DNS, HTTP, no such repository: each has its own exception
        raise MachineError(
            f"train.start = {name!r}: no such folder in {here}, and the hub does not give a model of that name "
            f"({type(error).__name__}); give a folder, or connect once"
        ) from error


@lru_cache(maxsize=2)
def _read(name: str, folder: Path, _changed_ns: int) -> Start:
    """Shape, vocabulary and hash of a checkpoint; a plan is made several times, the weights are read once."""
    try:
        check_hugging_face(folder, with_tokenizer=False)
    except UserError as error:
        raise SpecError(f"train.start: {error}") from None
    config = codec.read_plain_json(folder / "config.json")
    found = {"scale_attn_weights": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5} | config
    for key, allowed in SAME.items():
        if (value := found.get(key, False)) not in allowed:
            raise SpecError(f"train.start = {name!r}: its {key} is {value!r}, ours computes only with {allowed[0]!r}")
    try:
        shape = ModelShape(
            n_layer=config["n_layer"],
            d_model=config["n_embd"],
            n_head=config["n_head"],
            context_tokens=config["n_positions"],
            tied=config.get("tie_word_embeddings", True),
        )
        n_vocab, n_inner = int(config["vocab_size"]), config.get("n_inner")
    except KeyError as error:
        raise SpecError(f"train.start = {name!r}: its config.json has no {error.args[0]}; download it again") from None
    if n_inner not in (None, 4 * shape.d_model):
        raise SpecError(f"train.start = {name!r}: its n_inner is {n_inner}, ours is four times the width")
    return Start(name=name, folder=str(folder), sha256=tensors_hash(read_weights(folder)), shape=shape, n_vocab=n_vocab)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a GPT-2 in fp32 under the names of ours, a tied head once, the vocabulary as it is.

    Raises:
        CheckpointError: they cannot be read.
    """
    model = load_weights(folder)
    named = {name: p.detach().float() for name, p in model.named_parameters()}
    if not model.config.tie_word_embeddings:
        return named
    return {name: tensor for name, tensor in named.items() if name != HEAD}


def _refuse_other_ids(start: Start, corpus: CorpusManifest, shards: Path) -> None:
    """DataError where the checkpoint's own tokenizer gives other ids than the corpus's; one without any is trusted."""
    folder = Path(start.folder)
    if cut_by(read_facts(folder)) == corpus.tokenizer_hash:
        return
    cutter_is_here = corpus.tokenizer_file is not None or corpus.tokenizer == "bytes"
    if not (folder / "tokenizer.json").is_file() or not cutter_is_here or not shards.is_dir():
        return
    cutter = open_shards(shards).tokenizer()
    try:
        with quiet_transformers():
            theirs = load_tokenizer(folder)
            theirs.split_special_tokens = True  # as ours cuts
            check_same_ids(cutter, theirs)
    except DataError:
        raise DataError(
            f"train.start = {start.name!r} cuts text into other tokens than the corpus ({corpus.tokenizer}), of which "
            "its weights know nothing; build the shards with its tokenizer.json"
        ) from None


# -------------------------------------------------------------------------------------------------------- when training


@torch.no_grad()
def load_start(model: "LanguageModel", spec: RunSpec) -> str | None:
    """Puts the weights that the run begins from into a fresh model.

    Returns:
        Why they could not be had, in a sentence; a run that has a checkpoint goes on without them. None if all is well
        or the run begins from random weights.
    """
    wanted, told = spec.science.start, spec.execution.start_from
    if wanted is None:
        return None
    if told is None:
        return f"{spec.run_id} begins from weights {wanted[:12]}, and its spec does not say where they are; plan again"
    try:
        weights = read_weights(Path(told)) if Path(told).is_dir() else {}
    except HomelabError as error:
        return str(error)
    if not weights:
        return f"{told}: the weights that {spec.run_id} begins from are not there; restore the folder, or plan again"
    if tensors_hash(weights) != wanted:
        return f"{told}: holds other weights than {spec.run_id} was planned with; restore the folder, or plan again"
    n_vocab = spec.science.n_vocab
    for name, parameter in model.named_parameters():
        if name in (EMBEDDING, HEAD):
            parameter[:n_vocab] = weights[name]
            parameter[n_vocab:] = 0.0
        else:
            parameter.copy_(weights[name])
    return None
