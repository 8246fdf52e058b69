"""One frame of the monitor as plain data: everything a screen says, and nothing about how it looks.

Unknown is None, and a `why` beside it says why; zero is zero.
"""

from dataclasses import dataclass, field
from typing import Literal

from homelab_scaling.plan.timetable import Timetable
from homelab_scaling.watch.link import Level

RunState = Literal[
    "queued",
    "starting",
    "running",
    "slowed",
    "paused",
    "silent",
    "interrupted",
    "finished",
    "stopped",
    "diverged",
    "failed",
    "unreadable",
]
"""`silent`: its process lives and logs nothing; `interrupted`: its record says running and its process is gone."""
ACTIVE: tuple[RunState, ...] = ("starting", "running", "slowed", "paused", "silent")


@dataclass(frozen=True, kw_only=True)
class Span:
    """A guess and its range."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """One place of a loss curve; neighbours may be averaged into it."""

    update: int
    tokens: int
    loss: float
    decay: bool


@dataclass(frozen=True, kw_only=True)
class Held:
    """A validation."""

    tokens: int
    loss_nats: float
    se_nats: float | None
    full: bool
    """Over the whole held-out set, or the small one of the curve."""


@dataclass(frozen=True, kw_only=True)
class LawWord:
    """Whether the run is on the law of the finished ones."""

    verdict: str
    off_frac: float | None
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Over the last log intervals."""

    tokens_per_s: float | None = None
    mfu_frac: float | None = None
    mfu_why: str | None = None
    step_p50_s: float | None = None
    step_p99_s: float | None = None
    n_intervals: int = 0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Energy and money so far, and at the end if it goes on like this."""

    seconds: float | None = None
    """On the bill so far."""
    kwh: float | None = None
    """Of the cards."""
    kwh_end: float | None = None
    kwh_from: str | None = None
    """counter, integrated, or stated watts."""
    kwh_why: str | None = None
    kwh_err_frac: float | None = None
    kwh_wall: float | None = None
    kwh_wall_end: float | None = None
    kwh_wall_err_frac: float | None = None
    joules_per_token: float | None = None
    usd_energy: float | None = None
    usd_energy_end: float | None = None
    usd_machine: float | None = None
    usd_machine_end: float | None = None
    usd_why: str | None = None

    @property
    def usd(self) -> float | None:
        return _sum(self.usd_energy, self.usd_machine)

    @property
    def usd_end(self) -> float | None:
        return _sum(self.usd_energy_end, self.usd_machine_end)


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


@dataclass(frozen=True, kw_only=True)
class NoiseNow:
    """The gradient noise scale of the last window that told something."""

    at_tokens: int
    """Trained by its end."""
    tokens: float | None
    low_tokens: float | None = None
    """Of the 95 % interval."""
    high_tokens: float | None = None
    at_least_tokens: float | None = None
    """Where there is no number."""
    why: str | None = None
    """Why there is none."""


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """What batch.json says of a rung."""

    tokens: float
    low_tokens: float
    high_tokens: float
    basis: str
    """measured, forecast, bound or prior."""
    calibration: str
    """uncalibrated, sweep or branch."""
    c_side: str | None = None
    """at least or at most, where the calibration found but a bound."""
    advised_tokens: int


@dataclass(frozen=True, kw_only=True)
class BatchNow:
    """The batch it trains with at this moment, and how large it might be."""

    tokens: int
    full_tokens: int
    step: int
    """Which of the sizes of a batch warm-up, from 1; the last one is the full batch."""
    n_steps: int
    """1 without a warm-up."""
    noise: NoiseNow | None
    critical: CriticalBatch | None


@dataclass(frozen=True, kw_only=True)
class RunNow:
    """The run in focus."""

    run_id: str
    rung: str
    seed: int | None
    n_params: int | None
    state: RunState
    reason: str | None
    phase: str
    """In words: trunk to 640M, decay to 640M; empty where unknown."""
    update: int
    n_updates: int | None
    """None where nobody said how long it will be (another trainer's run)."""
    tokens_done: int
    """Trained, decays included."""
    tokens_total: int | None
    n_rows: int
    n_rows_planned: int | None
    left_s: Span | None
    left_why: str | None
    milestone: str | None
    """What the run itself comes to next."""
    milestone_s: float | None
    loss_nats: float | None
    lr: float | None
    curve: tuple[Point, ...]
    held_curve: tuple[Held, ...]
    held: Held | None
    law: LawWord
    speed: Speed
    batch_tokens: int | None
    """Of one step; during a batch warm-up several updates share it."""
    noise_scale_tokens: float | None
    """None until it is measured."""
    batch: BatchNow | None
    vram_bytes: int | None
    """Peak that the trainer allocated on its main rank's card."""
    cost: Cost
    device: str | None
    n_processes: int
    logged_s: float | None
    """When it last wrote a metric."""
    saved_s: float | None
    """When it last wrote a checkpoint."""
    paused_s: float | None
    paced_s: float | None

    @property
    def done_frac(self) -> float | None:
        return self.update / self.n_updates if self.n_updates else None


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One line of the list of runs."""

    run_id: str
    rung: str
    seed: int | None
    n_params: int | None
    state: RunState
    reason: str | None
    done_frac: float | None
    n_rows: int
    n_rows_planned: int | None
    loss_nats: float | None
    loss_from: Literal["row", "validation", "training"] | None
    seconds: float | None
    """Spent so far."""
    seconds_planned: float | None
    kwh: float | None
    usd: float | None


@dataclass(frozen=True, kw_only=True)
class CardNow:
    """One card: the facts, the last reading, and what the watchdog makes of it."""

    uuid: str
    index: int | None
    name: str
    state: Literal["ok", "lost", "error"]
    error: str | None
    temperature_c: float | None
    slowdown_c: float
    slowdown_assumed: bool
    power_w: float | None
    power_limit_w: float | None
    sm_clock_mhz: float | None
    sm_clock_max_mhz: float | None
    vram_bytes: int | None
    vram_used_bytes: int | None
    vram_reserved_bytes: int | None
    vram_peak_bytes: int | None
    utilisation_frac: float | None
    fan_frac: float | None
    reasons: tuple[str, ...] | None
    throttled_frac: dict[str, float]
    lost_clock_frac: float | None
    level: Level
    duty: float
    reason: str
    health: str
    history: tuple[tuple[float, float], ...]
    """(seconds before now, temperature) of the last ten minutes, oldest first."""
    slope_c_per_min: float | None
    """None where it cannot be told; 0 where it is steady."""
    missing: dict[str, str] = field(default_factory=dict)
    runs: tuple[str, ...] = ()

    @property
    def headroom_c(self) -> float | None:
        return None if self.temperature_c is None else self.slowdown_c - self.temperature_c


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that happened, for the list of transitions."""

    t_s: float
    who: str
    text: str
    level: Level


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """Whether anybody guards the cards."""

    state: Literal["alive", "silent", "none", "recording", "direct"]
    """`silent`: its status is stale; `direct`: no watchdog, the monitor asks the driver itself."""
    level: Level
    """The most urgent of all cards."""
    age_s: float | None
    """Of the last reading."""
    interval_s: float | None
    poll_p50_s: float | None
    poll_p99_s: float | None
    pid: int | None
    sensor_error: str | None
    moments: tuple[Moment, ...]
    """Newest last."""
    n_runs: int


@dataclass(frozen=True, kw_only=True)
class LadderNow:
    """The whole ladder."""

    name: str
    path: str
    question: str | None
    n_runs: int
    n_finished: int
    left_s: Span | None
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One look at a lab and its machine."""

    t_s: float
    lab: str
    ladder: LadderNow | None
    run: RunNow | None
    rungs: tuple[Rung, ...]
    cards: tuple[CardNow, ...]
    watchdog: Watchdog
    ahead: str
    """What would be done next, in a sentence."""
    notes: tuple[str, ...]
    """What could not be read, in sentences."""
    replay: str | None = None
    """Of which recording this is, and how fast."""
    timetable: Timetable | None = None
    """Of a driver that is at work on several slots."""
