"""A foreign training loop's rows, energy and curves, in the files that fit, report and monitor read."""

import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import codec
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.runs import RunFolder, read_rows, read_runs, write_runs_csv
from homelab_scaling.specs import Money
from homelab_scaling.watch import link, recorder
from homelab_scaling.watch.link import MachineFolder, Status
from homelab_scaling.watch.readings import CardFacts, CardReading
from homelab_scaling.watch.recorder import Recorder

A = "GPU-aaaa"


@pytest.fixture(autouse=True)
def _no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No watchdog unless a test plays one."""
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "machine"))
    monkeypatch.delenv(link.CARDS_VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(recorder, "_has_card", lambda: False)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(lab: Path, run_id: str = "mine", **more: Any) -> Recorder:
    return Recorder(run_id, lab=lab, n_params=1000, data_id="text", **more)


def test_the_example_in_the_docstring_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorder.__doc__ is not None
    block = [line for line in recorder.__doc__.splitlines() if line.startswith("    ")]
    assert len(block) <= 10
    monkeypatch.chdir(tmp_path)

    class Tokens:
        size = 512

    given = {"batches": [(Tokens, Tokens)] * 3, "train_one_step": lambda x, y: 2.5, "validate": lambda: 2.25}
    exec(textwrap.dedent("\n".join(block)), given)
    (point,), excluded = read_runs(tmp_path / "lab" / "mine")
    assert (point.n_params, point.n_tokens, point.loss_nats) == (124_000_000, 3 * 512, 2.25)
    assert excluded == []


def test_curves_are_in_the_project_s_format(lab: Path) -> None:
    clock = Clock()
    with make(lab, clock=clock) as run:
        for step in range(4):
            clock.now += 2.0
            run.step(tokens=100, loss=3.0 - step, lr=1e-3)
        run.validation(2.0)
    lines = codec.read_jsonl(RunFolder(lab / "runs" / "mine").metrics)
    steps = [ln for ln in lines if ln["kind"] == "step"]
    assert [(ln["update"], ln["tokens"], ln["loss"]) for ln in steps] == [
        (0, 100, 3.0),
        (1, 200, 2.0),
        (2, 300, 1.0),
        (3, 400, 0.0),
    ]
    first, second = (ln for ln in lines if ln["kind"] == "rate")
    assert (first["interval_tokens"], first["interval_s"], first["tokens_per_s"]) == (300, 6.0, 50.0)
    assert (second["interval_tokens"], second["interval_s"]) == (100, 2.0)
    (val,) = [ln for ln in lines if ln["kind"] == "val"]
    assert (val["tokens"], val["loss"], val["set"]) == (400, 2.0, "curve")


def test_losses_stay_on_the_device_until_they_are_written(lab: Path) -> None:
    fetched = []

    class Loss:
        def detach(self) -> "Loss":
            return self

        def __float__(self) -> float:
            fetched.append(1)
            return 1.5

    clock = Clock()
    with make(lab, clock=clock) as run:
        for _ in range(3):
            run.step(tokens=1, loss=Loss())
        assert fetched == []
        clock.now += 60
        run.step(tokens=1, loss=Loss())
        assert len(fetched) == 4


def test_a_loss_that_is_not_finite_is_null(lab: Path) -> None:
    with make(lab) as run:
        run.step(tokens=1, loss=float("nan"))
    (step, *_) = codec.read_jsonl(RunFolder(lab / "runs" / "mine").metrics)
    assert step["loss"] is None


def test_rows_and_their_bill(lab: Path) -> None:
    clock = Clock()
    with make(lab, clock=clock, money=Money(usd_per_machine_hour=3.6), about={"n_body": 800, "lr_peak": 1e-3}) as run:
        for n_tokens, loss in ((400, 3.0), (800, 2.5)):
            clock.now += 100.0
            run.step(tokens=400, loss=loss)
            run.row(n_tokens=n_tokens, loss=loss, loss_se=0.01)
    rows, excluded = read_rows(lab)
    assert excluded == []
    assert [(r.row_id, r.flops, r.seconds, r.seconds_marginal) for r in rows] == [
        ("mine@400", 6000.0 * 400, 100.0, 100.0),
        ("mine@800", 6000.0 * 800, 200.0, 100.0),
    ]
    assert [r.usd for r in rows] == pytest.approx([0.1, 0.2])
    assert [r.usd_marginal for r in rows] == pytest.approx([0.1, 0.1])
    assert (rows[0].n_body, rows[0].n_head, rows[0].lr_peak) == (800, None, 1e-3)
    assert rows[1].tokens_per_s == pytest.approx(4.0)
    record = RunFolder(lab / "runs" / "mine").read_record()
    assert record is not None
    assert record.status == "finished"
    assert record.unknown["n_head"] == "a foreign trainer did not say"
    assert record.unknown["kwh"] == "there is no card to measure"
    assert "mine@800" in write_runs_csv(lab).read_text()


def test_how_it_ended_is_recorded(lab: Path) -> None:
    def ended(error: BaseException) -> Any:
        with pytest.raises(type(error)), make(lab, "ends") as run:
            run.step(tokens=1, loss=1.0)
            raise error
        return RunFolder(lab / "runs" / "ends").read_record()

    assert (ended(ValueError("out of data")).status, ended(ValueError("out of data")).reason) == (
        "failed",
        "ValueError: out of data",
    )
    assert ended(KeyboardInterrupt()).status == "stopped"


def test_a_run_goes_on_from_where_it_is_told(lab: Path) -> None:
    clock = Clock()
    with pytest.raises(KeyboardInterrupt), make(lab, clock=clock) as run:
        for _ in range(6):
            clock.now += 10
            run.step(tokens=100, loss=1.0)
            if run.tokens == 300:
                run.row(n_tokens=300, loss=1.0)
        raise KeyboardInterrupt
    with make(lab, clock=clock, start_tokens=400) as run:
        assert (run.tokens, run.steps) == (400, 4)
        clock.now += 10
        run.step(tokens=100, loss=0.5)
        run.row(n_tokens=500, loss=0.5)
    lines = codec.read_jsonl(RunFolder(lab / "runs" / "mine").metrics)
    assert [ln["tokens"] for ln in lines if ln["kind"] == "step"] == [100, 200, 300, 400, 500]
    rows, _ = read_rows(lab)
    assert [(r.n_tokens, r.seconds, r.seconds_marginal) for r in rows] == [(300, 30.0, 30.0), (500, 50.0, 20.0)]


def test_a_finished_run_is_not_recorded_over(lab: Path) -> None:
    with make(lab) as run:
        run.step(tokens=1, loss=1.0)
    with pytest.raises(SpecError, match="finished; give another run_id"), make(lab):
        pass


def test_two_processes_do_not_record_one_run(lab: Path) -> None:
    with make(lab), pytest.raises(MachineError, match="another process"), make(lab):
        pass


def test_a_column_that_is_none_is_named(lab: Path) -> None:
    with pytest.raises(SpecError, match="no such column 'n_boddy'"):
        make(lab, about={"n_boddy": 3})


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineFolder]:
    """A watchdog whose one card draws 200 W."""
    monkeypatch.setattr(recorder, "_has_card", lambda: True)
    machine, over, started = MachineFolder(tmp_path / "machine"), threading.Event(), time.time()

    def write() -> None:
        now = time.time()
        reading = CardReading(uuid=A, power_w=200.0, energy_j=200.0 * (now - started), energy_from="counter")
        facts = (CardFacts(uuid=A, index=0, name="Fake 3090", vram_bytes=1),)
        codec.write_json(
            machine.status,
            Status(
                pid=os.getpid(),
                started_s=started,
                t_s=now,
                interval_s=1.0,
                poll_p50_s=0.0,
                poll_p99_s=0.0,
                facts=facts,
                readings=(reading,),
            ),
            durable=False,
        )

    def go_on() -> None:
        while not over.wait(0.1):
            write()

    write()
    thread = threading.Thread(target=go_on)
    thread.start()
    yield machine
    over.set()
    thread.join()


def test_energy_comes_from_the_watchdog(lab: Path, watched: MachineFolder) -> None:
    with make(lab, money=Money(usd_per_kwh=0.5)) as run:
        (registered,) = watched.registrations()
        assert (registered.pids, registered.cards, registered.foreign) == ((os.getpid(),), (A,), True)
        for _ in range(4):
            time.sleep(0.5)
            run.step(tokens=10, loss=1.0)
            run.flush()
        row = run.row(n_tokens=40, loss=1.0)
    assert watched.registrations() == []
    assert row.kwh is not None
    assert row.seconds is not None
    assert row.kwh * 3.6e6 == pytest.approx(200.0 * row.seconds, rel=0.1)
    assert row.kwh_from == "counter"
    assert row.kwh_wall is not None
    assert row.usd == pytest.approx(0.5 * row.kwh_wall)
    record = RunFolder(lab / "runs" / "mine").read_record()
    assert record is not None
    assert record.machine.device == "Fake 3090"
    assert "kwh" not in record.unknown
    rates = [ln for ln in codec.read_jsonl(RunFolder(lab / "runs" / "mine").metrics) if ln["kind"] == "rate"]
    assert all(ln["power_w"] == pytest.approx(200.0, rel=0.2) for ln in rates)


@pytest.mark.slow
def test_fit_report_and_monitor_read_it(homelab: Callable[..., Any], tmp_path: Path) -> None:
    lab = tmp_path / "lab" / "mine"
    for n_params in (1_000_000, 2_000_000, 4_000_000, 8_000_000):
        with Recorder(f"m{n_params // 10**6}", lab=lab, n_params=n_params, data_id="text") as run:
            for n_tokens in (10**7, 4 * 10**7, 16 * 10**7):
                run.step(tokens=n_tokens - run.tokens, loss=3.0)
                run.row(n_tokens=n_tokens, loss=1.7 + 400 / n_params**0.34 + 400 / n_tokens**0.28, loss_se=0.002)
    fitted = homelab("fit", lab, "--bootstrap", "20")
    assert fitted.code == 0, fitted.err
    assert homelab("report", lab).code == 0
    seen = homelab("monitor", tmp_path / "lab", "--once")
    assert seen.code == 0, seen.err
    assert "m8" in seen.out
