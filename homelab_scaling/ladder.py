"""What a person writes: the ladder file, at most 40 lines of TOML, table by table.

Every class checks itself when made and says found, wanted, what to do. What follows from a ladder on a given machine is
the planner's work (plan/ladder.py).
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, get_args

from homelab_scaling.specs import (
    MAX_WARMUP_FRAC,
    GradientComm,
    Money,
    Optim,
    ScheduleName,
    Sharding,
    WatchLimits,
    check_mixture,
    require,
)

MAX_CURVE_POINTS_PER_ROW = 20


@dataclass(frozen=True, kw_only=True)
class DataTable:
    """[data]: which text, cut into which tokens."""

    sources: tuple[str, ...] = ("python",)
    """Files and folders (relative to the ladder file), `python` or `hf:NAME[:CONFIG]`, as in `homelab corpus`."""
    tokenizer: str = "bpe:2048"
    """`bytes`, `bpe:N`, `gpt2` or the path of a tokenizer.json."""
    shards: str | None = None
    """A folder of finished shards to use instead of building them from `sources` (relative to the ladder file)."""
    text_field: str = "text"
    """Which field of .jsonl, .parquet and hf: rows holds the text."""
    val_frac: float = 0.02
    """Share of the documents held out for validation, chosen by content hash."""
    max_bytes: int | None = None
    """Bytes of text to use, both halves together and repetitions counted, spread over the sources by hash (of a hub
    stream: its beginning); None uses everything."""
    weights: tuple[float, ...] = ()
    """Parts of the training bytes, one per source in order, in any unit such as [0.7, 0.3]. With max_bytes a source too
    small for its part is repeated; without, the corpus is the largest in which none is."""
    epochs: tuple[float, ...] = ()
    """Or: times each source's text is in the training half, in order, such as [1, 2.5]; then max_bytes, where it is
    less than that, shrinks all alike."""
    near_duplicates: float | None = None
    """Drop documents whose Jaccard similarity with another one (sets of five words in a row) is this or more, 0.8 as a
    rule; None drops exact duplicates only. Wants the extra [dedup]."""
    max_epochs: float = 4.0
    """The plan refuses a run that would pass over the training text more often than this."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources is empty; name at least one file, folder, python or hf:NAME")
        require(0 < self.val_frac < 0.5, f"data.val_frac = {self.val_frac}, wants a share between 0 and 0.5")
        require(
            self.max_bytes is None or self.max_bytes > 0, f"data.max_bytes = {self.max_bytes}, wants a positive number"
        )
        mixed = bool(self.weights or self.epochs or self.near_duplicates is not None)
        require(
            self.shards is None or not mixed,
            "data.shards names finished shards, which weights, epochs and near_duplicates cannot change; remove them, "
            "or remove shards to build anew",
        )
        check_mixture(
            len(self.sources),
            weights=self.weights,
            epochs=self.epochs,
            near_duplicates=self.near_duplicates,
            table="data.",
        )
        require(self.max_epochs > 0, f"data.max_epochs = {self.max_epochs}, wants a positive number")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """[[rungs]]: one model size, by explicit shape or by a target number of parameters."""

    name: str
    n_layer: int | None = None
    d_model: int | None = None
    n_head: int | None = None
    n_params_target: int | None = None
    """Total parameters wanted; the planner picks the nearest shape of its family and shows wanted against actual."""
    lr_peak: float | None = None
    """This rung's peak learning rate, instead of what [lr] gives."""
    batch_tokens: int | None = None
    """This rung's global batch in tokens, instead of what [batch] gives."""
    nominal_tokens: int | None = None
    """The published D of this rung, used when horizons.mode is "nominal" and shown beside ours otherwise."""

    def __post_init__(self) -> None:
        shape = (self.n_layer, self.d_model, self.n_head)
        given = sum(value is not None for value in shape)
        require(
            self.name != "" and all(c.isalnum() or c in "._-" for c in self.name),
            f"rung name {self.name!r}: use letters, digits, dot, dash and underscore (it names a folder)",
        )
        require(
            (given == 3 and self.n_params_target is None) or (given == 0 and self.n_params_target is not None),
            f"rung {self.name}: give either n_layer, d_model and n_head, or n_params_target alone",
        )
        for key in ("n_layer", "d_model", "n_head", "n_params_target", "lr_peak", "batch_tokens", "nominal_tokens"):
            value = getattr(self, key)
            require(value is None or value > 0, f"rung {self.name}: {key} = {value}, wants a positive number")


@dataclass(frozen=True, kw_only=True)
class Horizons:
    """[horizons]: how many tokens each rung is trained on; exactly one of the four lists is given."""

    tokens: tuple[int, ...] = ()
    """Fixed token counts, the same for every rung."""
    tokens_per_param: tuple[float, ...] = ()
    """Multiples of the rung's total parameters (Chinchilla's rule of thumb is 20)."""
    flops: tuple[float, ...] = ()
    """isoFLOP budgets; D is solved from the exact FLOP count of the shape."""
    steps: tuple[int, ...] = ()
    """Optimizer steps at the rung's batch."""
    mode: Literal["exact", "nominal"] = "exact"
    """"nominal" takes each rung's `nominal_tokens` instead, to repeat a published design to the letter."""

    def __post_init__(self) -> None:
        lists = {k: getattr(self, k) for k in ("tokens", "tokens_per_param", "flops", "steps")}
        given = [k for k, v in lists.items() if v]
        require(
            len(given) == 1,
            f"horizons: found {' and '.join(given) or 'none'}; give exactly one of {', '.join(lists)}",
        )
        for key, values in lists.items():
            require(all(v > 0 for v in values), f"horizons.{key} = {list(values)}: every entry must be positive")
            require(len(set(values)) == len(values), f"horizons.{key} = {list(values)}: an entry is there twice")


@dataclass(frozen=True, kw_only=True)
class ScheduleTable:
    """[schedule]: shape of the learning rate over tokens."""

    name: ScheduleName = "wsd"
    """`wsd`: one trunk, decayed at each horizon. `cosine`: one run per horizon, each with its own cosine."""
    warmup_frac: float = 0.05
    """Linear warm-up, as a share of the smallest horizon (at most 0.1)."""
    decay_frac: float = 0.2
    """wsd only: the last share of each horizon, over which the rate falls to lr_final_frac (1 - sqrt shape)."""
    lr_final_frac: float = 0.0
    """Final learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        require(
            0 <= self.warmup_frac <= MAX_WARMUP_FRAC,
            f"schedule.warmup_frac = {self.warmup_frac}, wants 0 to {MAX_WARMUP_FRAC} (of the smallest horizon); "
            "a longer warm-up bends the law at small budgets",
        )
        require(0 < self.decay_frac <= 0.9, f"schedule.decay_frac = {self.decay_frac}, wants more than 0, at most 0.9")
        require(0 <= self.lr_final_frac < 1, f"schedule.lr_final_frac = {self.lr_final_frac}, wants 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class LrTable:
    """[lr]: the peak learning rate of each rung."""

    rule: Literal["fixed", "power", "step-law"] = "power"
    """`fixed`: peak for all. `power`: peak * (n_body / at_body_params) ** exponent. `step-law`: Step Law 2025."""
    peak: float = 3e-3
    at_body_params: float = 1e6
    exponent: float = -0.25
    at_batch_tokens: int | None = None
    """The batch that this rate is for: a measured batch scales it by sqrt(B / at_batch_tokens) up to B_crit. None takes
    the ladder's own batch, else Step Law's."""
    bracket: tuple[float, ...] = ()
    """Multiples of the rate tried on the smallest rungs, such as [0.5, 1, 2]; lr(N) is fitted to the best and used for
    the larger rungs. Empty tunes nothing."""
    bracket_rungs: int = 2
    """On how many of the smallest rungs: 2 or 3."""

    def __post_init__(self) -> None:
        factors = self.bracket
        require(
            not factors or (len(set(factors)) == len(factors) >= 2 and 1 in factors and min(factors) > 0),
            f"lr.bracket = {list(factors)}, wants different positive multiples with 1 among them, such as [0.5, 1, 2]",
        )
        require(2 <= self.bracket_rungs <= 3, f"lr.bracket_rungs = {self.bracket_rungs}, wants 2 or 3")
        at = self.at_batch_tokens
        require(at is None or at > 0, f"lr.at_batch_tokens = {at}, wants a positive number")
        require(self.peak > 0, f"lr.peak = {self.peak}, wants a positive number")
        require(self.at_body_params > 0, f"lr.at_body_params = {self.at_body_params}, wants a positive number")
        require(-1 <= self.exponent <= 0, f"lr.exponent = {self.exponent}, wants -1 to 0 (larger models want less)")


@dataclass(frozen=True, kw_only=True)
class BatchTable:
    """[batch]: the global batch of every rung."""

    tokens: int | None = None
    """Tokens per optimizer step over all ranks; None takes what `homelab batch-size` measured for the rung, else the
    Step Law batch of its largest horizon."""
    measure: bool = True
    """Whether `homelab run` measures the noise scale of a rung before it trains it, where no batch is given."""
    burn_in_frac: float = 0.2
    """Share of the longest horizon that such a measurement trains."""
    calibrate: Literal["branch", "none"] = "branch"
    """How B_crit follows from the noise scale: by branching a checkpoint of the smallest rung at several batches, or
    uncalibrated."""
    noise_every_steps: int | None = None
    """Measure the noise scale on every so-many-th update of each run too; None takes a cadence that costs under 3 %,
    0 never."""
    warmup_from_tokens: int | None = None
    """Start with this batch and double it up to the rung's own whenever the noise scale passes twice the batch, the
    rate going with its square root; None trains with one batch throughout."""

    def __post_init__(self) -> None:
        require(0 < self.burn_in_frac <= 1, f"batch.burn_in_frac = {self.burn_in_frac}, wants more than 0, at most 1")
        every, first = self.noise_every_steps, self.warmup_from_tokens
        require(every is None or every >= 0, f"batch.noise_every_steps = {every}, wants 0 (never) or more")
        require(first is None or first > 0, f"batch.warmup_from_tokens = {first}, wants a positive number")
        require(
            first is None or every != 0, "batch.warmup_from_tokens needs the noise scale; remove noise_every_steps = 0"
        )
        require(self.tokens is None or self.tokens > 0, f"batch.tokens = {self.tokens}, wants a positive number")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """[validation]: fixed windows over the held-out text, the same for every rung."""

    full_tokens: int = 1_000_000
    """Tokens of the full set, measured once per row (all of val.bin if it is smaller)."""
    curve_tokens: int = 100_000
    """Tokens of the small set behind the curves."""
    curve_points_per_row: int = 10
    """How often the small set is measured on the way to each row."""
    curve_every_steps: int | None = None
    """Measure every this many steps instead."""

    def __post_init__(self) -> None:
        require(self.full_tokens > 0, f"validation.full_tokens = {self.full_tokens}, wants a positive number")
        require(
            0 < self.curve_tokens <= self.full_tokens,
            f"validation.curve_tokens = {self.curve_tokens}, wants 1 to full_tokens ({self.full_tokens})",
        )
        require(
            0 <= self.curve_points_per_row <= MAX_CURVE_POINTS_PER_ROW,
            f"validation.curve_points_per_row = {self.curve_points_per_row}, wants 0 to {MAX_CURVE_POINTS_PER_ROW}",
        )
        require(
            self.curve_every_steps is None or self.curve_every_steps > 0,
            f"validation.curve_every_steps = {self.curve_every_steps}, wants a positive number",
        )


@dataclass(frozen=True, kw_only=True)
class TrainTable:
    """[train]: how runs are executed; only `precision` and `start` are part of a run's identity."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the device computes it in hardware, fp32 otherwise; resolved once, at plan time."""
    processes: int | None = None
    """Ranks per run; None takes one per GPU that divides the batch, or one on CPU."""
    microbatch_seqs_per_rank: int | None = None
    """Sequences per forward pass; None takes the largest that the VRAM prediction allows."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto` compiles unless there is no C compiler or it costs over 10 % of the predicted run."""
    loss: Literal["auto", "chunked", "plain"] = "auto"
    """The loss path; `auto` takes the chunked one where the logits would be large."""
    activation_checkpointing: bool = False
    """Compute each block again on the way back instead of keeping what it saved: less memory, a third more time."""
    sharding: Sharding = "none"
    """`full` and `grad-op` train with FSDP over the ranks of a run; for models whose states do not fit one card."""
    ddp_comm: GradientComm = "fp32"
    """`bf16` sends gradients rounded to 8 significant bits: half the traffic between two cards, other numbers."""
    log_every_steps: int = 10
    """How often the host reads the device: losses, commands, the non-finite flag."""
    checkpoint_every_s: float = 600.0
    """A checkpoint at the first log boundary after this many seconds."""
    checkpoint_every_steps: int | None = None
    """A checkpoint every this many steps as well."""
    start: str | None = None
    """A Hugging Face GPT-2 whose weights rungs of its shape begin from instead of random ones: a folder (relative to
    the ladder file; also one of `homelab export`) or a name on the hub. Its vocabulary must be that of the corpus."""

    def __post_init__(self) -> None:
        for key in ("processes", "microbatch_seqs_per_rank", "log_every_steps", "checkpoint_every_steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"train.{key} = {value}, wants 1 or more")
        require(self.start != "", "train.start is empty; name a folder or a model on the hub, or remove the line")
        require(self.checkpoint_every_s > 0, f"train.checkpoint_every_s = {self.checkpoint_every_s}, wants over 0")


FigureName = Literal[
    "exponent_n",
    "exponent_c",
    "r2",
    "slope_c",
    "loss_nats",
    "tokens_total",
    "flops_total",
    "hours",
    "kwh",
    "usd",
    "temperature_c",
    "peak_vram_bytes",
    "optimizer_saving_frac",
]
"""What a published figure can be of: the exponents of L ~ N^-x and, along the frontier, L ~ C^-x; R^2 of the first in
log-log; the slope of one model's loss against its own compute in log-log (below 0); the loss of a rung; what all of it
took; the hottest card; the most memory of a card; what 8-bit optimizer states save of memory."""
OF_A_RUNG = ("slope_c", "loss_nats")
SHARES = ("r2", "optimizer_saving_frac")


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """One number of a published experiment."""

    of: FigureName
    value: float
    rung: str | None = None
    """Of which model, by the name of its rung; None where that was not said or it is of all of them."""
    note: str | None = None
    """What was published beside it, in words."""

    def __post_init__(self) -> None:
        known = get_args(FigureName)
        require(self.of in known, f"a figure of {self.of!r}; wants one of {', '.join(known)}")
        value, name = self.value, f"reference figure {self.of} = {self.value:g}"
        require(math.isfinite(value), f"{name}, wants a finite number")
        if self.of == "slope_c":
            require(value < 0, f"{name}: a loss that falls has a slope below 0")
        else:
            require(value > 0, f"{name}, wants a positive number")
        require(self.of not in SHARES or value <= 1, f"{name}, wants a share of at most 1")
        require(self.of != "loss_nats" or self.rung is not None, f"{name}: name the rung it is of, rung = ...")
        require(
            self.rung is None or self.of in OF_A_RUNG, f"{name} is of the whole experiment; remove rung = {self.rung!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """[reference]: a published experiment that the report sets ours beside; no part of a run's identity."""

    source: str
    """What was published, in words."""
    figures: tuple[PublishedFigure, ...]
    hardware: str | None = None
    """In words; None takes n_cards x card."""
    card: str | None = None
    """The published card by its name in the table of cards (`homelab plan --card`), for its peak and rated power."""
    n_cards: int = 1
    peak_flops: float | None = None
    """FLOP/s of all its cards together; None takes the table's."""
    text: str | None = None
    """Such as OpenWebText; compared with the names of our sources."""
    schedule: str | None = None
    n_models: int | None = None
    n_params: tuple[float, ...] = ()
    """Sizes, or at least the smallest and the largest."""
    count: Literal["total", "body"] = "total"
    """Which parameters these sizes count."""

    def __post_init__(self) -> None:
        require(self.source.strip() != "", "reference.source is empty; say in words what was published")
        require(len(self.figures) > 0, "reference.figures is empty; give at least one, { of = ..., value = ... }")
        counted = Counter((figure.of, figure.rung) for figure in self.figures)
        twice = sorted(of if rung is None else f"{of} of {rung}" for (of, rung), n in counted.items() if n > 1)
        require(not twice, f"reference.figures has {', '.join(twice)} twice")
        require(self.n_cards >= 1, f"reference.n_cards = {self.n_cards}, wants 1 or more")
        for key in ("peak_flops", "n_models"):
            value = getattr(self, key)
            require(value is None or value > 0, f"reference.{key} = {value}, wants a positive number")
        sizes = self.n_params
        require(
            list(sizes) == sorted(set(sizes)) and all(n > 0 for n in sizes),
            f"reference.n_params = {list(sizes)}, wants positive numbers that ascend",
        )
        n = self.n_models
        require(n is None or n >= len(sizes), f"reference.n_models = {n}, but n_params names {len(sizes)} sizes")

    def value(self, of: FigureName) -> float | None:
        """The published number; None where it was not published for the whole experiment."""
        return next((figure.value for figure in self.figures if figure.of == of and figure.rung is None), None)

    @property
    def largest(self) -> float | None:
        """All parameters of the largest model; None where that was not said."""
        return self.n_params[-1] if self.n_params and self.count == "total" else None

    @property
    def machine(self) -> str | None:
        """In words, as far as it was said."""
        return self.hardware or (f"{self.n_cards} x {self.card}" if self.card else None)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A ladder file: one experiment."""

    name: str
    """Names the lab's folder."""
    rungs: tuple[Rung, ...]
    horizons: Horizons
    context_tokens: int = 1024
    tied: bool = True
    seeds: tuple[int, ...] = (0,)
    question: str | None = None
    """What the experiment is to answer, for the report's first line."""
    reference: Reference | None = None
    data: DataTable = field(default_factory=DataTable)
    optim: Optim = field(default_factory=Optim)
    schedule: ScheduleTable = field(default_factory=ScheduleTable)
    lr: LrTable = field(default_factory=LrTable)
    batch: BatchTable = field(default_factory=BatchTable)
    validation: Validation = field(default_factory=Validation)
    train: TrainTable = field(default_factory=TrainTable)
    money: Money = field(default_factory=Money)
    watch: WatchLimits = field(default_factory=WatchLimits)

    def __post_init__(self) -> None:
        require(
            self.name != "" and all(c.isalnum() or c in "._-" for c in self.name) and not self.name.startswith("."),
            f"name {self.name!r}: use letters, digits, dot, dash and underscore (it names a folder)",
        )
        require(len(self.rungs) > 0, "rungs is empty; write at least one [[rungs]] table")
        names = [rung.name for rung in self.rungs]
        twice = sorted({n for n in names if names.count(n) > 1})
        require(not twice, f"rung name {', '.join(twice)} is there twice; names must differ")
        require(self.context_tokens >= 8, f"context_tokens = {self.context_tokens}, wants 8 or more")
        require(len(self.seeds) > 0, "seeds is empty; write at least one, such as [0]")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds = {list(self.seeds)}: an entry is there twice")
        if self.horizons.mode == "nominal":
            without = [rung.name for rung in self.rungs if rung.nominal_tokens is None]
            require(not without, f'horizons.mode = "nominal", but {", ".join(without)} has no nominal_tokens')
