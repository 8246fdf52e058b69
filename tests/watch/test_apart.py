"""Sensors in a process of their own: hangs, crashes and nonsense become error readings, and a new process."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_cards import A, B, command, tell

from homelab_scaling.watch import processes
from homelab_scaling.watch.apart import SensorsApart
from homelab_scaling.watch.readings import Sample


@pytest.fixture
def said(tmp_path: Path) -> Path:
    path = tmp_path / "cards.json"
    tell(path)
    return path


@pytest.fixture
def apart(said: Path) -> Iterator[SensorsApart]:
    sensors = SensorsApart(interval_s=0.1, command=command(said), back_off_s=(0.05, 0.2))
    sensors.told = []  # type: ignore[attr-defined]
    sensors.tell = lambda kind, reason: sensors.told.append((kind, reason))  # type: ignore[attr-defined]
    yield sensors
    sensors.close()


def poll_until(apart: SensorsApart, good: Callable[[Sample], bool], timeout_s: float = 15.0) -> Sample:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        begun = time.monotonic()
        sample = apart.poll(time.time())
        assert time.monotonic() - begun < 1.5, "a poll must not wait for a driver"
        if good(sample):
            return sample
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s; last: {sample}")


def answered(sample: Sample) -> bool:
    return bool(sample.cards) and all(card.state == "ok" for card in sample.cards)


def test_passes_on_what_the_cards_say(apart: SensorsApart, said: Path) -> None:
    assert [f.uuid for f in apart.facts] == [A]
    tell(said, cards={A: {"temperature_c": 71.0, "power_w": 250.0}})
    sample = poll_until(apart, answered)
    (card,) = sample.cards
    assert (card.temperature_c, card.power_w) == (71.0, 250.0)
    assert apart.error is None


def test_a_hanging_driver_call_gives_error_readings_then_a_new_process(apart: SensorsApart, said: Path) -> None:
    poll_until(apart, answered)
    first = apart.child_pid
    tell(said, hang_s=600)
    sample = poll_until(apart, lambda s: s.cards[0].state == "error")
    assert "has not answered" in str(sample.cards[0].error)
    poll_until(apart, lambda _: any("has hung" in reason for _kind, reason in apart.told))  # type: ignore[attr-defined]
    tell(said, hang_s=0)
    poll_until(apart, answered)
    assert apart.child_pid != first
    assert first is not None
    assert not processes.is_alive(first)


def test_a_crash_of_the_driver_library_is_survived(apart: SensorsApart, said: Path) -> None:
    poll_until(apart, answered)
    tell(said, crash=True)
    sample = poll_until(apart, lambda s: s.cards[0].state == "error" and "SIGABRT" in str(s.cards[0].error))
    assert [c.uuid for c in sample.cards] == [A]
    assert "SIGABRT" in str(apart.error)
    tell(said, crash=False)
    poll_until(apart, answered)
    assert apart.error is None


def test_restarts_wait_longer_each_time(apart: SensorsApart, said: Path) -> None:
    poll_until(apart, answered)
    tell(said, crash=True)
    poll_until(apart, lambda _: sum("trying again" in r for _, r in apart.told) >= 3)  # type: ignore[attr-defined]
    waits = [float(r.rsplit(" ", 2)[1]) for _, r in apart.told if "trying again" in r]  # type: ignore[attr-defined]
    assert waits[:3] == [0.05, 0.1, 0.2]


def test_nonsense_on_the_pipe_is_a_dead_child(apart: SensorsApart, said: Path) -> None:
    poll_until(apart, answered)
    tell(said, say="a driver library's greeting")
    poll_until(apart, lambda s: s.cards[0].state == "error" and "greeting" in str(s.cards[0].error))


def test_a_card_that_a_new_process_no_longer_lists_is_lost(apart: SensorsApart, said: Path) -> None:
    apart.close()
    tell(said, cards={A: {"temperature_c": 50.0}, B: {"temperature_c": 50.0}})
    both = SensorsApart(interval_s=0.1, command=command(said), back_off_s=(0.05, 0.2))
    try:
        poll_until(both, answered)
        tell(said, cards={A: {"temperature_c": 50.0}})
        assert both.child_pid is not None
        os.kill(both.child_pid, 9)
        sample = poll_until(both, lambda s: s.cards[0].state == "ok" and len(s.cards) == 2)
        assert [(c.uuid, c.state) for c in sample.cards] == [(A, "ok"), (B, "lost")]
        assert {f.uuid for f in both.facts} == {A, B}
    finally:
        both.close()


def test_energy_goes_on_over_a_restart(apart: SensorsApart, said: Path) -> None:
    tell(said, cards={A: {"temperature_c": 50.0, "energy_j": 0.0, "power_w": 100.0}})
    assert poll_until(apart, answered).cards[0].energy_j == 0.0
    time.sleep(0.1)  # 40 J in less would be more than a card can draw
    tell(said, cards={A: {"temperature_c": 50.0, "energy_j": 40.0, "power_w": 100.0}})
    before = poll_until(apart, lambda s: s.cards[0].energy_j == 40.0)
    tell(said, cards={A: {"temperature_c": 50.0, "energy_j": 1.0, "power_w": 100.0}}, crash=True)
    poll_until(apart, lambda s: s.cards[0].state == "error")
    tell(said, crash=False)
    after = poll_until(apart, answered)
    energy = after.cards[0].energy_j
    assert energy is not None
    bridged = 100.0 * (after.t_s - before.t_s)  # the power ran on
    assert energy == pytest.approx(40.0 + bridged, rel=0.05)


def test_who_holds_memory_is_asked_for_at_the_start_and_on_a_surprise(apart: SensorsApart, said: Path) -> None:
    for _ in range(3):
        poll_until(apart, answered)
    tell(said, pids=[os.getpid()])
    poll_until(apart, answered)
    apart.ask_processes()
    for _ in range(3):
        poll_until(apart, answered)
    heard = [reason for kind, reason in apart.told if kind == "processes"]  # type: ignore[attr-defined]
    assert heard[0] == f"{A}: nobody"
    assert heard[1].startswith(f"{A}: ")
    assert heard[1].endswith(f" {os.getpid()} (1.0 GiB)")
    assert len(heard) == 2, "it costs the driver milliseconds: not in every poll"


def test_without_a_driver_it_says_why(said: Path) -> None:
    tell(said, error="NVML Shared Library Not Found")
    sensors = SensorsApart(interval_s=0.1, command=command(said))
    try:
        assert sensors.poll(time.time()).cards == ()
        assert sensors.error == "NVML Shared Library Not Found"
        assert sensors.facts == ()
    finally:
        sensors.close()


def test_the_child_ends_when_nobody_listens(apart: SensorsApart) -> None:
    pid = apart.child_pid
    assert pid is not None
    apart.close()
    assert not processes.is_alive(pid)


def test_the_real_child_answers_on_this_machine() -> None:
    sensors = SensorsApart(interval_s=1.0)
    try:
        sample = sensors.poll(time.time())
        assert len(sample.cards) == len(sensors.facts)
        assert sensors.facts or sensors.error
    finally:
        sensors.close()
