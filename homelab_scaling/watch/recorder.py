"""Ten lines in a foreign training loop for its rows, its energy, and its place in the fit, the report and the monitor.

    from homelab_scaling.watch.recorder import Recorder

    with Recorder("mine-124m", lab="lab/mine", n_params=124_000_000, data_id="my-text") as run:
        tokens = 0
        for x, y in batches:
            loss = train_one_step(x, y)
            tokens += x.size
            run.step(tokens=x.size, loss=loss)
        run.row(n_tokens=tokens, loss=validate())

Only one process of a run may record (rank 0). To be slowed, paused and stopped by the watchdog as well, start the
script with `homelab watchdog -- python train.py`.
"""

import contextlib
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from homelab_scaling import __version__, codec
from homelab_scaling.errors import HomelabError, SpecError
from homelab_scaling.runs import Machine, Row, RunFolder, RunRecord, RunStatus
from homelab_scaling.specs import Money
from homelab_scaling.watch import link
from homelab_scaling.watch.energy import CARD_ERR_FRAC, JOULES_PER_KWH, EnergyMeter, read_wall_model
from homelab_scaling.watch.foreign import cards_of
from homelab_scaling.watch.link import Registration
from homelab_scaling.watch.start import ensure_alive, wait_for_status

FLUSH_S = 5.0
"""How often losses are fetched from the device and written."""
MIN_METERED_FRAC = 0.5
"""With less of the time measured, energy is unknown rather than filled in."""
NOT_SAID = "a foreign trainer did not say"


class Recorder:
    """A run of somebody else's trainer, in this project's files.

    Args:
        run_id: its name, and its folder's: LAB/runs/RUN_ID.
        lab: the lab it belongs to, such as lab/mine; `homelab fit lab/mine` reads it.
        n_params: every real parameter of the model.
        data_id: names text and tokenizer; losses with different ones do not compare.
        seed: what this run differs in from its repetitions.
        flops_per_token: of training; None takes 6 n_params.
        n_tokens_unique: tokens of the corpus; None means that none was seen twice.
        family: architecture; laws of different families do not mix.
        about: further columns of `Row`, where known: n_body, n_pos, n_embed, n_head, lr_peak, schedule, optimizer,
            precision, batch_tokens.
        money: prices.
        start_tokens: of a run that goes on: what was recorded up to there is kept, what came after it is dropped.

    Raises:
        SpecError: the run is finished already, or a column is not one of the above.
        MachineError: another process records it.
    """

    COLUMNS = frozenset(
        ("n_body", "n_pos", "n_embed", "n_head", "lr_peak", "schedule", "optimizer", "precision", "batch_tokens")
    )

    def __init__(
        self,
        run_id: str,
        *,
        lab: Path | str,
        n_params: int,
        data_id: str,
        seed: int = 0,
        flops_per_token: float | None = None,
        n_tokens_unique: int | None = None,
        family: str = "foreign",
        about: dict[str, Any] | None = None,
        money: Money | None = None,
        start_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        unknown = set(about or ()) - self.COLUMNS
        if unknown:
            raise SpecError(f"about: no such column {sorted(unknown)[0]!r}; known: {', '.join(sorted(self.COLUMNS))}")
        self.run_id, self.folder = run_id, RunFolder(Path(lab) / "runs" / run_id)
        self.n_params, self.data_id, self.seed, self.family = n_params, data_id, seed, family
        self.flops_per_token = 6.0 * n_params if flops_per_token is None else flops_per_token
        self.n_tokens_unique, self.about, self.money = n_tokens_unique, about or {}, money or Money()
        self.start_tokens, self.clock = start_tokens, clock
        self.tokens = self.steps = 0
        self.rows: tuple[Row, ...] = ()
        self._pending: list[dict[str, Any]] = []
        self._seconds = self._joules = self._metered_s = 0.0
        self._interval_tokens, self._mark = 0, 0.0
        self._billed = (0.0, 0.0, 0.0, 0)  # seconds, joules, metered seconds and tokens of the row before
        self._meter: EnergyMeter | None = None
        self._stack = contextlib.ExitStack()

    # --------------------------------------------------------------------------------------------- the loop's calls

    def step(self, *, tokens: int, loss: Any, lr: float | None = None, grad_norm: Any = None) -> None:
        """After each optimizer step.

        Args:
            tokens: trained on in this step, over all ranks.
            loss: mean of the step, nats per token; a number or a tensor, which is fetched only every few seconds.
        """
        self.tokens += tokens
        self._interval_tokens += tokens
        step, self.steps = self.steps, self.steps + 1
        self._pending.append(
            {
                **{"kind": "step", "update": step, "phase": "trunk", "step": step, "tokens": self.tokens},
                **{"lr": lr, "loss": _kept(loss), "grad_norm": _kept(grad_norm)},
            }
        )
        if self.clock() - self._mark >= FLUSH_S:
            self.flush()

    def validation(self, loss: float, *, bpb: float | None = None) -> None:
        """A point of the validation curve, nats per token."""
        self.flush()
        codec.append_jsonl(
            self.folder.metrics, [{**self._here("val"), "loss": _number(loss), "bpb": bpb, "set": "curve"}]
        )

    def row(
        self,
        *,
        n_tokens: int,
        loss: float,
        loss_se: float | None = None,
        bpb: float | None = None,
        decayed: bool = True,
    ) -> Row:
        """A point for the fit: the loss of the model after `n_tokens`, nats per token, on the whole held-out text.

        Args:
            loss_se: its standard error.
            decayed: whether the learning rate had reached its end; others belong to another law.
        """
        self.flush()
        made = self._make_row(n_tokens, float(loss), loss_se, bpb, decayed)
        self.rows = (*(one for one in self.rows if one.n_tokens != n_tokens), made)
        self._billed = (self._seconds, self._joules, self._metered_s, n_tokens)
        self._write("running", "more rows may come")
        return made

    def flush(self) -> None:
        """Writes what is pending: a line per step, and the interval's rate and power."""
        now = self.clock()
        seconds, self._mark = now - self._mark, now
        joules = metered_s = 0.0
        if self._meter is not None:
            lap = self._meter.lap()
            joules, metered_s = lap.joules, max(0.0, lap.seconds - lap.unseen_s)
        self._seconds, self._joules = self._seconds + seconds, self._joules + joules
        self._metered_s += metered_s
        lines, self._pending = self._pending, []
        for line in lines:
            line["loss"], line["grad_norm"] = _number(line["loss"]), _number(line["grad_norm"])
        if lines and seconds > 0:
            lines.append(
                {
                    **self._here("rate"),
                    "interval_tokens": self._interval_tokens,
                    "interval_s": seconds,
                    "tokens_per_s": self._interval_tokens / seconds,
                    "mfu": None,
                    "vram_bytes": None,
                    "power_w": joules / metered_s if metered_s > 0 else None,
                    "energy_j": self._joules if self._meter is not None else None,
                    "metered_s": self._metered_s,
                }
            )
            self._interval_tokens = 0
        codec.append_jsonl(self.folder.metrics, lines)

    def __enter__(self) -> "Recorder":
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(self.folder.lock())
        try:
            self._take_up()
            self._watch()
        except BaseException:
            self._stack.close()
            raise
        self._event("segment", update=self.steps, step=self.steps, pids=[os.getpid()], n_processes=1)
        self._write("running", "in progress")
        self._mark = self.clock()
        if self._meter is not None:
            self._meter.lap()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        with self._stack:
            self.flush()
            if kind is None:
                self._write("finished", None)
            elif issubclass(kind, KeyboardInterrupt | SystemExit):
                self._write("stopped", f"stopped by {kind.__name__} at step {self.steps}")
            else:
                self._write("failed", f"{kind.__name__}: {error}".split("\n", maxsplit=1)[0])

    # ------------------------------------------------------------------------------------------------- the inside

    def _take_up(self) -> None:
        """What an earlier segment left, up to `start_tokens`."""
        record = self.folder.read_record()
        if record is not None and record.status == "finished":
            raise SpecError(f"{self.folder.path}: this run is finished; give another run_id, or remove the folder")
        kept = [] if not self.start_tokens else codec.read_jsonl(self.folder.metrics)
        kept = [line for line in kept if line["tokens"] <= self.start_tokens]
        codec.write_text(self.folder.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        steps = [line for line in kept if line["kind"] == "step"]
        rates = [line for line in kept if line["kind"] == "rate"]
        self.tokens, self.steps = self.start_tokens, steps[-1]["update"] + 1 if steps else 0
        self._seconds = sum(line["interval_s"] for line in rates)
        self._joules = (rates[-1]["energy_j"] or 0.0) if rates else 0.0
        self._metered_s = rates[-1]["metered_s"] if rates else 0.0
        self.rows = tuple(row for row in (record.rows if record else ()) if row.n_tokens <= self.start_tokens)
        if self.rows:
            last = self.rows[-1]
            self._billed = (last.seconds or 0.0, (last.kwh or 0.0) * JOULES_PER_KWH, self._metered_s, last.n_tokens)

    def _watch(self) -> None:
        """Starts a watchdog if there is a card, and registers with it; without one there is no energy."""
        self.machine = link.machine_folder(link.lab_of(self.folder))
        self._why_no_energy = "there is no card to measure"
        if not (_has_card() or os.environ.get(link.CARDS_VARIABLE)):
            return
        with contextlib.suppress(HomelabError, OSError):
            ensure_alive(self.machine)
        status = wait_for_status(self.machine, 10.0)
        if status is None or not status.readings:
            self._why_no_energy = (status.sensor_error if status else None) or "no watchdog could be started"
            return
        cards = cards_of(os.environ, status.facts)
        if not cards:
            self._why_no_energy = "CUDA_VISIBLE_DEVICES leaves the run no card"
            return
        self._meter = EnergyMeter(self.machine, cards)
        path = self.machine.register(
            Registration(
                run_id=self.run_id,
                folder=str(self.folder.path.resolve()),
                pids=(os.getpid(),),
                cards=cards,
                started_s=link.now_s(),
                foreign=True,
            )
        )
        self._stack.callback(path.unlink, missing_ok=True)

    def _make_row(self, n_tokens: int, loss: float, loss_se: float | None, bpb: float | None, decayed: bool) -> Row:
        before_s, before_j, before_metered_s, before_tokens = self._billed
        whole = self._bill(self._seconds, self._joules, self._metered_s)
        own = self._bill(self._seconds - before_s, self._joules - before_j, self._metered_s - before_metered_s)
        known = {column: self.about.get(column) for column in ("n_body", "n_pos", "n_embed", "n_head", "lr_peak")}
        return Row(
            row_id=f"{self.run_id}@{n_tokens}",
            run_id=self.run_id,
            rung=self.run_id,
            seed=self.seed,
            n_params=self.n_params,
            n_tokens=n_tokens,
            loss_nats=loss,
            loss_se_nats=loss_se,
            bpb=bpb,
            flops=self.flops_per_token * n_tokens,
            flops_marginal=self.flops_per_token * (n_tokens - before_tokens),
            n_steps=self.steps,
            batch_tokens=self.about.get("batch_tokens", round(self.tokens / self.steps) if self.steps else n_tokens),
            schedule=self.about.get("schedule", "unknown"),
            decayed=decayed,
            optimizer=self.about.get("optimizer", "unknown"),
            precision=self.about.get("precision", "unknown"),
            data_id=self.data_id,
            n_tokens_unique=min(n_tokens, self.n_tokens_unique or n_tokens),
            tokens_per_s=self.tokens / self._seconds if self._seconds > 0 and self.steps else None,
            mfu_frac=None,
            family=self.family,
            kwh_from=self._meter.source if self._meter is not None and whole["kwh"] is not None else None,
            kwh_err_frac=None if whole["kwh"] is None else CARD_ERR_FRAC + (whole["unmetered"] or 0.0),
            kwh_unmetered_frac=whole["unmetered"],
            **{name: whole[name] for name in ("seconds", "kwh", "kwh_wall", "usd", "usd_energy", "usd_machine")},
            **{
                f"{name}_marginal": own[name]
                for name in ("seconds", "kwh", "kwh_wall", "usd", "usd_energy", "usd_machine")
            },
            **known,
        )

    def _bill(self, seconds: float, joules: float, metered_s: float) -> dict[str, Any]:
        """Seconds, energy and money of a stretch; what no sensor saw is filled in at the mean of the rest."""
        per_hour, per_kwh = self.money.usd_per_machine_hour, self.money.usd_per_kwh
        kwh = kwh_wall = unmetered = None
        if self._meter is not None and metered_s > 0 and metered_s >= MIN_METERED_FRAC * seconds:
            unmetered = max(0.0, 1 - metered_s / seconds)
            joules *= max(1.0, seconds / metered_s)
            kwh = joules / JOULES_PER_KWH
            kwh_wall = read_wall_model(self.machine).joules(joules, seconds) / JOULES_PER_KWH
        usd_energy = None if kwh_wall is None or per_kwh is None else kwh_wall * per_kwh
        usd_machine = None if per_hour is None else seconds / 3600 * per_hour
        known = [part for part in (usd_energy, usd_machine) if part is not None]
        return {
            **{"seconds": seconds, "kwh": kwh, "kwh_wall": kwh_wall, "unmetered": unmetered},
            **{"usd_energy": usd_energy, "usd_machine": usd_machine, "usd": sum(known) if known else None},
        }

    def _write(self, status: RunStatus, reason: str | None) -> None:
        unknown = {
            c: NOT_SAID for c in ("n_body", "n_pos", "n_embed", "n_head", "lr_peak") if self.about.get(c) is None
        }
        unknown["mfu_frac"] = "not measured for a foreign trainer"
        if any(row.kwh is None for row in self.rows) or not self.rows:
            unknown["kwh"] = self._why_no_energy if self._meter is None else "less than half of the time was metered"
        facts = [self.run_id, self.n_params, self.data_id, self.seed, self.family]
        record = RunRecord(
            run_id=self.run_id,
            ladder=self.folder.path.resolve().parents[1].name,
            rung=self.run_id,
            status=status,
            reason=reason,
            stopped_by="signal" if status == "stopped" else None,
            science_hash=codec.stable_hash(facts),
            rows=self.rows,
            machine=_machine(self._card_name()),
            seconds_train=self._seconds,
            unknown=unknown,
        )
        codec.write_json(self.folder.record, record)
        if status != "running":
            self._event("end", status=status, reason=reason, update=self.steps)

    def _card_name(self) -> str:
        status = self.machine.read_status() if self._meter is not None else None
        return status.facts[0].name if status is not None and status.facts else "cpu"

    def _here(self, kind: str) -> dict[str, Any]:
        return {"kind": kind, "update": self.steps, "phase": "trunk", "step": self.steps, "tokens": self.tokens}

    def _event(self, kind: str, **fields: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        codec.append_jsonl(self.folder.events, [{"kind": kind, "time": now, **fields}])


def _kept(value: Any) -> Any:
    """A tensor without its graph, so that waiting for it costs no memory."""
    return value.detach() if hasattr(value, "detach") else value


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if value is None:
        return None
    found = float(value)
    return found if math.isfinite(found) else None


def _has_card() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def _machine(device: str) -> Machine:
    versions = {}
    for package in ("torch", "accelerate", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return Machine(
        device=device,
        n_processes=1,
        python=sys.version.split()[0],
        homelab_scaling=__version__,
        **versions,
    )
