"""Run folders that travel, without ray: what arrives in the lab, in which order, and from whom."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from homelab_scaling.errors import MachineError
from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep import depot as depots
from homelab_scaling.sweep import node
from homelab_scaling.sweep.depot import Depot, Sender, unpack
from homelab_scaling.sweep.launch import Launch
from homelab_scaling.watch import processes

RUN = "runs/r"


class Wire:
    """Calls a depot as a node would, and lets a test look in between."""

    def __init__(self, depot: Depot) -> None:
        self.depot, self.calls = depot, list[tuple[Any, ...]]()
        self.before: Callable[[str, tuple[Any, ...]], None] = lambda method, arguments: None

    def __call__(self, method: str, *arguments: Any, **more: Any) -> object:
        self.before(method, arguments)
        self.calls.append((method, *(a for a in arguments if not isinstance(a, bytes))))
        return getattr(self.depot, method)(*arguments, **more)


@pytest.fixture
def wire(tmp_path: Path) -> Wire:
    lab = tmp_path / "lab"
    write(lab / RUN, {"spec.json": "lab's", "metrics.jsonl": "1\n", "checkpoints/u1/a": "one", "checkpoints/u1/b": ""})
    return Wire(Depot(str(lab)))


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def taken(wire: Wire, here: Path, holder: str = "node 1") -> Sender:
    wire("take", RUN, holder)
    unpack(wire.depot.contents(RUN), here)
    return Sender(RunFolder(here), wire, RUN, holder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_just_brought_is_not_sent_back(wire: Wire, tmp_path: Path) -> None:
    sender = taken(wire, tmp_path / "node")
    write(tmp_path / "node", {"spec.json": "this machine's"})
    sender.send()
    assert [call[0] for call in wire.calls] == ["take", "keep_only"]
    assert (wire.depot.lab / RUN / "spec.json").read_text() == "lab's"


def test_files_larger_than_a_piece_arrive_whole(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depots, "PIECE_BYTES", 4)
    here = tmp_path / "node"
    sender = taken(wire, here)
    assert (here / "checkpoints/u1/b").read_bytes() == b""
    write(here, {"checkpoints/u2/a": "ten letters", "checkpoints/u2/b": "", "metrics.jsonl": "1\n2\n"})
    shutil.rmtree(here / "checkpoints/u1")
    sender.send()
    lab = wire.depot.lab / RUN
    assert names(lab / "checkpoints") == ["u2"]
    assert (lab / "checkpoints/u2/a").read_text() == "ten letters" and names(lab / "checkpoints/u2") == ["a", "b"]
    assert (lab / "metrics.jsonl").read_text() == "1\n2\n"


def test_a_checkpoint_replaced_on_its_way_does_not_cost_the_lab_its_own(wire: Wire, tmp_path: Path) -> None:
    here = tmp_path / "node"
    sender = taken(wire, here)
    write(here, {"checkpoints/u2/a": "two", "checkpoints/u2/b": "two"})
    shutil.rmtree(here / "checkpoints/u1")

    def trainer(method: str, _arguments: tuple[Any, ...]) -> None:
        if method == "put_piece" and not (here / "checkpoints/u3").exists():
            write(here, {"checkpoints/u3/a": "three"})
            shutil.rmtree(here / "checkpoints/u2")

    wire.before = trainer
    sender.send()
    checkpoints = wire.depot.lab / RUN / "checkpoints"
    assert "u1" in names(checkpoints), "the node may die now"
    assert "u2" not in names(checkpoints), "half of it"
    sender.send()
    assert names(checkpoints) == ["u3"]


def test_a_record_written_while_files_are_sent_waits_for_what_it_names(wire: Wire, tmp_path: Path) -> None:
    here = tmp_path / "node"
    sender = taken(wire, here)
    write(here, {"metrics.jsonl": "1\n2\n"})

    def trainer(method: str, _arguments: tuple[Any, ...]) -> None:
        if method == "put" and not (here / "record.json").exists():
            write(here, {"checkpoints/row-9/a": "weights", "record.json": "finished with row 9"})

    wire.before = trainer
    sender.send()
    assert not (wire.depot.lab / RUN / "record.json").exists(), "its row is not there yet"
    sender.send()
    assert (wire.depot.lab / RUN / "record.json").exists()
    assert (wire.depot.lab / RUN / "checkpoints/row-9/a").exists()


def test_only_the_last_machine_that_took_a_run_may_send(wire: Wire, tmp_path: Path) -> None:
    first = taken(wire, tmp_path / "node")
    wire("put_piece", RUN, "node 1", "u2/a", b"begun", first=True)
    taken(wire, tmp_path / "other", "node 2")
    assert names(wire.depot.lab / RUN / "checkpoints") == ["u1"], "what the first one began is swept away"
    write(tmp_path / "node", {"metrics.jsonl": "late\n"})
    with pytest.raises(MachineError, match="another machine"):
        first.send()
    assert (wire.depot.lab / RUN / "metrics.jsonl").read_text() == "1\n"


def test_a_task_that_fails_leaves_no_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray keeps the process of a failed task for the next one, so nobody else would end it."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    spec: Any = SimpleNamespace()
    launch = Launch(spec, RunFolder(tmp_path), process=process, session=process.pid, before=None, began_s=0.0)
    monkeypatch.setattr(node, "_launch", lambda *_: launch)
    for name in ("_with_share", "keep_smaller"):
        monkeypatch.setattr(node, name, lambda spec, *_: spec)
    monkeypatch.setattr(node.codec, "write_json", lambda *_: None)

    def tell(method: str, *_: object) -> object:
        raise ConnectionError("the depot is gone")

    order: Any = SimpleNamespace(spec=spec, n_cores=1, send_every_s=30.0)
    with pytest.raises(ConnectionError):
        node._train(order, spec, RunFolder(tmp_path), tell, None)
    assert not processes.is_alive(process.pid)


def test_a_run_that_is_trained_in_the_lab_is_not_taken(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "GIVE_UP_S", 0.0)
    order: Any = SimpleNamespace(run=RUN)
    with RunFolder(wire.depot.lab / RUN).lock():
        why = node._wait_until_free(order, RunFolder(tmp_path / "node"), wire)
    assert why is not None and why.status == "failed" and why.final
    assert node._wait_until_free(order, RunFolder(tmp_path / "node"), wire) is None
    assert os.path.exists(wire.depot.lab / RUN / "metrics.jsonl")
