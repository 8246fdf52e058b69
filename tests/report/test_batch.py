"""The report's section on batches: every kind of lab that knows something of them, and those that do not."""

import math
import re
from dataclasses import replace

import pytest
from planted_batches import add_noise, b_simple, make_advice

from homelab_scaling import codec
from homelab_scaling.batch.advice import batch_file, read_advice, write_advice
from homelab_scaling.batch.priors import kaplan_critical_tokens
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.points import read_points, with_c_min
from homelab_scaling.fit.result import save_fit
from homelab_scaling.report import tensorboard
from homelab_scaling.report.batch import batches
from homelab_scaling.report.collect import collect
from homelab_scaling.report.document import inline, to_markdown
from homelab_scaling.report.figures import FIGURES, NoPicture, _draw
from homelab_scaling.report.noise import batch_events, noise_lines
from homelab_scaling.report.story import tell
from homelab_scaling.specs import BatchWarmup

SHAPES = {"67k": (2, 24, 2), "127k": (2, 40, 2), "289k": (3, 64, 2)}
BATCH_FIGURES = [kind for kind in FIGURES if kind.section == "batch"]


def told(lab):
    return to_markdown("t", batches(collect(lab)))


def drawn(lab):
    """Names of the figures that are drawn."""
    view = collect(lab)
    return {p.name for kind in BATCH_FIGURES if not isinstance(p := _draw(kind, view), NoPicture)}


def grid(text, first):
    """Rows of the table whose head begins with these columns."""
    head = "| " + " | ".join(first)
    lines = text[text.index(head) :].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[0], rows[2 : next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]


@pytest.fixture
def trained(synthetic):
    for rung in SHAPES:
        synthetic.run(rung)
    return synthetic.lab


def test_no_section_where_nothing_is_known(trained):
    assert told(trained) == "# t\n"
    assert drawn(trained) == set()
    assert "## Batch" not in to_markdown("t", tell(collect(trained), []))


def test_a_fixed_batch_is_priced_by_the_runs_own_noise_and_flagged(trained):
    for rung in SHAPES:
        add_noise(trained, rung)
    text = told(trained)
    assert "uncalibrated" in text.split("\n\n")[2] and "batch-size --verify" in text.split("\n\n")[2]
    _, rows = grid(text, ("rung", "batch", "extra tokens"))
    view = collect(trained)
    for row, rung in zip(rows, view.batches.rungs, strict=True):
        middle = b_simple(rung.n_tokens / 2)
        found = rung.in_run
        assert found is not None and found.low < found.value < found.high
        grown = (SHAPES[rung.rung][1] / 24) ** 0.2
        assert found.value == pytest.approx(grown * middle, rel=0.15)
        assert rung.b_crit.value == pytest.approx(found.value) and row[5] == "in the run, uncalibrated"
        assert rung.overhead_frac == pytest.approx(4096 / found.value)
    _, costs = grid(text, ("rung", "batch", "tokens above need"))
    share = view.batches.rungs[0].overhead_frac / (1 + view.batches.rungs[0].overhead_frac)
    seconds = max(view.batches.rungs[0].runs[0].rows, key=lambda r: r.n_tokens).seconds
    assert costs[0][3] == f"{100 * share:.0f}\u00a0%"
    assert costs[0][4] == f"{share * seconds:.0f} s"
    assert "kWh" not in grid(text, ("rung", "batch", "tokens above need"))[0]  # nobody measured it
    assert drawn(trained) == {"noise_against_progress", "speed_against_batch"}


def test_windows_of_the_decay_and_the_warm_up_do_not_count(trained):
    add_noise(trained, "67k")
    before = collect(trained).batches.rungs[0].in_run
    (path,) = (trained / "runs").glob("67k-*")
    wild = {"kind": "noise", "loss": 4.0, "noise_scale_tokens": 9e9, "noise_low_tokens": 8e9, "noise_high_tokens": 1e10}
    codec.append_jsonl(path / "metrics.jsonl", [{**wild, "phase": "decay@2998272", "tokens": 2_900_000}])
    codec.append_jsonl(path / "metrics.jsonl", [{**wild, "phase": "trunk", "tokens": 8192}])
    assert collect(trained).batches.rungs[0].in_run == before


def test_only_bounds_give_no_number(trained):
    (path,) = (trained / "runs").glob("67k-*")
    line = {"kind": "noise", "phase": "trunk", "tokens": 1_500_000, "loss": 4.0, "noise_at_least_tokens": 5000.0}
    codec.append_jsonl(path / "metrics.jsonl", [{**line, "noise_scale_tokens": None, "why": "too few steps"}])
    text = told(trained)
    assert "nowhere well enough for a number" in text
    (row,) = grid(text, ("rung", "batch", "extra tokens"))[1]
    assert row[6] == "≥ 5.00k" and row[2] == "–" and row[5] == "not known"
    assert drawn(trained) == {"noise_against_progress"} | {"speed_against_batch"}


def test_lines_that_say_nothing_are_passed_over():
    empty = {"kind": "noise", "tokens": 10, "noise_scale_tokens": None}
    assert noise_lines([empty, {"kind": "step", "tokens": 10}, {"kind": "noise", "noise_scale_tokens": 5.0}]) == ()


def test_a_resumed_warm_up_is_told_once():
    events = [{"kind": "batch", "tokens": t, "batch_tokens": b} for t, b in ((100, 512), (90, 512), (200, 1024))]
    in_a_decay = {"kind": "batch", "tokens": 150, "batch_tokens": 1024}
    assert [(e.tokens, e.batch_tokens) for e in batch_events(events, 256)] == [(0, 256), (90, 512), (200, 1024)]
    assert batch_events([*events[:2], in_a_decay, events[2]], 256) == batch_events(events, 256)


def test_a_warm_up_is_told_and_drawn(synthetic):
    synthetic.batch_warmup = BatchWarmup(from_tokens=1024)
    synthetic.run("127k")
    assert told(synthetic.lab) == "# t\n"
    add_noise(synthetic.lab, "127k")
    wanted = "the batch was warmed up: 1,024 from 0 tokens on, 2,048 from 150k tokens on and 4,096 from 600k tokens on"
    assert wanted in told(synthetic.lab)
    assert "noise_against_progress" in drawn(synthetic.lab)


def test_advice_with_a_sweep(trained):
    found = make_advice(SHAPES, trained)
    add_noise(trained, "289k")
    text = told(trained)
    _, rows = grid(text, ("rung", "batch", "extra tokens"))
    for row, one in zip(rows, found.rungs, strict=True):
        assert row[5] == "measured, calibrated by sweep"
        assert row[2] == f"{100 * 4096 / one.b_crit.value:.0f}\u00a0%"
    head, lines = grid(text, ("rung", "batch", "which"))
    assert head[3:7] == ["tokens", "time", "kWh", "cost"]
    advice = found.rungs[0]
    mine = [line for line in lines[: next(i for i, line in enumerate(lines) if line[0] == "127k")]]
    by = {which: line for line in mine for which in line[2].split(", ")}
    assert by["taken"][1] == "4,096" and by["advised"][1] == f"{advice.batch_tokens:,}"
    fastest = min(advice.rows, key=lambda row: row.seconds)
    taken = next(row for row in advice.rows if row.batch_tokens == 4096)
    assert by["fastest"][1] == f"{fastest.batch_tokens:,}"
    assert f"(x {taken.seconds / fastest.seconds:.2g})" in by["fastest"][-1]
    assert by["fewest tokens"][1] == "128"
    assert "S_min 130 [" in text and "the hyperbola is not contradicted" in text
    assert "foretold" in text
    assert drawn(trained) == {
        "noise_against_progress",
        "speed_against_batch",
        "critical_batch_law",
        "steps_against_tokens",
    }


def test_how_far_kaplan_is_off(trained):
    found = make_advice(SHAPES, trained)
    factors = [kaplan_critical_tokens(r.measured.loss_nats) / r.b_crit.value for r in found.rungs]
    low, high = re.search(r"a factor of ([\d.]+) to ([\d.]+) above what was measured", told(trained)).groups()
    assert float(low) == pytest.approx(min(factors), rel=0.05) and float(high) == pytest.approx(max(factors), rel=0.05)


def test_advice_alone_before_anything_is_trained(tmp_path):
    lab = tmp_path / "early"
    lab.mkdir()
    horizons = {name: 600_064 * 2**i for i, name in enumerate(SHAPES)}
    make_advice(SHAPES, lab, sweep=False, branch=True, horizons=horizons)
    text = told(lab)
    assert "Advised, not trained yet: 67k, 127k and 289k" in text and "| taken" not in text
    assert "calibrated by branch" in text and "Merrill's rule" in text
    assert "B_crit goes as D^" in text and "Zhang 2024's 0.47" in text
    assert drawn(lab) == {"noise_against_progress", "critical_batch_law", "branches_against_batch"}


def test_a_forecast_gives_way_to_what_the_run_measured(trained):
    make_advice(SHAPES, trained, unmeasured=("289k",))
    rung = collect(trained).batches.rungs[-1]
    assert rung.basis == "forecast, calibrated by sweep" and rung.taken is not None
    add_noise(trained, "289k")
    rung = collect(trained).batches.rungs[-1]
    assert rung.basis == "in the run, calibrated by sweep" and rung.taken is None
    assert rung.b_crit.value == pytest.approx(rung.calibration.c * rung.in_run.value)
    assert math.log(rung.b_crit.high / rung.b_crit.low) > math.log(rung.in_run.high / rung.in_run.low)


@pytest.mark.parametrize(("side", "sign", "over"), [("at least", "≥", "≤"), ("at most", "≤", "≥")])
def test_a_calibration_that_is_a_bound_is_shown_as_one(trained, side, sign, over):
    found = make_advice(SHAPES, trained)
    bounded = replace(found.calibration, side=side, sd_log=None)
    write_advice(trained, replace(found, calibration=bounded))
    rung = collect(trained).batches.rungs[0]
    assert rung.side == side and rung.basis.endswith(f"calibrated by sweep, c {side} {bounded.c:.2g}")
    line = next(line for line in told(trained).splitlines() if line.startswith("| 67k | 4,096"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[2].startswith(over) and cells[3].startswith(sign) and cells[4] == "–"


def test_advice_that_cannot_be_read_is_told(trained):
    make_advice(SHAPES, trained)
    batch_file(trained).write_text('{"ladder": 1}')
    view = collect(trained)
    assert view.batch is None and any("batch.json cannot be read" in m for m in view.missing)
    assert told(trained) == "# t\n"


def test_the_numbers_are_in_tensorboard_too(trained):
    found = make_advice(SHAPES, trained)
    scalars = tensorboard.scalars(collect(trained))
    assert scalars["batch/67k/b_crit_tokens"] == found.rungs[0].b_crit.value
    assert scalars["batch/67k/batch_tokens"] == 4096
    assert read_advice(trained) == found


def test_names_with_an_index_are_set():
    assert inline("B_crit and B_simple, S_min") == "B<sub>crit</sub> and B<sub>simple</sub>, S<sub>min</sub>"
    assert inline("batch_tokens") == "batch_tokens"


def fitted(lab, **choices):
    table = with_c_min(read_points(lab))
    report = fit_points(table.points, table.excluded, source=table.source, n_bootstrap=0, **choices)
    save_fit(report, lab / "fit")
    return report


def test_both_exponents_of_compute_are_told(synthetic):
    for rung in ("67k", "127k", "289k", "545k"):
        synthetic.run(rung)
    shapes = {**SHAPES, "545k": (3, 96, 3)}
    make_advice(shapes, synthetic.lab)
    report = fitted(synthetic.lab, laws=("power-n", "power-c", "power-c-min"))
    text = to_markdown("t", tell(collect(synthetic.lab), []))
    spent, least = (report.get(law).derived["exponent"].value for law in ("power-c", "power-c-min"))
    assert f"falls as C_min^-{least:.3g}" in text and f"against the compute that was spent it is {spent:.3g}" in text
    assert "Kaplan et al. 2020 give 0.050 on this axis" in text
    assert "L = K C_min^-gamma" in text
    (row,) = [p for p in report.points if p.row_id.startswith("67k") and p.n_tokens == 2_998_272]
    told = read_advice(synthetic.lab).rungs[0]
    b_crit = told.b_crit.value * (row.n_tokens / told.n_tokens) ** 0.5
    assert row.c_min_flops == pytest.approx(row.flops / (1 + 4096 / b_crit))


def test_a_fit_by_c_min_has_a_whole_report(synthetic):
    for rung in SHAPES:
        synthetic.run(rung)
    synthetic.run("545k", "running", "in progress")
    make_advice({**SHAPES, "545k": (3, 96, 3)}, synthetic.lab)
    report = fitted(synthetic.lab, laws=("power-n", "power-c", "chinchilla"), compute="c_min")
    text = to_markdown("t", tell(collect(synthetic.lab), []))
    assert "--count total --compute c_min" in text and "far below critical" in text
    view = collect(synthetic.lab)
    assert view.study.checks == []  # its tokens are not those that the run trains for
    assert view.study.table.columns["flops"] == pytest.approx([p.c_min_flops for p in report.points])
