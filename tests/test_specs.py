"""What a run is: every science field decides its identity, no execution field does, and the impossible is refused."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Horizons, LrTable, Rung, ScheduleTable, TrainTable, Validation
from homelab_scaling.specs import (
    BatchWarmup,
    ExecutionSpec,
    ModelShape,
    Money,
    Optim,
    RunSpec,
    Schedule,
    ScienceSpec,
    ShardFile,
    Split,
    make_run_id,
)

SCIENCE = ScienceSpec(
    shape=ModelShape(n_layer=2, d_model=64, n_head=2, context_tokens=128),
    n_vocab=2048,
    tokenizer_hash="t",
    train_fingerprint="a",
    val_fingerprint="b",
    horizons_tokens=(409_600, 819_200),
    batch_tokens_global=4096,
    schedule=Schedule(name="wsd", lr_peak=3e-3, warmup_tokens=20_480, decay_frac=0.2, lr_final_frac=0.0),
    optim=Optim(),
    precision="fp32",
    seed=0,
    val_tokens=12_800,
)

# Another valid value for every field that decides a result. A new field must be added here to be tested.
OTHER: dict[type, dict[str, Any]] = {
    ModelShape: {"n_layer": 3, "d_model": 128, "n_head": 4, "context_tokens": 64, "tied": False},
    Schedule: {"name": "cosine", "lr_peak": 1e-3, "warmup_tokens": 4096, "decay_frac": 0.1, "lr_final_frac": 0.1},
    Optim: {
        "name": "adamw8bit",
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-9,
        "weight_decay": 0.0,
        "grad_clip": 2.0,
    },
    ScienceSpec: {
        "n_vocab": 2049,
        "tokenizer_hash": "u",
        "train_fingerprint": "c",
        "val_fingerprint": "d",
        "horizons_tokens": (409_600,),
        "batch_tokens_global": 2048,
        "precision": "bf16",
        "seed": 1,
        "val_tokens": 6400,
        "batch_warmup": BatchWarmup(from_tokens=SCIENCE.batch_tokens_global // 2),
        "start": "f" * 64,
    },
}
PARTS = {"shape": ModelShape, "schedule": Schedule, "optim": Optim}


def _field_cases() -> list[tuple[str | None, str]]:
    cases: list[tuple[str | None, str]] = []
    for field in dataclasses.fields(ScienceSpec):
        if field.name in PARTS:
            cases += [(field.name, inner.name) for inner in dataclasses.fields(PARTS[field.name])]
        else:
            cases.append((None, field.name))
    return cases


@pytest.mark.parametrize(("part", "name"), _field_cases())
def test_every_science_field_changes_the_identity(part: str | None, name: str) -> None:
    base = SCIENCE
    if (part, name) == ("schedule", "name"):  # a cosine run has one horizon
        base = dataclasses.replace(base, horizons_tokens=(409_600,))
    if part is None:
        changed = dataclasses.replace(base, **{name: OTHER[ScienceSpec][name]})
    else:
        inner = dataclasses.replace(getattr(base, part), **{name: OTHER[PARTS[part]][name]})
        changed = dataclasses.replace(base, **{part: inner})
    assert changed != base
    assert changed.hash != base.hash
    assert make_run_id("r", changed) != make_run_id("r", base)


def test_the_identity_of_this_science_is_the_same_everywhere() -> None:
    """Frozen: if this changes, every existing lab's run folders lose their names."""
    assert SCIENCE.hash == "bb9cba7c050acc80c36914c5ea9073f0c2be3574738d9b32afbdde5d1f436ca3"
    assert make_run_id("67k", SCIENCE) == "67k-s0-" + SCIENCE.hash[:8]
    cosine = dataclasses.replace(
        SCIENCE, horizons_tokens=(819_200,), schedule=dataclasses.replace(SCIENCE.schedule, name="cosine")
    )
    assert make_run_id("67k", cosine).startswith("67k-d819k-s0-")


def _spec(execution: ExecutionSpec) -> RunSpec:
    return RunSpec(
        run_id=make_run_id("r", SCIENCE),
        ladder="l",
        rung="r",
        science=SCIENCE,
        execution=execution,
        shards="../../shards",
        money=Money(usd_per_kwh=0.2),
    )


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        ExecutionSpec,
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        n_processes=st.sampled_from([1, 2, 4]),
        microbatch_seqs_per_rank=st.sampled_from([1, 2, 4, 8]),
        compile=st.sampled_from(["auto", "on", "off"]),
        loss=st.sampled_from(["auto", "chunked", "plain"]),
        log_every_steps=st.integers(1, 100),
        checkpoint_every_s=st.floats(0.1, 1e4),
        curve_tokens=st.integers(1, 10**6),
        curve_every_tokens=st.none() | st.integers(1, 10**6),
        predicted_s=st.none() | st.floats(0, 1e6),
    )
)
def test_no_execution_setting_changes_the_identity_and_json_keeps_all(execution: ExecutionSpec) -> None:
    spec = _spec(execution)
    assert spec.run_id == _spec(ExecutionSpec()).run_id
    assert codec.from_plain(json.loads(codec.dumps(spec)), RunSpec, "spec.json") == spec
    per_pass = execution.n_processes * execution.microbatch_seqs_per_rank
    assert execution.accumulation_steps(SCIENCE) * per_pass == SCIENCE.batch_seqs_global == 32


def test_an_edited_spec_is_noticed() -> None:
    plain = json.loads(codec.dumps(_spec(ExecutionSpec())))
    plain["science"]["schedule"]["lr_peak"] = 1e-2
    with pytest.raises(SpecError, match="the file was edited, plan again"):
        codec.from_plain(plain, RunSpec, "spec.json")


def test_the_data_identity_is_tokens_in_order() -> None:
    a, b = (ShardFile(name=f"{n}.bin", n_tokens=5, sha256=n) for n in "ab")
    split = Split(files=(a, b), n_tokens=10, n_bytes=None, n_documents=None)
    renamed = dataclasses.replace(split, files=(dataclasses.replace(a, name="z.bin"), b))
    assert split.fingerprint == renamed.fingerprint, "a file's name is no content"
    assert split.fingerprint != dataclasses.replace(split, files=(b, a)).fingerprint


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ModelShape(n_layer=1, d_model=10, n_head=3, context_tokens=8), "does not divide by n_head 3"),
        (lambda: ModelShape(n_layer=0, d_model=8, n_head=1, context_tokens=8), "n_layer = 0"),
        (lambda: Rung(name="r"), "n_params_target alone"),
        (lambda: Rung(name="r", n_params_target=5, n_layer=1), "n_params_target alone"),
        (lambda: Rung(name="a/b", n_params_target=5), "letters, digits"),
        (Horizons, "found none"),
        (lambda: Horizons(tokens=(1,), flops=(1.0,)), "tokens and flops"),
        (lambda: Optim(beta2=1.0), "optim.beta2"),
        (lambda: ScheduleTable(warmup_frac=0.2), "bends the law"),
        (lambda: LrTable(exponent=0.1), "lr.exponent"),
        (lambda: Validation(curve_points_per_row=21), "0 to 20"),
        (lambda: TrainTable(processes=0), "train.processes"),
        (lambda: dataclasses.replace(SCIENCE, horizons_tokens=(819_200, 409_600)), "must ascend"),
        (lambda: dataclasses.replace(SCIENCE, horizons_tokens=(409_601,)), "not a whole number of 4096-token batches"),
        (lambda: dataclasses.replace(SCIENCE, batch_tokens_global=4000), "not a whole number of 128-token sequences"),
        (
            lambda: dataclasses.replace(SCIENCE, schedule=dataclasses.replace(SCIENCE.schedule, warmup_tokens=102_400)),
            "exceeds a tenth of the smallest horizon",
        ),
        (
            lambda: dataclasses.replace(SCIENCE, schedule=dataclasses.replace(SCIENCE.schedule, name="cosine")),
            "has one horizon, found 2",
        ),
        (lambda: _spec(ExecutionSpec(n_processes=3)), "does not split into 3 ranks"),
    ],
)
def test_the_impossible_is_refused_in_one_sentence(make: Any, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (None, None),
        ("/models/mine", "mine"),
        ("/hf/hub/models--openai-community--gpt2/snapshots/607a30d783", "openai-community/gpt2"),
    ],
)
def test_a_start_is_called_what_people_call_it(folder: str | None, name: str | None) -> None:
    assert ExecutionSpec(start_from=folder).start_name == name
