"""The truth about an experiment, as frozen dataclasses: what a person writes (Ladder), what a run is (RunSpec).

A `Ladder` is read from a short TOML file. The planner turns it and a corpus manifest into `RunSpec`s. A RunSpec has two
halves: `ScienceSpec`, whose hash names the run and which never changes, and `ExecutionSpec`, which may change between
segments of one run without changing its result. Every class checks itself when made and says found, wanted, what to do.
"""

from dataclasses import dataclass, field
from typing import Literal

from homelab_scaling.codec import stable_hash
from homelab_scaling.errors import SpecError

Precision = Literal["bf16", "fp32"]
OptimizerName = Literal["adamw", "adamw8bit"]
ScheduleName = Literal["wsd", "cosine"]

MAX_WARMUP_FRAC = 0.10
MAX_CURVE_POINTS_PER_ROW = 20


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise SpecError(message)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A GPT-2 shape; the feed-forward width is 4 d_model, as in Hugging Face's GPT2Config default."""

    n_layer: int
    d_model: int
    n_head: int
    context_tokens: int
    tied: bool = True
    """Whether the output head shares the token embedding's matrix (GPT-2 does)."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "d_model", "n_head", "context_tokens"):
            value = getattr(self, name)
            _check(value >= 1, f"{name} = {value}, wants 1 or more")
        _check(
            self.d_model % self.n_head == 0,
            f"d_model {self.d_model} does not divide by n_head {self.n_head}; choose n_head among its divisors",
        )


# ---------------------------------------------------------------------------------------------- what a person writes


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
    """Stop reading text after this many bytes; None reads everything."""
    max_epochs: float = 4.0
    """The plan refuses a run that would pass over the training text more often than this."""

    def __post_init__(self) -> None:
        _check(len(self.sources) > 0, "data.sources is empty; name at least one file, folder, python or hf:NAME")
        _check(0 < self.val_frac < 0.5, f"data.val_frac = {self.val_frac}, wants a share between 0 and 0.5")
        _check(
            self.max_bytes is None or self.max_bytes > 0, f"data.max_bytes = {self.max_bytes}, wants a positive number"
        )
        _check(self.max_epochs > 0, f"data.max_epochs = {self.max_epochs}, wants a positive number")


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
        _check(
            self.name != "" and all(c.isalnum() or c in "._-" for c in self.name),
            f"rung name {self.name!r}: use letters, digits, dot, dash and underscore (it names a folder)",
        )
        _check(
            (given == 3 and self.n_params_target is None) or (given == 0 and self.n_params_target is not None),
            f"rung {self.name}: give either n_layer, d_model and n_head, or n_params_target alone",
        )
        for key in ("n_layer", "d_model", "n_head", "n_params_target", "lr_peak", "batch_tokens", "nominal_tokens"):
            value = getattr(self, key)
            _check(value is None or value > 0, f"rung {self.name}: {key} = {value}, wants a positive number")


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
        _check(
            len(given) == 1,
            f"horizons: found {' and '.join(given) or 'none'}; give exactly one of {', '.join(lists)}",
        )
        for key, values in lists.items():
            _check(all(v > 0 for v in values), f"horizons.{key} = {list(values)}: every entry must be positive")
            _check(len(set(values)) == len(values), f"horizons.{key} = {list(values)}: an entry is there twice")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """[optim]: decoupled weight decay on matrices only; gradient clipping by global norm."""

    name: OptimizerName = "adamw"
    """`adamw` is torch's fused AdamW; `adamw8bit` is bitsandbytes', with the token embedding's states in 32 bit."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            _check(0 <= value < 1, f"optim.{key} = {value}, wants 0 or more and less than 1")
        _check(self.eps > 0, f"optim.eps = {self.eps}, wants a positive number")
        _check(self.weight_decay >= 0, f"optim.weight_decay = {self.weight_decay}, wants 0 or more")
        _check(self.grad_clip > 0, f"optim.grad_clip = {self.grad_clip}, wants a positive number")


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
        _check(
            0 <= self.warmup_frac <= MAX_WARMUP_FRAC,
            f"schedule.warmup_frac = {self.warmup_frac}, wants 0 to {MAX_WARMUP_FRAC} (of the smallest horizon); "
            "a longer warm-up bends the law at small budgets",
        )
        _check(0 < self.decay_frac <= 0.9, f"schedule.decay_frac = {self.decay_frac}, wants more than 0, at most 0.9")
        _check(0 <= self.lr_final_frac < 1, f"schedule.lr_final_frac = {self.lr_final_frac}, wants 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class LrTable:
    """[lr]: the peak learning rate of each rung."""

    rule: Literal["fixed", "power", "step-law"] = "power"
    """`fixed`: peak for all. `power`: peak * (n_body / at_body_params) ** exponent. `step-law`: Step Law 2025."""
    peak: float = 3e-3
    at_body_params: float = 1e6
    exponent: float = -0.25

    def __post_init__(self) -> None:
        _check(self.peak > 0, f"lr.peak = {self.peak}, wants a positive number")
        _check(self.at_body_params > 0, f"lr.at_body_params = {self.at_body_params}, wants a positive number")
        _check(-1 <= self.exponent <= 0, f"lr.exponent = {self.exponent}, wants -1 to 0 (larger models want less)")


@dataclass(frozen=True, kw_only=True)
class BatchTable:
    """[batch]: the global batch of every rung."""

    tokens: int | None = None
    """Tokens per optimizer step over all ranks; None takes the Step Law batch of the rung's largest horizon."""

    def __post_init__(self) -> None:
        _check(self.tokens is None or self.tokens > 0, f"batch.tokens = {self.tokens}, wants a positive number")


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
        _check(self.full_tokens > 0, f"validation.full_tokens = {self.full_tokens}, wants a positive number")
        _check(
            0 < self.curve_tokens <= self.full_tokens,
            f"validation.curve_tokens = {self.curve_tokens}, wants 1 to full_tokens ({self.full_tokens})",
        )
        _check(
            0 <= self.curve_points_per_row <= MAX_CURVE_POINTS_PER_ROW,
            f"validation.curve_points_per_row = {self.curve_points_per_row}, wants 0 to {MAX_CURVE_POINTS_PER_ROW}",
        )
        _check(
            self.curve_every_steps is None or self.curve_every_steps > 0,
            f"validation.curve_every_steps = {self.curve_every_steps}, wants a positive number",
        )


@dataclass(frozen=True, kw_only=True)
class Money:
    """[money]: what energy and machine time cost; None where unknown, and then no money is reported."""

    usd_per_kwh: float | None = None
    usd_per_machine_hour: float | None = None

    def __post_init__(self) -> None:
        for key in ("usd_per_kwh", "usd_per_machine_hour"):
            value = getattr(self, key)
            _check(value is None or value >= 0, f"money.{key} = {value}, wants 0 or more")


@dataclass(frozen=True, kw_only=True)
class TrainTable:
    """[train]: how runs are executed; only `precision` is part of a run's identity."""

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
    log_every_steps: int = 10
    """How often the host reads the device: losses, commands, the non-finite flag."""
    checkpoint_every_s: float = 600.0
    """A checkpoint at the first log boundary after this many seconds."""
    checkpoint_every_steps: int | None = None
    """A checkpoint every this many steps as well."""

    def __post_init__(self) -> None:
        for key in ("processes", "microbatch_seqs_per_rank", "log_every_steps", "checkpoint_every_steps"):
            value = getattr(self, key)
            _check(value is None or value >= 1, f"train.{key} = {value}, wants 1 or more")
        _check(self.checkpoint_every_s > 0, f"train.checkpoint_every_s = {self.checkpoint_every_s}, wants over 0")


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
    data: DataTable = field(default_factory=DataTable)
    optim: Optim = field(default_factory=Optim)
    schedule: ScheduleTable = field(default_factory=ScheduleTable)
    lr: LrTable = field(default_factory=LrTable)
    batch: BatchTable = field(default_factory=BatchTable)
    validation: Validation = field(default_factory=Validation)
    train: TrainTable = field(default_factory=TrainTable)
    money: Money = field(default_factory=Money)

    def __post_init__(self) -> None:
        _check(
            self.name != "" and all(c.isalnum() or c in "._-" for c in self.name) and not self.name.startswith("."),
            f"name {self.name!r}: use letters, digits, dot, dash and underscore (it names a folder)",
        )
        _check(len(self.rungs) > 0, "rungs is empty; write at least one [[rungs]] table")
        names = [rung.name for rung in self.rungs]
        twice = sorted({n for n in names if names.count(n) > 1})
        _check(not twice, f"rung name {', '.join(twice)} is there twice; names must differ")
        _check(self.context_tokens >= 8, f"context_tokens = {self.context_tokens}, wants 8 or more")
        _check(len(self.seeds) > 0, "seeds is empty; write at least one, such as [0]")
        _check(len(set(self.seeds)) == len(self.seeds), f"seeds = {list(self.seeds)}: an entry is there twice")
        if self.horizons.mode == "nominal":
            without = [rung.name for rung in self.rungs if rung.nominal_tokens is None]
            _check(not without, f'horizons.mode = "nominal", but {", ".join(without)} has no nominal_tokens')


# ---------------------------------------------------------------------------------------------------- what the text is


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One .bin file of tokens."""

    name: str
    n_tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the held-out half of a corpus."""

    files: tuple[ShardFile, ...]
    """In reading order; the token stream is their concatenation."""
    n_tokens: int
    n_bytes: int | None
    """UTF-8 bytes of the text behind the tokens; None for foreign shards that never said."""
    n_documents: int | None

    @property
    def fingerprint(self) -> str:
        """Hash over the files' hashes: the same tokens in the same order."""
        return stable_hash([file.sha256 for file in self.files])


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """manifest.json: what the shards of a folder hold."""

    tokenizer: str
    """As asked for: bytes, bpe:2048, gpt2 or a file's name."""
    tokenizer_file: str | None
    """tokenizer.json beside the shards; None where the tokenizer has no file (bytes, foreign shards)."""
    tokenizer_hash: str
    n_vocab: int
    eot_id: int | None
    """The token that ends every document; None where a foreign corpus has none."""
    dtype: Literal["uint16", "uint32"]
    header_bytes: int = 0
    """Bytes before the first token of each file (llm.c: 1024)."""
    train: Split
    val: Split
    sources: tuple[str, ...]
    held_out_rule: str
    """In words: how the held-out documents were chosen."""
    n_duplicates_dropped: int = 0

    @property
    def data_id(self) -> str:
        """Short name of text and tokenizer; losses with different data_id do not compare."""
        return stable_hash([self.tokenizer_hash, self.train.fingerprint, self.val.fingerprint], n_chars=12)


# ------------------------------------------------------------------------------------------------------ what a run is


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A resolved learning-rate schedule; every length is in tokens."""

    name: ScheduleName
    lr_peak: float
    warmup_tokens: int
    decay_frac: float
    lr_final_frac: float

    def __post_init__(self) -> None:
        _check(self.lr_peak > 0, f"schedule.lr_peak = {self.lr_peak}, wants a positive number")
        _check(self.warmup_tokens >= 0, f"schedule.warmup_tokens = {self.warmup_tokens}, wants 0 or more")


@dataclass(frozen=True, kw_only=True)
class ScienceSpec:
    """Everything that decides a run's result; its hash is the run's identity."""

    shape: ModelShape
    n_vocab: int
    """Real vocabulary; the padding to a multiple of 64 is masked and never counted."""
    tokenizer_hash: str
    train_fingerprint: str
    val_fingerprint: str
    horizons_tokens: tuple[int, ...]
    """Ascending; each a whole number of batches; one row each."""
    batch_tokens_global: int
    schedule: Schedule
    optim: Optim
    precision: Precision
    seed: int
    val_tokens: int
    """Size of the full validation set, in tokens."""

    def __post_init__(self) -> None:
        horizons = self.horizons_tokens
        _check(len(horizons) > 0, "horizons_tokens is empty")
        _check(list(horizons) == sorted(set(horizons)), f"horizons_tokens {list(horizons)} must ascend")
        _check(self.n_vocab >= 2, f"n_vocab = {self.n_vocab}, wants 2 or more")
        _check(
            self.batch_tokens_global % self.shape.context_tokens == 0,
            f"batch of {self.batch_tokens_global} tokens is not a whole number of {self.shape.context_tokens}-token "
            "sequences",
        )
        for tokens in horizons:
            _check(
                tokens % self.batch_tokens_global == 0,
                f"horizon of {tokens} tokens is not a whole number of {self.batch_tokens_global}-token batches",
            )
        _check(
            self.schedule.warmup_tokens <= MAX_WARMUP_FRAC * horizons[0] + self.batch_tokens_global,
            f"warm-up of {self.schedule.warmup_tokens} tokens exceeds a tenth of the smallest horizon ({horizons[0]})",
        )
        _check(
            self.schedule.name == "wsd" or len(horizons) == 1,
            f"a {self.schedule.name} run has one horizon, found {len(horizons)}",
        )

    @property
    def batch_seqs_global(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.batch_tokens_global // self.shape.context_tokens

    @property
    def hash(self) -> str:
        """SHA-256 over every field."""
        return stable_hash(self)


@dataclass(frozen=True, kw_only=True)
class ExecutionSpec:
    """How a segment of a run is executed; may differ from segment to segment, never hashed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    n_processes: int = 1
    microbatch_seqs_per_rank: int = 1
    compile: Literal["auto", "on", "off"] = "auto"
    loss: Literal["auto", "chunked", "plain"] = "auto"
    log_every_steps: int = 10
    checkpoint_every_s: float = 600.0
    checkpoint_every_steps: int | None = None
    curve_tokens: int = 100_000
    curve_every_tokens: int | None = None
    """Cadence of the validation curve; None measures no curve."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    predicted_s: float | None = None
    """The plan's guess of the whole run's seconds, for the compile rule and the progress bar."""

    def __post_init__(self) -> None:
        for key in ("n_processes", "microbatch_seqs_per_rank", "log_every_steps"):
            value = getattr(self, key)
            _check(value >= 1, f"execution.{key} = {value}, wants 1 or more")

    def accumulation_steps(self, science: ScienceSpec) -> int:
        """Forward passes per rank and optimizer step; SpecError if the batch does not divide."""
        per_pass = self.n_processes * self.microbatch_seqs_per_rank
        if science.batch_seqs_global % per_pass:
            raise SpecError(
                f"a batch of {science.batch_seqs_global} sequences does not split into {self.n_processes} ranks x "
                f"{self.microbatch_seqs_per_rank} sequences; choose a divisor"
            )
        return science.batch_seqs_global // per_pass


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """spec.json: one launch of the trainer."""

    run_id: str
    ladder: str
    rung: str
    science: ScienceSpec
    execution: ExecutionSpec
    shards: str
    """Folder of train.bin, val.bin and manifest.json: absolute, or relative to the run's folder."""
    money: Money = field(default_factory=Money)

    def __post_init__(self) -> None:
        wanted = make_run_id(self.rung, self.science)
        _check(
            self.run_id == wanted,
            f"run_id {self.run_id} does not match its science spec ({wanted}); the file was edited, plan again",
        )
        self.execution.accumulation_steps(self.science)


def make_run_id(rung: str, science: ScienceSpec) -> str:
    """Readable prefix and short hash of the science: same science, same folder."""
    horizon = f"-d{_short(science.horizons_tokens[-1])}" if science.schedule.name == "cosine" else ""
    return f"{rung}{horizon}-s{science.seed}-{science.hash[:8]}"


def _short(n: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return str(n)
