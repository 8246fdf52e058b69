"""The batch that a run trains with at this moment, from its spec and its events."""

from collections.abc import Sequence
from typing import Any

from homelab_scaling.specs import RunSpec
from homelab_scaling.train.schedule import Phase
from homelab_scaling.watch.frame import BatchNow, CriticalBatch, NoiseNow


def batch_now(
    spec: RunSpec,
    events: Sequence[dict[str, Any]],
    *,
    plan: Sequence[Phase],
    phase: Phase | None,
    noise: NoiseNow | None,
    critical: CriticalBatch | None,
) -> BatchNow:
    """The present batch: of a warm-up, the one that the last doubling on the path to the present weights left.

    Args:
        phase: the one it is in; None after its end.
    """
    full = now = spec.science.batch_tokens_global
    n_steps = 1
    if (warmup := spec.science.batch_warmup) is not None:
        now = first = warmup.from_tokens
        n_steps = (full // first).bit_length()
        sizes = [event.get("batch_tokens") for event in _doublings(events, plan, phase)]
        now = next((size for size in reversed(sizes) if isinstance(size, int) and first <= size <= full), first)
    step = n_steps + 1 - (full // now).bit_length()
    return BatchNow(tokens=now, full_tokens=full, step=step, n_steps=n_steps, noise=noise, critical=critical)


def _doublings(
    events: Sequence[dict[str, Any]], plan: Sequence[Phase], phase: Phase | None
) -> Sequence[dict[str, Any]]:
    """Without those of a decay that was left behind."""
    doublings = [event for event in events if event.get("kind") == "batch"]
    if phase is None:
        return doublings
    kept = []
    for event in doublings:
        update, step = event.get("update"), event.get("step")
        if not isinstance(update, int) or not isinstance(step, int):
            continue
        own = next((p for p in plan if p.first_update < update <= p.end_update), None)
        if own is phase or (own is not None and own.kind == "trunk" and step <= phase.start_step):
            kept.append(event)
    return kept
