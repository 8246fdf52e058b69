"""Frames from folders: what is unknown, stale, lost, torn, paused, finished, diverged or not there at all."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watched_lab import DEVICE, NOW, UUIDS, WatchedLab, iso

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import Money
from homelab_scaling.watch import feed
from homelab_scaling.watch.costs import cost_so_far
from homelab_scaling.watch.energy import WallModel
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.runlog import MAX_POINTS, Rate, RunLog
from homelab_scaling.watch.screen import draw
from homelab_scaling.watch.view import View, find_place, newest_ladder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The lab in flight, made once."""
    return WatchedLab.in_flight(tmp_path_factory.mktemp("template") / "lab", every=40)


@pytest.fixture
def flying(template, tmp_path, monkeypatch):
    """A copy of it to spoil."""
    shutil.copytree(template.lab, tmp_path / "lab")
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "lab" / "machine"))
    made = object.__new__(WatchedLab)
    made.__dict__ = {**template.__dict__, "lab": tmp_path / "lab", "ladder": tmp_path / "lab" / template.ladder.name}
    return made


def look(lab, now=NOW, **kwargs):
    return View(find_place(lab), **kwargs).frame(now)


def append(folder, kind, at, **fields):
    codec.append_jsonl(folder.events, [{"kind": kind, "time": iso(at), **fields}])
    os.utime(folder.events, (at, at))


def words(frame, width=100, height=None):
    return "\n".join(line.plain for line in draw(frame, width, height))


# ------------------------------------------------------------------------------------------------------ a lab in flight


def test_a_lab_in_flight(flying):
    frame = look(flying.lab)
    run, ladder = frame.run, frame.ladder
    assert (run.rung, run.state, run.phase) == ("51m", "slowed", "decay to 515M")
    assert run.done_frac == pytest.approx(0.43, abs=0.005)
    assert run.tokens_done == run.update * run.batch_tokens
    assert run.speed.tokens_per_s == pytest.approx(flying.rate(flying.spec("51m")), rel=0.02)
    true_left = (run.tokens_total - run.tokens_done) / flying.rate(flying.spec("51m")) / 0.9
    assert run.left_s.low < true_left * 1.02 and true_left < run.left_s.high * 1.02
    assert [r.state for r in frame.rungs] == ["finished", "finished", "finished", "slowed", "queued"]
    assert [r.rung for r in frame.rungs] == ["5m", "12m", "24m", "51m", "124m"]
    assert (ladder.n_finished, ladder.n_runs) == (3, 5)
    queued = flying.spec("124m").execution.predicted_s
    assert ladder.left_s.mid == pytest.approx(run.left_s.mid + queued / 0.96, rel=0.02)
    assert frame.rungs[0].loss_from == "row" and frame.rungs[3].loss_from == "validation"
    assert frame.notes == ()


def test_its_energy_and_money(flying):
    frame = look(flying.lab)
    cost, spec = frame.run.cost, flying.spec("51m")
    seconds = frame.run.tokens_done / flying.rate(spec)
    assert cost.kwh == pytest.approx(536 * seconds / 3.6e6, rel=0.03)
    assert cost.kwh_end / cost.kwh == pytest.approx(1 / 0.43, rel=0.15)
    assert cost.kwh_wall == pytest.approx((110 * seconds + 536 * seconds / 0.92) / 3.6e6, rel=0.03)
    assert cost.usd_energy == pytest.approx(0.2 * cost.kwh_wall)
    assert cost.usd_machine == pytest.approx(0.15 * seconds / 3600, rel=0.02)
    assert cost.usd == pytest.approx(cost.usd_energy + cost.usd_machine)
    assert cost.joules_per_token == pytest.approx(536 / flying.rate(spec), rel=0.02)
    whole = frame.ladder.cost
    assert whole.kwh == pytest.approx(sum(r.kwh for r in frame.rungs if r.kwh is not None))
    assert whole.kwh < cost.kwh_end + whole.kwh < whole.kwh_end


def test_its_cards(flying):
    frame = look(flying.lab)
    first, second = frame.cards
    assert (first.level, second.level, second.duty) == ("ok", "slow", 0.9)
    assert first.headroom_c == 95 - first.temperature_c
    assert second.reason == "87 C for 15 s"
    assert len(second.history) == pytest.approx(121, abs=2)
    assert second.slope_c_per_min == 0.0
    assert first.runs == (frame.run.run_id,)
    assert (frame.watchdog.state, frame.watchdog.level, frame.watchdog.age_s) == ("alive", "slow", 0.0)
    assert [m.text.partition(":")[0] for m in frame.watchdog.moments] == [
        "started",
        "ok to warn",
        "warn to slow at 90 %",
    ]
    assert frame.ahead.startswith("GPU 1 speeds up again at 80 C held 120 s")


def test_a_frame_is_one_json_document_without_nan(flying):
    plain = json.loads(codec.dumps(look(flying.lab)))
    assert plain["run"]["rung"] == "51m"
    assert len(plain["run"]["curve"]) <= MAX_POINTS


def test_only_new_lines_are_read_and_a_resume_rewrites_the_curve(flying):
    view = View(find_place(flying.lab))
    before = view.frame(NOW).run
    folder = flying.folder("51m")
    line = {"kind": "step", "update": before.update, "step": 1, "phase": "trunk", "tokens": 5, "lr": 1e-3, "loss": 3.25}
    codec.append_jsonl(folder.metrics, [line])
    after = view.frame(NOW + 1).run
    assert (after.update, after.loss_nats) == (before.update + 1, 3.25)
    kept = [one for one in codec.read_jsonl(folder.metrics) if one["update"] < 1000]
    codec.write_text(folder.metrics, "".join(json.dumps(one) + "\n" for one in kept))
    assert view.frame(NOW + 2).run.update <= 1000


def test_a_new_run_and_a_new_ladder_are_noticed(flying):
    view = View(find_place(flying.lab))
    assert view.frame(NOW).ladder.name == "gpt2_5m_120m"
    other = flying.lab / "other" / "runs"
    shutil.copytree(flying.ladder / "runs", other)
    for path in other.rglob("*.jsonl"):
        os.utime(path, (NOW + 60, NOW + 60))
    frame = view.frame(NOW + 61)
    assert frame.ladder.name == "other"
    assert newest_ladder(flying.lab).name == "other"
    fixed = View(find_place(flying.ladder)).frame(NOW + 61)
    assert fixed.ladder.name == "gpt2_5m_120m"


def test_a_run_of_ones_choice(flying):
    assert look(flying.lab, run="12m").run.rung == "12m"
    assert look(flying.lab, run="12m").run.state == "finished"
    with pytest.raises(SpecError, match="no run begins with 7b; it has 5m-"):
        look(flying.lab, run="7b")


# ----------------------------------------------------------------------------------------------------------- its states


def test_paused_and_resumed(flying):
    folder = flying.folder("51m")
    append(folder, "paused", NOW - 1, update=6000, reason="92 C, 3 C below slowdown")
    run = look(flying.lab).run
    assert (run.state, run.reason) == ("paused", "92 C, 3 C below slowdown")
    assert "once it resumes" in words(look(flying.lab))
    append(folder, "resumed", NOW + 100, update=6000, paused_s=101.0, stops=False)
    run = look(flying.lab, NOW + 100).run
    assert run.state == "slowed"
    assert run.paused_s == 101.0


def test_silent_interrupted_starting(flying, monkeypatch):
    assert look(flying.lab, NOW + 20).run.state == "slowed", "a file that just grew belongs to a run that lives"
    monkeypatch.setattr(feed, "_lives", lambda pid, began: True)
    assert look(flying.lab, NOW + 170).run.state == "slowed"
    assert look(flying.lab, NOW + 2000).run.state == "silent"
    monkeypatch.setattr(feed, "_lives", lambda pid, began: False)
    interrupted = look(flying.lab, NOW + 2000).run
    assert interrupted.state == "interrupted"
    assert "run the same command again" in interrupted.reason
    append(flying.folder("51m"), "segment", NOW + 2005, update=interrupted.update, step=5, pids=[1])
    monkeypatch.setattr(feed, "_lives", lambda pid, began: True)
    starting = look(flying.lab, NOW + 2010).run
    assert starting.state == "starting"
    assert starting.left_s is not None, "the speed of the segment before is a guess"


def test_a_process_that_began_after_its_run_only_has_the_same_number():
    assert feed._lives(os.getpid(), None)
    assert not feed._lives(os.getpid(), 1.0)
    assert not feed._lives(2**22 + 1, None)


@pytest.mark.parametrize(
    ("status", "reason"),
    [("diverged", "loss became non-finite"), ("failed", "RuntimeError: x"), ("stopped", "SIGTERM")],
)
def test_a_run_that_ended_badly_says_why(flying, status, reason):
    path = flying.folder("51m").record
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "status": status, "reason": reason}))
    frame = look(flying.lab)
    assert (frame.run.state, frame.run.reason) == (status, reason)
    for width in (80, 160):
        assert f"{status}: {reason}" in words(frame, width)
    assert frame.ladder.n_finished == 3


def test_a_finished_lab(flying):
    for rung in ("51m", "124m"):
        shutil.rmtree(flying.folder(rung).path)
    flying.run("124m", ends_s=NOW - 3600)
    flying.run("51m", ends_s=NOW - 60)
    frame = look(flying.lab)
    assert frame.run.rung == "51m"
    assert (frame.run.state, frame.run.left_why, frame.run.done_frac) == ("finished", "finished", 1.0)
    assert frame.ladder.left_s is None
    assert (frame.ladder.n_finished, frame.ladder.cost.kwh) == (5, frame.ladder.cost.kwh_end)
    assert "this run is finished" in words(frame)
    assert frame.run.cost.kwh == pytest.approx(sum(row.kwh_marginal for row in flying.folder("51m").read_record().rows))


def test_out_of_memory_is_among_the_transitions(flying):
    append(flying.folder("51m"), "oom", NOW - 30, microbatch_seqs_per_rank=8, next=4)
    last = look(flying.lab).watchdog.moments[-1]
    assert last.text == "out of memory with micro-batch 8, goes on with 4"


def test_another_trainers_run_has_no_plan_and_still_a_place(empty, monkeypatch):
    folder = RunFolder(empty / "mine" / "runs" / "mine-124m")
    lines = []
    for u in range(10):
        lines.append(
            {"kind": "step", "update": u, "step": u, "phase": "trunk", "tokens": 512 * (u + 1), "loss": 5.0 - u / 10}
        )
        rate = {"kind": "rate", "update": u + 1, "interval_tokens": 512, "interval_s": 2.0, "power_w": 200.0}
        lines.append({**rate, "energy_j": 400.0 * (u + 1)})
    folder.path.mkdir(parents=True)
    codec.append_jsonl(folder.metrics, lines)
    codec.append_jsonl(folder.events, [{"kind": "segment", "time": iso(NOW - 30), "update": 0, "pids": [1]}])
    record = {"run_id": "mine-124m", "rung": "mine-124m", "status": "running", "rows": [], "machine": {"device": "cpu"}}
    folder.record.write_text(json.dumps(record))
    for path in (folder.metrics, folder.events, folder.record):
        os.utime(path, (NOW - 1, NOW - 1))
    frame = look(empty)
    run = frame.run
    assert (run.rung, run.state, run.n_updates, run.done_frac) == ("mine-124m", "running", None, None)
    assert (run.left_s, run.left_why) == (None, "its trainer did not say how long it will be")
    assert (run.tokens_done, run.speed.tokens_per_s, run.speed.step_p50_s) == (5120, 256.0, 2.0)
    assert run.cost.kwh == pytest.approx(4000 / 3.6e6)
    assert frame.notes == ()
    shown = words(frame, 100)
    assert "step 10   5.12k tokens" in shown and "time left unknown: its trainer did not say" in shown


# ------------------------------------------------------------------------------------------------ unknown is not zero


def test_unknown_energy_has_a_reason_and_zero_is_zero():
    rates = [Rate(update=10 * i, interval_s=10.0, interval_tokens=100) for i in range(1, 20)]
    given = {"clock": {}, "clock_update": 0, "wall": WallModel(), "left_s": 100.0}
    none = cost_so_far(rates=rates, money=Money(), why="the run is on CPU, and there is no card to watch", **given)
    assert (none.kwh, none.usd, none.kwh_why) == (None, None, "the run is on CPU, and there is no card to watch")
    assert none.usd_why == "the ladder's [money] has no price"
    free = cost_so_far(rates=rates, money=Money(usd_per_machine_hour=0.0), why=None, **given)
    assert (free.kwh, free.usd) == (None, 0.0)
    stated = cost_so_far(rates=rates, money=Money(watts=360.0, usd_per_kwh=0.5), why=None, **given)
    assert stated.kwh == pytest.approx(0.019)
    assert stated.kwh_end == pytest.approx(0.029)
    assert (stated.kwh_from, stated.kwh_err_frac) == ("stated watts", None)
    assert stated.usd_energy == pytest.approx(0.0095)


def test_energy_that_was_seen_for_a_part_of_the_time():
    def rate(i, seen):
        return Rate(
            update=10 * i,
            interval_s=10.0,
            interval_tokens=100,
            power_w=200.0 if seen else None,
            energy_j=2000.0 * min(i, 15),
        )

    given = {"clock": {}, "clock_update": 0, "wall": WallModel(), "left_s": None, "money": Money(), "why": None}
    most = cost_so_far(rates=[rate(i, i <= 15) for i in range(1, 21)], **given)
    assert most.kwh == pytest.approx(200 * 200 / 3.6e6)
    assert most.kwh_err_frac == pytest.approx(0.05 + 0.25)
    assert most.kwh_end is None
    little = cost_so_far(rates=[rate(i, i <= 15) for i in range(1, 41)], **given)
    assert little.kwh is None
    assert "only 38 % of the time" in little.kwh_why


def test_the_checkpoint_clock_holds_what_the_log_does_not():
    clock = {
        "train_s": {"0:trunk": 1000.0}, "validate_s": {"0:trunk": 60.0}, "checkpoint_s": {}, "start_s": 40.0,
        "energy_j": {"start": 1e3, "0:trunk": 3e5, "paused": 5e4}, "energy_from": "counter",
    }  # fmt: skip
    joules = {90: 3.51e5, 100: 3.54e5, 110: 3.57e5}
    rates = [Rate(update=u, interval_s=10.0, interval_tokens=1, power_w=300.0, energy_j=j) for u, j in joules.items()]
    money = Money(usd_per_machine_hour=3.6)
    cost = cost_so_far(clock=clock, clock_update=100, rates=rates, money=money, wall=WallModel(), left_s=0.0, why=None)
    assert cost.seconds == 1110.0
    assert cost.usd_machine == pytest.approx(1.11)
    assert cost.kwh == pytest.approx((3.51e5 + 6e3 - 5e4) / 3.6e6), "pauses are on nobody's bill"
    assert cost.kwh_from == "counter"


def test_a_card_without_sensors_shows_dashes_and_reasons(flying):
    nothing = dict.fromkeys(
        ("temperature_c", "power_w", "power_limit_w", "vram_used_bytes", "vram_reserved_bytes", "sm_clock_mhz",
         "utilisation_frac", "fan_frac", "reasons")
    )  # fmt: skip
    missing = {"temperature_c": "Not Supported"}
    facts = tuple(CardFacts(uuid=u, index=i, name=DEVICE, vram_bytes=1, missing=missing) for i, u in enumerate(UUIDS))
    flying.edit_status(card0=nothing, facts=facts, cards={})
    frame = look(flying.lab)
    card = frame.cards[0]
    assert (card.temperature_c, card.power_w, card.fan_frac, card.vram_used_bytes) == (None, None, None, None)
    assert card.slowdown_assumed and frame.cards[1].slowdown_assumed
    shown = words(frame)
    assert "temperature unknown: Not Supported" in shown
    assert "– W" in shown and "fan –" in shown and "VRAM –" in shown
    assert "90 C (assumed)" in shown
    assert " 0 W" not in shown and " 0 C" not in shown


def test_a_fan_that_stands_still_is_a_zero(flying):
    flying.edit_status(card0={"fan_frac": 0.0, "power_w": 0.0})
    shown = words(look(flying.lab))
    assert "fan 0 %" in shown and "0 of 320 W" in shown


def test_a_lost_card_never_hides_the_other(flying):
    flying.edit_status(card1={"state": "lost", "temperature_c": None, "error": "GPU is lost"})
    frame = look(flying.lab)
    assert frame.cards[1].state == "lost"
    assert "reboot" in frame.ahead
    shown = words(frame)
    assert "lost this card: GPU is lost" in shown
    assert f"{frame.cards[0].temperature_c:.0f} C" in shown


def test_a_stale_status_is_said_everywhere(flying):
    frame = look(flying.lab, NOW + 65)
    assert (frame.watchdog.state, frame.watchdog.age_s) == ("silent", 65.0)
    assert "silent" in frame.ahead
    shown = words(frame)
    assert "watchdog silent for 65 s" in shown
    assert shown.count("65 s old") == 2


def test_without_a_watchdog_it_says_so(flying):
    codec.append_jsonl(
        flying.lab / "machine" / "events.jsonl", [{"kind": "stop", "t_s": NOW, "reason": "asked to stop"}]
    )
    frame = look(flying.lab, NOW + 600)
    assert frame.watchdog.state == "none"
    assert "no watchdog running" in words(frame)
    shutil.rmtree(flying.lab / "machine")
    frame = look(flying.lab)
    assert (frame.watchdog.state, frame.cards, frame.watchdog.age_s) == ("none", (), None)
    assert "no card is known: no watchdog has looked" in words(frame)


def test_samples_alone_still_show_the_cards(flying):
    (flying.lab / "machine" / "status.json").unlink()
    frame = look(flying.lab)
    assert len(frame.cards) == 2
    assert frame.cards[0].name == "RTX 4080"
    assert frame.cards[0].health == "unknown"


# ---------------------------------------------------------------------------------------------------- nothing or little


class FakeSensors:
    """Two cards, one of them lost; counts what is asked of it."""

    source, interval_s, poll_p50_s, poll_p99_s, error = "nvml", 1.0, 0.001, 0.002, None
    facts = tuple(
        CardFacts(uuid=u, index=i, name=DEVICE, vram_bytes=16 * 2**30, slowdown_c=95.0) for i, u in enumerate(UUIDS)
    )

    def __init__(self):
        self.polls, self.closed = 0, False

    def poll(self, now_s):
        self.polls += 1
        one = CardReading(uuid=UUIDS[0], temperature_c=41.0, power_w=18.0)
        return Sample(
            t_s=now_s, poll_s=0.001, cards=(one, CardReading(uuid=UUIDS[1], state="lost", error="GPU is lost"))
        )

    def close(self):
        self.closed = True


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    (tmp_path / "lab").mkdir()
    return tmp_path / "lab"


def test_without_any_run_it_asks_the_cards_itself(empty):
    sensors = FakeSensors()
    view = View(find_place(empty), open_sensors=lambda: sensors)
    frame = view.frame(NOW)
    assert frame.run is None and frame.ladder is None
    assert frame.watchdog.state == "direct"
    assert [c.state for c in frame.cards] == ["ok", "lost"]
    shown = words(frame)
    assert "41 C" in shown and "There is no ladder" in shown and "no watchdog running" in shown
    view.frame(NOW + 1)
    assert sensors.polls == 2
    view.close()
    assert sensors.closed


def test_while_a_run_is_going_the_driver_is_left_alone(flying, monkeypatch):
    sensors = FakeSensors()
    shutil.rmtree(flying.lab / "machine")
    view = View(find_place(flying.lab), open_sensors=lambda: sensors)
    assert view.frame(NOW).watchdog.state == "none"
    assert sensors.polls == 0
    monkeypatch.setattr(feed, "_lives", lambda pid, began: False)
    assert view.frame(NOW + 5000).watchdog.state == "direct", "the run is interrupted by then"
    assert sensors.polls == 1


def test_without_any_card_it_says_so(empty):
    sensors = FakeSensors()
    sensors.facts, sensors.error = (), "the driver lists no card"
    sensors.poll = lambda now_s: Sample(t_s=now_s, poll_s=0.0, cards=())
    shown = words(View(find_place(empty), open_sensors=lambda: sensors).frame(NOW))
    assert "the driver lists no card" in shown
    assert "no card" in words(View(find_place(empty)).frame(NOW))


def test_a_prepared_lab_waits(flying):
    for path in (flying.ladder / "runs").iterdir():
        for name in ("record.json", "events.jsonl", "metrics.jsonl"):
            (path / name).unlink(missing_ok=True)
    frame = look(flying.lab)
    assert frame.run is None
    assert {r.state for r in frame.rungs} == {"queued"}
    assert "Nothing has begun: 5 runs wait" in words(frame)
    shutil.rmtree(flying.ladder / "runs")
    assert [r.state for r in look(flying.lab).rungs] == ["queued"] * 5, "the plan alone names them"


@pytest.mark.parametrize("name", ["a file", "nothing", "something else"])
def test_a_wrong_path_is_one_sentence(tmp_path, name):
    path = tmp_path / "x"
    if name == "a file":
        path.write_text("")
    elif name == "something else":
        path.mkdir()
        (path / "notes.txt").write_text("")
    with pytest.raises(SpecError, match=r"give (a lab|LAB)"):
        find_place(path)


# -------------------------------------------------------------------------------------------------------------- the law


def test_the_law_is_said_and_worked_out_once(flying, monkeypatch):
    from homelab_scaling.fit.fit import fit_points
    from homelab_scaling.fit.result import save_fit
    from homelab_scaling.report import study
    from homelab_scaling.runs import read_runs

    assert look(flying.lab).run.law.verdict == "not judged"
    points, excluded = read_runs(flying.ladder)
    save_fit(fit_points(points, excluded, source="x", n_bootstrap=60, laws=("chinchilla",)), flying.ladder / "fit")
    view, calls = View(find_place(flying.lab)), []
    check = study.check_runs
    monkeypatch.setattr(study, "check_runs", lambda *args: (calls.append(1), check(*args))[1])
    assert view.frame(NOW).run.law.verdict == "on the law"
    view.frame(NOW + 1)
    assert len(calls) == 1
    folder = flying.folder("51m")
    lines = codec.read_jsonl(folder.metrics)
    for line in lines:
        if line["kind"] == "val" and line["tokens"] > 1.5e8:
            line["loss"] *= 1.15
    codec.write_text(folder.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder.metrics, (NOW, NOW))
    frame = view.frame(NOW + 2)
    assert frame.run.law.verdict == "above the law"
    assert frame.run.law.off_frac > 0.1
    assert "above the law since" in words(frame, 160)
    (flying.ladder / "fit" / "fit.json").write_text("{}")
    assert view.frame(NOW + 3).run.law.verdict == "cannot be judged"


# ---------------------------------------------------------------------------------------------------------- anything


def test_thinning_keeps_the_mean_and_the_ends():
    log = RunLog()
    n = 10_000
    log.feed({"kind": "step", "update": u, "phase": "trunk", "tokens": 8 * (u + 1), "loss": float(u)} for u in range(n))
    curve = log.curve
    assert MAX_POINTS / 2 <= len(curve) <= MAX_POINTS
    assert curve[-1].update == n - 1
    sizes = [b.update - a.update for a, b in zip([replace(curve[0], update=-1), *curve[:-1]], curve, strict=True)]
    assert sum(p.loss * size for p, size in zip(curve, sizes, strict=True)) == pytest.approx(n * (n - 1) / 2)


GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'{"kind": "step"}\n',
    b"\xff\xfe\x00",
    b'{"rows": 3, "status": "running"}',
    b'{"t_s": "x"}\n',
]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(0, 10**9))
def test_whatever_is_missing_or_torn_there_is_a_frame(template, tmp_path_factory, seed):
    """Any subset of the files gone, emptied, cut anywhere or replaced by nonsense."""
    rng = random.Random(seed)
    root = tmp_path_factory.mktemp("torn")
    shutil.copytree(template.lab, root / "lab")
    files = sorted(p for p in (root / "lab").rglob("*") if p.is_file())
    share = rng.choice([0.1, 0.3, 0.8])
    for path in files:
        if rng.random() < share:
            match rng.randrange(3):
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])
                case 2:
                    path.write_bytes(rng.choice(GARBAGE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMELAB_MACHINE", str(root / "lab" / "machine"))
        try:
            place = find_place(root / "lab")
        except SpecError:
            return
        frame = View(place).frame(NOW)
    codec.dumps(frame)
    for width, height in ((80, 24), (140, 40)):
        lines = draw(frame, width, height)
        assert {line.cell_len for line in lines} == {width}
        assert len(lines) <= height
    shutil.rmtree(root)


def test_a_lab_whose_shards_are_being_built_is_waited_for(tmp_path):
    """The second terminal is often opened first."""
    (tmp_path / "mini" / "shards").mkdir(parents=True)
    assert find_place(tmp_path).ladder is None
    (tmp_path / "other").mkdir()
    (tmp_path / "mini" / "shards").rmdir()
    (tmp_path / "mini" / "notes.txt").touch()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(SpecError, match="no ladder in it"):
        find_place(tmp_path)
