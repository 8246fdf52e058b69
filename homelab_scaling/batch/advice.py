"""Batch, split and learning rate of every rung from what was measured: the frozen content of LAB/<ladder>/batch.json.

    measured B_simple x c -> B_crit -> trade-off table -> the row taken -> learning rate, beta2

c is what branches or a sweep on the smallest rung find B_crit / B_simple to be, and 1 until then (calibration.py). A
rung without a measurement gets a forecast from those with one, at least the lower bound that its own probe found, and
where nothing is measured at all the ladder's own batch. Advice is frozen: a rung whose training has begun keeps it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.batch.branch_fit import BranchResult
from homelab_scaling.batch.calibration import Calibration, scaled, sd_log
from homelab_scaling.batch.critical import BatchLaw, Estimate, fit_batch_law
from homelab_scaling.batch.estimator import NoiseScale
from homelab_scaling.batch.forecast import SAME_TOKENS_FACTOR, Forecast, Known, forecast
from homelab_scaling.batch.midrun import SLOPE
from homelab_scaling.batch.priors import OVERHEAD_FRAC, Band, Prior, band, priors_for
from homelab_scaling.batch.table import SHORTEST_STEPS, Row, Setting, choose_row, row_at, trade_off_table
from homelab_scaling.batch.trials import SweepResult
from homelab_scaling.errors import DataError
from homelab_scaling.plan import rules
from homelab_scaling.plan.parts import AdvisedBatch, BatchBasis
from homelab_scaling.runs import RUNS_FOLDERS, run_folders
from homelab_scaling.specs import ModelShape, RunSpec


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe found on one rung."""

    b_simple: Estimate | None
    """Tokens, at the middle of the run; None where the data were too few."""
    why_no_number: str | None
    loss_nats: float | None
    """At the middle of the run, by which Kaplan's prior is read."""
    at_least_tokens: float | None = None
    """Lower bound of B_simple, where there is no number."""
    points: tuple[NoiseScale, ...] = ()
    burn_in_tokens: int = 0
    flops: float = 0.0
    """Of the burn-in; on the bill, but in no run."""
    seconds: float = 0.0
    kwh: float | None = None
    overhead_frac: float | None = None
    """Of a measuring step's time, by the hooks."""


@dataclass(frozen=True, kw_only=True)
class RungAdvice:
    """One rung's batch, and everything it rests on."""

    rung: str
    shape: ModelShape
    n_params: int
    n_tokens: int
    """The longest horizon, for which the table holds."""
    basis: BatchBasis
    measured: Measured | None
    b_crit: Estimate
    """Tokens."""
    forecast: Forecast | None
    """Behind `b_crit`, or what the other rungs had foretold before this one was measured."""
    priors: tuple[Prior, ...]
    band: Band
    rows: tuple[Row, ...]
    batch_tokens: int
    why: str
    n_processes: int
    microbatch_seqs_per_rank: int
    accumulation_steps: int
    lr_scale: float
    """On the ladder's own rule."""
    lr_peak: float
    lr_source: str
    lr_step_law: float
    """The same scaling on Step Law's rate, to compare."""
    beta2: float | None = None
    """Rescaled; None leaves the ladder's."""

    @property
    def surprise(self) -> str | None:
        """How the measurement compares with the forecast made before it."""
        if self.basis != "measured" or self.forecast is None:
            return None
        told = self.forecast.b_crit
        inside = told.low <= self.b_crit.value <= told.high
        return (
            f"measured {self.b_crit.value:,.0f} tokens, {'inside' if inside else 'outside'} the "
            f"{told.low:,.0f} to {told.high:,.0f} foretold {self.forecast.words}"
        )


@dataclass(frozen=True, kw_only=True)
class BatchAdvice:
    """batch.json."""

    ladder: str
    data_id: str
    device: str
    calibration: Calibration
    rungs: tuple[RungAdvice, ...]
    law: BatchLaw | None
    """B_crit over the measured rungs against loss, or against tokens where those differ; None below three rungs."""
    why_no_law: str | None
    sweep: SweepResult | None = None
    """--verify's."""
    branch: BranchResult | None = None
    """Of the smallest rung, where c is from it."""
    overhead_max_frac: float = OVERHEAD_FRAC
    """Share of tokens above those of a small batch that the advice may spend."""
    rescale_beta2: bool = False

    def rung(self, name: str) -> RungAdvice | None:
        return next((r for r in self.rungs if r.rung == name), None)


# --------------------------------------------------------------------------------------------------------- the parts


def lr_scale(batch_tokens: float, base_tokens: float, b_crit_tokens: float) -> float:
    """sqrt(B / B_0) up to B_crit, flat beyond.

    Source: the square root is Adam's (Malladi et al. 2022, arXiv 2205.10287; Li et al. 2024, arXiv 2405.14578, whose
    optimum even falls beyond); a sweep at 0.24M parameters went from 1.4e-3 to 8e-3 over B = 4 to 128.
    """
    return math.sqrt(min(batch_tokens, b_crit_tokens) / min(base_tokens, b_crit_tokens))


def rescaled_beta2(beta2: float, batch_tokens: float, base_tokens: float) -> float:
    """beta2^(B / B_0): the second moment forgets after as many tokens as before.

    Source: Marek et al. 2025 (arXiv 2507.07101).
    """
    return math.pow(beta2, batch_tokens / base_tokens)


def base_batch(setting: Setting) -> float:
    """B_0 [tokens]: the batch that the ladder's rate is for: as [lr] says, else the ladder's own, else Step Law's."""
    ladder = setting.ladder
    if ladder.lr.at_batch_tokens is not None:
        return float(ladder.lr.at_batch_tokens)
    own = next((r.batch_tokens for r in ladder.rungs if r.name == setting.rung.name), None) or ladder.batch.tokens
    return float(own or rules.step_law_batch(setting.horizon_tokens))


# ---------------------------------------------------------------------------------------------------------- a ladder


def advise(
    settings: Sequence[Setting],
    measured: Mapping[str, Measured],
    *,
    ladder: str,
    data_id: str,
    calibration: Calibration | None = None,
    sweep: SweepResult | None = None,
    branch: BranchResult | None = None,
    previous: BatchAdvice | None = None,
    begun: frozenset[str] = frozenset(),
    own_batch: Mapping[str, str] | None = None,
    or_prior: bool = False,
    rescale_beta2: bool = False,
    overhead_max_frac: float = OVERHEAD_FRAC,
) -> BatchAdvice:
    """The advice for every rung of a ladder.

    Args:
        settings: one a rung, in the ladder's order.
        measured: by rung; those that are not there, or have no number, get a forecast.
        previous: what batch.json said until now; its forecasts are kept beside a measurement that has come since.
        begun: rungs whose training has begun, or whose advice stands for another reason: they keep the previous one.
        own_batch: rungs that keep the ladder's own batch, and why.
        or_prior: where not one rung has a measured noise scale, the ladder's own batches instead of an error.

    Raises:
        DataError: not one rung has a measured noise scale.
    """
    calibration = calibration or Calibration()
    known = {
        s.rung.name: Known(
            n_params=s.rung.size.n_params,
            n_tokens=s.horizon_tokens,
            b_crit_tokens=calibration.c * b.value,
            sd_log=sd_log(b),
        )
        for s in settings
        if (m := measured.get(s.rung.name)) is not None and (b := m.b_simple) is not None
    }
    if not known and not or_prior:
        reasons = "; ".join(f"{name}: {m.why_no_number}" for name, m in measured.items()) or "nothing was measured"
        raise DataError(f"no rung has a measured noise scale ({reasons}); measure more steps, or another rung")
    rungs = []
    for setting in settings:
        name = setting.rung.name
        before = previous.rung(name) if previous else None
        if name in begun and before is not None:
            rungs.append(replace(before, measured=measured.get(name, before.measured)))  # known, but too late to use
            continue
        if own_batch and name in own_batch:
            rungs.append(_own_batch(setting, measured.get(name), own_batch[name]))
            continue
        # A measured rung is held against what the smaller ones say of it.
        size = setting.rung.size.n_params if name in known else math.inf
        others = [k for n, k in known.items() if n != name and k.n_params < size]
        foretold = _forecast(setting, others, calibration) if others else None
        if name in known and before is not None and before.forecast is not None:
            foretold = before.forecast  # made when this rung was not known: a forecast is judged as it was given
        rungs.append(
            _advise_rung(
                setting,
                measured.get(name),
                calibration=calibration,
                foretold=foretold,
                rescale_beta2=rescale_beta2,
                overhead_max_frac=overhead_max_frac,
            )
        )
    law, why_no_law = _law(rungs)
    return BatchAdvice(
        ladder=ladder,
        data_id=data_id,
        device=settings[0].box.device,
        calibration=calibration,
        rungs=tuple(rungs),
        law=law,
        why_no_law=why_no_law,
        sweep=sweep,
        branch=branch,
        overhead_max_frac=overhead_max_frac,
        rescale_beta2=rescale_beta2,
    )


def _forecast(setting: Setting, known: Sequence[Known], calibration: Calibration) -> Forecast:
    found = forecast(known, n_params=setting.rung.size.n_params, n_tokens=setting.horizon_tokens)
    return replace(found, b_crit=scaled(found.b_crit, replace(calibration, c=1.0)))  # c is in `known` already


def _b_crit(
    measured: Measured | None, foretold: Forecast | None, calibration: Calibration
) -> tuple[BatchBasis, Estimate] | None:
    """What there is of B_crit, best first; a lower bound where it lies above the forecast. None where nothing is."""
    if measured is not None and measured.b_simple is not None:
        return "measured", scaled(measured.b_simple, calibration)
    least = calibration.c * measured.at_least_tokens if measured and measured.at_least_tokens else 0.0
    if foretold is not None and foretold.b_crit.value >= least:
        return "forecast", foretold.b_crit
    if least:
        high = max(least, foretold.b_crit.high) if foretold is not None else least
        return "bound", Estimate(value=least, low=least, high=high)
    return None


def _priors(setting: Setting, measured: Measured | None) -> tuple[Prior, ...]:
    return priors_for(
        n_params=setting.rung.size.n_params,
        n_body=setting.rung.size.params.n_body,
        n_tokens=setting.horizon_tokens,
        context_tokens=setting.shape.context_tokens,
        loss_nats=measured.loss_nats if measured else None,
    )


def _advise_rung(
    setting: Setting,
    measured: Measured | None,
    *,
    calibration: Calibration,
    foretold: Forecast | None,
    rescale_beta2: bool,
    overhead_max_frac: float,
) -> RungAdvice:
    rung = setting.rung
    found = _b_crit(measured, foretold, calibration)
    if found is None:
        reason = measured.why_no_number if measured else "it was not measured"
        return _own_batch(setting, measured, f"nothing is known of its noise scale ({reason})")
    basis, b_crit = found
    base = base_batch(setting)
    tuned = setting.ladder.lr.at_batch_tokens
    shown = [rung.training.batch_tokens, *([tuned] if tuned else [])]
    rows = trade_off_table(setting, b_crit.value, also_tokens=shown)
    shortest = rung.training.horizons[0].tokens
    # One batch for all horizons: the noise scale grows along the run, and the shortest bounds it.
    share = math.pow(shortest / setting.horizon_tokens, SLOPE)
    choice = choose_row(
        rows,
        overhead_max_frac * share,
        tuned_tokens=tuned,
        tuned_least_frac=tuned / b_crit.high if tuned else None,
        most_tokens=max(tuned or 0, setting.shape.context_tokens, shortest // SHORTEST_STEPS),
    )
    batch = choice.row.batch_tokens
    scale = lr_scale(batch, base, b_crit.value)
    beta2 = rescaled_beta2(setting.ladder.optim.beta2, batch, base) if rescale_beta2 else None
    return _rung_advice(
        setting, measured, basis=basis, b_crit=b_crit, foretold=foretold, rows=rows, row=choice.row, why=choice.why,
        scale=scale, beta2=beta2,
    )  # fmt: skip


def _own_batch(setting: Setting, measured: Measured | None, why: str) -> RungAdvice:
    """The batch and rate that the ladder has by itself: the run is the same as without this advice."""
    training = setting.rung.training
    spread = band(_priors(setting, measured))
    low, high = spread.low_tokens / OVERHEAD_FRAC, spread.high_tokens / OVERHEAD_FRAC
    b_crit = Estimate(value=math.sqrt(low * high), low=low, high=high)
    rows = trade_off_table(setting, b_crit.value, also_tokens=[training.batch_tokens])
    row = row_at(setting, training.batch_tokens, b_crit.value)
    if row.batch_tokens not in {r.batch_tokens for r in rows}:
        rows = tuple(sorted((*rows, row), key=lambda r: r.batch_tokens))
    return _rung_advice(
        setting, measured, basis="prior", b_crit=b_crit, foretold=None, rows=rows, row=row,
        why=f"the ladder's own, by {training.batch_source}: {why}",
        scale=rules.unmeasured_lr_scale(setting.ladder.lr, training.batch_tokens), beta2=None,
    )  # fmt: skip


def _rung_advice(
    setting: Setting,
    measured: Measured | None,
    *,
    basis: BatchBasis,
    b_crit: Estimate,
    foretold: Forecast | None,
    rows: tuple[Row, ...],
    row: Row,
    why: str,
    scale: float,
    beta2: float | None,
) -> RungAdvice:
    rung = setting.rung
    written = next(r for r in setting.ladder.rungs if r.name == rung.name)
    rule = rules.choose_lr(written, setting.ladder.lr, rung.size.params.n_body, setting.horizon_tokens)
    lr = rules.scaled_lr(rule, written, setting.ladder.lr, scale)
    priors = _priors(setting, measured)
    law = rules.step_law_lr(rung.size.params.n_body, setting.horizon_tokens)
    return RungAdvice(
        rung=rung.name,
        shape=setting.shape,
        n_params=rung.size.n_params,
        n_tokens=setting.horizon_tokens,
        basis=basis,
        measured=measured,
        b_crit=b_crit,
        forecast=foretold,
        priors=priors,
        band=band(priors),
        rows=rows,
        batch_tokens=row.batch_tokens,
        why=why,
        n_processes=row.n_processes,
        microbatch_seqs_per_rank=row.microbatch_seqs_per_rank,
        accumulation_steps=row.accumulation_steps,
        lr_scale=scale,
        lr_peak=lr.value,
        lr_source=lr.source,
        lr_step_law=law * lr_scale(row.batch_tokens, rules.step_law_batch(setting.horizon_tokens), b_crit.value),
        beta2=beta2,
    )


def _law(rungs: Sequence[RungAdvice]) -> tuple[BatchLaw | None, str | None]:
    """B_crit against tokens where the measured rungs differ in them, else against loss."""
    found = [r for r in rungs if r.basis == "measured"]
    tokens = [float(r.n_tokens) for r in found]
    losses = [r.measured.loss_nats for r in found if r.measured and r.measured.loss_nats is not None]
    b_crit = [r.b_crit.value for r in found]
    try:
        if tokens and max(tokens) / min(tokens) > SAME_TOKENS_FACTOR:
            return fit_batch_law("D", tokens, b_crit), None
        if len(losses) == len(found):
            return fit_batch_law("L", losses, b_crit), None
    except DataError as error:
        return None, str(error)
    return None, "not every measured rung knows the loss it was measured at"


# ------------------------------------------------------------------------------------------------------ frozen on disk


def batch_file(lab: Path) -> Path:
    """LAB/<ladder>/batch.json."""
    return lab / "batch.json"


def read_advice(lab: Path) -> BatchAdvice | None:
    """What a lab's batch.json says, or None where there is none."""
    path = batch_file(lab)
    return codec.read_json(path, BatchAdvice) if path.exists() else None


def write_advice(lab: Path, advice: BatchAdvice) -> Path:
    """Replaces LAB/<ladder>/batch.json."""
    path = batch_file(lab)
    codec.write_json(path, advice)
    return path


def begun_runs(lab: Path) -> list[RunSpec]:
    """The runs of a lab that have a record, trials of learning rates too: what they trained with must not change."""
    folders = [f for name in RUNS_FOLDERS if (lab / name).is_dir() for f in run_folders(lab / name)]
    return [f.read_spec() for f in folders if f.record.exists() and f.spec.exists()]


def advised_batches(lab: Path) -> dict[str, AdvisedBatch]:
    """What the planner takes from batch.json, by rung; empty where there is none."""
    advice = read_advice(lab)
    if advice is None:
        return {}
    return {
        r.rung: AdvisedBatch(
            batch_tokens=r.batch_tokens,
            lr_scale=r.lr_scale,
            beta2=r.beta2,
            basis=r.basis,
            shape=r.shape,
            n_tokens=r.n_tokens,
            data_id=advice.data_id,
        )
        for r in advice.rungs
    }
