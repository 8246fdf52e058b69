"""The branch test of a toy rung: planned, run from a probe's checkpoint or its own, interrupted, reused."""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from toy_run import write_shards

from homelab_scaling import codec
from homelab_scaling.batch import branch, branch_plan, branching
from homelab_scaling.batch.branch import finished_branch, run_branch, windows_path
from homelab_scaling.batch.branch_fit import BranchResult
from homelab_scaling.batch.branch_plan import BranchPlan, plan_branch
from homelab_scaling.batch.calibration import calibration_from_branch
from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.probe import plan_probe, prepare_probe, work_folder
from homelab_scaling.batch.probing import run_probe
from homelab_scaling.batch.table import Setting
from homelab_scaling.box import Box
from homelab_scaling.errors import RunFailed, SpecError, Stopped, StoppedByWatchdog
from homelab_scaling.ladder import BatchTable, DataTable, Horizons, Ladder, LrTable, Rung, TrainTable, Validation
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.specs import Optim, RunSpec, make_run_id

BOX = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=1, has_compiler=False)
LADDER = Ladder(
    name="toy",
    rungs=(Rung(name="a", n_layer=1, d_model=16, n_head=1),),
    context_tokens=16,
    data=DataTable(tokenizer="bytes", max_epochs=100.0),
    horizons=Horizons(tokens=(20_000, 80_000)),
    batch=BatchTable(tokens=128),
    lr=LrTable(rule="fixed", peak=1e-2),
    optim=Optim(beta2=0.75),  # with the shortest memory the branches may be short
    validation=Validation(full_tokens=1600, curve_tokens=400),
    train=TrainTable(compile="off", microbatch_seqs_per_rank=4),
)


class Toy:
    """A toy rung with its lab; `launch` runs the recipe's work in this process."""

    def __init__(self, root: Path) -> None:
        self.lab = root / "lab" / "toy"
        manifest = write_shards(self.lab / "shards")
        planned = plan_ladder(LADDER, manifest, BOX)
        self.setting = Setting(rung=planned.rungs[0], n_vocab=planned.n_vocab, box=BOX, ladder=LADDER)
        self.template: RunSpec = planned.runs[0]
        self.launches = 0

    def plan(self, **changes: Any) -> BranchPlan:
        changes = {"burn_in_frac": 0.1, "delta_frac": 0.07} | changes
        return plan_branch(self.setting, self.template, self.lab, self.lab / "shards", **changes)

    def launch(self, recipe: str, arguments: Sequence[str], **_: Any) -> int:
        assert recipe == "branch_test" and arguments[0] == "--plan"
        self.launches += 1
        begin_anew()
        branching.run_branches(codec.read_json(Path(arguments[1]), BranchPlan), started=time.monotonic())
        return 0

    def windows(self, plan: BranchPlan) -> list[list[dict[str, Any]]]:
        return [codec.read_jsonl(windows_path(plan.run_folder(b))) for b in plan.branches]


def begin_anew() -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    found = Toy(tmp_path)
    monkeypatch.setattr(branch, "run_recipe", found.launch)
    monkeypatch.setattr(branch_plan, "MIN_STEPS", 12)
    return found


def run(toy: Toy, plan: BranchPlan) -> BranchResult:
    return run_branch(plan, toy.lab.parent, lambda _text: None)


# -------------------------------------------------------------------------------------------------------------- plan


def test_branches_share_all_but_batch_rate_and_the_betas_of_small_ones(toy: Toy) -> None:
    plan = toy.plan()
    sciences = [b.spec.science for b in plan.branches]
    assert [s.batch_tokens_global for s in sciences] == [32, 64, 128, 256, 512]
    assert {s.horizons_tokens for s in sciences} == {(plan.delta_tokens,)}
    assert [s.schedule.lr_peak for s in sciences] == pytest.approx(
        [5e-3, 1e-2 / 2**0.5, 1e-2, 1e-2 * 2**0.5, 2e-2], rel=1e-5
    )
    assert [s.optim.beta2 for s in sciences] == pytest.approx([0.75**0.25, 0.75**0.5, 0.75, 0.75, 0.75])
    assert [s.optim.beta1 for s in sciences] == pytest.approx([0.9**0.25, 0.9**0.5, 0.9, 0.9, 0.9])
    assert {b.first_sequence for b in plan.branches} == {plan.start_tokens // 16} == {plan.start_steps * 8}
    assert plan.mark_tokens % 512 == 0 and plan.delta_tokens == 12 * plan.mark_tokens
    assert plan.branches[-1].n_steps == 12
    assert plan.start.science.hash == toy.template.science.hash, "so that a probe's checkpoint serves"
    long_memory = replace(toy.template.science, optim=Optim(beta2=0.95))
    toy.template = replace(toy.template, science=long_memory, run_id=make_run_id("a", long_memory))
    assert toy.plan().branches[-1].n_steps >= 2.5 * 20


def test_the_plan_says_what_it_costs(toy: Toy) -> None:
    plan = toy.plan()
    assert plan.tokens == plan.start_tokens + 5 * plan.delta_tokens and not plan.burn_in_paid
    assert plan.seconds is not None and plan.seconds > 0 and f"{plan.delta_tokens:,} tokens each" in plan.words
    longer = toy.plan(delta_frac=0.5)
    assert longer.delta_tokens > plan.delta_tokens
    assert longer.hash != plan.hash and (longer.seconds or 0) > plan.seconds


def test_longer_branches_reach_to_eight_times_the_batch(toy: Toy) -> None:
    ladder = replace(LADDER, horizons=Horizons(tokens=(1_000_000,)), data=replace(LADDER.data, max_epochs=1000.0))
    manifest = write_shards(toy.lab / "shards")
    planned = plan_ladder(ladder, manifest, BOX)
    setting = Setting(rung=planned.rungs[0], n_vocab=planned.n_vocab, box=BOX, ladder=ladder)
    plan = plan_branch(setting, planned.runs[0], toy.lab, toy.lab / "shards")
    assert [b.spec.science.batch_tokens_global for b in plan.branches] == [32, 64, 128, 256, 512, 1024]


def test_what_cannot_be_branched_is_refused(toy: Toy) -> None:
    with pytest.raises(SpecError, match="before the end of the warm-up or after the run"):
        toy.plan(burn_in_frac=0.001)
    with pytest.raises(SpecError, match="do not fit the horizon"):
        toy.plan(burn_in_frac=0.95)


# --------------------------------------------------------------------------------------------------------------- run


def test_it_is_run_once_and_its_result_is_kept(toy: Toy) -> None:
    plan = toy.plan()
    result = run(toy, plan)
    assert [b.batch_tokens for b in result.branches] == [32, 64, 128, 256, 512]
    losses = [b.loss_nats for b in result.branches]
    assert all(loss is not None and loss < result.start_nats for loss in losses)
    assert result.seconds is not None and result.seconds > 0 and result.start_tokens == plan.start_tokens
    assert finished_branch(plan) == result == run(toy, plan) and toy.launches == 1
    assert not list((toy.lab / "branch").glob("runs/*/checkpoints/*"))
    for lines in toy.windows(plan):
        assert [line["tokens"] for line in lines] == [k * plan.mark_tokens for k in range(13)]
    starts = [lines[0]["losses"] for lines in toy.windows(plan)]
    assert all(start == starts[0] for start in starts), "one checkpoint, the same windows"
    assert finished_branch(toy.plan(delta_frac=0.5)) is None


def test_a_probes_checkpoint_is_where_branches_begin(toy: Toy) -> None:
    own = run(toy, toy.plan())
    (toy.lab / "branch" / "result.json").unlink()
    before = toy.windows(toy.plan())
    probe = replace(plan_probe(toy.template, burn_in_frac=0.1, n_points=1), keep_checkpoint=True)
    begin_anew()
    prepare_probe(probe, toy.lab)
    run_probe(probe, toy.lab, started=time.monotonic())
    plan = toy.plan()
    assert plan.burn_in_paid and plan.tokens == 5 * plan.delta_tokens and "the probe's checkpoint" in plan.words
    for path in (toy.lab / "branch").glob("runs/*"):
        (path / "record.json").unlink()
    result = run(toy, plan)
    # The probe cuts its batch smaller, which rounds differently.
    assert [b.loss_nats for b in result.branches] == pytest.approx([b.loss_nats for b in own.branches], rel=1e-3)
    assert toy.windows(plan)[0][0]["losses"] == pytest.approx(before[0][0]["losses"], rel=1e-4)
    assert not plan.start_folder.metrics.exists() or plan.start_folder.read_record() is None
    assert not work_folder(toy.lab, "a").checkpoints.exists(), "nothing begins from it any more"


def test_a_branch_reads_the_text_on_from_the_checkpoint(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[int, list[int]] = {}
    real = branching.Stretch.do_update

    def noting(self: branching.Stretch, lr: float) -> None:
        order, batch = self.feed.order, self.science.batch_seqs_global
        asked: list[int] = []
        plain = type(order).windows
        monkeypatch.setattr(
            type(order), "windows", lambda o, first, n: (asked.extend(range(first, first + n)), plain(o, first, n))[1]
        )
        real(self, lr)
        monkeypatch.setattr(type(order), "windows", plain)
        read.setdefault(batch if self.start else 0, []).extend(asked)

    monkeypatch.setattr(branching.Stretch, "do_update", noting)
    plan = toy.plan()
    run(toy, plan)
    first, n = plan.start_steps * 8, plan.delta_tokens // 16
    assert read.pop(0) == list(range(first))
    assert set(read) == {2, 4, 8, 16, 32} and all(seqs == list(range(first, first + n)) for seqs in read.values())


def test_interrupted_it_goes_on_with_the_branch_it_was_in(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(toy, toy.plan())
    codec.write_json(toy.lab / "kept.json", whole)
    (toy.lab / "branch").rename(toy.lab / "whole")
    real, seen = branching.Stretch.do_update, []

    def stopping(self: branching.Stretch, lr: float) -> None:
        real(self, lr)
        if self.science.batch_tokens_global == 256 and self.step == 20:
            seen.append(self.step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(branching.Stretch, "do_update", stopping)
    with pytest.raises(Stopped):
        run(toy, toy.plan())
    monkeypatch.setattr(branching.Stretch, "do_update", real)
    done = [branch.is_done(toy.plan(), b) for b in toy.plan().branches]
    assert seen == [20] and done == [True, True, True, False, False]
    again = run(toy, toy.plan())
    assert again.branches == whole.branches and again.b_crit == whole.b_crit


def test_a_branch_that_diverges_is_left_out(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = branching.Stretch.do_update

    def bursting(self: branching.Stretch, lr: float) -> None:
        if self.science.batch_tokens_global == 512 and self.start is not None and self.step == 5:
            with torch.no_grad():
                next(iter(self.optimizer.names)).fill_(float("nan"))
        real(self, lr)

    monkeypatch.setattr(branching.Stretch, "do_update", bursting)
    result = run(toy, toy.plan())
    assert result.branches[-1].loss_nats is None and "512 tokens: diverged" in result.notes[0]


def test_a_launch_that_dies_or_is_ended_by_the_watchdog_is_said(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch, "run_recipe", lambda *_a, **_k: 9)
    with pytest.raises(RunFailed, match=r"5 branches did not end \(the launch ended with exit code 9\)"):
        run(toy, toy.plan())
    monkeypatch.setattr(branch, "run_recipe", toy.launch)
    result_before = run(toy, toy.plan())
    assert result_before is not None
    (toy.lab / "branch" / "result.json").unlink()
    folder = toy.plan().run_folder(toy.plan().branches[2])
    record = folder.read_record()
    assert record is not None
    codec.write_json(folder.record, replace(record, status="stopped", stopped_by="watchdog", reason="too hot"))
    monkeypatch.setattr(branch, "run_recipe", lambda *_a, **_k: 1)
    with pytest.raises(StoppedByWatchdog, match="too hot"):
        run(toy, toy.plan())


def test_the_average_forgets_the_beginning(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant weights have themselves as average; of a straight path it is the point 5 / 6 of the way."""
    shares: list[float] = []
    n = 400
    average = 0.0
    for step in range(1, n + 1):
        share = (branching.AVERAGE + 1) / (branching.AVERAGE + step)
        shares.append(share)
        average += share * (step - average)
    assert shares[0] == 1 and average / n == pytest.approx(5 / 6, rel=0.01)


# -------------------------------------------------------------------------------------------------------- calibration


def result_with(**changes: Any) -> BranchResult:
    plain = BranchResult(
        rung="a",
        plan_hash="",
        base_tokens=128,
        start_tokens=8_000,
        delta_tokens=4_000,
        start_nats=3.0,
        branches=(),
        b_crit=Estimate(value=600.0, low=300.0, high=1200.0),
        at_least_tokens=None,
        at_most_tokens=None,
        why_no_number=None,
        misfit=1.0,
        merrill_tokens=256,
        merrill_is_last=False,
        tolerance_nats=0.01,
        flops=1.0,
        seconds=None,
        kwh=None,
        notes=(),
    )
    return replace(plain, **changes)


def test_c_is_the_critical_batch_over_the_noise_scale_with_both_errors() -> None:
    found = calibration_from_branch(result_with(), Estimate(value=200.0, low=100.0, high=400.0), "a")
    assert (found.c, found.method, found.rung) == (3.0, "branch", "a")
    one = np.log(2) / 1.96
    assert found.sd_log == pytest.approx(np.hypot(one, one), rel=1e-3) and "c = 3.00 [" in found.sentence
    assert result_with().middle_tokens == 10_000


def test_a_bound_calibrates_as_if_it_were_the_value_and_nothing_does_not() -> None:
    noise = Estimate(value=200.0, low=100.0, high=400.0)
    bound = result_with(b_crit=None, at_least_tokens=1000.0, why_no_number="try larger ones")
    found = calibration_from_branch(bound, noise, "a")
    assert (found.c, found.sd_log, found.method) == (5.0, None, "branch") and "at least 1,000 tokens" in found.sentence
    unknown = result_with(b_crit=None, why_no_number="the noise hides it")
    assert calibration_from_branch(unknown, noise, "a").method == "uncalibrated"
    assert "the noise hides it" in calibration_from_branch(unknown, noise, "a").sentence
    assert calibration_from_branch(result_with(), None, "a").method == "uncalibrated"


@pytest.mark.parametrize(("most", "c"), [(100.0, 0.5), (1000.0, 1.0)])
def test_an_upper_bound_never_makes_a_batch_larger(most: float, c: float) -> None:
    bound = result_with(b_crit=None, at_most_tokens=most, why_no_number="try smaller ones")
    found = calibration_from_branch(bound, Estimate(value=200.0, low=100.0, high=400.0), "a")
    assert found.c == c and found.sd_log is None and f"at most {most:,.0f} tokens" in found.sentence
    assert found.method == ("branch" if c < 1 else "uncalibrated")


@pytest.mark.slow
def test_the_recipe_under_accelerate_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    toy = Toy(tmp_path)
    result = run(toy, toy.plan())
    assert json.loads((toy.lab / "branch" / "result.json").read_text()) == codec.to_plain(result)
    assert len(result.branches) == 5
