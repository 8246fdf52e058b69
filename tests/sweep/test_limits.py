"""When a command stops by itself: hours, a time of day, money."""

import datetime
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.errors import SpecError, Stopped
from homelab_scaling.ladder import TrainTable
from homelab_scaling.sweep.limits import Limits, alarmed, make_limits, next_time
from homelab_scaling.sweep.recipe import StopRequest
from homelab_scaling.tools import run

NOON = datetime.datetime(2026, 11, 22, 12, 0, 0).timestamp()


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 23), st.integers(0, 59), st.floats(0, 86_400))
def test_a_time_of_day_is_the_next_one(hour: int, minute: int, after: float) -> None:
    then = next_time(f"{hour:02}:{minute:02}", NOON + after)
    assert 0 < then - (NOON + after) <= 86_400 + 3600
    said = datetime.datetime.fromtimestamp(then)
    assert (said.hour, said.minute, said.second) == (hour, minute, 0)


@pytest.mark.parametrize("text", ["25:00", "7", "07:60", "7:5", "seven", "", "07:00:00", "-1:00"])
def test_what_is_no_time_of_day_is_said(text: str) -> None:
    with pytest.raises(SpecError, match="such as 07:00"):
        next_time(text, NOON)


@pytest.mark.parametrize("bad", [{"max_hours": 0.0}, {"max_hours": -1.0}, {"max_usd": 0.0}, {"max_usd": float("nan")}])
def test_limits_are_positive(bad) -> None:
    with pytest.raises(SpecError, match="wants a positive number"):
        make_limits(**bad, now_s=NOON)


def test_the_earlier_of_two_ends_counts() -> None:
    limits = make_limits(max_hours=1.5, until="14:00", max_usd=2.0, now_s=NOON)
    assert limits.ends_at_s == NOON + 1.5 * 3600
    assert make_limits(max_hours=3, until="14:00", now_s=NOON).ends_at_s == NOON + 2 * 3600
    assert limits.reached(NOON, 1.99) is None and limits.reached(NOON, None) is None
    assert "13:30" in limits.reached(NOON + 5400, 0.0)
    assert limits.reached(NOON, 2.0) == "the ladder has cost $2.00 of the $2.00 it may"
    assert make_limits(now_s=NOON).reached(1e12, 1e12) is None


def test_the_end_is_heard_outside_of_training() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Stopped, match="the end that was asked for"), alarmed(Limits(ends_at_s=time.time() + 0.1)):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
    with alarmed(Limits(ends_at_s=time.time() + 0.1)), StopRequest() as stop:
        time.sleep(0.3)  # while something is launched it is a wish
        assert stop.time_is_up and not stop.asked()
    with alarmed(Limits()):
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_end_is_heard_between_runs_where_batches_are_measured() -> None:
    class Batches:
        experiment, corpus = SimpleNamespace(ladder=SimpleNamespace(train=TrainTable())), object()

        def in_turn(self, _say: object) -> Iterator[set[str]]:
            time.sleep(5)
            yield set()

    args, limits = run.Args(ladder="any"), Limits(ends_at_s=time.time() + 0.1)
    outcome = run._train(args, Batches(), limits, object())  # type: ignore[arg-type]
    assert outcome.stopped and outcome.limit is not None and outcome.exit_code == 75
