"""The model of a data-parallel step, its judgement, and what both say about a ladder."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError, UserError
from homelab_scaling.plan import cost
from homelab_scaling.plan.counting import count_params
from homelab_scaling.plan.ddp import (
    ASSUMED_FABRIC,
    MIB,
    Fabric,
    best_mix,
    buckets_of,
    choose_bucket_mib,
    ddp_step,
    gradients_in_order,
    least_tokens,
    packed,
)
from homelab_scaling.plan.ddp_advice import advise_ladder, pays_from, step_seconds
from homelab_scaling.plan.ddp_judge import judge
from homelab_scaling.plan.ddp_times import (
    DdpMeasurement,
    RungTimes,
    Sweep,
    Timed,
    Transfer,
    ddp_path,
    read_ddp,
    write_ddp,
)
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.parts import Plan, RungPlan
from homelab_scaling.specs import ModelShape

GPT2_VOCAB = 50_257
SHAPES = {
    "5.4M": ModelShape(n_layer=4, d_model=96, n_head=4, context_tokens=512),
    "18M": ModelShape(n_layer=6, d_model=256, n_head=4, context_tokens=512),
    "51M": ModelShape(n_layer=8, d_model=512, n_head=8, context_tokens=512),
    "124M": ModelShape(n_layer=12, d_model=768, n_head=12, context_tokens=1024),
}

# ------------------------------------------------------------------------------------------------------------ the model


def compute_seconds(n_params: int, n_tokens: int, flops_per_s: float) -> float:
    """Forward and backward at 6 FLOPs a parameter and token."""
    return 6.0 * n_params * n_tokens / flops_per_s


def efficiency_of(measurement: DdpMeasurement | None, rung: RungPlan, box: Box) -> tuple[float, str]:
    """Of strong scaling over two, at a rung's own batch."""
    one, many, basis = step_seconds(measurement, rung, 2, box=box)
    return one / (2 * many), basis


@pytest.mark.parametrize(
    "name, wanted", [("5.4M", (74, 92, 98)), ("18M", (78, 93, 98)), ("51M", (83, 95, 99)), ("124M", (89, 97, 99))]
)
def test_efficiencies_at_8_gb_per_s_and_39_tflops_are_those_worked_out_by_hand(
    name: str, wanted: tuple[int, int, int]
) -> None:
    params = count_params(SHAPES[name], GPT2_VOCAB)
    for n_tokens, percent in zip((8192, 32_768, 131_072), wanted, strict=True):
        step = ddp_step(params, compute_seconds(params.n_params, n_tokens, 39e12))
        assert 100 * step.weak_efficiency == pytest.approx(percent, abs=0.6)


def test_one_sync_costs_as_much_as_3250_tokens_of_computing_whatever_the_size() -> None:
    for shape in SHAPES.values():
        n = count_params(shape, GPT2_VOCAB).n_params
        assert 4 * n / 8e9 == pytest.approx(compute_seconds(n, 3250, 39e12))


def test_only_the_last_pass_hides_gradients_and_one_rank_sends_none() -> None:
    params = count_params(SHAPES["124M"], GPT2_VOCAB)
    one, three = (ddp_step(params, 0.03, n_passes=n) for n in (1, 3))
    assert three.spill_s > one.spill_s and three.late_s == one.late_s
    assert ddp_step(params, 0.03, n_ranks=1).exposed_s == 0.0
    four = ddp_step(params, 0.03, n_ranks=4)
    assert four.late_s == pytest.approx(1.5 * one.late_s)  # 2 (n - 1) / n
    assert ddp_step(params, 0.03, Fabric(bytes_per_s=8e9, latency_s=1e-3, basis=""), n_buckets=5).latency_s == 5e-3


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 64))
def test_the_least_batch_is_the_first_multiple_that_pays(threshold: int, step: int) -> None:
    found = least_tokens(lambda n: n >= threshold, step)
    assert found is not None and found % step == 0 and found >= threshold and found - step < threshold
    assert least_tokens(lambda _: False, step) is None


# ------------------------------------------------------------------------------------------------------------- buckets


@settings(derandomize=True, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from([64, 96, 256, 512, 768]),
    st.sampled_from([2048, GPT2_VOCAB]),
    st.booleans(),
)
def test_gradients_are_all_there_and_the_chosen_bucket_is_never_worse_than_the_default(
    n_layer: int, d_model: int, n_vocab: int, tied: bool
) -> None:
    shape = ModelShape(n_layer=n_layer, d_model=d_model, n_head=4, context_tokens=256, tied=tied)
    order = gradients_in_order(shape, n_vocab)
    assert sum(size for _, size in order) == 4 * count_params(shape, n_vocab).n_stored
    assert order[-1][0] == "embed"
    sizes = [size for _, size in order]
    cap = choose_bucket_mib(shape, n_vocab)
    assert 1 <= cap <= 50

    def late(mib: int) -> int:
        return sum(buckets_of(sizes, mib * MIB)[-1])

    assert late(cap) <= max(late(25), sizes[-1] + 100e-6 * 8e9 * len(buckets_of(sizes, 25 * MIB)))


def test_an_18m_model_would_send_everything_at_the_end_and_does_not() -> None:
    sizes = [size for _, size in gradients_in_order(SHAPES["18M"], GPT2_VOCAB)]
    assert [len(buckets_of(sizes, cap * MIB)) for cap in (25, choose_bucket_mib(SHAPES["18M"], GPT2_VOCAB))] == [1, 7]


# ----------------------------------------------------------------------------------------------------------- judgement

PUBLISHED = {"t1_full_s": 22.03e-3, "t_ddp_s": 26.36e-3, "compute_s": 15.12e-3, "communication_s": 11.24e-3}


def test_the_published_case_is_two_runs_and_both_scalings_have_their_names() -> None:
    found = judge(**PUBLISHED)
    assert 100 * found.overhead_frac == pytest.approx(42.6, abs=0.05)
    assert 100 * found.strong_efficiency == pytest.approx(41.8, abs=0.05)
    assert found.strong_speedup == pytest.approx(0.84, abs=0.005)
    assert 100 * found.weak_efficiency == pytest.approx(83.6, abs=0.05)
    assert found.weak_speedup == pytest.approx(1.67, abs=0.005) and not found.weak_is_measured
    assert found.runs_over_ddp == pytest.approx(2.4, abs=0.01)
    assert found.advice == "two independent runs" and "one GPU" in found.words
    assert judge(**PUBLISHED, n_runs=1).advice == "one GPU"


def test_one_of_compute_and_communication_gives_the_other() -> None:
    for missing in ("compute_s", "communication_s"):
        found = judge(**{k: v for k, v in PUBLISHED.items() if k != missing})
        assert found.overhead_frac == pytest.approx(11.24 / 26.36)
    assert judge(t1_full_s=2.0, t_ddp_s=1.2).overhead_frac is None


def test_advice_follows_the_faster_way() -> None:
    assert judge(t1_full_s=1.0, t_ddp_s=0.51, n_runs=1).advice == "DDP"
    assert judge(t1_full_s=1.0, t_ddp_s=0.51).advice == "two independent runs"
    assert judge(t1_full_s=1.0, t_ddp_s=0.51, runs_speedup=1.5).advice == "DDP"  # runs that disturb each other
    assert judge(t1_full_s=1.0, t_ddp_s=1.1, runs_speedup=1.0).advice == "one GPU"
    assert judge(t1_full_s=1.0, t_ddp_s=0.99, n_runs=1).advice == "one GPU"
    four = judge(t1_full_s=4.0, t_ddp_s=1.25, n_ranks=4)
    assert four.strong_efficiency == pytest.approx(0.8) and "4 independent runs" in four.words


@pytest.mark.parametrize(
    "times, said",
    [
        ({"t1_full_s": 0.0, "t_ddp_s": 1.0}, "single = 0 ms"),
        ({"t1_full_s": 1.0, "t_ddp_s": -1.0}, "ddp = -1000 ms"),
        ({"t1_full_s": math.nan, "t_ddp_s": 1.0}, "single = nan ms"),
        ({"t1_full_s": 1.0, "t_ddp_s": math.inf}, "ddp = inf ms"),
        ({"t1_full_s": 1.0, "t_ddp_s": 1.0, "compute_s": 0.2, "communication_s": 0.3}, "must be of one and the same"),
        ({"t1_full_s": 1.0, "t_ddp_s": 1.0, "compute_s": 1.5}, "must be of one and the same"),
        ({"t1_full_s": 1.0, "t_ddp_s": 1.0, "communication_s": 1.0}, "must be of one and the same"),
    ],
)
def test_times_that_cannot_be_are_refused(times: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        judge(**times)


# ------------------------------------------------------------------------------------------------------- several runs


def test_a_dominant_run_is_split_and_the_rest_packed() -> None:
    """c ~ N^2 for 5 to 120M parameters, as worked out by hand."""
    costs = [25.0, 100.0, 400.0, 1600.0, 6400.0, 14_400.0]
    assert packed(costs, 2) == 14_400.0
    at_95 = best_mix(costs, [1.9] * 6)
    assert at_95.all_ddp_s == pytest.approx(12_066, abs=1) and at_95.packed_s == 14_400 and at_95.one_card_s == 22_925
    poor_below = best_mix(costs, [0.8, 0.8, 0.8, 0.8, 1.2, 1.9])
    assert poor_below.n_ddp == 1 and poor_below.seconds < min(poor_below.packed_s, poor_below.all_ddp_s)
    three_seeds = best_mix([c for c in costs for _ in range(4)], [1.9] * 24)
    assert three_seeds.n_ddp == 0  # packs evenly: nothing to gain
    with pytest.raises(SpecError, match="positive"):
        best_mix([1.0], [0.0])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.2, 2.0)), min_size=1, max_size=9), st.integers(2, 4))
def test_the_best_mix_is_no_later_than_its_neighbours(runs: list[tuple[float, float]], n: int) -> None:
    mix = best_mix([s for s, _ in runs], [up for _, up in runs], n)
    assert mix.seconds <= min(mix.packed_s, mix.all_ddp_s)
    assert mix.packed_s <= mix.one_card_s * (1 + 1e-9) and mix.packed_s >= max(s for s, _ in runs)


# ---------------------------------------------------------------------------------------------------- what was measured


def timed(seconds: float) -> Timed:
    return Timed(seconds=seconds, low_s=0.99 * seconds, high_s=1.01 * seconds, n=20)


def measured(plan: Plan, name: str, *, exposed_s: float = 0.004, device: str = "RTX 4080") -> DdpMeasurement:
    """As `homelab ddp` would leave it for one rung: 10 ms computing per rank."""
    rung = next(r for r in plan.rungs if r.name == name)
    times = RungTimes(
        rung=name,
        shape=rung.size.shape,
        n_vocab=plan.n_vocab,
        precision=rung.training.precision,
        batch_tokens=rung.training.batch_tokens,
        microbatch_seqs_per_rank=rung.placement.microbatch_seqs_per_rank,
        accumulation_steps=rung.placement.accumulation_steps,
        compiled=True,
        bucket_mib=25,
        alone_full=timed(0.020),
        alone_rank=timed(0.010),
        together_full=timed(0.020),
        together_rank=timed(0.010),
        no_sync=timed(0.010),
        sync=timed(0.010 + exposed_s),
    )
    sweep = Sweep(
        setting="NCCL_P2P_DISABLE=1",
        transfers=tuple(Transfer(n_bytes=n * MIB, timed=timed(2e-5 + n * MIB / 4e9)) for n in (1, 25, 100, 500)),
    )
    return DdpMeasurement(
        device=device,
        n_ranks=2,
        backend="nccl",
        threads_per_rank=None,
        measured_s=time.time(),
        torch="2.13.0",
        sweep=sweep,
        other_sweep=None,
        rungs=(times,),
    )


@pytest.fixture(scope="module")
def reference(two_4080: Box) -> Plan:
    ladder, path = read_ladder("gpt2_5m_120m")
    return plan_ladder(ladder, None, two_4080, folder=path.parent)


def test_a_measurement_survives_the_disk_and_is_absent_without_one(reference: Plan, tmp_path: Path) -> None:
    assert read_ddp(tmp_path) is None
    found = measured(reference, "24m")
    assert write_ddp(tmp_path, found) == ddp_path(tmp_path) == tmp_path / "machine" / "ddp.json"
    assert read_ddp(tmp_path) == found
    ddp_path(tmp_path).write_text("{", encoding="utf-8")
    assert read_ddp(tmp_path) is None


def test_bandwidth_is_the_largest_transfers_and_latency_the_smallests(reference: Plan) -> None:
    fabric = measured(reference, "24m").fabric
    assert fabric.bytes_per_s == pytest.approx(4e9, rel=1e-3)
    assert fabric.latency_s == pytest.approx(2e-5, rel=0.02)
    assert "4 GB/s" in fabric.basis


def test_efficiency_is_the_measured_one_where_there_is_one(reference: Plan, two_4080: Box) -> None:
    found = measured(reference, "24m")
    by_name = {r.name: r for r in reference.rungs}
    efficiency, basis = efficiency_of(found, by_name["24m"], two_4080)
    assert efficiency == pytest.approx(0.020 / (2 * 0.014)) and basis.startswith("measured by `homelab ddp`")
    other, basis = efficiency_of(found, by_name["51m"], two_4080)
    assert "rung 24m" in basis and "4 GB/s" in basis and 0.3 < other < 1
    assumed, basis = efficiency_of(None, by_name["51m"], two_4080)
    assert "assumed 8 GB/s" in basis and assumed > other
    elsewhere, basis = efficiency_of(replace(found, device="RTX 3090"), by_name["24m"], two_4080)
    assert "assumed" in basis and elsewhere != efficiency


def test_the_model_agrees_with_the_plan_before_anything_is_measured(reference: Plan, two_4080: Box) -> None:
    for rung in reference.rungs:
        efficiency, _ = efficiency_of(None, rung, two_4080)
        params, tokens = rung.size.params, rung.training.batch_tokens // 2
        peak = (
            97.5e12 * cost.GPU_MFU_WIDE * rung.size.shape.d_model / (rung.size.shape.d_model + cost.GPU_MFU_HALF_WIDTH)
        )
        compute_s = tokens * rung.size.flops_per_token.causal_padded / peak
        late_s = 4 * (params.n_embed + params.n_padding) / ASSUMED_FABRIC.bytes_per_s
        assert efficiency == pytest.approx(compute_s / (compute_s + late_s), abs=0.02)


def test_a_batch_from_which_it_pays_is_where_the_exchange_is_paid_for(reference: Plan, two_4080: Box) -> None:
    rung = next(r for r in reference.rungs if r.name == "24m")
    share = rung.training.batch_tokens // 2
    found = pays_from(measured(reference, "24m"), rung, 2, box=two_4080)
    # 4 ms of exchange: as long as 0.4 of this share computes, so that is where two cards draw level with one.
    assert found.at_all_tokens == pytest.approx(0.4 * share, rel=0.06)
    # 90 % of two runs: exchange is a ninth of computing.
    assert found.well_tokens == pytest.approx(9 * 0.4 * share, rel=0.02)


def test_the_plan_takes_measured_times_and_else_the_measured_bandwidth(reference: Plan, two_4080: Box) -> None:
    ladder, path = read_ladder("gpt2_5m_120m")
    found = measured(reference, "24m", exposed_s=0.004)
    plan = plan_ladder(ladder, None, two_4080, folder=path.parent, ddp=found)
    rates = {r.name: r.bill.rate for r in plan.rungs}
    rung = next(r for r in plan.rungs if r.name == "24m")
    assert rates["24m"].tokens_per_s == pytest.approx(rung.training.batch_tokens / 0.014)
    assert "measured by `homelab ddp`" in rates["24m"].basis
    assert "measured 4 GB/s" in rates["51m"].basis
    before = {r.name: r.bill.rate for r in reference.rungs}
    assert rates["51m"].tokens_per_s < before["51m"].tokens_per_s
    foreign = plan_ladder(ladder, None, two_4080, folder=path.parent, ddp=replace(found, device="cpu"))
    assert {r.name: r.bill.rate for r in foreign.rungs} == before


def test_a_ladders_advice_splits_what_finishes_it_earlier(reference: Plan, two_4080: Box) -> None:
    free = advise_ladder(None, reference, 2, box=two_4080)
    assert {r.advice for r in free.rungs} <= {"one GPU", "DDP", "two independent runs"}
    assert free.rungs[-1].advice == "DDP"  # the largest rung is most of the work
    slow = advise_ladder(measured(reference, "124m", exposed_s=10.0), reference, 2, box=two_4080)
    assert all(r.advice != "DDP" for r in slow.rungs) and slow.mix.n_ddp == 0
    assert "independent runs on 2 cards" in slow.words
    codec.dumps(slow)


def test_without_a_gpu_ranks_share_what_one_process_has(make_corpus: Callable[..., object], cpu: Box) -> None:
    ladder, path = read_ladder("quickstart")
    plan = plan_ladder(ladder, None, cpu, folder=path.parent)
    assert efficiency_of(None, plan.rungs[0], cpu)[0] == pytest.approx(0.5)
