"""Run folders and their records: the files that are the database.

    LAB/<ladder>/runs/<run_id>/{spec.json, metrics.jsonl, events.jsonl, checkpoints/, tensorboard/, record.json}

Every run writes only its own folder. record.json is the truth about how a run ended; runs.csv is derived from the
records and can be rebuilt at any time. No row vanishes silently: what is not a point is an `Excluded` with its reason.
"""

import csv
import dataclasses
import fcntl
import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.specs import RunSpec

RunStatus = Literal["running", "finished", "stopped", "diverged", "failed"]
StoppedBy = Literal["signal", "watchdog", "memory"]
BRACKET_RUNS = "bracket_runs"
"""Folder of the trials of learning rates: ordinary runs that are no part of the ladder's results."""
RUNS_FOLDERS = ("runs", BRACKET_RUNS)
"""Of LAB/<ladder>, where runs lie."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One finished decay: a (N, D, loss) point with everything needed to judge it. One line of runs.csv.

    `flops`, `seconds`, `kwh` and `usd` are as if this row had been run alone; the `_marginal` ones sum to the bill of
    the trunk. What the watchdog made the run wait (pauses, sleep between steps) is not in `seconds` nor in the price of
    machine time. Unknown is None, and the record's `unknown` table says why.
    """

    row_id: str
    """run_id@n_tokens."""
    run_id: str
    rung: str
    seed: int
    n_params: int
    n_tokens: int
    loss_nats: float
    """Mean over the full validation set, nats per token."""
    loss_se_nats: float | None
    """Standard error over held-out documents (sampling of text, not of seeds)."""
    bpb: float | None
    """Bits per UTF-8 byte of the same text."""
    flops: float
    """Exact training FLOPs: causal attention, head included, padding excluded."""
    flops_marginal: float
    n_body: int | None
    n_pos: int | None
    n_embed: int | None
    n_head: int | None
    n_steps: int
    batch_tokens: int
    lr_peak: float | None
    schedule: str
    decayed: bool
    """Whether the learning rate reached its final value; always true for a written row."""
    optimizer: str
    precision: str
    data_id: str
    n_tokens_unique: int
    """Distinct training tokens seen: min(n_tokens, tokens of the corpus)."""
    seconds: float | None
    """Wall time as if alone, start-up, validation and checkpoints included."""
    seconds_marginal: float | None
    tokens_per_s: float | None
    mfu_frac: float | None
    kwh: float | None = None
    """Of the cards, measured; of the whole machine where it is computed from stated watts."""
    kwh_marginal: float | None = None
    kwh_from: Literal["counter", "integrated", "stated watts"] | None = None
    """The cards' energy counters, the trapezoid of their power, or [money] watts times seconds."""
    kwh_err_frac: float | None = None
    """Stated relative error of `kwh`; None for stated watts."""
    kwh_unmetered_frac: float | None = None
    """Share of the time that no sensor saw, filled in at the mean power of the rest."""
    kwh_wall: float | None = None
    """At the plug: watch.energy.WallModel of `kwh`."""
    kwh_wall_marginal: float | None = None
    kwh_wall_err_frac: float | None = None
    usd: float | None = None
    """Energy at the plug and machine time together, as far as they are known."""
    usd_marginal: float | None = None
    usd_energy: float | None = None
    usd_energy_marginal: float | None = None
    usd_machine: float | None = None
    usd_machine_marginal: float | None = None
    peak_vram_bytes: int | None = None
    family: str = "gpt2"
    """Architecture; laws of different families do not mix."""
    start: str | None = None
    """SHA-256 of the weights that the run began from; None: random ones."""

    @property
    def joules_per_token(self) -> float | None:
        """`kwh` by the row's own tokens."""
        return None if self.kwh is None else self.kwh * 3.6e6 / self.n_tokens

    @property
    def kwh_per_mtoken(self) -> float | None:
        """Kilowatt-hours per million tokens."""
        return None if self.kwh is None else self.kwh * 1e6 / self.n_tokens


DERIVED_COLUMNS = ("joules_per_token", "kwh_per_mtoken")
"""Of runs.csv, after the fields of `Row`."""
ESTIMATED = ("measured", "forecast")
"""Grounds of a rung's B_crit that make it an estimate."""
CORRECTED_COLUMNS = ("c_min_flops", "s_min_steps")
"""After those, where the ladder's critical batches are known."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run ran."""

    device: str
    n_processes: int
    torch: str
    accelerate: str
    transformers: str
    python: str
    homelab_scaling: str
    git_commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """record.json: how a run ended and the rows it earned."""

    run_id: str
    ladder: str
    rung: str
    status: RunStatus
    reason: str | None
    """Why it is not finished, in a sentence; None when it is."""
    stopped_by: StoppedBy | None = None
    """Of a stopped run: who ended it. `memory`: it goes on with a smaller micro-batch when launched again."""
    science_hash: str
    rows: tuple[Row, ...]
    machine: Machine
    seconds_train: float | None = None
    seconds_validate: float | None = None
    seconds_checkpoint: float | None = None
    seconds_paused: float | None = None
    """Waited because the watchdog asked for it; in no other figure."""
    seconds_paced: float | None = None
    """Slept between steps because the watchdog asked for it; in no other figure of time."""
    kwh_paused: float | None = None
    """What the cards took during pauses; in no row."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Column name -> why its value is None."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """What the fitter eats: one row of a points table (design: points CSV).

    N and D are whole in our own rows, but published tables hold digitised, fractional ones: rounding them would move
    the optimum in its ninth digit.
    """

    n_params: float
    n_tokens: float
    loss_nats: float
    row_id: str | None = None
    run_id: str | None = None
    seed: int | None = None
    schedule: str | None = None
    decayed: bool | None = None
    data_id: str | None = None
    n_tokens_unique: int | None = None
    loss_se_nats: float | None = None
    flops: float | None = None
    n_body: int | None = None
    n_head: int | None = None
    n_embed: int | None = None
    n_pos: int | None = None
    family: str | None = None
    bpb: float | None = None
    usd: float | None = None
    kwh: float | None = None
    c_min_flops: float | None = None
    s_min_steps: float | None = None
    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A run or row that is not a point, and why."""

    row_id: str
    reason: str


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = path / "spec.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.record = path / "record.json"

    def read_spec(self) -> RunSpec:
        return codec.read_json(self.spec, RunSpec)

    def read_record(self) -> RunRecord | None:
        """The record, or None where the run never wrote one."""
        return codec.read_json(self.record, RunRecord) if self.record.exists() else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second process out of this folder while the block runs; the kernel frees it if we die.

        Raises:
            MachineError: another process holds it.
        """
        with flock(self.path / ".lock", f"{self.path}: another process is training this run; wait for it or stop it"):
            yield


@contextmanager
def flock(path: Path, message: str) -> Iterator[None]:
    """An exclusive advisory lock on `path`, or MachineError(message) if somebody has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MachineError(message) from None
        yield


def run_folders(lab: Path) -> list[RunFolder]:
    """Every run folder of a lab (LAB/<ladder>, or a folder of runs itself), in name order."""
    runs = lab / "runs" if (lab / "runs").is_dir() else lab
    if not runs.is_dir():
        raise SpecError(f"{lab}: no such lab; run `homelab run LADDER` first, or name a lab's folder")
    return [RunFolder(p) for p in sorted(runs.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def readable_runs(labs: Iterable[Path]) -> Iterator[tuple[RunFolder, RunSpec, RunRecord]]:
    """Every run of these labs with a spec and a record; labs without runs and files that cannot be read give none."""
    for lab in labs:
        for folder in run_folders(lab) if (lab / "runs").is_dir() else ():
            try:
                record, spec = folder.read_record(), folder.read_spec()
            except SpecError:
                continue
            if record is not None:
                yield folder, spec, record


def planned_run_ids(lab: Path) -> frozenset[str]:
    """The runs that LAB/<ladder>/plan.json names; empty where there is no plan, or one made before the shards."""
    path = lab / "plan.json"
    if not path.exists():
        return frozenset()
    plain = codec.read_plain_json(path)
    runs = plain.get("runs", []) if isinstance(plain, dict) else []
    return frozenset(str(run["run_id"]) for run in runs if isinstance(run, dict) and "run_id" in run)


def read_records(lab: Path) -> tuple[list[RunRecord], list[Excluded]]:
    """Every record of the current plan, and each run (or rest of a run) that gives no row, with its reason."""
    records: list[RunRecord] = []
    excluded: list[Excluded] = []
    planned = planned_run_ids(lab)
    for folder in run_folders(lab):
        name = folder.path.name
        if planned and name not in planned:
            excluded.append(Excluded(row_id=name, reason="not in the current plan.json: the ladder was changed since"))
            continue
        try:
            record = folder.read_record()
        except SpecError as error:
            excluded.append(Excluded(row_id=name, reason=f"unreadable record: {error}"))
            continue
        if record is None:
            reason = (
                "no record.json: it has not finished" if folder.spec.exists() else "not a run folder (no spec.json)"
            )
            excluded.append(Excluded(row_id=name, reason=reason))
            continue
        records.append(record)
        if record.status != "finished":
            excluded.append(Excluded(row_id=name, reason=f"{record.status}: {record.reason or 'no reason recorded'}"))
    return records, excluded


def read_rows(lab: Path) -> tuple[list[Row], list[Excluded]]:
    """Every row of every record, and what did not become one."""
    records, excluded = read_records(lab)
    return [row for record in records for row in record.rows], excluded


@dataclass(frozen=True, kw_only=True)
class CriticalBatch:
    """What batch.json says of one rung."""

    n_params: int
    n_tokens: int
    """The horizon at whose middle it holds."""
    data_id: str
    b_crit_tokens: float

    def at(self, row: Row) -> float | None:
        """B_crit in tokens at the middle of a row's own horizon; None for a row of another model or text."""
        from homelab_scaling.batch.midrun import SLOPE

        if (row.n_params, row.data_id) != (self.n_params, self.data_id):
            return None
        return self.b_crit_tokens * math.pow(row.n_tokens / self.n_tokens, SLOPE)


def critical_batches(lab: Path) -> dict[str, CriticalBatch]:
    """By rung, from a batch.json that a sweep or a branch test has calibrated; empty otherwise.

    An uncalibrated one may be wrong by factors, and would bend what is corrected by it; so would a bound, or what
    published rules say of other models.
    """
    return _critical_batches(lab)[0]


def why_not_corrected(lab: Path) -> str | None:
    """Why no row of a lab can have its C_min and S_min; None where some can."""
    return _critical_batches(lab)[1]


def _critical_batches(lab: Path) -> tuple[dict[str, CriticalBatch], str | None]:
    path = lab / "batch.json"
    if not path.exists():
        return {}, "there is no batch.json"
    try:
        plain = codec.read_plain_json(path)
        calibration = plain["calibration"]
        method, is_measured = calibration["method"], calibration["sd_log"] is not None
        found = {
            str(rung["rung"]): CriticalBatch(
                n_params=int(rung["n_params"]),
                n_tokens=int(rung["n_tokens"]),
                data_id=str(plain["data_id"]),
                b_crit_tokens=float(rung["b_crit"]["value"]),
            )
            for rung in plain["rungs"]
            if rung["basis"] in ESTIMATED
        }
    except SpecError:
        return {}, "batch.json cannot be read"
    except (KeyError, TypeError, ValueError):
        return {}, "batch.json is of another version"
    if method == "uncalibrated":
        return {}, "batch.json is uncalibrated"
    if not is_measured:
        return {}, f"its {method} test gave only a bound"
    return found, None if found else "batch.json has measured no rung"


def corrected(row: Row, b_crit_tokens: float | None) -> dict[str, float | None]:
    """`CORRECTED_COLUMNS` of a row: its compute at a batch far below critical, its steps at one far above.

    Source: Kaplan et al. 2020 (arXiv 2001.08361), eqs. 5.4 and 5.5.
    """
    if b_crit_tokens is None:
        return dict.fromkeys(CORRECTED_COLUMNS)
    ratio = row.batch_tokens / b_crit_tokens
    return {"c_min_flops": row.flops / (1 + ratio), "s_min_steps": row.n_steps / (1 + 1 / ratio)}


def to_point(row: Row, b_crit_tokens: float | None = None) -> LossPoint:
    """The fitter's view of a row; with the critical batch of its rung where that is known."""
    names = {f.name for f in dataclasses.fields(LossPoint)} & {f.name for f in dataclasses.fields(Row)}
    shared: dict[str, Any] = {name: getattr(row, name) for name in names}
    return LossPoint(**shared | corrected(row, b_crit_tokens))


def read_runs(lab: Path) -> tuple[list[LossPoint], list[Excluded]]:
    """A lab's points for the fitter, and everything that is not one with its reason."""
    rows, excluded = read_rows(lab)
    critical = critical_batches(lab)
    return [to_point(row, critical[row.rung].at(row) if row.rung in critical else None) for row in rows], excluded


def runs_csv(records: list[RunRecord], critical: dict[str, CriticalBatch] | None = None) -> str:
    """runs.csv: one line per row: the columns of `Row`, then its run's status and machine; unknown is an empty cell.

    Args:
        critical: by rung; where there is any, `CORRECTED_COLUMNS` are there too.
    """
    critical = critical or {}
    extra = CORRECTED_COLUMNS if critical else ()
    of_row = [*(f.name for f in dataclasses.fields(Row)), *DERIVED_COLUMNS, *extra]
    of_machine = [f.name for f in dataclasses.fields(Machine)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*of_row, "status", *of_machine])
    for record in records:
        machine = codec.to_plain(record.machine)
        for row in record.rows:
            plain = codec.to_plain(row) | {name: getattr(row, name) for name in DERIVED_COLUMNS}
            plain |= corrected(row, critical[row.rung].at(row) if row.rung in critical else None)
            cells = [*(plain[c] for c in of_row), record.status, *(machine[c] for c in of_machine)]
            writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def write_runs_csv(lab: Path) -> Path:
    """Rebuilds LAB/<ladder>/runs.csv from the records."""
    records, _excluded = read_records(lab)
    path = lab / "runs.csv"
    codec.write_text(path, runs_csv(records, critical_batches(lab)))
    return path
