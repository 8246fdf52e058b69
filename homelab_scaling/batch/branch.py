"""Runs a branch test and says what it found: `run_branch`; what it runs is planned in branch_plan.py."""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np

from homelab_scaling import codec
from homelab_scaling.batch.branch_fit import TOLERANCE_NATS, BranchResult, Curve, Found, fit_branches
from homelab_scaling.batch.branch_plan import BranchPlan, BranchSpec
from homelab_scaling.batch.probe import work_folder
from homelab_scaling.errors import RunFailed, SpecError, StoppedByWatchdog
from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep.recipe import run_recipe

Say = Callable[[str], None]


def windows_path(folder: RunFolder) -> Path:
    """Per-window losses of a branch."""
    return folder.path / "windows.jsonl"


def bill_path(folder: RunFolder) -> Path:
    """Seconds and kWh of a branch or burn-in that came to its end."""
    return folder.path / "bill.json"


def plan_path(plan: BranchPlan) -> Path:
    return plan.folder / "plan.json"


def result_path(lab: Path) -> Path:
    """Where a lab's branch test lies."""
    return lab / "branch" / "result.json"


def is_done(plan: BranchPlan, branch: BranchSpec) -> bool:
    """Whether a branch came to its end, or diverged, which it would do again."""
    folder = plan.run_folder(branch)
    record = folder.read_record()
    return record is not None and record.status in ("finished", "diverged")


def finished_branch(plan: BranchPlan) -> BranchResult | None:
    """The result of this very test, if it is there."""
    path = result_path(Path(plan.lab))
    if not path.exists():
        return None
    try:
        found = codec.read_json(path, BranchResult)
    except SpecError:  # of an older version: run again
        return None
    return found if found.plan_hash == plan.hash else None


def prepare_branch(plan: BranchPlan) -> Path:
    """Writes plan.json and every spec.json; what another plan left is thrown away."""
    path = plan_path(plan)
    if path.exists():
        try:
            same = codec.read_json(path, BranchPlan).hash == plan.hash
        except SpecError:
            same = False
        if not same:
            shutil.rmtree(plan.folder)
    codec.write_json(plan.start_folder.spec, plan.start)
    for branch in plan.branches:
        codec.write_json(plan.run_folder(branch).spec, branch.spec)
    codec.write_json(path, plan)
    return path


def run_branch(plan: BranchPlan, labs: Path, say: Say, *, tolerance_nats: float = TOLERANCE_NATS) -> BranchResult:
    """Runs what is not on disk yet and fits the critical batch.

    Args:
        labs: the folder of labs, whose watchdog guards the cards.

    Raises:
        RunFailed: a branch did not end; the same call goes on.
        DataError: fewer than four branches came to their end.
        Stopped, StoppedByWatchdog: it was asked to, or had to.
    """
    found = finished_branch(plan)
    if found is not None and found.tolerance_nats == tolerance_nats:
        return found
    path = prepare_branch(plan)
    if not all(is_done(plan, branch) for branch in plan.branches):
        say(plan.words)
        code = run_recipe(
            "branch_test",
            ["--plan", str(path)],
            n_processes=1,
            box=plan.box,
            on_gpu=plan.box.on_gpu,
            lab=labs,
            watch=plan.start.watch,
            say=say,
        )
        unfinished = [branch for branch in plan.branches if not is_done(plan, branch)]
        if unfinished:
            record = plan.run_folder(unfinished[0]).read_record() or plan.start_folder.read_record()
            if record is not None and record.stopped_by == "watchdog":
                raise StoppedByWatchdog(f"the branch test was ended by the watchdog: {record.reason}")
            why = record.reason if record and record.reason else f"the launch ended with exit code {code}"
            raise RunFailed(f"{len(unfinished)} branches did not end ({why}); the same command goes on")
    result = summarise(plan, tolerance_nats)
    codec.write_json(result_path(Path(plan.lab)), result)
    for branch in plan.branches:
        shutil.rmtree(plan.run_folder(branch).checkpoints, ignore_errors=True)
    for start in (plan.start_folder, work_folder(Path(plan.lab), plan.rung)):
        shutil.rmtree(start.checkpoints, ignore_errors=True)
    return result


def summarise(plan: BranchPlan, tolerance_nats: float = TOLERANCE_NATS) -> BranchResult:
    """The result from the curves on disk."""
    fit = fit_branches([read_curve(plan, branch) for branch in plan.branches], tolerance_nats=tolerance_nats)
    bills = [
        codec.read_plain_json(path)
        for folder in (plan.start_folder, *map(plan.run_folder, plan.branches))
        if (path := bill_path(folder)).exists()
    ]
    kwh = [bill["kwh"] for bill in bills]
    return BranchResult(
        rung=plan.rung,
        plan_hash=plan.hash,
        base_tokens=plan.base_tokens,
        start_tokens=plan.start_tokens,
        delta_tokens=plan.delta_tokens,
        flops=plan.flops,
        seconds=sum(bill["seconds"] for bill in bills) if bills else None,
        kwh=sum(kwh) if bills and all(k is not None for k in kwh) else None,
        **{f.name: getattr(fit, f.name) for f in fields(Found)},
    )


def read_curve(plan: BranchPlan, branch: BranchSpec) -> Curve:
    """What a branch left on disk."""
    folder = plan.run_folder(branch)
    record = folder.read_record()
    lines = codec.read_jsonl(windows_path(folder))
    return Curve(
        run_id=branch.spec.run_id,
        batch_tokens=branch.spec.science.batch_tokens_global,
        lr=branch.spec.science.schedule.lr_peak,
        tokens=tuple(int(line["tokens"]) for line in lines),
        losses=np.array([line["losses"] for line in lines], dtype=np.float64),
        diverged=record is not None and record.status == "diverged",
    )
