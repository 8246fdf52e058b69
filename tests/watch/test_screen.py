"""The screen at every size: nothing wider than it, no number broken, what matters first, words for every state."""

import re
import shutil
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from watched_lab import NOW, WatchedLab

from homelab_scaling.watch import words
from homelab_scaling.watch.bars import (
    Series,
    binned,
    boxed,
    chart,
    cut,
    fit,
    padded,
    part,
    ruled,
    spark,
    to_ascii,
    wrapped,
)
from homelab_scaling.watch.frame import Frame, RunState
from homelab_scaling.watch.live import self_contained, write_svg
from homelab_scaling.watch.screen import TWO_COLUMNS, draw, one_line
from homelab_scaling.watch.view import View, find_place

SIZES = [(80, 24), (100, 30), (TWO_COLUMNS, 40), (160, 45), (250, 70)]


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> Frame:
    lab = tmp_path_factory.mktemp("screen") / "lab"
    WatchedLab.in_flight(lab, every=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMELAB_MACHINE", str(lab / "machine"))
        found = View(find_place(lab)).frame(NOW)
    shutil.rmtree(lab)
    return found


def plain(frame, width, height=None, **kwargs):
    return "\n".join(line.plain for line in draw(frame, width, height, **kwargs))


def with_cards(frame, n):
    cards = [replace(frame.cards[i % 2], index=i, uuid=f"GPU-{i}") for i in range(n)]
    return replace(frame, cards=tuple(cards))


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_everything_that_matters_is_on_every_screen(frame, width, height):
    shown = plain(frame, width, height)
    run, heat = frame.run, f"{frame.cards[0].temperature_c:.0f} C"
    wanted = [
        *("51m", "slowed", "43.0 %", f"step {run.update:,} of {run.n_updates:,}", "left (", "loss", "val", "tokens/s"),
        *("MFU", "step ", "p99", "kWh", "$", "batch", "GPU 0", "GPU 1", heat, "slow, 90 %", "of 320 W", "VRAM", "peak"),
        *("power cap", "sensors 0.0 s ago", "next: GPU 1", "87 C for 15 s", "finished", "queued", "law"),
    ]
    assert [word for word in wanted if word not in shown] == []


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.integers(20, 260), st.one_of(st.none(), st.integers(1, 90)), st.integers(0, 5))
def test_every_line_is_as_wide_as_the_screen_and_there_are_not_too_many(frame, width, height, n_cards):
    lines = draw(with_cards(frame, n_cards), width, height)
    assert {line.cell_len for line in lines} == {width}
    assert height is None or len(lines) <= height
    assert lines


@pytest.fixture(scope="module")
def numbers_by_width(frame):
    """Width -> every number on a screen so wide, but for counts of hidden runs and the ends of axes."""
    found = {}
    for width in range(40, 200, 3):
        shown = re.sub(r"and \d+ more: .*|[⠀-⣿▁-█]", " ", plain(frame, width, 24))
        found[width] = {n for n in numbers(shown) if not re.fullmatch(r"\d\.\d\d", n)}
    return found


@pytest.mark.parametrize("width", [*range(40, 200, 3)])
def test_no_number_is_ever_broken(frame, numbers_by_width, width):
    """A number cut short would be one that no other screen shows."""
    others = set().union(*(found for other, found in numbers_by_width.items() if other != width))
    whole = others | numbers(plain(frame, 300, 80)) | numbers(plain(frame, 70, 60))
    assert numbers_by_width[width] - whole == set()


def numbers(text):
    return set(re.findall(r"(?<![\w.,])[$]?\d[\d,.:]*\w?", text))


def test_a_taller_screen_says_more(frame):
    sizes = [len(plain(frame, 100, h).split()) for h in (8, 12, 16, 20, 24, 30, 40, 50)]
    assert sizes == sorted(sizes)
    assert sizes[0] > 10


def test_two_columns_end_together(frame):
    lines = plain(frame, 160, 45).splitlines()
    assert len(lines) == 45
    assert lines[-1].count("╰") == 2


def test_without_a_height_there_is_what_there_is_to_say(frame):
    assert 30 <= len(draw(frame, 100)) <= 50
    assert plain(frame, 100).count("queued") == 2


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_any_number_of_cards(frame, n):
    shown = plain(with_cards(frame, n), 100, 60)
    assert [f"GPU {i}" in shown for i in range(n)] == [True] * n
    small = plain(with_cards(frame, n), 80, 24)
    assert [f"GPU {i}" in small for i in range(n)] == [True] * n


@pytest.mark.parametrize("state", get_args(RunState))
def test_every_state_has_its_word(frame, state):
    run = replace(frame.run, state=state, reason=None)
    rungs = tuple(replace(r, state=state) for r in frame.rungs)
    shown = plain(replace(frame, run=run, rungs=rungs), 80, 24)
    assert shown.count(state) >= 2


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("alive", "sensors 9.0 s ago"),
        ("silent", "watchdog silent for 9.0 s"),
        ("none", "no watchdog running"),
        ("recording", "as recorded"),
        ("direct", "asked the driver"),
    ],
)
def test_every_state_of_the_watchdog_has_its_words(frame, state, said):
    dog = replace(frame.watchdog, state=state, age_s=9.0)
    assert said in plain(replace(frame, watchdog=dog), 80, 24)


def test_a_long_list_shows_the_run_and_counts_the_rest(frame):
    many = [
        replace(frame.rungs[0], run_id=f"r{i}", rung=f"r{i}", state="finished" if i < 30 else "queued")
        for i in range(60)
    ]
    many[30] = frame.rungs[3]
    shown = plain(replace(frame, rungs=tuple(many)), 80, 24)
    assert "51m" in shown
    assert re.search(r"and 5\d more: 2\d finished, 2\d queued", shown)


def test_notes_stand_at_the_end(frame):
    shown = plain(replace(frame, notes=("plan.json cannot be read", "x")), 80, 24).splitlines()
    assert shown[-1].startswith("! plan.json cannot be read (and 1 more)")
    assert len(shown) <= 24


def test_names_with_brackets_are_names(frame):
    run = replace(frame.run, rung="[red]51m[/]", reason="[bold]x", state="failed")
    assert "[red]51m[/]" in plain(replace(frame, run=run), 100, 30)


def test_unknown_is_a_word_and_zero_a_number(frame):
    run = frame.run
    unknown = replace(
        run, cost=replace(run.cost, kwh=None, kwh_why="on CPU", usd_energy=None, usd_machine=None, usd_why="no price")
    )
    shown = plain(replace(frame, run=unknown), 140, 40)
    assert "energy unknown: on CPU" in shown and "money unknown: no price" in shown
    zero = replace(run, cost=replace(run.cost, kwh=0.0, usd_energy=0.0, usd_machine=0.0))
    shown = plain(replace(frame, run=zero), 100, 30)
    assert "0 of about" in shown and "$0 of about" in shown and "unknown" not in shown
    slow = replace(
        run, speed=replace(run.speed, tokens_per_s=None, step_p50_s=None, mfu_frac=None, mfu_why="this run is in fp32")
    )
    assert "MFU unknown: this run is in fp32" in plain(replace(frame, run=slow), 100, 30)


def test_the_noise_scale_is_there_once_it_is_measured(frame):
    assert "noise" not in plain(frame, 160, 45)
    run = replace(frame.run, noise_scale_tokens=123_456.0)
    assert "noise scale 123k" in plain(replace(frame, run=run), 160, 45)


def test_the_line_a_minute(frame):
    said = one_line(frame)
    assert "\n" not in said
    for word in ("51m", "slowed", "43.0 %", "loss", "val", "tok/s", "left", "kWh", "GPU 0 ", "GPU 1 ", " C", "slow"):
        assert word in said
    assert one_line(replace(frame, run=None, rungs=())).split()[1:3] == ["no", "run"]


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_picture_loads_nothing(frame, tmp_path):
    path = tmp_path / "a.svg"
    write_svg(frame, path, width=100, height=None)
    text = path.read_text()
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg", "https://www.textualize.io"}
    assert "@font-face" not in text and "url(" not in text.replace("url(#", "")
    assert len(text) < 150_000
    assert "gpt2_5m_120m" in text.replace("&#160;", " ")
    assert self_contained(text) == text


def test_no_colour_where_none_is_wanted(frame, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(width=80, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        for line in draw(frame, 80, 24):
            console.print(line)
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", capture.get())


def test_an_ascii_terminal_gets_ascii_of_the_same_shape(frame):
    shown = plain(frame, 100, 40, ascii_only=True)
    assert shown.isascii()
    assert "?" not in shown
    assert [len(line) for line in shown.splitlines()] == [100] * len(shown.splitlines())
    assert "51m  slowed" in shown and "+-" in shown


# --------------------------------------------------------------------------------------------------------------- pieces


FORMS = st.lists(st.text("abc 123.", min_size=1, max_size=12), min_size=1, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 5), FORMS), max_size=6), st.integers(1, 60))
def test_a_line_is_made_of_whole_parts(parts, width):
    parts = [(keep, sorted(forms, key=len, reverse=True)) for keep, forms in parts]
    line = fit([part(keep, *forms) for keep, forms in parts], width, gap="|").plain
    assert len(line) <= width
    if parts and not line.endswith("…") and line:
        left = [form for _, forms in parts for form in forms]
        assert all(piece in left for piece in line.split("|"))
    if parts and width > 20:
        assert line


def test_important_parts_outlive_others():
    parts = [part(1, "nice to have"), part(5, "12.5 kWh of 80", "12.5 kWh"), part(9, "71 C")]
    assert fit(parts, 100).plain == "nice to have   12.5 kWh of 80   71 C"
    assert fit(parts, 25).plain == "12.5 kWh of 80   71 C"
    assert fit(parts, 16).plain == "12.5 kWh   71 C"
    assert fit(parts, 8).plain == "71 C"
    assert fit([part(3, "a b"), None, part(2, "")], 80).plain == "a b"


def test_cutting_ends_at_a_word():
    assert cut(Text("temperature of 71 degrees"), 17).plain == "temperature of…"
    assert cut(Text("temperature of 71 degrees"), 99).plain == "temperature of 71 degrees"
    assert cut(Text("71"), 1).plain == "…"
    assert padded(Text("ab"), 4).plain == "ab  "
    assert [t.plain for t in wrapped("one two three four", 9, 2)] == ["one two", "three…"]
    assert [t.plain for t in wrapped("one two", 20, 3)] == ["one two"]


@pytest.mark.parametrize("width", [20, 30, 80])
def test_boxes_are_as_wide_as_asked(width):
    lines = [Text("a line"), Text("x" * 200), Text("two words " * 20)]
    for draw_box in (boxed, ruled):
        for right in (None, Text("12:00")):
            drawn = draw_box(lines, width, Text("a title of some words"), right)
            assert {line.cell_len for line in drawn} == {width}


def test_sparks_and_bins():
    drawn = spark([0.0, 5.0, None, 10.0], 0.0, 10.0, lambda _: "red")
    assert drawn.plain == "▁▅ █"
    assert spark([3.0], 3.0, 3.0, lambda _: "").cell_len == 1
    assert binned([(0, 1.0), (1, 3.0), (9, 5.0), (11, 7.0)], 0, 10, 5) == [2.0, None, None, None, 5.0]


def test_a_chart_goes_from_corner_to_corner():
    rows = chart([Series([(0.0, 0.0), (1.0, 1.0)], "cyan")], 10, 3, (0.0, 1.0), (0.0, 1.0))
    assert [len(row.plain) for row in rows] == [10] * 3
    assert rows[0].plain[-1] != " " and rows[-1].plain[0] != " " and rows[0].plain[0] == " "
    nothing = chart([Series([(0.5, 9.0), (0.6, float("nan"))], "cyan")], 4, 2, (0.0, 1.0), (0.0, 1.0))
    assert {row.plain for row in nothing} == {"    "}
    assert to_ascii(Text("━─│▁█±…⣿")).plain == "=-|_#~~#"


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (words.kwh(0.0), "0 kWh"), (words.kwh(0.0042), "4.2 Wh"), (words.kwh(0.39), "0.39 kWh"),
        (words.kwh(12.34), "12.3 kWh"), (words.kwh(1234.0), "1,234 kWh"), (words.usd(0.0), "$0"),
        (words.usd(0.0041), "$0.0041"), (words.usd(12.345), "$12.35"), (words.usd(1e-6), "under $0.0001"),
        (words.percent(0.0), "0 %"), (words.percent(0.004), "0.4 %"), (words.percent(0.331), "33 %"),
        (words.percent(None), "–"), (words.step(0.0842), "84.2 ms"), (words.step(1.071), "1.07 s"),
        (words.step(None), "–"), (words.gib(16 * 2**30), "16"), (words.gib(None), "–"), (words.loss(None), "–"),
        (words.ago(0.84), "0.8 s"), (words.ago(75.0), "75 s"), (words.whole(2520.4, " MHz"), "2,520 MHz"),
    ],
)  # fmt: skip
def test_numbers_in_words(found, wanted):
    assert found == wanted


def test_moments_to_come():
    assert re.fullmatch(r"\d\d:\d\d", words.when(NOW + 3600, NOW))
    assert re.fullmatch(r"\w{3} \d\d:\d\d", words.when(NOW + 30 * 3600, NOW))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", words.when(NOW + 30 * 86_400, NOW))
