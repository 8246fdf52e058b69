"""Cards that say what a JSON file tells them to: a sensor source for tests, in this process or as a sensor child.

The file: {"cards": {uuid: {"temperature_c": 60.0, ...}}, "lost": [uuid], "hang_s": 9, "crash": true, "say": "text"}.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from homelab_scaling.watch.gpu import CardProcess
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.sensor_child import serve

A, B = "GPU-aaaa", "GPU-bbbb"


def tell(path: Path, **state: Any) -> None:
    """Changes what the cards say, at once for whoever reads the file."""
    before = json.loads(path.read_text()) if path.exists() else {"cards": {A: {"temperature_c": 50.0}}}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({**before, **state}))
    os.replace(temporary, path)


class FakeCards:
    """A `SensorSource` over the file."""

    source = "nvml"

    def __init__(self, path: Path, interval_s: float = 1.0) -> None:
        self.path, self.interval_s = path, interval_s
        self.poll_p50_s = self.poll_p99_s = 0.001
        self.error: str | None = self._state().get("error")
        self.closed = False
        uuids = [] if self.error else self._state()["cards"]
        self.facts = tuple(
            CardFacts(uuid=uuid, index=i, name="Fake 3090", vram_bytes=24 * 2**30, slowdown_c=90.0)
            for i, uuid in enumerate(uuids)
        )

    def _state(self) -> dict[str, Any]:
        return json.loads(self.path.read_text())

    def poll(self, now_s: float) -> Sample:
        state = self._state()
        time.sleep(state.get("hang_s", 0.0))
        if state.get("crash"):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()
        if "say" in state:
            print(state["say"], flush=True)
        cards = [
            CardReading(uuid=uuid, state="lost", error="GPU is lost")
            if uuid in state.get("lost", ())
            else CardReading(uuid=uuid, energy_from="counter" if "energy_j" in said else None, **said)
            for uuid, said in state["cards"].items()
            if uuid in {f.uuid for f in self.facts}
        ]
        return Sample(t_s=now_s, poll_s=0.001, cards=tuple(cards))

    def processes(self) -> dict[str, tuple[CardProcess, ...]]:
        holders = tuple(CardProcess(pid=pid, kind="compute", vram_bytes=2**30) for pid in self._state().get("pids", ()))
        return {fact.uuid: holders for fact in self.facts}

    def close(self) -> None:
        self.closed = True


def command(path: Path) -> tuple[str, ...]:
    """What to start as a sensor child."""
    return (sys.executable, str(Path(__file__).resolve()), str(path))


if __name__ == "__main__":
    serve(FakeCards(Path(sys.argv[1]), float(sys.argv[2])), sys.stdin, sys.stdout)
