"""Answers as rich tables for 100 columns: a value, below it its interval, beside it how far it reaches."""

from typing import TYPE_CHECKING

from homelab_scaling.fit.advice import BestPartner, Budget, MoreTokens
from homelab_scaling.fit.answers import Prediction
from homelab_scaling.fit.laws import AXIS_LETTER, AXIS_UNIT
from homelab_scaling.fit.predict import Forecast, Reach
from homelab_scaling.fit.result import Estimate
from homelab_scaling.fit.serving import KvCache, Life, ServingPlan, TokensToReach
from homelab_scaling.fit.words import short

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

UNSURE_RATIO = 30.0
"""An interval wider than this factor says that the data do not know."""


def prediction_page(made: Prediction) -> "list[RenderableType]":
    """Heading, one table for each answer, and what all of it assumes."""
    from rich.text import Text

    page: list[RenderableType] = [Text(f"{made.source}: {made.formula}", style="bold"), Text(_heading(made)), Text("")]
    if made.loss is not None:
        page += _loss(made.loss)
    if made.budgets:
        page += _budgets(made.budgets)
    for title, one in (
        ("Tokens for which this size is best", made.tokens_for_params),
        ("The same by exact FLOPs", made.tokens_for_params_by_shapes),
        ("Size for which these tokens are best", made.params_for_tokens),
    ):
        if one is not None:
            page += _partner(title, one)
    if made.more_tokens is not None:
        page += _more_tokens(made.more_tokens)
    if made.tokens_to_reach is not None:
        page += _tokens_to_reach(made.tokens_to_reach)
    if made.serving is not None:
        page += _serving(made.serving)
    if made.kv_cache is not None:
        page += _cache(made.kv_cache)
    page += [Text("Taken for granted", style="bold")]
    page += [_item(Text(sentence)) for sentence in made.assumes]
    return page


def _heading(made: Prediction) -> str:
    spans = [
        f"{AXIS_LETTER.get(axis, axis)} {count(low)} to {count(high)}" for axis, (low, high) in made.ranges.items()
    ]
    if made.budget_range_flops is not None and "flops" not in made.ranges:
        spans.append(f"C {count(made.budget_range_flops[0])} to {count(made.budget_range_flops[1])}")
    return f"law {made.law}, measured over {', '.join(spans)}; {made.interval}"


# --------------------------------------------------------------------------------------------------------------- cells


def count(value: float) -> str:
    """Three digits: 124M, 3.00e+18, 4.1e-07."""
    return f"{value:.2e}" if value >= 1e15 or 0 < value < 0.01 else short(value)


def nats(value: float) -> str:
    return f"{value:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if abs(share) < 10 else f"{100 * share:,.0f} %"


def dollars(usd: float) -> str:
    if usd >= 1e6:
        return f"${short(usd)}"
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:,.2f}" if usd >= 0.1 else f"${usd:.2g}"


def _cell(one: Estimate, form: "Callable[[float], str]" = count) -> "Text":
    """The value and, dim below it, its interval."""
    from rich.text import Text

    cell = Text("?" if one.value is None else form(one.value))
    if one.ci95 is not None:
        low, high = one.ci95
        unsure = high > UNSURE_RATIO * max(low, 1e-300) and low > 0
        cell.append(f"\n[{form(low)}, {form(high)}]", style="yellow" if unsure else "dim")
    return cell


def _reach(factor: float, axis: str | None) -> "Text":
    from rich.text import Text

    return Text(Reach(factor=factor, axis=axis).words, style="" if axis is None else "yellow")


def _table(title: str, *columns: str, left: int = 1) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        last = index == len(columns) - 1
        table.add_column(column, justify="left" if index < left or last else "right", overflow="fold")
    return table


def _item(text: "Text") -> "Table":
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_row("-", text)
    return grid


def _said(*sentences: str) -> "list[RenderableType]":
    from rich.text import Text

    return [*(_item(Text(sentence)) for sentence in sentences), Text("")]


def _span(one: Estimate, form: "Callable[[float], str]" = count) -> str:
    """value [low, high] in one line."""
    value = "?" if one.value is None else form(one.value)
    return value if one.ci95 is None else f"{value} [{form(one.ci95[0])}, {form(one.ci95[1])}]"


# -------------------------------------------------------------------------------------------------------------- answers


def _loss(one: Forecast) -> "list[RenderableType]":
    from rich.text import Text

    heads = [f"{AXIS_LETTER[axis]} [{AXIS_UNIT[axis]}]" for axis in one.at]
    table = _table("Loss", *heads, "loss [nats/token]", "measured range", left=0)
    value = _cell(Estimate(value=one.loss_nats, ci95=one.ci95), nats)
    table.add_row(*(count(v) for v in one.at.values()), value, _reach(one.extrapolation, one.furthest))
    return [table, Text("")]


def _budgets(budgets: tuple[Budget, ...]) -> "list[RenderableType]":
    table = _table("Best split of a budget", "C [FLOPs]", "by", "N", "D", "D/N", "loss", "measured range", left=2)
    for one in budgets:
        f, r = one.fitted, one.rule
        table.add_row(
            f"{f.flops:.2e}",
            "this law, 6 N D",
            _cell(f.n_params),
            _cell(f.n_tokens),
            _cell(f.tokens_per_param),
            _cell(f.loss_nats, nats),
            _reach(f.extrapolation, f.furthest),
        )
        table.add_row(
            "",
            f"{r.tokens_per_param:g} tokens per N",
            count(r.n_params),
            count(r.n_tokens),
            f"{r.tokens_per_param:.3g}",
            _cell(r.loss_nats, nats),
            _reach(r.extrapolation, r.furthest),
        )
        if one.shapes is not None:
            s = one.shapes
            ratio = (s.n_tokens.value or 0.0) / (s.n_params.value or 1.0)
            table.add_row(
                "",
                "this law, exact FLOPs",
                _cell(s.n_params),
                _cell(s.n_tokens),
                count(ratio),
                _cell(s.loss_nats, nats),
                _reach(s.extrapolation, s.furthest),
            )
            table.add_row(
                "",
                f"best shape: L{s.n_layer} d{s.d_model}",
                count(s.shape_n_params),
                count(s.shape_n_tokens),
                count(s.shape_n_tokens / s.shape_n_params),
                nats(s.shape_loss_nats),
                _reach(s.extrapolation, s.furthest),
            )
        table.add_section()
    costs = [f"{_span(one.rule.above_best_nats, nats)} nats at {one.fitted.flops:.2e}" for one in budgets]
    return [table, *_said(f"20 tokens per parameter instead of this law's split costs {'; '.join(costs)} FLOPs.")]


def _partner(title: str, one: BestPartner) -> "list[RenderableType]":
    from rich.text import Text

    table = _table(title, "N", "D", "D/N", "C [FLOPs]", "loss [nats/token]", "measured range", left=0)
    table.add_row(
        _cell(one.n_params),
        _cell(one.n_tokens),
        _cell(one.tokens_per_param),
        _cell(one.flops),
        _cell(one.loss_nats, nats),
        _reach(one.extrapolation, one.furthest),
    )
    return [table, *(_said(f"C counts every matmul of {one.family}.") if one.family else [Text("")])]


def _more_tokens(one: MoreTokens) -> "list[RenderableType]":
    table = _table(
        f"More tokens for {count(one.n_params)} parameters after {count(one.n_tokens)} tokens",
        "doubled to",
        "loss",
        "gain",
        "gain/loss",
        "new model for that compute",
        "measured range",
        left=0,
    )
    for step in one.doublings:
        table.add_row(
            count(2 * step.from_tokens),
            _cell(step.loss_nats, nats),
            _cell(step.gain_nats, nats),
            percent(step.gain_frac),
            _cell(step.fresh_loss_nats, nats),
            _reach(step.extrapolation, step.furthest),
        )
    far = Reach(factor=one.extrapolation, axis=one.furthest).words
    return [
        table,
        *_said(
            f"A doubling gains {one.worth} or more up to {_span(one.worth_until_tokens)} tokens ({far}).",
            f"A doubling beats a new model at the best split of the same compute from "
            f"{_span(one.beats_fresh_from_tokens)} to {_span(one.beats_fresh_until_tokens)} tokens; below, this model "
            "is too large for its tokens, above too small.",
        ),
    ]


def _tokens_to_reach(one: TokensToReach) -> "list[RenderableType]":
    table = _table("Tokens to reach a loss", "N", "loss [nats/token]", "D", "C [FLOPs]", "measured range", left=0)
    table.add_row(
        count(one.n_params),
        nats(one.loss_nats),
        _cell(one.n_tokens),
        _cell(one.flops),
        _reach(one.extrapolation, one.furthest),
    )
    return [table, *_said(*_unreachable(one.unreachable_frac))]


def _unreachable(share: float) -> list[str]:
    if share == 0:
        return []
    return [f"In {percent(share)} of the draws this loss is never reached; the intervals are over the others."]


def _serving(one: ServingPlan) -> "list[RenderableType]":
    money = one.by_money is not None
    load = f"and {count(one.inference_tokens)} served tokens" if one.inference_tokens else "at the least training"
    table = _table(
        f"Loss {nats(one.quality_loss_nats.value or 0.0)} {load}", "model", "N", "D", "FLOPs",
        *(["USD"] if money else []), "saves", "measured range",
    )  # fmt: skip

    def row(name: str, life: Life, saves: "Text | str") -> None:
        usd = [] if life.usd is None else [_cell(life.usd, dollars)]
        cells = (_cell(life.n_params), _cell(life.n_tokens), _cell(life.flops))
        table.add_row(name, *cells, *usd, saves, _reach(life.extrapolation, life.furthest))

    row("as wanted" if one.inference_tokens else "cheapest to train", one.baseline, "")
    if one.inference_tokens:
        row("fewest FLOPs", one.by_flops, _cell(one.saved_flops_frac, percent))
    if one.by_money is not None and one.saved_usd_frac is not None:
        row("least money", one.by_money, _cell(one.saved_usd_frac, percent))
    said = _unreachable(one.unreachable_frac)
    if one.inference_tokens:
        said.append(f"Over its life the cheapest model saves {_span(one.saved_flops)} FLOPs at the same loss.")
    if one.saved_usd is not None:
        said.append(f"By money it saves {_span(one.saved_usd, dollars)}.")
    return [table, *_said(*said)]


def _cache(one: KvCache) -> "list[RenderableType]":
    table = _table("KV cache", "shape", "bytes/token", "context", "bytes/sequence", "weights", "sequences = weights")
    table.add_row(
        f"L{one.n_layer} d{one.d_model}, {one.bytes_per_element:g} bytes each",
        f"{one.bytes_per_token:,.0f}",
        f"{one.context_tokens:,}",
        size(one.bytes_per_sequence),
        "?" if one.weight_bytes is None else size(one.weight_bytes),
        "?" if one.sequences_as_weights is None else f"{one.sequences_as_weights:.3g}",
    )
    return [table, *_said("Keys and values of every layer, 2 x layers x width elements a token; arithmetic, no law.")]


def size(n_bytes: float) -> str:
    """Bytes in binary units."""
    for unit, limit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.3g} {unit}"
    return f"{n_bytes:.0f} B"
