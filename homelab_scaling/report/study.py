"""What a report works out from a lab's fit, once, for its text and for its figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from homelab_scaling.errors import HomelabError
from homelab_scaling.fit import diagnose, underdetermined
from homelab_scaling.fit.card import FitCard, Training, fit_card
from homelab_scaling.fit.catalogue import joint_fit, must_be_as_trained
from homelab_scaling.fit.fit import fit_law
from homelab_scaling.fit.laws import CHINCHILLA, get_law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.onlaw import JointLaw, LawCheck, TrunkCurve, check_curve, check_decayed
from homelab_scaling.fit.points import apply_compute, apply_count
from homelab_scaling.fit.predict import compute_of, count_of
from homelab_scaling.fit.reconcile import N_DRAWS, Reconciliation, on_the_way, reconcile
from homelab_scaling.fit.resample import FEW_RUNS
from homelab_scaling.fit.result import FitReport, HoldOut, ScalingFit
from homelab_scaling.fit.slices import MIN_LEVELS, Slice, Table, levels, tabulate
from homelab_scaling.fit.solve import solve
from homelab_scaling.fit.underdetermined import Profile
from homelab_scaling.plan.counting import count_params
from homelab_scaling.runs import LossPoint, to_point

if TYPE_CHECKING:
    from homelab_scaling.report.collect import LabView, RunView

N_STARTS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """A law fitted to the sizes up to `largest`, and what it says of the rows above."""

    largest: float
    n_params: Array
    measured: Array
    predicted: Array


class Study:
    """Everything derived from one lab's view; each part is worked out when first asked for."""

    def __init__(self, view: "LabView") -> None:
        self.view = view

    @cached_property
    def joint(self) -> JointLaw | None:
        """The law of N and D that hold-out chose, else the free one; None where none was fitted."""
        if self.view.fit is None:
            return None
        try:
            fit, law, draws = joint_fit(self.view.fit)
        except HomelabError:
            return None
        return JointLaw(fit=fit, law=law, draws=draws)

    @cached_property
    def table(self) -> Table | None:
        """The fitted rows as columns, N, C and D counted as the fit's laws of N and D count them."""
        report = self.view.fit
        if report is None or not report.points:
            return None
        try:
            return tabulate(apply_count(apply_compute(tuple(report.points), compute_of(report)), count_of(report)))
        except HomelabError:
            return None

    @cached_property
    def left_open(self) -> Profile | None:
        """How well L(N, D) can have each value of its exponents, where the rows are too few to fit it.

        None where they are enough, or where no such law passes through them.
        """
        table = self.table
        if table is None or len(table.losses) < underdetermined.FEWEST:
            return None
        if diagnose.too_few(CHINCHILLA, table, np.arange(len(table.losses))) is None:
            return None
        columns = {axis: table.columns[axis] for axis in CHINCHILLA.axes}
        posed = CHINCHILLA.pose(columns, table.losses)
        return underdetermined.profile(CHINCHILLA, posed, table.losses, underdetermined.places_of(columns))

    @cached_property
    def size_law(self) -> ScalingFit | None:
        """L(N) at the largest D that three sizes share; where they share none, at the largest D / N that they share.

        Published ladders are often of the second kind, and their exponent is then not that of N alone.
        """
        report, table = self.view.fit, self.table
        fit = report.get("power-n") if report else None
        if report is None or table is None or (fit is not None and fit.is_fitted):
            return fit
        n, d = table.columns["n_params"], table.columns["n_tokens"]
        for rows in reversed(levels(d / n)):
            if len(levels(n[rows])) < MIN_LEVELS:
                continue
            words = f"D = {float((d / n)[rows].mean()):.3g} N"
            return fit_law(
                get_law("power-n"),
                table,
                Slice(rows=rows, words=words, outside=f"not at {words}"),
                excluded=(),
                name=parse_objective(report.objective),
                n_bootstrap=report.n_bootstrap,
                rng=np.random.default_rng(report.seed),
            )[0]
        return fit

    @cached_property
    def reconciliation(self) -> Reconciliation | None:
        """From Kaplan's exponent to Chinchilla's on these rows; None before there is a fit."""
        report = self.view.fit
        if report is None or not self.view.rows:
            return None
        points = report.points or [to_point(row) for row in self.view.rows]
        n_draws = min(N_DRAWS, report.n_bootstrap)
        return reconcile(
            points, self._unfinished(points), objective=report.objective, n_bootstrap=n_draws, seed=report.seed
        )

    def _unfinished(self, points: list[LossPoint]) -> list[LossPoint]:
        """What the trunks of finished runs read before their decays."""
        found: list[LossPoint] = []
        for run in (run for run in self.view.runs if run.status == "finished"):
            rows = [p for p in points if p.run_id == run.run_id]
            for curve in run.validation:
                if not curve.is_decay:
                    found += on_the_way(rows, curve.tokens, curve.losses)
        return found

    @cached_property
    def checks(self) -> list[LawCheck]:
        """Whether the unfinished runs are on the law; nothing where there is no law."""
        waiting = [run for run in self.view.runs if run.status != "finished"]
        fit = self.view.fit
        if self.joint is None or fit is None or compute_of(fit) == "c_min":
            return []
        return check_runs(self.view, fit, waiting)

    @cached_property
    def card(self) -> FitCard | None:
        """The checklist, filled from the fit and the runs."""
        view = self.view
        if view.fit is None:
            return None
        machines = tuple(dict.fromkeys(run.record.machine for run in view.runs if run.record))
        training = Training(
            specs=tuple(run.spec for run in view.runs if run.spec is not None), machines=machines, corpus=view.corpus
        )
        return fit_card(view.fit, training)

    @cached_property
    def held_out(self) -> HoldOut | None:
        """The windows along N of the law this report predicts with."""
        evidence = self.view.fit.evidence if self.view.fit else None
        wanted = [evidence.chosen_law, "chinchilla"] if evidence else []
        for name in wanted:
            for one in evidence.holdouts if evidence else ():
                if one.law == name and one.along == "n_params" and one.windows:
                    return one
        return None

    @cached_property
    def folds(self) -> list[Fold]:
        """The predictions behind `held_out`, row by row."""
        table, held, report = self.table, self.held_out, self.view.fit
        if table is None or held is None or report is None:
            return []
        return [_fold(table, held.law, window.largest, report) for window in held.windows]


def _fold(table: Table, name: str, largest: float, report: FitReport) -> Fold:
    law = get_law(name)
    small = table.columns["n_params"] <= largest * (1 + 1e-9)
    columns = {axis: table.columns[axis][small] for axis in law.axes}
    posed = law.pose(columns, table.losses[small])
    few = report.objective == "adaptive" and report.n_runs < FEW_RUNS
    objective = parse_objective("l2-log" if few else report.objective)
    best = solve(
        posed.model, np.log(table.losses[small]), posed.starts(N_STARTS), objective, bounds=posed.bounds, n_polish=8
    )
    above: dict[str, Array | float] = {axis: table.columns[axis][~small] for axis in law.axes}
    return Fold(
        largest=largest,
        n_params=table.columns["n_params"][~small],
        measured=table.losses[~small],
        predicted=law.loss(posed.natural(best.theta), above),
    )


# ----------------------------------------------------------------------------------------------------------- live check


def check_runs(view: "LabView", report: FitReport, chosen: "Sequence[RunView]") -> list[LawCheck]:
    """Each run by its trunk where finished trunks show what to expect, else by its decayed rows.

    Raises:
        SpecError: the fit has no law of N and D as trained.
    """
    must_be_as_trained(report)
    fit, law, draws = joint_fit(report)
    joint = JointLaw(fit=fit, law=law, draws=draws)
    curves = {run.run_id: _trunk(run, report.count) for run in view.runs}
    finished = [curves[run.run_id] for run in view.runs if run.status == "finished"]
    fitted = {point.row_id for point in report.points}
    found = []
    for run in chosen:
        warmup = run.spec.science.schedule.warmup_tokens if run.spec is not None else 0
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


def _trunk(run: "RunView", count: str) -> TrunkCurve:
    trunk = [curve for curve in run.validation if not curve.is_decay]
    tokens = np.array([t for curve in trunk for t in curve.tokens], dtype=np.float64)
    losses = np.array([x for curve in trunk for x in curve.losses], dtype=np.float64)
    science = run.spec.science if run.spec is not None else None
    return TrunkCurve(
        run_id=run.run_id,
        n_params=_counted(run, count),
        tokens=tokens,
        losses=losses,
        horizon_tokens=science.horizons_tokens[-1] if science and science.schedule.name == "cosine" else None,
    )


def _counted(run: "RunView", count: str) -> float:
    if run.spec is None:
        return float(run.n_params)
    counts = count_params(run.spec.science.shape, run.spec.science.n_vocab)
    known = {"total": counts.n_params, "body": counts.n_body, "body+head": counts.n_body + counts.n_head}
    return float(known.get(count, counts.n_params))
