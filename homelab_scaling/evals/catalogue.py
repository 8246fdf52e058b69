"""From what the user names to tasks: our own, those of lm-evaluation-harness, a YAML folder's, a JSONL file's.

Names are found and data loaded before any model is opened. What needs the hub asks first, in seconds, whether it can be
reached; where it cannot, what is in the cache still works.
"""

import contextlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from homelab_scaling.errors import DataError, HomelabError, MachineError, SpecError
from homelab_scaling.evals.harness import Loaded, quiet
from homelab_scaling.evals.known import HARNESS, nearest
from homelab_scaling.evals.local import read_task
from homelab_scaling.evals.own import OWN_TASKS

PATIENCE_S = 5.0
"""For the hub's first word."""
READERS = frozenset({"json", "csv", "text", "parquet", "arrow"})
"""Dataset names that mean files of one's own."""
YAML = (".yaml", ".yml")


class Catalogue:
    """lm-eval's tasks by name, and those of folders of one's own, which come first.

    Raises:
        MachineError: lm-eval is not installed.
        SpecError: a folder is none.
    """

    def __init__(self, include: Sequence[Path] = ()) -> None:
        self.include = tuple(include)
        for folder in self.include:
            if not folder.is_dir():
                raise SpecError(f"--include {folder}: wants a folder of YAML tasks")
        self._reachable: bool | None = None

    def load(self, name: str) -> list[Loaded]:
        """The task of this name, or the tasks of a tag.

        Raises:
            SpecError: there is none (near names are said).
            DataError: its definition or its data cannot be read.
            MachineError: its data are on the hub, and neither there nor in the cache to be had.
        """
        require_harness()
        path = Path(name).expanduser()
        if path.suffix == ".jsonl":
            return [_from_jsonl(path)]
        if path.suffix in YAML:
            if not path.is_file():
                raise SpecError(f"{name}: no such file; give an existing YAML or JSONL file, or the name of a task")
            return self._build(str(path.resolve()), _entry_of(path), self._own or self._none)
        finders: tuple[Callable[[], Any], ...] = (lambda: self._own, lambda: self._near(name), _every_task)
        for find in finders:  # the last one only where it must be
            manager = find()
            if manager is not None and name in manager.task_index:
                return self._build(name, manager.task_index[name], manager)
        known = [*OWN_TASKS, *HARNESS, *_every_task().all_tasks, *(self._own.all_tasks if self._own else ())]
        raise SpecError(
            f"there is no task {name!r}{nearest(name, known) or '; `homelab eval --list` names the usual ones'}"
        )

    @cached_property
    def _own(self) -> Any:
        return _manager(list(self.include)) if self.include else None

    @cached_property
    def _none(self) -> Any:
        return _manager([])

    def _near(self, name: str) -> Any:
        """Only the folder where a usual task is defined: the index of all of them takes seconds."""
        if name not in HARNESS:
            return None
        import lm_eval

        return _manager([Path(lm_eval.__file__).parent / "tasks" / HARNESS[name].folder])

    def _build(self, spec: str, entry: Any, manager: Any) -> list[Loaded]:
        known = HARNESS.get(spec) if self._own is None or spec not in self._own.task_index else None
        name = entry.name
        leaves = _leaves(entry, manager)
        data = sorted({one for leaf in leaves for one in _datasets_of(leaf)})
        with self._online(name, data), _beside(leaves), quiet():
            try:
                found = manager.load([spec])
            except HomelabError:
                raise
            except Exception as error:  # lm-eval's, datasets', the author's of the task
                raise DataError(f"{name}: lm-eval cannot make this task ({_short(error)})") from None
        shots = known.shots if known is not None else None
        tasks = found["tasks"]
        if len(tasks) > 1 and name not in found.get("groups", {}):
            return [Loaded(name=one, parts=(task,), default_shots=shots) for one, task in tasks.items()]
        return [Loaded(name=name, parts=tuple(tasks.values()), default_shots=shots)]

    @contextlib.contextmanager
    def _online(self, name: str, data: Sequence[str]) -> Iterator[None]:
        """Turns a failure to load what is on the hub into a sentence; offline if the hub does not answer."""
        if not data:
            yield
            return
        told = is_offline()
        if not told and self._reachable is None:
            self._reachable = hub_answers()
        try:
            with contextlib.nullcontext() if told or self._reachable else offline():
                yield
        except DataError as error:
            if self._reachable and not told:
                raise
            why = "HF_HUB_OFFLINE is set" if told else "the hub cannot be reached"
            todo = "unset it, or" if told else "connect, or"
            raise MachineError(
                f"{name}: its data {', '.join(data)} are not in the cache and {why}; {todo} use the tasks that need "
                "no network (`homelab eval --list`)"
            ) from error


def require_harness() -> None:
    """MachineError where lm-eval is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise MachineError(
            "lm-evaluation-harness is not installed, which asks every task but our own; "
            "pip install 'homelab_scaling[eval]'"
        )


@cache
def _every_task() -> Any:
    """The index of all of lm-eval's tasks: some fourteen thousand files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _manager(folders: list[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def _entry_of(path: Path) -> Any:
    from lm_eval.tasks._index import TaskIndex

    try:
        entry = TaskIndex.entry_from_path(path)
    except Exception as error:  # the YAML reader's, or what an include does
        raise DataError(f"{path}: lm-eval cannot read this task ({_short(error)})") from None
    if entry is None:
        raise DataError(f"{path}: names no task; a task's YAML begins with `task: NAME`")
    return entry


def _config_of(entry: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.yaml_path is None:
        return dict(entry.cfg or {})
    found: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=False)
    return found


def _leaves(entry: Any, manager: Any) -> list[Any]:
    """The single tasks behind a task, a group or a tag."""
    children = sorted(entry.tags) if entry.yaml_path is None else _config_of(entry).get("task")
    if not isinstance(children, list):
        return [entry]
    named = [child if isinstance(child, str) else child.get("task") or child.get("group") for child in children]
    found = [manager.task_index[name] for name in named if name in manager.task_index]
    return [leaf for one in found for leaf in _leaves(one, manager)]


def _datasets_of(leaf: Any) -> list[str]:
    """The name of a single task's data, where they are on the hub."""
    name = _config_of(leaf).get("dataset_path")
    is_local = name is None or name in READERS or Path(str(name)).exists() or _is_beside(leaf, str(name))
    return [] if is_local else [str(name)]


def _is_beside(leaf: Any, name: str) -> bool:
    return leaf.yaml_path is not None and (Path(leaf.yaml_path).parent / name).exists()


def _home(leaf: Any) -> Path | None:
    """The task's own folder where its files lie there and not here: lm-eval looks only where it was started."""
    config = _config_of(leaf)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    names = [files] if isinstance(files, str) else list((files or {}).values()) if isinstance(files, dict) else []
    names = [name for name in [*names, config.get("dataset_path")] if isinstance(name, str)]
    beside = any(_is_beside(leaf, name) and not Path(name).exists() for name in names)
    return Path(leaf.yaml_path).parent if beside else None


@contextlib.contextmanager
def _beside(leaves: Sequence[Any]) -> Iterator[None]:
    """In the folder of the tasks whose files lie beside them; that of the first, where they lie in several."""
    homes = [home for leaf in leaves if (home := _home(leaf)) is not None]
    with contextlib.chdir(homes[0]) if homes else contextlib.nullcontext():
        yield


def _from_jsonl(path: Path) -> Loaded:
    rows, config = read_task(path)
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def data(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list(rows)}

    with quiet():
        task = ConfigurableTask(config={"task": path.name, "custom_dataset": data, "test_split": "test", **config})
    return Loaded(name=path.name, parts=(task,))


# -------------------------------------------------------------------------------------------------------------- the hub


def is_offline() -> bool:
    """Whether the user's environment forbids the hub."""
    from datasets import config
    from huggingface_hub import constants

    return bool(config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE)


def hub_answers(patience_s: float = PATIENCE_S) -> bool:
    """Whether the hub says anything at all within a few seconds, look-up of its name included."""
    from huggingface_hub import constants

    answered = threading.Event()

    def knock() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=patience_s):
                answered.set()
        except urllib.error.HTTPError as error:
            # A proxy that refuses answers, too, but not for the hub.
            if error.code not in (403, 407, 502, 503, 504):
                answered.set()
        except (OSError, ValueError):
            return

    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(patience_s)
    return answered.is_set()


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """The cache alone, for libraries that have already read their environment."""
    from datasets import config
    from huggingface_hub import constants

    before = (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before[:2]
        if before[2] is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before[2]


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
