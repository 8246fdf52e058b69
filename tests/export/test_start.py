"""A Hugging Face GPT-2 as the start of a run: the same model, part of the run's name, and nothing else does."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_run import StopAt, make_toy_run, steps_of, train_here, train_on_ranks
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from homelab_scaling import codec
from homelab_scaling.data.shards import build_shards
from homelab_scaling.data.tokenizers import BytesTokenizer
from homelab_scaling.errors import CheckpointError, DataError, MachineError, SpecError, Stopped
from homelab_scaling.export.hf_tokenizer import to_hugging_face
from homelab_scaling.export.start import find_start
from homelab_scaling.export.write import export_model
from homelab_scaling.fit.checks import table_checks
from homelab_scaling.ladder import BatchTable, Horizons, Ladder, Rung, TrainTable
from homelab_scaling.plan.ladder import plan_ladder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.plan.peaks import box_with
from homelab_scaling.runs import RunFolder, read_runs
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.train.feed import Feed, open_matching_shards

N_VOCAB = 257
CONTEXT = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusManifest, Path]:
    folder = tmp_path_factory.mktemp("bytes")
    texts = [f"{i} cats sat on {7 * i} mats. " * (4 + i % 7) for i in range(150)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return build_shards([str(folder / "a.jsonl")], "bytes", folder / "shards", val_frac=0.2), folder / "shards"


def gpt2(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(7)
    usual = {"vocab_size": N_VOCAB, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2}
    usual |= {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**{**usual, **changes}))
    with torch.no_grad():  # far from any initialisation
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    gpt2().save_pretrained(tmp_path / "base")
    to_hugging_face(BytesTokenizer(), CONTEXT).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def ladder(start: str | None) -> Ladder:
    rungs = (Rung(name="s", n_layer=1, d_model=32, n_head=2), Rung(name="m", n_layer=2, d_model=32, n_head=2))
    return Ladder(
        name="tuned",
        rungs=rungs,
        horizons=Horizons(tokens=(20_480,)),
        context_tokens=CONTEXT,
        batch=BatchTable(tokens=512),
        train=TrainTable(start=start),
    )


@pytest.fixture
def plan(corpus: tuple[CorpusManifest, Path], tmp_path: Path) -> Callable[..., Plan]:
    manifest, shards = corpus
    roomy = replace(manifest, train=replace(manifest.train, n_tokens=10**7))

    def made(name: str | None, manifest: CorpusManifest | None = roomy, **changes: object) -> Plan:
        found = None if name is None else find_start(name, tmp_path, manifest, shards)
        wanted = replace(ladder(name), **changes)
        data = replace(wanted.data, tokenizer="bytes")
        return plan_ladder(replace(wanted, data=data), manifest, box_with("RTX 4080", 1), start=found)

    return made


# ------------------------------------------------------------------------------------------------------------- planning


def test_only_the_rung_of_its_shape_begins_from_it(plan, checkpoint: Path) -> None:
    plain, begun = plan(None), plan("base")
    assert [run.science.start for run in plain.runs] == [None, None]
    s, m = begun.runs
    assert s == plain.runs[0], "a rung of another shape is what it was"
    assert m.science.start is not None and m.run_id != plain.runs[1].run_id
    assert m.execution.start_from == str(checkpoint)
    assert replace(m.science, start=None) == plain.runs[1].science
    said = " ".join(begun.warnings)
    assert "rung m begins from the weights of base (s from random ones)" in said and "set lr_peak of m" in said
    slow = replace(ladder("base").rungs[1], lr_peak=1e-4)
    assert "set lr_peak" not in " ".join(plan("base", rungs=(ladder("base").rungs[0], slow)).warnings)


def test_the_weights_name_the_run_and_their_place_does_not(plan, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    torch.manual_seed(8)
    other = gpt2()
    with torch.no_grad():
        other.transformer.wpe.weight[3, 3] += 1e-4
    other.save_pretrained(tmp_path / "other")
    ids = {name: plan(name).runs[1].run_id for name in ("base", "elsewhere", "other")}
    assert ids["base"] == ids["elsewhere"] != ids["other"]


def test_a_model_saved_without_its_head_is_the_same_start(plan, checkpoint: Path, tmp_path: Path) -> None:
    """OpenAI's own upload has names without `transformer.`."""
    model = gpt2()
    bare = GPT2Model(model.config)
    bare.load_state_dict(model.transformer.state_dict())
    bare.save_pretrained(tmp_path / "bare")
    assert plan("bare").runs[1].science.start == plan("base").runs[1].science.start


def test_a_tokenizer_that_knows_special_tokens_cuts_text_as_ours(plan, checkpoint: Path) -> None:
    """As everybody's but ours: it would take a spelt-out end of text for the token."""
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": False}))
    assert AutoTokenizer.from_pretrained(checkpoint)("<|endoftext|>")["input_ids"] == [256]
    assert plan("base").runs[1].science.start is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 300}, "has 300 token ids, the ladder's tokenizer 257"),
        ({"n_positions": 64}, "context_tokens 64 and a tied output head, as no rung has"),
        ({"tie_word_embeddings": False}, "its own output head, as no rung has"),
        ({"activation_function": "relu"}, "its activation_function is 'relu', ours computes only with 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True"),
        ({"layer_norm_epsilon": 1e-6}, "its layer_norm_epsilon is 1e-06"),
        ({"n_inner": 48}, "its n_inner is 48, ours is four times the width"),
    ],
)
def test_what_cannot_be_a_start_is_told_when_planning(plan, tmp_path: Path, changes: dict, said: str) -> None:
    gpt2(**changes).save_pretrained(tmp_path / "base")
    with pytest.raises(SpecError, match=said):
        plan("base")


def test_without_shards_the_vocabulary_is_compared_all_the_same(plan, tmp_path: Path) -> None:
    gpt2(vocab_size=300).save_pretrained(tmp_path / "base")
    with pytest.raises(SpecError, match="has 300 token ids, the ladder's tokenizer 257"):
        plan("base", None)


def test_missing_things_are_one_sentence(plan, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        plan("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="nor a Hugging Face model"):
        plan("empty")

    def unreachable(*_a: object, **_k: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(MachineError, match="hub does not give a model of that name"):
        plan("somebody/gpt2")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(SpecError, match=r"train.start: .*model.safetensors missing"):
        plan("base")
    config = json.loads((checkpoint / "config.json").read_text())
    gpt2().save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(SpecError, match="its model_type is 'llama'"):
        plan("base")
    with pytest.raises(SpecError, match=r"train\.start is empty"):
        TrainTable(start="")


def test_the_same_number_of_other_ids_is_refused(plan, checkpoint: Path) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"cuts text into other tokens than the corpus \(bytes\)"):
        plan("base")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def make_begun(corpus, plan, checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[RunSpec, RunFolder]]:
    """`make_begun(lab)`: a run of 16 steps that begins from the checkpoint, with a tiny learning rate."""
    manifest, shards = corpus
    wanted = plan("base").runs[1]

    def made(lab: str, **changes: object) -> tuple[RunSpec, RunFolder]:
        own = {"shape": wanted.science.shape, "n_vocab": N_VOCAB, "horizons": (16,), "start": wanted.science.start}
        own |= {"start_from": str(checkpoint)}
        spec, folder = make_toy_run(shards.parent, manifest, lab=f"{tmp_path.name}-{lab}", **{**own, **changes})
        return spec, folder

    return made


def test_training_begins_where_the_checkpoint_is(make_begun, checkpoint: Path) -> None:
    spec, folder = make_begun("begun")
    record = train_here(spec, folder)
    spec_random, random = make_begun("random", start=None, start_from=None)
    train_here(spec_random, random)
    theirs = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    feed = Feed(open_matching_shards(spec, folder), spec, rank=0, world_size=1, device=torch.device("cpu"))
    x, y = feed.micro_batch(0, 0, spec.science.batch_seqs_global)
    with torch.no_grad():
        logits = theirs(x).logits
    first = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert steps_of(folder)[0]["loss"] == pytest.approx(first, abs=1e-5)
    assert abs(steps_of(random)[0]["loss"] - first) > 0.1
    assert record.rows[0].start == spec.science.start
    assert codec.read_plain_json(random.record)["rows"][0]["start"] is None


def test_resume_needs_the_checkpoint_no_more_and_goes_on_to_the_bit(make_begun, checkpoint: Path) -> None:
    spec, whole = make_begun("whole")
    train_here(spec, whole)
    _, stopped = make_begun("stopped")
    with pytest.raises(Stopped):
        train_here(spec, stopped, [StopAt(7)])
    shutil.rmtree(checkpoint)
    train_here(spec, stopped)
    assert steps_of(stopped) == steps_of(whole)
    rows = [folder.read_record().rows[0] for folder in (whole, stopped)]
    assert rows[0].loss_nats == rows[1].loss_nats


@pytest.mark.parametrize("harm", ["gone", "changed", "never said"])
def test_a_run_never_begins_from_anything_else(make_begun, checkpoint: Path, harm: str) -> None:
    said = {"gone": "are not there", "changed": "holds other weights", "never said": "does not say where"}[harm]
    spec, folder = make_begun(harm.replace(" ", ""), **({"start_from": None} if harm == "never said" else {}))
    if harm == "gone":
        shutil.rmtree(checkpoint)
    if harm == "changed":
        gpt2(initializer_range=0.03).save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=said):
        train_here(spec, folder)
    assert not folder.checkpoints.exists() or not list(folder.checkpoints.glob("[ur]*"))


def test_our_own_export_is_a_start(runs, tmp_path: Path) -> None:
    """With its own tokenizer, known by the hash in its record; the loss goes on where it was."""
    run = runs["bpe:300"]
    export_model(run.folder.path, tmp_path / "base", device="cpu")
    manifest = codec.read_json(run.shards / "manifest.json", CorpusManifest)
    found = find_start("base", tmp_path, manifest, run.shards)
    assert found.shape == run.spec.science.shape and found.n_vocab == 300
    changes = {"shape": found.shape, "n_vocab": 300, "start": found.sha256, "start_from": found.folder}
    spec, folder = make_toy_run(run.shards.parent, manifest, lab="again", horizons=(12,), **changes)
    train_here(spec, folder)
    before = run.folder.read_record().rows[-1]
    assert steps_of(folder)[0]["loss"] < before.loss_nats + 0.3 < steps_of(run.folder)[0]["loss"]
    with pytest.raises(SpecError, match="is a run of ours; export it"):
        find_start(str(run.folder.path), tmp_path, manifest, run.shards)


def test_a_fit_says_that_it_is_not_of_random_starts(make_begun) -> None:
    spec, folder = make_begun("fit")
    train_here(spec, folder)
    points, _ = read_runs(folder.path.parents[1])
    (said,) = [text for text in table_checks(points) if "another model's weights" in text]
    assert said.startswith("1 of 1 rows")
    assert not [text for text in table_checks([replace(points[0], start=None)]) if "another model's weights" in text]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_on_two_ranks_it_begins_there_too(make_begun, sharding: str) -> None:
    spec, alone = make_begun("alone")
    train_here(spec, alone)
    _, both = make_begun(f"both{sharding}", n_processes=2, microbatch_seqs_per_rank=2, sharding=sharding)
    train_on_ranks(both, 2)
    wanted, found = ([step["loss"] for step in steps_of(folder)] for folder in (alone, both))
    assert found == pytest.approx(wanted, rel=2e-5)
