"""Where a ladder's runs are trained: on this box, or on a Ray cluster (`ray_engine`)."""

from collections.abc import Callable
from typing import Protocol

from homelab_scaling.plan.parts import Plan
from homelab_scaling.sweep import local
from homelab_scaling.sweep.limits import Limits
from homelab_scaling.sweep.local import Outcome, Run
from homelab_scaling.sweep.prepare import Experiment


class Engine(Protocol):
    """Trains runs whose specs are written."""

    experiment: Experiment
    """With the box that the plan is made for."""

    def refuse_early(self, plan: Plan) -> None:
        """What it could not do with this plan, before shards are built and batches are measured.

        Raises:
            SpecError: one of its runs, limits or measurements is impossible there.
        """

    def run_all(self, runs: list[Run]) -> Outcome:
        """Trains everything that is not finished."""


class ThisBox:
    """The machine that the command was given on.

    Args:
        n_cpu_slots: without a GPU, how many runs share the CPU.
    """

    def __init__(self, experiment: Experiment, limits: Limits, n_cpu_slots: int, say: Callable[[str], None]) -> None:
        self.experiment, self.limits, self.n_cpu_slots, self.say = experiment, limits, n_cpu_slots, say

    def refuse_early(self, plan: Plan) -> None:
        local.refuse_early(plan, self.experiment.ladder, self.limits, self.n_cpu_slots)

    def run_all(self, runs: list[Run]) -> Outcome:
        return local.run_all(
            runs,
            self.experiment.box,
            self.say,
            train=self.experiment.ladder.train,
            limits=self.limits,
            n_cpu_slots=self.n_cpu_slots,
        )
