"""Scores, prices and differences as tables on the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

from homelab_scaling.evals.compare import Delta, Evaluated
from homelab_scaling.evals.known import FORMS, HARNESS
from homelab_scaling.evals.own import OWN_TASKS, WANT_TEXT
from homelab_scaling.evals.results import Part, Score
from homelab_scaling.fit.words import short


def score_text(part: Part, kind: str) -> str:
    """38.2 % [35.1, 41.4]; 1.234 [1.201, 1.266]."""
    if part.score is None:
        return "–"
    form, factor, unit = ("{:.1f}", 100, " %") if kind == "share" else ("{:.4f}", 1, "")
    text = form.format(factor * part.score) + unit
    if part.low is None or part.high is None:
        return text
    return f"{text} [{form.format(factor * part.low)}, {form.format(factor * part.high)}]"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3.4 min, 2.1 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return (
        f"{seconds:.0f} s"
        if seconds < 60
        else f"{seconds / 60:.1f} min"
        if seconds < 3600
        else f"{seconds / 3600:.1f} h"
    )


def kwh_text(score: Score) -> str:
    """With a tilde where it comes from stated watts."""
    if score.kwh is None:
        return "–"
    return f"{'~' if score.kwh_from == 'stated watts' else ''}{score.kwh:.2g}"


def usd_text(score: Score) -> str:
    return "–" if score.usd is None else f"${score.usd:.2g}"


def chance_text(score: Score) -> str:
    if score.chance is None:
        return "–"
    return f"{100 * score.chance:.1f} %" if score.kind == "share" else f"{score.chance:.3g}"


def clean_text(score: Score) -> str:
    """The score of the documents that are not in the training text."""
    clean = score.clean
    if clean is None or clean.score is None:
        return "–"
    return f"{100 * clean.score:.1f} %" if score.kind == "share" else f"{clean.score:.4f}"


def page(models: Sequence[Evaluated], deltas: Sequence[Delta]) -> Iterator[Any]:
    """What a terminal shows: a table for each model, one of differences, warnings and what is unknown."""
    from rich.text import Text

    for model in models:
        yield scores_table(model)
        yield from (Text(f"  {line}", style="dim") for line in remarks([model]))
        yield Text("")
    if len(models) > 1:
        yield deltas_table(deltas) if deltas else Text("No task has a score of two models: nothing to compare.")
        notes = dict.fromkeys(note for delta in deltas for note in _notes(delta))
        yield from (Text(f"  {note}", style="dim") for note in notes)


def scores_table(model: Evaluated) -> Any:
    """One model's tasks, their scores and what they cost."""
    from rich.table import Table

    about = model.about
    facts = [f"N = {short(about.n_params)}"] if about.n_params is not None else []
    facts += [f"D = {short(about.n_tokens)}"] if about.n_tokens is not None else []
    facts += [f"loss {about.loss_nats:.3f}"] if about.loss_nats is not None else []
    table = Table(title=f"{about.name}   {', '.join(facts)}", title_justify="left", title_style="bold")
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in ("score [95 %]", "chance", "clean part", "documents", "time", "kWh", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in model.scores.values():
        table.add_row(
            score.task,
            score.metric,
            score_text(score.whole, score.kind),
            chance_text(score),
            clean_text(score),
            f"{score.whole.n_documents:,}",
            duration(score.seconds),
            kwh_text(score),
            usd_text(score),
        )
        for name, part in score.also.items():
            if name != "cut":
                kind = "share" if name.startswith(("acc", "exact")) else "mean"
                table.add_row("", name, score_text(part, kind), "", "", "", "", "", "", style="dim")
    return table


def remarks(models: Sequence[Evaluated]) -> list[str]:
    """Every warning and every unknown, once, with the tasks it is about, and the models where it is not all of them."""
    found: dict[str, dict[str, list[str]]] = {}
    for model in models:
        for score in model.scores.values():
            unknown = (f"{name} is unknown: {why}" for name, why in score.unknown.items())
            for text in (*score.warnings, *unknown):
                found.setdefault(text, {}).setdefault(score.task, []).append(model.about.name)
    asked = {task: [model for model in models if task in model.scores] for model in models for task in model.scores}
    return [_remark(text, about, asked) for text, about in found.items()]


def _remark(text: str, about: dict[str, list[str]], asked: dict[str, list[Evaluated]]) -> str:
    everywhere = all(len(about.get(task, ())) == len(models) for task, models in asked.items())
    if everywhere and len(asked) > 1:
        return text
    parts = [
        task if len(names) == len(asked[task]) else f"{task} of {', '.join(names)}" for task, names in about.items()
    ]
    return f"{', '.join(parts)}: {text}"


def deltas_table(deltas: Sequence[Delta]) -> Any:
    """Differences with their paired intervals, a part of the table for each two models."""
    from rich.table import Table

    table = Table(title="differences on the same documents", title_justify="left", title_style="bold")
    table.add_column("task")
    for name in ("difference [95 %]", "p", "documents"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    before = None
    for delta in deltas:
        if (delta.first, delta.second) != before:
            before = delta.first, delta.second
            table.add_section()
            table.add_row(f"{delta.first} → {delta.second}", style="bold")
        table.add_row(
            f"  {delta.task}",
            delta_text(delta),
            "–" if delta.p_value is None else f"{delta.p_value:.2g}",
            f"{delta.n_documents:,}",
            verdict(delta),
            style="dim" if delta.delta is None else None,
        )
    return table


def delta_text(delta: Delta) -> str:
    """+3.1 [-0.4, 6.5] points; -0.021 [-0.034, -0.008]."""
    if delta.delta is None or delta.low is None or delta.high is None:
        return "–"
    form, factor, unit = ("{:+.1f}", 100, " points") if delta.kind == "share" else ("{:+.4f}", 1, "")
    low, high = (form.format(factor * end) for end in (delta.low, delta.high))
    return f"{form.format(factor * delta.delta)} [{low}, {high}]{unit}"


def verdict(delta: Delta) -> str:
    """better, worse, not told apart, or why not compared."""
    if delta.refused is not None:
        return f"not compared: {delta.refused}"
    return {True: "better", False: "worse", None: "not told apart"}[delta.is_better]


def _notes(delta: Delta) -> list[str]:
    return [f"{delta.first} and {delta.second}: {note}" for note in delta.notes]


def listed_tasks() -> list[dict[str, Any]]:
    """The known tasks as plain data."""
    own = [{"name": name, "asks": asks, "needs_hub": False, "is_own": True} for name, asks in OWN_TASKS.items()]
    return own + [
        {
            "name": one.name,
            "asks": one.about,
            "metric": one.metric,
            "n_documents": one.n_documents,
            "shots": one.shots,
            "data": one.data,
            "needs_hub": True,
            "is_own": False,
        }
        for one in HARNESS.values()
    ]


def listing() -> Iterator[Any]:
    """What `--list` shows: tasks by name and what they need, and the forms of files of one's own."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="tasks", title_justify="left", title_style="bold")
    for name in ("name", "asks", "metric", "documents", "shots", "needs"):
        table.add_column(name, justify="right" if name in ("documents", "shots") else "left", no_wrap=name == "name")
    for name, asks in OWN_TASKS.items():
        needs = "held-out text: the run's own, or --text" if name in WANT_TEXT else "nothing"
        table.add_row(name, asks, "bits_per_byte" if name == "bpb" else "acc", "up to 500", "0", needs)
    for one in HARNESS.values():
        hint = f"; --limit {one.suggested_limit} gives an idea" if one.suggested_limit else ""
        shots = "" if one.shots is None else str(one.shots)
        table.add_row(one.name, one.about + hint, one.metric, f"{one.n_documents:,}", shots, f"[eval], hub: {one.data}")
    yield table
    yield Text("Any other task of lm-evaluation-harness goes by its name, one of your own by its YAML file, or by name")
    yield Text("with --include FOLDER. A JSONL file needs [eval] and no network; its lines are all of one form:")
    yield from (Text(f"  {form}") for form in FORMS)
