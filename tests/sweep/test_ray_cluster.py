"""What a cluster's machines say of themselves, and what is made of it, with a played ray."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from homelab_scaling import __version__
from homelab_scaling.box import describe_box
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.ladder import TrainTable
from homelab_scaling.sweep.limits import Limits
from homelab_scaling.sweep.node import NodeFacts
from homelab_scaling.sweep.ray_cluster import can_take, survey
from homelab_scaling.tools import run

BOX = replace(describe_box([]), n_cores=8)
CARDS = replace(BOX, device="RTX 4080", n_gpus=2, vram_bytes=16 * 2**30)


class PlayedRay:
    """Answers for its machines; some do not see files of the lab, or those elsewhere."""

    exceptions = SimpleNamespace(GetTimeoutError=TimeoutError)

    def __init__(self, *machines: tuple[dict[str, float], NodeFacts], blind_to: str = " ") -> None:
        self.facts = {f"{i + 1:056x}": facts for i, (_, facts) in enumerate(machines)}
        self.listed = [
            {"NodeID": f"{i + 1:056x}", "Alive": True, "Resources": resources, "NodeManagerHostname": facts.host}
            for i, (resources, facts) in enumerate(machines)
        ]
        self.blind_to = blind_to

    def nodes(self) -> list[dict[str, Any]]:
        return self.listed

    def remote(self, **_options: Any) -> Any:
        def options(scheduling_strategy: Any) -> Any:
            facts = self.facts[scheduling_strategy.node_id]

            def ask(paths: list[str], _gpus: bool) -> NodeFacts:
                assert Path(paths[0]).exists()
                return replace(facts, sees_lab=not any(self.blind_to in path for path in paths))

            return SimpleNamespace(remote=ask)

        return lambda _task: SimpleNamespace(options=options)

    def get(self, answer: NodeFacts, timeout: float) -> NodeFacts:
        return answer


def machine(host: str, box: Any = BOX) -> NodeFacts:
    return NodeFacts(host=host, version=__version__, box=box, sees_lab=True)


def experiment(labs: Path, shards: str | None = None, processes: int | None = None) -> Any:
    lab = labs / "deep" / "tiny"
    return SimpleNamespace(
        lab=lab,
        shards=Path(shards or lab / "shards"),
        ladder=SimpleNamespace(data=SimpleNamespace(shards=shards), train=TrainTable(processes=processes)),
    )


@pytest.fixture(autouse=True)
def _ray() -> None:
    pytest.importorskip("ray")


def test_a_lab_that_machines_do_not_see_is_refused_or_sent_and_nothing_is_left(tmp_path: Path) -> None:
    blind = PlayedRay(({"CPU": 8.0}, machine("far")), blind_to="tiny")
    with pytest.raises(MachineError, match=r"far does not see .*tiny"):
        survey(blind, experiment(tmp_path), "shared")
    assert not list(tmp_path.iterdir()), "nothing half-started"
    assert not survey(blind, experiment(tmp_path), "auto").shared
    assert survey(PlayedRay(({"CPU": 8.0}, machine("near"))), experiment(tmp_path), "auto").shared


def test_shards_elsewhere_must_be_seen_too(tmp_path: Path) -> None:
    blind = PlayedRay(({"CPU": 8.0}, machine("far")), blind_to="/corpora")
    with pytest.raises(MachineError, match="/corpora/books"):
        survey(blind, experiment(tmp_path, "/corpora/books"), "shared")
    assert not survey(blind, experiment(tmp_path, "/corpora/books"), "auto").shared
    assert survey(blind, experiment(tmp_path), "auto").shared


def test_machines_with_too_few_cards_are_left_out(tmp_path: Path) -> None:
    small, large = (
        ({"CPU": 8.0, "GPU": 1.0}, machine("one", replace(CARDS, n_gpus=1))),
        (
            {"CPU": 8.0, "GPU": 2.0},
            machine("two", CARDS),
        ),
    )
    assert len(survey(PlayedRay(small, large), experiment(tmp_path), "auto").nodes) == 2
    assert [n.host for n in survey(PlayedRay(small, large), experiment(tmp_path, processes=2), "auto").nodes] == ["two"]
    with pytest.raises(MachineError, match="has a CPU and 2 GPUs to give"):
        survey(PlayedRay(small), experiment(tmp_path, processes=2), "auto")
    with pytest.raises(MachineError, match="driver lists none"):
        survey(PlayedRay(({"CPU": 8.0, "GPU": 1.0}, machine("odd"))), experiment(tmp_path), "auto")


def test_a_machine_that_is_gone_or_too_small_can_take_nothing() -> None:
    node = {"Alive": True, "Resources": {"CPU": 4.0}}
    assert can_take(node, {"CPU": 4.0}) and not can_take(node, {"CPU": 1.0, "GPU": 1.0})
    assert not can_take({**node, "Alive": False}, {"CPU": 1.0})


@pytest.mark.parametrize("flags", [{"address": "10.0.0.1:6379"}, {"folders": "sent"}])
def test_flags_of_a_cluster_are_not_ignored_without_one(flags: dict[str, Any]) -> None:
    args = run.Args(ladder="quickstart", **flags)
    with pytest.raises(SpecError, match="add --engine ray"), run._engine(args, Limits()):
        pass
