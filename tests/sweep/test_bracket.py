"""The bracket of rates over an experiment: what is trained, moved and frozen, with launches that only write records."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fake_probes import write_ladder

from homelab_scaling import codec
from homelab_scaling.batch.bracket import Bracket, read_bracket
from homelab_scaling.plan.counting import count_params
from homelab_scaling.runs import Machine, Row, RunFolder, RunRecord, RunStatus, read_runs, run_folders
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.sweep.bracket import ensure_rates
from homelab_scaling.sweep.local import Outcome, Run
from homelab_scaling.sweep.prepare import Experiment, ensure_corpus, make_plan, open_experiment, write_specs

MACHINE = Machine(device="cpu", n_processes=1, torch="", accelerate="", transformers="", python="", homelab_scaling="")
RULE = 1e-2


@dataclass
class World:
    """Stands for the trainer: losses with a best rate of their own for each size."""

    best: Callable[[int], float] = lambda n: RULE
    diverge_above: float = math.inf
    stop_at: int | None = None
    launched: list[list[str]] = field(default_factory=list)

    def __call__(self, runs: list[Run]) -> Outcome:
        self.launched.append([spec.run_id for spec, _ in runs])
        failed = {}
        for i, (spec, folder) in enumerate(runs):
            if self.stop_at == i:
                return Outcome(finished=(), failed={}, stopped=True)
            if folder.record.exists():
                continue
            diverges = spec.science.schedule.lr_peak > self.diverge_above
            if diverges:
                failed[spec.run_id] = "diverged: too high"
            rows = () if diverges else tuple(self.row(spec, tokens) for tokens in spec.science.horizons_tokens)
            self.write(spec, folder, "diverged" if diverges else "finished", rows)
        return Outcome(finished=(), failed=failed, stopped=False)

    def write(self, spec: RunSpec, folder: RunFolder, status: RunStatus, rows: tuple[Row, ...]) -> None:
        record = RunRecord(
            run_id=spec.run_id,
            ladder=spec.ladder,
            rung=spec.rung,
            status=status,
            reason=None if status == "finished" else "too high",
            science_hash=spec.science.hash,
            rows=rows,
            machine=MACHINE,
        )
        codec.write_json(folder.record, record)

    def row(self, spec: RunSpec, tokens: int) -> Row:
        science = spec.science
        n = count_params(science.shape, science.n_vocab)
        off = math.log(science.schedule.lr_peak / self.best(n.n_body))
        return Row(
            row_id=f"{spec.run_id}@{tokens}",
            run_id=spec.run_id,
            rung=spec.rung,
            seed=science.seed,
            n_params=n.n_params,
            n_tokens=tokens,
            loss_nats=1 + 8 * n.n_params**-0.1 * tokens**-0.05 + 0.2 * off**2,
            loss_se_nats=None,
            bpb=None,
            flops=1.0,
            flops_marginal=1.0,
            n_body=n.n_body,
            n_pos=None,
            n_embed=None,
            n_head=None,
            n_steps=1,
            batch_tokens=science.batch_tokens_global,
            lr_peak=science.schedule.lr_peak,
            schedule="wsd",
            decayed=True,
            optimizer="adamw",
            precision="fp32",
            data_id="",
            n_tokens_unique=tokens,
            seconds=None,
            seconds_marginal=None,
            tokens_per_s=None,
            mfu_frac=None,
        )


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Experiment, CorpusManifest]:
    """Three rungs whose rates are to be tuned on two."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = write_ladder(tmp_path)
    found = open_experiment(str(path), tmp_path / "lab")
    lr = replace(found.ladder.lr, rule="fixed", peak=RULE, bracket=(0.5, 1.0, 2.0))
    batch = replace(found.ladder.batch, tokens=512)
    found = replace(found, ladder=replace(found.ladder, lr=lr, batch=batch))
    return found, ensure_corpus(found)


def tune(experiment: tuple[Experiment, CorpusManifest], world: World, said: list[str] | None = None) -> Bracket | None:
    ended = ensure_rates(*experiment, world, (said if said is not None else []).append)
    assert ended is None
    return read_bracket(experiment[0].lab)


def peaks(experiment: tuple[Experiment, CorpusManifest]) -> dict[str, float]:
    return {spec.rung: spec.science.schedule.lr_peak for spec in make_plan(*experiment).runs}


def test_the_best_rates_are_found_moved_and_taken_to_larger_rungs(experiment) -> None:
    world, said = World(best=lambda n: 1.3 * RULE * (n / 3000) ** -0.2), []
    bracket = tune(experiment, world, said)
    assert bracket is not None and [r.name for r in bracket.rungs] == ["a", "b"]
    assert [len(ids) for ids in world.launched] == [3, 3]
    assert bracket.rates.slope == pytest.approx(-0.2, abs=1e-6)
    plan = make_plan(*experiment)
    sizes = {r.name: r.size.params.n_body for r in plan.rungs}
    assert peaks(experiment)["c"] == pytest.approx(world.best(sizes["c"]), rel=1e-5)
    assert plan.rungs[2].training.lr_source.endswith("tuned on a, b")
    lab = experiment[0].lab
    winners = {run_id for rung in bracket.rungs for run_id in rung.winner.run_ids}
    assert {f.path.name for f in run_folders(lab)} == winners == {s.run_id for s in plan.runs if s.rung != "c"}
    assert len(list((lab / "bracket_runs").iterdir())) == 4
    assert any("takes x 1" in line for line in said) and "N_body^-0.20" in said[-2] and "exponent" not in said[-1]
    spec = run_folders(lab)[0].read_spec()
    assert (run_folders(lab)[0].path / spec.shards).resolve() == experiment[0].shards


def test_losers_are_no_part_of_the_results(experiment) -> None:
    tune(experiment, World())
    plan = make_plan(*experiment)
    write_specs(plan, experiment[0])
    points, excluded = read_runs(experiment[0].lab)
    assert {p.run_id for p in points} == {s.run_id for s in plan.runs if s.rung != "c"}
    assert [e.row_id.split("-")[0] for e in excluded] == ["c"]


def test_it_goes_beyond_an_edge_and_the_winner_there_is_the_rungs_own_run(experiment) -> None:
    world = World(best=lambda n: 4.2 * RULE)
    bracket = tune(experiment, world)
    assert bracket is not None and [t.factor for t in bracket.rungs[0].trials] == [0.5, 1, 2, 4, 8]
    assert bracket.rungs[0].best.factor == 4 and bracket.rungs[0].best.vertex == pytest.approx(4.2)
    assert peaks(experiment)["a"] == pytest.approx(4 * RULE)
    assert all(h.gains_nats[0] > 0.3 for h in bracket.effect.horizons)


def test_started_again_it_trains_nothing_and_says_the_same(experiment) -> None:
    first = tune(experiment, World())
    world = World()
    assert tune(experiment, world) == first and world.launched == []


def test_stopped_in_the_middle_it_goes_on(experiment) -> None:
    stopping = World(stop_at=1)
    ended = ensure_rates(*experiment, stopping, [].append)
    assert ended is not None and ended.stopped and read_bracket(experiment[0].lab) is None
    bracket = tune(experiment, World())
    assert bracket is not None and len(bracket.rungs) == 2


def test_killed_between_the_word_and_the_move_it_moves_what_is_left(experiment) -> None:
    bracket = tune(experiment, World())
    assert bracket is not None
    lab, run_id = experiment[0].lab, bracket.rungs[0].winner.run_ids[0]
    (lab / "runs" / run_id).rename(lab / "bracket_runs" / run_id)
    codec.write_json(RunFolder(lab / "runs" / run_id).spec, {"prepared": True})
    world = World()
    tune(experiment, world)
    assert world.launched == [] and RunFolder(lab / "runs" / run_id).record.exists()


def test_a_rate_that_diverges_is_a_trial_lost_and_all_of_them_an_error(experiment) -> None:
    bracket = tune(experiment, World(diverge_above=1.5 * RULE))
    assert bracket is not None and bracket.rungs[0].trials[-1].why_not is not None
    assert bracket.rungs[0].best.factor == 1


def test_all_rates_diverged_is_said_with_the_rung(experiment) -> None:
    ended = ensure_rates(*experiment, World(diverge_above=0), [].append)
    assert ended is not None and ended.exit_code == 1 and "every rate diverged" in ended.failed["a"]
    assert read_bracket(experiment[0].lab) is None


def test_a_trial_that_failed_keeps_larger_rungs_from_starting(experiment) -> None:
    def failing(runs: list[Run]) -> Outcome:
        return Outcome(finished=(), failed={runs[0][0].run_id: "failed: no shards"}, stopped=False)

    ended = ensure_rates(*experiment, failing, [].append)
    assert ended is not None and ended.exit_code == 1 and read_bracket(experiment[0].lab) is None


def test_a_rung_that_had_begun_keeps_its_rate(experiment) -> None:
    world = World(best=lambda n: 2 * RULE)
    (spec, folder), *_ = write_specs(make_plan(*experiment), experiment[0])
    world.write(spec, folder, "stopped", ())
    bracket = tune(experiment, world)
    assert bracket is not None and [r.name for r in bracket.rungs] == ["b"] and bracket.rates.kept == {"a": RULE}
    assert peaks(experiment)["a"] == RULE and peaks(experiment)["c"] == pytest.approx(2 * RULE, rel=1e-5)


def test_a_bracket_widened_after_larger_rungs_began_leaves_them_their_rates(experiment) -> None:
    world = World(best=lambda n: RULE)
    tune(experiment, world)
    before = peaks(experiment)
    assert before["c"] == RULE, "the trial at 1 would be the very run that is there"
    (spec, folder) = next(run for run in write_specs(make_plan(*experiment), experiment[0]) if run[0].rung == "c")
    world.write(spec, folder, "finished", tuple(world.row(spec, n) for n in spec.science.horizons_tokens))
    found, corpus = experiment
    wider = replace(found, ladder=replace(found.ladder, lr=replace(found.ladder.lr, bracket_rungs=3)))
    bracket = tune((wider, corpus), world)
    assert bracket is not None and [r.name for r in bracket.rungs] == ["a", "b"] and len(world.launched) == 2
    assert peaks((wider, corpus)) == before


def test_only_rungs_whose_batches_are_settled_are_tuned(experiment) -> None:
    world = World()
    assert ensure_rates(*experiment, world, [].append, rungs=["a"]) is None
    bracket = read_bracket(experiment[0].lab)
    assert bracket is not None and [r.name for r in bracket.rungs] == ["a"] and len(world.launched) == 1
    assert ensure_rates(*experiment, world, [].append, rungs=["b", "c"]) is None
    bracket = read_bracket(experiment[0].lab)
    assert bracket is not None and [r.name for r in bracket.rungs] == ["a", "b"]
    assert ensure_rates(*experiment, world, [].append, rungs=["c"]) is None and len(world.launched) == 2


def test_a_rung_of_another_shape_is_tuned_anew(experiment) -> None:
    tune(experiment, World())
    found, corpus = experiment
    rungs = (replace(found.ladder.rungs[0], d_model=24), *found.ladder.rungs[1:])
    world = World()
    bracket = tune((replace(found, ladder=replace(found.ladder, rungs=rungs)), corpus), world)
    assert bracket is not None and len(world.launched) == 1 and bracket.rungs[0].shape.d_model == 24


def test_a_ladder_without_a_bracket_is_left_alone(experiment) -> None:
    found, corpus = experiment
    plain = replace(found, ladder=replace(found.ladder, lr=replace(found.ladder.lr, bracket=())))
    world = World()
    assert ensure_rates(plain, corpus, world, [].append) is None and not world.launched
    assert read_bracket(found.lab) is None


@pytest.mark.slow
def test_homelab_run_tunes_moves_and_trains_the_rest(tmp_path: Path) -> None:
    path = write_ladder(tmp_path)
    text = path.read_text(encoding="utf-8").replace("[100_000, 200_000]", "[10_240, 20_480]")
    text = text.replace("[lr]\npeak = 1e-2", '[lr]\nrule = "fixed"\npeak = 1e-2\nbracket = [0.25, 1, 4]')
    path.write_text(text.replace("[batch]", "[batch]\ntokens = 512"), encoding="utf-8")
    command = [sys.executable, "-m", "homelab_scaling", "run", str(path), "--lab", str(tmp_path / "lab"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    lab = tmp_path / "lab" / "mini"
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    bracket = read_bracket(lab)
    assert bracket is not None and [r.name for r in bracket.rungs] == ["a", "b"] and bracket.effect.horizons
    points, excluded = read_runs(lab)
    assert len(points) == 6 and excluded == []
    winners = {run_id for rung in bracket.rungs for run_id in rung.winner.run_ids}
    assert winners < {p.run_id for p in points}
    (largest,) = {f.read_spec().science.schedule.lr_peak for f in run_folders(lab) if f.path.name.startswith("c-")}
    n_body = next(p.n_body for p in points if p.run_id not in winners)
    assert n_body is not None and largest == pytest.approx(1e-2 * bracket.rates.factor(n_body), rel=1e-4)
    assert "Learning rate" in (lab / "report" / "report.md").read_text(encoding="utf-8")
    before = {p: p.stat().st_mtime_ns for p in lab.glob("*runs/*/metrics.jsonl")}
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0 and "not repeated" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in lab.glob("*runs/*/metrics.jsonl")} == before
