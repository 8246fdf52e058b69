"""The evidence beside the fits: four approaches on shared draws, honest refusals, three counts, one report."""

import dataclasses
import json

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.fit import select
from homelab_scaling.fit.evidence import gather
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.isoflop import best_split
from homelab_scaling.fit.laws import CHINCHILLA, LAWS
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.points import Selection, read_points
from homelab_scaling.fit.result import load_fit, save_fit
from homelab_scaling.fit.slices import tabulate
from homelab_scaling.fit.solve import solve
from homelab_scaling.runs import LossPoint

VALUES = np.array([1.8172181, 477.82587, 2143.41736, 0.3473105, 0.3671724])
TRUE_A = 0.3671724 / (0.3473105 + 0.3671724)


def rows(sizes, tokens_of, *, noise=0.003, seed=0, trunks=False, **more):
    rng = np.random.default_rng(seed)
    points = []
    for n in sizes:
        for d in tokens_of(n):
            loss = float(CHINCHILLA.loss(VALUES, {"n_params": n, "n_tokens": d})) * np.exp(noise * rng.normal())
            run = f"{n:.3g}" if trunks else f"{n:.3g}-{d:.3g}"
            points.append(
                LossPoint(
                    n_params=float(n),
                    n_tokens=float(d),
                    loss_nats=loss,
                    row_id=f"{n:.3g}@{d:.3g}",
                    run_id=run,
                    flops=6.0 * n * d,
                    **more,
                )
            )
    return points


def isoflop(n_sizes=7, **more):
    points = []
    for i, c in enumerate(np.geomspace(1e17, 1e20, 5)):
        best = 0.1 * (c / 6) ** 0.5
        points += rows(
            best * np.geomspace(1 / 4, 4, n_sizes) * (c / 1e18) ** 0.014,
            lambda n, c=c: [c / 6 / n],
            seed=i,
            **more,
        )
    return points


def evidence_of(points, *, held_out=False, **more):
    """The evidence; without the hold-out, which has tests of its own, unless asked for."""
    settings = {"name": parse_objective("adaptive"), "n_draws": 300, **more}
    with pytest.MonkeyPatch.context() as patch:
        if not held_out:
            patch.setattr(select, "hold_outs", lambda *_args, **_more: [])
        return gather(points, tabulate(tuple(points)), **settings)


@pytest.fixture(scope="module")
def plain():
    """Evidence of five budgets of seven sizes."""
    return evidence_of(isoflop(), held_out=True)


def by_name(evidence):
    return {a.name: a for a in evidence.approaches}


def test_isoflop_table_gives_approaches_2_and_3_that_agree(plain):
    found = plain
    roads = by_name(found)
    assert list(roads) == ["1", "2", "3-free", "3-tied"]
    assert "sizes with 3 or more token counts" in roads["1"].why_not
    for name in ("2", "3-free"):
        low, high = roads[name].a.ci95
        assert low < TRUE_A < high
        assert roads[name].a.value + roads[name].b.value == pytest.approx(1)
        assert roads[name].n_opt.ci95[0] < roads[name].n_opt.value < roads[name].n_opt.ci95[1]
    assert roads["3-tied"].a.value == 0.5 and roads["3-tied"].a.ci95 is None
    assert any("its own bias" in note and "N_opt" in note for note in roads["2"].notes)
    assert any("Akima" in note for note in roads["2"].notes)
    pairs = {(d.first, d.second): d for d in found.disagreements}
    assert set(pairs) == {("2", "3-free"), ("2", "3-tied"), ("3-free", "3-tied")}
    apart = pairs["2", "3-free"]
    assert apart.a_difference.value == pytest.approx(roads["2"].a.value - roads["3-free"].a.value)
    assert apart.p_value > 0.05
    # a is fixed in 3-tied, so on shared draws the difference has exactly the other's spread.
    assert pairs["3-free", "3-tied"].a_difference.se == pytest.approx(roads["3-free"].a.se, rel=1e-9)
    assert pairs["2", "3-tied"].a_difference.se == pytest.approx(roads["2"].a.se, rel=1e-9)
    assert found.budget_flops == pytest.approx(1e21, rel=1e-6)
    assert {h.along for h in found.holdouts} == {"n_params", "flops"}
    assert found.chosen_law in {h.law for h in found.holdouts}
    assert any(note.startswith(f"{found.chosen_law} predicts held-out rows best") for note in found.notes)
    assert any("pairs bootstrap over 35 runs within 5 budgets" in note for note in found.notes)


def test_parabolas_off_centre_on_a_lopsided_surface_are_found_out():
    """Sizes drift from 1/10 to 10 times the best one: Approach 2 is off, p says so and its own bias says why."""
    lopsided = np.array([1.69, 406.4, 410.7, 0.465, 0.155])
    points = []
    rng = np.random.default_rng(0)
    for i, c in enumerate(np.geomspace(1e17, 1e21, 5)):
        centre = np.exp(best_split(CHINCHILLA, lopsided, c)[1]) * 10 ** (i / 2 - 1)
        for n in centre * np.geomspace(1 / 16, 16, 15):
            loss = float(CHINCHILLA.loss(lopsided, {"n_params": n, "n_tokens": c / 6 / n}))
            loss *= np.exp(2e-4 * rng.normal())
            points.append(LossPoint(n_params=n, n_tokens=c / 6 / n, loss_nats=loss, run_id=f"r{len(points)}"))
    found = evidence_of(points)
    (apart,) = (d for d in found.disagreements if (d.first, d.second) == ("2", "3-free"))
    assert apart.p_value < 0.05
    assert any("approaches 2 and 3-free disagree" in note for note in found.notes)
    (own,) = (note for note in by_name(found)["2"].notes if "its own bias" in note)
    assert float(own.split("rows: a ")[1].split(",")[0]) == pytest.approx(apart.a_difference.value, abs=0.01)


def test_dense_trunks_give_approach_1_with_an_interval_and_its_own_bias():
    tokens = np.geomspace(1e7, 1e11, 9)
    points = [
        p
        for seed in range(2)
        for p in (
            dataclasses.replace(q, run_id=f"{q.run_id}-s{seed}", row_id=f"{q.row_id}-s{seed}")
            for q in rows(
                np.geomspace(1e6, 1e9, 9), lambda n: tokens, seed=seed, noise=0.001, trunks=True, schedule="wsd"
            )
        )
    ]
    roads = by_name(evidence_of(points))
    low, high = roads["1"].a.ci95
    assert low < TRUE_A < high and high - low < 0.3
    assert roads["1"].a.value == pytest.approx(TRUE_A, abs=0.05)
    assert any("its own bias" in note for note in roads["1"].notes)
    cosine = [dataclasses.replace(p, schedule="cosine") for p in points]
    refused = by_name(evidence_of(cosine[:40], n_draws=0))["1"]
    assert refused.a.value is None and "under one cosine schedule" in refused.why_not


def test_three_sizes_per_budget_draw_a_parabola_without_an_interval():
    found = evidence_of(isoflop(n_sizes=3), n_draws=100)
    roads = by_name(found)
    assert roads["2"].a.value is not None
    assert roads["2"].a.ci95 is None and roads["2"].a.se is None
    assert any("three sizes only" in note for note in roads["2"].notes)
    pairs = {(d.first, d.second): d for d in found.disagreements}
    assert pairs["2", "3-free"].p_value is None


def test_an_unbracketed_budget_is_dropped_by_name_and_a_wide_one_warned_of():
    points = isoflop(n_sizes=6)
    top = max(p.flops for p in points)
    falling = [
        dataclasses.replace(p, loss_nats=4 - 0.1 * np.log(p.n_params / 1e8)) if p.flops > 0.99 * top else p
        for p in points
    ]
    road = by_name(evidence_of(falling, n_draws=0))["2"]
    assert any(note.startswith("dropped C = 1e+20 FLOPs (6 sizes)") for note in road.notes)
    wide = rows(1e8 * np.geomspace(1 / 20, 20, 8), lambda n: [1e18 / n], noise=0.0)
    wide += rows(3e8 * np.geomspace(1 / 4, 4, 8), lambda n: [1e19 / n], noise=0.0)
    notes = by_name(evidence_of(wide, n_draws=0))["2"].notes
    assert any("where losses are no parabola" in note for note in notes)


def test_too_few_rows_for_any_joint_law_give_no_evidence():
    assert evidence_of(rows([1e6, 2e6, 4e6], lambda n: [1e14 / n])) is None


def test_without_resamples_there_are_values_but_no_intervals_and_no_p():
    found = evidence_of(isoflop(), n_draws=0)
    assert all(a.a.ci95 is None for a in found.approaches)
    assert all(d.p_value is None for d in found.disagreements)
    assert by_name(found)["2"].a.value is not None


def test_three_counts_move_a_and_alpha_where_the_head_matters():
    """Sizes are mostly vocabulary: with the body alone the same rows give another exponent."""
    points = []
    for p in rows(np.geomspace(2e6, 2e8, 7), lambda n: np.geomspace(1e8, 1e10, 4), noise=0.001):
        head = round(256 * 50_000 * (p.n_params / 2e8) ** 0.33)
        body = round(p.n_params) - min(head, round(0.9 * p.n_params))
        points.append(dataclasses.replace(p, n_body=body, n_head=min(head, round(0.9 * p.n_params))))
    counts = {c.count: c for c in evidence_of(points).counts}
    assert list(counts) == ["total", "body", "body+head"]
    assert counts["total"].a.value == pytest.approx(TRUE_A, abs=0.05)
    assert counts["body+head"].a.value == pytest.approx(counts["total"].a.value, rel=1e-3)
    assert counts["body"].a.value > counts["total"].a.value + 0.05
    assert counts["body"].alpha.value < counts["total"].alpha.value
    assert all(c.a.ci95 and c.alpha.ci95 and c.why_not is None for c in counts.values())


def test_counts_say_what_is_missing(plain):
    counts = {c.count: c for c in plain.counts}
    assert counts["body"].why_not == "not every row has n_body; add that to the table"
    assert "n_body and n_head" in counts["body+head"].why_not
    assert "no token count is shared" in counts["total"].why_not
    assert counts["total"].a.value is not None and counts["total"].alpha.value is None


def test_the_report_holds_the_evidence_and_fits_the_chosen_law(tmp_path):
    small = isoflop(n_sizes=4)
    report = fit_points(small, n_bootstrap=100)
    assert report.evidence.chosen_law in {fit.law for fit in report.fits}
    again = load_fit(save_fit(report, tmp_path))
    assert again.evidence == report.evidence
    stored = json.loads(codec.dumps(report))
    assert len(stored["evidence"]["approaches"]) == 4
    assert fit_points(small, laws=["chinchilla"], n_bootstrap=0).evidence is None
    assert fit_points(small, laws=["chinchilla"], n_bootstrap=0, with_evidence=True).evidence is not None


def test_evidence_repeats_with_its_seed():
    points = rows([1e7, 3e7, 9e7], lambda n: [1e9, 3e9, 9e9, 27e9])
    one, same, other = (evidence_of(points, seed=seed, n_draws=120, held_out=True) for seed in (3, 3, 4))
    assert one == same
    assert one.approaches != other.approaches
    assert one.holdouts == other.holdouts


def test_chinchilla_table_shows_approaches_that_agree(shared_data):
    """Besiroglu et al. 2024: with the fit corrected, Approach 3 agrees with Hoffmann's Approaches 1 and 2."""
    points = read_points(shared_data / "chinchilla_figure4_points.csv", Selection(drop_highest_loss=5)).points
    found = evidence_of(points, n_draws=150)
    roads = by_name(found)
    assert roads["2"].a.value == pytest.approx(0.49, abs=0.02)
    assert roads["3-free"].a.value == pytest.approx(0.515, abs=0.01)
    (apart,) = (d for d in found.disagreements if (d.first, d.second) == ("2", "3-free"))
    assert apart.p_value > 0.05


@pytest.mark.parametrize(
    ("where", "n_points", "expected"),
    [
        ({"hparams": "base", "warmup": "short", "decay": "chinchilla"}, 88, (2.52901, 0.39125, 0.55338)),
        ({"hparams": "tuned", "warmup": "short", "decay": "const"}, 121, (3.13076, 0.62981, 0.70847)),
    ],
    ids=["cosine", "tuned-const"],
)
def test_porian_joint_law_is_exact(shared_data, where, n_points, expected):
    selection = Selection(
        columns={"n_params": "N", "n_tokens": "D", "loss_nats": "loss"}, where={**where, "count": "standard"}
    )
    table = tabulate(read_points(shared_data / "porian_refinedweb_isoflop.csv", selection).points)
    assert len(table.losses) == n_points
    law = LAWS["chinchilla"]
    posed = law.pose({axis: table.columns[axis] for axis in law.axes}, table.losses)
    y = np.log(table.losses)
    best = solve(posed.model, y, posed.starts(256), parse_objective("huber:1e-3"), bounds=posed.bounds)
    e, _a, _b, alpha, beta = posed.natural(best.theta)
    assert (round(e, 5), round(alpha, 5), round(beta, 5)) == pytest.approx(expected, abs=1.01e-5)
