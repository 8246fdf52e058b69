"""The whole of `homelab eval`: tasks found, models opened one by one and asked, differences, a picture."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from homelab_scaling.errors import SpecError, Stopped
from homelab_scaling.evals import cautions, contamination
from homelab_scaling.evals.catalogue import Catalogue
from homelab_scaling.evals.compare import Delta, Evaluated, against_first, against_previous, read_evaluated
from homelab_scaling.evals.harness import HarnessTask, Loaded, Options
from homelab_scaling.evals.known import HARNESS
from homelab_scaling.evals.own import OWN_TASKS, left_out_because, own_tasks
from homelab_scaling.evals.plots import write_picture
from homelab_scaling.evals.price import Tariff, metered
from homelab_scaling.evals.results import Task
from homelab_scaling.evals.sitting import Progress, Sitting
from homelab_scaling.evals.sources import Target, about, priced
from homelab_scaling.evals.store import Store, stores
from homelab_scaling.evals.telling import LINE_EVERY_S
from homelab_scaling.export.convert import Portable, open_model
from homelab_scaling.fit.words import short
from homelab_scaling.specs import Money

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user asks for, beyond the models."""

    tasks: tuple[str, ...] = ()
    """Names, YAML and JSONL files; our own tasks when empty."""
    include: tuple[Path, ...] = ()
    """Folders of YAML tasks."""
    options: Options = field(default_factory=Options)
    device: str = "auto"
    tokenizer: Path | None = None
    text: str | None = None
    text_field: str = "text"
    seed: int = 0
    watts: float | None = None
    usd_per_kwh: float | None = None
    usd_per_hour: float | None = None

    def __post_init__(self) -> None:
        counts = {
            "--limit": self.options.limit,
            "--batch-seqs": self.options.batch_seqs,
            "--max-new-tokens": self.options.max_new_tokens,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise SpecError(f"{name} {value}: wants 1 or more")
        others = {
            "--shots": self.options.shots,
            "--watts": self.watts,
            "--usd-per-kwh": self.usd_per_kwh,
            "--usd-per-hour": self.usd_per_hour,
        }
        for flag, given in others.items():
            if given is not None and given < 0:
                raise SpecError(f"{flag} {given:g}: wants 0 or more")
        if len(set(self.tasks)) < len(self.tasks):
            raise SpecError("--tasks names a task twice; name each once")

    def money(self, target: Target) -> Money:
        return priced(target.money, watts=self.watts, usd_per_kwh=self.usd_per_kwh, usd_per_hour=self.usd_per_hour)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What an evaluation gives."""

    models: tuple[Evaluated, ...]
    """In the order asked for; only the tasks of this command."""
    deltas: tuple[Delta, ...]
    folders: tuple[Path, ...]
    pictures: tuple[Path, ...]


def evaluate(
    targets: Sequence[Target],
    wishes: Wishes,
    loaded: Sequence[Loaded],
    *,
    one_by_one: bool,
    say: Say,
    report: Callable[[Progress], None],
    stopped: Callable[[], str | None],
) -> Result:
    """Asks every model every task; what was answered before is not asked again.

    Args:
        loaded: the tasks that are not our own, from `load_tasks`.
        one_by_one: each model is compared with the one before it (a ladder), not with the first.
        stopped: why to stop, as soon as there is a reason.

    Raises:
        UserError: a task or a model is not there, or cannot be asked.
        Stopped: asked to stop; the same command goes on.
    """
    models, folders = [], []
    for target in targets:
        if (why := stopped()) is not None:
            raise Stopped(f"{why} before {target.source.name} was asked; the same command goes on from here")
        store, names = _ask(target, wishes, loaded, say=say, report=report, stopped=stopped)
        models.append(read_evaluated(store, names))
        folders.append(store.folder)
    deltas = (against_previous if one_by_one else against_first)(models)
    # The picture shows every model that was ever asked in the same folder, not those of this command alone.
    pictures = [path for evals in dict.fromkeys(t.evals for t in targets) if (path := _draw(evals)) is not None]
    return Result(models=tuple(models), deltas=tuple(deltas), folders=tuple(folders), pictures=tuple(pictures))


def _draw(evals: Path) -> Path | None:
    return write_picture(evals, [read_evaluated(store) for store in stores(evals)])


def load_tasks(wishes: Wishes, say: Say) -> list[Loaded]:
    """The tasks that are not our own, found and with their data, before any model is opened.

    Raises:
        UserError: as `Catalogue.load`.
    """
    names = [name for name in wishes.tasks if name not in OWN_TASKS]
    if not names:
        return []
    catalogue = Catalogue(wishes.include)
    loaded = [one for name in names for one in catalogue.load(name)]
    for one in loaded:
        known = HARNESS.get(one.name)
        if known is not None and known.generates and wishes.options.limit is None:
            say(
                f"{one.name} writes an answer to each of {known.n_documents:,} questions; --limit "
                f"{known.suggested_limit} gives an idea in a fraction of the time"
            )
    return loaded


def _ask(
    target: Target,
    wishes: Wishes,
    loaded: Sequence[Loaded],
    *,
    say: Say,
    report: Callable[[Progress], None],
    stopped: Callable[[], str | None],
) -> tuple[Store, list[str]]:
    """One model's folder, with a score of every task in it; the tasks' names."""
    model = open_model(target.source, at=target.at, device=wishes.device, tokenizer=wishes.tokenizer)
    facts = about(model, target.source)
    store = Store(target.evals / model.name)
    tasks = tasks_for(model, wishes, loaded)
    say(f"{model.name}: {', '.join(task.name for task in tasks)}; on {facts.device}")
    if not wishes.tasks and (left_out := left_out_because(model, [task.name for task in tasks])) is not None:
        say(left_out)
    with store.lock(), metered(target.labs, model.device, say) as meter:
        store.open_for(facts)
        training_text, why_not = _training_text(model, target, tasks, stopped, say)
        sitting = Sitting(
            model=model,
            about=facts,
            store=store,
            tariff=Tariff(money=wishes.money(target), wall=meter.wall, why_no_meter=meter.why_not),
            meter=meter.meter,
            training_text=training_text,
            overlap_unknown=why_not,
            stopped=stopped,
            report=report,
            cautions=cautions.cautions,
        )
        for task in tasks:
            sitting.evaluate(task)
    return store, [task.name for task in tasks]


def tasks_for(model: Portable, wishes: Wishes, loaded: Sequence[Loaded]) -> list[Task]:
    """The tasks in the order in which they were named.

    Raises:
        UserError: one cannot be asked of this model.
    """
    own_names = [name for name in wishes.tasks if name in OWN_TASKS]
    own: list[Task] = []
    if own_names or not wishes.tasks:
        own = own_tasks(
            model,
            own_names or None,
            text=wishes.text,
            text_field=wishes.text_field,
            limit=wishes.options.limit,
            seed=wishes.seed,
        )
    harness: list[Task] = [HarnessTask(one, wishes.options, context_tokens=model.context_tokens) for one in loaded]
    tasks = [*own, *harness]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SpecError(f"two tasks are called {twice}; name one of them")
    return tasks


def _training_text(
    model: Portable, target: Target, tasks: Sequence[Task], stopped: Callable[[], str | None], say: Say
) -> tuple[contamination.TrainingText | None, str | None]:
    """The run's training text with every task's documents looked for in one reading, or why that is not possible."""
    why_not = contamination.unknown_because(model)
    if why_not is not None:
        return None, why_not

    told_s = time.monotonic()

    def check(n_read: int, n_all: int) -> None:
        nonlocal told_s
        if time.monotonic() - told_s > LINE_EVERY_S:
            told_s = time.monotonic()
            say(f"looking for the documents in the training text: {short(n_read)} of {short(n_all)} tokens")
        if (why := stopped()) is not None:
            raise Stopped(f"{why} while the training text was read; the same command goes on from here")

    text = contamination.TrainingText(model, cache=target.evals, report=check, say=say)
    text.overlaps([task.documents() for task in tasks])
    return text, None


def as_json(result: Result) -> dict[str, object]:
    """The result as plain data."""
    from homelab_scaling.codec import to_plain

    def one(model: Evaluated, folder: Path) -> dict[str, object]:
        plain: dict[str, object] = to_plain(model.about)
        return plain | {"folder": str(folder), "scores": [to_plain(score) for score in model.scores.values()]}

    return {
        "models": [one(model, folder) for model, folder in zip(result.models, result.folders, strict=True)],
        "deltas": to_plain(list(result.deltas)),
        "pictures": [str(path) for path in result.pictures],
    }
