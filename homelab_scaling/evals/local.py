"""A task from a plain JSONL file, as a configuration that lm-evaluation-harness takes; all lines are of one form."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homelab_scaling.errors import DataError
from homelab_scaling.evals.known import FORMS

Row = dict[str, Any]
MEAN = {"aggregation": "mean", "higher_is_better": True}
ANSWER_TOKENS = 32


def read_task(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a file and the lm-eval configuration that asks them, its data left out.

    Raises:
        DataError: the file, or a line of it (which), is not what it should be.
    """
    rows, form = [], None
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give an existing JSONL file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found, row = _read_line(line)
            if form is not None and found is not form:
                raise ValueError(f"has {found.keys_text}, the lines before it have {form.keys_text}")
        except ValueError as error:
            raise DataError(f"{path.name}, line {number}: {error}") from None
        form = found
        rows.append(row)
    if form is None:
        raise DataError(f"{path}: holds no line; a line is one of {'; '.join(FORMS)}")
    return rows, form.config()


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of line."""

    keys: tuple[str, ...]
    check: Callable[[Row], None]
    config: Callable[[], dict[str, Any]]

    @property
    def keys_text(self) -> str:
        return ", ".join(self.keys)


def _read_line(line: str) -> tuple[Form, Row]:
    try:
        plain = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(plain, dict):
        raise ValueError(f"wants an object such as {FORMS[0].partition(':')[0]}, found {line.strip()[:40]}")
    fits = [form for form in ALL if set(form.keys) <= set(plain)]
    if len(fits) != 1:
        what = f"has {', '.join(map(str, plain)) or 'no keys'}" if not fits else "is of several forms at once"
        raise ValueError(f"{what}; wants one of {', '.join('{' + form.keys_text + '}' for form in ALL)}")
    (form,) = fits
    row = {key: plain[key] for key in form.keys}
    form.check(row)
    return form, row


def _want_text(row: Row, key: str, *, empty: bool = False) -> None:
    if not isinstance(row[key], str) or not (row[key] or empty):
        raise ValueError(f"{key} wants {'text' if empty else 'text that is not empty'}, found {row[key]!r}")


def _check_text(row: Row) -> None:
    _want_text(row, "text")


def _check_choices(row: Row) -> None:
    _want_text(row, "context", empty=True)
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"choices wants two texts or more, none of them empty, found {choices!r}")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer wants the place of the right choice, 0 to {len(choices) - 1}, found {answer!r}")


def _check_target(row: Row) -> None:
    _want_text(row, "prompt", empty=True)
    _want_text(row, "target")


def _check_answer(row: Row) -> None:
    _want_text(row, "prompt")
    _want_text(row, "answer")
    if row["answer"] != row["answer"].strip() or "\n" in row["answer"]:
        raise ValueError(f"answer wants one line without blanks around it, found {row['answer']!r}")


def _rolling() -> dict[str, Any]:
    metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [metric],
    }


def _choosing() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "metric_list": [{"metric": name, **MEAN} for name in ("acc_norm", "acc")],
    }


def _continuing() -> dict[str, Any]:
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    return {
        "output_type": "loglikelihood",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "target_delimiter": "",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc", **MEAN}, perplexity],
    }


def _answering() -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": ANSWER_TOKENS},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    }


ALL = (
    Form(keys=("text",), check=_check_text, config=_rolling),
    Form(keys=("context", "choices", "answer"), check=_check_choices, config=_choosing),
    Form(keys=("prompt", "target"), check=_check_target, config=_continuing),
    Form(keys=("prompt", "answer"), check=_check_answer, config=_answering),
)
