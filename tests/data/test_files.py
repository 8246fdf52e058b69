"""Documents out of files: where text is cut, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling.data import files
from homelab_scaling.data.files import MAX_TXT_DOCUMENT_BYTES, read_jsonl, read_parquet, read_txt
from homelab_scaling.errors import DataError

props = settings(derandomize=True, deadline=None, max_examples=60)
no_surrogates = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


def txt(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [document.text for document in read_txt(path, path.name, "")]


@props
@given(blocks=st.lists(st.text(no_surrogates, max_size=30), max_size=400), small=st.booleans())
def test_cutting_loses_nothing(tmp_path_factory, blocks: list[str], small: bool) -> None:
    text = "\n".join(blocks * (1 if small else 20)).lstrip("\ufeff")
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "MAX_TXT_DOCUMENT_BYTES", 256)
        patch.setattr(files, "_BLOCK_BYTES", 300)
        pieces = txt(path, text.encode())
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 256 for piece in pieces)
    assert all(len(piece.encode()) > 256 // 2 - 4 for piece in pieces[:-1])


def test_a_cut_prefers_a_blank_line_then_a_line_then_a_character(tmp_path: Path) -> None:
    half = MAX_TXT_DOCUMENT_BYTES // 2
    line = "x" * 99 + "\n"
    blank = line * (half // 100 + 50) + "\n" + line * 1000
    assert txt(tmp_path / "a.txt", blank.encode())[0].endswith("x\n\n")
    assert txt(tmp_path / "b.txt", (line * 2000).encode())[0].endswith("x\n")
    pieces = txt(tmp_path / "c.txt", ("é€😀" * 30_000).encode())
    assert "".join(pieces) == "é€😀" * 30_000 and len(pieces) > 1


@props
@given(stories=st.lists(st.text("abc \n", min_size=1, max_size=40), min_size=1, max_size=30), crlf=st.booleans())
def test_a_marker_ends_a_document(tmp_path_factory, stories: list[str], crlf: bool) -> None:
    end = "\r\n" if crlf else "\n"
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK_BYTES", 70)
        pieces = txt(path, f"{end}<|endoftext|>{end}".join(stories).encode())
    assert pieces == stories


def test_a_utf8_bom_is_no_text(tmp_path: Path) -> None:
    assert txt(tmp_path / "a.txt", b"\xef\xbb\xbfhello") == ["hello"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert [d.text for d in read_jsonl(path, "a.jsonl", "text")] == ["hello"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfeh\0i\0", "UTF-16 byte-order mark"),
        (b"\xfe\xff\0h\0i", "UTF-16 byte-order mark"),
        (b"h\0i\0", "byte 1 is NUL"),
        ("naïve".encode("latin-1"), r"byte 2 \(0xef\) is not UTF-8"),
        (b"a" * 200_000 + b"\xff", r"byte 200000 \(0xff\) is not UTF-8"),
        ("€".encode()[:2], "byte 0"),
    ],
)
def test_wrong_encodings_are_named_with_their_place(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        txt(tmp_path / "a.txt", content)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one\\n"}\n\n{"body": "two", "text": 3}\n')
    assert [(d.text, d.name) for d in read_jsonl(path, "a.jsonl", "body")] == [
        ("one\n", "a.jsonl: line 1"),
        ("two", "a.jsonl: line 3"),
    ]
    for field, said in (("text", r"line 1 has no field 'text' \(fields: body\)"), ("none", "no field 'none'")):
        with pytest.raises(DataError, match=said):
            list(read_jsonl(path, "a.jsonl", field))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b'["text"]', "is not a JSON object"),
        (b'{"text": 5}', "holds int, wants text"),
        (b'{"text": null}', "holds NoneType, wants text"),
        (b'{"text": "\xff"}', "is not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"line 2.*{said}"):
        list(read_jsonl(path, "a.jsonl", "text"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"document {i}" for i in range(1000)]
    parquet.write_table(pyarrow.table({"body": texts, "n": list(range(1000))}), path, row_group_size=100)
    assert [d.text for d in read_parquet(path, "a.parquet", "body")] == texts
    with pytest.raises(DataError, match=r"no field 'text' \(fields: body, n\)"):
        list(read_parquet(path, "a.parquet", "text"))
    with pytest.raises(DataError, match="row 1: field 'n' holds int"):
        list(read_parquet(path, "a.parquet", "n"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_parquet(path, "a.parquet", "body"))


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="row 3: character 1 is half of a surrogate pair"):
        files.utf8(json.loads('"a\\ud800"'), "row 3")
