"""The watchdog process: what it writes, whom it ends, and that nothing that happens to it stops a run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cards import A, B, FakeCards, command, tell

from homelab_scaling import codec
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch import link, processes, watchdog_loop
from homelab_scaling.watch.apart import SensorsApart
from homelab_scaling.watch.link import Ended, MachineFolder, Registration
from homelab_scaling.watch.signals import Signals
from homelab_scaling.watch.watchdog_loop import Options, Turn, Watchdog, run_watchdog

T0 = 1_800_000_000.0


@pytest.fixture
def said(tmp_path: Path) -> Path:
    path = tmp_path / "cards.json"
    tell(path)
    return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineFolder:
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "machine"))
    return MachineFolder(tmp_path / "machine")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self, now: float = T0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


Make = Callable[..., Watchdog]


@pytest.fixture
def make(machine: MachineFolder, said: Path, clock: Clock) -> Iterator[Make]:
    """A watchdog over whatever the cards say when it is made."""
    made: list[Watchdog] = []

    def one(source: FakeCards | None = None, **options: Any) -> Watchdog:
        made.append(Watchdog(machine, source or FakeCards(said), clock=clock, options=Options(**options)))
        return made[-1]

    yield one
    for dog in made:
        dog.withdraw()


@pytest.fixture
def dog(make: Make) -> Watchdog:
    return make()


@pytest.fixture
def sleeper() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Processes that wait, by default for ever; `stubborn` ones do not hear SIGTERM."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*, stubborn: bool = False) -> subprocess.Popen[bytes]:
        trap = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if stubborn else ""
        text = f"import signal, time; {trap} print('up', flush=True); time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        process.stdout.readline()
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def turns(dog: Watchdog, clock: Clock, n: int, step_s: float = 1.0) -> Turn:
    for _ in range(n):
        turn = dog.turn(clock.now)
        clock.now += step_s
    return turn


def events(machine: MachineFolder) -> list[dict[str, Any]]:
    return codec.read_jsonl(machine.events)


def register(machine: MachineFolder, clock: Clock, *pids: int, cards: tuple[str, ...] = (A,), **more: Any) -> Path:
    one = Registration(run_id="run", folder="", pids=pids, cards=cards, started_s=clock.now, **more)
    return machine.register(one)


# ------------------------------------------------------------------------------------------------------- the files


def test_status_holds_facts_readings_and_levels(dog: Watchdog, machine: MachineFolder, clock: Clock) -> None:
    turns(dog, clock, 2)
    status = machine.read_status()
    assert status is not None
    assert [f.uuid for f in status.facts] == [A]
    assert status.readings[0].temperature_c == 50.0
    assert status.cards[A].level == "ok"
    assert status.pid == os.getpid()
    assert status.is_fresh(clock.now)


def test_orders_are_written_when_they_change_and_their_ids_grow(
    dog: Watchdog, machine: MachineFolder, said: Path, clock: Clock
) -> None:
    turns(dog, clock, 3)
    first = machine.read_control()
    assert first is not None
    assert first.cards[A].level == "ok"
    clock.now += 10  # a jump within a second would not be believed
    tell(said, cards={A: {"temperature_c": 88.0}})
    turns(dog, clock, 1)
    hot = machine.read_control()
    assert hot is not None
    assert (hot.id, hot.cards[A].level) == (first.id + 1, "pause")
    turns(dog, clock, 5)
    assert machine.read_control() == hot
    changes = [e for e in events(machine) if e["kind"] == "transition"]
    assert [(e["uuid"], e["before"], e["after"]) for e in changes] == [(A, "ok", "pause")]
    assert "88 C" in changes[0]["reason"]


@pytest.mark.parametrize("torn", ["", '{"id": 7, "t_s"', "[]"])
def test_ids_grow_over_restarts_even_from_a_torn_file(
    make: Make, machine: MachineFolder, said: Path, clock: Clock, torn: str
) -> None:
    ids = []
    for _ in range(2):
        dog = make()
        turns(dog, clock, 1)
        control = machine.read_control()
        assert control is not None
        ids.append(control.id)
    machine.control.write_text(torn)
    machine.status.write_text(torn)
    dog = make()
    turns(dog, clock, 1)
    control = machine.read_control()
    assert control is not None
    assert ids[0] < ids[1] < control.id
    assert machine.read_status() is not None


def test_a_torn_line_of_events_is_cut_off(make: Make, machine: MachineFolder, said: Path, clock: Clock) -> None:
    machine.path.mkdir(parents=True)
    machine.events.write_text('{"kind": "start", "t_s": 1.0}\n{"kind": "sto')
    dog = make()
    dog.event("start")
    assert [e["kind"] for e in events(machine)] == ["start", "start"]


def test_samples_are_recorded(dog: Watchdog, machine: MachineFolder, clock: Clock) -> None:
    turns(dog, clock, 3)
    samples = [line for line in codec.read_jsonl(machine.samples) if "t_s" in line]
    assert [s["t_s"] for s in samples] == [T0, T0 + 1, T0 + 2]


def test_a_replay_is_not_recorded_again(make: Make, machine: MachineFolder, said: Path, clock: Clock) -> None:
    source = FakeCards(said)
    source.source = "gpu.jsonl"
    turns(make(source), clock, 3)
    assert not machine.samples.exists()


def test_the_last_transitions_survive_a_restart(
    make: Make, dog: Watchdog, machine: MachineFolder, said: Path, clock: Clock
) -> None:
    tell(said, cards={A: {"temperature_c": 88.0}})
    turns(dog, clock, 1)
    again = make()
    tell(said, cards={A: {"temperature_c": 50.0}})
    turn = turns(again, clock, 1)
    assert [t.after for t in turn.status.transitions] == ["pause"]


def test_a_full_disk_is_survived(
    dog: Watchdog,
    machine: MachineFolder,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    turns(dog, clock, 1)
    before = machine.read_status()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(codec, "write_json", full)
        turns(dog, clock, 3)
    assert capfd.readouterr().err.count("No space left") == 1
    turns(dog, clock, 1)
    after = machine.read_status()
    assert before is not None
    assert after is not None
    assert after.t_s > before.t_s


# --------------------------------------------------------------------------------------------------------- the runs


def test_the_run_s_limits_hold_for_its_cards_only(
    make: Make, machine: MachineFolder, said: Path, clock: Clock, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    tell(said, cards={A: {"temperature_c": 70.0}, B: {"temperature_c": 70.0}})
    limits = WatchLimits(
        pause_below_c=25.0, slow_below_c=30.0, warn_below_c=35.0, recover_below_c=40.0, resume_below_c=45.0
    )
    register(machine, clock, sleeper().pid, cards=(B,), limits=limits)
    turn = turns(make(), clock, 1)
    assert {uuid: card.level for uuid, card in turn.status.cards.items()} == {A: "ok", B: "pause"}


def test_polls_as_closely_as_the_most_impatient_run_wants(
    dog: Watchdog, machine: MachineFolder, clock: Clock, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    register(machine, clock, sleeper().pid, limits=WatchLimits(interval_s=0.2))
    assert turns(dog, clock, 1).status.interval_s == 0.2
    dog.source.interval_s = 5.0  # the driver has become slow
    assert turns(dog, clock, 1).status.interval_s == 5.0


def test_registrations_of_the_dead_are_dropped(
    dog: Watchdog, machine: MachineFolder, clock: Clock, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = sleeper()
    path = register(machine, clock, process.pid)
    assert turns(dog, clock, 2).n_runs == 1
    process.kill()
    deadline = time.monotonic() + 10
    while processes.is_alive(process.pid) and time.monotonic() < deadline:  # a zombie by then: nobody has waited for it
        time.sleep(0.01)
    assert turns(dog, clock, 1).n_runs == 0
    assert not path.exists()
    assert [e["run_id"] for e in events(machine) if e["kind"] == "dropped"] == ["run"]


def test_a_pid_that_was_used_again_is_not_the_run(dog: Watchdog, machine: MachineFolder, clock: Clock) -> None:
    started = processes.started_s(processes.look_up(os.getpid()))  # type: ignore[arg-type]
    clock.now = started - 3600  # left behind an hour before this process began
    path = register(machine, clock, os.getpid())
    assert turns(dog, clock, 1).n_runs == 0
    assert not path.exists()


def test_a_torn_registration_is_nobody(dog: Watchdog, machine: MachineFolder, clock: Clock) -> None:
    machine.runs.mkdir(parents=True)
    (machine.runs / "torn.json").write_text('{"run_id": "torn", "pi')
    assert turns(dog, clock, 1).n_runs == 0


def make_checkpoint(run: Path, update: int, *, whole: bool = True) -> Path:
    folder = run / "checkpoints" / f"u{update:08d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps({"sha256": {"model.safetensors": "x"}}))
    if whole:
        (folder / "model.safetensors").write_bytes(b"x")
    return folder


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_run_that_hangs_on_a_lost_card_is_ended_and_its_checkpoint_named(
    make: Make,
    machine: MachineFolder,
    said: Path,
    clock: Clock,
    tmp_path: Path,
    sleeper: Callable[..., subprocess.Popen[bytes]],
    stubborn: bool,
) -> None:
    tell(said, cards={A: {"temperature_c": 60.0}, B: {"temperature_c": 60.0}})
    good = make_checkpoint(tmp_path / "run", 20)
    make_checkpoint(tmp_path / "run", 30, whole=False)
    hung, other = sleeper(stubborn=stubborn), sleeper()
    limits = WatchLimits(hang_kill_s=50)
    machine.register(
        Registration(
            run_id="hung",
            folder=str(tmp_path / "run"),
            pids=(hung.pid,),
            cards=(A, B),
            started_s=clock.now,
            limits=limits,
        )
    )
    machine.register(Registration(run_id="other", folder="", pids=(other.pid,), cards=(A,), started_s=clock.now))
    dog = make(kill_grace_s=20)
    turns(dog, clock, 2)
    tell(said, lost=[B])
    turns(dog, clock, 50)
    control = machine.read_control()
    assert control is not None
    assert (control.cards[A].level, control.cards[B].level) == ("ok", "stop")
    assert hung.poll() is None
    assert machine.read_ended("hung") is None
    turns(dog, clock, 2)
    ended = machine.read_ended("hung")
    assert ended is not None
    assert ended.last_checkpoint == str(good)
    assert "lost" in ended.reason
    if stubborn:
        turns(dog, clock, 15)
        assert hung.poll() is None, "a stubborn run gets its grace"
        turns(dog, clock, 10)
    assert hung.wait(timeout=10) == (-signal.SIGKILL if stubborn else -signal.SIGTERM)
    turns(dog, clock, 1)
    assert [r.run_id for r in machine.registrations()] == ["other"]
    assert other.poll() is None


def test_a_card_that_comes_back_in_time_ends_nobody(
    dog: Watchdog, machine: MachineFolder, said: Path, clock: Clock, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = sleeper()
    register(machine, clock, process.pid, limits=WatchLimits(hang_kill_s=50))
    tell(said, lost=[A])
    turns(dog, clock, 45)
    tell(said, lost=[])
    turns(dog, clock, 30)
    tell(said, lost=[A])
    turns(dog, clock, 45)
    assert process.poll() is None
    assert machine.read_ended("run") is None


def test_a_run_that_is_back_is_not_one_that_was_ended(
    dog: Watchdog, machine: MachineFolder, clock: Clock, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    codec.write_json(machine.ended / "run.json", Ended(run_id="run", t_s=clock.now - 100, reason="hung"))
    register(machine, clock, sleeper().pid)
    turns(dog, clock, 1)
    assert machine.read_ended("run") is None


# ------------------------------------------------------------------------------------------------------ its own life


def test_ends_by_itself_without_runs_and_takes_its_orders_back(
    machine: MachineFolder, said: Path, clock: Clock, sleeper: Callable[..., subprocess.Popen[bytes]]
) -> None:
    tell(said, cards={A: {"temperature_c": 88.0}})
    process = sleeper()
    register(machine, clock, process.pid)
    source = FakeCards(said)
    levels = []

    def look(turn: Turn) -> None:
        levels.append(turn.status.cards[A].level)
        if len(levels) == 30:
            process.kill()
            process.wait()

    why = run_watchdog(
        machine,
        source,
        stop=lambda: False,
        sleep=clock.sleep,
        clock=clock,
        options=Options(idle_exit_s=60.0),
        on_turn=look,
    )
    assert why == "no run for 60 s"
    assert 85 <= len(levels) <= 95
    assert set(levels) == {"pause"}
    control = machine.read_control()
    assert control is not None
    assert control.cards == {}
    assert source.closed
    assert [e["kind"] for e in events(machine)] == ["start", "transition", "dropped", "stop"]


def test_by_hand_it_goes_on_without_runs(machine: MachineFolder, said: Path, clock: Clock) -> None:
    run_watchdog(machine, FakeCards(said), stop=lambda: clock.now > T0 + 1000, sleep=clock.sleep, clock=clock)
    status = machine.read_status()
    assert status is not None
    assert status.t_s >= T0 + 999


def test_a_silent_sensor_child_is_restarted_and_the_cards_are_stale_meanwhile(
    machine: MachineFolder, said: Path
) -> None:
    source = SensorsApart(interval_s=0.1, command=command(said), back_off_s=(0.05, 0.2))
    hung_from, health, deadline = None, [], time.monotonic() + 30

    def look(turn: Turn) -> None:
        nonlocal hung_from
        health.append(turn.status.readings[0].state if turn.status.readings else "none")
        if len(health) == 5:
            hung_from = source.child_pid
            tell(said, hang_s=600)
        if any(e.get("reason", "").startswith("a driver call has hung") for e in events(machine)):
            tell(said, hang_s=0)

    def done() -> bool:
        back = "error" in health and health[-1] == "ok"
        return back or time.monotonic() > deadline

    run_watchdog(machine, source, stop=done, options=Options(interval_s=0.1), on_turn=look)
    assert health[-1] == "ok"
    assert health.count("error") >= 5
    said_of_sensors = [e["reason"] for e in events(machine) if e["kind"] == "sensors"]
    assert "has hung" in said_of_sensors[0]
    assert said_of_sensors[1].startswith("started again after")
    assert hung_from is not None
    assert not processes.is_alive(hung_from)


def test_two_at_once_are_one(machine: MachineFolder) -> None:
    with watchdog_loop.sole_watchdog(machine) as first, watchdog_loop.sole_watchdog(machine) as second:
        assert (first, second) == (True, False)
    with watchdog_loop.sole_watchdog(machine) as third:
        assert third


def test_a_glance_at_the_lock_is_no_watchdog(machine: MachineFolder) -> None:
    import fcntl
    import threading

    machine.path.mkdir(parents=True)
    with open(machine.lock, "a", encoding="utf-8") as glance:
        fcntl.flock(glance, fcntl.LOCK_SH)
        timer = threading.Timer(0.3, lambda: fcntl.flock(glance, fcntl.LOCK_UN))
        timer.start()
        with watchdog_loop.sole_watchdog(machine) as mine:
            assert mine
        timer.join()


def test_a_signal_ends_a_sleep_at_once() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        begun = time.monotonic()
        signals.sleep(10)
        assert time.monotonic() - begun < 1
        assert signals.caught == signal.SIGTERM


def test_one_poll_costs_little(dog: Watchdog, machine: MachineFolder, clock: Clock) -> None:
    register(machine, Clock(time.time()), os.getpid())
    turns(dog, clock, 5)
    begun = time.process_time()
    turns(dog, clock, 100)
    assert (time.process_time() - begun) / 100 < 0.01, "more than 1 % of a core at 1 Hz"
