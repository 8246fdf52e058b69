"""A ladder on a Ray cluster of several CPU nodes on this machine: lost nodes, Ctrl-C, files that travel, bad addresses.

What runs is the whole command as its user gives it, against `ray.cluster_utils`; only the machines share a kernel.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling import codec
from homelab_scaling.runs import RunFolder, run_folders
from homelab_scaling.sweep.launch import ranks_of
from homelab_scaling.watch import processes

LADDER = """\
name = "tiny"
context_tokens = 16
rungs = [
    { name = "a", n_layer = 1, d_model = 16, n_head = 1 },
    { name = "b", n_layer = 1, d_model = 32, n_head = 1 },
]
[data]
sources = ["text"]
tokenizer = "bytes"
val_frac = 0.1
[horizons]
tokens = [%(tokens)s]
[batch]
tokens = 128
noise_every_steps = 0
[validation]
full_tokens = 512
curve_tokens = 128
[train]
compile = "off"
checkpoint_every_steps = 200
"""
HOMELAB = [sys.executable, "-m", "homelab_scaling"]


class Crowd:
    """A head without CPUs, on which commands are given, and nodes of one CPU each."""

    def __init__(self, n_nodes: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **STORE}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1, **STORE) for _ in range(n_nodes)]
        self.cluster.wait_for_nodes()

    def kill_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)


STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def crowd() -> Iterator[Crowd]:
    pytest.importorskip("ray")
    made = Crowd(2)
    yield made
    made.cluster.shutdown()


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    return write_ladder(tmp_path, "1280, 2560")


def write_ladder(folder: Path, tokens: str) -> Path:
    text = folder / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text("".join(f"{i} and {j} is {i + j}; " for j in range(150)), encoding="utf-8")
    path = folder / "tiny.toml"
    path.write_text(LADDER % {"tokens": tokens}, encoding="utf-8")
    return path


def begin(ladder: Path, lab: Path, *more: str) -> "subprocess.Popen[str]":
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*HOMELAB, "run", str(ladder), "--lab", str(lab), "--trackers", "--json", *more],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: "subprocess.Popen[str]", code: int = 0) -> tuple[dict[str, Any], str]:
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, err
    return (json.loads(out)["outcome"] if out.strip() else {}), err


def losses(lab: Path) -> dict[str, float]:
    records = [folder.read_record() for folder in run_folders(lab / "tiny")]
    return {row.row_id: row.loss_nats for record in records if record is not None for row in record.rows}


def steps_of(folder: RunFolder) -> list[int]:
    return [line["update"] for line in codec.read_jsonl(folder.metrics) if line["kind"] == "step"]


def wait_until(true: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


BOTH = pytest.mark.parametrize("folders", ["shared", "sent"])
TOKENS = "12800, 384000"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The rows of one box, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    end(begin(write_ladder(folder, TOKENS), folder / "lab"))
    return losses(folder / "lab")


def assert_nothing_is_twice(lab: Path) -> None:
    for folder in run_folders(lab / "tiny"):
        n = steps_of(folder)
        assert n == sorted(set(n)), "an update is there twice"
        assert [row.n_tokens for row in folder.read_record().rows] == [12800, 384000]  # type: ignore[union-attr]
        assert folder.read_spec().shards == "../../shards", "a machine's own path is of no use in the lab"
        assert not list(folder.checkpoints.glob(".*"))


def wait_for_trainers(process: "subprocess.Popen[str]", lab: Path) -> None:
    runs = lab / "tiny" / "runs"
    wait_until(lambda: len(list(runs.glob("*/events.jsonl"))) == 2 or process.poll() is not None)


@pytest.mark.slow
def test_a_finished_ladder_is_not_repeated(crowd: Crowd, tmp_path: Path, alone: dict[str, float]) -> None:
    ladder, lab = write_ladder(tmp_path, TOKENS), tmp_path / "lab"
    outcome, said = end(begin(ladder, lab, "--engine", "ray", "--address", crowd.cluster.address))
    assert len(outcome["finished"]) == 2 and not outcome["failed"], said
    assert losses(lab) == alone
    assert len((lab / "tiny" / "runs.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4
    again, said = end(begin(ladder, lab, "--engine", "ray", "--address", crowd.cluster.address))
    assert said.count("not repeated") == 2 and len(again["finished"]) == 2


@pytest.mark.slow
@BOTH
def test_a_node_that_dies_loses_nothing_and_nothing_runs_twice(
    crowd: Crowd, tmp_path: Path, alone: dict[str, float], folders: str
) -> None:
    ladder, lab = write_ladder(tmp_path, TOKENS), tmp_path / "lab"
    crowd.nodes.append(crowd.cluster.add_node(num_cpus=1, **STORE))
    crowd.cluster.wait_for_nodes()
    process = begin(ladder, lab, "--engine", "ray", "--address", crowd.cluster.address, "--folders", folders)
    wait_for_trainers(process, lab)
    crowd.kill_node()
    outcome, said = end(process)
    assert len(outcome["finished"]) == 2, said
    assert_nothing_is_twice(lab)
    assert losses(lab) == alone


@pytest.mark.slow
@BOTH
def test_ctrl_c_saves_every_run_and_the_same_command_goes_on(
    crowd: Crowd, tmp_path: Path, alone: dict[str, float], folders: str
) -> None:
    ladder, lab = write_ladder(tmp_path, TOKENS), tmp_path / "lab"
    more = ("--engine", "ray", "--address", crowd.cluster.address, "--folders", folders)
    process = begin(ladder, lab, *more)
    wait_for_trainers(process, lab)
    process.send_signal(signal.SIGINT)
    outcome, said = end(process, code=75)
    assert outcome["stopped"], said
    statuses = {r.status for f in run_folders(lab / "tiny") if (r := f.read_record()) is not None}
    assert statuses <= {"stopped", "finished"} and "stopped" in statuses
    outcome, said = end(begin(ladder, lab, *more))
    assert len(outcome["finished"]) == 2, said
    assert_nothing_is_twice(lab)
    assert losses(lab) == alone


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_no_trainer(crowd: Crowd, tmp_path: Path) -> None:
    ladder, lab = write_ladder(tmp_path, TOKENS), tmp_path / "lab"
    process = begin(ladder, lab, "--engine", "ray", "--address", crowd.cluster.address)
    wait_for_trainers(process, lab)
    pids = [pid for folder in run_folders(lab / "tiny") for pid, _ in ranks_of(folder)]
    assert pids
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    end(process, code=75)
    wait_until(lambda: not any(processes.is_alive(pid) for pid in pids), 60)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("nonsense", "wants HOST:PORT"),
        ("ray://127.0.0.1:10001", "wants HOST:PORT"),
    ],
)
def test_an_address_that_does_not_answer_is_one_sentence(ladder: Path, tmp_path: Path, address: str, said: str) -> None:
    pytest.importorskip("ray")
    _, err = end(begin(ladder, tmp_path / "lab", "--engine", "ray", "--address", address), code=2)
    assert said in err and "Traceback" not in err
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_somebody_else_at_the_address_is_one_sentence(ladder: Path, tmp_path: Path, reply: bytes) -> None:
    """Ray would try for minutes to make a head of it."""
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = begin(ladder, tmp_path / "lab", "--engine", "ray", "--address", address)
        with server.accept()[0] as talk:
            talk.sendall(reply)
            _, err = end(process, code=2)
    assert "no Ray cluster answers there" in err and "Traceback" not in err
    assert not (tmp_path / "lab").exists()
