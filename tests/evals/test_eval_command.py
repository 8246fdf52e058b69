"""`homelab eval` as its user meets it: a lab, one row, a folder of Hugging Face's; stopped, repeated, misspelt."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from toy_run import make_toy_run, train_here

from homelab_scaling import codec
from homelab_scaling.data.shards import build_shards
from homelab_scaling.errors import UserError
from homelab_scaling.evals.price import metered
from homelab_scaling.evals.results import Score
from homelab_scaling.evals.sources import fingerprint, targets
from homelab_scaling.report.collect import collect
from homelab_scaling.report.document import to_markdown
from homelab_scaling.report.evals import evaluations
from homelab_scaling.specs import ModelShape
from homelab_scaling.watch import link
from homelab_scaling.watch.readings import CardFacts, CardReading

Homelab = Callable[..., Any]
QUICK = ("--tasks", "bpb", "copy", "--limit", 40)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAB/<ladder> with two finished runs of two rows each, on documents that repeat themselves."""
    root = tmp_path_factory.mktemp("labs")
    texts = [f"Chapter {i}. " + f"the {i} cats sat on the {i * 7} mats; wörld. " * (3 + i % 5) for i in range(120)]
    source = root / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = build_shards([str(source)], "bpe:300", root / "shards", val_frac=0.2)
    for width in (32, 16):
        shape = ModelShape(n_layer=1, d_model=width, n_head=2, context_tokens=32)
        settings: dict[str, Any] = {"shape": shape, "n_vocab": manifest.n_vocab, "horizons": (10, 30), "trackers": ()}
        spec, folder = make_toy_run(root, manifest, **settings)
        train_here(spec, folder)
    return root / "a"


@pytest.fixture
def lab(trained: Path, tmp_path: Path) -> Path:
    """A lab of one's own: the runs are shared, the evaluations are not."""
    folder = tmp_path / "labs" / "a"
    folder.mkdir(parents=True)
    (folder / "runs").symlink_to(trained / "runs")
    (folder.parent / "shards").symlink_to(trained.parent / "shards")
    return folder


def runs_of(lab: Path) -> list[Path]:
    return sorted((lab / "runs").iterdir())


def test_a_lab_is_every_run_s_largest_row_compared_and_drawn(lab: Path, tmp_path: Path, homelab: Homelab) -> None:
    said = homelab("eval", lab, *QUICK, "--out", lab / "evals", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    first, second = found["models"]
    assert first["flops"] < second["flops"] and first["n_params"] < second["n_params"]
    assert [score["task"] for score in first["scores"]] == ["bpb", "copy"]
    bits = first["scores"][0]
    assert bits["whole"]["low"] < bits["whole"]["score"] < bits["whole"]["high"] and bits["n_tokens"] > 100
    assert bits["kwh"] is None and "--watts" in bits["unknown"]["kwh"]
    assert {(d["task"], d["first"], d["second"]) for d in found["deltas"]} == {
        (task, first["name"], second["name"]) for task in ("bpb", "copy")
    }
    (picture,) = found["pictures"]
    assert Path(picture).read_bytes()[1:4] == b"PNG" and Path(picture).stat().st_size > 5_000
    assert codec.read_json(Path(first["folder"]) / "bpb.json", Score).whole.score == bits["whole"]["score"]
    samples = {folder["folder"]: (Path(folder["folder"]) / "samples.jsonl").read_bytes() for folder in found["models"]}
    again = homelab("eval", lab, *QUICK, "--out", lab / "evals", "--json")
    assert json.loads(again.out) == found, "nothing is asked, nothing changes"
    assert all((Path(folder) / "samples.jsonl").read_bytes() == before for folder, before in samples.items())
    text = to_markdown("t", evaluations(collect(lab), []))
    assert "## What the models can do" in text and text.count("| copy |") == 2 and "bpb bits per byte" in text


def test_the_tables_say_score_price_and_difference(lab: Path, homelab: Homelab) -> None:
    one, other = runs_of(lab)
    said = homelab(
        "eval", one, other, *QUICK, "--out", lab / "e", "--watts", 100, "--usd-per-kwh", 0.3, "--usd-per-hour", 2
    )
    assert said.code == 0, said.err
    assert "differences on the same documents" in said.out and f"{one.name}@3840 → {other.name}@3840" in said.out
    assert "12.5 %" in said.out and "~" in said.out and "$" in said.out, "chance, stated watts, money"
    assert f"written: {lab / 'e' / one.name}@3840" in said.err and "copy: 40 of 40 documents" in said.err


def test_without_tasks_all_of_our_own_are_asked_of_a_row(lab: Path, homelab: Homelab) -> None:
    run = runs_of(lab)[0]
    said = homelab("eval", run, "--at", 1280, "--limit", 20, "--out", lab / "e", "--json")
    assert said.code == 0, said.err
    (model,) = json.loads(said.out)["models"]
    assert model["name"] == f"{run.name}@1280" and model["is_ours"] and model["loss_nats"] is not None
    assert [score["task"] for score in model["scores"]] == ["bpb", "copy", "last-word", "minimal-pairs"]
    assert model["scores"][0]["overlap_frac"] == 0 and model["scores"][0]["clean"] is not None
    every = homelab("eval", run, "--all-rows", *QUICK, "--out", lab / "e", "--json")
    assert [model["n_tokens"] for model in json.loads(every.out)["models"]] == [1280, 3840]


def test_a_folder_of_hugging_face_s_is_asked_too(
    lab: Path, tmp_path: Path, homelab: Homelab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from homelab_scaling.export.convert import open_model

    ours = open_model(runs_of(lab)[0])
    ours.model.save_pretrained(tmp_path / "hf")
    ours.tokenizer.save_pretrained(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    text = lab.parent / "held.txt"
    text.write_text("The 3 cats sat on the mats.\n\nNobody answered them; the 7 dogs sat on the 9 mats.\n" * 20)
    said = homelab("eval", "hf", "--tasks", "bpb", "--text", text, "--json")
    assert said.code == 0, said.err
    (model,) = json.loads(said.out)["models"]
    assert (tmp_path / "evals" / "hf" / "bpb.json").exists() and not model["is_ours"]
    assert model["scores"][0]["clean"] is None and "contamination unknown" in str(model["scores"][0]["warnings"])
    assert model["weights"] == fingerprint(ours), "the same weights, wherever they come from"


@contextmanager
def interrupting() -> Iterator[Callable[[Any], None]]:
    """Ctrl-C as soon as something was answered."""

    def report(progress: Any) -> None:
        if progress.n_kept < progress.n_done < progress.n_documents:
            os.kill(os.getpid(), signal.SIGINT)

    yield report


def test_ctrl_c_keeps_what_was_answered_and_exits_75(
    lab: Path, homelab: Homelab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runs_of(lab)[0], lab / "e"
    command = ("eval", run, "--tasks", "copy", "--limit", 60, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr("homelab_scaling.evals.telling.telling", interrupting)
        stopped = homelab(*command)
    assert stopped.code == 75 and "stopped by SIGINT in copy" in stopped.err and "goes on from here" in stopped.err
    (samples,) = out.glob("*/samples.jsonl")
    before = [line["doc_id"] for line in codec.read_jsonl(samples)]
    assert 0 < len(before) < 60 and not list(out.glob("*/copy.json"))
    done = homelab(*command)
    after = [line["doc_id"] for line in codec.read_jsonl(samples)]
    assert done.code == 0 and after[: len(before)] == before and len(after) == len(set(after)) == 60


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "which model? give a run"),
        (("none",), "none: no such folder"),
        (("RUN", "--tasks", "copy", "copy"), "--tasks names a task twice"),
        (("RUN", "--limit", 0), "--limit 0: wants 1 or more"),
        (("RUN", "--shots", -1), "--shots -1: wants 0 or more"),
        (("RUN", "--batch-seqs", 0), "--batch-seqs 0: wants 1 or more"),
        (("RUN", "--watts", -3), "--watts -3: wants 0 or more"),
        (("RUN", "--at", 77), "has no checkpoint at 77; rows: 1280, 3840"),
        (("LAB", "--at", 1280), "chooses a row of one run"),
        (("RUN", "--all-rows", "--at", 1280), "--all-rows wants a run's folder, and no --at"),
        (("HERE", "--all-rows"), "is neither a run nor a lab"),
        (("HERE",), "neither a run (no spec.json), nor a checkpoint, nor a Hugging Face model"),
        (("EMPTY",), "no run of this lab has finished"),
        (("RUN", "--device", "tpu"), "device 'tpu': wants auto, cpu, cuda or cuda:N"),
        (("RUN", "--tasks", "bpb", "--text", "none.txt"), "none.txt"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    lab: Path, homelab: Homelab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[Any, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    words = {"RUN": runs_of(lab)[0], "LAB": lab, "HERE": tmp_path, "EMPTY": tmp_path / "empty"}
    found = homelab("eval", *(words.get(arg, arg) for arg in args))
    lines = [line for line in found.err.splitlines() if line.startswith("homelab eval:")]
    assert found.code == 2 and len(lines) == 1 and said in lines[0], found.err
    assert not (lab / "evals").exists() and not (tmp_path / "evals").exists(), "nothing half-written"


def test_the_list_names_tasks_and_forms(homelab: Homelab) -> None:
    said = homelab("eval", "--list")
    for name in ("bpb", "copy", "last-word", "minimal-pairs", "hellaswag", "gsm8k", "blimp", "--limit 100"):
        assert name in said.out
    assert '{"context", "choices", "answer"}' in said.out and "acc_norm" in said.out
    tasks = {task["name"]: task for task in json.loads(homelab("eval", "--list", "--json").out)["tasks"]}
    assert tasks["hellaswag"]["shots"] == 10 and tasks["hellaswag"]["needs_hub"] and not tasks["copy"]["needs_hub"]


def test_scores_of_runs_lie_in_their_lab_and_of_others_here(lab: Path, tmp_path: Path) -> None:
    run = runs_of(lab)[0]
    assert [t.evals for t in targets([run])] == [lab / "evals"]
    (row,) = targets([run / "checkpoints" / "row-1280"])
    assert row.evals.name == "evals" and row.labs.name
    assert targets([tmp_path])[0].evals == Path("evals") and targets([run], out=tmp_path)[0].evals == tmp_path
    assert len(targets([run, run])) == 1
    with pytest.raises(UserError, match="is a lab; name the run"):
        targets([lab], at=3)


# -------------------------------------------------------------------------------------------------------------- energy


def test_the_watchdog_meters_and_knows_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog (this process, by its status) that reads a card's counter: 360 J between two laps."""
    monkeypatch.setenv(link.MACHINE_VARIABLE, str(tmp_path / "machine"))
    monkeypatch.setenv(link.CARDS_VARIABLE, "all")
    machine = link.machine_folder(tmp_path)
    began = time.time() - 5

    def tell(joules: float) -> None:
        reading = CardReading(uuid="GPU-a", power_w=0.0, energy_j=joules, energy_from="counter")
        facts = CardFacts(uuid="GPU-a", index=0, name="Fake 3090", vram_bytes=1, slowdown_c=90.0)
        status = link.Status(
            pid=os.getpid(),
            started_s=began,
            t_s=time.time(),
            interval_s=1.0,
            poll_p50_s=0.001,
            poll_p99_s=0.001,
            facts=(facts,),
            readings=(reading,),
        )
        machine.path.mkdir(exist_ok=True)
        codec.write_json(machine.status, status)

    tell(1000.0)
    notes: list[str] = []
    with metered(tmp_path, "cpu", notes.append) as found:
        (registered,) = machine.registrations()
        assert registered.foreign and registered.pids == (os.getpid(),) and registered.cards == ("GPU-a",)
        assert found.meter is not None and notes == []
        found.meter.lap()
        monkeypatch.setattr("homelab_scaling.watch.energy.READ_EVERY_S", 0.0)
        tell(1360.0)
        lap = found.meter.lap()
        assert lap.joules == pytest.approx(360, abs=1) and found.meter.source == "counter"
    assert machine.registrations() == []


def test_on_a_cpu_nothing_is_metered(tmp_path: Path) -> None:
    with metered(tmp_path, "cpu", lambda _: None) as found:
        assert found.meter is None and found.why_not == "asked on a CPU, which no sensor meters"
    assert list(tmp_path.iterdir()) == []
