"""The law of repeated data: what a token is worth the second time, and a parameter that has too few tokens to learn.

Legend:  N parameters, D tokens trained on, U different ones among them, N_U parameters that the base law pairs with U
         tokens (at most N); R repetitions: D/U - 1 of the tokens, N/N_U - 1 of the parameters; R_D, R_N the scales on
         which their worth decays, after which one more is worth 1/e of a fresh one

    D' = U (1 + R_D (1 - exp(-(D/U - 1) / R_D)))        N' = N_U (1 + R_N (1 - exp(-(N/N_U - 1) / R_N)))
    L = E + A N'^-alpha + B D'^-beta

Source: Muennighoff et al. 2023 (Scaling Data-Constrained Language Models), equations 5 and 6. The base law (E, A, B,
alpha, beta) is that of fresh tokens. It is given, or fitted first, to the rows that repeat nothing.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.crosscheck import compare_roads, profile, spread
from homelab_scaling.fit.diagnose import too_few, wide
from homelab_scaling.fit.laws import CHINCHILLA, Law, Parameter, Posed, pin
from homelab_scaling.fit.models import Array, Dense
from homelab_scaling.fit.objectives import Objective, ObjectiveName
from homelab_scaling.fit.resample import FEW_RUNS, MIN_CLUSTERS, WEBB, clusters, draw
from homelab_scaling.fit.result import CrossCheck, Estimate
from homelab_scaling.fit.slices import Table, levels
from homelab_scaling.fit.solve import GRADIENT_CLOSE, REFIT_LAD_DELTAS, Minima, Optimum, minimise, refit, solve
from homelab_scaling.fit.words import number

BASE = CHINCHILLA.names
LOWEST, HIGHEST = 1e-2, 1e5
"""Bounds of R_D and R_N: worth nothing the second time, and worth as much as fresh ones."""
START_ENDS = (0.1, 3000.0)
N_STARTS = 1024
N_POLISH = 256
"""Losses of repeated data have several minima along the ridge between R_D and R_N: many starts are followed down."""
BASE_STARTS = 1024
MIN_REPEATED = 3
ROUNDING = 1e-6
"""Published token counts are fractions, counts of different tokens whole."""
RIVAL = 0.01
"""Another minimum that is worse by less than this share is worth a word."""
NO_EFFECT = 1e-9
"""Slope of log loss in log R below which these rows do not tell R at all."""


@dataclass(frozen=True, kw_only=True)
class RepeatedLaw(Law):
    """L(N, D, U). Its natural parameters are the base law's five, R_D and R_N."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        own = (
            ("R_D", "n_tokens", "repetitions of a token after which one more is worth 1/e of a fresh one"),
            ("R_N", "n_params", "the same of parameters beyond those that the different tokens can teach"),
        )
        return (
            *CHINCHILLA.parameters,
            *(Parameter(name=name, kind="prefactor", axis=axis, meaning=meaning) for name, axis, meaning in own),
        )

    @property
    def free(self) -> tuple[str, ...]:
        """The base law is never fitted along: it is given, or fitted before to other rows."""
        return ("R_D", "R_N")

    @property
    def base(self) -> Array | None:
        """Natural parameters of the base law; None where it is to be fitted."""
        return np.array([self.fixed[name] for name in BASE]) if self.pinned else None

    def with_base(self, values: Array) -> "RepeatedLaw":
        """The law with this base (5,) given."""
        pinned = tuple(sorted(zip(BASE, map(float, values), strict=True)))
        return replace(self, pinned=pinned)

    def pose(self, columns: dict[str, Array], losses: Array) -> Posed:
        """The law on these rows, its base given.

        Raises:
            SpecError: it has no base.
        """
        base = self.base
        if base is None:
            raise SpecError(f"{self.name} needs its base law here; give one, such as {self.name}:base=muennighoff-2023")

        def natural(theta: Array) -> Array:
            spread = np.broadcast_to(base, (*theta.shape[:-1], len(BASE)))
            return np.concatenate([spread, np.exp(theta)], axis=-1)

        return Posed(
            model=Repeated(columns, base[None]),
            low=np.log([LOWEST, LOWEST]),
            high=np.log([HIGHEST, HIGHEST]),
            free=self.free,
            full=lambda theta: theta,
            natural=natural,
            starts=_starts,
        )

    def loss(self, values: Array, columns: dict[str, Array | float]) -> Array:
        """Loss in nats; without the column n_tokens_unique every token is fresh."""
        e, a, b, alpha, beta, r_d, r_n = np.moveaxis(values, -1, 0)
        d = np.asarray(columns["n_tokens"], dtype=np.float64)
        u = np.minimum(columns.get("n_tokens_unique", d), d)
        n = np.asarray(columns["n_params"], dtype=np.float64)
        with np.errstate(divide="ignore"):
            log_paired = (np.log(alpha * a) - np.log(beta * b) + beta * np.log(u)) / alpha
            log_n = np.minimum(np.log(n), log_paired)
            log_n = log_n + np.log(_worth(np.exp(np.log(n) - log_n) - 1, r_n))
            log_d = np.log(u) + np.log(_worth(d / u - 1, r_d))
            total = e + np.exp(np.log(a) - alpha * log_n) + np.exp(np.log(b) - beta * log_d)
        return np.asarray(total, dtype=np.float64)


def _worth(repeats: Array, scale: Array) -> Array:
    """1 + scale (1 - exp(-repeats / scale)): how many fresh ones they are worth together."""
    return np.asarray(1 - scale * np.expm1(-repeats / scale))


def _starts(n: int) -> Array:
    """About n pairs (log R_D, log R_N)."""
    axis = np.log(np.geomspace(*START_ENDS, max(2, round(n**0.5))))
    return np.stack([g.ravel() for g in np.meshgrid(axis, axis, indexing="ij")], axis=1)


REPEATED = RepeatedLaw(
    name="repeated",
    title="L(N, D, unique D)",
    formula="L = E + A N'^-alpha + B D'^-beta, D' = U (1 + R_D (1 - exp(-(D/U - 1) / R_D))), N' alike with R_N",
    source="Muennighoff et al. 2023 eq. 5 and 6",
    axes=("n_params", "n_tokens", "n_tokens_unique"),
    offset=True,
    prefactors=("A", "B"),
    exponents=("alpha", "beta"),
)


def repeated_law(rest: str) -> RepeatedLaw:
    """The law `repeated`, or `repeated:REST` with REST `base=NAME` (of the catalogue) or all five parameters.

    Raises:
        SpecError: no such base, or not all five.
    """
    from homelab_scaling.fit.catalogue import CATALOGUE
    from homelab_scaling.fit.laws import get_law, parse_pins

    if not rest:
        return REPEATED
    name = f"{REPEATED.name}:{rest}"
    key, _equals, value = rest.partition("=")
    if key.strip() == "base":
        usable = [one for one in CATALOGUE.values() if get_law(one.law).names == BASE]
        one = next((one for one in usable if one.name == value.strip()), None)
        if one is None:
            raise SpecError(f"law {name!r}: no base law {value!r}; choose among {', '.join(u.name for u in usable)}")
        law = REPEATED.with_base(np.array([one.values[p] for p in BASE]))
        return replace(law, name=name, title=f"{law.title} on {one.name}")
    values = parse_pins(CHINCHILLA, name, rest)
    if set(values) != set(BASE):
        raise SpecError(f"law {name!r}: wants repeated:base=NAME, or all of {', '.join(BASE)}")
    pin(CHINCHILLA, {p: v for p, v in values.items() if p != "E"})  # complains about values that none can have
    law = REPEATED.with_base(np.array([values[p] for p in BASE]))
    return replace(law, name=name, title=f"{law.title} on a given law")


class Repeated(Dense):
    """log L as a function of (log R_D, log R_N), at base laws that are given.

    With several base laws the third parameter says which one; it has no derivative and is to be held by its bounds.

    Args of its maker: columns n_params, n_tokens, n_tokens_unique, and base laws (M, 5) in natural parameters.
    """

    def __init__(self, columns: dict[str, Array], bases: Array) -> None:
        n, d = columns["n_params"], columns["n_tokens"]
        u = np.minimum(columns["n_tokens_unique"], d)
        self.log_n, self.log_u, self.repeats = np.log(n), np.log(u), d / u - 1
        self.bases = bases
        self.n_points = len(n)
        self.n_params = 2 if len(bases) == 1 else 3

    def derivatives(self, theta: Array) -> tuple[Array, list[Array], dict[tuple[int, int], Array]]:
        which = np.zeros(len(theta), dtype=np.int64) if self.n_params == 2 else theta[:, 2].astype(np.int64)
        e, a, b, alpha, beta = self.bases[which].T[:, :, None]
        paired = (np.log(alpha * a) - np.log(beta * b) + beta * self.log_u) / alpha
        log_n = np.minimum(self.log_n, paired)
        d_log, d_first, d_second = _log_worth(np.broadcast_to(self.repeats, log_n.shape), theta[:, :1])
        n_log, n_first, n_second = _log_worth(np.expm1(self.log_n - log_n), theta[:, 1:2])
        in_n = np.exp(np.log(a) - alpha * (log_n + n_log))
        in_d = np.exp(np.log(b) - beta * (self.log_u + d_log))
        total = e + in_n + in_d
        in_n, in_d = in_n / total, in_d / total
        by_d, by_n = -beta * d_first, -alpha * n_first
        first = [in_d * by_d, in_n * by_n]
        second = {
            (0, 0): in_d * ((1 - in_d) * by_d**2 - beta * d_second),
            (0, 1): -in_d * in_n * by_d * by_n,
            (1, 1): in_n * ((1 - in_n) * by_n**2 - alpha * n_second),
        }
        if self.n_params == 3:
            first.append(np.zeros_like(total))
        return np.log(total), first, second


def _log_worth(repeats: Array, log_scale: Array) -> tuple[Array, Array, Array]:
    """log of what repeats are worth, and its first and second derivative in log scale."""
    scale = np.exp(log_scale)
    z = repeats / scale
    fading = np.exp(-z)
    worth = 1 - scale * np.expm1(-z)
    # d worth / d scale; its two parts cancel where there are few repeats for the scale
    series = z**2 * (0.5 - z / 3 + z**2 / 8)
    slope = np.where(z < 1e-3, series, -np.expm1(-z) - z * fading)
    first = scale * slope / worth
    second = (scale * slope - scale * z**2 * fading) / worth - first**2
    return np.log(worth), first, second


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True, kw_only=True, eq=False)
class RepeatedFit:
    """The optimum, where its base came from, and the draws."""

    law: RepeatedLaw
    """With the base that was used."""
    posed: Posed
    optimum: Optimum
    base_rows: NDArray[np.int64] | None
    """Rows the base was fitted to; None where it was given."""
    base_optimum: Optimum | None
    draws: Array
    """(R, 7) natural parameters; base laws vary along where they were fitted."""
    n_failed: int
    method: str
    """In words, how the draws were made."""


def why_not(law: RepeatedLaw, table: Table, rows: NDArray[np.int64]) -> str | None:
    """Why these rows cannot carry the law; None if they can."""
    repeats = _repeats(table, rows)
    again = repeats > 0
    if again.sum() < MIN_REPEATED or len(levels(1 + repeats[again])) < 2:
        return (
            f"{int(again.sum())} rows train on tokens more than once (n_tokens above n_tokens_unique) where "
            f"{MIN_REPEATED} at two or more epochs are needed: R_D cannot be told; add runs that repeat their data"
        )
    if law.base is not None:
        return None
    missing = too_few(CHINCHILLA, table, rows[~again])
    if missing is None:
        return None
    return (
        f"its base law needs the rows that repeat nothing, and there are {missing}; or give a base, such as "
        f"--law {REPEATED.name}:base=muennighoff-2023"
    )


def repeats_of(columns: dict[str, Array]) -> Array:
    """How often tokens are seen again, D/U - 1; 0 where U is D but for rounding, or was never used up."""
    found = columns["n_tokens"] / columns["n_tokens_unique"] - 1
    return np.where(found > ROUNDING, found, 0.0)


def _repeats(table: Table, rows: NDArray[np.int64]) -> Array:
    return repeats_of({name: table.columns[name][rows] for name in ("n_tokens", "n_tokens_unique")})


def fit_repeated(
    law: RepeatedLaw,
    table: Table,
    rows: NDArray[np.int64],
    *,
    name: ObjectiveName,
    n_draws: int,
    rng: np.random.Generator,
) -> RepeatedFit:
    """R_D and R_N at the best of many minima, and their draws; each draw refits a base that was fitted.

    Args:
        rows: of the table, judged by `why_not` before.
        name: of the objective, resolved for few runs.
    """
    columns = {axis: table.columns[axis][rows] for axis in law.axes}
    losses = table.losses[rows]
    y, runs = np.log(losses), clusters([table.run_ids[i] for i in rows])
    fresh = np.flatnonzero(_repeats(table, rows) <= 0)
    base_posed: Posed | None = None
    base_optimum: Optimum | None = None
    if law.base is None:
        base_posed = CHINCHILLA.pose({axis: columns[axis][fresh] for axis in CHINCHILLA.axes}, losses[fresh])
        starts = base_posed.starts(BASE_STARTS)
        base_optimum = solve(base_posed.model, y[fresh], starts, name, bounds=base_posed.bounds)
        law = law.with_base(base_posed.natural(base_optimum.theta))
    posed = law.pose(columns, losses)
    optimum = solve(posed.model, y, posed.starts(N_STARTS), name, bounds=posed.bounds, n_polish=N_POLISH)
    found = RepeatedFit(
        law=law,
        posed=posed,
        optimum=optimum,
        base_rows=None if base_posed is None else rows[fresh],
        base_optimum=base_optimum,
        draws=np.zeros((0, len(law.names))),
        n_failed=0,
        method="no intervals: run with --bootstrap 4000",
    )
    if n_draws == 0:
        return found
    n_runs = int(runs.max()) + 1
    # As many runs on fresh tokens as there are, in every draw: they are what the base law rests on.
    strata = np.zeros(n_runs, dtype=np.int64)
    strata[runs[np.setdiff1d(np.arange(len(y)), fresh)]] = 1 if len(fresh) else 0
    multipliers = None
    if n_runs < FEW_RUNS and n_runs >= MIN_CLUSTERS:
        multipliers = rng.choice(WEBB, size=(n_draws, n_runs))
    drawn = draw(
        posed.model,
        y,
        runs=runs,
        strata=strata,
        theta=optimum.theta,
        n_draws=n_draws,
        rng=rng,
        multipliers=multipliers,
    )
    if base_posed is None or base_optimum is None:
        again = refit(posed.model, drawn.y, drawn.weights, optimum, name, bounds=posed.bounds)
        values, good = posed.natural(again.theta), np.isfinite(again.value)
        return replace(found, draws=values[good], n_failed=int((~good).sum()), method=drawn.method)
    # The base of each draw: the same runs count, or the same signs flip the residuals of the base's own fit.
    base_y, base_weights = y[fresh], drawn.weights[..., fresh]
    if drawn.weights.ndim == 1:
        ids, at = np.unique(runs[fresh], return_inverse=True)
        signs = multipliers[:, ids] if multipliers is not None and len(ids) >= MIN_CLUSTERS else None
        redrawn = draw(
            base_posed.model,
            base_y,
            runs=at,
            strata=np.zeros(len(ids), dtype=np.int64),
            theta=base_optimum.theta,
            n_draws=n_draws,
            rng=rng,
            multipliers=signs,
        )
        base_y, base_weights = redrawn.y, redrawn.weights
    based = refit(base_posed.model, base_y, base_weights, base_optimum, name, bounds=base_posed.bounds)
    bases = base_posed.natural(based.theta)
    again = _ride(Repeated(columns, bases), drawn.y, drawn.weights, optimum, name, bounds=posed.bounds)
    values = np.concatenate([bases, np.exp(again.theta[:, :2])], axis=1)
    good = np.isfinite(again.value) & np.isfinite(values).all(axis=1)
    method = f"{drawn.method}, each with its own base law"
    return replace(found, draws=values[good], n_failed=int((~good).sum()), method=method)


def _ride(
    model: Repeated, y: Array, weights: Array, optimum: Optimum, name: ObjectiveName, *, bounds: tuple[Array, Array]
) -> Minima:
    """`refit` where each resample has its own base law: the third parameter, held, says which."""
    members = np.arange(len(model.bases), dtype=np.float64)[:, None]
    low, high = (np.concatenate([np.repeat(b[None], len(members), axis=0), members], axis=1) for b in bounds)
    best: Minima | None = None
    for start in optimum.candidates:
        theta = np.concatenate([np.repeat(start[None], len(members), axis=0), members], axis=1)
        for delta in REFIT_LAD_DELTAS if name.kind == "lad" else (optimum.objective.delta,):
            objective = Objective(kind=optimum.objective.kind, delta=delta)
            found = minimise(model, y, weights, theta, objective=objective, bounds=(low, high), done=GRADIENT_CLOSE)
            theta = found.theta
        best = found if best is None else best.better(found)
    assert best is not None
    return best


# ----------------------------------------------------------------------------------------------------------- judging it


def unpinned(fit: RepeatedFit, estimates: dict[str, Estimate]) -> dict[str, str]:
    """R_D or R_N -> why the rows do not pin it down."""
    _f, state = fit.posed.model.value(fit.optimum.theta[None])
    slopes = np.abs(fit.posed.model.jacobian(state)[0]).max(axis=0)
    found = {}
    for index, (name, what) in enumerate((("R_D", "tokens"), ("R_N", "parameters"))):
        theta, interval = float(fit.optimum.theta[index]), estimates[name].ci95
        if slopes[index] < NO_EFFECT and name == "R_N":
            found[name] = "no row has more parameters than the base law pairs with its different tokens"
        elif theta >= fit.posed.high[index] - 1e-6:
            found[name] = f"{name} went to its upper bound: repeated {what} did as well as fresh ones"
        elif theta <= fit.posed.low[index] + 1e-6:
            found[name] = f"{name} went to its lower bound: repeated {what} did nothing at all"
        elif interval is not None and (too_wide := wide("prefactor", interval, 1.0)):
            found[name] = too_wide
    return found


def cautions(fit: RepeatedFit, loose: dict[str, str], y: Array) -> tuple[str, ...]:
    """What the fitted numbers themselves make suspect."""
    said = [f"the data do not pin down {name}: {why}" for name, why in loose.items()]
    if fit.base_rows is None:
        said.append("the base law was given, not fitted: the intervals take it as exact")
    f, _state = fit.posed.model.value(fit.optimum.candidates)
    if fit.optimum.objective.kind == "huber":
        values = fit.optimum.objective.value(f, y[None], np.ones((1, len(y))))
        for theta, value in zip(fit.optimum.candidates[1:], values[1:], strict=True):
            if value < values[0] * (1 + RIVAL):
                r_d, r_n = np.exp(theta)
                said.append(
                    f"another minimum at R_D = {number(float(r_d))}, R_N = {number(float(r_n))} is only "
                    f"{100 * (value / values[0] - 1):.2g} % worse: R_D and R_N trade off along a ridge, trust the "
                    "intervals and predictions rather than the two numbers"
                )
                break
    if fit.n_failed:
        said.append(f"{fit.n_failed} resamples did not converge and are left out of the intervals")
    return tuple(said)


def cross_checks(
    fit: RepeatedFit, table: Table, rows: NDArray[np.int64], estimates: dict[str, Estimate]
) -> dict[str, CrossCheck]:
    """R_D and R_N by bootstrap, profile and delta method, all at one base law; empty where the base was fitted."""
    if fit.base_rows is not None or not len(fit.draws):
        return {}
    y, runs = np.log(table.losses[rows]), clusters([table.run_ids[i] for i in rows])
    around = spread(fit.posed, fit.optimum.objective, fit.optimum.theta, y, runs)
    if around is None:
        return {}
    found = {}
    for index, name in enumerate(fit.law.free):
        half = around.student * float(np.sqrt(around.covariance[index, index]))
        theta = float(fit.optimum.theta[index])
        low, high = (
            None if end is None else float(np.exp(end)) for end in profile(fit.posed, fit.optimum, y, index, around)
        )
        delta = (float(np.exp(theta - half)), float(np.exp(min(theta + half, 700.0))))
        found[name] = compare_roads(name, estimates[name], (low, high), delta)
    return found


def rows_in_words(fit: RepeatedFit, words: str) -> str:
    """Which rows fed what."""
    if fit.base_rows is None:
        return words
    return f"{words}; base law from the {len(fit.base_rows)} that repeat nothing"
