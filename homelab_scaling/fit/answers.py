"""Questions to a fit and their answers: what `homelab predict` asks and prints."""

from dataclasses import dataclass, fields, replace
from typing import Any

from homelab_scaling.errors import SpecError
from homelab_scaling.fit.advice import (
    BestPartner,
    Budget,
    MoreTokens,
    predict_budget,
    predict_more_tokens,
    predict_partner,
)
from homelab_scaling.fit.allocate import parse_worth
from homelab_scaling.fit.catalogue import joint_fit
from homelab_scaling.fit.family import OutsideFamily, ShapeFamily
from homelab_scaling.fit.laws import AXIS_LETTER, CHINCHILLA, Law, get_law
from homelab_scaling.fit.predict import Forecast, Range, budgets_of, chosen_fit, predict_loss, shown_factor
from homelab_scaling.fit.result import Draws, FitReport, ScalingFit
from homelab_scaling.fit.serving import (
    KvCache,
    Machine,
    Quality,
    ServingPlan,
    TokensToReach,
    kv_cache,
    kv_cache_of,
    predict_serving,
    predict_tokens_to_reach,
)
from homelab_scaling.fit.words import listed

DEFAULT_BUDGETS = (1, 10, 100)
"""Times the largest budget measured, where nothing is asked."""
MOST = 1e40
"""Of anything that is asked: beyond it even silly answers stop being numbers."""
FAR = 10.0
"""Times the measured range from which an answer is called far."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked; None where it is not."""

    params: float | None = None
    tokens: float | None = None
    flops: float | None = None
    steps: float | None = None
    """S_min, for a law of it."""
    unique_tokens: float | None = None
    """How many of the tokens are different ones, for a law of repeated data."""
    worth: str = "1%"
    quality_of: float | None = None
    quality_loss: float | None = None
    inference_tokens: float | None = None
    machines: tuple[Machine, Machine] | None = None
    """What trains and what serves, for costs in money."""
    layers: int | None = None
    width: int | None = None
    context: int | None = None
    kv_bytes: float = 2.0
    family: ShapeFamily | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not isinstance(value, int | float):
                continue
            least = 0.0 if one.name in ("quality_loss", "kv_bytes") else 1.0
            if not (least <= value <= MOST and value > 0):
                wants = f"a number from {least:g} to {MOST:g}" if least else "a positive number"
                raise SpecError(f"--{one.name.replace('_', '-')} {value:g}: wants {wants}")
        if self.params is not None and self.tokens is not None and self.flops is not None:
            raise SpecError("size, tokens and FLOPs are given together; C = 6 N D leaves room for two of them")
        if (self.layers is None) != (self.width is None):
            raise SpecError("a shape needs both --layers and --width")
        if self.quality_of is not None and self.quality_loss is not None:
            raise SpecError("the quality is either that of a model (--quality-of) or a loss (--quality-loss); keep one")
        if self.inference_tokens is not None and self.quality_of is None and self.quality_loss is None:
            raise SpecError(
                "a serving load needs the quality wanted: give --quality-of N, a model as good, or --quality-loss L"
            )
        if self.quality_of is not None and self.inference_tokens is None:
            raise SpecError("--quality-of needs --inference-tokens, how many tokens the model will serve")
        if self.machines is not None and self.inference_tokens is None:
            raise SpecError("prices are for a serving load; give --quality-of and --inference-tokens as well")

    @property
    def about_law(self) -> bool:
        """Whether anything but a cache is asked."""
        asked = (self.params, self.tokens, self.flops, self.steps, self.quality_of, self.quality_loss)
        return any(one is not None for one in asked)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Every answer, with what it stands on; None or empty where it was not asked for."""

    source: str
    law: str
    formula: str
    rows: str
    """In words, what the law was fitted to."""
    count: str
    """Which parameters N counts."""
    ranges: dict[str, Range]
    """What was measured; outside it a prediction extrapolates."""
    budget_range_flops: Range | None
    n_draws: int
    interval: str
    """In words, how the intervals were made."""
    assumes: tuple[str, ...]
    """Plain sentences on what every number here takes for granted."""
    warnings: tuple[str, ...] = ()
    """What makes these numbers less sure than their intervals say."""
    loss: Forecast | None = None
    budgets: tuple[Budget, ...] = ()
    tokens_for_params: BestPartner | None = None
    tokens_for_params_by_shapes: BestPartner | None = None
    """The same with the exact FLOPs of the family."""
    params_for_tokens: BestPartner | None = None
    more_tokens: MoreTokens | None = None
    serving: ServingPlan | None = None
    tokens_to_reach: TokensToReach | None = None
    kv_cache: KvCache | None = None


def predict(report: FitReport, asked: Questions, law: str | None = None) -> Prediction:
    """Answers to everything that is asked; a page of budgets where nothing is.

    Args:
        law: which of the report's fits; when not given the one that can answer.

    Raises:
        SpecError: no fit can answer, a number that no law can take, or a quality that nothing reaches.
    """
    fit, chosen, drawn = _fit_for(report, asked, law)
    known = _known_budgets(report, fit)
    answers = _of_split(fit, drawn, asked, known) if chosen.splits else _of_one(fit, chosen, drawn, asked)
    made = Prediction(
        source=report.source,
        law=fit.law,
        formula=chosen.formula,
        rows=fit.rows.split(":")[0],
        count=report.count,
        ranges=dict(fit.ranges),
        budget_range_flops=known,
        n_draws=len(drawn.values),
        interval=interval_words(fit, drawn),
        assumes=tuple(assumptions(report, fit, chosen, asked)),
        **answers,
    )
    made = replace(made, kv_cache=_cache(asked, made.serving))
    return replace(made, warnings=tuple(cautions(made, fit, chosen, asked)))


def _fit_for(report: FitReport, asked: Questions, law: str | None) -> tuple[ScalingFit, Law, Draws]:
    if law is not None:
        return chosen_fit(report, law)
    try:
        return joint_fit(report)
    except SpecError:
        given = (("n_params", asked.params), ("n_tokens", asked.tokens), ("flops", asked.flops))
        axes = tuple(name for name, value in given if value is not None)
        if len(axes) == 1:
            return chosen_fit(report, None, axes=axes)
        usable = [fit for fit in report.main if fit.is_fitted and len(get_law(fit.law).axes) == 1]
        if asked.about_law or not usable:
            raise
        return chosen_fit(report, usable[0].law)


def _known_budgets(report: FitReport, fit: ScalingFit) -> Range | None:
    try:
        return budgets_of(report, fit)
    except SpecError:
        return None


def _of_split(fit: ScalingFit, drawn: Draws, asked: Questions, known: Range | None) -> dict[str, Any]:
    if asked.steps is not None:
        raise SpecError(f"{fit.law} knows no steps; ask with --tokens")
    n, d, family = asked.params, asked.tokens, asked.family
    answers: dict[str, Any] = {}
    if asked.flops is not None and n is not None:
        d = asked.flops / (6 * n)
    elif asked.flops is not None and d is not None:
        n = asked.flops / (6 * d)
    budgets = [] if asked.flops is None else [asked.flops]
    if not asked.about_law and asked.layers is None and known is not None:
        budgets = [times * known[1] for times in DEFAULT_BUDGETS]
    answers["budgets"] = tuple(_budget(fit, drawn, one, family, known) for one in budgets)
    if asked.quality_of is not None or asked.quality_loss is not None:
        return answers | _of_quality(fit, drawn, asked, known)
    if n is not None and d is not None:
        answers["loss"] = predict_loss(fit, drawn, n_params=n, n_tokens=d, **_unique(fit, asked, d))
        if asked.unique_tokens is None:
            answers["more_tokens"] = predict_more_tokens(fit, drawn, n, d, parse_worth(asked.worth))
    elif n is not None:
        answers["tokens_for_params"] = predict_partner(fit, drawn, n_params=n, budgets=known)
        if family is not None and family.holds(n):
            exact = predict_partner(fit, drawn, n_params=n, family=family, budgets=known)
            answers["tokens_for_params_by_shapes"] = exact
    elif d is not None:
        answers["params_for_tokens"] = predict_partner(fit, drawn, n_tokens=d, budgets=known)
    return answers


def _budget(fit: ScalingFit, drawn: Draws, flops: float, family: ShapeFamily | None, known: Range | None) -> Budget:
    try:
        return predict_budget(fit, drawn, flops, family=family, budgets=known)
    except OutsideFamily:  # 6 N D still has an answer; `cautions` says that the shapes have none
        return predict_budget(fit, drawn, flops, budgets=known)


def _unique(fit: ScalingFit, asked: Questions, n_tokens: float) -> dict[str, float]:
    """The law's third variable where it has one: all tokens are new unless it is said how many are."""
    if "n_tokens_unique" in get_law(fit.law).axes:
        return {"n_tokens_unique": min(asked.unique_tokens or n_tokens, n_tokens)}
    if asked.unique_tokens is not None:
        raise SpecError(f"{fit.law} knows nothing of repeated tokens; drop --unique-tokens or choose a --law that does")
    return {}


def _of_quality(fit: ScalingFit, drawn: Draws, asked: Questions, known: Range | None) -> dict[str, Any]:
    if asked.quality_loss is not None and asked.params is not None and asked.inference_tokens is None:
        reached = predict_tokens_to_reach(fit, drawn, asked.params, asked.quality_loss, budgets=known)
        return {"tokens_to_reach": reached}
    trained = asked.tokens if asked.quality_of is not None else None
    quality = Quality(n_params=asked.quality_of, n_tokens=trained, loss_nats=asked.quality_loss)
    load = asked.inference_tokens or 0.0
    return {"serving": predict_serving(fit, drawn, quality, load, machines=asked.machines, budgets=known)}


def _of_one(fit: ScalingFit, law: Law, drawn: Draws, asked: Questions) -> dict[str, Any]:
    """A law that knows no split gives a loss, and nothing else."""
    given = {"n_params": asked.params, "n_tokens": asked.tokens, "s_min_steps": asked.steps}
    given["c_min_flops" if "c_min_flops" in law.axes else "flops"] = asked.flops
    at = {axis: value for axis, value in given.items() if value is not None}
    other = asked.quality_of is not None or asked.quality_loss is not None
    if other or (set(at) - set(law.axes)):
        letters = listed([AXIS_LETTER[axis] for axis in law.axes])
        raise SpecError(
            f"{law.name} is a law of {letters} and cannot split a budget between size and tokens; ask it for the loss "
            f"at {letters} alone, or fit one that can with `homelab fit --law chinchilla`"
        )
    if not at and asked.layers is not None:
        return {}
    if not at:  # the page: the end of what was measured
        at = {axis: fit.ranges[axis][1] for axis in law.axes}
    return {"loss": predict_loss(fit, drawn, **at)}


def _cache(asked: Questions, serving: ServingPlan | None) -> KvCache | None:
    """Of the shape that was given, else of the family's shape nearest to the size that was asked about or found."""
    if asked.layers is not None and asked.width is not None:
        context = asked.context or (asked.family.context_tokens if asked.family else None)
        if context is None:
            raise SpecError("the cache of a sequence needs its length; give --context")
        return kv_cache(asked.layers, asked.width, context, bytes_per_element=asked.kv_bytes, n_params=asked.params)
    n = asked.params
    if serving is not None and serving.inference_tokens:
        n = (serving.by_money or serving.by_flops).n_params.value
    if asked.family is None or n is None or not asked.family.holds(n):
        return None
    shape = asked.family.nearest(n)
    total = float(replace(asked.family, count="total").n_of(shape))
    return kv_cache_of(shape, bytes_per_element=asked.kv_bytes, n_params=total)


def cautions(made: Prediction, fit: ScalingFit, law: Law, asked: Questions) -> list[str]:
    """What the intervals do not know."""
    said = []
    if law.fixed:
        given = listed([f"{name} = {value:.4g}" for name, value in law.fixed.items()])
        said.append(f"{given} was given to this law, not fitted: the intervals take it as exact")
    if fit.unpinned:
        said.append(
            f"the points do not pin down {listed(list(fit.unpinned))}: read the intervals, not the values beside them"
        )
    one = made.tokens_for_params
    without = any(b.shapes is None for b in made.budgets) or (one and made.tokens_for_params_by_shapes is None)
    if asked.family is not None and without:
        said.append(f"no exact FLOPs, only 6 N D: these sizes are outside the {asked.family.words}")
    far = max(_factors(made), default=1.0)
    if far > FAR:
        said.append(
            f"answers go up to x {shown_factor(far)} beyond what was measured: the intervals know the noise of the "
            "points, not whether the law still holds out there"
        )
    return said


def _factors(made: Prediction) -> list[float]:
    """Extrapolation of every answer."""
    found = [f.extrapolation for b in made.budgets for f in (b.fitted, b.rule, b.shapes) if f is not None]
    single = (
        made.loss,
        made.tokens_for_params,
        made.tokens_for_params_by_shapes,
        made.params_for_tokens,
        made.more_tokens,
        made.tokens_to_reach,
        None if made.serving is None else made.serving.by_flops,
    )
    return found + [one.extrapolation for one in single if one is not None]


def interval_words(fit: ScalingFit, drawn: Draws) -> str:
    """Where the intervals come from, or why there are none."""
    if len(drawn.values) >= 2:
        return f"95 % intervals of the law from {len(drawn.values):,} draws ({fit.interval.split(':')[0]})"
    if fit.objective == "published":
        return "no interval was published with this law"
    return "no intervals: fitted without resamples; run `homelab fit --bootstrap 4000`"


def assumptions(report: FitReport, fit: ScalingFit, law: Law, asked: Questions) -> list[str]:
    """What a person has to grant before believing the numbers."""
    if fit.objective == "published":
        where = f"of the text and tokenizer of {report.source}; on other text only the shape of the law carries over"
    else:
        where = f"on the held-out text of {report.source}, for its tokenizer, its data and its training recipe"
    fresh = asked.unique_tokens is None or "n_tokens_unique" not in law.axes
    said = [
        f"Loss is cross-entropy in nats per token {where}.",
        f"N counts {'all' if report.count == 'total' else report.count} parameters; every run finishes its schedule; "
        + ("every token is new." if fresh else "tokens beyond the different ones are whole further epochs."),
    ]
    if law.splits:
        said.append(
            "Compute is 6 N D with that N"
            + (", or where said the exact matmuls of " + asked.family.words if asked.family else "")
            + ". Outside the measured range the law is assumed to go on as it is."
        )
    if report.compute == "c_min" and law.axes == CHINCHILLA.axes:
        said.append(
            "Tokens and compute are those of a batch far below critical (--compute c_min): at a batch B take "
            "(1 + B / B_crit) times as many."
        )
    if asked.inference_tokens is not None:
        said.append(
            "Serving costs 2 N FLOPs a token, prompt and answer alike; the cache's attention and idle hours are not in."
        )
    if asked.machines is not None:
        said.append(f"Training: {asked.machines[0].words}. Serving: {asked.machines[1].words}.")
    return said
