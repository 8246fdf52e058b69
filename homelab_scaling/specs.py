"""What a run is, as frozen dataclasses: its science, its execution, and the corpus it reads.

The planner turns a `Ladder` (ladder.py, what a person writes) and a corpus manifest into `RunSpec`s. A RunSpec has two
halves: `ScienceSpec`, whose hash names the run and which never changes, and `ExecutionSpec`, which may change between
segments of one run without changing its result. Every class checks itself when made and says found, wanted, what to do.
"""

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

from homelab_scaling.codec import stable_hash, to_plain
from homelab_scaling.errors import SpecError

Precision = Literal["bf16", "fp32"]
OptimizerName = Literal["adamw", "adamw8bit"]
ScheduleName = Literal["wsd", "cosine"]
GradientComm = Literal["fp32", "bf16"]
"""What gradients travel as between ranks."""
Sharding = Literal["none", "grad-op", "full"]
"""What FSDP splits over the ranks: nothing (DDP), gradients and optimizer states, or the weights too."""

CompileMode = Literal["default", "reduce-overhead"]
"""Of torch.compile: `reduce-overhead` replays CUDA graphs, for steps that wait for kernel launches."""

MAX_WARMUP_FRAC = 0.10
LATER_FIELDS = frozenset({"batch_warmup", "start"})
"""Of ScienceSpec; None in runs that were named before they existed."""
NEARLY_AS_GOOD_EPOCHS = 4
"""Source: Muennighoff et al. 2023, "Scaling data-constrained language models": up to here repeated text is nearly as
good as new text, later ever less, and after some 40 passes it adds nothing."""


def require(ok: bool, message: str) -> None:
    """SpecError with this message unless `ok`."""
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
            require(value >= 1, f"{name} = {value}, wants 1 or more")
        require(
            self.d_model % self.n_head == 0,
            f"d_model {self.d_model} does not divide by n_head {self.n_head}; choose n_head among its divisors",
        )


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
            require(0 <= value < 1, f"optim.{key} = {value}, wants 0 or more and less than 1")
        require(self.eps > 0, f"optim.eps = {self.eps}, wants a positive number")
        require(self.weight_decay >= 0, f"optim.weight_decay = {self.weight_decay}, wants 0 or more")
        require(self.grad_clip > 0, f"optim.grad_clip = {self.grad_clip}, wants a positive number")


@dataclass(frozen=True, kw_only=True)
class Money:
    """[money]: what energy and machine time cost; None where unknown, and then no money is reported."""

    usd_per_kwh: float | None = None
    usd_per_machine_hour: float | None = None
    watts: float | None = None
    """Stated power of the whole machine while it trains; used, and labelled so, only where no sensor measures it."""

    def __post_init__(self) -> None:
        for key in ("usd_per_kwh", "usd_per_machine_hour", "watts"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"money.{key} = {value}, wants 0 or more")

    def shared(self, frac: float) -> "Money":
        """Of a share of the machine; a kilowatt-hour costs what it costs."""
        per_hour, watts = self.usd_per_machine_hour, self.watts
        return replace(
            self,
            usd_per_machine_hour=None if per_hour is None else frac * per_hour,
            watts=None if watts is None else frac * watts,
        )


@dataclass(frozen=True, kw_only=True)
class WatchLimits:
    """[watch]: when the watchdog acts. Temperatures are degrees below the card's own slowdown limit."""

    enabled: bool = True
    """Whether `homelab run` and the recipe start a watchdog and obey it."""
    interval_s: float = 1.0
    """Between two polls of the sensors."""
    slowdown_c: float = 90.0
    """Assumed where a card does not tell its own."""
    warn_below_c: float = 12.0
    slow_below_c: float = 8.0
    slow_after_s: float = 15.0
    """How long it must be that hot before training is slowed."""
    pause_below_c: float = 3.0
    resume_below_c: float = 25.0
    resume_after_s: float = 30.0
    recover_below_c: float = 15.0
    recover_after_s: float = 120.0
    """Below `recover_below_c` for this long, pacing is eased by one step."""
    min_hold_s: float = 30.0
    """No level is lowered before it was held this long."""
    duty_step_down: float = 0.10
    duty_step_up: float = 0.05
    duty_min: float = 0.20
    move_every_s: float = 60.0
    """At most one step of pacing in this time."""
    max_pauses: int = 3
    """More within `pauses_within_s` is a stop."""
    pauses_within_s: float = 1800.0
    alarm_after_s: float = 10.0
    """A hardware-thermal or power-brake bit held this long is a stop."""
    vram_warn_frac: float = 0.95
    throttle_warn_frac: float = 0.05
    """Share of ten minutes under software-thermal throttling that is worth a warning."""
    hang_kill_s: float = 180.0
    """After a card is lost, how long its runs may take to end before they are ended."""

    def __post_init__(self) -> None:
        order = ("resume_below_c", "recover_below_c", "warn_below_c", "slow_below_c", "pause_below_c")
        values = [getattr(self, key) for key in order]
        require(
            all(a > b for a, b in itertools.pairwise(values)) and values[-1] > 0,
            f"watch: {', '.join(f'{k} = {v:g}' for k, v in zip(order, values, strict=True))} must fall in this order, "
            "all above 0",
        )
        for key in ("interval_s", "move_every_s", "hang_kill_s", "resume_after_s", "recover_after_s"):
            require(getattr(self, key) > 0, f"watch.{key} = {getattr(self, key)}, wants a positive number")
        for key in ("slow_after_s", "alarm_after_s", "pauses_within_s", "min_hold_s"):
            require(getattr(self, key) >= 0, f"watch.{key} = {getattr(self, key)}, wants 0 or more")
        require(40 <= self.slowdown_c <= 120, f"watch.slowdown_c = {self.slowdown_c}, wants 40 to 120")
        for key in ("duty_step_down", "duty_step_up", "duty_min", "vram_warn_frac", "throttle_warn_frac"):
            require(0 < getattr(self, key) <= 1, f"watch.{key} = {getattr(self, key)}, wants more than 0, at most 1")
        require(self.max_pauses >= 0, f"watch.max_pauses = {self.max_pauses}, wants 0 or more")


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


def check_mixture(
    n_sources: int,
    *,
    weights: tuple[float, ...] = (),
    epochs: tuple[float, ...] = (),
    near_duplicates: float | None = None,
    table: str = "",
) -> None:
    """Raises SpecError unless these say how to mix so many sources; `table` is what the keys are called by."""
    require(
        not (weights and epochs), f"found both {table}weights and {table}epochs; give one of them, the other follows"
    )
    for key, values in (("weights", weights), ("epochs", epochs)):
        said = f"{table}{key} = {list(values)}"
        require(
            len(values) in (0, n_sources), f"{said}, wants one number for each of the {n_sources} sources, in order"
        )
        require(
            all(0 < value < math.inf for value in values),
            f"{said}, wants positive numbers; leave out a source that is not wanted",
        )
    require(
        near_duplicates is None or 0 < near_duplicates <= 1,
        f"{table}near_duplicates = {near_duplicates}, wants a Jaccard similarity above 0 and at most 1, such as 0.8",
    )


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What one source gave to a corpus: its row in the table of the mixture."""

    name: str
    """The source as it was asked for."""
    weight: float | None = None
    """Part of the training bytes asked for, all weights together being 1; None where none was."""
    epochs_asked: float | None = None
    """Times its training text was asked for; None where that was not said."""
    epochs: float
    """Times its training text stands in the training half, by bytes; below 1 some of it was left out."""
    n_documents: int
    """Different training documents."""
    n_bytes: int
    """Of training text, repetitions counted."""
    n_tokens: int
    """Of the training half, repetitions counted."""
    n_tokens_unique: int
    """The same, each document counted once."""
    n_val_documents: int
    n_val_tokens: int
    n_exact_duplicates: int
    """Documents dropped because the same text had come before, here or in another source."""
    n_near_duplicates: int = 0
    """Documents dropped because they say nearly what another one says."""


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
    """Exact duplicates."""
    near_duplicates: float | None = None
    """Documents this similar (Jaccard, data/near_duplicates.py) to another one were dropped; None: not looked for."""
    mixture: tuple[SourceShare, ...] = ()
    """One per source, in order; empty in manifests from before it existed and for token files of other projects."""

    @property
    def n_tokens_unique(self) -> int:
        """Tokens of the training half, each document counted once."""
        return sum(share.n_tokens_unique for share in self.mixture) or self.train.n_tokens

    def unique_tokens(self, n_tokens: int) -> int:
        """Different tokens among the first `n_tokens` of training, in expectation where documents stand there twice.

        Windows are visited in a random order, so a document that stands there k times has been met after a share f of
        the stream with probability 1 - (1 - f)^k.
        """
        left = 1 - min(1.0, n_tokens / self.train.n_tokens)
        if not self.mixture:
            return min(n_tokens, self.train.n_tokens)
        met = 0.0
        for share in self.mixture:
            if share.n_tokens_unique:
                k, n_more = divmod(share.n_tokens, share.n_tokens_unique)
                met += n_more * (1 - left ** (k + 1)) + (share.n_tokens_unique - n_more) * (1 - left**k)
        return min(n_tokens, round(met))

    @property
    def data_id(self) -> str:
        """Short name of text and tokenizer; losses with different data_id do not compare."""
        return stable_hash([self.tokenizer_hash, self.train.fingerprint, self.val.fingerprint], n_chars=12)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A resolved learning-rate schedule; every length is in tokens."""

    name: ScheduleName
    lr_peak: float
    warmup_tokens: int
    decay_frac: float
    lr_final_frac: float

    def __post_init__(self) -> None:
        require(self.lr_peak > 0, f"schedule.lr_peak = {self.lr_peak}, wants a positive number")
        require(self.warmup_tokens >= 0, f"schedule.warmup_tokens = {self.warmup_tokens}, wants 0 or more")


@dataclass(frozen=True, kw_only=True)
class BatchWarmup:
    """A batch that starts small and doubles up to the run's own batch while the measured noise scale allows it.

    A step stays one full batch of tokens; during the warm-up it is cut into 2^k optimizer updates, each at the rate
    times sqrt(its batch / the full batch). So tokens, horizons and the order of the text do not depend on the warm-up.
    """

    from_tokens: int
    """The first batch [tokens]; the full batch is a power of two times it."""
    grow_at: float = 2.0
    """Doubled when the noise scale passes this many times the present batch (Merrill et al. 2025)."""

    def __post_init__(self) -> None:
        require(self.from_tokens >= 1, f"batch_warmup.from_tokens = {self.from_tokens}, wants 1 or more")
        require(self.grow_at > 0, f"batch_warmup.grow_at = {self.grow_at}, wants a positive number")


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
    batch_warmup: BatchWarmup | None = None
    start: str | None = None
    """SHA-256 of the weights that training begins from (export/start.py); None begins from random ones."""

    def __post_init__(self) -> None:
        horizons = self.horizons_tokens
        require(len(horizons) > 0, "horizons_tokens is empty")
        require(list(horizons) == sorted(set(horizons)), f"horizons_tokens {list(horizons)} must ascend")
        require(self.n_vocab >= 2, f"n_vocab = {self.n_vocab}, wants 2 or more")
        require(
            self.batch_tokens_global % self.shape.context_tokens == 0,
            f"batch of {self.batch_tokens_global} tokens is not a whole number of {self.shape.context_tokens}-token "
            "sequences",
        )
        for tokens in horizons:
            require(
                tokens % self.batch_tokens_global == 0,
                f"horizon of {tokens} tokens is not a whole number of {self.batch_tokens_global}-token batches",
            )
        require(
            self.schedule.warmup_tokens <= MAX_WARMUP_FRAC * horizons[0] + self.batch_tokens_global,
            f"warm-up of {self.schedule.warmup_tokens} tokens exceeds a tenth of the smallest horizon ({horizons[0]})",
        )
        require(
            self.schedule.name == "wsd" or len(horizons) == 1,
            f"a {self.schedule.name} run has one horizon, found {len(horizons)}",
        )
        if (warmup := self.batch_warmup) is not None:
            n_first, rest = divmod(self.batch_tokens_global, warmup.from_tokens)
            require(
                rest == 0 and n_first & (n_first - 1) == 0 and warmup.from_tokens % self.shape.context_tokens == 0,
                f"batch warm-up from {warmup.from_tokens} tokens to {self.batch_tokens_global}: wants sequences of "
                f"{self.shape.context_tokens} tokens, whole ones, that reach the full batch by doubling",
            )
            require(
                warmup.from_tokens > self.shape.context_tokens,
                f"batch warm-up from {warmup.from_tokens} tokens: wants 2 sequences or more, noise shows only between",
            )

    @property
    def batch_seqs_global(self) -> int:
        """Sequences per optimizer step over all ranks."""
        return self.batch_tokens_global // self.shape.context_tokens

    @property
    def hash(self) -> str:
        """SHA-256 over every field; one that came later and is not used does not rename the runs from before it."""
        plain = to_plain(self)
        return stable_hash({k: v for k, v in plain.items() if v is not None or k not in LATER_FIELDS})


@dataclass(frozen=True, kw_only=True)
class ExecutionSpec:
    """How a segment of a run is executed; may differ from segment to segment, never hashed."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    n_processes: int = 1
    microbatch_seqs_per_rank: int = 1
    compile: Literal["auto", "on", "off"] = "auto"
    compile_mode: CompileMode = "default"
    loss: Literal["auto", "chunked", "plain"] = "auto"
    log_every_steps: int = 10
    checkpoint_every_s: float = 600.0
    checkpoint_every_steps: int | None = None
    curve_tokens: int = 100_000
    curve_every_tokens: int | None = None
    """Cadence of the validation curve; None measures no curve."""
    noise_every_steps: int | None = None
    """The gradient noise scale is measured on every so-many-th optimizer update; None never."""
    activation_checkpointing: bool = False
    """Blocks keep their inputs alone and are computed again on the way back: less memory, about a third more time."""
    sharding: Sharding = "none"
    ddp_comm: GradientComm = "fp32"
    """bf16 halves the traffic and rounds every gradient, and their sum, to 8 significant bits before the update. It is
    the one execution setting that changes numbers beyond the order of a sum, so it is never chosen for you.
    """
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    predicted_s: float | None = None
    """The plan's guess of the whole run's seconds, for the compile rule and the progress bar."""
    machine_frac: float = 1.0
    """Share of the machine that is this run's while others train beside it: of machine time, of stated watts, and of
    what the machine takes without its cards."""
    start_from: str | None = None
    """Folder of the model whose weights `ScienceSpec.start` names; not needed any more once there is a checkpoint."""

    def __post_init__(self) -> None:
        for key in ("n_processes", "microbatch_seqs_per_rank", "log_every_steps"):
            value = getattr(self, key)
            require(value >= 1, f"execution.{key} = {value}, wants 1 or more")
        require(
            0 < self.machine_frac <= 1, f"execution.machine_frac = {self.machine_frac}, wants more than 0, at most 1"
        )
        every = self.noise_every_steps
        require(every is None or every >= 1, f"execution.noise_every_steps = {every}, wants 1 or more")

    @property
    def start_name(self) -> str | None:
        """Of `start_from`, as people call it: a model's name on the hub, or its folder's."""
        if self.start_from is None:
            return None
        *_, in_cache, snapshots, folder = ("", "", "", *self.start_from.rstrip("/").split("/"))
        is_hub = snapshots == "snapshots" and in_cache.startswith("models--")
        return in_cache.removeprefix("models--").replace("--", "/") if is_hub else folder

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
    watch: WatchLimits = field(default_factory=WatchLimits)

    @property
    def own_money(self) -> Money:
        """[money] for this run's share of the machine: what two runs at a time are billed adds up to one machine."""
        return self.money.shared(self.execution.machine_frac)

    def __post_init__(self) -> None:
        wanted = make_run_id(self.rung, self.science)
        require(
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
