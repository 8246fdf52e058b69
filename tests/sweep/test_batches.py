"""`homelab run` on a ladder without a batch: what is measured when, what is frozen, what is done without a number."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_probes import LADDER, MACHINE, Probes, write_ladder

from homelab_scaling import codec
from homelab_scaling.batch import measure
from homelab_scaling.batch.advice import BatchAdvice, RungAdvice, read_advice
from homelab_scaling.batch.probe import ProbePlan, work_folder
from homelab_scaling.errors import MachineError, Stopped
from homelab_scaling.plan.parts import Plan
from homelab_scaling.recipes import noise_probe
from homelab_scaling.report import page
from homelab_scaling.runs import RunFolder, RunRecord, RunStatus, StoppedBy
from homelab_scaling.specs import RunSpec, make_run_id
from homelab_scaling.sweep import batches, local

Homelab = Callable[..., Any]
Run = tuple[RunSpec, RunFolder]
NOT_TOGETHER = 0.0


@pytest.fixture
def ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return write_ladder(tmp_path)


@pytest.fixture
def log() -> list[str]:
    """What was launched, in order: `probe a b`, `train a`."""
    return []


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> Probes:
    fake = Probes({"a": 2_000.0, "b": 3_000.0, "c": 4_000.0})

    def launch(recipe: str, arguments: Sequence[str], **_: Any) -> int:
        log.append("probe " + " ".join(Path(path).parent.name for path in arguments[1:]))
        return fake(recipe, arguments)

    monkeypatch.setattr(measure, "run_recipe", launch)
    return fake


def record(spec: RunSpec, status: RunStatus, reason: str | None = None, by: StoppedBy | None = None) -> RunRecord:
    return RunRecord(
        run_id=spec.run_id,
        ladder=spec.ladder,
        rung=spec.rung,
        status=status,
        reason=reason,
        stopped_by=by,
        science_hash=spec.science.hash,
        rows=(),
        machine=MACHINE,
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> dict[str, RunSpec]:
    """Stands for the training: every run finishes at once; rung -> its spec."""
    found: dict[str, RunSpec] = {}

    def run_all(runs: list[Run], *_: Any, **__: Any) -> local.Outcome:
        for spec, folder in runs:
            known = folder.read_record()
            if known is None or known.status != "finished":
                log.append(f"train {spec.rung}")
                found[spec.rung] = folder.read_spec()
                codec.write_json(folder.record, record(spec, "finished"))
        return local.Outcome(finished=tuple(spec.run_id for spec, _ in runs), failed={}, stopped=False)

    monkeypatch.setattr(local, "run_all", run_all)
    monkeypatch.setattr(page, "write_report", lambda lab: lab / "report" / "report.html")  # no rows to report
    return found


def lab_of(ladder: Path) -> Path:
    return ladder.parent / "lab" / "mini"


def advice_of(ladder: Path) -> BatchAdvice:
    found = read_advice(lab_of(ladder))
    assert found is not None
    return found


def told(ladder: Path, name: str) -> RungAdvice:
    found = advice_of(ladder).rung(name)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------ in turn


def test_small_probes_share_one_launch_and_every_run_trains_at_what_was_measured(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    said = homelab("run", ladder, "--json")
    assert said.code == 0, said.err
    assert log == ["probe a b c", "train a", "train b", "train c"]
    assert len(json.loads(said.out)["outcome"]["finished"]) == 3
    for name, spec in trained.items():
        advised = told(ladder, name)
        assert advised.basis == "measured" and spec.science.batch_tokens_global == advised.batch_tokens
        assert spec.science.schedule.lr_peak == pytest.approx(advised.lr_peak)
        assert f"{name}: batch {advised.batch_tokens:,} tokens at rate" in said.err
    assert "measuring 3 batches comes on top" in said.err.splitlines()[0]
    assert "all in one launch before the first run" in said.err
    again = homelab("run", ladder)
    assert again.code == 0 and len(log) == 4 and "measuring" not in again.err, "nothing is repeated"


def test_larger_probes_come_each_before_its_rung_and_revise_the_forecast_of_the_next(
    ladder: Path,
    homelab: Homelab,
    probes: Probes,
    trained: dict[str, RunSpec],
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "TOGETHER_BELOW_S", NOT_TOGETHER)
    seen: list[BatchAdvice] = []
    write = batches.write_advice
    monkeypatch.setattr(batches, "write_advice", lambda lab, found: (seen.append(found), write(lab, found))[1])
    assert homelab("run", ladder).code == 0
    assert log == ["probe a", "train a", "probe b", "train b", "probe c", "train c"]
    assert [[r.basis for r in advice.rungs] for advice in seen] == [
        ["measured", "forecast", "forecast"],
        ["measured", "measured", "forecast"],
        ["measured"] * 3,
    ]
    foretold = [advice.rungs[2].forecast for advice in seen]
    assert [f.n_known for f in foretold if f] == [1, 2, 2] and foretold[0] != foretold[1]
    assert seen[2].rungs[1] == seen[1].rungs[1] and seen[1].rungs[0] == seen[0].rungs[0], "begun, so it stays"
    assert seen[2].rungs[2].forecast == seen[1].rungs[2].forecast, "kept beside the measurement"
    plan = codec.read_json(lab_of(ladder) / "plan.json", Plan)
    assert {run.run_id for run in plan.runs} == {spec.run_id for spec in trained.values()}
    assert sorted(p.name for p in (lab_of(ladder) / "runs").iterdir()) == sorted(run.run_id for run in plan.runs)


def test_advice_of_batch_size_is_taken_as_it_is(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    homelab("batch-size", ladder, "--rungs", "a", "--overhead", "0.05", "--beta2")
    before = told(ladder, "a")
    assert homelab("run", ladder).code == 0
    assert log[:2] == ["probe a", "probe b c"], "a was measured before"
    assert told(ladder, "a") == before
    assert advice_of(ladder).overhead_max_frac == 0.05 and told(ladder, "c").beta2 is not None
    assert trained["a"].science.batch_tokens_global == before.batch_tokens


@pytest.mark.parametrize("change", ["horizon", "text"])
def test_advice_for_another_horizon_or_text_is_measured_anew(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str], change: str
) -> None:
    assert homelab("run", ladder).code == 0
    if change == "horizon":
        ladder.write_text(LADDER.replace("[100_000, 200_000]", "[100_000, 400_000]"))
    else:
        shutil.rmtree(lab_of(ladder) / "shards")
        (ladder.parent / "text" / "more.txt").write_text("another document\n" * 50)
    log.clear()
    said = homelab("run", ladder)
    assert said.code == 0, said.err
    assert log == ["probe a b c", "train a", "train b", "train c"]


def test_a_ladder_with_a_batch_measures_nothing(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    ladder.write_text(LADDER + "tokens = 512\n")
    assert homelab("run", ladder).code == 0
    assert log == ["train a", "train b", "train c"] and read_advice(lab_of(ladder)) is None
    assert trained["a"].science.batch_tokens_global == 512


def test_measure_false_takes_the_prior(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    ladder.write_text(LADDER.replace("[lr]", "[lr]\nat_batch_tokens = 256") + "measure = false\n")
    assert homelab("run", ladder).code == 0
    assert log == ["train a", "train b", "train c"] and read_advice(lab_of(ladder)) is None
    assert {spec.science.batch_tokens_global for spec in trained.values()} == {256}


def test_a_rung_with_its_own_batch_is_not_measured(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    ladder.write_text(LADDER.replace("d_model = 32, n_head = 2 }", "d_model = 32, n_head = 2, batch_tokens = 512 }"))
    assert homelab("run", ladder).code == 0
    assert log == ["probe a c", "train a", "train b", "train c"]
    assert trained["b"].science.batch_tokens_global == 512


def test_several_seeds_are_measured_once(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    ladder.write_text("seeds = [1, 2]\n" + LADDER)
    assert homelab("run", ladder).code == 0
    assert log[0] == "probe a b c" and len(log) == 7


# ------------------------------------------------------------------------------------------------- without a number


def test_a_rung_without_a_number_is_foretold_or_gets_its_bound(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec]
) -> None:
    probes.at_end["b"] = None  # "at least 700 tokens", and a forecast above that
    said = homelab("run", ladder)
    assert said.code == 0
    assert told(ladder, "b").basis == "forecast"
    assert f"b: batch {told(ladder, 'b').batch_tokens:,} tokens" in said.err and "at least 700 tokens" in said.err


def test_a_lower_bound_alone_is_used(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec]
) -> None:
    probes.at_end = dict.fromkeys("abc", None)
    assert homelab("run", ladder).code == 0
    assert {r.basis for r in advice_of(ladder).rungs} == {"bound"}
    assert {r.b_crit.value for r in advice_of(ladder).rungs} == {700.0}
    assert trained["a"].science.batch_tokens_global == 96, "0.2 of 700 half-way down the ladder's horizons: 99 tokens"


def test_a_burn_in_that_is_too_short_leaves_the_ladders_own_batch(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    ladder.write_text(LADDER.replace("[lr]", "[lr]\nat_batch_tokens = 256") + "burn_in_frac = 0.001\n")
    said = homelab("run", ladder)
    assert said.code == 0 and log == ["train a", "train b", "train c"]
    advice = advice_of(ladder)
    assert {(r.basis, r.batch_tokens, r.lr_scale) for r in advice.rungs} == {("prior", 256, 1.0)}
    assert "a: batch 256 tokens" in said.err and "a burn-in of 1 updates" in said.err
    ladder.write_text(ladder.read_text() + "measure = false\n")
    ids = {spec.run_id for spec in trained.values()}
    assert {run["run_id"] for run in json.loads(homelab("plan", ladder, "--json").out)["runs"]} == ids, (
        "the same runs as without the advice"
    )


@pytest.mark.parametrize(("status", "launches"), [("diverged", 1), ("failed", 2)])
def test_a_probe_that_ends_badly_stops_nobody(
    ladder: Path,
    homelab: Homelab,
    probes: Probes,
    trained: dict[str, RunSpec],
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
    status: RunStatus,
    launches: int,
) -> None:
    def launch(_recipe: str, arguments: Sequence[str], **_: Any) -> int:
        for path in map(Path, arguments[1:]):
            plan = codec.read_json(path, ProbePlan)
            log.append(f"probe {plan.rung}")
            if plan.rung == "b":  # and what follows in this launch is not reached
                folder = work_folder(path.parents[2], "b")
                codec.write_json(folder.record, record(plan.spec, status, "a loss that is not finite"))
                return 1
            probes("noise_probe", ["--probe", str(path)])
        return 0

    monkeypatch.setattr(measure, "run_recipe", launch)
    said = homelab("run", ladder)
    assert said.code == 0, said.err
    assert log == ["probe a", *["probe b"] * launches, "probe c", "train a", "train b", "train c"]
    assert told(ladder, "b").basis == "forecast" and told(ladder, "c").basis == "measured"
    assert "its probe ended without a result" in said.err and "a loss that is not finite" in said.err


# ----------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("which", ["first", "second"])
def test_stopped_in_a_probe_the_same_command_goes_on(
    ladder: Path,
    homelab: Homelab,
    probes: Probes,
    trained: dict[str, RunSpec],
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    monkeypatch.setattr(batches, "TOGETHER_BELOW_S", NOT_TOGETHER)
    launch = measure.run_recipe
    rung = "a" if which == "first" else "b"

    def stopping(recipe: str, arguments: Sequence[str], **more: Any) -> int:
        if Path(arguments[1]).parent.name == rung:
            raise Stopped("stopped; the same command goes on from here")
        return launch(recipe, arguments, **more)

    monkeypatch.setattr(measure, "run_recipe", stopping)
    said = homelab("run", ladder, "--json")
    assert said.code == 75 and "run the same command again" in said.err
    document = json.loads(said.out)
    assert document["outcome"]["stopped"]
    assert (document["report"] is None) == (which == "first")
    monkeypatch.setattr(measure, "run_recipe", launch)
    assert homelab("run", ladder).code == 0
    assert log == ["probe a", "train a", "probe b", "train b", "probe c", "train c"], "each once"


def test_the_watchdog_may_stop_a_probe(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_recipe: str, arguments: Sequence[str], **_: Any) -> int:
        plan = codec.read_json(Path(arguments[1]), ProbePlan)
        folder = work_folder(Path(arguments[1]).parents[2], plan.rung)
        codec.write_json(folder.record, record(plan.spec, "stopped", "GPU 0 is at 93 C", "watchdog"))
        return 1

    monkeypatch.setattr(measure, "run_recipe", stopped)
    said = homelab("run", ladder)
    assert said.code == 3 and "GPU 0 is at 93 C" in said.err and "when the card is well" in said.err
    assert trained == {}


def test_training_that_began_before_there_was_a_measurement_keeps_its_batch(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str]
) -> None:
    assert homelab("run", ladder, "--prepare").code == 0
    (first,) = (lab_of(ladder) / "runs").glob("a-*")
    spec = RunFolder(first).read_spec()
    codec.write_json(RunFolder(first).record, record(spec, "stopped", "by hand", "signal"))
    said = homelab("run", ladder)
    assert said.code == 0, said.err
    assert log == ["probe b c", "train a", "train b", "train c"]
    assert trained["a"] == spec and told(ladder, "a").basis == "prior"
    assert "training began before" in told(ladder, "a").why
    assert len(list((lab_of(ladder) / "runs").iterdir())) == 3, "what was prepared for b and c and never began is gone"


@pytest.mark.parametrize("where", ["runs", "bracket_runs"])
def test_one_seed_or_a_trial_of_its_rate_is_a_beginning(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec], log: list[str], where: str
) -> None:
    ladder.write_text("seeds = [1, 2]\n" + LADDER)
    assert homelab("run", ladder, "--prepare").code == 0
    first = min((lab_of(ladder) / "runs").glob("a-s1-*"))
    spec = RunFolder(first).read_spec()
    if where != "runs":  # at another rate, as trials are
        science = replace(spec.science, schedule=replace(spec.science.schedule, lr_peak=3e-3))
        spec = replace(spec, science=science, run_id=make_run_id(spec.rung, science))
    folder = RunFolder(lab_of(ladder) / where / "a-s1-begun")
    codec.write_json(folder.spec, spec)
    codec.write_json(folder.record, record(spec, "stopped", "by hand", "signal"))
    assert homelab("run", ladder).code == 0
    assert log[0] == "probe b c" and trained["a"].science.batch_tokens_global == spec.science.batch_tokens_global


def test_runs_of_a_rung_that_was_changed_since_do_not_freeze_its_forecast(
    ladder: Path,
    homelab: Homelab,
    probes: Probes,
    trained: dict[str, RunSpec],
    log: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "TOGETHER_BELOW_S", NOT_TOGETHER)
    assert homelab("run", ladder).code == 0
    ladder.write_text(LADDER.replace("d_model = 32", "d_model = 40").replace("d_model = 64", "d_model = 72"))
    log.clear()
    assert homelab("run", ladder).code == 0
    assert log == ["probe b", "train b", "probe c", "train c"]
    assert [told(ladder, name).basis for name in "abc"] == ["measured"] * 3


def test_a_probe_by_hand_leaves_one_that_is_at_work_alone(ladder: Path, homelab: Homelab) -> None:
    assert homelab("run", ladder, "--prepare").code == 0
    folder = work_folder(lab_of(ladder), "a")
    args = noise_probe.Args(ladder=str(ladder), rung="a", lab=lab_of(ladder).parent)
    with folder.lock(), pytest.raises(MachineError, match="another process"):
        noise_probe.probes_of(args)
    noise_probe.probes_of(args)
    assert (folder.path / "probe.json").exists()


# ------------------------------------------------------------------------------------------------------- said before


def test_branches_of_a_rung_that_was_measured_before_are_on_the_bill(
    ladder: Path, homelab: Homelab, probes: Probes, log: list[str]
) -> None:
    assert homelab("batch-size", ladder, "--rungs", "a").code == 0
    ladder.write_text(ladder.read_text().replace('calibrate = "none"', 'calibrate = "branch"'))
    said = homelab("plan", ladder, "--json")
    measuring = json.loads(said.out)["measuring"]
    assert measuring["rungs"] == ["b", "c"] and measuring["calibrated_on"] == "a"


def test_prepare_measures_nothing_and_says_so(ladder: Path, homelab: Homelab, probes: Probes, log: list[str]) -> None:
    said = homelab("run", ladder, "--prepare")
    assert said.code == 0 and log == [] and "prepared: 3 runs" in said.err
    assert "the batch of a, b, c is measured by `homelab run`" in said.err


def test_the_plan_says_what_is_to_be_measured_and_what_it_counts_with(
    ladder: Path, homelab: Homelab, probes: Probes, trained: dict[str, RunSpec]
) -> None:
    said = homelab("plan", ladder).out.replace("\n", " ")
    assert "measuring 3 batches comes on top" in " ".join(said.split())
    assert "the batch of a, b, c is measured by `homelab run`" in " ".join(said.split())
    assert "Step Law's batch" in said
    homelab("batch-size", ladder, "--rungs", "a")
    plan = codec.from_plain(json.loads(homelab("plan", ladder, "--json").out), Plan, "plan")
    assert plan.measuring is not None and plan.measuring.rungs == ("b", "c") and plan.measuring.flops > 0
    assert [r.training.batch_source for r in plan.rungs] == ["measured", "forecast", "forecast"]
    homelab("run", ladder)
    plan = codec.from_plain(json.loads(homelab("plan", ladder, "--json").out), Plan, "plan")
    assert plan.measuring is None
