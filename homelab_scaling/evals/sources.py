"""Which models are meant by the folders on the command line, where their scores go, and what energy costs them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling.errors import HomelabError, SpecError, UserError
from homelab_scaling.evals.store import EVALS, About
from homelab_scaling.export.convert import Portable
from homelab_scaling.runs import RunFolder, read_records
from homelab_scaling.specs import Money
from homelab_scaling.watch import link

SAMPLED_VALUES = 1024
"""Of each tensor, for the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to ask."""

    source: Path
    at: int | str | None
    evals: Path
    """Folder of evaluations; the model gets one inside it."""
    labs: Path
    """The folder that holds the labs, where the machine's watchdog keeps its files."""
    money: Money


def targets(
    sources: Sequence[Path], *, at: int | str | None = None, all_rows: bool = False, out: Path | None = None
) -> list[Target]:
    """The models behind runs, checkpoints, labs and Hugging Face folders.

    A lab is every finished run's largest row; with `all_rows`, a run or a lab is every row there is.

    Raises:
        UserError: nothing that can be asked is there.
    """
    found: list[Target] = []
    for source in sources:
        found += _of(source.expanduser(), at, all_rows, out)
    return list(dict.fromkeys(found))


def _of(source: Path, at: int | str | None, all_rows: bool, out: Path | None) -> list[Target]:
    from homelab_scaling.export.trained import is_run

    if (source / "runs").is_dir():
        if at is not None:
            raise UserError(f"--at {at}: chooses a row of one run, {source} is a lab; name the run, or leave --at out")
        return _of_lab(source, all_rows, out)
    if not is_run(source):
        if all_rows:
            raise UserError(f"--all-rows: {source} is neither a run nor a lab, it has no rows to choose from")
        return [Target(source=source, at=at, evals=out or Path(EVALS), labs=Path("lab"), money=Money())]
    run = RunFolder(source if (source / "spec.json").is_file() else source.absolute().parent.parent)
    if not all_rows:
        return [_of_run(run, source, at, out)]
    if at is not None or run.path != source:
        raise UserError(f"{source}: --all-rows wants a run's folder, and no --at")
    record = run.read_record()
    if record is None or not record.rows:
        raise UserError(f"{source}: this run has finished no row yet; train it first, or name a checkpoint inside it")
    return [_of_run(run, source, row.n_tokens, out) for row in record.rows]


def _of_lab(lab: Path, all_rows: bool, out: Path | None) -> list[Target]:
    found = []
    for record in sorted(read_records(lab)[0], key=lambda one: [row.flops for row in one.rows]):
        run = RunFolder(lab / "runs" / record.run_id)
        if record.status == "finished" and record.rows and run.spec.is_file():
            rows = record.rows if all_rows else (max(record.rows, key=lambda row: row.n_tokens),)
            found += [_of_run(run, run.path, row.n_tokens, out) for row in rows]
    if not found:
        raise UserError(f"{lab}: no run of this lab has finished; train it with `homelab run`")
    return found


def _of_run(run: RunFolder, source: Path, at: int | str | None, out: Path | None) -> Target:
    try:
        money = run.read_spec().money
    except HomelabError as error:
        raise SpecError(f"{source}: {error}") from None
    path = run.path.absolute()
    return Target(source=source, at=at, evals=out or path.parents[1] / EVALS, labs=link.lab_of(run), money=money)


def priced(
    money: Money, *, watts: float | None = None, usd_per_kwh: float | None = None, usd_per_hour: float | None = None
) -> Money:
    """[money] with what was given on the command line."""
    given = {"watts": watts, "usd_per_kwh": usd_per_kwh, "usd_per_machine_hour": usd_per_hour}
    return replace(money, **{key: value for key, value in given.items() if value is not None})


def about(model: Portable, source: Path) -> About:
    """What model.json says of an opened model."""
    corpus = (model.facts or {}).get("data_id")
    return About(
        name=model.name,
        source=str((model.run if model.run is not None else source).resolve()),
        weights=fingerprint(model),
        tokenizer=model.tokenizer_hash[:12] if model.tokenizer_hash is not None else type(model.tokenizer).__name__,
        context_tokens=model.context_tokens,
        n_vocab=model.n_vocab,
        is_ours=model.run is not None,
        device=_device_name(model.device),
        dtype=str(model.model.dtype).removeprefix("torch."),
        n_params=model.n_params,
        n_tokens=model.n_tokens,
        flops=model.flops,
        loss_nats=model.loss_nats,
        data_id=corpus if isinstance(corpus, str) else None,
    )


def fingerprint(model: Portable) -> str:
    """Hash of some values of every tensor: other weights, another name; the same on every device."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // SAMPLED_VALUES)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else "cpu"
