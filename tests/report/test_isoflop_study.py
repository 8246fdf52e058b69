"""The isoFLOP study: a planted D_opt within its interval, nothing claimed from three points, files to the letter."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from planted_ladder import fit_lab, plant

from homelab_scaling import codec
from homelab_scaling.errors import MachineError
from homelab_scaling.fit.allocate import Terms, tokens_for
from homelab_scaling.fit.catalogue import CATALOGUE
from homelab_scaling.fit.isoflop import vertex_interval
from homelab_scaling.fit.laws import CHINCHILLA
from homelab_scaling.ladder import BatchTable, DataTable, Horizons, Ladder, Rung
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.report import figures, isoflop_plots, isoflop_study, plots, target
from homelab_scaling.report.collect import collect
from homelab_scaling.report.document import to_markdown
from homelab_scaling.report.story import tell
from homelab_scaling.report.style import LIGHT, themed
from homelab_scaling.report.tensorboard import png_size

TRUTH = {"E": 1.82, "A": 482.0, "alpha": 0.35, "B": 2085.0, "beta": 0.37}
FILES = {"lab_runs.csv", "lab_fit.json", "iso-flop.png", "prediction.md"}


def law(n, d):
    return TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]


def d_opt(n=1e9):
    values = np.array([TRUTH[name] for name in CHINCHILLA.names])
    return float(tokens_for(Terms.of(CHINCHILLA, values), n))


SIZES = (3_000_000, 6_000_000, 12_000_000, 24_000_000, 50_000_000, 100_000_000)
WIDE = Ladder(
    name="wide",
    rungs=tuple(Rung(name=f"{n // 10**6}m", n_params_target=n) for n in SIZES),
    horizons=Horizons(flops=(3e16, 3e17, 3e18)),
    data=DataTable(tokenizer="bpe:2048"),
    batch=BatchTable(tokens=32_768),
)


def three(name="isoflop_5m_25m_100m"):
    return read_ladder(name)[0]


def report(lab):
    """What `homelab report` writes of the study, without the other figures."""
    view = collect(lab)
    pictures = [figures._draw(kind, view) for kind in figures.FIGURES if kind.draw is isoflop_plots.isoflop_curves]
    isoflop_study.write_isoflop_study(view, pictures)
    codec.write_text(lab / "report" / "report.md", to_markdown("t", tell(view, pictures)))
    return pictures


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Six sizes at three budgets, a little noise, fitted and told; made once, read by many."""
    lab = tmp_path_factory.mktemp("labs") / "wide"
    plant(lab, WIDE, law, n_vocab=2048, noise=0.002)
    fit_lab(lab)
    report(lab)
    return lab


@pytest.fixture(scope="module", params=["isoflop_5m_25m_100m", "isoflop_5m_25m_100m_nominal"])
def published(request, tmp_path_factory):
    """The shipped three sizes, solved for the budget or on the published tokens."""
    lab = tmp_path_factory.mktemp("labs") / request.param
    plant(lab, three(request.param), law)
    fit_lab(lab)
    report(lab)
    return lab


def lab_fit(lab):
    return json.loads((lab / "lab_fit.json").read_text())


def numbers(text):
    """22.6B as 22.6e9."""
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}
    found = re.findall(r"(\d[\d.]*)([kMBT]?)\b", text)
    return [float(digits) * scale[letter] for digits, letter in found]


# -------------------------------------------------------------------------------------------------- enough points


def test_a_planted_law_gives_its_own_optimum_within_a_finite_interval(wide):
    text = (wide / "prediction.md").read_text()
    value, low, high = numbers(re.search(r"D_opt = (\S+) tokens \(95 % interval \[(.*?)\]\)", text).expand(r"\1 \2"))
    assert low < d_opt() < high < 30 * low and low < value < high
    ratio, r_low, r_high = numbers(
        re.search(r"D/N = (\S+) tokens per parameter \(95 % interval \[(.*?)\]\)", text).expand(r"\1 \2")
    )
    assert (ratio, r_low, r_high) == pytest.approx((value / 1e9, low / 1e9, high / 1e9), rel=0.01)
    flops = float(re.search(r"C = 6 N D = (\S+) FLOPs", text)[1])
    assert flops == pytest.approx(6e9 * value, rel=0.01)


def test_the_parameters_are_those_of_the_fit(wide):
    found = lab_fit(wide)
    assert list(found) == ["E", "A", "alpha", "B", "beta"]
    fit = collect(wide).fit.get("chinchilla")
    for name, one in found.items():
        assert list(one) == ["point", "ci95", "reason"]
        assert one["ci95"] == pytest.approx(fit.parameters[name].ci95)
        assert one["ci95"][0] < TRUTH[name] < one["ci95"][1], name
        assert one["point"] == fit.parameters[name].value
        assert (one["point"] is None) == (one["reason"] is not None)
    assert found["alpha"]["point"] is not None and found["beta"]["point"] is not None


def test_runs_csv_holds_every_row_to_the_last_digit(wide):
    text = (wide / "lab_runs.csv").read_text()
    assert text.splitlines()[0] == "run_id,N,D,val_loss,usd" and "\r" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    view = collect(wide)
    assert len(rows) == len(view.rows) == 18
    for line, row in zip(rows, view.rows, strict=True):
        assert line["run_id"] == row.run_id
        assert (int(line["N"]), int(line["D"])) == (row.n_params, row.n_tokens)
        assert (float(line["val_loss"]), float(line["usd"])) == (row.loss_nats, row.usd)


def test_the_rule_and_the_risk_are_told_in_both_places(wide):
    text = (wide / "prediction.md").read_text()
    page = (wide / "report" / "report.md").read_text()
    said = [line for line in text.splitlines() if line.startswith(("Against 20 tokens", "Extrapolation risk"))]
    assert len(said) == 2 and all(line in page for line in said)
    rule, risk = said
    for ratio in ("29 by Hoffmann", "44 by the same with its constants as the text rounds", "23 by Besiroglu"):
        assert ratio in rule, ratio
    largest = max(row.n_params for row in collect(wide).rows)
    assert f"N = 1.00B is {np.log10(1e9 / largest):.1f} decades beyond" in risk
    for wanted in (
        "Held out: fitted to the smaller sizes alone",
        "Without the largest size",
        "laws of these rows that hold-out does not discard",
    ):
        assert wanted in risk, wanted


def test_the_ratio_beside_twenty_names_the_side(wide):
    view = collect(wide)
    found = target.target_by(view, "chinchilla")
    low, high = found.best.tokens_per_param.ci95
    for rule, said in ((low / 2, "for more"), (high * 2, "for fewer"), ((low + high) / 2, "do not speak against")):
        assert said in target._beside(rule, found.best.tokens_per_param)
    assert "neither supports the rule nor speaks against it" in target._beside(
        20.0, found.best.tokens_per_param, is_pinned=False
    )


def test_picture_has_an_interval_for_six_sizes_and_stands_in_its_section(wide):
    width, height = png_size((wide / "iso-flop.png").read_bytes())
    assert 1000 <= width <= 1400 and 400 <= height <= 900
    page = (wide / "report" / "report.md").read_text()
    assert page.count("(isoflop_curves.png)") == 1
    study = page[page.index("## The isoFLOP study") : page.index("## What was run")]
    assert (
        "(isoflop_curves.png)" in study
        and "![Loss at equal compute](iso-flop.png)" in (wide / "prediction.md").read_text()
    )
    with themed(LIGHT) as plt:
        axes = isoflop_plots.isoflop_curves(plt, collect(wide), LIGHT).axes
        assert len(axes) == 1
        assert "its minimum with 95 % interval" in [t.get_text() for t in axes[0].get_legend().get_texts()]
        assert not [t for t in axes[0].texts if "three sizes" in t.get_text()]


def test_minima_of_the_budgets_are_where_the_law_has_them(wide):
    for budget in isoflop_plots.measured_budgets(collect(wide)):
        best = isoflop_plots.minimum_of(budget)
        if best is None:
            continue
        rows = [row for row in collect(wide).rows if abs(row.flops / budget.flops - 1) < 0.05]
        fine = np.geomspace(budget.sizes.min(), budget.sizes.max(), 2000)
        rate = np.interp(fine, [r.n_params for r in rows], [r.flops / r.n_tokens for r in rows])
        truth = fine[np.argmin(law(fine, budget.flops / rate))]
        assert best.n_params == pytest.approx(truth, rel=0.35)


# ---------------------------------------------------------------------------------------------------- three points


def test_three_points_give_nulls_with_their_reasons_and_a_range(published):
    found = lab_fit(published)
    assert list(found) == ["E", "A", "alpha", "B", "beta"]
    for name, one in found.items():
        assert one["point"] is None and one["ci95"] is None
        assert one["reason"].startswith("3 points for 5 parameters")
        span = re.search(rf"laws through all points have {name} in \[(.*?)\]", one["reason"])[1]
        low, high = (float(end) for end in span.split(", "))
        assert low < TRUTH[name] < high, name
    text = (published / "prediction.md").read_text()
    assert "**unknown** D_opt for N = 1.00B" in text
    assert "No D_opt for N = 1.00B follows from this lab: 3 points for 5 parameters" in text
    assert "not an interval" in text and "95 % interval" not in text
    assert "neither support the rule nor speak against it" in text


def test_the_true_law_is_among_those_that_three_points_leave_open(published):
    (low, high), ratio, n_laws = target.range_of_laws(collect(published))
    assert low < d_opt() < high and high > 30 * low and n_laws > 50
    assert ratio == pytest.approx((low / 1e9, high / 1e9))


def test_no_interval_on_a_parabola_through_three_sizes_and_the_profile_beside_it(published):
    view = collect(published)
    (budget,) = isoflop_plots.measured_budgets(view)
    best = isoflop_plots.minimum_of(budget)
    assert best is not None and best.ci95 is None
    with themed(LIGHT) as plt:
        left, right = isoflop_plots.isoflop_curves(plt, view, LIGHT).axes
        key = [t.get_text() for t in left.get_legend().get_texts()]
        assert "parabola (no interval)" in key and not any("95 %" in text for text in key)
        told = [t.get_text() for t in left.texts]
        assert ("three sizes: no interval" in told) == ("1.35e17 FLOPs" in told) == (budget.flops is not None)
        assert not [line for line in left.lines if line.get_linewidth() == 5]  # the bar of an interval
        curves = {line.get_label(): line for line in right.lines if not line.get_label().startswith("_")}
        assert set(curves) == {r"$\alpha$", r"$\beta$"}
        for line in curves.values():  # nearly every exponent passes through three points
            assert np.mean(np.asarray(line.get_ydata()) < 0.3) > 0.5
    assert png_size((published / "iso-flop.png").read_bytes())[0] >= 1000


def test_hoffmanns_rounded_law_at_the_published_runs_is_said_beside_what_was_printed(published):
    assert CATALOGUE["hoffmann-2022-rounded"].values == {
        "E": 1.69,
        "A": 406.4,
        "B": 410.7,
        "alpha": 0.34,
        "beta": 0.28,
    }
    view = collect(published)
    assert [rung.n_params for rung in view.published] == pytest.approx([5e6, 2.5e7, 1e8])
    assert [rung.n_tokens for rung in view.published] == [4_500_000_000, 900_000_000, 225_000_000]
    assert [f"{x:.2f}" for x in isoflop_study.rounded_losses(view)] == ["4.65", "4.21", "4.35"]
    text = (published / "report" / "report.md").read_text()
    assert "give 4.65, 4.21 and 4.35 nats for the 3 runs" in text
    assert "prints 4.66, 4.40 and 4.48, +0.01, +0.19 and +0.13 from that law" in text


def test_the_ladders_question_is_answered_first(published, wide):
    page = (published / "report" / "report.md").read_text()
    answer = page[: page.index("## The isoFLOP study")]
    view = collect(published)
    best = min(view.rows, key=lambda row: row.loss_nats)
    assert f"{best.loss_nats:.3f}" in answer
    if published.name.endswith("nominal"):
        assert "no size can be called best for its compute" in answer
    else:
        (budget,) = isoflop_plots.measured_budgets(view)
        low = isoflop_plots.minimum_of(budget).n_params
        assert (
            f"At 1.35e17 FLOPs the loss is lowest near N = {low / 1e6:.1f}M (a parabola through three sizes" in answer
        )
    assert "of the sizes trained N = " in (wide / "report" / "report.md").read_text().split("## ")[0]


def test_the_figure_of_sizes_at_equal_tokens_is_no_answer_here(published):
    view = collect(published)
    size = next(kind for kind in figures.FIGURES if kind.draw is plots.loss_against_size)
    one = figures.Picture(
        name="loss_against_size", title="t", caption="c", light_png=b"", dark_png=b"", section=size.section
    )
    (moved,) = isoflop_study.other_pictures(view, [one])
    assert moved == replace(one, section="figures")
    assert isoflop_study.other_pictures(replace(view, horizons=None), [one]) == [one]


def test_the_published_tokens_are_three_budgets_by_exact_count(published):
    nominal = published.name.endswith("nominal")
    view = collect(published)
    assert [f"{rung.flops_full:.1e}" for rung in view.published] == ["5.6e+17", "2.7e+17", "2.3e+17"]
    assert [f"{rung.flops_causal:.1e}" for rung in view.published] == ["5.2e+17", "2.6e+17", "2.2e+17"]
    plan = codec.read_json(published / "plan.json", Plan)
    said = [w for w in plan.warnings if "5.6e17, 2.7e17 and 2.3e17 FLOPs" in w and "not one budget" in w]
    assert len(said) == nominal
    text = (published / "prediction.md").read_text()
    assert ("5.6e17, 2.7e17 and 2.3e17 FLOPs" in text) == nominal
    assert ("1.35e17 FLOPs counted over every matmul" in text) != nominal
    title = "Loss at the published tokens: not one budget" if nominal else "Loss at equal compute"
    with themed(LIGHT) as plt:
        assert isoflop_plots.isoflop_curves(plt, view, LIGHT).axes[0].get_title(loc="left") == title


def test_the_nominal_ladder_is_the_other_one_on_the_published_tokens():
    exact, nominal = three(), three("isoflop_5m_25m_100m_nominal")
    assert (exact.horizons.mode, nominal.horizons.mode) == ("exact", "nominal")
    assert (
        replace(
            nominal,
            name=exact.name,
            question=exact.question,
            horizons=exact.horizons,
            data=replace(nominal.data, max_bytes=exact.data.max_bytes),
        )
        == exact
    )
    plan = plan_ladder(nominal, None, box_with("RTX 4080", 2))
    for rung, wanted in zip(plan.rungs, (4.5e9, 9e8, 2.25e8), strict=True):
        assert [h.tokens for h in rung.training.horizons] == pytest.approx([wanted], rel=1.2e-3)


def test_the_miniature_asks_the_same_and_its_middle_size_is_not_at_an_end():
    mini, whole = three("isoflop_5m_25m_100m_cpu"), three()
    assert len(mini.rungs) == len(whole.rungs) == 3
    assert len(mini.horizons.flops) == 1 and mini.horizons.mode == "exact" and mini.batch.tokens is not None


def test_seeds_of_three_sizes_are_judged_by_their_mean_and_still_no_law(tmp_path):
    lab = tmp_path / "isoflop_5m_25m_100m"
    plant(lab, replace(three(), seeds=(0, 1, 2)), law, noise=0.004)  # beyond what a single run may miss
    fit_lab(lab)
    view = collect(lab)
    assert view.fit.get("chinchilla").status.startswith("not fitted: 9 points at 3 different")
    assert "seed means of all 3 places" in view.fit.get("chinchilla").interval
    assert target.range_of_laws(view) is not None
    (budget,) = isoflop_plots.measured_budgets(view)
    assert isoflop_plots.minimum_of(budget).ci95 is None


@pytest.mark.parametrize("published", ["isoflop_5m_25m_100m"], indirect=True)
def test_homelab_report_writes_the_files_beside_the_page(published, homelab):
    before = {name: (published / name).read_bytes() for name in FILES}
    for name in FILES:
        (published / name).unlink()
    assert homelab("report", published).code == 0
    assert {name: (published / name).read_bytes() for name in FILES} == before
    assert (published / "report" / "isoflop_curves.png").read_bytes() == before["iso-flop.png"]
    page = (published / "report" / "report.html").read_text()
    assert "<h2>The isoFLOP study</h2>" in page and "Extrapolation risk: " in page and "Against 20 tokens" in page


# -------------------------------------------------------------------------------------------------- what went wrong


def files(lab):
    return {name for name in FILES if (lab / name).exists()}


def test_a_diverged_and_a_missing_run_are_named_and_leave_their_lines_out(tmp_path):
    lab = tmp_path / "isoflop_5m_25m_100m"
    plant(lab, three(), law, diverged=["25m"], missing=["100m"])
    report(lab)  # a single row: no fit can be made
    assert files(lab) == FILES - {"iso-flop.png"}
    assert len((lab / "lab_runs.csv").read_text().splitlines()) == 2
    assert all(one["reason"] == "one row is no law" for one in lab_fit(lab).values())
    text = (lab / "prediction.md").read_text()
    assert "diverged: the loss was no number at step 7" in text and "There is no iso-flop.png" in text
    plant(lab, three(), law, diverged=["25m"])
    fit_lab(lab)
    report(lab)
    assert len((lab / "lab_runs.csv").read_text().splitlines()) == 3
    assert lab_fit(lab)["E"]["reason"].startswith("2 points for 5 parameters")
    assert "No D_opt for N = 1.00B" in (lab / "prediction.md").read_text()


def test_nothing_measured_is_said_and_an_old_picture_goes(tmp_path):
    lab = tmp_path / "isoflop_5m_25m_100m"
    plant(lab, three(), law, missing=["5m", "25m", "100m"])
    (lab / "iso-flop.png").write_bytes(b"of an earlier ladder")
    (lab / "runs").mkdir()
    report(lab)
    assert files(lab) == FILES - {"iso-flop.png"}
    assert (lab / "lab_runs.csv").read_text() == "run_id,N,D,val_loss,usd\n"
    assert {one["reason"] for one in lab_fit(lab).values()} == {"no run has finished a row yet"}
    assert "no run has finished a row yet" in (lab / "prediction.md").read_text()


def test_an_unknown_cost_is_empty_and_no_resamples_no_interval(tmp_path):
    lab = tmp_path / "wide"
    plant(lab, WIDE, law, n_vocab=2048)
    fit_lab(lab, n_bootstrap=0, laws=["chinchilla"])
    view = collect(lab)
    view = replace(view, rows=tuple(replace(row, usd=None) for row in view.rows))
    assert all(line.endswith(",") for line in isoflop_study.lab_runs(view).splitlines()[1:])
    found = isoflop_study.lab_fit(view)
    assert found["E"].point == pytest.approx(TRUTH["E"], rel=1e-4)
    assert found["E"].ci95 is None and found["E"].reason == "no interval: fitted without resamples"
    text = isoflop_study.prediction(view, [])
    assert "(95 % interval none)" in text and "--bootstrap" in text


def test_six_points_have_an_interval_that_is_not_to_be_relied_on_and_nothing_held_out(tmp_path):
    lab = tmp_path / "wide"
    plant(
        lab, replace(WIDE, rungs=WIDE.rungs[::2], horizons=Horizons(flops=(1e17, 1e18))), law, n_vocab=2048, noise=0.005
    )
    fit_lab(lab, laws=["chinchilla"], n_bootstrap=100)
    text = isoflop_study.prediction(collect(lab), [])
    assert "With 6 points of 3 runs for 5 parameters" in text and "do not rely on the width" in text
    assert "Nothing was held out" in text and "Without its largest size the lab could not carry this law" in text
    assert "- The interval is from few runs (3)" in text
    assert text.count("trust the widest") <= 1


def test_losses_too_noisy_for_an_optimum_do_not_get_one(tmp_path):
    lab = tmp_path / "wide"
    plant(
        lab, replace(WIDE, rungs=WIDE.rungs[1:5], horizons=Horizons(flops=(3e16, 3e17))), law, n_vocab=2048, noise=0.03
    )
    fit_lab(lab, laws=["chinchilla"], n_bootstrap=100)
    view = collect(lab)
    assert not target.target_by(view, "chinchilla").is_pinned
    text = isoflop_study.prediction(view, [])
    assert "**not pinned down** D_opt for N = 1.00B" in text and "is no prediction" in text
    assert isoflop_study.lab_fit(view)["alpha"].point is None
    assert "nan" not in text and "inf" not in json.dumps(codec.to_plain(isoflop_study.lab_fit(view)))


def test_a_fit_without_the_joint_law_and_lost_draws_are_said(wide, tmp_path):
    view = collect(wide)
    without = replace(view.fit, fits=tuple(f for f in view.fit.fits if f.law != "chinchilla"))
    without.points.extend(view.fit.points)
    assert "holds no L(N, D)" in isoflop_study.lab_fit(replace(view, fit=without))["E"].reason
    gone = replace(view.fit)
    gone.points.extend(view.fit.points)
    text = isoflop_study.prediction(replace(view, fit=gone), [])
    assert "the draws of the fit are gone" in text


def test_other_ladders_get_none_of_it(tmp_path):
    lab = tmp_path / "other"
    ladder = replace(WIDE, name="other", horizons=Horizons(tokens=(10_000_000, 20_000_000)))
    plant(lab, ladder, law, n_vocab=2048)
    view = collect(lab)
    isoflop_study.write_isoflop_study(view, [])
    assert files(lab) == set()
    assert "isoFLOP study" not in to_markdown("t", tell(view, []))


def test_a_folder_that_cannot_be_written_is_one_sentence_and_leaves_nothing_half_written(published, monkeypatch):
    before = {name: (published / name).read_bytes() for name in FILES}
    view = collect(published)

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(codec.os, "replace", full_disk)
    with pytest.raises(MachineError, match=r"lab_runs\.csv: could not be written \(No space left on device\)"):
        isoflop_study.write_isoflop_study(view, [])
    assert {name: (published / name).read_bytes() for name in FILES} == before
    assert not list(published.glob(".*.tmp"))


def test_writing_again_changes_nothing(published):
    before = {name: (published / name).read_bytes() for name in FILES}
    (picture,) = report(published)
    assert {name: (published / name).read_bytes() for name in FILES} == before
    assert picture.light_png == before["iso-flop.png"] != picture.dark_png


# --------------------------------------------------------------------------------------------------- Fieller's interval


def test_the_vertex_lies_in_its_interval_as_often_as_it_says():
    rng = np.random.default_rng(1)
    x = np.log(np.geomspace(1e6, 2e7, 6))
    truth = x[0] + 0.55 * np.ptp(x)
    inside = bounded = 0
    for _ in range(600):
        ends = vertex_interval(x, 3 + 0.05 * (x - truth) ** 2 + 0.004 * rng.normal(size=6))
        if ends is not None:
            bounded += 1
            inside += ends[0] <= truth <= ends[1]
    assert bounded > 570
    assert inside / bounded == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    "y", [[3.0, 2.9, 3.0], [3.0, 3.1, 3.1, 3.0], [3.0, 2.95, 3.05, 2.9]], ids=["three sizes", "bent down", "no curve"]
)
def test_what_has_no_sure_minimum_has_no_interval(y):
    assert vertex_interval(np.linspace(14, 17, len(y)), np.array(y)) is None


def test_an_exact_parabola_is_sure():
    x = np.linspace(14.0, 17.0, 5)
    low, high = vertex_interval(x, 3 + 0.1 * (x - 15.2) ** 2)
    assert low == pytest.approx(15.2, abs=1e-5) and high == pytest.approx(15.2, abs=1e-5)
