"""`homelab batch-size` as a person uses it: the plan, the measurement, the advice, and the plan that obeys it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_probes import LADDER, Probes, write_ladder

from homelab_scaling import codec
from homelab_scaling.batch import measure
from homelab_scaling.batch.advice import BatchAdvice, read_advice
from homelab_scaling.plan.parts import Plan
from homelab_scaling.sweep.prepare import ensure_corpus, open_experiment

Homelab = Callable[..., Any]


@pytest.fixture
def ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ladder without a batch over some of the standard library's own text; the folder to stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return write_ladder(tmp_path)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Probes:
    fake = Probes({"a": 2_000.0, "b": 3_000.0, "c": 4_000.0})
    monkeypatch.setattr(measure, "run_recipe", fake)
    return fake


def advice_of(ladder: Path) -> BatchAdvice:
    found = read_advice(ladder.parent / "lab" / "mini")
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(ladder: Path, homelab: Homelab) -> None:
    said = homelab("batch-size", ladder, "--dry-run", "--verify")
    assert said.code == 0, said.err
    for words in ("To be measured", "Total:", "FLOPs", "Step Law", "Zhang CBS(D)", "no shards yet", "sweep on a"):
        assert words in said.out
    assert not (ladder.parent / "lab").exists()
    assert max(map(len, said.out.splitlines())) <= 100


def test_a_dry_run_as_json(ladder: Path, homelab: Homelab) -> None:
    document = json.loads(homelab("batch-size", ladder, "--dry-run", "--json", "--rungs", "b").out)
    assert [p["rung"] for p in document["probes"]] == ["b"] and document["probes"][0]["flops"] > 0
    assert set(document["priors"]) == {"a", "b", "c"} and document["sweep"] is None


# ------------------------------------------------------------------------------------------------------------ measured


def test_it_builds_shards_measures_advises_and_the_plan_obeys(ladder: Path, homelab: Homelab, probes: Probes) -> None:
    said = homelab("batch-size", ladder)
    assert said.code == 0, said.err
    assert probes.launched == ["a", "b", "c"]
    for words in (
        "Batch advice for mini",
        "uncalibrated",
        "this ladder, 0.2 B_crit",
        "takes",
        "kWh",
        "B_crit goes as L^",
    ):
        assert words in said.out
    assert said.err.index("to measure: a, b, c") < said.err.index("a: B_simple"), "the plan comes first"
    found = advice_of(ladder)
    assert [r.basis for r in found.rungs] == ["measured"] * 3 and found.law is not None
    plan = codec.from_plain(json.loads(homelab("plan", ladder, "--json").out), Plan, "plan")
    assert [(r.training.batch_tokens, r.training.batch_source) for r in plan.rungs] == [
        (r.batch_tokens, "measured") for r in found.rungs
    ]


def test_what_was_measured_is_frozen(ladder: Path, homelab: Homelab, probes: Probes) -> None:
    first = json.loads(homelab("batch-size", ladder, "--json").out)
    probes.at_end = dict.fromkeys("abc", 9_000.0)
    again = homelab("batch-size", ladder, "--json")
    assert json.loads(again.out) == first and probes.launched == ["a", "b", "c"]
    assert "measured before and kept: a, b, c" in again.err
    anew = json.loads(homelab("batch-size", ladder, "--json", "--again", "--rungs", "b").out)
    assert probes.launched == ["a", "b", "c", "b"]
    assert anew["rungs"][1]["b_crit"]["value"] > 2 * first["rungs"][1]["b_crit"]["value"]
    assert anew["rungs"][0] == first["rungs"][0]


def test_larger_rungs_are_foretold_and_revised_when_they_are_measured(
    ladder: Path, homelab: Homelab, probes: Probes
) -> None:
    assert homelab("batch-size", ladder, "--rungs", "a", "b").code == 0
    before = advice_of(ladder).rungs[2]
    assert before.basis == "forecast" and before.forecast is not None and before.forecast.n_known == 2
    said = homelab("batch-size", ladder)
    after = advice_of(ladder).rungs[2]
    assert probes.launched == ["a", "b", "c"]
    assert after.basis == "measured" and after.forecast == before.forecast
    assert "foretold from 2 measured rungs" in said.out.replace("\n", " ")


def test_a_rung_without_a_number_is_foretold_with_the_reason(ladder: Path, homelab: Homelab, probes: Probes) -> None:
    probes.at_end["b"] = None
    said = homelab("batch-size", ladder)
    assert said.code == 0
    assert advice_of(ladder).rungs[1].basis == "forecast"
    assert "B_simple at least 700 tokens" in said.out.replace("\n", " ")


def test_nothing_measurable_is_a_sentence(ladder: Path, homelab: Homelab, probes: Probes) -> None:
    probes.at_end = dict.fromkeys("abc", None)
    said = homelab("batch-size", ladder)
    assert said.code == 2
    assert "no rung has a measured noise scale" in said.err and "Traceback" not in said.err


def test_beta2_is_advised_when_asked_for(ladder: Path, homelab: Homelab, probes: Probes) -> None:
    homelab("batch-size", ladder, "--beta2")
    assert all(r.beta2 is not None and 0 < r.beta2 < 1 for r in advice_of(ladder).rungs)


def test_a_ladder_that_fixes_its_batch_is_told_so(ladder: Path, homelab: Homelab, probes: Probes) -> None:
    ladder.write_text(LADDER + "tokens = 512\n")
    said = homelab("batch-size", ladder)
    assert "the ladder fixes 512 tokens" in said.out and "* 512" in said.out
    plan = json.loads(homelab("plan", ladder, "--json").out)
    assert {r["training"]["batch_source"] for r in plan["rungs"]} == {"ladder"}


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ("", ("--rungs", "z"), "has no rung 'z'; its rungs are a, b, c"),
        ("", ("--overhead", "0"), "--overhead 0: wants a share"),
        ("", ("--watts", "-5"), "--watts -5: wants the power"),
        ("[train]\nmicrobatch_seqs_per_rank = 7\n", (), "= 7 does not divide the"),
        ("tokens = 32\n", (), "wants 2 or more"),
        ("[horizon]\n", (), "no such key"),
    ],
)
def test_each_mistake_is_one_sentence(
    ladder: Path, homelab: Homelab, probes: Probes, change: str, flags: tuple[str, ...], said: str
) -> None:
    ladder.write_text(LADDER + change)
    found = homelab("batch-size", ladder, *flags)
    assert found.code == 2, found.out
    assert said in found.err and "Traceback" not in found.err and found.out == ""


def test_a_probe_that_dies_is_a_sentence(ladder: Path, homelab: Homelab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "run_recipe", lambda *_a, **_k: 1)
    said = homelab("batch-size", ladder, "--rungs", "a")
    assert said.code == 1 and "the probe of a ended without a result" in said.err


def test_help_is_fast_and_says_what_it_does(homelab: Homelab) -> None:
    said = homelab("batch-size", "--help")
    assert said.code == 0 and "--verify" in said.out and "--dry-run" in said.out and "batch.json" in said.out


# ---------------------------------------------------------------------------------------------------------- for real


@pytest.mark.slow
def test_measured_verified_and_obeyed_for_real(ladder: Path, homelab: Homelab) -> None:
    said = homelab("batch-size", ladder, "--rungs", "a", "--burn-in", "0.5", "--verify", "--json")
    assert said.code == 0, said.err[-3000:]
    found = codec.from_plain(json.loads(said.out), BatchAdvice, "advice")
    assert found.calibration.method == "sweep" and found.sweep is not None
    assert len(found.sweep.best) >= 4
    assert found.sweep.best[-1].batch_tokens >= 16 * found.sweep.best[0].batch_tokens
    steps = [t.n_steps or 0 for t in found.sweep.best]
    assert steps[0] > steps[-1] > 0
    trade_off = found.sweep.trade_off
    assert trade_off.b_crit.low < trade_off.b_crit.value < trade_off.b_crit.high
    assert [r.basis for r in found.rungs] == ["measured", "forecast", "forecast"]
    assert any("measured" in row.rate_basis for row in found.rungs[0].rows)
    experiment = open_experiment(str(ladder), ladder.parent / "lab")
    assert ensure_corpus(experiment).data_id == found.data_id
    assert not list((ladder.parent / "lab" / "mini" / "batch_sweep").glob("runs/*/checkpoints"))
