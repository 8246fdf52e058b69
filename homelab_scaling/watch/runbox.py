"""The run in focus, as lines of a given width in the order of the screen, each with its importance."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from homelab_scaling.watch import words
from homelab_scaling.watch.ahead import duration
from homelab_scaling.watch.bars import Part, Series, bar, binned, chart, cut, fit, padded, part, spark
from homelab_scaling.watch.batchbox import batch_line, batch_part
from homelab_scaling.watch.frame import ACTIVE, Cost, Frame, Point, RunNow, RunState, Span

STATE_STYLE: dict[RunState, str] = {
    "queued": "dim",
    "starting": "cyan",
    "running": "bold green",
    "slowed": "bold yellow",
    "paused": "bold yellow",
    "silent": "bold yellow",
    "interrupted": "bold yellow",
    "finished": "green",
    "stopped": "bold yellow",
    "diverged": "bold red",
    "failed": "bold red",
    "unreadable": "bold red",
}
LAW_STYLE = {"on the law": "green", "above the law": "bold red", "below the law": "bold yellow"}
MIN_SPARK = 12
SPEED_RANK, BATCH_RANK = 4, 7


@dataclass(frozen=True)
class Line:
    """One line and its importance (1 is the first to be shown)."""

    rank: int
    text: Text


def run_title(frame: Frame) -> Text:
    """What is on screen: ladder, rung, state."""
    run, ladder = frame.run, frame.ladder
    title = Text(ladder.name if ladder else "no run", "bold")
    if run is not None:
        seed = f", seed {run.seed}" if len({rung.seed for rung in frame.rungs}) > 1 else ""
        title.append(f"  {run.rung}{seed}", "default")
        title.append(f"  {run.state}", STATE_STYLE[run.state])
    return title


def run_lines(frame: Frame, width: int, *, with_spark: bool = True, most: int = 9) -> list[Line]:
    """Everything about the run, for a box of this inner width.

    Args:
        with_spark: whether the loss gets a sparkline (a chart says it better).
        most: how many of them there is room for.
    """
    run = frame.run
    if run is None:
        return _no_run(frame, width)
    lines = [
        Line(1, _progress(run, width)),
        Line(2, _time(frame, run, width)),
        Line(3, _loss(run, width, with_spark)),
        Line(SPEED_RANK, _speed(run, width)),
        Line(5, _cost(frame, run, width)),
        Line(6, _place(frame, run, width)),
    ]
    if run.reason:
        style = STATE_STYLE[run.state]
        lines.insert(
            0, Line(7 if run.state in ACTIVE else 2, cut(Text.assemble((f"{run.state}: ", style), run.reason), width))
        )
    if run.law.verdict in ("above the law", "below the law"):
        lines.append(Line(6, cut(Text(run.law.sentence, LAW_STYLE[run.law.verdict]), width)))
    batch = batch_line(run, width)
    if batch is not None and len([line for line in lines if line.rank <= BATCH_RANK]) < most:
        at = next(i for i, line in enumerate(lines) if line.rank == SPEED_RANK)
        lines[at : at + 1] = [Line(SPEED_RANK, _speed(run, width, with_batch=False)), Line(BATCH_RANK, batch)]
    return lines


def _no_run(frame: Frame, width: int) -> list[Line]:
    if frame.ladder is None:
        said = f"There is no ladder in {frame.lab} yet. `homelab run quickstart` makes one; this screen then shows it."
    elif any(rung.state != "queued" for rung in frame.rungs):
        n_waiting = sum(rung.state == "queued" for rung in frame.rungs)
        said = f"No run is going on: {len(frame.rungs) - n_waiting} ended, {n_waiting} wait."
    elif frame.rungs:
        said = f"Nothing has begun: {len(frame.rungs)} runs wait. `homelab run {frame.ladder.name}` starts them."
    else:
        said = f"{frame.ladder.path} has no runs yet. `homelab run` starts them; this screen then shows them."
    return [Line(1, cut(Text(said), width))]


def _progress(run: RunNow, width: int) -> Text:
    if run.n_updates is None or run.done_frac is None or run.tokens_total is None:
        return fit(
            [part(2, f"step {words.count(run.update)}"), part(1, f"{words.tokens(run.tokens_done)} tokens")], width
        )
    left = Text.assemble((f"{100 * run.done_frac:5.1f} %", "bold"))
    step = f"step {words.count(run.update)} of {words.count(run.n_updates)}"
    forms = (
        f"{step}, {words.tokens(run.tokens_done)} of {words.tokens(run.tokens_total)} tokens",
        step,
        f"{words.count(run.update)}/{words.count(run.n_updates)}",
    )
    room = width - left.cell_len - 4
    right = next((form for form in forms if len(form) <= room - 10), "")
    n = max(4, room - len(right)) if right else room + 2
    style = "green" if run.state in (*ACTIVE, "finished") else STATE_STYLE[run.state]
    return fit([part(3, left), part(2, bar(run.done_frac, n, style)), part(1, right)], width, gap="  ")


def _time(frame: Frame, run: RunNow, width: int) -> Text:
    ladder = frame.ladder.left_s if frame.ladder else None
    whole = _ladder_time(frame, ladder)
    if run.left_s is None:
        if run.state == "finished":
            return fit([part(3, [("this run is finished", "green")]), part(2, _rows(run)), whole], width)
        return fit([part(3, f"time left unknown: {run.left_why}", "time left unknown"), whole], width)
    if run.state not in ACTIVE:
        left = duration(run.left_s.mid)
        return fit(
            [part(3, ["about ", (left, "bold"), " of training left once it goes on"], f"{left} left"), whole], width
        )
    halted = run.state == "paused"
    return fit(
        [
            part(
                7,
                [(duration(run.left_s.mid), "bold"), f" left ({words.span(run.left_s)})", " once it resumes" * halted],
                [(duration(run.left_s.mid), "bold"), " left"],
            ),
            None if halted else part(2, f"done about {words.when(frame.t_s + run.left_s.mid, frame.t_s)}"),
            whole,
            _waits(run),
        ],
        width,
    )


def _ladder_time(frame: Frame, left: Span | None) -> Part | None:
    ladder = frame.ladder
    if ladder is None or ladder.n_runs < 2 or ladder.n_finished == ladder.n_runs:
        return None
    if left is None:
        return part(1, f"ladder: {ladder.n_finished} of {ladder.n_runs} finished")
    return part(
        3,
        f"whole ladder {duration(left.mid)} ({words.span(left)})",
        f"whole ladder {duration(left.mid)}",
        f"ladder {duration(left.mid)}",
    )


def _waits(run: RunNow) -> Part | None:
    said = []
    if run.paused_s:
        said.append(f"paused {duration(run.paused_s)} so far")
    if run.paced_s:
        said.append(f"slowed by {duration(run.paced_s)}")
    return part(0, ", ".join(said)) if said else None


def _loss(run: RunNow, width: int, with_spark: bool) -> Text:
    held = run.held
    now = part(5, ["loss ", (words.loss(run.loss_nats), "bold")])
    if held is None:
        val = part(2, "no validation yet")
    else:
        se = "" if held.se_nats is None else f" ± {held.se_nats:.3f}"
        val = part(
            4,
            ["val ", (words.loss(held.loss_nats), "bold"), f"{se} at {words.tokens(held.tokens)}"],
            ["val ", (words.loss(held.loss_nats), "bold"), se],
            ["val ", (words.loss(held.loss_nats), "bold")],
        )
    with_spark = with_spark and width >= 50 and len(run.curve) > 1
    rest = fit([now, val, _law(run)], width - (MIN_SPARK + 3 if with_spark else 0))
    room = width - rest.cell_len - 3
    if not with_spark or room < MIN_SPARK:
        return rest
    drawn = loss_spark(run, min(room, 40))
    return fit([now, part(1, drawn), val, _law(run)], width)


def _law(run: RunNow) -> Part:
    law = run.law
    if law.verdict == "not judged":
        return part(3, f"law: {law.sentence}", "law: no fit yet")
    if law.off_frac is None:
        return part(3, f"law: {law.sentence}", "law: cannot be judged yet")
    style = LAW_STYLE.get(law.verdict, "")
    side = "above" if law.off_frac >= 0 else "below"
    off = f"{abs(100 * law.off_frac):.1f} % {side} what it predicts"
    return part(3, [(law.verdict, style), f", {off}"], [(law.verdict, style)])


def loss_spark(run: RunNow, width: int) -> Text:
    """The training loss from the first update to now, in one line."""
    points = [(float(p.update), p.loss) for p in run.curve]
    low, high = loss_range(run)
    values = binned(points, points[0][0], points[-1][0], min(width, len(points)))
    return spark(values, low, high, lambda _: "cyan")


def shown_points(run: RunNow) -> Sequence[Point]:
    """The curve without its first eighth, which would flatten the rest."""
    return run.curve[min(len(run.curve) // 8, max(0, len(run.curve) - 10)) :]


def loss_range(run: RunNow) -> tuple[float, float]:
    """From the lowest loss to the highest one that is shown."""
    points = shown_points(run)
    first = points[0].tokens
    losses = [p.loss for p in points] + [h.loss_nats for h in run.held_curve if h.tokens >= first]
    low, high = min(losses), max(losses)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _speed(run: RunNow, width: int, *, with_batch: bool = True) -> Text:
    speed = run.speed
    rate = speed.tokens_per_s
    mfu = (
        part(3, ["MFU ", (words.percent(speed.mfu_frac), "bold")])
        if speed.mfu_frac is not None
        else part(1, f"MFU unknown: {speed.mfu_why}", "MFU unknown")
        if speed.mfu_why
        else part(1, "MFU unknown")
    )
    noise = run.noise_scale_tokens if with_batch else None
    batch = run.batch if with_batch else None
    return fit(
        [
            part(5, [(words.whole(rate), "bold"), " tokens/s"], [(words.whole(rate), "bold"), " tok/s"])
            if rate is not None
            else part(5, "no speed measured yet"),
            mfu,
            None
            if speed.step_p50_s is None
            else part(
                4,
                f"step {words.step(speed.step_p50_s)}, p99 {words.step(speed.step_p99_s)}",
                f"step {words.step(speed.step_p50_s)}",
            ),
            None if batch is None else batch_part(batch, 2),
            None if noise is None else part(3, f"noise scale {words.tokens(noise)}", f"noise {words.tokens(noise)}"),
            None if run.lr is None else part(0, f"lr {run.lr:.2g}"),
        ],
        width,
    )


def _cost(frame: Frame, run: RunNow, width: int) -> Text:
    whole = frame.ladder.cost if frame.ladder and frame.ladder.n_runs > 1 else None
    return fit([*_energy(run.cost), *_money(run.cost), _whole_cost(whole)], width)


def _energy(cost: Cost) -> list[Part | None]:
    if cost.kwh is None:
        return [part(3, f"energy unknown: {cost.kwh_why}", "energy unknown")]
    err = "" if cost.kwh_err_frac is None else f" ±{100 * cost.kwh_err_frac:.0f} %"
    end = cost.kwh_end
    so_far = words.kwh(cost.kwh)
    source = {"stated watts": "from stated watts", None: ""}.get(cost.kwh_from, f"cards{err}")
    ends = "" if end is None or end == cost.kwh else f" of about {words.kwh(end)}"
    if ends and so_far.split()[1] == words.kwh(end or 0.0).split()[1]:
        so_far = so_far.split()[0]  # the unit once
    wall = cost.kwh_wall
    wall_err = "" if cost.kwh_wall_err_frac is None else f" ±{100 * cost.kwh_wall_err_frac:.0f} %"
    return [
        part(
            5, [(so_far, "bold"), ends, f" ({source})" if source else ""], [(so_far, "bold"), ends], [(so_far, "bold")]
        ),
        None
        if wall is None or cost.kwh_from == "stated watts"
        else part(1, f"{words.kwh(wall)} at the plug{wall_err}", f"{words.kwh(wall)} at the plug"),
        None if cost.joules_per_token is None else part(0, f"{cost.joules_per_token:.3g} J/token"),
    ]


def _money(cost: Cost) -> list[Part | None]:
    if cost.usd is None:
        return [part(2, f"money unknown: {cost.usd_why or cost.kwh_why}", "money unknown")]
    end = cost.usd_end
    ends = "" if end is None or end == cost.usd else f" of about {words.usd(end)}"
    pieces = [("energy", cost.usd_energy), ("machine time", cost.usd_machine)]
    split = ", ".join(f"{name} {words.usd(v)}" for name, v in pieces if v is not None)
    which = f" ({split})" if None not in (cost.usd_energy, cost.usd_machine) else f" ({split.rsplit(' ', 1)[0]})"
    return [
        part(
            4,
            [(words.usd(cost.usd), "bold"), ends, which],
            [(words.usd(cost.usd), "bold"), ends],
            [(words.usd(cost.usd), "bold")],
        )
    ]


def _whole_cost(cost: Cost | None) -> Part | None:
    if cost is None or (cost.usd_end is None and cost.kwh_end is None):
        return None
    said = [words.kwh(cost.kwh_end)] if cost.kwh_end is not None else []
    said += [words.usd(cost.usd_end)] if cost.usd_end is not None else []
    about = "" if (cost.kwh, cost.usd) == (cost.kwh_end, cost.usd_end) else "about "
    return part(1, f"ladder {about}{', '.join(said)} in all", f"ladder {about}{said[-1]}")


def _rows(run: RunNow) -> str:
    return f"{run.n_rows} rows" if run.n_rows_planned is None else f"{run.n_rows} of {run.n_rows_planned} rows"


def _place(frame: Frame, run: RunNow, width: int) -> Text:
    milestone, n = None, run.n_params
    if run.milestone is not None:
        in_time = "" if run.milestone_s is None else f" in about {duration(run.milestone_s)}"
        milestone = part(3, f"next {run.milestone}{in_time}", f"next {run.milestone}")
    active = run.state in ACTIVE
    saved = None
    if run.saved_s is not None and active:
        saved = part(2, f"checkpoint {words.ago(max(0.0, frame.t_s - run.saved_s))} old")
    elif active and frame.replay is None and run.n_updates is not None:  # a recording does not know
        saved = part(2, "no checkpoint yet")
    return fit(
        [
            None if n is None else part(5, f"{words.tokens(n)} parameters", f"N {words.tokens(n)}"),
            part(4, run.phase) if run.phase and active else None,
            milestone,
            saved,
            part(1, _rows(run)),
            part(0, f"{run.n_processes} x {run.device}" if run.n_processes > 1 else run.device) if run.device else None,
        ],
        width,
    )


def loss_chart(run: RunNow, width: int, height: int) -> list[Text]:
    """Loss over tokens: trunk, decays and validations, with the ends of both axes.

    Args:
        height: with the line of the axis.
    """
    low, high = loss_range(run)
    grace = 0.03 * (high - low)
    low, high = low - grace, high + grace
    labels = [f"{high:.2f}", f"{low:.2f}"]
    margin = max(map(len, labels)) + 1
    points = shown_points(run)
    ends = (points[0].tokens, max([p.tokens for p in points] + [h.tokens for h in run.held_curve]))
    trunk = Series([(p.tokens, p.loss) for p in points if not p.decay], "cyan")
    decays = _decays(points)
    held = Series([(h.tokens, h.loss_nats) for h in run.held_curve if h.tokens >= ends[0]], "bold yellow", joined=False)
    rows = chart([trunk, *decays, held], width - margin, height - 1, (float(ends[0]), float(ends[1])), (low, high))
    drawn = []
    for i, row in enumerate(rows):
        label = labels[0] if i == 0 else labels[1] if i == len(rows) - 1 else ""
        drawn.append(Text.assemble((f"{label:>{margin - 1}} ", "dim"), row))
    first, last = (f"{words.tokens(end)} tokens" for end in ends)
    legend = fit(
        [
            part(3, [("training", "cyan")]),
            part(2, [("decay", "magenta")]) if decays else None,
            part(2, [("validation", "bold yellow")]) if held.points else None,
        ],
        max(0, width - margin - len(first) - len(last) - 4),
        gap="  ",
    )
    axis = Text.assemble((" " * margin + first, "dim"), "  ", legend)
    drawn.append(padded(axis, width - len(last)).append(last, "dim"))
    return drawn


def _decays(points: Sequence[Point]) -> list[Series]:
    """One line for each decay."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point.decay and (not stretches[-1] or point.tokens >= stretches[-1][-1][0]):
            stretches[-1].append((point.tokens, point.loss))
        elif stretches[-1]:
            stretches.append([(point.tokens, point.loss)] if point.decay else [])
    return [Series(stretch, "magenta") for stretch in stretches if stretch]
