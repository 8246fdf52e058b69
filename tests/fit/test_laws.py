"""Laws as the engine sees them: derivatives, ties, pins, and what published numbers say through them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.catalogue import CATALOGUE, as_report, joint_fit, open_fit
from homelab_scaling.fit.laws import LAWS, get_law, pin
from homelab_scaling.fit.models import LogSum, Softened
from homelab_scaling.fit.objectives import parse_objective
from homelab_scaling.fit.solve import solve

GRID = {
    "n_params": np.repeat(np.geomspace(1e6, 1e9, 6), 5),
    "n_tokens": np.tile(np.geomspace(1e8, 1e11, 5), 6),
}
GRID |= {"flops": 6 * GRID["n_params"] * GRID["n_tokens"], "s_min_steps": GRID["n_tokens"] / 5e5}
GRID |= {"c_min_flops": GRID["flops"] / 1.2}
TRUTH = {
    "power-n": {"A": 30.0, "alpha": 0.09},
    "power-n-offset": {"E": 1.7, "A": 300.0, "alpha": 0.3},
    "power-d": {"B": 40.0, "beta": 0.1},
    "power-d-offset": {"E": 1.9, "B": 500.0, "beta": 0.33},
    "power-c": {"K": 25.0, "gamma": 0.05},
    "power-c-offset": {"E": 1.8, "K": 800.0, "gamma": 0.16},
    "power-c-min": {"K": 11.0, "gamma": 0.05},
    "power-c-min-offset": {"E": 1.8, "K": 800.0, "gamma": 0.16},
    "chinchilla": {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.35, "beta": 0.37},
    "chinchilla-tied": {"E": 1.8, "A": 480.0, "B": 1500.0, "alpha": 0.35, "beta": 0.35},
    "kaplan": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    "kaplan-s": {"A": 8.8e13**0.077, "B": 2.1e3**0.76, "alpha_N": 0.077, "alpha_S": 0.76},
}


def fitted(law, losses, columns=GRID, objective="l2-log"):
    posed = law.pose({axis: columns[axis] for axis in law.axes}, losses)
    found = solve(posed.model, np.log(losses), posed.starts(256), parse_objective(objective), bounds=posed.bounds)
    return dict(zip(law.names, posed.natural(found.theta), strict=True)), found


@pytest.mark.parametrize("name", list(TRUTH))
def test_every_law_is_recovered_from_noiseless_losses(name):
    law = get_law(name)
    losses = law.loss(np.array([TRUTH[name][p] for p in law.names]), GRID)
    found, optimum = fitted(law, losses)
    assert optimum.converged
    for parameter, truth in TRUTH[name].items():
        assert found[parameter] == pytest.approx(truth, rel=1e-4), parameter


def test_the_catalogue_of_truths_covers_every_law():
    assert set(TRUTH) == set(LAWS) - {"repeated"}  # which has a test module of its own


def derivatives_agree(model, theta):
    _f, state = model.value(theta[None])
    jacobian = model.jacobian(state)[0]
    slope = np.random.default_rng(0).normal(size=(1, model.n_points))
    gradient = model.gradient(state, slope)[0][0]
    hessian = model.hessian(state, np.zeros_like(slope), slope)[0]
    gauss = model.hessian(state, np.ones_like(slope), None)[0]
    assert gauss == pytest.approx(jacobian.T @ jacobian, rel=1e-9)
    assert gradient == pytest.approx(jacobian.T @ slope[0], rel=1e-9)
    for p in range(len(theta)):
        step = 1e-6 * np.eye(len(theta))[p]
        (up, up_state), (down, down_state) = model.value((theta + step)[None]), model.value((theta - step)[None])
        assert (up - down)[0] / 2e-6 == pytest.approx(jacobian[:, p], rel=1e-5, abs=1e-7)
        change = (model.gradient(up_state, slope)[0] - model.gradient(down_state, slope)[0])[0] / 2e-6
        assert change == pytest.approx(hessian[p], rel=1e-4, abs=1e-5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_derivatives_of_both_models_match_finite_differences(seed):
    rng = np.random.default_rng(seed)
    kaplan, tied = get_law("kaplan"), get_law("chinchilla-tied:E=1.7")
    losses = np.full(30, 3.0)
    posed = kaplan.pose(GRID, losses)
    assert isinstance(posed.model, Softened)
    derivatives_agree(posed.model, np.array([*rng.uniform(-1, 2, 2), *rng.uniform(0.05, 1.5, 2)]))
    posed = tied.pose(GRID, losses)
    assert isinstance(posed.model, LogSum)
    derivatives_agree(posed.model, np.array([*rng.uniform(-3, 1, 2), rng.uniform(0.05, 1.5)]))


def test_a_tie_is_the_free_fit_under_a_constraint():
    """The tied optimum on untied losses beats every free law whose exponents are equal."""
    losses = LAWS["chinchilla"].loss(np.array([1.8, 480.0, 2100.0, 0.30, 0.40]), GRID)
    tied, optimum = fitted(LAWS["chinchilla-tied"], losses)
    free, best = fitted(LAWS["chinchilla"], losses)
    assert tied["alpha"] == tied["beta"]
    assert 0.30 < tied["alpha"] < 0.40
    assert free["alpha"] == pytest.approx(0.30, rel=1e-4)
    assert optimum.value > best.value
    for shift in (0.98, 1.02):
        held, worse = fitted(get_law(f"chinchilla:alpha={tied['alpha'] * shift},beta={tied['alpha'] * shift}"), losses)
        assert held["alpha"] == tied["alpha"] * shift
        assert worse.value > optimum.value


@pytest.mark.parametrize(
    "pins", ["E=1.8", "alpha=0.35", "A=480.0", "E=1.8,beta=0.37", "A=480.0,alpha=0.35", "E=1.8,B=2100"]
)
def test_pinned_at_the_truth_the_rest_is_recovered(pins):
    law = get_law(f"chinchilla:{pins}")
    losses = LAWS["chinchilla"].loss(np.array(list(TRUTH["chinchilla"].values())), GRID)
    found, optimum = fitted(law, losses)
    assert found == pytest.approx(TRUTH["chinchilla"], rel=1e-4)
    assert len(optimum.theta) == 5 - len(pins.split(","))
    assert get_law(law.name) == law  # its name, as fit.json keeps it, says all of it


def test_no_irreducible_loss_is_a_pin_too():
    losses = 400 * GRID["n_params"] ** -0.3 + 900 * GRID["n_tokens"] ** -0.3
    found, _optimum = fitted(get_law("chinchilla:E=0"), losses)
    assert found["E"] == 0
    assert found["A"] == pytest.approx(400, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chinchilla:F=1", "no parameter 'F'"),
        ("chinchilla:E=-1", "wants 0 or more"),
        ("chinchilla:alpha=0", "wants a number above 0"),
        ("chinchilla:E", "wants chinchilla:NAME=VALUE"),
        ("chinchilla:E=x", "wants chinchilla:NAME=VALUE"),
        ("chinchilla:E=nan", "wants 0 or more"),
        ("chinchilla-tied:beta=0.3", "exponents are tied"),
        ("kaplan:alpha_N=0.1", "cannot be pinned"),
        ("power-n:A=1,alpha=0.1", "every parameter is pinned"),
        ("hoffmann", "no law 'hoffmann'"),
    ],
)
def test_bad_laws_are_one_sentence(name, said):
    with pytest.raises(SpecError, match=said.replace("(", r"\(")):
        get_law(name)


def test_pins_do_not_pile_up():
    assert pin(LAWS["chinchilla"], {"E": 1.7, "alpha": 0.3}).free == ("A", "B", "beta")


def test_kaplans_own_split_exponent():
    """Kaplan's joint law alone gives a = alpha_D / (alpha_N + alpha_D) = .575 at 6 N D; the paper's .73 is of C_min."""
    law, values = LAWS["kaplan"], np.array(list(TRUTH["kaplan"].values()))
    assert float(law.derived(values)["a"]) == pytest.approx(0.103 / 0.179)
    a, b, alpha, beta = law.split_terms(values)
    n = np.geomspace(1e6, 1e12, 2001)
    flops = 1e21
    inner = a * n**-alpha + b * (flops / 6 / n) ** -beta
    outer = law.loss(values, {"n_params": n, "n_tokens": flops / 6 / n})
    assert np.argmin(inner) == np.argmin(outer)


def test_published_laws_answer_like_fitted_ones():
    for name in CATALOGUE:
        report = open_fit(name)
        fit = report.fits[0]
        assert fit.is_fitted
        assert report.draws[fit.draws_file].values.shape == (0, len(fit.parameters))
    fit, law, drawn = joint_fit(as_report(CATALOGUE["hoffmann-2022"]))
    assert law.name == "chinchilla"
    assert fit.derived["a"].value == pytest.approx(0.2849083 / (0.2849083 + 0.33917084))
    assert drawn.point[0] == pytest.approx(1.69337368)
    kaplan = get_law("power-n")
    values = np.array(list(CATALOGUE["kaplan-2020-n"].values.values()))
    assert float(kaplan.loss(values, {"n_params": 8.8e13})) == pytest.approx(1.0)  # N_c is where L = 1 nat
    with pytest.raises(SpecError, match="no fitted"):
        joint_fit(as_report(CATALOGUE["kaplan-2020-n"]))
    with pytest.raises(SpecError, match="besiroglu-2024"):
        open_fit("besiroglu")
