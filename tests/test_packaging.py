"""What is installed: the right files, under names that hide nobody's module, with every version pinned."""

import configparser
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from homelab_scaling import __version__, cli
from homelab_scaling.doctor import read_pins

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"homelab_scaling": "homelab_scaling", "tools": "homelab_scaling/tools", "recipes": "homelab_scaling/recipes"}

# Not installed here, but imported by a dependency of ours where it is.
PROBED = {"watchdog": "TensorBoard's server"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def listed(section: str, option: str) -> list[str]:
    return [line for line in setup_cfg()[section][option].splitlines() if line and not line.startswith("#")]


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


# ------------------------------------------------------------------------------------------------------------- names


def hides(stem: str) -> str | None:
    """Whose module a script of this name would hide, since a script's folder comes first on sys.path."""
    if stem in sys.stdlib_module_names:
        return "the standard library"
    if stem in PROBED:
        return PROBED[stem]
    spec = importlib.util.find_spec(stem)
    return str(spec.origin) if spec else None


def test_no_script_hides_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {str(ROOT / "tools"), str(ROOT / "recipes")}
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ours])
    stems = [p.stem for folder in sorted(ours) for p in Path(folder).glob("*.py") if p.stem != "__init__"]
    assert len(stems) >= 3
    assert {stem: hides(stem) for stem in stems if hides(stem)} == {}
    assert all(hides(bad) for bad in ("tokenize", "profile", "select", "accelerate", "watchdog", "numpy"))


# ------------------------------------------------------------------------------------------------------------- lists


def test_every_package_is_listed() -> None:
    found = {
        ".".join((ROOMS[room].replace("/", "."), *folder.parent.relative_to(ROOT / room).parts))
        for room in ROOMS
        for folder in (ROOT / room).rglob("__init__.py")
    }
    assert set(listed("options", "packages")) == found
    without = {p.parent for p in (ROOT / "homelab_scaling").rglob("*.py")} - {
        p.parent for p in (ROOT / "homelab_scaling").rglob("__init__.py")
    }
    assert without == set(), "a folder of modules without __init__.py is not installed"


def test_every_requirement_is_pinned_at_or_above_its_lower_bound() -> None:
    pins = {name.lower().replace("_", "-"): version for name, version in read_pins(ROOT / "constraints.txt").items()}
    wanted = listed("options", "install_requires") + listed("options.extras_require", "dev")
    for extra in ("parquet", "hub"):
        wanted += re.findall(r"\S+", setup_cfg()["options.extras_require"][extra])
    assert len(wanted) >= 20
    for line in wanted:
        name, bound = re.match(r"([\w-]+)(?:>=([\d.]+))?", line).groups()  # type: ignore[union-attr]
        assert name.lower() in pins, f"{name} has no pin in constraints.txt"
        assert bound is None or release(pins[name.lower()]) >= release(bound), line


def test_pins_are_exact_portable_and_in_order() -> None:
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "a build label or a path would bind to one box"
    )
    assert lines == sorted(lines, key=str.lower)


def test_the_requirements_of_what_is_installed_are_pinned_too() -> None:
    from importlib.metadata import PackageNotFoundError, requires

    pins = {name.lower().replace("_", "-") for name in read_pins(ROOT / "constraints.txt")}
    unpinned = set()
    for name in pins:
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # a dev tool that this environment was made without
            continue
        plain = (need for need in needs if ";" not in need)
        unpinned |= {re.split(r"[^\w.-]", need)[0].lower().replace("_", "-") for need in plain} - pins
    assert {name for name in unpinned if not name.startswith(("nvidia-", "triton", "cuda-"))} == set(), (
        "torch pins its own CUDA packages; everything else belongs into constraints.txt"
    )


# ------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, built from a copy of the sources."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for name in ROOMS:
        copytree(ROOT / name, tree / name, ignore=ignore_patterns("__pycache__", ".*"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = (tree / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment holding the wheel; this one's packages shine through, its editable install does not."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return home


def said_by(command: list[str | Path], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_library_tools_recipes_and_ladders(wheel: Path) -> None:
    wanted = set()
    for room, place in ROOMS.items():
        for pattern in ("*.py", "*.toml", "*.yaml", "py.typed", "README.md", "LOG.md", "*.png", "*.svg"):
            wanted |= {f"{place}/{p.relative_to(ROOT / room).as_posix()}" for p in (ROOT / room).rglob(pattern)}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"homelab_scaling/tools/plan.py", "homelab_scaling/recipes/ladders/quickstart.toml"} <= wanted
    assert held == wanted


@pytest.mark.slow
def test_the_wheel_works_without_the_clone(elsewhere: Path, tmp_path: Path) -> None:
    where = "import homelab_scaling, homelab_scaling.tools as t; print(homelab_scaling.__file__, t.__file__)"
    for path in said_by([elsewhere / "bin" / "python", "-c", where], tmp_path).split():
        assert path.startswith(str(elsewhere)), "imported from the clone, not from the wheel"
    homelab = elsewhere / "bin" / "homelab"
    assert said_by([homelab, "--version"], tmp_path) == f"homelab {__version__}\n"
    listing = said_by([homelab, "--help"], tmp_path)
    assert all(f"\n  {verb} " in listing for verb in cli.verbs())
    assert "quickstart" in said_by([homelab, "plan", "quickstart"], tmp_path)
    assert json.loads(said_by([homelab, "plan", "quickstart", "--json"], tmp_path))
    assert list(tmp_path.iterdir()) == [], "plan writes nothing"
