"""The toy run as a fixture."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from toy_run import make_toy_run, write_shards

from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., tuple[RunSpec, RunFolder]]:
    """`make_run(lab="a", optimizer=..., **changes)`: a fresh run folder on the toy corpus."""
    return partial(make_toy_run, tmp_path, write_shards(tmp_path / "shards"))
