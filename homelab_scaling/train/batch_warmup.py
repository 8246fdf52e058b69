"""A batch that starts small: how a step of one full batch is cut into optimizer updates, and when they grow.

With k halvings a step is 2^k updates, each of 1 / 2^k of the step's sequences at the rate times sqrt(1 / 2^k). Whether
k falls is decided at the end of a window of `noise_windows.warmup_windows`, from gradients of micro-batches whose size
is a property of the batch, so that neither ranks nor memory nor the measuring cadence of the run move that moment (a
rank count that does not divide the parts, or a card too small for one, cuts finer: the same expectation, other chance).

Source: Merrill et al. 2025 (arXiv 2505.23971) double when the critical batch is twice the batch, the rate by sqrt.
"""

import math
from dataclasses import dataclass

from homelab_scaling.errors import SpecError
from homelab_scaling.specs import ExecutionSpec, ScienceSpec
from homelab_scaling.train.hooks import Line

MOST_PARTS = 4
"""Micro-batches that an update is cut into while the batch warms up: more cost speed and gain little."""


@dataclass(frozen=True, kw_only=True)
class StepSplit:
    """How one step is executed on each rank."""

    n_updates: int
    """Optimizer updates of a step; 1 outside a warm-up."""
    accumulation: int
    """Micro-batches of an update."""
    microbatch_seqs: int

    @property
    def lr_scale(self) -> float:
        """On the schedule's rate: the square root of the batch's share."""
        return math.sqrt(1 / self.n_updates)


def first_halvings(science: ScienceSpec) -> int:
    """How often the full batch is halved at the beginning; 0 without a warm-up."""
    warmup = science.batch_warmup
    return 0 if warmup is None else (science.batch_tokens_global // warmup.from_tokens).bit_length() - 1


def batch_tokens(science: ScienceSpec, halvings: int) -> int:
    """The batch of one optimizer update."""
    return science.batch_tokens_global >> halvings


def split_step(science: ScienceSpec, execution: ExecutionSpec, halvings: int) -> StepSplit:
    """Updates, accumulation and micro-batch at the present batch.

    Raises:
        SpecError: the small batch does not split over the ranks.
    """
    micro, ranks = execution.microbatch_seqs_per_rank, execution.n_processes
    if halvings == 0:
        return StepSplit(n_updates=1, accumulation=execution.accumulation_steps(science), microbatch_seqs=micro)
    seqs = science.batch_seqs_global >> halvings
    if seqs % ranks:
        raise SpecError(
            f"the batch warm-up's {seqs} sequences do not split over {ranks} ranks; launch with a divisor, or raise "
            "batch.warmup_from_tokens"
        )
    size = min(micro, seqs // _parts(seqs))
    size = next(m for m in range(size, 0, -1) if seqs // ranks % m == 0)
    return StepSplit(n_updates=1 << halvings, accumulation=seqs // ranks // size, microbatch_seqs=size)


def _parts(seqs: int) -> int:
    """Into how many parts a batch is cut to be compared: its largest divisor up to 4, or its smallest above 1."""
    divisors = [n for n in range(2, seqs + 1) if seqs % n == 0]
    return max((n for n in divisors if n <= MOST_PARTS), default=divisors[0])


def grows(line: Line, science: ScienceSpec, halvings: int) -> bool:
    """Whether a window's noise scale, or what it is at least, passes so many times the present batch.

    Args:
        line: of the window, as in metrics.jsonl.
    """
    if science.batch_warmup is None or halvings == 0:
        return False
    value, at_least = line["noise_scale_tokens"], line["noise_at_least_tokens"]
    found = at_least if value is None else value
    return found is not None and found >= science.batch_warmup.grow_at * batch_tokens(science, halvings)
