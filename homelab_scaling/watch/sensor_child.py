"""The sensors' own process: `python -m homelab_scaling.watch.sensor_child`. Started by apart.SensorsApart.

A driver call can hang or crash; here it takes nothing with it. On stdin, one line with the time asks for one poll; on
stdout, one JSON line answers. The first line, unasked, is the facts. End of input is the end: no orphan is left.
"""

import json
import os
import signal
import sys
from typing import Protocol, TextIO

from homelab_scaling import codec
from homelab_scaling.watch.gpu import CardProcess, SensorSource, open_sensors

PROCESSES = "processes"
"""After the time: who holds memory is wanted too, which costs a driver milliseconds."""


class LiveSource(SensorSource, Protocol):
    """A source that also knows who uses the cards."""

    def processes(self) -> dict[str, tuple[CardProcess, ...]]: ...


def serve(source: LiveSource, asks: TextIO, answers: TextIO) -> None:
    """Answers until the asking ends."""

    def say(**fields: object) -> None:
        answers.write(json.dumps(fields, allow_nan=False) + "\n")
        answers.flush()

    facts = source.facts
    say(facts=codec.to_plain(facts), error=source.error)
    for ask in asks:
        now_s, _, wish = ask.strip().partition(" ")
        sample = source.poll(float(now_s))
        before, facts = facts, source.facts
        say(
            sample=codec.to_plain(sample),
            error=source.error,
            interval_s=source.interval_s,
            poll_p50_s=source.poll_p50_s,
            poll_p99_s=source.poll_p99_s,
            **({"facts": codec.to_plain(facts)} if facts != before else {}),
            **({"processes": codec.to_plain(source.processes())} if wish == PROCESSES else {}),
        )


def main(argv: list[str]) -> int:
    # Ctrl-C in a terminal reaches the whole group; the watchdog alone decides, and closes our input when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a driver library prints must not land among the answers
    source = open_sensors(float(argv[0]) if argv else 1.0)
    try:
        serve(source, sys.stdin, answers)
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more; closing the driver could hang
    source.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
