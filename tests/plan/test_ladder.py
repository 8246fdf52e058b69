"""Whole plans: the shipped ladders, the rules across parts, and properties that every valid ladder keeps."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import (
    BatchTable,
    DataTable,
    Horizons,
    Ladder,
    LrTable,
    Rung,
    ScheduleTable,
    TrainTable,
    Validation,
)
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.plan.ladder import find_ladder, plan_ladder, read_ladder, shipped_ladders
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.specs import CorpusManifest, Optim, RunSpec
from homelab_scaling.train.schedule import phases

MakeCorpus = Callable[..., CorpusManifest]
BODY_SIZES = {"786k": 786_432, "4m": 3_932_160, "25m": 25_165_824}


def _ladder(**changes: object) -> Ladder:
    usual: dict[str, object] = {
        "name": "test",
        "rungs": (Rung(name="r", n_layer=2, d_model=64, n_head=2),),
        "horizons": Horizons(tokens=(1_000_000,)),
        "context_tokens": 128,
        "batch": BatchTable(tokens=4096),
    }
    return Ladder(**{**usual, **changes})


# --------------------------------------------------------------------------------------------------- shipped ladders


def test_the_ladders_that_are_asked_for_ship() -> None:
    asked = {"gpt2_350m_fsdp", "gpt2_5m_120m", "isoflop_5m_25m_100m", "quickstart", "wikitext_786k_4m_25m"}
    assert asked <= set(shipped_ladders())


@pytest.mark.parametrize("name", shipped_ladders())
def test_a_shipped_ladder_is_short_and_plans_for_two_4080(name: str, two_4080: Box) -> None:
    ladder, path = read_ladder(name)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert ladder.name == name
    assert ladder.money.usd_per_kwh is not None and ladder.money.usd_per_machine_hour is not None
    plan = plan_ladder(ladder, None, two_4080)
    said = [w for w in plan.warnings if "are not one budget" in w]
    assert list(plan.warnings) == said and len(said) == (ladder.horizons.mode == "nominal")
    assert plan.runs == (), "no run has an identity before its data"
    for rung in plan.rungs:
        assert rung.placement.fits
        assert set(rung.placement.vram_bytes) == {"adamw", "adamw8bit"}
        assert rung.bill.unknown == {}
        assert all(h.n_steps >= 150 for h in rung.training.horizons)
    assert plan.totals.seconds is not None and plan.totals.usd is not None
    readme = path.parents[1] / "README.md"
    assert f"`{name}`" in readme.read_text(encoding="utf-8"), "the table of recipes names it"


def test_quickstart_spans_the_decades_within_its_time(cpu: Box) -> None:
    ladder, _ = read_ladder("quickstart")
    plan = plan_ladder(ladder, None, cpu)
    sizes = [r.size.n_params for r in plan.rungs]
    assert len(sizes) == 5 and sizes == sorted(sizes)
    assert sizes[-1] / sizes[0] >= 10**1.2
    tokens = {tuple(h.tokens for h in r.training.horizons) for r in plan.rungs}
    assert len(tokens) == 1 and len(tokens.pop()) == 3, "three horizons, equal for all rungs"
    assert all(len(r.launches) == 1 for r in plan.rungs), "one launch per rung"
    assert all(r.training.precision == "fp32" for r in plan.rungs)
    assert plan.totals.seconds is not None and plan.totals.seconds < 600


def test_the_reference_ladder_is_named_by_total_parameters(two_4080: Box) -> None:
    plan = plan_ladder(read_ladder("gpt2_5m_120m")[0], None, two_4080)
    sizes = {r.name: r.size.n_params / 1e6 for r in plan.rungs}
    assert sizes == pytest.approx({"5m": 5.3, "12m": 12.5, "24m": 23.8, "51m": 51.4, "124m": 124.4}, rel=0.02)
    assert plan.rungs[-1].size.n_params == 124_439_808
    for rung in plan.rungs:
        assert [h.tokens_per_param for h in rung.training.horizons] == pytest.approx([5, 10, 20], rel=0.01)


def test_isoflop_shows_the_exact_and_the_published_tokens(two_4080: Box) -> None:
    ladder, _ = read_ladder("isoflop_5m_25m_100m")
    exact = plan_ladder(ladder, None, two_4080)
    nominal = plan_ladder(
        dataclasses.replace(ladder, horizons=dataclasses.replace(ladder.horizons, mode="nominal")), None, two_4080
    )
    published = {"5m": 4.5e9, "25m": 9e8, "100m": 2.25e8}
    for ours, theirs in zip(exact.rungs, nominal.rungs, strict=True):
        (horizon,) = ours.training.horizons
        assert horizon.flops == pytest.approx(1.35e17, rel=2e-3)
        assert horizon.flops == horizon.tokens * flops_per_token(ours.size.shape, 50_257)
        assert ours.training.other is not None and theirs.training.other is not None
        assert (ours.training.other.mode, theirs.training.other.mode) == ("nominal", "exact")
        assert ours.training.other.row == theirs.training.horizons[0]
        assert theirs.training.other.row == horizon
        assert ours.training.other.row.wanted_tokens == published[ours.name]
        assert ours.training.batch_tokens == 524_288


def test_wikitext_is_named_by_body_and_validates_every_50_steps(two_4080: Box) -> None:
    plan = plan_ladder(read_ladder("wikitext_786k_4m_25m")[0], None, two_4080)
    for rung in plan.rungs:
        assert 12 * rung.size.shape.n_layer * rung.size.shape.d_model**2 == BODY_SIZES[rung.name]
        assert [h.n_steps for h in rung.training.horizons] == [500]
        assert rung.launches[0].curve_every_tokens == 50 * rung.training.batch_tokens


def test_ladders_are_found_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_ladder("quickstart")
    assert find_ladder("quickstart.toml") == find_ladder("recipes/ladders/quickstart.toml") == shipped
    own = tmp_path / "quickstart"
    own.write_text("name = 'mine'", encoding="utf-8")
    assert find_ladder("quickstart") == Path("quickstart"), "a file that is there comes first"
    with pytest.raises(SpecError, match=r"one of batch_study_cpu, .*gpt2_350m_fsdp, gpt2_5m_120m"):
        find_ladder("elsewhere/quickstart")


# ------------------------------------------------------------------------------------------------- rules across parts


def test_cosine_makes_a_run_per_horizon_and_wsd_one_trunk(cpu: Box, make_corpus: MakeCorpus) -> None:
    horizons = Horizons(tokens=(500_000, 1_000_000))
    wsd = plan_ladder(_ladder(horizons=horizons, seeds=(0, 1)), make_corpus(), cpu)
    cosine = plan_ladder(
        _ladder(horizons=horizons, seeds=(0, 1), schedule=ScheduleTable(name="cosine")), make_corpus(), cpu
    )
    assert [len(run.science.horizons_tokens) for run in wsd.runs] == [2, 2]
    assert [len(run.science.horizons_tokens) for run in cosine.runs] == [1, 1, 1, 1]
    assert wsd.totals.n_rows == cosine.totals.n_rows == 4
    assert wsd.totals.tokens_trained < cosine.totals.tokens_trained, "sharing a trunk is what WSD is for"


def test_a_wished_size_is_shown_beside_the_actual_one(cpu: Box) -> None:
    rungs = (Rung(name="a", n_params_target=300_000), Rung(name="b", n_params_target=20_000))
    plan = plan_ladder(_ladder(rungs=rungs), None, cpu)
    a, b = plan.rungs
    assert a.size.n_params_wanted == 300_000
    assert a.size.n_params == pytest.approx(300_000, rel=0.1)
    warned = [w for w in plan.warnings if "wanted 20,000 parameters" in w]
    assert len(warned) == 1 and f"{b.size.n_params:,}" in warned[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": BatchTable(tokens=200)}, "wanted a batch of 200 tokens, 256 is the nearest"),
        ({"horizons": Horizons(tokens=(10_000,))}, "wanted 10,000 tokens, whole batches of 4,096 give 8,192"),
        ({"horizons": Horizons(steps=(12,))}, "12 steps to the smallest horizon are too few"),
        ({"schedule": ScheduleTable(decay_frac=0.6)}, "each decay is longer than the trunk"),
        ({"train": TrainTable(precision="bf16")}, "emulates it slowly"),
        ({"train": TrainTable(processes=4)}, "train.processes = 4 on 2 CPU cores"),
        ({"validation": Validation(curve_every_steps=1)}, "asks for more than 20 points"),
        ({"lr": LrTable(rule="step-law")}, "far outside the sizes it was fitted on"),
        ({"horizons": Horizons(tokens=(4_000_000,))}, "1.33 passes over the training text"),
        ({}, "needs at least 3"),
    ],
)
def test_warnings_name_what_to_change(cpu: Box, make_corpus: MakeCorpus, changes: dict[str, object], said: str) -> None:
    plan = plan_ladder(_ladder(**changes), make_corpus(n_train=3_000_000), cpu)
    assert [w for w in plan.warnings if said in w] != [], plan.warnings


def test_a_rung_too_large_for_the_card_says_what_would_fit() -> None:
    large = (Rung(name="xl", n_layer=24, d_model=1024, n_head=16),)
    ladder = _ladder(
        rungs=large,
        context_tokens=1024,
        batch=BatchTable(tokens=65_536),
        horizons=Horizons(tokens=(10**8,)),
        data=DataTable(tokenizer="gpt2"),
        train=TrainTable(microbatch_seqs_per_rank=32),
    )
    plan = plan_ladder(ladder, None, box_with("RTX 4080", 1))
    assert plan.rungs[0].placement.fits is False
    (warning,) = [w for w in plan.warnings if "rung xl: needs" in w]
    assert "would fit" in warning and "GiB more than 90 % of the card's 16 GiB" in warning
    fits = int(warning.split("microbatch_seqs_per_rank = ")[1].split(" ")[0])
    smaller = dataclasses.replace(ladder, train=TrainTable(microbatch_seqs_per_rank=fits))
    assert plan_ladder(smaller, None, box_with("RTX 4080", 1)).rungs[0].placement.fits
    hopeless = plan_ladder(ladder, None, box_with("RTX 4060", 1))
    assert any("not even one sequence fits" in w for w in hopeless.warnings)


def test_a_batch_that_does_not_split_uses_fewer_cards(two_4080: Box) -> None:
    plan = plan_ladder(_ladder(batch=BatchTable(tokens=7 * 128)), None, two_4080)
    assert plan.rungs[0].placement.n_processes == 1
    assert any("does not split over 2 GPUs" in w for w in plan.warnings)


def test_execution_never_changes_identity(cpu: Box, make_corpus: MakeCorpus) -> None:
    """Other cards, ranks, micro-batches and loss paths, same precision: the same run ids."""
    corpus = make_corpus()
    base = plan_ladder(_ladder(), corpus, cpu)
    execution = TrainTable(
        precision="fp32", processes=2, microbatch_seqs_per_rank=4, compile="off", loss="chunked", log_every_steps=1
    )
    for box in (cpu, box_with("RTX 3090", 2), box_with("A100", 4)):
        other = plan_ladder(_ladder(train=execution), corpus, box, shards="/elsewhere")
        assert [r.run_id for r in other.runs] == [r.run_id for r in base.runs]
        assert other.runs[0].execution != base.runs[0].execution


def test_precision_is_resolved_by_the_machine(cpu: Box) -> None:
    wide = (Rung(name="w", n_layer=2, d_model=256, n_head=4),)

    def precision(rungs: tuple[Rung, ...], box: Box) -> str:
        return plan_ladder(_ladder(rungs=rungs), None, box).rungs[0].training.precision

    fast_cpu = dataclasses.replace(cpu, computes_bf16=True)
    narrow = _ladder().rungs
    assert precision(narrow, fast_cpu) == "fp32", "a narrow model gains nothing"
    assert precision(wide, fast_cpu) == "bf16"
    assert precision(wide, cpu) == "fp32"
    assert precision(narrow, box_with("RTX 4080", 1)) == "bf16"
    assert precision(wide, box_with("T4", 1)) == "fp32"
    mixed = plan_ladder(_ladder(rungs=(*narrow, *wide)), None, fast_cpu)
    assert any("rungs differ in precision" in w for w in mixed.warnings)


# ---------------------------------------------------------------------------------------------------------- properties

SHAPES = st.sampled_from([(1, 24, 2), (2, 32, 1), (2, 64, 2), (3, 96, 3), (4, 128, 4), (6, 256, 4), (2, 320, 5)])
BOXES = st.sampled_from(
    [
        Box(device="cpu", n_gpus=0, vram_bytes=None, computes_bf16=True, n_cores=2, has_compiler=True),
        box_with("RTX 4080", 1),
        box_with("RTX 4080", 2),
        box_with("Tesla T4", 3),
    ]
)


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Ladders that can be run: horizons of at least 40 batches, spaced by a factor of two."""
    context = draw(st.sampled_from([64, 100, 256]))
    batch_seqs = draw(st.integers(1, 64))
    n_horizons = draw(st.integers(1, 4))
    first = draw(st.integers(40, 3000))
    if draw(st.booleans()):
        horizons = Horizons(steps=tuple(first * 2**i for i in range(n_horizons)))
    else:
        wiggle = draw(st.floats(0.97, 1.03))
        horizons = Horizons(
            tokens=tuple(round(wiggle * first * 2**i * batch_seqs * context) for i in range(n_horizons))
        )
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    return Ladder(
        name="drawn",
        rungs=tuple(Rung(name=f"r{i}", n_layer=s[0], d_model=s[1], n_head=s[2]) for i, s in enumerate(shapes)),
        horizons=horizons,
        context_tokens=context,
        tied=draw(st.booleans()),
        seeds=tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))),
        optim=Optim(name=draw(st.sampled_from(["adamw", "adamw8bit"])), weight_decay=draw(st.floats(0, 1))),
        schedule=ScheduleTable(
            name=draw(st.sampled_from(["wsd", "cosine"])),
            warmup_frac=draw(st.floats(0, 0.1)),
            decay_frac=draw(st.floats(0.02, 0.85)),
        ),
        lr=LrTable(rule=draw(st.sampled_from(["fixed", "power", "step-law"])), peak=draw(st.floats(1e-5, 1e-1))),
        batch=BatchTable(tokens=batch_seqs * context + draw(st.integers(0, context // 3))),
        validation=Validation(
            full_tokens=draw(st.integers(1, 10**6)),
            curve_tokens=1,
            curve_points_per_row=draw(st.integers(0, 20)),
            curve_every_steps=draw(st.none() | st.integers(1, 500)),
        ),
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(ladder=ladders(), box=BOXES)
def test_every_run_of_a_valid_ladder_is_whole(make_corpus: MakeCorpus, ladder: Ladder, box: Box) -> None:
    plan = plan_ladder(ladder, make_corpus(), box)
    per_seed = 1 if ladder.schedule.name == "wsd" else len(plan.rungs[0].training.horizons)
    assert len(plan.runs) == len(ladder.rungs) * len(ladder.seeds) * per_seed == plan.totals.n_runs
    assert len({(run.rung, run.run_id) for run in plan.runs}) == len(plan.runs)
    trained = 0
    for run in plan.runs:
        science, execution = run.science, run.execution
        batch = science.batch_tokens_global
        assert batch % science.shape.context_tokens == 0
        assert all(h % batch == 0 and h > 0 for h in science.horizons_tokens)
        assert science.schedule.warmup_tokens % batch == 0
        assert science.schedule.warmup_tokens <= 0.1 * science.horizons_tokens[0]
        per_pass = execution.n_processes * execution.microbatch_seqs_per_rank
        assert execution.accumulation_steps(science) * per_pass == science.batch_seqs_global
        assert science.val_tokens % science.shape.context_tokens == 0
        if execution.curve_every_tokens is not None:
            assert execution.curve_every_tokens % batch == 0
            assert science.horizons_tokens[-1] / execution.curve_every_tokens <= 20
        trained += sum(phase.n_updates for phase in phases(science)) * batch
    assert trained == plan.totals.tokens_trained, "the trainer's phases and the plan's bill agree"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(ladder=ladders(), box=BOXES)
def test_ladders_and_plans_survive_json(make_corpus: MakeCorpus, ladder: Ladder, box: Box) -> None:
    assert codec.from_plain(json.loads(codec.dumps(ladder)), Ladder, "ladder") == ladder
    plan = plan_ladder(ladder, make_corpus(), box)
    again = codec.from_plain(json.loads(codec.dumps(plan)), Plan, "plan.json")
    assert again == plan
    for run in plan.runs:
        copy = codec.from_plain(json.loads(codec.dumps(run)), RunSpec, "spec.json")
        assert (copy, copy.science.hash) == (run, run.science.hash)
