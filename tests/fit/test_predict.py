"""`homelab predict`: answers against the law by hand, their intervals, their reach, and what is refused."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest

from homelab_scaling import cli, codec
from homelab_scaling.errors import SpecError
from homelab_scaling.fit.answers import Prediction, Questions, predict
from homelab_scaling.fit.catalogue import CATALOGUE, open_fit
from homelab_scaling.fit.family import ShapeFamily
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.laws import CHINCHILLA
from homelab_scaling.fit.predict import budgets_of, count_of, reach, shown_factor
from homelab_scaling.fit.predict_page import count, dollars, flops, prediction_page, size
from homelab_scaling.fit.result import save_fit
from homelab_scaling.runs import LossPoint

TRUTH = np.array([1.7, 60.0, 900.0, 0.35, 0.37])
SIZES = np.geomspace(1e5, 1e8, 8)
HORIZONS = (1e7, 1e8, 1e9)


def loss(n, d):
    return float(CHINCHILLA.loss(TRUTH, {"n_params": n, "n_tokens": d}))


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    points = [
        LossPoint(
            n_params=round(n),
            n_tokens=round(d),
            loss_nats=loss(n, d) * float(np.exp(0.002 * rng.normal())),
            row_id=f"{n:.0f}@{d:.0f}",
            run_id=f"{n:.0f}@{d:.0f}",
        )
        for n in SIZES
        for d in HORIZONS
    ]
    return fit_points(points, laws=["chinchilla", "power-c", "power-n"], n_bootstrap=300, source="ladder")


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "fit"
    save_fit(report, path)
    return path


def covers(one, truth):
    return one.ci95 is not None and one.ci95[0] <= truth <= one.ci95[1] and one.ci95[0] < one.value < one.ci95[1]


def text(made: Prediction) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
    for part in prediction_page(made):
        console.print(part)
    return console.file.getvalue()


def test_loss_and_what_more_tokens_buy(report):
    made = predict(report, Questions(params=3e6, tokens=2e8))
    assert made.loss.ci95[0] <= loss(3e6, 2e8) <= made.loss.ci95[1]
    assert made.loss.extrapolation == 1
    more = made.more_tokens
    assert [d.from_tokens for d in more.doublings] == [2e8, 4e8, 8e8, 16e8]
    first = more.doublings[0]
    assert covers(first.gain_nats, loss(3e6, 2e8) - loss(3e6, 4e8))
    assert first.loss_nats.value + first.gain_nats.value == pytest.approx(made.loss.loss_nats, rel=1e-12)
    assert more.doublings[-1].furthest == "D"
    until = more.worth_until_tokens.value
    assert more.worth == "1 %"
    dear = predict(report, Questions(params=3e6, tokens=2e8, worth="5%")).more_tokens
    assert dear.worth_until_tokens.value < until
    assert more.beats_fresh_from_tokens.value < more.beats_fresh_until_tokens.value


def test_budget_beside_the_rule_and_the_exact_count(report):
    family = ShapeFamily(n_vocab=512, context_tokens=256)
    made = predict(report, Questions(flops=1e18, family=family))
    (one,) = made.budgets
    true_n = (0.35 * 60 / (0.37 * 900)) ** (1 / 0.72) * (1e18 / 6) ** (0.37 / 0.72)
    assert covers(one.fitted.n_params, true_n)
    assert covers(one.fitted.n_tokens, 1e18 / 6 / true_n)
    assert covers(one.fitted.tokens_per_param, 1e18 / 6 / true_n**2)
    assert covers(one.fitted.loss_nats, loss(true_n, 1e18 / 6 / true_n))
    assert one.rule.n_params == pytest.approx((1e18 / 120) ** 0.5)
    assert one.rule.above_best_nats.value > 0
    assert one.rule.loss_nats.value == pytest.approx(one.fitted.loss_nats.value + one.rule.above_best_nats.value)
    assert one.shapes.n_params.ci95[0] < one.shapes.n_params.value < one.shapes.n_params.ci95[1]
    assert one.shapes.shape_loss_nats >= one.shapes.loss_nats.value
    reached = max(1e18 / made.budget_range_flops[1], one.fitted.n_tokens.value / 1e9, one.fitted.n_params.value / 1e8)
    assert one.fitted.extrapolation == pytest.approx(max(reached, 1))


def test_a_size_alone_and_tokens_alone_are_each_others_inverse(report):
    forward = predict(report, Questions(params=1e7)).tokens_for_params
    truth = (0.37 * 900 * 1e7**0.35 / (0.35 * 60)) ** (1 / 0.37)
    assert covers(forward.n_tokens, truth)
    assert covers(forward.tokens_per_param, truth / 1e7)
    assert forward.n_params.ci95 is None
    back = predict(report, Questions(tokens=forward.n_tokens.value)).params_for_tokens
    assert back.n_params.value == pytest.approx(1e7, rel=1e-9)
    assert back.flops.value == pytest.approx(forward.flops.value, rel=1e-9)


def test_a_budget_and_a_size_give_the_loss_of_that_size(report):
    made = predict(report, Questions(params=1e7, flops=6e15))
    assert made.loss.at == {"n_params": 1e7, "n_tokens": 1e8}
    assert made.budgets[0].fitted.loss_nats.value <= made.loss.loss_nats
    turned = predict(report, Questions(tokens=1e8, flops=6e15))
    assert turned.loss.loss_nats == pytest.approx(made.loss.loss_nats)


def test_every_draw_stands_behind_a_serving_answer(report):
    made = predict(report, Questions(quality_of=5e7, inference_tokens=1e11)).serving
    assert made.by_flops.n_params.value < 5e7 == made.baseline.n_params.value
    low, high = made.saved_flops_frac.ci95
    assert 0 < low < made.saved_flops_frac.value < high < 1
    hard = predict(report, Questions(quality_loss=1.72)).serving
    assert 0 < hard.unreachable_frac < 1, "some draws have an irreducible loss above 1.72"
    assert "of the draws this loss is never reached" in text(predict(report, Questions(quality_loss=1.72)))


def test_trained_off_the_optimum_costs_what_it_cost(report):
    made = predict(report, Questions(quality_of=5e7, tokens=1e9, inference_tokens=1e11)).serving
    assert made.baseline.n_tokens.value == 1e9
    assert made.baseline.flops.value == pytest.approx(6 * 5e7 * 1e9 + 2 * 5e7 * 1e11)
    assert made.quality_loss_nats.value == pytest.approx(
        predict(report, Questions(params=5e7, tokens=1e9)).loss.loss_nats
    )


def test_nothing_asked_shows_three_budgets(report):
    made = predict(report, Questions())
    largest = max(6.0 * p.n_params * p.n_tokens for p in report.points)
    assert made.budget_range_flops[1] == largest
    assert [b.fitted.flops for b in made.budgets] == pytest.approx([largest, 10 * largest, 100 * largest])
    assert made.budgets[0].rule.extrapolation < 10 < made.budgets[2].rule.extrapolation
    assert any("beyond what was measured" in w for w in made.warnings)
    assert any("cross-entropy in nats per token on the held-out text of ladder" in s for s in made.assumes)


def test_laws_of_one_variable_give_losses_only(report):
    made = predict(report, Questions(flops=1e16), law="power-c")
    assert made.loss.at == {"flops": 1e16}
    assert made.budgets == ()
    assert predict(report, Questions(), law="power-c").loss.extrapolation == 1
    with pytest.raises(SpecError, match="law of C and cannot split"):
        predict(report, Questions(params=1e6, flops=1e15), law="power-c")
    with pytest.raises(SpecError, match="cannot split"):
        predict(report, Questions(quality_loss=2.0), law="power-n")
    with pytest.raises(SpecError, match="laws that can be asked here: chinchilla, power-c, power-n"):
        predict(report, Questions(flops=1e16), law="power-d")


def test_published_laws_say_that_no_interval_was_published():
    for name, one in CATALOGUE.items():
        made = predict(open_fit(name), Questions())
        assert made.law == one.law
        assert made.interval == "no interval was published with this law"
        assert made.budgets == () or made.budgets[0].fitted.n_params.ci95 is None
        assert "of the text and tokenizer of" in made.assumes[0]
        assert "no interval was published" in " ".join(text(made).split())


def test_published_figures_through_the_front_door():
    (split,) = predict(open_fit("hoffmann-2022"), Questions(flops=6e22)).budgets
    assert split.rule.n_params == pytest.approx(22.4e9, rel=2e-3)
    assert split.rule.n_tokens == pytest.approx(447e9, rel=2e-3)
    served = predict(open_fit("hoffmann-2022"), Questions(quality_of=13e9, inference_tokens=2e12)).serving
    assert served.by_flops.n_params.value == pytest.approx(7.12e9, abs=0.005e9)
    assert served.saved_flops_frac.value == pytest.approx(0.163, abs=5e-4)


def test_given_parameters_are_said_to_be_given(report):
    pinned = fit_points(report.points, laws=["chinchilla:E=1.7"], n_bootstrap=50, source="ladder")
    made = predict(pinned, Questions(flops=1e17))
    assert any(w.startswith("E = 1.7 was given to this law") for w in made.warnings)
    assert made.budgets[0].fitted.n_params.ci95 is not None


def test_without_resamples_there_are_no_intervals_and_it_says_so(report):
    bare = fit_points(report.points, laws=["chinchilla"], n_bootstrap=0, source="ladder")
    made = predict(bare, Questions(params=1e7))
    assert made.tokens_for_params.n_tokens.ci95 is None
    assert "fitted without resamples" in made.interval


def test_cache_follows_the_shape_or_the_size(report):
    given = predict(report, Questions(layers=12, width=768, context=1024, params=124e6)).kv_cache
    assert given.bytes_per_token == 36_864
    family = ShapeFamily(n_vocab=50_257, context_tokens=1024)
    of_size = predict(open_fit("hoffmann-2022"), Questions(params=124e6, family=family))
    assert (of_size.kv_cache.n_layer, of_size.kv_cache.d_model) == (12, 768)
    assert of_size.kv_cache.weight_bytes == 2 * 124_439_808
    assert of_size.tokens_for_params_by_shapes.n_tokens.value != of_size.tokens_for_params.n_tokens.value
    alone = predict(report, Questions(layers=12, width=768, context=1024))
    assert alone.budgets == ()
    with pytest.raises(SpecError, match="--context"):
        predict(report, Questions(layers=12, width=768))


def test_sizes_outside_the_shapes_are_answered_by_6nd_and_it_is_said(report):
    family = ShapeFamily(n_vocab=512, context_tokens=256)
    made = predict(report, Questions(params=1e20, family=family))
    assert made.tokens_for_params is not None
    assert made.tokens_for_params_by_shapes is None
    assert made.kv_cache is None
    assert any(w.startswith("no exact FLOPs") for w in made.warnings)
    assert predict(report, Questions(flops=1e38, family=family)).budgets[0].shapes is None


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"params": -1.0}, "--params -1: wants a number from 1"),
        ({"tokens": float("nan")}, "--tokens nan"),
        ({"flops": float("inf")}, "--flops inf"),
        ({"params": 1.0, "tokens": 1.0, "flops": 1.0}, "leaves room for two"),
        ({"layers": 3}, "both --layers and --width"),
        ({"quality_of": 1e9, "quality_loss": 2.0}, "keep one"),
        ({"inference_tokens": 1e9}, "--quality-of N"),
        ({"quality_of": 1e9}, "needs --inference-tokens"),
    ],
)
def test_questions_that_make_no_sense(asked, sentence):
    with pytest.raises(SpecError, match=re.escape(sentence)):
        Questions(**asked)


def test_repeats_and_steps_need_a_law_of_them(report):
    with pytest.raises(SpecError, match="repeated tokens"):
        predict(report, Questions(params=1e6, tokens=1e8, unique_tokens=1e7))
    with pytest.raises(SpecError, match="no steps"):
        predict(report, Questions(steps=100.0))


def test_reach_names_the_variable(report):
    fit = report.get("chinchilla")
    assert reach(fit, {"n_params": 1e6, "n_tokens": 1e8}).words == "inside"
    assert reach(fit, {"n_params": 4.2e8, "n_tokens": 2e9}).words == "N x 4.2 out"
    assert reach(fit, {"n_params": 1e6, "n_tokens": 1e6}).words == "D x 10 out"
    assert reach(fit, {"flops": 1e30}, budgets=(1e12, 1e20)).axis == "C"
    assert [shown_factor(x) for x in (1.023, 4.21, 37.2, 4.5e6)] == ["1.02", "4.2", "37", "4.5e6"]
    assert budgets_of(report, fit)[0] == min(6.0 * p.n_params * p.n_tokens for p in report.points)
    assert budgets_of(open_fit("kaplan-2020-c"), open_fit("kaplan-2020-c").fits[0])[1] == pytest.approx(8.64e20)
    with pytest.raises(SpecError, match="counted as"):
        count_of(dataclasses.replace(report, count="everything"))


def test_numbers_as_people_read_them():
    assert [count(x) for x in (124e6, 3e18, 0.5, 4.1e-7)] == ["124M", "3.00e18", "0.500", "4.10e-07"]
    assert flops(6e22) == "6.00e22"
    assert [dollars(x) for x in (0.003, 12.345, 543, 237_799)] == ["$0.003", "$12.35", "$543", "$238k"]
    assert [size(x) for x in (12, 2048, 36 * 2**20, 3 * 2**30)] == ["12 B", "2 KiB", "36 MiB", "3 GiB"]


MONEY = ("--train-mfu=0.4", "--serve-mfu=0.1", "--train-peak=97.5e12", "--serve-peak=RTX4090", "--train-usd-hour=0.3")
EVERYTHING = (
    [],
    ["--params", "1e7"],
    ["--params", "1e7", "--tokens", "1e9"],
    ["--tokens", "1e9"],
    ["--flops", "1e18", "--vocab", "512", "--context", "256"],
    ["--quality-loss", "1.9"],
    ["--quality-loss", "2.5", "--params", "1e7"],
    ["--layers", "12", "--width", "768", "--context", "1024"],
    ["--law", "power-n", "--params", "1e9"],
    ["--quality-of=5e7", "--inference-tokens=1e11", "--vocab=512", "--context=256", *MONEY],
)


@pytest.mark.parametrize("flags", EVERYTHING, ids=lambda flags: " ".join(flags[:4]) or "nothing")
def test_every_page_fits_a_hundred_columns_and_every_json_is_one_document(folder, flags, capsys):
    assert cli.main(["predict", str(folder), *flags]) == 0
    page = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in page.splitlines()) <= 100
    assert "…" not in page
    assert "Taken for granted" in page
    assert "nan" not in page
    answers = ("inside", " out", "KV cache")
    assert any(word in page for word in answers), "every answer says how far it reaches"
    assert cli.main(["predict", str(folder), *flags, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert codec.from_plain(plain, Prediction, "answer").source == "ladder"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--params", "-5"], "wants a number from 1"),
        (["--params", "many"], "--params wants a number, found 'many'"),
        (["--quality-loss", "0.5"], "irreducible loss"),
        (["--quality-loss", "1.72", "--params", "1e5"], "never reach 1.72"),
        (["--law", "power-c", "--params", "1e5"], "cannot split"),
        (["--vocab", "512"], "give --context"),
        (["--worth", "much", "--params", "1e5", "--tokens", "1e7"], "such as 1% or nats"),
        (["--train-mfu", "0.4"], "--serve-mfu, --train-peak, --train-usd-hour missing"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(folder, flags, sentence, capsys):
    assert cli.main(["predict", str(folder), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_a_source_that_is_none(capsys):
    assert cli.main(["predict", "no-such-fit"]) == 2
    assert "one of kaplan-2020" in capsys.readouterr().err
