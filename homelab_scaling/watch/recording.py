"""gpu.jsonl: every sample the watchdog took, bounded in size, and played back as if it were live.

A file begins with a line of facts (`{"facts": [...]}`); a line per sample follows, without what is unknown or usual.
Full files move to gpu.1.jsonl, gpu.2.jsonl ... and the oldest goes. A line that a killed writer left torn is skipped.
"""

import errno
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from homelab_scaling import codec
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.watch.meter import PollTimes, percentile
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample

MIB = 1024**2
MAX_BYTES, KEEP = 32 * MIB, 4
"""Two cards at 1 Hz write about 60 MB a day: five files of 32 MiB hold more than a run of 48 hours."""
DIGITS = {"t_s": 3, "poll_s": 6, "power_w": 2, "energy_j": 2, "energy_gap_s": 2}
FASTEST_REPLAY_S = 0.05
"""A replay asks to be polled at most this often; above 20x, samples are passed over."""


class Recording:
    """Appends samples to a rotated file of bounded size; safe to reopen after a kill."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, keep: int = KEEP) -> None:
        """
        Args:
            path: the newest file; older ones are numbered beside it.
            max_bytes: size at which a file is full.
            keep: how many full ones stay: at most (keep + 1) * max_bytes and a line are on disk.
        """
        self.path, self.max_bytes, self.keep = path, max_bytes, keep
        self._facts: tuple[CardFacts, ...] | None = None
        self._torn = False
        """The last write failed, perhaps in the middle of a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._open()

    def append(self, sample: Sample, facts: tuple[CardFacts, ...]) -> None:
        """Writes one sample; `facts` only where they changed or a file begins.

        Raises:
            OSError: the disk is full or gone; the next append may work again.
        """
        text = b""
        if facts != self._facts or self._file.tell() == 0:
            text = _line({"facts": codec.to_plain(facts)})
        text += _line(_compact(sample))
        if self._file.tell() and self._file.tell() + len(text) > self.max_bytes:
            self._rotate()
            text = _line({"facts": codec.to_plain(facts)}) + _line(_compact(sample))
        if self._torn:
            text = b"\n" + text
        self._torn = True
        if self._file.write(text) < len(text):  # a disk that fills up takes a part without a word
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._torn, self._facts = False, facts

    def close(self) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (kept open: one write per sample)
        self._torn = file.tell() > 0 and not _ends_in_newline(self.path)  # by a writer that was killed
        return file

    def _rotate(self) -> None:
        self._file.close()
        files = [self.path, *(_numbered(self.path, n) for n in range(1, self.keep + 1))]
        for older, newer in pairwise(reversed(files)):
            if newer.exists():
                os.replace(newer, older)
        self.path.unlink(missing_ok=True)  # still there only if none are kept
        self._file = self._open()


def _numbered(path: Path, n: int) -> Path:
    return path.with_name(f"{path.stem}.{n}{path.suffix}")


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _line(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode() + b"\n"


_USUAL = {f.name: f.default for f in fields(CardReading) if f.default is not MISSING}


def _compact(sample: Sample) -> dict[str, Any]:
    """A sample as plain data without defaults, rounded to what sensors know."""
    cards = [
        {n: _short(n, value) for n, value in vars(card).items() if n not in _USUAL or value != _USUAL[n]}
        for card in sample.cards
    ]
    return {"t_s": round(sample.t_s, 3), "poll_s": round(sample.poll_s, 6), "cards": cards}


def _short(name: str, value: Any) -> Any:
    if not isinstance(value, float):
        return value
    value = round(value, DIGITS.get(name, 4))
    return int(value) if value.is_integer() else value


# ------------------------------------------------------------------------------------------------------------- reading


def read_recording(path: Path, *, since_s: float = 0.0) -> Iterator[tuple[tuple[CardFacts, ...], Sample]]:
    """Facts and sample, oldest first, over all files of a recording; torn and foreign lines are passed over.

    Args:
        path: the newest file, or a single one.
        since_s: Unix time before which samples are passed over without being looked at closely.
    """
    facts: tuple[CardFacts, ...] = ()
    for file in reversed(_files(path)):
        for line in _lines(file):
            try:
                plain = json.loads(line)
                if "facts" in plain:
                    facts = codec.from_plain(plain["facts"], tuple[CardFacts, ...], file.name)
                elif plain["t_s"] >= since_s:
                    yield facts, codec.from_plain(plain, Sample, file.name)
            except (ValueError, TypeError, KeyError, SpecError):
                continue


@dataclass(frozen=True, kw_only=True)
class Hottest:
    """The highest temperature read of a card."""

    uuid: str
    name: str
    index: int | None
    """NVML's order; None where the facts of the card are gone."""
    temperature_c: float
    t_s: float
    """When; Unix time."""


def hottest(path: Path, spans: Sequence[tuple[float, float]]) -> tuple[Hottest, ...]:
    """Every card's hottest reading within these stretches of Unix time, the hottest card first.

    A card without a reading there is not in it. Lines are looked at as plain data: days of them take seconds.
    """
    known: dict[str, dict[str, Any]] = {}
    found: dict[str, tuple[float, float]] = {}
    for file in reversed(_files(path)):
        for line in _lines(file):
            try:
                plain = json.loads(line)
                if "facts" in plain:
                    known |= {str(card["uuid"]): card for card in plain["facts"]}
                    continue
                t_s = float(plain["t_s"])
                if not any(low <= t_s <= high for low, high in spans):
                    continue
                for card in plain["cards"]:
                    celsius, uuid = card.get("temperature_c"), str(card["uuid"])
                    if celsius is not None and (uuid not in found or celsius > found[uuid][0]):
                        found[uuid] = (float(celsius), t_s)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
    cards = [
        Hottest(
            uuid=uuid,
            name=str(known.get(uuid, {}).get("name", "a card")),
            index=known.get(uuid, {}).get("index"),
            temperature_c=celsius,
            t_s=t_s,
        )
        for uuid, (celsius, t_s) in found.items()
    ]
    return tuple(sorted(cards, key=lambda card: -card.temperature_c))


def _files(path: Path) -> list[Path]:
    """The newest file and the numbered ones, newest first."""
    found = [path] if path.exists() else []
    n = 1
    while _numbered(path, n).exists():
        found.append(_numbered(path, n))
        n += 1
    return found


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError:  # rotated away under the reader
        return


class Replay:
    """A recording as a source of samples: `poll` gives what was read at that moment of the recording.

    Samples are stamped with the time at which the replay began plus their place in the recording, so durations in
    them are the recorded ones at any speed (a policy judges as it would have); above speed 1 the stamps therefore run
    ahead of the clock. After the end every card is in state `error`.
    """

    def __init__(self, path: Path, speed: float = 1.0, *, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            path: a recording's newest file.
            speed: recorded seconds per second of the clock.
            clock: where the beginning is taken from; `poll` is told the time.

        Raises:
            DataError: the file holds no sample.
            SpecError: the speed is not positive.
        """
        if not speed > 0:
            raise SpecError(f"replay speed {speed:g}, wants a positive number")
        self._entries = read_recording(path)
        first = next(self._entries, None)
        if first is None:
            raise DataError(f"{path}: no sample in it; give a gpu.jsonl that a watchdog wrote")
        self.source, self.error = str(path), None
        self._speed, self._started_s = speed, clock()
        self._facts, self._sample = first
        self._first_s = self._sample.t_s
        self._next = next(self._entries, None)
        self._gaps = deque([self._next[1].t_s - self._first_s if self._next else 1.0], maxlen=60)
        self._times = PollTimes(1.0)

    @property
    def interval_s(self) -> float:
        """At which no sample is passed over, but not below 50 ms."""
        return max(self._recorded_interval_s / self._speed, FASTEST_REPLAY_S)

    @property
    def facts(self) -> tuple[CardFacts, ...]:
        """As they were at this place of the recording."""
        return self._facts

    @property
    def poll_p50_s(self) -> float:
        return self._times.p50_s

    @property
    def poll_p99_s(self) -> float:
        return self._times.p99_s

    def is_over(self, now_s: float) -> bool:
        """All was played, and the next sample is overdue."""
        place_s = self._first_s + (now_s - self._started_s) * self._speed
        return self._next is None and place_s > self._sample.t_s + 2 * self._recorded_interval_s

    def poll(self, now_s: float) -> Sample:
        """The newest sample of that moment."""
        place_s = self._first_s + (now_s - self._started_s) * self._speed
        while self._next is not None and self._next[1].t_s <= place_s:
            self._gaps.append(self._next[1].t_s - self._sample.t_s)
            self._facts, self._sample = self._next
            self._times.add(self._sample.t_s, self._sample.poll_s)
            self._next = next(self._entries, None)
        sample, shift_s = self._sample, self._started_s - self._first_s
        if self.is_over(now_s):
            over = tuple(CardReading(uuid=c.uuid, state="error", error="the recording is over") for c in sample.cards)
            return Sample(t_s=place_s + shift_s, poll_s=0.0, cards=over)
        return replace(sample, t_s=sample.t_s + shift_s)

    def close(self) -> None:
        """Nothing to let go of."""

    @property
    def _recorded_interval_s(self) -> float:
        return percentile(list(self._gaps), 0.5)
