"""Stopped, killed or torn, an evaluation goes on, asks nothing twice, and ends with the score of one that was not."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from asked import Noted, about, sitting

from homelab_scaling import codec
from homelab_scaling.errors import DataError, MachineError, SpecError, Stopped
from homelab_scaling.evals import sitting as module
from homelab_scaling.evals.results import Score
from homelab_scaling.evals.store import Line, Store, file_name, stores
from homelab_scaling.specs import Money
from homelab_scaling.watch.energy import Lap

N = 50


@pytest.fixture
def task(tmp_path: Path) -> Noted:
    return Noted(n=N, notes=tmp_path / "notes.jsonl")


def stop_after(n_checks: int):  # type: ignore[no-untyped-def]
    checks = iter(range(10**6))
    return lambda: "stopped by SIGINT" if next(checks) >= n_checks else None


def without_price(score: Score) -> Score:
    return replace(score, seconds=0.0)


@pytest.mark.parametrize("kind", ["share", "mean", "bits per byte"])
def test_stopped_anywhere_it_goes_on_and_asks_nothing_twice(tmp_path: Path, task: Noted, kind: str) -> None:
    task = replace(task, kind=kind)
    whole = sitting(tmp_path / "whole").evaluate(replace(task, notes=tmp_path / "other.jsonl"))
    for n_checks in (0, 1, 1):
        with pytest.raises(Stopped, match=r"stopped by SIGINT in noted, \d+ of 50 documents left; the same command"):
            sitting(tmp_path / "m", stopped=stop_after(n_checks)).evaluate(task)
    assert not list((tmp_path / "m").glob("noted.json")), "half a task has no score"
    score = sitting(tmp_path / "m").evaluate(task)
    assert sorted(task.asked()) == sorted(f"d{i}" for i in range(N)), "every document once"
    assert without_price(score) == without_price(whole)
    assert codec.read_json(tmp_path / "m" / "noted.json", Score) == score
    again = sitting(tmp_path / "m").evaluate(task)
    assert len(task.asked()) == N and again == score, "a finished one is read, price and all"


KILLED = """
import sys
from pathlib import Path
from asked import Noted, sitting
import os, signal

class Deadly(Noted):
    def ask(self, model, documents):
        answers = super().ask(model, documents)
        if len(self.asked()) > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return answers

folder = Path(sys.argv[1])
sitting(folder / "m").evaluate(Deadly(n=50, notes=folder / "notes.jsonl"))
"""


def test_killed_it_loses_only_the_piece_in_flight(tmp_path: Path, task: Noted) -> None:
    support = str(Path(__file__).resolve().parents[1] / "support")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], check=False, env={**os.environ, "PYTHONPATH": support}
    )
    assert killed.returncode == -signal.SIGKILL
    kept = {line.doc_id for line in next(iter(Store(tmp_path / "m").lines().values())).values()}
    asked = task.asked()
    lost = set(asked) - kept
    assert kept and lost
    score = sitting(tmp_path / "m").evaluate(task)
    twice = {doc for doc in task.asked() if task.asked().count(doc) > 1}
    assert twice == lost, "only what had not come back was asked again"
    assert score.whole.n_documents == N


def test_a_torn_line_is_asked_again_and_the_file_stays_whole(tmp_path: Path, task: Noted) -> None:
    sitting(tmp_path / "m").evaluate(task)
    samples = tmp_path / "m" / "samples.jsonl"
    written = samples.read_bytes()
    samples.write_bytes(written[:-7])
    with Store(tmp_path / "m").lock():
        sitting(tmp_path / "m").evaluate(task)
    assert task.asked().count(f"d{N - 1}") == 2 and len(task.asked()) == N + 1
    assert len(codec.read_jsonl(samples)) == N and samples.read_bytes().endswith(b"\n")
    samples.write_bytes(b'{"half": ')
    with Store(tmp_path / "m").lock():
        assert samples.read_bytes() == b"", "a file of nothing but a torn line"


def test_a_damaged_line_is_named(tmp_path: Path, task: Noted) -> None:
    sitting(tmp_path / "m").evaluate(task)
    samples = tmp_path / "m" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes() + b'{"task": "noted"}\n')
    with pytest.raises(DataError, match=r"samples.jsonl: .*this key is missing.*remove that line"):
        sitting(tmp_path / "m").evaluate(task)


@pytest.mark.parametrize(
    "other",
    [
        {"settings": {"shots": 5}},
        {"settings": {"shots": 0, "limit": 10}},
        {"metric": "acc_norm"},
        {"name": "another"},
    ],
)
def test_other_settings_are_asked_anew(tmp_path: Path, task: Noted, other: dict[str, object]) -> None:
    sitting(tmp_path / "m").evaluate(task)
    sitting(tmp_path / "m").evaluate(replace(task, **other))  # type: ignore[arg-type]
    assert len(task.asked()) == 2 * N
    sitting(tmp_path / "m").evaluate(task)
    assert len(task.asked()) == 2 * N, "the first ones are still there"


@pytest.mark.parametrize(
    "facts", [{"weights": "w1"}, {"tokenizer": "t1"}, {"context_tokens": 32}, {"dtype": "bfloat16"}]
)
def test_another_model_is_asked_anew(tmp_path: Path, task: Noted, facts: dict[str, object]) -> None:
    sitting(tmp_path / "m").evaluate(task)
    sitting(tmp_path / "m", facts=about(**facts)).evaluate(task)
    assert len(task.asked()) == 2 * N


def test_a_model_trained_anew_loses_its_old_scores(tmp_path: Path, task: Noted) -> None:
    store = Store(tmp_path / "m")
    store.open_for(about())
    sitting(tmp_path / "m").evaluate(task)
    store.open_for(about())
    assert [score.task for score in store.scores()] == ["noted"]
    store.open_for(about(weights="w1"))
    assert store.scores() == []
    with pytest.raises(SpecError, match=r"holds the scores of /models/m, not of /elsewhere; give another --out"):
        store.open_for(about(source="/elsewhere"))
    assert [found.folder.name for found in stores(tmp_path)] == ["m"] and stores(tmp_path / "none") == []


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    message = r"m: another evaluation is writing here; wait for it"
    with Store(tmp_path / "m").lock(), pytest.raises(MachineError, match=message), Store(tmp_path / "m").lock():
        pass


def test_pieces_grow_with_the_speed_of_the_model(tmp_path: Path, task: Noted) -> None:
    ticks = [0.0]

    class Slow(Noted):
        def ask(self, model, documents):  # type: ignore[no-untyped-def]
            ticks[0] += 1.5 * len(documents)
            return super().ask(model, documents)

    slow = Slow(n=30, notes=task.notes)
    sitting(tmp_path / "m", clock=lambda: ticks[0]).evaluate(slow)
    sizes = [line.count("d") for line in task.notes.read_text().splitlines()]
    assert sizes == [module.FIRST_PIECE, *[3] * 7, 1], "3 documents take 4.5 s, 4 would take 6"


@pytest.mark.parametrize("n", [0, 2])
def test_documents_must_be_there_and_have_names_of_their_own(tmp_path: Path, task: Noted, n: int) -> None:
    class Twins(Noted):
        def documents(self):  # type: ignore[no-untyped-def]
            return [document for document in super().documents()[:1] for _ in range(n)]

    with pytest.raises(DataError, match="has no documents" if n == 0 else "two documents are called 'd0'"):
        sitting(tmp_path / "m").evaluate(Twins(n=3, notes=task.notes))


def test_an_answer_that_is_no_number_is_not_stored(tmp_path: Path, task: Noted) -> None:
    broken = replace(task, kind="mean", answers=lambda i: float("nan") if i == 3 else 1.0)
    with pytest.raises(DataError, match=r"answer to document d3 is no finite number"):
        sitting(tmp_path / "m").evaluate(broken)
    assert not (tmp_path / "m" / "samples.jsonl").exists()


def test_other_metrics_of_the_same_answers_have_their_own_parts(tmp_path: Path, task: Noted) -> None:
    class Two(Noted):
        def ask(self, model, documents):  # type: ignore[no-untyped-def]
            answers = super().ask(model, documents)
            return [replace(a, also={"acc": float(i % 2), "nats": 2.0 + i}) for i, a in enumerate(answers)]

    score = sitting(tmp_path / "m").evaluate(Two(n=8, notes=task.notes))
    acc, nats = score.also["acc"], score.also["nats"]
    assert (acc.score, acc.n_documents) == (0.5, 8) and acc.low is not None and acc.low > 0.2, "Wilson's"
    assert nats.score == 5.5 and nats.se == pytest.approx(8**-0.5 * 6**0.5)


# --------------------------------------------------------------------------------------------------------------- price


class Ammeter:
    """100 W, as a counter says; blind for a share of the time."""

    source = "counter"

    def __init__(self, now: list[float], blind_frac: float = 0.0) -> None:
        self.now, self.blind_frac, self.last = now, blind_frac, now[0]

    def lap(self) -> Lap:
        seconds, self.last = self.now[0] - self.last, self.now[0]
        seen = seconds * (1 - self.blind_frac)
        return Lap(joules=100 * seen, seconds=seconds, unseen_s=seconds - seen)


class Timed(Noted):
    """Takes 36 s a document."""

    def ask(self, model, documents):  # type: ignore[no-untyped-def]
        model[0] += 36.0 * len(documents)
        return super().ask(model, documents)


def priced(
    folder: Path, *, money: Money, meter: type | None = None, blind_frac: float = 0.0, sittings: int = 1
) -> Score:
    folder.mkdir(exist_ok=True)
    task = Timed(n=100, notes=folder / "notes.jsonl")
    for number in range(sittings):
        now = [1000.0 * number]
        one = replace(
            sitting(folder / "m", money=money, clock=lambda now=now: now[0]),
            model=now,
            meter=meter(now, blind_frac) if meter else None,
            stopped=stop_after(3) if number < sittings - 1 else lambda: None,
        )
        if number < sittings - 1:
            with pytest.raises(Stopped):
                one.evaluate(task)
        else:
            score = one.evaluate(task)
    return score


@pytest.mark.parametrize("sittings", [1, 3])
def test_energy_of_the_counter_is_billed_over_all_sittings(tmp_path: Path, sittings: int) -> None:
    money = Money(usd_per_kwh=0.5, usd_per_machine_hour=2.0)
    score = priced(tmp_path, money=money, meter=Ammeter, sittings=sittings)
    assert score.seconds == pytest.approx(3600) and score.n_tokens == 500
    assert score.kwh == pytest.approx(0.1) and score.kwh_from == "counter"
    at_the_plug = 0.110 + 0.1 / 0.92
    assert score.usd == pytest.approx(2.0 + 0.5 * at_the_plug) and score.unknown == {}


def test_what_no_sensor_saw_is_filled_in_at_the_mean_and_too_little_is_unknown(tmp_path: Path) -> None:
    assert priced(tmp_path / "a", money=Money(), meter=Ammeter, blind_frac=0.25).kwh == pytest.approx(0.1)
    blind = priced(tmp_path / "b", money=Money(), meter=Ammeter, blind_frac=0.75)
    assert blind.kwh is None and blind.unknown["kwh"].startswith("less than 50% of the time was metered; --watts")


def test_stated_watts_are_labelled_and_without_them_energy_is_unknown(tmp_path: Path) -> None:
    stated = priced(tmp_path / "a", money=Money(watts=200, usd_per_kwh=0.5))
    assert (stated.kwh, stated.kwh_from) == (pytest.approx(0.2), "stated watts") and stated.usd == pytest.approx(0.1)
    unknown = priced(tmp_path / "b", money=Money(usd_per_kwh=0.5))
    assert unknown.kwh is None and unknown.usd is None and unknown.kwh_from is None
    assert unknown.unknown == {
        "kwh": "asked on a CPU, which no sensor meters; --watts gives an estimate",
        "usd": "the energy is unknown, and machine time has no price",
    }
    nothing = priced(tmp_path / "c", money=Money())
    assert nothing.unknown["usd"] == "neither the run's [money] nor --usd-per-kwh and --usd-per-hour give a price"


def test_lines_are_short_and_come_back_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    lines = [
        Line(task="t", key="k", doc_id="a", value=1.0, n_tokens=3, seconds=0.5),
        Line(
            task="t", key="k", doc_id="b", value=0.0, weight=7.0, n_tokens=3, seconds=0.5, also={"acc": 1.0}, joules=2.0
        ),
    ]
    store.append(lines)
    first, second = codec.read_jsonl(store.samples)
    assert set(first) == {"task", "key", "doc_id", "value", "n_tokens", "seconds"} and second["also"] == {"acc": 1.0}
    assert list(store.lines()["t", "k"].values()) == lines


@pytest.mark.parametrize(
    ("task", "file"), [("bpb", "bpb"), ("my.jsonl", "my.jsonl"), ("a/b c", "a-b-c"), ("../x", "x")]
)
def test_a_task_s_file_stays_in_its_folder(task: str, file: str) -> None:
    assert file_name(task) == file
