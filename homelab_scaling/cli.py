"""The `homelab` command: finds a verb's module by name, parses its flags, catches the project's errors once.

A verb is a module of `homelab_scaling.tools` with a docstring (`homelab --help` shows its first line, `homelab VERB
--help` all of it), a frozen dataclass `Args` (its fields are the flags, its field docstrings the help) and
`main(args) -> int`. Nothing else is registered.
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from homelab_scaling import __version__
from homelab_scaling.errors import HomelabError, UserError

A = TypeVar("A")

TOOLS = "homelab_scaling.tools"


def verbs() -> dict[str, str]:
    """Every verb and what it does, read from the tools' docstrings without importing them."""
    return {verb: _summary(path) for verb, path in _tool_files().items()}


def _tool_files() -> dict[str, Path]:
    """Verb -> its file; `gpu_watchdog.py` is `watchdog`, whose name TensorBoard probes and no file may carry."""
    spec = importlib.util.find_spec(TOOLS)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(p for folder in folders for p in folder.glob("*.py") if not p.name.startswith("_"))
    return {path.stem.removeprefix("gpu_").replace("_", "-"): path for path in files}


def _summary(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].rstrip(".")


def parse(kind: type[A], argv: list[str], prog: str, description: str | None = None) -> A:
    """A `kind` from flags; every parsing fault becomes one sentence.

    Args:
        kind: the dataclass whose fields are the flags.
        argv: the words after the verb.
        prog: what help and errors call the command.
        description: what help says first; None takes the docstring of `kind`.

    Raises:
        UserError: a flag is unknown, misspelt, missing or of the wrong type.
    """
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _readable_boxes(argv):
            return tyro.cli(kind, args=argv, prog=prog, description=description, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_sentence(errors.getvalue(), prog)) from None


@contextlib.contextmanager
def _readable_boxes(argv: list[str]) -> Iterator[None]:
    """tyro's widest box for complaints, so that few words are broken; help keeps the width it is shown at."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(argv):
        os.environ["COLUMNS"] = "80"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


# tyro's words (left) in ours; the first group of each is the flag.
_PLAINER = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 wants a whole number, found \2"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 wants a number, found \2"),
    (
        r"Error parsing (\S+): no type matching \{None\}\|INT could.*?\['(.*?)'\].*",
        r"\1 wants a whole number, found '\2'",
    ),
    (r"Error parsing (\S+): no type matching \{None\}\|FLOAT could.*?\['(.*?)'\].*", r"\1 wants a number, found '\2'"),
    (r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.", r"\2 wants one of \3, found \1"),
    (r"Missing value for argument '(\S+)'\..*", r"\1 has no value"),
    (r"Missing from [^:]*: ((?:--\S+ )?\S+) (.*)", r"missing \1: \2"),
    (r"\W*\(required\)(?=.)", ";"),
    (r" ?\(required\)", ""),
    (r"Unrecognized options: (.*)", r"unknown: \1"),
)


def _one_sentence(boxed: str, prog: str) -> str:
    """tyro's boxed complaint, without the box."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in boxed.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰", "+-"))]
    if not boxed.lstrip().startswith(("╭", "+-")):  # where stdout is ASCII the title stands in a frame of blanks
        lines = lines[2:]
    parts: list[list[str]] = [[]]
    for line in lines:
        if set(line) <= {"─", "-"}:
            parts.append([])
        else:
            parts[-1].append(line)
    said = " ".join(parts[0])
    for theirs, ours in _PLAINER:
        said = re.sub(theirs, ours, said)
    meant = next((p[1] for p in parts[1:] if len(p) > 1 and p[0].startswith("Perhaps you meant")), "")
    hint = f"; did you mean {meant}?" if meant else f"; see `{prog} --help`"
    return said.rstrip(". ") + hint


def run_verb(verb: str, argv: list[str]) -> int:
    """Runs one verb and returns its exit code (see errors.py)."""
    prog = f"homelab {verb}"
    try:
        files = _tool_files()
        if verb not in files:
            raise UserError(f"no such verb; {_closest(verb, list(files))}")
        module: Any = importlib.import_module(f"{TOOLS}.{files[verb].stem}")
        flags, command = _split_command(module.Args, argv)
        try:
            args = parse(module.Args, flags, prog, module.__doc__)
        except SystemExit:  # --help was asked for and given
            return 0
        return int(module.main(dataclasses.replace(args, command=command) if command else args))
    except HomelabError as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def _split_command(kind: Any, argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The verb's own words, and those after `--` for a verb whose Args have a field `command` to run."""
    if "--" not in argv or "command" not in {f.name for f in dataclasses.fields(kind)}:
        return argv, ()
    at = argv.index("--")
    if not argv[at + 1 :]:
        raise UserError("nothing stands after `--`; put the command to run there")
    return argv[:at], tuple(argv[at + 1 :])


def _closest(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def usage() -> str:
    """What `homelab --help` prints."""
    width = min(shutil.get_terminal_size().columns, 100)
    listing = "\n".join(
        textwrap.fill(what, width, initial_indent=f"  {verb:<12} ", subsequent_indent=" " * 15)
        for verb, what in verbs().items()
    )
    return (
        "usage: homelab VERB [ARGS...]\n\nOne workstation, one scaling law you can defend.\n\n"
        f"verbs:\n{listing}\n\n`homelab VERB --help` explains one; `homelab --version` prints the version."
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point of `homelab`."""
    try:
        code = _answer(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `homelab fit ... | head` closed our stdout; not an error worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _answer(argv: list[str]) -> int:
    match argv:
        case ["-h" | "--help", *_]:
            print(usage())
            return 0
        case ["--version", *_]:
            print(f"homelab {__version__}")
            return 0
        case [verb, *rest] if not verb.startswith("-"):
            return run_verb(verb, rest)
        case [flag, *_]:
            said = f"{flag} is not an option here; {_closest(flag, ['--help', '--version'])}"
        case _:
            said = "say what to do; `homelab --help` lists the verbs"
    print(f"homelab: {said}", file=sys.stderr)
    return UserError.exit_code
