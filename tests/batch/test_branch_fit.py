"""The estimator of the branch test: on curves of the hyperbola, on quadratics, and where it must give no number."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from homelab_scaling import codec
from homelab_scaling.batch.branch_fit import Curve, Found, ema, fit_branches, merrill_rule
from homelab_scaling.batch.critical import fit_trade_off
from homelab_scaling.errors import DataError

BATCHES = (256, 512, 1024, 2048, 4096)
DELTA, MARKS, WINDOWS = 240_000, 12, 64


def falling(tokens: np.ndarray) -> np.ndarray:
    """A loss curve of another form than the estimator's."""
    return 1.5 + 6.0 * ((480_000 + tokens) / 1e5) ** -0.3


def branches(
    b_crit: float,
    rng: np.random.Generator,
    *,
    batches: Sequence[int] = BATCHES,
    path: float = 0.003,
    text: float = 0.03,
    curve: Callable[[np.ndarray], np.ndarray] = falling,
) -> list[Curve]:
    """Branches on the hyperbola; `path` is the noise of a validation, `text` that of a window against the others."""
    t = np.linspace(0, DELTA, MARKS + 1)
    windows = rng.normal(0, 1.0, WINDOWS)
    found = []
    for batch in batches:
        mean = curve(t * (1 + batches[0] / b_crit) / (1 + batch / b_crit))
        own = rng.normal(0, text, WINDOWS) * np.sqrt(t / DELTA)[:, None]
        shaken = np.concatenate([[0.0], rng.normal(0, path, MARKS)])[:, None]
        found.append(make(batch, mean[:, None] + windows + own + shaken))
    return found


def make(batch: int, losses: np.ndarray, *, diverged: bool = False) -> Curve:
    tokens = tuple(int(t) for t in np.linspace(0, DELTA, len(losses)))
    return Curve(run_id=f"b{batch}", batch_tokens=batch, lr=1e-3, tokens=tokens, losses=losses, diverged=diverged)


def covers(found: Found, truth: float) -> bool:
    if found.b_crit is not None:
        return found.b_crit.low <= truth <= found.b_crit.high
    return (found.at_least_tokens or 0) <= truth <= (found.at_most_tokens or math.inf)


@pytest.mark.parametrize("b_crit", [100.0, 1500.0, 20_000.0])
def test_without_noise_it_returns_the_critical_batch(b_crit: float) -> None:
    found = fit_branches(branches(b_crit, np.random.default_rng(0), path=0, text=0))
    assert found.b_crit is not None and found.b_crit.value == pytest.approx(b_crit, rel=0.05)
    ratios = [b.token_ratio for b in found.branches]
    assert ratios == pytest.approx([(b_crit + b) / (b_crit + 256) for b in BATCHES], rel=0.05)


@pytest.mark.parametrize("b_crit", [300.0, 1500.0, 8000.0, 60_000.0])
def test_its_interval_covers_the_truth_as_often_as_it_says(b_crit: float) -> None:
    rng, n = np.random.default_rng(1), 150
    hits = sum(covers(fit_branches(branches(b_crit, rng)), b_crit) for _ in range(n))
    assert hits / n > 0.91  # 95 % less two standard errors of a count of 150


def test_noise_that_the_windows_share_does_not_count() -> None:
    rng = np.random.default_rng(2)
    quiet = fit_branches(branches(1500, rng, path=1e-4, text=1e-4))
    assert quiet.b_crit is not None and quiet.b_crit.high / quiet.b_crit.low < 1.2  # windows differ by a whole nat


def test_batches_that_all_come_as_far_give_a_lower_bound() -> None:
    found = fit_branches(branches(1e9, np.random.default_rng(3)))
    assert found.b_crit is None and found.at_most_tokens is None
    assert found.at_least_tokens is not None and found.at_least_tokens > 4096
    assert found.merrill_tokens == 4096 and found.merrill_is_last
    assert "try larger ones" in (found.why_no_number or "")


def test_batches_that_only_save_steps_give_an_upper_bound() -> None:
    found = fit_branches(branches(1.0, np.random.default_rng(4)))
    assert found.b_crit is None and found.at_least_tokens is None
    assert found.at_most_tokens is not None and found.at_most_tokens < 256
    assert found.merrill_tokens == 256


def test_a_reference_that_learns_nothing_gives_no_number() -> None:
    flat = fit_branches(branches(1500, np.random.default_rng(5), curve=lambda t: 3.0 + 0 * t))
    assert (flat.b_crit, flat.at_least_tokens, flat.at_most_tokens) == (None, None, None)
    assert "lengthen the branches" in (flat.why_no_number or "")


def test_a_branch_that_no_hyperbola_explains_is_said_and_widens_the_interval() -> None:
    curves = branches(1500, np.random.default_rng(6))
    worse = make(8192, curves[0].losses[0] + np.linspace(0, 0.05, MARKS + 1)[:, None])
    found, without = fit_branches([*curves, worse]), fit_branches(curves)
    assert found.branches[-1].token_ratio is None and without.b_crit is not None
    assert found.b_crit is None or found.b_crit.high / found.b_crit.low > 2 * without.b_crit.high / without.b_crit.low
    assert found.misfit is not None and found.misfit > 3 and "off the hyperbola" in found.notes[-1]


def test_a_diverged_branch_is_left_out_and_too_few_are_refused() -> None:
    curves = branches(1500, np.random.default_rng(7), batches=(*BATCHES, 8192))
    lost = [*curves[:-1], make(8192, curves[-1].losses[:3], diverged=True)]
    found = fit_branches(lost)
    assert found.branches[-1].loss_nats is None and "8,192 tokens: diverged" in found.notes[0]
    assert covers(found, 1500) and found.merrill_tokens != 8192
    with pytest.raises(DataError, match="3 of 6 branches came to their end"):
        fit_branches([*lost[:3], *(make(c.batch_tokens, c.losses, diverged=True) for c in lost[3:])])


def test_branches_measured_differently_are_refused() -> None:
    curves = branches(1500, np.random.default_rng(8))
    with pytest.raises(DataError, match="different tokens or on different windows"):
        fit_branches([*curves[:-1], make(4096, curves[-1].losses[:, :9])])


# ------------------------------------------------------------------------------------------------- Merrill's own rule


def test_the_rule_takes_the_largest_batch_within_the_tolerance_of_every_smaller_one() -> None:
    assert merrill_rule([1, 2, 4, 8], [3.0, 3.005, 3.009, 3.02]) == 4
    assert merrill_rule([1, 2, 4, 8], [3.02, 3.0, 3.012, 3.009]) == 8, "4 is behind 2, but 8 is not behind any"
    assert merrill_rule([1, 2, 4, 8], [3.0, None, 3.0, None]) == 4
    assert merrill_rule([1, 2, 4], [3.0, 3.02, 3.1]) == 1
    assert merrill_rule([1, 2, 4], [3.0, 3.02, 3.1], [0, 0.05, 0.05]) == 2


def test_the_average_begins_with_the_first_loss() -> None:
    assert ema([4.0, 2.0, 2.0]) == pytest.approx(2.5)


# --------------------------------------------------------------------------------------------------- solvable problems


def test_the_isotropic_quadratic_at_its_greedy_rate_has_no_critical_batch_in_tokens() -> None:
    """1 / L' = 1 / L + B / c: what a batch reaches depends on tokens alone, so every larger one is as good."""
    start, c = 2.0, 40_000.0
    t = np.linspace(0, DELTA, MARKS + 1)
    losses = {}
    for batch in BATCHES:
        loss, seen, reached = start, 0.0, []
        for mark in t:
            while seen + batch <= mark + 1e-6:
                loss, seen = 1 / (1 / loss + batch / c), seen + batch
            reached.append(1 / (1 / loss + (mark - seen) / c))
        losses[batch] = np.repeat(np.array(reached)[:, None], 4, axis=1)
    found = fit_branches([make(b, x) for b, x in losses.items()])
    assert found.b_crit is None and found.at_least_tokens is not None and found.at_least_tokens > 5 * BATCHES[-1]
    assert found.merrill_tokens == BATCHES[-1]


class NoisyQuadratic:
    """m_i(t + 1) = (1 - eps h_i)^2 m_i(t) + eps^2 s_i / B with h_i = s_i = 1 / i, solved for every t at once."""

    h = 1 / np.arange(1, 1001)
    rates = np.geomspace(1e-2, 1.9, 60)

    def after(self, m: np.ndarray, eps: float, batch: float, steps: float) -> np.ndarray:
        shrink = (1 - eps * self.h) ** 2
        floor = eps**2 * self.h / batch / (1 - shrink)
        return np.asarray(floor + (m - floor) * shrink**steps)

    def loss(self, m: np.ndarray) -> float:
        return float(self.h @ m) / 2

    def steps_to(self, m: np.ndarray, batch: float, target: float) -> tuple[float, float]:
        """Fewest steps over all rates, and that rate."""
        return min((self._steps(m, float(eps), batch, target), float(eps)) for eps in self.rates)

    def _steps(self, m: np.ndarray, eps: float, batch: float, target: float) -> float:
        low, high = 0.0, 1.0
        while self.loss(self.after(m, eps, batch, high)) > target:
            low, high = high, 2 * high
            if high > 1e6:
                return math.inf
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.loss(self.after(m, eps, batch, middle)) > target else (low, middle)
        return high


def checkpoint_of(world: NoisyQuadratic, burn_in: float) -> tuple[np.ndarray, float]:
    """The state at a share of the first loss, and a fifth of the examples that it took."""
    base, untrained = 32, np.ones(1000)
    steps, eps = world.steps_to(untrained, base, burn_in * world.loss(untrained))
    return world.after(untrained, eps, base, steps), 0.2 * steps * base


def exact(world: NoisyQuadratic, checkpoint: np.ndarray, curves: list[Curve]) -> float:
    """B_crit of the sweep, without noise, to the mean loss that the branches came to."""
    target = float(np.mean([c.means[-1] for c in curves]))
    sweep = [8.0, 16.0, 32.0, 64.0, 128.0]
    return fit_trade_off(sweep, [world.steps_to(checkpoint, b, target)[0] for b in sweep]).b_crit.value


@pytest.mark.parametrize("burn_in", [0.3, 0.15])
def test_on_the_noisy_quadratic_it_agrees_with_the_exact_sweep_from_the_same_checkpoint(burn_in: float) -> None:
    world = NoisyQuadratic()
    checkpoint, delta = checkpoint_of(world, burn_in)
    curves = []
    for batch in (8, 16, 32, 64, 128):  # at each mark the best rate for it, as in S(B)
        marks = [delta / batch * k / MARKS for k in range(MARKS + 1)]
        path = [min(world.loss(world.after(checkpoint, e, batch, n)) for e in world.rates) for n in marks]
        curves.append(make(batch, np.repeat(np.array(path)[:, None], 4, axis=1)))
    found, truth = fit_branches(curves), exact(world, checkpoint, curves)
    assert found.b_crit is not None
    assert found.b_crit.value == pytest.approx(truth, rel=0.3)  # this world bends more sharply


@pytest.mark.parametrize("burn_in", [0.3, 0.15])
def test_one_rate_to_the_end_finds_too_large_a_batch_rather_than_too_small(burn_in: float) -> None:
    """A constant rate is wrong for the loss on the way: the reference looks slower there than it could be."""
    world = NoisyQuadratic()
    checkpoint, delta = checkpoint_of(world, burn_in)
    curves = []
    for batch in (8, 16, 32, 64, 128):
        own = min(world.rates, key=lambda e, b=batch: world.loss(world.after(checkpoint, e, b, delta / b)))
        path = [world.loss(world.after(checkpoint, own, batch, delta / batch * k / MARKS)) for k in range(MARKS + 1)]
        curves.append(make(batch, np.repeat(np.array(path)[:, None], 4, axis=1)))
    found, truth = fit_branches(curves), exact(world, checkpoint, curves)
    assert found.b_crit is not None and truth < found.b_crit.value < 2 * truth


def test_a_result_survives_its_file() -> None:
    found = fit_branches(branches(1500, np.random.default_rng(9)))
    assert codec.from_plain(codec.to_plain(found), Found, "found") == found
