"""The wall plug's model, and the power limit with the most tokens per joule."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, RunFailed, UserError
from homelab_scaling.watch.calibrate import PlugReading, ask_readings, fit_wall, mean_cards_w, parse_readings
from homelab_scaling.watch.energy import Lap
from homelab_scaling.watch.link import CardStatus, MachineFolder, Status
from homelab_scaling.watch.power import (
    FixedWork,
    Measured,
    RunningTraining,
    SweepPoint,
    calm,
    limits_to_try,
    recommend,
    sweep,
)
from homelab_scaling.watch.readings import CardReading

# ------------------------------------------------------------------------------------------------------- calibration


def test_three_exact_readings_give_the_model_back() -> None:
    readings = [PlugReading(wall_w=60 + 1.1 * gpu, cards_w=gpu) for gpu in (40.0, 200.0, 600.0)]
    found = fit_wall(readings)
    assert found.model.base_w == pytest.approx(60)
    assert found.model.slope == pytest.approx(1.1)
    assert found.model.se_w == pytest.approx(0, abs=1e-9)
    assert found.model.n == 3


def test_residual_error_by_hand() -> None:
    # A line through (0, 100), (100, 210), (200, 310) by least squares: slope 1.05, base 101.667.
    found = fit_wall([PlugReading(wall_w=w, cards_w=g) for w, g in ((100.0, 0.0), (210.0, 100.0), (310.0, 200.0))])
    assert found.model.slope == pytest.approx(1.05)
    assert found.residuals_w == pytest.approx((-5 / 3, 10 / 3, -5 / 3))
    assert found.model.se_w == pytest.approx(np.sqrt(2 * (5 / 3) ** 2 + (10 / 3) ** 2))


def test_two_readings_have_no_residual_error() -> None:
    found = fit_wall([PlugReading(wall_w=92, cards_w=38), PlugReading(wall_w=410, cards_w=331)])
    assert found.model.se_w is None


@pytest.mark.parametrize("cards", [[], [38.0], [330.0, 331.0, 332.0]])
def test_one_load_is_no_calibration(cards: list[float]) -> None:
    with pytest.raises(UserError, match="one with idle, one with half and one with fully busy cards"):
        fit_wall([PlugReading(wall_w=1.1 * c + 60, cards_w=c) for c in cards])


@pytest.mark.parametrize(
    ("pair", "said"), [("410", "WALL:CARDS"), ("a:b", "WALL:CARDS"), ("1:2:3", "WALL:CARDS"), ("38:92", "swap")]
)
def test_a_bad_pair_is_named(pair: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_readings(["92:38", pair])


def test_asks_until_an_empty_line_and_forgives_typing_errors() -> None:
    answers = iter(["92", "four hundred", "410 W", "30", "600", ""])
    questions: list[str] = []
    loads = iter([38.0, 331.0, 331.0, 500.0, 500.0])

    def ask(question: str) -> str:
        questions.append(question)
        return next(answers)

    found = ask_readings(ask, lambda: next(loads), lambda _: None)
    assert found == [
        PlugReading(wall_w=92, cards_w=38),
        PlugReading(wall_w=410, cards_w=331),
        PlugReading(wall_w=600, cards_w=500),
    ]
    assert "idle" in questions[0]
    assert "half busy" in questions[1]


def write_status(machine: MachineFolder, readings: tuple[CardReading, ...], level: str = "ok") -> None:
    status = Status(
        pid=1,
        started_s=0.0,
        t_s=time.time(),
        interval_s=1.0,
        poll_p50_s=0.0,
        poll_p99_s=0.0,
        readings=readings,
        cards={r.uuid: CardStatus(level=level) for r in readings},  # type: ignore[arg-type]
        sensor_error=None if readings else "no driver",
    )
    codec.write_json(machine.status, status)


def test_the_cards_power_is_averaged_over_polls(tmp_path: Path) -> None:
    machine = MachineFolder(tmp_path)
    watts = iter([100.0, 200.0, 300.0, 400.0])

    def poll() -> None:
        write_status(machine, (CardReading(uuid="A", power_w=next(watts)), CardReading(uuid="B", power_w=10.0)))

    poll()
    assert mean_cards_w(machine, seconds=1.5, sleep=lambda _: poll()) == pytest.approx(210.0)


@pytest.mark.parametrize("readings", [(), (CardReading(uuid="A"),)])
def test_without_a_power_sensor_pairs_are_asked_for(tmp_path: Path, readings: tuple[CardReading, ...]) -> None:
    machine = MachineFolder(tmp_path)
    write_status(machine, readings)
    with pytest.raises(MachineError, match="--readings WALL:CARDS"):
        mean_cards_w(machine)


# ------------------------------------------------------------------------------------------------------------- choice


def point(limit: float, rate: float, power: float) -> SweepPoint:
    return SweepPoint(limit_w=limit, units_per_s=rate, power_w=power)


# A 3090 as published: 350 to 280 W keeps 95 %, 230 W keeps 80 %.
PUBLISHED = [point(350, 100, 345), point(315, 98, 312), point(280, 95.5, 279), point(230, 80, 229)]


def test_the_best_tokens_per_joule_within_the_allowed_slowdown() -> None:
    assert recommend(PUBLISHED, 0.05).limit_w == 280
    assert recommend(PUBLISHED, 0.25).limit_w == 230
    assert recommend(PUBLISHED, 0.01).limit_w == 350


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.floats(100, 400), st.floats(1, 1e6), st.floats(50, 400)), min_size=1, max_size=12),
    st.floats(0, 0.5),
)
def test_no_other_allowed_limit_is_better(rows: list[tuple[float, float, float]], slowdown: float) -> None:
    points = [point(*row) for row in rows]
    best = recommend(points, slowdown)
    fastest = max(p.units_per_s for p in points)
    assert best.units_per_s >= (1 - slowdown) * fastest
    assert all(p.units_per_j <= best.units_per_j for p in points if p.units_per_s >= (1 - slowdown) * fastest)


def test_limits_go_down_to_half_or_to_what_the_card_allows() -> None:
    assert limits_to_try(lowest_w=100, now_w=350) == [350, 325, 300, 275, 250, 225, 200, 175]
    assert limits_to_try(lowest_w=290, now_w=350) == [350, 325, 300]
    assert limits_to_try(lowest_w=350, now_w=350) == [350]


class FakeWork:
    """A card whose speed saturates above 280 W, in a room that makes everything slower by the window."""

    unit = "tokens"

    def __init__(self, drift: float = 0.0) -> None:
        self.limit, self.n, self.drift = 0.0, 0, drift

    def set_limit(self, watts: float) -> None:
        self.limit = watts

    def measure(self) -> Measured:
        self.n += 1
        rate = min(1.0, self.limit / 280) * 1000 * (1 - self.drift * (self.n - 1))
        return Measured(units_per_s=rate, power_w=min(self.limit, 300.0))


def test_a_sweep_finds_the_knee_and_measures_the_top_twice() -> None:
    work = FakeWork(drift=0.001)
    said: list[str] = []
    found = sweep([350, 325, 300, 275, 250], work.set_limit, work, say=said.append)  # type: ignore[arg-type]
    assert work.n == 6
    assert len(said) == 6
    assert [p.limit_w for p in found.points] == [350, 325, 300, 275, 250]
    assert found.best.limit_w == 275
    assert found.drift_frac == pytest.approx(0.005)
    assert found.slowdown_frac == pytest.approx(1 - 275 / 280, abs=0.005)
    assert found.saved_frac > 0.05


def test_a_window_that_the_watchdog_disturbed_is_worth_nothing(tmp_path: Path) -> None:
    machine, work = MachineFolder(tmp_path), FakeWork()
    write_status(machine, (CardReading(uuid="A", power_w=1.0),), level="slow")
    with pytest.raises(RunFailed, match="let the machine cool"):
        sweep([350], work.set_limit, work, say=lambda _: None, check=lambda: calm(machine))  # type: ignore[arg-type]
    write_status(machine, (CardReading(uuid="A", power_w=1.0),), level="warn")
    calm(machine)


# ------------------------------------------------------------------------------------------------------ real commands

TRAINER = """
import json, sys, time
from pathlib import Path
metrics, limit = Path(sys.argv[1]), Path(sys.argv[2])
while True:
    watts = json.loads(limit.read_text())
    time.sleep(0.05)
    with open(metrics, "a") as file:
        print(json.dumps({"kind": "rate", "interval_s": 1.0, "interval_tokens": 10 * watts}), file=file)
        print(json.dumps({"kind": "step", "loss": 1.0}), file=file)
"""


class FakeMeter:
    """The cards draw what the file says."""

    def __init__(self, limit: Path, unseen_frac: float = 0.0) -> None:
        self.limit, self.before, self.unseen_frac = limit, time.monotonic(), unseen_frac

    def lap(self) -> Lap:
        now = time.monotonic()
        seconds, self.before = now - self.before, now
        watts = float(json.loads(self.limit.read_text()))
        return Lap(joules=watts * seconds, seconds=seconds, unseen_s=self.unseen_frac * seconds)


@pytest.fixture
def limit(tmp_path: Path) -> Path:
    path = tmp_path / "limit"
    path.write_text("300")
    return path


@pytest.fixture
def training(tmp_path: Path, limit: Path) -> Iterator[RunningTraining]:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps({"kind": "rate", "interval_s": 1.0, "interval_tokens": 1e9}) + "\n")  # of before
    command = [sys.executable, "-c", TRAINER, str(metrics), str(limit)]
    with RunningTraining(
        command=command, metrics=metrics, meter=FakeMeter(limit), settle_s=0.2, window_s=0.5
    ) as training:
        yield training


def test_a_running_training_is_measured_by_its_metrics(training: RunningTraining, limit: Path) -> None:
    for watts in (300, 200):
        new = limit.with_suffix(".new")
        new.write_text(str(watts))
        new.replace(limit)
        found = training.measure()
        assert found.units_per_s == pytest.approx(10 * watts)
        assert found.power_w == pytest.approx(watts)


def test_a_training_that_ends_early_says_so(tmp_path: Path, limit: Path) -> None:
    with (
        RunningTraining(
            command=[sys.executable, "-c", "raise SystemExit(4)"],
            metrics=tmp_path / "none.jsonl",
            meter=FakeMeter(limit),
            settle_s=30,
        ) as training,
        pytest.raises(RunFailed, match="exit code 4"),
    ):
        training.measure()


def test_energy_that_was_not_measured_is_no_energy(tmp_path: Path, limit: Path) -> None:
    work = FixedWork(command=[sys.executable, "-c", "pass"], meter=FakeMeter(limit, unseen_frac=0.5))
    with pytest.raises(RunFailed, match="was not measured"):
        work.measure()


def test_a_fixed_piece_of_work_is_timed(limit: Path) -> None:
    found = FixedWork(command=[sys.executable, "-c", "import time; time.sleep(0.5)"], meter=FakeMeter(limit)).measure()
    assert 0.5 < 1 / found.units_per_s < 5
    assert found.power_w == pytest.approx(300, rel=0.01)


def test_a_fixed_piece_of_work_that_fails_is_no_measurement(limit: Path) -> None:
    with pytest.raises(RunFailed, match="exit code 9"):
        FixedWork(command=[sys.executable, "-c", "raise SystemExit(9)"], meter=FakeMeter(limit)).measure()


# ------------------------------------------------------------------------------------------------------- the commands


def test_calibrate_with_pairs_writes_the_model(
    homelab: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    said = homelab("watchdog", "calibrate", "--readings", "104:40", "280:200", "720:600")
    assert said.code == 0, said  # type: ignore[attr-defined]
    model = codec.read_plain_json(tmp_path / "machine" / "wall.json")
    assert model["base_w"] == pytest.approx(60)
    assert model["slope"] == pytest.approx(1.1)
    as_json = homelab("watchdog", "calibrate", "--json", "--readings", "104:40", "280:200", "720:600")
    assert json.loads(as_json.out)["model"]["n"] == 3  # type: ignore[attr-defined]


def test_a_power_sweep_without_root_or_card_is_one_sentence(
    homelab: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    said = homelab("watchdog", "power-sweep")
    assert said.code == 2  # type: ignore[attr-defined]
    assert "needs root" in said.err  # type: ignore[attr-defined]
