"""What every test gets: one thread, no network, no display, and a few folders."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before anything imports torch, tokenizers or matplotlib: each of them reads its variable once. Subprocesses inherit.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
)

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one `homelab` command returned and printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """An empty lab folder."""
    folder = tmp_path / "lab"
    folder.mkdir()
    return folder


@pytest.fixture
def shared_data() -> Path:
    """Published scaling-law tables beside the checkout; the test skips where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"published tables are not here ({SHARED_DATA.name} folder beside the checkout is absent)")
    return SHARED_DATA


@pytest.fixture
def homelab(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `homelab ARGS...` in this process: `homelab("plan", ladder).code`."""
    from homelab_scaling import cli

    def run(*args: object) -> Said:
        capfd.readouterr()
        code = cli.main([str(a) for a in args])
        out, err = capfd.readouterr()
        return Said(code=code, out=out, err=err)

    return run
