"""The batch on the screen: noise scale with its interval or bound, the sizes of a warm-up, what B_crit makes of it."""

import json
import shutil
from dataclasses import replace

import pytest
from watched_lab import NOW, WatchedLab

from homelab_scaling import codec
from homelab_scaling.specs import BatchWarmup, make_run_id
from homelab_scaling.train.schedule import phases
from homelab_scaling.watch.feed import Look
from homelab_scaling.watch.frame import BatchNow, CriticalBatch, NoiseNow
from homelab_scaling.watch.runlog import RunLog
from homelab_scaling.watch.runview import RunEye
from homelab_scaling.watch.screen import draw
from homelab_scaling.watch.tail import Fresh
from homelab_scaling.watch.view import View, find_place

NOISE = {
    "kind": "noise", "update": 900, "phase": "trunk", "step": 900, "tokens": 200_000_000, "loss": 3.6,
    "batch_tokens": 262_144, "noise_scale_tokens": 412_345.0, "noise_low_tokens": 350_000.0,
    "noise_high_tokens": 491_000.0, "noise_at_least_tokens": None, "why": None, "n_steps": 16, "k": 8,
    "microbatch_seqs": 8,
}  # fmt: skip
BOUND = NOISE | {
    "noise_scale_tokens": None, "noise_low_tokens": None, "noise_high_tokens": None, "noise_at_least_tokens": 90_000.0,
    "why": "its interval reaches zero",
}  # fmt: skip
ADVICE = {
    "calibration": {"method": "sweep"},
    "rungs": [
        {"rung": "51m", "basis": "measured", "b_crit": {"value": 1.31e6, "low": 1.0e6, "high": 1.72e6},
         "batch_tokens": 262_144},
        {"rung": "124m", "basis": "prior", "b_crit": {"value": 9e6, "low": 1e6, "high": 9e7}, "batch_tokens": 524_288},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return WatchedLab.in_flight(tmp_path_factory.mktemp("template") / "lab", every=40)


@pytest.fixture
def flying(template, tmp_path, monkeypatch):
    shutil.copytree(template.lab, tmp_path / "lab")
    monkeypatch.setenv("HOMELAB_MACHINE", str(tmp_path / "lab" / "machine"))
    made = object.__new__(WatchedLab)
    made.__dict__ = {**template.__dict__, "lab": tmp_path / "lab", "ladder": tmp_path / "lab" / template.ladder.name}
    return made


@pytest.fixture(scope="module")
def frame(template):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMELAB_MACHINE", str(template.lab / "machine"))
        return View(find_place(template.lab)).frame(NOW)


def shown(frame, batch, width=160, height=45):
    run = replace(frame.run, batch=batch, noise_scale_tokens=batch.noise.tokens if batch.noise else None)
    lines = [line.plain for line in draw(replace(frame, run=run), width, height)]
    assert {len(line) for line in lines} == {width}
    return "\n".join(lines)


def batch_of(noise=None, critical=None, **changes):
    now = BatchNow(tokens=262_144, full_tokens=262_144, step=1, n_steps=1, noise=noise, critical=critical)
    return replace(now, **changes)


KNOWN = NoiseNow(at_tokens=200_000_000, tokens=412_345.0, low_tokens=350_000.0, high_tokens=491_000.0)
CRITICAL = CriticalBatch(
    tokens=1.31e6, low_tokens=1e6, high_tokens=1.72e6, basis="measured", calibration="sweep", advised_tokens=262_144
)


# ------------------------------------------------------------------------------------------------------- from files


def test_noise_and_advice_reach_the_frame(flying):
    codec.append_jsonl(flying.folder("51m").metrics, [BOUND | {"tokens": 100_000_000}, NOISE])
    codec.write_json(flying.ladder / "batch.json", ADVICE)
    batch = View(find_place(flying.lab)).frame(NOW).run.batch
    assert batch.noise == KNOWN and batch.critical == CRITICAL
    assert (batch.step, batch.n_steps, batch.tokens) == (1, 1, batch.full_tokens)
    document = json.loads(codec.dumps(View(find_place(flying.lab)).frame(NOW)))
    assert document["run"]["batch"]["noise"]["low_tokens"] == 350_000.0
    assert document["run"]["batch"]["critical"]["calibration"] == "sweep"


def test_published_rules_alone_are_no_advice(flying):
    codec.write_json(
        flying.ladder / "batch.json", {"calibration": {"method": "uncalibrated"}, "rungs": ADVICE["rungs"]}
    )
    view = View(find_place(flying.lab))
    view.frame(NOW)
    assert view._ladder.critical("124m") is None and view._ladder.critical("5m") is None


def test_torn_advice_is_noted_and_costs_nothing_else(flying):
    (flying.ladder / "batch.json").write_text('{"calibration": {"method"')
    frame = View(find_place(flying.lab)).frame(NOW)
    assert frame.run.batch.critical is None and any("batch.json" in note for note in frame.notes)


def test_a_window_without_a_number_does_not_wipe_one_away():
    log = RunLog()
    log.feed([NOISE, {**BOUND, "noise_at_least_tokens": None}])
    assert log.noise == KNOWN
    log.feed([BOUND])
    assert log.noise.tokens is None and log.noise.at_least_tokens == 90_000.0
    assert log.noise_scale_tokens == 412_345.0


class Played:
    """A feed whose events are given."""

    def __init__(self, spec, events):
        self.run_id, self.spec, self.problem, self.events = spec.run_id, spec, None, events

    def look(self, now_s):
        return Look(
            metrics=Fresh(lines=[], restarted=False), events=self.events, record=None, logged_s=now_s, saved_s=None,
            is_alive=True,
        )  # fmt: skip


def warmed_up(spec):
    """The same run with a full batch of 262,144 tokens, warmed up from a quarter."""
    science = spec.science
    horizons = tuple(d // 262_144 * 262_144 for d in science.horizons_tokens)
    science = replace(
        science,
        batch_tokens_global=262_144,
        horizons_tokens=horizons,
        batch_warmup=BatchWarmup(from_tokens=65_536),
    )
    execution = replace(spec.execution, microbatch_seqs_per_rank=8)
    return replace(spec, science=science, execution=execution, run_id=make_run_id(spec.rung, science))


def doubling(update, step, batch):
    return {"kind": "batch", "update": update, "step": step, "tokens": step * 262_144, "batch_tokens": batch}


def seen(spec, events):
    eye = RunEye(Played(spec, events))
    eye.look(NOW)
    return eye


@pytest.mark.parametrize(
    ("sizes", "wanted"), [((), (65_536, 1)), ((131_072,), (131_072, 2)), ((131_072, 262_144), (262_144, 3))]
)
def test_the_sizes_of_a_warm_up(template, sizes, wanted):
    spec = warmed_up(template.spec("51m"))
    events = [doubling(i + 1, i + 1, size) for i, size in enumerate(sizes)]
    batch = seen(spec, events)._batch(None)
    assert (batch.tokens, batch.step, batch.n_steps) == (wanted[0], wanted[1], 3)


def test_a_doubling_within_a_decay_ends_with_it(template):
    spec = warmed_up(template.spec("51m"))
    _trunk, decay, on = phases(spec.science)[:3]
    events = [
        doubling(10, 10, 131_072),
        doubling(decay.first_update + 5, decay.start_step + 5, 262_144),
    ]
    for phase, wanted in ((decay, 262_144), (on, 131_072)):
        eye = seen(spec, events)
        eye.log.update = phase.first_update + 7
        assert eye._batch(None).tokens == wanted


# ---------------------------------------------------------------------------------------------------- on the screen


def test_a_wide_screen_has_all_of_it_and_says_it_once(frame):
    text = shown(frame, batch_of(KNOWN, CRITICAL), 250, 60)
    for word in ("batch 262,144 tokens", "noise scale 412k [350k, 491k]", "B_crit 1.31M [1.00M, 1.72M]"):
        assert text.count(word) == 1
    assert "(by sweep): 20 % more tokens than a small batch" in text
    assert text.count("noise") == 1


def test_a_small_screen_keeps_the_numbers_it_has_room_for(frame):
    text = shown(frame, batch_of(KNOWN, CRITICAL), 80, 24)
    assert text.count("noise 412k") == 1
    assert "noise scale 412k [350k, 491k]" in shown(frame, batch_of(KNOWN, CRITICAL), 160, 45)


def test_bounds_and_doubts_are_words(frame):
    bound = NoiseNow(at_tokens=10**8, tokens=None, at_least_tokens=90_000.0, why="its interval reaches zero")
    critical = replace(CRITICAL, basis="bound", calibration="uncalibrated")
    text = shown(frame, batch_of(bound, critical), 250, 60)
    assert "noise scale at least 90.0k" in text
    assert "B_crit at least 1.31M (uncalibrated): at most 20 % more tokens" in text
    assert "(forecast, uncalibrated)" in shown(frame, batch_of(KNOWN, replace(critical, basis="forecast")), 250, 60)
    half_known = replace(CRITICAL, c_side="at most")
    text = shown(frame, batch_of(KNOWN, half_known), 250, 60)
    assert "B_crit at most 1.31M (by sweep): at least 20 % more tokens" in text


def test_a_warm_up_says_which_of_how_many(frame):
    text = shown(frame, batch_of(KNOWN, tokens=65_536, step=1, n_steps=3), 250, 60)
    assert "batch 65,536 tokens (size 1 of 3)" in text
    assert "(size 3 of 3)" in shown(frame, batch_of(KNOWN, step=3, n_steps=3), 250, 60)
    assert "(size 1 of 3)" in shown(frame, batch_of(None, tokens=65_536, n_steps=3), 132, 45)


def test_without_anything_known_there_is_no_line_more(frame):
    plain = "\n".join(line.plain for line in draw(frame, 160, 45))
    assert "noise" not in plain and "B_crit" not in plain and "batch " in plain


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 132, 200])
def test_it_fits_every_width(frame, width):
    shown(frame, batch_of(KNOWN, CRITICAL, tokens=65_536, n_steps=3), width, 40)
