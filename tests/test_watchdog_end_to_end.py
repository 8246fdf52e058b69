"""The whole chain through the real pynvml: a stand-in driver, the watchdog's processes, and a training that obeys.

The driver is a small C library with the names of libnvidia-ml.so.1 (tests/support/nvml_stub); the training is a toy on
the CPU that counts the stand-in's cards as its own. The policy's durations are scaled down to seconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from nvml_stub.nvml_stub import StubDriver
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.specs import WatchLimits
from homelab_scaling.watch.link import MachineFolder

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pretrain.py"
SECONDS = WatchLimits(
    interval_s=0.2,
    slow_after_s=1,
    move_every_s=2,
    resume_after_s=1,
    recover_after_s=2,
    min_hold_s=1,
    alarm_after_s=1,
    hang_kill_s=3,
)
PATIENCE_S = 60.0


class Story:
    """A toy run under a stand-in driver, told step by step."""

    def __init__(self, root: Path, horizons=(3000,)):
        manifest = write_shards(root / "shards")
        spec, self.folder = make_toy_run(
            root, manifest, horizons=horizons, log_every_steps=10, checkpoint_every_steps=500, curve_every_tokens=None
        )
        self.spec = replace(spec, watch=SECONDS)
        codec.write_json(self.folder.spec, self.spec)
        plain, plain_folder = make_toy_run(
            root,
            manifest,
            lab="plain",
            horizons=horizons,
            log_every_steps=10,
            checkpoint_every_steps=500,
            curve_every_tokens=None,
        )
        self.plain = (plain, plain_folder)
        self.machine = MachineFolder(root / "machine")
        self.driver = StubDriver(root / "driver", cards=1)
        self.process: subprocess.Popen | None = None
        self.output = root / "output.txt"

    def launch(self) -> None:
        extra = {"HOMELAB_MACHINE": str(self.machine.path), "HOMELAB_WATCH_CARDS": "all", "OMP_NUM_THREADS": "1"}
        with open(self.output, "a") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(RECIPE), "--spec", str(self.folder.spec)],
                env=self.driver.env(**extra),
                stdout=output,
                stderr=output,
            )

    def events(self, kind: str) -> list[dict]:
        return [e for e in codec.read_jsonl(self.folder.events) if e["kind"] == kind]

    def until(self, what: str, holds) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            died = self.process is not None and self.process.poll() is not None
            assert time.monotonic() < deadline, f"{what}: not in {PATIENCE_S:.0f} s\n{self.told()}"
            assert not died or holds(), f"{what}: the training ended first ({self.process.poll()})\n{self.told()}"
            time.sleep(0.1)

    def told(self) -> str:
        parts = [self.output, self.machine.log, self.machine.events, self.folder.events]
        return "\n".join(f"== {p.name}\n{p.read_text()[-3000:]}" for p in parts if p.exists())

    def heat(self, below_slowdown_c: float) -> None:
        """Warms or cools the card as fast as a real one could: 20 C a second."""
        target = self.slowdown_c - below_slowdown_c
        while (now := self.driver.get(0, "temperature_c")) != target:
            step = max(-20, min(20, target - now))
            self.driver.set(0, temperature_c=int(now + step))
            time.sleep(1.0 if abs(step) == 20 else 0.0)

    @property
    def slowdown_c(self) -> float:
        status = self.machine.read_status()
        assert status is not None and status.facts[0].slowdown_c is not None
        return status.facts[0].slowdown_c

    def level(self) -> str | None:
        status = self.machine.read_status()
        return next((card.level for card in status.cards.values()), None) if status else None

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        status = self.machine.read_status()
        if status is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(status.pid, signal.SIGTERM)
        self.driver.close()


@pytest.fixture
def story(tmp_path):
    one = Story(tmp_path)
    try:
        yield one
    finally:
        one.end()


def test_heat_slows_pauses_resumes_stops_and_costs_nothing_but_time(story):
    story.launch()
    story.until("the watchdog sees the run", lambda: bool(story.machine.registrations()) and story.level() == "ok")
    story.until("training has begun", lambda: len(steps_of(story.folder)) > 20)
    story.heat(7)
    story.until("slowed", lambda: bool(story.events("paced")))
    assert story.events("paced")[0]["duty"] == pytest.approx(0.9)
    story.heat(2)
    story.until("paused", lambda: bool(story.events("paused")))
    assert "C below slowdown" in story.events("paused")[0]["reason"]
    done = len(steps_of(story.folder))
    time.sleep(1.5)
    assert len(steps_of(story.folder)) == done, "a paused run trains nothing"
    story.heat(40)
    story.until("resumed", lambda: bool(story.events("resumed")))
    story.until("trains again", lambda: len(steps_of(story.folder)) > done)
    story.heat(-1)
    assert story.process.wait(PATIENCE_S) == 3, story.told()
    record = story.folder.read_record()
    assert record.status == "stopped"
    assert "stopped by the watchdog" in record.reason and "slowdown limit" in record.reason
    assert record.seconds_paused > 0
    assert not story.machine.registrations()
    before_stop = len(steps_of(story.folder))

    story.heat(40)
    deadline = time.monotonic() + PATIENCE_S
    while story.level() != "ok" and time.monotonic() < deadline:
        time.sleep(0.1)
    story.launch()
    assert story.process.wait(4 * PATIENCE_S) == 0, story.told()
    finished = story.folder.read_record()
    assert finished.status == "finished"
    kwh = finished.rows[-1].kwh
    assert kwh is not None and kwh > 0
    assert finished.rows[-1].kwh_from == "counter"
    plain = train_here(*story.plain)
    assert finished.rows[-1].loss_nats == plain.rows[-1].loss_nats, "slowed, paused, stopped: the same loss bit for bit"
    assert steps_of(story.folder)[:before_stop] == steps_of(story.plain[1])[:before_stop]


def test_a_driver_that_hangs_or_crashes_does_not_touch_the_training(story):
    story.launch()
    story.until("training has begun", lambda: len(steps_of(story.folder)) > 20 and story.level() == "ok")
    story.driver.hang(0)
    story.until(
        "the hang is seen",
        lambda: next(iter(story.machine.read_status().cards.values())).health in ("stale", "unknown"),
    )
    done = len(steps_of(story.folder))
    story.until("training goes on meanwhile", lambda: len(steps_of(story.folder)) > done)
    story.driver.release(0)
    story.until("seen again", lambda: next(iter(story.machine.read_status().cards.values())).health == "ok")
    story.driver.crash(0)
    story.until(
        "sensors restarted after the crash",
        lambda: "crash" in story.machine.events.read_text() or "died" in story.machine.events.read_text(),
    )
    story.until("seen again", lambda: next(iter(story.machine.read_status().cards.values())).health == "ok")
    assert not story.events("paused")
    assert story.process.poll() is None


def test_a_lost_card_ends_a_hung_run_and_names_its_checkpoint(story):
    story.launch()
    story.until("a checkpoint is there", lambda: any(story.folder.checkpoints.glob("u[0-9]*/checkpoint.json")))
    story.until("watched", lambda: story.level() == "ok" and bool(story.machine.registrations()))
    os.kill(story.process.pid, signal.SIGSTOP)  # as a rank that waits for a card that will not answer
    story.driver.lose(0)
    story.process.wait(PATIENCE_S)
    ended = story.machine.read_ended(story.spec.run_id)
    assert ended is not None, story.told()
    assert "lost" in ended.reason
    # It wakes to the order to end, and may write a newer checkpoint in place of the one that is named.
    named = Path(ended.last_checkpoint)
    assert named.parent == story.folder.checkpoints.resolve()
    assert max(p.name for p in story.folder.checkpoints.glob("u[0-9]*")) >= named.name


def test_a_killed_watchdog_is_replaced_and_the_run_goes_on(story):
    story.launch()
    story.until("watched", lambda: story.level() == "ok" and len(steps_of(story.folder)) > 20)
    first = story.machine.read_status().pid
    os.kill(first, signal.SIGKILL)
    story.until("another one", lambda: story.machine.read_status().pid != first)
    done = len(steps_of(story.folder))
    story.until("training goes on", lambda: len(steps_of(story.folder)) > done)
    assert "watchdog" in {e["kind"] for e in codec.read_jsonl(story.folder.events)}
