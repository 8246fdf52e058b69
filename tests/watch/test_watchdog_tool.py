"""`homelab watchdog`: what it prints, a recording played through it, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import codec
from homelab_scaling.watch import link, say
from homelab_scaling.watch.link import CardStatus, MachineFolder, Status, Transition
from homelab_scaling.watch.power import SweepPoint, SweepResult
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.recording import Recording
from homelab_scaling.watch.watchdog_loop import Turn

A = "GPU-aaaa"
FACTS = (CardFacts(uuid=A, index=0, name="NVIDIA GeForce RTX 3090", vram_bytes=24 * 2**30, slowdown_c=90.0),)

Homelab = Callable[..., Any]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineFolder:
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "machine"))
    return MachineFolder(tmp_path / "machine")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A minute of a card that heats up to 88 C and stays there."""
    path = tmp_path / "old" / "gpu.jsonl"
    writer = Recording(path)
    for second in range(60):
        card = CardReading(uuid=A, temperature_c=min(88.0, 50.0 + second), power_w=300.0, power_limit_w=350.0)
        writer.append(Sample(t_s=1_000_000.0 + second, poll_s=0.001, cards=(card,)), FACTS)
    writer.close()
    return path


def test_help_answers_and_shows_the_ways_to_use_it(homelab: Homelab) -> None:
    said = homelab("watchdog", "--help")
    assert said.code == 0
    for word in ("-- CMD", "calibrate", "power-sweep", "--once", "--replay"):
        assert word in said.out


def test_a_recording_plays_as_if_live(homelab: Homelab, machine: MachineFolder, recording: Path) -> None:
    said = homelab("watchdog", "--replay", recording, "--speed", "20")
    assert said.code == 0
    assert "GPU 0 (RTX 3090): ok -> warn: 78 C" in said.err
    assert "GPU 0 (RTX 3090): warn -> pause: 87 C" in said.err
    assert "stop: " not in said.err, "the end of a recording is no silence of the sensors"
    assert "ended (the recording is over)" in said.err
    status = machine.read_status()
    assert status is not None
    assert status.source == str(recording)
    assert status.facts == FACTS
    kinds = [e["kind"] for e in codec.read_jsonl(machine.events)]
    assert kinds[0] == "start"
    assert kinds.count("transition") >= 2
    assert kinds[-1] == "stop"
    control = machine.read_control()
    assert control is not None
    assert control.cards == {}, "orders are taken back at the end"


def test_once_without_a_watchdog_reads_the_cards(homelab: Homelab, machine: MachineFolder, recording: Path) -> None:
    said = homelab("watchdog", "--once", "--replay", recording)
    assert said.code == 0
    assert "no watchdog is running" in said.out
    assert "GPU 0 (RTX 3090)  50 C of 90  300 of 350 W  ok" in said.out
    assert not machine.path.exists(), "looking writes nothing"


def test_once_shows_what_the_watchdog_says(homelab: Homelab, machine: MachineFolder) -> None:
    change = Transition(t_s=link.now_s(), uuid=A, before="ok", after="slow", duty=0.9, reason="83 C for 15 s")
    status = Status(
        pid=4321,
        started_s=link.now_s(),
        t_s=link.now_s(),
        interval_s=1.0,
        poll_p50_s=0.0011,
        poll_p99_s=0.0023,
        facts=FACTS,
        readings=(
            CardReading(uuid=A, temperature_c=83.0, vram_used_bytes=21 * 2**30, reasons=("software power cap",)),
        ),
        cards={A: CardStatus(level="slow", duty=0.9, reason="83 C for 15 s")},
        transitions=(change,),
    )
    codec.write_json(machine.status, status)
    said = homelab("watchdog", "--once")
    assert "pid 4321" in said.out
    assert "83 C of 90  21.0 of 24 GiB  software power cap  slow at 90% (83 C for 15 s)" in said.out
    assert "polls 1.1 ms, p99 2.3 ms" in said.out
    assert "ok -> slow at 90%: 83 C for 15 s" in said.out
    as_json = json.loads(homelab("watchdog", "--once", "--json").out)
    assert as_json["watchdog"] is True
    assert as_json["status"]["cards"][A]["level"] == "slow"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--json",), "--json goes with --once"),
        (("--readings", "1:2"), "--readings goes with calibrate"),
        (("calibrate", "--once"), "--once goes with guard"),
        (("--metrics", "x"), "--metrics goes with power-sweep"),
        (("--interval-s", "0.01"), "wants 0.1 or more"),
        (("power-sweep", "--rung", "x"), "--rung wants --ladder too"),
        (("power-sweep", "--max-slowdown", "5"), "--max-slowdown 5"),
        (("calibrate", "--", "ls"), "calibrate takes no command"),
        (("--",), "nothing stands after"),
        (("watch",), "watch"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(homelab: Homelab, words: tuple[str, ...], said: str) -> None:
    found = homelab("watchdog", *words)
    assert found.code == 2
    assert said in found.err
    assert found.err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--power-limit-w", "--target-temperature-c", "--fan-percent"])
def test_root_settings_without_root_are_refused(
    homelab: Homelab, machine: MachineFolder, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    found = homelab("watchdog", flag, "80")
    assert found.code == 2
    assert "needs root" in found.err


def turn(t_s: float, *, level: str = "ok", error: str | None = None, n_runs: int = 0, changes: Any = ()) -> Turn:
    status = Status(
        pid=1,
        started_s=0.0,
        t_s=t_s,
        interval_s=1.0,
        poll_p50_s=0.001,
        poll_p99_s=0.002,
        facts=FACTS,
        readings=(CardReading(uuid=A, temperature_c=60.0),),
        cards={A: CardStatus(level=level)},  # type: ignore[arg-type]
        sensor_error=error,
    )
    return Turn(status=status, transitions=changes, n_runs=n_runs)


def test_the_narrator_says_changes_at_once_and_the_rest_every_minute() -> None:
    said: list[str] = []
    narrator = say.Narrator(said.append)
    for second in range(130):
        narrator(turn(float(second), n_runs=int(second >= 30), error="it hangs" if 40 <= second < 50 else None))
    assert sum("60 C of 90" in line for line in said) == 3
    assert [line.split("  ", 1)[1] for line in said if "guard" in line or "sensors" in line or "hangs" in line] == [
        "1 run under guard",
        "it hangs",
        "the sensors answer again",
    ]
    quiet: list[str] = []
    narrator = say.Narrator(quiet.append, every_s=None)
    for second in range(130):
        narrator(turn(float(second)))
    assert quiet == []


def test_a_card_that_says_nothing_is_not_zero() -> None:
    status = turn(0.0).status
    lost = Status(**{**vars(status), "readings": (CardReading(uuid=A, state="lost", error="GPU is lost"),)})
    assert "lost: GPU is lost" in say.card_lines(lost)[0]
    assert " 0 C" not in say.card_lines(lost)[0]


def test_a_sweep_as_a_table() -> None:
    points = tuple(
        SweepPoint(limit_w=w, units_per_s=r, power_w=p)
        for w, r, p in ((350, 1000, 345), (280, 960, 279), (200, 700, 199))
    )
    result = SweepResult(unit="tokens", points=points, drift_frac=0.03, best=points[1], max_slowdown=0.05)
    lines = say.sweep_lines(result)
    assert [("<- recommended" in line) for line in lines[1:4]] == [False, True, False]
    assert lines[4] == ("recommended: 280 W: 4.0% slower (at most 5% allowed), 15.8% less energy per token")
    assert "sweep again" in lines[5]
