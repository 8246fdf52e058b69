"""When memory runs out: half the micro-batch, twice the accumulation, the same global batch.

Batches are slices of a global sequence and gradients are means, so the result is the same up to rounding. One process
goes on in place. Of several, the one that ran out cannot reach the others, which wait inside a collective: it leaves a
note (oom_notes), ends, and so ends them; all are launched again from the last checkpoint.
"""

import gc
from collections.abc import Callable

import torch

from homelab_scaling.train.evaluate import Evaluator, Validation
from homelab_scaling.train.model import LanguageModel

SAYINGS = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")


def complaint(error: RuntimeError) -> str | None:
    """The error's first line if it says that the device or the host ran out of memory, else None."""
    said = str(error).split("\n")[0]
    ran_out = isinstance(error, torch.cuda.OutOfMemoryError) or any(word in said.lower() for word in SAYINGS)
    return said if ran_out else None


def free_caches() -> None:
    """Gives back what the failed attempt held; its error and its frames must be gone by now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(evaluator: Evaluator, model: LanguageModel, event: Callable[..., None]) -> Validation:
    """A validation, in smaller batches if it must be; other ranks only wait for its sums."""
    while True:
        try:
            return evaluator.measure(model)
        except RuntimeError as error:
            said = complaint(error)
            if said is None or evaluator.batch_seqs == 1 or model.sharded:  # under FSDP ranks go through it in step
                raise
        model.train()
        evaluator.batch_seqs //= 2
        event("oom in validation", batch_seqs=evaluator.batch_seqs, said=said)
        free_caches()
