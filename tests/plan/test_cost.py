"""Time, energy and money: what is measured wins, what is assumed is plausible, what is unknown says why."""

import dataclasses
from pathlib import Path

import pytest

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.plan import cost
from homelab_scaling.plan.cost import MeasuredRate, predict_power, predict_rate, usd_of
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.runs import Machine, Row, RunFolder, RunRecord
from homelab_scaling.specs import ModelShape, Money, RunSpec

SMALL = ModelShape(n_layer=12, d_model=768, n_head=12, context_tokens=1024)


def _rate(box: Box, shape: ModelShape = SMALL, **changes: object) -> cost.Rate | None:
    usual = {"n_processes": 1, "microbatch_seqs": 16, "accumulation_steps": 1, "precision": "bf16"}
    return predict_rate(shape, 50_257, box=box, **{**usual, **changes})


# The quickstart's rungs on two idle cores, 2026-11-22: layers, width, heads and tokens/s (recipes/LOG.md), batches of
# 8 x 128 tokens of a 2,048-token vocabulary.
MEASURED = [(2, 20, 2, 110_000), (2, 36, 2, 88_000), (2, 64, 2, 60_000), (3, 88, 4, 33_500), (3, 128, 4, 24_800)]


@pytest.mark.parametrize(("n_layer", "d_model", "n_head", "speed"), MEASURED)
def test_the_cpu_model_gives_the_measured_speeds(
    cpu: Box, n_layer: int, d_model: int, n_head: int, speed: float
) -> None:
    shape = ModelShape(n_layer=n_layer, d_model=d_model, n_head=n_head, context_tokens=128)
    rate = predict_rate(shape, 2048, box=cpu, n_processes=1, microbatch_seqs=8, accumulation_steps=1, precision="fp32")
    assert rate is not None
    assert rate.tokens_per_s == pytest.approx(speed, rel=0.2)


def test_a_4090_comes_near_the_known_speed_of_a_124m_model() -> None:
    rate = _rate(box_with("RTX 4090", 1))
    assert rate is not None
    assert rate.tokens_per_s == pytest.approx(106_000, rel=0.35), "nanoGPT, compiled"
    assert rate.basis.startswith("assumed")


def test_a_launch_floor_bounds_tiny_micro_batches() -> None:
    tiny = ModelShape(n_layer=4, d_model=64, n_head=2, context_tokens=128)
    box = box_with("RTX 4080", 1)
    one, two = _rate(box, tiny, microbatch_seqs=1), _rate(box, tiny, microbatch_seqs=2)
    assert one is not None and two is not None
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s), (
        "a launch-bound step takes as long with twice as much"
    )


@pytest.mark.parametrize("device", ["RTX 4090", "cpu"])
def test_recomputed_blocks_cost_a_third_of_the_blocks(cpu: Box, device: str) -> None:
    box = cpu if device == "cpu" else box_with(device, 1)
    once, again = _rate(box), _rate(box, activation_checkpointing=True)
    assert once is not None and again is not None
    blocks = 1 - 6 * 50_304 * 768 / cost.asked_flops_per_token(SMALL, 50_257)
    assert 0.65 < blocks < 0.75, "of a 124M model's FLOPs"
    slower = once.tokens_per_s / again.tokens_per_s
    assert slower == pytest.approx(1 + blocks / 3, abs=1e-6 if device != "cpu" else 0.02)


def test_shards_travel_in_every_pass_and_full_ones_half_as_often_again() -> None:
    """At 8 x 1024 tokens a pass between cards at 8 GB/s, where little of it hides."""
    box = box_with("RTX 4080", 2)
    step = {"n_processes": 2, "microbatch_seqs": 8, "accumulation_steps": 4}
    found = [_rate(box, **step, sharding=kind) for kind in ("none", "grad-op", "full")]
    ddp, grad_op, full = (rate.tokens_per_s for rate in found if rate)
    assert ddp > grad_op > full
    alone = _rate(box, n_processes=1, microbatch_seqs=8, accumulation_steps=4, sharding="full")
    assert alone == _rate(box, n_processes=1, microbatch_seqs=8, accumulation_steps=4)


def test_a_speed_measured_without_recomputing_is_not_taken_for_one_with_it(cpu: Box) -> None:
    seen = MeasuredRate(
        shape=SMALL, n_vocab=50_257, device="cpu (x)", n_processes=1, precision="bf16", tokens_per_s=123.0
    )
    found = _rate(cpu, measured=[seen]), _rate(cpu, measured=[seen], activation_checkpointing=True)
    assert [rate.tokens_per_s == 123.0 for rate in found if rate] == [True, False]


def test_two_cards_pay_more_the_larger_the_batch() -> None:
    box = box_with("RTX 4080", 2)

    def efficiency(seqs: int) -> float:
        alone, both = _rate(box, microbatch_seqs=seqs), _rate(box, microbatch_seqs=seqs, n_processes=2)
        assert alone is not None and both is not None
        return both.tokens_per_s / (2 * alone.tokens_per_s)

    assert 0.5 < efficiency(8) < efficiency(32) < efficiency(128) < 1


def test_no_rate_where_nothing_is_known() -> None:
    assert _rate(dataclasses.replace(box_with("RTX 4080", 1), device="Radeon")) is None
    assert _rate(box_with("RTX 4080", 1), precision="fp32") is None
    assert "not in the table" in cost.why_no_rate(dataclasses.replace(box_with("RTX 4080", 1), device="Radeon"), "bf16")
    assert "fp32" in cost.why_no_rate(box_with("RTX 4080", 1), "fp32")


def test_a_measured_speed_replaces_the_assumption_only_where_everything_matches() -> None:
    box = box_with("RTX 4080", 1)
    seen = MeasuredRate(
        shape=SMALL, n_vocab=50_257, device="RTX 4080", n_processes=1, precision="bf16", tokens_per_s=70_000.0
    )
    faster = dataclasses.replace(seen, tokens_per_s=80_000.0)
    rate = _rate(box, measured=(seen, faster, faster))
    assert rate is not None
    assert (rate.tokens_per_s, rate.basis) == (80_000.0, "measured on this box (3 rows)")
    for other in ({"device": "RTX 3090"}, {"n_vocab": 2048}, {"n_processes": 2}, {"precision": "fp32"}):
        rate = _rate(box, measured=(dataclasses.replace(seen, **other),))
        assert rate is not None
        assert rate.basis.startswith("assumed"), other


def _finished(spec: RunSpec, tokens_per_s: float | None) -> RunRecord:
    row = Row(
        row_id=f"{spec.run_id}@1", run_id=spec.run_id, rung=spec.rung, seed=0, n_params=1, n_tokens=1, loss_nats=4.0,
        loss_se_nats=None, bpb=None, flops=1.0, flops_marginal=1.0, n_body=1, n_pos=1, n_embed=1, n_head=1, n_steps=1,
        batch_tokens=1, lr_peak=1e-3, schedule="wsd", decayed=True, optimizer="adamw", precision="fp32", data_id="x",
        n_tokens_unique=1, seconds=None, seconds_marginal=None, tokens_per_s=tokens_per_s, mfu_frac=None,
    )  # fmt: skip
    machine = Machine(
        device="cpu (some CPU, 2 threads)", n_processes=1, torch="2", accelerate="1", transformers="5", python="3.11",
        homelab_scaling="0",
    )  # fmt: skip
    return RunRecord(
        run_id=spec.run_id, ladder=spec.ladder, rung=spec.rung, status="finished", reason=None,
        science_hash=spec.science.hash, rows=(row,), machine=machine,
    )  # fmt: skip


def test_records_of_a_lab_feed_the_next_plan(lab: Path, cpu: Box, make_corpus: object) -> None:
    ladder, _ = read_ladder("quickstart")
    corpus = make_corpus()
    first = plan_ladder(ladder, corpus, cpu)
    assert first.rungs[0].bill.rate is not None
    assert first.rungs[0].bill.rate.basis.startswith("assumed")
    for spec, speed in zip(first.runs[:2], (12_345.0, None), strict=True):
        folder = RunFolder(lab / ladder.name / "runs" / spec.run_id)
        codec.write_json(folder.spec, spec)
        codec.write_json(folder.record, _finished(spec, speed))
    (lab / ladder.name / "runs" / "torn").mkdir()
    (lab / ladder.name / "runs" / "torn" / "record.json").write_text("{", encoding="utf-8")
    rates = cost.measured_rates([lab / ladder.name, lab / "no-such-lab"])
    again = plan_ladder(ladder, corpus, cpu, measured=rates)
    assert again.rungs[0].bill.rate == cost.Rate(tokens_per_s=12_345.0, basis="measured on this box (1 row)")
    assert again.rungs[1].bill.rate == first.rungs[1].bill.rate, "a row without a speed teaches nothing"
    assert again.runs[0].run_id == first.runs[0].run_id, "a speed is no science"


def test_energy_needs_stated_watts(cpu: Box) -> None:
    assert predict_power(cpu, 1, None) is None
    assert "--watts" in cost.why_no_power(cpu)
    stated = predict_power(cpu, 1, 60.0)
    assert stated is not None
    assert cost.kwh_of(3600, stated) == pytest.approx(0.06)
    rated = predict_power(box_with("RTX 4080", 2), 2, None)
    assert rated is not None
    assert (rated.watts, "rated" in rated.basis) == (640.0, True)


def test_measured_watts_beat_stated_ones_and_both_beat_the_rating(cpu: Box) -> None:
    box = box_with("RTX 4080", 2)
    seen = MeasuredRate(
        shape=SMALL, n_vocab=50_257, device="RTX 4080", n_processes=2, precision="bf16", tokens_per_s=1.0, watts=500.0,
        watts_err_frac=0.15,
    )  # fmt: skip
    other = dataclasses.replace(seen, shape=dataclasses.replace(SMALL, n_layer=7), watts=300.0)
    stated = Money(watts=444.0)
    power = predict_power(box, 2, None, shape=SMALL, measured=(seen, other), money=stated)
    assert power is not None and power.watts == 500
    assert power.basis == "measured on this box (1 row), at the wall plug, within 15%"
    larger = dataclasses.replace(SMALL, n_layer=9)
    near = predict_power(box, 2, None, shape=larger, measured=(seen, other), money=stated)
    assert near is not None and near.watts == 400, "the nearest there is: other sizes on the same cards"
    flag = predict_power(box, 2, 60.0, shape=SMALL, measured=(seen,), money=stated)
    assert flag is not None and flag.watts == 60, "who states it for this plan is believed"
    for nothing in ({"watts": None}, {"n_processes": 1}, {"device": "RTX 3090"}):
        power = predict_power(box, 2, None, shape=SMALL, measured=(dataclasses.replace(seen, **nothing),), money=stated)
        assert power is not None and (power.watts, "[money]" in power.basis) == (444, True), nothing
    assert predict_power(cpu, 1, None, money=Money()) is None


def test_a_plan_prices_energy_and_machine_time_apart(cpu: Box) -> None:
    ladder, _ = read_ladder("quickstart")
    money = Money(usd_per_kwh=0.5, usd_per_machine_hour=2.0, watts=100.0)
    plan = plan_ladder(dataclasses.replace(ladder, money=money), None, cpu)
    t = plan.totals
    assert t.seconds is not None and t.kwh == pytest.approx(100 * t.seconds / 3.6e6)
    assert t.usd_energy == pytest.approx(0.5 * t.kwh) and t.usd_machine == pytest.approx(2 * t.seconds / 3600)
    assert t.usd == pytest.approx(t.usd_energy + t.usd_machine) and "[money]" in plan.energy_basis


def test_a_row_tells_the_watts_of_its_run_unless_they_were_only_stated(
    lab: Path, cpu: Box, make_corpus: object
) -> None:
    ladder, _ = read_ladder("quickstart")
    first = plan_ladder(ladder, make_corpus(), cpu)
    for spec, source in zip(first.runs[:2], ("counter", "stated watts"), strict=True):
        folder = RunFolder(lab / ladder.name / "runs" / spec.run_id)
        codec.write_json(folder.spec, spec)
        record = _finished(spec, 1000.0)
        row = dataclasses.replace(record.rows[0], seconds=3600.0, kwh_wall=0.2, kwh_from=source, kwh_wall_err_frac=0.15)
        codec.write_json(folder.record, dataclasses.replace(record, rows=(row,)))
    rates = cost.measured_rates([lab / ladder.name])
    assert sorted(r.watts or 0 for r in rates) == [0, pytest.approx(200.0)]
    again = plan_ladder(ladder, make_corpus(), cpu, measured=rates)
    assert "measured on this box (1 row)" in again.energy_basis and again.totals.kwh is not None


def test_money_counts_what_is_priced() -> None:
    both = Money(usd_per_kwh=0.5, usd_per_machine_hour=2.0)
    assert usd_of(1800, 3.0, both) == pytest.approx(1.5 + 1.0)
    assert usd_of(1800, None, both) == pytest.approx(1.0)
    assert usd_of(1800, None, Money(usd_per_kwh=0.5)) is None
    assert usd_of(1800, 3.0, Money()) is None
    assert usd_of(None, None, both) is None
