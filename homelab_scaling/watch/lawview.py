"""Whether a run in progress is on the law of the finished ones, worked out again only when something is new."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homelab_scaling.errors import HomelabError
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.watch.feed import Cached
from homelab_scaling.watch.frame import LawWord
from homelab_scaling.watch.runview import NOT_JUDGED, RunEye

if TYPE_CHECKING:
    from homelab_scaling.fit.result import FitReport
    from homelab_scaling.report.collect import Curve, LabView, RunView


class LawEye:
    """Judges runs of one ladder against its own fit (fit/fit.json), as `homelab report --check` does."""

    def __init__(self, ladder: Path) -> None:
        self.ladder = ladder
        self._file = Cached(ladder / "fit" / "fit.json")
        self._fit: FitReport | None = None
        self._problem: str | None = None
        self._said: dict[str, tuple[tuple[object, ...], LawWord]] = {}

    def judge(self, run: RunEye, everyone: Sequence[RunEye]) -> LawWord:
        """The verdict on one run, from everybody's validation curves."""
        if not self._load():
            return NOT_JUDGED if self._problem is None else _silent(self._problem)
        finished = [one for one in everyone if one.state == "finished" and one is not run]
        new = tuple((one.run_id, one.n_restarts, len(one.log.held), len(one.rows)) for one in [run, *finished])
        said = self._said.get(run.run_id)
        if said is None or said[0] != new:
            said = (new, self._check(run, [run, *finished]))
            self._said[run.run_id] = said
        return said[1]

    def _load(self) -> bool:
        plain = self._file.read()
        if plain is None:
            self._fit, self._problem = None, self._file.problem
        elif self._file.changed:
            from homelab_scaling.fit.result import load_fit

            self._said = {}
            try:
                self._fit, self._problem = load_fit(self._file.path), None
            except (HomelabError, OSError, ValueError) as error:
                self._fit, self._problem = None, f"the fit cannot be read ({error})"
        return self._fit is not None

    def _check(self, run: RunEye, everyone: Sequence[RunEye]) -> LawWord:
        from homelab_scaling.report.study import check_runs

        assert self._fit is not None
        view = _lab_view(self.ladder, everyone, self._fit)
        chosen = [one for one in view.runs if one.run_id == run.run_id]
        if not chosen:
            return _silent("its spec cannot be read")
        try:
            (check,) = check_runs(view, self._fit, chosen)
        except HomelabError as error:
            return _silent(str(error))
        return LawWord(verdict=check.verdict, off_frac=check.off_frac, sentence=check.sentence)


def _silent(why: str) -> LawWord:
    return LawWord(verdict="cannot be judged", off_frac=None, sentence=why)


def _lab_view(ladder: Path, runs: Sequence[RunEye], fit: "FitReport") -> "LabView":
    """As much of a report's view as the check reads."""
    from homelab_scaling.report.collect import LabView

    views = tuple(view for view in map(_run_view, runs) if view is not None)
    return LabView(
        name=ladder.name,
        path=ladder,
        question=None,
        corpus=None,
        plan_warnings=(),
        n_rungs_planned=None,
        runs=views,
        rows=(),
        excluded=(),
        fit=fit,
        missing=(),
    )


def _run_view(run: RunEye) -> "RunView | None":
    from homelab_scaling import codec
    from homelab_scaling.report.collect import RunView
    from homelab_scaling.runs import RunRecord

    spec = run.spec
    if spec is None:
        return None  # another trainer's run: no schedule to compare trunks under
    try:
        record = codec.from_plain(run.record, RunRecord, "record.json") if run.record else None
    except HomelabError:
        record = None
    return RunView(
        run_id=spec.run_id,
        rung=spec.rung,
        seed=spec.science.seed,
        n_params=count_params(spec.science.shape, spec.science.n_vocab).n_params,
        flops_per_token=flops_per_token(spec.science.shape, spec.science.n_vocab),
        spec=spec,
        record=record,
        training=(),
        validation=_curves(run),
    )


def _curves(run: RunEye) -> "tuple[Curve, ...]":
    from homelab_scaling.report.collect import Curve

    phases: dict[str, list[tuple[int, int, float]]] = {}
    for line in run.log.held:
        if line.get("set") == "curve":
            point = (int(line.get("step") or 0), int(line["tokens"]), float(line["loss"]))
            phases.setdefault(str(line.get("phase", "trunk")), []).append(point)
    return tuple(
        Curve(
            phase=phase,
            steps=tuple(p[0] for p in points),
            tokens=tuple(p[1] for p in points),
            losses=tuple(p[2] for p in points),
        )
        for phase, points in phases.items()
    )
