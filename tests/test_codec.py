"""The only reader and writer of files: strict in, atomic out, one sentence for every fault."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.errors import DataError, MachineError, SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    name: str = "x"
    on: bool = False
    limit: int | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()
    by_name: dict[str, int] = dataclasses.field(default_factory=dict)
    settings: dict[str, str | int | float | bool | None] = dataclasses.field(default_factory=dict)


def _read(**plain: object) -> Outer:
    return codec.from_plain({"count": 1, **plain}, Outer, "f.toml")


# ------------------------------------------------------------------------------------------------------------ strict


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"cuont": 1}, "cuont: no such key (did you mean count?)"),
        ({"inner": {"rte": 1.0}}, "inner.rte: no such key (did you mean rate?)"),
        ({"count": 6.5}, "count: wants a whole number, found 6.5"),
        ({"count": True}, "count: wants a whole number, found True"),
        ({"count": "1"}, "count: wants a whole number, found '1'"),
        ({"inner": {"rate": True}}, "inner.rate: wants a number, found True"),
        ({"inner": {"rate": math.nan}}, "inner.rate: wants a finite number, found nan"),
        ({"inner": {"rate": math.inf}}, "inner.rate: wants a finite number, found inf"),
        ({"name": 5}, "name: wants text in quotes, found 5"),
        ({"on": 1}, "on: wants true or false, found 1"),
        ({"limit": 2.5}, "limit: wants a whole number, found 2.5"),
        ({"inner": {"kind": "c"}}, "inner.kind: wants one of 'a', 'b', found 'c'"),
        ({"inner": 3}, "inner: wants a table, found 3"),
        ({"parts": 3}, "parts: wants a list, found 3"),
        ({"parts": "ab"}, "parts: wants a list, found 'ab'"),
        ({"parts": [{}, {"rate": "fast"}]}, "parts[1].rate: wants a number, found 'fast'"),
        ({"by_name": {"k": 0.5}}, "wants a whole number, found 0.5"),
    ],
)
def test_every_fault_has_its_path(plain: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        _read(**plain)
    assert str(caught.value).startswith("f.toml: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SpecError, match="count: this key is missing"):
        codec.from_plain({}, Outer, "f.toml")


def test_all_faults_at_once_and_the_flood_is_cut() -> None:
    with pytest.raises(SpecError) as caught:
        _read(name=1, on=2, limit="3", parts=4, by_name={"k": "v"})
    assert str(caught.value).count(";") == 4
    assert str(caught.value).endswith("and 1 more")


def test_whole_floats_are_whole_numbers() -> None:
    """TOML writes 4.5e9 for a token count, and nothing is lost by taking it."""
    read = _read(count=4.5e9, inner={"rate": 1})
    assert read.count == 4_500_000_000 and isinstance(read.count, int)
    assert read.inner.rate == 1.0 and isinstance(read.inner.rate, float)


@settings(derandomize=True, deadline=None)
@given(
    st.builds(
        Outer,
        count=st.integers(-(2**60), 2**60),
        name=st.text(max_size=20),
        on=st.booleans(),
        limit=st.none() | st.integers(),
        inner=st.builds(Inner, rate=st.floats(allow_nan=False, allow_infinity=False), kind=st.sampled_from(["a", "b"])),
        parts=st.lists(st.builds(Inner), max_size=3).map(tuple),
        by_name=st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    )
)
def test_json_round_trip_is_equal_to_the_bit(value: Outer) -> None:
    again = codec.from_plain(json.loads(codec.dumps(value)), Outer, "x")
    assert again == value
    assert codec.stable_hash(again) == codec.stable_hash(value)


def test_the_hash_ignores_the_order_of_keys_and_is_the_same_everywhere() -> None:
    assert codec.stable_hash({"a": 1, "b": [1.5, None]}) == codec.stable_hash({"b": [1.5, None], "a": 1})
    assert codec.stable_hash({"a": 1}, n_chars=12) == "015abd7f5cc5", 'sha256 of {"a":1}'


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"count = ", "cannot be read"),
        (b"count = 1\ncount = 2", "cannot be read"),
        (b"name = '\xff'", "not UTF-8 text"),
        (b"count = nan", "whole number"),
    ],
)
def test_a_bad_toml_file_is_one_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "f.toml"
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        codec.read_toml(path, Outer)
    assert "f.toml" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("content", ['{"count": 1', '{"count": NaN}', '{"count": Infinity}', ""])
def test_a_torn_or_non_finite_json_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SpecError, match=r"f\.json: cannot be read"):
        codec.read_json(path, Outer)


def test_missing_files_and_folders_say_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        codec.read_json(tmp_path / "none.json", Outer)
    with pytest.raises(SpecError, match="this is a folder"):
        codec.read_toml(tmp_path, Outer)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    codec.append_jsonl(path, [{"step": 1}, {"step": 2}])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert codec.read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert codec.read_jsonl(tmp_path / "none.jsonl") == []


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        codec.read_jsonl(path)


def test_a_damaged_last_line_with_its_newline_is_an_error(tmp_path: Path) -> None:
    """A killed writer leaves no newline; a broken line that has one was edited."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        codec.read_jsonl(path)


# ----------------------------------------------------------------------------------------------------------- writing


def test_not_a_number_never_reaches_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec.write_json(path, {"loss": math.nan})
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec.append_jsonl(tmp_path / "m.jsonl", [{"step": 1}, {"loss": math.inf}])
    assert list(tmp_path.iterdir()) == []


def test_a_scalar_of_any_kind_stays_what_it_is() -> None:
    """One that becomes another kind would change the hash of the settings that hold it."""
    plain = {"shots": 3, "frac": 1.0, "on": True, "name": "3", "none": None}
    read = _read(settings=plain).settings
    assert read == plain and [type(v) for v in read.values()] == [type(v) for v in plain.values()]
    for bad in ([1], {"a": 1}, math.nan):
        with pytest.raises(SpecError, match=r"settings\[shots\]: wants one of str, int, float, bool, null, found"):
            _read(settings={"shots": bad})


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "deep" / "record.json"
    codec.write_json(path, {"status": "running"})

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(MachineError, match=r"record\.json: could not be written \(No space left on device\)"):
        codec.write_json(path, {"status": "finished"})
    monkeypatch.undo()
    assert codec.read_plain_json(path) == {"status": "running"}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"], "no temporary file stays behind"


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(MachineError, match="could not be written"):
        codec.write_json(tmp_path / "taken" / "plan.json", {})
