"""The section on batches: how large each rung's batch was, how large it may be, and what the choice costs."""

from collections.abc import Callable, Sequence

from homelab_scaling.batch.branch_fit import BranchResult
from homelab_scaling.batch.calibration import UNCALIBRATED
from homelab_scaling.batch.critical import Estimate
from homelab_scaling.batch.priors import KAPLAN_LOSS_EXPONENT, kaplan_critical_tokens
from homelab_scaling.batch.table import Row as Trade
from homelab_scaling.batch.trials import SweepResult
from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.noise import RungBatch
from homelab_scaling.report.words import duration, known, money, plural, sentence

SAME_FRAC = 0.005
"""Differences below this share are not worth words."""
SIGNS = {None: ("", ""), "at least": ("≥ ", "≤ "), "at most": ("≤ ", "≥ ")}
"""Before a B_crit that is a bound, and before the tokens that follow from it."""
AGAINST = "why, or what the batch taken costs against it"


def batches(view: LabView, images: Sequence[Block] = ()) -> list[Block]:
    """Tables, sentences and figures of the batch; nothing where neither a run nor a probe measured anything."""
    rungs = view.batches.rungs
    if not rungs:
        return []
    blocks: list[Block] = [Heading(text="Batch"), Paragraph(text=_answer(rungs)), _sizes(rungs)]
    costs = _costs(rungs)
    blocks += [costs] if costs else []
    advice = view.batches.advice
    blocks += [_sweep(advice.sweep)] if advice and advice.sweep else []
    blocks += [_branches(advice.branch)] if advice and advice.branch else []
    said = _sentences(view)
    blocks += [Bullets(items=tuple(said))] if said else []
    return [*blocks, *images]


def _answer(rungs: Sequence[RungBatch]) -> str:
    """The tokens that the batches cost, in a sentence or two."""
    shares = [(r.overhead_frac, r) for r in rungs if r.overhead_frac is not None]
    if not shares:
        return (
            "The noise scale was measured, but nowhere well enough for a number: the batches cannot be judged by it "
            "(lower bounds are in the table)."
        )
    trained = all(r.trained for _, r in shares)
    low, high = _percent(min(share for share, _ in shares)), _percent(max(share for share, _ in shares))
    sides = {r.side for _, r in shares}
    about = "at most" if sides <= {"at least", None} and any(sides) else "at least" if sides == {"at most"} else "about"
    who = f"At the batches used, the runs took {about}" if trained else f"At the batches advised, runs take {about}"
    text = (
        f"{who} {low if low == high else f'{low} to {high}'} more tokens than very small batches need for the same "
        f"loss (B / B_crit, {len(shares)} rung{plural(len(shares))})."
    )
    if not any(r.is_calibrated for _, r in shares):
        text += f" This is {UNCALIBRATED.replace('--verify', '`homelab batch-size --verify`')}."
    return text


def _sizes(rungs: Sequence[RungBatch]) -> Grid:
    rows = []
    for r in rungs:
        seqs = "–" if r.context_tokens is None else f"{r.batch_tokens / r.context_tokens:,.0f}"
        bound = max((p.at_least for p in r.noise if p.at_least is not None), default=None)
        simple = _value(r.b_simple) if r.b_simple or bound is None else f"≥ {short(bound)}"
        sign, over_sign = SIGNS[r.side]
        over = "–" if r.overhead_frac is None else over_sign + _percent(r.overhead_frac)
        crit = (sign + _value(r.b_crit), "–" if r.side else _interval(r.b_crit), r.basis)
        rows.append((r.rung, f"{r.batch_tokens:,}", over, *crit, simple, _interval(r.b_simple), seqs))
    caption = (
        "Batches in tokens, the last column in sequences. Extra tokens: B / B_crit, above what a very small batch "
        "needs for the same loss; at B_crit it is twice the tokens. B_simple is the noise scale at the middle of the "
        "run with its 95 % interval: by the run's own windows where it measured them, else by a probe before it."
    )
    if not all(r.trained for r in rungs):
        waiting = [r.rung for r in rungs if not r.trained]
        caption += f" Advised, not trained yet: {listed(waiting)}."
    return Grid(
        head=("rung", "batch", "extra tokens", "B_crit", "95 %", "from", "B_simple", "95 % ", "sequences"),
        rows=tuple(rows),
        left=frozenset({"rung", "from"}),
        caption=caption,
    )


# ----------------------------------------------------------------------------------------------- the cost of the choice


def _costs(rungs: Sequence[RungBatch]) -> Grid | None:
    """What each rung's batch costs against the best ones of its trade-off table; without one, against a small batch."""
    rows = [line for r in rungs if r.taken is not None for line in _against(r, r.taken)]
    if rows:
        head, cells = _known_columns(("rung", "batch", "which", "tokens", "time", "kWh", "cost", AGAINST), rows)
        return Grid(
            head=head,
            rows=cells,
            left=frozenset({"rung", "which", AGAINST}),
            caption="To one and the same loss: that of the longest horizon at a very small batch. Speeds are measured "
            "where this batch was run on this machine, otherwise the cost model's.",
        )
    alone = [line for r in rungs if (line := _flat(r)) is not None]
    if not alone:
        return None
    head, cells = _known_columns(("rung", "batch", "tokens above need", "share", "time", "kWh", "cost"), alone)
    return Grid(
        head=head,
        rows=cells,
        left=frozenset({"rung"}),
        caption="What the ladder's own batch costs at the longest horizon: the tokens above those that a very small "
        "batch would need for the loss it reached, and their share of the row's time, energy and money at the same "
        f"speed (a smaller batch may be slower). {sentence(_how(rungs))}",
    )


def _how(rungs: Sequence[RungBatch]) -> str:
    if not any(r.is_calibrated for r in rungs):
        return "uncalibrated: B_crit is taken to be B_simple as the runs measured it, and may be off by factors"
    return "B_crit is the calibrated multiple of B_simple as the runs measured it"


def _known_columns(
    head: tuple[str, ...], rows: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Without the columns of which nothing is known."""
    kept = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return tuple(head[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows)


def _against(r: RungBatch, taken: Trade) -> list[tuple[str, ...]]:
    """The row taken, the one advised where it is another, the fastest and the one of fewest tokens."""
    assert r.advice is not None
    rows = r.trades
    is_advised = r.advice.batch_tokens == r.batch_tokens
    lines = [(r.rung, *_trade(taken, "taken"), r.advice.why if is_advised else "")]
    others = [(row, "advised") for row in rows if row.batch_tokens == r.advice.batch_tokens]
    timed = [row for row in rows if row.seconds is not None]
    if timed:
        others.append((min(timed, key=lambda row: row.seconds or 0.0), "fastest"))
    others.append((min(rows, key=lambda row: row.tokens), "fewest tokens"))
    names: dict[int, list[str]] = {}
    for row, which in others:
        names.setdefault(row.batch_tokens, []).append(which)
    for row in dict.fromkeys(row for row, _ in others):
        if row.batch_tokens != taken.batch_tokens:
            lines.append(("", *_trade(row, ", ".join(names[row.batch_tokens])), _difference(taken, row)))
    also = names.get(taken.batch_tokens, [])
    lines[0] = (*lines[0][:2], ", ".join(["taken"] * r.trained + also), *lines[0][3:])
    return lines


def _trade(row: Trade, which: str) -> tuple[str, ...]:
    return (
        f"{row.batch_tokens:,}",
        which,
        short(row.tokens),
        "–" if row.seconds is None else duration(row.seconds),
        "–" if row.kwh is None else f"{row.kwh:.2g}",
        "–" if row.usd is None else money(row.usd),
    )


def _difference(taken: Trade, other: Trade) -> str:
    """What the row taken costs more or less than another, in words."""
    times = f" (x {taken.seconds / other.seconds:.2g})" if taken.seconds and other.seconds else ""
    parts: list[tuple[float | None, float | None, Callable[[float], str]]] = [
        (taken.tokens, other.tokens, lambda n: f"{short(n)} tokens"),
        (taken.seconds, other.seconds, lambda s: f"{duration(s)}{times}"),
        (taken.kwh, other.kwh, lambda kwh: f"{kwh:.2g} kWh"),
        (taken.usd, other.usd, money),
    ]
    said = []
    for mine, theirs, words in parts:
        if mine is None or not theirs or abs(mine / theirs - 1) < SAME_FRAC:
            continue
        said.append(f"{'+' if mine > theirs else '−'}{words(abs(mine - theirs))}")
    return ", ".join(said)


def _flat(r: RungBatch) -> tuple[str, ...] | None:
    """What B / B_crit costs of what was spent, at equal speed."""
    if r.overhead_frac is None:
        return None
    share = r.overhead_frac / (1 + r.overhead_frac)
    row = r.row
    parts = (row.seconds, row.kwh, row.usd) if row else (None, None, None)
    forms: tuple[Callable[[float], str], ...] = (duration, "{:.2g}".format, money)
    cells = ("–" if part is None else form(share * part) for part, form in zip(parts, forms, strict=True))
    return (r.rung, f"{r.batch_tokens:,}", short(share * r.n_tokens), _percent(share), *cells)


# ------------------------------------------------------------------------------------------------------------ the rest


def _sweep(sweep: SweepResult) -> Grid:
    fit = sweep.trade_off
    rows = tuple(
        (
            f"{trial.batch_tokens:,}",
            f"{trial.lr_peak:.2e}",
            f"{trial.n_steps or 0:,.0f}",
            f"{fit.steps(trial.batch_tokens):,.0f}",
            short((trial.n_steps or 0) * trial.batch_tokens),
            short(fit.examples(trial.batch_tokens)),
        )
        for trial in sweep.best
    )
    notes = f" {sentence('; '.join(sweep.notes))}" if sweep.notes else ""
    return Grid(
        head=("batch", "best lr", "steps S", "hyperbola", "tokens E", "hyperbola "),
        rows=rows,
        left=frozenset(),
        caption=f"The sweep on {sweep.rung}: steps and tokens to a held-out loss of {sweep.target_nats:.3f} nats, the "
        f"fastest rate of each batch.{notes}",
    )


def _branches(found: BranchResult) -> Grid:
    rows = tuple(
        (
            f"{one.batch_tokens:,}",
            f"{one.lr:.2e}",
            "diverged" if one.loss_nats is None else f"{one.loss_nats:.4f} ± {2 * (one.sd_nats or 0.0):.4f}",
            known(one.expected_nats, ".4f"),
            known(one.token_ratio, ".2f"),
        )
        for one in found.branches
    )
    return Grid(
        head=("batch", "lr", "loss", "hyperbola", "tokens per token"),
        rows=rows,
        left=frozenset(),
        caption=f"The branch test on {found.rung}: one checkpoint after {short(found.start_tokens)} tokens, trained on "
        f"for {short(found.delta_tokens)} tokens with each batch. Loss with two standard errors of its difference to "
        "the smallest batch; the last column is how many tokens it needs for one of the smallest's.",
    )


def _sentences(view: LabView) -> list[str]:
    found, advice = view.batches, view.batches.advice
    said: list[str] = []
    if advice is not None:
        if advice.calibration.method != "uncalibrated":
            said.append(sentence(advice.calibration.sentence))
        if advice.sweep is not None:
            said.append(_bend(advice.sweep))
        if advice.branch is not None:
            said += [sentence(advice.branch.words), *(sentence(note) for note in advice.branch.notes)]
        if advice.law is not None:
            said.append(sentence(advice.law.compare()))
        elif advice.why_no_law:
            said.append(sentence(f"no law of B_crit over the ladder: {advice.why_no_law}"))
    said += _beside_kaplan(found.rungs)
    said += [text for r in found.rungs if (text := _foretold(r)) is not None]
    said += [text for r in found.rungs if (text := _warm_up(r)) is not None]
    return said


def _bend(sweep: SweepResult) -> str:
    fit, bend = sweep.trade_off, sweep.trade_off.bend
    judged = (
        "too few batches to judge whether the hyperbola holds"
        if bend.p is None
        else f"the hyperbola is {'missed' if bend.doubted else 'not contradicted'} (free exponent "
        f"{bend.exponent:.2f}, p = {bend.p:.2g})"
    )
    return (
        f"The sweep on {sweep.rung}: S_min {_both(fit.s_min)} steps, E_min {_both(fit.e_min)} tokens, B_crit "
        f"{_both(fit.b_crit)} tokens; scatter {100 * fit.rms:.1f} %; {judged}."
    )


def _beside_kaplan(rungs: Sequence[RungBatch]) -> list[str]:
    """How far measured B_crit lie from Kaplan's formula at the loss they were measured at."""
    ratios = []
    for r in rungs:
        loss = r.advice.measured.loss_nats if r.advice and r.advice.measured else None
        if loss is not None and r.b_crit is not None and r.advice and r.advice.basis == "measured":
            ratios.append(kaplan_critical_tokens(loss) / r.b_crit.value)
    if not ratios:
        return []
    side = "above" if min(ratios) >= 1 else "below" if max(ratios) <= 1 else "around"
    low, high = sorted((x if side != "below" else 1 / x) for x in (min(ratios), max(ratios)))
    times = f"{brief(low)}" if f"{low:.2g}" == f"{high:.2g}" else f"{low:.2g} to {high:.2g}"
    head = f"Kaplan's formula, 2e8 L^{KAPLAN_LOSS_EXPONENT:.2f}, lies"
    return [f"{head} a factor of {times} {side} what was measured, for {len(ratios)} rung{plural(len(ratios))}."]


def _foretold(r: RungBatch) -> str | None:
    """The probe's forecast for the middle of the run beside what the run had there."""
    told, own = r.foretold, r.in_run
    if r.advice is not None and r.advice.surprise is not None:
        return sentence(f"{r.rung}: {r.advice.surprise}")
    if told is None or own is None:
        return None
    inside = told.low <= own.value <= told.high
    return (
        f"{r.rung}: B_simple at the middle of the run was {short(own.value)} tokens, "
        f"{'inside' if inside else 'outside'} what the probe had foretold, {_both(told)}."
    )


def _warm_up(r: RungBatch) -> str | None:
    run = next((run for run in r.runs if run.batches), None)
    if run is None:
        return None
    steps = [f"{one.batch_tokens:,} from {short(one.tokens)} tokens on" for one in run.batches]
    return f"{r.rung}: the batch was warmed up: {listed(steps)}."


def _percent(frac: float) -> str:
    """4.5 %, 16 %, on one line."""
    return f"{100 * frac:.1f}\u00a0%" if frac < 0.0995 else f"{100 * frac:.0f}\u00a0%"


def _value(x: Estimate | None) -> str:
    return "–" if x is None else short(x.value)


def _interval(x: Estimate | None) -> str:
    return "–" if x is None else f"[{short(x.low)}, {short(x.high)}]"


def _both(x: Estimate) -> str:
    return f"{short(x.value)} {_interval(x)}"
