"""Training in parts (FSDP 1 and 2) on two ranks over gloo: whole in all that is kept, the same in all that is computed.

What two GPUs would add, and these tests cannot show, is in tests/recipes/test_sharded.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling.errors import SpecError
from homelab_scaling.specs import Optim
from homelab_scaling.train.sharded import fsdp_version, hide_from_accelerate, of_launch, refuse_optimizer

RANKS = Path(__file__).resolve().parents[1] / "support" / "sharded_ranks.py"


def found_by_ranks(folder: Path, *args: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen([*command, str(rank), "2", *args, str(folder)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=120)
            assert rank.returncode == 0, said.decode()[-2000:]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["full", "grad-op"])
@pytest.mark.parametrize("version", ["1", "2"])
def test_two_ranks_compute_what_one_does_and_keep_it_whole(tmp_path: Path, version: str, sharding: str) -> None:
    for found in found_by_ranks(tmp_path, version, sharding):
        assert found["no_states_yet"] and found["start"] == 0.0
        for in_parts, alone in found["norms"]:
            assert in_parts == pytest.approx(alone, rel=1e-5)
            assert alone > 0.5, "it clips"
        assert found["weights"] < 2e-6 and found["losses"] < 1e-5
        # A gradient of one rank that is not finite reaches no weight of any, and no state.
        assert not found["bad_norm_is_finite"]
        assert found["weights_moved_by_a_bad_update"] == found["states_moved_by_a_bad_update"] == 0.0
        # Saved and loaded, bit for bit; also what an evaluation has gathered is replaced.
        assert found["reloaded"] == found["losses_reloaded"] == found["states_reloaded"] == 0.0
        assert found["step"] and found["same_again"] == [True, 0.0]
        assert found["state_bytes"] == pytest.approx(found["state_bytes_whole"] / 2, rel=0.1)
        assert "sharded parameters (FSDP)" in found["noise"]


ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_USE_ORIG_PARAMS": "true"}
ONE, TWO = {**ASKED, "FSDP_VERSION": "1"}, {**ASKED, "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, {}),
        ({**ONE, "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, {"sharding": "full"}),
        ({**ONE, "FSDP_SHARDING_STRATEGY": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}, {"sharding": "grad-op"}),
        ({**ONE, "FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"}, {"sharding": "grad-op"}),
        ({**TWO, "FSDP_RESHARD_AFTER_FORWARD": "true"}, {"sharding": "full"}),
        ({**TWO, "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"sharding": "grad-op"}),
        ({**TWO, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"sharding": "full", "activation_checkpointing": True}),
    ],
)
def test_the_launchers_config_is_obeyed(environ: dict[str, str], settings: dict[str, Any]) -> None:
    assert of_launch(environ) == settings


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**ONE, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "HYBRID_SHARD; use FULL_SHARD, SHARD_GRAD_OP"),
        ({**ONE, "FSDP_USE_ORIG_PARAMS": "false"}, "fsdp_use_orig_params: false"),
        ({**TWO, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_we_do_not_do_is_refused(environ: dict[str, str], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        of_launch(environ)


def test_accelerate_starts_plain_ranks_and_the_version_is_remembered() -> None:
    environ = dict(ONE)
    hide_from_accelerate(environ)
    hide_from_accelerate(environ)
    assert of_launch(environ) == {} and fsdp_version(environ) == 1
    assert fsdp_version({}) == 2


def test_8_bit_states_are_not_cut(make_run) -> None:
    spec, _ = make_run(optimizer="adamw8bit", n_processes=2, sharding="full", microbatch_seqs_per_rank=4)
    with pytest.raises(SpecError, match=r'found .* "adamw8bit" with sharding = "full".*set name = "adamw"'):
        refuse_optimizer(spec)
    refuse_optimizer(replace(spec, execution=replace(spec.execution, sharding="none")))
    refuse_optimizer(replace(spec, execution=replace(spec.execution, n_processes=1)))
    assert spec.science.optim == Optim(name="adamw8bit")
