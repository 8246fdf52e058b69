"""Makes a Hugging Face folder of a trained model, with a card from its record, and proves that it is the same model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec

if TYPE_CHECKING:
    from homelab_scaling.export.write import Exported


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to export, and where to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder (LAB/LADDER/runs/RUN), or one of its checkpoint folders."""
    out: Path
    """The folder to make; an older export of the same checkpoint there is replaced, anything else refused."""
    at: str | None = None
    """Which checkpoint: the tokens of a row, or the name of a state between rows (u00000123); the largest finished row
    when not given."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights in the file. bf16 halves it and changes the loss a little; the card says by how much."""
    tokenizer: Path | None = None
    """A tokenizer.json, for a run on token files that came without one."""
    device: str = "auto"
    """Where the check computes: auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print what was made as one JSON document."""


def main(args: Args) -> int:
    from homelab_scaling.export.write import export_model

    made = export_model(
        args.run,
        args.out,
        at=args.at,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        device=args.device,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if args.json:
        print(codec.dumps(made))
    else:
        _print(made)
    return 0


def _print(made: "Exported") -> None:
    check = made.check
    print(made.folder)
    size = f"{made.n_params:,} parameters, {made.dtype}, {made.n_bytes / 1e6:,.1f} MB"
    print(f"{made.name}: {size}, trained on {made.n_tokens:,} tokens")
    print(
        f"loaded again by transformers: {check.loss_nats:.6f} nats on {check.on} ({check.n_tokens:,} tokens); trained "
        f"model with the same weights: {check.loss_own_nats:.6f}"
    )
    if made.dtype != "fp32":
        print(f"{made.dtype} changes the loss by {check.loss_nats - check.loss_fp32_nats:+.2g} nats")
    for sample in made.samples:
        print(f"\n{sample.how}:\n{sample.prompt}⟪{sample.text}⟫")


if __name__ == "__main__":
    raise SystemExit(cli.main(["export", *sys.argv[1:]]))
