"""The [reference] table: what a ladder may say of a published experiment, and that it changes no run."""

import dataclasses
from collections.abc import Callable
from typing import get_args

import pytest

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import FigureName, PublishedFigure, Reference
from homelab_scaling.plan.ladder import plan_ladder, read_ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.specs import CorpusManifest

MakeCorpus = Callable[..., CorpusManifest]

ISSUE = {
    "exponent_n": 0.07,
    "r2": 0.98,
    "flops_total": 1.2e18,
    "kwh": 35,
    "hours": 48,
    "temperature_c": 84,
    "peak_vram_bytes": 14.2e9,
    "optimizer_saving_frac": 0.35,
}
"""What the published report of gpt2_5m_120m says."""
ONE = ({"of": "r2", "value": 0.98},)


def read(**table: object) -> Reference:
    return codec.from_plain({"source": "a report", "figures": ONE} | table, Reference, "my.toml: reference")


def test_the_reference_ladders_carry_what_was_published() -> None:
    gpt2 = read_ladder("gpt2_5m_120m")[0].reference
    assert gpt2 is not None
    assert {figure.of: figure.value for figure in gpt2.figures} == ISSUE
    notes = {figure.of: figure.note for figure in gpt2.figures if figure.note}
    assert notes == {"exponent_n": "Kaplan .076", "temperature_c": "the second card"}
    assert (gpt2.machine, gpt2.n_models, gpt2.n_params) == ("2 x RTX 4080", 5, (5e6, 120e6))
    wikitext = read_ladder("wikitext_786k_4m_25m")[0].reference
    assert wikitext is not None
    assert [(f.of, f.value, f.rung) for f in wikitext.figures] == [("slope_c", -0.136, None)]


@pytest.mark.parametrize("name", ["gpt2_5m_120m", "wikitext_786k_4m_25m"])
def test_a_miniature_is_the_same_experiment_with_the_same_reference(name: str, cpu: Box) -> None:
    large, small = read_ladder(name)[0], read_ladder(f"{name}_cpu")[0]
    assert small.reference == large.reference is not None
    assert (small.horizons, small.optim, small.schedule.name) == (large.horizons, large.optim, large.schedule.name)
    assert small.validation.curve_every_steps == large.validation.curve_every_steps
    assert len(small.rungs) == len(large.rungs)
    assert small.batch.tokens is not None, "nothing is measured first"
    assert small.data.sources == ("python",)
    plan = plan_ladder(small, None, cpu)
    assert plan.warnings == ()
    assert plan.totals.seconds is not None and 120 < plan.totals.seconds < 300


@pytest.mark.parametrize("name", ["gpt2_5m_120m_cpu", "wikitext_786k_4m_25m_cpu"])
def test_a_reference_survives_the_plan_and_changes_no_run(name: str, cpu: Box, make_corpus: MakeCorpus) -> None:
    ladder = read_ladder(name)[0]
    plan = plan_ladder(ladder, make_corpus(), cpu)
    assert plan.reference == ladder.reference and plan.runs
    assert codec.from_plain(codec.to_plain(plan), Plan, "plan.json") == plan
    bare = plan_ladder(dataclasses.replace(ladder, reference=None), make_corpus(), cpu)
    assert dataclasses.replace(plan, reference=None) == bare, "run ids and all"


def test_a_plan_of_before_has_none(two_4080: Box) -> None:
    plain = codec.to_plain(plan_ladder(read_ladder("gpt2_5m_120m")[0], None, two_4080))
    del plain["reference"]
    assert codec.from_plain(plain, Plan, "plan.json").reference is None


def test_an_unknown_figure_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError) as refused:
        read(figures=[{"of": "exponent", "value": 0.07}])
    assert all(name in str(refused.value) for name in get_args(FigureName))
    assert "found 'exponent'" in str(refused.value)
    with pytest.raises(SpecError, match="wants one of exponent_n, "):
        PublishedFigure(of="exponent", value=0.07)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"source": " "}, "source is empty"),
        ({"figures": []}, "figures is empty"),
        ({"figures": [*ONE, *ONE]}, "has r2 twice"),
        ({"figures": [{"of": "loss_nats", "value": 4.5, "rung": "a"}] * 2}, "has loss_nats of a twice"),
        ({"figures": [{"of": "r2", "value": 1.2}]}, "a share of at most 1"),
        ({"figures": [{"of": "hours", "value": 0}]}, "wants a positive number"),
        ({"figures": [{"of": "hours", "value": float("inf")}]}, "finite"),
        ({"figures": [{"of": "slope_c", "value": 0.136}]}, "below 0"),
        ({"figures": [{"of": "loss_nats", "value": 4.48}]}, "name the rung"),
        ({"figures": [{"of": "kwh", "value": 35, "rung": "5m"}]}, "of the whole experiment"),
        ({"figures": [{"of": "kwh"}]}, "value: this key is missing"),
        ({"n_cards": 0}, "n_cards = 0"),
        ({"peak_flops": -1.0}, "peak_flops = -1"),
        ({"n_params": [120e6, 5e6]}, "that ascend"),
        ({"n_models": 1, "n_params": [5e6, 120e6]}, "n_params names 2 sizes"),
        ({"count": "both"}, "wants one of 'total', 'body'"),
        ({"card_name": "RTX 4080"}, "no such key"),
    ],
)
def test_what_a_reference_cannot_say_is_one_sentence(table: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said) as refused:
        read(**table)
    assert str(refused.value).startswith("my.toml: reference") and "\n" not in str(refused.value)


def test_the_same_figure_of_two_rungs_is_two_figures() -> None:
    losses = [{"of": "loss_nats", "value": v, "rung": name} for name, v in (("5m", 4.66), ("25m", 4.40))]
    assert [figure.rung for figure in read(figures=losses).figures] == ["5m", "25m"]
    assert read(figures=losses).value("loss_nats") is None, "it is of no whole experiment"
    assert read().value("r2") == 0.98


def test_body_sizes_say_nothing_of_all_parameters() -> None:
    assert read(n_params=[5e6, 120e6]).largest == 120e6
    assert read(n_params=[5e6, 120e6], count="body").largest is None
    assert read().largest is None
    assert read().machine is None
    assert read(hardware="a lab", card="RTX 4080").machine == "a lab"
