"""What a ladder has cost so far, over all that it trains."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from homelab_scaling.sweep import purse
from homelab_scaling.sweep.purse import Purse


class Eye:
    """A run whose name says what it has cost: `begun-1.5`."""

    def __init__(self, path: Path) -> None:
        self.state, _, self.usd = path.name.partition("-")

    def look(self, _now_s: float) -> None: ...

    def cost(self, _wall: Any) -> Any:
        return SimpleNamespace(usd=float(self.usd) if self.usd else None)


def test_trials_of_rates_cost_money_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purse, "FolderFeed", lambda path: path)
    monkeypatch.setattr(purse, "RunEye", Eye)
    ours = Purse(tmp_path / "ladder", tmp_path)
    assert ours.spent(0.0) == 0.0
    for name in ("runs/running-1.5", "runs/queued-100", "runs/finished", "bracket_runs/stopped-2"):
        (tmp_path / "ladder" / name).mkdir(parents=True)
    assert ours.spent(5.0) == 0.0, "it looks every ten seconds"
    assert ours.spent(10.0) == 3.5
    (tmp_path / "ladder/bracket_runs/stopped-2").rename(tmp_path / "ladder/runs/stopped-2")  # kept as a row's run
    assert ours.spent(20.0) == 3.5


def test_measuring_batches_costs_money_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purse, "FolderFeed", lambda path: path)
    monkeypatch.setattr(purse, "RunEye", Eye)
    for name in ("runs/running-1", "batch/finished-0.5", "batch_sweep/runs/finished-0.25", "branch/runs/stopped-0.125"):
        (tmp_path / "ladder" / name).mkdir(parents=True)
    (tmp_path / "ladder/batch/54k.json").touch()
    assert Purse(tmp_path / "ladder", tmp_path).spent(0.0) == 1.875
