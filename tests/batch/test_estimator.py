"""The noise scale's estimators against Gaussian gradients of known covariance."""

from dataclasses import dataclass

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.batch.estimator import (
    NoiseMeasurement,
    NoiseScale,
    fieller,
    measurable_seqs,
    noise_scale,
    steps_for,
)
from homelab_scaling.errors import DataError


@dataclass(frozen=True, kw_only=True)
class World:
    """g_i = G + e, e ~ N(0, diag(variance)), where B_simple = sum(variance) / |G|^2 exactly."""

    gradient: np.ndarray
    variance: np.ndarray

    @property
    def b_simple(self) -> float:
        return float(self.variance.sum() / (self.gradient @ self.gradient))

    def steps(self, rng: np.random.Generator, *, t: int, k: int, b: int) -> list[NoiseMeasurement]:
        """T measuring steps of K micro-batches of b sequences."""
        noise = rng.standard_normal((t, k, len(self.gradient))) * np.sqrt(self.variance / b)
        g = self.gradient + noise
        return [
            NoiseMeasurement(
                k=k,
                microbatch_seqs=b,
                mean_sq_norm=float(np.mean(np.sum(one * one, axis=1))),
                sq_norm_of_mean=float(np.sum(one.mean(0) ** 2)),
            )
            for one in g
        ]


def world(d: int, b_simple: float, *, anisotropic: bool = True) -> World:
    """Noise whose variances fall as 1 / sqrt(i), along the gradient no less than across it."""
    rng = np.random.default_rng(3)
    variance = np.arange(1, d + 1) ** -0.5 if anisotropic else np.ones(d)
    gradient = rng.standard_normal(d) * np.sqrt(variance)
    return World(gradient=gradient * np.sqrt(variance.sum() / b_simple / (gradient @ gradient)), variance=variance)


def scale(steps: list[NoiseMeasurement]) -> NoiseScale:
    return noise_scale(steps, context_tokens=10, loss_nats=3.0, tokens_trained=1, n_params=1)


def test_both_estimates_are_unbiased() -> None:
    w = world(50, 30.0)
    steps = w.steps(np.random.default_rng(0), t=20_000, k=4, b=2)
    for name, truth in (("grad_sq", w.gradient @ w.gradient), ("trace", w.variance.sum())):
        values = np.array([getattr(s, name) for s in steps])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize(("k", "b", "t", "b_simple"), [(8, 2, 50, 100.0), (8, 2, 50, 400.0), (4, 1, 50, 30.0)])
def test_the_interval_covers(k: int, b: int, t: int, b_simple: float) -> None:
    w = world(400, b_simple)
    rng = np.random.default_rng(1)
    covered = 0
    n = 400
    for _ in range(n):
        s = scale(w.steps(rng, t=t, k=k, b=b))
        truth = w.b_simple * 10
        if s.ci95_tokens is not None:
            covered += s.ci95_tokens[0] <= truth <= s.ci95_tokens[1]
        else:
            assert s.b_simple_tokens is None and s.why_no_number
            covered += s.at_least_tokens is None or s.at_least_tokens <= truth
    assert 0.92 <= covered / n <= 0.98


def test_where_noise_drowns_the_gradient_it_says_at_least_and_gives_no_number() -> None:
    w = world(200, 3000.0)
    rng = np.random.default_rng(2)
    found = [scale(w.steps(rng, t=30, k=2, b=1)) for _ in range(200)]
    unbounded = [s for s in found if s.ci95_tokens is None]
    assert len(unbounded) > 150
    assert all(s.b_simple_seqs is None and s.b_simple_tokens is None for s in unbounded)
    bounds = [s.at_least_tokens for s in unbounded]
    assert all(bound is not None and bound > 0 for bound in bounds)
    assert np.mean([bound <= w.b_simple * 10 for bound in bounds if bound is not None]) > 0.95
    assert "at least" in unbounded[0].words and "not significantly" in (unbounded[0].why_no_number or "")


def test_a_negative_mean_of_squares_still_gives_a_bound_and_no_noise_gives_an_upper_one() -> None:
    rng = np.random.default_rng(4)
    ratio = fieller(10 + rng.standard_normal(20), -0.5 + rng.standard_normal(20))
    assert ratio.value is None and ratio.high is None and ratio.low is not None and ratio.low > 0
    ratio = fieller(rng.standard_normal(20) - 0.1, 10 + rng.standard_normal(20))
    assert ratio.value is None and ratio.low == 0.0 and ratio.high is not None and 0 < ratio.high < 0.2


def test_units_and_file(tmp_path: object) -> None:
    s = scale(world(50, 30.0).steps(np.random.default_rng(0), t=40, k=8, b=2))
    assert s.b_simple_seqs is not None and s.b_simple_tokens == pytest.approx(10 * s.b_simple_seqs)
    assert codec.from_plain(codec.to_plain(s), NoiseScale, "x") == s


@pytest.mark.parametrize(("k", "q", "say"), [(1, 1.0, "found 1 micro-batch"), (4, float("nan"), "not finite")])
def test_what_cannot_be_measured_is_refused_in_a_sentence(k: int, q: float, say: str) -> None:
    with pytest.raises(DataError, match=say):
        NoiseMeasurement(k=k, microbatch_seqs=1, mean_sq_norm=q, sq_norm_of_mean=0.5)


def test_two_steps_are_too_few() -> None:
    with pytest.raises(DataError, match="found 2 measuring steps, wants 3 or more"):
        fieller(np.ones(2), np.ones(2))


@pytest.mark.parametrize("r", [4.0, 16.0])
def test_the_planned_number_of_steps_comes_within_twenty_percent_nine_times_in_ten(r: float) -> None:
    k, b, d = 8, 2, 300
    w = world(d, r * k * b)
    s = w.variance
    rho = float((w.gradient**2 * s).sum() / (w.gradient @ w.gradient) / s.sum())
    d_eff = float(s.sum() ** 2 / (s @ s))
    t = steps_for(w.b_simple, k=k, microbatch_seqs=b, rho=rho, d_eff=d_eff)
    rng = np.random.default_rng(5)
    # |G|^2 alone, as the formula has it: what 1 / x does to its tails is the interval's business.
    means = np.array([np.mean([m.grad_sq for m in w.steps(rng, t=t, k=k, b=b)]) for _ in range(200)])
    within = np.abs(means / (w.gradient @ w.gradient) - 1) <= 0.20
    assert 0.84 <= within.mean() <= 0.96
    assert measurable_seqs(t, k=k, microbatch_seqs=b, rho=rho, d_eff=d_eff) == pytest.approx(w.b_simple, rel=0.05)


def test_the_plan_matches_the_published_simulation() -> None:
    """d = 2000, K = 8: about 22 steps at r = 16 and 320 at r = 64."""
    for r, steps in ((16, 22), (64, 320)):
        assert steps_for(r * 8, k=8, microbatch_seqs=1, rho=1 / 2000, d_eff=2000) == pytest.approx(steps, rel=0.05)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_isotropic_quadratic_follows_its_closed_form_at_the_rate_that_the_measured_scale_gives(batch: int) -> None:
    """L = h |theta|^2 / 2 with greedy rate (1 / h) / (1 + B_noise / B): 1 / L' = 1 / L + B / c, c = tr(S) / (2 h).

    With H = h I the B_noise of the theory is B_simple, so the rate is taken from our own measurement.
    """
    h, d, n_paths, n_steps = 0.7, 20, 300, 12
    rng = np.random.default_rng(6)
    variance = np.full(d, 0.5)
    c = variance.sum() / (2 * h)
    theta = np.full((n_paths, d), 1.0)
    measured = scale(World(gradient=h * theta[0], variance=variance).steps(rng, t=4000, k=8, b=4)).b_simple_seqs
    assert measured == pytest.approx(variance.sum() / (h * theta[0] @ (h * theta[0])), rel=0.03)
    inverse = 2 / (h * float(theta[0] @ theta[0]))
    for step in range(n_steps):
        b_noise = measured if step == 0 else variance.sum() / (2 * h / inverse)
        rate = (1 / h) / (1 + b_noise / batch)
        gradient = h * theta + rng.standard_normal(theta.shape) * np.sqrt(variance / batch)
        theta = theta - rate * gradient
        inverse += batch / c
    loss = h / 2 * np.mean(np.sum(theta**2, axis=1))
    assert 1 / loss == pytest.approx(inverse, rel=0.03)
    if batch >= measured:  # the loss at least halves in the first step, which is what B_noise means
        assert 1 / (1 / (h * d / 2) + batch / c) <= h * d / 2 / 2 * 1.01


def test_noisy_quadratic_has_the_scale_that_its_matrices_say() -> None:
    """H = diag(1 / i), noise covariance H, 1000 modes, at a fixed rate: moments of theta are exact at every step.

    m_i(t + 1) = (1 - e h_i)^2 m_i(t) + e^2 s_i / B; B_simple = tr(S) / E|H theta|^2 is measured on sampled weights.
    """
    h = 1 / np.arange(1, 301)
    m, rate, b, k = np.ones_like(h), 0.3, 16, 8
    for _ in range(30):
        m = (1 - rate * h) ** 2 * m + rate**2 * h / (b * k)
    rng = np.random.default_rng(7)
    steps: list[NoiseMeasurement] = []
    for _ in range(300):  # each step at weights of its own, as in a window of training
        theta = rng.standard_normal(len(h)) * np.sqrt(m)
        steps += World(gradient=h * theta, variance=h).steps(rng, t=1, k=k, b=b)
    exact = h.sum() / float((h**2 * m).sum())
    found = scale(steps)
    assert found.ci95_tokens is not None
    assert found.ci95_tokens[0] <= 10 * exact <= found.ci95_tokens[1]
    assert found.ci95_tokens[1] - found.ci95_tokens[0] < 0.4 * (found.b_simple_tokens or 0.0)
