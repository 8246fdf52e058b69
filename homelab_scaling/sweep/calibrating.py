"""Calibrates an experiment's noise scales on its smallest rung: by branches of a checkpoint or a sweep of batches."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from homelab_scaling.batch.advice import base_batch, lr_scale
from homelab_scaling.batch.branch import run_branch
from homelab_scaling.batch.branch_fit import BranchResult
from homelab_scaling.batch.calibration import Calibration, calibrate, calibration_from_branch
from homelab_scaling.batch.measure import b_simple_at_middle, longest_run
from homelab_scaling.batch.trials import SweepResult
from homelab_scaling.batch.verify import SweepPlan, plan_sweep, run_sweep
from homelab_scaling.errors import DataError, RunFailed, SpecError
from homelab_scaling.plan import rules

if TYPE_CHECKING:
    from homelab_scaling.sweep.batches import Batches

Say = Callable[[str], None]


def calibrate_by_branch(batches: "Batches", say: Say) -> tuple[Calibration, BranchResult] | None:
    """c from branches of the smallest rung, where the ladder wants it and it is not known yet.

    None where there is nothing to do, or where it failed, which is said.

    Raises:
        Stopped, StoppedByWatchdog: it was asked to stop.
    """
    name = batches.smallest.rung.name
    plan = batches.branch_plan() if batches.is_known(name) else None
    if plan is None:
        return None
    batches.branched = True  # once a session: what it does not tell now it does not tell in a minute
    try:
        result = run_branch(plan, batches.lab.parent, say)
    except (DataError, RunFailed) as error:
        say(f"  ! the batches stay uncalibrated: {error}")
        return None
    say(result.words)
    here = b_simple_at_middle(batches.measured[name].points, round(2 * result.middle_tokens))
    found = calibration_from_branch(result, here, name)
    say(found.sentence)
    return found, result


def sweep_plan(batches: "Batches", b_crit_tokens: float) -> SweepPlan:
    """The sweep of batches on the smallest rung, laid about a belief."""
    setting, ladder = batches.smallest, batches.ladder
    written = next(r for r in ladder.rungs if r.name == setting.rung.name)
    n_body = setting.rung.size.params.n_body
    rule = rules.choose_lr(written, ladder.lr, n_body, setting.horizon_tokens).value
    return plan_sweep(
        setting,
        longest_run(batches.plan, setting.rung.name),
        batches.lab,
        batches.experiment.shards,
        b_crit_tokens=b_crit_tokens,
        lr_middle=lambda batch: rule * lr_scale(batch, base_batch(setting), max(batch, base_batch(setting))),
    )


def calibrate_by_sweep(batches: "Batches", say: Say) -> tuple[Calibration, SweepResult]:
    """c from a sweep of batches on the smallest rung, whose noise scale is measured.

    Raises:
        SpecError: it has no number.
        DataError, RunFailed, Stopped: as `run_sweep`.
    """
    name = batches.smallest.rung.name
    known = batches.measured[name]
    if known.b_simple is None:
        raise SpecError(
            f"rung {name}: its noise scale is not known ({known.why_no_number}), so a sweep has nothing to calibrate; "
            "measure longer with a larger --burn-in"
        )
    # Where training is short the noise scale is smaller than at the middle of the whole run.
    target = batches.smallest.rung.training.horizons[0].tokens // 2
    about = b_simple_at_middle(known.points, target) or known.b_simple
    plan = sweep_plan(batches, about.value)
    say(plan.words)
    sweep = run_sweep(plan, batches.lab.parent, say)
    here = b_simple_at_middle(known.points, sweep.target_tokens) or known.b_simple
    return calibrate(sweep.trade_off, here, name), sweep
