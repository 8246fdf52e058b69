"""gpu.jsonl: what was sampled comes back, bounded in size, torn or rotated, at any speed."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.watch.gpu import SensorSource
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.recording import Recording, Replay, read_recording

FACTS = (CardFacts(uuid="GPU-a", index=0, name="card", vram_bytes=16, slowdown_c=90.0, missing={"fan_frac": "none"}),)


def sample(t_s: float, temperature_c: float = 60.0, **more: object) -> Sample:
    reading = CardReading(uuid="GPU-a", temperature_c=temperature_c, reasons=("power cap",), **more)  # type: ignore[arg-type]
    return Sample(t_s=t_s, poll_s=0.0004, cards=(reading,))


def record(path: Path, samples: list[Sample], **options: int) -> None:
    recording = Recording(path, **options)
    for one in samples:
        recording.append(one, FACTS)
    recording.close()


def test_what_was_sampled_comes_back(tmp_path: Path) -> None:
    lost = Sample(t_s=3.5, poll_s=0.0, cards=(CardReading(uuid="GPU-a", state="lost", error="GPU is lost"),))
    told = [sample(1.5, energy_j=12.25, energy_from="counter", vram_used_bytes=7), sample(2.5, 61.0), lost]
    record(tmp_path / "gpu.jsonl", told)
    assert list(read_recording(tmp_path / "gpu.jsonl")) == [(FACTS, one) for one in told]
    assert list(read_recording(tmp_path / "gpu.jsonl", since_s=2.0)) == [(FACTS, one) for one in told[1:]]
    assert list(read_recording(tmp_path / "none.jsonl")) == []


def test_a_line_is_short_and_plain_json_of_a_sample(tmp_path: Path) -> None:
    record(tmp_path / "gpu.jsonl", [sample(1795332220.98750234, power_w=287.123456)])
    facts, line = (tmp_path / "gpu.jsonl").read_text().splitlines()
    assert "facts" in json.loads(facts)
    assert json.loads(line) == {
        "t_s": 1795332220.988,
        "poll_s": 0.0004,
        "cards": [{"uuid": "GPU-a", "temperature_c": 60.0, "power_w": 287.12, "reasons": ["power cap"]}],
    }
    assert codec.from_plain(json.loads(line), Sample, "line").card("GPU-a") is not None


def test_reasons_none_and_no_reason_at_all_stay_apart(tmp_path: Path) -> None:
    quiet, silent = CardReading(uuid="GPU-a", reasons=()), CardReading(uuid="GPU-a", reasons=None)
    record(tmp_path / "gpu.jsonl", [Sample(t_s=1.0, poll_s=0.0, cards=(quiet, silent))])
    ((_, back),) = read_recording(tmp_path / "gpu.jsonl")
    assert [c.reasons for c in back.cards] == [(), None]


@settings(derandomize=True, deadline=None, max_examples=25)
@given(n=st.integers(1, 120), max_bytes=st.integers(600, 4000), keep=st.integers(0, 3))
def test_the_size_is_bounded_and_the_newest_samples_stay(
    tmp_path_factory: pytest.TempPathFactory, n: int, max_bytes: int, keep: int
) -> None:
    path = tmp_path_factory.mktemp("machine") / "gpu.jsonl"
    record(path, [sample(float(t)) for t in range(n)], max_bytes=max_bytes, keep=keep)
    files = list(path.parent.iterdir())
    assert len(files) <= keep + 1
    assert all(file.stat().st_size <= max_bytes for file in files)
    back = list(read_recording(path))
    assert [s.t_s for _, s in back] == [float(t) for t in range(n - len(back), n)]
    assert all(facts == FACTS for facts, _ in back)
    assert len(back) == n or sum(file.stat().st_size for file in files) > keep * max_bytes / 2


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    record(path, [sample(1.0), sample(2.0)])
    with open(path, "ab") as file:
        file.write(b'{"t_s":3.0,"poll_s":0.0,"car')
    assert [s.t_s for _, s in read_recording(path)] == [1.0, 2.0]
    record(path, [sample(4.0)])
    assert [s.t_s for _, s in read_recording(path)] == [1.0, 2.0, 4.0]
    with open(path, "ab") as file:
        file.write(b'[]\n7\n{"t_s":"x"}\n\xff\n{"t_s":5.0,"poll_s":0.0,"cards":[{"uuid":"GPU-a","colour":1}]}\n')
    assert [s.t_s for _, s in read_recording(path)] == [1.0, 2.0, 4.0]


def test_a_disk_that_was_full_for_a_while_costs_those_samples(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    recording = Recording(path)
    recording.append(sample(1.0), FACTS)
    real = recording._file

    class Full:
        tell, close = real.tell, real.close

        def write(self, text: bytes) -> int:
            return real.write(text[:20])  # what a file system does with its last block

    recording._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        recording.append(sample(2.0), FACTS)
    recording._file = real
    recording.append(sample(3.0), FACTS)
    recording.close()
    assert [s.t_s for _, s in read_recording(path)] == [1.0, 3.0]


def test_new_facts_are_written_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    other = (*FACTS, CardFacts(uuid="GPU-b", index=1, name="other", vram_bytes=8))
    recording = Recording(path)
    for t_s, facts in ((1.0, FACTS), (2.0, FACTS), (3.0, other)):
        recording.append(sample(t_s), facts)
    recording.close()
    assert [facts for facts, _ in read_recording(path)] == [FACTS, FACTS, other]
    assert path.read_text().count("facts") == 2


# -------------------------------------------------------------------------------------------------------------- replay


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    record(tmp_path / "gpu.jsonl", [sample(500.0 + t, 50.0 + t) for t in range(100)], max_bytes=3000, keep=9)
    return tmp_path / "gpu.jsonl"


def test_a_replay_is_a_source_that_keeps_the_recorded_pace(path: Path) -> None:
    clock = Clock()
    source: SensorSource = (replay := Replay(path, clock=clock))
    assert (source.facts, source.error, source.source) == (FACTS, None, str(path))
    assert source.interval_s == 1.0
    seen = []
    for n in range(100):
        seen.append(source.poll(clock.now_s + n))
    assert [s.t_s for s in seen] == [clock.now_s + n for n in range(100)]
    assert [s.cards[0].temperature_c for s in seen] == [50.0 + n for n in range(100)]
    assert (source.poll_p50_s, source.poll_p99_s) == (0.0004, 0.0004)
    assert not replay.is_over(clock.now_s + 100)


@pytest.mark.parametrize("speed", [0.5, 7.0, 1000.0])
def test_a_faster_replay_shows_the_same_moments_sooner(path: Path, speed: float) -> None:
    clock = Clock()
    replay = Replay(path, speed, clock=clock)
    for n in range(20):
        wait_s = (n * 3 + 0.5) / speed
        seen = replay.poll(clock.now_s + wait_s)
        assert seen.cards[0].temperature_c == 50.0 + 3 * n
        assert seen.t_s == pytest.approx(clock.now_s + wait_s * speed, abs=1.0)
    assert replay.interval_s == max(1 / speed, 0.05)


def test_after_the_end_the_cards_say_so(path: Path) -> None:
    clock = Clock()
    replay = Replay(path, 10.0, clock=clock)
    polls = [replay.poll(clock.now_s + n) for n in range(14)]
    assert polls[9].cards[0].state == "ok"
    assert {s.cards[0].error for s in polls[11:]} == {"the recording is over"}
    assert {s.cards[0].state for s in polls[11:]} == {"error"}
    assert all(a.t_s < b.t_s for a, b in pairwise(polls))
    assert replay.is_over(clock.now_s + 13)


def test_a_gap_in_the_recording_stays_a_gap(tmp_path: Path) -> None:
    clock = Clock()
    record(tmp_path / "gpu.jsonl", [sample(t) for t in (0.0, 1.0, 2.0, 60.0, 61.0)])
    replay = Replay(tmp_path / "gpu.jsonl", clock=clock)
    assert [replay.poll(clock.now_s + t).t_s - clock.now_s for t in (0.0, 2.0, 30.0, 59.0, 60.5)] == [0, 2, 2, 2, 60]


def test_nothing_to_replay_and_a_silly_speed_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample in it"):
        Replay(tmp_path / "gpu.jsonl")
    with pytest.raises(SpecError, match="speed"):
        Replay(tmp_path / "gpu.jsonl", 0.0)
