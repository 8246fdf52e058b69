"""The report of every kind of lab: full, one rung, diverged, nothing at all. Numbers in it come from the data."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from homelab_scaling import cli, codec
from homelab_scaling.errors import MachineError, SpecError
from homelab_scaling.fit.card import FitCard, fit_card, read_training
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.points import read_points
from homelab_scaling.fit.predict import draws_of, predict_loss, predict_split
from homelab_scaling.fit.result import load_fit, save_fit
from homelab_scaling.report import fit_plots, isoflop_plots, tensorboard
from homelab_scaling.report.collect import collect
from homelab_scaling.report.document import Grid, Heading, Image, Paragraph, inline, to_html, to_markdown
from homelab_scaling.report.figures import FIGURES, NoPicture, Picture, draw_all
from homelab_scaling.report.page import write_report
from homelab_scaling.report.story import tell
from homelab_scaling.report.style import DARK, LIGHT, nice_ticks, ordered_colours, spread, themed
from homelab_scaling.report.tensorboard import png_size
from homelab_scaling.report.words import duration, money
from homelab_scaling.runs import LossPoint

# A finished lab has nothing to check, and this one measured no batch (test_batch.py).
NAMES = {kind.draw.__name__ for kind in FIGURES if kind.section in ("answer", "figures")} - {"on_the_law"}


def fit_lab(lab, n_bootstrap=100, laws=()):
    """A fit on disk; naming laws leaves the evidence out, which takes most of the time."""
    table = read_points(lab)
    report = fit_points(
        table.points, table.excluded, laws=laws, source=table.source, notes=table.notes, n_bootstrap=n_bootstrap
    )
    save_fit(report, lab / "fit")
    return report


@pytest.fixture(scope="module")
def full(tmp_path_factory, request):
    """A finished lab with its fit and report; made once, read by many."""
    make = request.getfixturevalue("make_lab")
    lab = make(tmp_path_factory.mktemp("labs") / "quickstart").all_rungs().lab
    fit_lab(lab)
    write_report(lab)
    return lab


def told(lab):
    """The report's text without drawing anything."""
    return to_markdown("t", tell(collect(lab), []))


def pictures_of(lab):
    """The pictures that were drawn, read back."""
    pngs = {name: (lab / "report" / f"{name}.png").read_bytes() for name in sorted(NAMES)}
    return [Picture(name=n, title=n, caption=n, light_png=png, dark_png=png) for n, png in pngs.items()]


class Outside(html.parser.HTMLParser):
    """Collects whatever a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.stack = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "poster") and not value.startswith("data:"):
                self.found.append(f"{tag} {name}={value[:60]}")
        if tag not in ("meta", "img", "source", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_full_lab_tells_the_law_first(full):
    text = (full / "report" / "report.md").read_text()
    fit = load_fit(full / "fit").get("power-n")
    exponent = fit.derived["exponent"]
    lead = text.split("\n\n")[1]
    assert f"exponent {exponent.value:.3g} [{exponent.ci95[0]:.3g}, {exponent.ci95[1]:.3g}]" in lead
    assert f"R² = {fit.derived['r2_log'].value:.4f}" in lead
    assert f"by {100 * (1 - 2**-exponent.value):.1f} %" in lead
    assert "the loss falls at every step in size" in text
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        "What was run",
        "The laws",
        "Evidence",
        "What the seed alone does",
        "Figures",
        "What is weak",
        "Predictions",
        "How to repeat this",
        "Fit card",
    ]
    rows, _excluded = read_points(full).points, None
    for row in rows:
        assert f"{row.loss_nats:.4f} ± {row.loss_se_nats:.4f}" in text
    assert "few runs (5)" in text
    assert "no peak is known for this processor" in text
    assert "not pinned down" in text
    assert "homelab fit LAB/quickstart --objective adaptive --bootstrap 100 --seed 0 --count total" in text
    assert str(full) not in text


def test_html_is_whole_and_needs_nothing_from_outside(full):
    page = (full / "report" / "report.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.found == []
    assert parser.stack == []
    assert not re.search(r"url\(|@import|https?://", page)
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page
    assert page.count("data:image/png;base64,") == 2 * len(NAMES)
    assert str(full) not in page


def test_every_figure_is_a_picture_of_readable_size(full):
    for name in NAMES:
        width, height = png_size((full / "report" / f"{name}.png").read_bytes())
        assert 1000 <= width <= 1400 and 400 <= height <= 900, name
    text = (full / "report" / "report.md").read_text()
    assert {m.removesuffix(".png") for m in re.findall(r"!\[.*?\]\((.*?)\)", text)} == NAMES


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_evidence_stands_side_by_side(full):
    text = section((full / "report" / "report.md").read_text(), "Evidence")
    report = load_fit(full / "fit")
    for name in ("1: envelope of the curves", "2: isoFLOP parabolas", "3: L(N, D)", "3 with alpha = beta"):
        assert f"| {name} |" in text
    (free,) = [one for one in report.evidence.approaches if one.name == "3-free"]
    assert f"| {free.a.value:.4g} | [{free.a.ci95[0]:.4g}, {free.a.ci95[1]:.4g}] |" in text
    for one in report.evidence.approaches:
        assert one.why_not is None or one.why_not in text
    assert "| chosen |" in text
    for one in report.evidence.holdouts:
        if one.rms_frac is not None:
            assert f"{100 * one.rms_frac:.2f} %" in text
    for step in ("body parameters only", "+ output head", "+ only finished decays", "+ irreducible term"):
        assert f"| {step} |" in text
    assert "| body parameters only | 15, 10 before decay |" in text
    joint = report.get("chinchilla")
    check = joint.cross_checks["beta"]
    assert f"| [{check.delta95[0]:.4g}, {check.delta95[1]:.4g}] |" in text


def test_the_law_that_hold_out_chose_predicts(full):
    text = (full / "report" / "report.md").read_text()
    view = collect(full)
    joint = view.study.joint
    assert joint is not None and joint.law.name == view.fit.evidence.chosen_law != "chinchilla"
    assert f"{joint.law.title} predicts what was held out best" in text
    n = max(run.n_params for run in view.runs)
    one = predict_loss(joint.fit, joint.draws, n_params=2 * n, n_tokens=max(row.n_tokens for row in view.rows))
    low, high = one.ci95
    assert f"| {one.loss_nats:.3f} | [{low:.3f}, {high:.3f}] | x 2 outside |" in section(text, "Predictions")


def test_isoflop_rows_are_drawn_as_they_were_measured(tmp_path):
    rng = np.random.default_rng(0)
    points = [
        LossPoint(
            n_params=n,
            n_tokens=c / 6 / n,
            loss_nats=(1.8 + 480 * n**-0.35 + 2100 * (c / 6 / n) ** -0.37) * math.exp(0.002 * rng.normal()),
            row_id=f"{n:.0f}-{c:.0e}",
            flops=c,
        )
        for c in (1e16, 1e17, 1e18)
        for n in np.geomspace(0.2, 5, 7) * (c / 1e16) ** 0.5 * 1.2e7
    ]
    report = fit_points(points, laws=("chinchilla",), n_bootstrap=0)
    view = replace(collect(tmp_path), fit=report)
    with themed(LIGHT) as plt:
        axes = isoflop_plots.isoflop_curves(plt, view, LIGHT).axes[0]
        dots = [line for line in axes.lines if line.get_marker() == "o" and line.get_linestyle() == "None"]
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert sorted(len(line.get_xdata()) for line in dots) == [7, 7, 7]
        assert sorted(y for line in dots for y in line.get_ydata()) == pytest.approx(
            sorted(p.loss_nats for p in points)
        )
        best = [float(line.get_xdata()[0]) for line in stars]
        for n, c in zip(best, (1e16, 1e17, 1e18), strict=True):
            split = predict_split(report.get("chinchilla"), draws_of(report, report.get("chinchilla")), c)
            assert n == pytest.approx(split.n_params.value, rel=0.05)
        assert "measured" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_predictions_drawn_are_those_that_were_judged(full):
    view = collect(full)
    held, folds = view.study.held_out, view.study.folds
    assert held is not None and held.law == view.fit.evidence.chosen_law
    assert len(folds) == len(held.windows)
    for fold, window in zip(folds, held.windows, strict=True):
        miss = np.log(fold.predicted / fold.measured)
        assert len(miss) == window.n_test
        assert np.sqrt((miss**2).mean()) == pytest.approx(window.rms_frac, rel=1e-3)
        assert miss.mean() == pytest.approx(window.bias_frac, rel=1e-3, abs=1e-6)


def test_fit_card_is_told_and_written(full):
    card = codec.read_json(full / "report" / "fit_card.json", FitCard)
    text = section((full / "report" / "report.md").read_text(), "Fit card")
    assert len(card.items) > 15
    for item in card.items:
        assert item.question in text
        assert (item.answer or f"unknown: {item.why_unknown}") in text
    assert "67k: lr 0.0098, batch 4,096 tokens" in text
    assert card == fit_card(load_fit(full / "fit"), read_training(full))


def test_running_runs_are_judged_in_the_report_and_on_the_command_line(synthetic, homelab):
    for rung in ("67k", "127k", "289k", "545k"):
        synthetic.run(rung)
    spec = synthetic.run("1072k", status="running", reason="still going", off=(0.05, 6e5))
    fit_lab(synthetic.lab, laws=("chinchilla",))
    view = collect(synthetic.lab)
    text = to_markdown("t", tell(view, []))
    line = next(line for line in text.splitlines() if "| running | above the law |" in line)
    assert "655k" in line and "look at its learning rate" in line
    with themed(LIGHT) as plt:
        axes = fit_plots.on_the_law(plt, view, LIGHT).axes[0]
        assert axes.get_xlim()[1] > 9e5
    said = homelab("report", synthetic.lab, "--check")
    assert said.code == 0
    assert said.out.startswith(f"{spec.run_id}: above the law since 655k tokens")
    plain = json.loads(homelab("report", synthetic.lab, "--check", "127k", "--json").out)
    (check,) = plain["checks"]
    assert check["verdict"] == "on the law" and check["run_id"].startswith("127k")
    other = json.loads(homelab("report", synthetic.lab, "--check", "--against", "hoffmann-2022", "--json").out)
    assert other["checks"][0]["verdict"] != "cannot be judged"  # the finished trunks carry the offset of any law


def test_what_cannot_be_checked_is_one_sentence(synthetic, homelab):
    synthetic.run("67k")
    said = homelab("report", synthetic.lab, "--check")
    assert said.code == 2 and "no fit to check against" in said.err
    fit_lab(synthetic.lab, laws=("power-d",))
    said = homelab("report", synthetic.lab, "--check", "nosuch")
    assert said.code == 2 and "no run called nosuch" in said.err
    said = homelab("report", synthetic.lab, "--check", "67k")
    assert said.code == 2 and "no fitted L(N, D)" in said.err
    said = homelab("report", synthetic.lab, "--against", "hoffmann-2022")
    assert said.code == 2 and "add --check" in said.err
    alone = homelab("report", synthetic.lab, "--check", "67k", "--against", "hoffmann-2022")
    assert alone.code == 0 and "z = " in alone.out  # by its decayed rows
    assert homelab("report", synthetic.lab, "--check", "--against", "hoffmann-2022").out == ""


def test_three_isoflop_points_claim_nothing(synthetic):
    synthetic.batch = 65_536
    for rung, tokens in (("5M", 4_760), ("26M", 976), ("101M", 251)):
        synthetic.horizons = (tokens * synthetic.batch,)
        synthetic.run(rung)
    report = fit_lab(synthetic.lab)
    for fit in report.fits:
        assert all(e.value is None for e in fit.parameters.values())
    low, high = report.get("chinchilla").derived["a"].ci95
    assert high - low > 0.7
    text = told(synthetic.lab)
    assert "3 points for 5 parameters (E, A, B, alpha and beta)" in section(text, "Evidence")
    assert "Every exponent a from 0 to 1 is compatible with them" in section(text, "Evidence")
    steps = [line for line in section(text, "Evidence").splitlines() if line.startswith("| + ")]
    assert len(steps) == 3 and all("| – | – |" in line for line in steps[1:])
    unfinished = re.search(r"\| body parameters only \|.*\[([\d.]+), ([\d.]+)\]", text)
    assert unfinished is None or float(unfinished[2]) - float(unfinished[1]) > 0.3
    assert "## Predictions" not in text


def test_tensorboard_gets_the_same_figures_and_numbers(full):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tensorboard.write_summaries(full / "tensorboard", collect(full), pictures_of(full))  # again: replaced, not doubled
    events = EventAccumulator(str(full / "tensorboard" / "report"))
    events.Reload()
    tags = events.Tags()
    assert {t.removeprefix("report/") for t in tags["images"]} == NAMES
    fit = load_fit(full / "fit").get("power-n")
    (alpha,) = events.Scalars("fit/power-n/alpha")
    assert alpha.value == pytest.approx(fit.parameters["alpha"].value, rel=1e-6)
    (image,) = events.Images("report/residuals")
    assert image.encoded_image_string == (full / "report" / "residuals.png").read_bytes()
    assert len(list((full / "tensorboard" / "report").iterdir())) == 1


def test_report_imports_no_torch(synthetic):
    synthetic.run("67k", status="failed", reason="out of memory")
    code = (
        "import sys; from pathlib import Path; from homelab_scaling.report.page import write_report; "
        "assert 'matplotlib' not in sys.modules; write_report(Path(sys.argv[1])); "
        "print([m for m in ('torch', 'transformers', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(synthetic.lab)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_command_prints_the_path(synthetic, capsys):
    synthetic.run("67k", status="failed", reason="out of memory")
    assert cli.run_verb("report", [str(synthetic.lab), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert Path(plain["report"]) == synthetic.lab / "report" / "report.html"
    assert [Path(p).name for p in plain["pictures"]] == ["loss_against_steps.png"]


def test_one_rung_has_a_page_but_no_law_of_size(synthetic):
    synthetic.run("289k")
    fit_lab(synthetic.lab)
    text = write_report(synthetic.lab).with_suffix(".md").read_text()
    assert "There is no law of model size to report: no token count is shared by three sizes" in text
    assert "fewer than two sizes have finished" in text
    assert "Loss against tokens" in text
    assert not (synthetic.lab / "report" / "loss_against_size.png").exists()


def test_diverged_and_failed_rungs_are_told(synthetic):
    for rung in ("67k", "127k", "289k", "545k"):
        synthetic.run(rung)
    synthetic.run("1072k", status="diverged", reason="the loss was not finite at step 61; lower this rung's lr")
    fit_lab(synthetic.lab, laws=("power-n",))
    text = told(synthetic.lab)
    assert "lower this rung's lr" in text
    assert "**4 of 5** runs finished, 12 rows" in text
    assert re.search(r"\| 1072k-s0-\w+ \| diverged: the loss was not finite", text)
    assert "through 4 points" in text


def test_nothing_finished_is_still_a_page(synthetic):
    synthetic.run("67k", status="failed", reason="out of memory")
    text = write_report(synthetic.lab).with_suffix(".md").read_text()
    assert "No run has finished a row yet, so there is no law to report (runs: 1 failed)." in text
    assert "out of memory" in text
    assert (synthetic.lab / "report" / "loss_against_steps.png").exists()


def test_an_empty_lab_is_still_a_page(tmp_path: Path):
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert "nothing has been trained in this lab yet" in text
    assert all(isinstance(p, NoPicture) for p in draw_all(collect(tmp_path)))


def test_missing_pieces_are_said(full, tmp_path: Path):
    lab = tmp_path / "quickstart"
    shutil.copytree(full, lab)
    run = next((lab / "runs").iterdir())
    (run / "metrics.jsonl").write_bytes(b"{broken\n" + (run / "metrics.jsonl").read_bytes())
    (lab / "plan.json").write_text("{")
    for draws in (lab / "fit").glob("*.npz"):
        draws.unlink()
    missing = " ".join(collect(lab).missing)
    assert "curves cannot be read" in missing and "line 1 is not JSON" in missing
    assert "plan.json cannot be read" in missing
    assert "draws files are gone" in missing
    record = run / "record.json"
    plain = json.loads(record.read_text())
    plain["rows"] = plain["rows"][:1]
    record.write_text(json.dumps(plain))
    assert "the lab now holds 13: run `homelab fit` again" in " ".join(collect(lab).missing)
    record.write_text("[]")
    assert f"{run.name} | no record: none readable" in told(lab)
    (lab / "plan.json").unlink()
    assert "unreadable record" in told(lab)
    (lab / "fit" / "fit.json").unlink()
    text = told(lab)
    assert "There is no fit yet" in text
    assert "## The laws" not in text


def test_plan_and_corpus_are_used_where_they_are(full, tmp_path: Path):
    lab = tmp_path / "quickstart"
    shutil.copytree(full, lab)
    codec.write_json(
        lab / "plan.json",
        {"question": "Does it scale?", "warnings": ["1072k sees its text 1.4 times"], "rungs": [{}] * 6, "other": 1},
    )
    split = {"files": [{"name": "t.bin", "n_tokens": 9, "sha256": "0"}], "n_tokens": 9_000_000, "n_documents": 7}
    manifest = {
        "tokenizer": "bpe:2048",
        "tokenizer_file": "tokenizer.json",
        "tokenizer_hash": "t",
        "n_vocab": 2048,
        "eot_id": 0,
        "dtype": "uint16",
        "train": {**split, "n_bytes": 27_000_000},
        "val": {**split, "n_bytes": 9},
        "sources": ["python"],
        "held_out_rule": "2 % of the packages by hash",
    }
    (lab / "shards").mkdir()
    (lab / "shards" / "manifest.json").write_text(json.dumps(manifest))
    text = told(lab)
    assert "Does it scale?" in text
    assert "1072k sees its text 1.4 times." in text
    assert "**5 of 6** runs finished" in text
    assert "9.00M training" in text and "3.00 bytes per token" in text and "2 % of the packages by hash" in text


def test_runs_of_an_earlier_ladder_are_left_out(full, tmp_path: Path):
    lab = tmp_path / "quickstart"
    shutil.copytree(full, lab)
    runs = sorted(p.name for p in (lab / "runs").iterdir())
    codec.write_json(lab / "plan.json", {"runs": [{"run_id": name} for name in runs[1:]]})
    view = collect(lab)
    assert sorted(run.run_id for run in view.runs) == runs[1:]


def test_no_lab_and_no_room_are_one_sentence(tmp_path: Path, capsys):
    with pytest.raises(SpecError, match="no such lab"):
        write_report(tmp_path / "absent")
    assert cli.run_verb("report", [str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "report").write_text("a file where the folder should be")
    with pytest.raises(MachineError, match="could not be written"):
        write_report(tmp_path)


def test_curves_branch_at_the_forks(full):
    view = collect(full)
    assert [run.rung for run in view.runs] == ["67k", "127k", "289k", "545k", "1072k"]
    for run in view.runs:
        assert [c.is_decay for c in run.training] == [False, True, True, True]
        trunk, first = run.training[0], run.training[1]
        assert first.steps[0] in trunk.steps
        assert first.steps[-1] == run.rows[0].n_steps - 1


def test_text_is_escaped_and_formulas_are_set():
    assert inline("a < b & `x^-alpha`") == "a &lt; b &amp; <code>x^-alpha</code>"
    assert inline("N^-alpha") == "N<sup>−α</sup>"
    assert inline("L = 9.57 N^-0.0543: falls") == "L = 9.57 N<sup>−0.0543</sup>: falls"
    joint = "L = [(N<sub>c</sub>/N)<sup>α<sub>N</sub>/α<sub>D</sub></sup> + D<sub>c</sub>/D]<sup>α<sub>D</sub></sup>"
    assert inline("L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D") == joint
    assert inline("fit_card.json n_params 1e-3") == "fit_card.json n_params 1e-3"
    grid = Grid(head=("a", "b"), rows=(("x|y", "<i>"),), left=frozenset({"a"}), caption="c")
    page = to_html("t", [Heading(text="<h>"), grid, Paragraph(text="p")])
    assert "&lt;i&gt;" in page and "<h2>&lt;h&gt;</h2>" in page
    assert "| x\\|y | <i> |" in to_markdown("t", [grid])
    image = Image(file="f.png", title='"q"', caption="c", light_png=b"l", dark_png=b"d")
    assert 'alt="&quot;q&quot;"' in image.html()


def test_labels_are_spread_without_reordering():
    assert spread([0, 1, 2, 50], 10) == [-9, 1, 11, 50]
    assert spread([], 10) == []
    placed = spread([0.0, 0.5, 9.0, 9.1, 30.0], 4)
    assert all(b - a >= 4 - 1e-9 for a, b in pairwise(placed))


@pytest.mark.parametrize(("low", "high"), [(4.4, 7.1), (6e4, 1.3e6), (1e11, 3e13), (3.61, 3.64), (1, 1e12), (2.0, 9)])
def test_log_ticks_are_few_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low * 0.999 <= t <= high * 1.001 for t in ticks)
    assert ticks == sorted(set(ticks))


def test_colours_are_ordered_and_contrast_with_their_page():
    def luminance(colour):
        return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]

    for theme, page in ((LIGHT, 1.0), (DARK, 0.1)):
        colours = [luminance(c) for c in ordered_colours([5, 1, 3, 3, 9], theme).values()]
        assert len(colours) == 4
        assert colours == sorted(colours)
        assert all(abs(c - page) > 0.2 for c in colours)


def test_words():
    assert [duration(s) for s in (12, 90, 7200, 4e5)] == ["12 s", "1.5 min", "2.0 h", "4.6 days"]
    assert [money(d) for d in (0, 0.0041, 12.3, 1234.5)] == ["$0.00", "$0.0041", "$12.30", "$1,234.50"]
