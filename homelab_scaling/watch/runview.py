"""One run as the monitor sees it: what its files say, put together."""

from itertools import pairwise
from typing import Any

from homelab_scaling.errors import HomelabError
from homelab_scaling.fit.words import short
from homelab_scaling.plan.counting import count_params
from homelab_scaling.specs import Money, RunSpec
from homelab_scaling.train.schedule import Phase, phases
from homelab_scaling.watch.ahead import time_left
from homelab_scaling.watch.batchview import batch_now
from homelab_scaling.watch.costs import cost_of_record, cost_so_far
from homelab_scaling.watch.energy import WallModel
from homelab_scaling.watch.feed import Feed, Look, event_s
from homelab_scaling.watch.frame import (
    ACTIVE,
    BatchNow,
    Cost,
    CriticalBatch,
    LawWord,
    Moment,
    Rung,
    RunNow,
    RunState,
    Span,
    Speed,
)
from homelab_scaling.watch.runlog import Rate, RunLog

QUIET_S, QUIET_INTERVALS = 180.0, 20.0
"""Without a metric for longer than this (or so many log intervals), a living run is called silent."""
FRESH_S = 30.0
"""A file that grew so recently belongs to a run that lives, wherever its processes are."""
N_RECENT = 50
NO_SPEC = "its trainer did not say how long it will be"
NOT_JUDGED = LawWord(verdict="not judged", off_frac=None, sentence="there is no fit yet; `homelab fit LAB` makes one")


class RunEye:
    """Follows one run; `look` first, then ask."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.log = RunLog()
        self.n_restarts = 0
        """How often its metrics were written anew."""
        self.seen: Look | None = None
        self.state: RunState = "queued"
        self._plan: tuple[Phase, ...] = ()
        self._planned_for: RunSpec | None = None
        self.plan_problem: str | None = None

    @property
    def run_id(self) -> str:
        return self.feed.run_id

    @property
    def spec(self) -> RunSpec | None:
        return self.feed.spec

    @property
    def record(self) -> dict[str, Any]:
        return (self.seen.record if self.seen else None) or {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows = self.record.get("rows")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    @property
    def moved_s(self) -> float:
        """When something last happened in it; 0 for never."""
        seen = self.seen
        events = [event_s(e) or 0.0 for e in seen.events[-1:]] if seen else []
        return max([0.0, *events, *(t for t in (seen.logged_s, seen.saved_s) if t)] if seen else [0.0])

    def look(self, now_s: float) -> None:
        """Takes in what is new."""
        self.seen = self.feed.look(now_s)
        if self.seen.metrics.restarted:
            self.log, self.n_restarts = RunLog(), self.n_restarts + 1
        self.log.feed(self.seen.metrics.lines)
        if self.spec is not self._planned_for:
            self._planned_for = self.spec
            self._plan, self.plan_problem = (), None
            try:
                self._plan = phases(self.spec.science) if self.spec else ()
            except HomelabError as error:
                self.plan_problem = str(error)
        self.state = self._state(self.seen, now_s)

    # ----------------------------------------------------------------------------------------------------- how it is

    def _state(self, seen: Look, now_s: float) -> RunState:
        status = self.record.get("status")
        if status in ("finished", "stopped", "diverged", "failed"):
            return status  # type: ignore[no-any-return]
        if status is None and not self._segments():
            return "unreadable" if self.spec is None and seen.problems else "queued"
        last_s = max((t for t in (seen.logged_s, *(event_s(e) for e in seen.events[-1:])) if t), default=0.0)
        if not seen.is_alive and now_s - last_s > FRESH_S:
            return "interrupted"
        if self._paused():
            return "paused"
        return self._busy(now_s - last_s)

    def _busy(self, age_s: float) -> RunState:
        """How a run that lives is doing, by the age of its last word."""
        if not self._since_start():
            return "starting"
        quiet = max(QUIET_S, QUIET_INTERVALS * self._rates()[-1].interval_s)
        if age_s > quiet:
            return "silent"
        return "slowed" if self.duty < 1 else "running"

    def _segments(self) -> list[dict[str, Any]]:
        return [e for e in self.seen.events if e.get("kind") == "segment"] if self.seen else []

    def _last(self, *kinds: str) -> dict[str, Any] | None:
        """The newest event of these kinds in this segment."""
        for event in reversed(self.seen.events if self.seen else ()):
            if event.get("kind") in kinds:
                return dict(event)
            if event.get("kind") == "segment":
                return None
        return None

    def _paused(self) -> bool:
        last = self._last("paused", "resumed")
        return last is not None and last["kind"] == "paused"

    @property
    def duty(self) -> float:
        """Share of the time that the watchdog lets it compute."""
        last = self._last("paced")
        duty = last.get("duty") if last else None
        return float(duty) if isinstance(duty, int | float) and 0 < duty <= 1 else 1.0

    def _starts(self) -> list[int]:
        """Updates that were done when each segment began."""
        return [update for e in self._segments() if isinstance(update := e.get("update"), int)]

    def _rates(self) -> list[Rate]:
        """Without the first interval of each segment, which holds compilation and cold caches."""
        starts = [0, *self._starts()]
        kept: list[Rate] = []
        for rate in self.log.rates:
            first = False
            while starts and rate.update > starts[0]:
                starts.pop(0)
                first = True
            if not first:
                kept.append(rate)
        return kept or list(self.log.rates)

    def _since_start(self) -> list[Rate]:
        """Every rate of this segment, its first one too."""
        first = self._starts()[-1:]
        return [rate for rate in self.log.rates if not first or rate.update > first[0]]

    def _overhead_frac(self) -> float:
        """Seconds beside training per second of it in this segment: validations and checkpoints, not the waiting."""
        segments, seen = self._segments(), self.seen
        began = event_s(segments[-1]) if segments else None
        rates = self._since_start()
        if began is None or seen is None or seen.logged_s is None or not rates:
            return 0.0
        busy = sum(r.interval_s for r in rates)
        waited = sum(float(e.get("paused_s") or 0.0) for e in self._this_segment("resumed"))
        return max(0.0, min(3.0, (seen.logged_s - began - waited - self._slept()) / busy - 1))

    def _slept(self) -> float:
        """Seconds slept between steps in this segment, on the watchdog's order."""
        rates = self._since_start()
        if not rates:
            return 0.0
        before = [rate for rate in self.log.rates if rate.update < rates[0].update]
        return max(0.0, rates[-1].slept_s - (before[-1].slept_s if before else 0.0))

    def _this_segment(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for event in self.seen.events if self.seen else ():
            if event.get("kind") == "segment":
                found = []
            elif event.get("kind") == kind:
                found.append(event)
        return found

    # ------------------------------------------------------------------------------------------------ where it stands

    @property
    def is_foreign(self) -> bool:
        """Another trainer's run (watch/recorder.py): records and metrics without a spec."""
        seen = self.seen
        return self.spec is None and seen is not None and not seen.has_spec and bool(self.record)

    @property
    def n_params(self) -> int | None:
        """By the spec, else by a row."""
        if self.spec is not None:
            return count_params(self.spec.science.shape, self.spec.science.n_vocab).n_params
        n = self.rows[-1].get("n_params") if self.rows else None
        return n if isinstance(n, int) else None

    @property
    def seed(self) -> int | None:
        """By the spec, else by a row."""
        seed = self.spec.science.seed if self.spec else self.rows[-1].get("seed") if self.rows else None
        return seed if isinstance(seed, int) else None

    @property
    def rung(self) -> str:
        """By the spec, else by the record."""
        return self.spec.rung if self.spec else str(self.record.get("rung") or self.run_id)

    @property
    def n_updates(self) -> int:
        return self._plan[-1].end_update if self._plan else 0

    @property
    def update(self) -> int:
        """Updates done; all of them once it is finished."""
        if self.state == "finished" and self.n_updates:
            return self.n_updates
        return min(self.log.update, self.n_updates) if self.n_updates else self.log.update

    def _phase(self) -> Phase | None:
        update = self.update
        return next((p for p in self._plan if p.first_update <= update < p.end_update), None)

    def left(self) -> tuple[Span | None, str | None]:
        """Seconds still to go, or why that is not known."""
        if self.state == "finished":
            return None, "finished"
        if self.spec is None or not self._plan:
            return None, self.plan_problem or (NO_SPEC if self.is_foreign else self.feed.problem)
        batch = self.spec.science.batch_tokens_global
        tokens = (self.n_updates - self.update) * batch
        span = time_left(self._rates(), tokens, overhead_frac=self._overhead_frac(), duty=self.duty)
        if span is not None:
            return span, None
        planned = self.spec.execution.predicted_s
        if planned is None:
            return None, "no speed is measured yet"
        share = tokens / (self.n_updates * batch)
        return Span(low=planned * share / 2, mid=planned * share, high=planned * share * 2), None

    def now(self, law: LawWord, wall: WallModel, critical: CriticalBatch | None = None) -> RunNow | None:
        """The run in focus; None where there is nothing to say of it.

        Args:
            critical: what is known of its rung's critical batch.
        """
        spec, seen, log = self.spec, self.seen, self.log
        if seen is None or (spec is None and not self.is_foreign):
            return None
        left, left_why = self.left()
        phase = self._phase()
        batch = spec.science.batch_tokens_global if spec else None
        held = log.held_curve
        machine = self.record.get("machine")
        milestone, milestone_s = self._milestone(phase, left)
        return RunNow(
            run_id=self.run_id,
            rung=self.rung,
            seed=self.seed,
            n_params=self.n_params,
            state=self.state,
            reason=self._reason(),
            phase=_phase_words(phase) if phase else "",
            update=self.update,
            n_updates=self.n_updates or None,
            tokens_done=log.tokens if batch is None else self.update * batch,
            tokens_total=None if batch is None else self.n_updates * batch,
            n_rows=len(self.rows),
            n_rows_planned=len(spec.science.horizons_tokens) if spec else None,
            left_s=left,
            left_why=left_why,
            milestone=milestone,
            milestone_s=milestone_s,
            loss_nats=log.loss,
            lr=log.lr,
            curve=log.curve,
            held_curve=held,
            held=held[-1] if held else None,
            law=law,
            speed=self._speed(),
            batch_tokens=batch,
            noise_scale_tokens=log.noise_scale_tokens,
            batch=self._batch(critical),
            vram_bytes=max((r.vram_bytes for r in log.rates if r.vram_bytes is not None), default=None),
            cost=self.cost(wall),
            device=str(machine.get("device")) if isinstance(machine, dict) and machine.get("device") else None,
            n_processes=spec.execution.n_processes if spec else 1,
            logged_s=seen.logged_s,
            saved_s=seen.saved_s,
            paused_s=self._waited(),
            paced_s=(log.rates[-1].slept_s if log.rates else 0.0) or None,
        )

    def _batch(self, critical: CriticalBatch | None) -> BatchNow | None:
        if self.spec is None or self.seen is None:
            return None
        return batch_now(
            self.spec,
            self.seen.events,
            plan=self._plan,
            phase=self._phase(),
            noise=self.log.noise,
            critical=critical,
        )

    def _reason(self) -> str | None:
        if self.state == "paused":
            last = self._last("paused")
            return str(last.get("reason") or "") if last else None
        if self.state == "slowed":
            last = self._last("paced")
            return str(last.get("reason") or "") if last else None
        if self.state in ("stopped", "diverged", "failed"):
            reason = self.record.get("reason")
            return str(reason) if reason else None
        if self.state == "interrupted":
            return "its process is gone; run the same command again to go on from its last checkpoint"
        return None

    def _waited(self) -> float | None:
        waits = [e.get("paused_s") for e in (self.seen.events if self.seen else ()) if e.get("kind") == "resumed"]
        known = [float(w) for w in waits if isinstance(w, int | float)]
        return sum(known) if known else None

    def _milestone(self, phase: Phase | None, left: Span | None) -> tuple[str | None, float | None]:
        """The end of the phase it is in."""
        if phase is None or left is None or self.state not in ACTIVE:
            return None, None
        todo = self.n_updates - self.update
        seconds = left.mid * (phase.end_update - self.update) / todo if todo else 0.0
        goal = short(phase.horizon_tokens)
        return (f"row at {goal}" if phase.earns_row else f"decay to {goal}"), seconds

    def _speed(self) -> Speed:
        rates = self._rates()[-N_RECENT:]
        unknown = self.record.get("unknown")
        why = unknown.get("mfu_frac") if isinstance(unknown, dict) else None
        if not rates:
            return Speed(mfu_why=why)
        steps = sorted(b.interval_s / (b.update - a.update) for a, b in pairwise(rates) if b.update > a.update)
        last = rates[-5:]
        mfu = [(r.mfu_frac, r.interval_s) for r in last if r.mfu_frac is not None]
        return Speed(
            tokens_per_s=sum(r.interval_tokens for r in last) / sum(r.interval_s for r in last),
            mfu_frac=sum(m * s for m, s in mfu) / sum(s for _, s in mfu) if mfu else None,
            mfu_why=None if mfu else why,
            step_p50_s=steps[(len(steps) - 1) // 2] if steps else None,
            step_p99_s=steps[round(0.99 * (len(steps) - 1))] if steps else None,
            n_intervals=len(rates),
        )

    def cost(self, wall: WallModel) -> Cost:
        """Energy and money so far and at the end."""
        spec, seen = self.spec, self.seen
        money = spec.own_money if spec else Money()
        wall = wall.shared(spec.execution.machine_frac) if spec else wall
        if seen is None or (spec is None and not self.is_foreign):
            return Cost(kwh_why="its spec cannot be read", usd_why="its spec cannot be read")
        if self.state == "finished" and self.rows:  # a probe earns none
            return cost_of_record(self.record, money)
        left, _ = self.left()
        unknown = self.record.get("unknown")
        why = unknown.get("kwh") if isinstance(unknown, dict) else None
        if not self._segments() and not self.log.update:
            return Cost(kwh_why="it has not begun", usd_why="it has not begun")
        return cost_so_far(
            clock=seen.clock,
            clock_update=seen.clock_update,
            rates=self.log.rates,
            money=money,
            wall=wall,
            left_s=left.mid if left else None,
            why=str(why) if why else None,
        )

    def line(self, cost: Cost | None) -> Rung:
        """This run in the list."""
        spec = self.spec
        science = spec.science if spec else None
        loss, source = self._best_loss()
        rows = self.rows
        seconds = [row.get("seconds_marginal") for row in rows]
        spent = sum(float(s) for s in seconds if isinstance(s, int | float)) if rows else None
        if self.state != "finished" and cost is not None:
            spent = cost.seconds
        return Rung(
            run_id=self.run_id,
            rung=self.rung,
            seed=self.seed,
            n_params=self.n_params,
            state=self.state,
            reason=self._reason() or ("; ".join(self.seen.problems) if self.seen and self.seen.problems else None),
            done_frac=self.update / self.n_updates if self.n_updates else None,
            n_rows=len(rows),
            n_rows_planned=len(science.horizons_tokens) if science else None,
            loss_nats=loss,
            loss_from=source,
            seconds=spent,
            seconds_planned=spec.execution.predicted_s if spec else None,
            kwh=cost.kwh if cost else None,
            usd=cost.usd if cost else None,
        )

    def moments(self) -> list[Moment]:
        """What happened to it that belongs beside the watchdog's transitions."""
        found = []
        for event in self.seen.events if self.seen else ():
            t_s, said = event_s(event), None
            if event.get("kind") == "oom":
                said = f"out of memory with micro-batch {event.get('microbatch_seqs_per_rank')}"
                said += (
                    f", goes on with {event['next']}" if event.get("next") is not None else ", no smaller one is left"
                )
            elif event.get("kind") == "watchdog" and event.get("state") == "silent":
                said = f"heard nothing from the watchdog: {event.get('done')}"
            if said is not None and t_s is not None:
                found.append(Moment(t_s=t_s, who=self.run_id, text=said, level="warn"))
        return found

    def _best_loss(self) -> tuple[float | None, Any]:
        if self.rows and isinstance(self.rows[-1].get("loss_nats"), int | float) and not self.is_active:
            return float(self.rows[-1]["loss_nats"]), "row"
        if self.log.held:
            return float(self.log.held[-1]["loss"]), "validation"
        return (self.log.loss, "training") if self.log.loss is not None else (None, None)


def _phase_words(phase: Phase) -> str:
    goal = short(phase.horizon_tokens)
    return (
        f"decay to {goal}"
        if phase.kind == "decay"
        else f"trunk to {goal}"
        if phase.kind == "trunk"
        else f"cosine to {goal}"
    )
