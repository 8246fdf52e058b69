"""From a measured noise scale to a batch, its split, its rate and its bill, and into the plan."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.batch import advice, table
from homelab_scaling.batch.calibration import calibrate
from homelab_scaling.batch.critical import Estimate, fit_trade_off
from homelab_scaling.batch.forecast import Known, forecast
from homelab_scaling.box import Box
from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.ladder import BatchTable, Horizons, Ladder, LrTable, Rung, TrainTable
from homelab_scaling.plan import memory, rules
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.specs import CorpusManifest, Money, ShardFile, Split

CPU = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=True)
TWO_4080 = box_with("RTX 4080", 2)
RUNGS = (
    Rung(name="a", n_layer=2, d_model=64, n_head=2),
    Rung(name="b", n_layer=4, d_model=128, n_head=4),
    Rung(name="c", n_layer=6, d_model=256, n_head=4),
)


def corpus(text: str = "one") -> CorpusManifest:
    def split(name: str, n: int) -> Split:
        file = ShardFile(name=f"{name}.bin", n_tokens=n, sha256=f"{text}-{name}")
        return Split(files=(file,), n_tokens=n, n_bytes=4 * n, n_documents=1000)

    return CorpusManifest(
        tokenizer="bpe:2048",
        tokenizer_file="tokenizer.json",
        tokenizer_hash="a" * 64,
        n_vocab=2048,
        eot_id=0,
        dtype="uint16",
        train=split("train", 10**11),
        val=split("val", 10**7),
        sources=("python",),
        held_out_rule="by content hash",
    )


def make_ladder(**changes: object) -> Ladder:
    plain = Ladder(
        name="t",
        rungs=RUNGS,
        context_tokens=128,
        horizons=Horizons(tokens=(10_000_000, 40_000_000)),
        money=Money(usd_per_kwh=0.2, usd_per_machine_hour=0.05, watts=500.0),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def make_settings(ladder: Ladder | None = None, box: Box = CPU, **extra: object) -> list[table.Setting]:
    ladder = ladder or make_ladder()
    plan = plan_ladder(ladder, corpus(), box)
    return [
        table.Setting(rung=rung, n_vocab=plan.n_vocab, box=box, ladder=ladder, **extra)  # type: ignore[arg-type]
        for rung in plan.rungs
    ]


def simple(tokens: float, factor: float = 1.2) -> advice.Measured:
    return advice.Measured(
        b_simple=Estimate(value=tokens, low=tokens / factor, high=tokens * factor), why_no_number=None, loss_nats=4.5
    )


def advised(measured: dict[str, advice.Measured], **more: object) -> advice.BatchAdvice:
    given_settings = more.pop("settings", None) or make_settings()
    return advice.advise(given_settings, measured, ladder="t", data_id=corpus().data_id, **more)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the table


def test_a_row_keeps_the_hyperbola_and_its_bill() -> None:
    (setting, *_rest) = make_settings(watts=None)
    for row in table.trade_off_table(setting, 20_000):
        assert row.batch_tokens == row.batch_seqs * 128
        assert row.batch_seqs == row.n_processes * row.microbatch_seqs_per_rank * row.accumulation_steps
        assert row.tokens == pytest.approx(40_000_000 * (1 + row.batch_tokens / 20_000), rel=1e-3)
        assert row.n_steps * row.batch_tokens == pytest.approx(row.tokens)
        assert row.seconds == pytest.approx(row.tokens / (row.tokens_per_s or 0))
        assert row.kwh == pytest.approx(500 * row.seconds / 3.6e6)
        assert row.usd == pytest.approx(0.2 * row.kwh + 0.05 * row.seconds / 3600)


def test_every_row_fits_the_card_and_uses_both() -> None:
    ladder = make_ladder(
        context_tokens=1024,
        rungs=(Rung(name="big", n_layer=12, d_model=768, n_head=12),),
        horizons=Horizons(tokens=(2_400_000_000,)),
    )
    (setting,) = make_settings(ladder, TWO_4080)
    rows = table.trade_off_table(setting, 500_000)
    for row in rows:
        need = memory.predict_vram(
            setting.shape,
            2048,
            optimizer="adamw",
            microbatch_seqs=row.microbatch_seqs_per_rank,
            n_processes=row.n_processes,
            precision="bf16",
            loss_path=memory.choose_loss_path(row.microbatch_seqs_per_rank * 1024, 2048, on_gpu=True),
            accumulates=row.accumulation_steps > 1,
        )
        assert need.total_bytes <= memory.CARD_SHARE * (TWO_4080.vram_bytes or 0)
        assert row.n_processes == (2 if row.batch_seqs % 2 == 0 else 1)
    assert any(row.accumulation_steps > 1 for row in rows)


def test_a_card_too_small_is_said_in_a_sentence() -> None:
    ladder = make_ladder(context_tokens=4096, rungs=(Rung(name="big", n_layer=48, d_model=1600, n_head=25),))
    (setting,) = make_settings(ladder, box_with("RTX 3080", 1))
    with pytest.raises(SpecError, match="not even one sequence of 4096 tokens fits"):
        table.trade_off_table(setting, 500_000)


def rate_at(seqs: int, tokens_per_s: float, setting: table.Setting) -> table.BatchRate:
    return table.BatchRate(
        shape=setting.shape,
        n_vocab=setting.n_vocab,
        precision="fp32",
        device="cpu (some model, 2 threads)",
        n_processes=1,
        batch_seqs=seqs,
        microbatch_seqs=seqs,
        tokens_per_s=tokens_per_s,
    )


def test_measured_speeds_come_before_the_model() -> None:
    (setting, *_rest) = make_settings()
    assert table.rate_of(setting, 1, 8, 1)[1].startswith("assumed")
    measured = replace(setting, rates=[rate_at(8, 1234.0, setting)])
    assert table.rate_of(measured, 1, 8, 1) == (1234.0, "measured (1)")
    model_8, model_16 = table.rate_of(setting, 1, 8, 1)[0], table.rate_of(setting, 1, 16, 1)[0]
    scaled, basis = table.rate_of(measured, 1, 16, 1)
    assert basis == "model scaled to 1 measured"
    assert scaled == pytest.approx(1234.0 * model_16 / model_8)


def row_of(batch: int, overhead: float, seconds: float | None) -> table.Row:
    return table.Row(
        batch_tokens=batch,
        batch_seqs=batch,
        n_processes=1,
        microbatch_seqs_per_rank=1,
        accumulation_steps=1,
        n_steps=1.0,
        tokens=1.0,
        overhead_frac=overhead,
        tokens_per_s=None if seconds is None else 1 / seconds,
        rate_basis="",
        seconds=seconds,
        kwh=None,
        usd=None,
    )


def test_the_largest_batch_within_the_overhead_is_taken_while_it_saves_time() -> None:
    faster = [row_of(1, 0.05, 100), row_of(2, 0.10, 60), row_of(4, 0.20, 40), row_of(8, 0.40, 20)]
    choice = table.choose_row(faster)
    assert choice.row.batch_tokens == 4 and "8 tokens would cost 40%" in choice.why
    saturated = [row_of(1, 0.05, 100), row_of(2, 0.10, 60), row_of(4, 0.20, 59.5), row_of(8, 0.40, 70)]
    choice = table.choose_row(saturated)
    assert choice.row.batch_tokens == 2 and "saves only 0.8% of the time" in choice.why
    worse = [row_of(1, 0.05, 50), row_of(2, 0.10, 55), row_of(4, 0.20, 60)]
    assert table.choose_row(worse).row.batch_tokens == 1
    assert "takes 20.0% more time" in table.choose_row(worse).why


def test_small_savings_add_up() -> None:
    rows = [row_of(2**k, 0.01 * 2**k / 2, 100 * 0.985**k) for k in range(5)]
    assert table.choose_row(rows).row.batch_tokens == 16


def test_without_a_speed_the_overhead_alone_decides() -> None:
    choice = table.choose_row([row_of(1, 0.05, None), row_of(2, 0.19, None), row_of(4, 0.4, None)])
    assert choice.row.batch_tokens == 2 and "no speed is known" in choice.why


def test_a_tuned_rate_is_left_for_a_smaller_batch_only_where_b_crit_is_known_well_enough() -> None:
    rows = [row_of(128, 0.09, 44), row_of(256, 0.18, 28), row_of(1024, 0.7, 22)]
    stays = table.choose_row(rows, tuned_tokens=1024, tuned_least_frac=0.1)
    assert stays.row.batch_tokens == 1024 and "70% more tokens" in stays.why and "10% by the upper end" in stays.why
    assert table.choose_row(rows, tuned_tokens=1024, tuned_least_frac=0.3).row.batch_tokens == 256
    assert table.choose_row(rows).row.batch_tokens == 256


def test_advice_reads_the_upper_end_of_the_interval() -> None:
    ladder = make_ladder(lr=LrTable(at_batch_tokens=4096))

    def batch_of(factor: float) -> int:
        return advised({"a": simple(4_000, factor)}, settings=make_settings(ladder)).rungs[0].batch_tokens

    assert batch_of(100) == 4096, "B_crit may be 400,000"
    assert batch_of(1.2) < 1024


def test_a_batch_that_cannot_be_small_enough_is_said() -> None:
    choice = table.choose_row([row_of(128, 0.5, 10), row_of(256, 1.0, 5)])
    assert choice.row.batch_tokens == 128 and "50% more tokens" in choice.why


# ------------------------------------------------------------------------------------------------- rate and beta2


def test_the_rate_rises_with_the_root_and_is_flat_beyond() -> None:
    assert advice.lr_scale(4096, 1024, 1e6) == pytest.approx(2)
    assert advice.lr_scale(256, 1024, 1e6) == pytest.approx(0.5)
    assert advice.lr_scale(64_000, 1024, 4096) == pytest.approx(2)
    assert advice.lr_scale(64_000, 32_000, 4096) == 1


def test_beta2_forgets_after_as_many_tokens() -> None:
    assert advice.rescaled_beta2(0.95, 512, 1024) == pytest.approx(math.sqrt(0.95))
    assert advice.rescaled_beta2(0.95, 2048, 1024) == pytest.approx(0.9025)


# ----------------------------------------------------------------------------------------------------- forecasting


def test_one_rung_is_enough_for_a_guess_and_three_make_it_narrower() -> None:
    known = [Known(n_params=n, n_tokens=20 * n, b_crit_tokens=1e4 * (n / 1e6) ** 0.47, sd_log=0.1) for n in (1e6, 4e6)]
    one = forecast(known[:1], n_params=16e6, n_tokens=320e6)
    two = forecast(known, n_params=16e6, n_tokens=320e6)
    assert one.of == "D" and one.n_known == 1
    assert one.b_crit.value == pytest.approx(1e4 * 16**0.47, rel=1e-6)
    assert two.b_crit.value == pytest.approx(1e4 * 16**0.47, rel=1e-6)
    assert two.b_crit.high / two.b_crit.low < one.b_crit.high / one.b_crit.low
    further = forecast(known, n_params=64e6, n_tokens=1280e6)
    assert further.b_crit.high / further.b_crit.low > two.b_crit.high / two.b_crit.low


def test_rungs_with_equal_tokens_are_lined_up_by_size() -> None:
    known = [Known(n_params=n, n_tokens=1e6, b_crit_tokens=100.0, sd_log=0.1) for n in (1e5, 2e5)]
    assert forecast(known, n_params=4e5, n_tokens=1e6).of == "N"


def test_measurements_outweigh_what_was_published() -> None:
    known = [
        Known(n_params=n, n_tokens=20 * n, b_crit_tokens=1e3 * (n / 1e6) ** 1.0, sd_log=0.05)
        for n in (1e6, 4e6, 16e6, 64e6)
    ]
    assert forecast(known, n_params=256e6, n_tokens=20 * 256e6).exponent.value == pytest.approx(1.0, abs=0.1)


def test_the_forecasts_interval_holds_the_next_rung_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(500):
        slope = rng.normal(0.47, 0.20)
        sizes = np.array([1e6, 2e6, 4e6, 16e6])
        truth = 1e4 * (sizes / 1e6) ** slope * np.exp(rng.normal(0, 0.25, 4))
        seen = truth[:3] * np.exp(rng.normal(0, 0.1, 3))
        known = [
            Known(n_params=n, n_tokens=20 * n, b_crit_tokens=b, sd_log=0.1)
            for n, b in zip(sizes[:3], seen, strict=True)
        ]
        found = forecast(known, n_params=16e6, n_tokens=320e6).b_crit
        held += found.low <= truth[3] <= found.high
    assert 0.92 <= held / 500 <= 0.98


# --------------------------------------------------------------------------------------------------------- a ladder


def test_measured_rungs_are_advised_and_the_others_foretold() -> None:
    found = advised({"a": simple(8_000), "b": simple(12_000)})
    assert [r.basis for r in found.rungs] == ["measured", "measured", "forecast"]
    assert found.calibration.method == "uncalibrated" and found.calibration.c == 1
    a, _b, c = found.rungs
    assert a.b_crit.value == pytest.approx(8_000)
    assert c.forecast is not None and c.forecast.n_known == 2 and c.b_crit == c.forecast.b_crit
    assert c.b_crit.low < c.b_crit.value < c.b_crit.high
    for rung in found.rungs:
        chosen = next(r for r in rung.rows if r.batch_tokens == rung.batch_tokens)
        assert chosen.overhead_frac <= 0.2
        assert rung.n_processes * rung.microbatch_seqs_per_rank * rung.accumulation_steps == chosen.batch_seqs
    assert found.law is None and found.why_no_law is not None


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.floats(200, 1e6), st.sampled_from([CPU, TWO_4080]))
def test_the_overhead_is_kept_wherever_it_can_be(b_simple: float, box: Box) -> None:
    found = advised({"a": simple(b_simple)}, settings=make_settings(box=box))
    rung = found.rungs[0]
    row = next(r for r in rung.rows if r.batch_tokens == rung.batch_tokens)
    assert row.overhead_frac <= 0.2 or row == rung.rows[0]


def test_a_measurement_revises_the_forecast_and_is_held_against_it() -> None:
    before = advised({"a": simple(8_000), "b": simple(12_000)})
    after = advised({"a": simple(8_000), "b": simple(12_000), "c": simple(14_000)}, previous=before)
    c = after.rung("c")
    assert c is not None and c.basis == "measured" and c.b_crit.value == pytest.approx(14_000)
    assert c.forecast == before.rungs[2].forecast
    assert c.surprise is not None and "inside the" in c.surprise
    wild = advised({"a": simple(8_000), "b": simple(12_000), "c": simple(900_000)}, previous=before).rung("c")
    assert wild is not None and wild.surprise is not None and "outside the" in wild.surprise


def test_three_measured_rungs_give_a_law(tmp_path: Path) -> None:
    losses = {"a": 5.0, "b": 4.5, "c": 4.0}
    measured = {name: replace(simple(1e8 * loss**-4.8), loss_nats=loss) for name, loss in losses.items()}
    found = advised(measured)
    advice.write_advice(tmp_path, found)
    assert advice.read_advice(tmp_path) == found
    law = found.law
    assert law is not None and law.of == "L"
    assert law.exponent.value == pytest.approx(-4.8, abs=0.01)


def test_a_rung_that_has_begun_keeps_its_batch() -> None:
    before = advised({"a": simple(8_000)})
    after = advised({"a": simple(80_000)}, previous=before, begun=frozenset({"a"}))
    assert after.rungs[0] == replace(before.rungs[0], measured=simple(80_000)), "what is known now, and what was taken"
    assert after.rungs[1].b_crit.value > 5 * before.rungs[1].b_crit.value


def test_a_sweep_calibrates_every_rung() -> None:
    batches = [256.0, 512, 1024, 2048, 4096]
    sweep = fit_trade_off(
        batches, [200 * (1 + 1650 / b) * w for b, w in zip(batches, (1, 1.02, 0.98, 1, 1), strict=True)]
    )
    c = calibrate(sweep, Estimate(value=3300, low=3000, high=3600), "a")
    assert c.c == pytest.approx(0.5, rel=0.1) and c.method == "sweep" and c.sd_log is not None
    found = advised({"a": simple(8_000)}, calibration=c)
    assert found.rungs[0].b_crit.value == pytest.approx(8_000 * c.c)
    plain = advised({"a": simple(8_000)}).rungs[0].b_crit
    assert found.rungs[0].b_crit.high / found.rungs[0].b_crit.low > plain.high / plain.low
    assert found.rungs[2].b_crit.value == pytest.approx(advised({"a": simple(8_000)}).rungs[2].b_crit.value * c.c)


def test_nothing_measured_is_no_advice() -> None:
    nothing = advice.Measured(b_simple=None, why_no_number="at least 9,000 tokens in 5 steps", loss_nats=None)
    with pytest.raises(DataError, match=r"a: at least 9,000 tokens in 5 steps"):
        advised({"a": nothing})
    assert advised({"a": nothing, "b": simple(9_000)}).rungs[0].basis == "forecast"


def test_advice_survives_its_file(tmp_path: Path) -> None:
    found = advised({"a": simple(8_000), "b": simple(9_000)}, rescale_beta2=True)
    advice.write_advice(tmp_path, found)
    assert codec.to_plain(advice.read_advice(tmp_path)) == codec.to_plain(found)
    assert advice.read_advice(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(("seconds", "taken"), [((30.0, 24.0, 22.0), 1024), ((30.0, 24.0, 20.0), 2048)])
def test_the_batch_of_a_tuned_rate_is_left_only_for_a_real_gain(seconds: tuple[float, ...], taken: int) -> None:
    (setting, *_rest) = make_settings()
    rows = [
        replace(table.row_at(setting, b, 20_000), seconds=s) for b, s in zip((512, 1024, 2048), seconds, strict=True)
    ]
    found = table.choose_row(rows, 0.2, tuned_tokens=1024)
    assert found.row.batch_tokens == taken
    assert ("the rate was tuned at it; 2,048 tokens (10%) would save 8% of the time" in found.why) == (taken == 1024)
    assert table.choose_row(rows, 0.2).row.batch_tokens == 2048
    assert table.choose_row(rows, 0.04, tuned_tokens=1024).row.batch_tokens == 512, "above the overhead it is no choice"


def test_the_shortest_horizon_bounds_the_batch() -> None:
    one = {"a": simple(200_000)}
    plain, short = (
        advised(one, settings=make_settings(make_ladder(horizons=Horizons(tokens=tokens)))).rungs[0]
        for tokens in ((40_000_000,), (1_000_000, 40_000_000))
    )
    assert short.batch_tokens <= 1_000_000 // table.SHORTEST_STEPS < plain.batch_tokens
    assert "fewer than 500 steps" in short.why and "fewer than 500 steps" not in plain.why


def test_the_base_of_the_rate_is_what_the_ladder_says_first() -> None:
    for lr, batch, base in (
        (LrTable(at_batch_tokens=512), BatchTable(tokens=4096), 512),
        (LrTable(), BatchTable(tokens=4096), 4096),
        (LrTable(), BatchTable(), rules.step_law_batch(40_000_000)),
    ):
        (setting, *_rest) = make_settings(make_ladder(lr=lr, batch=batch))
        assert advice.base_batch(setting) == pytest.approx(base, rel=0.01)


@pytest.mark.parametrize(
    ("at", "batch", "source", "scale"),
    [(1024, 1024, "[lr]", 1.0), (None, 12288, "Step Law", 1.0), (49152, 12288, "Step Law", 0.5)],
)
def test_without_a_measurement_the_rate_goes_down_with_the_batch_and_never_up(
    at: int | None, batch: int, source: str, scale: float
) -> None:
    training = plan_ladder(make_ladder(lr=LrTable(at_batch_tokens=at)), corpus(), CPU).rungs[0].training
    plain = plan_ladder(make_ladder(), corpus(), CPU).rungs[0].training
    assert training.batch_tokens == pytest.approx(batch, rel=0.05) and training.batch_source == source
    assert training.lr_peak / plain.lr_peak == pytest.approx(scale, rel=0.03)


# ------------------------------------------------------------------------------------------------------ in the plan


def plan_with(found: advice.BatchAdvice, folder: Path, ladder: Ladder | None = None, text: str = "one") -> Plan:
    advice.write_advice(folder, found)
    return plan_ladder(ladder or make_ladder(), corpus(text), CPU, advised=advice.advised_batches(folder))


def test_the_plan_takes_the_advice_where_the_ladder_gives_no_batch(tmp_path: Path) -> None:
    found = advised({"a": simple(8_000)})
    plan = plan_with(found, tmp_path)
    for rung, told in zip(plan.rungs, found.rungs, strict=True):
        assert rung.training.batch_tokens == told.batch_tokens
        assert rung.training.batch_source == told.basis
        assert rung.training.lr_peak == pytest.approx(told.lr_peak)
        assert rung.training.lr_source == told.lr_source == f"power -0.25 x {told.lr_scale:.2f}"
    runs = {run.rung: run.science for run in plan.runs}
    assert runs["a"].batch_tokens_global == found.rungs[0].batch_tokens
    assert runs["a"].schedule.lr_peak == pytest.approx(found.rungs[0].lr_peak)
    assert runs["a"].optim.beta2 == 0.95


def test_the_ladders_own_batch_wins(tmp_path: Path) -> None:
    found = advised({"a": simple(8_000)})
    plan = plan_with(found, tmp_path, make_ladder(batch=BatchTable(tokens=4096)))
    assert {(r.training.batch_tokens, r.training.batch_source) for r in plan.rungs} == {(4096, "ladder")}
    assert plan.rungs[0].training.lr_source == "power -0.25"


def test_a_rate_written_as_a_number_stays(tmp_path: Path) -> None:
    found = advised({"a": simple(8_000)})
    plan = plan_with(found, tmp_path, make_ladder(lr=LrTable(rule="fixed", peak=1e-3)))
    assert {(r.training.lr_peak, r.training.lr_source) for r in plan.rungs} == {(1e-3, "fixed")}


def test_beta2_is_taken_when_it_was_asked_for(tmp_path: Path) -> None:
    found = advised({"a": simple(8_000)}, rescale_beta2=True)
    science = {run.rung: run.science for run in plan_with(found, tmp_path).runs}["a"]
    base = rules.step_law_batch(40_000_000)
    assert science.optim.beta2 == pytest.approx(0.95 ** (found.rungs[0].batch_tokens / base), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "text", "said"), [({}, "two", "another text"), ({"tied": False}, "one", "another model")]
)
def test_advice_for_something_else_is_not_taken(
    tmp_path: Path, changes: dict[str, object], text: str, said: str
) -> None:
    plan = plan_with(advised({"a": simple(8_000)}), tmp_path, make_ladder(**changes), text)
    assert {r.training.batch_source for r in plan.rungs} == {"Step Law"}
    assert any(said in warning for warning in plan.warnings)


def test_steps_need_no_batch_once_one_is_measured(tmp_path: Path) -> None:
    found = advised({"a": simple(8_000)})
    by_steps = make_ladder(horizons=Horizons(steps=(500,)))
    with pytest.raises(SpecError, match=r"write batch\.tokens"):
        plan_ladder(by_steps, corpus(), CPU)
    plan = plan_with(found, tmp_path, by_steps)
    assert plan.rungs[0].training.horizons[0].tokens == 500 * found.rungs[0].batch_tokens


def test_a_fixed_micro_batch_is_kept_where_it_divides() -> None:
    (setting, *_rest) = make_settings(
        make_ladder(train=TrainTable(microbatch_seqs_per_rank=2), batch=BatchTable(tokens=1024))
    )
    assert table.split_batch(setting, 8) == (1, 2, 4)
