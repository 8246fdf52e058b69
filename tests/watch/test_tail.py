"""Reading a growing file: nothing twice, nothing torn, whatever its writer does to it."""

import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.watch.tail import Tail


def text(*numbers):
    return "".join(json.dumps({"n": n}) + "\n" for n in numbers)


def numbers(fresh):
    return [line["n"] for line in fresh.lines]


def test_only_what_is_new_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    tail = Tail(path)
    assert tail.read().lines == []
    assert tail.changed_s is None
    path.write_text(text(1, 2))
    assert numbers(tail.read()) == [1, 2]
    assert numbers(tail.read()) == []
    with path.open("a") as file:
        file.write(text(3))
    assert numbers(tail.read()) == [3]
    assert tail.changed_s == path.stat().st_mtime


def test_a_torn_last_line_waits_for_its_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text(1) + '{"n": ')
    tail = Tail(path)
    assert numbers(tail.read()) == [1]
    with path.open("a") as file:
        file.write("22}\n")
    assert numbers(tail.read()) == [22]


def test_what_is_no_object_is_skipped_and_nan_is_unknown(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\nnot json\n\n{"n": NaN}\n' + text(4).encode())
    assert numbers(Tail(path).read()) == [None, 4]


def test_a_rewritten_file_is_another_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text(1, 2, 3))
    tail = Tail(path)
    tail.read()
    other = tmp_path / "b"
    other.write_text(text(1, 9, 3, 4, 5))  # a resume rewrites metrics.jsonl: longer, and other lines
    os.replace(other, path)
    fresh = tail.read()
    assert fresh.restarted
    assert numbers(fresh) == [1, 9, 3, 4, 5]
    with path.open("r+") as file:  # the same inode, other content
        file.write(text(7, 7, 7, 7, 7))
    assert tail.read().restarted
    path.write_text(text(8))
    fresh = tail.read()
    assert (fresh.restarted, numbers(fresh)) == (True, [8])


def test_a_file_that_goes_and_comes_back(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text(1, 2))
    tail = Tail(path)
    tail.read()
    path.unlink()
    assert tail.read().lines == []
    path.write_text(text(5))
    assert numbers(tail.read()) == [5]


def test_of_a_big_file_only_the_end_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text(*range(1000)))
    tail = Tail(path, first_bytes=100)
    found = numbers(tail.read())
    assert tail.skipped_start
    assert found == list(range(1000 - len(found), 1000))
    assert 5 <= len(found) <= 10
    with path.open("a") as file:
        file.write(text(1000))
    assert numbers(tail.read()) == [1000]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 10**6))
def test_a_file_written_in_any_pieces_gives_each_line_once(tmp_path_factory, sizes, first):
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    whole = text(*range(first, first + 40)).encode()
    tail, found, at = Tail(path), [], 0
    for size in [*sizes, len(whole)]:
        with path.open("ab") as file:
            file.write(whole[at : at + size])
        at += size
        found += numbers(tail.read())
    assert found == list(range(first, first + 40))
