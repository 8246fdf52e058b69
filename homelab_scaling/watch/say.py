"""What the watchdog prints in a terminal: a line per change, a line a minute, a table of now."""

import datetime
from collections.abc import Callable

from homelab_scaling.watch.link import CardStatus, Status, Transition
from homelab_scaling.watch.power import SweepResult
from homelab_scaling.watch.readings import CardFacts, CardReading
from homelab_scaling.watch.watchdog_loop import Turn

MINUTE_S = 60.0
GIB = 2**30


class Narrator:
    """Says what changes as it changes, and every minute how things stand.

    Args:
        say: prints a line.
        every_s: how often things stand; None says changes only.
    """

    def __init__(self, say: Callable[[str], None], *, every_s: float | None = MINUTE_S) -> None:
        self.say, self.every_s = say, every_s
        self._said_s: float | None = None
        self._error: str | None = None
        self._n_runs = 0

    def __call__(self, turn: Turn) -> None:
        """Takes a poll (`run_watchdog`'s on_turn)."""
        status = turn.status
        names = short_names(status.facts)
        for one in turn.transitions:
            self.say(f"{clock(one.t_s)}  {transition_line(one, names)}")
        if status.sensor_error != self._error:
            self._error = status.sensor_error
            self.say(f"{clock(status.t_s)}  {self._error or 'the sensors answer again'}")
        if turn.n_runs != self._n_runs:
            self._n_runs = turn.n_runs
            self.say(f"{clock(status.t_s)}  {count(turn.n_runs, 'run')} under guard")
        if self.every_s is not None and (self._said_s is None or status.t_s - self._said_s >= self.every_s):
            self._said_s = status.t_s
            for line in card_lines(status):
                self.say(f"{clock(status.t_s)}  {line}")


def clock(t_s: float) -> str:
    """Local time of day."""
    return datetime.datetime.fromtimestamp(t_s).strftime("%H:%M:%S")


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def short_names(facts: tuple[CardFacts, ...]) -> dict[str, str]:
    """UUID -> "GPU 0 (RTX 3090)"."""
    return {f.uuid: f"GPU {f.index} ({f.name.removeprefix('NVIDIA ').removeprefix('GeForce ')})" for f in facts}


def transition_line(one: Transition, names: dict[str, str]) -> str:
    """A change of level in words."""
    after = f"{one.after} at {one.duty:.0%}" if one.duty < 1 and one.after == "slow" else one.after
    reason = f": {one.reason}" if one.reason else ""
    return f"{names.get(one.uuid, one.uuid)}: {one.before} -> {after}{reason}"


def card_lines(status: Status) -> list[str]:
    """One line per card: what is known, and nothing for what is not."""
    names = short_names(status.facts)
    facts = {f.uuid: f for f in status.facts}
    lines = []
    for reading in status.readings:
        about = facts.get(reading.uuid)
        said = [names.get(reading.uuid, reading.uuid), *_figures(reading, about)]
        card = status.cards.get(reading.uuid, CardStatus())
        level = f"{card.level} at {card.duty:.0%}" if card.duty < 1 else card.level
        lines.append("  ".join([*said, f"{level} ({card.reason})" if card.reason else level]))
    polls = f"polls {1e3 * status.poll_p50_s:.1f} ms, p99 {1e3 * status.poll_p99_s:.1f} ms"
    return [*lines, f"{polls}, every {status.interval_s:g} s"] if lines else [status.sensor_error or "no card"]


def _figures(reading: CardReading, facts: CardFacts | None) -> list[str]:
    if reading.state != "ok" and reading.temperature_c is None:
        return [f"{reading.state}: {reading.error}" if reading.error else reading.state]
    said = []
    if reading.temperature_c is not None:
        limit = facts.slowdown_c if facts is not None else None
        said.append(f"{reading.temperature_c:.0f} C" + (f" of {limit:.0f}" if limit is not None else ""))
    if reading.power_w is not None:
        limit_w = reading.power_limit_w
        said.append(f"{reading.power_w:.0f}" + (f" of {limit_w:.0f} W" if limit_w is not None else " W"))
    if reading.vram_used_bytes is not None and facts is not None:
        said.append(f"{reading.vram_used_bytes / GIB:.1f} of {facts.vram_bytes / GIB:.0f} GiB")
    if reading.reasons:
        said.append(", ".join(reading.reasons))
    return said


def sweep_lines(result: SweepResult) -> list[str]:
    """A power sweep as a table, and what follows from it."""
    top, unit = result.points[0], result.unit
    lines = [f"{'limit':>7} {f'{unit}/s':>12} {'speed':>7} {'power':>7} {f'{unit}/kJ':>12} {'energy':>7}"]
    for one in result.points:
        lines.append(
            f"{one.limit_w:>5.0f} W {one.units_per_s:>12,.5g} {one.units_per_s / top.units_per_s:>7.1%} "
            f"{one.power_w:>5.0f} W {1e3 * one.units_per_j:>12,.5g} {top.units_per_j / one.units_per_j:>7.1%}"
            + ("  <- recommended" if one is result.best else "")
        )
    lines.append(
        f"recommended: {result.best.limit_w:.0f} W: {result.slowdown_frac:.1%} slower (at most "
        f"{result.max_slowdown:.0%} allowed), {result.saved_frac:.1%} less energy per {unit.removesuffix('s')}"
    )
    if abs(result.drift_frac) > 0.02:
        lines.append(
            f"the highest limit was {result.drift_frac:.1%} slower at the end than at the beginning: the machine was "
            "still warming up, sweep again"
        )
    return lines
