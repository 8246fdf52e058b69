"""A recording played back: the cards as the policy saw them, the runs as far as they had come."""

import itertools

import pytest
from watched_lab import NOW, WatchedLab, iso

from homelab_scaling import codec
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.watch.feed import event_s
from homelab_scaling.watch.play import ReplayView, dated
from homelab_scaling.watch.view import View, find_place


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return WatchedLab.in_flight(tmp_path_factory.mktemp("play") / "lab", every=40)


@pytest.fixture
def recording(lab, monkeypatch):
    monkeypatch.setenv("HOMELAB_MACHINE", str(lab.lab / "machine"))
    return lab.lab / "machine" / "gpu.jsonl"


def test_its_end_is_what_the_live_screen_showed(lab, recording):
    live = View(find_place(lab.lab)).frame(NOW)
    view = ReplayView(recording)
    assert view.end_s == NOW
    played = view.frame(view.end_s, 60)
    for card, other in zip(played.cards, live.cards, strict=True):
        assert (card.level, card.duty, card.temperature_c) == (other.level, other.duty, other.temperature_c)
        assert card.power_w == pytest.approx(other.power_w)
        assert card.history == other.history
    said = [(m.t_s, m.text) for m in live.watchdog.moments if m.who != "watchdog"]
    assert [(pytest.approx(m.t_s, abs=0.01), m.text) for m in played.watchdog.moments] == said
    assert (played.run.rung, played.run.state) == (live.run.rung, live.run.state)
    assert played.run.update == live.run.update
    assert [r.state for r in played.rungs] == [r.state for r in live.rungs]
    assert played.watchdog.state == "recording"
    assert "x60, over" in played.replay
    assert played.ahead == live.ahead


def test_time_goes_forward(lab, recording):
    view = ReplayView(recording)
    frames = [view.frame(view.start_s + s) for s in range(0, 720, 20)]
    assert all(a.run.update <= b.run.update for a, b in itertools.pairwise(frames))
    assert frames[0].run.update < frames[-1].run.update
    assert frames[0].cards[1].level == "ok" and frames[-1].cards[1].level == "slow"
    assert frames[0].run.state == "running" and frames[-1].run.state == "slowed"
    assert all("over" not in frame.replay for frame in frames)
    free = [frame for frame in frames if frame.run.state == "running"]
    assert len(free) > 2
    passed = free[0].run.left_s.mid - free[-1].run.left_s.mid
    assert passed == pytest.approx(free[-1].t_s - free[0].t_s, rel=0.5)
    assert frames[-1].run.left_s.mid > free[-1].run.left_s.mid - 600 * 0.9, "slowed by a tenth, it takes longer"


def test_long_before_the_recording_runs_had_other_states(lab, recording):
    view = ReplayView(recording)
    spec = lab.spec("24m")
    events = codec.read_jsonl(lab.folder("24m").events)
    began, ended = (next(e for e in events if e["kind"] == kind)["time"] for kind in ("segment", "end"))
    middle = (event_s({"time": began}) + event_s({"time": ended})) / 2
    frame = view.frame(middle)
    by_rung = {r.rung: r for r in frame.rungs}
    assert by_rung["12m"].state == "finished"
    assert by_rung["51m"].state == by_rung["124m"].state == "queued"
    assert frame.run.run_id == spec.run_id
    assert frame.run.state == "running"
    assert frame.run.done_frac == pytest.approx(0.5, abs=0.03)
    assert by_rung["24m"].n_rows == 0
    assert frame.cards == ()
    assert {r.rung: r.state for r in view.frame(event_s({"time": ended})).rungs}["24m"] == "finished"


def test_lines_get_the_time_of_their_interval():
    events = [
        (100.0, {"kind": "segment", "update": 0}),
        (150.0, {"kind": "end"}),
        (200.0, {"kind": "segment", "update": 20}),
    ]
    lines = [
        *({"kind": "step", "update": u} for u in range(10)), {"kind": "rate", "update": 10, "interval_s": 10.0},
        *({"kind": "step", "update": u} for u in range(10, 20)), {"kind": "rate", "update": 20, "interval_s": 15.0},
        {"kind": "val", "update": 20},
        {"kind": "step", "update": 20}, {"kind": "rate", "update": 21, "interval_s": 1.0}, {"kind": "rate"},
    ]  # fmt: skip
    found = dated(lines, events)
    assert len(found) == len(lines) - 1
    times = [t for t, _ in found]
    assert times[:11] == [120.0] * 11, "stretched to the segment's end: 25 s of training in 50 s"
    assert times[11:23] == [150.0] * 12
    assert times[23:] == [201.0, 201.0]


def test_a_resumed_run_is_stopped_in_between(lab, recording, tmp_path):
    other = WatchedLab(tmp_path / "lab", every=40)
    other.machine(minutes=1)
    spec, folder = other.spec("5m"), other.folder("5m")
    began = other.run("5m", ends_s=NOW, done=0.5, status="running")
    middle = (began + NOW) / 2
    update = codec.read_jsonl(folder.metrics)[-1]["update"] // 2
    first, *_ = codec.read_jsonl(folder.events)
    events = [
        first,
        {"kind": "end", "time": iso(middle - 20), "status": "stopped", "reason": "SIGTERM"},
        {"kind": "segment", "time": iso(middle), "update": update, "step": update, "pids": []},
    ]
    codec.write_text(folder.events, "")
    codec.append_jsonl(folder.events, events)
    view = ReplayView(other.lab / "machine" / "gpu.jsonl")
    states = [view.frame(t).run.state for t in (middle - 60, middle - 10, middle + 1, NOW)]
    assert states == ["running", "stopped", "starting", "running"]
    assert view.frame(NOW).run.run_id == spec.run_id


def test_a_recording_alone_shows_the_cards(recording, tmp_path):
    path = tmp_path / "machine" / "gpu.jsonl"
    path.parent.mkdir()
    path.write_bytes(recording.read_bytes())
    frame = ReplayView(path).frame(NOW)
    assert frame.run is None and frame.ladder is None
    assert len(frame.cards) == 2


def test_what_is_no_recording_is_one_sentence(tmp_path):
    with pytest.raises(SpecError, match="no such recording"):
        ReplayView(tmp_path / "gpu.jsonl")
    path = tmp_path / "gpu.jsonl"
    path.write_text('{"n": 1}\nnot json\n')
    with pytest.raises(DataError, match="no sample in it"):
        ReplayView(path)
