"""--autotune: what is tried, what is kept, where it is remembered, and that a run gets it without another name."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec
from homelab_scaling.train import autotune as tuning
from homelab_scaling.train import autotune_trials as trials
from homelab_scaling.train.findings import Finding, Setting, Trial, cache_file

CPU = Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=False, n_cores=2, has_compiler=True)
CARD = Box(device="NVIDIA H100", n_gpus=1, vram_bytes=80 * 2**30, computes_bf16=True, n_cores=8, has_compiler=True)


@pytest.fixture
def spec(make_run: Callable[..., tuple[RunSpec, RunFolder]], monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """The toy run: 8 sequences a step, planned in micro-batches of 4, everything left to the rules."""
    monkeypatch.setattr(tuning, "missing_for_compile", list)
    return make_run(compile="auto")[0]


def trial(setting: Setting, micro_s: float | None, *, update_s: float = 0.1, first_s: float = 0.0) -> Trial:
    if micro_s is None:
        return trials.out(setting, "out of memory")
    return Trial(setting=setting, micro_s=micro_s, update_s=update_s, first_s=first_s, peak_bytes=None)


def finding(spec: RunSpec, *tried: Trial) -> Finding:
    return Finding(key=tuning.key_of(spec, CPU), trials=tried, seconds=1.0)


PLANNED = Setting(microbatch_seqs=4, mode="default", loss="chunked")


# --------------------------------------------------------------------------------------------------- what is tried


def test_what_is_tried_depends_on_the_device(spec: RunSpec) -> None:
    here = replace(spec, execution=replace(spec.execution, device="auto"))
    cpu, card = tuning.space_of(here, CPU), tuning.space_of(here, CARD)
    assert cpu.modes == ("off", "default")
    assert card.modes == ("off", "default", "reduce-overhead")
    assert cpu.microbatches == card.microbatches == (1, 2, 4, 8)
    assert cpu.first == PLANNED
    assert set(cpu.losses) == {"chunked", "plain"}


def test_what_is_settled_is_not_tried(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replace(spec, execution=replace(spec.execution, device="auto", compile="on", loss="plain"))
    space = tuning.space_of(asked, CARD, fixed_microbatch=True)
    assert (space.microbatches, space.losses) == ((4,), ("plain",))
    assert space.modes == ("default", "reduce-overhead")
    assert tuning.space_of(replace(asked, execution=replace(asked.execution, compile="off")), CARD).modes == ("off",)
    two = replace(asked, execution=replace(asked.execution, n_processes=2))
    assert "reduce-overhead" not in tuning.space_of(two, CARD).modes, "DDP's hooks act in the middle of a pass"
    monkeypatch.setattr(tuning, "missing_for_compile", lambda: ["Python.h"])
    assert tuning.space_of(spec, CPU).modes == ("off",)


def test_the_search_finds_the_best_of_a_planted_machine(spec: RunSpec) -> None:
    """Graphs are worth 40 %, plain loss is out of memory, larger micro-batches amortise a launch."""
    space = tuning.space_of(replace(spec, execution=replace(spec.execution, device="auto")), CARD)

    def machine(setting: Setting) -> Trial:
        if setting.loss == "plain":
            return trial(setting, None)
        launch = {"off": 2.0, "default": 1.0, "reduce-overhead": 0.2}[setting.mode]
        return trial(setting, launch + 0.1 * setting.microbatch_seqs)

    tried = tuning.search(space, 8, machine)
    best = finding(spec, *tried).best()
    assert best is not None
    assert best.setting == Setting(microbatch_seqs=8, mode="reduce-overhead", loss="chunked")
    assert tried[0].setting == space.first, "the stated rule's comes first"
    assert len({one.setting for one in tried}) == len(tried)


def test_the_search_goes_down_where_memory_is_short(spec: RunSpec) -> None:
    space = tuning.space_of(spec, CPU)
    tried = tuning.search(space, 8, lambda s: trial(s, None if s.microbatch_seqs > 2 else 1.0))
    best = finding(spec, *tried).best()
    assert best is not None
    assert best.setting.microbatch_seqs == 2


def test_the_search_ends_when_time_does(spec: RunSpec) -> None:
    asked: list[Setting] = []

    def machine(setting: Setting) -> Trial | None:
        asked.append(setting)
        return trial(setting, 1.0) if len(asked) == 1 else None

    assert [one.setting for one in tuning.search(tuning.space_of(spec, CPU), 8, machine)] == [PLANNED]


# ----------------------------------------------------------------------------------------------------- what is kept


def test_a_gain_within_the_noise_keeps_the_rule(spec: RunSpec) -> None:
    other = replace(PLANNED, microbatch_seqs=8)
    close = finding(spec, trial(PLANNED, 1.0), trial(other, 1.96))
    clear = finding(spec, trial(PLANNED, 1.0), trial(other, 1.80))
    assert close.best() == close.trials[0]
    assert clear.best() == clear.trials[1]


def test_a_short_run_does_not_pay_for_compilation(spec: RunSpec) -> None:
    off = replace(PLANNED, mode="off")
    found = finding(spec, trial(PLANNED, 1.0, first_s=60.0), trial(off, 1.5, first_s=1.0))
    assert found.best(n_steps=10) == found.trials[1]
    assert found.best(n_steps=1000) == found.trials[0]


def test_a_run_gets_the_settings_and_keeps_its_name(spec: RunSpec) -> None:
    graphs = Setting(microbatch_seqs=8, mode="reduce-overhead", loss="plain")
    execution = tuning.tuned_execution(spec, finding(spec, trial(PLANNED, 1.0), trial(graphs, 0.2)))
    assert execution.microbatch_seqs_per_rank == 8
    assert (execution.compile, execution.compile_mode, execution.loss) == ("on", "reduce-overhead", "plain")
    changed = replace(spec, execution=execution)
    assert changed.science.hash == spec.science.hash
    assert changed.run_id == spec.run_id
    none = tuning.tuned_execution(spec, finding(spec, trial(PLANNED, None)))
    assert none == spec.execution, "nothing worked: the rule stands"


# -------------------------------------------------------------------------------------------------------- the memory


class FakeRehearser:
    """Plays trials by rule; counts how often it was asked."""

    n_asked = 0

    def __init__(self, *_: object) -> None:
        pass

    def try_setting(self, setting: Setting, limit_s: float) -> Trial:
        assert limit_s >= 0
        FakeRehearser.n_asked += 1
        return trial(setting, None if setting.loss == "plain" else 1.0 / setting.microbatch_seqs)

    def end(self) -> None:
        pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    monkeypatch.setattr(tuning, "Rehearser", FakeRehearser)
    FakeRehearser.n_asked = 0

    def since() -> int:
        n, FakeRehearser.n_asked = FakeRehearser.n_asked, 0
        return n

    return since


def test_a_finding_is_remembered_and_readable(spec: RunSpec, tmp_path: Path, asked: Callable[[], int]) -> None:
    first = tuning.autotune(spec, CPU, print, folder=tmp_path / "cache")
    assert asked() > 3
    assert tuning.autotune(spec, CPU, print, folder=tmp_path / "cache") == first
    assert asked() == 0
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name.startswith("L2-d32-T16-fp32-")
    assert codec.read_plain_json(file)["key"]["shape"]["d_model"] == 32


def test_another_key_is_measured_anew(spec: RunSpec, tmp_path: Path, asked: Callable[[], int]) -> None:
    cache = tmp_path / "cache"
    tuning.autotune(spec, CPU, print, folder=cache)
    asked()
    science, execution = spec.science, spec.execution
    wider = replace(science, shape=replace(science.shape, d_model=64))
    others = [
        (replace(spec, science=wider, run_id=tuning_id(spec, wider)), CPU, False),
        (replace(spec, execution=replace(execution, loss="chunked")), CPU, False),
        (spec, replace(CPU, n_cores=4), False),
        (spec, CPU, True),
    ]
    for other, box, fixed in others:
        tuning.autotune(other, box, print, folder=cache, fixed_microbatch=fixed)
        assert asked() > 0
    assert len(list(cache.iterdir())) == 5


def tuning_id(spec: RunSpec, science: object) -> str:
    from homelab_scaling.specs import ScienceSpec, make_run_id

    assert isinstance(science, ScienceSpec)
    return make_run_id(spec.rung, science)


@pytest.mark.parametrize("damage", ["{", '{"key": 1}', ""])
def test_a_damaged_memory_is_told_of_and_replaced(
    damage: str, spec: RunSpec, tmp_path: Path, asked: Callable[[], int]
) -> None:
    file = cache_file(tuning.key_of(spec, CPU), tmp_path)
    tuning.autotune(spec, CPU, print, folder=tmp_path)
    asked()
    file.write_text(damage, encoding="utf-8")
    said: list[str] = []
    found = tuning.autotune(spec, CPU, said.append, folder=tmp_path)
    assert asked() > 0
    assert "damaged" in said[0]
    assert codec.read_json(file, Finding) == found


def test_where_nothing_worked_nothing_is_remembered(
    spec: RunSpec, tmp_path: Path, asked: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRehearser, "try_setting", lambda self, setting, limit_s: trial(setting, None))
    found = tuning.autotune(spec, CPU, print, folder=tmp_path / "cache")
    assert found.best() is None
    assert not (tmp_path / "cache").exists()


def test_a_ladder_is_tuned_once_for_each_shape(spec: RunSpec, tmp_path: Path, asked: Callable[[], int]) -> None:
    tuner = tuning.Tuner(CPU, print, fixed_microbatch=False, folder=tmp_path)
    first = tuner(spec)
    n = asked()
    seeded = replace(spec.science, seed=2)
    second = tuner(replace(spec, science=seeded, run_id=tuning_id(spec, seeded)))
    assert n > 0
    assert asked() == 0
    assert first.execution == second.execution
    assert first.execution.microbatch_seqs_per_rank == 8


# ------------------------------------------------------------------------------------------------------- real trials


def test_a_trial_is_the_trainers_own_step(spec: RunSpec, tmp_path: Path, fresh_accelerator: None) -> None:
    setting = Setting(microbatch_seqs=2, mode="off", loss="chunked")
    short = trials.trial_spec(spec, setting, tmp_path / "shards")
    assert short.science.batch_seqs_global == 4, "two micro-batches stand for four"
    assert short.science.shape == spec.science.shape
    found = trials.try_setting(spec, setting, tmp_path)
    assert found.why_out is None
    assert found.micro_s is not None
    assert found.update_s is not None
    assert found.micro_s > 0
    assert found.update_s > 0


def test_running_out_of_memory_is_an_answer(
    spec: RunSpec, tmp_path: Path, fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from homelab_scaling.train.model import LanguageModel

    real = LanguageModel.forward

    def greedy(self: LanguageModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return real(self, x, y)

    monkeypatch.setattr(LanguageModel, "forward", greedy)
    found = trials.try_setting(spec, replace(PLANNED, mode="off"), tmp_path)
    assert found.micro_s is None
    assert "memory" in (found.why_out or "")


@pytest.fixture
def fresh_accelerator() -> None:
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_process_that_dies_is_out_and_the_next_setting_gets_another(spec: RunSpec, tmp_path: Path) -> None:
    rehearser = tuning.Rehearser(spec, tmp_path, 1)
    try:
        process = rehearser._start()
        os.kill(process.pid, signal.SIGSTOP)
        slow = rehearser.try_setting(PLANNED, 0.1)
        assert slow.why_out == "took longer than 0 s"
        process = rehearser._start()
        os.kill(process.pid, signal.SIGKILL)
        dead = rehearser.try_setting(replace(PLANNED, mode="off"), 60.0)
        assert dead.why_out is None or "signal 9" in dead.why_out
    finally:
        rehearser.end()


@pytest.mark.slow
def test_autotune_for_real(spec: RunSpec, tmp_path: Path) -> None:
    asked = replace(spec, execution=replace(spec.execution, compile="off"))
    said: list[str] = []
    found = tuning.autotune(asked, CPU, said.append, folder=tmp_path / "cache", budget_s=60.0)
    assert len(found.trials) >= 3
    assert all(one.micro_s is not None for one in found.trials)
    execution = tuning.tuned_execution(asked, found)
    assert execution.compile == "off"
    assert execution.microbatch_seqs_per_rank in (1, 2, 4, 8)


# --------------------------------------------------------------------------------------------------------- CUDA graphs


def test_the_mode_reaches_torch_and_gradients_are_kept(
    make_run: Callable[..., tuple[RunSpec, RunFolder]],
    tmp_path: Path,
    fresh_accelerator: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No GPU here: that torch is asked for graphs, told of each pass, and handed gradients that stay where they are."""
    from homelab_scaling.train.rehearsal import rehearse

    modes: list[str | None] = []
    marks: list[int] = []

    def compile_(function: Callable[..., torch.Tensor], mode: str | None = None) -> Callable[..., torch.Tensor]:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    spec, _ = make_run(compile="on", compile_mode="reduce-overhead", microbatch_seqs_per_rank=4)
    stepper = rehearse(spec, tmp_path)
    assert set(modes) == {"reduce-overhead"}
    where = {name: p.grad.data_ptr() for name, p in stepper.model.named_parameters() if p.grad is not None}
    assert len(where) == len(list(stepper.model.named_parameters()))
    for _ in range(2):
        stepper.do_update(1e-3)
    assert len(marks) == 4, "once for each micro-batch"
    assert where == {name: p.grad.data_ptr() for name, p in stepper.model.named_parameters() if p.grad is not None}


def test_kept_gradients_train_the_same_weights(
    make_run: Callable[..., tuple[RunSpec, RunFolder]], tmp_path: Path, fresh_accelerator: None
) -> None:
    from homelab_scaling.train.rehearsal import rehearse

    spec, _ = make_run()
    weights = []
    for name in ("fresh", "kept"):
        stepper = rehearse(spec, tmp_path / name)
        if name == "kept":
            stepper.optimizer.keep_gradients()
        for _ in range(3):
            stepper.do_update(1e-2)
        weights.append([p.detach().clone() for p in stepper.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
