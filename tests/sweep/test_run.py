"""`homelab run` on a miniature ladder of real text: the whole job, interrupted, resumed, with a rung that diverges."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from homelab_scaling import codec
from homelab_scaling.batch.advice import read_advice
from homelab_scaling.runs import RunFolder, read_rows

LADDER = """
name = "mini"
context_tokens = 32
rungs = [
    { name = "a", n_layer = 1, d_model = 16, n_head = 1 },
    { name = "b", n_layer = 2, d_model = 32, n_head = 2 },
    { name = "c", n_layer = 2, d_model = 64, n_head = 2%s },
]
[data]
sources = ["text"]
tokenizer = "bytes"
val_frac = 0.1
[horizons]
tokens = [20_480, 40_960]
[batch]
tokens = 512
[lr]
rule = "fixed"
peak = 1e-2
[validation]
full_tokens = 8_192
curve_tokens = 1_024
[train]
log_every_steps = 5
checkpoint_every_steps = 10
[money]
usd_per_machine_hour = 0.05
"""


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """A ladder over some of the standard library's own text."""
    text = tmp_path / "text"
    text.mkdir()
    for module in ("argparse", "ast", "codecs", "decimal", "enum", "inspect", "json", "os", "re", "typing"):
        source = Path(sys.modules[module].__file__) if module in sys.modules else None
        if source and source.suffix == ".py":
            (text / f"{module}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "mini.toml"
    path.write_text(LADDER % "")
    return path


def start(ladder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "homelab_scaling",
            "run",
            str(ladder),
            "--lab",
            str(ladder.parent / "lab"),
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def finished_runs(lab: Path) -> dict[str, str]:
    records = {p.name: RunFolder(p).read_record() for p in (lab / "runs").iterdir()}
    return {name: record.status for name, record in records.items() if record is not None}


@pytest.mark.slow
def test_the_whole_job_interrupted_and_resumed(ladder: Path) -> None:
    lab = ladder.parent / "lab" / "mini"
    process = start(ladder)
    # Stop it in the middle of a rung, as a person does.
    wait_for(lambda: any(p.stat().st_size for p in lab.glob("runs/a-*/metrics.jsonl")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, (out, err[-2000:])
    assert "run the same command again" in err and "Traceback" not in err
    stopped = json.loads(out)
    assert stopped["outcome"]["stopped"] and Path(stopped["report"]).exists()
    first = next(iter((lab / "runs").glob("a-*")))
    assert RunFolder(first).read_record().status in ("stopped", "finished")

    process = start(ladder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert set(finished_runs(lab).values()) == {"finished"} and len(finished_runs(lab)) == 3
    rows, excluded = read_rows(lab)
    assert len(rows) == 6 and excluded == []
    assert (lab / "runs.csv").read_text().count("\n") == 7
    for run in (lab / "runs").iterdir():
        updates = [x["update"] for x in codec.read_jsonl(run / "metrics.jsonl") if x["kind"] == "step"]
        assert updates == list(range(len(updates))), "each step once, over all segments"
    report = Path(json.loads(out)["report"])
    assert report.exists() and list(report.parent.glob("*.png"))
    assert json.loads((lab / "fit" / "fit.json").read_text())["fits"]

    before = {p: p.stat().st_mtime_ns for p in lab.glob("runs/*/metrics.jsonl")}
    process = start(ladder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "not repeated" in err
    assert {p: p.stat().st_mtime_ns for p in lab.glob("runs/*/metrics.jsonl")} == before


@pytest.mark.slow
def test_a_rung_that_diverges_does_not_stop_the_others(ladder: Path) -> None:
    ladder.write_text(LADDER % ", lr_peak = 1e30")
    lab = ladder.parent / "lab" / "mini"
    process = start(ladder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err[-2000:]
    outcome = json.loads(out)["outcome"]
    assert len(outcome["finished"]) == 2 and len(outcome["failed"]) == 1
    assert "non-finite" in next(iter(outcome["failed"].values())) or "not finite" in next(
        iter(outcome["failed"].values())
    )
    assert sorted(finished_runs(lab).values()) == ["diverged", "finished", "finished"]
    page = Path(json.loads(out)["report"]).with_name("report.md").read_text()
    assert "diverged" in page


@pytest.mark.slow
def test_two_at_once_in_one_lab_are_refused(ladder: Path) -> None:
    lab = ladder.parent / "lab" / "mini"
    first = start(ladder)
    wait_for(lambda: (lab / ".lock").exists() or first.poll() is not None)
    time.sleep(0.5)
    second = start(ladder)
    _, err = second.communicate(timeout=60)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert second.returncode == 2 and "another `homelab run` is at work here" in err
    assert first.returncode == 75


MEASURED = """
name = "mini"
context_tokens = 32
rungs = [
    { name = "a", n_layer = 1, d_model = 32, n_head = 1 },
    { name = "b", n_layer = 1, d_model = 64, n_head = 2 },
]
[data]
sources = ["text"]
tokenizer = "bytes"
val_frac = 0.1
[horizons]
tokens = [65_536, 131_072]
[batch]
burn_in_frac = 0.5
[lr]
peak = 1e-2
exponent = 0
at_batch_tokens = 256
[validation]
full_tokens = 8_192
curve_tokens = 1_024
[train]
log_every_steps = 5
checkpoint_every_steps = 50
"""


@pytest.mark.slow
def test_batches_are_measured_first_whatever_happens_on_the_way(ladder: Path) -> None:
    """Stopped in a probe, killed in a probe, and at last left alone: each update of a probe is made once."""
    ladder.write_text(MEASURED)
    lab = ladder.parent / "lab" / "mini"
    heard = [lab / "batch" / name / "noise.jsonl" for name in "ab"]

    process = start(ladder)
    wait_for(lambda: heard[0].exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in err, err[-2000:]
    assert json.loads(out)["report"] is None and not (lab / "runs").exists() and not (lab / "batch.json").exists()

    killed = start(ladder)
    wait_for(lambda: heard[1].exists() or killed.poll() is not None)
    killed.kill()  # the probe lives on, and with it the pipe
    killed.wait(timeout=10)

    process = start(ladder)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    for file in heard:
        steps = [line["step"] for line in codec.read_jsonl(file)]
        assert steps == sorted(set(steps))
    advice = read_advice(lab)
    assert advice is not None and {r.basis for r in advice.rungs} <= {"measured", "bound", "forecast"}
    assert advice.calibration.method == "branch" or "does not calibrate" in err, err
    for run in (lab / "runs").iterdir():
        spec = RunFolder(run).read_spec()
        told = advice.rung(spec.rung)
        assert told is not None and spec.science.batch_tokens_global == told.batch_tokens
    assert set(finished_runs(lab).values()) == {"finished"} and len(finished_runs(lab)) == 2
    assert "still runs, from a command that is gone" in err
    killed.communicate(timeout=10)
