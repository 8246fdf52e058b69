"""Answers as rich tables for 100 columns: a value, below it its interval, beside it how far it reaches."""

from typing import TYPE_CHECKING

from homelab_scaling.fit.advice import BestPartner, Budget, MoreTokens, RuleSplit, ShapeSplit
from homelab_scaling.fit.answers import Prediction
from homelab_scaling.fit.laws import AXIS_LETTER, AXIS_UNIT
from homelab_scaling.fit.predict import Forecast, Reach, Split
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
    for warning in made.warnings:
        page.append(_item(Text(warning, style="yellow"), mark="!"))
    page.append(Text("Taken for granted", style="bold"))
    page += [_item(Text(sentence)) for sentence in made.assumes]
    return page


def _heading(made: Prediction) -> str:
    known = dict(made.ranges)
    if made.budget_range_flops is not None:
        known.setdefault("flops", made.budget_range_flops)
    spans = [
        f"{AXIS_LETTER.get(axis, axis)} {' to '.join((flops if axis == 'flops' else count)(end) for end in ends)}"
        for axis, ends in known.items()
    ]
    return f"law {made.law}, measured over {', '.join(spans)}; {made.interval}"


# --------------------------------------------------------------------------------------------------------------- cells


def count(value: float) -> str:
    """Three digits: 124M, 3.00e18, 4.10e-07."""
    return flops(value) if value >= 1e15 or 0 < value < 0.01 else short(value)


def flops(value: float) -> str:
    """3.00e18."""
    return f"{value:.2e}".replace("e+", "e")


def nats(value: float) -> str:
    return f"{value:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if abs(share) < 10 else f"{100 * share:,.0f} %"


def dollars(usd: float) -> str:
    if abs(usd) >= 1e4:
        return f"${short(usd)}"
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:,.2f}" if usd >= 0.1 else f"${usd:.2g}"


def _cell(one: Estimate, form: "Callable[[float], str]" = count) -> "Text":
    """The value and, dim below it, its interval."""
    from rich.text import Text

    cell = Text("?" if one.value is None else form(one.value))
    if one.ci95 is not None and one.ci95[0] < one.ci95[1]:
        low, high = one.ci95
        unsure = high > UNSURE_RATIO * max(low, 1e-300) and low > 0
        cell.append(f"\n{_ends(low, high, form)}", style="yellow" if unsure else "dim")
    return cell


def _ends(low: float, high: float, form: "Callable[[float], str]") -> str:
    """[low, high], a unit said once."""
    return f"[{form(low).removesuffix(' %')}, {form(high)}]".replace(" %]", "] %")


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


def _item(text: "Text", mark: str = "-") -> "Table":
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_row(mark, text)
    return grid


def _said(*sentences: str) -> "list[RenderableType]":
    from rich.text import Text

    return [*(_item(Text(sentence)) for sentence in sentences), Text("")]


def _span(one: Estimate, form: "Callable[[float], str]" = count) -> str:
    """value [low, high] in one line."""
    value = "?" if one.value is None else form(one.value)
    return value if one.ci95 is None else f"{value} {_ends(*one.ci95, form)}"


# -------------------------------------------------------------------------------------------------------------- answers


def _loss(one: Forecast) -> "list[RenderableType]":
    from rich.text import Text

    heads = [f"{AXIS_LETTER[axis]} [{AXIS_UNIT[axis]}]" for axis in one.at]
    table = _table("Loss", *heads, "loss [nats/token]", "range", left=0)
    value = _cell(Estimate(value=one.loss_nats, ci95=one.ci95), nats)
    table.add_row(*(count(v) for v in one.at.values()), value, _reach(one.extrapolation, one.furthest))
    return [table, Text("")]


def _budgets(budgets: tuple[Budget, ...]) -> "list[RenderableType]":
    page: list[RenderableType] = []
    for one in budgets:
        f, r, s = one.fitted, one.rule, one.shapes
        table = _table(f"Best split of C = {flops(f.flops)} FLOPs", "by", "N", "D", "D/N", "loss [nats]", "range")

        def row(by: str, *cells: "Text | str", table: "Table" = table) -> None:
            table.add_row(by, *cells)

        ratio = f"{r.tokens_per_param:g}"
        row("law, 6 N D", _cell(f.n_params), _cell(f.n_tokens), _cell(f.tokens_per_param), *_tail(f))
        row(f"{ratio} tokens/N", count(r.n_params), count(r.n_tokens), ratio, *_tail(r))
        if s is not None:
            row("law, exact C", _cell(s.n_params), _cell(s.n_tokens), _cell(s.tokens_per_param), *_tail(s))
            real = (s.shape_n_params, s.shape_n_tokens, s.shape_n_tokens / s.shape_n_params)
            loss = Estimate(value=s.shape_loss_nats)
            row(
                f"  L{s.n_layer} d{s.d_model}",
                *(count(v) for v in real),
                _cell(loss, nats),
                _reach(s.extrapolation, s.furthest),
            )
        above = _span(r.above_best_nats, nats)
        page += [table, *_said(f"{ratio} tokens per parameter instead of the law's split costs {above} nats.")]
    return page


def _tail(one: "Split | RuleSplit | ShapeSplit") -> "tuple[Text, Text]":
    return _cell(one.loss_nats, nats), _reach(one.extrapolation, one.furthest)


def _partner(title: str, one: BestPartner) -> "list[RenderableType]":
    from rich.text import Text

    table = _table(title, "N", "D", "D/N", "C [FLOPs]", "loss [nats/token]", "range", left=0)
    table.add_row(
        _cell(one.n_params),
        _cell(one.n_tokens),
        _cell(one.tokens_per_param),
        _cell(one.flops, flops),
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
        "new model",
        "range",
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
            f"Doubling beats a new model at the best split of the same compute from "
            f"{_span(one.beats_fresh_from_tokens)} to {_span(one.beats_fresh_until_tokens)} tokens; below, this "
            "model is too large for its tokens, above too small.",
        ),
    ]


def _tokens_to_reach(one: TokensToReach) -> "list[RenderableType]":
    table = _table("Tokens to reach a loss", "N", "loss [nats/token]", "D", "C [FLOPs]", "range", left=0)
    table.add_row(
        count(one.n_params),
        nats(one.loss_nats),
        _cell(one.n_tokens),
        _cell(one.flops, flops),
        _reach(one.extrapolation, one.furthest),
    )
    return [table, *_said(*_unreachable(one.unreachable_frac))]


def _unreachable(share: float) -> list[str]:
    if share == 0:
        return []
    return [f"In {percent(share)} of the draws this loss is never reached; the intervals are over the others."]


def _serving(one: ServingPlan) -> "list[RenderableType]":
    loss = nats(one.quality_loss_nats.value or 0.0)
    if not one.inference_tokens:
        table = _table(f"Cheapest training to a loss of {loss}", "N", "D", "C [FLOPs]", "range", left=0)
        table.add_row(*_life(one.baseline), _cell(one.baseline.flops, flops), _tail_of(one.baseline))
        return [table, *_said(*_unreachable(one.unreachable_frac))]
    title = f"Loss {loss} and {count(one.inference_tokens)} served tokens"
    table = _table(f"{title}: by FLOPs", "model", "N", "D", "FLOPs", "saves", "range")
    for name, life, saves in (
        ("as wanted", one.baseline, ""),
        ("fewest FLOPs", one.by_flops, _cell(one.saved_flops_frac, percent)),
    ):
        table.add_row(name, *_life(life), _cell(life.flops, flops), saves, _tail_of(life))
    said = [f"Over its life it saves {_span(one.saved_flops, flops)} FLOPs at the same loss."]
    page: list[RenderableType] = [table, *_said(*said, *_unreachable(one.unreachable_frac))]
    if one.by_money is None or one.saved_usd is None or one.saved_usd_frac is None:
        return page
    table = _table(f"{title}: by money", "model", "N", "D", "USD", "saves", "range")
    for name, life, saves in (
        ("as wanted", one.baseline, ""),
        ("fewest FLOPs", one.by_flops, ""),
        ("least money", one.by_money, _cell(one.saved_usd_frac, percent)),
    ):
        cost = "?" if life.usd is None else _cell(life.usd, dollars)
        table.add_row(name, *_life(life), cost, saves, _tail_of(life))
    return [*page, table, *_said(f"Over its life it saves {_span(one.saved_usd, dollars)} at the same loss.")]


def _life(life: Life) -> "tuple[Text, Text]":
    return _cell(life.n_params), _cell(life.n_tokens)


def _tail_of(life: Life) -> "Text":
    return _reach(life.extrapolation, life.furthest)


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
