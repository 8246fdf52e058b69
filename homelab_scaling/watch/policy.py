"""When to warn, slow, pause and stop: a pure state machine, `judge(state, sample) -> (state, verdict)`.

No clock, no file, no driver: time is the sample's. Temperatures are judged by their distance to the card's own slowdown
limit. Upwards it acts at once or after a short hold; downwards only after a hold of at least `min_hold_s`, so that no
level comes and goes faster than that. A reading that is missing, stuck or impossible is unknown: nothing is relaxed and
nothing is slowed because of it, but work on a card that was hot when it fell silent is stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch.link import CardStatus, Level, Order, Transition
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample

STALE_S = 5.0
"""Silence that makes a reading stale (or five polls, if they are slower)."""
BLIND_STOP_S = 300.0
"""Slowed or paused and without a usable temperature for this long: stop."""
STUCK_S, STUCK_POWER_FRAC = 600.0, 0.20
PLAUSIBLE_C, MAX_JUMP_C_PER_S = (5.0, 125.0), 25.0
WARN_CLEAR_C = 2.0
"""A warning is lifted this far below where it was raised."""
SHARE_WINDOW_S, BUCKET_S = 600.0, 10.0
ALARMS = ("hardware thermal", "power brake")
HEAT = ("software thermal", "hardware thermal", "hardware slowdown")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Ten seconds of throttle words and clocks."""

    start_s: float
    n: int = 0
    words: Mapping[str, int] = field(default_factory=dict)
    hot_clock: tuple[float, int] = (0.0, 0)
    """Sum of SM clocks while heat throttles, and how many."""
    free_clock: tuple[float, int] = (0.0, 0)
    """The same while nothing throttles and the card is busy."""


@dataclass(frozen=True, kw_only=True)
class CardState:
    """Everything remembered of one card."""

    level: Level = "ok"
    duty: float = 1.0
    reason: str = ""
    since_s: float = 0.0
    health: str = "unknown"
    seen_s: float | None = None
    """When a usable temperature was last seen."""
    temperature_c: float | None = None
    """That temperature."""
    first_s: float | None = None
    same_since_s: float = 0.0
    power_w: tuple[float, float] | None = None
    """Lowest and highest since the temperature last changed."""
    hot_since_s: float | None = None
    cool_since_s: float | None = None
    """Below the recovery line."""
    cold_since_s: float | None = None
    """Below the resume line."""
    calm_since_s: float | None = None
    """Nothing to warn of."""
    alarm_since_s: float | None = None
    moved_s: float = -1e18
    pauses_s: tuple[float, ...] = ()
    vram_peak_bytes: int | None = None
    buckets: tuple[Bucket, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PolicyState:
    """By UUID."""

    cards: Mapping[str, CardState] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs on each card are to do, what to show of each card, and what changed just now."""

    orders: dict[str, Order]
    cards: dict[str, CardStatus]
    transitions: tuple[Transition, ...]


def initial_state() -> PolicyState:
    return PolicyState()


def strictest(several: Sequence[WatchLimits]) -> WatchLimits:
    """The limits for a card that several runs share: for each, the value that acts first or relaxes last."""
    if not several:
        return WatchLimits()
    cautious_when_small = {"slowdown_c", "slow_after_s", "alarm_after_s", "max_pauses", "vram_warn_frac", "duty_min"}
    cautious_when_small |= {"throttle_warn_frac", "interval_s", "hang_kill_s", "duty_step_up", "move_every_s"}
    chosen = {}
    for one in fields(WatchLimits):
        values = [getattr(limits, one.name) for limits in several]
        chosen[one.name] = min(values) if one.name in cautious_when_small else max(values)
    return WatchLimits(**chosen)


def judge(
    state: PolicyState, sample: Sample, facts: Mapping[str, CardFacts], limits: Mapping[str, WatchLimits]
) -> tuple[PolicyState, Verdict]:
    """The next state, and the verdict on every card that was ever seen.

    Args:
        sample: a poll; a card that failed to answer is there with state `error` or `lost`, or is missing.
        facts: by UUID; a card without facts is judged by the assumed slowdown limit.
        limits: by UUID; the defaults for a card that is not there.
    """
    cards, orders, shown, changes = {}, {}, {}, []
    for uuid in dict.fromkeys([*facts, *state.cards, *(c.uuid for c in sample.cards)]):
        before = state.cards.get(uuid, CardState(since_s=sample.t_s))
        own = limits.get(uuid, WatchLimits())
        reading = sample.card(uuid) or CardReading(uuid=uuid, state="error", error="not in this sample")
        after = _judge_card(before, reading, sample.t_s, facts.get(uuid), own)
        cards[uuid] = after
        orders[uuid] = Order(level=after.level, duty=after.duty, reason=after.reason)
        shown[uuid] = _show(after)
        if (after.level, after.duty) != (before.level, before.duty):
            changes.append(
                Transition(
                    t_s=sample.t_s,
                    uuid=uuid,
                    before=before.level,
                    after=after.level,
                    duty=after.duty,
                    reason=after.reason,
                )
            )
    return PolicyState(cards=cards), Verdict(orders=orders, cards=shown, transitions=tuple(changes))


@dataclass(frozen=True, kw_only=True)
class _Look:
    """One card's reading and what it is judged by."""

    reading: CardReading
    now: float
    slowdown: float
    limits: WatchLimits
    facts: CardFacts | None


def _judge_card(
    before: CardState, reading: CardReading, now: float, facts: CardFacts | None, limits: WatchLimits
) -> CardState:
    card = _note(before, reading, now, limits)
    slowdown = facts.slowdown_c if facts is not None and facts.slowdown_c is not None else limits.slowdown_c
    if card.seen_s == now:
        card = _time_spent(card, now, slowdown, limits)
    elif card.seen_s is None or now - card.seen_s > STALE_S:
        card = replace(card, cool_since_s=None, cold_since_s=None)  # what was not seen was not cold
    wanted = _wanted(card, _Look(reading=reading, now=now, slowdown=slowdown, limits=limits, facts=facts))
    if (wanted.level, wanted.duty) != (before.level, before.duty):
        wanted = replace(wanted, since_s=now)
    return wanted


# ---------------------------------------------------------------------------------------------------- what is known


def _note(card: CardState, reading: CardReading, now: float, limits: WatchLimits) -> CardState:
    """The card's memory with this reading in it; an unusable temperature leaves the last one standing."""
    card = replace(card, first_s=now if card.first_s is None else card.first_s, buckets=_share(card, reading, now))
    used = [b for b in (reading.vram_used_bytes, reading.vram_reserved_bytes) if b is not None]
    if used and reading.vram_used_bytes is not None:
        card = replace(card, vram_peak_bytes=max(card.vram_peak_bytes or 0, sum(used)))
    alarm = reading.reasons is not None and any(word in reading.reasons for word in ALARMS)
    card = replace(card, alarm_since_s=(now if card.alarm_since_s is None else card.alarm_since_s) if alarm else None)
    if reading.state == "lost":
        return replace(card, health="lost")
    t = reading.temperature_c
    if reading.state == "error" or t is None:
        since = card.seen_s if card.seen_s is not None else card.first_s
        silent = now - (since if since is not None else now) > max(STALE_S, 5 * limits.interval_s)
        kind = "stale" if card.seen_s is not None else "unknown"
        return replace(card, health=kind if silent or card.seen_s is None else card.health)
    if not PLAUSIBLE_C[0] <= t <= PLAUSIBLE_C[1] or _jumped(card, t, now):
        return replace(card, health="implausible")
    if t != card.temperature_c or card.power_w is None:
        power = None if reading.power_w is None else (reading.power_w, reading.power_w)
        return replace(card, health="ok", seen_s=now, temperature_c=t, same_since_s=now, power_w=power)
    if reading.power_w is not None:
        low, high = card.power_w
        card = replace(card, power_w=(min(low, reading.power_w), max(high, reading.power_w)))
    low, high = card.power_w or (0.0, 0.0)
    if now - card.same_since_s > STUCK_S and high - low > STUCK_POWER_FRAC * max(high, 1.0):
        return replace(card, health="stuck")
    return replace(card, health="ok", seen_s=now)


def _jumped(card: CardState, t: float, now: float) -> bool:
    if card.temperature_c is None or card.seen_s is None:
        return False
    return abs(t - card.temperature_c) > MAX_JUMP_C_PER_S * max(now - card.seen_s, 1.0)


def _share(card: CardState, reading: CardReading, now: float) -> tuple[Bucket, ...]:
    """The last ten minutes of throttle words and clocks, in buckets of ten seconds."""
    if reading.reasons is None:
        return card.buckets
    kept = tuple(b for b in card.buckets if b.start_s > now - SHARE_WINDOW_S)
    if not kept or now - kept[-1].start_s >= BUCKET_S:
        kept = (*kept, Bucket(start_s=now))
    last = kept[-1]
    words = {**last.words, **{word: last.words.get(word, 0) + 1 for word in reading.reasons}}
    hot, free, clock = last.hot_clock, last.free_clock, reading.sm_clock_mhz
    if clock is not None and any(word in HEAT for word in reading.reasons):
        hot = (hot[0] + clock, hot[1] + 1)
    elif clock is not None and "idle" not in reading.reasons:
        free = (free[0] + clock, free[1] + 1)
    return (*kept[:-1], replace(last, n=last.n + 1, words=words, hot_clock=hot, free_clock=free))


def _time_spent(card: CardState, now: float, slowdown: float, limits: WatchLimits) -> CardState:
    """Since when it is hot, cool and cold, from a temperature seen just now."""
    assert card.temperature_c is not None
    t = card.temperature_c

    def since(holds: bool, started: float | None) -> float | None:
        return (now if started is None else started) if holds else None

    return replace(
        card,
        hot_since_s=since(t >= slowdown - limits.slow_below_c, card.hot_since_s),
        cool_since_s=since(t < slowdown - limits.recover_below_c, card.cool_since_s),
        cold_since_s=since(t <= slowdown - limits.resume_below_c, card.cold_since_s),
    )


# -------------------------------------------------------------------------------------------------- what follows


def _wanted(card: CardState, look: _Look) -> CardState:
    """The card's state with its next level and duty."""
    stop = _over(card, look) or _blind(card, look)
    if stop is not None:
        return card if card.level == "stop" else replace(card, level="stop", reason=stop)
    known = card.seen_s == look.now
    if card.level == "stop":
        return _after_stop(card, look.now, look.limits) if known else card
    if card.level == "pause":
        return _after_pause(card, look.now, look.limits) if known else card
    if known:
        card = _paced(card, look.now, look.slowdown, look.limits)
        if card.level == "pause":
            stop = _over(card, look)  # this pause may be one too many
            return card if stop is None else replace(card, level="stop", reason=stop)
    return _with_warning(card, _warnings(card, look), look)


def _over(card: CardState, look: _Look) -> str | None:
    """Why work on this card must end, by what is known; None if it need not."""
    t, now, limits = card.temperature_c, look.now, look.limits
    recent = [s for s in card.pauses_s if now - s <= limits.pauses_within_s]
    if card.health == "lost":
        return "the driver has lost the card; it usually takes a reboot to get it back"
    if card.health == "ok" and t is not None and t >= look.slowdown:
        return f"{t:.0f} C, at its slowdown limit of {look.slowdown:.0f} C"
    if card.alarm_since_s is not None and now - card.alarm_since_s >= limits.alarm_after_s:
        return f"the hardware reports heat or a power brake for {now - card.alarm_since_s:.0f} s (look at PSU and fans)"
    if card.level == "pause" and now - card.since_s > limits.pauses_within_s:
        return f"paused for {(now - card.since_s) / 60:.0f} minutes and still not cool"
    if len(recent) > limits.max_pauses:
        return f"{len(recent)} pauses in {limits.pauses_within_s / 60:.0f} minutes"
    return None


def _blind(card: CardState, look: _Look) -> str | None:
    """Why work must end because the card fell silent while it was hot, slowed or paused; None if it need not."""
    t, limits = card.temperature_c, look.limits
    if card.health not in ("stale", "stuck", "implausible") or card.seen_s is None or t is None:
        return None
    silent = look.now - card.seen_s
    if t > look.slowdown - limits.slow_below_c and silent > max(STALE_S, 5 * limits.interval_s):
        return f"no usable temperature for {silent:.0f} s ({card.health}), and {t:.0f} C when last seen"
    if card.level in ("slow", "pause") and silent > BLIND_STOP_S:
        return f"no usable temperature for {silent:.0f} s ({card.health}) while {card.level}"
    return None


def _after_stop(card: CardState, now: float, limits: WatchLimits) -> CardState:
    """A stopped card is free again once it is cold; what stopped it is forgotten."""
    if card.cold_since_s is None or now - max(card.cold_since_s, card.since_s) < max(
        limits.resume_after_s, limits.min_hold_s
    ):
        return card
    return replace(card, level="ok", duty=1.0, reason="cold again", pauses_s=(), hot_since_s=None, calm_since_s=now)


def _after_pause(card: CardState, now: float, limits: WatchLimits) -> CardState:
    if card.cold_since_s is None or now - max(card.cold_since_s, card.since_s) < max(
        limits.resume_after_s, limits.min_hold_s
    ):
        return card
    duty = _stepped(card.duty - limits.duty_step_down, limits)
    return replace(card, level="slow", duty=duty, reason="cold after a pause", moved_s=now, hot_since_s=None)


def _paced(card: CardState, now: float, slowdown: float, limits: WatchLimits) -> CardState:
    """Pause at once, pace in steps, ease off in smaller ones."""
    t = card.temperature_c
    assert t is not None
    if t >= slowdown - limits.pause_below_c:
        recent = tuple(s for s in card.pauses_s if now - s <= limits.pauses_within_s)
        reason = f"{t:.0f} C, {slowdown - t:.0f} C below slowdown"
        return replace(card, level="pause", reason=reason, pauses_s=(*recent, now), hot_since_s=None, cold_since_s=None)
    may_move = now - card.moved_s >= max(limits.move_every_s, limits.min_hold_s)
    if card.hot_since_s is not None and now - card.hot_since_s >= limits.slow_after_s and may_move:
        duty = _stepped(card.duty - limits.duty_step_down, limits)
        if duty < card.duty:
            reason = f"{t:.0f} C for {now - card.hot_since_s:.0f} s"
            return replace(card, level="slow", duty=duty, reason=reason, moved_s=now)
    held = max(limits.recover_after_s, limits.min_hold_s)
    if card.duty < 1 and card.cool_since_s is not None and now - card.cool_since_s >= held and may_move:
        duty = min(1.0, round(card.duty + limits.duty_step_up, 6))
        level: Level = "slow" if duty < 1 else "ok"
        return replace(
            card,
            level=level,
            duty=duty,
            reason=f"cool for {held:.0f} s",
            moved_s=now,
            cool_since_s=now,
            calm_since_s=now,
        )
    return card


def _stepped(duty: float, limits: WatchLimits) -> float:
    return max(limits.duty_min, round(duty, 6))


def _warnings(card: CardState, look: _Look) -> list[str]:
    """What is worth a word though nothing is done about it."""
    said = []
    t, now, slowdown, limits, facts = card.temperature_c, look.now, look.slowdown, look.limits, look.facts
    if card.health != "ok":
        silent = now - (card.seen_s if card.seen_s is not None else (now if card.first_s is None else card.first_s))
        if card.health in ("stuck", "implausible") or silent > max(STALE_S, 5 * limits.interval_s):
            why = look.reading.error or (facts.missing.get("temperature") if facts else None)
            said.append(f"temperature {card.health} for {silent:.0f} s" + (f" ({why})" if why else ""))
    elif t is not None:
        line = slowdown - limits.warn_below_c - (WARN_CLEAR_C if card.level == "warn" else 0.0)
        if t >= line:
            said.append(f"{t:.0f} C, {slowdown - t:.0f} C below slowdown")
    if facts is not None and look.reading.vram_used_bytes is not None:
        full = (look.reading.vram_used_bytes + (look.reading.vram_reserved_bytes or 0)) / facts.vram_bytes
        if full > limits.vram_warn_frac:
            said.append(f"VRAM {100 * full:.0f} % full")
    share = throttled(card).get("software thermal", 0.0)
    if share > limits.throttle_warn_frac:
        lost = lost_clock(card)
        said.append(
            f"slowed by its own driver for heat {100 * share:.0f} % of ten minutes"
            + (f", {100 * lost:.0f} % of the clock lost meanwhile" if lost is not None else "")
        )
    return said


def _with_warning(card: CardState, said: list[str], look: _Look) -> CardState:
    """Raises a warning at once and lifts it after a hold; pacing, where there is any, stays what it is."""
    if card.level == "slow":
        return card
    if said:
        return replace(card, level="warn", reason="; ".join(said), calm_since_s=None)
    calm = look.now if card.calm_since_s is None else card.calm_since_s
    card = replace(card, calm_since_s=calm)
    if card.level == "warn" and look.now - max(calm, card.since_s) >= look.limits.min_hold_s:
        return replace(card, level="ok", reason="")
    return card


# ---------------------------------------------------------------------------------------------------------- to show


def throttled(card: CardState) -> dict[str, float]:
    """Throttle word -> share of the last ten minutes (of those that are on record)."""
    total = sum(b.n for b in card.buckets)
    words = dict.fromkeys(word for b in card.buckets for word in b.words)
    return {word: sum(b.words.get(word, 0) for b in card.buckets) / total for word in words} if total else {}


def lost_clock(card: CardState) -> float | None:
    """Share of the SM clock that heat costs while it throttles; None where either state was not seen."""
    hot, n_hot = (sum(b.hot_clock[i] for b in card.buckets) for i in (0, 1))
    free, n_free = (sum(b.free_clock[i] for b in card.buckets) for i in (0, 1))
    if not n_hot or not n_free or not free:
        return None
    return max(0.0, 1 - (hot / n_hot) / (free / n_free))


def _show(card: CardState) -> CardStatus:
    return CardStatus(
        level=card.level,
        duty=card.duty,
        reason=card.reason,
        since_s=card.since_s,
        health=card.health,
        throttled_frac=throttled(card),
        lost_clock_frac=lost_clock(card),
        vram_peak_bytes=card.vram_peak_bytes,
    )
