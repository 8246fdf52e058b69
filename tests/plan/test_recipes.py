"""What ships beside the ladders: launch configurations that Accelerate reads, a README whose numbers are the plan's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from homelab_scaling.box import Box
from homelab_scaling.plan.cost import kwh_of, usd_of
from homelab_scaling.plan.ladder import find_ladder, plan_ladder, read_ladder, shipped_ladders
from homelab_scaling.plan.parts import Power
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.sweep.batches import Batches
from homelab_scaling.sweep.prepare import open_experiment

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


# ------------------------------------------------------------------------------------------ the README's table of costs

WATTS = {"2 CPU cores": 100, "one 8 GB GPU": 410, "two 16 GB GPUs": 730, "two GPUs": 730}
HOURS = {"h": 1.0, "min": 1 / 60}


def table() -> dict[str, tuple[str, ...]]:
    """Recipe -> hardware, time, kWh, USD as the README has them."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, flags=re.MULTILINE)
    return {name: tuple(cell.strip() for cell in rest.split("|"))[1:] for name, rest in lines}


def hours_of(cell: str) -> float:
    value, unit = cell.split()
    return float(value) * HOURS[unit]


@pytest.mark.parametrize("name", shipped_ladders())
def test_time_energy_and_money_in_the_readme_are_the_plans(name: str, tmp_path: Path, cpu: Box) -> None:
    hardware, time, kwh, usd = table()[name]
    kind = hardware.removesuffix(", or any GPU")
    box = cpu if "CPU" in kind else box_with("RTX 4080", 1 if kind.startswith("one") else 2)
    ladder, path = read_ladder(name)
    if name.startswith("ddp_"):  # what `homelab ddp` takes is measured, not planned
        hours = hours_of(time)
    else:
        plan = plan_ladder(ladder, None, box, folder=path.parent)
        measuring = Batches(replace(open_experiment(name, tmp_path), box=box), None).measuring()
        before = measuring.seconds if measuring else 0.0
        assert plan.totals.seconds is not None and before is not None
        hours = (plan.totals.seconds + before) / 3600
        assert hours_of(time) == pytest.approx(hours, rel=0.05)
    energy = kwh_of(hours * 3600, Power(watts=WATTS[kind], basis="stated in the README"))
    money = usd_of(hours * 3600, energy, ladder.money)
    assert float(kwh) == pytest.approx(energy, rel=0.05, abs=0.0005)
    assert money is not None and float(usd) == pytest.approx(money, rel=0.05, abs=0.0005)
