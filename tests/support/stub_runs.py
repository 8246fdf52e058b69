"""Stub trainers and a driver over them: processes that keep a run's folder as a real trainer does, without torch.

    stub_runs.py train SPEC     what stands in for `accelerate launch recipes/pretrain.py --spec SPEC`
    stub_runs.py drive LAB N    a driver over every run of LAB on N slots, to be killed

A run's folder says what its stub does, in stub.json: {"seconds": 1.0, "fail": 1, "diverge": false}. Every moment of
training leaves a line in trace.jsonl: so a test sees whether anything was trained twice or lost.
"""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import MachineError
from homelab_scaling.runs import Machine, RunFolder, RunRecord
from homelab_scaling.specs import RunSpec

TICK_S = 0.05
MACHINE = Machine(
    device="cpu", n_processes=1, torch="-", accelerate="-", transformers="-", python="-", homelab_scaling="-"
)
TWO_GPUS = Box(
    device="NVIDIA GeForce RTX 4080",
    n_gpus=2,
    vram_bytes=16 * 2**30,
    computes_bf16=True,
    n_cores=4,
    has_compiler=False,
)
CPU = replace(TWO_GPUS, device="cpu", n_gpus=0, vram_bytes=None)


def behave(folder: RunFolder, **how: Any) -> None:
    """What the stub of this run does."""
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / "stub.json").write_text(json.dumps(how))


def command(spec: RunSpec, folder: RunFolder, box: Box) -> list[str]:
    """Instead of `launch.launch_command`."""
    return [sys.executable, __file__, "train", str(folder.spec)]


def trace(folder: RunFolder) -> list[dict[str, Any]]:
    """Every tick that was trained, in order, and by whom."""
    return codec.read_jsonl(folder.path / "trace.jsonl")


def train(spec_file: Path) -> int:
    """A run of so many ticks, which it keeps count of in progress.json."""
    folder = RunFolder(spec_file.parent)
    spec = folder.read_spec()
    how = json.loads((folder.path / "stub.json").read_text())
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with folder.lock():
            return _train(spec, folder, how, stop)
    except MachineError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2


def _train(spec: RunSpec, folder: RunFolder, how: dict[str, Any], stop: list[int]) -> int:
    progress = folder.path / "progress.json"
    done = json.loads(progress.read_text())["done"] if progress.exists() else 0
    codec.append_jsonl(folder.events, [{"kind": "segment", "pids": [os.getpid()]}])
    n_failed = sum(e["kind"] == "failed" for e in codec.read_jsonl(folder.events))

    def record(status: Any, reason: str | None = None, stopped_by: Any = None) -> None:
        said = RunRecord(
            run_id=spec.run_id, ladder=spec.ladder, rung=spec.rung, status=status, reason=reason,
            stopped_by=stopped_by, science_hash=spec.science.hash, rows=(), machine=MACHINE,
        )  # fmt: skip
        codec.write_json(folder.record, said)

    record("running")
    print(f"{spec.run_id} starts at tick {done}", file=sys.stderr, flush=True)
    while done < round(how["seconds"] / TICK_S):
        if how.get("lose_gpu") and os.environ.get("CUDA_VISIBLE_DEVICES") == how["lose_gpu"] and done > 5:
            record("stopped", "stopped by the watchdog: the driver has lost the card", "watchdog")
            return 0
        if stop:
            record("stopped", "stopped by SIGTERM", "signal")
            return 0
        if n_failed < how.get("fail", 0) and done >= 3:
            codec.append_jsonl(folder.events, [{"kind": "failed"}])
            record("failed", "RuntimeError: out of luck")
            return 1
        time.sleep(TICK_S)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        ranks = spec.execution.n_processes
        line = {"tick": done, "pid": os.getpid(), "t_s": time.time(), "visible": visible, "ranks": ranks}
        codec.append_jsonl(folder.path / "trace.jsonl", [line])
        done += 1
        codec.write_json(progress, {"done": done}, durable=False)
    if how.get("diverge"):
        record("diverged", "the loss is not finite")
    else:
        record("finished")
    return 0


def drive(lab: Path, n_slots: int) -> int:
    """Runs everything in LAB/runs on so many CPU slots."""
    from homelab_scaling.sweep import launch, local

    launch.launch_command = command
    folders = [RunFolder(path) for path in sorted((lab / "runs").iterdir())]
    runs = [(folder.read_spec(), folder) for folder in folders]
    outcome = local.run_all(runs, CPU, lambda text: print(text, flush=True), n_cpu_slots=n_slots)
    return outcome.exit_code


if __name__ == "__main__":
    if sys.argv[1] == "train":
        raise SystemExit(train(Path(sys.argv[2])))
    raise SystemExit(drive(Path(sys.argv[2]), int(sys.argv[3])))
