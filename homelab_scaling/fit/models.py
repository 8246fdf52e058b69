"""What the engine minimises over: f = log of a predicted loss, with its derivatives, for a batch of parameter vectors.

Legend:  R batch member (a start or a resample), n point, T term, P parameter, K rows of a model's state
"""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Model(Protocol):
    """A function of P parameters at n points; `state` (K, R, n) is whatever its derivatives need of its value."""

    @property
    def n_points(self) -> int:
        """Points it is evaluated at."""

    def value(self, theta: Array) -> tuple[Array, Array]:
        """f (R, n) = log loss at theta (R, P), and the state (K, R, n)."""

    def jacobian(self, state: Array) -> Array:
        """df/dtheta (R, n, P)."""

    def gradient(self, state: Array, slope: Array) -> tuple[Array, Array]:
        """sum_n slope df/dtheta (R, P), and the same sum of absolute contributions, its natural scale."""

    def hessian(self, state: Array, outer: Array, slope: Array | None) -> Array:
        """sum_n outer df df' [+ slope d2f] (R, P, P)."""


class LogSum:
    """f = log sum_T exp(constant_T + basis_T . theta): a sum of power terms seen on log axes.

    Its state are the terms' shares of the loss (T, R, n).
    """

    def __init__(self, basis: Array, constant: Array | None = None) -> None:
        """Takes the basis (T, n, P) and constants (T, n), zero when not given."""
        self.basis = basis
        self.constant = np.zeros(basis.shape[:2]) if constant is None else constant
        n_terms, n_points, n_params = basis.shape
        self.n_points = n_points
        self._size = np.abs(basis)
        # Terms that are the same at every point (E) cost one exponential a member, not one a point.
        self._flat = [bool((basis[t] == basis[t, :1]).all() and np.ptp(self.constant[t]) == 0) for t in range(n_terms)]
        self._moments = [
            (s, t, *_distinct_columns(_pair(basis, s, t))) for s in range(n_terms) for t in range(s, n_terms)
        ]
        self._n_params = n_params

    def value(self, theta: Array) -> tuple[Array, Array]:
        n_batch = len(theta)
        shares = np.empty((len(self.basis), n_batch, self.n_points))
        for t, (rows, constant) in enumerate(zip(self.basis, self.constant, strict=True)):
            if self._flat[t]:
                shares[t] = np.exp(theta @ rows[0] + constant[0])[:, None]
            else:
                np.matmul(theta, rows.T, out=shares[t])
                shares[t] += constant
                np.exp(shares[t], out=shares[t])
        total = shares.sum(axis=0)
        shares /= total
        return np.log(total, out=total), shares

    def jacobian(self, state: Array) -> Array:
        return np.asarray(np.einsum("trn,tnp->rnp", state, self.basis))

    def gradient(self, state: Array, slope: Array) -> tuple[Array, Array]:
        gradient = np.zeros((len(slope), self._n_params))
        scale = np.zeros_like(gradient)
        size = np.abs(slope)
        for shares, rows, sizes in zip(state, self.basis, self._size, strict=True):
            gradient += (slope * shares) @ rows
            scale += (size * shares) @ sizes
        return gradient, scale

    def hessian(self, state: Array, outer: Array, slope: Array | None) -> Array:
        # d2f = sum_T share_T b b' - df df', so both parts are moments of products of shares.
        weight = outer if slope is None else outer - slope
        flat = np.zeros((state.shape[1], self._n_params**2))
        for s, t, columns, spread in self._moments:
            part = weight * state[s]
            part *= state[t]
            if slope is not None and s == t:
                part += slope * state[t]
            flat += (part @ columns) @ spread
        return flat.reshape(-1, self._n_params, self._n_params)


def _pair(basis: Array, s: int, t: int) -> Array:
    """b_s b_t' symmetrised over the pair, (n, P * P)."""
    product = basis[s][:, :, None] * basis[t][:, None, :]
    both = product if s == t else product + product.swapaxes(1, 2)
    return np.asarray(both.reshape(len(both), -1))


def _distinct_columns(table: Array) -> tuple[Array, Array]:
    """`columns` (n, k) and `spread` (k, m) with columns @ spread = table, k as small as equal columns allow.

    Of the 25 products of a term's basis most are zero or repeat: four of 25 are left for a pair of power terms.
    """
    kept: list[Array] = []
    spread: list[Array] = []
    for index, column in enumerate(table.T):
        if not column.any():
            continue
        for known, row in zip(kept, spread, strict=True):
            if np.array_equal(known, column) or np.array_equal(known, -column):
                row[index] = 1.0 if np.array_equal(known, column) else -1.0
                break
        else:
            kept.append(column)
            row = np.zeros(table.shape[1])
            row[index] = 1.0
            spread.append(row)
    if not kept:
        return np.zeros((len(table), 1)), np.zeros((1, table.shape[1]))
    return np.ascontiguousarray(np.stack(kept, axis=1)), np.stack(spread)


class Dense(ABC):
    """A model that gives all its first and second derivatives; its state are those, (P + P (P + 1) / 2, R, n).

    A subclass has `n_points`, `n_params` and `derivatives`.
    """

    n_points: int
    n_params: int

    @abstractmethod
    def derivatives(self, theta: Array) -> tuple[Array, list[Array], dict[tuple[int, int], Array]]:
        """f (R, n), df/dtheta_p for each p, and d2f/dtheta_p dtheta_q for p <= q where it is not zero."""

    def value(self, theta: Array) -> tuple[Array, Array]:
        f, first, second = self.derivatives(theta)
        zero = np.zeros_like(f)
        return f, np.stack([*first, *(second.get(pair, zero) for pair in self._pairs())])

    def _pairs(self) -> list[tuple[int, int]]:
        return [(p, q) for p in range(self.n_params) for q in range(p, self.n_params)]

    def jacobian(self, state: Array) -> Array:
        return np.moveaxis(state[: self.n_params], 0, -1)

    def gradient(self, state: Array, slope: Array) -> tuple[Array, Array]:
        first = state[: self.n_params]
        return (
            np.asarray(np.einsum("prn,rn->rp", first, slope)),
            np.asarray(np.einsum("prn,rn->rp", np.abs(first), np.abs(slope))),
        )

    def hessian(self, state: Array, outer: Array, slope: Array | None) -> Array:
        first = state[: self.n_params]
        total = np.asarray(np.einsum("prn,qrn,rn->rpq", first, first, outer))
        if slope is not None:
            for index, (p, q) in enumerate(self._pairs()):
                part = (state[self.n_params + index] * slope).sum(axis=-1)
                total[:, p, q] += part
                if p != q:
                    total[:, q, p] += part
        return total


class Softened(Dense):
    """f = s log sum_T exp(l_T / s) with l_T = basis_T . theta and s one of the parameters: Kaplan's joint law.

    Args of its maker: the basis (T, n, P) and which parameter s is.
    """

    def __init__(self, basis: Array, s_index: int) -> None:
        self.basis = basis
        _n_terms, self.n_points, self.n_params = basis.shape
        self.s_index = s_index

    def derivatives(self, theta: Array) -> tuple[Array, list[Array], dict[tuple[int, int], Array]]:
        s = theta[:, self.s_index, None]
        terms = np.einsum("tnp,rp->trn", self.basis, theta)
        scaled = terms / s
        top = scaled.max(axis=0)
        shares = np.exp(scaled - top)
        total = shares.sum(axis=0)
        shares /= total
        soft = top + np.log(total)  # f / s
        mean = (shares * terms).sum(axis=0)
        by_s = soft - mean / s
        n_params = self.n_params
        first = [(shares * self.basis[:, None, :, p]).sum(axis=0) for p in range(n_params)]
        leaning = [(shares * (terms - mean) * self.basis[:, None, :, p]).sum(axis=0) for p in range(n_params)]
        variance = (shares * (terms - mean) ** 2).sum(axis=0)
        second = {}
        for p in range(n_params):
            for q in range(p, n_params):
                both = (shares * self.basis[:, None, :, p] * self.basis[:, None, :, q]).sum(axis=0)
                value = (both - first[p] * first[q]) / s
                if p == self.s_index:
                    value = value - leaning[q] / s**2
                if q == self.s_index:
                    value = value - leaning[p] / s**2
                if p == q == self.s_index:
                    value = value + variance / s**3
                second[p, q] = value
        first[self.s_index] = first[self.s_index] + by_s
        return soft * s, first, second
