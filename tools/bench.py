"""Side-by-side timings: ours and a peer's, in one run on this machine.

A subject is a module of `homelab_scaling.bench` with `run(*, n_rounds, say)`, which returns a frozen dataclass that has
`summary() -> str`; the modules called `<subject>_...` are its parts. Nothing else is registered.
"""

import importlib
import pkgutil
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any

import tyro

from homelab_scaling import bench, cli
from homelab_scaling.bench.train import TrainOptions
from homelab_scaling.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Times one part of the project beside what others offer for it."""

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")]
    """What to time: `data` (text to tokens, tokens to batches), `train` (a training step), `fit` or `coverage`."""
    rounds: int = 5
    """Every contestant runs once a round; ratios are taken within rounds."""
    json: bool = False
    """Print every number as JSON."""
    train: Annotated[TrainOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=TrainOptions)


def main(args: Args) -> int:
    from homelab_scaling import codec

    known = sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if "_" not in module.name)
    if args.subject not in known:
        close = get_close_matches(args.subject, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"no bench {args.subject!r}; {hint}")
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: wants 1 or more")
    options: dict[str, Any] = {}
    if args.subject == "train":
        options = {"options": args.train}
    elif args.train != TrainOptions():
        raise UserError(f"bench {args.subject} takes no options but --rounds and --json; shapes and such are for train")
    module: Any = importlib.import_module(f"{bench.__name__}.{args.subject}")
    result = module.run(n_rounds=args.rounds, say=lambda line: print(line, file=sys.stderr, flush=True), **options)
    print(codec.dumps(result) if args.json else result.summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.main(["bench", *sys.argv[1:]]))
