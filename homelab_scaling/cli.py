"""The `homelab` command: finds a verb's module by name, parses its flags, catches the project's errors once.

A verb is a module of `homelab_scaling.tools` with a one-line docstring (shown by `homelab --help`), a frozen dataclass
`Args` (its fields are the flags, its field docstrings the help) and `main(args) -> int`. Nothing else is registered.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from homelab_scaling import __version__
from homelab_scaling.errors import HomelabError, UserError

A = TypeVar("A")

TOOLS = "homelab_scaling.tools"


def verbs() -> dict[str, str]:
    """Every verb and what it does, read from the tools' docstrings without importing them."""
    spec = importlib.util.find_spec(TOOLS)
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = {}
    for path in sorted(p for folder in folders for p in folder.glob("*.py") if not p.name.startswith("_")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem.replace("_", "-")] = doc.splitlines()[0].rstrip(".") if doc else ""
    return found


def parse(kind: type[A], argv: list[str], prog: str) -> A:
    """A `kind` from flags; every parsing fault becomes one sentence.

    Raises:
        UserError: a flag is unknown, misspelt, missing or of the wrong type.
    """
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, prog=prog)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_sentence(errors.getvalue(), prog)) from None


def _one_sentence(boxed: str, prog: str) -> str:
    """tyro's boxed complaint, without the box."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in boxed.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰", "+-"))]
    parts: list[list[str]] = [[]]
    for line in lines:
        if set(line) <= {"─", "-"}:
            parts.append([])
        else:
            parts[-1].append(line)
    said = " ".join(parts[0])
    hint = next((" ".join(p[:2]) for p in parts[1:] if p and p[0].startswith("Perhaps you meant")), "")
    return f"{said}{'. ' + hint if hint else ''}; see `{prog} --help`"


def run_verb(verb: str, argv: list[str]) -> int:
    """Runs one verb and returns its exit code (see errors.py)."""
    known = verbs()
    prog = f"homelab {verb}"
    try:
        if verb not in known:
            from difflib import get_close_matches

            close = get_close_matches(verb, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"no verb {verb!r}; {hint}")
        module: Any = importlib.import_module(f"{TOOLS}.{verb.replace('-', '_')}")
        return int(module.main(parse(module.Args, argv, prog)))
    except HomelabError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `homelab fit ... | head` closed our stdout; not an error worth a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `homelab`."""
    listing = "\n".join(f"  {verb:<12} {what}" for verb, what in verbs().items())
    parser = argparse.ArgumentParser(
        prog="homelab",
        description="One workstation, one scaling law you can defend.",
        epilog=f"verbs:\n{listing}\n\n`homelab VERB --help` explains one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"homelab {__version__}")
    parser.add_argument("verb", help="what to do (below)")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the verb's own arguments")
    given = parser.parse_args(argv)
    return run_verb(given.verb, given.args)
