"""The `homelab` command: its listing, its help, and one sentence for every wrong word."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro

from homelab_scaling import __version__, cli, errors, tools

# Slow to import, and none of them is needed to say what a verb does.
HEAVY = ["torch", "transformers", "bitsandbytes", "accelerate", "datasets", "pyarrow", "matplotlib", "scipy"]

HELP_OF_EVERY_VERB = """
import contextlib, io, json, sys
from homelab_scaling import cli

said = {}
for verb in [None, *cli.verbs()]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            code = cli.main(["--help"] if verb is None else [verb, "--help"])
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in sys.argv[1:] if name in sys.modules]
    said[str(verb)] = {"code": code, "out": out.getvalue(), "heavy": heavy}
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, Any]]:
    """Every verb's help, all from one fresh process; "None" is the top-level help."""
    command = [sys.executable, "-c", HELP_OF_EVERY_VERB, *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return said


def test_help_imports_nothing_heavy(helps: dict[str, dict[str, Any]]) -> None:
    assert {verb: said["heavy"] for verb, said in helps.items() if said["heavy"]} == {}


def test_the_guard_would_see_a_heavy_import() -> None:
    code = HELP_OF_EVERY_VERB.replace("import contextlib", "import safetensors, contextlib")
    done = subprocess.run([sys.executable, "-c", code, "safetensors"], capture_output=True, text=True, check=True)
    assert all(said["heavy"] == ["safetensors"] for said in json.loads(done.stdout).values())


def test_every_verb_explains_itself(helps: dict[str, dict[str, Any]]) -> None:
    assert len(helps) == len(cli.verbs()) + 1 > 2
    assert {verb: said["code"] for verb, said in helps.items() if said["code"] != 0} == {}
    for verb, what in cli.verbs().items():
        assert what, f"tools/{verb}.py has no docstring"
        assert f"usage: homelab {verb}" in helps[verb]["out"]
        assert " ".join(what.split()) in " ".join(helps[verb]["out"].split())


@pytest.mark.parametrize("columns", [60, 200])
def test_the_listing_names_every_tool_and_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    verbs, listing = cli.verbs(), cli.usage()
    assert re.findall(r"^  (\S+)", listing, flags=re.MULTILINE) == list(verbs)
    assert all(len(line) <= columns for line in listing.splitlines() if line.startswith("  "))
    assert all(" ".join(what.split()) in " ".join(listing.split()) for what in verbs.values())
    files = [p.stem for p in Path(str(tools.__file__)).parent.glob("*.py") if p.stem != "__init__"]
    assert len(verbs) == len(files)


def test_each_tool_also_runs_as_a_script_of_its_own_verb() -> None:
    for verb, path in cli._tool_files().items():
        last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
        assert isinstance(last, ast.If), f"{path.name} does not end in `if __name__ == ...`"
        assert ast.unparse(last.test) == "__name__ == '__main__'"
        assert f"['{verb}', *sys.argv[1:]]" in ast.unparse(last.body[0]), path.name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "homelab: say what to do; `homelab --help` lists the verbs"),
        (["--verson"], "homelab: --verson is not an option here; did you mean --version?"),
        (["docter"], "homelab docter: no such verb; did you mean doctor?"),
        (["doctor", "--jsno"], "homelab doctor: unknown: --jsno; did you mean --json?"),
        (["doctor", "here"], "homelab doctor: unknown: here; see `homelab doctor --help`"),
        (["doctor", "--lab"], "homelab doctor: --lab has no value; see `homelab doctor --help`"),
    ],
)
def test_a_wrong_word_costs_one_line_and_exit_2(homelab: Callable[..., Any], argv: list[str], said: str) -> None:
    result = homelab(*argv)
    assert (result.code, result.out, result.err) == (2, "", said + "\n")


def test_a_word_like_no_verb_gets_them_all(homelab: Callable[..., Any]) -> None:
    result = homelab("qqq")
    assert result.code == 2
    assert result.err.strip() == f"homelab qqq: no such verb; known: {', '.join(cli.verbs())}"


def test_version(homelab: Callable[..., Any]) -> None:
    assert homelab("--version").out == f"homelab {__version__}\n"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Flags of every kind."""

    ladder: tyro.conf.Positional[str]
    """A ladder file, or the name of a shipped one, explained in so many words that they wrap in the box."""
    budget: float
    """FLOPs."""
    n_steps: int = 3
    """How many."""
    mode: Literal["exact", "nominal"] = "exact"
    """Which."""
    json: bool = False
    """One document."""


def test_flags_become_a_dataclass() -> None:
    args = cli.parse(Args, ["x.toml", "--budget", "1e15", "--json", "--n-steps", "4"], "homelab t")
    assert args == Args(ladder="x.toml", budget=1e15, n_steps=4, json=True)


@pytest.mark.parametrize("columns", ["40", "80", "250"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--budget", "lots"], "--budget wants a number, found 'lots'; see `homelab t --help`"),
        (
            ["x", "--budget", "1", "--n-steps", "6.5"],
            "--n-steps wants a whole number, found '6.5'; see `homelab t --help`",
        ),
        (["x", "--mode", "exat"], "--mode wants one of 'exact', 'nominal', found 'exat'; see `homelab t --help`"),
        (["x"], "missing --budget FLOAT: FLOPs; see `homelab t --help`"),
        (["x", "--budget", "1", "--n-step", "4"], "unknown: --n-step, 4; did you mean --n-steps INT?"),
        (["x", "--budget", "1", "--n-steps"], "--n-steps has no value; see `homelab t --help`"),
        (
            ["--budget", "1"],
            "missing STR: A ladder file, or the name of a shipped one, explained in so many words that they wrap in "
            "the box; see `homelab t --help`",
        ),
    ],
)
def test_a_wrong_flag_is_one_plain_sentence_at_any_width(
    argv: list[str], said: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(errors.UserError) as caught:
        cli.parse(Args, argv, "homelab t")
    assert str(caught.value) == said


class FakeTool:
    """A verb whose main does what a test wants."""

    Args = Args
    raised: BaseException

    @classmethod
    def main(cls, args: Args) -> int:
        raise cls.raised


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (errors.SpecError("found 1,\n  wanted 2"), 2, "homelab doctor: found 1, wanted 2\n"),
        (errors.RunFailed("a rung diverged"), 1, "homelab doctor: a rung diverged\n"),
        (errors.StoppedByWatchdog("too hot"), 3, "homelab doctor: too hot\n"),
        (errors.Stopped("run it again"), 75, "homelab doctor: run it again\n"),
        (KeyboardInterrupt(), 130, "homelab doctor: interrupted\n"),
    ],
)
def test_a_verb_s_error_is_its_exit_code_and_one_line(
    raised: BaseException, code: int, said: str, homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTool, "raised", raised, raising=False)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: FakeTool)
    result = homelab("doctor", "x", "--budget", "1")
    assert (result.code, result.err) == (code, said)


def test_a_bug_keeps_its_traceback(homelab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTool, "raised", ZeroDivisionError(), raising=False)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: FakeTool)
    with pytest.raises(ZeroDivisionError):
        homelab("doctor", "x", "--budget", "1")


@pytest.mark.parametrize("argv", [["--help"], ["doctor", "--help"]])
def test_a_closed_pipe_is_no_traceback(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys; from homelab_scaling import cli; sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", code, *argv], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
