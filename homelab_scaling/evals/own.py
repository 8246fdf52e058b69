"""Our own tasks for a model, by name: bits per byte and three probes that work from a few million parameters on."""

from collections.abc import Callable, Sequence
from pathlib import Path

from homelab_scaling.errors import DataError
from homelab_scaling.evals.bpb import BitsPerByte
from homelab_scaling.evals.probes import Copy, LastWord, MinimalPairs
from homelab_scaling.evals.results import Task
from homelab_scaling.evals.texts import HeldOut, held_out
from homelab_scaling.export.convert import Portable

OWN_TASKS = {
    BitsPerByte.name: "bits per byte of held-out text, the loss that compares across tokenizers",
    Copy.name: "induction: the next token of a repeated random sequence, of 8 candidates",
    LastWord.name: "the next word (in code, identifier) of a held-out passage that has it before",
    MinimalPairs.name: "a held-out line or its corrupted twin: which is more probable?",
}
"""Name -> what it asks."""
WANT_TEXT = (BitsPerByte.name, LastWord.name, MinimalPairs.name)
"""Those that cannot do without held-out text."""


def own_tasks(
    model: Portable,
    names: Sequence[str] | None = None,
    *,
    text: str | Path | None = None,
    text_field: str = "text",
    limit: int | None = None,
    seed: int = 0,
) -> list[Task]:
    """Our own tasks for a model, in the order of OWN_TASKS.

    Args:
        model: that will be asked; its tokenizer reads the shards of its run, and makes the sequences of `copy`.
        names: of OWN_TASKS; None takes all for which there is text (see `left_out_because`).
        text: a .txt, .jsonl or .parquet file, a folder of them or `python`, in place of the run's held-out documents.
        text_field: of .jsonl and .parquet.
        limit: most items of a task (500).
        seed: of the items.

    Raises:
        DataError: a task that was named wants held-out text and there is none; or the text cannot be read.
    """
    found, why_none = _text(model, text, text_field)
    if names is None:
        names = [name for name in OWN_TASKS if found is not None or name not in WANT_TEXT]
    makers: dict[str, Callable[[HeldOut], Task]] = {
        BitsPerByte.name: lambda held: BitsPerByte(held, limit=limit),
        LastWord.name: lambda held: LastWord(held, limit=limit, seed=seed),
        MinimalPairs.name: lambda held: MinimalPairs(model, held, limit=limit, seed=seed),
    }
    tasks: list[Task] = []
    for name in OWN_TASKS:
        if name not in names:
            continue
        if name == Copy.name:
            tasks.append(Copy(model, found, limit=limit, seed=seed))
        elif found is None:
            raise DataError(f"task {name} wants held-out text: {why_none}")
        else:
            tasks.append(makers[name](found))
    return tasks


def left_out_because(model: Portable, names: Sequence[str]) -> str | None:
    """Which of our own tasks are not among those asked, for want of held-out text, in words; None if none is."""
    missing = [name for name in OWN_TASKS if name not in names]
    why_none = _text(model, None, "text")[1] if missing else None
    return None if why_none is None else f"not asked: {', '.join(missing)}; {why_none}"


def _text(model: Portable, text: str | Path | None, text_field: str) -> tuple[HeldOut | None, str | None]:
    """The text, or why there is none; a text that was named and cannot be read is an error."""
    if text is not None:
        return held_out(model, text, text_field=text_field), None
    try:
        return held_out(model), None
    except DataError as error:
        return None, str(error)
