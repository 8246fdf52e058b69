"""The section on what the models can do: scores with their errors and prices, and the warnings that go with them."""

import re
from typing import Any

from homelab_scaling.errors import HomelabError
from homelab_scaling.evals import plots, show
from homelab_scaling.evals.compare import Evaluated, read_evaluated
from homelab_scaling.evals.store import EVALS, stores
from homelab_scaling.report.collect import LabView
from homelab_scaling.report.document import Block, Bullets, Grid, Heading, Paragraph
from homelab_scaling.report.parts import Nothing
from homelab_scaling.report.style import Theme
from homelab_scaling.report.words import sentence

TITLE = "What the models can do"
CAPTION = (
    "Scores of `homelab eval` with their 95 % intervals. The clean part leaves out documents that share a run of 13 "
    "words with the training text, and long ones that share a fifth of all their runs. Time is that of asking; a tilde "
    "marks energy from stated watts."
)


def evaluations(view: LabView, images: list[Block]) -> list[Block]:
    """A line for each model and task, the figure, and what to know before believing them; nothing without scores."""
    try:
        models = evaluated_models(view)
    except HomelabError as error:
        return [Heading(text=TITLE), Paragraph(text=sentence(f"The evaluations cannot be read: {error}"))]
    if not models:
        return []
    blocks: list[Block] = [Heading(text=TITLE), _scores(models), *images]
    remarks = tuple(f"{text}." for text in show.remarks(models))
    return [*blocks, Bullets(items=remarks)] if remarks else blocks


def evaluated_models(view: LabView) -> list[Evaluated]:
    """The models of LAB/<ladder>/evals that have a score, by compute.

    Raises:
        SpecError, DataError: a file of theirs is damaged.
    """
    found = [read_evaluated(store) for store in stores(view.path / EVALS)]
    return sorted((one for one in found if one.scores), key=lambda one: (one.about.flops or 0.0, one.about.name))


def scores(plt: Any, view: LabView, theme: Theme) -> Any:
    """Scores against loss and compute."""
    try:
        models = evaluated_models(view)
    except HomelabError:
        models = []
    if not models:
        raise Nothing("")
    why_not = plots.why_not_drawn(models)
    if why_not is not None:
        raise Nothing(why_not)
    return plots.draw(plt, models, theme)


def _scores(models: list[Evaluated]) -> Grid:
    """A line for each task and model, by task; which metric it is stands in the caption."""
    tasks = list(dict.fromkeys(name for model in models for name in model.scores))
    short = _short_names([model.about.name for model in models])
    lines = [(task, model, model.scores[task]) for task in tasks for model in models if task in model.scores]
    rows = tuple(
        (
            task,
            short[model.about.name],
            show.score_text(score.whole, score.kind),
            show.chance_text(score),
            show.clean_text(score),
            f"{score.whole.n_documents:,}",
            show.duration(score.seconds),
            show.kwh_text(score),
            show.usd_text(score),
        )
        for task, model, score in lines
    )
    metrics = {f"{task} {score.metric.replace('_', ' ')}": None for task, _, score in lines}
    return Grid(
        head=("task", "model", "score", "chance", "clean part", "documents", "time", "kWh", "cost"),
        rows=rows,
        left=frozenset({"task", "model"}),
        caption=f"{CAPTION} Metrics: {', '.join(metrics)}.",
    )


def _short_names(names: list[str]) -> dict[str, str]:
    """Names without the hashes of their runs, where they stay apart without."""
    cut = {name: re.sub(r"-[0-9a-f]{8}(?=@)", "", name) for name in names}
    return cut if len(set(cut.values())) == len(names) else {name: name for name in names}
