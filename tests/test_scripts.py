"""The two commands of a fresh machine: what they make, what they say, and what they leave alone."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["python3", "python3.11", "python3.12", "python3.13", "python3.14"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with our scripts and what an installation depends on."""
    root = tmp_path / "a clone"  # with a space, as folders of users have
    (root / "tools").mkdir(parents=True)
    for name in ("environment.sh", "quickstart.sh", "check.sh"):
        copy(ROOT / "tools" / name, root / "tools")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        copy(ROOT / name, root)
    return root


def put(path: Path, script: str) -> Path:
    """An executable at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def bash(clone: Path, script: str, fakes: Path | None = None) -> tuple[int, str, str]:
    """Runs `script` after environment.sh, as check.sh would, with `fakes` before everything on the PATH."""
    path = f"{fakes}:/usr/bin:/bin" if fakes else f"{Path(sys.executable).parent}:/usr/bin:/bin"
    env = {"PATH": path, "HOME": str(clone), "LC_ALL": "C"}
    code = f'set -euo pipefail\nsource "{clone}/tools/environment.sh"\n{script}'
    done = subprocess.run(["bash", "-c", code, "check.sh"], env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def make_venv(clone: Path) -> Path:
    """A whole .venv, with an empty module in pip's place."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    (site,) = (clone / ".venv").glob("lib/python*/site-packages")
    (site / "pip.py").touch()
    return clone / ".venv"


def fake_pythons(folder: Path, *, version_ok: bool, venv_ok: bool) -> Path:
    for name in PYTHONS:
        put(
            folder / name,
            f'case "$*" in --version) echo Python 3.8.10;; *ensurepip*) exit {int(not venv_ok)};; '
            f"*print*) echo python3.12;; *) exit {int(not version_ok)};; esac",
        )
    return folder


def test_an_old_python_is_one_sentence(clone: Path, tmp_path: Path) -> None:
    fakes = fake_pythons(tmp_path / "bin", version_ok=False, venv_ok=True)
    code, out, err = bash(clone, "ensure_environment", fakes)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("check: found Python 3.8.10, wanted Python 3.11 or later: install it")
    assert not (clone / ".venv").exists()


def test_a_missing_venv_module_is_one_sentence(clone: Path, tmp_path: Path) -> None:
    fakes = fake_pythons(tmp_path / "bin", version_ok=True, venv_ok=False)
    code, _, err = bash(clone, "with_environment_locked ensure_environment dev; echo not reached", fakes)
    assert code == 2
    assert err == "check: python3-venv is missing: sudo apt install python3.12-venv, then run this again\n"
    assert not (clone / ".venv").exists()


def test_too_little_disk_is_one_sentence(clone: Path, tmp_path: Path) -> None:
    fakes = fake_pythons(tmp_path / "bin", version_ok=True, venv_ok=True)
    put(fakes / "df", "echo header; echo /dev/vda 1 1 1234 99% /")
    code, _, err = bash(clone, "ensure_environment", fakes)
    assert code == 2
    assert err.count("\n") == 1
    assert "found 1234 MB free" in err and "wanted 6000 MB" in err
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("pip_says", "we_say"),
    [
        ("WARNING: Retrying ... [Errno -3] Temporary failure in name resolution", "no network"),
        ("WARNING: ... Failed to establish a new connection: Network is unreachable", "no network"),
        (
            "WARNING: Max retries exceeded\nERROR: No matching distribution found for setuptools>=77",
            "no network",
        ),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "the disk became full"),
        ("ERROR: No matching distribution found for torch==2.13.0", "set PYTHON to another interpreter"),
        ("ERROR: hashes are wrong", "pip failed (ERROR: hashes are wrong): see "),
    ],
)
def test_what_pip_says_becomes_one_sentence(clone: Path, pip_says: str, we_say: str) -> None:
    put(
        clone / ".venv/bin/python",
        f'if [[ $1 == --version ]]; then echo Python 3.15.0; else echo "{pip_says}" >&2; exit 1; fi',
    )
    code, out, err = bash(clone, 'install_project ""; echo not reached')
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert we_say in err


RECORD = 'install_project() { echo "installed [$1]"; }\n'


def test_a_finished_environment_is_left_alone(clone: Path) -> None:
    make_venv(clone)
    first, second, third = (bash(clone, RECORD + "ensure_environment")[1] for _ in range(3))
    assert (first, second, third) == ("installed []\n", "", "")
    assert bash(clone, RECORD + "ensure_environment dev")[1] == "installed [dev]\n"
    assert bash(clone, RECORD + "ensure_environment")[1] == "", "what dev installed is enough for the quickstart"
    (clone / "constraints.txt").write_text("torch==2.14.0\n")
    assert bash(clone, RECORD + "ensure_environment")[1] == "installed []\n"


def test_a_change_of_versions_needs_little_disk(clone: Path, tmp_path: Path) -> None:
    make_venv(clone)
    bash(clone, RECORD + "ensure_environment")
    (clone / "constraints.txt").write_text("torch==2.14.0\n")
    put(tmp_path / "bin" / "df", "echo header; echo /dev/vda 1 1 1234 99% /")
    assert bash(clone, RECORD + "ensure_environment", tmp_path / "bin")[1] == "installed []\n"


@pytest.mark.parametrize("damage", ["cut off while installing", "cut off while made", "interpreter gone", "moved"])
def test_a_half_made_environment_is_made_again(clone: Path, tmp_path: Path, damage: str) -> None:
    venv = make_venv(clone)
    (venv / "witness").touch()
    if damage == "cut off while installing":
        bash(clone, "install_project() { kill -9 $$; }\nensure_environment")
    elif damage == "cut off while made":
        (venv / "bin" / "python").unlink()
    elif damage == "interpreter gone":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to("/nowhere/python3")
    else:
        text = (venv / "pyvenv.cfg").read_text()
        assert f"{clone}/.venv" in text
        (venv / "pyvenv.cfg").write_text(text.replace(str(clone), "/home/old place"))
    real = f'exec "{sys.executable}" -m venv --without-pip "${{@:3}}"'
    put(tmp_path / "bin" / "python3", f'case "$*" in "-m venv"*) {real};; *) exec "{sys.executable}" "$@";; esac')
    code, out, err = bash(clone, RECORD + "ensure_environment", tmp_path / "bin")
    assert (code, out) == (0, "installed []\n")
    assert ".venv is unfinished, broken or was moved here: making it again" in err
    assert not (venv / "witness").exists()
    assert not (venv / ".unfinished").exists()


def test_two_scripts_do_not_meet_in_the_environment(clone: Path) -> None:
    work = 'work() { echo in >>"$ROOT/log"; sleep 0.3; echo out >>"$ROOT/log"; }\nwith_environment_locked work'
    code = f'source "{clone}/tools/environment.sh"\n{work}'
    both = [subprocess.Popen(["bash", "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=20)[1] for process in both]
    assert (clone / "log").read_text().split() == ["in", "out", "in", "out"]
    assert sorted(said) == ["", "waiting for another script that is at work on .venv\n"]


def test_quickstart_runs_its_ladder_from_anywhere_and_passes_the_exit_code_on(clone: Path, tmp_path: Path) -> None:
    venv = make_venv(clone)
    bash(clone, RECORD + "ensure_environment")
    put(venv / "bin" / "homelab", 'pwd; printf "[%s]" "$@"; exit 75')
    env = os.environ | {"PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere"}
    command = ["bash", clone / "tools" / "quickstart.sh", "--lab", "x y"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert done.stdout == f"{clone}\n[run][recipes/ladders/quickstart.toml][--lab][x y]"


def test_check_stops_at_the_first_failure(clone: Path) -> None:
    venv = make_venv(clone)
    bash(clone, RECORD + "ensure_environment dev")
    put(
        venv / "bin" / "python",
        f'case "$*" in *"ruff check"*) echo bad; exit 7;; *ruff*) exit 0;; *) exec "{sys.executable}" "$@";; esac',
    )
    env = os.environ | {"PIP_NO_INDEX": "1"}
    command = ["bash", clone / "tools" / "check.sh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "bad\n")
    said = done.stderr.splitlines()
    assert "== format passed, 0 s" in said
    assert said[-1] == "== lint failed after 0 s"


def test_check_knows_one_word(clone: Path) -> None:
    done = subprocess.run(["bash", clone / "tools" / "check.sh", "quick"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "check: found 'quick', wanted nothing or 'fast'\n")


def test_ci_runs_check_and_nothing_else() -> None:
    lines = [x for x in (ROOT / ".ci" / "run").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[-1] == "exec bash tools/check.sh"
    assert len(lines) == 3
    for script in (ROOT / ".ci" / "run", *(ROOT / "tools").glob("*.sh")):
        assert os.access(script, os.X_OK), f"{script.name} is not executable"
