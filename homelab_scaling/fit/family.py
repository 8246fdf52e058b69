"""GPT-2 shapes by width, with exact counts: which of them a budget wants when C is every matmul instead of 6 N D.

Legend:  d width, L layers; N parameters by the fit's count, F training FLOPs per token, C budget, D = C / F tokens
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from homelab_scaling.errors import SpecError, UserError
from homelab_scaling.fit.allocate import loss_at
from homelab_scaling.fit.laws import Law
from homelab_scaling.fit.models import Array
from homelab_scaling.fit.points import Count
from homelab_scaling.plan.counting import ParamCount, count_params, flops_per_token
from homelab_scaling.plan.rules import ASPECT, MIN_LAYERS
from homelab_scaling.runs import run_folders
from homelab_scaling.specs import ModelShape

HEAD_SIZE = 64
NARROW_HEAD_SIZE = 32
WIDTHS = (*range(32, 513, 32), *range(576, 32_769, 64))
SEARCHED_WIDTHS = (8.0, 262_144.0)
N_GRID, N_GOLDEN = 192, 48
GOLDEN = (5**0.5 - 1) / 2


class OutsideFamily(SpecError):
    """A size or budget for which the family has no shape."""


@dataclass(frozen=True, kw_only=True)
class ShapeFamily:
    """The planner's rule for shapes: L = max(4, d / 64), heads of 64 (32 in models narrower than 128 or between).

    Counts are those of plan/counting.py. They are polynomials, linear in L and quadratic in d, so six shapes give them
    at every width, also between the real ones: that is what a smooth optimum needs.
    """

    n_vocab: int
    context_tokens: int
    tied: bool = True
    count: Count = "total"
    """Which parameters N is, as in the fit."""

    def __post_init__(self) -> None:
        if self.n_vocab < 2 or self.context_tokens < 1:
            raise SpecError(
                f"a vocabulary of {self.n_vocab} and a context of {self.context_tokens} tokens; wants 2 and 1 or more"
            )

    @property
    def words(self) -> str:
        return f"GPT-2 shapes (width 64 x layers, vocabulary {self.n_vocab:,}, context {self.context_tokens:,})"

    def shape(self, width: int) -> ModelShape:
        """The real shape of this width."""
        head = HEAD_SIZE if width % HEAD_SIZE == 0 and width >= 2 * HEAD_SIZE else NARROW_HEAD_SIZE
        return ModelShape(
            n_layer=max(MIN_LAYERS, round(width / ASPECT)),
            d_model=width,
            n_head=width // head,
            context_tokens=self.context_tokens,
            tied=self.tied,
        )

    def n_of(self, shape: ModelShape) -> int:
        """N of a real shape, by the family's count."""
        return counted(count_params(shape, self.n_vocab), self.count)

    def flops_of(self, shape: ModelShape) -> float:
        """Exact training FLOPs per token of a real shape."""
        return flops_per_token(shape, self.n_vocab)

    def n_at(self, width: Array) -> Array:
        """N at any width, with the depth that the rule gives before rounding."""
        return _evaluate(self._n_coefficients, width)

    def flops_at(self, width: Array) -> Array:
        """Training FLOPs per token at any width."""
        return _evaluate(self._flops_coefficients, width)

    @cached_property
    def _n_coefficients(self) -> Array:
        return self._coefficients(self.n_of)

    @cached_property
    def _flops_coefficients(self) -> Array:
        return self._coefficients(self.flops_of)

    def _coefficients(self, of: Callable[[ModelShape], float]) -> Array:
        """(2, 3) coefficients of L^i d^j, from six shapes."""
        nodes = [(layers, width) for layers in (1, 2) for width in (64, 128, 192)]
        rows = np.array([[layers**i * width**j for i in (0, 1) for j in (0, 1, 2)] for layers, width in nodes])
        values = [
            of(ModelShape(n_layer=n, d_model=d, n_head=1, context_tokens=self.context_tokens, tied=self.tied))
            for n, d in nodes
        ]
        return np.asarray(np.linalg.solve(rows.astype(np.float64), np.array(values, dtype=np.float64)).reshape(2, 3))

    def elasticity(self, n_params: float) -> float:
        """d log F / d log N at this size: what one percent of N costs in FLOPs per token."""
        width, step = self.width_for(n_params), 1e-4
        ends = np.array([width * (1 - step), width * (1 + step)])
        return float(np.diff(np.log(self.flops_at(ends)))[0] / np.diff(np.log(self.n_at(ends)))[0])

    def width_for(self, n_params: float) -> float:
        """The width, real or not, whose N this is.

        Raises:
            OutsideFamily: none has.
        """
        low, high = np.log(SEARCHED_WIDTHS)
        smallest, largest = (float(self.n_at(np.array(w))) for w in SEARCHED_WIDTHS)
        if not smallest <= n_params <= largest:
            raise OutsideFamily(
                f"{n_params:.3g} parameters are outside the {self.words}, which go from {smallest:.2g} to {largest:.2g}"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.n_at(np.exp(middle)) < n_params else (low, middle)
        return float(np.exp(low))

    def holds(self, n_params: float) -> bool:
        """Whether real shapes reach around this N."""
        return self._real[0][1] / 1.5 <= n_params <= 1.5 * self._real[-1][1]

    def nearest(self, n_params: float) -> ModelShape:
        """The real shape whose N is nearest in ratio."""
        return min(self._real, key=lambda one: abs(np.log(one[1] / n_params)))[0]

    @cached_property
    def _real(self) -> list[tuple[ModelShape, int]]:
        shapes = [self.shape(width) for width in WIDTHS]
        return [(shape, self.n_of(shape)) for shape in shapes]


def counted(params: ParamCount, count: Count) -> int:
    """N under one of the three counts of the fitter."""
    return {
        "total": params.n_params,
        "body": params.n_body,
        "body+head": params.n_body + params.n_head,
    }[count]


def depth(width: Array) -> Array:
    """Layers by the planner's rule, before rounding."""
    return np.maximum(MIN_LAYERS, width / ASPECT)


def _evaluate(coefficients: Array, width: Array) -> Array:
    powers = np.stack([np.ones_like(width), width, width * width], axis=-1)
    without, per_layer = (powers @ row for row in coefficients)
    return np.asarray(without + depth(width) * per_layer)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapeOptimum:
    """Where C = F(d) D is best spent, for one law or a batch of draws (...)."""

    width: Array
    n_params: Array
    n_tokens: Array
    loss_nats: Array


def optimal_shape(law: Law, values: Array, flops: float, family: ShapeFamily) -> ShapeOptimum:
    """The width, N and D of lowest loss at exactly `flops`, searched numerically over the family.

    A grid over log d finds the valley, golden sections its floor: no assumption about how F grows with N.

    Raises:
        SpecError: not a law of N and D.
        OutsideFamily: the optimum lies outside the widths that are searched.
    """
    law.split_terms(values)

    def loss(log_d: Array) -> Array:
        width = np.exp(log_d)
        return loss_at(law, values[..., None, :], family.n_at(width), flops / family.flops_at(width))

    grid = np.linspace(float(np.log(SEARCHED_WIDTHS[0])), float(np.log(SEARCHED_WIDTHS[1])), N_GRID)
    best = loss(np.broadcast_to(grid, (*values.shape[:-1], N_GRID))).argmin(axis=-1)
    if values.ndim == 1 and best in (0, N_GRID - 1):
        edge = "narrower" if best == 0 else "wider"
        raise OutsideFamily(f"the best shape for {flops:.3g} FLOPs is {edge} than any of the {family.words}")
    low, high = grid[np.maximum(best - 1, 0)][..., None], grid[np.minimum(best + 1, N_GRID - 1)][..., None]
    for _ in range(N_GOLDEN):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        smaller = loss(left) < loss(right)
        low, high = np.where(smaller, low, left), np.where(smaller, right, high)
    width = np.exp((low + high) / 2)[..., 0]
    n, d = family.n_at(width), flops / family.flops_at(width)
    return ShapeOptimum(width=width, n_params=n, n_tokens=d, loss_nats=loss_at(law, values, n, d))


def best_real_shape(law: Law, values: Array, flops: float, family: ShapeFamily) -> tuple[ModelShape, float, float]:
    """The real shape of lowest loss at exactly `flops`, its D, and that loss, for one law (P,)."""
    found = []
    for shape, n in family._real:
        d = flops / family.flops_of(shape)
        found.append((float(loss_at(law, values, float(n), d)), d, shape))
    lowest, d, shape = min(found, key=lambda one: one[0])
    return shape, d, lowest


def lab_family(source: str, count: Count) -> ShapeFamily | None:
    """Vocabulary and context of the lab that a fit belongs to, from its plan or its runs; None where they are unknown.

    Args:
        source: what a person calls the fit: the lab's folder, its fit folder or its fit.json.
    """
    path = Path(source).resolve()
    for folder in (path, path.parent, path.parent.parent):
        specs = _specs_of(folder)
        if specs:
            return ShapeFamily(n_vocab=specs[0], context_tokens=specs[1], tied=specs[2], count=count)
    return None


def _specs_of(folder: Path) -> tuple[int, int, bool] | None:
    """Vocabulary, context and tying that every run of the lab shares."""
    if not (folder / "runs").is_dir():
        return None
    found = set()
    for run in run_folders(folder):
        try:
            science = run.read_spec().science
        except UserError:
            continue  # a folder that is no run; its neighbours say what the lab is
        found.add((science.n_vocab, science.shape.context_tokens, science.shape.tied))
    return found.pop() if len(found) == 1 else None
