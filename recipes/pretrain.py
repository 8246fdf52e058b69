"""Trains one run, or all runs of a rung: what `accelerate launch` starts.

    accelerate launch --num_processes 2 --multi_gpu recipes/pretrain.py --spec lab/NAME/runs/RUN_ID/spec.json
    accelerate launch recipes/pretrain.py --ladder recipes/ladders/quickstart.toml --rung 60k      (one GPU, or CPU)

Launch the same line again to resume. How the run ended is `status` in its record.json, because a launcher turns every
exit code into 1. Read homelab_scaling/train/loop.py for what happens inside.
"""

import os
import sys
import time

STARTED = time.monotonic()

from dataclasses import dataclass, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Literal  # noqa: E402

from homelab_scaling import cli, codec  # noqa: E402
from homelab_scaling.errors import HomelabError, RunFailed, Stopped, StoppedByWatchdog, UserError  # noqa: E402
from homelab_scaling.runs import RunFolder  # noqa: E402
from homelab_scaling.specs import RunSpec  # noqa: E402
from homelab_scaling.sweep.recipe import RECORD_TELLS  # noqa: E402
from homelab_scaling.train.oom_notes import NoRoom, OutOfMemory, keep_smaller  # noqa: E402

TOGETHER = (Stopped, StoppedByWatchdog, RunFailed)
"""Ends that every rank comes to after the same update."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Trains one run; everything but the science may be changed between launches of the same run."""

    spec: Path | None = None
    """spec.json of a run folder."""
    ladder: str | None = None
    """Ladder file (or the name of a shipped one), instead of --spec; its shards must have been built."""
    rung: str | None = None
    """With --ladder: which rung; all its seeds and horizons are trained one after the other."""
    lab: Path = Path("lab")
    """With --ladder: the folder that holds the labs."""
    processes: int | None = None
    """Ranks of this launch, when they differ from the plan's."""
    microbatch: int | None = None
    """Sequences per forward pass and rank."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to train."""
    compile: Literal["auto", "on", "off"] | None = None
    """torch.compile."""
    loss: Literal["auto", "chunked", "plain"] | None = None
    """Loss path."""
    recompute: Literal["on", "off"] | None = None
    """Activation checkpointing: blocks are computed again on the way back; less memory, a third more time."""
    sharding: Literal["none", "grad-op", "full"] | None = None
    """What FSDP splits over the ranks: nothing, gradients and optimizer states, or the weights too."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] | None = None
    """Where curves go, for example `--trackers tensorboard wandb`."""


def specs_of(args: Args) -> list[tuple[RunSpec, RunFolder]]:
    """The runs asked for and their folders; with --ladder, spec.json is written where it is missing."""
    if (args.spec is None) == (args.ladder is None):
        raise UserError("give either --spec FILE or --ladder FILE --rung NAME")
    if args.spec is not None:
        folder = RunFolder(args.spec.resolve().parent)
        return [(codec.read_json(args.spec, RunSpec), folder)]
    from homelab_scaling.sweep.prepare import prepare_rung

    if args.rung is None:
        raise UserError("--ladder wants --rung NAME too; `homelab plan LADDER` lists the names")
    return prepare_rung(str(args.ladder), args.rung, args.lab)


def with_overrides(spec: RunSpec, folder: RunFolder, args: Args) -> RunSpec:
    """The spec with this launch's execution settings; its science cannot change.

    A micro-batch that memory was too small for is not tried again unless it is asked for.
    """
    from homelab_scaling.train.sharded import of_launch

    given: dict[str, Any] = {
        "n_processes": args.processes,
        "microbatch_seqs_per_rank": args.microbatch,
        "device": args.device,
        "compile": args.compile,
        "loss": args.loss,
        "activation_checkpointing": None if args.recompute is None else args.recompute == "on",
        "sharding": args.sharding,
        "trackers": args.trackers,
    }
    changed = of_launch(os.environ) | {key: value for key, value in given.items() if value is not None}
    spec = replace(spec, execution=replace(spec.execution, **changed)) if changed else spec
    return spec if args.microbatch else keep_smaller(spec, folder)


def main(argv: list[str]) -> int:
    """Exit code of this rank; see errors.py."""
    try:
        args = cli.parse(Args, argv, "recipes/pretrain.py")
        train_all([(with_overrides(spec, folder, args), folder) for spec, folder in specs_of(args)])
    except HomelabError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        if isinstance(error, OutOfMemory | NoRoom) and n_ranks() > 1:
            sys.stderr.flush()
            os._exit(error.exit_code)  # not 0 and no farewell: the other ranks wait in a collective and must be ended
        told = RECORD_TELLS in os.environ and isinstance(error, TOGETHER)
        return 0 if told else error.exit_code
    return 0


def train_all(runs: list[tuple[RunSpec, RunFolder]]) -> None:
    """Trains runs one after the other, and leaves the process group in good order whatever happens."""
    from homelab_scaling.train.loop import train
    from homelab_scaling.train.session import leave_group

    together, alone = False, False
    try:
        started = STARTED
        for spec, folder in runs:
            train(spec, folder, started=started)
            started = time.monotonic()  # only the first run pays for the imports
        together = True
    except TOGETHER as error:
        alone = isinstance(error, OutOfMemory | NoRoom) and n_ranks() > 1
        together = not alone
        raise
    finally:
        if not alone:
            leave_group(together=together)


def n_ranks() -> int:
    """Ranks of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
