"""The tables of a report: what was run, the fitted laws, the predictions."""

import math
from collections.abc import Iterable
from dataclasses import replace

from homelab_scaling.fit.laws import get_law
from homelab_scaling.fit.predict import draws_of, predict_loss, predict_split
from homelab_scaling.fit.result import Estimate, FitReport, ScalingFit
from homelab_scaling.fit.words import listed, number, short
from homelab_scaling.report.bills import energy_and_money
from homelab_scaling.report.collect import LabView, RunView
from homelab_scaling.report.corpus import sources
from homelab_scaling.report.document import Block, Bullets, Grid, Heading
from homelab_scaling.report.words import (
    duration,
    interval_text,
    known,
    loss_text,
    main_fit,
    money,
    plural,
    r2_text,
    rows_words,
    value_text,
)
from homelab_scaling.runs import Machine


def what_was_run(view: LabView) -> list[Block]:
    """Machine, text, settings and the table of rows."""
    blocks: list[Block] = [Heading(text="What was run")]
    lines = [*_machine_lines(view), *_text_lines(view), *_recipe_lines(view)]
    if lines:
        blocks.append(Bullets(items=tuple(lines)))
    blocks += sources(view)
    if view.rows:
        blocks += [_rows_table(view), *energy_and_money(view)]
    unfinished = [run for run in view.runs if run.status != "finished"]
    if unfinished:
        rows = tuple(
            (run.rung, short(run.n_params), run.run_id, run.status, (run.record.reason if run.record else None) or "–")
            for run in unfinished
        )
        blocks.append(
            Grid(
                head=("rung", "N", "run", "status", "why"),
                rows=rows,
                left=frozenset({"rung", "run", "status", "why"}),
                caption="Runs that did not finish; what they measured before is kept, what they did not measure is not "
                "guessed.",
            )
        )
    return blocks


def _machine_lines(view: LabView) -> list[str]:
    machines = dict.fromkeys(r.record.machine for r in view.runs if r.record)
    commits: dict[Machine, list[str]] = {}
    for machine in machines:
        commits.setdefault(replace(machine, git_commit=None), []).extend(filter(None, [machine.git_commit]))
    lines = []
    for m, own in sorted(commits.items(), key=lambda item: (item[0].device, item[0].n_processes)):
        commit = f", commit{plural(len(own))} {listed([f'`{c}`' for c in own])}" if own else ""
        lines.append(
            f"Machine: {m.device}, {m.n_processes} process{'es' if m.n_processes > 1 else ''}; Python {m.python}, "
            f"torch {m.torch}, accelerate {m.accelerate}, transformers {m.transformers}, "
            f"homelab_scaling {m.homelab_scaling}{commit}."
        )
    return lines


def _text_lines(view: LabView) -> list[str]:
    if view.corpus is not None:
        c = view.corpus
        bytes_per_token = f", {c.train.n_bytes / c.train.n_tokens:.2f} bytes per token" if c.train.n_bytes else ""
        return [
            f"Text: {listed(list(c.sources))}; tokenizer {c.tokenizer} with {c.n_vocab:,} ids; "
            f"{short(c.train.n_tokens)} training and {short(c.val.n_tokens)} held-out tokens"
            f"{bytes_per_token}. Held out: {c.held_out_rule}."
        ]
    sciences = {(r.spec.science.n_vocab, r.spec.science.val_tokens) for r in view.runs if r.spec is not None}
    return [
        f"Text: {vocab:,} token ids; losses are measured on {short(val)} held-out tokens, the same for every rung."
        for vocab, val in sorted(sciences)
    ]


def _recipe_lines(view: LabView) -> list[str]:
    sciences = [run.spec.science for run in view.runs if run.spec is not None]
    if not sciences:
        return []

    def all_of(values: Iterable[object]) -> str:
        return listed([str(v) for v in dict.fromkeys(values)])

    seeds = list(dict.fromkeys(s.seed for s in sciences))
    begun = [run for run in view.runs if run.spec is not None and run.spec.science.start is not None]
    decays = all_of(f"{100 * s.schedule.decay_frac:g} %" for s in sciences if s.schedule.name == "wsd")
    with_decay = f" with {decays} decay" if decays else ""  # a cosine falls all the way
    return [
        f"Recipe: context {all_of(s.shape.context_tokens for s in sciences)} tokens, "
        f"{all_of(s.optim.name for s in sciences)}, {all_of(s.precision for s in sciences)}, schedule "
        f"{all_of(s.schedule.name for s in sciences)}{with_decay}, "
        f"seed{plural(len(seeds))} {listed([str(s) for s in seeds])}. Only decayed losses are rows.",
        *([_begun_line(begun)] if begun else []),
    ]


def _begun_line(begun: list[RunView]) -> str:
    weights = {(run.spec.science.start, run.spec.execution.start_name) for run in begun if run.spec is not None}
    named = listed(sorted(f"`{name}` (SHA-256 {(sha or '')[:12]})" for sha, name in weights))
    return (
        f"Not from random weights: {listed([run.run_id for run in begun])} began from those of {named}, and what these "
        "were trained with is in no figure here."
    )


def _rows_table(view: LabView) -> Grid:
    columns: list[tuple[str, list[str]]] = [
        ("rung", [r.rung for r in view.rows]),
        ("N", [short(r.n_params) for r in view.rows]),
        ("D", [short(r.n_tokens) for r in view.rows]),
        ("steps", [f"{r.n_steps:,}" for r in view.rows]),
        ("batch", [f"{r.batch_tokens:,}" for r in view.rows]),
        ("lr", [known(r.lr_peak, ".2g") for r in view.rows]),
        ("loss ± se", [loss_text(r) for r in view.rows]),
        ("bits/byte", [known(r.bpb, ".3f") for r in view.rows]),
        ("FLOPs", [f"{r.flops:.2e}" for r in view.rows]),
        ("time", ["–" if r.seconds is None else duration(r.seconds) for r in view.rows]),
        ("tokens/s", ["–" if r.tokens_per_s is None else short(r.tokens_per_s) for r in view.rows]),
        ("MFU", [known(None if r.mfu_frac is None else 100 * r.mfu_frac, ".1f", " %") for r in view.rows]),
        ("kWh", [known(r.kwh, ".3g") for r in view.rows]),
        ("cost", ["–" if r.usd is None else money(r.usd) for r in view.rows]),
    ]
    seeds = {r.seed for r in view.rows}
    if len(seeds) > 1:
        columns.insert(1, ("seed", [str(r.seed) for r in view.rows]))
    kept = [(head, cells) for head, cells in columns if any(cell != "–" for cell in cells)]
    gone = [head for head, cells in columns if all(cell == "–" for cell in cells)]
    caption = (
        "One line per finished decay. Loss in nats per token on held-out text, with its standard error over documents; "
        "FLOPs, time and cost as if the row had been run alone (rows of one trunk share most of their bill)."
    )
    if gone:
        caption += f" Not known here: {listed(gone)}{_why_unknown(view, gone)}."
    return Grid(
        head=tuple(head for head, _ in kept),
        rows=tuple(zip(*(cells for _, cells in kept), strict=True)),
        left=frozenset({"rung"}),
        caption=caption,
    )


UNKNOWN_COLUMNS = {"kWh": "kwh", "cost": "usd", "MFU": "mfu_frac", "tokens/s": "tokens_per_s"}


def _why_unknown(view: LabView, gone: list[str]) -> str:
    wanted = {UNKNOWN_COLUMNS[head] for head in gone if head in UNKNOWN_COLUMNS}
    unknown = [run.record.unknown for run in view.runs if run.record]
    reasons = dict.fromkeys(why for one in unknown for column, why in one.items() if column in wanted)
    return f" ({'; '.join(reasons)})" if reasons else ""


# ----------------------------------------------------------------------------------------------------------------- laws


def laws(view: LabView) -> list[Block]:
    """The table of parameters, and the same laws at other D or N."""
    if view.fit is None:
        return []
    main = view.fit.main
    blocks: list[Block] = [
        Heading(text="The laws"),
        Grid(
            head=("law", "rows", "parameters with 95 % intervals", "R²"),
            rows=tuple(_law_row(fit) for fit in main),
            left=frozenset({"law", "rows", "parameters with 95 % intervals"}),
            caption=_laws_caption(view.fit, main),
        ),
    ]
    others = [fit for fit in view.fit.fits if fit not in main]
    if others:
        blocks.append(
            Grid(
                head=("law", "rows", "points", "exponent", "95 % interval", "R²"),
                rows=tuple(
                    (
                        get_law(fit.law).title,
                        rows_words(fit),
                        str(fit.n_points),
                        value_text(fit.derived["exponent"]),
                        interval_text(fit.derived["exponent"]),
                        r2_text(fit),
                    )
                    for fit in others
                ),
                left=frozenset({"law", "rows"}),
                caption="The same laws at the other token counts and sizes: exponents that drift from line to line "
                "mean that the straight line is local. Their warnings are in fit/fit.json.",
            )
        )
    return blocks


def _law_row(fit: ScalingFit) -> tuple[str, ...]:
    law = get_law(fit.law)
    if not fit.is_fitted:
        return (law.formula, rows_words(fit), fit.status, "–")
    said = [f"{name} = {number(value)} given" for name, value in law.pinned]
    same = law.exponents[1:] if law.tied else ()
    said += [f"{k} {_with_interval(e)}" for k, e in fit.parameters.items() if k not in law.fixed and k not in same]
    if law.splits and not law.tied:
        said.append(f"a {_with_interval(fit.derived['a'])}")
    # No break inside a parameter, so that lines end between two of them.
    return (law.formula, rows_words(fit), ", ".join(text.replace(" ", "\u00a0") for text in said), r2_text(fit))


def _with_interval(e: Estimate) -> str:
    value = "not pinned down" if e.value is None else f"= {number(e.value)}"
    return value if e.ci95 is None else f"{value} {interval_text(e)}"


def _laws_caption(report: FitReport, main: list[ScalingFit]) -> str:
    counted = {
        "total": "N counts every parameter",
        "body": "N counts the blocks only, no embedding or head",
        "body+head": "N counts the blocks and the output head",
    }
    methods = list(dict.fromkeys(fit.interval for fit in main if fit.draws_file))
    fitted = [fit for fit in main if fit.objective_value is not None]
    converged = sum(fit.status.startswith("converged") for fit in fitted)
    objectives = list(dict.fromkeys(fit.objective for fit in fitted))
    text = f"{counted.get(report.count, report.count)}. Objective: {listed(objectives or [report.objective])}"
    text += f"; {converged} of {len(fitted)} fits reached a certified optimum." if fitted else "."
    if methods:
        text += f" Intervals: {'; '.join(methods)}, {report.n_bootstrap:,} resamples, seed {report.seed}."
    return text + " R² is in log-log; a is the exponent of the best N against compute (of the best D it is 1 - a)."


# ---------------------------------------------------------------------------------------------------------- predictions


def predictions(view: LabView) -> list[Block]:
    """Losses and best splits inside and just outside the range, with interval and reach."""
    if view.fit is None:
        return []
    blocks: list[Block] = []
    joint = view.study.joint
    sized = main_fit(view.fit, "power-n")
    if joint is not None:
        blocks = [_loss_table(view.fit, joint.fit), _split_table(view.fit, joint.fit)]
    elif sized is not None and view.fit.draws.get(sized.draws_file or ""):
        blocks = [_loss_table(view.fit, sized)]
    return [Heading(text="Predictions"), *blocks] if blocks else []


def _loss_table(report: FitReport, fit: ScalingFit) -> Grid:
    drawn = draws_of(report, fit)
    (n_low, n_high) = fit.ranges["n_params"]
    points = [(math.sqrt(n_low * n_high), 1.0), (n_high, 1.0), (2 * n_high, 1.0), (4 * n_high, 1.0)]
    d_high = fit.ranges.get("n_tokens", (0.0, 0.0))[1]
    if d_high:
        points += [(n_high, 2.0), (4 * n_high, 4.0)]
    rows = []
    for n, times in points:
        at = {"n_params": n} | ({"n_tokens": times * d_high} if d_high else {})
        one = predict_loss(fit, drawn, **at)
        rows.append(
            (
                short(n),
                short(times * d_high) if d_high else rows_words(fit).removeprefix("D = ").removesuffix(" tokens"),
                f"{one.loss_nats:.3f}",
                "–" if one.ci95 is None else f"[{one.ci95[0]:.3f}, {one.ci95[1]:.3f}]",
                "inside" if one.extrapolation <= 1.0000001 else f"x {one.extrapolation:.3g} outside",
            )
        )
    scatter = f" A single run scatters around the law by about {100 * fit.sigma_log:.1f} %." if fit.sigma_log else ""
    return Grid(
        head=("N", "D", "loss", "95 % interval", "range"),
        rows=tuple(rows),
        left=frozenset({"range"}),
        caption=f"Loss in nats per token by {get_law(fit.law).title}, on this text with this recipe. The interval is "
        f"that of the law.{scatter} Outside the range the law is assumed to go on unchanged.",
    )


def _split_table(report: FitReport, fit: ScalingFit) -> Grid:
    drawn = draws_of(report, fit)
    largest = 6 * fit.ranges["n_params"][1] * fit.ranges["n_tokens"][1]
    rows = []
    for times in (0.1, 1.0, 10.0, 100.0):
        split = predict_split(fit, drawn, times * largest)
        cells = [f"{split.flops:.2e}"]
        for e in (split.n_params, split.n_tokens):
            cells += [short(e.value or 0), "–" if e.ci95 is None else f"[{_big(e.ci95[0])}, {_big(e.ci95[1])}]"]
        low_high = split.loss_nats.ci95
        cells.append(
            f"{split.loss_nats.value:.3f}" + ("" if low_high is None else f" [{low_high[0]:.3f}, {low_high[1]:.3f}]")
        )
        cells.append("inside" if split.extrapolation <= 1.0000001 else f"x {split.extrapolation:.3g} outside")
        rows.append(tuple(cells))
    return Grid(
        head=("C = 6 N D", "best N", "95 %", "best D", "95 % ", "loss", "range"),
        rows=tuple(rows),
        left=frozenset({"range"}),
        caption=f"The split of a budget that {get_law(fit.law).title} prefers, counting 6 N D FLOPs. The range says "
        "how far the budget, the best N or the best D, whichever is worst, lies outside what was measured.",
    )


def _big(value: float) -> str:
    return short(value) if 1e-3 < value < 1e15 else f"{value:.0e}"
