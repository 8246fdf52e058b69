"""Every shipped miniature once through `homelab run` (or `homelab ddp`), shrunk further, to seconds.

The same tables and the same code, and at the end the sections that its study promises.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from homelab_scaling.plan.ladder import find_ladder, shipped_ladders
from homelab_scaling.runs import read_rows

MINIATURES = [name for name in shipped_ladders() if name.endswith("_cpu")]
TIMED = [name for name in MINIATURES if name.startswith("ddp_")]
CONTEXT, BATCH, TOKENS = 32, 256, (8_192, 16_384)
N_RUNGS = 3
"""What a law of N needs; starting a run costs more than training it here."""
PROMISED = {
    "every study": ("## The laws", "## What the seed alone does", "## How to repeat this"),
    "reference": ("## Beside the published experiment",),
    "batch": ("## Batch",),
    "steps": ("## Every size for the same steps",),
    "flops": ("## The isoFLOP study",),
}


def as_toml(value: Any) -> str:
    """A value as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {as_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    return json.dumps(value)


def shrunk(name: str) -> dict[str, Any]:
    """The ladder's tables with tiny shapes and horizons; which tables there are, and all else, stays as it is."""
    ladder = tomllib.loads(find_ladder(name).read_text(encoding="utf-8"))
    ladder["context_tokens"] = CONTEXT
    ladder["data"] |= {"sources": ["text"], "tokenizer": "bytes", "val_frac": 0.1, "max_epochs": 1000.0}
    ladder["data"].pop("max_bytes", None)
    ladder["rungs"] = ladder["rungs"][:N_RUNGS]
    for i, rung in enumerate(ladder["rungs"]):
        rung.pop("n_params_target", None)
        rung.update(n_layer=1, d_model=8 * 2**i, n_head=1)
        rung.update({key: BATCH for key in ("batch_tokens",) if key in rung})
        rung.update({key: TOKENS[-1] // 2**i for key in ("nominal_tokens",) if key in rung})
    shorter = {
        "tokens": TOKENS,
        "tokens_per_param": (1.0, 2.0),
        "flops": (1.5e9, 3e9),
        "steps": tuple(tokens // BATCH for tokens in TOKENS),
    }
    for key, values in shorter.items():
        if key in ladder["horizons"]:
            ladder["horizons"][key] = list(values[: len(ladder["horizons"][key])])
    if "tokens" in ladder.get("batch", {}):
        ladder["batch"]["tokens"] = BATCH
    ladder["validation"] = {"full_tokens": 2_048, "curve_tokens": 512} | (
        {"curve_every_steps": 10} if "curve_every_steps" in ladder.get("validation", {}) else {}
    )
    return ladder


@pytest.fixture
def small(tmp_path: Path):
    """`small(name)`: the shrunk ladder's file, beside some of the standard library's own text."""
    (tmp_path / "text").mkdir()
    for module in ("argparse", "ast", "codecs", "inspect", "typing"):
        source = Path(sys.modules[module].__file__ or "")
        (tmp_path / "text" / f"{module}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in shrunk(name).items()), encoding="utf-8")
        return path

    return write


def homelab(verb: str, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "homelab_scaling", verb, *argv, "--lab", str(cwd / "lab"), "--json"]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MINIATURES if name not in TIMED])
def test_a_miniature_runs_whole_and_its_report_keeps_what_it_promises(name: str, small, tmp_path: Path) -> None:
    path = small(name)
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    done = homelab("run", str(path), "--slots", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lab = tmp_path / "lab" / name
    rows, excluded = read_rows(lab)
    n_horizons = len(next(v for k, v in tables["horizons"].items() if k != "mode"))
    assert len(rows) == len(tables["rungs"]) * n_horizons and excluded == []
    report = (lab / "report" / "report.md").read_text(encoding="utf-8")
    promised = [*PROMISED["every study"]]
    promised += PROMISED["reference"] if "reference" in tables else ()
    promised += [heading for kind in tables["horizons"] for heading in PROMISED.get(kind, ())]
    promised += PROMISED["batch"] if "tokens" not in tables.get("batch", {}) else ()
    for heading in promised:
        assert f"\n{heading}" in report, heading
    assert f"recipes/ladders/{name}.toml --seeds 3" in report
    for file in ISOFLOP if "flops" in tables["horizons"] else ():
        assert (lab / file).is_file(), file


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMED)
def test_the_question_of_two_gpus_is_answered_by_two_cpu_ranks(name: str, small, tmp_path: Path) -> None:
    done = homelab("ddp", str(small(name)), "--cpu", "--steps", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    rungs = [rung["name"] for rung in tomllib.loads(find_ladder(name).read_text(encoding="utf-8"))["rungs"]]
    assert [verdict["rung"] for verdict in found["verdicts"]] == rungs
    assert found["n_ranks"] == 2 and found["measurement"]["backend"] == "gloo"
    for verdict in found["verdicts"]:
        assert verdict["judgement"]["advice"]


def test_every_large_study_has_its_miniature() -> None:
    """Of one line of tables: the same horizons by kind, and a `[reference]` where the large one has it."""
    large = {"gpt2_5m_120m", "wikitext_786k_4m_25m", "isoflop_5m_25m_100m", "ddp_two_gpus"}
    assert {f"{name}_cpu" for name in large} <= set(MINIATURES)


ISOFLOP = ("lab_runs.csv", "lab_fit.json", "iso-flop.png", "prediction.md")
