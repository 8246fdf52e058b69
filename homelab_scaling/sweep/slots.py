"""Which run goes on which slot, and when: a pure function of predicted seconds. A slot is a GPU, or a share of a CPU.

Runs are packed longest first, one slot each. Spread over several slots (DDP) a run pays for its traffic, so it is
spread only where the ladder ends earlier: from its start, or for the rest of it once the other slots have nothing left
to do (a run resumes on any number of ranks).

Source: longest first is Graham's LPT rule (1969), at most 4/3 - 1/(3 n) of the best packing.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Part = Literal["whole", "first", "rest"]
Unit = Literal["s", "FLOPs"]

MAX_EXHAUSTIVE = 8
"""With more runs than this that could be spread, only the longest so-and-so many are tried."""
MIN_GAIN_S, MIN_GAIN_FRAC = 60.0, 0.05
"""A run in progress is not stopped and spread for less: its remaining seconds are a guess."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be placed."""

    run_id: str
    rung: str
    seconds: Mapping[int, float]
    """Predicted on so many slots at once; a number of slots that is not there cannot be had (memory, batch)."""

    @property
    def narrowest(self) -> int:
        return min(self.seconds)

    def widest(self, n_slots: int) -> int:
        """On as many slots as there are and it can use."""
        return max((k for k in self.seconds if k <= n_slots), default=self.narrowest)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A run, or the part of it before or after it is spread, on its slots."""

    run_id: str
    rung: str
    slots: tuple[int, ...]
    start_s: float
    end_s: float
    part: Part = "whole"

    @property
    def ddp(self) -> bool:
        return len(self.slots) > 1


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way to run the same jobs."""

    name: Literal["pack", "all DDP", "mixed"]
    what: str
    makespan_s: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What runs where and when, in seconds from now (or in FLOPs, where no speed is known)."""

    slots: tuple[int, ...]
    assignments: tuple[Assignment, ...]
    """By start."""
    makespan_s: float
    alternatives: tuple[Alternative, ...]
    """Pack, all DDP, mixed; empty where no run can be spread."""
    why: str
    unit: Unit = "s"


def make_schedule(
    jobs: Sequence[Job],
    slots: Sequence[int],
    *,
    free_at: Mapping[int, float] | None = None,
    restart_s: float = 0.0,
    unit: Unit = "s",
) -> Schedule:
    """The best schedule found: never later than packing alone or DDP for every run.

    On one slot the runs keep their order: it changes nothing about the end, and small ones first tell more sooner.

    Args:
        jobs: each fits the slots on at least one width.
        free_at: when each slot is free [s from now]; 0 where not given.
        restart_s: what it costs to stop a run and start it on more slots.
        unit: "FLOPs" where `Job.seconds` are FLOPs: then nothing is spread.

    Raises:
        ValueError: a job needs more slots than there are.
    """
    slots = tuple(slots)
    free = {slot: (free_at or {}).get(slot, 0.0) for slot in slots}
    for job in jobs:
        if job.narrowest > len(slots):
            raise ValueError(f"{job.run_id} needs {job.narrowest} slots, there are {len(slots)}")
    if len(slots) == 1:
        found = tuple(_packed([(job, 1) for job in jobs], free))
        return _schedule(slots, found, (), "one slot: one run after the other, in the ladder's order", unit)
    if unit == "FLOPs":
        jobs = [replace(job, seconds={job.narrowest: job.seconds[job.narrowest]}) for job in jobs]
    ordered = sorted(jobs, key=lambda job: -job.seconds[job.narrowest])
    can_spread = [job for job in ordered if job.narrowest < job.widest(len(slots))]
    pack, everything = _placed(ordered, set(), free), _placed(ordered, {job.run_id for job in can_spread}, free)
    mixed = min(_mixtures(ordered, can_spread, free, restart_s), key=_rank)
    by_run = {job.run_id: job for job in jobs}
    alternatives = (
        ()
        if not can_spread
        else (
            Alternative(name="pack", what="one slot each, longest first", makespan_s=_end(pack)),
            Alternative(name="all DDP", what="every run over all slots", makespan_s=_end(everything)),
            Alternative(name="mixed", what=_words(mixed, by_run), makespan_s=_end(mixed)),
        )
    )
    chosen = min((pack, everything, mixed), key=_rank)
    return _schedule(slots, chosen, alternatives, _why(chosen, pack, everything, by_run, unit), unit)


def worth_spreading(job: Job, left_s: float, now_on: int, n_slots: int, restart_s: float) -> int | None:
    """On how many slots a run in progress should go on, or None where it should stay as it is.

    Args:
        left_s: predicted for the rest of it as it is.
        now_on: how many slots it has.
        n_slots: how many it could have.
    """
    then = {
        k: restart_s + left_s * job.seconds[k] / job.seconds[now_on]
        for k in job.seconds
        if now_on < k <= n_slots and now_on in job.seconds
    }
    best = min(then, key=lambda k: then[k], default=None)
    if best is None or then[best] > left_s - max(MIN_GAIN_S, MIN_GAIN_FRAC * left_s):
        return None
    return best


# ------------------------------------------------------------------------------------------------------------- search


def _mixtures(
    ordered: Sequence[Job], can_spread: Sequence[Job], free: Mapping[int, float], restart_s: float
) -> Iterable[tuple[Assignment, ...]]:
    """Every placement that is tried, with its last run spread at the end where that pays."""
    names = [job.run_id for job in can_spread]
    if len(names) <= MAX_EXHAUSTIVE:
        chosen = [set(s) for n in range(len(names) + 1) for s in itertools.combinations(names, n)]
    else:
        chosen = [set(names[:n]) for n in range(len(names) + 1)]
    for spread in chosen:
        for wide_first in (True, False) if spread else (True,):
            placed = _placed(ordered, spread, free, wide_first=wide_first)
            yield placed
            yield _with_tail(placed, {job.run_id: job for job in ordered}, free, restart_s)


def _placed(
    ordered: Sequence[Job], spread: set[str], free: Mapping[int, float], *, wide_first: bool = True
) -> tuple[Assignment, ...]:
    widths = [(job, job.widest(len(free)) if job.run_id in spread else job.narrowest) for job in ordered]
    widths.sort(key=lambda one: -one[1] if wide_first else one[1])  # stable: longest first within a width
    return _packed(widths, free)


def _packed(widths: Sequence[tuple[Job, int]], free: Mapping[int, float]) -> tuple[Assignment, ...]:
    """Each run on the slots that are free first, in the order given."""
    until, placed = dict(free), []
    for job, k in widths:
        slots = tuple(sorted(sorted(until, key=lambda slot: (until[slot], slot))[:k]))
        start = max(until[slot] for slot in slots)
        end = start + job.seconds[k]
        until.update(dict.fromkeys(slots, end))
        placed.append(Assignment(run_id=job.run_id, rung=job.rung, slots=slots, start_s=start, end_s=end))
    return tuple(placed)


def _with_tail(
    placed: tuple[Assignment, ...], jobs: Mapping[str, Job], free: Mapping[int, float], restart_s: float
) -> tuple[Assignment, ...]:
    """The run that ends last goes on with more slots from when they have nothing left to do, where that pays."""
    if not placed:
        return placed
    last = max(placed, key=lambda one: (one.end_s, -len(one.slots)))
    others = [one for one in placed if one is not last]
    idle = {s: max([free[s], *(o.end_s for o in others if s in o.slots)]) for s in free if s not in last.slots}
    job, best = jobs[last.run_id], last.end_s
    result = placed
    for k in sorted(k for k in job.seconds if len(last.slots) < k <= len(free)):
        more = sorted(idle, key=lambda slot: (idle[slot], slot))[: k - len(last.slots)]
        switch = max([last.start_s, *(idle[slot] for slot in more)])
        left = (last.end_s - switch) / (last.end_s - last.start_s) if last.end_s > last.start_s else 0.0
        end = switch + left * job.seconds[k] + (restart_s if switch > last.start_s else 0.0)
        if left <= 0 or end >= best:
            continue
        best, slots = end, tuple(sorted((*last.slots, *more)))
        rest = replace(last, slots=slots, start_s=switch, end_s=end, part="rest")
        if switch == last.start_s:
            result = (*others, replace(rest, part="whole"))
        else:
            result = (*others, replace(last, end_s=switch, part="first"), rest)
    return result


def _end(placed: Iterable[Assignment]) -> float:
    return max((one.end_s for one in placed), default=0.0)


def _rank(placed: Sequence[Assignment]) -> tuple[float, int, int]:
    """The earliest end; of equals the one with less DDP, then with fewer restarts."""
    return round(_end(placed), 6), sum(one.ddp for one in placed), len(placed)


# -------------------------------------------------------------------------------------------------------------- words


def _schedule(
    slots: tuple[int, ...],
    placed: tuple[Assignment, ...],
    alternatives: tuple[Alternative, ...],
    why: str,
    unit: Unit,
) -> Schedule:
    return Schedule(
        slots=slots,
        assignments=tuple(sorted(placed, key=lambda one: (one.start_s, one.slots))),
        makespan_s=_end(placed),
        alternatives=alternatives,
        why=why,
        unit=unit,
    )


def _words(placed: Sequence[Assignment], jobs: Mapping[str, Job]) -> str:
    whole = [one.rung for one in placed if one.ddp and one.part == "whole" and jobs[one.run_id].narrowest == 1]
    rest = [one.rung for one in placed if one.ddp and one.part == "rest"]
    said = [f"{_listed(whole)} with DDP"] if whole else []
    said += [f"the end of {_listed(rest)} with DDP"] if rest else []
    return " and ".join([*said, "the others packed"]) if said else "no run with DDP"


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")


def _why(
    chosen: tuple[Assignment, ...],
    pack: tuple[Assignment, ...],
    everything: tuple[Assignment, ...],
    jobs: Mapping[str, Job],
    unit: Unit,
) -> str:
    if unit == "FLOPs":
        return "no speed is known on this device yet, so runs are packed by their FLOPs and none is spread"
    if not any(job.narrowest < job.widest(2**16) for job in jobs.values()):
        return "packed, longest first"
    if _end(chosen) >= _end(pack):
        return "packed, longest first: DDP would pay for its traffic and save nothing"
    saved = [
        f"{1 - _end(chosen) / _end(other):.0%} earlier than {name}"
        for name, other in (("packing alone", pack), ("DDP for all", everything))
        if _end(other) > _end(chosen)
    ]
    return f"{_words(chosen, jobs)}: ends {' and '.join(saved)}"
