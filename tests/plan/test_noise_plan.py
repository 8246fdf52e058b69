"""The cadence of measuring and the first batch of a warm-up, from what a ladder says."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import BatchTable, Horizons, Ladder, Rung, TrainTable
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.plan.noise import MIN_MEASUREMENTS, OVERHEAD_FRAC, cadence, longest_phase, plan_warmup
from homelab_scaling.plan.parts import Plan
from homelab_scaling.specs import BatchWarmup, RunSpec

CONTEXT = 16


def ladder_of(*, tokens: int = 32 * CONTEXT, steps: tuple[int, ...] = (1000,), **batch: Any) -> Ladder:
    """A rung with a batch of 32 sequences, in micro-batches of 8."""
    return Ladder(
        name="toy",
        rungs=(Rung(name="a", n_layer=1, d_model=32, n_head=1),),
        horizons=Horizons(steps=steps),
        context_tokens=CONTEXT,
        batch=BatchTable(tokens=tokens, **batch),
        train=TrainTable(microbatch_seqs_per_rank=8),
    )


@pytest.fixture
def plan(make_corpus: Any, cpu: Box) -> Any:
    """`plan(ladder)`: its plan on two cores."""

    def make(ladder: Ladder) -> Plan:
        return plan_ladder(ladder, make_corpus(), cpu)

    return make


def every_of(plan: Plan) -> int | None:
    (spec,) = plan.runs
    assert isinstance(spec, RunSpec) and plan.rungs[0].launches[0].noise_every_steps == spec.execution.noise_every_steps
    return spec.execution.noise_every_steps


def noise_warnings(plan: Plan) -> list[str]:
    return [w for w in plan.warnings if "noise_every_steps" in w]


@given(n_steps=st.integers(1, 10**6), n_passes=st.integers(1, 8), may_compile=st.booleans())
@settings(derandomize=True, deadline=None)
def test_measuring_costs_under_three_per_cent_and_no_more_than_it_is_worth(
    n_steps: int, n_passes: int, may_compile: bool
) -> None:
    every = cadence(n_steps=n_steps, n_passes=n_passes, may_compile=may_compile)
    cost = OVERHEAD_FRAC["as trained" if n_passes > 1 else "in full-size parts" if may_compile else "in parts"]
    assert cost / every <= 0.03
    assert n_steps < 20 * 64 * (every + 1), "64 in each of 20 windows, up to a whole number"
    assert every == 1 or cost / (every - 1) > 0.03 or n_steps / (every - 1) > 20 * 64, "nor rarer than that"


def test_the_cadence_follows_from_how_an_update_is_cut(plan: Any) -> None:
    assert every_of(plan(ladder_of())) == 4  # four micro-batches: hooks alone
    one = ladder_of(tokens=8 * CONTEXT)
    assert every_of(plan(one)) == 38  # one micro-batch, perhaps compiled: twice the work
    assert every_of(plan(replace(one, train=replace(one.train, compile="off")))) == 9
    assert every_of(plan(ladder_of(steps=(100_000,)))) == 100_000 // 1280
    asked = ladder_of(noise_every_steps=2)
    assert every_of(plan(asked)) == 2 and noise_warnings(plan(asked)) == []


def test_what_would_give_no_number_is_off_and_said_where_it_was_asked_for(plan: Any) -> None:
    assert every_of(plan(ladder_of(noise_every_steps=0))) is None
    assert MIN_MEASUREMENTS * 4 == 32  # of trunk: four fifths of the steps
    assert every_of(plan(ladder_of(steps=(40,)))) == 4 and every_of(plan(ladder_of(steps=(39,)))) is None
    short = plan(ladder_of(steps=(39,), noise_every_steps=4))
    assert every_of(short) is None
    assert "longest stretch of 31 updates has no 8 measuring ones at one in 4" in noise_warnings(short)[0]
    single = ladder_of(tokens=CONTEXT, noise_every_steps=1)
    single = replace(single, train=replace(single.train, microbatch_seqs_per_rank=1))
    assert every_of(plan(single)) is None and "a batch of 1 sequence" in noise_warnings(plan(single))[0]
    silent = plan(replace(single, batch=replace(single.batch, noise_every_steps=None)))
    assert every_of(silent) is None and noise_warnings(silent) == []


def test_sharded_parameters_are_not_measured_and_asking_is_refused(plan: Any) -> None:
    ladder = ladder_of()
    sharded = replace(ladder, train=replace(ladder.train, sharding="full"))
    silent = plan(sharded)
    assert every_of(silent) is None and noise_warnings(silent) == []
    for asked, name in ({"noise_every_steps": 4}, "noise_every_steps"), ({"warmup_from_tokens": 128}, "warmup_from"):
        with pytest.raises(SpecError, match=rf"{name}.*found sharded parameters \(FSDP\)"):
            plan(replace(sharded, batch=replace(ladder.batch, **asked)))


@pytest.mark.parametrize(
    ("horizons", "decay_frac", "wanted"),
    [((100,), None, 100), ((100,), 0.2, 80), ((100,), 0.9, 90), ((40, 100), 0.2, 48), ((90, 100), 0.2, 72)],
)
def test_the_longest_phase(horizons: tuple[int, ...], decay_frac: float | None, wanted: int) -> None:
    assert longest_phase(tuple(h * 64 for h in horizons), 64, decay_frac) == wanted


@pytest.mark.parametrize(
    ("wanted_seqs", "ranks", "first_seqs"),
    [(8, 1, 8), (9, 1, 8), (11, 1, 8), (12, 1, 16), (1.5, 1, 2), (6, 4, 8), (3, 4, 4), (31, 1, None), (32, 1, None)],
)
def test_a_warm_up_begins_at_the_nearest_batch_that_doubles_to_the_full_one(
    wanted_seqs: float, ranks: int, first_seqs: int | None
) -> None:
    ladder = ladder_of(warmup_from_tokens=round(wanted_seqs * CONTEXT))
    said: list[str] = []
    found = plan_warmup(ladder, rung="a", batch_tokens=32 * CONTEXT, n_ranks=ranks, warn=said.append)
    assert found == (None if first_seqs is None else BatchWarmup(from_tokens=first_seqs * CONTEXT))
    far = first_seqs is not None and abs(first_seqs / wanted_seqs - 1) > 0.1
    assert bool(said) == far and all("reaches 512 by doubling" in text for text in said)


def test_a_warm_up_that_cannot_double_to_the_batch_names_the_nearest(plan: Any) -> None:
    with pytest.raises(SpecError, match=r"does not reach the batch of 512 tokens .* nearest that does is 32\b"):
        plan(ladder_of(warmup_from_tokens=CONTEXT))  # one sequence: nothing to compare
    with pytest.raises(SpecError, match=r"\(25 sequences on 1 rank\) by doubling; the nearest that does is 400"):
        ladder = ladder_of(tokens=25 * CONTEXT, warmup_from_tokens=4 * CONTEXT)
        plan(replace(ladder, train=replace(ladder.train, microbatch_seqs_per_rank=5)))


def test_the_warm_up_is_part_of_the_science_and_of_the_page(plan: Any) -> None:
    from rich.console import Console

    from homelab_scaling.plan.show import plan_page

    warmed, plain = plan(ladder_of(warmup_from_tokens=8 * CONTEXT)), plan(ladder_of())
    assert warmed.runs[0].science.batch_warmup == BatchWarmup(from_tokens=128)
    assert plain.runs[0].science.batch_warmup is None and warmed.runs[0].run_id != plain.runs[0].run_id
    console = Console(record=True, width=200)
    console.print(*plan_page(warmed))
    assert "128 to 512" in console.export_text()
