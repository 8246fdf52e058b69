"""What comes next, as pure functions: seconds left with a range, a temperature's trend, the watchdog's next act, and
what a driver means to do on several slots."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.plan.timetable import Timetable
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch.frame import CardNow, Span
from homelab_scaling.watch.runlog import Rate

HALF_LIFE, FAST_HALF_LIFE = 20.0, 3.0
"""Of the moving averages of the rate, in log intervals."""
LOOK_BACK = 200
DRIFT = 1.25
"""The fast average is itself late: a change is taken to be so much larger than it shows."""
Z90 = 1.64
N_BLOCKS, MIN_BLOCK = 8, 5
"""Means over stretches of the recent rates show how far their level wanders."""
SURPRISE_FRAC = 0.02
"""Of the time left that no rate ever tells."""
SLOPE_S, MIN_SLOPE_S = 180.0, 60.0
STEADY_C_PER_MIN = 0.3
"""A sensor of whole degrees shows less than this by chance."""
FAR_S = 6 * 3600.0
PLAN_SPREAD = 1.25
"""Range of a timetable's end: predictions of runs that have not begun are that uncertain."""


def time_left(rates: Sequence[Rate], tokens: float, *, overhead_frac: float = 0.0, duty: float = 1.0) -> Span | None:
    """Seconds until so many tokens are trained, with a range; None before the first rate.

    A moving average of the recent log rates. The range holds their noise, their wandering and their drift, and
    half of what validations and checkpoints have taken beside training: nine truths of ten under steady noise, eight
    where the level wanders (tested).

    Args:
        rates: oldest first; without intervals that hold a start-up.
        overhead_frac: seconds beside training per second of it.
        duty: share of the time that the watchdog lets it compute from now on.
    """
    if not rates:
        return None
    recent = [math.log(one.tokens_per_s) for one in rates[-LOOK_BACK:]]
    mean, noise = _moving(recent, HALF_LIFE)
    fast, _ = _moving(recent, FAST_HALF_LIFE)
    few = 0.1 / len(recent)
    spread = Z90**2 * (noise + _wander(recent) ** 2)
    wide = math.sqrt(spread + (DRIFT * (fast - mean)) ** 2 + SURPRISE_FRAC**2 + few**2)
    seconds = tokens / math.exp(mean) / max(duty, 0.01)
    return Span(
        low=seconds * math.exp(-wide) * (1 + 0.5 * overhead_frac),
        mid=seconds * (1 + overhead_frac),
        high=seconds * math.exp(wide) * (1 + 1.5 * overhead_frac),
    )


def _moving(values: Sequence[float], half_life: float) -> tuple[float, float]:
    """Mean with weights that halve every `half_life` values back, and its variance if the values were independent."""
    weights = [0.5 ** ((len(values) - 1 - i) / half_life) for i in range(len(values))]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    scatter = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total
    n = total**2 / sum(w * w for w in weights)
    return mean, scatter / (n - 1) if n > 1.5 else scatter


def _wander(values: Sequence[float]) -> float:
    """Standard deviation of the means of neighbouring stretches; 0 with fewer than three."""
    size = max(MIN_BLOCK, len(values) // N_BLOCKS)
    means = [statistics.fmean(values[i : i + size]) for i in range(len(values) % size, len(values), size)]
    return statistics.stdev(means) if len(means) > 2 else 0.0


def slope_c_per_min(history: Sequence[tuple[float, float]]) -> float | None:
    """Degrees a minute over the last three minutes; 0 where that is within the sensor's grain, None with too little.

    Args:
        history: (time in seconds, temperature), oldest first.
    """
    if not history:
        return None
    recent = [(t, c) for t, c in history if t >= history[-1][0] - SLOPE_S]
    if len(recent) < 5 or recent[-1][0] - recent[0][0] < MIN_SLOPE_S:
        return None
    n = len(recent)
    mean_t, mean_c = sum(t for t, _ in recent) / n, sum(c for _, c in recent) / n
    spread = sum((t - mean_t) ** 2 for t, _ in recent)
    slope = 60 * sum((t - mean_t) * (c - mean_c) for t, c in recent) / spread
    return slope if abs(slope) >= STEADY_C_PER_MIN else 0.0


def duration(seconds: float) -> str:
    """48 s, 12 min, 2 h 41 min, 11 h, 3 d 4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours >= 10:
        hours, minutes = round(seconds / 3600), 0
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def next_act(card: CardNow, limits: WatchLimits) -> tuple[str, float]:
    """What the watchdog would do next with a card, in a sentence, and in how many seconds (infinite: not in sight)."""
    if card.state == "lost":
        return "stays stopped: the driver has lost the card, which usually takes a reboot", 0.0
    if card.temperature_c is None or card.state == "error" or card.health not in ("ok", "unknown"):
        why = card.error or card.missing.get("temperature_c") or card.missing.get("temperature") or card.health
        return f"is watched without a temperature ({why})", 60.0
    if card.level in ("stop", "pause"):
        act = "may work again" if card.level == "stop" else "resumes"
        return _falling(card, limits.resume_below_c, limits.resume_after_s, act), 0.0
    hot = card.temperature_c >= card.slowdown_c - limits.slow_below_c
    if card.level == "slow" and not hot and (card.slope_c_per_min or 0.0) <= 0:
        return _easing(card, limits), 0.0
    if card.level != "slow" and hot:
        return f"slows: {card.temperature_c:.0f} C for {limits.slow_after_s:.0f} s is too long", 0.0
    acts = [("slows", limits.slow_below_c), ("pauses", limits.pause_below_c), ("stops", 0.0)]
    act, below_c = next(
        (a, b) for a, b in acts[card.level == "slow" :] if card.temperature_c < card.slowdown_c - b or not b
    )
    return _rising(card, act, card.slowdown_c - below_c)


def _easing(card: CardNow, limits: WatchLimits) -> str:
    assert card.temperature_c is not None
    if card.temperature_c < card.slowdown_c - limits.recover_below_c:
        return (
            f"speeds up by {100 * limits.duty_step_up:.0f} % every {limits.recover_after_s:.0f} s while it is that cool"
        )
    return _falling(card, limits.recover_below_c, limits.recover_after_s, "speeds up again")


def _rising(card: CardNow, act: str, line_c: float) -> tuple[str, float]:
    assert card.temperature_c is not None
    away, slope = line_c - card.temperature_c, card.slope_c_per_min
    said = f"{act} at {line_c:.0f} C: {max(0.0, away):.0f} C away"
    if slope is None:
        return said, math.inf
    if slope <= 0:
        return f"{said}, {'steady' if slope == 0 else f'falling {-slope:.1f} C/min'}", math.inf
    seconds = 60 * max(0.0, away) / slope
    rising = f"{said}, rising {slope:.1f} C/min"
    if seconds > FAR_S:
        return f"{rising}, more than {duration(FAR_S)}", seconds
    return f"{rising}, about {duration(seconds)}", seconds


def _falling(card: CardNow, below_c: float, held_s: float, act: str) -> str:
    assert card.temperature_c is not None
    line = card.slowdown_c - below_c
    away, slope = card.temperature_c - line, card.slope_c_per_min
    said = f"{act} at {line:.0f} C held {held_s:.0f} s"
    if away <= 0:
        return f"{said}: cool enough now"
    said = f"{said}: {away:.0f} C to go"
    if slope is None:
        return said
    if slope >= 0:
        return f"{said}, {'steady' if slope == 0 else f'rising {slope:.1f} C/min'}"
    return f"{said}, falling {-slope:.1f} C/min, about {duration(60 * away / -slope + held_s)}"


def soonest(cards: Sequence[CardNow], limits: Sequence[WatchLimits]) -> str | None:
    """The act that comes first over all cards; None without cards."""
    acts = [(*next_act(card, own), card) for card, own in zip(cards, limits, strict=True)]
    if not acts:
        return None
    order = {"stop": 0, "pause": 1, "slow": 2, "warn": 3, "ok": 3}

    def urgency(act: tuple[str, float, CardNow]) -> tuple[float, ...]:
        _, seconds, card = act
        return (order[card.level], seconds, card.headroom_c if card.headroom_c is not None else -1.0)

    text, _seconds, card = min(acts, key=urgency)
    return f"{called(card)} {text}"


def read_timetable(plain: dict[str, Any] | None) -> Timetable | None:
    """schedule.json; None where it cannot be read, which is no reason to show nothing else."""
    if plain is None:
        return None
    try:
        return codec.from_plain(plain, Timetable, "schedule.json")
    except HomelabError:
        return None


def until_all_end(table: Timetable | None, now_s: float) -> Span | None:
    """Seconds until the last run of several slots ends; None with one slot, or where a run's end is unknown."""
    if table is None or len(table.slots) < 2 or table.end_s is None:
        return None
    left = max(0.0, table.end_s - now_s)
    return Span(low=left / PLAN_SPREAD, mid=left, high=left * PLAN_SPREAD)


def called(card: CardNow) -> str:
    """GPU 0."""
    return f"GPU {card.index}" if card.index is not None else f"GPU {card.uuid[:12]}"
