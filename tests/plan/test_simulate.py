"""A ladder before it is run: the intervals it will have, what it cannot answer, and what a change would buy."""

import dataclasses
import json

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.result import save_fit
from homelab_scaling.fit.worlds import Noise, ladder_design, simulate_world
from homelab_scaling.ladder import Horizons
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.simulate import design_of, open_truth, shortcomings, simulate

LAW = get_law("chinchilla")
TRUTH = np.array([1.7, 60.0, 900.0, 0.35, 0.37])


@pytest.fixture
def planner(cpu):
    """Plans the quickstart, or a change of it, without shards."""
    return lambda ladder: plan_ladder(ladder, None, cpu, folder=read_ladder("quickstart")[1].parent)


@pytest.fixture
def pilot(tmp_path):
    """A fit whose law is known, as a law to simulate from."""
    design = ladder_design((5e4, 1e5, 2.5e5, 5e5, 1e6), (6e5, 1.2e6, 2.4e6))
    points = simulate_world(design, LAW, TRUTH, Noise(run_sd=0, row_sd=0))
    save_fit(fit_points(points, laws=["chinchilla"], n_bootstrap=0, source="pilot"), tmp_path / "pilot")
    return str(tmp_path / "pilot")


def quickstart(**changes):
    return dataclasses.replace(read_ladder("quickstart")[0], **changes)


def simulated(planner, truth, ladder=None, **settings):
    return simulate(
        ladder or quickstart(), planner, open_truth(truth), n_worlds=settings.pop("n_worlds", 80), **settings
    )


def test_the_design_is_the_plan_row_by_row(planner):
    ladder = quickstart(seeds=(3, 5))
    plan = planner(ladder)
    design = design_of(plan, 2, "total")
    assert len(design) == plan.totals.n_rows == 30
    assert len({row.run for row in design}) == plan.totals.n_runs == 10
    rung = plan.rungs[0]
    assert {row.n_params for row in design[:6]} == {rung.size.n_params}
    assert [row.n_tokens for row in design[:3]] == [h.tokens for h in rung.training.horizons]
    assert design[0].flops == pytest.approx(rung.training.horizons[0].flops)
    assert design_of(plan, 1, "body")[0].n_params == rung.size.params.n_body
    cosine = planner(quickstart(schedule=dataclasses.replace(ladder.schedule, name="cosine")))
    assert len({row.run for row in design_of(cosine, 1, "total")}) == 15, "every cosine run has its own noise"


def test_without_noise_the_truth_is_found_exactly(planner, pilot):
    found = simulated(planner, pilot, noise=Noise(run_sd=0, row_sd=0), n_worlds=20)
    free = found.variants[0].law("chinchilla")
    for name, truth in {"a": 0.37 / 0.72, "alpha": 0.35, "beta": 0.37, "E": 1.7}.items():
        one = free.get(name)
        assert one.truth == pytest.approx(truth, rel=1e-5)
        assert one.ci95 == pytest.approx((truth, truth), rel=1e-4)
    assert found.warnings == ()


def test_intervals_hold_the_truth_and_widen_with_the_noise(planner, pilot):
    widths = []
    for sd in (0.0003, 0.001, 0.003):
        a = simulated(planner, pilot, noise=Noise(run_sd=sd, row_sd=sd / 3)).variants[0].law("chinchilla").get("a")
        assert a.ci95[0] < 0.37 / 0.72 < a.ci95[1]
        widths.append(a.width)
    assert widths[1] == pytest.approx(widths[0] * 10 / 3, rel=0.15), "first order: noise times 3.3, width times 3.3"
    assert widths[2] > 2 * widths[1]


def test_changes_narrow_the_interval_and_cost_more(planner, pilot):
    found = simulated(planner, pilot, noise=Noise(run_sd=0.001, row_sd=0.0003), n_worlds=300)
    first, *others = found.variants
    assert [v.name for v in found.variants] == ["as written", "size x 2", "horizon x 2", "three seeds"]
    width = first.law("chinchilla").get("a").width
    for one in others:
        assert one.law("chinchilla").get("a").width < width
        assert one.flops > first.flops
    seeds = others[2]
    assert seeds.n_runs == 3 * first.n_runs and seeds.flops == pytest.approx(3 * first.flops)
    assert seeds.law("chinchilla").get("a").width == pytest.approx(width / 3**0.5, rel=0.2)


def test_a_noisy_ladder_is_told_that_it_cannot_answer_and_what_would(planner, pilot):
    found = simulated(planner, pilot, noise=Noise(run_sd=0.01, row_sd=0.003))
    assert "cannot answer it" in found.warnings[0] and "How does the loss on Python source" in found.warnings[0]
    assert any("wide" in w or "at a bound" in w for w in found.warnings)
    assert any(w.startswith(("what would:", "none of the three")) for w in found.warnings)
    quiet = simulated(planner, pilot, noise=Noise(run_sd=0.0003, row_sd=0.0001))
    assert quiet.warnings == ()


def test_a_named_target_is_judged_a_usual_one_only_noted(planner, pilot):
    noise = Noise(run_sd=0.002, row_sd=0.0005)
    usual = simulated(planner, pilot, noise=noise)
    assert not any("D_opt" in w for w in usual.warnings) and any("D_opt" in n for n in usual.notes)
    named = simulated(planner, pilot, noise=noise, targets=("d-opt:1e9",))
    assert any("D_opt at N = 1.00B are a factor of" in w for w in named.warnings)
    with pytest.raises(SpecError, match="no such quantity"):
        simulated(planner, pilot, targets=("q",))


def test_one_isoflop_budget_gives_a_minimum_and_no_law(planner, two_4080):
    ladder, path = read_ladder("isoflop_5m_25m_100m")
    found = simulate(
        ladder,
        lambda one: plan_ladder(one, None, two_4080, folder=path.parent),
        open_truth("hoffmann-2022"),
        n_worlds=100,
    )
    assert found.targets == ("d-opt:1e9", "n-opt:1.35e+17")
    first = found.variants[0]
    assert "3 points for 5 parameters" in first.law("chinchilla").why_not
    (parabola,) = first.parabolas
    assert parabola.found_frac == 1.0 and parabola.ci95[0] < parabola.without_noise < parabola.ci95[1]
    assert 3e7 < parabola.without_noise < 5e7
    assert any("no exponent" in n for n in found.notes) and found.warnings == ()
    seeds = found.variants[3]
    assert "9 points at 3 different" in seeds.law("chinchilla").why_not


def test_too_few_rows_are_a_shortcoming(planner, pilot):
    ladder = quickstart(rungs=quickstart().rungs[:3], horizons=Horizons(tokens=(600_000,)))
    found = simulated(planner, pilot, ladder)
    assert "cannot be fitted" in shortcomings(found.variants[0], ())[0]
    assert any("three sizes, each at three token counts" in w for w in found.warnings)


def test_what_cannot_be_planned_says_why(planner, pilot):
    rungs = tuple(dataclasses.replace(r, nominal_tokens=1_200_000) for r in quickstart().rungs)
    ladder = quickstart(rungs=rungs, horizons=Horizons(tokens=(600_000,), mode="nominal"))
    longer = simulated(planner, pilot, ladder).variants[2]
    assert longer.why_not == "nominal horizons are one per rung" and longer.laws == ()


def test_a_law_far_from_home_is_said(planner):
    found = simulated(planner, "hoffmann-2022")
    said = " ".join(found.notes)
    assert "own text and tokenizer" in said and "times below its smallest" in said
    assert "more than guessing among 2,048 tokens" in said
    kaplan = simulated(planner, "kaplan-2020")
    assert kaplan.truth.count == "body"
    assert kaplan.variants[0].law("chinchilla").get("E").truth is None
    assert any("these worlds obey another law" in n for n in kaplan.notes)


def test_same_seed_same_worlds(planner, pilot):
    once = simulated(planner, pilot, n_worlds=20)
    assert once == simulated(planner, pilot, n_worlds=20)
    assert once != simulated(planner, pilot, n_worlds=20, noise=Noise(seed=1))


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", ["quickstart", "gpt2_5m_120m", "isoflop_5m_25m_100m", "wikitext_786k_4m_25m"])
def test_the_page_reads_at_100_columns(name, homelab, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    said = homelab("plan", name, "--simulate", "hoffmann-2022", "--card", "RTX 4080", "--gpus", 2, "--worlds", 50)
    assert said.code == 0 and said.err == ""
    assert max(len(line) for line in said.out.splitlines()) <= 100 and "…" not in said.out
    page = said.out[said.out.index("Simulated from hoffmann-2022") :]
    for wanted in ("50 worlds", "As written, and three changes", "size x 2", "horizon x 2", "three seeds"):
        assert wanted in page, wanted


def test_json_has_the_plan_and_the_simulation(homelab, monkeypatch, tmp_path, pilot):
    monkeypatch.chdir(tmp_path)
    said = homelab("plan", "quickstart", "--gpus", 0, "--simulate", pilot, "--worlds", 30, "--json", "--write")
    document = json.loads(said.out)
    simulation = document.pop("simulation")
    plan = codec.from_plain(document, Plan, "stdout")
    assert plan == codec.read_json(tmp_path / "lab" / "quickstart" / "plan.json", Plan)
    assert simulation["n_worlds"] == 30 and len(simulation["variants"]) == 4
    a = simulation["variants"][0]["laws"][0]["expected"][0]
    assert a["name"] == "a" and a["ci95"][0] < a["truth"] < a["ci95"][1]
    assert "simulation" not in json.loads(homelab("plan", "quickstart", "--gpus", 0, "--json").out)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--simulate", "nowhere"), "no fit, folder or published law"),
        (("--simulate", "kaplan-2020-d"), "no law of N and D"),
        (("--simulate", "hoffmann-2022", "--worlds", 3), "wants 20 to 5,000"),
        (("--simulate", "hoffmann-2022", "--worlds", "many"), "whole number"),
        (("--simulate", "hoffmann-2022", "--noise", 2, 0.1), "run_sd = 2"),
        (("--simulate", "hoffmann-2022", "--noise", 0.1), "--noise"),
        (("--simulate", "hoffmann-2022", "--target", "d-opt:big"), "wants a number"),
    ],
)
def test_every_mistake_is_one_sentence(homelab, monkeypatch, tmp_path, args, said):
    monkeypatch.chdir(tmp_path)
    result = homelab("plan", "quickstart", "--gpus", 0, *args)
    assert result.code == 2 and result.out == ""
    assert said in result.err and len(result.err.strip().splitlines()) == 1
