"""Cards, watchdog and the list of runs, as lines of a given width."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from homelab_scaling.watch import words
from homelab_scaling.watch.ahead import called, duration
from homelab_scaling.watch.bars import (
    MIN_TAIL,
    Part,
    Series,
    bar,
    binned,
    chart,
    cut,
    fit,
    padded,
    part,
    spark,
    wrapped,
)
from homelab_scaling.watch.frame import CardNow, Frame, Rung, Watchdog
from homelab_scaling.watch.link import Level
from homelab_scaling.watch.machineview import HISTORY_S
from homelab_scaling.watch.runbox import STATE_STYLE

LEVEL_STYLE: dict[Level, str] = {
    "ok": "green",
    "warn": "yellow",
    "slow": "bold yellow",
    "pause": "bold magenta",
    "stop": "bold red",
}
COLD_C = 45.0
"""Bars of temperature begin so far below the slowdown limit."""
LOSS_WORD = {"row": "loss", "validation": "val", "training": "train"}
MIN_CHART = 5
MIN_TREND_C = 12.0
"""A sparkline of temperature spans at least so much."""
HARMLESS = ("idle", "application clocks", "display clocks")


def heat_style(headroom_c: float) -> str:
    """By distance to the card's own limit, as the policy's defaults see it."""
    return "green" if headroom_c > 12 else "yellow" if headroom_c > 8 else "red"


def card_title(card: CardNow, dog: Watchdog) -> Text:
    """Which card, and how it is; how old that is, where it is old."""
    title = Text.assemble((called(card), "bold"), f"  {card.name}  ")
    if dog.state in ("silent", "none") and dog.age_s is not None:
        return title.append(f"{words.ago(dog.age_s)} old", "bold red")
    if card.state == "lost":
        return title.append("lost", "bold red")
    level = f"{card.level}, {100 * card.duty:.0f} %" if card.duty < 1 and card.level == "slow" else card.level
    return title.append(level, LEVEL_STYLE[card.level])


def card_lines(card: CardNow, width: int, most: int) -> list[Text]:
    """Up to `most` lines, the important ones first."""
    if card.state == "lost":
        return wrapped(f"the driver has lost this card: {card.error or 'no reason given'}", width, min(most, 3), "red")
    lines = [_heat(card, width), _power(card, width), _vram(card, width), _throttle(card, width)]
    reason = [cut(Text(card.reason, LEVEL_STYLE[card.level]), width)] if card.reason and card.level != "ok" else []
    rows = most - len(lines) - len(reason)
    if rows >= MIN_CHART and len(card.history) > 1:
        return [*lines, *_heat_chart(card, width, rows), *reason]
    return [*lines, _trend(card, width), *reason][:most]


def card_line(card: CardNow, width: int) -> Text:
    """The card in one line."""
    title = Text.assemble((called(card), "bold"))
    if card.state == "lost":
        return fit([part(3, title), part(4, [("lost", "bold red")]), part(1, card.error or "")], width)
    return fit(
        [
            part(9, title),
            part(1, card.name),
            part(8, [(card.level, LEVEL_STYLE[card.level])]),
            part(7, _temperature(card)),
            part(2, _heat_bar(card, 12)) if card.temperature_c is not None else None,
            _headroom(card, 6),
            part(5, *_of(card.power_w, card.power_limit_w, "W")),
            part(4, _vram_short(card)),
            part(3, *_of(card.sm_clock_mhz, card.sm_clock_max_mhz, "MHz")),
            part(0, f"fan {words.percent(card.fan_frac)}"),
        ],
        width,
        gap="  ",
    )


def _temperature(card: CardNow) -> Text:
    if card.temperature_c is None:
        why = card.error or card.missing.get("temperature_c") or card.missing.get("temperature")
        return Text(f"temperature unknown{f': {why}' if why else ''}", "yellow")
    return Text(f"{card.temperature_c:.0f} C", f"bold {heat_style(card.headroom_c or 0.0)}")


def _headroom(card: CardNow, keep: int) -> Part | None:
    if card.headroom_c is None:
        return None
    limit = f"{card.slowdown_c:.0f} C" + (" (assumed)" if card.slowdown_assumed else "")
    if card.headroom_c < 0:
        return part(
            keep,
            [(f"{-card.headroom_c:.0f} C above its slowdown at {limit}", "bold red")],
            [("above slowdown", "bold red")],
        )
    return part(
        keep,
        f"{card.headroom_c:.0f} C below slowdown at {limit}",
        f"{card.headroom_c:.0f} C to {limit}",
        f"{card.headroom_c:.0f} C left",
    )


def _heat_bar(card: CardNow, width: int) -> Text:
    assert card.temperature_c is not None and card.headroom_c is not None
    low, high = card.slowdown_c - COLD_C, card.slowdown_c
    return bar((card.temperature_c - low) / (high - low), width, heat_style(card.headroom_c))


def _heat(card: CardNow, width: int) -> Text:
    if card.temperature_c is None:
        return cut(_temperature(card), width)
    beside = _headroom(card, 2)
    health = None if card.health in ("ok", "unknown") else part(4, [(f"sensor {card.health}", "bold red")])
    rest = fit([part(5, _temperature(card)), health, beside], max(10, width - 12), gap="  ")
    room = width - rest.cell_len - 2
    drawn = part(1, _heat_bar(card, min(room, 30))) if room >= 6 else None
    return fit([part(5, _temperature(card)), drawn, health, beside], width, gap="  ")


def _power(card: CardNow, width: int) -> Text:
    return fit(
        [
            part(5, *_of(card.power_w, card.power_limit_w, "W")),
            part(4, *_of(card.sm_clock_mhz, card.sm_clock_max_mhz, "MHz")),
            part(2, f"fan {words.percent(card.fan_frac)}"),
            None if card.utilisation_frac is None else part(1, f"busy {words.percent(card.utilisation_frac)}"),
        ],
        width,
        gap="  ",
    )


def _of(value: float | None, most: float | None, unit: str) -> tuple[str, ...]:
    """281 of 320 W, 281/320 W, 281 W; what is unknown is a dash."""
    if value is None:
        return (f"{words.UNKNOWN} {unit}",)
    alone = f"{value:,.0f} {unit}"
    return (
        (alone,) if most is None else (f"{value:,.0f} of {most:,.0f} {unit}", f"{value:,.0f}/{most:,.0f} {unit}", alone)
    )


def _vram(card: CardNow, width: int) -> Text:
    if card.vram_used_bytes is None:
        return fit([part(2, f"VRAM {words.UNKNOWN} of {words.gib(card.vram_bytes)} GiB")], width)
    reserved = card.vram_reserved_bytes
    held = (card.vram_used_bytes + (reserved or 0)) / card.vram_bytes if card.vram_bytes else 0.0
    style = "bold red" if held > 0.95 else "bold"
    total = f" of {words.gib(card.vram_bytes)} GiB"
    used = (words.gib(card.vram_used_bytes), style)
    more = "" if reserved is None else f" + {words.gib(reserved)}"
    return fit(
        [
            part(
                4,
                ["VRAM ", used, f"{more} reserved" if more else "", total],
                ["VRAM ", used, more.replace(" ", ""), total],
                ["VRAM ", used, total],
            ),
            None if card.vram_peak_bytes is None else part(3, f"peak {words.gib(card.vram_peak_bytes)}"),
        ],
        width,
        gap="  ",
    )


def _vram_short(card: CardNow) -> str:
    used = None if card.vram_used_bytes is None else card.vram_used_bytes + (card.vram_reserved_bytes or 0)
    return f"{words.gib(used)}/{words.gib(card.vram_bytes)} GiB"


def _throttle(card: CardNow, width: int) -> Text:
    """Why the clock is not higher, now and over ten minutes."""
    if card.reasons is None and not card.throttled_frac:
        return cut(Text("clock limits unknown: the driver does not say", "dim"), width)
    now = [r for r in card.reasons or () if r not in HARMLESS]
    shares = sorted(((s, w) for w, s in card.throttled_frac.items() if w not in HARMLESS and s > 0), reverse=True)
    if not now and not shares:
        idle = "idle" in (card.reasons or ())
        return fit([part(2, "idle" if idle else "no throttling in 10 min", "no throttling")], width)
    said = [
        part(3 - i, [(f"{word} {words.percent(share)}", _word_style(word)), " of 10 min" * (i == 0)])
        for i, (share, word) in enumerate(shares[:3])
    ]
    if not shares:
        said = [part(2, [(", ".join(now), _word_style(now[0]))])]
    lost = card.lost_clock_frac
    return fit([*said, None if not lost else part(0, f"{words.percent(lost)} of the clock lost")], width, gap=", ")


def _word_style(word: str) -> str:
    return (
        "bold red"
        if word in ("hardware thermal", "power brake", "hardware slowdown")
        else "yellow"
        if "thermal" in word
        else ""
    )


def _slope_words(card: CardNow) -> str:
    slope = card.slope_c_per_min
    if slope is None:
        return ""
    return "steady" if slope == 0 else f"{'rising' if slope > 0 else 'falling'} {abs(slope):.1f} C/min"


def _trend(card: CardNow, width: int) -> Text:
    said = _slope_words(card)
    words_part = part(2, f"10 min, {said}", said) if said else part(2, "10 min")
    room = width - words_part.forms[0].cell_len - 2
    if not card.history or room < 8:
        return cut(Text("no history yet", "dim"), width) if not card.history else fit([words_part], width)
    n = min(room, 60)
    values = binned([(-ago, c) for ago, c in card.history], -HISTORY_S, 0.0, n)
    seen = [c for _, c in card.history]
    middle, half = (min(seen) + max(seen)) / 2, max(MIN_TREND_C, max(seen) - min(seen)) / 2
    low, high = middle - half, middle + half
    return fit(
        [part(1, spark(values, low, high, lambda c: heat_style(card.slowdown_c - c))), words_part], width, gap="  "
    )


def _heat_chart(card: CardNow, width: int, height: int) -> list[Text]:
    """Ten minutes of temperature, with its ends and, where it is near, the slowdown limit."""
    seen = [c for _, c in card.history]
    low, high = min(seen) - 2, max(max(seen) + 2, min(seen) + MIN_TREND_C)
    limit = card.slowdown_c
    if limit - max(seen) < MIN_TREND_C:
        high = max(high, limit)
    style = heat_style(card.slowdown_c - seen[-1])
    series = [Series([(-ago, c) for ago, c in card.history], style)]
    if high >= limit:
        dashes = [Series([(-HISTORY_S + 30.0 * i, limit)], "red", joined=False) for i in range(int(HISTORY_S / 30) + 1)]
        series = [*dashes, *series]
    labels = [f"{high:.0f} C", f"{low:.0f} C"]
    margin = max(map(len, labels)) + 1
    rows = chart(series, width - margin, height - 1, (-HISTORY_S, 0.0), (low, high))
    drawn = []
    for i, row in enumerate(rows):
        label = labels[0] if i == 0 else labels[1] if i == len(rows) - 1 else ""
        drawn.append(Text.assemble((f"{label:>{margin - 1}} ", "dim"), row))
    slope = _slope_words(card)
    axis = fit([part(2, [("10 min ago", "dim")]), part(3, slope) if slope else None], width - margin - 5, gap="  ")
    return [*drawn, padded(Text(" " * margin).append_text(axis), width - 3).append("now", "dim")]


# --------------------------------------------------------------------------------------------------- watchdog


def dog_title(dog: Watchdog) -> Text:
    """Whether anybody guards the cards, and how old what it says is."""
    age = "" if dog.age_s is None else words.ago(dog.age_s)
    match dog.state:
        case "alive":
            title = Text.assemble(("watchdog", "bold"), "  ", (dog.level, LEVEL_STYLE[dog.level]))
            return title.append(f"  sensors {age} ago", "default" if (dog.age_s or 0.0) < 5 else "bold red")
        case "silent":
            return Text.assemble(
                ("watchdog silent", "bold red"), (f" for {age}", "bold red"), "  what is shown is as old"
            )
        case "recording":
            title = Text.assemble(("watchdog", "bold"), " as recorded  ", (dog.level, LEVEL_STYLE[dog.level]))
            return title
        case "direct":
            return Text.assemble(("no watchdog running", "bold yellow"), f"  asked the driver {age} ago" if age else "")
        case _:
            old = f"  what is shown is {age} old" if age else ""
            return Text.assemble(("no watchdog running", "bold yellow"), old)


def dog_right(dog: Watchdog) -> Text | None:
    if dog.poll_p50_s is None or dog.state not in ("alive", "direct"):
        return None
    return Text(f"a poll takes {words.step(dog.poll_p50_s)}, p99 {words.step(dog.poll_p99_s)}", "dim")


def dog_lines(frame: Frame, width: int, most: int) -> list[Text]:
    """What comes next, then what happened, newest first."""
    dog = frame.watchdog
    lines = wrapped(f"next: {frame.ahead}", width, 1 if most < 2 else 2)
    lines[0].stylize("bold", 0, 5)
    if dog.sensor_error:
        lines.append(cut(Text(f"no sensors: {dog.sensor_error}", "bold red"), width))
    for moment in reversed(dog.moments):
        if len(lines) >= most:
            break
        head = f"{words.clock(moment.t_s)}  "
        said = Text.assemble(
            (head, "dim"),
            (f"{moment.who} ", "bold"),
            (moment.text, LEVEL_STYLE[moment.level] if moment.level != "ok" else ""),
        )
        lines.append(cut(said, width))
    if len(lines) == 1 and most > 1 and dog.state in ("alive", "recording"):
        lines.append(Text("no change of level so far", "dim"))
    return lines[:most]


# ------------------------------------------------------------------------------------------------------- rungs


def rung_title(frame: Frame) -> Text:
    total = len(frame.rungs)
    words_by_state: dict[str, int] = {}
    for rung in frame.rungs:
        words_by_state[rung.state] = words_by_state.get(rung.state, 0) + 1
    said = ", ".join(f"{n} {state}" for state, n in words_by_state.items())
    return Text.assemble(("runs", "bold"), f"  {said}" if total else "  none")


def rung_lines(frame: Frame, width: int, most: int) -> list[Text]:
    """A window of the list around the run in focus; what is outside is counted."""
    rungs = frame.rungs
    if not rungs or most < 1:
        return []
    at = next((i for i, r in enumerate(rungs) if frame.run and r.run_id == frame.run.run_id), 0)
    n = min(most, len(rungs))
    first = max(0, min(at - n // 2, len(rungs) - n))
    columns = _columns(rungs, width)
    lines = [
        _rung_line(rung, columns, width, frame.run is not None and rung.run_id == frame.run.run_id)
        for rung in rungs[first : first + n]
    ]
    hidden = len(rungs) - n
    if hidden and n > 1:
        kept = rungs[first : first + n - 1]
        rest = [r for r in rungs if r not in kept]
        said: dict[str, int] = {}
        for one in rest:
            said[one.state] = said.get(one.state, 0) + 1
        lines[-1] = cut(Text(f"and {len(rest)} more: " + ", ".join(f"{c} {s}" for s, c in said.items()), "dim"), width)
    return lines


@dataclass(frozen=True)
class _Columns:
    """What the list shows of each run, and how wide; the same for all of them."""

    with_seed: bool
    name: int
    state: int
    progress: int
    shown: frozenset[str]


OPTIONAL = (("loss", 11), ("time", 9), ("progress", 0), ("kwh", 10), ("usd", 8), ("size", 6), ("long time", 7))
"""Columns in the order in which they are given room, and their widths; `long time` has room for an `about`."""


def _columns(rungs: Sequence[Rung], width: int) -> _Columns:
    with_seed = len({r.seed for r in rungs}) > 1
    name = min(24, max(len(_name(r, with_seed)) for r in rungs))
    state, progress = max(len(r.state) for r in rungs), max(len(_progress(r)) for r in rungs)
    there = {
        "progress": progress > 0,
        "kwh": any(r.kwh is not None for r in rungs),
        "usd": any(r.usd is not None for r in rungs),
    }
    room, shown = width - name - state - 2, set()
    for column, fixed in OPTIONAL:
        wide = fixed or progress
        if there.get(column, True) and room >= wide + 2:
            room -= wide + (0 if column == "long time" else 2)
            shown.add(column)
    return _Columns(with_seed=with_seed, name=name, state=state, progress=progress, shown=frozenset(shown))


def _name(rung: Rung, with_seed: bool) -> str:
    return f"{rung.rung} seed {rung.seed}" if with_seed and rung.seed is not None else rung.rung


def _progress(rung: Rung) -> str:
    if rung.state == "queued":
        return ""
    if rung.n_rows_planned is not None and rung.state == "finished":
        return f"{rung.n_rows} of {rung.n_rows_planned} rows"
    return "" if rung.done_frac is None else f"{100 * rung.done_frac:.0f} %"


def _rung_line(rung: Rung, columns: _Columns, width: int, focused: bool) -> Text:
    bad = rung.state in ("failed", "diverged", "stopped", "interrupted", "unreadable")
    long = "long time" in columns.shown
    time = ""
    if rung.seconds is not None:
        time = duration(rung.seconds)
    elif rung.seconds_planned is not None and rung.state == "queued":
        time = f"{'about ' if long else ''}{duration(rung.seconds_planned)}"
    loss = "" if rung.loss_nats is None else f"{LOSS_WORD[rung.loss_from or 'training']} {rung.loss_nats:.3f}"
    cells = {
        "size": f"{'' if rung.n_params is None else words.tokens(rung.n_params):>6}",
        "progress": f"{_progress(rung):>{columns.progress}}",
        "loss": f"{loss:>11}",
        "time": f"{time:>{16 if long else 9}}",
        "kwh": f"{'' if rung.kwh is None else words.kwh(rung.kwh):>10}",
        "usd": f"{'' if rung.usd is None else words.usd(rung.usd):>8}",
    }
    said = [
        cell for column, cell in cells.items() if column in columns.shown and not (bad and column in ("kwh", "usd"))
    ]
    line = Text("  ").join(
        [
            padded(Text(_name(rung, columns.with_seed), "bold" if focused else ""), columns.name),
            padded(Text(rung.state, STATE_STYLE[rung.state]), columns.state),
            *(Text(cell) for cell in said),
        ]
    )
    if bad and rung.reason and width - line.cell_len >= MIN_TAIL:
        line.append("  ").append_text(cut(Text(rung.reason), width - line.cell_len))
    return cut(line, width)
