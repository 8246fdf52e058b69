"""The sweep behind --verify: which trials it runs, and that it finds the critical batch that made their curves."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.batch import trials, verify
from homelab_scaling.batch.table import Setting
from homelab_scaling.box import Box
from homelab_scaling.errors import DataError, RunFailed, StoppedByWatchdog
from homelab_scaling.ladder import Horizons, Ladder, Rung
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.runs import Machine, RunFolder, RunRecord
from homelab_scaling.specs import CorpusManifest, RunSpec, ShardFile, Split

CPU = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=True)
CONTEXT = 64
MACHINE = Machine(device="cpu", n_processes=1, torch="", accelerate="", transformers="", python="", homelab_scaling="")


# ------------------------------------------------------------------------------------------------------- arithmetic


@settings(derandomize=True, deadline=None)
@given(st.floats(1, 1e9), st.integers(100_000, 10**10))
def test_batches_span_sixteen_and_leave_steps(b_crit: float, target: int) -> None:
    batches = trials.sweep_batches(b_crit, 256, target)
    assert len(set(batches)) == 5 and batches[-1] == 16 * batches[0] and batches[0] >= 1
    assert target / (batches[2] * 256) >= trials.MIN_STEPS


def test_too_short_a_horizon_is_refused() -> None:
    with pytest.raises(DataError, match="10,000 tokens are too few for a sweep"):
        trials.sweep_batches(1000, 256, 10_000)


def test_a_crossing_is_found_between_two_validations() -> None:
    steps = [2**k for k in range(1, 9)]
    losses = [6 - 0.5 * math.log(s) for s in steps]
    assert trials.crossing(steps, losses, 6 - 0.5 * math.log(50)) == pytest.approx(50, rel=1e-6)
    assert trials.crossing(steps, losses, 1.0) is None
    assert trials.crossing(steps, losses, 99.0) == 2


def test_one_lucky_validation_is_no_crossing() -> None:
    losses = [6.0, 5.0, 5.0, 3.9, 5.0, 4.5, 3.9, 3.8, 3.7]
    found = trials.crossing(range(1, 10), losses, 4.0)
    assert found is not None and 6 < found < 8


def test_a_trial_has_gone_far_enough_when_three_in_a_row_are_below() -> None:
    assert not trials.reached([5, 3.9, 4.1, 3.9], 4.0)
    assert trials.reached([5, 3.9, 3.8, 3.9], 4.0)
    assert not trials.reached([3.0, 3.0], 4.0)


def test_rates_are_added_where_the_best_is_at_an_edge() -> None:
    assert trials.more_rates({0.5: 9, 1: 5, 2: 7}) is None
    assert trials.more_rates({0.5: 9, 1: 5, 2: 4}) == 4
    assert trials.more_rates({0.5: 3, 1: 5, 2: None}) == 0.25
    assert trials.more_rates({0.5: None, 1: None, 2: None}) is None
    assert trials.more_rates({0.5: 9, 1: 8, 2: 7, 4: 6, 8: 5}) is None, "enough is enough"


# ------------------------------------------------------------------------------------------------------------- a sweep


def corpus() -> CorpusManifest:
    def split(name: str, n: int) -> Split:
        return Split(files=(ShardFile(name=name, n_tokens=n, sha256=name),), n_tokens=n, n_bytes=4 * n, n_documents=99)

    return CorpusManifest(
        tokenizer="bpe:2048",
        tokenizer_file="tokenizer.json",
        tokenizer_hash="a",
        n_vocab=512,
        eot_id=0,
        dtype="uint16",
        train=split("train", 10**8),
        val=split("val", 10**6),
        sources=("python",),
        held_out_rule="by content hash",
    )


def make_plan(lab: Path, b_crit: float = 1000.0) -> verify.SweepPlan:
    ladder = Ladder(
        name="t",
        rungs=(Rung(name="a", n_layer=2, d_model=32, n_head=2),),
        context_tokens=CONTEXT,
        horizons=Horizons(tokens=(400_000,)),
    )
    plan = plan_ladder(ladder, corpus(), CPU)
    setting = Setting(rung=plan.rungs[0], n_vocab=512, box=CPU, ladder=ladder)
    return verify.plan_sweep(
        setting, plan.runs[0], lab, lab / "shards", b_crit_tokens=b_crit, lr_middle=lambda batch: 1e-3 * batch**0.5
    )


def test_trials_share_everything_but_batch_and_rate(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    specs = [verify.trial_spec(plan, seqs, factor) for seqs in plan.batches_seqs for factor in trials.RATES]
    assert len({s.run_id for s in specs}) == 15
    for seqs, spec in zip([s for s in plan.batches_seqs for _ in trials.RATES], specs, strict=True):
        science = spec.science
        assert (science.shape, science.seed, science.optim) == (
            plan.template.science.shape,
            0,
            plan.template.science.optim,
        )
        assert science.batch_seqs_global == seqs and science.schedule.decay_frac * science.horizons_tokens[
            0
        ] == pytest.approx(science.batch_tokens_global)
        assert science.horizons_tokens[0] >= plan.target_tokens * max(1, seqs / plan.middle_seqs)
    middle = [s.science.schedule.lr_peak for s in specs[6:9]]
    assert middle == pytest.approx([0.5 * plan.lr_middle, plan.lr_middle, 2 * plan.lr_middle], rel=1e-5)
    assert specs[13].science.schedule.lr_peak == pytest.approx(2 * plan.lr_middle, rel=1e-5), "sqrt(4) at the largest"


class Curves:
    """Stands for the launch: writes the curves of trials whose speed obeys the hyperbola."""

    def __init__(self, b_crit: float, *, best_factor: float = 1.0, diverge_above: float = math.inf) -> None:
        self.b_crit, self.best_factor, self.diverge_above = b_crit, best_factor, diverge_above
        self.launched: list[list[RunSpec]] = []
        self.plan: verify.SweepPlan | None = None

    def __call__(self, recipe: str, arguments: Sequence[str], **_: Any) -> int:
        assert recipe == "batch_sweep" and arguments[0] == "--specs"
        until = float(arguments[-1]) if arguments[-2] == "--until" else None
        paths = [Path(a) for a in arguments[1:] if a.endswith("spec.json")]
        self.launched.append([codec.read_json(path, RunSpec) for path in paths])
        for path, spec in zip(paths, self.launched[-1], strict=True):
            self.train(RunFolder(path.parent), spec, until)
        return 0

    def train(self, folder: RunFolder, spec: RunSpec, until: float | None) -> None:
        assert self.plan is not None
        science = spec.science
        middle = self.plan.lr_middle * (science.batch_seqs_global / self.plan.middle_seqs) ** 0.5
        factor = science.schedule.lr_peak / middle
        slower = 1 + 0.3 * math.log2(factor / self.best_factor) ** 2
        unit = 5 * slower * (1 + self.b_crit / science.batch_tokens_global)
        diverged = factor > self.diverge_above
        lines: list[dict[str, Any]] = []
        every = (spec.execution.curve_every_tokens or 0) // science.batch_tokens_global
        for step in range(every, science.horizons_tokens[0] // science.batch_tokens_global, every):
            loss = 7 * (1 + step / unit) ** -0.2
            lines.append({"kind": "val", "set": "curve", "step": step, "loss": loss})
            if (until is not None and trials.reached([ln["loss"] for ln in lines], until)) or diverged:
                break
        codec.append_jsonl(folder.metrics, lines)
        stopped = until is not None and trials.reached([ln["loss"] for ln in lines], until)
        record = RunRecord(
            run_id=spec.run_id,
            ladder=spec.ladder,
            rung=spec.rung,
            status="diverged" if diverged else "stopped" if stopped else "finished",
            reason=None,
            science_hash=science.hash,
            rows=(),
            machine=MACHINE,
        )
        codec.write_json(folder.record, record)


def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curves: Curves, guess: float = 1000.0) -> trials.SweepResult:
    curves.plan = make_plan(tmp_path, guess)
    monkeypatch.setattr(verify, "run_recipe", curves)
    return verify.run_sweep(curves.plan, tmp_path, lambda _text: None)


@pytest.mark.parametrize("guess", [500.0, 1000.0, 2500.0])
def test_it_finds_the_critical_batch_that_made_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guess: float
) -> None:
    found = sweep(tmp_path, monkeypatch, Curves(1200), guess)
    assert found.trade_off.b_crit.value == pytest.approx(1200, rel=0.05)
    assert found.trade_off.rms < 0.02 and not found.notes
    assert len(found.best) == 5


def test_it_is_launched_twice_and_never_repeats_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = Curves(1200)
    first = sweep(tmp_path, monkeypatch, curves)
    assert [len(launch) for launch in curves.launched] == [3, 12]
    again = sweep(tmp_path, monkeypatch, curves)
    assert len(curves.launched) == 2 and again == first


def test_it_follows_the_best_rate_past_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = Curves(1200, best_factor=4.0)
    found = sweep(tmp_path, monkeypatch, curves)
    assert found.trade_off.b_crit.value == pytest.approx(1200, rel=0.05)
    rates = {t.batch_tokens: t.lr_peak for t in found.best}
    assert curves.plan is not None
    assert rates[curves.plan.middle_seqs * CONTEXT] == pytest.approx(4 * curves.plan.lr_middle, rel=1e-5)


def test_a_rate_that_diverges_is_only_a_trial_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep(tmp_path, monkeypatch, Curves(1200, diverge_above=1.5))
    assert found.trade_off.b_crit.value == pytest.approx(1200, rel=0.05)
    assert sum("diverged" in (t.why_not or "") for t in found.trials) == 5


def test_rates_that_all_diverge_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match="every rate diverged at the middle batch"):
        sweep(tmp_path, monkeypatch, Curves(1200, diverge_above=0.0))


def test_a_launch_that_dies_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run_recipe", lambda *_a, **_k: 9)
    with pytest.raises(RunFailed, match=r"3 trials of the sweep did not end \(the launch ended with exit code 9\)"):
        verify.run_sweep(make_plan(tmp_path), tmp_path, lambda _text: None)


def test_the_watchdogs_end_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_hot(_recipe: str, arguments: Sequence[str], **_: Any) -> int:
        folder = RunFolder(Path(arguments[1]).parent)
        spec = folder.read_spec()
        record = RunRecord(
            run_id=spec.run_id,
            ladder=spec.ladder,
            rung=spec.rung,
            status="stopped",
            reason="card 0 was too hot",
            stopped_by="watchdog",
            science_hash=spec.science.hash,
            rows=(),
            machine=MACHINE,
        )
        codec.write_json(folder.record, record)
        return 3

    monkeypatch.setattr(verify, "run_recipe", too_hot)
    with pytest.raises(StoppedByWatchdog, match="card 0 was too hot"):
        verify.run_sweep(make_plan(tmp_path), tmp_path, lambda _text: None)


def test_the_plan_says_what_it_costs(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    about, most = plan.seconds or (0, 0)
    assert 0 < about < most
    assert "256, 512, 1,024, 2,048, 4,096 tokens" in plan.words and "at most" in plan.words
    shorter = replace(plan, target_tokens=plan.target_tokens // 2)
    assert (shorter.seconds or (0, 0))[1] < most
