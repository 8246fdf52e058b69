"""Two small instruments: joules that only ever grow, and how long polls take."""

import math
from collections import deque

LONGEST_GAP_S = 5.0
"""Power is not interpolated over more than this."""
MOST_WATTS = 3000.0
"""No card draws more: a counter that says so has jumped."""
WINDOW_S = 600.0
SLOW_POLL_S = 0.050
"""A driver this slow (p99) is asked less often: others wait for the same lock."""
SLOW_INTERVAL_S = 5.0
MIN_SLOW_POLLS = 3
"""One hiccup among few polls is not a slow driver."""
QUICK_POLLS_TO_RECOVER = 24


class EnergyMeter:
    """Joules since the first reading: a counter's steps without its resets, or the trapezoid of power."""

    def __init__(self) -> None:
        self._total_j: float | None = None
        self._gap_s = 0.0
        self._bridged_j = 0.0  # by power since the counter last answered: its step replaces this when it answers again
        self._unbridged_s = 0.0
        self._covered_s: float | None = None  # up to when the total is known
        self._counter: tuple[float, float] | None = None  # time, joules
        self._power: tuple[float, float] | None = None  # time, watts
        self._last_s: float | None = None

    @property
    def total_j(self) -> float | None:
        """None before anything was measured."""
        return None if self._total_j is None else self._total_j + self._bridged_j

    @property
    def gap_s(self) -> float:
        """Seconds that the total does not cover."""
        open_s = self._last_s - self._covered_s if self._last_s is not None and self._covered_s is not None else 0.0
        return self._gap_s + self._unbridged_s + open_s

    def add(
        self, now_s: float, *, counter_j: float | None, power_w: float | None, longest_gap_s: float = LONGEST_GAP_S
    ) -> None:
        """Takes one reading; what it lacks is None."""
        if self._last_s is not None and now_s <= self._last_s:
            self._clock_was_set_back(now_s, power_w)
            return
        bridge_j = self._trapezoid(now_s, power_w, longest_gap_s)
        self._last_s = now_s
        if counter_j is not None:
            self._step(now_s, counter_j, bridge_j)
        elif power_w is None:
            return  # the gap stays open
        elif self._total_j is None or self._covered_s is None:
            self._total_j = 0.0
        elif bridge_j is None:
            self._unbridged_s += now_s - self._covered_s
        else:
            self._bridged_j += bridge_j
        self._covered_s = now_s

    def _clock_was_set_back(self, now_s: float, power_w: float | None) -> None:
        self._last_s = now_s
        self._covered_s = None if self._covered_s is None else now_s
        self._power = None if power_w is None else (now_s, power_w)
        self._counter = None if self._counter is None else (now_s, self._counter[1])

    def _trapezoid(self, now_s: float, power_w: float | None, longest_gap_s: float) -> float | None:
        """Joules since the total was last known, if power tells them."""
        if power_w is None:
            return None
        before, self._power = self._power, (now_s, power_w)
        if before is None or before[0] != self._covered_s or now_s - before[0] > longest_gap_s:
            return None
        return (before[1] + power_w) / 2 * (now_s - before[0])

    def _step(self, now_s: float, counter_j: float, bridge_j: float | None) -> None:
        """Joules since the counter last answered: its own step, or power where it was set back or jumped."""
        before, self._counter = self._counter, (now_s, counter_j)
        dt_s, step_j = (0.0, 0.0) if before is None else (now_s - before[0], counter_j - before[1])
        unknown_s = self._unbridged_s
        if bridge_j is None and self._covered_s is not None:
            unknown_s += now_s - self._covered_s
        if before is not None and 0 <= step_j <= MOST_WATTS * dt_s:
            joules, unknown_s = max(step_j, self._bridged_j), 0.0  # what was already said is not taken back
        elif bridge_j is not None:
            joules = self._bridged_j + bridge_j
        elif step_j < 0 and counter_j <= MOST_WATTS * dt_s:
            joules = max(counter_j, self._bridged_j)  # at least what it counted since it was set back
        else:
            joules = self._bridged_j
        self._total_j = (self._total_j or 0.0) + joules
        self._gap_s += unknown_s
        self._bridged_j = self._unbridged_s = 0.0


class PollTimes:
    """What polls took over the last ten minutes, and how often to poll because of it."""

    def __init__(self, interval_s: float) -> None:
        self.base_s = interval_s
        self.interval_s = interval_s
        self._times: deque[tuple[float, float]] = deque(maxlen=int(WINDOW_S))
        self._n_judged = 0  # the newest polls of the window that may slow us down
        self._n_quick = 0

    def add(self, now_s: float, poll_s: float) -> None:
        """Takes one poll's duration and adapts the interval."""
        while self._times and not 0 <= now_s - self._times[0][0] <= WINDOW_S:
            self._times.popleft()
        self._times.append((now_s, poll_s))
        self._n_judged += 1
        self._n_quick = self._n_quick + 1 if poll_s <= SLOW_POLL_S else 0
        if self.interval_s > self.base_s:
            if self._n_quick >= QUICK_POLLS_TO_RECOVER:
                self.interval_s, self._n_judged = self.base_s, 0
            return
        if poll_s <= SLOW_POLL_S:
            return
        judged = [t for _, t in self._times][-self._n_judged :]
        if sum(t > SLOW_POLL_S for t in judged) >= MIN_SLOW_POLLS and percentile(judged, 0.99) > SLOW_POLL_S:
            self.interval_s = max(SLOW_INTERVAL_S, self.base_s)

    @property
    def p50_s(self) -> float:
        return percentile([t for _, t in self._times], 0.50)

    @property
    def p99_s(self) -> float:
        return percentile([t for _, t in self._times], 0.99)


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile; 0 of nothing."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0.0
