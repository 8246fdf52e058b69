"""What a report says of seeds: planted noise is found with an honest interval, small differences are not claimed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.batch.bracket import SEED_SD_NATS
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.result import save_fit
from homelab_scaling.report.collect import LabView, collect
from homelab_scaling.report.document import Commands, Grid, Heading, Paragraph, to_markdown
from homelab_scaling.report.repeats import Repeats, sd_interval
from homelab_scaling.report.seeds import TITLE, seeds
from homelab_scaling.report.story import tell
from homelab_scaling.runs import read_runs

SIGMA = 0.01
RUNGS = ("67k", "127k", "289k")


@pytest.fixture(scope="module")
def view(make_lab, tmp_path_factory) -> LabView:
    """Three rungs, three seeds each, three horizons."""
    return planted(make_lab(tmp_path_factory.mktemp("lab") / "quickstart"), {rung: 3 for rung in RUNGS})


def planted(lab, n_seeds: dict[str, int]) -> LabView:
    for rung, n in n_seeds.items():
        for seed in range(n):
            lab.run(rung, seed=seed)
    return collect(lab.lab)


def with_losses(view: LabView, loss) -> LabView:
    """The same lab with other losses: `loss(row)`."""
    return replace(view, rows=tuple(replace(row, loss_nats=loss(row)) for row in view.rows))


def world(view: LabView, rng, *, run_sd: float = SIGMA, row_sd: float = 0.0, slope: float = 0.3) -> LabView:
    """Losses that fall with size and tokens, and noise shared by a run's rows, and of each row alone."""
    shared = {run.run_id: run_sd * rng.normal() for run in view.runs}
    noise = {row.row_id: shared[row.run_id] + row_sd * rng.normal() for row in view.rows}
    return with_losses(view, lambda r: 9 - slope * math.log(r.n_params) - 0.1 * math.log(r.n_tokens) + noise[r.row_id])


def text_of(view: LabView) -> str:
    return to_markdown("", seeds(view))


# ----------------------------------------------------------------------------------------------------------- the spread


def test_the_interval_is_that_of_chi_square() -> None:
    """20.4832 and 3.24697 are the 2.5 % and 97.5 % points in any table of chi-square at 10 degrees of freedom."""
    assert sd_interval(2.0, 10) == pytest.approx((2 * (10 / 20.4832) ** 0.5, 2 * (10 / 3.24697) ** 0.5), rel=1e-5)


@pytest.mark.parametrize(("run_sd", "row_sd", "low", "high"), [(SIGMA, 0.0, 0.93, 0.97), (0.0, SIGMA, 0.97, 1.0)])
def test_the_interval_covers_the_planted_noise(view: LabView, run_sd, row_sd, low, high) -> None:
    """Noise of runs as often as it says; noise of rows at least as often, because rows never count as repeats."""
    rng = np.random.default_rng(5)
    found = [Repeats(world(view, rng, run_sd=run_sd, row_sd=row_sd)).spread for _ in range(400)]
    assert all(s.dof == 6 and s.n_cells == 9 for s in found)
    covered = np.mean([s.ci95[0] <= SIGMA <= s.ci95[1] for s in found])
    assert low <= covered <= high
    assert np.sqrt(np.mean([s.sd**2 for s in found])) == pytest.approx(SIGMA, rel=0.03)


def test_each_horizon_pools_its_rungs(view: LabView) -> None:
    repeats = Repeats(world(view, np.random.default_rng(1)))
    horizons = repeats.by_horizon()
    assert [spread.dof for _, spread in horizons] == [6, 6, 6]
    for cells, spread in horizons:
        assert len({cell.n_tokens for cell in cells}) == 1 and len(cells) == 3
        assert spread.sd == pytest.approx(math.sqrt(sum(cell.sd**2 for cell in cells) / 3))
    grid = next(block for block in seeds(repeats.view) if isinstance(block, Grid))
    assert len(grid.rows) == 9 + 3 + 1
    assert grid.rows[-1][0] == "all" and grid.rows[-1][-1] == "6"


def test_unequal_seeds_count_what_there_is(make_lab, tmp_path) -> None:
    lab = make_lab(tmp_path / "quickstart")
    lab.run("67k", status="running", seed=3)  # one row of three
    view = planted(lab, {"67k": 3, "127k": 1, "289k": 2})
    repeats = Repeats(view)
    assert [len(cell.rows) for cell in repeats.cells] == [4, 3, 3, 1, 1, 1, 2, 2, 2]
    assert repeats.spread.dof == 3 + 1
    grid = next(block for block in seeds(view) if isinstance(block, Grid))
    assert "3 rows with one seed alone are left out" in grid.caption
    small, large = (e for e in repeats.between_rungs if e.name.endswith(" at D = 3.00M"))
    t = repeats.spread.reach
    assert small.noise95 == pytest.approx(t * repeats.spread.sd * math.sqrt(1 / 3 + 1))
    assert large.noise95 == pytest.approx(t * repeats.spread.sd * math.sqrt(1 + 1 / 2))


def test_another_recipe_is_no_repeat(make_lab, tmp_path) -> None:
    """Another batch beside it, under another seed, is another experiment."""
    lab = make_lab(tmp_path / "quickstart")
    lab.run("67k", seed=0)
    lab.batch //= 2
    lab.run("67k", seed=1)
    assert Repeats(collect(lab.lab)).spread is None


def test_runs_of_another_trainer_are_told_apart_by_their_rows(make_lab, tmp_path) -> None:
    lab = make_lab(tmp_path / "quickstart")
    for seed in range(3):
        (lab.lab / "runs" / lab.run("67k", seed=seed).run_id / "spec.json").unlink()
    view = collect(lab.lab)
    assert all(run.spec is None for run in view.runs)
    assert Repeats(view).spread.dof == 2


# ---------------------------------------------------------------------------------------------------------- the effects


def test_differences_that_are_nothing_are_claimed_one_time_in_twenty(view: LabView) -> None:
    rng = np.random.default_rng(7)
    wrong = [e.is_beyond for _ in range(300) for e in Repeats(world(view, rng, slope=0.0)).between_rungs]
    assert 0.03 <= np.mean(wrong) <= 0.07


def test_a_gap_of_many_spreads_is_beyond_seeds_and_a_small_one_is_named(view: LabView) -> None:
    large = world(view, np.random.default_rng(2), slope=0.3)
    assert all(effect.is_beyond for effect in Repeats(large).between_rungs)
    assert "all are larger than what seeds do" in text_of(large)
    small = world(view, np.random.default_rng(2), slope=0.003)
    lost = [effect for effect in Repeats(small).between_rungs if not effect.is_beyond]
    assert lost
    said = text_of(small)
    assert "Smaller than what seeds do, so not to be claimed from these runs: 127k against 67k at D = 750k" in said
    assert f"{12 - len(lost)} are larger than what seeds do" in said
    table = [block for block in seeds(small) if isinstance(block, Grid)][1]
    by_name = {row[0]: row for row in table.rows}
    for effect in lost:
        if effect.name in by_name:
            assert by_name[effect.name][-1] == "no"
            assert float(by_name[effect.name][2]) == pytest.approx(effect.nats / Repeats(small).spread.sd, abs=0.06)


def test_horizons_of_one_run_share_its_noise_and_those_of_several_do_not(view: LabView) -> None:
    """A gain of two spreads is sure where the same run has both rows, and not where each row is its own run."""
    rng = np.random.default_rng(3)
    noisy = world(view, rng, run_sd=0.07, row_sd=0.001)
    assert all(effect.is_beyond for effect in Repeats(noisy).between_horizons)
    apart = replace(noisy, rows=tuple(replace(r, run_id=r.row_id) for r in noisy.rows), runs=_split(noisy))
    effects = Repeats(apart).between_horizons
    assert len(effects) == 6 and Repeats(apart).spread.dof == 18
    assert min(e.noise95 for e in effects) > 20 * max(e.noise95 for e in Repeats(noisy).between_horizons)
    assert not all(effect.is_beyond for effect in effects)


def _split(view: LabView):
    """Every row a cosine run of its own."""
    return tuple(
        replace(
            run,
            run_id=row.row_id,
            spec=None,
            record=replace(run.record, rows=(replace(row, schedule="cosine", run_id=row.row_id),)),
        )
        for run in view.runs
        for row in run.rows
    )


def test_ladders_without_common_tokens_are_compared_rung_by_rung(make_lab, tmp_path) -> None:
    lab = make_lab(tmp_path / "quickstart")
    for factor, rung in ((1, "67k"), (2, "127k")):
        lab.horizons = tuple(factor * tokens * 3 // 2 for tokens in (749_568 // 3 * 2, 1_499_136))
        for seed in range(2):
            lab.run(rung, seed=seed)
    names = [effect.name for effect in Repeats(collect(lab.lab)).between_rungs]
    assert names == ["127k against 67k at D = 750k and 1.50M", "127k against 67k at D = 2.25M and 4.50M"]


def test_what_a_better_rate_gained_is_measured_in_seeds(view: LabView) -> None:
    repeats = Repeats(world(view, np.random.default_rng(4)))
    first, second = repeats.of_rates([("67k", 0.002), ("127k", 0.2)])
    assert not first.is_beyond and second.is_beyond
    assert first.noise95 == pytest.approx(2.4469 * repeats.spread.sd * math.sqrt(2), rel=1e-4)
    assert second.sds == pytest.approx(0.2 / repeats.spread.sd)


def test_what_all_rungs_have_in_common_is_told_when_it_is_there(view: LabView) -> None:
    rng = np.random.default_rng(6)
    shift = dict(zip(range(3), 0.05 * rng.normal(size=3), strict=True))
    alike = world(view, rng, run_sd=0.001)
    alike = with_losses(alike, lambda row: row.loss_nats + shift[row.seed])
    share, p_value = Repeats(alike).common
    assert share > 0.95 and p_value < 1e-3
    assert "common to all rungs" in text_of(alike)
    p_values = [Repeats(world(view, rng)).common[1] for _ in range(300)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_a_rung_that_seeds_move_more_than_the_others_is_named(view: LabView) -> None:
    rng = np.random.default_rng(8)
    calm = [Repeats(world(view, rng)).unlike for _ in range(300)]
    assert np.mean([one is not None for one in calm]) < 0.03
    wild = world(view, rng)
    wild = with_losses(wild, lambda r: r.loss_nats + (0.3 * r.seed if r.rung == "127k" else 0.0))
    rung, own, rest = Repeats(wild).unlike
    assert rung == "127k" and own.sd > 20 * rest.sd and (own.dof, rest.dof) == (2, 4)
    assert "Seeds move 127k by" in text_of(wild)


def test_residuals_are_held_against_seeds(synthetic) -> None:
    for rung in ("67k", "127k", "289k", "545k", "1072k"):
        for seed in range(2):
            synthetic.run(rung, seed=seed)
    points, excluded = read_runs(synthetic.lab)
    laws = ["power-n", "chinchilla"]
    save_fit(fit_points(points, excluded, source="x", laws=laws, n_bootstrap=20), synthetic.lab / "fit")
    view = collect(synthetic.lab)
    said = text_of(view)
    assert "what seeds alone would leave" in said, "the planted law is the fitted one"
    assert view.fit.n_runs == 10
    assert "its resamples are of 10 runs of 5 sizes" in said, "seeds are clusters of their own"
    assert "seed by seed is" in said and "the fit over all runs says" in said
    quiet = with_losses(view, lambda row: row.loss_nats - _off(view, row) * 0.99)
    assert "the law's own misfit" in text_of(quiet), "the same law is off where seeds hardly spread"


def _off(view: LabView, row) -> float:
    cell = next(c for c in Repeats(view).cells if (c.rung, c.n_tokens) == (row.rung, row.n_tokens))
    return row.loss_nats - cell.mean


# ----------------------------------------------------------------------------------------------------------- degenerate


def test_with_one_seed_it_says_how_to_measure_and_what_that_costs(synthetic) -> None:
    synthetic.all_rungs()
    heading, said = seeds(collect(synthetic.lab))
    assert isinstance(heading, Heading) and heading.text == TITLE and isinstance(said, Paragraph)
    assert f"about {SEED_SD_NATS:g} nats" in said.text and said.text.endswith("quickstart.toml --seeds 3`.")
    totals = {"seconds": 1800.0, "kwh": 0.25, "usd": None}
    codec.write_json(synthetic.lab / "plan.json", {"totals": totals, "seeds": [0], "runs": []})
    _, said = seeds(collect(synthetic.lab))
    assert said.text.endswith("by the plan about 1.0 h one run after the other and 0.5 kWh more.")
    for broken in ({}, {"totals": []}, {"totals": {"seconds": "x"}}, {"totals": totals, "seeds": 3}):
        codec.write_json(synthetic.lab / "plan.json", broken)
        assert "--seeds 3" in seeds(collect(synthetic.lab))[1].text


def test_copies_are_not_repeats(view: LabView) -> None:
    copied = with_losses(view, lambda row: 5.0)
    _, said = seeds(copied)
    assert "copies of one run, not repeats" in said.text


def test_before_there_are_rows_there_is_no_section(synthetic) -> None:
    synthetic.run("67k", status="failed", reason="it broke")
    assert seeds(collect(synthetic.lab)) == []


def test_the_report_has_the_section(make_lab, tmp_path) -> None:
    lab = make_lab(tmp_path / "quickstart")
    blocks = tell(planted(lab, {rung: 2 for rung in RUNGS}), [])
    assert [block.text for block in blocks if isinstance(block, Heading)].count(TITLE) == 1
    (commands,) = (block.text for block in blocks if isinstance(block, Commands))
    assert "quickstart.toml --seeds 2 " in commands
