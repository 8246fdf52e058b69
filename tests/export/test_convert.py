"""What leaves is the model that was trained, with the ids it was trained on; what cannot leave says why."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from homelab_scaling import codec
from homelab_scaling.data.foreign import Facts, foreign_manifest
from homelab_scaling.data.shards import open_shards
from homelab_scaling.data.tokenizers import EOT, BytesTokenizer, FileTokenizer
from homelab_scaling.errors import CheckpointError, DataError, MachineError, UserError
from homelab_scaling.export.check import own_model
from homelab_scaling.export.convert import open_model
from homelab_scaling.export.hf_tokenizer import to_hugging_face
from homelab_scaling.export.trained import find_trained, tokenizer_of
from homelab_scaling.specs import ScienceSpec, make_run_id

BOTH = pytest.mark.parametrize("kind", ["bpe:300", "bytes"])


def copied(run, to: Path) -> Path:
    """A copy of a run's folder that still finds its text."""
    return Path(shutil.copytree(run.folder.path, to / run.spec.run_id))


@BOTH
def test_every_logit_is_ours(runs, kind: str) -> None:
    run = runs[kind]
    found = open_model(run.folder.path)
    own = own_model(find_trained(run.folder.path)).eval()
    ids = torch.randint(found.n_vocab, (3, found.context_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = own.hidden_states(ids) @ own.head_weight[: found.n_vocab].T
        logits = found.model(ids).logits
    assert own.head_weight.shape[0] > found.n_vocab == run.spec.science.n_vocab  # it was padded
    assert logits.shape == (3, found.context_tokens, found.n_vocab)
    assert (logits - wanted).abs().max() < 1e-5 and wanted.std() > 0.01
    assert found.model.num_parameters() == found.n_params and not found.model.training


def test_the_facts_come_from_the_record(run) -> None:
    rows = run.folder.read_record().rows
    found = open_model(run.folder.path)
    assert found.name == f"{run.spec.run_id}@{rows[-1].n_tokens}" == rows[-1].row_id
    assert (found.loss_nats, found.flops, found.n_params) == (rows[-1].loss_nats, rows[-1].flops, rows[-1].n_params)
    assert found.n_tokens == rows[-1].n_tokens and found.shards == run.shards and found.run == run.folder.path
    assert found.context_tokens == 32 and found.device in ("cpu", "cuda")


def test_any_checkpoint_can_be_asked_for(run) -> None:
    rows = run.folder.read_record().rows
    first = open_model(run.folder.path, at=rows[0].n_tokens)
    assert first.loss_nats == rows[0].loss_nats != rows[1].loss_nats
    assert open_model(run.folder.checkpoints / f"row-{rows[0].n_tokens}").name == first.name
    (state,) = [p for p in run.folder.checkpoints.iterdir() if p.name.startswith("u")][-1:]
    between = open_model(state)
    assert between.name == f"{run.spec.run_id}@{state.name}" and between.loss_nats is None
    assert open_model(run.folder.path, at=state.name).n_tokens == between.n_tokens
    assert between.flops == pytest.approx(rows[1].flops * between.n_tokens / rows[1].n_tokens)
    last = open_model(run.folder.path)
    assert not torch.equal(first.model.transformer.wte.weight, last.model.transformer.wte.weight)


# ----------------------------------------------------------------------------------------------------------- tokenizers

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@BOTH
@settings(derandomize=True, deadline=None, max_examples=60)
@given(parts=st.lists(st.one_of(TEXT, st.sampled_from([EOT, " ", "\n\n", " n't .", "</s>"])), max_size=6))
def test_the_ids_are_those_of_training(runs, kind: str, parts: list[str]) -> None:
    text = "".join(parts)
    trained = find_trained(runs[kind].folder.path)
    cutter = tokenizer_of(trained)
    theirs = to_hugging_face(cutter, 10**6)
    wanted = cutter.encode_batch([text])[0].tolist()
    assert theirs(text)["input_ids"] == theirs.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert theirs(text)["input_ids"] == wanted
    assert theirs.decode(wanted, skip_special_tokens=False) == text


@BOTH
def test_nothing_is_added_and_the_end_is_ours(runs, kind: str) -> None:
    found = open_model(runs[kind].folder.path)
    theirs = found.tokenizer
    assert theirs.eos_token_id == found.eot_id == open_shards(runs[kind].shards).manifest.eot_id
    assert theirs("")["input_ids"] == [] and theirs.bos_token is None
    assert found.eot_id not in theirs(f"a {EOT} b")["input_ids"]
    assert theirs.model_max_length == found.context_tokens and len(theirs) == found.n_vocab
    assert theirs.decode([found.eot_id]) == EOT and theirs.decode([found.eot_id], skip_special_tokens=True) == ""


def test_a_tokenizer_that_would_put_tokens_around_a_text_adds_none(run) -> None:
    engine = Engine.from_str((run.shards / "tokenizer.json").read_text())
    engine.post_processor = TemplateProcessing(single=f"{EOT} $A {EOT}", special_tokens=[(EOT, 0)])
    engine.enable_truncation(5)
    cutter = FileTokenizer("llama-like", engine.to_str())
    long = "the cats sat on the mats " * 9
    assert to_hugging_face(cutter, 32)(long)["input_ids"] == cutter.encode_batch([long])[0].tolist()


# ----------------------------------------------------------------------------------------------------------- refusals


def test_another_tokenizer_is_refused(run, tmp_path: Path) -> None:
    other = json.loads((run.shards / "tokenizer.json").read_text())
    other["model"]["merges"] = other["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="not the tokenizer it was trained with"):
        open_model(run.folder.path, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="not the tokenizer it was trained with"):
        open_model(run.folder.path, tokenizer=Path("bytes"))


@BOTH
def test_a_run_whose_text_is_gone_needs_its_tokenizer(runs, kind: str, tmp_path: Path) -> None:
    """Bytes have no file, and are known by their hash."""
    run = runs[kind]
    folder = copied(run, tmp_path)
    spec = codec.read_plain_json(folder / "spec.json")
    codec.write_json(folder / "spec.json", spec | {"shards": str(tmp_path / "gone")})
    if kind == "bytes":
        assert open_model(folder).shards is None
        return
    with pytest.raises(DataError, match=r"not at .*gone; restore them or give --tokenizer"):
        open_model(folder)
    found = open_model(folder, tokenizer=run.shards / "tokenizer.json")
    assert found.shards is None and found.eot_id == 0


@pytest.fixture
def on_foreign_shards(runs, tmp_path: Path) -> Path:
    """The byte run as if on nanoGPT's .bin files; the vocabulary is said to be `name`."""
    run = runs["bytes"]
    folder, bins = copied(run, tmp_path), tmp_path / "bins"
    bins.mkdir()
    for half in ("train", "val"):
        shutil.copy(run.shards / f"{half}.bin", bins)
    return folder


def retold(folder: Path, name: str, n_vocab: int, eot_id: int) -> None:
    bins = folder.parent / "bins"
    manifest = foreign_manifest(bins, Facts(tokenizer=name, n_vocab=n_vocab, eot_id=eot_id))
    codec.write_json(bins / "manifest.json", manifest)
    spec = codec.read_plain_json(folder / "spec.json")
    science = spec["science"] | {"tokenizer_hash": manifest.tokenizer_hash, "n_vocab": n_vocab}
    for half in ("train", "val"):
        science[f"{half}_fingerprint"] = getattr(manifest, half).fingerprint
    parsed = codec.from_plain(science, ScienceSpec, "test")
    run_id = make_run_id("toy", parsed)
    codec.write_json(folder / "spec.json", spec | {"science": science, "shards": str(bins), "run_id": run_id})
    for checkpoint in (folder / "checkpoints").iterdir():
        said = codec.read_plain_json(checkpoint / "checkpoint.json")
        codec.write_json(checkpoint / "checkpoint.json", said | {"science_hash": parsed.hash})


def test_foreign_shards_need_a_tokenizer_to_be_named(on_foreign_shards: Path, run) -> None:
    retold(on_foreign_shards, "char", 257, 256)
    with pytest.raises(DataError, match=r"came without a tokenizer \(they were called 'char'\); give --tokenizer FILE"):
        open_model(on_foreign_shards)
    with pytest.raises(DataError, match="wants 257 ids and end of text 256, it has 300 and 0"):
        open_model(on_foreign_shards, tokenizer=run.shards / "tokenizer.json")
    found = open_model(on_foreign_shards, tokenizer=Path("bytes"))
    assert found.tokenizer("é")["input_ids"] == list("é".encode())


def test_gpt2_shards_without_the_file_say_what_to_give(on_foreign_shards: Path, monkeypatch, tmp_path: Path) -> None:
    retold(on_foreign_shards, "gpt2", 50257, 50256)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)

    def unreachable(*_a: object, **_k: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(MachineError, match=r"hub cannot be reached.*with --tokenizer FILE"):
        open_model(on_foreign_shards)


def torn(folder: Path) -> None:
    path = folder / "checkpoints" / "row-2560" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def without_rows(folder: Path) -> None:
    for row in (folder / "checkpoints").glob("row-*"):
        shutil.rmtree(row)


def bare(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def of_another(folder: Path) -> None:
    path = folder / "checkpoints" / "row-2560" / "checkpoint.json"
    codec.write_json(path, codec.read_plain_json(path) | {"science_hash": "0" * 64})


@pytest.mark.parametrize(
    ("harm", "kind", "said"),
    [
        (torn, CheckpointError, "torn checkpoint row-2560: model.safetensors does not match its hash"),
        (without_rows, UserError, r"no finished row; name a state between rows instead \(u0"),
        (bare, UserError, "no finished row; train it first"),
        (of_another, CheckpointError, "belongs to another run"),
    ],
)
def test_what_is_wrong_with_a_run_is_one_sentence(run, tmp_path: Path, harm, kind, said: str) -> None:
    folder = copied(run, tmp_path)
    harm(folder)
    with pytest.raises(kind, match=said) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at 7; rows: 1280, 2560; states between: u0"):
        open_model(run.folder.path, at=7)
    with pytest.raises(UserError, match="no such folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="whole lab; name one of its runs"):
        open_model(run.folder.path.parents[1])
    with pytest.raises(UserError, match=r"neither a run .* nor a checkpoint, nor a Hugging Face model"):
        open_model(tmp_path)
    with pytest.raises(UserError, match="no checkpoint of a run"):
        open_model(tmp_path / "row-5")
    with pytest.raises(UserError, match="one checkpoint already"):
        open_model(run.folder.checkpoints / "row-1280", at=1280)
    with pytest.raises(MachineError, match="wants auto, cpu"):
        open_model(run.folder.path, device="tpu")


# -------------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Somebody else's GPT-2 with the byte tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path / "theirs"
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=24, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    to_hugging_face(BytesTokenizer(), 24).save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_opens_without_the_hub(foreign: Path, monkeypatch) -> None:
    def refused(*_a: object, **_k: object) -> None:
        raise AssertionError("it called somebody")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    found = open_model(foreign, device="cpu")
    assert (found.name, found.context_tokens, found.n_vocab, found.eot_id) == ("theirs", 24, 260, 256)
    assert found.run is None and found.shards is None and found.loss_nats is None and found.facts is None
    assert found.n_params == 260 * 16 + 24 * 16 + (12 * 16 * 16 + 13 * 16) + 2 * 16
    with pytest.raises(UserError, match="only a run of ours has checkpoints"):
        open_model(foreign, at=3)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["config.json"], "half a model, config.json missing"),
        (["model.safetensors"], "half a model, model.safetensors missing"),
        (["config.json", "model.safetensors"], "half a model, config.json and model.safetensors missing"),
        (["tokenizer.json"], "half a model, tokenizer.json missing"),
    ],
)
def test_half_a_folder_says_which_half(foreign: Path, lost: list[str], said: str) -> None:
    for name in lost:
        (foreign / name).unlink()
    with pytest.raises(UserError, match=said):
        open_model(foreign)


def test_weights_are_never_made_up(foreign: Path) -> None:
    """transformers fills in what is missing at random, and only warns."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(foreign / "model.safetensors")
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, foreign / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing .*h\.0\.mlp\.c_fc\.weight"):
        open_model(foreign)
    (foreign / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(CheckpointError, match="transformers cannot load this model"):
        open_model(foreign)


def test_ids_of_a_run_decode_to_its_text(run) -> None:
    found = open_model(run.folder.path)
    stream = np.asarray(open_shards(run.shards).val[:200])
    text = found.tokenizer.decode(stream.tolist())
    assert "cats sat on the" in text and EOT in text
