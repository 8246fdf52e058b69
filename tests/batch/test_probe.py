"""A probe of a toy rung: planned, run to its result, stopped and resumed, reused, refused where it would mislead."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from short_of_memory import shorten
from toy_run import make_toy_run, steps_of, train_here, write_shards

from homelab_scaling import codec
from homelab_scaling.batch.noise import NoiseHook
from homelab_scaling.batch.probe import (
    ProbePlan,
    ProbeResult,
    finished_probe,
    plan_path,
    plan_probe,
    prepare_probe,
    result_path,
    work_folder,
)
from homelab_scaling.batch.probing import Prober, run_probe, unigram_nats
from homelab_scaling.box import Box
from homelab_scaling.data.shards import open_shards
from homelab_scaling.errors import DataError, SpecError, Stopped
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.specs import RunSpec
from homelab_scaling.train.journal import Diverged
from homelab_scaling.train.model import LanguageModel

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "noise_probe.py"
BOX = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=False)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., tuple[RunSpec, Path]]:
    """`toy(horizons=(400,), **changes)`: a rung's spec and its lab."""
    manifest = write_shards(tmp_path / "shards")

    def make(lab: str = "a", horizons: tuple[int, ...] = (400,), **changes: Any) -> tuple[RunSpec, Path]:
        spec, _ = make_toy_run(tmp_path, manifest, lab=lab, horizons=horizons, **changes)
        return spec, tmp_path / lab

    return make


def run_here(plan: ProbePlan, lab: Path) -> ProbeResult:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    prepare_probe(plan, lab)
    run_probe(plan, lab, started=time.monotonic())
    return codec.read_json(result_path(lab, plan.rung), ProbeResult)


def numbers(result: ProbeResult) -> list[Any]:
    """What must not depend on interruptions and clocks."""
    return [replace(p, overhead_frac=None) for p in result.points]


def test_the_plan_states_windows_precision_and_cost(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, _ = toy()
    spec = replace(spec, execution=replace(spec.execution, predicted_s=40.0))
    plan = plan_probe(spec, burn_in_frac=0.25)
    assert (plan.k, plan.microbatch_seqs) == (8, 1)  # the run's micro-batch of 4 would leave two
    assert plan.burn_in_tokens == 100 * 128
    assert [(w.first_step, w.end_step) for w in plan.windows] == [(12, 24), (24, 49), (49, 100)]
    assert plan.flops == plan.burn_in_tokens * flops_per_token(spec.science.shape, spec.science.n_vocab)
    assert plan.seconds == pytest.approx(40.0 * 100 / 400)
    slower = plan_probe(spec, burn_in_frac=0.25, box=BOX).seconds
    assert slower is not None and slower > 2 * 10.0  # eight forward passes of one sequence, not two of four
    assert plan.steps_for(plan.measurable_tokens) in (12, 13)  # of the shortest window
    assert "12 + 25 + 51 steps of 8 x 1 sequences" in plan.words and "25% of the longest horizon" in plan.words
    long = plan_probe(toy(horizons=(4000,))[0], burn_in_frac=0.25)
    assert long.windows[-1].every > 1 and len(long.windows[-1].steps) <= 128


def test_sharded_parameters_are_refused_before_anything_is_launched(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, _ = toy(horizons=(200,))
    alone = replace(spec, execution=replace(spec.execution, sharding="full"))
    assert plan_probe(alone, burn_in_frac=0.4).k == 8, "one rank holds all parameters, whatever it is called"
    with pytest.raises(SpecError, match=r"found sharded parameters \(FSDP\), wants whole ones"):
        plan_probe(replace(alone, execution=replace(alone.execution, n_processes=2)), burn_in_frac=0.4)


def test_a_probe_measures_at_three_losses_and_is_not_repeated(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, lab = toy()
    plan = plan_probe(spec, burn_in_frac=0.25)
    assert finished_probe(plan, lab) is None
    result = run_here(plan, lab)
    assert finished_probe(plan, lab) == result
    assert [p.n_steps for p in result.points] == [12, 25, 51]
    losses = [p.loss_nats for p in result.points]
    assert losses == sorted(losses, reverse=True)
    assert [p.k for p in result.points] == [8, 8, 8]
    assert result.unigram_nats == pytest.approx(unigram_nats(open_shards(Path(spec.shards))))
    assert [p.why_not_informative is None for p in result.points] == [loss < result.unigram_nats for loss in losses]
    assert result.points[-1].b_simple_tokens is not None and result.middle.b_simple_tokens is not None
    assert result.middle.at_tokens == 200 * 128
    assert result.overhead_frac >= 0 and result.overhead_frac / result.every_steps <= 0.03
    assert result.seconds > 0 and result.flops == plan.flops
    assert not work_folder(lab, plan.rung).checkpoints.exists()
    began = result_path(lab, plan.rung).stat().st_mtime_ns
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run_probe(plan, lab, started=time.monotonic()) is None
    assert result_path(lab, plan.rung).stat().st_mtime_ns == began
    other = plan_probe(replace(spec, science=spec.science), burn_in_frac=0.2)
    assert finished_probe(other, lab) is None


def test_the_training_under_a_probe_is_that_of_the_run(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, lab = toy(horizons=(200,))
    plan = plan_probe(spec, burn_in_frac=0.4)
    run_here(plan, lab)
    _, folder = make_toy_run(lab.parent, write_shards(lab.parent / "shards"), lab="b", horizons=(200,))
    train_here(spec, folder)
    probed, trained = steps_of(work_folder(lab, plan.rung)), steps_of(folder)
    assert len(probed) == 80
    for key in ("loss", "grad_norm", "lr"):
        assert [s[key] for s in probed] == pytest.approx([s[key] for s in trained[:80]], rel=1e-3)


def test_a_probe_stopped_on_the_way_ends_with_the_same_measurements(
    toy: Callable[..., tuple[RunSpec, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole_lab = toy("whole")
    plan = plan_probe(spec, burn_in_frac=0.25)
    whole = run_here(plan, whole_lab)
    _, lab = toy("cut")
    gradients = Prober.gradients

    def interrupted(self: Prober, *args: Any, **kwargs: Any) -> Any:
        if self.step == 37:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Prober, "gradients", interrupted)
        with pytest.raises(Stopped):
            run_here(plan, lab)
    assert not result_path(lab, plan.rung).exists()
    record = work_folder(lab, plan.rung).read_record()
    assert record is not None and record.status == "stopped"
    assert numbers(run_here(plan, lab)) == numbers(whole)


def test_a_probe_that_runs_out_of_memory_goes_on_with_smaller_micro_batches(
    toy: Callable[..., tuple[RunSpec, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole_lab = toy("whole")
    whole = run_here(plan_probe(spec, burn_in_frac=0.25, microbatch_seqs=2), whole_lab)
    _, lab = toy("short")
    monkeypatch.setattr(LanguageModel, "forward", shorten(LanguageModel.forward, fits=1, at_call=4 * 30 + 1))
    short = run_here(plan_probe(spec, burn_in_frac=0.25, microbatch_seqs=2), lab)
    assert [(p.k, p.microbatch_seqs) for p in short.points] == [(4, 2), (8, 1), (8, 1)]
    assert [p.n_steps for p in short.points] == [12, 25, 51]
    assert numbers(short)[0] == numbers(whole)[0]
    assert [p.loss_nats for p in short.points] == pytest.approx([p.loss_nats for p in whole.points], rel=1e-4)


def test_another_science_throws_away_what_was_begun(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, lab = toy()
    plan = plan_probe(spec, burn_in_frac=0.25)
    prepare_probe(plan, lab)
    begun = work_folder(lab, plan.rung).path / "noise.jsonl"
    begun.write_text("{}\n")
    prepare_probe(plan, lab)
    assert begun.exists()
    prepare_probe(plan_probe(spec, burn_in_frac=0.2), lab)
    assert not begun.exists() and plan_path(work_folder(lab, plan.rung)).exists()


def test_gradients_that_are_not_finite_end_the_probe(
    toy: Callable[..., tuple[RunSpec, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, lab = toy()
    note = NoiseHook.note
    monkeypatch.setattr(NoiseHook, "note", lambda self, norm: note(self, norm * float("inf")))
    with pytest.raises((DataError, Diverged), match="not finite"):
        run_here(plan_probe(spec, burn_in_frac=0.25), lab)
    assert not result_path(lab, "toy").exists()


def test_too_short_a_burn_in_and_a_batch_of_one_are_refused(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, _ = toy()
    with pytest.raises(SpecError, match=r"a burn-in of 20 updates.*untrained weights is not informative"):
        plan_probe(spec, burn_in_frac=0.05)
    with pytest.raises(SpecError, match="wants more than 0 and at most 1"):
        plan_probe(spec, burn_in_frac=1.5)
    one = replace(spec.science, batch_tokens_global=16, schedule=replace(spec.science.schedule, warmup_tokens=16))
    single = replace(
        spec,
        run_id="toy-s1-" + one.hash[:8],
        science=one,
        execution=replace(spec.execution, microbatch_seqs_per_rank=1),
    )
    with pytest.raises(SpecError, match="found 1 micro-batch in a batch of 1 sequence"):
        plan_probe(single)


@pytest.mark.slow
def test_two_launched_ranks_measure_what_one_does(toy: Callable[..., tuple[RunSpec, Path]]) -> None:
    spec, alone = toy("one")
    plan = plan_probe(spec, burn_in_frac=0.25)
    one = run_here(plan, alone)
    _, lab = toy("two")
    two_ranks = replace(spec, execution=replace(spec.execution, n_processes=2))
    both = plan_probe(two_ranks, burn_in_frac=0.25)
    assert (both.hash, both.k, both.microbatch_seqs) == (plan.hash, 8, 1)
    path = prepare_probe(both, lab)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(RECIPE), "--probe", str(path)),
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two = codec.read_json(result_path(lab, "toy"), ProbeResult)
    for a, b in zip(one.points, two.points, strict=True):
        assert b.loss_nats == pytest.approx(a.loss_nats, rel=1e-4)
        assert b.trace == pytest.approx(a.trace, rel=2e-2) and b.grad_sq == pytest.approx(a.grad_sq, rel=5e-2)
    assert "at the middle of the run" in done.stderr
    shutil.rmtree(lab)
