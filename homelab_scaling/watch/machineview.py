"""The cards and their watchdog as the monitor sees them: what lies under LAB/machine."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch import link
from homelab_scaling.watch.ahead import slope_c_per_min, soonest
from homelab_scaling.watch.energy import WallModel, read_wall_model
from homelab_scaling.watch.frame import CardNow, Moment, Watchdog
from homelab_scaling.watch.gpu import SensorSource
from homelab_scaling.watch.link import LEVELS, CardStatus, Level, MachineFolder, Registration, Status
from homelab_scaling.watch.policy import strictest
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.tail import Tail

HISTORY_S = 600.0
HISTORY_BYTES = 4 * 2**20
"""Ten minutes of eight cards fit in it."""
GRAIN_S = 5.0
"""Temperatures of a frame are means of so many seconds."""
FIND_EVERY_S = 10.0
N_MOMENTS = 30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One look at the cards."""

    cards: tuple[CardNow, ...]
    watchdog: Watchdog
    registrations: tuple[Registration, ...]
    wall: WallModel
    ahead: str


class History:
    """Temperatures of the last ten minutes, by card, and the newest sample."""

    def __init__(self) -> None:
        self.facts: tuple[CardFacts, ...] = ()
        self.sample: Sample | None = None
        self._seen: dict[str, deque[tuple[float, float]]] = {}

    def feed(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Lines of gpu.jsonl; what is neither facts nor a sample is passed over."""
        for line in lines:
            try:
                if "facts" in line:
                    self.facts = codec.from_plain(line["facts"], tuple[CardFacts, ...], "gpu.jsonl")
                else:
                    self.add(codec.from_plain(dict(line), Sample, "gpu.jsonl"))
            except HomelabError:
                continue

    def add(self, sample: Sample) -> None:
        """A sample; one older than the newest is passed over."""
        if self.sample is not None and sample.t_s <= self.sample.t_s:
            return
        self.sample = sample
        for card in sample.cards:
            temperatures = self._seen.setdefault(card.uuid, deque())
            if card.temperature_c is not None:
                temperatures.append((sample.t_s, card.temperature_c))
            while temperatures and temperatures[0][0] < sample.t_s - HISTORY_S:
                temperatures.popleft()

    def of(self, uuid: str, now_s: float) -> list[tuple[float, float]]:
        """(Unix time, temperature) of the ten minutes before `now_s`."""
        return [(t, c) for t, c in self._seen.get(uuid, ()) if now_s - HISTORY_S <= t <= now_s + 1]


class LiveMachine:
    """LAB/machine (or where this machine's watchdog keeps its files), read as it changes.

    Args:
        lab: the folder that holds the labs.
        open_sensors: asked for the cards themselves where there is no watchdog; None never asks.
    """

    def __init__(self, lab: Path, open_sensors: Callable[[], SensorSource] | None = None) -> None:
        self.lab, self.open_sensors = lab, open_sensors
        self.asks_driver = False
        """Whether to ask the driver itself while there is no watchdog."""
        self._sensors: SensorSource | None = None
        self._found_s = float("-inf")
        self._open(link.machine_folder(lab))

    def _open(self, folder: MachineFolder) -> None:
        self.folder = folder
        self._samples = Tail(folder.samples, first_bytes=HISTORY_BYTES)
        self._events_tail = Tail(folder.events, first_bytes=2**20)
        self._events: deque[dict[str, Any]] = deque(maxlen=N_MOMENTS)
        self._history = History()

    def look(self, now_s: float) -> Machine:
        """Everything that is there now."""
        status = self.folder.read_status()
        if (status is None or not status.is_fresh(now_s)) and now_s - self._found_s >= FIND_EVERY_S:
            self._found_s = now_s
            folder = link.machine_folder(self.lab)
            if folder.path != self.folder.path:
                self._open(folder)
                status = self.folder.read_status()
        self._history.feed(self._samples.read().lines)
        self._events.extend(self._events_tail.read().lines)
        registrations = tuple(self.folder.registrations()) if self.folder.runs.is_dir() else ()
        fresh = status is not None and status.is_fresh(now_s)
        if not fresh and self.asks_driver and self.open_sensors is not None:
            status = self._ask(now_s)
            return assemble(
                status,
                self._history,
                self._events,
                registrations,
                now_s,
                state="direct",
                wall=read_wall_model(self.folder),
            )
        self.close()
        ended = bool(self._events) and self._events[-1].get("kind") == "stop"
        state = "alive" if fresh else "none" if status is None or ended else "silent"
        return assemble(
            status, self._history, self._events, registrations, now_s, state=state, wall=read_wall_model(self.folder)
        )

    def _ask(self, now_s: float) -> Status:
        assert self.open_sensors is not None
        if self._sensors is None:
            self._sensors = self.open_sensors()
        source = self._sensors
        sample = source.poll(now_s)
        self._history.add(sample)
        return Status(
            pid=0,
            started_s=now_s,
            t_s=now_s,
            interval_s=source.interval_s,
            poll_p50_s=source.poll_p50_s,
            poll_p99_s=source.poll_p99_s,
            source=source.source,
            facts=source.facts,
            readings=sample.cards,
            cards={
                card.uuid: CardStatus(health="unknown" if card.temperature_c is None else "ok") for card in sample.cards
            },
            sensor_error=source.error,
        )

    def close(self) -> None:
        """Lets go of the driver, if it was asked."""
        sensors, self._sensors = self._sensors, None
        if sensors is not None:
            sensors.close()


def assemble(
    status: Status | None,
    history: History,
    events: Sequence[dict[str, Any]],
    registrations: Sequence[Registration],
    now_s: float,
    *,
    state: Any,
    wall: WallModel,
) -> Machine:
    """One look, from whatever of its parts there is."""
    facts = status.facts if status and status.facts else history.facts
    readings = status.readings if status else history.sample.cards if history.sample else ()
    judged = status.cards if status else {}
    limits = {
        uuid: strictest([r.limits for r in registrations if uuid in r.cards])
        for uuid in dict.fromkeys([*(f.uuid for f in facts), *(c.uuid for c in readings)])
    }
    cards = tuple(
        _card(
            uuid,
            facts=next((f for f in facts if f.uuid == uuid), None),
            reading=next((c for c in readings if c.uuid == uuid), None),
            judged=judged.get(uuid, CardStatus(health="unknown")),
            history=history.of(uuid, now_s),
            limits=limits[uuid],
            now_s=now_s,
            runs=tuple(r.run_id for r in registrations if uuid in r.cards),
        )
        for uuid in limits
    )
    last_s = status.t_s if status else history.sample.t_s if history.sample else None
    levels: list[Level] = [card.level for card in cards]
    watchdog = Watchdog(
        state=state,
        level=max(levels, key=LEVELS.index, default="ok"),
        age_s=None if last_s is None else max(0.0, now_s - last_s),
        interval_s=status.interval_s if status else None,
        poll_p50_s=status.poll_p50_s if status else None,
        poll_p99_s=status.poll_p99_s if status else None,
        pid=status.pid if status and state == "alive" else None,
        sensor_error=status.sensor_error if status else None,
        moments=tuple(_moments(events, status, cards)),
        n_runs=len(registrations),
    )
    return Machine(
        cards=cards,
        watchdog=watchdog,
        registrations=tuple(registrations),
        wall=wall,
        ahead=_ahead(watchdog, cards, [limits[card.uuid] for card in cards]),
    )


def _ahead(watchdog: Watchdog, cards: Sequence[CardNow], limits: Sequence[WatchLimits]) -> str:
    if watchdog.state == "silent":
        return "nothing while the watchdog is silent; a run restarts it, and so does `homelab watchdog`"
    if watchdog.state in ("none", "direct"):
        if not cards:
            return "nothing, there is no card to guard"
        return "nothing without a watchdog; `homelab run` starts one, and so does `homelab watchdog`"
    return soonest(cards, limits) or "nothing, there is no card to guard"


def _card(
    uuid: str,
    *,
    facts: CardFacts | None,
    reading: CardReading | None,
    judged: CardStatus,
    history: Sequence[tuple[float, float]],
    limits: WatchLimits,
    now_s: float,
    runs: tuple[str, ...],
) -> CardNow:
    reading = reading or CardReading(uuid=uuid, state="error", error="not in the last sample")
    assumed = facts is None or facts.slowdown_c is None
    used = reading.vram_used_bytes
    peak = judged.vram_peak_bytes
    return CardNow(
        uuid=uuid,
        index=facts.index if facts else None,
        name=facts.name.removeprefix("NVIDIA ").removeprefix("GeForce ") if facts else "unknown card",
        state=reading.state,
        error=reading.error,
        temperature_c=reading.temperature_c,
        slowdown_c=limits.slowdown_c if facts is None or facts.slowdown_c is None else facts.slowdown_c,
        slowdown_assumed=assumed,
        power_w=reading.power_w,
        power_limit_w=reading.power_limit_w
        if reading.power_limit_w is not None
        else facts.power_limit_w
        if facts
        else None,
        sm_clock_mhz=reading.sm_clock_mhz,
        sm_clock_max_mhz=facts.sm_clock_max_mhz if facts else None,
        vram_bytes=facts.vram_bytes if facts else None,
        vram_used_bytes=used,
        vram_reserved_bytes=reading.vram_reserved_bytes,
        vram_peak_bytes=peak if peak is not None else None,
        utilisation_frac=reading.utilisation_frac,
        fan_frac=reading.fan_frac,
        reasons=reading.reasons,
        throttled_frac=dict(judged.throttled_frac),
        lost_clock_frac=judged.lost_clock_frac,
        level=judged.level,
        duty=judged.duty,
        reason=judged.reason,
        health=judged.health,
        history=tuple(_grained(history, now_s)),
        slope_c_per_min=slope_c_per_min(history),
        missing=dict(facts.missing) if facts else {},
        runs=runs,
    )


def _grained(history: Sequence[tuple[float, float]], now_s: float) -> list[tuple[float, float]]:
    """Means of a few seconds, as (seconds before now, temperature)."""
    cells: dict[int, list[float]] = {}
    for t, c in history:
        cells.setdefault(int((now_s - t) // GRAIN_S), []).append(c)
    return [(cell * GRAIN_S, sum(cs) / len(cs)) for cell, cs in sorted(cells.items(), reverse=True)]


def _moments(events: Sequence[dict[str, Any]], status: Status | None, cards: Sequence[CardNow]) -> list[Moment]:
    """The last events in words, oldest first; the status's own transitions where events.jsonl is not there."""
    names = {card.uuid: f"GPU {card.index}" for card in cards if card.index is not None}
    found = [moment for event in events if (moment := _moment(event, names)) is not None]
    if not found and status is not None:
        plain = [{"kind": "transition", **codec.to_plain(t)} for t in status.transitions]
        found = [moment for event in plain if (moment := _moment(event, names)) is not None]
    return found


def _moment(event: Mapping[str, Any], names: Mapping[str, str]) -> Moment | None:
    t_s, kind, reason = event.get("t_s"), event.get("kind"), str(event.get("reason") or "")
    if not isinstance(t_s, int | float):
        return None
    if kind == "transition":
        before, after, duty = event.get("before"), event.get("after"), event.get("duty")
        if before not in LEVELS or after not in LEVELS:
            return None
        paced = f" at {100 * duty:.0f} %" if isinstance(duty, int | float) and duty < 1 and after == "slow" else ""
        said = f"{before} to {after}{paced}" if before != after else f"{after}{paced}"
        who = names.get(str(event.get("uuid")), str(event.get("uuid"))[:12])
        return Moment(t_s=t_s, who=who, text=f"{said}: {reason}" if reason else said, level=after)
    if kind in ("ended", "dropped"):
        word = "ended" if kind == "ended" else "no longer watched"
        return Moment(
            t_s=t_s, who=str(event.get("run_id")), text=f"{word}: {reason}", level="stop" if kind == "ended" else "ok"
        )
    if kind in ("start", "stop"):
        return Moment(t_s=t_s, who="watchdog", text="started" if kind == "start" else f"ended: {reason}", level="ok")
    return Moment(t_s=t_s, who=str(kind), text=reason, level="warn") if reason else None
