"""Ours beside a published experiment: every kind of figure on planted labs, unknown ones, what follows from theirs."""

import datetime
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from homelab_scaling import codec
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.points import read_points
from homelab_scaling.fit.result import load_fit, save_fit
from homelab_scaling.ladder import FigureName, PublishedFigure, Reference
from homelab_scaling.plan.ladder import read_ladder
from homelab_scaling.report.collect import collect, run_spans
from homelab_scaling.report.document import Bullets, Grid, to_html, to_markdown
from homelab_scaling.report.follows import what_follows
from homelab_scaling.report.ours import OURS, joined
from homelab_scaling.report.published import KINDS, differences, published
from homelab_scaling.report.states import largest_memory
from homelab_scaling.report.story import tell
from homelab_scaling.runs import RunRecord
from homelab_scaling.specs import CorpusManifest, RunSpec, ScienceSpec, ShardFile, Split, make_run_id
from homelab_scaling.watch.readings import CardFacts, CardReading, Sample
from homelab_scaling.watch.recording import Recording, hottest

EVERY = {
    "exponent_n": 0.07,
    "exponent_c": 0.05,
    "r2": 0.98,
    "slope_c": -0.136,
    "tokens_total": 1e9,
    "flops_total": 1.2e18,
    "hours": 48.0,
    "kwh": 35.0,
    "usd": 7.0,
    "temperature_c": 84.0,
    "peak_vram_bytes": 14.2e9,
    "optimizer_saving_frac": 0.35,
}


def reference(**changes) -> Reference:
    figures = tuple(PublishedFigure(of=of, value=value) for of, value in EVERY.items())
    usual = {"source": "a report", "card": "RTX 4080", "n_cards": 2, "n_models": 5, "n_params": (5e6, 120e6)}
    return Reference(**{**usual, "figures": figures, **changes})


def only(**figures: float) -> tuple[PublishedFigure, ...]:
    return tuple(PublishedFigure(of=of, value=value) for of, value in figures.items())


def plan_json(lab: Path, ref: Reference | None, **more) -> None:
    plain = {"rungs": [], "warnings": []} | ({} if ref is None else {"reference": codec.to_plain(ref)})
    codec.write_json(lab / "plan.json", plain | more)


def seen(lab: Path, ref: Reference | None = None):
    plan_json(lab, ref or reference())
    return collect(lab)


def change_rows(lab: Path, change, **record_changes) -> None:
    """Every row of every record through `change`."""
    for path in sorted(lab.glob("runs/*/record.json")):
        record = codec.read_json(path, RunRecord)
        codec.write_json(path, replace(record, rows=tuple(map(change, record.rows)), **record_changes))


def fit_lab(lab: Path, laws=("power-n", "power-c"), n_bootstrap=200) -> None:
    table = read_points(lab)
    report = fit_points(table.points, table.excluded, laws=laws, source=table.source, n_bootstrap=n_bootstrap)
    save_fit(report, lab / "fit")


def ours(view, of: FigureName, value: float | None = None, rung: str | None = None):
    return OURS[of](view, PublishedFigure(of=of, value=EVERY[of] if value is None else value, rung=rung))


def line(view, of: FigureName) -> dict[str, str]:
    """The table's line of a figure, and how ours was measured."""
    blocks = published(view)
    grid = next(block for block in blocks if isinstance(block, Grid))
    cells = next(cells for cells in grid.rows if cells[0].startswith(KINDS[of].title))
    every = next(block for block in blocks if isinstance(block, Bullets)).items
    how = next(said.removeprefix(f"{cells[0]}: ") for said in every if said.startswith(f"{cells[0]}: "))
    return dict(zip(("figure", "theirs", "ours", "why"), cells, strict=True)) | {"how": how}


# ---------------------------------------------------------------------------------------------- the published figures


def test_every_figure_that_can_be_published_has_ours_and_a_look() -> None:
    assert set(OURS) == set(KINDS) == set(get_args(FigureName)) == {*EVERY, "loss_nats"}


def test_what_follows_from_the_published_figures_of_the_reference_experiment() -> None:
    ref = read_ladder("gpt2_5m_120m")[0].reference
    speed, power, tokens, exponent, saving = what_follows(ref, None)
    rate = 1.2e18 / (48 * 3600)
    assert f"{rate / 1e12:.2f} TFLOP/s: 3.6 % of the 195 TFLOP/s" in speed
    assert round(100 * rate / 195e12, 1) == 3.6
    hours = 1.2e18 / (0.45 * 195e12) / 3600
    assert f"take {hours:.1f} h" in speed
    assert "35 kWh in 48 h are 729 W, consistent with 2 x RTX 4080" in power
    share = (35e3 / 48 - 110) * 0.92 / 640
    assert f"the cards at {100 * share:.0f} % of their rated 640 W" in power
    assert "the cards alone are not rated for as much" in power and "3.6 % of their peak" in power
    assert f"{1.2e18 / 6 / 120e6 / 1e9:.2f}B tokens" in tokens and "13.9 a parameter" in tokens
    half = 3.182446 * 0.07 * math.sqrt((1 / 0.98 - 1) / 3)
    assert f"0.07 ± {half:.2g}" in exponent and "cannot be told apart" in exponent
    assert "16 bytes a parameter become 10.03, 37 % less" in saving and "35 % less memory" in saving
    saved = 5.97 * 120e6
    assert f"save {saved / 1e9:.3f} GB at 120M parameters, {100 * saved / (14.2e9 + saved):.1f} %" in saving
    assert "It cannot be of the peak" in saving and "4.97 GB" in saving


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"figures": only(kwh=35, hours=20)}, "1750 W, more than the 806 W"),
        ({"figures": only(kwh=1, hours=48)}, "21 W, less than the machine takes without its cards"),
        ({"figures": only(kwh=24, hours=48)}, "if it is of the cards alone, they ran at 78 % of it"),
        ({"figures": only(kwh=35, hours=48), "card": None}, "rated power is not known"),
        ({"figures": only(flops_total=1e20, hours=48)}, "more than they can do"),
        ({"figures": only(flops_total=1e19, hours=48)}, "30 % of the 195 TFLOP/s"),
        ({"figures": only(flops_total=1.2e18, hours=48), "card": None}, "because no card was named"),
        ({"figures": only(flops_total=1.2e18, hours=48), "card": "Foo"}, "Foo is not in the table of cards"),
        ({"figures": only(flops_total=1.2e18, hours=48), "card": None, "peak_flops": 1e14}, "6.9 % of the 100 TFLOP/s"),
        ({"figures": only(exponent_n=0.07, r2=0.999)}, "but not Kaplan's 0.076 in it."),
        ({"figures": only(optimizer_saving_frac=0.35)}, "37 % less where all moments are in 8 bit."),
        ({"figures": only(optimizer_saving_frac=0.35, peak_vram_bytes=1.5e9)}, "so it can be of that, too"),
    ],
)
def test_what_follows_depends_on_the_figures(changes: dict, said: str) -> None:
    found = what_follows(reference(n_params=(120e6,), **changes), None)
    assert said in " ".join(found)


@pytest.mark.parametrize("of", sorted(set(EVERY) - {"optimizer_saving_frac"}))
def test_nothing_follows_from_one_figure_alone(of: str) -> None:
    alone = reference(figures=only(**{of: EVERY[of]}), n_params=())
    assert what_follows(alone, None) == ()


# -------------------------------------------------------------------------------------------------------- the section


def test_a_lab_without_a_reference_has_no_section(synthetic) -> None:
    synthetic.run("67k")
    plan_json(synthetic.lab, None)
    view = collect(synthetic.lab)
    assert view.reference is None and published(view) == []
    assert not any("reference" in said.lower() for said in view.missing)


def test_a_reference_that_cannot_be_read_is_said_and_costs_nothing_else(synthetic) -> None:
    synthetic.run("67k")
    codec.write_json(synthetic.lab / "plan.json", {"rungs": [], "reference": {"source": "x"}})
    view = collect(synthetic.lab)
    assert view.reference is None and len(view.rows) == 3
    assert any("The published experiment cannot be read" in said for said in view.missing)


def test_an_empty_lab_says_why_everything_is_unknown(tmp_path) -> None:
    lab = tmp_path / "new"
    lab.mkdir()
    view = seen(lab)
    grid, _, hows = (block for block in published(view)[2:5])
    assert {cells[2] for cells in grid.rows} == {"unknown"} and len(grid.rows) == len(EVERY)
    assert {cells[3] for cells in grid.rows} == {"ours is not known"}
    assert len(hows.items) == len(EVERY)
    assert all(re.fullmatch(r"[^:]+: not known; \w.{8,}\.", said) for said in hows.items)
    assert "3.6 %" in to_markdown("t", published(view)), "the published figures need no run of ours"


def test_a_cpu_lab_says_of_each_figure_what_it_can(synthetic) -> None:
    synthetic.all_rungs()
    fit_lab(synthetic.lab)
    view = seen(synthetic.lab)
    rows = view.rows
    flops = sum(row.flops_marginal for row in rows)
    assert ours(view, "flops_total").value == flops
    assert line(view, "flops_total")["why"].startswith(f"ours is 1/{float(f'{1.2e18 / flops:.3g}'):,.0f} of theirs")
    first, second, third = synthetic.horizons
    trained = 5 * (first + (second - first) + 0.2 * first + (third - second) + 0.2 * second)
    assert ours(view, "tokens_total").value == pytest.approx(trained, rel=1e-9), "each trunk once, each decay once"
    seconds = sum(row.seconds_marginal for row in rows)
    assert ours(view, "hours").value == pytest.approx(seconds / 3600)
    assert "side by side are counted each" in line(view, "hours")["how"]
    assert ours(view, "usd").value == pytest.approx(sum(row.usd_marginal for row in rows))
    assert line(view, "kwh")["how"] == "not known; no power reading on this machine."
    assert line(view, "temperature_c")["how"].startswith("not known; trained on a CPU")
    assert "1072k a card would need" in line(view, "peak_vram_bytes")["how"]
    assert "theirs was 2 x RTX 4080, ours is a CPU" in differences(view, view.reference)["machine"]


def test_the_exponent_stands_with_its_interval_and_a_verdict(synthetic) -> None:
    synthetic.all_rungs()
    fit_lab(synthetic.lab)
    fit = load_fit(synthetic.lab / "fit").get("power-n")
    e = fit.derived["exponent"]
    low, high = e.ci95
    inside, outside = (low + high) / 2, high * 2
    for value, verdict in ((inside, "our interval contains"), (outside, "does not contain")):
        view = seen(synthetic.lab, reference(figures=only(exponent_n=value)))
        said = line(view, "exponent_n")
        assert said["ours"].startswith(f"{e.value:.3g} [{low:.3g}, {high:.3g}]")
        assert verdict in said["why"]
        kaplan = "inside" if low <= 0.076 <= high else "outside"
        assert f"Kaplan's 0.076 (body parameters) is {kaplan} it" in said["why"]
    assert said["why"].endswith("different, or not said: sizes and schedule")
    assert "bootstrap" in said["how"] and f"{fit.n_points} points at {fit.rows}" in said["how"]
    view = seen(synthetic.lab, reference(figures=only(r2=0.5, exponent_c=0.05)))
    assert ours(view, "r2").value == fit.derived["r2_log"].value
    assert line(view, "r2")["why"].startswith("ours is higher")
    frontier = load_fit(synthetic.lab / "fit").get("power-c").derived["exponent"]
    assert ours(view, "exponent_c").value == frontier.value


def test_sizes_that_share_no_tokens_are_taken_at_equal_tokens_per_parameter(synthetic) -> None:
    exponent = 0.17
    for rung in ("67k", "127k", "289k", "545k"):
        n = collect_n(synthetic, rung)
        synthetic.horizons = tuple(round(ratio * n / 4096) * 4096 for ratio in (20, 40))
        synthetic.run(rung)
    change_rows(
        synthetic.lab, lambda row: replace(row, loss_nats=30 * row.n_params**-exponent * (1 + row.n_tokens % 7 / 7e4))
    )
    fit_lab(synthetic.lab, laws=("power-n", "power-c"))
    assert not load_fit(synthetic.lab / "fit").get("power-n").is_fitted
    view = seen(synthetic.lab)
    fit = view.study.size_law
    assert fit.n_points == 4 and fit.rows == "D = 40 N"
    assert fit.derived["exponent"].value == pytest.approx(exponent, abs=1e-3)
    assert fit.derived["exponent"].ci95 is not None
    assert "not of N alone" in line(view, "exponent_n")["how"]
    lead = tell(view, [])[0].text
    assert "There is no law of model size" in lead and "at D = 40 N, the loss falls with N as a power of 0.17" in lead


def collect_n(synthetic, rung: str) -> int:
    from homelab_scaling.plan.counting import count_params

    spec = synthetic.spec(rung)
    return count_params(spec.science.shape, spec.science.n_vocab).n_params


def test_an_exponent_that_is_not_pinned_down_is_not_called_known(synthetic) -> None:
    for rung in ("67k", "127k", "289k"):
        synthetic.run(rung)
    noise = iter((2.0, 2.4, 1.7, 2.3, 1.9, 2.2, 2.05, 2.5, 1.8))
    change_rows(synthetic.lab, lambda row: replace(row, loss_nats=next(noise)))
    fit_lab(synthetic.lab)
    assert load_fit(synthetic.lab / "fit").get("power-n").derived["exponent"].value is None
    said = line(seen(synthetic.lab), "exponent_n")
    assert (said["ours"], said["why"]) == ("not pinned down", "our points do not say")
    assert "95 % interval" in said["how"] or "bound" in said["how"]


def test_the_loss_of_a_rung_is_that_of_its_longest_run(synthetic) -> None:
    synthetic.run("67k")
    synthetic.run("127k", status="diverged", reason="not finite")
    view = seen(synthetic.lab)
    row = max(view.rows, key=lambda r: r.n_tokens)
    found = ours(view, "loss_nats", row.loss_nats + 0.02, rung="67k")
    assert found.value == row.loss_nats
    assert found.ci95 == pytest.approx((row.loss_nats - 1.96 * 0.012, row.loss_nats + 1.96 * 0.012))
    assert ours(view, "loss_nats", 4.4, rung="127k").how == "its run is diverged and has no row"
    assert ours(view, "loss_nats", 4.4, rung="25m").how == "there is no rung 25m here, but 67k"
    two = reference(figures=(PublishedFigure(of="loss_nats", value=row.loss_nats + 0.1, rung="67k"),))
    assert "does not contain" in line(seen(synthetic.lab, two), "loss_nats")["why"]
    assert line(seen(synthetic.lab, two), "loss_nats")["figure"] == "loss, nats per token, 67k"


# --------------------------------------------------------------------------------------------------- time and energy


def at(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(1_700_000_000 + seconds, datetime.UTC).isoformat(timespec="seconds")


def events(lab: Path, rung: str, *entries: tuple[str, float]) -> None:
    (folder,) = lab.glob(f"runs/{rung}-*")
    codec.append_jsonl(folder / "events.jsonl", [{"kind": kind, "time": at(t)} for kind, t in entries])


def test_hours_are_by_the_clock_where_runs_overlap(synthetic) -> None:
    for rung in ("67k", "127k", "289k"):
        synthetic.run(rung)
    events(synthetic.lab, "67k", ("segment", 0), ("end", 3600))
    events(synthetic.lab, "127k", ("segment", 1800), ("end", 5400), ("segment", 9000), ("end", 9360))
    events(synthetic.lab, "289k", ("watchdog", 9360), ("segment", 9360), ("end", 9720))
    found = ours(seen(synthetic.lab), "hours")
    assert found.value == pytest.approx((5400 + 720) / 3600)
    assert "while at least one run was going" in found.how


@pytest.mark.parametrize(
    ("entries", "known_s", "spans"),
    [
        ([("segment", 10), ("end", 30)], 0.0, [(10, 30)]),
        ([("segment", 10), ("paused", 25), ("segment", 100), ("end", 130)], 0.0, [(10, 25), (100, 130)]),
        ([("segment", 10), ("end", 30), ("segment", 50)], 60.0, [(10, 30), (50, 90)]),
        ([("segment", 10), ("paused", 40)], 5.0, [(10, 40)]),
        ([("end", 30)], 9.0, []),
        ([], 9.0, []),
    ],
)
def test_a_segment_without_its_end_lasts_as_long_as_is_known(entries, known_s, spans) -> None:
    lines = [{"kind": kind, "time": at(t)} for kind, t in entries]
    found = run_spans([*lines, {"kind": "segment"}, {"kind": "segment", "time": "soon"}], known_s)
    assert [(a - 1_700_000_000, b - 1_700_000_000) for a, b in found] == spans
    assert joined(list(found) + list(found)) == list(found)


def test_energy_is_the_plug_s_and_says_where_it_comes_from(synthetic) -> None:
    synthetic.run("67k")
    metered = {"kwh_marginal": 0.2, "kwh_wall_marginal": 0.3, "kwh_wall_err_frac": 0.15, "kwh_from": "counter"}
    change_rows(synthetic.lab, lambda row: replace(row, **metered))
    found = line(seen(synthetic.lab), "kwh")
    assert found["ours"] == "0.9 kWh ± 15 %" and "the cards alone 0.6 kWh" in found["how"]
    assert "energy counters" in found["how"] and found["why"].startswith("ours is 1/38.9 of theirs")
    near = line(seen(synthetic.lab, reference(figures=only(kwh=1.0))), "kwh")
    assert "the same within its error" in near["why"]
    change_rows(synthetic.lab, lambda row: replace(row, kwh_wall_marginal=0.3 if row.n_steps > 200 else None))
    part = line(seen(synthetic.lab), "kwh")
    assert part["ours"] == "0.6 kWh of 2 rows" and "1 of 3 rows do not know theirs" in part["how"]
    assert part["why"] == "ours is not known as a whole"
    stated = {"kwh_marginal": 0.3, "kwh_wall_marginal": 0.3, "kwh_wall_err_frac": None, "kwh_from": "stated watts"}
    change_rows(synthetic.lab, lambda row: replace(row, **stated))
    found = line(seen(synthetic.lab), "kwh")
    assert found["ours"] == "0.9 kWh" and "nothing was measured" in found["how"]
    assert "the cards alone" not in found["how"]


# ---------------------------------------------------------------------------------------------------------- the cards


def on_cards(synthetic, *rungs: str, n: int = 2) -> None:
    """The runs as if they had been trained on RTX 4080s."""
    for rung in rungs:
        synthetic.run(rung)
    for path in synthetic.lab.glob("runs/*/record.json"):
        record = codec.read_json(path, RunRecord)
        machine = replace(record.machine, device="NVIDIA GeForce RTX 4080", n_processes=n)
        codec.write_json(path, replace(record, machine=machine))


FACTS = tuple(
    CardFacts(uuid=f"GPU-{i}", index=i, name="NVIDIA GeForce RTX 4080", vram_bytes=16 * 2**30) for i in range(2)
)


def record_heat(path: Path, readings: dict[float, tuple[float | None, float]]) -> None:
    recording = Recording(path, max_bytes=2000, keep=9)
    for t, celsius in readings.items():
        cards = tuple(CardReading(uuid=f"GPU-{i}", temperature_c=c) for i, c in enumerate(celsius))
        recording.append(Sample(t_s=1_700_000_000 + t, poll_s=0.001, cards=cards), FACTS)
    recording.close()


def test_the_hottest_card_is_read_from_the_recording_of_that_time(synthetic) -> None:
    on_cards(synthetic, "67k")
    events(synthetic.lab, "67k", ("segment", 100), ("end", 200))
    heat = {float(t): (60.0 + t % 5, 70.0 + t % 7) for t in range(0, 300, 2)}
    heat[50.0], heat[150.0], heat[151.0], heat[250.0] = (99.0, 99.0), (71.0, 81.0), (None, 80.0), (98.0, 98.0)
    recording = synthetic.lab.parent / "machine" / "gpu.jsonl"
    record_heat(recording, dict(sorted(heat.items())))
    assert len(list(recording.parent.glob("gpu*.jsonl"))) > 2, "the recording was rotated"
    found = line(seen(synthetic.lab), "temperature_c")
    assert found["ours"] == "81 °C" and found["why"].startswith("ours is 3 °C cooler")
    assert "card 1 (NVIDIA GeForce RTX 4080) 81 °C, card 0 (NVIDIA GeForce RTX 4080) 71 °C" in found["how"]
    with open(recording, "a", encoding="utf-8") as file:
        file.write('{"t_s": 1700000150, "cards": [{"uuid": "GPU-0", "temperature_c": "hot"}, 7]}\n[]\n{"t_s"')
    assert ours(seen(synthetic.lab), "temperature_c").value == 81.0
    assert hottest(recording, []) == ()


def test_no_recording_of_that_time_is_no_temperature(synthetic) -> None:
    on_cards(synthetic, "67k")
    assert "no run says when" in ours(seen(synthetic.lab), "temperature_c").how
    events(synthetic.lab, "67k", ("segment", 100), ("end", 200))
    assert "holds nothing of that time" in ours(seen(synthetic.lab), "temperature_c").how
    record_heat(synthetic.lab.parent / "machine" / "gpu.jsonl", {500.0: (90.0, 90.0)})
    assert "holds nothing of that time" in ours(seen(synthetic.lab), "temperature_c").how


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_measured_peak_and_what_8_bit_moments_save_of_it(synthetic, optimizer: str) -> None:
    on_cards(synthetic, "67k", "5M")
    for path in synthetic.lab.glob("runs/*/spec.json"):
        plain = codec.read_plain_json(path)
        plain["science"]["optim"]["name"] = optimizer
        science = codec.from_plain(plain["science"], ScienceSpec, "spec")
        plain["run_id"] = make_run_id(plain["rung"], science)
        codec.write_json(path, codec.from_plain(plain, RunSpec, "spec"))
    change_rows(synthetic.lab, lambda r: replace(r, peak_vram_bytes=r.n_params * 40, optimizer=optimizer))
    view = seen(synthetic.lab)
    n = max(row.n_params for row in view.rows)
    peak = ours(view, "peak_vram_bytes")
    assert peak.value == 40 * n
    assert f"5M with {'AdamW8bit' if optimizer == 'adamw8bit' else 'AdamW'};" in peak.how
    memory = largest_memory(view)
    embedding = 2048 * 256
    stored = n
    saved = 8 * stored - (round(2.03 * (stored - embedding)) + 8 * embedding)
    assert memory.saved_bytes == pytest.approx(saved, abs=2)
    before = 40 * n + (saved if optimizer == "adamw8bit" else 0)
    found = ours(view, "optimizer_saving_frac")
    assert found.value == pytest.approx(saved / (16 * stored))
    assert memory.saved_of_peak_frac == pytest.approx(saved / before, rel=1e-6)
    assert f"{100 * saved / (16 * stored):.0f} % of model state, {100 * saved / before:.0f} % of the peak" == found.text
    assert "with AdamW measured" in found.how
    assert line(view, "optimizer_saving_frac")["why"].startswith("theirs does not say of what; ours is of both")


def test_memory_of_a_ladder_that_was_only_planned_is_that_of_its_largest_rung(tmp_path) -> None:
    lab = tmp_path / "gpt2_5m_120m"
    lab.mkdir()
    ladder = read_ladder("gpt2_5m_120m")[0]
    rungs = [
        {"name": r.name, "size": {"shape": {"n_layer": r.n_layer, "d_model": r.d_model, "n_head": r.n_head,
                                            "context_tokens": 1024, "tied": True}}}
        for r in ladder.rungs
    ]  # fmt: skip
    plan_json(lab, ladder.reference, rungs=rungs, n_vocab=50_257)
    view = collect(lab)
    memory = largest_memory(view)
    assert memory.rung == "124m" and memory.n_params == 124_439_808
    assert 0.25 < memory.saved_of_state_frac < 0.27, "with the embedding's moments in 32 bit: about 26 %"
    assert memory.saved_of_peak_frac < 0.15
    assert "26 % for our 124m" in what_follows(ladder.reference, memory)[-1]
    assert "5 of our 5 sizes have no row: 5m (not started)" in differences(view, ladder.reference)["rungs"]


# ------------------------------------------------------------------------------------------------------- differences


def manifest(source: str, tokenizer: str = "gpt2") -> CorpusManifest:
    half = Split(files=(ShardFile(name="t.bin", n_tokens=9, sha256="a"),), n_tokens=9, n_bytes=30, n_documents=2)
    return CorpusManifest(
        tokenizer=tokenizer, tokenizer_file=None, tokenizer_hash="t", n_vocab=50_257, eot_id=None, dtype="uint16",
        train=half, val=half, sources=(source,), held_out_rule="by hash",
    )  # fmt: skip


def test_nothing_differs_where_everything_is_the_same(synthetic) -> None:
    on_cards(synthetic, "67k", "127k")
    n = [collect_n(synthetic, rung) for rung in ("67k", "127k")]
    view = replace(seen(synthetic.lab), corpus=manifest("hf:Skylion007/openwebtext"))
    flops = sum(row.flops_marginal for row in view.rows)
    same = reference(
        figures=only(flops_total=flops * 1.01), text="OpenWebText", schedule="wsd", n_models=2,
        n_params=(n[0] * 1.02, n[1] * 0.98),
    )  # fmt: skip
    view = replace(view, reference=same)
    assert differences(view, same) == {}
    assert line(view, "flops_total")["why"] == "the same within 5 %; nothing that was published differs"


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        ({"text": "WikiText"}, "text", "theirs was WikiText, ours is hf:Skylion007/openwebtext (tokenizer gpt2"),
        ({"text": None}, "text", "theirs was not said"),
        ({"card": None}, "machine", "theirs was not said; ours is 2 x NVIDIA GeForce RTX 4080"),
        ({"card": "RTX 3090"}, "machine", "theirs was 2 x RTX 3090, ours is 2 x NVIDIA GeForce RTX 4080"),
        ({"n_cards": 1}, "machine", "theirs was 1 x RTX 4080, ours is 2 x NVIDIA GeForce RTX 4080."),
        ({"schedule": "cosine"}, "schedule", "theirs was cosine, ours is wsd"),
        ({"n_params": (5e6, 120e6)}, "sizes", "the largest 1/39.5 of their smallest"),
        (
            {"n_params": (10_000, 20_000), "count": "body"},
            "sizes",
            "to 20.0k parameters in their bodies, ours are 2 from 1",
        ),
    ],
)
def test_each_difference_is_read_from_the_data(synthetic, changes: dict, name: str, said: str) -> None:
    on_cards(synthetic, "67k", "127k")
    view = replace(seen(synthetic.lab), corpus=manifest("hf:Skylion007/openwebtext"))
    assert said in differences(view, reference(**changes))[name]


def test_two_runs_side_by_side_are_two_cards(synthetic) -> None:
    on_cards(synthetic, "67k", n=1)
    plan_json(synthetic.lab, reference(), box={"n_gpus": 2})
    assert "machine" not in differences(collect(synthetic.lab), reference())
    plan_json(synthetic.lab, reference(), box={"n_gpus": None}, rungs=7, n_vocab="many")
    said = differences(collect(synthetic.lab), reference())["machine"]
    assert said == "theirs was 2 x RTX 4080, ours is 1 x NVIDIA GeForce RTX 4080."


def test_a_bill_of_nothing_is_no_share(synthetic) -> None:
    synthetic.run("67k")
    change_rows(synthetic.lab, lambda row: replace(row, usd_marginal=0.0))
    assert line(seen(synthetic.lab), "usd")["why"].startswith("ours is nothing")


def test_a_missing_rung_is_a_difference_that_moves_the_law(synthetic) -> None:
    for rung in ("67k", "127k", "289k"):
        synthetic.run(rung)
    synthetic.run("545k", status="diverged", reason="not finite")
    fit_lab(synthetic.lab)
    view = seen(synthetic.lab)
    assert differences(view, view.reference)["rungs"] == "1 of our 4 sizes has no row: 545k (diverged)."
    assert "rungs" in line(view, "exponent_n")["why"] and "rungs" in line(view, "flops_total")["why"]
    assert "1 run without a row not counted" in line(view, "flops_total")["how"]


def test_the_section_is_in_the_report_and_whole_in_html(synthetic) -> None:
    synthetic.all_rungs()
    seen(synthetic.lab)
    text = to_markdown("t", tell(collect(synthetic.lab), []))
    assert text.index("## The laws" if "## The laws" in text else "## What was run") < text.index("## Beside the pub")
    blocks = published(collect(synthetic.lab))
    page = to_html("t", blocks)
    assert page.count("<tr>") == len(EVERY) + 1 and "3.6 %" in page
    assert sum(len(block.items) for block in blocks if isinstance(block, Bullets)) >= 8
    for cells in next(block for block in blocks if isinstance(block, Grid)).rows:
        assert all(cell and "None" not in cell and "nan" not in cell for cell in cells)
