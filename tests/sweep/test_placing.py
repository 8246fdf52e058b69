"""How a run is placed on one GPU and on two, what fits no card, and which GPUs there are."""

import re
from dataclasses import replace

import pytest
from watched_lab import reference_plan

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Horizons, Ladder, Rung, TrainTable
from homelab_scaling.plan.cost import MeasuredRate
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.plan.rules import tokens_trained
from homelab_scaling.specs import Money, Optim
from homelab_scaling.sweep import where
from homelab_scaling.sweep.limits import Limits
from homelab_scaling.sweep.local import refuse_early
from homelab_scaling.sweep.placing import Placer, work_of
from homelab_scaling.sweep.relay import Relay
from homelab_scaling.watch.energy import WallModel
from homelab_scaling.watch.gpu import Card

PLAN = reference_plan()
BY_RUNG = {spec.rung: spec for spec in PLAN.runs}


def placer(**changes) -> Placer:
    return Placer(**{"box": PLAN.box, "n_slots": 2, "train": TrainTable(), **changes})


def test_a_run_is_split_over_one_gpu_and_over_two() -> None:
    spec = BY_RUNG["124m"]
    for width in (1, 2):
        execution = placer().timed(spec, width).execution
        assert execution.n_processes == width
        steps = execution.accumulation_steps(spec.science)
        assert steps * width * execution.microbatch_seqs_per_rank == spec.science.batch_seqs_global
    assert placer().placed(spec, 2).science == spec.science


def test_the_model_says_that_ddp_pays_more_for_large_models() -> None:
    jobs, unit = placer().jobs([(spec, 1.0) for spec in PLAN.runs])
    efficiency = {job.rung: job.seconds[1] / job.seconds[2] / 2 for job in jobs}
    assert unit == "s" and 0.5 < efficiency["5m"] < efficiency["24m"] < efficiency["124m"] < 1
    (half,), _ = placer().jobs([(BY_RUNG["24m"], 0.5)])
    assert half.seconds[1] == pytest.approx(next(j for j in jobs if j.rung == "24m").seconds[1] / 2)


def test_a_measured_speed_on_two_gpus_sets_the_one_on_one() -> None:
    """Else a card that is slower than assumed would look faster alone than two of it."""
    spec = BY_RUNG["124m"]
    model = {k: placer().rate(placer().placed(spec, k)).tokens_per_s for k in (1, 2)}
    seen = MeasuredRate(
        shape=spec.science.shape, n_vocab=spec.science.n_vocab, device=PLAN.box.device, n_processes=2,
        precision=spec.science.precision, tokens_per_s=model[2] / 3,
    )  # fmt: skip
    knowing = placer(measured=(seen,))
    assert knowing.rate(knowing.placed(spec, 2)).tokens_per_s == pytest.approx(model[2] / 3)
    alone = knowing.rate(knowing.placed(spec, 1))
    assert alone.tokens_per_s == pytest.approx(model[1] / 3) and "measured on 2 ranks" in alone.basis


def test_without_a_known_speed_jobs_are_measured_in_flops() -> None:
    unknown = placer(box=replace(PLAN.box, device="Some New Card"))
    jobs, unit = unknown.jobs([(spec, 1.0) for spec in PLAN.runs])
    assert unit == "FLOPs" and min(jobs, key=lambda j: j.seconds[1]).rung == "5m"


def test_ranks_that_were_asked_for_stay() -> None:
    assert placer(train=TrainTable(processes=1)).widths(BY_RUNG["5m"]) == (1,)
    with pytest.raises(SpecError, match="on 2 GPUs at once, and 1 can be had"):
        placer(train=TrainTable(processes=2), n_slots=1).jobs([(BY_RUNG["5m"], 1.0)])
    per_rank = BY_RUNG["5m"].science.batch_seqs_global // 2
    fixed = placer(train=TrainTable(microbatch_seqs_per_rank=per_rank))
    assert fixed.placed(BY_RUNG["5m"], 2).execution.microbatch_seqs_per_rank == per_rank
    assert placer(train=TrainTable(microbatch_seqs_per_rank=2 * per_rank)).placed(BY_RUNG["5m"], 2) is None
    own = placer(train=None)
    assert own.widths(BY_RUNG["5m"]) == (BY_RUNG["5m"].execution.n_processes,)
    assert own.placed(BY_RUNG["5m"], 2) is BY_RUNG["5m"]


def test_the_work_of_a_run_is_what_its_plan_says() -> None:
    for rung in PLAN.rungs:
        trained, validated = work_of(BY_RUNG[rung.name])
        assert trained == rung.launches[0].tokens_trained and validated >= len(rung.training.horizons) * PLAN.val_tokens
    science = BY_RUNG["5m"].science
    assert work_of(BY_RUNG["5m"])[0] == tokens_trained(
        science.horizons_tokens, science.batch_tokens_global, science.schedule.decay_frac
    )


# -------------------------------------------------------------------------------------------------- what fits no card


def ladder(rung: Rung, **changes) -> Ladder:
    small = Rung(name="5m", n_params_target=5_000_000)
    fields = {"name": "fat", "rungs": (small, rung), "horizons": Horizons(tokens=(100_000_000,)), **changes}
    return Ladder(**fields, data=replace(Ladder(**fields).data, tokenizer="gpt2"))


def refused(one: Ladder, card: str) -> str | None:
    try:
        refuse_early(plan_ladder(one, None, box_with(card, 2)), one, Limits())
    except SpecError as error:
        return str(error)
    return None


BIG = Rung(name="1b", n_layer=32, d_model=2048, n_head=16, batch_tokens=65_536)
SAID = re.compile(
    r"rung 1b: one sequence of \d+ tokens needs ([\d.]+) GiB, ([\d.]+) GiB more than 90 % of a card's (\d+) GiB; (.*)"
)


def obeying(one: Ladder, advice: str) -> Ladder:
    """The ladder with the first remedy of a refusal."""
    if found := re.match(r"n_layer = (\d+) instead of 32 would fit", advice):
        return replace(one, rungs=(one.rungs[0], replace(BIG, n_layer=int(found[1]))))
    first, also = advice.split(" or ", maxsplit=1)[0], " with " in advice
    if found := re.match(r"context_tokens = (\d+)", first):
        return replace(one, context_tokens=int(found[1]))
    if "activation_checkpointing" in first:
        one = replace(one, train=TrainTable(activation_checkpointing=True))
    if "adamw8bit" in (advice if also else first):
        one = replace(one, optim=Optim(name="adamw8bit"))
    return one


@pytest.mark.parametrize("card", ["RTX 4080", "RTX 3090", "RTX 4090", "A100"])
@pytest.mark.parametrize("context", [1024, 8192, 32_768])
def test_a_ladder_that_fits_no_card_is_refused_with_what_would_fit(card: str, context: int) -> None:
    one = ladder(BIG, context_tokens=context)
    if (said := refused(one, card)) is not None:
        need, over, room, advice = SAID.fullmatch(said).groups()
        assert float(need) - float(over) == pytest.approx(0.9 * float(room), rel=0.02)
        assert refused(obeying(one, advice), card) is None, advice


def test_only_what_is_too_large_is_refused_and_all_of_it_is_named() -> None:
    assert refused(ladder(BIG), "RTX 4080").endswith("would fit")
    assert refused(ladder(replace(BIG, n_layer=4)), "RTX 3090") is None
    one = ladder(BIG)
    two = replace(one, rungs=(*one.rungs, replace(BIG, name="900m", n_layer=30)))
    assert refused(two, "RTX 4080").endswith("; too large as well: 900m")


# --------------------------------------------------------------------------------------------------------- which GPUs


CARDS = [Card(index=i, uuid=f"GPU-{i}{i}", name="RTX 4080", vram_bytes=16 * 2**30, capability=(8, 9)) for i in range(2)]


def test_gpus_by_index(monkeypatch) -> None:
    monkeypatch.setattr(where, "list_cards", lambda: CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    where.use_gpus("1")
    assert where.os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-11"
    (slot,) = where.slots_of(replace(PLAN.box, n_gpus=1))
    assert (slot.index, slot.uuid, slot.name) == (1, "GPU-11", "GPU 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(SpecError, match=r"there is no GPU 2; this machine has 0 \(RTX 4080\), 1 \(RTX 4080\)"):
        where.use_gpus("0,2")
    for text in ("a", "0,,1", "0,0", "-1", ""):
        with pytest.raises(SpecError, match="such as 0,1"):
            where.use_gpus(text)
    assert [slot.uuid for slot in where.slots_of(PLAN.box)] == ["GPU-00", "GPU-11"]
    assert where.environment_of(where.slots_of(PLAN.box)[1:])["CUDA_VISIBLE_DEVICES"] == "GPU-11"
    monkeypatch.setattr(where, "list_cards", list)
    with pytest.raises(SpecError, match="no GPU that can be used"):
        where.use_gpus("0")


def test_shares_of_a_cpu() -> None:
    cpu = replace(PLAN.box, n_gpus=0, device="cpu", vram_bytes=None, n_cores=4)
    assert [slot.name for slot in where.slots_of(cpu, 2)] == ["CPU 0", "CPU 1"]
    assert [slot.name for slot in where.slots_of(cpu)] == ["CPU"]
    assert where.threads_of(cpu, 2).n_cores == 2 and where.threads_of(cpu, 9).n_cores == 1
    with pytest.raises(SpecError, match="wants 1 to 4"):
        where.slots_of(cpu, 5)
    with pytest.raises(SpecError, match="use --gpus"):
        where.slots_of(PLAN.box, 2)


def test_whole_lines_are_passed_on_as_they_come(tmp_path) -> None:
    path, said = tmp_path / "output.log", []
    path.write_text("old\n")
    relay = Relay(path, "5m-s0", said.append)
    with open(path, "a", encoding="utf-8") as file:
        file.write("5m-s0 starts\nhal")
        file.flush()
        relay.pass_on()
        assert said == ["5m-s0 starts"]
        file.write("f\n\nend")
        file.flush()
    relay.pass_on(last=True)
    assert said == ["5m-s0 starts", "5m-s0: half", "5m-s0: end"]


def test_two_runs_at_a_time_are_billed_one_machine() -> None:
    """Cards' energy is each run's own; the rest of the machine, its time and its price are shared."""
    whole, money = WallModel(base_w=100.0, slope=1.1), Money(usd_per_kwh=0.3, usd_per_machine_hour=2.0, watts=400.0)
    spec = replace(BY_RUNG["5m"], money=money)
    half = replace(spec, execution=replace(spec.execution, machine_frac=0.5))
    assert half.own_money == Money(usd_per_kwh=0.3, usd_per_machine_hour=1.0, watts=200.0) and spec.own_money == money
    two = [whole.shared(0.5).joules(300.0 * 60, 60.0), whole.shared(0.5).joules(250.0 * 60, 60.0)]
    assert sum(two) == pytest.approx(whole.joules(550.0 * 60, 60.0))
    assert Money().shared(0.5) == Money()
    assert half.run_id == spec.run_id and half.science.hash == spec.science.hash
