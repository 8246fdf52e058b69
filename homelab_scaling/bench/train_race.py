"""The race behind `homelab bench train`: contestants in processes of their own, taking turns."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homelab_scaling.bench.train_job import Job
from homelab_scaling.errors import MachineError

TITLES = {
    "ours": "ours",
    "hf": "plain GPT2LMHeadModel loop",
    "hf-trainer": "transformers.Trainer",
    "nanogpt": "nanoGPT's model, compiled",
}
N_PART_STEPS = 5
N_FIRST_STEPS = 3
"""Before the race: compilation, optimizer states, and the allocator's first pages."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What one contestant's turns took, round by round."""

    about: str
    n_steps: int
    """Of one turn; the same for everybody."""
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    peak_bytes: int
    head_loss_frac: float | None


class Racer:
    """A contestant's process."""

    def __init__(self, name: str, path: Path, n_threads: int) -> None:
        self.name, self.about = name, ""
        self.errors = path.with_suffix(".err").open("w+", encoding="utf-8")
        # Everybody's threads spin at barriers as long as those of `homelab run`: longer is a little faster on an idle
        # box and several times slower beside any other work.
        chosen = {"GOMP_SPINCOUNT": "10000"} if "OMP_WAIT_POLICY" not in os.environ else {}
        threads = {"OMP_NUM_THREADS": str(n_threads), "TOKENIZERS_PARALLELISM": "false"}
        environment = {**chosen, **os.environ, **threads}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "homelab_scaling.bench.train_contestants", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
        )

    def answer(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            MachineError: it died.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = [text for text in self.errors.read().splitlines() if text.strip()][-1:] or ["no message"]
            raise MachineError(f"bench train: {TITLES[self.name]} failed ({said[0]}); race without it by --only")
        result: dict[str, Any] = json.loads(line)
        return result

    def ask(self, **order: Any) -> dict[str, Any]:
        """Gives an order and waits for its answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Ends it, by closing its orders; by force after a while."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.errors.close()


@contextlib.contextmanager
def _start(jobs: Mapping[str, tuple[Job, Path]]) -> Iterator[dict[str, Racer]]:
    """Every contestant, built one after the other."""
    racers: dict[str, Racer] = {}
    try:
        for name, (job, path) in jobs.items():
            racers[name] = Racer(name, path, job.n_threads)
            racers[name].about = racers[name].answer()["about"]
        yield racers
    finally:
        for racer in racers.values():
            racer.end()


def race(
    label: str, jobs: Mapping[str, tuple[Job, Path]], *, n_rounds: int, turn_s: float, say: Callable[[str], None]
) -> dict[str, Turns]:
    """What everybody's turns took.

    Args:
        turn_s: about how long the slowest contestant's turn lasts [s]; all take as many steps as it does.

    Raises:
        MachineError: a contestant's process died.
    """
    say(f"{label}: starting {', '.join(TITLES[name] for name in jobs)}")
    job = next(iter(jobs.values()))[0]
    with _start(jobs) as racers:
        slowest_s = 0.0
        for racer in racers.values():
            slowest_s = max(slowest_s, racer.ask(do="turn", n_warm=N_FIRST_STEPS, n_steps=2)["wall_s"] / 2)
        n_steps = max(1, round(turn_s / slowest_s))
        n_tokens = n_steps * job.batch_seqs * job.shape.context_tokens
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in racers}
        for number in range(n_rounds):
            for name in list(racers) if number % 2 == 0 else list(racers)[::-1]:
                turns[name].append(racers[name].ask(do="turn", n_warm=1, n_steps=n_steps))
            rates = ", ".join(f"{n_tokens / own[-1]['wall_s']:,.0f}" for own in turns.values())
            say(f"{label}, round {number + 1} of {n_rounds}: {rates} tokens/s")
        parts = {name: racer.ask(do="parts", n_steps=N_PART_STEPS) for name, racer in racers.items()}
        return {
            name: Turns(
                about=racer.about,
                n_steps=n_steps,
                wall_s=tuple(turn["wall_s"] for turn in turns[name]),
                cpu_s=tuple(turn["cpu_s"] for turn in turns[name]),
                peak_bytes=turns[name][-1]["peak_bytes"],
                head_loss_frac=_head_loss_frac(parts[name]),
            )
            for name, racer in racers.items()
        }


def _head_loss_frac(parts: dict[str, Any]) -> float | None:
    if parts["step_s"] is None:
        return None
    return max(0.0, 1.0 - float(parts["backbone_s"]) / float(parts["step_s"]))
