"""The parts of a plan, as frozen records: what `plan_ladder` returns and plan.json holds."""

from dataclasses import dataclass, field
from typing import Literal

from homelab_scaling.box import Box
from homelab_scaling.ladder import Horizons, Reference
from homelab_scaling.plan.cost import Power, Rate
from homelab_scaling.plan.counting import ParamCount
from homelab_scaling.plan.memory import LossPath, VramEstimate
from homelab_scaling.specs import BatchWarmup, ModelShape, OptimizerName, Precision, RunSpec

BatchBasis = Literal["measured", "bound", "forecast", "prior"]
"""What an advised batch rests on: the noise scale, a lower bound of it, those of other rungs, or nothing measured."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A checkpoint whose weights rungs of its shape begin from (export/start.py)."""

    name: str
    """As the ladder says."""
    folder: str
    """Where it lies, absolute."""
    sha256: str
    """Of its weights."""
    shape: ModelShape
    n_vocab: int


@dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Training FLOPs per token under every convention in use."""

    causal: float
    """Exact, the one used everywhere: every matmul, head included, the causal half of attention, no padding."""
    full: float
    """With the full attention square."""
    causal_padded: float
    full_padded: float
    six_n: float
    """6N with N total parameters."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the model is."""

    shape: ModelShape
    n_params_wanted: int | None
    """Where the ladder gave a target instead of a shape."""
    n_params: int
    params: ParamCount
    flops_per_token: FlopsPerToken


@dataclass(frozen=True, kw_only=True)
class HorizonPlan:
    """One row to come: wanted and actual tokens."""

    wanted_tokens: int
    tokens: int
    n_steps: int
    tokens_per_param: float
    n_epochs: float | None
    """Passes over the training text; None without a corpus."""
    flops: float
    """Exact, as if run alone."""
    flops_6nd: float


@dataclass(frozen=True, kw_only=True)
class OtherMode:
    """What the other horizons.mode would train: the published D beside a solved one, or the reverse."""

    mode: Literal["exact", "nominal"]
    row: HorizonPlan


@dataclass(frozen=True, kw_only=True)
class AdvisedBatch:
    """What `homelab batch-size` advises for a rung, as far as the plan needs it (LAB/<ladder>/batch.json)."""

    batch_tokens: int
    lr_scale: float
    """On the rate of the ladder's rule."""
    beta2: float | None
    """Instead of the ladder's; None keeps it."""
    basis: BatchBasis
    shape: ModelShape
    """Of the model it was measured on."""
    n_tokens: int
    """The longest horizon it is for."""
    data_id: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the result: tokens, batch, learning rate, precision."""

    horizons: tuple[HorizonPlan, ...]
    """Ascending."""
    other: OtherMode | None
    """Shown beside the rows, not run; None where the ladder states no published D."""
    batch_tokens_wanted: int
    batch_tokens: int
    batch_source: str
    lr_peak: float
    lr_source: str
    warmup_tokens: int
    precision: Precision
    beta2: float | None = None
    """Rescaled with an advised batch; None is the ladder's own."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How it is executed and whether it fits."""

    n_processes: int
    microbatch_seqs_per_rank: int
    accumulation_steps: int
    loss_path: LossPath
    memory: tuple[VramEstimate, ...]
    """The ladder's optimizer first, the other one beside it."""
    vram_bytes: dict[OptimizerName, int]
    """Totals of `memory`."""
    fits: bool | None
    """Within 90 % of the card; None on CPU."""
    peak_vram_bytes: int | None = None
    """The highest that finished rows recorded with this placement, to hold against `memory`'s allocated_bytes."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One run of one seed: a trunk with all its horizons (wsd), or one horizon (cosine)."""

    horizons_tokens: tuple[int, ...]
    tokens_trained: int
    """Decays included."""
    curve_every_tokens: int | None
    seconds: float | None
    noise_every_steps: int | None = None
    """The noise scale is measured on every so-many-th update; None never."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What the rung costs over all seeds."""

    rate: Rate | None
    n_runs: int
    tokens_trained: int
    flops: float
    seconds: float | None
    kwh: float | None
    usd: float | None
    """Energy and machine time together, as far as they are known."""
    usd_energy: float | None = None
    usd_machine: float | None = None
    power: Power | None = None
    """Behind `kwh`."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Field -> why it is None."""


@dataclass(frozen=True, kw_only=True)
class RungPlan:
    """One rung, fully resolved."""

    name: str
    size: Size
    training: Training
    placement: Placement
    launches: tuple[Launch, ...]
    """Of one seed."""
    bill: Bill
    batch_warmup: BatchWarmup | None = None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The whole ladder."""

    n_runs: int
    n_rows: int
    tokens_trained: int
    flops: float
    seconds: float | None
    """One run after the other."""
    kwh: float | None
    usd: float | None
    usd_energy: float | None = None
    usd_machine: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What `homelab run` measures of a ladder before it trains it, and what that costs."""

    rungs: tuple[str, ...]
    """Whose noise scale is measured, ascending in size."""
    burn_in_frac: float
    """Of the longest horizon: what a probe trains."""
    flops: float
    seconds: float | None
    """Start-up included; None where no speed is known."""
    together: bool
    """In one launch before the first run; else each before its rung."""
    calibrated_on: str | None = None
    """The rung whose checkpoint is branched at several batches to calibrate by; in flops and seconds."""
    kept: dict[str, str] = field(default_factory=dict)
    """Rung -> why it cannot be measured."""


@dataclass(frozen=True, kw_only=True)
class PublishedRung:
    """What was published of one rung, beside what its tokens cost in the shape that stands for it."""

    name: str
    n_tokens: int
    """The published D."""
    n_params: float | None
    """The published N = C / (6 D); None where the ladder names no single budget."""
    flops_causal: float
    """Of our shape on those tokens: every matmul, the causal half of attention, as everywhere here."""
    flops_full: float
    """The same with the whole attention square, as PaLM and nanoGPT count."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """plan.json."""

    ladder: str
    question: str | None
    box: Box
    n_vocab: int
    vocab_basis: str
    n_train_tokens: int | None
    """Tokens of the training text, each document counted once; None where there is none yet."""
    data_id: str | None
    val_tokens: int
    rungs: tuple[RungPlan, ...]
    totals: Totals
    energy_basis: str
    warnings: tuple[str, ...]
    runs: tuple[RunSpec, ...]
    """In the order of the rungs; empty without a corpus."""
    measuring: Measuring | None = None
    """What comes before the runs; their batches and rates are what is known until then."""
    reference: Reference | None = None
    """The ladder's, for the report."""
    seeds: tuple[int, ...] = (0,)
    """Every rung is trained once with each."""
    lab_seeds: tuple[int, ...] = ()
    """Of these, the ones that nobody asked for now: their runs are in the lab."""
    horizons: Horizons | None = None
    """The ladder's, for the report."""
    published: tuple[PublishedRung, ...] = ()
    """The rungs whose published tokens the ladder states."""
