"""Two recipes in worlds where the truth is known: the right verdict, narrower for pairing, refusals in one sentence."""

import dataclasses
import json

import numpy as np
import pytest

from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.fit.allocate import best_loss
from homelab_scaling.fit.arms import Arm, check_comparable, match_runs, open_arm, shared_multipliers, shared_offset
from homelab_scaling.fit.compare import compare, compute_multiplier
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.points import points_csv
from homelab_scaling.fit.result import save_fit
from homelab_scaling.fit.worlds import Noise, as_points, columns_of, ladder_design, noise_of

LAW = get_law("chinchilla")
TRUTH = np.array([1.7, 60.0, 900.0, 0.35, 0.37])
CHEAPER = np.array([1.7, 57.0, 860.0, 0.35, 0.37])
STEEPER = np.array([1.7, 75.0, 1350.0, 0.37, 0.395])
DESIGN = ladder_design(np.geomspace(1e5, 3e7, 6).tolist(), (1e7, 1e8, 1e9), seeds=(0, 1))
FEW = ladder_design(np.geomspace(1e5, 3e7, 6).tolist(), (1e7, 1e8, 1e9))


def arm(truth, *, own, common=7, design=DESIGN, common_sd=0.003, seed_offset=0, **fields):
    """Rows of one recipe: noise `common` to both recipes (seed, data order), and a sixth as much of its own."""
    y = np.log(LAW.loss(truth, dict(columns_of(design))))
    y = y + noise_of(design, Noise(run_sd=common_sd, row_sd=0.0002, seed=common), 1)[0]
    y = y + noise_of(design, Noise(run_sd=0.0005, row_sd=0.0005, seed=own), 1)[0]
    points = as_points(design, y)
    points = tuple(dataclasses.replace(p, seed=p.seed + seed_offset, **fields) for p in points)
    largest = max(6 * p.n_params * p.n_tokens for p in points)
    return Arm(
        name=f"recipe {own}",
        count="total",
        points=points,
        law="chinchilla",
        drawn=None,
        largest_flops=largest,
        published=False,
    )


def width(interval):
    return interval[1] - interval[0]


def exponent(comparison):
    return next(d for d in comparison.differences if d.name == "exponent").change


# -------------------------------------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize("design", [DESIGN, FEW], ids=["pairs bootstrap", "wild bootstrap"])
def test_the_verdict_is_right_where_the_truth_is_known(design):
    a = arm(TRUTH, own=1, design=design)
    verdicts = {
        name: compare(a, arm(truth, own=2, design=design), n_draws=600).verdict
        for name, truth in {"equal": TRUTH, "cheaper": CHEAPER, "steeper": STEEPER}.items()
    }
    assert (verdicts["equal"].kind, verdicts["equal"].better) == ("not distinguishable", None)
    assert (verdicts["cheaper"].kind, verdicts["cheaper"].better) == ("better constant only", "B")
    assert (verdicts["steeper"].kind, verdicts["steeper"].better) == ("better exponent", "B")
    assert compare(arm(STEEPER, own=2, design=design), a, n_draws=600).verdict.better == "A"


def test_a_copy_is_no_better():
    """Rounding in the last digit is no difference, however narrow a paired interval of nothing is."""
    found = compare(arm(TRUTH, own=1), arm(TRUTH, own=1), n_draws=200)
    assert found.verdict.kind == "not distinguishable"
    assert all(at.p_b_better == pytest.approx(0.5) for at in found.budgets)


def test_multiplier_and_probability_are_those_of_the_truth():
    found = compare(arm(TRUTH, own=1), arm(STEEPER, own=2), n_draws=600, flops=(1e15, 1e17))
    for at in found.budgets:
        truth = float(compute_multiplier(LAW, TRUTH, LAW, STEEPER, at.flops))
        assert at.multiplier.ci95[0] <= truth <= at.multiplier.ci95[1]
        assert at.multiplier.value == pytest.approx(truth, rel=0.05)
        assert at.multiplier_shared_e.value == pytest.approx(truth, rel=0.05)
        assert at.p_b_better == 1.0
    assert found.shared_e == pytest.approx(1.7, abs=0.03)
    same = compare(arm(TRUTH, own=1), arm(TRUTH, own=2), n_draws=600)
    assert 0.01 < same.budgets[0].p_b_better < 0.99
    assert [at.extrapolation for at in same.budgets] == pytest.approx([1, 10, 100])


def test_the_multiplier_inverts_the_frontier_and_is_the_closed_form():
    flops = 1e18
    m = float(compute_multiplier(LAW, TRUTH, LAW, STEEPER, flops))
    wanted = float(best_loss(LAW, STEEPER, flops))
    assert float(best_loss(LAW, TRUTH, m * flops)) == pytest.approx(wanted, rel=1e-12)
    l_1, e, g = float(best_loss(LAW, TRUTH, flops)), 1.7, 0.35 * 0.37 / 0.72
    assert m == pytest.approx(((l_1 - e) / (wanted - e)) ** (1 / g), rel=1e-9)
    floor = np.array([1.9, 60.0, 900.0, 0.35, 0.37])
    assert np.isinf(compute_multiplier(LAW, floor, LAW, STEEPER, 1e24)), "a higher floor is never left"


def test_an_unreachable_loss_is_said_not_invented():
    floor = np.array([2.4, 60.0, 900.0, 0.35, 0.37])
    found = compare(arm(floor, own=1), arm(TRUTH, own=2), n_draws=200, flops=(1e22,))
    (at,) = found.budgets
    assert at.multiplier.value is None and at.multiplier.never_frac == 1.0
    assert json.loads(json.dumps(at.multiplier.never_frac)) == 1.0
    assert at.p_b_better == 1.0


# -------------------------------------------------------------------------------------------------------------- pairing


@pytest.mark.parametrize("design", [DESIGN, FEW], ids=["pairs bootstrap", "wild bootstrap"])
def test_pairing_is_narrower_where_runs_share_noise(design):
    a = arm(TRUTH, own=1, design=design)
    paired = compare(a, arm(TRUTH, own=2, design=design), n_draws=600)
    apart = compare(a, arm(TRUTH, own=2, design=design, seed_offset=10), n_draws=600)
    assert paired.paired and paired.pairing.startswith("paired: all")
    assert not apart.paired and "wider for it" in apart.pairing
    assert exponent(paired).value == pytest.approx(exponent(apart).value, abs=1e-12)
    assert 2 * width(exponent(paired).ci95) < width(exponent(apart).ci95)


def test_runs_match_by_size_tokens_and_seed_in_any_order():
    a, b = arm(TRUTH, own=1).points, arm(TRUTH, own=2).points
    renamed = tuple(dataclasses.replace(p, run_id=f"x{p.run_id}", n_params=p.n_params * 1.004) for p in reversed(b))
    found = match_runs(a, renamed)
    assert found.is_full and found.n_matched == 12
    assert [(p.seed, p.n_tokens) for p in found.a] == [(p.seed, p.n_tokens) for p in found.b]
    assert match_runs(a, b[3:]).n_matched == 11
    other = match_runs(a, tuple(dataclasses.replace(p, n_tokens=p.n_tokens * 1.1) for p in b))
    assert other.n_matched == 0 and other.n_runs == (12, 12)


def test_multipliers_are_shared_by_the_matched_runs_alone():
    a, b = arm(TRUTH, own=1).points, arm(TRUTH, own=2).points
    partly = match_runs(a, b[: 3 * 8] + tuple(dataclasses.replace(p, seed=99) for p in b[3 * 8 :]))
    left, right = shared_multipliers(partly, np.zeros(12, dtype=np.int64), (36, 36), 300, 0)
    assert np.array_equal(left[:, :8], right[:, :8])
    assert not np.array_equal(left[:, 8:], right[:, 8:])
    assert (left.sum(axis=1) == 12).all() and (right.sum(axis=1) == 12).all()
    nearly = match_runs(a, b[: 3 * 11])
    assert shared_multipliers(nearly, np.zeros(12, dtype=np.int64), (36, 33), 300, 0) is None, "one run has no spread"


def test_few_runs_share_signs_and_one_run_shares_rows():
    few = match_runs(arm(TRUTH, own=1, design=FEW).points, arm(TRUTH, own=2, design=FEW[:15]).points)
    left, right = shared_multipliers(few, np.zeros(6, dtype=np.int64), (18, 15), 50, 0)
    assert left.shape == (50, 6) and right.shape == (50, 5)
    assert np.array_equal(left[:, :5], right)
    one = match_runs(arm(TRUTH, own=1, design=FEW[:3]).points, arm(TRUTH, own=2, design=FEW[:3]).points)
    rows, _same = shared_multipliers(one, np.zeros(1, dtype=np.int64), (3, 3), 50, 0)
    assert rows.shape == (50, 3)


def test_same_seed_same_answer():
    a, b = arm(TRUTH, own=1), arm(CHEAPER, own=2)
    assert compare(a, b, n_draws=100, seed=5) == compare(a, b, n_draws=100, seed=5)
    assert compare(a, b, n_draws=100, seed=5) != compare(a, b, n_draws=100, seed=6)


def test_the_shared_offset_is_found_between_two_fits():
    from homelab_scaling.fit.arms import _fit
    from homelab_scaling.fit.objectives import parse_objective

    silent = {"common_sd": 0.0}
    arms = arm(TRUTH, own=1, **silent), arm(STEEPER, own=2, **silent)
    left, right = (_fit(one, LAW, parse_objective("l2-log")) for one in arms)
    assert shared_offset(LAW, (left, right)) == pytest.approx(1.7, abs=0.02)


# ---------------------------------------------------------------------------------------------------------- what is not


def test_published_laws_have_no_interval_and_no_verdict():
    found = compare(open_arm("hoffmann-2022"), open_arm("besiroglu-2024"))
    assert found.verdict.kind == "no intervals" and found.verdict.better is None
    assert exponent(found).value == pytest.approx(0.1785 - 0.1548, abs=2e-4)
    assert exponent(found).ci95 is None and found.shared_e is None
    assert [n for n in found.notes if "published without draws" in n]
    assert found.budgets[0].multiplier.value is not None and found.budgets[0].p_b_better is None


def test_a_published_law_beside_points_compares_exponents_only():
    found = compare(arm(TRUTH, own=1), open_arm("hoffmann-2022"), n_draws=200)
    assert found.budgets == () and found.verdict_shared_e is None
    assert exponent(found).ci95 is not None
    assert any("only exponents" in n for n in found.notes)


def test_other_texts_and_other_counts_are_refused():
    a, b = arm(TRUTH, own=1, data_id="books"), arm(TRUTH, own=2, data_id="code")
    with pytest.raises(DataError, match=r"books.*code.*--bpb"):
        compare(a, b, n_draws=0)
    with pytest.raises(SpecError, match="--count body"):
        compare(a, dataclasses.replace(b, count="body", points=()), n_draws=0)
    assert "same text" in check_comparable(a, arm(TRUTH, own=2), bpb=False)[0]


def test_bits_per_byte_compare_across_tokenizers():
    a = arm(TRUTH, own=1, data_id="books")
    with pytest.raises(DataError, match="no bpb"):
        compare(a, a, bpb=True, n_draws=0)
    points = tuple(dataclasses.replace(p, bpb=0.3 * p.loss_nats, data_id="other") for p in a.points)
    in_bytes = dataclasses.replace(a, points=points)
    again = dataclasses.replace(
        a, points=tuple(dataclasses.replace(p, loss_nats=9.9, bpb=0.3 * p.loss_nats) for p in a.points)
    )
    found = compare(again, in_bytes, bpb=True, n_draws=0)
    assert exponent(found).value == pytest.approx(0, abs=1e-12)
    assert found.budgets[0].loss_a.value == pytest.approx(0.3 * float(best_loss(LAW, TRUTH, 1.8e17)), rel=0.02)


def test_too_few_rows_and_bad_budgets_are_refused():
    with pytest.raises(DataError, match="cannot be fitted"):
        compare(arm(TRUTH, own=1, design=FEW[:4]), arm(TRUTH, own=2), n_draws=0)
    with pytest.raises(SpecError, match="positive budgets"):
        compare(arm(TRUTH, own=1), arm(TRUTH, own=2), flops=(-1.0,))
    with pytest.raises(SpecError, match="law of N and D"):
        compare(arm(TRUTH, own=1), arm(TRUTH, own=2), law="power-n")


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command_reads_fits_and_csvs(tmp_path, monkeypatch, homelab):
    monkeypatch.setenv("COLUMNS", "100")
    a, b = arm(TRUTH, own=1), arm(STEEPER, own=2)
    save_fit(fit_points(a.points, laws=["chinchilla"], n_bootstrap=20, source="a"), tmp_path / "a")
    (tmp_path / "b.csv").write_text(points_csv(b.points), encoding="utf-8")
    said = homelab("compare", tmp_path / "a", tmp_path / "b.csv", "--bootstrap", "300")
    assert said.code == 0 and said.err == ""
    assert "paired: all 12 runs" in said.out and "B has the better exponent" in said.out
    assert max(len(line) for line in said.out.splitlines()) <= 100
    said = homelab("compare", tmp_path / "a", tmp_path / "b.csv", "--bootstrap", "300", "--json", "--flops", "1e16")
    found = json.loads(said.out)
    assert found["verdict"]["kind"] == "better exponent" and found["paired"] is True
    assert [at["flops"] for at in found["budgets"]] == [1e16]
    assert {d["name"] for d in found["differences"]} == {*LAW.names, "a", "b", "exponent"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("nowhere", "hoffmann-2022"), "no fit, folder or published law"),
        (("kaplan-2020", "hoffmann-2022"), "counts N as body"),
        (("kaplan-2020-n", "kaplan-2020"), "no fitted L(N, D)"),
        (("hoffmann-2022", "besiroglu-2024", "--flops", "many"), "many"),
        (("hoffmann-2022", "besiroglu-2024", "--flops", "0"), "positive budgets"),
        (("hoffmann-2022", "besiroglu-2024", "--bootstrap", "-1"), "0 to 100,000"),
        (("hoffmann-2022", "besiroglu-2024", "--bpb"), "needs it on every row"),
        (("hoffmann-2022",), "--help"),
    ],
)
def test_every_mistake_is_one_sentence(homelab, args, said):
    result = homelab("compare", *args)
    assert result.code == 2 and result.out == ""
    assert said in result.err and len(result.err.strip().splitlines()) == 1
