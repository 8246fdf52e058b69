"""Points off tracked runs: one per run (one per decay of ours), with where each number came from."""

import csv
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from homelab_scaling.errors import DataError
from homelab_scaling.fit.from_trackers import guess
from homelab_scaling.fit.from_trackers.tracked import TrackedRun, as_number, as_truth
from homelab_scaling.fit.points import FIELDS, TEXT, WHOLE, PointTable, fault_of, same_value
from homelab_scaling.runs import Excluded, LossPoint

SAME_NAME = ("seed", "data_id", "family", "schedule", "n_tokens_unique")
"""Columns that a configuration may hold under our own name. Not `n_head`, which means heads everywhere else."""
COUNTED = ("n_body", "n_head", "n_embed", "n_pos", "flops")
BY_NAME = "name:"
SHOWN_TAGS = 12
JOINABLE = tuple(f for f in FIELDS if f not in ("row_id", "run_id", "loss_nats"))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How points are read off runs."""

    columns: dict[str, str] = field(default_factory=dict)
    """Our column -> a curve, a configuration's name, or `name:REGEX` for a part of the run's name."""
    where: dict[str, str] = field(default_factory=dict)
    """Configuration's name -> the value a run must have."""
    loss_at: Literal["last", "min"] = "last"
    tokens_per_step: float | None = None
    n_vocab: int | None = None
    """Vocabulary to count a GPT-2's embeddings with, where its configuration says none or a padded one."""
    table: Path | None = None
    """CSV of `run,n_params,n_tokens,...`."""
    keep_unfinished: bool = False


class _NoPoint(Exception):
    """Why a run gives none."""


@dataclass(kw_only=True)
class _Found:
    """Values of one point with what is said of them."""

    values: dict[str, Any] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    counted: dict[str, Any] = field(default_factory=dict)
    """Groups of parameters and FLOPs by the shape, for what nobody says."""

    def put(self, column: str, value: object, how: str) -> None:
        self.values[column] = _checked(column, value, how)
        self.how[column] = how


def collect(source: str, runs: Sequence[TrackedRun], reading: Reading) -> PointTable:
    """The points of these runs; each run that gives none is excluded with its reason.

    Raises:
        DataError: no curve can be the loss or several can, or a flag names what no run has.
    """
    _check_flags(reading)
    runs = _chosen(_told_apart(runs), reading.where)
    loss_tag = _loss_tag([r for r in runs if r.broken is None], reading)
    joined, strays = _joined(reading.table, runs)
    found: list[_Found] = []
    excluded: list[Excluded] = []
    for run in runs:
        try:
            found += _points_of(run, loss_tag, reading, joined.get(run.name, {}))
        except _NoPoint as why:
            excluded.append(Excluded(row_id=run.name, reason=str(why)))
    if not all(one.counted for one in found):  # part counted, part 6 N D would be two conventions in one table
        for one in found:
            one.counted.clear()
    notes = [f"points read off {source}: {len(found)} from {len(runs)} runs", *_notes(found)]
    if any(one.counted for one in found):
        notes.append("flops: counted exactly from layers, width and context")
    if strays:
        notes.append(f"{reading.table}: no run here is called {', '.join(strays[:5])}")
    points = tuple(LossPoint(**one.counted | one.values) for one in found)
    return PointTable(source=source, points=points, excluded=tuple(excluded), notes=tuple(notes))


def _check_flags(reading: Reading) -> None:
    for ours, theirs in reading.columns.items():
        if ours not in FIELDS:
            raise DataError(f"--columns {ours}={theirs}: we know no column {ours}; choose among {', '.join(FIELDS)}")
        if theirs.startswith(BY_NAME):
            try:
                n_groups = re.compile(theirs.removeprefix(BY_NAME)).groups
            except re.error as error:
                raise DataError(f"--columns {ours}={theirs}: not a regular expression ({error}); mend it") from None
            if n_groups != 1:
                raise DataError(f"--columns {ours}={theirs}: wants one group, as in {ours}=name:(\\d+M)")
    if reading.tokens_per_step is not None and not 0 < reading.tokens_per_step < math.inf:
        raise DataError(f"--tokens-per-step {reading.tokens_per_step}: wants a number above 0")
    if reading.n_vocab is not None and reading.n_vocab < 2:
        raise DataError(f"--n-vocab {reading.n_vocab}: wants 2 or more")


def _told_apart(runs: Sequence[TrackedRun]) -> list[TrackedRun]:
    """The runs; of those that share a name, each with its id behind it."""
    times = Counter(run.name for run in runs)
    apart = []
    for index, run in enumerate(runs):
        name = f"{run.name} ({next(iter(run.aliases), index)})" if times[run.name] > 1 else run.name
        apart.append(dataclasses.replace(run, name=name, aliases=(*run.aliases, run.name)))
    return apart


def _chosen(runs: list[TrackedRun], where: dict[str, str]) -> list[TrackedRun]:
    for name, wanted in where.items():
        known = sorted({fact for run in runs for fact in run.facts})
        if name not in known:
            raise DataError(f"--where {name}={wanted}: no run's configuration has {name}; there are {_some(known)}")
        values = sorted({str(run.facts[name]) for run in runs if name in run.facts})
        runs = [run for run in runs if name in run.facts and same_value(str(run.facts[name]), wanted)]
        if not runs:
            raise DataError(f"--where {name}={wanted}: no run has it; {name} is {_some(values)}")
    return runs


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN_TAGS} more" if len(listed) > SHOWN_TAGS else ""
    return (", ".join(listed[:SHOWN_TAGS]) or "none") + more


# ----------------------------------------------------------------------------------------------------------------- loss


def _loss_tag(runs: Sequence[TrackedRun], reading: Reading) -> str | None:
    """The curve to take; None for the full validations of our own runs.

    Raises:
        DataError: none fits, or several do; the sentence lists what there is.
    """
    tags = sorted({tag for run in runs for tag in run.tags})
    given = reading.columns.get("loss_nats")
    if given is not None:
        if not any(given in run.tags or given in run.facts for run in runs) and not given.startswith(BY_NAME):
            raise DataError(f"--columns loss_nats={given}: no run has it; their curves are {_some(tags)}")
        return given
    candidates = [tag for tag in tags if guess.looks_like_loss(tag)]
    ours = any(guess.OURS.fullmatch(tag) for tag in tags)
    if ours and not candidates:
        return None
    if len(candidates) == 1 and not ours:
        return candidates[0]
    if not tags:
        why = next((run.broken for run in runs if run.broken), None)
        raise DataError(f"no run has a curve{f' ({why})' if why else ''}; name the folder or store of the training")
    if candidates:
        also = ["decay-*-val-full/loss"] if ours else []
        raise DataError(
            f"several curves may be the loss ({_some(candidates + also)}); choose with --columns "
            f"loss_nats={candidates[0]}"
        )
    raise DataError(
        f"no curve is called as a validation loss usually is; there are {_some(tags)}: name one with --columns "
        "loss_nats=..."
    )


def _losses(run: TrackedRun, tag: str | None, reading: Reading) -> Iterator[tuple[_Found, int | None]]:
    """A point with its loss, and the step of the tracker's axis where that is (None: not off a curve)."""
    if tag is None:
        yield from _our_rows(run)
        return
    point = _Found(values={"row_id": run.name, "run_id": run.name})
    if tag not in run.tags:
        value = _look_up(run, tag, None)
        if value is None:
            raise _NoPoint(f"no {tag}; its curves are {_some(sorted(run.tags))}")
        point.put("loss_nats", value, tag)
        yield point, None
        return
    picked = run.read(tag).pick(reading.loss_at)
    if picked is None:
        raise _NoPoint(f"its {tag} has no value")
    which = "the last" if reading.loss_at == "last" else "the lowest (of many noisy values: biased low)"
    point.put("loss_nats", picked[1], f"{which} value of {tag}")
    yield point, picked[0]


def _our_rows(run: TrackedRun) -> Iterator[tuple[_Found, int | None]]:
    """Rows of a run of our own: each decay's full validation; a cosine run's one."""
    tags = sorted((tag for tag in run.tags if guess.OURS.fullmatch(tag)), key=lambda t: (len(t), t))
    if not tags:
        raise _NoPoint(f"no full validation at the end of a decay; its curves are {_some(sorted(run.tags))}")
    for tag in tags:
        match = guess.OURS.fullmatch(tag)
        picked = run.read(tag).pick("last")
        if match is None or picked is None:
            continue
        point = _Found(values={"run_id": run.name, "row_id": run.name, "decayed": True})
        point.put("loss_nats", picked[1], "the full validation at the end of each decay")
        if match[1]:
            point.put("n_tokens", float(match[1]), "the horizon in the decay's name")
            point.values["row_id"] = f"{run.name}@{match[1]}"
        for column, ours in (("loss_se_nats", "loss_se"), ("bpb", "bpb")):
            beside = tag.removesuffix("loss") + ours
            value = run.read(beside).exactly(picked[0]) if beside in run.tags else None
            if value is not None:
                point.values[column] = _checked(column, value, beside)
        yield point, picked[0]


# ------------------------------------------------------------------------------------------------------- other columns


def _points_of(run: TrackedRun, tag: str | None, reading: Reading, told: dict[str, object]) -> Iterator[_Found]:
    if run.broken is not None:
        raise _NoPoint(run.broken)
    if run.unfinished is not None and not reading.keep_unfinished:
        raise _NoPoint(f"{run.unfinished} (--keep-unfinished takes it)")
    done = []
    for point, step in _losses(run, tag, reading):
        for column, value in told.items():
            point.put(column, value, f"--with {reading.table}")
        for column, name in reading.columns.items():
            if column in told or column == "loss_nats":
                continue
            value = _look_up(run, name, step)
            if value is None:
                raise _NoPoint(f"no {name} for {column} in its curves, configuration or name")
            point.put(column, value, name)
        for column in (*SAME_NAME, *(("start",) if tag is None else ())):
            if column not in point.values and (value := run.facts.get(column)) not in (None, ""):
                point.values[column] = _checked(column, value, column)
        _add_params(point, run, reading)
        _add_tokens(point, run, reading, step)
        _add_counted(point, run, reading)
        done.append(point)
    return iter(done)


def _look_up(run: TrackedRun, name: str, step: int | None) -> object:
    """A curve's value at that step, a configuration's value, or the part of the run's name."""
    if name.startswith(BY_NAME):
        match = re.search(name.removeprefix(BY_NAME), run.name)
        return match[1] if match else None
    if name in run.tags:
        series = run.read(name)
        return series.until(step) if step is not None else (series.values[-1] if series.values else None)
    return run.facts.get(name)


def _add_params(point: _Found, run: TrackedRun, reading: Reading) -> None:
    if "n_params" in point.values:
        return
    for name in guess.named(guess.PARAM_NAMES, run.facts):
        if (value := as_number(run.facts[name])) is not None:
            point.put("n_params", value, f"{name} of the configuration")
            return
    for name in guess.named(guess.PARAM_NAMES, run.tags):
        point.put("n_params", _look_up(run, name, None), f"the last value of {name}")
        return
    counted = guess.count_gpt2(run.facts, reading.n_vocab)
    if isinstance(counted, str):
        raise _NoPoint(
            f"no n_params: nothing called so in its configuration, and {counted}; name it with --columns n_params=... "
            "or give a table with --with"
        )
    point.put("n_params", counted.n_params, counted.how)


def _add_tokens(point: _Found, run: TrackedRun, reading: Reading, step: int | None) -> None:
    if "n_tokens" in point.values:
        return
    if reading.tokens_per_step is not None:
        _tokens_of_steps(point, run, step, reading.tokens_per_step, f"{reading.tokens_per_step:,.0f} tokens")
        return
    for name in guess.named(guess.TOKEN_NAMES, run.tags):
        if (value := _look_up(run, name, step)) is not None:
            point.put("n_tokens", value, f"{name} at that step")
            return
    for name in guess.named(guess.TOKEN_NAMES, run.facts):
        if (value := as_number(run.facts[name])) is not None:
            point.put("n_tokens", value, f"{name} of the configuration")
            return
    per_step = guess.tokens_per_step(run.facts)
    if per_step is None:
        raise _NoPoint(
            "no n_tokens: neither a curve nor its configuration is called so; give --tokens-per-step, name it with "
            "--columns n_tokens=... or give a table with --with"
        )
    _tokens_of_steps(point, run, step, *per_step)


def _tokens_of_steps(point: _Found, run: TrackedRun, step: int | None, per_step: float, how: str) -> None:
    if step is None:
        raise _NoPoint("no n_tokens: its loss is not off a curve, so it has no step; give a table with --with")
    steps, axis = guess.optimizer_step(run, step)
    if steps <= 0:
        raise _NoPoint(f"its loss was measured at step {steps:g} by {axis}: no tokens yet")
    point.put("n_tokens", steps * per_step, f"{axis} x {how}")


def _add_counted(point: _Found, run: TrackedRun, reading: Reading) -> None:
    """Groups of parameters and exact FLOPs, where counting the shape gives the n_params that is taken."""
    counted = guess.count_gpt2(run.facts, reading.n_vocab)
    if isinstance(counted, str) or counted.n_params != point.values["n_params"]:
        return
    groups = counted.params
    flops = counted.flops_per_token * point.values["n_tokens"]
    values = (counted.n_body, groups.n_head, groups.n_embed, groups.n_pos, flops)
    point.counted = dict(zip(COUNTED, values, strict=True))


def _checked(column: str, value: object, how: str) -> object:
    """The value as the column wants it.

    Raises:
        _NoPoint: it cannot be one.
    """
    if column in TEXT:
        return str(value)
    if column == "decayed":
        if (truth := as_truth(value)) is None:
            raise _NoPoint(f"{column} is {str(value)[:40]!r} ({how}), wants true or false")
        return truth
    number = as_number(value)
    if number is None:
        raise _NoPoint(f"{column} is {str(value)[:40]!r} ({how}), wants a finite number")
    if fault := fault_of(column, number):
        raise _NoPoint(f"{column} is {number:g} ({how}), {fault}")
    return round(number) if column in WHOLE else number


def _notes(found: Sequence[_Found]) -> Iterator[str]:
    """Where each column came from, with the number of points where that differs."""
    for column in dict.fromkeys(name for one in found for name in one.how):
        ways = Counter(one.how[column] for one in found if column in one.how)
        told = [f"{way} ({n} points)" if len(ways) > 1 else way for way, n in ways.most_common(4)]
        yield f"{column}: {'; '.join(told)}"


# ---------------------------------------------------------------------------------------------------------------- table


def _joined(path: Path | None, runs: Sequence[TrackedRun]) -> tuple[dict[str, dict[str, object]], list[str]]:
    """What a table says of each run, by the run's name; and names in it that no run has.

    Raises:
        DataError: no such file, no column `run`, a column we do not know, or a run twice.
    """
    if path is None:
        return {}, []
    known = {alias: run.name for run in runs for alias in run.aliases} | {run.name: run.name for run in runs}
    rows: dict[str, dict[str, object]] = {}
    strays = []
    for name, told in _table_rows(path):
        if name not in known:
            strays.append(name)
            continue
        if known[name] in rows:
            raise DataError(f"--with {path}: run {name} is there twice; keep one row")
        rows[known[name]] = told
    return rows, strays


def _table_rows(path: Path) -> list[tuple[str, dict[str, object]]]:
    wanted = "a header of run,n_params,n_tokens and one line per run"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except FileNotFoundError:
        raise DataError(f"--with {path}: no such file; write {wanted}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--with {path}: cannot be read ({error}); write {wanted}") from None
    if "run" not in header:
        raise DataError(f"--with {path}: no column run; wants {wanted}")
    odd = [name for name in header if name != "run" and name not in JOINABLE]
    if odd:
        raise DataError(f"--with {path}: column {odd[0]!r} is none of ours; choose among run, {', '.join(JOINABLE)}")
    told = []
    for row in rows:
        cells = {column: cell for column, cell in row.items() if column in JOINABLE and cell and cell.strip()}
        told.append(((row["run"] or "").strip(), dict[str, object](cells)))
    return told
