"""One run over two "machines": two launchers on this one with a CPU rank each, `accelerate launch --num_machines 2`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.runs import RunFolder

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pretrain.py"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch_on_machines(folders: list[RunFolder], *flags: str) -> list[subprocess.CompletedProcess[str]]:
    """One launcher for each folder, machine 0 first; how each ended."""
    port, environment = str(free_port()), {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    started = []
    for rank, folder in enumerate(folders):
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"),
            *(str(RECIPE), "--device", "cpu", "--spec", str(folder.spec), *flags),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, env=environment, **pipes))  # type: ignore[call-overload]
    ended = []
    for process in started:
        try:
            out, err = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def test_two_machines_give_the_losses_of_one_process_and_one_of_them_writes(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards")
    spec, alone = make_toy_run(tmp_path, manifest, lab="one")
    train_here(spec, alone)
    _, both = make_toy_run(tmp_path, manifest, lab="two", n_processes=2, microbatch_seqs_per_rank=2)
    first, second = launch_on_machines([both, both])
    assert first.returncode == 0 and second.returncode == 0, first.stderr[-2000:] + second.stderr[-2000:]
    one, two = steps_of(alone), steps_of(both)
    assert [x["update"] for x in two] == [x["update"] for x in one]  # each once: nobody else wrote
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=2e-5)
    ours, theirs = both.read_record(), alone.read_record()
    assert [r.loss_nats for r in ours.rows] == pytest.approx([r.loss_nats for r in theirs.rows], rel=1e-4)
    segments = [e for e in codec.read_jsonl(both.events) if e["kind"] == "segment"]
    assert len(segments) == 1 and segments[0]["n_processes"] == 2 and len(set(segments[0]["pids"])) == 2


def test_machines_that_do_not_share_the_runs_folder_are_refused_before_a_step(tmp_path: Path) -> None:
    manifest = write_shards(tmp_path / "shards")
    _, here = make_toy_run(tmp_path, manifest, lab="here", n_processes=2, microbatch_seqs_per_rank=2)
    _, elsewhere = make_toy_run(tmp_path, manifest, lab="elsewhere", n_processes=2, microbatch_seqs_per_rank=2)
    for ended in launch_on_machines([here, elsewhere]):
        assert ended.returncode != 0 and "the machines of one run share its folder" in ended.stderr
    for folder in (here, elsewhere):
        assert sorted(p.name for p in folder.path.iterdir()) == ["spec.json"]
