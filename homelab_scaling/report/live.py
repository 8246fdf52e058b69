"""The live check of a lab: are the runs that have not finished on the law of those that have."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from homelab_scaling.errors import HomelabError, SpecError
from homelab_scaling.fit.catalogue import joint_fit, open_fit
from homelab_scaling.fit.onlaw import JointLaw, LawCheck, TrunkCurve, check_curve, check_decayed
from homelab_scaling.fit.result import FitReport
from homelab_scaling.plan.counting import count_params
from homelab_scaling.report.collect import LabView, RunView, collect


def check_lab(lab: Path, *, runs: Sequence[str] = (), against: str | None = None) -> list[LawCheck]:
    """A check of each run named, or of each that has not finished.

    Args:
        lab: LAB/<ladder>.
        runs: run ids, or beginnings of them such as a rung's name.
        against: a lab, a fit or a published law; the lab's own fit when not given.

    Raises:
        SpecError: no fit of N and D to check against, or no run of that name.
    """
    view = collect(lab)
    if against is None and view.fit is None:
        raise SpecError(
            f"{lab}: no fit to check against; run `homelab fit {lab}`, or name another lab's fit or a published law "
            "with --against"
        )
    report = open_fit(against) if against is not None else view.fit
    assert report is not None
    chosen = [run for run in view.runs if run.status != "finished"]
    if runs:
        chosen = [run for run in view.runs if any(run.run_id.startswith(name) for name in runs)]
        for name in runs:
            if not any(run.run_id.startswith(name) for run in chosen):
                known = ", ".join(run.run_id for run in view.runs) or "no run at all"
                raise SpecError(f"{lab}: no run called {name}; it has {known}")
    return check_runs(view, report, chosen)


def check_view(view: LabView) -> list[LawCheck]:
    """The same for a report: nothing where there is no law to check against."""
    waiting = [run for run in view.runs if run.status != "finished"]
    if view.fit is None or not waiting:
        return []
    try:
        return check_runs(view, view.fit, waiting)
    except HomelabError:
        return []


def check_runs(view: LabView, report: FitReport, chosen: Sequence[RunView]) -> list[LawCheck]:
    """Each run by its trunk where finished trunks show what to expect, else by its decayed rows."""
    fit, law, draws = joint_fit(report)
    joint = JointLaw(fit=fit, law=law, draws=draws)
    curves = {run.run_id: _trunk(run, report.count) for run in view.runs}
    finished = [curves[run.run_id] for run in view.runs if run.status == "finished"]
    fitted = {point.row_id for point in report.points}
    found = []
    for run in chosen:
        warmup = run.spec.science.schedule.warmup_tokens
        check = check_curve(curves[run.run_id], joint, finished, warmup_tokens=warmup)
        if check.verdict == "cannot be judged" and run.rows:
            check = check_decayed(
                run.run_id,
                _counted(run, report.count),
                [row.n_tokens for row in run.rows],
                [row.loss_nats for row in run.rows],
                joint,
                in_fit=any(row.row_id in fitted for row in run.rows),
            )
        found.append(check)
    return found


def _trunk(run: RunView, count: str) -> TrunkCurve:
    trunk = [curve for curve in run.validation if not curve.is_decay]
    tokens = np.array([t for curve in trunk for t in curve.tokens], dtype=np.float64)
    losses = np.array([x for curve in trunk for x in curve.losses], dtype=np.float64)
    science = run.spec.science
    return TrunkCurve(
        run_id=run.run_id,
        n_params=_counted(run, count),
        tokens=tokens,
        losses=losses,
        horizon_tokens=science.horizons_tokens[-1] if science.schedule.name == "cosine" else None,
    )


def _counted(run: RunView, count: str) -> float:
    counts = count_params(run.spec.science.shape, run.spec.science.n_vocab)
    known = {"total": counts.n_params, "body": counts.n_body, "body+head": counts.n_body + counts.n_head}
    return float(known.get(count, counts.n_params))
