"""What a reader sees: scores in their units, prices, differences in words, each warning once."""

from dataclasses import replace
from pathlib import Path

import pytest
from asked import Noted, about, sitting

from homelab_scaling.evals import plots, show
from homelab_scaling.evals.compare import Delta, Evaluated, deltas, read_evaluated
from homelab_scaling.evals.results import Part, Score
from homelab_scaling.evals.sitting import Progress
from homelab_scaling.evals.store import Store
from homelab_scaling.evals.telling import describe


def evaluated(folder: Path, name: str, *, warn: tuple[str, ...] = (), **facts: object) -> Evaluated:
    """Two tasks of a model; the first one is warned of."""
    known = about(name, **facts)
    Store(folder / name).open_for(known)
    for task in ("one", "two"):
        warnings = warn if task == "one" else ()
        sitting(folder / name, facts=known, cautions=lambda _, warnings=warnings: warnings).evaluate(
            Noted(n=20, name=task, notes=folder / "notes")
        )
    return read_evaluated(Store(folder / name))


def part(score: float | None, low: float | None = None, high: float | None = None) -> Part:
    return Part(n_documents=10, score=score, se=None, low=low, high=high)


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        (part(0.382, 0.351, 0.414), "share", "38.2 % [35.1, 41.4]"),
        (part(1.23456, 1.2, 1.27), "bits per byte", "1.2346 [1.2000, 1.2700]"),
        (part(2.5), "mean", "2.5000"),
        (part(None), "share", "–"),
    ],
)
def test_scores_are_in_their_units(what: Part, kind: str, text: str) -> None:
    assert show.score_text(what, kind) == text


def test_prices_say_where_they_come_from(tmp_path: Path) -> None:
    score: Score = evaluated(tmp_path, "a").scores["one"]
    assert (show.kwh_text(score), show.usd_text(score), show.clean_text(score)) == ("–", "–", "–")
    priced = replace(score, kwh=0.01234, kwh_from="counter", usd=0.5, clean=part(0.25))
    assert (show.kwh_text(priced), show.usd_text(priced), show.clean_text(priced)) == ("0.012", "$0.5", "25.0 %")
    assert show.kwh_text(replace(priced, kwh_from="stated watts")) == "~0.012"
    assert [show.duration(s) for s in (0.44, 12.3, 90, 7200)] == ["0.4 s", "12 s", "1.5 min", "2.0 h"]


def test_a_difference_in_words(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path, "a"), evaluated(tmp_path, "b")
    delta: Delta = deltas(a, b)[0]
    assert show.delta_text(delta) == "+0.0 [-8.9, +8.9] points" and show.verdict(delta) == "not told apart"
    gained = replace(delta, delta=0.2, low=0.1, high=0.3)
    assert show.verdict(gained) == "better" and show.verdict(replace(gained, higher_is_better=False)) == "worse"
    refused = replace(
        delta, delta=None, low=None, high=None, refused="asked with different settings: shots 0 against 5"
    )
    assert show.delta_text(refused) == "–"
    assert show.verdict(refused) == "not compared: asked with different settings: shots 0 against 5"


def test_a_warning_is_said_once_and_of_whom(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path, "a", warn=("near chance",)), evaluated(tmp_path, "b", warn=("near chance",))
    said = show.remarks([a, b])
    kwh, usd = "kwh is unknown: asked on a CPU", "usd is unknown: neither the run's [money]"
    assert said[0] == "one: near chance" and [text.startswith(k) for text, k in zip(said[1:], (kwh, usd), strict=True)]
    plain = evaluated(tmp_path, "c")
    assert show.remarks([a, plain])[0] == "one of a: near chance"


def test_a_figure_wants_two_models_with_a_loss(tmp_path: Path) -> None:
    known = {"n_params": 10**6, "n_tokens": 10**8, "flops": 1e15}
    a, b = (evaluated(tmp_path, n, **known, loss_nats=x) for n, x in (("a", 3.0), ("b", 2.9)))
    unknown = evaluated(tmp_path, "c")
    assert plots.drawn_tasks([a, b, unknown]) == ["one", "two"] and plots.drawn_tasks([a, unknown]) == []
    assert plots.write_picture(tmp_path, [a, b]) == tmp_path / "scores.png"
    assert plots.write_picture(tmp_path, [a]) is None and not (tmp_path / "scores.png").exists(), "no old picture stays"


def test_progress_tells_what_was_kept() -> None:
    progress = Progress(task="bpb", n_done=1200, n_documents=5000, n_kept=1000, seconds=12.4)
    assert describe(progress) == "bpb: 1,200 of 5,000 documents (1,000 of them from before), 12 s"
