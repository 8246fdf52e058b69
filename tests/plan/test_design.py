"""The next run: what the Jacobian promises is what simulated experiments keep, at the price the plan would give."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.fit.catalogue import joint_fit
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.points import points_csv
from homelab_scaling.fit.result import save_fit
from homelab_scaling.fit.slices import tabulate
from homelab_scaling.fit.solve import refit, solve
from homelab_scaling.fit.targets import parse_target
from homelab_scaling.fit.worlds import Design, Noise, columns_of, ladder_design, log_losses, simulate_world
from homelab_scaling.plan.budget import Facts, Offer, Price, ShapePricer, SixNd, find_lab, lab_facts, parse_budget
from homelab_scaling.plan.design import Option, _verdict, advise, offers, run_words, runs_done
from homelab_scaling.plan.information import NoiseParts, estimate_noise, information, tangent_of
from homelab_scaling.plan.ladder import plan_ladder, read_ladder

LAW = get_law("chinchilla")
TRUTH = np.array([1.7, 60.0, 900.0, 0.35, 0.37])
NOISE = Noise(run_sd=0.002, row_sd=0.001)
LADDER = ladder_design((1e5, 3e5, 1e6, 3e6, 1e7), (1e7, 3e7, 1e8))
TARGET = parse_target("d-opt:1e8", LAW)


def report_of(design, noise=NOISE, laws=("chinchilla",), n_bootstrap=0):
    return fit_points(simulate_world(design, LAW, TRUTH, noise), laws=laws, n_bootstrap=n_bootstrap, source="made")


def advice(design=LADDER, budget="1e16", target="d-opt:1e8", pricer=None, n_bootstrap=0):
    report = report_of(design, n_bootstrap=n_bootstrap)
    fit, law, drawn = joint_fit(report)
    return advise(
        report,
        fit,
        law,
        drawn,
        target=parse_target(target, law),
        budget=parse_budget(budget),
        pricer=pricer or SixNd(),
    )


def spread_of(design, n_worlds=600):
    """Standard deviation over simulated experiments of the logarithm of the target, refitted in each."""
    columns = columns_of(design)
    posed = LAW.pose(columns, LAW.loss(TRUTH, dict(columns)))
    name = parse_objective("l2-log")
    silent = np.log(LAW.loss(TRUTH, dict(columns)))
    optimum = solve(posed.model, silent, posed.starts(64), name, bounds=posed.bounds)
    y = log_losses(design, LAW, TRUTH, NOISE, n_worlds)
    found = refit(posed.model, y, np.ones(len(design)), optimum, name, bounds=posed.bounds)
    return float(np.std(TARGET.scaled(LAW, posed.natural(found.theta))))


# -------------------------------------------------------------------------------------------------------- information


def test_the_promised_error_is_the_one_that_simulated_experiments_have():
    more = [*LADDER, *(Design(n_params=4e7, n_tokens=d, run="new") for d in (1e7, 3e7, 1e8))]
    tangent = tangent_of(tabulate(simulate_world(LADDER, LAW, TRUTH, Noise(run_sd=0, row_sd=0))), LAW, "l2-log")
    noise = NoiseParts(row_sd=NOISE.row_sd, run_sd=NOISE.run_sd, basis="given")
    slope = tangent.slope(TARGET)
    now = tangent.so_far.standard_error(slope, noise)
    then = (tangent.so_far + tangent.of_run(4e7, (1e7, 3e7, 1e8))).standard_error(slope, noise)
    assert now == pytest.approx(spread_of(LADDER), rel=0.12)
    assert then == pytest.approx(spread_of(more), rel=0.12)
    assert then < 0.8 * now


def test_a_target_that_no_parameter_moves_is_refused(monkeypatch):
    """As D_opt is by a fit whose law has run into a bound: there is nothing that a run would narrow."""
    still = dataclasses.replace(TARGET, of=lambda law, values: np.full(np.asarray(values).shape[:-1], 7.0))
    monkeypatch.setattr(sys.modules[__name__], "parse_target", lambda text, law: still)
    with pytest.raises(SpecError, match="stays where it is whatever further runs would tell"):
        advice()


def test_repeating_the_whole_design_narrows_by_the_square_root_of_two():
    tangent = tangent_of(tabulate(simulate_world(LADDER, LAW, TRUTH, NOISE)), LAW, "l2-log")
    slope, twice = tangent.slope(TARGET), tangent.so_far + tangent.so_far
    ratio = twice.standard_error(slope, tangent.noise) / tangent.so_far.standard_error(slope, tangent.noise)
    assert ratio == pytest.approx(1 / math.sqrt(2), rel=1e-6)
    by_run = tangent.of_run(1e5, (1e7, 3e7, 1e8))
    for n in (3e5, 1e6, 3e6, 1e7):
        by_run = by_run + tangent.of_run(n, (1e7, 3e7, 1e8))
    assert by_run.rows == pytest.approx(tangent.so_far.rows, rel=1e-5)
    assert by_run.runs == pytest.approx(tangent.so_far.runs, rel=1e-5)


def test_run_and_row_noise_are_told_apart():
    design = ladder_design(np.geomspace(1e5, 1e7, 6).tolist(), (1e7, 3e7, 1e8, 3e8), seeds=range(10))
    tangent = tangent_of(tabulate(simulate_world(design, LAW, TRUTH, Noise(run_sd=0.004, row_sd=0.001))), LAW, "l2-log")
    assert tangent.noise.run_sd == pytest.approx(0.004, rel=0.3)
    assert tangent.noise.row_sd == pytest.approx(0.001, rel=0.15)
    alone = ladder_design(np.geomspace(1e5, 1e7, 6).tolist(), (1e8,), seeds=range(10))
    jacobian = np.ones((60, 1))
    residuals = np.random.default_rng(0).normal(0, 0.003, 60)
    found = estimate_noise(residuals, jacobian, np.arange(60))
    assert found.run_sd == 0 and found.row_sd == pytest.approx(0.003, rel=0.2) and len(alone) == 60


def test_no_spare_row_no_noise():
    with pytest.raises(SpecError, match="nothing to tell the noise from"):
        estimate_noise(np.zeros(3), np.ones((3, 3)), np.arange(3))
    with pytest.raises(SpecError, match="law of N and D"):
        tangent_of(tabulate(simulate_world(LADDER, LAW, TRUTH, NOISE)), get_law("power-n"), "l2-log")


def test_information_adds_up_over_runs():
    rows = np.array([[1.0, 2.0], [3.0, 1.0], [0.5, 0.5]])
    apart = information(rows[:2], np.zeros(2, dtype=int)) + information(rows[2:], np.zeros(1, dtype=int))
    together = information(rows, np.array([0, 0, 1]))
    assert np.allclose(apart.rows, together.rows) and np.allclose(apart.runs, together.runs)


# -------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4h", 4, "hours"),
        ("30min", 0.5, "hours"),
        ("90 s", 0.025, "hours"),
        ("2d", 48, "hours"),
        ("1e17", 1e17, "FLOPs"),
        ("3E16 FLOPs", 3e16, "FLOPs"),
        ("5kWh", 5, "kWh"),
        ("500wh", 0.5, "kWh"),
    ],
)
def test_budgets_as_people_write_them(text, amount, unit):
    found = parse_budget(text)
    assert (found.amount, found.unit) == (pytest.approx(amount), unit)


@pytest.mark.parametrize("text", ["", "h", "-1h", "0", "4 parsecs", "1e999", "4h30"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(SpecError, match="such as 4h, 30min, 1e17 or 5kWh"):
        parse_budget(text)


def test_every_offer_is_within_budget_and_near_known_ground():
    done = runs_done(tabulate(simulate_world(LADDER, LAW, TRUTH, NOISE)))
    assert {run.horizons for run in done} == {(1e7, 3e7, 1e8)} and len(done) == 5
    found = offers(done, SixNd(), parse_budget("2e15"))
    assert all(o.price.flops <= 2e15 * (1 + 1e-6) for o in found)
    assert {o.n_params for o in found if o.is_repeat} == {1e5, 3e5, 1e6, 3e6}, "the fifth costs 6e15"
    assert {o.n_params for o in found} - {1e5, 3e5, 1e6, 3e6, 1e7}, "new sizes are among them"
    assert all(1 / 2 <= h / o.n_params <= 2000 for o in found for h in o.horizons)
    assert all(len(o.horizons) == 3 for o in found), "a trunk like the others"


def test_a_budget_that_buys_nothing_says_what_would():
    done = runs_done(tabulate(simulate_world(LADDER, LAW, TRUTH, NOISE)))
    with pytest.raises(SpecError, match=r"buys no run: the cheapest run costs 1.5e\+13 FLOPs"):
        offers(done, SixNd(), parse_budget("1e9"))
    with pytest.raises(SpecError, match="--vocab and --context"):
        offers(done, SixNd(), parse_budget("4h"))


def test_shapes_are_priced_as_the_plan_prices_them(make_corpus, two_4080):
    ladder, path = read_ladder("gpt2_5m_120m")
    corpus = make_corpus(tokenizer="gpt2", n_vocab=50_257)
    plan = plan_ladder(ladder, corpus, two_4080, folder=path.parent)
    rung = plan.rungs[3]
    facts = Facts(
        n_vocab=50_257,
        context_tokens=1024,
        optim=ladder.optim,
        schedule=ladder.schedule,
        batches=((rung.size.n_params, rung.training.batch_tokens),),
        shapes=(rung.size.shape,),
        money=ladder.money,
    )
    pricer = ShapePricer(facts=facts, box=two_4080)
    offer = pricer.offer(rung.size.n_params, [h.tokens for h in rung.training.horizons])
    assert offer.shape == rung.size.shape and offer.n_params == rung.size.n_params
    assert offer.price.flops == rung.bill.flops
    assert offer.price.hours == pytest.approx(rung.bill.seconds / 3600, rel=0.02)
    assert offer.price.kwh == pytest.approx(rung.bill.kwh, rel=0.02)
    body = ShapePricer(facts=facts, box=two_4080, count="body").offer(2e7, (1e8,))
    assert body.n_params == pytest.approx(2e7, rel=0.2)
    assert pricer.offer(2e10, (1e9,)) is None, "larger than the card"


# -------------------------------------------------------------------------------------------------------------- advice


def test_the_best_option_narrows_most_and_repeats_are_beside_it():
    found = advice(budget="2e16", n_bootstrap=200)
    kinds = [o.kind for o in found.options]
    assert kinds[-1] == "one more seed of all" and "same sizes again" in kinds and "one run" in kinds
    assert all(o.within_budget == (o.price.flops <= 2e16 * (1 + 1e-9)) for o in found.options)
    *news, same, every = found.options
    assert [o.width_frac for o in news] == sorted(o.width_frac for o in news)
    assert news[0].width_frac < same.width_frac < 1
    assert every.width_frac == pytest.approx(1 / math.sqrt(2), rel=1e-3)
    low, high = found.ci95_now
    assert low < found.value < high and found.ci95_resampled is not None
    best = news[0]
    assert math.log(best.ci95[1] / best.ci95[0]) == pytest.approx(best.width_frac * math.log(high / low))
    assert "bring" in found.verdict


def test_a_larger_budget_never_buys_less():
    widths = [min(o.width_frac for o in advice(budget=b).options if o.within_budget) for b in ("1e15", "1e16", "1e17")]
    assert widths[0] > widths[1] > widths[2]


def _option(kind, width):
    offer = Offer(n_params=1e6, horizons=(1e7, 1e8), price=Price(flops=6e14))
    return Option(
        kind=kind,
        runs=(offer,),
        price=offer.price,
        within_budget=True,
        ci95=(1.0, 2.0),
        width_frac=width,
        gain_per_unit=1.0,
    )


@pytest.mark.parametrize(
    ("best", "same", "said"),
    [
        (0.5, 0.98, "more of the same sizes does not help"),
        (0.5, 0.85, "helps little"),
        (0.5, 0.65, "part of the way"),
        (0.5, 0.52, "nearly as good"),
        (0.98, 0.99, "no run within 4 h narrows"),
        (0.9, 0.5, "more seeds of the sizes there are do best"),
    ],
)
def test_the_verdict_says_whether_more_of_the_same_helps(best, same, said):
    options = [_option("one run", best), _option("same sizes again", same)]
    assert said in _verdict(options, TARGET, parse_budget("4h"))


def test_runs_in_words():
    offer = Offer(n_params=1e6, horizons=(1e7, 1e8), price=Price(flops=6e14))
    other = Offer(n_params=5.1e7, horizons=(1e9,), price=Price(flops=3e17))
    assert run_words([other, offer, offer]) == "2 x 1.00M on 100M and 51.0M on 1.00B tokens"


def test_far_targets_are_said():
    assert any("times beyond the largest size" in n for n in advice(target="d-opt:1e9").notes)
    assert not any("beyond" in n for n in advice(target="a").notes)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def saved(tmp_path):
    return save_fit(report_of(LADDER, n_bootstrap=100), tmp_path / "fit").parent


def test_the_command_prints_a_table_and_one_json(saved, homelab, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = homelab("next", saved, "--budget", "1e16", "--target", "d-opt:100M")
    assert said.code == 0 and said.err == ""
    assert max(len(line) for line in said.out.splitlines()) <= 100
    for wanted in ("D_opt at N = 100M now", "same sizes again", "one more seed of all", "Verdict:", "6 N D FLOPs"):
        assert wanted in said.out
    found = json.loads(homelab("next", saved, "--budget", "1e16", "--json").out)
    assert found["target"] == "d-opt:1e9" and found["budget"] == {"amount": 1e16, "unit": "FLOPs"}
    assert found["options"][0]["runs"][0]["price"]["flops"] > 0


def test_stated_shapes_take_hours(saved, homelab):
    args = ("--vocab", 2048, "--context", 128, "--card", "RTX 4080", "--json")
    found = json.loads(homelab("next", saved, "--budget", "4h", *args).out)
    assert found["options"][0]["runs"][0]["shape"]["context_tokens"] == 128
    assert 0 < found["options"][0]["price"]["hours"] <= 4 * (1 + 1e-9)
    found = json.loads(homelab("next", saved, "--budget", "1kWh", *args).out)
    assert 0 < found["options"][0]["price"]["kwh"] <= 1 + 1e-9


def test_a_lab_knows_its_shapes(tmp_path, homelab, make_corpus, cpu):
    ladder, path = read_ladder("quickstart")
    plan = plan_ladder(ladder, make_corpus(n_train=10**8), cpu, folder=path.parent)
    lab = tmp_path / "quickstart"
    codec.write_json(lab / "plan.json", plan)
    design = []
    for run in plan.runs:
        codec.write_json(lab / "runs" / run.run_id / "spec.json", run)
        size = next(r.size for r in plan.rungs if r.name == run.rung)
        design += [Design(n_params=size.n_params, n_tokens=d, run=run.run_id) for d in run.science.horizons_tokens]
    save_fit(report_of(design), lab / "fit")
    assert find_lab(str(lab / "fit" / "fit.json")) == lab
    facts, measured = lab_facts(lab)
    assert (facts.n_vocab, facts.context_tokens, facts.n_train_tokens, measured) == (2048, 128, 10**8, ())
    assert facts.batches[0][1] == 1024
    found = json.loads(homelab("next", lab, "--budget", "10min", "--gpus", "0", "--json").out)
    runs = [run for option in found["options"] for run in option["runs"]]
    shapes = {rung.size.n_params: codec.to_plain(rung.size.shape) for rung in plan.rungs}
    assert any(run["is_repeat"] and run["shape"] == shapes[run["n_params"]] for run in runs)
    assert all(max(run["horizons"]) <= 10**8 for run in runs)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--budget", "soon"), "such as 4h"),
        ((), "--budget"),
        (("--budget", "4h"), "--vocab and --context"),
        (("--budget", "1e16", "--vocab", "100"), "belong together"),
        (("--budget", "1e16", "--target", "d-opt:"), "wants a number"),
        (("--budget", "1e16", "--target", "loss:1e9"), "wants 2 numbers"),
        (("--budget", "1e16", "--target", "gamma"), "no such quantity"),
        (("--budget", "1e16", "--law", "kaplan"), "no fitted kaplan"),
        (("--budget", "1"), "buys no run"),
        (("--budget", "1e16", "--watts", "-3"), "positive number"),
    ],
)
def test_every_mistake_is_one_sentence(saved, homelab, args, said):
    result = homelab("next", saved, *args)
    assert result.code == 2 and result.out == ""
    assert said in result.err and len(result.err.strip().splitlines()) == 1


def test_a_fit_without_rows_has_nothing_to_add_to(homelab, tmp_path):
    assert "are not known" in homelab("next", "hoffmann-2022", "--budget", "1e17").err
    (tmp_path / "points.csv").write_text(points_csv(simulate_world(LADDER, LAW, TRUTH, NOISE)), encoding="utf-8")
    assert homelab("next", tmp_path, "--budget", "1e17").code == 2
