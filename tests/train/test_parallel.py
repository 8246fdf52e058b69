"""How DDP is set up: gradients of two gloo ranks against one process, the buckets, what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ddp_ranks
import pytest
import torch
from toy_run import make_toy_run, write_shards

from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.plan.ddp import MIB, buckets_of, gradients_in_order
from homelab_scaling.specs import ModelShape, RunSpec, make_run_id
from homelab_scaling.train.model import build_model
from homelab_scaling.train.parallel import choose_parallel, choose_static_graph

RANKS = Path(__file__).resolve().parents[1] / "support" / "ddp_ranks.py"


def two_ranks(
    folder: Path, accumulation: int, *, static: bool, hooks: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """What both ranks found, or what they said where they failed."""
    flags = (str(accumulation), "static" if static else "dynamic", "hooks" if hooks else "none", str(folder))
    ranks = [
        subprocess.Popen([sys.executable, str(RANKS), str(rank), "2", *flags], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    files = sorted(folder.glob("rank-*.json"))
    return [json.loads(file.read_text()) for file in files], said


@pytest.mark.slow
@pytest.mark.parametrize("accumulation, static, hooks", [(1, True, True), (3, False, True)])
def test_two_ranks_have_the_gradients_of_one_process_and_the_embedding_travels_alone(
    tmp_path: Path, accumulation: int, static: bool, hooks: bool
) -> None:
    assert choose_static_graph(n_passes=accumulation, batch_warmup=False)[0] is static  # each as it is chosen
    found, said = two_ranks(tmp_path, accumulation, static=static, hooks=hooks)
    assert len(found) == 2, said
    sizes = [size for _, size in gradients_in_order(ddp_ranks.SHAPE, ddp_ranks.N_VOCAB)]
    for one in found:
        assert max(one["errors"]) < 2e-6
        assert one["n_heard"] == 3 * accumulation * len(sizes)  # a tied weight once per pass
        assert one["buckets"][-len(buckets_of(sizes, MIB)) :] == [sum(b) for b in buckets_of(sizes, MIB)]


@pytest.mark.slow
def test_torch_still_cannot_learn_a_static_graph_from_a_pass_that_is_not_synchronised(tmp_path: Path) -> None:
    """When this fails, torch has learnt it, and `choose_static_graph` may say yes under accumulation."""
    found, said = two_ranks(tmp_path, 3, static=True)
    assert not found and all("expect_autograd_hooks_" in text for text in said)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_get_ready_in_the_order_that_buckets_are_planned_by(tied: bool) -> None:
    shape = ModelShape(n_layer=2, d_model=32, n_head=2, context_tokens=16, tied=tied)
    model, order = build_model(shape, 100, seed=0, loss_path="chunked"), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: order.append(4 * p.numel()))
    tokens = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert order == [size for _, size in gradients_in_order(shape, 100)]


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    made, _ = make_toy_run(tmp_path, write_shards(tmp_path / "shards"), n_processes=2, microbatch_seqs_per_rank=4)
    return made


def test_each_choice_says_why(spec: RunSpec) -> None:
    one_pass = choose_parallel(spec, on_gpu=False)
    assert one_pass.static_graph and "one pass" in one_pass.static_graph_reason and one_pass.comm == "fp32"
    handler = one_pass.kwargs_handler()
    assert handler.gradient_as_bucket_view and handler.static_graph and handler.bucket_cap_mb == one_pass.bucket_mib
    two_passes = replace(spec, execution=replace(spec.execution, microbatch_seqs_per_rank=2))
    assert not choose_parallel(two_passes, on_gpu=False).static_graph
    assert not choose_static_graph(n_passes=1, batch_warmup=True)[0]


def test_bf16_gradients_are_asked_for_by_name_and_refused_where_they_would_be_wrong(spec: RunSpec) -> None:
    from accelerate.utils import DDPCommunicationHookType

    assert spec.execution.ddp_comm == "fp32"  # never by itself
    asked = replace(spec, execution=replace(spec.execution, ddp_comm="bf16"))
    with pytest.raises(SpecError, match="fp32 run"):
        choose_parallel(asked, on_gpu=True)
    science = replace(asked.science, precision="bf16")
    wide = replace(asked, science=science, run_id=make_run_id(asked.rung, science))
    with pytest.raises(MachineError, match="needs NCCL"):
        choose_parallel(wide, on_gpu=False)
    assert choose_parallel(wide, on_gpu=True).kwargs_handler().comm_hook == DDPCommunicationHookType.BF16
    alone = replace(wide, execution=replace(wide.execution, n_processes=1))
    assert choose_parallel(alone, on_gpu=False).comm == "bf16"  # one rank sends nothing, on whatever device
