"""`homelab plan` as a person uses it: readable at 100 columns, one JSON document, one sentence for every mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from homelab_scaling import codec
from homelab_scaling.plan.ladder import shipped_ladders
from homelab_scaling.plan.parts import Plan
from homelab_scaling.specs import CorpusManifest

GOOD = """\
name = "mine"
context_tokens = 128
rungs = [
    { name = "a", n_layer = 2, d_model = 32, n_head = 2 },
    { name = "b", n_layer = 2, d_model = 64, n_head = 2 },
    { name = "c", n_layer = 2, d_model = 96, n_head = 2 },
]
[data]
tokenizer = "bpe:2048"
[horizons]
tokens = [500_000, 1_000_000]
[batch]
tokens = 4096
[validation]
full_tokens = 100_000
curve_tokens = 10_000
"""

MakeCorpus = Callable[..., CorpusManifest]
Homelab = Callable[..., object]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, 100 columns wide, without cards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "mine.toml").write_text(GOOD, encoding="utf-8")
    return tmp_path


def _write_corpus(folder: Path, corpus: CorpusManifest) -> None:
    codec.write_json(folder / "manifest.json", corpus)


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# --------------------------------------------------------------------------------------------------------------- good


@pytest.mark.parametrize("name", shipped_ladders())
def test_the_page_reads_at_100_columns(here: Path, homelab: Homelab, name: str) -> None:
    said = homelab("plan", name, "--card", "RTX 4080", "--gpus", "2")
    assert said.code == 0 and said.err == ""
    assert max(len(line) for line in said.out.splitlines()) <= 100
    assert "…" not in said.out
    for wanted in (
        "total N",
        "exact (causal)",
        "full, padded",
        "6N",
        "peak lr",
        "epochs",
        "AdamW8bit",
        "Total:",
        "kWh",
    ):
        assert wanted in said.out, wanted
    assert set(_tree(here)) == {"mine.toml"}, "a dry run writes nothing"


def test_several_cards_are_planned_at_once(here: Path, homelab: Homelab) -> None:
    said = homelab("plan", "gpt2_5m_120m", "--card", "RTX 4080", "--gpus", "2")
    (line,) = (line for line in said.out.splitlines() if "on 2 cards at once all runs end after about" in line)
    assert "h:" in line
    document = json.loads(homelab("plan", "gpt2_5m_120m", "--card", "RTX 4080", "--gpus", "2", "--json").out)
    schedule = document["schedule"]
    assert len(schedule["slots"]) == 2 and len(schedule["assignments"]) >= 5
    assert schedule["makespan_s"] == max(one["end_s"] for one in schedule["assignments"])
    assert schedule["makespan_s"] <= min(one["makespan_s"] for one in schedule["alternatives"])
    alone = homelab("plan", "gpt2_5m_120m", "--card", "RTX 4080", "--gpus", "1")
    assert "cards at once" not in alone.out


def test_the_page_says_what_it_assumed_and_warns_last(here: Path, homelab: Homelab) -> None:
    (here / "mine.toml").write_text(GOOD.replace("500_000, 1_000_000", "10_000"), encoding="utf-8")
    said = homelab("plan", "mine.toml")
    assert "assumed for bpe:2048" in said.out and "no shards yet" in said.out
    assert "no watts are stated" in said.out
    lines = [line for line in said.out.splitlines() if line.startswith("! ")]
    assert "wanted 10,000 tokens" in lines[0]
    assert said.out.index("Total:") < said.out.index("! rung a")


def test_one_json_document_that_is_the_plan(here: Path, homelab: Homelab) -> None:
    said = homelab("plan", "mine.toml", "--json", "--watts", "60")
    plan = codec.from_plain(json.loads(said.out), Plan, "stdout")
    assert [rung.name for rung in plan.rungs] == ["a", "b", "c"]
    assert plan.totals.seconds is not None
    assert plan.totals.kwh == pytest.approx(60 * plan.totals.seconds / 3.6e6)
    assert plan.energy_basis == "stated: 60 W for the whole machine"


def test_finished_shards_give_runs_and_write_keeps_the_plan(
    here: Path, homelab: Homelab, make_corpus: MakeCorpus
) -> None:
    _write_corpus(here / "labs" / "mine" / "shards", make_corpus(n_train=2_000_000, n_val=50_000))
    said = homelab("plan", "mine.toml", "--lab", "labs", "--json", "--write")
    assert said.code == 0 and "plan.json" in said.err
    written = codec.read_json(here / "labs" / "mine" / "plan.json", Plan)
    assert written == codec.from_plain(json.loads(said.out), Plan, "stdout")
    assert [run.rung for run in written.runs] == ["a", "b", "c"]
    assert written.rungs[0].training.horizons[-1].n_epochs == pytest.approx(0.5, rel=0.01)
    assert written.val_tokens == 49_999 // 128 * 128, "all of the held-out text, in whole windows"
    assert {run.shards for run in written.runs} == {"../../shards"}


def test_shards_that_the_ladder_names_are_used(here: Path, homelab: Homelab, make_corpus: MakeCorpus) -> None:
    _write_corpus(here / "elsewhere", make_corpus(tokenizer="foreign", n_vocab=50_257))
    (here / "mine.toml").write_text(GOOD.replace("[data]", '[data]\nshards = "elsewhere"'), encoding="utf-8")
    plan = codec.from_plain(json.loads(homelab("plan", "mine.toml", "--json").out), Plan, "stdout")
    assert plan.n_vocab == 50_257
    assert {run.shards for run in plan.runs} == {str(here / "elsewhere")}


def test_a_tokenizer_file_gives_its_vocabulary(here: Path, homelab: Homelab) -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<|endoftext|>"}]}
    (here / "tok.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (here / "mine.toml").write_text(GOOD.replace("bpe:2048", "tok.json"), encoding="utf-8")
    assert json.loads(homelab("plan", "mine.toml", "--json").out)["n_vocab"] == 3


# ---------------------------------------------------------------------------------------------------------------- bad


def _ladder(old: str, new: str) -> Callable[[Path], None]:
    """A ladder file with one mistake."""
    assert old in GOOD

    def write(folder: Path) -> None:
        (folder / "mine.toml").write_text(GOOD.replace(old, new, 1), encoding="utf-8")

    return write


def _bytes(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def _broken_tokenizer(folder: Path) -> None:
    _ladder("bpe:2048", "mine.json")(folder)
    _bytes("mine.json", b'{"model": {"vocab": []}}')(folder)


def _nothing(_folder: Path) -> None:
    return None


MINE = ("mine.toml",)
HORIZONS_AND_BATCH = "[horizons]\ntokens = [500_000, 1_000_000]\n[batch]\ntokens = 4096\n"
BAD: list[tuple[str, Callable[[Path], None], tuple[str, ...], str]] = [
    ("no such ladder", _nothing, ("nowhere.toml",), "no such ladder"),
    ("a folder", lambda f: (f / "dir").mkdir(), ("dir",), "a ladder file is wanted"),
    ("no ladder at all", _nothing, (), "homelab plan --help"),
    ("unknown flag", _nothing, (*MINE, "--gpu", "2"), "--gpus"),
    ("flag of wrong type", _nothing, (*MINE, "--gpus", "two"), "two"),
    ("not TOML", _bytes("mine.toml", b"name = "), MINE, "cannot be read"),
    ("not UTF-8", _bytes("mine.toml", b"name = '\xff'"), MINE, "not UTF-8"),
    (
        "key there twice",
        _ladder("context_tokens = 128", "context_tokens = 128\ncontext_tokens = 64"),
        MINE,
        "cannot be read",
    ),
    ("misspelt key", _ladder("context_tokens", "context_token"), MINE, "did you mean context_tokens"),
    ("misspelt nested key", _ladder("curve_tokens", "curve_token"), MINE, "validation.curve_token"),
    ("half a token", _ladder("context_tokens = 128", "context_tokens = 128.5"), MINE, "whole number"),
    ("true for a number", _ladder("tokens = 4096", "tokens = true"), MINE, "batch.tokens"),
    ("text for a number", _ladder("n_layer = 2", 'n_layer = "2"'), MINE, "n_layer"),
    ("not a number", _ladder("[batch]", "[lr]\npeak = nan\n[batch]"), MINE, "finite"),
    ("infinite", _ladder("[batch]", "[money]\nusd_per_kwh = inf\n[batch]"), MINE, "finite"),
    ("a number for a list", _ladder("[500_000, 1_000_000]", "500_000"), MINE, "wants a list"),
    ("no horizons", _ladder("tokens = [500_000, 1_000_000]", ""), MINE, "give exactly one of"),
    ("two kinds of horizons", _ladder("[horizons]", "[horizons]\nsteps = [9]"), MINE, "tokens and steps"),
    ("a horizon twice", _ladder("500_000, 1_000_000", "500_000, 500_000"), MINE, "there twice"),
    ("horizon below a batch", _ladder("500_000, ", "1_000, "), MINE, "less than one batch"),
    ("horizons that fall together", _ladder("500_000, ", "1_000_100, "), MINE, "space them wider"),
    ("negative horizon", _ladder("500_000, ", "-5, "), MINE, "must be positive"),
    ("nominal without tokens", _ladder("[horizons]", '[horizons]\nmode = "nominal"'), MINE, "nominal_tokens"),
    ("steps without batch", _ladder(HORIZONS_AND_BATCH, "[horizons]\nsteps = [500]\n"), MINE, "write batch.tokens"),
    ("rung with half a shape", _ladder("n_layer = 2, ", ""), MINE, "n_params_target alone"),
    ("shape and target", _ladder("n_layer = 2, ", "n_params_target = 9, n_layer = 2, "), MINE, "n_params_target alone"),
    ("heads that do not divide", _ladder("n_head = 2", "n_head = 3"), MINE, "does not divide"),
    ("same rung name", _ladder('name = "b"', 'name = "a"'), MINE, "twice"),
    ("no rungs", _bytes("mine.toml", b'name = "x"\nrungs = []\n[horizons]\ntokens = [9]'), MINE, "rungs is empty"),
    ("a name that is a path", _ladder('"mine"', '"../mine"'), MINE, "letters, digits"),
    ("unknown optimizer", _ladder("[batch]", '[optim]\nname = "sgd"\n[batch]'), MINE, "adamw8bit"),
    ("long warm-up", _ladder("[batch]", "[schedule]\nwarmup_frac = 0.3\n[batch]"), MINE, "warmup_frac"),
    ("rising rate", _ladder("[batch]", "[lr]\nexponent = 0.5\n[batch]"), MINE, "lr.exponent"),
    ("decay in the warm-up", _ladder("500_000, ", "4_096, "), MINE, "leaves no trunk"),
    ("unknown tokenizer", _ladder("bpe:2048", "gtp2"), MINE, "wants bytes, bpe:N, gpt2"),
    ("tiny bpe", _ladder("bpe:2048", "bpe:12"), MINE, "257"),
    ("no tokenizer file", _ladder("bpe:2048", "tok.json"), MINE, "no such file"),
    ("broken tokenizer file", _broken_tokenizer, MINE, "not a tokenizer.json"),
    ("curve larger than full", _ladder("curve_tokens = 10_000", "curve_tokens = 200_000"), MINE, "curve_tokens"),
    (
        "micro-batch does not divide",
        _ladder("[batch]", "[train]\nmicrobatch_seqs_per_rank = 5\n[batch]"),
        MINE,
        "divisor",
    ),
    ("unknown card", _nothing, (*MINE, "--card", "RTX 4081"), "not in the table"),
    ("no cards of a kind", _nothing, (*MINE, "--card", "RTX 4080", "--gpus", "0"), "wants 1 or more"),
    ("cards that are not here", _nothing, (*MINE, "--gpus", "9"), "--card"),
    ("negative watts", _nothing, (*MINE, "--watts=-5"), "positive"),
    (
        "shards without a manifest",
        lambda here: (_ladder("[data]", '[data]\nshards = "raw"')(here), _bytes("raw/train.bin", b"12")(here)),
        MINE,
        "holds token files without a manifest.json; run `homelab corpus",
    ),
    ("shards that are not there", _ladder("[data]", '[data]\nshards = "gone"'), MINE, "homelab corpus"),
    ("torn manifest", _bytes("lab/mine/shards/manifest.json", b'{"tokenizer": '), MINE, "manifest.json"),
    ("foreign manifest", _bytes("lab/mine/shards/manifest.json", b'{"tokens": 5}'), MINE, "manifest.json"),
    ("a lab that is a file", _bytes("taken", b""), (*MINE, "--lab", "taken", "--write"), "taken"),
]


@pytest.mark.parametrize(("prepare", "args", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_mistake_gets_one_sentence_and_changes_nothing(
    here: Path, homelab: Homelab, prepare: Callable[[Path], None], args: tuple[str, ...], said: str
) -> None:
    prepare(here)
    _must_be_refused(here, homelab, args, said)


def _must_be_refused(here: Path, homelab: Homelab, args: tuple[str, ...], said: str) -> None:
    before = _tree(here)
    answer = homelab("plan", *args)
    assert answer.code == 2, answer
    assert answer.out == ""
    assert answer.err.count("\n") == 1 and answer.err.startswith("homelab plan: "), answer.err
    assert said in answer.err
    assert _tree(here) == before


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ({"n_train": 100}, "the training text has 100 tokens, one window of 128 needs 129"),
        ({"n_val": 128}, "the held-out text has 128 tokens"),
        ({"n_train": 200_000}, "add 49,856 tokens of text, shorten the horizon or raise data.max_epochs"),
        ({"tokenizer": "bytes"}, "the shards were cut with tokenizer bytes, the ladder wants bpe:2048"),
    ],
)
def test_a_corpus_that_cannot_serve_is_refused(
    here: Path, homelab: Homelab, make_corpus: MakeCorpus, corpus: dict[str, object], said: str
) -> None:
    _write_corpus(here / "lab" / "mine" / "shards", make_corpus(**corpus))
    _must_be_refused(here, homelab, MINE, said)


def test_told_so_more_passes_are_allowed(here: Path, homelab: Homelab, make_corpus: MakeCorpus) -> None:
    _write_corpus(here / "lab" / "mine" / "shards", make_corpus(n_train=200_000))
    (here / "mine.toml").write_text(GOOD.replace("[data]", "[data]\nmax_epochs = 6"), encoding="utf-8")
    said = homelab("plan", "mine.toml")
    assert said.code == 0
    assert "passes over the training text" in said.out


def test_planning_needs_no_torch(here: Path) -> None:
    code = (
        "import sys; from homelab_scaling import cli; code = cli.main(['plan', 'mine.toml', '--json']); "
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'transformers', 'scipy', 'bitsandbytes')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=here, check=False, capture_output=True).returncode == 0
