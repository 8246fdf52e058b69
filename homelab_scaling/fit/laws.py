"""Scaling laws as equations: what they say, where they come from, and how the engine sees them.

Legend:  N parameters, D training tokens, C training FLOPs, C_min FLOPs at a batch far below critical, S_min optimizer
         steps at one far above, L loss in nats per token; E irreducible loss [nats], A and B prefactors [nats], alpha
         and beta exponents [1]

Most laws are sums of power terms, so log L = log sum_t exp(basis_t . theta) with theta = (log E, log A', ..., alpha,
...). Prefactors in theta are centred, A' = A exp(-alpha mean(log N)), which takes the condition number of the problem
down by orders of magnitude. Tying two exponents or pinning a parameter is an affine map from fewer free parameters.
Everything downstream sees the parameters of the formula ("natural", in the order of `names`), pinned ones included.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.models import Array, LogSum, Model, Softened

Kind = Literal["offset", "prefactor", "exponent"]

MAX_EXPONENT = 10.0
MIN_EXPONENT = 1e-5
LOG_NOTHING = -60.0
"""log of a pinned E = 0: below rounding beside any loss."""
AXIS_LETTER = {
    "n_params": "N",
    "n_tokens": "D",
    "flops": "C",
    "c_min_flops": "C_min",
    "s_min_steps": "S_min",
    "n_tokens_unique": "U",
}
AXIS_UNIT = {
    "n_params": "parameters",
    "n_tokens": "tokens",
    "flops": "FLOPs",
    "c_min_flops": "FLOPs",
    "s_min_steps": "steps",
    "n_tokens_unique": "unique tokens",
}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a law."""

    name: str
    kind: Kind
    axis: str | None = None
    """The variable it belongs to; None for the irreducible loss."""
    meaning: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Posed:
    """A law on one set of rows, ready for the engine."""

    model: Model
    low: Array
    """(P,) lowest free theta."""
    high: Array
    """(P,)."""
    free: tuple[str, ...]
    """Names of the free parameters, in the order of theta; a tied pair goes by its first name."""
    full: Callable[[Array], Array]
    """Free theta (..., P) to the law's whole theta."""
    natural: Callable[[Array], Array]
    """Free theta (..., P) to natural parameters, in the order of the law's names."""
    starts: Callable[[int], Array]
    """About so many starting points (S, P)."""

    @property
    def bounds(self) -> tuple[Array, Array]:
        return self.low, self.high


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law L = [E +] sum over axes of prefactor * variable ** -exponent."""

    name: str
    """What `--law` takes."""
    title: str
    formula: str
    source: str
    axes: tuple[str, ...]
    """Columns it needs, in the order of its terms."""
    offset: bool
    prefactors: tuple[str, ...]
    exponents: tuple[str, ...]
    tied: bool = False
    """All exponents are one."""
    pinned: tuple[tuple[str, float], ...] = ()
    """Parameters that are given, not fitted."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order of theta: offset, prefactors, exponents."""
        found = []
        if self.offset:
            found.append(Parameter(name="E", kind="offset", meaning="loss that no size or data removes [nats/token]"))
        for name, axis in zip(self.prefactors, self.axes, strict=True):
            found.append(Parameter(name=name, kind="prefactor", axis=axis, meaning=self._prefactor_meaning(axis)))
        for name, axis in zip(self.exponents, self.axes, strict=True):
            found.append(
                Parameter(name=name, kind="exponent", axis=axis, meaning=f"how fast the {AXIS_LETTER[axis]} term falls")
            )
        return tuple(found)

    def _prefactor_meaning(self, axis: str) -> str:
        letter = AXIS_LETTER[axis]
        return f"loss of the {letter} term at {letter} = 1"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def fixed(self) -> dict[str, float]:
        return dict(self.pinned)

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the fitted parameters; of tied exponents the first."""
        same = self.exponents[1:] if self.tied else ()
        return tuple(n for n in self.names if n not in self.fixed and n not in same)

    @property
    def levels_needed(self) -> int:
        """Distinct values of each variable below which a term's parameters cannot be told apart."""
        return 3 if self.offset and "E" not in self.fixed else 2

    @property
    def splits(self) -> bool:
        """Whether it says how to split a budget between N and D."""
        return self.axes[:2] == ("n_params", "n_tokens")

    def basis(self, columns: dict[str, Array], centres: dict[str, float]) -> Array:
        """The (term, point, parameter) array whose product with the whole theta is the log of each term."""
        n_points, k = len(next(iter(columns.values()))), len(self.axes)
        first = 1 if self.offset else 0
        basis = np.zeros((first + k, n_points, first + 2 * k))
        if self.offset:
            basis[0, :, 0] = 1.0
        for t, axis in enumerate(self.axes):
            basis[first + t, :, first + t] = 1.0
            basis[first + t, :, first + k + t] = -(np.log(columns[axis]) - centres[axis])
        return basis

    def constraint(self, centres: dict[str, float]) -> tuple[Array, Array]:
        """(M, c) with the whole theta = M free + c."""
        names, free, fixed = self.names, self.free, self.fixed
        matrix, constant = np.zeros((len(names), len(free))), np.zeros(len(names))
        for row, p in enumerate(self.parameters):
            name = self.exponents[0] if p.kind == "exponent" and self.tied else p.name
            if p.name not in fixed:
                matrix[row, free.index(name)] = 1.0
            elif p.kind == "exponent":
                constant[row] = fixed[p.name]
            elif p.kind == "offset":
                constant[row] = math.log(fixed[p.name]) if fixed[p.name] > 0 else LOG_NOTHING
            else:  # a prefactor is centred with its exponent
                assert p.axis is not None
                constant[row] = math.log(fixed[p.name])
                exponent = self.exponents[self.prefactors.index(p.name)]
                if exponent in fixed:
                    constant[row] -= fixed[exponent] * centres[p.axis]
                else:
                    matrix[row, free.index(self.exponents[0] if self.tied else exponent)] = -centres[p.axis]
        return matrix, constant

    def bounds(self, losses: Array) -> tuple[Array, Array]:
        """Lowest and highest whole theta the engine may try: E and each term within e^-14 .. e^3 of the losses."""
        middle, k = float(np.log(losses).mean()), len(self.axes)
        n_logs = len(self.names) - k
        low = np.array([middle - 14.0] * n_logs + [MIN_EXPONENT] * k)
        high = np.array([middle + 3.0] * n_logs + [MAX_EXPONENT] * k)
        return low, high

    def pose(self, columns: dict[str, Array], losses: Array) -> Posed:
        """The law on these rows."""
        centres = {axis: float(np.log(columns[axis]).mean()) for axis in self.axes}
        matrix, constant = self.constraint(centres)
        low, high = self.bounds(losses)
        own = [self.names.index(name) for name in self.free]

        def full(theta: Array) -> Array:
            return np.asarray(theta @ matrix.T + constant)

        return Posed(
            model=self._model(self.basis(columns, centres), matrix, constant),
            low=low[own],
            high=high[own],
            free=self.free,
            full=full,
            natural=lambda theta: self.natural(full(theta), centres),
            starts=lambda n: np.clip(start_grid(self, columns, losses, centres, n)[:, own], low[own], high[own]),
        )

    def _model(self, basis: Array, matrix: Array, constant: Array) -> Model:
        return LogSum(basis @ matrix, basis @ constant)

    def natural(self, theta: Array, centres: dict[str, float]) -> Array:
        """The whole theta (..., parameter) to the parameters as the formula writes them."""
        k = len(self.axes)
        out = np.array(theta, dtype=np.float64)
        for t, axis in enumerate(self.axes):
            exponent = out[..., len(self.names) - k + t]
            at = (1 if self.offset else 0) + t
            out[..., at] = np.exp(np.clip(out[..., at] + exponent * centres[axis], -700, 700))
        if self.offset:
            out[..., 0] = np.exp(out[..., 0])
        for name, value in self.pinned:
            out[..., self.names.index(name)] = value
        return out

    def loss(self, values: Array, columns: dict[str, Array | float]) -> Array:
        """Loss in nats at `columns` from natural parameters (..., parameter); both broadcast."""
        k = len(self.axes)
        total = values[..., 0] if self.offset else np.zeros(values.shape[:-1])
        for t, axis in enumerate(self.axes):
            prefactor = values[..., (1 if self.offset else 0) + t]
            exponent = values[..., len(self.names) - k + t]
            with np.errstate(divide="ignore"):
                total = total + np.exp(np.log(prefactor) - exponent * np.log(columns[axis]))
        return np.asarray(total, dtype=np.float64)

    def by_name(self, values: Array) -> dict[str, Array]:
        """Natural parameters (..., parameter) as name -> (...)."""
        return dict(zip(self.names, np.moveaxis(values, -1, 0), strict=True))

    def split_terms(self, values: Array) -> tuple[Array, Array, Array, Array]:
        """(A, B, alpha, beta), each (...), such that the best split of C = 6 N D minimises A N^-alpha + B D^-beta.

        Raises:
            SpecError: not a law of N and D.
        """
        if not self.splits:
            raise SpecError(f"{self.name} has no best split of a budget; use the chinchilla law")
        p = self.by_name(values)
        return p["A"], p["B"], p["alpha"], p["beta"]

    def derived(self, values: Array) -> dict[str, Array]:
        """What follows from the parameters, drawn along with them: (..., parameter) to name -> (...).

        `a` and `b` are the exponents of the best N and D against compute; `exponent` that of loss (above E) along the
        best split, or against the law's one variable.
        """
        if self.splits:
            _a, _b, alpha, beta = self.split_terms(values)
            total = alpha + beta
            return {"a": beta / total, "b": alpha / total, "exponent": self._along_optimum(values)}
        p = self.by_name(values)
        return {"exponent": p[self.exponents[0]]} if len(self.axes) == 1 else {}

    def _along_optimum(self, values: Array) -> Array:
        p = self.by_name(values)
        return p["alpha"] * p["beta"] / (p["alpha"] + p["beta"])


@dataclass(frozen=True, kw_only=True)
class KaplanJoint(Law):
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D.

    With l_N = alpha_N log(N_c / N), l_D = alpha_D log(D_c / D) and s = alpha_D it is log L = s log(e^(l_N / s) +
    e^(l_D / s)): the two laws of one variable, joined by a soft maximum.
    """

    def _prefactor_meaning(self, axis: str) -> str:
        letter = AXIS_LETTER[axis]
        return f"{letter} at which the {letter} term alone would give a loss of 1 nat"

    def _model(self, basis: Array, matrix: Array, constant: Array) -> Model:
        if constant.any():
            raise SpecError(f"{self.name}: its parameters cannot be pinned; pin those of chinchilla instead")
        return Softened(basis @ matrix, self.names.index("alpha_D"))

    def natural(self, theta: Array, centres: dict[str, float]) -> Array:
        out = np.array(theta, dtype=np.float64)
        for t, axis in enumerate(self.axes):
            out[..., t] = np.exp(np.clip(out[..., t] / out[..., 2 + t] + centres[axis], -700, 700))
        return out

    def loss(self, values: Array, columns: dict[str, Array | float]) -> Array:
        n_c, d_c, alpha_n, alpha_d = np.moveaxis(values, -1, 0)
        in_n = alpha_n / alpha_d * (np.log(n_c) - np.log(columns["n_params"]))
        in_d = np.log(d_c) - np.log(columns["n_tokens"])
        return np.asarray(np.exp(alpha_d * np.logaddexp(in_n, in_d)))

    def split_terms(self, values: Array) -> tuple[Array, Array, Array, Array]:
        n_c, d_c, alpha_n, alpha_d = np.moveaxis(values, -1, 0)
        alpha = alpha_n / alpha_d
        return np.exp(np.clip(alpha * np.log(n_c), -700, 700)), d_c, alpha, np.ones_like(alpha)

    def _along_optimum(self, values: Array) -> Array:
        _n_c, _d_c, alpha_n, alpha_d = np.moveaxis(values, -1, 0)
        return np.asarray(alpha_n * alpha_d / (alpha_n + alpha_d))


def _power(axis: str, name: str, prefactor: str, exponent: str, offset: bool) -> Law:
    letter = AXIS_LETTER[axis]
    tail = "-offset" if offset else ""
    formula = f"L = {'E + ' if offset else ''}{prefactor} {letter}^-{exponent}"
    source = (
        "Kaplan et al. 2020 eq. 1.1-1.3 plus an irreducible term (Henighan et al. 2020 eq. 1.1)"
        if offset
        else "Kaplan et al. 2020 eq. 1.1-1.3, written with A = X_c^alpha"
    )
    return Law(
        name=f"{name}{tail}",
        title=f"L({letter}){' with E' if offset else ''}",
        formula=formula,
        source=source,
        axes=(axis,),
        offset=offset,
        prefactors=(prefactor,),
        exponents=(exponent,),
    )


CHINCHILLA = Law(
    name="chinchilla",
    title="L(N, D)",
    formula="L = E + A N^-alpha + B D^-beta",
    source="Hoffmann et al. 2022 eq. 2",
    axes=("n_params", "n_tokens"),
    offset=True,
    prefactors=("A", "B"),
    exponents=("alpha", "beta"),
)

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        _power("n_params", "power-n", "A", "alpha", False),
        _power("n_params", "power-n", "A", "alpha", True),
        _power("n_tokens", "power-d", "B", "beta", False),
        _power("n_tokens", "power-d", "B", "beta", True),
        _power("flops", "power-c", "K", "gamma", False),
        _power("flops", "power-c", "K", "gamma", True),
        _power("c_min_flops", "power-c-min", "K", "gamma", False),
        _power("c_min_flops", "power-c-min", "K", "gamma", True),
        CHINCHILLA,
        replace(
            CHINCHILLA,
            name="chinchilla-tied",
            title="L(N, D) with alpha = beta",
            formula="L = E + A N^-alpha + B D^-alpha",
            source="Hoffmann et al. 2022 eq. 2 with alpha = beta (Muennighoff et al. 2023, section 6)",
            tied=True,
        ),
        KaplanJoint(
            name="kaplan",
            title="Kaplan's L(N, D)",
            formula="L = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D",
            source="Kaplan et al. 2020 eq. 1.5",
            axes=("n_params", "n_tokens"),
            offset=False,
            prefactors=("N_c", "D_c"),
            exponents=("alpha_N", "alpha_D"),
        ),
        Law(
            name="kaplan-s",
            title="L(N, S_min)",
            formula="L = A N^-alpha_N + B S_min^-alpha_S",
            source="Kaplan et al. 2020 eq. 1.6, written with A = N_c^alpha_N and B = S_c^alpha_S",
            axes=("n_params", "s_min_steps"),
            offset=False,
            prefactors=("A", "B"),
            exponents=("alpha_N", "alpha_S"),
        ),
    )
}


def get_law(name: str) -> Law:
    """The law of this name; `chinchilla:E=1.7,alpha=0.34` pins parameters, `repeated:base=NAME` names the base law.

    Raises:
        SpecError: no such law or parameter, or a value it cannot have.
    """
    base, colon, pins = name.partition(":")
    if base == "repeated":  # it stands on the chinchilla law, so its module imports this one
        from homelab_scaling.fit.repeated import repeated_law

        return repeated_law(pins)
    if base not in LAWS:
        known = ", ".join((*LAWS, "repeated"))
        raise SpecError(f"no law {name!r}; choose among {known}, each with :NAME=VALUE to pin a parameter")
    law = LAWS[base]
    return pin(law, parse_pins(law, name, pins)) if colon else law


def pin(law: Law, values: dict[str, float]) -> Law:
    """The law with these parameters given instead of fitted.

    Raises:
        SpecError: a parameter it does not have or a value that it cannot take, or nothing left to fit.
    """
    for name, value in values.items():
        if name not in law.names:
            raise SpecError(f"{law.name} has no parameter {name!r} to pin; choose among {', '.join(law.names)}")
        lowest = "0 or more" if name == "E" else "a number above 0"
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "E"):
            raise SpecError(f"{law.name}: {name} pinned at {value:g}, wants {lowest}")
        if law.tied and name in law.exponents:
            raise SpecError(f"{law.name}: its exponents are tied; pin those of {law.name.removesuffix('-tied')}")
        if type(law) is not Law:
            raise SpecError(f"{law.name}: its parameters cannot be pinned; pin those of chinchilla instead")
    pinned = tuple(sorted(values.items()))
    words = ", ".join(f"{name} = {value:.4g}" for name, value in pinned)
    tail = ",".join(f"{name}={value!r}" for name, value in pinned)
    done = replace(law, name=f"{law.name}:{tail}", title=f"{law.title} with {words} given", pinned=pinned)
    if not done.free:
        raise SpecError(f"{done.name}: every parameter is pinned; leave at least one to fit")
    return done


def parse_pins(law: Law, name: str, pins: str) -> dict[str, float]:
    """`alpha=0.34,E=1.7` as numbers.

    Raises:
        SpecError: not of that form.
    """
    values = {}
    for part in pins.split(","):
        key, equals, text = part.partition("=")
        try:
            values[key.strip()] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise SpecError(f"law {name!r}: wants {law.name}:NAME=VALUE, for example chinchilla:E=1.7")
    return values


def start_grid(law: Law, columns: dict[str, Array], losses: Array, centres: dict[str, float], n_starts: int) -> Array:
    """Starting points (start, whole theta): a grid of free exponents, the linear parameters by least squares at each.

    At fixed exponents the law is linear in E and the prefactors (variable projection), so the search is over the
    exponents alone. Negative solutions are moved to a small positive share of the loss.
    """
    k, fixed = len(law.axes), law.fixed
    searched = [e for e in law.exponents[: 1 if law.tied else k] if e not in fixed]
    per_axis = max(2, round(n_starts ** (1 / max(1, len(searched)))))
    grid = np.meshgrid(*[np.geomspace(0.02, 2.5, per_axis)] * len(searched), indexing="ij")
    found = {name: g.ravel() for name, g in zip(searched, grid, strict=True)}
    count = per_axis ** len(searched)
    exponents = np.stack(
        [
            found[law.exponents[0]] if law.tied else found.get(e, np.full(count, fixed.get(e, np.nan)))
            for e in law.exponents
        ],
        axis=-1,
    )
    x = np.stack([np.log(columns[a]) - centres[a] for a in law.axes], axis=-1)
    terms = np.exp(-exponents[:, None, :] * x[None])
    design = np.concatenate([np.ones((*terms.shape[:2], 1)), terms], axis=2) if law.offset else terms
    scaled = design / losses[None, :, None]  # relative residuals, as on log loss
    normal = np.einsum("snp,snq->spq", scaled, scaled)
    right = scaled.sum(axis=1)
    ridge = 1e-9 * np.trace(normal, axis1=1, axis2=2)[:, None, None] * np.eye(normal.shape[-1])
    linear = np.linalg.solve(normal + ridge, right[..., None])[..., 0]
    linear = np.maximum(linear, 1e-3 * losses.min())
    low, high = law.bounds(losses)
    return np.asarray(np.clip(np.concatenate([np.log(linear), exponents], axis=1), low, high))
