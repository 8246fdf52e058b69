"""What is known of a lab's batches, put together by rung: noise scales in the runs, probes, advice, measured speeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from homelab_scaling.batch.advice import BatchAdvice, RungAdvice
from homelab_scaling.batch.calibration import Calibration
from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.estimator import Z95
from homelab_scaling.batch.midrun import SCATTER_LN, weighted_line
from homelab_scaling.batch.table import BatchRate, measured_batch_rates
from homelab_scaling.batch.table import Row as Trade
from homelab_scaling.errors import HomelabError
from homelab_scaling.runs import Row

if TYPE_CHECKING:
    from homelab_scaling.report.collect import LabView, RunView

SWEEP = "batch_sweep"
"""Where batch-size --verify keeps its trials, beside a lab's runs."""
BASES = {"measured": "measured", "forecast": "forecast", "bound": "a lower bound"}
"""Of an advice, in words."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """B_simple over one window of a run, or of a probe."""

    tokens: int
    loss: float | None
    b_simple: float | None
    ci95: tuple[float, float] | None
    at_least: float | None
    why: str | None
    is_decay: bool = False

    @property
    def sd_log(self) -> float | None:
        if self.b_simple is None or self.ci95 is None or self.ci95[0] <= 0:
            return None
        return math.log(self.ci95[1] / self.ci95[0]) / (2 * Z95)

    @property
    def shown(self) -> float | None:
        """The number, else the lower bound."""
        return self.b_simple if self.b_simple is not None else self.at_least


@dataclass(frozen=True, kw_only=True)
class BatchAt:
    """From here on a run trained with this batch."""

    tokens: int
    batch_tokens: int


def noise_lines(lines: Sequence[dict[str, Any]]) -> tuple[Noise, ...]:
    """The lines of kind `noise` that hold a number or a bound."""
    found = []
    for line in lines:
        if line.get("kind") != "noise" or not isinstance(line.get("tokens"), int):
            continue
        low, high = _positive(line.get("noise_low_tokens")), _positive(line.get("noise_high_tokens"))
        one = Noise(
            tokens=int(line["tokens"]),
            loss=_positive(line.get("loss")),
            b_simple=_positive(line.get("noise_scale_tokens")),
            ci95=(low, high) if low is not None and high is not None else None,
            at_least=_positive(line.get("noise_at_least_tokens")),
            why=str(line["why"]) if line.get("why") else None,
            is_decay=str(line.get("phase", "")).startswith("decay"),
        )
        found += [one] if one.shown is not None else []
    return tuple(found)


def batch_events(events: Sequence[dict[str, Any]], first_tokens: int) -> tuple[BatchAt, ...]:
    """The batch of a warm-up at its beginning and from each doubling on.

    A doubling that was made again is told once: a segment that went back in time takes those after it with it, and one
    within a decay ends with that decay.
    """
    found = [BatchAt(tokens=0, batch_tokens=first_tokens)]
    for event in events:
        tokens, batch = event.get("tokens"), event.get("batch_tokens")
        if event.get("kind") == "batch" and isinstance(tokens, int) and isinstance(batch, int):
            found = [one for one in found if one.tokens == 0 or (one.tokens < tokens and one.batch_tokens < batch)]
            found.append(BatchAt(tokens=tokens, batch_tokens=batch))
    return tuple(found)


def _positive(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if usable else None  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RungBatch:
    """One rung: the batch it was trained with, and what is known of the critical one."""

    rung: str
    n_params: int
    n_tokens: int
    context_tokens: int | None
    batch_tokens: int
    trained: bool
    """Whether a run took this batch; else it is advised."""
    runs: "tuple[RunView, ...]"
    advice: RungAdvice | None
    calibration: Calibration | None
    rates: tuple[BatchRate, ...]
    """Measured here, for this very model."""

    @cached_property
    def probe(self) -> tuple[Noise, ...]:
        """The points of its probe."""
        points = self.advice.measured.points if self.advice and self.advice.measured else ()
        return tuple(
            Noise(
                tokens=p.tokens_trained,
                loss=p.loss_nats,
                b_simple=p.b_simple_tokens,
                ci95=p.ci95_tokens,
                at_least=p.at_least_tokens,
                why=p.why_no_number or p.why_not_informative,
            )
            for p in points
            if p.b_simple_tokens is not None or p.at_least_tokens is not None
        )

    @cached_property
    def in_run(self) -> Estimate | None:
        """B_simple at the middle of the run, by the line through the windows of its trunks after their warm-up."""
        usable = []
        for run in self.runs:
            warmup = run.spec.science.schedule.warmup_tokens if run.spec else 0
            usable += [p for p in run.noise if p.sd_log is not None and not p.is_decay and p.tokens > warmup]
        if not usable or max(p.tokens for p in usable) < self.n_tokens / 4:
            return None
        middle = self.n_tokens / 2
        x = np.log([p.tokens / middle for p in usable])
        y = np.log([p.b_simple or math.nan for p in usable])
        found = weighted_line(x, y, np.array([p.sd_log or 0.0 for p in usable]) ** 2 + SCATTER_LN**2)
        half = Z95 * math.sqrt(found.var + SCATTER_LN**2)
        value = math.exp(found.value)
        return Estimate(value=value, low=value * math.exp(-half), high=value * math.exp(half))

    @property
    def b_simple(self) -> Estimate | None:
        """In the run where it was measured there, else by the probe."""
        return self.in_run or self.foretold

    @property
    def foretold(self) -> Estimate | None:
        """B_simple at the middle of the run by the probe before it."""
        return self.advice.measured.b_simple if self.advice and self.advice.measured else None

    @property
    def own_advice(self) -> RungAdvice | None:
        """Its advice, where that rests on a noise scale rather than on published rules."""
        return self.advice if self.advice and self.advice.basis != "prior" else None

    @property
    def is_by_run(self) -> bool:
        """B_crit is from the run itself: it is no measured rung's advice, and the run knows better than a forecast."""
        known = self.own_advice is not None and self.own_advice.basis == "measured"
        return not known and self.in_run is not None

    @property
    def side(self) -> Literal["at least", "at most"] | None:
        """Which bound B_crit is, where it is one: what follows from it is then one of the other side."""
        if not self.is_by_run and self.own_advice is not None and self.own_advice.basis == "bound":
            return "at least"
        return self.calibration.side if self.calibration else None

    @cached_property
    def b_crit(self) -> Estimate | None:
        """The advice's, or c times what the run itself had."""
        if not self.is_by_run or self.in_run is None:
            return self.own_advice.b_crit if self.own_advice else None
        own, c = self.in_run, self.calibration or Calibration()
        half = Z95 * math.hypot(math.log(own.high / own.low) / (2 * Z95), c.sd_log or 0.0)
        value = c.c * own.value
        return Estimate(value=value, low=value * math.exp(-half), high=value * math.exp(half))

    @property
    def is_calibrated(self) -> bool:
        """Whether it was measured how B_crit follows from the noise scale."""
        return self.calibration is not None and self.calibration.method != "uncalibrated"

    @property
    def basis(self) -> str:
        """Where B_crit comes from, in words."""
        if self.b_crit is None:
            return "not known"
        assert self.is_by_run or self.own_advice is not None
        source = "in the run" if self.is_by_run or self.own_advice is None else BASES[self.own_advice.basis]
        return f"{source}, {(self.calibration or Calibration()).words}"

    @property
    def overhead_frac(self) -> float | None:
        """Tokens above those of a small batch, for the same loss."""
        return None if self.b_crit is None else self.batch_tokens / self.b_crit.value

    @property
    def trades(self) -> tuple[Trade, ...]:
        """The rows of its trade-off table, where that is made with this B_crit."""
        return self.own_advice.rows if self.own_advice and not self.is_by_run else ()

    @property
    def taken(self) -> Trade | None:
        """The row that it was trained (or is to be trained) with."""
        return next((row for row in self.trades if row.batch_tokens == self.batch_tokens), None)

    @property
    def row(self) -> Row | None:
        """Its row of the longest horizon, of its first run."""
        rows = [row for run in self.runs for row in run.rows]
        return max(rows, key=lambda row: row.n_tokens, default=None)

    @property
    def noise(self) -> tuple[Noise, ...]:
        """Every window of its runs and points of its probe."""
        return (*(p for run in self.runs for p in run.noise), *self.probe)


class BatchStudy:
    """Everything a report says of batches; `rungs` is empty where nothing is known."""

    def __init__(self, view: "LabView") -> None:
        self.view = view
        self.advice: BatchAdvice | None = view.batch

    @cached_property
    def rungs(self) -> tuple[RungBatch, ...]:
        """By size; those of which some noise scale or advice is known."""
        names = dict.fromkeys([run.rung for run in self.view.runs])
        names |= dict.fromkeys(r.rung for r in (self.advice.rungs if self.advice else ()))
        found = [one for name in names if (one := self._rung(name)) is not None]
        return tuple(sorted(found, key=lambda r: r.n_params))

    def _rung(self, name: str) -> RungBatch | None:
        runs = tuple(run for run in self.view.runs if run.rung == name)
        advice = self.advice.rung(name) if self.advice else None
        if advice is None and not any(run.noise for run in runs):
            return None
        spec = next((run.spec for run in runs if run.spec is not None), None)
        science = spec.science if spec else None
        shape = science.shape if science else advice.shape if advice else None
        if science is None and advice is None:
            return None
        assert shape is not None
        batch = science.batch_tokens_global if science else advice.batch_tokens if advice else 0
        tokens = max((run.spec.science.horizons_tokens[-1] for run in runs if run.spec), default=0)
        return RungBatch(
            rung=name,
            n_params=runs[0].n_params if runs else advice.n_params if advice else 0,
            n_tokens=tokens or (advice.n_tokens if advice else 0),
            context_tokens=shape.context_tokens,
            batch_tokens=batch,
            trained=science is not None,
            runs=runs,
            advice=advice,
            calibration=self.advice.calibration if self.advice else None,
            rates=tuple(rate for rate in self._rates if rate.shape == shape),
        )

    @cached_property
    def _rates(self) -> tuple[BatchRate, ...]:
        try:
            return measured_batch_rates([self.view.path, self.view.path / SWEEP])
        except HomelabError:
            return ()
