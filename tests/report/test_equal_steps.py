"""Ladders of equal steps: slopes of planted curves, their intervals, the figure, and what the design cannot show."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.ladder import PublishedFigure, Reference
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.report.collect import collect
from homelab_scaling.report.document import Bullets, Grid, to_markdown
from homelab_scaling.report.equal_steps import equal_steps, model_slopes, steps_study, way_of
from homelab_scaling.report.figures import NoPicture, Picture, draw_all
from homelab_scaling.report.ours import OURS
from homelab_scaling.report.page import write_report
from homelab_scaling.report.published import published
from homelab_scaling.runs import RunRecord
from homelab_scaling.specs import make_run_id

STEPS, EVERY, BATCH = 500, 50, 4096
SLOPES = {"67k": -0.20, "289k": -0.136, "1072k": -0.11}
STARTS = {"67k": 6.0, "289k": 5.2, "1072k": 4.6}
BENT = "1072k"


def curve(rung: str, tokens: np.ndarray, bend: float = 0.0) -> np.ndarray:
    """The planted loss, STARTS[rung] at the last step."""
    x = np.log(tokens / (STEPS * BATCH))
    return STARTS[rung] * np.exp(SLOPES[rung] * x + bend * x**2)


def train(
    synthetic, rung: str, *, seed: int = 0, schedule: str = "cosine", off: float = 0.0, bend: float = 0.0
) -> None:
    """A run of 500 steps with a validation curve on a power law, and its row unless it is still going."""
    synthetic.horizons = (STEPS * synthetic.batch,)
    synthetic.run(rung, seed=seed)
    (folder,) = [p for p in (synthetic.lab / "runs").iterdir() if p.name.startswith(f"{rung}-s{seed}")]
    spec, record = codec.read_plain_json(folder / "spec.json"), codec.read_json(folder / "record.json", RunRecord)
    made = synthetic.spec(rung, seed)
    science = replace(made.science, schedule=replace(made.science.schedule, name=schedule))
    run_id = make_run_id(rung, science)
    spec = replace(made, run_id=run_id, science=science)
    tokens = BATCH * np.arange(EVERY, STEPS, EVERY)  # the row itself is measured on the full set alone
    losses = curve(rung, tokens, bend) * np.exp(off * np.log(tokens / tokens[-1]))
    lines = [
        {"kind": "val", "set": "curve", "phase": "trunk", "update": int(t // synthetic.batch), "loss": float(x),
         "step": int(t // synthetic.batch), "tokens": int(t)}
        for t, x in zip(tokens, losses, strict=True)
    ]  # fmt: skip
    target = folder.with_name(run_id)
    folder.rename(target)
    (target / "metrics.jsonl").unlink()
    codec.append_jsonl(target / "metrics.jsonl", lines)
    codec.write_json(target / "spec.json", spec)
    rows = tuple(
        replace(row, run_id=run_id, row_id=f"{run_id}@{row.n_tokens}", loss_nats=STARTS[rung], schedule=schedule)
        for row in record.rows
    )
    codec.write_json(target / "record.json", replace(record, run_id=run_id, rows=rows))


@pytest.fixture
def three(synthetic):
    for rung in SLOPES:
        train(synthetic, rung)
    return synthetic


def test_slopes_of_power_laws_are_theirs(three) -> None:
    view = collect(three.lab)
    assert equal_steps(view) == STEPS
    found = model_slopes(view)
    assert [one.rung for one in found] == list(SLOPES)
    for one in found:
        assert one.value == pytest.approx(SLOPES[one.rung], rel=1e-9)
        assert one.reach == pytest.approx((SLOPES[one.rung],) * 2, rel=1e-9)
        assert one.ci95 is None and one.n_seeds == 1 and one.n_points == 9


def test_a_bent_curve_has_different_stretches_and_says_so(synthetic) -> None:
    for rung in SLOPES:
        train(synthetic, rung, bend=0.03)
    for one in model_slopes(collect(synthetic.lab)):
        steepest, flattest = one.reach
        assert steepest < one.value < flattest < 0
    view = collect(synthetic.lab)
    way = way_of(view.runs[0])
    first, last = (replace(way, flops=way.flops[s], losses=way.losses[s]) for s in (slice(5), slice(4, 9)))
    assert way.reach() == pytest.approx((first.slope(), last.slope())), "steep first, flat later"


def test_seeds_give_an_interval_of_the_mean(synthetic) -> None:
    offs = (-0.01, 0.0, 0.016)
    for seed, off in enumerate(offs):
        train(synthetic, "67k", seed=seed, off=off)
    train(synthetic, "289k")
    small, large = model_slopes(collect(synthetic.lab))
    mean = SLOPES["67k"] + sum(offs) / 3
    half = 4.302653 * np.std(offs, ddof=1) / math.sqrt(3)
    assert small.value == pytest.approx(mean) and small.ci95 == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert large.ci95 is None
    text = to_markdown("t", steps_study(collect(synthetic.lab), []))
    assert "95 % interval of its mean over 3 seeds" in text and "One seed" not in text


def test_the_warm_up_is_no_part_of_a_slope(three) -> None:
    view = collect(three.lab)
    run = view.runs[0]
    assert run.spec is not None
    warm = replace(run.spec.science.schedule, warmup_tokens=50 * three.batch)
    science = replace(run.spec.science, schedule=warm)
    warmed = replace(run, spec=replace(run.spec, run_id=make_run_id(run.rung, science), science=science))
    assert len(way_of(run).losses) == 9 and len(way_of(warmed).losses) == 8
    few = replace(run, validation=tuple(replace(c, tokens=c.tokens[:3], losses=c.losses[:3]) for c in run.validation))
    assert way_of(few) is None


def test_the_table_says_what_equal_steps_cost(three) -> None:
    view = collect(three.lab)
    grid = next(block for block in steps_study(view, []) if isinstance(block, Grid))
    per_token = {run.rung: flops_per_token(run.spec.science.shape, 2048) for run in view.runs}
    n = {run.rung: count_params(run.spec.science.shape, 2048).n_params for run in view.runs}
    tokens = STEPS * three.batch
    for cells, rung in zip(grid.rows, SLOPES, strict=True):
        cell = dict(zip(grid.head, cells, strict=True))
        assert cell["rung"] == rung and cell["FLOPs"] == f"{per_token[rung] * tokens:.2e}"
        assert cell["of the least"] == f"x {per_token[rung] / per_token['67k']:.3g}"
        assert cell["tokens/N"] == f"{tokens / n[rung]:.3g}"
        assert cell["slope"] == f"{SLOPES[rung]:.3g}".replace("-", "−")
        at = (STEPS - EVERY) * BATCH * per_token["67k"] / per_token[rung]
        said = "–" if at < EVERY * three.batch else f"{float(curve(rung, np.array([at]))[0]):.3f}"
        assert list(cell.values())[-1] == said


def test_what_such_a_design_can_and_cannot_show(three) -> None:
    view = collect(three.lab)
    (bullets,) = [block for block in steps_study(view, []) if isinstance(block, Bullets)]
    order, compute, seed, way, slope = bullets.items
    assert "67k 6.000, 289k 5.200 and 1072k 4.600 nats per token, lower at every step in size" in order
    assert re.search(r"Equal steps are not equal compute: 1072k spends [\d.]+ times the FLOPs of 67k", compute)
    assert "One seed" in seed and "0.600 nats, far more than that" in seed
    assert "halfway a cosine still trains at 50 % of its peak rate" in way
    assert "(−0.2 (67k) to −0.11 (1072k)) is no scaling law" in slope


def test_losses_that_do_not_fall_with_size_are_not_called_ordered(synthetic) -> None:
    for rung in ("67k", "289k"):
        train(synthetic, rung)
    (path,) = synthetic.lab.glob("runs/289k-*/record.json")
    record = codec.read_json(path, RunRecord)
    codec.write_json(path, replace(record, rows=tuple(replace(row, loss_nats=6.004) for row in record.rows)))
    text = to_markdown("t", steps_study(collect(synthetic.lab), []))
    assert "not lower at every step in size" in text and "0.004 nats, no more than that" in text


def test_a_trunk_is_told_from_a_cosine(synthetic) -> None:
    for rung in ("67k", "289k"):
        train(synthetic, rung, schedule="wsd")
    assert "before its decay a trunk trains at the full rate" in to_markdown(
        "t", steps_study(collect(synthetic.lab), [])
    )


def test_runs_without_rows_or_curves_are_told_and_not_guessed(synthetic) -> None:
    for rung in ("67k", "289k"):
        train(synthetic, rung)
    for path in synthetic.lab.glob("runs/*/record.json"):
        record = codec.read_json(path, RunRecord)
        codec.write_json(path, replace(record, rows=(), status="running"))
        (path.parent / "metrics.jsonl").write_text("")
    view = collect(synthetic.lab)
    text = to_markdown("t", steps_study(view, []))
    assert "Nothing yet: 0 of 2 sizes have finished their 500 steps" in text and "| rung |" not in text
    picture = next(p for p in draw_all(view) if p.name == "equal_steps_curves")
    assert isinstance(picture, NoPicture) and "enough of its validation curve" in picture.reason
    assert "for a slope" in OURS["slope_c"](view, PublishedFigure(of="slope_c", value=-0.1)).how


def test_other_designs_have_no_such_section(synthetic) -> None:
    synthetic.all_rungs()
    view = collect(synthetic.lab)
    assert equal_steps(view) is None and steps_study(view, []) == []
    picture = next(p for p in draw_all(view) if p.name == "equal_steps_curves")
    assert isinstance(picture, NoPicture) and picture.reason == "", "nobody misses it"


def test_one_size_is_no_study_of_sizes(synthetic) -> None:
    train(synthetic, "67k")
    assert equal_steps(collect(synthetic.lab)) is None


# ------------------------------------------------------------------------------------------- beside a published slope


def beside(lab, value: float, rung: str | None = None, bend: float = 0.0):
    ref = Reference(source="a check", figures=(PublishedFigure(of="slope_c", value=value, rung=rung),))
    codec.write_json(lab / "plan.json", {"rungs": [], "reference": codec.to_plain(ref)})
    view = collect(lab)
    blocks = published(view)
    (cells,) = next(block for block in blocks if isinstance(block, Grid)).rows
    (how,) = next(block for block in blocks if isinstance(block, Bullets)).items
    return to_markdown("t", blocks), (*cells[:3], how, cells[3])


def test_a_slope_of_an_unnamed_model_is_set_beside_all(three) -> None:
    text, cells = beside(three.lab, -0.136)
    assert "Which model the slope of −0.136 is of was not said." in text
    assert cells[1:3] == ("−0.136", "67k −0.2, 289k −0.136, 1072k −0.11")
    assert cells[4].startswith("289k comes nearest: −0.136 ")
    assert (
        "289k: −0.136 to −0.136 over stretches of half its points" in cells[3]
        and "one seed, so no interval" in cells[3]
    )


def test_a_slope_of_a_named_model_is_set_beside_that_one(three) -> None:
    text, cells = beside(three.lab, -0.15, rung="67k")
    assert "was not said." not in text.split("|")[0]
    assert cells[0] == "slope against compute, 67k" and cells[2] == "−0.2"
    assert "−0.15 does not lie between the slopes of stretches of half its points; no interval" in cells[4]
    _, cells = beside(three.lab, -0.136, rung="25m")
    assert cells[2] == "unknown" and "no curve of a rung 25m here, but of 67k, 289k and 1072k" in cells[3]


def test_seeds_make_the_verdict_one_of_an_interval(synthetic) -> None:
    for seed, off in enumerate((-0.01, 0.0, 0.016)):
        train(synthetic, "67k", seed=seed, off=off)
    _, cells = beside(synthetic.lab, -0.2)
    assert "our interval contains −0.2" in cells[4] and "95 % over 3 seeds" in cells[3]
    _, cells = beside(synthetic.lab, -0.4)
    assert "does not contain −0.4: ours is higher" in cells[4]


def test_the_page_has_the_figure_in_its_section(three) -> None:
    beside(three.lab, -0.136)
    write_report(three.lab)
    text = (three.lab / "report" / "report.md").read_text()
    section = text.split("## Every size for the same steps\n", 1)[1].split("\n## ", 1)[0]
    assert "![Every size for the same steps](equal_steps_curves.png)" in section
    assert (three.lab / "report" / "equal_steps_curves.png").stat().st_size > 5000
    assert text.index("## Beside the published experiment") < text.index("## Every size for the same steps")
    picture = next(p for p in draw_all(collect(three.lab)) if p.name == "equal_steps_curves")
    assert isinstance(picture, Picture) and picture.light_png != picture.dark_png
