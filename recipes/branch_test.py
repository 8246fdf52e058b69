"""Trains one checkpoint on with several batches: the branch test that calibrates `homelab batch-size`.

    accelerate launch recipes/branch_test.py --plan lab/NAME/branch/plan.json

Launch the same line again to go on; finished branches are not repeated. Read homelab_scaling/batch/branching.py for
what happens inside.
"""

import sys
import time

STARTED = time.monotonic()

from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

from homelab_scaling import cli, codec  # noqa: E402
from homelab_scaling.batch.branch_plan import BranchPlan  # noqa: E402
from homelab_scaling.errors import HomelabError  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Args:
    """Trains the branches of a checkpoint, one after the other, in one process."""

    plan: Path
    """plan.json, as `homelab batch-size` and `homelab run` write it."""


def main(argv: list[str]) -> int:
    """Exit code; see errors.py."""
    from homelab_scaling.batch.branching import run_branches
    from homelab_scaling.train.session import leave_group

    try:
        args = cli.parse(Args, argv, "recipes/branch_test.py")
        run_branches(codec.read_json(args.plan, BranchPlan), started=STARTED)
    except HomelabError as error:
        print(f"branch_test: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        leave_group(together=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
