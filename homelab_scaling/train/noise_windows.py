"""Which steps of a run are measured for its noise scale, and where windows end: pure functions of the spec.

A window is a stretch of one phase whose measuring steps give one number. In an ordinary run every n-th step measures;
windows begin with 8 measuring steps, each has twice as many as the one before, until it is a twentieth of the run.
While the batch warms up, whose growth the windows decide, every step of a window measures, and windows of 8 steps
follow one another as long as that is a tenth of the way so far, then farther apart.
"""

import math
from dataclasses import dataclass

from homelab_scaling.plan.noise import MIN_MEASUREMENTS, N_WINDOWS
from homelab_scaling.specs import ScienceSpec
from homelab_scaling.train.schedule import Phase

WARMUP_WINDOW_STEPS = 8
WARMUP_REACTION_FRAC = 0.1
"""A growing noise scale is noticed within this share of the steps so far."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of steps that gives one measurement."""

    first_step: int
    end_step: int
    every: int = 1

    @property
    def steps(self) -> range:
        """Its measuring steps."""
        return range(self.first_step, self.end_step, self.every)

    @property
    def middle_step(self) -> float:
        """Its middle in log tokens."""
        return math.sqrt(self.first_step * self.end_step)


def run_windows(science: ScienceSpec, phase: Phase, every: int | None) -> tuple[Window, ...]:
    """Windows of a phase at full batch; none where it is too short for 8 measuring steps.

    Args:
        every: of the phase's steps, one in so many measures; None measures nothing.
    """
    if every is None:
        return ()
    n_steps = science.horizons_tokens[-1] // science.batch_tokens_global
    most = max(MIN_MEASUREMENTS, math.ceil(n_steps / N_WINDOWS / every))
    wanted = MIN_MEASUREMENTS if phase.start_step == 0 else most
    windows: list[Window] = []
    begin = phase.start_step
    while (left := (phase.end_step - begin) // every) >= MIN_MEASUREMENTS:
        n = left if left - wanted < MIN_MEASUREMENTS else wanted
        windows.append(Window(first_step=begin, end_step=begin + n * every, every=every))
        begin, wanted = begin + n * every, min(2 * wanted, most)
    return tuple(windows)


def warmup_windows(phase: Phase) -> tuple[Window, ...]:
    """Windows of a phase while the batch warms up; they depend on nothing but the step."""
    windows: list[Window] = []
    begin = 0
    while (end := begin + WARMUP_WINDOW_STEPS) <= phase.end_step:
        if begin >= phase.start_step:
            windows.append(Window(first_step=begin, end_step=end))
        begin = max(end, math.ceil(begin * (1 + WARMUP_REACTION_FRAC)))
    return tuple(windows)
