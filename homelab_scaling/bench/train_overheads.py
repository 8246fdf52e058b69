"""What a run spends beside its steps: batches, logging, validation, checkpoints, obeying the watchdog.

    python -m homelab_scaling.bench.train_overheads job.json

A short real run of the Trainer, everything on, with a stopwatch in its seams. Events come often in it, so that each is
measured several times; what they cost is then spread at the cadence of a whole rung: 20 tokens per parameter, a log
line every 10 steps, the validation curve and the full validation of a ladder's defaults, a checkpoint every 600 s.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from homelab_scaling import codec
from homelab_scaling.bench.train_job import N_VOCAB
from homelab_scaling.errors import MachineError
from homelab_scaling.ladder import TrainTable, Validation
from homelab_scaling.plan.counting import count_params
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import ExecutionSpec, ModelShape, Precision, RunSpec
from homelab_scaling.train.rehearsal import make_spec, write_random_shards

TARGET_FRAC = 0.02
TOKENS_PER_PARAM = 20
N_STEPS, LOG_EVERY, CURVE_EVERY, SAVE_EVERY = 20, 4, 5, 5
N_FIRST_STEPS = LOG_EVERY
"""Of the short run, not counted: compilation."""
SEAMS = ("batches", "logging", "validation", "checkpoints", "orders")


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """One thing beside the steps."""

    name: str
    each_s: float
    """Median cost of once (of a token, for validation)."""
    n_measured: int
    n_whole_rung: float
    """How often in the whole rung (tokens, for validation)."""
    share_frac: float
    """Of the whole rung's wall time."""
    cadence: str


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """All of it."""

    device: str
    shape: ModelShape
    n_params: int
    batch_tokens: int
    tokens_per_s: float
    """Of the steps alone."""
    whole_rung_s: float
    overheads: tuple[Overhead, ...]
    write_s: float | None
    """Of a checkpoint in the background, beside training."""
    watched: bool
    """Whether a watchdog guarded a card meanwhile."""

    @property
    def total_frac(self) -> float:
        return sum(one.share_frac for one in self.overheads)

    def summary(self) -> str:
        """For a person."""
        shape = self.shape
        verdict = "reached" if self.total_frac < TARGET_FRAC else "MISSED"
        lines = [
            f"{self.device}: L{shape.n_layer} d{shape.d_model}, context {shape.context_tokens}, "
            f"{self.n_params / 1e6:.1f}M parameters, steps of {self.batch_tokens:,} tokens at {self.tokens_per_s:,.0f} "
            f"tokens/s; a whole rung of {TOKENS_PER_PARAM} tokens per parameter takes {self.whole_rung_s / 3600:.1f} h",
            *(
                f"  {one.name:<12}{one.share_frac:>9.4%}   {1e3 * one.each_s:9.4f} ms each "
                f"({one.n_measured} measured), {one.cadence}"
                for one in self.overheads
            ),
            f"  {'together':<12}{self.total_frac:>9.4%}   wanted less than {TARGET_FRAC:.0%}: {verdict}",
        ]
        if self.write_s is not None:
            lines.append(f"  a checkpoint is written in {self.write_s:.2f} s beside training, which goes on meanwhile")
        if not self.watched:
            lines.append("  no watchdog: it guards NVIDIA cards, and this run used none")
        return "\n".join(lines)


@dataclass
class Stopwatch:
    """Seconds inside named seams; a seam inside another counts for the inner one alone."""

    laps: dict[str, list[float]] = field(default_factory=dict)
    inner: list[float] = field(default_factory=list)

    def around(self, owner: Any, method: str, seam: str) -> None:
        """Times a method of one object from now on."""
        does: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            began = time.perf_counter()
            try:
                return does(*args, **kwargs)
            finally:
                spent = time.perf_counter() - began
                inner = self.inner.pop()
                if self.inner:
                    self.inner[-1] += spent
                self.laps.setdefault(seam, []).append(spent - inner)

        setattr(owner, method, timed)


def measure(
    shape: ModelShape,
    *,
    precision: Precision,
    device: Literal["cpu", "cuda"],
    device_name: str,
    batch_tokens: int,
    microbatch_seqs: int | None = None,
    n_threads: int | None = None,
    n_vocab: int = N_VOCAB,
    compile_it: Literal["auto", "off"] = "auto",
) -> Overheads:
    """A short run in a process of its own, and what its events would cost a whole rung.

    Raises:
        MachineError: the run failed.
    """
    batch_seqs = max(1, batch_tokens // shape.context_tokens)
    validation = Validation()
    with tempfile.TemporaryDirectory(prefix="homelab-bench-") as name:
        lab = Path(name, "lab")
        shards = lab / "shards"
        manifest = write_random_shards(shards, n_vocab, 64 * max(batch_seqs, 4) * shape.context_tokens + 1)
        step_tokens = batch_seqs * shape.context_tokens
        execution = ExecutionSpec(
            device=device,
            microbatch_seqs_per_rank=microbatch_seqs or batch_seqs,
            compile=compile_it,
            log_every_steps=LOG_EVERY,
            checkpoint_every_steps=SAVE_EVERY,
            curve_tokens=4 * shape.context_tokens,
            curve_every_tokens=CURVE_EVERY * step_tokens,
        )
        spec = make_spec(
            shape,
            manifest,
            shards=shards,
            batch_seqs=batch_seqs,
            precision=precision,
            execution=execution,
            n_steps=N_STEPS,
            val_tokens=8 * shape.context_tokens,
            watched=True,
        )
        folder = RunFolder(lab / "bench" / "runs" / spec.run_id)
        codec.write_json(folder.spec, spec)
        done = subprocess.run(
            [sys.executable, "-m", "homelab_scaling.bench.train_overheads", str(folder.spec)],
            capture_output=True,
            text=True,
            check=False,
            env=_environment(n_threads),
        )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        raise MachineError(f"bench train --overheads: the run failed ({last[0]}); see `homelab doctor`")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return judge(found, spec, validation, TrainTable(), device_name)


def _environment(n_threads: int | None) -> dict[str, str]:
    """As `homelab run` launches its ranks: threads do not spin long at a barrier."""
    threads = {} if n_threads is None else {"OMP_NUM_THREADS": str(n_threads)}
    return {"GOMP_SPINCOUNT": "10000", **os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"}


def judge(
    found: dict[str, Any], spec: RunSpec, validation: Validation, table: TrainTable, device_name: str
) -> Overheads:
    """The measured costs at the cadence of a whole rung."""
    science = spec.science
    counts = count_params(science.shape, science.n_vocab)
    step_s = found["step_s"]
    n_steps = TOKENS_PER_PARAM * counts.n_params / science.batch_tokens_global
    base_s = n_steps * step_s
    n_points = validation.curve_points_per_row
    val_tokens = n_points * validation.curve_tokens + validation.full_tokens
    times = {
        "batches": (n_steps * spec.execution.accumulation_steps(science), "every micro-batch"),
        "logging": (n_steps / table.log_every_steps, f"every {table.log_every_steps} steps"),
        "validation": (
            float(val_tokens),
            f"per token; {n_points} points of {validation.curve_tokens:,} tokens and one of {validation.full_tokens:,}",
        ),
        "checkpoints": (base_s / table.checkpoint_every_s + 1, f"every {table.checkpoint_every_s:.0f} s, and the row"),
        "orders": (n_steps, "every step: signals, the clock, the watchdog's orders"),
    }
    costs = {name: statistics.median(found["laps"][name]) for name in SEAMS if found["laps"].get(name)}
    # of a step there are several looks at the orders
    if "orders" in costs:
        costs["orders"] = sum(found["laps"]["orders"]) / N_STEPS
    whole_s = base_s + sum(times[name][0] * cost for name, cost in costs.items())
    return Overheads(
        device=device_name,
        shape=science.shape,
        n_params=counts.n_params,
        batch_tokens=science.batch_tokens_global,
        tokens_per_s=science.batch_tokens_global / step_s,
        whole_rung_s=whole_s,
        overheads=tuple(
            Overhead(
                name=name,
                each_s=cost,
                n_measured=len(found["laps"][name]),
                n_whole_rung=times[name][0],
                share_frac=times[name][0] * cost / whole_s,
                cadence=times[name][1],
            )
            for name, cost in costs.items()
        ),
        write_s=statistics.median(found["laps"]["writing"]) if found["laps"].get("writing") else None,
        watched=found["watched"],
    )


def _rehearse(path: Path) -> dict[str, Any]:
    """The short run itself."""
    from homelab_scaling.train.hooks import MetricsFile, Progress
    from homelab_scaling.train.loop import Trainer
    from homelab_scaling.train.session import choose, start_accelerator
    from homelab_scaling.train.trackers import Trackers

    folder = RunFolder(path.parent)
    spec = codec.read_json(path, RunSpec)
    accelerator = start_accelerator(spec, folder.path)
    hooks = [MetricsFile(folder), Trackers(accelerator, folder, spec), Progress(spec.run_id, 1)]
    trainer = Trainer(
        spec=spec,
        folder=folder,
        accelerator=accelerator,
        choices=choose(spec, accelerator.device.type == "cuda"),
        hooks=hooks,
        started=time.monotonic(),
    )
    watch, background = Stopwatch(), Stopwatch()
    watch.around(trainer.feed, "micro_batch", "batches")
    watch.around(trainer.journal, "tell", "logging")
    watch.around(trainer, "validate", "validation")
    watch.around(trainer, "save_checkpoint", "checkpoints")
    for method in ("after_update", "due", "look"):
        watch.around(trainer.obey, method, "orders")
    background.around(trainer.keeper, "_write", "writing")
    step_s = _watch_steps(trainer)
    trainer.run()
    tokens = {"curve": spec.execution.curve_tokens, "full": spec.science.val_tokens}
    sets = [line["set"] for line in codec.read_jsonl(folder.metrics) if line["kind"] == "val"]
    watch.laps["validation"] = [
        spent / tokens[which] for spent, which in zip(watch.laps["validation"], sets, strict=True)
    ][1:]  # the first compiles the forward pass
    laps = watch.laps | background.laps
    micro_s = statistics.median(laps["batches"]) * trainer.accumulation
    return {
        "step_s": statistics.median(step_s[N_FIRST_STEPS:]) - micro_s,
        "laps": laps,
        "watched": trainer.watched.orders is not None,
    }


def _watch_steps(trainer: Any) -> list[float]:
    """Seconds of each update from now on, the device waited for; batches included."""
    import torch

    seconds: list[float] = []
    does = trainer.do_update

    def timed(lr: float) -> None:
        began = time.perf_counter()
        does(lr)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        seconds.append(time.perf_counter() - began)

    trainer.do_update = timed
    return seconds


def main(path: str) -> None:
    """Runs and prints what was measured as one line of JSON."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(_rehearse(Path(path))), file=channel, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
