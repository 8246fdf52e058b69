"""Scaling laws as equations: what they say, where they come from, and which of their parameters a table can pin down.

Legend:  N parameters, D training tokens, C training FLOPs, L loss in nats per token
         E irreducible loss [nats], A and B prefactors [nats], alpha and beta exponents [1]

Every law here is a sum of power terms, so log L = log sum_t exp(basis_t . theta) with theta = (log E, log A', ...,
alpha, ...): the engine (solve.py) needs nothing but the basis. Prefactors in theta are centred, A' = A exp(-alpha
mean(log N)), which takes the condition number of the problem down by orders of magnitude.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from homelab_scaling.errors import SpecError

Array = NDArray[np.float64]
Kind = Literal["offset", "prefactor", "exponent"]

MAX_EXPONENT = 10.0
MIN_EXPONENT = 1e-5
AXIS_LETTER = {"n_params": "N", "n_tokens": "D", "flops": "C"}
AXIS_UNIT = {"n_params": "parameters", "n_tokens": "tokens", "flops": "FLOPs"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a law."""

    name: str
    kind: Kind
    axis: str | None = None
    """The variable it belongs to; None for the irreducible loss."""
    meaning: str


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

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order of theta: offset, prefactors, exponents."""
        found = []
        if self.offset:
            found.append(Parameter(name="E", kind="offset", meaning="loss that no size or data removes [nats/token]"))
        for name, axis in zip(self.prefactors, self.axes, strict=True):
            letter = AXIS_LETTER[axis]
            found.append(
                Parameter(name=name, kind="prefactor", axis=axis, meaning=f"loss of the {letter} term at {letter} = 1")
            )
        for name, axis in zip(self.exponents, self.axes, strict=True):
            found.append(
                Parameter(name=name, kind="exponent", axis=axis, meaning=f"how fast the {AXIS_LETTER[axis]} term falls")
            )
        return tuple(found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def levels_needed(self) -> int:
        """Distinct values of each variable below which a term's parameters cannot be told apart."""
        return 3 if self.offset else 2

    def basis(self, columns: dict[str, Array], centres: dict[str, float]) -> Array:
        """The (term, point, parameter) array whose product with theta is the log of each term."""
        n_points, k = len(next(iter(columns.values()))), len(self.axes)
        first = 1 if self.offset else 0
        basis = np.zeros((first + k, n_points, first + 2 * k))
        if self.offset:
            basis[0, :, 0] = 1.0
        for t, axis in enumerate(self.axes):
            basis[first + t, :, first + t] = 1.0
            basis[first + t, :, first + k + t] = -(np.log(columns[axis]) - centres[axis])
        return basis

    def bounds(self, losses: Array) -> tuple[Array, Array]:
        """Lowest and highest theta the engine may try: E and each term within e^-14 .. e^3 of the losses."""
        middle, k = float(np.log(losses).mean()), len(self.axes)
        n_logs = len(self.names) - k
        low = np.array([middle - 14.0] * n_logs + [MIN_EXPONENT] * k)
        high = np.array([middle + 3.0] * n_logs + [MAX_EXPONENT] * k)
        return low, high

    def natural(self, theta: Array, centres: dict[str, float]) -> Array:
        """theta (..., parameter) to the parameters as the formula writes them."""
        k = len(self.axes)
        out = np.array(theta, dtype=np.float64)
        for t, axis in enumerate(self.axes):
            exponent = out[..., len(self.names) - k + t]
            at = (1 if self.offset else 0) + t
            out[..., at] = np.exp(np.clip(out[..., at] + exponent * centres[axis], -700, 700))
        if self.offset:
            out[..., 0] = np.exp(out[..., 0])
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

    def derived(self, values: Array) -> dict[str, Array]:
        """What follows from the parameters, drawn along with them: (..., parameter) to name -> (...)."""
        p = dict(zip(self.names, np.moveaxis(values, -1, 0), strict=True))
        if self.axes == ("n_params", "n_tokens"):
            total = p["alpha"] + p["beta"]
            return {
                "a": p["beta"] / total,
                "b": p["alpha"] / total,
                "exponent": p["alpha"] * p["beta"] / total,
            }
        return {"exponent": p[self.exponents[0]]}


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


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        _power("n_params", "power-n", "A", "alpha", False),
        _power("n_params", "power-n", "A", "alpha", True),
        _power("n_tokens", "power-d", "B", "beta", False),
        _power("n_tokens", "power-d", "B", "beta", True),
        _power("flops", "power-c", "K", "gamma", False),
        _power("flops", "power-c", "K", "gamma", True),
        Law(
            name="chinchilla",
            title="L(N, D)",
            formula="L = E + A N^-alpha + B D^-beta",
            source="Hoffmann et al. 2022 eq. 2",
            axes=("n_params", "n_tokens"),
            offset=True,
            prefactors=("A", "B"),
            exponents=("alpha", "beta"),
        ),
    )
}


def get_law(name: str) -> Law:
    """The law of this name, or SpecError listing the known ones."""
    if name not in LAWS:
        raise SpecError(f"no law {name!r}; choose among {', '.join(LAWS)}")
    return LAWS[name]


def start_grid(law: Law, columns: dict[str, Array], losses: Array, centres: dict[str, float], n_starts: int) -> Array:
    """Starting points (start, parameter): a grid of exponents, the linear parameters by least squares at each.

    At fixed exponents the law is linear in E and the prefactors (variable projection), so the search is over the
    exponents alone. Negative solutions are moved to a small positive share of the loss.
    """
    k = len(law.axes)
    per_axis = max(2, round(n_starts ** (1 / k)))
    grid = np.geomspace(0.02, 2.5, per_axis)
    exponents = np.stack(np.meshgrid(*[grid] * k, indexing="ij"), axis=-1).reshape(-1, k)
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
