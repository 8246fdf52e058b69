"""Shards hold the documents, in order, whole or not at all; whatever disagrees is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homelab_scaling import codec
from homelab_scaling.data import build, encode
from homelab_scaling.data.batches import TokenStream
from homelab_scaling.data.encode import Batch, encode_batches
from homelab_scaling.data.files import Document
from homelab_scaling.data.shards import Progress, build_shards, open_shards
from homelab_scaling.data.survey import VAL, choose, read_survey
from homelab_scaling.data.tokenizers import BytesTokenizer
from homelab_scaling.errors import DataError, MachineError
from homelab_scaling.specs import CorpusManifest

PROSE = [f"Chapter {i}. " + f"the {i} cats sat on the {i * 7} mats. " * (5 + i % 9) for i in range(120)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents_of(stream: TokenStream, eot_id: int) -> list[list[int]]:
    """The stream cut after every end of text; fails if it does not end with one."""
    tokens = stream[:].tolist()
    assert tokens[-1] == eot_id
    documents: list[list[int]] = [[]]
    for token in tokens:
        if token == eot_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents[:-1]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=2, max_size=30, unique=True)
)
def test_every_document_is_there_in_order_and_ends(tmp_path_factory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    try:
        manifest = build_shards([write_jsonl(folder / "a.jsonl", texts)], "bytes", folder / "out", val_frac=0.2)
    except DataError as error:  # of a few documents all may be held out
        assert "leaves nothing for training" in str(error)
        return
    shards = open_shards(folder / "out", verify=True)
    documents = [Document(text=text, name="") for text in texts]
    part = choose(read_survey([documents], lambda _: None), val_frac=0.2, max_bytes=None).part
    for split, stream, half in ((manifest.train, shards.train, 1), (manifest.val, shards.val, VAL)):
        wanted = [text for text, p in zip(texts, part, strict=True) if p == half]
        found = documents_of(stream, 256)
        assert [shards.tokenizer().decode(ids) for ids in found] == wanted
        assert split.n_documents == len(wanted) and split.n_tokens == len(stream)
        assert split.n_bytes == sum(len(text.encode()) for text in wanted) == split.n_tokens - split.n_documents


def test_a_corpus_with_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*PROSE, PROSE[3], PROSE[5]])
    manifest = build_shards([source], "bpe:300", tmp_path / "out", val_frac=0.1)
    shards = open_shards(tmp_path / "out", verify=True)
    assert manifest == shards.manifest
    assert (manifest.n_vocab, manifest.dtype, manifest.n_duplicates_dropped) == (300, "uint16", 2)
    tokenizer = shards.tokenizer()
    assert (tokenizer.hash, tokenizer.eot_id) == (manifest.tokenizer_hash, manifest.eot_id)
    texts = [tokenizer.decode(ids) for s in (shards.train, shards.val) for ids in documents_of(s, tokenizer.eot_id)]
    assert sorted(texts) == sorted(PROSE)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "build.json",
        "manifest.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]
    assert "training documents" in json.loads((tmp_path / "out/build.json").read_text())["tokenizer_rule"]


def test_the_bin_files_are_nanogpts(tmp_path: Path) -> None:
    """As nanoGPT's train.py opens them, with nothing of ours."""
    build_shards([write_jsonl(tmp_path / "a.jsonl", PROSE)], "bytes", tmp_path / "out")
    data = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r")
    assert bytes(data[: len("Chapter")].astype(np.uint8)) == b"Chapter"


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(build, "MAX_UINT16_VOCAB", 256)
    manifest = build_shards([write_jsonl(tmp_path / "a.jsonl", PROSE)], "bytes", tmp_path / "out")
    shards = open_shards(tmp_path / "out", verify=True)
    assert manifest.dtype == "uint32" == shards.train.dtype.name
    assert (tmp_path / "out/train.bin").stat().st_size == 4 * manifest.train.n_tokens
    assert documents_of(shards.train, 256)


def test_workers_give_the_same_shards(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(encode, "MIN_BYTES_FOR_WORKERS", 0)
    monkeypatch.setattr(build, "BATCH_BYTES", 2000)
    source = write_jsonl(tmp_path / "a.jsonl", PROSE)
    told: list[Progress] = []
    two = build_shards([source], "bpe:300", tmp_path / "two", n_workers=2, progress=told.append)
    one = build_shards([source], "bpe:300", tmp_path / "one", n_workers=1)
    assert two == one and two.data_id == one.data_id
    last = [p for p in told if p.stage == "encoding"][-1]
    assert last.n_bytes == last.total_bytes and last.n_tokens == two.train.n_tokens + two.val.n_tokens


def test_batches_are_drawn_only_as_fast_as_they_are_used() -> None:
    drawn = 0

    def batches():
        nonlocal drawn
        for i in range(100):
            drawn += 1
            yield Batch([f"text {i}"], [False], 6)

    for used, encoded in enumerate(encode_batches(batches(), BytesTokenizer(), np.uint16, 2), start=1):
        assert drawn <= used + 2 * 2
        assert bytes(encoded.train[:-1].astype(np.uint8)).decode() == f"text {used - 1}"  # in order
    assert drawn == used == 100


def test_a_dead_worker_is_one_sentence_even_while_a_large_batch_is_on_its_way() -> None:
    batches = (Batch(["words " * 100_000], [False], 600_000) for _ in range(50))
    results = encode_batches(batches, BytesTokenizer(), np.uint16, 2)
    next(results)
    for pid in _children(os.getpid()):
        if "encode import serve" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    with pytest.raises(MachineError, match=r"worker process that encodes text died \(killed by signal 9"):
        list(results)


@pytest.mark.parametrize("how", ["stdin", "script without a main guard"])
def test_workers_do_not_care_how_the_caller_was_started(tmp_path: Path, how: str) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", PROSE)
    code = UNGUARDED.format(source=source, out=str(tmp_path / "out"))
    (tmp_path / "script.py").write_text(code)
    argv, text = ([str(tmp_path / "script.py")], None) if how != "stdin" else (["-"], code)
    subprocess.run([sys.executable, *argv], input=text, text=True, check=True, timeout=60)
    assert open_shards(tmp_path / "out", verify=True)


UNGUARDED = """
from pathlib import Path
from homelab_scaling.data import encode
from homelab_scaling.data.shards import build_shards
encode.MIN_BYTES_FOR_WORKERS = 0
build_shards([{source!r}], "bpe:300", Path({out!r}), n_workers=2)
"""


# ------------------------------------------------------------------------------------------------ again, and in between


def test_asking_again_finds_it_and_asking_for_something_else_is_refused(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", PROSE), tmp_path / "out"
    manifest = build_shards([source], "bytes", out)
    before = snapshot(tmp_path)
    assert build_shards([source], "bytes", out) == manifest
    for options, said in (
        ({"tokenizer": "bpe:300"}, "tokenizer is 'bytes', asked for 'bpe:300'"),
        ({"val_frac": 0.3}, "val_frac is 0.02, asked for 0.3"),
        ({"max_bytes": 99}, "max_bytes is None, asked for 99"),
    ):
        with pytest.raises(DataError, match=said):
            build_shards([source], **{"tokenizer": "bytes", "out": out} | options)
    assert snapshot(tmp_path) == before
    os.utime(source, ns=(1, 1))  # another time, the same text
    assert build_shards([source], "bytes", out) == manifest
    write_jsonl(Path(source), PROSE[1:])
    with pytest.raises(DataError, match="built from other text"):
        build_shards([source], "bytes", out)
    Path(source).unlink()  # the shards are here, the text no longer has to be
    assert build_shards([source], "bytes", out) == manifest


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", PROSE)
    build_shards([source], "bpe:290", tmp_path / "one")
    build_shards([source], "bpe:290", tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, fault: BaseException) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", PROSE), tmp_path / "new" / "lab" / "out"
    before = snapshot(tmp_path)

    def interrupt(progress: Progress) -> None:
        if progress.stage == "encoding":
            raise fault

    wanted = {"match": "No space left on device"} if isinstance(fault, OSError) else {}
    with pytest.raises(MachineError if wanted else KeyboardInterrupt, **wanted):
        build_shards([source], "bytes", out, progress=interrupt)
    assert snapshot(tmp_path) == before
    assert build_shards([source], "bytes", out).train.n_tokens


def test_two_builders_do_not_meet(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", PROSE), tmp_path / "out"
    refused: list[str] = []

    def second(progress: Progress) -> None:
        if progress.stage == "encoding" and not refused:
            with pytest.raises(MachineError, match="another process is building these shards") as error:
                build_shards([source], "bytes", out)
            refused.append(str(error.value))

    build_shards([source], "bytes", out, progress=second)
    assert refused and open_shards(out, verify=True)


KILLED = """
import sys
from pathlib import Path
from homelab_scaling.data import build, encode
from homelab_scaling.data.shards import build_shards
encode.MIN_BYTES_FOR_WORKERS, build.BATCH_BYTES = 0, 20_000
build_shards([sys.argv[1]], "bpe:300", Path(sys.argv[2]), n_workers=2)
"""


def test_kill_9_leaves_nothing_that_looks_whole_and_no_worker(tmp_path: Path) -> None:
    texts = [f"{i} {text}" * 3 for i in range(60) for text in PROSE]  # 7 MB: a few seconds of encoding
    source, out = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out"
    (tmp_path / "build.py").write_text(KILLED)
    child = subprocess.Popen([sys.executable, str(tmp_path / "build.py"), source, str(out)])
    partial = tmp_path / ".out.building" / "train.bin"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 0):
        assert child.poll() is None and time.monotonic() < deadline, "the build ended before it could be killed"
        time.sleep(0.005)
    workers = _children(child.pid)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL and len(workers) == 2
    assert not out.exists() and partial.exists()
    with pytest.raises(DataError, match="no such folder"):
        open_shards(out)
    deadline = time.monotonic() + 20
    while left := [pid for pid in workers if _alive(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("a worker outlived its parent")
        time.sleep(0.05)
    small = write_jsonl(tmp_path / "b.jsonl", PROSE)  # a leftover of another request is replaced as well
    build_shards([small], "bytes", out)
    assert open_shards(out, verify=True).manifest.n_vocab == 257
    assert not partial.parent.exists()


def _children(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


MEASURED = """
import re, sys
from pathlib import Path
from homelab_scaling.data.shards import build_shards
manifest = build_shards([sys.argv[1]], "bytes", Path(sys.argv[2]))
# not ru_maxrss, which begins at what the parent had when it forked us
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(manifest.train.n_bytes + manifest.val.n_bytes, 1024 * peak_kib)
"""


@pytest.mark.slow
def test_a_large_file_does_not_need_its_size_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("w") as file:
        for i in range(700_000):
            file.write(f"{i} {PROSE[i % 120][:480]}\n" + "\n" * (i % 7 == 0))
    size = path.stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "out")]
    n_bytes, peak_bytes = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert n_bytes == size
    assert peak_bytes < 150e6  # the interpreter, numpy and cattrs are 60 MB of it


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", PROSE)

    def change(progress: Progress) -> None:
        if progress.stage == "learning the tokenizer":
            write_jsonl(Path(source), PROSE[::-1])

    with pytest.raises(DataError, match="the text changed while it was read"):
        build_shards([source], "bpe:290", tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --------------------------------------------------------------------------------------------------- what disagrees


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build_shards([write_jsonl(folder / "a.jsonl", PROSE)], "bytes", folder / "out")
    return folder / "out"


def edit(path: Path, **changes: object) -> None:
    plain = json.loads(path.read_text())
    for key, value in changes.items():
        plain[key] = value
    path.write_text(json.dumps(plain))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path, value: int) -> None:
    data = np.memmap(path, dtype=np.uint16, mode="r+")
    data[100] = value
    data.flush()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: truncate(f / "train.bin"), r"train.bin: \d+ bytes, manifest.json says \d+; the file is torn"),
        (lambda f: shutil.copy(f / "train.bin", f / "val.bin"), r"val.bin: .*the file is not the one"),
        (lambda f: (f / "val.bin").unlink(), "val.bin: named by manifest.json but not there"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda f: edit(f / "manifest.json", n_vocab="257"), "n_vocab: wants a whole number"),
        (lambda f: edit(f / "manifest.json", extra=1), "extra: no such key"),
        (lambda f: edit(f / "manifest.json", dtype="int8"), "dtype: wants one of 'uint16', 'uint32'"),
        (lambda f: edit(f / "manifest.json", dtype="uint32"), "train.bin: .*the file is torn"),
        (lambda f: edit(f / "manifest.json", eot_id=257), "n_vocab 257 and eot_id 257 do not fit"),
        (lambda f: edit(f / "manifest.json", header_bytes=1024), "train.bin: .*the file is torn"),
        (lambda f: (f / "manifest.json").unlink(), "add --tokenizer, --n-vocab, --eot-id"),
    ],
)
def test_opening_checks_sizes_and_the_manifest(whole: Path, tmp_path: Path, damage, said: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(DataError, match=said):
        open_shards(folder)


def test_counts_that_contradict_each_other(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    plain = json.loads((folder / "manifest.json").read_text())
    plain["train"]["n_tokens"] += 1
    (folder / "manifest.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match=r"train has \d+ tokens, its files \d+"):
        open_shards(folder)
    plain["train"]["n_tokens"] -= 1
    plain["train"]["files"][0]["name"] = "../out/train.bin"
    (folder / "manifest.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match="named by manifest"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("value", "said"), [(3, "its SHA-256 is not the one"), (257, "token 100 is 257, but the vocab")]
)
def test_verifying_reads_every_token(whole: Path, tmp_path: Path, value: int, said: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    flip(folder / "train.bin", value)
    assert open_shards(folder).train[100:101] == value  # sizes are right: only verify can know
    with pytest.raises(DataError, match=f"train.bin: {said}"):
        open_shards(folder, verify=True)


def test_facts_must_agree_with_the_manifest(whole: Path) -> None:
    assert open_shards(whole, n_vocab=257, eot_id=256, tokenizer="bytes", dtype="uint16")
    with pytest.raises(DataError, match=r"manifest.json says n_vocab = 257, you said 50257"):
        open_shards(whole, n_vocab=50257)


def test_a_folder_with_something_else_in_it_is_left_alone(whole: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", PROSE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        build_shards([source], "bytes", tmp_path / "out")
    with pytest.raises(DataError, match="this is a file"):
        build_shards([source], "bytes", Path(source))
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    (folder / "build.json").unlink()
    with pytest.raises(DataError, match="that says how they were made"):
        build_shards([source], "bytes", folder)
    (tmp_path / "empty").mkdir()  # an empty folder is as good as none
    assert isinstance(build_shards([source], "bytes", tmp_path / "empty"), CorpusManifest)
    assert codec.read_json(tmp_path / "empty" / "manifest.json", CorpusManifest).n_vocab == 257
