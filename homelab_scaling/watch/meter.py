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

    def __init__(self, *, has_counter: bool) -> None:
        self.has_counter = has_counter
        self.gap_s = 0.0
        """Seconds that the total does not cover."""
        self._total_j: float | None = None
        self._bridged_j = 0.0  # since the counter last answered: replaced by its step when it answers again
        self._bridge_gap_s = 0.0
        self._counter: tuple[float, float] | None = None  # time, joules
        self._power: tuple[float, float] | None = None  # time, watts
        self._last_s: float | None = None

    @property
    def total_j(self) -> float | None:
        """None before anything was measured."""
        return None if self._total_j is None else self._total_j + self._bridged_j

    def add(
        self, now_s: float, *, counter_j: float | None, power_w: float | None, longest_gap_s: float = LONGEST_GAP_S
    ) -> None:
        """Takes one reading; what it lacks is None."""
        if self._last_s is not None and now_s <= self._last_s:  # the clock was set back: the next step is whole again
            self._last_s, self._power = now_s, None if power_w is None else (now_s, power_w)
            self._counter = self._counter and (now_s, self._counter[1])
            return
        bridge_j = self._trapezoid(now_s, power_w, longest_gap_s)
        dt_s = 0.0 if self._last_s is None else now_s - self._last_s
        if counter_j is not None:
            self._step(now_s, counter_j, bridge_j)
        elif bridge_j is not None or (power_w is not None and self._total_j is None):
            self._total_j = self._total_j or 0.0
            self._bridged_j += bridge_j or 0.0
        elif self._total_j is not None:
            self._bridge_gap_s += dt_s
            self.gap_s += dt_s
        self._last_s = now_s

    def _trapezoid(self, now_s: float, power_w: float | None, longest_gap_s: float) -> float | None:
        before, self._power = self._power, None if power_w is None else (now_s, power_w)
        if before is None or power_w is None or now_s - before[0] > longest_gap_s:
            return None
        return (before[1] + power_w) / 2 * (now_s - before[0])

    def _step(self, now_s: float, counter_j: float, bridge_j: float | None) -> None:
        before, self._counter = self._counter, (now_s, counter_j)
        if before is None:
            self._total_j = (self._total_j or 0.0) + self._bridged_j
            self._bridged_j = self._bridge_gap_s = 0.0
            return
        dt_s, step_j = now_s - before[0], counter_j - before[1]
        bridged_j = self._bridged_j + (bridge_j or 0.0)
        if 0 <= step_j <= MOST_WATTS * dt_s:
            self.gap_s -= self._bridge_gap_s  # the counter ran on while it was silent
            # what was already said is not taken back
            step_j = max(step_j, self._bridged_j)
        elif step_j < 0 and bridge_j is None and counter_j <= MOST_WATTS * dt_s:
            self.gap_s += dt_s - self._bridge_gap_s
            step_j = max(counter_j, self._bridged_j)  # set back to 0 meanwhile: what came before that is not known
        else:  # set back, or a jump that no card could draw
            self.gap_s += dt_s - self._bridge_gap_s if bridge_j is None else 0.0
            step_j = bridged_j
        self._total_j = (self._total_j or 0.0) + step_j
        self._bridged_j = self._bridge_gap_s = 0.0


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
