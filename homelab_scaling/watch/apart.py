"""Sensors in a process of their own: a driver call that hangs or crashes is an `error` reading, never the end of us."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.watch.gpu import CardProcess
from homelab_scaling.watch.meter import EnergyMeter
from homelab_scaling.watch.processes import name_of
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.sensor_child import PROCESSES

SILENT_POLLS, SILENT_S = 5, 2.0
"""A child that owes an answer for longer than so many polls, and so many seconds, is killed and replaced."""
START_S = 30.0
"""What a driver may take to wake up; without persistence mode that is seconds."""
FIRST_S = 5.0
"""How long the very first poll is held up for the facts."""
BACK_OFF_S = (1.0, 60.0)
"""Pause before the first restart, doubled up to the second number."""
GOOD_POLLS = 20
"""After so many answers the back-off starts anew."""
LOOK_AGAIN_S = (300.0, 10.0)
"""Without a driver or a card: how often to look whether there is one now; the second where there was one before."""
LONGEST_RESTART_S = 60.0
"""Between two children power is taken to have run straight for at most this long."""
MOST_STUCK = 3
"""Children that not even SIGKILL ends (they wait inside the driver) before no more are started."""

COMMAND = (sys.executable, "-m", "homelab_scaling.watch.sensor_child")


class Gone(Exception):
    """The child ended or said something that is no answer."""


class SensorsApart:
    """A source of samples (`gpu.SensorSource`) that never blocks for longer than one poll interval.

    Args:
        interval_s: how often `poll` will be called.
        command: what to start, with the interval as its last argument; it speaks the protocol of sensor_child.
        back_off_s: first and longest pause before a restart.
        start_s: how long a new child may take to say what cards there are.
    """

    def __init__(
        self,
        *,
        interval_s: float = 1.0,
        command: Sequence[str] = COMMAND,
        back_off_s: tuple[float, float] = BACK_OFF_S,
        start_s: float = START_S,
    ) -> None:
        self.source = "nvml"
        self.interval_s = interval_s
        """As the driver's speed advises."""
        self.poll_p50_s = self.poll_p99_s = 0.0
        self.tell: Callable[[str, str], None] = lambda _kind, _reason: None
        """Told what happens to the child."""
        self._command, self._back_off, self._start_s = (*command, f"{interval_s:g}"), back_off_s, start_s
        self.every_s = interval_s
        """How often `poll` is called now: it holds the caller up for no longer."""
        self._pause_s = back_off_s[0]
        self._known: dict[str, CardFacts] = {}
        self._listed: frozenset[str] = frozenset()
        self._energy: dict[str, _Energy] = {}
        self._child: _Child | None = None
        self._stuck: list[_Child] = []
        self._why: str | None = "the sensors have not answered yet"
        self._driver_error: str | None = None
        self._restart_at = 0.0
        self._n_good = 0
        self._wants_processes = True
        self._start()
        self._wait_for_facts(min(start_s, FIRST_S))

    @property
    def facts(self) -> tuple[CardFacts, ...]:
        """Every card that was ever listed."""
        return tuple(self._known.values())

    @property
    def child_pid(self) -> int | None:
        """The sensors' process; None while there is none."""
        return self._child.pid if self._child is not None else None

    @property
    def error(self) -> str | None:
        """Why there are no readings now."""
        return self._why or self._driver_error

    def poll(self, now_s: float) -> Sample:
        """The answer, if it comes within an interval; else readings in state `error` that say why."""
        begun = time.monotonic()
        try:
            sample = self._ask(now_s, begun)
        except Gone as gone:
            self._give_up(str(gone))
            sample = None
        spent = time.monotonic() - begun
        if sample is None:
            return self._blank(now_s, spent)
        self._why = None
        self._n_good += 1
        if self._n_good == GOOD_POLLS:
            self._pause_s = self._back_off[0]
        return self._completed(replace(sample, t_s=now_s))

    def ask_processes(self) -> None:
        """With the next sample `tell` hears who holds memory on which card."""
        self._wants_processes = True

    def close(self) -> None:
        """Ends the child, which ends by itself when its input does; killed if it does not."""
        if self._child is not None:
            self._child.close(0.5)
            self._child = None

    # ----------------------------------------------------------------------------------------------- the child

    def _start(self) -> None:
        self._stuck = [child for child in self._stuck if not child.ended()]
        if len(self._stuck) >= MOST_STUCK:
            raise Gone(f"{len(self._stuck)} sensor processes hang inside the driver; the machine wants a reboot")
        self._child = _Child(self._command)
        self._n_good = 0

    def _wait_for_facts(self, timeout_s: float) -> None:
        assert self._child is not None
        try:
            answer = self._child.answer(timeout_s)
            if answer is not None:
                self._take_facts(answer)
        except Gone as gone:
            self._give_up(str(gone))

    def _ask(self, now_s: float, begun: float) -> Sample | None:
        """One sample, or None if there is none in time. The deadline covers whatever the child owes."""
        if self._child is None:
            if begun < self._restart_at:
                return None
            self._start()
            self.tell("sensors", f"started again after: {self._why}")
        child = self._child
        assert child is not None
        if not child.has_facts:
            answer = child.answer(self.every_s)
            if answer is None:
                self._why = f"the driver has not answered for {time.monotonic() - child.started:.1f} s"
                if begun - child.started > self._start_s:
                    raise Gone(f"the driver did not answer within {self._start_s:.0f} s")
                return None
            self._take_facts(answer)
        if not child.has_cards and begun - child.started > LOOK_AGAIN_S[bool(self._known)]:
            child.close(0.5)
            self._start()
            return None
        child.ask(f"{now_s!r} {PROCESSES}" if self._wants_processes else repr(now_s))
        answer = child.answer(max(0.02, self.every_s - (time.monotonic() - begun)))
        if answer is None:
            silent = time.monotonic() - child.asked
            if silent > max(SILENT_S, SILENT_POLLS * self.every_s):
                raise Gone(f"a driver call has hung for {silent:.1f} s")
            self._why = f"the driver has not answered for {silent:.1f} s"
            return None
        return self._take_sample(answer)

    def _give_up(self, why: str) -> None:
        """Ends the child and sets the time of the next try."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            if not child.ended():
                self._stuck.append(child)
            self.tell("sensors", f"{why}; trying again in {self._pause_s:g} s")
        self._why = why
        self._restart_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._back_off[1])

    # ------------------------------------------------------------------------------------------- what it said

    def _take_facts(self, answer: dict[str, object]) -> None:
        try:
            facts = codec.from_plain(answer["facts"], tuple[CardFacts, ...], "facts")
        except (KeyError, HomelabError) as error:
            raise Gone(f"the sensors said something that is not facts ({error})") from None
        if self._child is not None:
            self._child.has_facts, self._child.has_cards = True, bool(facts)
        self._driver_error = str(answer["error"]) if answer.get("error") else None
        self._known.update({one.uuid: one for one in facts})
        if self._driver_error is None or facts:
            self._listed = frozenset(one.uuid for one in facts)

    def _take_sample(self, answer: dict[str, object]) -> Sample:
        try:
            sample = codec.from_plain(answer["sample"], Sample, "sample")
            self.interval_s, self.poll_p50_s, self.poll_p99_s = (
                codec.from_plain(answer[key], float, key) for key in ("interval_s", "poll_p50_s", "poll_p99_s")
            )
        except (KeyError, HomelabError) as error:
            raise Gone(f"the sensors said something that is not a sample ({error})") from None
        self._driver_error = str(answer["error"]) if answer.get("error") else None
        if "facts" in answer:
            self._take_facts(answer)
        if PROCESSES in answer:
            self._wants_processes = False
            self._tell_processes(answer[PROCESSES])
        return sample

    def _tell_processes(self, said: object) -> None:
        try:
            found = codec.from_plain(said, dict[str, tuple[CardProcess, ...]], PROCESSES)
        except HomelabError as error:
            raise Gone(f"the sensors said something that is not a list of processes ({error})") from None
        for uuid, holders in found.items():
            listed = ", ".join(f"{name_of(one.pid)} {one.pid} ({_gib(one.vram_bytes)})" for one in holders)
            self.tell(PROCESSES, f"{uuid}: {listed or 'nobody'}")

    def _blank(self, now_s: float, spent: float) -> Sample:
        cards = tuple(CardReading(uuid=uuid, state="error", error=self._why) for uuid in self._known)
        return Sample(t_s=now_s, poll_s=spent, cards=cards)

    def _completed(self, sample: Sample) -> Sample:
        """With energy that goes on over restarts of the child, and with the cards that it no longer finds."""
        cards = [self._metered(card, sample.t_s) for card in sample.cards]
        for uuid in self._known:
            if sample.card(uuid) is not None:
                continue
            if self._driver_error is not None and uuid in self._listed:
                cards.append(CardReading(uuid=uuid, state="error", error=self._driver_error))
            else:
                cards.append(CardReading(uuid=uuid, state="lost", error="the driver no longer lists this card"))
        return replace(sample, cards=tuple(cards))

    def _metered(self, card: CardReading, now_s: float) -> CardReading:
        return self._energy.setdefault(card.uuid, _Energy()).carried_on(card, now_s)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


class _Energy:
    """One card's joules, whose count starts anew with each child, as one that goes on."""

    def __init__(self) -> None:
        self._meter = EnergyMeter()
        self._gaps_s = self._gap_s = 0.0

    def carried_on(self, card: CardReading, now_s: float) -> CardReading:
        self._meter.add(now_s, counter_j=card.energy_j, power_w=card.power_w, longest_gap_s=LONGEST_RESTART_S)
        if card.energy_j is None:
            return card
        gap_s = card.energy_gap_s or 0.0
        if gap_s < self._gap_s:  # of a new child
            self._gaps_s += self._gap_s
        self._gap_s = gap_s
        return replace(card, energy_j=self._meter.total_j, energy_gap_s=self._gaps_s + gap_s + self._meter.gap_s)


class _Child:
    """The process and its two pipes."""

    def __init__(self, command: Sequence[str]) -> None:
        self.started = time.monotonic()
        self.asked = self.started
        self.has_facts = self.has_cards = False
        self._owes = False
        self._text = b""
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def ask(self, line: str) -> None:
        """Asks for a sample, unless one is owed."""
        if self._owes:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
        except OSError:
            raise Gone(self._how_it_ended()) from None
        self._owes, self.asked = True, time.monotonic()

    def answer(self, timeout_s: float) -> dict[str, object] | None:
        """The next line, or None if there is none in time."""
        deadline = time.monotonic() + timeout_s
        assert self._process.stdout is not None
        while b"\n" not in self._text:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, left))
            if not ready:
                return None
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise Gone(self._how_it_ended())
            self._text += piece
        line, _, self._text = self._text.partition(b"\n")
        self._owes = False
        try:
            answer = json.loads(line)
        except ValueError:
            raise Gone(f"the sensors said {line[:60]!r}") from None
        if not isinstance(answer, dict):
            raise Gone(f"the sensors said {line[:60]!r}")
        return answer

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the sensors' process closed its output"
        if code < 0:
            return f"the sensors' process died of {signal.Signals(-code).name} (a crash of the driver library)"
        return f"the sensors' process ended with exit code {code}"

    def close(self, patience_s: float) -> None:
        """Ends its input, then itself."""
        for pipe in self._pipes():
            pipe.close()
        try:
            self._process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL; one that waits inside the kernel ends when the driver lets go of it."""
        for pipe in self._pipes():
            pipe.close()
        self._process.kill()
        try:
            self._process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            self._process.returncode = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        return self._process.poll() is not None

    def _pipes(self) -> Iterator[IO[bytes]]:
        yield from (p for p in (self._process.stdin, self._process.stdout) if p is not None)
