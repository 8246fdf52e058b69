"""What a fit is on disk: fit.json, and beside it the .npz of its draws and the points it was fitted to."""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from homelab_scaling import codec
from homelab_scaling.errors import DataError, MachineError
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.points import points_csv, read_points
from homelab_scaling.runs import Excluded, LossPoint

POINTS_FILE = "points.csv"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and how sure it is; `value` is None where the data do not pin it down (see `unpinned`)."""

    value: float | None
    se: float | None = None
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class CrossCheck:
    """The 95 % interval of one quantity by three roads; None where a road does not lead there."""

    bootstrap95: tuple[float, float] | None
    profile95: tuple[float | None, float | None] | None
    """Where the profiled objective has risen by more than noise explains; an end that no value reaches is None."""
    delta95: tuple[float, float] | None
    """From the Jacobian at the optimum (cluster-robust)."""
    disagreement: str | None
    """A sentence where the roads differ by more than a factor of two in width; None where they agree."""


@dataclass(frozen=True, kw_only=True)
class HoldOutWindow:
    """One fold: fitted below, judged above."""

    largest: float
    """Largest N (or C) that was fitted."""
    n_train: int
    n_test: int
    rms_frac: float
    """Root mean square of log(predicted / measured) on the rows above."""
    bias_frac: float
    """Mean of log(predicted / measured): above 0 predicts too high a loss."""


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """How well a law fitted to the smaller runs predicts the larger ones."""

    law: str
    along: Literal["n_params", "flops"]
    windows: tuple[HoldOutWindow, ...]
    rms_frac: float | None
    """Root mean square over the windows, each counted once; None where there is none."""
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True)
class Approach:
    """One way to the exponent of N_opt(C): Hoffmann's 1 (envelope), 2 (isoFLOP parabolas), 3 (joint law)."""

    name: Literal["1", "2", "3-free", "3-tied"]
    a: Estimate
    b: Estimate
    n_opt: Estimate
    """At the report's `budget_flops`."""
    why_not: str | None = None
    """Why it gives no numbers; None where it does."""
    notes: tuple[str, ...] = ()
    """What it dropped, and an estimate of its own bias."""


@dataclass(frozen=True, kw_only=True)
class Disagreement:
    """Two approaches on the same resamples."""

    first: str
    second: str
    a_difference: Estimate
    """a of the first minus a of the second."""
    p_value: float | None
    """Two-sided, from the paired draws; None without draws."""


@dataclass(frozen=True, kw_only=True)
class CountRow:
    """The same rows under another parameter count."""

    count: str
    a: Estimate
    """Exponent of N_opt(C) with C = 6 N D of this count."""
    alpha: Estimate
    """Exponent of L(N) at the largest common D."""
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What stands beside the fits: other roads to the same numbers, and how well each law predicts the unseen."""

    budget_flops: float
    """Where the approaches' N_opt are compared."""
    approaches: tuple[Approach, ...]
    disagreements: tuple[Disagreement, ...]
    holdouts: tuple[HoldOut, ...]
    chosen_law: str | None
    """Lowest hold-out error over N and C among free, tied, pinned and Kaplan's; None where nothing was held out."""
    counts: tuple[CountRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScalingFit:
    """One law fitted to one set of rows."""

    law: str
    objective: str
    """As asked for, and in brackets what it resolved to."""
    n_points: int
    excluded: tuple[Excluded, ...]
    """Rows this fit does not use, and why."""
    parameters: dict[str, Estimate]
    derived: dict[str, Estimate]
    objective_value: float | None
    """Sum over the points; None where nothing was fitted."""
    gradient_norm: float | None
    """Largest gradient component over the sum of its absolute contributions: 0 at a perfect optimum."""
    starts_in_basin: int
    status: str
    warnings: tuple[str, ...]
    draws_file: str | None
    """Name of the .npz beside fit.json; None before it is written."""
    rows: str
    """In words, which rows it uses: "D = 3.00M tokens"."""
    n_runs: int
    n_starts: int
    interval: str
    """In words, how the intervals were made."""
    unpinned: dict[str, str]
    """Parameter or derived quantity -> why the data do not pin it down."""
    ranges: dict[str, tuple[float, float]]
    """Variable -> smallest and largest value among the points used; beyond them a prediction extrapolates."""
    sigma_log: float | None
    """Residual standard deviation of log loss, corrected for the fitted parameters."""
    cross_checks: dict[str, CrossCheck] = field(default_factory=dict)
    """Exponents, E and a by bootstrap, profile and delta method."""

    @property
    def is_fitted(self) -> bool:
        """False where the rows could not carry the law at all; `status` then says why."""
        return self.objective_value is not None


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """fit.json: every law fitted to one table of points."""

    source: str
    """The lab or file the points came from."""
    count: str
    """Which parameters N counts: total, body or body+head."""
    objective: str
    n_bootstrap: int
    seed: int
    n_points: int
    n_runs: int
    excluded: tuple[Excluded, ...]
    fits: tuple[ScalingFit, ...]
    notes: tuple[str, ...]
    """What was done to the table on the way in."""
    warnings: tuple[str, ...]
    """About the design as a whole; each fit has its own as well."""
    evidence: Evidence | None = None
    """None where no L(N, D) could be fitted, or it was not asked for."""
    compute: str = "c"
    """What C and D are in the laws of N and D: `c` as trained, `c_min` as at a batch far below critical."""
    draws: dict[str, "Draws"] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Draws file -> its content; filled after making, and kept out of the JSON."""
    points: list[LossPoint] = field(default_factory=list, init=False, repr=False, compare=False)
    """The rows that were given to the fits, before any --count; in points.csv beside fit.json."""

    def get(self, law: str) -> ScalingFit | None:
        """The first (main) fit of a law."""
        return next((fit for fit in self.fits if fit.law == law), None)

    @property
    def main(self) -> list[ScalingFit]:
        """The first fit of each law, fitted or not: L(N) at the largest D, L(D) at the largest N."""
        return list({fit.law: fit for fit in reversed(self.fits)}.values())[::-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """The optimum and every resample's, in natural parameters, so that anything derived from them has an interval."""

    names: tuple[str, ...]
    point: Array
    """(P,)."""
    values: Array
    """(R, P); R is 0 without a bootstrap."""


def draws_name(index: int, law: str) -> str:
    return f"draws_{index:02d}_{law}.npz"


def save_fit(report: FitReport, folder: Path) -> Path:
    """Writes fit.json, its draws and its points into `folder` and returns the path of fit.json.

    Raises:
        MachineError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draws in report.draws.items():
            temporary = folder / f".{name}.tmp"
            with open(temporary, "wb") as file:
                np.savez(file, names=np.array(draws.names), point=draws.point, draws=draws.values)
            temporary.replace(folder / name)
        for stale in set(folder.glob("draws_*.npz")) - {folder / name for name in report.draws}:
            stale.unlink()
    except OSError as error:
        raise MachineError(f"{folder}: could not be written ({error.strerror}); choose another --out") from None
    if report.points:
        codec.write_text(folder / POINTS_FILE, points_csv(report.points))
    path = folder / "fit.json"
    codec.write_json(path, report)
    return path


def load_fit(path: Path) -> FitReport:
    """A report from fit.json (or the folder that holds it), draws included where they are there.

    Raises:
        SpecError: fit.json is missing or says something else.
        DataError: a draws file is damaged.
    """
    file = path / "fit.json" if path.is_dir() else path
    report = codec.read_json(file, FitReport)
    for fit in report.fits:
        if fit.draws_file is None or not (beside := file.parent / fit.draws_file).exists():
            continue
        try:
            with np.load(beside, allow_pickle=False) as data:
                names = tuple(str(n) for n in data["names"])
                report.draws[fit.draws_file] = Draws(names=names, point=data["point"], values=data["draws"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise DataError(f"{beside}: damaged draws file; run `homelab fit` again") from None
    if (rows := file.parent / POINTS_FILE).exists():
        report.points.extend(read_points(rows).points)
    return report
