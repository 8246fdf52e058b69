"""When what happens: the phases of a run and the learning rate, both pure functions of the spec.

A WSD run with horizons h1 < h2 is: trunk to p1, decay p1 -> h1 (a row), back to the state at p1, trunk to p2, decay
p2 -> h2 (a row). `update` counts optimizer updates through all of this, so one integer says where a run is; `step`
counts them along the path that leads to the current weights, so tokens = step * batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from homelab_scaling.errors import SpecError
from homelab_scaling.specs import Schedule, ScienceSpec


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of updates under one learning-rate rule."""

    index: int
    kind: Literal["trunk", "decay", "cosine"]
    first_update: int
    """Global number of its first update."""
    start_step: int
    """Step (along the path) before its first update."""
    end_step: int
    horizon_tokens: int
    """The row it leads to; for a trunk, the next one."""

    @property
    def n_updates(self) -> int:
        return self.end_step - self.start_step

    @property
    def end_update(self) -> int:
        """Global number of updates done when it is complete."""
        return self.first_update + self.n_updates

    @property
    def earns_row(self) -> bool:
        return self.kind != "trunk"

    @property
    def key(self) -> str:
        """Unique within the run, for the clock."""
        return f"{self.index}:{self.name}"

    @property
    def name(self) -> str:
        """As metrics.jsonl calls it."""
        return f"decay@{self.horizon_tokens}" if self.kind == "decay" else "trunk"


def phases(science: ScienceSpec) -> tuple[Phase, ...]:
    """Every phase of a run, in order.

    Raises:
        SpecError: a decay would begin before the warm-up ends.
    """
    batch = science.batch_tokens_global
    plan: list[Phase] = []
    update = step = 0

    def add(kind: Literal["trunk", "decay", "cosine"], start: int, end: int, horizon: int) -> None:
        nonlocal update
        phase = Phase(
            index=len(plan), kind=kind, first_update=update, start_step=start, end_step=end, horizon_tokens=horizon
        )
        plan.append(phase)
        update = phase.end_update

    if science.schedule.name == "cosine":
        (horizon,) = science.horizons_tokens
        add("cosine", 0, horizon // batch, horizon)
        return tuple(plan)
    for horizon in science.horizons_tokens:
        fork = decay_start_step(science, horizon)
        if fork * batch < science.schedule.warmup_tokens:
            raise SpecError(
                f"the decay to {horizon} tokens would begin before the warm-up of {science.schedule.warmup_tokens} "
                "tokens ends; shorten the warm-up or the decay"
            )
        if fork > step:
            add("trunk", step, fork, horizon)
            step = fork
        add("decay", step, horizon // batch, horizon)
    return tuple(plan)


def decay_start_step(science: ScienceSpec, horizon_tokens: int) -> int:
    """The step at which the decay to `horizon_tokens` begins; at least one step is decayed."""
    steps = horizon_tokens // science.batch_tokens_global
    return steps - max(1, round(science.schedule.decay_frac * steps))


def validation_steps(science: ScienceSpec, phase: Phase, every_tokens: int | None) -> frozenset[int]:
    """Where the curve set is measured in a phase; the end of a decay is left to the full set."""
    if every_tokens is None:
        return frozenset()
    every = max(1, every_tokens // science.batch_tokens_global)
    steps = set(range(every, phase.end_step + 1, every)) - ({phase.end_step} if phase.earns_row else set())
    return frozenset(s for s in steps if s > phase.start_step)


def lr_at(science: ScienceSpec, phase: Phase, step: int) -> float:
    """Learning rate of the update that takes the model from `step` to `step + 1`.

    A pure function of tokens seen, taken at the middle of the step's batch, so that neither the first nor the last
    update has rate zero.
    """
    schedule, batch = science.schedule, science.batch_tokens_global
    tokens = (step + 0.5) * batch
    if tokens < schedule.warmup_tokens:
        return schedule.lr_peak * tokens / schedule.warmup_tokens
    if phase.kind == "trunk":
        return schedule.lr_peak
    start = schedule.warmup_tokens if phase.kind == "cosine" else phase.start_step * batch
    return schedule.lr_peak * _falling(schedule, (tokens - start) / (phase.horizon_tokens - start))


def _falling(schedule: Schedule, progress: float) -> float:
    """Share of the peak left after `progress` of the decay: half a cosine, or 1 - sqrt for WSD.

    Source: 1 - sqrt from Haegele et al. 2024 (arXiv 2405.18392), which found it the best cooldown shape.
    """
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.name == "cosine" else 1 - math.sqrt(progress)
    return schedule.lr_final_frac + (1 - schedule.lr_final_frac) * shape
