"""The live check of a lab: are the runs that have not finished on the law of those that have."""

from collections.abc import Sequence
from pathlib import Path

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.catalogue import open_fit
from homelab_scaling.fit.onlaw import LawCheck
from homelab_scaling.report.collect import collect
from homelab_scaling.report.study import check_runs


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
