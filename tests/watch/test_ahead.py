"""What comes next: the time left and its range, the trend of a temperature, the watchdog's next act in words."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch.ahead import duration, next_act, slope_c_per_min, soonest, time_left
from homelab_scaling.watch.frame import CardNow
from homelab_scaling.watch.runlog import Rate


def rates(speeds, tokens=1000):
    return [Rate(update=10 * (i + 1), interval_s=tokens / s, interval_tokens=tokens) for i, s in enumerate(speeds)]


def card(temperature=70.0, **changes):
    fields = {
        "uuid": "GPU-a", "index": 0, "name": "a card", "state": "ok", "error": None, "temperature_c": temperature,
        "slowdown_c": 95.0, "slowdown_assumed": False, "power_w": 280.0, "power_limit_w": 320.0, "sm_clock_mhz": 2500.0,
        "sm_clock_max_mhz": 2800.0, "vram_bytes": 2**34, "vram_used_bytes": 2**33, "vram_reserved_bytes": None,
        "vram_peak_bytes": None, "utilisation_frac": None, "fan_frac": None, "reasons": (), "throttled_frac": {},
        "lost_clock_frac": None, "level": "ok", "duty": 1.0, "reason": "", "health": "ok", "history": (),
        "slope_c_per_min": None,
    }  # fmt: skip
    return CardNow(**{**fields, **changes})


def test_no_rate_no_guess():
    assert time_left([], 1e6) is None


def test_a_steady_rate_gives_a_narrow_range_around_the_truth():
    left = time_left(rates([500.0] * 30), 50_000)
    assert left.mid == pytest.approx(100)
    assert left.low < 100 < left.high
    assert left.high / left.low < 1.06


def test_pacing_and_what_is_not_training_take_their_time():
    plain = time_left(rates([500.0] * 30), 50_000)
    paced = time_left(rates([500.0] * 30), 50_000, duty=0.8)
    assert paced.mid == pytest.approx(plain.mid / 0.8)
    busy = time_left(rates([500.0] * 30), 50_000, overhead_frac=0.2)
    assert busy.mid == pytest.approx(1.2 * plain.mid)
    assert busy.high - busy.low > plain.high - plain.low


def test_a_change_of_speed_is_followed_and_widens_the_range():
    slower = time_left(rates([500.0] * 100 + [400.0] * 40), 50_000)
    assert slower.mid == pytest.approx(125, rel=0.08)
    just = time_left(rates([500.0] * 100 + [400.0] * 8), 50_000)
    assert just.high > 125 * 0.97
    assert just.high / just.low > 1.1


def test_a_single_rate_is_trusted_less():
    one, many = time_left(rates([500.0]), 50_000), time_left(rates([500.0] * 50), 50_000)
    assert one.high / one.low > many.high / many.low > 1


@pytest.mark.parametrize(
    ("noise", "wander", "at_least"), [(0.02, 0.0, 0.9), (0.1, 0.0, 0.9), (0.3, 0.0, 0.9), (0.05, 0.01, 0.8)]
)
def test_the_range_holds_the_truth_most_of_the_time(noise, wander, at_least):
    """Runs of 400 intervals with independent noise and a wandering level, guessed at a quarter of the way."""
    hits = 0
    for seed in range(200):
        rng = random.Random(seed)
        level, speeds = 0.0, []
        for _ in range(400):
            level = 0.98 * level + wander * rng.gauss(0, 1)
            speeds.append(500 * math.exp(level + noise * rng.gauss(0, 1)))
        seconds = [1000 / s for s in speeds]
        left = time_left(rates(speeds[:100]), 300 * 1000)
        hits += left.low <= sum(seconds[100:]) <= left.high
    assert hits >= at_least * 200


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=300), st.floats(0, 1e15), st.floats(0, 3), st.floats(0.05, 1)
)
def test_a_range_is_a_range(speeds, tokens, overhead, duty):
    left = time_left(rates(speeds), tokens, overhead_frac=overhead, duty=duty)
    assert 0 <= left.low <= left.mid <= left.high < math.inf


@pytest.mark.parametrize("slope", [-3.0, -0.8, 0.0, 0.8, 4.0])
def test_the_slope_of_a_noisy_sensor_of_whole_degrees(slope):
    for seed in range(20):
        rng = random.Random(seed)
        history = [(float(t), float(round(70 + slope * t / 60 + rng.gauss(0, 0.4)))) for t in range(200)]
        assert slope_c_per_min(history) == pytest.approx(slope, abs=0.35)
    assert slope_c_per_min([(float(t), 70.0) for t in range(200)]) == 0.0


def test_no_slope_from_a_moment():
    assert slope_c_per_min([]) is None
    assert slope_c_per_min([(float(t), 70.0 + t) for t in range(30)]) is None
    gap = [(0.0, 40.0), (1.0, 41.0), *((1000.0 + t, 70.0) for t in range(20))]
    assert slope_c_per_min(gap) is None, "what lies before the last minutes does not count"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 78.0, "slope_c_per_min": 0.4}, "slows at 87 C: 9 C away, rising 0.4 C/min, about 22 min"),
        ({"temperature": 78.0, "slope_c_per_min": 0.0}, "slows at 87 C: 9 C away, steady"),
        ({"temperature": 78.0, "slope_c_per_min": -1.25}, "slows at 87 C: 9 C away, falling 1.2 C/min"),
        ({"temperature": 78.0}, "slows at 87 C: 9 C away"),
        ({"temperature": 30.0, "slope_c_per_min": 0.1}, "slows at 87 C: 57 C away, rising 0.1 C/min, more than 6 h"),
        ({"temperature": 88.0}, "slows: 88 C for 15 s is too long"),
        (
            {"temperature": 88.0, "level": "slow", "slope_c_per_min": 1.0},
            "pauses at 92 C: 4 C away, rising 1.0 C/min, about 4 min",
        ),
        (
            {"temperature": 83.0, "level": "slow", "slope_c_per_min": -1.0},
            "speeds up again at 80 C held 120 s: 3 C to go, falling 1.0 C/min, about 5 min",
        ),
        (
            {"temperature": 75.0, "level": "slow", "slope_c_per_min": 0.0},
            "speeds up by 5 % every 120 s while it is that cool",
        ),
        ({"temperature": 93.0, "level": "slow"}, "stops at 95 C: 2 C away"),
        (
            {"temperature": 82.0, "level": "pause", "slope_c_per_min": -3.0},
            "resumes at 70 C held 30 s: 12 C to go, falling 3.0 C/min, about 4 min",
        ),
        ({"temperature": 68.0, "level": "pause"}, "resumes at 70 C held 30 s: cool enough now"),
        ({"temperature": 90.0, "level": "stop"}, "may work again at 70 C held 30 s: 20 C to go"),
        ({"state": "lost"}, "stays stopped: the driver has lost the card, which usually takes a reboot"),
        ({"temperature": None, "error": "Unknown Error"}, "is watched without a temperature (Unknown Error)"),
        ({"temperature": None, "missing": {"temperature_c": "x"}}, "is watched without a temperature (x)"),
        ({"health": "stuck"}, "is watched without a temperature (stuck)"),
    ],
)  # fmt: skip
def test_the_next_act_in_words(changes, said):
    assert next_act(card(**changes), WatchLimits())[0] == said


def test_the_lines_are_those_of_the_ladder():
    limits = WatchLimits(slow_below_c=10, resume_below_c=30)
    assert next_act(card(80.0), limits)[0] == "slows at 85 C: 5 C away"
    assert "at 65 C" in next_act(card(90.0, level="pause"), limits)[0]
    assert "at 83 C" in next_act(card(80.0, slowdown_c=91.0), WatchLimits())[0]


def test_the_soonest_act_of_several_cards():
    two = [card(70.0, slope_c_per_min=3.0), card(80.0, index=1, slope_c_per_min=0.5)]
    assert soonest(two, [WatchLimits()] * 2).startswith("GPU 0 slows at 87 C: 17 C away")
    steady = [card(70.0), card(80.0, index=1)]
    assert soonest(steady, [WatchLimits()] * 2).startswith("GPU 1 slows"), "the nearer one, where none is rising"
    paused = [card(90.0, slope_c_per_min=9.0), card(75.0, index=1, level="pause")]
    assert soonest(paused, [WatchLimits()] * 2).startswith("GPU 1 resumes")
    assert soonest([], []) is None


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.one_of(st.none(), st.integers(-20, 130)),
    st.sampled_from(["ok", "warn", "slow", "pause", "stop"]),
    st.one_of(st.none(), st.floats(-30, 30)),
    st.sampled_from(["ok", "unknown", "stale", "stuck", "lost"]),
)
def test_there_is_always_a_sentence(temperature, level, slope, health):
    t = None if temperature is None else float(temperature)
    said, seconds = next_act(card(t, level=level, slope_c_per_min=slope, health=health), WatchLimits())
    assert said
    assert seconds >= 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"), (48, "48 s"), (99, "99 s"), (100, "2 min"), (720, "12 min"), (3599, "1 h"), (3600, "1 h"),
        (9660, "2 h 41 min"), (36_600, "10 h"), (47.6 * 3600, "2 d"), (76 * 3600, "3 d 4 h"), (72 * 3600, "3 d"),
    ],
)  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds) == said
