"""`--seeds` of `homelab plan` and `homelab run`: which seeds a ladder gets, and that no run on disk is forgotten."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import BatchTable, Horizons, Ladder, LrTable, Rung
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.plan.seeds import plan_with_seeds, repeats_in, seeds_words, with_seeds
from homelab_scaling.runs import read_records

LADDER = Ladder(
    name="mini",
    rungs=(
        Rung(name="a", n_layer=1, d_model=16, n_head=1),
        Rung(name="b", n_layer=1, d_model=32, n_head=1),
        Rung(name="c", n_layer=1, d_model=64, n_head=1),
    ),
    horizons=Horizons(tokens=(100_000, 200_000)),
    context_tokens=32,
    batch=BatchTable(tokens=512),
)
FILE = """
name = "mini"
context_tokens = 32
rungs = [
    { name = "a", n_layer = 1, d_model = 16, n_head = 1 },
    { name = "b", n_layer = 1, d_model = 32, n_head = 1 },
    { name = "c", n_layer = 1, d_model = 64, n_head = 1 },
]
[data]
sources = ["text"]
tokenizer = "bytes"
val_frac = 0.1
max_epochs = 100.0
[horizons]
tokens = [100_000, 200_000]
[batch]
tokens = 512
[validation]
full_tokens = 1_024
curve_tokens = 1_024
[money]
usd_per_machine_hour = 1.0
"""


@pytest.fixture
def planner(make_corpus, cpu):
    return lambda ladder: plan_ladder(ladder, make_corpus(), cpu)


def begin(lab: Path, plan, *, seeds: tuple[int, ...], beside: str | None = "metrics.jsonl") -> None:
    """Run folders of a plan, as training leaves them after its first steps; or their spec.json alone."""
    for spec in plan.runs:
        if spec.science.seed in seeds:
            codec.write_json(lab / "runs" / spec.run_id / "spec.json", spec)
            if beside:
                (lab / "runs" / spec.run_id / beside).write_text("")


# ---------------------------------------------------------------------------------------------------------- which seeds


@pytest.mark.parametrize(
    ("own", "n", "wanted"),
    [((0,), 1, (0,)), ((0,), 3, (0, 1, 2)), ((1, 2), 3, (1, 2, 0)), ((7, 0), 4, (7, 0, 1, 2)), ((5, 6, 7), 2, (5, 6))],
)
def test_the_ladders_own_come_first(own: tuple[int, ...], n: int, wanted: tuple[int, ...]) -> None:
    assert with_seeds(replace(LADDER, seeds=own), n).seeds == wanted


@pytest.mark.parametrize("n", [0, -2, 10**12])
def test_no_seed_is_no_experiment_and_too_many_are_a_slip(n: int) -> None:
    with pytest.raises(SpecError, match=f"--seeds {n}: wants how many seeds"):
        with_seeds(LADDER, n)


def test_seeds_in_words() -> None:
    assert (seeds_words((4,)), seeds_words((0, 1, 2))) == ("seed 4", "3 seeds (0, 1, 2)")


# ------------------------------------------------------------------------------------------------------ what a lab has


def test_without_the_flag_a_lab_goes_on_with_what_it_has(planner, tmp_path: Path) -> None:
    begin(tmp_path, planner(with_seeds(LADDER, 3)), seeds=(0, 2))
    plan = plan_with_seeds(LADDER, tmp_path, planner)
    assert (plan.seeds, plan.lab_seeds) == ((0, 2), (2,))
    assert {run.science.seed for run in plan.runs} == {0, 2} and plan.totals.n_runs == len(plan.runs) == 6
    codec.write_json(tmp_path / "plan.json", plan)
    _, excluded = read_records(tmp_path)
    assert not [e for e in excluded if "not in the current plan" in e.reason]
    assert plan_with_seeds(LADDER, tmp_path, planner) == plan, "and again"
    assert plan_with_seeds(with_seeds(LADDER, 3), tmp_path, planner, asked=True).lab_seeds == ()


def test_a_seed_that_was_prepared_counts_too_until_fewer_are_asked_for(planner, tmp_path: Path) -> None:
    begin(tmp_path, planner(with_seeds(LADDER, 2)), seeds=(0, 1), beside=None)
    assert plan_with_seeds(LADDER, tmp_path, planner).seeds == (0, 1)
    assert plan_with_seeds(with_seeds(LADDER, 1), tmp_path, planner, asked=True).seeds == (0,)


def test_fewer_than_have_begun_are_refused_in_one_sentence(planner, tmp_path: Path) -> None:
    begin(tmp_path, planner(with_seeds(LADDER, 3)), seeds=(0, 1, 2))
    with pytest.raises(SpecError) as said:
        plan_with_seeds(with_seeds(LADDER, 1), tmp_path, planner, asked=True)
    text = str(said.value)
    assert text.startswith("--seeds 1, but ") and "other seeds too (1, 2)" in text
    assert text.count("runs/") == 3 and text.endswith("and 3 more") and "\n" not in text


def test_runs_of_another_recipe_are_no_repeats(planner, tmp_path: Path) -> None:
    other = replace(LADDER, seeds=(5,), lr=LrTable(peak=1e-3))
    begin(tmp_path, planner(other), seeds=(5,))
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "spec.json").write_text("{")
    plan = planner(LADDER)
    assert repeats_in(tmp_path, plan) == []
    assert plan_with_seeds(LADDER, tmp_path, planner) == plan
    assert plan_with_seeds(LADDER, tmp_path / "nowhere", planner) == plan


# ------------------------------------------------------------------------------------------------------- the two verbs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"line {i} of a text that is long enough. " * 40, encoding="utf-8")
    (tmp_path / "mini.toml").write_text(FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def homelab(capsys: pytest.CaptureFixture[str], verb: str, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run_verb(verb, ["mini.toml", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def specs(here: Path) -> list[int]:
    found = [json.loads(p.read_text()) for p in (here / "lab" / "mini" / "runs").glob("*/spec.json")]
    return sorted(spec["science"]["seed"] for spec in found)


def test_the_plan_says_what_all_seeds_cost_and_what_one_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = json.loads(homelab(capsys, "plan", "--json", "--watts", "100")[1])
    three = json.loads(homelab(capsys, "plan", "--json", "--watts", "100", "--seeds", "3")[1])
    assert alone["seeds"] == [0] and three["seeds"] == [0, 1, 2]
    for key in ("n_runs", "n_rows", "tokens_trained", "flops", "seconds", "kwh", "usd"):
        assert three["totals"][key] == pytest.approx(3 * alone["totals"][key]), key
    assert three["rungs"][0]["training"] == alone["rungs"][0]["training"]
    _, out, _ = homelab(capsys, "plan", "--watts", "100", "--seeds", "3")
    assert "Rows of one seed; there are 3 seeds (0, 1, 2)" in out
    assert "time, money of 3 seeds (0, 1, 2) together" in out and "9 runs of 3 seeds, 18 rows" in out
    lines = {line.split("  ")[0].strip(): line.split() for line in out.splitlines() if line.strip()}
    assert lines["all"][1] == "9" and lines["one seed"][2] == "3"
    _, out, _ = homelab(capsys, "plan")
    assert "one seed" not in out and "3 runs, 6 rows" in out


def test_a_number_that_is_none_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("plan", "run"):
        for value, said in (("0", "1 to 1000"), ("-1", "1 to 1000"), ("x", "--seeds")):
            code, out, err = homelab(capsys, verb, "--seeds", value)
            assert code == 2 and out == "" and said in err and err.count("\n") == 1
    assert not (here / "lab").exists()


def test_run_prepares_every_seed_and_does_not_forget_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = homelab(capsys, "run", "--prepare", "--seeds", "2")
    assert code == 0 and "6 runs of 2 seeds" in err and "prepared: 6 runs" in err
    assert specs(here) == [0, 0, 0, 1, 1, 1]
    code, _, err = homelab(capsys, "run", "--prepare")
    assert code == 0 and "prepared: 6 runs" in err
    assert "seed 1: this lab has runs of it already, so they go on" in err
    _, out, _ = homelab(capsys, "plan")
    assert "6 runs of 2 seeds" in out and "this lab has runs of it already" in out
    code, _, err = homelab(capsys, "run", "--prepare", "--seeds", "1")
    assert code == 0 and specs(here) == [0, 0, 0], "nothing of the other had begun"
    homelab(capsys, "run", "--prepare", "--seeds", "3")
    begun = next(
        p for p in (here / "lab" / "mini" / "runs").glob("a-*") if '"seed": 2' in (p / "spec.json").read_text()
    )
    (begun / "metrics.jsonl").write_text("")
    for verb in ("plan", "run"):
        code, out, err = homelab(capsys, verb, "--seeds", "2")
        assert code == 2 and out == "" and f"runs/{begun.name}" in err and err.count("\n") == 1
    assert len(specs(here)) == 9, "a refusal touches nothing"
