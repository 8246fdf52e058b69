"""From a ladder file to run folders that are ready to launch: shards, plan.json, spec.json."""

import functools
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.batch.advice import advised_batches
from homelab_scaling.batch.bracket import tuned_rates
from homelab_scaling.box import Box, detect_box
from homelab_scaling.data.progress import show_progress
from homelab_scaling.data.shards import build_shards, open_shards
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.begin import start_of
from homelab_scaling.plan.cost import measured_rates
from homelab_scaling.plan.ddp_times import read_ddp
from homelab_scaling.plan.ladder import find_corpus, plan_ladder, read_ladder, shards_folder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.seeds import has_begun, plan_with_seeds, with_seeds
from homelab_scaling.runs import RunFolder, flock, run_folders
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.train.oom_notes import keep_smaller


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A ladder, its lab LAB/<ladder>, and the box it runs on."""

    ladder: Ladder
    ladder_file: Path
    lab: Path
    shards: Path
    """The lab's own folder, or the one that data.shards names."""
    box: Box
    seeds_asked: bool = False
    """The ladder's seeds are those of a flag, not of its file."""

    @property
    def shards_reference(self) -> str:
        """What spec.json says: relative where the lab owns them, so that a lab can be moved whole."""
        return "../../shards" if self.ladder.data.shards is None else str(self.shards)

    def run(self, run_id: str) -> RunFolder:
        return RunFolder(self.lab / "runs" / run_id)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second `homelab run` out of this experiment."""
        with flock(self.lab / ".lock", f"{self.lab}: another `homelab run` is at work here; wait for it or stop it"):
            yield


def open_experiment(ladder: str, labs: Path, n_seeds: int | None = None) -> Experiment:
    """The experiment behind a ladder file or the name of a shipped one; touches nothing.

    Args:
        n_seeds: so many instead of the ladder's own.
    """
    parsed, path = read_ladder(ladder)
    if n_seeds is not None:
        parsed = with_seeds(parsed, n_seeds)
    lab = (labs / parsed.name).resolve()
    shards = shards_folder(parsed, path, labs.resolve())
    asked = n_seeds is not None
    return Experiment(ladder=parsed, ladder_file=path, lab=lab, shards=shards, box=detect_box(), seeds_asked=asked)


def existing_corpus(experiment: Experiment) -> CorpusManifest | None:
    """The manifest of finished shards, or None where they are still to be built."""
    return find_corpus(experiment.ladder, experiment.shards)


def ensure_corpus(experiment: Experiment) -> CorpusManifest:
    """The corpus, built from the ladder's sources if it is not there yet; progress goes to stderr."""
    data = experiment.ladder.data
    if data.shards is not None:
        return open_shards(experiment.shards).manifest
    here = experiment.ladder_file.parent
    named = data.tokenizer in ("bytes", "gpt2") or data.tokenizer.startswith("bpe:")
    with show_progress() as progress:
        return build_shards(
            [s if s == "python" or s.startswith("hf:") else str((here / s).resolve()) for s in data.sources],
            data.tokenizer if named else str((here / data.tokenizer).resolve()),
            experiment.shards,
            text_field=data.text_field,
            val_frac=data.val_frac,
            max_bytes=data.max_bytes,
            weights=data.weights,
            epochs=data.epochs,
            near_duplicates=data.near_duplicates,
            progress=progress,
        )


def make_plan(
    experiment: Experiment, corpus: CorpusManifest | None, *, advised: bool = True, tuned: bool = True
) -> Plan:
    """The plan for what is known so far, with every seed that the lab has.

    Args:
        advised: obey the lab's batch.json and lr.json; False is the plan as the ladder alone would have it.
        tuned: obey lr.json.

    Raises:
        SpecError: the ladder cannot be run as written, or has runs of more seeds than were asked for.
    """
    planner = functools.partial(
        plan_ladder,
        corpus=corpus,
        box=experiment.box,
        shards=experiment.shards_reference,
        measured=measured_rates([experiment.lab]),
        ddp=read_ddp(experiment.lab.parent),
        advised=advised_batches(experiment.lab) if advised else None,
        tuned=tuned_rates(experiment.lab) if advised and tuned else None,
        folder=experiment.ladder_file.parent,
        start=start_of(experiment.ladder, experiment.ladder_file, corpus, experiment.shards),
    )
    return plan_with_seeds(experiment.ladder, experiment.lab, planner, asked=experiment.seeds_asked)


def write_specs(
    plan: Plan,
    experiment: Experiment,
    change: Callable[[RunSpec], RunSpec] = lambda spec: spec,
    rungs: Collection[str] | None = None,
) -> list[tuple[RunSpec, RunFolder]]:
    """Writes plan.json and every spec.json; a run that exists keeps its science, its execution settings are renewed.

    Only a micro-batch that memory was too small for stays as small as it became. A spec that never began and that the
    plan does not hold any more, because its batch has been measured since, goes.

    Args:
        rungs: only the specs of these; the batch of the others is not settled yet.
    """
    codec.write_json(experiment.lab / "plan.json", plan)
    _forget_unbegun(plan, experiment)
    written = []
    for planned in plan.runs:
        if rungs is not None and planned.rung not in rungs:
            continue
        folder = experiment.run(planned.run_id)
        spec = keep_smaller(change(planned), folder)
        codec.write_json(folder.spec, spec)
        written.append((spec, folder))
    return written


def _forget_unbegun(plan: Plan, experiment: Experiment) -> None:
    wanted = {run.run_id for run in plan.runs}
    folders = run_folders(experiment.lab) if (experiment.lab / "runs").is_dir() else []
    for folder in folders:
        if folder.path.name not in wanted and not has_begun(folder):
            shutil.rmtree(folder.path)


def prepare_rung(ladder: str, rung: str, labs: Path) -> list[tuple[RunSpec, RunFolder]]:
    """Every run of one rung, its spec.json written where it is missing; for launching by hand.

    Raises:
        SpecError: no such rung, or the shards are not built yet.
    """
    experiment = open_experiment(ladder, labs)
    corpus = existing_corpus(experiment)
    if corpus is None:
        raise SpecError(f"{experiment.shards}: no shards yet; run `homelab run {ladder} --prepare` first")
    chosen = [spec for spec in make_plan(experiment, corpus).runs if spec.rung == rung]
    if not chosen:
        names = ", ".join(r.name for r in experiment.ladder.rungs)
        raise SpecError(f"{experiment.ladder_file.name} has no rung {rung!r}; its rungs are {names}")
    prepared = []
    for spec in chosen:
        folder = experiment.run(spec.run_id)
        if not folder.spec.exists():
            codec.write_json(folder.spec, spec)
        prepared.append((folder.read_spec(), folder))
    return prepared
