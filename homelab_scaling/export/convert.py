"""A trained row, or anybody's Hugging Face folder, as a causal language model with its tokenizer.

Ours are GPT-2 with a vocabulary padded to a multiple of 64 whose extra rows are masked in training. What leaves has the
real vocabulary only, so that no sampler can draw a token that does not exist, and the loss stays what it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from homelab_scaling import codec
from homelab_scaling.errors import CheckpointError, DataError, MachineError, UserError
from homelab_scaling.export.hf_tokenizer import quiet_transformers, to_hugging_face

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

    from homelab_scaling.export.trained import Trained
    from homelab_scaling.specs import ModelShape

FACTS = "homelab.json"
"""In a folder that `homelab export` wrote: what the record said."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
_OF_HUGGING_FACE = ("config.json", "tokenizer_config.json", "generation_config.json", *_WEIGHTS, *_TOKENIZERS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Portable:
    """A model as Hugging Face knows it, and where it comes from."""

    name: str
    """Short and fit for a folder's name: <run_id>@<tokens>, or the folder's own."""
    model: "PreTrainedModel"
    """In evaluation mode, on `device`."""
    tokenizer: "PreTrainedTokenizerBase"
    context_tokens: int
    n_vocab: int
    eot_id: int | None
    device: str
    run: Path | None = None
    """Our run's folder; None for a foreign model, of whose training text nothing is known."""
    shards: Path | None = None
    """The training text of our run, where it is still there."""
    n_params: int | None = None
    n_tokens: int | None = None
    flops: float | None = None
    loss_nats: float | None = None
    """Of the row, on its own held-out text."""
    tokenizer_hash: str | None = None
    facts: dict[str, Any] | None = None
    """What else the record says (data, energy, money); for the model card."""


def open_model(
    source: Path, *, at: int | str | None = None, device: str = "auto", tokenizer: Path | None = None
) -> Portable:
    """A model and its tokenizer, in fp32 and ready to be asked; the hub is never called.

    Args:
        source: a run's folder, a checkpoint folder inside it, or a Hugging Face folder.
        at: of a run's folder: the horizon in tokens, or the name of a checkpoint; None takes the largest finished row.
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        tokenizer: a tokenizer.json, for runs on shards that came without one.

    Raises:
        UserError: nothing of the kind is there, it is torn, incomplete, or lacks a tokenizer; in one sentence.
    """
    from homelab_scaling.export.trained import find_trained, is_run, refuse_lab

    source = Path(source).expanduser()
    where = pick_device(device)
    if is_run(source):
        return from_trained(find_trained(source, at), device=where, tokenizer=tokenizer)
    if not source.is_dir():
        raise UserError(
            f"{source}: no such folder; give a run (LAB/LADDER/runs/RUN), a checkpoint or an exported model"
        )
    refuse_lab(source)
    if at is not None:
        raise UserError(f"{source}: only a run of ours has checkpoints to choose from; leave --at out")
    return from_hugging_face(source, device=where)


def pick_device(device: str) -> str:
    """The device meant, as torch calls it.

    Raises:
        MachineError: torch does not see it.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise MachineError(f"device {device!r}: wants auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise MachineError(f"device {device!r}: wants auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"device {device}: torch sees {torch.cuda.device_count()} GPUs; use cpu, or `homelab doctor`"
        )
    return device


# ----------------------------------------------------------------------------------------------------------------- ours


def from_trained(trained: "Trained", *, device: str = "cpu", tokenizer: Path | None = None) -> Portable:
    """A checkpoint of ours with the real vocabulary.

    Raises:
        DataError: its tokenizer is missing or another one.
        CheckpointError: its tensors do not fit its spec.
    """
    from homelab_scaling.export.trained import tokenizer_of
    from homelab_scaling.train.checkpoint import MODEL

    science = trained.spec.science
    cutter = tokenizer_of(trained, tokenizer)
    eot_id = cutter.eot_id if trained.corpus is None else trained.corpus.eot_id
    model = gpt2_of(science.shape, science.n_vocab, _read_tensors(trained.folder / MODEL), eot_id=eot_id)
    row = trained.row
    return Portable(
        name=trained.name,
        model=model.to(device).eval(),
        tokenizer=to_hugging_face(cutter, science.shape.context_tokens),
        context_tokens=science.shape.context_tokens,
        n_vocab=science.n_vocab,
        eot_id=eot_id,
        device=device,
        run=trained.run.path,
        shards=trained.shards if trained.corpus is not None else None,
        n_params=trained.n_params,
        n_tokens=trained.checkpoint.tokens,
        flops=row.flops if row is not None else trained.flops,
        loss_nats=row.loss_nats if row is not None else None,
        tokenizer_hash=science.tokenizer_hash,
        facts=facts_of(trained),
    )


def facts_of(trained: "Trained") -> dict[str, Any]:
    """What the run's files say, as plain data: spec, row, machine, corpus."""
    record = trained.record
    return {
        "name": trained.name,
        "checkpoint": {key: getattr(trained.checkpoint, key) for key in ("update", "step", "tokens", "phase")},
        "weights_sha256": trained.checkpoint.sha256["model.safetensors"],
        "spec": codec.to_plain(trained.spec),
        "row": None if trained.row is None else codec.to_plain(trained.row),
        "unknown": {} if record is None else record.unknown,
        "machine": None if record is None else codec.to_plain(record.machine),
        "corpus": None if trained.corpus is None else codec.to_plain(trained.corpus),
        "data_id": trained.checkpoint.data_id,
    }


def _read_tensors(path: Path) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from None


def gpt2_of(
    shape: "ModelShape", n_vocab: int, weights: "dict[str, torch.Tensor]", *, eot_id: int | None
) -> "GPT2LMHeadModel":
    """Hugging Face's GPT-2 with our weights, less the rows of tokens that do not exist.

    Raises:
        CheckpointError: tensors are missing, or are not of this shape.
    """
    import torch
    from transformers import GenerationConfig, GPT2LMHeadModel

    from homelab_scaling.train.model import gpt2_config

    config = gpt2_config(shape, n_vocab)
    config.vocab_size, config.use_cache = n_vocab, True
    config.bos_token_id = config.eos_token_id = eot_id
    config.architectures = ["GPT2LMHeadModel"]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = GPT2LMHeadModel(config)
    cut = dict(weights)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name in cut:
            cut[name] = cut[name][:n_vocab].clone()
    if shape.tied and "transformer.wte.weight" in cut:
        cut["lm_head.weight"] = cut["transformer.wte.weight"]
    try:
        model.load_state_dict(cut)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the run's shape ({' '.join(str(error).split())[:200]})"
        ) from None
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=eot_id, eos_token_id=eot_id, pad_token_id=eot_id)
    return model


# --------------------------------------------------------------------------------------------------------- Hugging Face


def from_hugging_face(folder: Path, *, device: str = "cpu") -> Portable:
    """Anybody's model from its folder.

    Raises:
        UserError: it is none, parts of it are missing, or transformers cannot read it.
    """
    check_hugging_face(folder)
    name = folder.resolve().name
    model = load_weights(folder)
    tokenizer = load_tokenizer(folder)
    config: Any = model.config
    facts = read_facts(folder)
    row, eot_id = facts.get("row") or {}, tokenizer.eos_token_id
    return Portable(
        name=name,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        context_tokens=_context(config, tokenizer, folder),
        n_vocab=config.get_text_config().vocab_size,
        eot_id=eot_id if isinstance(eot_id, int) else None,
        device=device,
        n_params=model.num_parameters(),
        n_tokens=facts.get("checkpoint", {}).get("tokens"),
        flops=row.get("flops"),
        loss_nats=row.get("loss_nats"),
        tokenizer_hash=_hash_of(folder, facts),
        facts=facts or None,
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """What our export wrote beside the model; empty for others."""
    plain = codec.read_plain_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    return plain if isinstance(plain, dict) and cut_by(plain) is not None else {}


def cut_by(facts: dict[str, Any]) -> str | None:
    """The hash of the tokenizer that cut the training text; None where the facts are not ours."""
    try:
        return str(facts["spec"]["science"]["tokenizer_hash"])
    except (KeyError, TypeError):
        return None


def check_hugging_face(folder: Path, *, with_tokenizer: bool = True) -> None:
    """Refuses what is no Hugging Face folder, or half of one.

    Raises:
        UserError: which files are missing.
    """
    there = {path.name for path in folder.iterdir()}
    if not there & set(_OF_HUGGING_FACE) and not any(name.endswith((".safetensors", ".bin")) for name in there):
        raise UserError(
            f"{folder}: neither a run (no spec.json), nor a checkpoint, nor a Hugging Face model (no config.json); "
            "give LAB/LADDER/runs/RUN or an exported folder"
        )
    wanted = [("config.json", ("config.json",)), (_WEIGHTS[0], _WEIGHTS)]
    wanted += [(_TOKENIZERS[0], _TOKENIZERS)] if with_tokenizer else []
    missing = [what for what, names in wanted if not there & set(names)]
    if missing:
        raise UserError(f"{folder}: half a model, {' and '.join(missing)} missing; export or download it again")


def load_weights(folder: Path) -> "PreTrainedModel":
    """The model of a Hugging Face folder in fp32, every weight of it read and none made up.

    Raises:
        CheckpointError: transformers cannot read it, or weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # every library below has its own exceptions
        raise CheckpointError(f"{folder}: transformers cannot load this model ({_short(error)})") from None
    if lost := sorted(loading["missing_keys"]) + sorted(str(key[0]) for key in loading["mismatched_keys"]):
        raise CheckpointError(
            f"{folder}: weights are missing or of another shape ({', '.join(lost[:3])}{', ...' * (len(lost) > 3)}); "
            "export or download it again"
        )
    model.requires_grad_(False)
    found: PreTrainedModel = model
    return found


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a Hugging Face folder.

    Raises:
        DataError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as above
        raise DataError(f"{folder}: transformers cannot load this tokenizer ({_short(error)})") from None
    return tokenizer


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _context(config: Any, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> int:
    text = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    if tokenizer.model_max_length < 10**9:  # transformers writes 1e30 for "unknown"
        return int(tokenizer.model_max_length)
    raise UserError(
        f"{folder}: config.json does not say how long a context the model takes; add max_position_embeddings"
    )


def _hash_of(folder: Path, facts: dict[str, Any]) -> str | None:
    """Of the tokenizer, as our manifests have it."""
    from homelab_scaling.data.tokenizers import load_tokenizer as load_cutter

    if facts:
        return cut_by(facts)
    try:
        return load_cutter(str(folder / "tokenizer.json")).hash
    except DataError:
        return None
