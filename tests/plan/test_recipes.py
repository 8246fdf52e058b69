"""What ships beside the ladders: launch configurations that Accelerate reads, and a README whose paths exist."""

import re

import pytest

from homelab_scaling.plan.ladder import find_ladder, shipped_ladders

RECIPES = find_ladder("quickstart").parents[1]


@pytest.mark.parametrize(
    ("name", "kind", "n_processes", "on_cpu"),
    [("cpu", "NO", 1, True), ("one_gpu", "NO", 1, False), ("two_gpus", "MULTI_GPU", 2, False)],
)
def test_accelerate_reads_the_launch_configurations(name: str, kind: str, n_processes: int, on_cpu: bool) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / "accelerate_configs" / f"{name}.yaml"))
    assert config.distributed_type.value == kind
    assert (config.num_processes, config.use_cpu) == (n_processes, on_cpu)
    assert config.mixed_precision == "no", "precision belongs to the run's spec"


def test_every_path_and_recipe_in_the_readme_exists() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    paths = re.findall(r"recipes/([\w./]+\.(?:yaml|py|md))", text)
    assert len(paths) >= 4
    assert [p for p in paths if not (RECIPES / p).is_file()] == []
    named = set(re.findall(r"^\| `(\w+)`", text, flags=re.MULTILINE))
    assert named == set(shipped_ladders())
