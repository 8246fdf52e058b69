"""Everything a report says, read once from a lab's folder; what is missing becomes a sentence, not a crash."""

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.batch.advice import BatchAdvice, read_advice
from homelab_scaling.errors import HomelabError
from homelab_scaling.fit.result import FitReport, load_fit
from homelab_scaling.ladder import Horizons, Reference
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.plan.parts import PublishedRung
from homelab_scaling.report.noise import BatchAt, BatchStudy, Noise, batch_events, noise_lines
from homelab_scaling.report.study import Study
from homelab_scaling.runs import Excluded, Row, RunFolder, RunRecord, read_rows, run_folders
from homelab_scaling.specs import CorpusManifest, ModelShape, RunSpec

Span = tuple[float, float]
"""From when to when, in Unix time."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a figure: a phase of a run."""

    phase: str
    """`trunk` or `decay@<horizon tokens>`."""
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def is_decay(self) -> bool:
        return self.phase.startswith("decay@")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run as a report sees it."""

    run_id: str
    rung: str
    seed: int
    n_params: int
    flops_per_token: float
    spec: RunSpec | None
    """None for a run of another trainer, or where it cannot be read."""
    record: RunRecord | None
    training: tuple[Curve, ...]
    """Loss of each training batch."""
    validation: tuple[Curve, ...]
    """Loss of the small held-out set."""
    noise: tuple[Noise, ...] = ()
    """The gradient noise scale, window by window, where the run measured it."""
    batches: tuple[BatchAt, ...] = ()
    """The steps of a batch warm-up."""
    spans: tuple[Span, ...] = ()
    """When it was in progress."""

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.record.rows if self.record else ()

    @property
    def status(self) -> str:
        return self.record.status if self.record else "no record"


@dataclass(frozen=True, kw_only=True)
class LabView:
    """A lab, ready to be told."""

    name: str
    path: Path
    question: str | None
    corpus: CorpusManifest | None
    plan_warnings: tuple[str, ...]
    n_rungs_planned: int | None
    runs: tuple[RunView, ...]
    """By size, then seed."""
    rows: tuple[Row, ...]
    """By size, then tokens."""
    excluded: tuple[Excluded, ...]
    fit: FitReport | None
    missing: tuple[str, ...]
    """What the report would have liked to find, in sentences."""
    batch: BatchAdvice | None = None
    """batch.json."""
    reference: Reference | None = None
    """The published experiment that the ladder names."""
    planned_shapes: tuple[tuple[str, ModelShape], ...] = ()
    """Rung and shape, by plan.json."""
    n_vocab_planned: int | None = None
    n_cards_planned: int | None = None
    """Of the machine that the plan is for; runs side by side use one each."""
    horizons: Horizons | None = None
    """The ladder's, by plan.json."""
    published: tuple[PublishedRung, ...] = ()
    """The published tokens of its rungs."""

    @cached_property
    def batches(self) -> BatchStudy:
        """What is known of its batches."""
        return BatchStudy(self)

    @cached_property
    def study(self) -> Study:
        """What is worked out from all this."""
        return Study(self)


def collect(lab: Path) -> LabView:
    """A lab's plan, runs, rows and fit.

    Raises:
        SpecError: `lab` is no folder.
    """
    missing: list[str] = []
    plan = _read_plan(lab / "plan.json", missing)
    planned = {str(run["run_id"]) for run in plan.get("runs") or () if isinstance(run, dict) and "run_id" in run}
    has_runs = (lab / "runs").is_dir()
    if not has_runs:
        missing.append("There is no runs folder: nothing has been trained in this lab yet.")
    runs = []
    for folder in run_folders(lab) if has_runs or not lab.is_dir() else []:
        if planned and folder.path.name not in planned:
            continue  # of an earlier ladder; read_rows lists it among the excluded
        view = _read_run(folder, missing)
        if view is not None:
            runs.append(view)
    rows, excluded = _read_rows(lab, runs) if has_runs else ([], [])
    fit = _read_fit(lab / "fit" / "fit.json", len(rows), missing)
    advice, reference = _read_advice(lab, missing), _read_reference(plan, missing)
    return LabView(
        name=lab.resolve().name,
        path=lab,
        question=plan.get("question") if isinstance(plan.get("question"), str) else None,
        corpus=_read_corpus(lab, runs),
        plan_warnings=tuple(str(w) for w in plan.get("warnings") or ()),
        n_rungs_planned=len(plan["rungs"]) if isinstance(plan.get("rungs"), list) else None,
        runs=tuple(sorted(runs, key=lambda r: (r.n_params, r.seed, r.run_id))),
        rows=tuple(sorted(rows, key=lambda r: (r.n_params, r.n_tokens, r.seed))),
        excluded=tuple(excluded),
        fit=fit,
        missing=tuple(missing),
        batch=advice,
        reference=reference,
        planned_shapes=_planned_shapes(plan),
        n_vocab_planned=plan["n_vocab"] if isinstance(plan.get("n_vocab"), int) else None,
        n_cards_planned=_planned_cards(plan),
        horizons=_read_horizons(plan),
        published=_read_published(plan),
    )


def _read_reference(plan: dict[str, Any], missing: list[str]) -> Reference | None:
    """The published experiment; a plan from before there were any names none."""
    if plan.get("reference") is None:
        return None
    try:
        return codec.from_plain(plan["reference"], Reference, "plan.json: reference")
    except HomelabError as error:
        missing.append(f"The published experiment cannot be read ({error}).")
        return None


def _read_horizons(plan: dict[str, Any]) -> Horizons | None:
    """None where the plan is of an older version."""
    with contextlib.suppress(HomelabError):
        return codec.from_plain(plan.get("horizons"), Horizons, "plan.json: horizons")
    return None


def _read_published(plan: dict[str, Any]) -> tuple[PublishedRung, ...]:
    with contextlib.suppress(HomelabError, TypeError):
        return tuple(codec.from_plain(one, PublishedRung, "plan.json") for one in plan.get("published") or ())
    return ()


def _planned_shapes(plan: dict[str, Any]) -> tuple[tuple[str, ModelShape], ...]:
    found = []
    for rung in plan["rungs"] if isinstance(plan.get("rungs"), list) else ():
        with contextlib.suppress(HomelabError, KeyError, TypeError):
            found.append((str(rung["name"]), codec.from_plain(rung["size"]["shape"], ModelShape, "plan.json")))
    return tuple(found)


def _planned_cards(plan: dict[str, Any]) -> int | None:
    box = plan.get("box")
    cards = box.get("n_gpus") if isinstance(box, dict) else None
    return cards if isinstance(cards, int) else None


def _read_advice(lab: Path, missing: list[str]) -> BatchAdvice | None:
    try:
        return read_advice(lab)
    except HomelabError as error:
        missing.append(f"batch.json cannot be read ({error}).")
        return None


def _read_rows(lab: Path, runs: list[RunView]) -> tuple[list[Row], list[Excluded]]:
    """Rows and what is not one; a plan.json that cannot be read must not cost the rows."""
    try:
        return read_rows(lab)
    except HomelabError:
        unfinished = [run for run in runs if run.status != "finished"]
        return [row for run in runs for row in run.rows], [
            Excluded(row_id=run.run_id, reason=f"{run.status}: {run.record.reason if run.record else 'none readable'}")
            for run in unfinished
        ]


def _read_run(folder: RunFolder, missing: list[str]) -> RunView | None:
    try:
        record = folder.read_record()
    except HomelabError:
        record = None  # read_rows lists it among the excluded, with the reason
    row = record.rows[0] if record is not None and record.rows else None
    spec = None
    if folder.spec.exists() or row is None:  # another trainer's run has no spec, and its rows say enough
        try:
            spec = folder.read_spec()
        except HomelabError as error:
            missing.append(f"{folder.path.name}: its spec cannot be read ({error}).")
    try:
        lines = codec.read_jsonl(folder.metrics)
    except HomelabError as error:
        lines = []
        missing.append(f"{folder.path.name}: its curves cannot be read ({error}).")
    try:
        events = codec.read_jsonl(folder.events) if folder.events.exists() else []
    except HomelabError:
        events = []  # a batch warm-up and hours are read from them, and do without
    warmup = spec.science.batch_warmup if spec is not None else None
    if spec is not None:
        science = spec.science
        rung, seed = spec.rung, science.seed
        n_params = count_params(science.shape, science.n_vocab).n_params
        per_token = flops_per_token(science.shape, science.n_vocab)
    elif row is not None:
        rung, seed, n_params, per_token = row.rung, row.seed, row.n_params, row.flops / row.n_tokens
    else:
        return None
    return RunView(
        run_id=spec.run_id if spec is not None else folder.path.name,
        rung=rung,
        seed=seed,
        n_params=n_params,
        flops_per_token=per_token,
        spec=spec,
        record=record,
        training=_curves(lines, "step"),
        validation=_curves([line for line in lines if line.get("set") == "curve"], "val"),
        noise=noise_lines(lines),
        batches=batch_events(events, warmup.from_tokens) if warmup else (),
        spans=run_spans(events, _seconds(record)),
    )


def run_spans(events: Sequence[dict[str, Any]], known_s: float) -> tuple[Span, ...]:
    """When a run was in progress, segment by segment.

    Args:
        events: of events.jsonl.
        known_s: the run's seconds by its record, for the end of a segment that did not live to tell it.
    """
    spans: list[Span] = []
    start = last = None
    for event in events:
        try:
            now = datetime.datetime.fromisoformat(str(event.get("time"))).timestamp()
        except ValueError:
            continue
        if event.get("kind") == "segment":
            if start is not None and last is not None:  # the one before was killed
                spans.append((start, last))
            start = now
        elif event.get("kind") == "end" and start is not None:
            spans.append((start, now))
            start = None
        last = now
    if start is not None and last is not None:
        rest_s = known_s - sum(end - begin for begin, end in spans)
        spans.append((start, max(last, start + rest_s)))
    return tuple(spans)


def _seconds(record: RunRecord | None) -> float:
    if record is None:
        return 0.0
    books = ("seconds_train", "seconds_validate", "seconds_checkpoint", "seconds_paused", "seconds_paced")
    return sum(getattr(record, book) or 0.0 for book in books)


def _curves(lines: list[dict[str, Any]], kind: str) -> tuple[Curve, ...]:
    """The lines of one kind, by phase, in the order of training; a non-finite loss ends its line."""
    phases: dict[str, list[tuple[int, int, float]]] = {}
    for line in lines:
        loss = line.get("loss")
        if line.get("kind") == kind and isinstance(loss, int | float):
            phase = str(line.get("phase", "trunk"))
            phases.setdefault(phase, []).append((int(line["step"]), int(line["tokens"]), float(loss)))
    return tuple(
        Curve(
            phase=phase,
            steps=tuple(p[0] for p in points),
            tokens=tuple(p[1] for p in points),
            losses=tuple(p[2] for p in points),
        )
        for phase, points in phases.items()
    )


def _read_corpus(lab: Path, runs: list[RunView]) -> CorpusManifest | None:
    """The manifest behind the runs; None where the shards have moved away."""
    for run in runs:
        if run.spec is None:
            continue
        path = lab / "runs" / run.run_id / run.spec.shards / "manifest.json"
        try:
            return codec.read_json(path, CorpusManifest)
        except HomelabError:
            return None
    return None


def _read_plan(path: Path, missing: list[str]) -> dict[str, Any]:
    """plan.json as plain data; another version's plan must not stop a report."""
    if not path.exists():
        missing.append("There is no plan.json, so planned and actual figures are not compared.")
        return {}
    try:
        plain = codec.read_plain_json(path)
    except HomelabError as error:
        missing.append(f"plan.json cannot be read ({error}).")
        return {}
    return plain if isinstance(plain, dict) else {}


def _read_fit(path: Path, n_rows: int, missing: list[str]) -> FitReport | None:
    if not path.exists():
        if n_rows:
            missing.append("There is no fit yet: run `homelab fit` on this lab, then `homelab report` again.")
        return None
    try:
        fit = load_fit(path)
    except HomelabError as error:
        missing.append(f"The fit cannot be read ({error}).")
        return None
    lost = [f.draws_file for f in fit.fits if f.draws_file and f.draws_file not in fit.draws]
    if lost:
        missing.append(f"{len(lost)} draws files are gone from the fit folder, so those curves have no band.")
    if fit.n_points + sum("decayed" in e.reason for e in fit.excluded) != n_rows:
        missing.append(f"The fit used {fit.n_points} rows and the lab now holds {n_rows}: run `homelab fit` again.")
    return fit
