"""Writes a Hugging Face folder from a checkpoint, after proving that it is the same model.

    OUT/{config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json, README.md,
         homelab.json}

All of it is made in a hidden folder beside OUT and becomes OUT by one rename at the end, so OUT is whole or absent.
Before that the folder is loaded again as a stranger would load it, and has to give the loss that our own model gives.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, SpecError, UserError
from homelab_scaling.export.card import write_card
from homelab_scaling.export.check import Check, Sample, check_folder
from homelab_scaling.export.convert import FACTS, Portable, from_trained, pick_device
from homelab_scaling.export.hf_tokenizer import quiet_transformers
from homelab_scaling.export.law import Law, read_law
from homelab_scaling.export.trained import At, Trained, find_trained, is_run, public_source, refuse_lab, tokenizer_of
from homelab_scaling.runs import flock

Dtype = Literal["fp32", "bf16"]
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `homelab export` made."""

    folder: str
    name: str
    dtype: Dtype
    n_params: int
    n_tokens: int
    n_bytes: int
    """Of all files."""
    check: Check
    samples: tuple[Sample, ...]


def export_model(
    source: Path,
    out: Path,
    *,
    at: At = None,
    dtype: Dtype = "fp32",
    tokenizer: Path | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda _: None,
) -> Exported:
    """The Hugging Face folder `out` of a trained checkpoint, proven to be the same model.

    Args:
        source: a run's folder or one of its checkpoints.
        out: the folder to make; an export of the same checkpoint that is there already is replaced.
        at: as of `open_model`.
        dtype: of the weights in the file.
        tokenizer: a tokenizer.json, for runs on shards that came without one.
        device: where the check computes.
        tell: hears what is being done, in a line.

    Raises:
        UserError: there is nothing to export, `out` holds something else, or the folder does not give the same loss.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser().absolute()
    where = pick_device(device)
    trained = _find(source, at)
    _refuse_other(out, trained)
    cutter, portable = tokenizer_of(trained, tokenizer), from_trained(trained, tokenizer=tokenizer)
    law = read_law(trained)
    with _building(out) as folder:
        _write_model(portable, folder, dtype)
        tell(f"{portable.name}: written; loading it again as anybody would, to compare losses on {where}")
        check, samples = check_folder(folder, trained, cutter, dtype=dtype, device=where)
        _write_words(portable, trained, folder, dtype=dtype, check=check, samples=samples, law=law)
        _publish(folder, out)
    return Exported(
        folder=str(out),
        name=portable.name,
        dtype=dtype,
        n_params=trained.n_params,
        n_tokens=trained.checkpoint.tokens,
        n_bytes=sum(path.stat().st_size for path in out.iterdir()),
        check=check,
        samples=samples,
    )


def _find(source: Path, at: At) -> Trained:
    if is_run(source):
        return find_trained(source, at)
    refuse_lab(source)
    if (source / "config.json").is_file():
        raise SpecError(f"{source}: a Hugging Face folder already; copy it, or name the run that it came from")
    raise SpecError(f"{source}: no run there (no spec.json); give LAB/LADDER/runs/RUN or a folder of its checkpoints")


# --------------------------------------------------------------------------------------------------- the folder's files


def _write_model(portable: Portable, folder: Path, dtype: Dtype) -> None:
    """Weights, configuration and tokenizer, in the form that transformers, vLLM and lm-eval load."""
    import torch

    model: Any = portable.model
    with quiet_transformers():
        model.to(getattr(torch, TORCH_NAMES[dtype])).save_pretrained(str(folder), max_shard_size="5GB")
        portable.tokenizer.save_pretrained(str(folder))
    # Names that transformers 4 knows too; 5 writes its own.
    _edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None)
    for path in folder.iterdir():  # safetensors writes what only the owner may read
        path.chmod((folder / "config.json").stat().st_mode)


def _edit(path: Path, **changes: str | None) -> None:
    """Sets keys of a JSON file; None takes one out."""
    plain = codec.read_plain_json(path) | changes
    text = json.dumps({key: value for key, value in plain.items() if value is not None}, indent=2, ensure_ascii=False)
    codec.write_text(path, text + "\n")


def _write_words(
    portable: Portable,
    trained: Trained,
    folder: Path,
    *,
    dtype: Dtype,
    check: Check,
    samples: tuple[Sample, ...],
    law: Law | str,
) -> None:
    facts = public_facts(portable.facts or {})
    made = {"dtype": dtype, "check": codec.to_plain(check), "samples": [codec.to_plain(one) for one in samples]}
    codec.write_json(folder / FACTS, facts | {"export": made})
    codec.write_text(folder / CARD, write_card(trained, dtype=dtype, check=check, samples=samples, law=law))


def public_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without the paths of the machine they come from."""
    spec = {key: value for key, value in facts["spec"].items() if key != "shards"}
    execution = spec["execution"]
    spec["execution"] = execution | {"start_from": public_source(execution["start_from"] or "") or None}
    corpus = facts["corpus"]
    if corpus is not None:
        sources = [public_source(one) for one in corpus["sources"]]
        mixture = [share | {"name": public_source(share["name"])} for share in corpus["mixture"]]
        corpus = corpus | {"sources": sources, "mixture": mixture, "tokenizer": public_source(corpus["tokenizer"])}
    return facts | {"spec": spec, "corpus": corpus}


# ------------------------------------------------------------------------------------------------------ whole or absent


def _refuse_other(out: Path, trained: Trained) -> None:
    """SpecError where OUT holds anything but an export of this very checkpoint."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise SpecError(f"{out}: is there already and is no folder; choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        found = codec.read_plain_json(out / FACTS)
    except UserError:
        raise SpecError(f"{out}: not empty, and no export of ours; choose another --out") from None
    if found.get("weights_sha256") != trained.checkpoint.sha256["model.safetensors"]:
        raise SpecError(
            f"{out}: holds the export of another model ({found.get('name', 'without a name')}); choose another --out"
        )


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """An empty hidden folder beside `out`, ours alone; nothing of it stays but what was renamed to `out`.

    Raises:
        MachineError: another process exports there, or the disk refused.
        CheckpointError, DataError: what is being built is not right.
    """
    new_parents = [parent for parent in out.parents if not parent.exists()]
    room = out.parent / f".{out.name}.exporting"
    try:
        with flock(room / ".lock", f"{out}: another process is exporting there; wait for it, then run again"):
            try:
                shutil.rmtree(room / "folder", ignore_errors=True)  # of an export that was killed
                (room / "folder").mkdir()
                yield room / "folder"
            finally:
                shutil.rmtree(room, ignore_errors=True)
                if not out.exists():
                    for parent in new_parents:
                        with suppress(OSError):
                            parent.rmdir()
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise MachineError(
            f"{out}: the export could not be written ({why}); free space or choose another --out"
        ) from error


def _publish(folder: Path, out: Path) -> None:
    """Makes the folder visible under its name, in place of an older export of the same."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    codec.sync_folder(folder)
    if out.exists():
        os.replace(out, folder.with_name("older"))  # goes with the hidden folder
    os.replace(folder, out)
    codec.sync_folder(out.parent)
