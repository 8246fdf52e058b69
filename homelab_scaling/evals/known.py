"""The usual tasks of lm-evaluation-harness with their usual settings, and the forms of files of one's own."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Known:
    """A task of lm-evaluation-harness with the settings it is usually reported with."""

    name: str
    about: str
    metric: str
    folder: str
    """Of lm_eval/tasks, where it is defined."""
    shots: int | None = None
    """None leaves what the task says itself."""
    n_documents: int
    data: str
    """On the hub."""
    generates: bool = False
    suggested_limit: int | None = None
    """Documents that tell enough where all take long."""


HARNESS = {
    one.name: one
    for one in (
        Known(
            name="hellaswag",
            about="which ending follows; chance 25 %",
            metric="acc_norm",
            folder="hellaswag",
            shots=10,
            n_documents=10_042,
            data="Rowan/hellaswag",
        ),
        Known(
            name="gsm8k",
            about="grade-school sums, answer written out",
            metric="exact_match",
            folder="gsm8k",
            shots=5,
            n_documents=1_319,
            data="openai/gsm8k",
            generates=True,
            suggested_limit=100,
        ),
        Known(
            name="truthfulqa_mc2",
            about="probability of the true among true and false answers",
            metric="acc",
            folder="truthfulqa",
            shots=0,
            n_documents=817,
            data="truthfulqa/truthful_qa",
        ),
        Known(
            name="lambada_openai",
            about="the last word of a passage of a novel",
            metric="acc",
            folder="lambada",
            shots=0,
            n_documents=5_153,
            data="EleutherAI/lambada_openai",
        ),
        Known(
            name="blimp",
            about="67 kinds of grammatical minimal pairs; chance 50 %",
            metric="acc",
            folder="blimp",
            shots=0,
            n_documents=67_000,
            data="nyu-mll/blimp",
        ),
        Known(
            name="piqa",
            about="which of two ways to do a thing works; chance 50 %",
            metric="acc_norm",
            folder="piqa",
            shots=0,
            n_documents=1_838,
            data="baber/piqa",
        ),
    )
}

FORMS = (
    '{"text"}: bits per byte of each text',
    '{"context", "choices", "answer"}: the likeliest choice, joined by a blank; answer counts from 0; acc_norm and acc',
    '{"prompt", "target"}: whether target is the likeliest continuation; begins with a blank where a word does',
    '{"prompt", "answer"}: generated to the end of the line, then compared',
)
"""Of a line of a task's JSONL file."""


def nearest(name: str, others: Iterable[str]) -> str:
    """`; did you mean a or b?`, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(name, sorted(set(others)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
