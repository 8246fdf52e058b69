"""Times steps with and without DDP on this machine: what `homelab ddp` launches.

    accelerate launch --multi_gpu --num_processes 2 recipes/ddp_probe.py --job job.json

`homelab ddp LADDER` writes the job and reads the answer; homelab_scaling/bench/ddp_ranks.py says what happens inside.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from homelab_scaling import cli, codec
from homelab_scaling.bench.ddp_job import ProbeJob
from homelab_scaling.errors import HomelabError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measures what exchanging gradients costs."""

    job: Path
    """job.json, as `homelab ddp` writes it."""


def main(argv: list[str]) -> int:
    """Exit code of this rank; see errors.py."""
    try:
        job = codec.read_json(cli.parse(Args, argv, "recipes/ddp_probe.py").job, ProbeJob)
        measure(job)
    except HomelabError as error:
        print(f"ddp_probe: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(job: ProbeJob) -> None:
    """Measures, and leaves the process group in good order."""
    import torch

    from homelab_scaling.bench.ddp_ranks import probe
    from homelab_scaling.train.session import leave_group

    together = False
    try:
        answer = probe(job)
        if torch.distributed.get_rank() == 0:
            codec.write_json(Path(job.answer), answer, durable=False)
        together = True
    finally:
        leave_group(together=together)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
