"""What a further run costs, in hours, FLOPs or kWh, and how much of it a budget buys.

With a lab (or a stated vocabulary and context) a run is a real GPT-2 shape, priced by the plan's own cost model; with a
bare table of points it is N parameters on D tokens at 6 N D FLOPs.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError, UserError
from homelab_scaling.fit.points import Count
from homelab_scaling.ladder import BatchTable, Horizons, Ladder, Rung, ScheduleTable, TrainTable, Validation
from homelab_scaling.plan.cost import MeasuredRate, measured_rates, why_no_power
from homelab_scaling.plan.counting import ParamCount, count_params
from homelab_scaling.plan.given import Given
from homelab_scaling.plan.parts import Plan, RungPlan
from homelab_scaling.plan.rules import nearest_shape
from homelab_scaling.plan.rung import plan_rung
from homelab_scaling.runs import run_folders
from homelab_scaling.specs import MAX_WARMUP_FRAC, ModelShape, Money, Optim, Precision, RunSpec

Unit = Literal["hours", "FLOPs", "kWh"]

# What people write -> our unit and how many of it.
UNITS: dict[str, tuple[Unit, float]] = {
    "s": ("hours", 1 / 3600),
    "min": ("hours", 1 / 60),
    "m": ("hours", 1 / 60),
    "h": ("hours", 1.0),
    "d": ("hours", 24.0),
    "": ("FLOPs", 1.0),
    "flop": ("FLOPs", 1.0),
    "flops": ("FLOPs", 1.0),
    "kwh": ("kWh", 1.0),
    "wh": ("kWh", 1e-3),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An amount to spend."""

    amount: float
    unit: Unit


def parse_budget(text: str) -> Budget:
    """`4h`, `30min`, `2d`, `1e17` (FLOPs) or `5kWh`.

    Raises:
        SpecError: anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    amount = float(match[1]) * unit[1] if match and unit else 0.0
    if unit is None or not 0 < amount < math.inf:
        raise SpecError(f"--budget {text}: wants a time, FLOPs or energy above 0, such as 4h, 30min, 1e17 or 5kWh")
    return Budget(amount=amount, unit=unit[0])


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a run costs; None where unknown."""

    flops: float
    hours: float | None = None
    kwh: float | None = None

    def of(self, unit: Unit) -> float | None:
        return {"hours": self.hours, "FLOPs": self.flops, "kWh": self.kwh}[unit]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A run that could be done."""

    n_params: float
    """N as the fit counts it."""
    horizons: tuple[float, ...]
    """Tokens of its rows, ascending."""
    price: Price
    shape: ModelShape | None = None
    is_repeat: bool = False
    """Another seed of a run that was done."""


class Pricer(Protocol):
    """Turns a wished size and horizons into an offer."""

    @property
    def basis(self) -> str:
        """In words, what prices rest on."""

    def offer(self, n_params: float, horizons: Sequence[float]) -> Offer | None:
        """The nearest real run, or None where there is none (too large for the card, too short for a batch)."""

    def why_not(self, unit: Unit) -> str | None:
        """Why it has no price in this unit; None where it has."""


@dataclass(frozen=True, kw_only=True)
class SixNd:
    """Prices at 6 N D, for points without shapes."""

    basis: str = "6 N D FLOPs (no vocabulary and context known, so no shapes and no speed)"

    def offer(self, n_params: float, horizons: Sequence[float]) -> Offer:
        flops = 6 * n_params * max(horizons)
        return Offer(n_params=n_params, horizons=tuple(horizons), price=Price(flops=flops))

    def why_not(self, unit: Unit) -> str | None:
        if unit == "FLOPs":
            return None
        return (
            f"a budget in {unit} needs shapes to time: give --vocab and --context (or a lab's folder), or a budget in "
            "FLOPs such as 1e17"
        )


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What every run of a lab shares, as far as its price depends on it."""

    n_vocab: int
    context_tokens: int
    tied: bool = True
    optim: Optim = field(default_factory=Optim)
    schedule: ScheduleTable = field(default_factory=ScheduleTable)
    val_tokens: int = 1_000_000
    batches: tuple[tuple[int, int], ...] = ()
    """(total N, batch in tokens) of the runs there are; empty takes Step Law's."""
    shapes: tuple[ModelShape, ...] = ()
    """Of the runs there are: reused where N is theirs."""
    precision: Precision | None = None
    money: Money = field(default_factory=Money)
    n_train_tokens: int | None = None
    """Tokens of the training text; longer runs would repeat it."""


@dataclass(frozen=True, kw_only=True)
class ShapePricer:
    """Prices real shapes by the plan's cost model on a machine."""

    facts: Facts
    box: Box
    count: Count = "total"
    watts: float | None = None
    measured: tuple[MeasuredRate, ...] = ()

    @property
    def basis(self) -> str:
        where = f"{self.box.n_gpus} x {self.box.device}" if self.box.on_gpu else f"CPU, {self.box.n_cores} cores"
        rates = "measured and assumed" if self.measured else "assumed"
        return f"GPT-2 shapes on {where}, vocabulary {self.facts.n_vocab:,}, {rates} speeds, as in `homelab plan`"

    def offer(self, n_params: float, horizons: Sequence[float]) -> Offer | None:
        shape = self._shape(n_params)
        longest = self.facts.n_train_tokens
        if longest is not None and max(horizons) > longest:
            return None
        try:
            rung = self._plan(shape, horizons)
        except SpecError:  # less than a batch, or horizons that round to one
            return None
        if rung.placement.fits is False:
            return None
        bill = rung.bill
        return Offer(
            n_params=counted(rung.size.params, self.count),
            horizons=tuple(float(h.tokens) for h in rung.training.horizons),
            price=Price(flops=bill.flops, hours=None if bill.seconds is None else bill.seconds / 3600, kwh=bill.kwh),
            shape=shape,
        )

    def why_not(self, unit: Unit) -> str | None:
        if unit == "FLOPs":
            return None
        some = self._plan(
            nearest_shape(1_000_000, self.facts.n_vocab, self.facts.context_tokens, tied=self.facts.tied), ()
        )
        reason = some.bill.unknown.get("seconds") or (some.bill.unknown.get("kwh") if unit == "kWh" else None)
        if reason is None:
            return None
        return f"a budget in {unit} has no price here: {reason or why_no_power(self.box)}"

    def _shape(self, n_params: float) -> ModelShape:
        facts = self.facts
        for shape in facts.shapes:
            if abs(math.log(counted(count_params(shape, facts.n_vocab), self.count) / n_params)) < 0.01:
                return shape
        target = n_params
        for _ in range(4):  # a count that leaves the embedding out wants a larger total
            shape = nearest_shape(round(target), facts.n_vocab, facts.context_tokens, tied=facts.tied)
            if self.count == "total":
                break
            params = count_params(shape, facts.n_vocab)
            target = max(1.0, n_params + params.n_params - counted(params, self.count))
        return shape

    def _plan(self, shape: ModelShape, horizons: Sequence[float]) -> RungPlan:
        facts = self.facts
        total = count_params(shape, facts.n_vocab).n_params
        near = min(facts.batches, key=lambda one: abs(math.log(one[0] / total)), default=None)
        tokens = tuple(sorted(max(1, round(h)) for h in horizons)) or (1_000_000 * facts.context_tokens,)
        ladder = Ladder(
            name="next",
            rungs=(Rung(name="next", n_layer=shape.n_layer, d_model=shape.d_model, n_head=shape.n_head, lr_peak=1e-3),),
            horizons=Horizons(tokens=tokens),
            context_tokens=facts.context_tokens,
            tied=facts.tied,
            optim=facts.optim,
            schedule=facts.schedule,
            batch=BatchTable(tokens=near[1] if near else None),
            validation=Validation(full_tokens=facts.val_tokens, curve_tokens=min(100_000, facts.val_tokens)),
            train=TrainTable(precision=facts.precision or "auto"),
            money=facts.money,
        )
        given = Given(
            ladder=ladder,
            corpus=None,
            box=self.box,
            n_vocab=facts.n_vocab,
            val_tokens=facts.val_tokens,
            measured=self.measured,
            watts=self.watts,
            warn=lambda _said: None,
        )
        return plan_rung(given, ladder.rungs[0])


def counted(params: ParamCount, count: Count) -> int:
    """N under one of the fitter's three counts."""
    return {"total": params.n_params, "body": params.n_body, "body+head": params.n_body + params.n_head}[count]


# --------------------------------------------------------------------------------------------------------------- a lab


def find_lab(source: str) -> Path | None:
    """The lab that a fit lies in: the folder itself or one of the two above it, whichever has runs."""
    path = Path(source)
    return next((p for p in (path, path.parent, path.parent.parent) if (p / "runs").is_dir()), None)


def lab_facts(lab: Path) -> tuple[Facts, tuple[MeasuredRate, ...]] | None:
    """What the lab's runs share, and the speeds they measured; None without a readable spec."""
    specs: list[RunSpec] = []
    for run in run_folders(lab):
        try:
            specs.append(run.read_spec())
        except UserError:
            continue
    if not specs:
        return None
    first = specs[0].science
    shapes = tuple(dict.fromkeys(spec.science.shape for spec in specs))
    batches = {count_params(s.science.shape, s.science.n_vocab).n_params: s.science.batch_tokens_global for s in specs}
    schedule = first.schedule
    facts = Facts(
        n_vocab=first.n_vocab,
        context_tokens=first.shape.context_tokens,
        tied=first.shape.tied,
        optim=first.optim,
        schedule=ScheduleTable(
            name=schedule.name,
            warmup_frac=min(MAX_WARMUP_FRAC, schedule.warmup_tokens / first.horizons_tokens[0]),
            decay_frac=schedule.decay_frac,
            lr_final_frac=schedule.lr_final_frac,
        ),
        val_tokens=first.val_tokens,
        batches=tuple(sorted(batches.items())),
        shapes=shapes,
        precision=first.precision,
        money=specs[0].money,
        n_train_tokens=_train_tokens(lab),
    )
    return facts, measured_rates([lab])


def _train_tokens(lab: Path) -> int | None:
    path = lab / "plan.json"
    try:
        return codec.read_json(path, Plan).n_train_tokens if path.exists() else None
    except SpecError:
        return None
