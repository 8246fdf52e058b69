"""Joules from the watchdog's status, through restarts and silence; the plug; the bill."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import CARD, HandWatchdog
from toy_run import make_toy_run, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.specs import Money
from homelab_scaling.train import orders
from homelab_scaling.train.bill import make_bill, why_unknown
from homelab_scaling.train.checkpoint import START, Clock
from homelab_scaling.train.hooks import Hooks
from homelab_scaling.watch import energy
from homelab_scaling.watch.energy import EnergyMeter, WallModel, read_wall_model, write_wall_model


class Plant:
    """A card at known power, a watchdog that sees it every second while it is up, and a clock."""

    def __init__(self, path: Path, monkeypatch) -> None:
        monkeypatch.setattr(energy, "READ_EVERY_S", 0.0)
        self.watchdog = HandWatchdog(path, started_s=1000.0)
        self.now = 1000.0
        self.counted_from_s = 1000.0
        self.joules = self.before = 0.0
        self.up = True
        self.say(0.0)

    def say(self, watts: float) -> None:
        joules = self.joules - self.before
        self.watchdog.status(t_s=self.now, energy_j=joules, power_w=watts)

    def run(self, seconds: int, watts: float) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.joules += watts
            if self.up:
                self.say(watts)

    def restart(self) -> None:
        self.up, self.before, self.watchdog.started_s = True, self.joules, self.now
        self.say(0.0)

    def meter(self, cards=(CARD,)) -> EnergyMeter:
        return EnergyMeter(self.watchdog.machine, cards, now=lambda: self.now)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch) -> Plant:
    return Plant(tmp_path / "machine", monkeypatch)


def test_laps_are_differences_of_the_counter(plant: Plant) -> None:
    plant.run(50, 300)  # before the run: not ours
    meter = plant.meter()
    plant.run(10, 200)
    lap = meter.lap()
    assert (lap.joules, lap.seconds, lap.unseen_s) == (2000.0, 10.0, 0.0) and lap.power_w == 200.0
    plant.run(5, 100)
    assert meter.lap().joules == pytest.approx(500)
    assert meter.source == "counter" and meter.why_not is None


def test_the_last_power_carries_on_to_now_and_is_never_counted_twice(plant: Plant) -> None:
    plant.run(5, 200)
    meter = plant.meter()
    plant.now += 0.5
    assert meter.lap().joules == pytest.approx(100)
    plant.now -= 0.5
    plant.run(1, 200)
    assert meter.lap().joules == pytest.approx(100)


def test_a_guess_that_was_too_high_is_made_good(plant: Plant) -> None:
    meter = plant.meter()
    total = 0.0
    for _ in range(10):
        plant.run(1, 400)
        plant.now += 0.9
        total += meter.lap().joules  # the last power was 400 W, but nothing more will come
        plant.now -= 0.9
        plant.run(1, 0)
        total += meter.lap().joules
    assert 10 * 400 <= total <= 10 * 400 + 360


def test_a_hole_in_the_counter_is_made_good_a_restart_is_not(plant: Plant) -> None:
    meter = plant.meter()
    plant.run(10, 200)
    assert meter.lap().joules == 2000
    plant.up = False
    plant.run(100, 200)
    lap = meter.lap()
    assert lap.unseen_s == 100 and lap.power_w is None
    plant.up = True
    plant.run(1, 200)
    lap = meter.lap()
    assert lap.joules == 101 * 200 and lap.unseen_s == -100, "the same watchdog's counter knows what happened"
    plant.up = False
    plant.run(30, 200)
    plant.restart()
    plant.run(10, 100)
    lap = meter.lap()
    assert lap.joules == 1000 and lap.unseen_s == 30


def test_a_watchdog_that_starts_after_the_run_is_all_ours(tmp_path: Path, monkeypatch) -> None:
    plant = Plant(tmp_path / "m", monkeypatch)
    plant.watchdog.machine.status.unlink()
    meter = plant.meter()
    plant.up = False
    plant.run(3, 200)
    assert meter.lap().unseen_s == 3 and "no watchdog" in meter.why_not
    plant.restart()
    plant.run(7, 200)
    lap = meter.lap()
    assert (lap.joules, lap.seconds, lap.unseen_s) == (1400, 7, 0)


def test_unknown_is_said_not_zero(plant: Plant) -> None:
    assert plant.meter(()).why_not == "the run uses no card"
    other = plant.meter(("GPU-other",))
    plant.run(5, 200)
    assert other.lap().unseen_s == 5 and "neither energy nor power" in other.why_not
    every = plant.meter("all")
    plant.run(5, 200)
    assert every.lap().joules == 1000


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["run", "down", "restart", "lap"]), st.integers(1, 40), st.integers(0, 400))))
def test_nothing_is_counted_twice_whatever_happens(tmp_path_factory, moves) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant = Plant(tmp_path_factory.mktemp("m"), patch)
        meter = plant.meter()
        joules = unseen = 0.0
        began = plant.now
        for move, seconds, watts in [*moves, ("lap", 1, 0)]:
            if move == "run":
                plant.run(seconds, watts)
            elif move == "down":
                plant.up = False
            elif move == "restart":
                plant.restart()
            lap = meter.lap()
            assert lap.joules >= 0
            joules, unseen = joules + lap.joules, unseen + lap.unseen_s
        # A guess of the last power for up to five seconds of silence is the most that can be too much.
        assert joules <= plant.joules + 5 * 400
        assert -1e-6 <= unseen <= plant.now - began + 1e-6
        if unseen == 0:
            assert joules >= plant.joules - 5 * 400


def test_the_plug(plant: Plant) -> None:
    machine = plant.watchdog.machine
    default = read_wall_model(machine)
    assert not default.is_calibrated and default.err_frac(500) == 0.15
    assert default.joules(280 * 3600, 3600) / 3600 == pytest.approx(110 + 280 / 0.92)
    write_wall_model(machine, WallModel(base_w=60, slope=1.1, se_w=5, n=3))
    ours = read_wall_model(machine)
    assert ours.is_calibrated and ours.err_frac(200) == pytest.approx(0.05) and ours.err_frac(2000) == 0.02
    with pytest.raises(SpecError, match="positive slope"):
        WallModel(slope=0.0)


PRICES = Money(usd_per_kwh=0.5, usd_per_machine_hour=2.0)


def clock_of(**changes) -> Clock:
    plain = {
        "train_s": {"0:trunk": 3000.0, "1:decay": 600.0},
        "start_s": 100.0,
        "paused_s": {"0:trunk": 5000.0},
        "slept_s": {"0:trunk": 400.0},
        "energy_j": {"0:trunk": 900e3, "1:decay": 180e3, "start": 5e3, "paused": 50e3},
        "metered_s": {"0:trunk": 3400.0, "1:decay": 600.0, "start": 100.0, "paused": 5000.0},
        "energy_from": "counter",
    }
    return codec.from_plain({**plain, **changes}, Clock, "clock")


def test_a_bill_in_parts_and_together() -> None:
    wall = WallModel(base_w=100, slope=1.1, se_w=10, n=4)
    whole = make_bill(clock_of(), [START, "0:trunk", "1:decay"], PRICES, wall)
    assert whole.seconds == 3700, "neither pauses nor pacing are the run's seconds"
    assert whole.kwh == pytest.approx(1085e3 / 3.6e6) and whole.kwh_from == "counter"
    assert whole.kwh_wall == pytest.approx((100 * 4100 + 1.1 * 1085e3) / 3.6e6), "the machine was on while it was paced"
    assert whole.usd_energy == pytest.approx(0.5 * whole.kwh_wall)
    assert whole.usd_machine == pytest.approx(2 * 3700 / 3600)
    assert whole.usd == pytest.approx(whole.usd_energy + whole.usd_machine)
    assert whole.kwh_err_frac == pytest.approx(0.05) and whole.kwh_unmetered_frac == 0
    assert whole.kwh_wall_err_frac == pytest.approx(2 * 10 / (100 + 1.1 * 1085e3 / 4100))
    parts = [make_bill(clock_of(), names, PRICES, wall) for names in ([START, "0:trunk"], ["1:decay"])]
    assert sum(p.usd for p in parts) == pytest.approx(whole.usd)


def test_what_no_sensor_saw_is_filled_in_and_flagged_or_unknown() -> None:
    wall, names = WallModel(), ["0:trunk"]
    half = clock_of(energy_j={"0:trunk": 500e3}, metered_s={"0:trunk": 2550.0})
    bill = make_bill(half, names, PRICES, wall)
    assert bill.kwh_unmetered_frac == pytest.approx(0.25) and bill.kwh_err_frac == pytest.approx(0.30)
    assert bill.kwh == pytest.approx(500e3 / 0.75 / 3.6e6)
    little = clock_of(energy_j={"0:trunk": 100e3}, metered_s={"0:trunk": 1000.0})
    bill = make_bill(little, names, PRICES, wall)
    assert bill.kwh is None and bill.usd_energy is None and bill.usd == bill.usd_machine
    assert "less than 50% of the time was metered" in why_unknown(little, PRICES, "?")["kwh"]


def test_stated_watts_are_an_estimate_that_says_so() -> None:
    none = clock_of(energy_j={}, metered_s={}, energy_from=None)
    bill = make_bill(none, ["1:decay"], Money(watts=400, usd_per_kwh=0.5), WallModel())
    assert (bill.kwh_from, bill.kwh_err_frac, bill.kwh_wall_err_frac) == ("stated watts", None, None)
    assert bill.kwh == bill.kwh_wall == pytest.approx(400 * 600 / 3.6e6)
    assert bill.usd == bill.usd_energy == pytest.approx(0.5 * bill.kwh) and bill.usd_machine is None
    measured = make_bill(clock_of(), ["1:decay"], Money(watts=400), WallModel())
    assert measured.kwh_from == "counter", "what is measured comes first"
    assert make_bill(none, ["1:decay"], Money(), WallModel()).usd is None
    reasons = why_unknown(none, Money(), "the run is on CPU")
    assert reasons["usd_energy"] == "the ladder's [money] gives no usd_per_kwh" and "on CPU" in reasons["kwh"]


def test_an_old_clock_counts_as_not_measured() -> None:
    """Checkpoints from before there was a meter: what they trained is time that no sensor saw."""
    old = codec.from_plain({"train_s": {"0:trunk": 100.0}, "start_s": 5.0}, Clock, "checkpoint.json")
    assert make_bill(old, [START, "0:trunk"], Money(), WallModel()).kwh is None


class Burn(Hooks):
    """200 J more on the counter after every log interval."""

    def __init__(self, watchdog: HandWatchdog) -> None:
        self.watchdog, self.joules = watchdog, 5000.0
        self.burn()

    def burn(self) -> None:
        self.watchdog.status(energy_j=self.joules, power_w=0.0)

    def steps(self, lines, rate) -> None:
        self.joules += 200.0
        self.burn()


def test_a_run_records_its_energy_and_money(tmp_path: Path, monkeypatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(energy, "READ_EVERY_S", 0.0)
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    monkeypatch.setenv("HOMELAB_WATCH_CARDS", "all")
    monkeypatch.setattr(orders, "start_watchdog", lambda lab: None)
    spec, folder = make_toy_run(tmp_path, write_shards(tmp_path / "shards"))
    spec = replace(spec, money=PRICES)
    watchdog = HandWatchdog(tmp_path / "machine")
    burn = Burn(watchdog)
    record = train_here(spec, folder, [burn])
    total_j = burn.joules - 5000.0
    assert record.rows[0].kwh_from == "counter"
    # The last interval's joules are seen by nobody, as nothing is measured after the last row. Time in which a busy
    # machine let no sensor be heard is filled in at the mean power of the rest.
    filled = max(row.kwh_unmetered_frac for row in record.rows)
    assert filled < 0.3
    billed_j = sum(r.kwh_marginal for r in record.rows) * 3.6e6
    assert total_j - 200.1 <= billed_j <= total_j / (1 - filled) + 0.1
    for row in record.rows:
        assert row.usd == pytest.approx(row.usd_energy + row.usd_machine)
        assert row.kwh_wall > row.kwh and row.kwh_wall_err_frac >= 0.15
        assert row.joules_per_token == pytest.approx(row.kwh * 3.6e6 / row.n_tokens)
        assert row.kwh_per_mtoken == pytest.approx(row.joules_per_token / 3.6)
    assert not {"kwh", "usd", "usd_energy"} & set(record.unknown)
    rates = [x for x in codec.read_jsonl(folder.metrics) if x["kind"] == "rate"]
    assert [x["energy_j"] for x in rates] == sorted(x["energy_j"] for x in rates) and rates[-1]["power_w"] > 0
    assert folder.read_record() == record
