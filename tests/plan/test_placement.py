"""A rung on its cards: sharded and recomputed as the ladder asks, and memory beside what rows have measured."""

from dataclasses import replace
from typing import Any

import pytest

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import BatchTable, Horizons, Ladder, Rung, TrainTable
from homelab_scaling.plan.cost import MeasuredRate
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.parts import Placement, Plan
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.plan.show import memory_notes
from homelab_scaling.specs import Optim


def plan(box: Box, *, measured: tuple[MeasuredRate, ...] = (), optim: str = "adamw", **train: Any) -> Plan:
    ladder = Ladder(
        name="test",
        rungs=(Rung(name="big", n_layer=12, d_model=768, n_head=12),),
        horizons=Horizons(tokens=(100_000_000,)),
        batch=BatchTable(tokens=262_144),
        optim=Optim(name=optim),
        train=TrainTable(**train),
    )
    return plan_ladder(ladder, None, box=box, measured=measured)


def placement(*args: Any, **kwargs: Any) -> Placement:
    return plan(*args, **kwargs).rungs[0].placement


def test_recomputing_is_taken_only_when_asked_for_and_makes_room(two_4080: Box) -> None:
    small = box_with("RTX 4060", 1)
    usual, again = placement(small), placement(small, activation_checkpointing=True)
    assert again.microbatch_seqs_per_rank > usual.microbatch_seqs_per_rank
    spec = plan(two_4080, activation_checkpointing=True)
    assert spec.rungs[0].bill.rate.tokens_per_s < plan(two_4080).rungs[0].bill.rate.tokens_per_s


def test_sharding_splits_the_states(two_4080: Box) -> None:
    whole, parts = placement(two_4080), placement(two_4080, sharding="full")
    assert parts.memory[0].optimizer_bytes == whole.memory[0].optimizer_bytes // 2
    assert parts.microbatch_seqs_per_rank >= whole.microbatch_seqs_per_rank


def test_8_bit_states_are_not_sharded(two_4080: Box) -> None:
    with pytest.raises(SpecError, match=r"rung big: .*8-bit optimizer states; set"):
        plan(two_4080, sharding="full", optim="adamw8bit")
    alone = plan(box_with("RTX 4080", 1), sharding="full", optim="adamw8bit")
    assert any("shares nothing on one rank" in warning for warning in alone.warnings)
    assert alone.rungs[0].placement.memory[0].weights_bytes == 4 * alone.rungs[0].size.params.n_stored


def test_the_recipe_beyond_one_card_fits_two(two_4080: Box) -> None:
    ladder, _ = read_ladder("gpt2_350m_fsdp")
    found = plan_ladder(ladder, None, box=two_4080)
    assert 340e6 < found.rungs[-1].size.n_params < 360e6
    assert all(rung.placement.fits and rung.placement.n_processes == 2 for rung in found.rungs)


def test_context_and_reserve_are_apart_and_measured_peaks_stand_beside(two_4080: Box) -> None:
    before = plan(two_4080)
    placed = before.rungs[0].placement
    need = placed.memory[0]
    assert need.total_bytes == need.allocated_bytes + need.context_bytes + need.reserve_bytes
    assert len(memory_notes(before)) == 1 and "context" in memory_notes(before)[0]
    seen = MeasuredRate(
        shape=before.rungs[0].size.shape,
        n_vocab=before.n_vocab,
        device=two_4080.device,
        n_processes=2,
        precision="bf16",
        tokens_per_s=100_000.0,
        microbatch_seqs=placed.microbatch_seqs_per_rank,
        peak_vram_bytes=round(0.96 * need.allocated_bytes),
    )
    others = (replace(seen, sharding="full", peak_vram_bytes=10**12), replace(seen, device="other"))
    after = plan(two_4080, measured=(seen, replace(seen, peak_vram_bytes=None), *others))
    assert after.rungs[0].placement.peak_vram_bytes == seen.peak_vram_bytes
    assert "(+4.2%)" in memory_notes(after)[1]
