"""`homelab corpus`: what it prints, and that nothing it refuses leaves a trace."""

import json
from pathlib import Path

import numpy as np
import pytest

from homelab_scaling import cli
from homelab_scaling.data.progress import describe, show_progress
from homelab_scaling.data.shards import Progress, open_shards

PROSE = [f"Chapter {i}. " + f"the {i} cats sat on the {i * 7} mats. " * (5 + i % 9) for i in range(60)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of good and bad sources, where the command is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write = Path.write_bytes
    write(Path("good.txt"), "\n<|endoftext|>\n".join(PROSE).encode())
    write(Path("good.jsonl"), "".join(json.dumps({"body": t}) + "\n" for t in PROSE).encode())
    write(Path("empty.txt"), b"")
    write(Path("blank.jsonl"), b"\n\n")
    write(Path("latin1.txt"), "naïve".encode("latin-1"))
    write(Path("utf16.txt"), "text".encode("utf-16"))
    write(Path("one.txt"), b"a single document")
    write(Path("torn.jsonl"), b'{"text": "fine"}\n{"text": "to')
    write(Path("null.jsonl"), b'{"text": null}\n')
    write(Path("half.jsonl"), b'{"text": "\\ud800"}\n{"text": "b"}\n')
    write(Path("fake.parquet"), b"PAR1 not really PAR1")
    write(Path("notes.md"), b"text")
    write(Path("bad.json"), b"{}")
    Path("nothing").mkdir()
    Path("broken").mkdir()
    Path("broken/gone.txt").symlink_to("nowhere.txt")
    Path("taken").mkdir()
    write(Path("taken/thesis.tex"), b"years of work")
    for folder, tokens in (("bins", 300), ("torn", 300), ("noval", 300)):
        Path(folder).mkdir()
        np.arange(tokens, dtype=np.uint16).tofile(f"{folder}/train.bin")
        np.arange(50, dtype=np.uint16).tofile(f"{folder}/val.bin")
    write(Path("torn/val.bin"), b"abc")
    Path("noval/val.bin").unlink()
    assert cli.main(["corpus", "good.txt", "--tokenizer", "bytes", "--out", "made"]) == 0
    return tmp_path


BAD: list[tuple[str, str]] = [
    ("--tokenizer bytes --out new", "no source given"),
    ("good.txt --out new", "--tokenizer"),
    ("good.txt --tokenizer bytes", "--out"),
    ("good.txt --tokenizer bytes --out new --bogus 1", "--bogus"),
    ("missing.txt --tokenizer bytes --out new", "missing.txt: no such file or folder"),
    ("empty.txt --tokenizer bytes --out new", "empty.txt: the file is empty"),
    ("blank.jsonl --tokenizer bytes --out new", "the sources hold no text"),
    ("latin1.txt --tokenizer bytes --out new", "latin1.txt: byte 2 (0xef) is not UTF-8"),
    ("good.txt utf16.txt --tokenizer bytes --out new", "utf16.txt: begins with a UTF-16"),
    ("one.txt --tokenizer bytes --out new", "found 1 different document"),
    ("torn.jsonl --tokenizer bytes --out new", "torn.jsonl: line 2 is not JSON"),
    ("null.jsonl --tokenizer bytes --out new", "null.jsonl: line 1: field 'text' holds NoneType"),
    ("half.jsonl --tokenizer bytes --out new", "half.jsonl: line 1: character 0 is half of a surrogate pair"),
    ("good.jsonl --tokenizer bytes --out new", "good.jsonl: line 1 has no field 'text' (fields: body)"),
    ("fake.parquet --tokenizer bytes --out new", "fake.parquet: cannot be read as Parquet"),
    ("notes.md --tokenizer bytes --out new", "notes.md: cannot read .md"),
    ("nothing --tokenizer bytes --out new", "nothing: no .txt, .jsonl, .parquet file in it"),
    ("broken --tokenizer bytes --out new", "broken/gone.txt: cannot be read (No such file or directory)"),
    ("hf:./nowhere --tokenizer bytes --out new", "`datasets` gave up after 0 rows"),
    ("good.txt --tokenizer gpt5 --out new", "tokenizer gpt5: no such tokenizer or file"),
    ("good.txt --tokenizer bad.json --out new", "bad.json: not a tokenizer.json"),
    ("good.txt --tokenizer bpe:100 --out new", "wants bpe:N with N from 258"),
    ("good.txt --tokenizer bpe:60000 --out new", "ask for bpe:"),
    ("good.txt --tokenizer bytes --out new --val-frac 0", "val_frac = 0.0, wants a share"),
    ("good.txt --tokenizer bytes --out new --val-frac 0.7", "val_frac = 0.7, wants a share"),
    ("good.txt --tokenizer bytes --out new --max-bytes 0", "max_bytes = 0, wants 1 or more"),
    ("good.txt --tokenizer bytes --out new --max-bytes 10", "found 0 different documents under max_bytes = 10"),
    ("good.txt --tokenizer bytes --out new --max-bytes 1.5", "1.5"),
    ("good.txt --tokenizer bytes --out new --workers 0", "workers = 0, wants 1 or more"),
    ("good.txt --tokenizer bytes --out good.jsonl", "this is a file"),
    ("good.txt --tokenizer bytes --out taken", "taken: holds other files"),
    ("good.txt --tokenizer bytes --out made --val-frac 0.1", "made: already holds other shards (val_frac is 0.02"),
    ("good.jsonl --tokenizer bytes --out made", "made: already holds other shards (sources is"),
    ("bins --tokenizer mine --out new", "add --n-vocab, --eot-id"),
    ("bins --tokenizer mine --n-vocab 300 --eot-id end --out new", "--eot-id end: wants a token id or none"),
    ("bins --tokenizer mine --n-vocab 299 --eot-id 0 --out new", "train.bin: token 299 is 299"),
    ("torn --tokenizer gpt2 --out new", "val.bin: 3 bytes are not a whole number of uint16 tokens"),
    ("noval --tokenizer gpt2 --out new", "no *val*.bin"),
    ("made --tokenizer bytes --out new", "already holds shards with a manifest.json"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=[line for line, _said in BAD])
def test_bad_input_is_exit_2_one_sentence_and_no_trace(here: Path, capfd, line: str, said: str) -> None:
    before = _snapshot(here)
    capfd.readouterr()
    assert cli.main(["corpus", *line.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("homelab corpus: ") and err.count("\n") == 1 and said in err
    assert _snapshot(here) == before


def test_the_table_and_the_json_say_what_the_manifest_says(here: Path, capfd) -> None:
    argv = ["corpus", "good.jsonl", "--tokenizer", "bpe:300", "--text-field", "body", "--val-frac", "0.1"]
    capfd.readouterr()
    assert cli.main([*argv, "--out", "lab/shards"]) == 0
    table = capfd.readouterr().out
    assert cli.main([*argv, "--out", "lab/shards", "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    manifest = open_shards(Path("lab/shards"), verify=True).manifest
    assert printed["data_id"] == manifest.data_id and printed["data_id"] in table
    assert printed["train"]["n_tokens"] == manifest.train.n_tokens
    for number in (manifest.train.n_tokens, manifest.val.n_bytes, manifest.train.n_documents):
        assert f" {number:,} " in table


def test_token_files_get_a_manifest(here: Path, capfd) -> None:
    facts = ["--tokenizer", "mine", "--n-vocab", "300", "--eot-id", "none"]
    assert cli.main(["corpus", "bins", *facts, "--out", "adopted"]) == 0
    assert "unknown" in capfd.readouterr().out
    assert open_shards(Path("adopted")).manifest.eot_id is None


def test_progress_prints_a_line_a_minute_off_a_terminal(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("homelab_scaling.data.progress.time.monotonic", lambda: now[0])
    with show_progress() as report:
        for minute in range(4):
            now[0] = 50.0 * minute
            n_bytes = minute * 100_000_000
            report(Progress(stage="encoding", n_bytes=n_bytes, total_bytes=10**9, n_tokens=n_bytes // 4))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["corpus: encoding: 200.0/1000.0 MB, 2.0 MB/s, 500,000 tokens/s"]
    assert describe(Progress(stage="reading", n_bytes=5_000_000, total_bytes=None), 2.0) == "5.0 MB, 2.5 MB/s"


def test_progress_bars_on_a_terminal_go_to_stderr(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with show_progress() as report:
        report(Progress(stage="reading", n_bytes=10**6, total_bytes=None))
        report(Progress(stage="encoding", n_bytes=10**6, total_bytes=10**6, n_tokens=250_000))
    out, err = capsys.readouterr()
    assert out == ""
    assert "encoding" in err and "tokens/s" in err


def _snapshot(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    found = folder.rglob("*")
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None for p in found}
