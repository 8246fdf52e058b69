"""Where text comes from, in which order, and what is refused."""

import json
import sys
from pathlib import Path

import pytest

from homelab_scaling.data import sources
from homelab_scaling.data.sources import HubSource, PythonSource, make_source
from homelab_scaling.errors import DataError, MachineError


def quiet(_: int) -> None:
    pass


def test_a_folder_is_read_in_the_order_of_names_whatever_the_file_system_says(tmp_path: Path, monkeypatch) -> None:
    for name in ("b.TXT", "a/z.txt", "a/b/c.jsonl", "a.txt", ".hidden.txt", ".git/x.txt", "readme.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    wanted = ["a.txt", "a/b/c.jsonl", "a/z.txt", "b.TXT"]
    assert [d.text for d in make_source(str(tmp_path), "text").documents()] == wanted
    walk = sources.os.walk

    def backwards(top):
        for here, subfolders, names in walk(top):
            subfolders.sort(reverse=True)
            yield here, subfolders, sorted(names, reverse=True)

    monkeypatch.setattr(sources.os, "walk", backwards)
    assert [d.text for d in make_source(str(tmp_path), "text").documents()] == wanted


def test_a_changed_file_changes_the_state(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = make_source(str(path), "text").state()
    assert make_source(str(path), "text").state() == before
    path.write_text("other")
    assert make_source(str(path), "text").state() != before


def test_python_is_stable_grouped_and_without_tests() -> None:
    documents = list(PythonSource().documents())
    names = [d.name for d in documents]
    order = [("stdlib", "torch", "numpy", "scipy").index(name.split("/")[0]) for name in names]
    assert order == sorted(order) and set(order) == {0, 1, 2, 3}
    assert all(names[a:b] == sorted(names[a:b]) for a, b in ((0, order.index(1)), (order.index(3), len(names))))
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    assert not {"torch/version.py", "numpy/version.py", "scipy/version.py", "numpy/__config__.py"} & set(names)
    groups = {d.name: d.group for d in documents}
    assert groups["stdlib/asyncio/events.py"] == "stdlib/asyncio"
    assert groups["stdlib/argparse.py"] == "stdlib/argparse"
    assert groups["torch/distributed/fsdp/__init__.py"] == "torch/distributed"
    assert sum(len(d.text) for d in documents) > 40e6


def test_python_without_a_package_says_which(monkeypatch) -> None:
    monkeypatch.setattr(sources, "PYTHON_PACKAGES", ("numpy", "no_such_package"))
    with pytest.raises(MachineError, match="pip install no_such_package"):
        list(PythonSource().documents())


def test_files_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("none.txt", "no such file or folder"),
        ("empty.txt", "the file is empty"),
        ("notes.md", "cannot read .md"),
        ("folder", r"no .txt, .jsonl, .parquet file in it"),
    ):
        with pytest.raises(DataError, match=said):
            make_source(str(tmp_path / name), "text")


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    """A data set in a local folder, as `datasets` reads it."""
    pytest.importorskip("datasets")
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [{"text": f"story {i}, {'word ' * 20}", "id": i} for i in range(40)]
    for part in (0, 1):
        lines = (json.dumps(row) + "\n" for row in rows[20 * part : 20 * part + 20])
        (folder / f"train-{part}.jsonl").write_text("".join(lines))
    return f"hf:{folder}"


def test_a_hub_stream_is_copied_once_and_then_read_like_files(stand_in: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "_SPOOL_FILE_BYTES", 1000)
    monkeypatch.setattr(sources, "_SPOOL_GROUP_BYTES", 300)
    source = make_source(stand_in, "text")
    assert isinstance(source, HubSource)
    ticks: list[int] = []
    spool = tmp_path / "spool"
    spool.mkdir()
    local = source.local(spool, None, ticks.append)
    texts = [d.text for d in local.documents()]
    assert texts == [d.text for d in source.documents()] == [f"story {i}, {'word ' * 20}" for i in range(40)]
    assert texts == [d.text for d in local.documents()]
    assert sum(ticks) == sum(map(len, texts))
    assert len(list(spool.iterdir())) == 5


def test_a_cap_ends_the_stream(stand_in: str, tmp_path: Path) -> None:
    local = make_source(stand_in, "text").local(tmp_path, 500, quiet)
    assert [d.text.split(",")[0] for d in local.documents()] == [f"story {i}" for i in range(5)]


def test_hub_faults_are_one_sentence(stand_in: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(DataError, match=r"row 1 has no field 'body' \(fields: id, text\)"):
        make_source(stand_in, "body").local(tmp_path, None, quiet)
    with pytest.raises(DataError, match="`datasets` gave up after 0 rows"):
        make_source(f"hf:{tmp_path}/nowhere", "text").local(tmp_path, None, quiet)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MachineError, match=r"pip install 'homelab_scaling\[hub\]'"):
        make_source(stand_in, "text").local(tmp_path, None, quiet)
