"""The README: its table of verbs is what --help says, its flags exist, and its commands run.

A line of a ```bash block is run here, in a small world of finished labs, unless its comment begins with what it needs
and a test lacks: `GPU:`, `hub:` (a network), `root:`, `terminal:`, `tracker:` (its database) or `minutes:` (the
miniatures have tests of their own); those are only understood. What is no `homelab` command is named in ELSEWHERE.
"""

import functools
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from homelab_scaling import cli, codec

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "recipes/README.md")
NEEDS = ("GPU", "hub", "root", "terminal", "tracker", "minutes")

ELSEWHERE = {
    "bash tools/quickstart.sh": ("tests/test_scripts.py", "quickstart.sh"),
    "bash tools/check.sh": ("tests/test_scripts.py", "check.sh"),
    "source .venv/bin/activate": ("tests/test_scripts.py", ".venv"),
    "pip install -c constraints.txt -e": ("tests/test_packaging.py", "install"),
    "accelerate launch": ("tests/recipes/test_pretrain.py", "accelerate"),
    "tensorboard --logdir": ("tests/train/test_hooks.py", "EventAccumulator"),
}
"""Beginnings of other commands -> where they, or what they show, are tested, and by which word one finds it there."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command of a page."""

    words: tuple[str, ...]
    needs: frozenset[str]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[Line]:
    """Every line of the page's ```bash blocks."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", page(name), flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            command, _, comment = line.partition(" #")
            need = "|".join(NEEDS)
            needs = re.match(rf"\s*((?:{need})(?:, (?:{need}))*)(?::|$)", comment)
            if command.strip():
                words = tuple(shlex.split(command))
                found.append(Line(words=words, needs=frozenset(needs[1].split(", ") if needs else ())))
    return found


OURS = [line for line in commands("README.md") if line.words[0] in ("homelab", "sudo")]
RUN_HERE = [line for line in OURS if not line.needs]


def test_the_page_has_commands_to_check() -> None:
    assert len(OURS) >= 20 and len(RUN_HERE) >= 12
    assert {need for line in OURS for need in line.needs} <= set(NEEDS)


def test_the_table_of_verbs_is_what_help_says() -> None:
    rows = dict(re.findall(r"^\| `homelab ([\w-]+)` \| (.*) \|$", page("README.md"), flags=re.MULTILINE))
    wanted = "\n".join(f"| `homelab {verb}` | {what} |" for verb, what in cli.verbs().items())
    assert rows == cli.verbs(), f"paste this:\n{wanted}"


@functools.cache
def help_of(verb: str) -> str:
    """What `homelab VERB --help` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "homelab_scaling", verb, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_named_beside_a_verb_is_in_its_help(name: str) -> None:
    """In running text too: `homelab run --max-usd 5`."""
    seen = 0
    for quoted in re.findall(r"`((?:sudo )?homelab [^`]+)`", page(name).replace("\n", " ")):
        words = quoted.removeprefix("sudo ").split()
        if words[1] in cli.verbs():
            for flag in (word for word in words[: words.index("--") if "--" in words else None] if word[:2] == "--"):
                seen += 1
                wanted = re.compile(rf"(?<![\w-]){re.escape(flag)}(?![\w-])")
                assert flag == "--help" or wanted.search(help_of(words[1])), f"{quoted}: no {flag} in its help"
        else:
            assert words[1] in ("VERB", "--help", "--version"), f"{quoted}: no such verb"
    assert seen >= 3


@pytest.mark.parametrize("line", OURS, ids=lambda line: line.text[:60])
def test_every_command_is_understood(line: Line) -> None:
    words = [word for word in line.words if word != "sudo"]
    module = importlib.import_module(f"{cli.TOOLS}.{cli._tool_files()[words[1]].stem}")
    flags, _command = cli._split_command(module.Args, words[2:])
    cli.parse(module.Args, flags, f"homelab {words[1]}")


def test_every_other_command_is_run_by_a_test() -> None:
    others = [line.text for name in PAGES for line in commands(name) if line.words[0] not in ("homelab", "sudo")]
    assert len(others) >= len(ELSEWHERE)
    for text in others:
        (where, word) = next(place for start, place in ELSEWHERE.items() if text.startswith(start))
        assert word in (ROOT / where).read_text(encoding="utf-8"), text


# --------------------------------------------------------------------------------------------------------- running them

LADDER = """
name = "quickstart"
context_tokens = 32
rungs = [
    { name = "a", n_layer = 1, d_model = 16, n_head = 1 },
    { name = "b", n_layer = 1, d_model = 24, n_head = 1 },
    { name = "c", n_layer = 2, d_model = 32, n_head = 2 },
    { name = "d", n_layer = 2, d_model = 64, n_head = 2 },
]
[data]
sources = ["text"]
tokenizer = "bytes"
val_frac = 0.2
[horizons]
tokens = [10_240, 20_480, 40_960]
[batch]
tokens = 512
[lr]
rule = "fixed"
peak = 1e-2
[validation]
full_tokens = 8_192
curve_tokens = 1_024
[money]
usd_per_machine_hour = 0.05
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the README's lines name: labs, points, text."""
    here = tmp_path_factory.mktemp("readme")
    texts = {
        "text": ("argparse", "ast", "enum", "inspect", "typing", "tokenize", "threading", "tarfile", "zipfile"),
        "my_text": ("datetime", "decimal", "difflib", "doctest", "pickle", "plistlib", "shutil", "socket"),
    }
    for name, modules in texts.items():
        (here / name).mkdir()
        for module in modules:
            source = importlib.import_module(module).__file__
            assert source is not None
            (here / name / f"{module}.txt").write_text(Path(source).read_text(encoding="utf-8"), encoding="utf-8")
    (here / "mini.toml").write_text(LADDER)
    done = _run(here, "homelab", "run", "mini.toml", "--slots", "2")
    assert done.returncode == 0, done.stderr
    _plant_a_law(here / "lab" / "quickstart")
    done = _run(here, "homelab", "fit", "lab/quickstart")
    assert done.returncode == 0, done.stderr
    for name in ("baseline", "new_recipe"):
        copytree(here / "lab" / "quickstart", here / "lab" / name)
    rng = np.random.default_rng(0)
    lines = ["n_params,n_tokens,loss_nats"]
    for n in np.geomspace(1e6, 1e9, 8):
        for d in np.geomspace(2e7, 2e10, 6):
            loss = (1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(rng.normal(0, 0.003))
            lines.append(f"{n:.0f},{d:.0f},{loss:.5f}")
    (here / "points.csv").write_text("\n".join(lines) + "\n")
    return here


def _plant_a_law(lab: Path) -> None:
    """Gives the rows, whose models hardly learnt anything in their second of training, losses with something to ask."""
    for path in lab.glob("runs/*/record.json"):
        record = codec.read_plain_json(path)
        for row in record["rows"]:
            row["loss_nats"] = 1.5 + 30 / row["n_params"] ** 0.4 + 60 / row["n_tokens"] ** 0.35
        codec.write_json(path, record)


def _run(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "homelab_scaling", *words[1:]]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("line", RUN_HERE, ids=lambda line: line.text[:60])
def test_every_command_runs(world: Path, line: Line) -> None:
    run_id = next((world / "lab" / "quickstart" / "runs").iterdir()).name
    words = [word.replace("RUN_ID", run_id) for word in line.words]
    done = _run(world, *words)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
