"""A run and its watchdog's orders: slow, pause, resume, stop, and what happens when the watchdog falls silent."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from orders import CARD, HandWatchdog
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.box import detect_box
from homelab_scaling.errors import Stopped, StoppedByWatchdog
from homelab_scaling.specs import WatchLimits
from homelab_scaling.sweep import launch, local
from homelab_scaling.train import obey, orders
from homelab_scaling.train.hooks import Hooks


class At(Hooks):
    """Does something after each of some updates, for as long as there is something left to do."""

    def __init__(self, **actions) -> None:
        self.actions = {int(name.removeprefix("u")): act for name, act in actions.items()}

    def steps(self, lines, rate) -> None:
        for update in [u for u in self.actions if lines and lines[-1]["update"] >= u]:
            self.actions.pop(update)()


@pytest.fixture
def watchdog(tmp_path: Path, monkeypatch) -> HandWatchdog:
    """The machine's watchdog, whose word is law for the card that the run counts as its own."""
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "machine"))
    monkeypatch.setenv("HOMELAB_WATCH_CARDS", CARD)
    monkeypatch.setattr(orders, "READ_EVERY_S", 0.0)
    monkeypatch.setattr(obey, "DOZE_S", 0.01)
    monkeypatch.setattr(orders, "start_watchdog", lambda lab: None)
    monkeypatch.setattr(orders, "ensure_alive", lambda machine: "started another")
    return HandWatchdog(tmp_path / "machine")


def events_of(folder, *kinds: str) -> list[dict]:
    return [e for e in codec.read_jsonl(folder.events) if e["kind"] in kinds]


def after(seconds: float, act) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


def test_an_order_to_slow_stretches_steps_and_is_kept_out_of_every_rate(make_run, watchdog) -> None:
    spec, free = make_run(lab="free", horizons=(40,))
    train_here(spec, free)
    spec, folder = make_run(lab="slow", horizons=(40,))
    watchdog.order("slow", duty=0.5)
    began = time.monotonic()
    record = train_here(spec, folder)
    wall_s = time.monotonic() - began
    assert steps_of(folder) == steps_of(free), "pacing changes nothing that is trained"
    assert [e["duty"] for e in events_of(folder, "paced")] == [0.5]
    train_s = record.seconds_train
    # Half of the time: as much sleep as work, from the first exchange on.
    assert 0.6 * train_s < record.seconds_paced < 2.0 * train_s
    assert record.rows[0].seconds + record.seconds_paced <= wall_s + 0.1
    rates = [x for x in codec.read_jsonl(folder.metrics) if x["kind"] == "rate"]
    assert sum(x["interval_s"] for x in rates) == pytest.approx(train_s, rel=0.2)
    assert rates[-1]["slept_s"] == pytest.approx(record.seconds_paced, rel=0.3)


def test_a_pause_checkpoints_waits_and_resumes_with_nothing_lost(make_run, watchdog, monkeypatch) -> None:
    monkeypatch.setattr(obey, "FRESH_CHECKPOINT_S", 0.0)
    spec, whole = make_run(lab="whole")
    train_here(spec, whole)
    spec, folder = make_run(lab="paused", checkpoint_every_steps=None)
    seen = []

    def lift() -> None:
        seen.extend(p.name for p in folder.checkpoints.glob("u*"))
        watchdog.order("ok", duty=0.9)

    def pause() -> None:
        watchdog.order("pause")
        after(0.4, lift)

    began = time.monotonic()
    record = train_here(spec, folder, [At(u7=pause)])
    assert seen == ["u00000008"], "saved before it slept"
    paused, resumed = events_of(folder, "paused", "resumed")
    assert paused["update"] == resumed["update"] == 8 and paused["reason"] == "it is hot"
    assert 0.3 < resumed["paused_s"] < 2.0
    assert record.seconds_paused == pytest.approx(resumed["paused_s"], abs=0.1)
    assert sum(row.seconds_marginal for row in record.rows) + record.seconds_paused <= time.monotonic() - began + 0.1
    assert steps_of(folder) == steps_of(whole)
    assert max(x["interval_s"] for x in codec.read_jsonl(folder.metrics) if x["kind"] == "rate") < 0.3


def test_a_young_checkpoint_is_not_written_again_for_a_pause(make_run, watchdog) -> None:
    spec, folder = make_run(lab="paused", checkpoint_every_steps=None)
    seen = []

    def lift() -> None:
        seen.extend(folder.checkpoints.glob("u*"))
        watchdog.order("ok")

    def pause() -> None:
        watchdog.order("pause")
        after(0.2, lift)

    train_here(spec, folder, [At(u7=pause)])
    assert seen == [] and len(events_of(folder, "resumed")) == 1


@pytest.mark.parametrize("first", ["training", "paused"])
def test_a_stop_checkpoints_and_the_run_goes_on_later(make_run, watchdog, first: str) -> None:
    spec, whole = make_run(lab="whole")
    train_here(spec, whole)
    spec, folder = make_run(lab="stopped")

    def act() -> None:
        if first == "paused":
            watchdog.order("pause")
            after(0.2, lambda: watchdog.order("stop", reason="96 C is the card's limit"))
        else:
            watchdog.order("stop", reason="96 C is the card's limit")

    with pytest.raises(StoppedByWatchdog, match="96 C is the card's limit") as stopped:
        train_here(spec, folder, [At(u7=act)])
    assert stopped.value.exit_code == 3
    record = folder.read_record()
    assert (record.status, record.stopped_by) == ("stopped", "watchdog") and "96 C" in record.reason
    assert [p.name for p in folder.checkpoints.glob("u*")] == ["u00000008"]
    assert not list(watchdog.machine.runs.glob("*")), "its registration is gone"
    watchdog.order("ok")
    assert train_here(spec, folder).status == "finished"
    assert steps_of(folder) == steps_of(whole)


def test_a_signal_ends_a_pause(make_run, watchdog) -> None:
    spec, folder = make_run()

    def pause() -> None:
        watchdog.order("pause")
        after(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM))

    began = time.monotonic()
    with pytest.raises(Stopped, match="SIGTERM at step 8"):
        train_here(spec, folder, [At(u7=pause)])
    assert time.monotonic() - began < 10
    assert folder.read_record().stopped_by == "signal"
    assert [p.name for p in folder.checkpoints.glob("u*")] == ["u00000008"]


def test_orders_for_other_cards_and_of_an_earlier_watchdog_are_not_ours(make_run, watchdog, monkeypatch) -> None:
    monkeypatch.setenv("HOMELAB_WATCH_CARDS", "GPU-another")
    watchdog.order("stop")
    spec, folder = make_run(lab="other", horizons=(20,))
    assert train_here(spec, folder).status == "finished"
    monkeypatch.setenv("HOMELAB_WATCH_CARDS", CARD)
    watchdog.started_s = time.time()
    watchdog.status()
    watchdog.order("stop", t_s=watchdog.started_s - 5)
    spec, folder = make_run(lab="old", horizons=(20,))
    assert train_here(spec, folder).status == "finished"
    assert events_of(folder, "paced", "paused") == []


def test_it_registers_itself_with_its_limits(make_run, watchdog, monkeypatch) -> None:
    from dataclasses import replace

    monkeypatch.setenv("HOMELAB_WATCH_CARDS", "all")
    spec, folder = make_run(horizons=(20,))
    spec = replace(spec, watch=WatchLimits(hang_kill_s=7.0))
    seen = []
    train_here(spec, folder, [At(u7=lambda: seen.extend(watchdog.machine.registrations()))])
    (one,) = seen
    assert (one.run_id, one.pids, one.cards) == (spec.run_id, (os.getpid(),), (CARD,)), "`all` became what there is"
    assert one.limits.hang_kill_s == 7.0 and Path(one.folder) == folder.path and not one.foreign
    assert watchdog.machine.registrations() == []


def test_a_silent_watchdog_is_replaced_and_the_run_goes_on(make_run, watchdog, monkeypatch, capsys) -> None:
    calls = []
    monkeypatch.setattr(orders, "ensure_alive", lambda machine: calls.append(machine.path) or "started another")
    spec, folder = make_run()
    silent = At(u7=lambda: watchdog.status(t_s=time.time() - 60), u19=watchdog.status)
    assert train_here(spec, folder, [silent]).status == "finished"
    assert calls == [watchdog.machine.path], "once, not at every look"
    assert [e["state"] for e in events_of(folder, "watchdog")] == ["silent", "heard again"]
    assert capsys.readouterr().err.count("the watchdog is silent: started another; training goes on") == 1


def test_orders_outlive_their_watchdog_but_a_pause_does_not_last_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(orders, "ensure_alive", lambda machine: None)
    monkeypatch.setattr(orders, "READ_EVERY_S", 0.0)
    watchdog = HandWatchdog(tmp_path)
    now = [time.time()]
    one = orders.Registration(run_id="r", folder="", pids=(1,), cards=(CARD,), started_s=0.0)
    said: list[str] = []
    with orders.Orders(watchdog.machine, one, event=lambda kind, **f: said.append(f["state"]), now=lambda: now[0]) as o:
        watchdog.status(t_s=now[0])
        watchdog.order("pause", duty=0.4, t_s=now[0])
        assert o.read().level == "pause"
        now[0] += 100
        assert o.read().level == "pause" and said == ["silent"]
        now[0] += orders.ORPHANED_S
        assert (o.read().level, o.read().duty) == ("slow", 0.4)
        watchdog.status(t_s=now[0])
        assert o.read().level == "pause", "heard again: its word counts"
    assert not list(watchdog.machine.runs.iterdir())


def test_an_unwatched_run_reads_no_orders_and_says_why(make_run, watchdog, monkeypatch) -> None:
    from dataclasses import replace

    watchdog.order("stop")
    spec, folder = make_run(lab="off", horizons=(20,))
    spec = replace(spec, watch=WatchLimits(enabled=False))
    assert train_here(spec, folder).status == "finished"
    assert events_of(folder, "watchdog")[0]["why"] == "watch.enabled is false"
    monkeypatch.delenv("HOMELAB_MACHINE")
    monkeypatch.delenv("HOMELAB_WATCH_CARDS")
    spec, folder = make_run(lab="cpu", horizons=(20,))
    record = train_here(spec, folder)
    assert "no card to watch" in events_of(folder, "watchdog")[0]["why"]
    assert "no card to watch" in record.unknown["kwh"] and record.rows[0].kwh is None


def test_looks_are_about_two_seconds_apart_and_never_further_than_a_log_interval(monkeypatch) -> None:
    import torch

    from homelab_scaling.train.checkpoint import Clock
    from homelab_scaling.train.ranks import Ranks
    from homelab_scaling.train.stop import StopWish
    from homelab_scaling.train.timing import Timing

    def next_look(step_s: float) -> int:
        one = obey.Obey(
            ranks=Ranks(1),
            orders=None,
            stop=StopWish(),
            timing=Timing(Clock(), 0.0),
            device=torch.device("cpu"),
            is_main=True,
            log_every_steps=50,
            checkpoint_every_s=1e9,
            event=lambda *a, **k: None,
        )
        one.note_step(step_s)
        one.look(100)
        return next(u for u in range(101, 200) if one.due(u)) - 100

    assert [next_look(s) for s in (0.001, 0.1, 0.5, 1.9, 60.0)] == [50, 20, 4, 1, 1]


RECIPE = Path(__file__).resolve().parents[1] / "support" / "quick_to_obey.py"


@pytest.mark.slow
def test_two_ranks_obey_at_the_same_step_and_the_ladder_ends_with_3(tmp_path: Path, watchdog, monkeypatch) -> None:
    manifest = write_shards(tmp_path / "shards")
    horizons = (200, 400)
    spec, alone = make_toy_run(tmp_path, manifest, lab="one", horizons=horizons)
    watchdog.order("ok")
    train_here(spec, alone)
    spec, folder = make_toy_run(
        tmp_path, manifest, lab="two", horizons=horizons, n_processes=2, microbatch_seqs_per_rank=4
    )
    command = launch.launch_command
    monkeypatch.setattr(
        launch, "launch_command", lambda *a: [str(RECIPE) if x.endswith("pretrain.py") else x for x in command(*a)]
    )
    watchdog.order("slow", duty=0.5)
    script = [("pause", 20), ("ok", 20), ("stop", 60)]

    def play() -> None:
        for level, update in script:
            while len(steps_of(folder)) <= update:
                time.sleep(0.02)
            if level == "ok":
                while not events_of(folder, "paused"):
                    time.sleep(0.02)
                time.sleep(0.5)
            watchdog.order(level, duty=0.9)

    player = threading.Thread(target=play, daemon=True)
    player.start()
    outcome = local.run_all([(spec, folder)], detect_box(), print)
    player.join(timeout=60)
    assert outcome.exit_code == 3 and "it is hot" in outcome.watchdog and outcome.finished == ()
    record = folder.read_record()
    assert (record.status, record.stopped_by) == ("stopped", "watchdog") and record.seconds_paused > 0.4
    assert [e["duty"] for e in events_of(folder, "paced")][:2] == [0.5, 0.9]
    (segment,) = events_of(folder, "segment")
    assert len(segment["pids"]) == 2 and len(events_of(folder, "paused")) == 1
    watchdog.order("ok")
    assert local.run_all([(spec, folder)], detect_box(), print).exit_code == 0
    one, two = steps_of(alone), steps_of(folder)
    assert [x["update"] for x in two] == [x["update"] for x in one]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
