"""An exported folder is whole or absent, the same model to a stranger, and its card says what the record says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from homelab_scaling import cli, codec
from homelab_scaling.data.batches import read_windows, validation_windows
from homelab_scaling.data.shards import open_shards
from homelab_scaling.errors import CheckpointError, MachineError, SpecError
from homelab_scaling.export import check as checking
from homelab_scaling.export import convert, write
from homelab_scaling.export.card import sample_texts
from homelab_scaling.export.convert import open_model
from homelab_scaling.export.law import read_law
from homelab_scaling.export.trained import find_trained
from homelab_scaling.export.write import export_model
from homelab_scaling.fit.fit import fit_points
from homelab_scaling.fit.result import save_fit
from homelab_scaling.runs import LossPoint

FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "homelab.json"),
}


def loss_as_a_stranger(folder: Path, run) -> float:
    """Of AutoModelForCausalLM over the run's validation windows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream, science = open_shards(run.shards).val, run.spec.science
    starts = validation_windows(len(stream), science.shape.context_tokens, science.val_tokens)
    windows = torch.from_numpy(read_windows(stream, starts, science.shape.context_tokens).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), windows[:, 1:].flatten()).item()


@pytest.mark.parametrize("kind", ["bpe:300", "bytes"])
def test_a_stranger_gets_the_recorded_loss_and_form(runs, kind: str, tmp_path: Path) -> None:
    run = runs[kind]
    made = export_model(run.folder.path, tmp_path / "out", device="cpu")
    out, science = tmp_path / "out", run.spec.science
    row = run.folder.read_record().rows[-1]
    assert {p.name for p in out.iterdir()} == FILES and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert loss_as_a_stranger(out, run) == pytest.approx(row.loss_nats, abs=1e-5)
    assert made.check.loss_nats == pytest.approx(row.loss_nats, abs=1e-5) and made.check.whole
    assert made.check.bpb == pytest.approx(row.bpb, abs=1e-4)

    config = json.loads((out / "config.json").read_text())
    wanted = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": science.n_vocab}
    wanted |= {"tie_word_embeddings": science.shape.tied, "n_positions": 32, "use_cache": True, "dtype": "float32"}
    assert {key: config[key] for key in wanted} == wanted
    with safe_open(out / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        shape = file.get_slice("transformer.wte.weight").get_shape()
    assert metadata == {"format": "pt"} and shape == [science.n_vocab, 32]
    assert ("lm_head.weight" in names) is not science.shape.tied
    assert all(name.startswith(("transformer.", "lm_head.")) for name in names)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    modes = {p.stat().st_mode for p in out.iterdir()}
    assert len(modes) == 1, "one file may be read by fewer people than the others"


@pytest.mark.slow
def test_a_fresh_process_generates(run, tmp_path: Path) -> None:
    """And draws no id that does not exist, though the head was padded."""
    export_model(run.folder.path, tmp_path / "out", device="cpu")
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "torch.manual_seed(0)\n"
        "out = m.generate(**t('Chapter 3. the', return_tensors='pt'), max_new_tokens=16, do_sample=True,"
        " num_return_sequences=8)\n"
        "assert out.max() < len(t) == m.config.vocab_size == 300, out.max()\n"
        "print(t.decode(out[0]))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Chapter 3. the") and len(done.stdout) > 20


def test_bf16_is_half_the_size_and_says_what_it_changed(run, tmp_path: Path) -> None:
    whole = export_model(run.folder.path, tmp_path / "whole", device="cpu")
    half = export_model(run.folder.path, tmp_path / "half", dtype="bf16", device="cpu")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    assert 0 < abs(half.check.loss_nats - whole.check.loss_nats) < 0.05
    assert half.check.loss_fp32_nats == whole.check.loss_own_nats
    assert "what bf16 changes" in (tmp_path / "half" / "README.md").read_text()
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_our_own_folder_opens_again_and_knows_its_record(run, tmp_path: Path) -> None:
    export_model(run.folder.path, tmp_path / "out", device="cpu")
    first, again = open_model(run.folder.path), open_model(tmp_path / "out")
    for key in ("n_params", "n_tokens", "flops", "loss_nats", "tokenizer_hash", "n_vocab", "eot_id", "context_tokens"):
        assert getattr(again, key) == getattr(first, key), key
    assert again.run is None and again.name == "out"


# ------------------------------------------------------------------------------------------------------ whole or absent


def test_a_wrong_folder_never_gets_a_name(run, tmp_path: Path, monkeypatch) -> None:
    """Weights that are off by a little are found out by the loss."""
    honest = convert.gpt2_of

    def off(*args: object, **kwargs: object) -> object:
        model = honest(*args, **kwargs)
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight *= 1.02
        return model

    monkeypatch.setattr(convert, "gpt2_of", off)
    with pytest.raises(CheckpointError, match=r"gives a loss of .* nothing was written"):
        export_model(run.folder.path, tmp_path / "deep" / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), SafetensorError("IoError")]
)
def test_an_interrupted_export_leaves_nothing(run, tmp_path: Path, monkeypatch, error: BaseException) -> None:
    def interrupted(*_a: object, **_k: object) -> None:
        raise error

    monkeypatch.setattr(write, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else MachineError):
        export_model(run.folder.path, tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_is_replaced_and_nothing_else(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_model(run.folder.path, out, device="cpu")  # an empty folder is none
    (out / "README.md").write_text("scribble")
    export_model(run.folder.path, out, device="cpu", dtype="bf16")
    assert "scribble" not in (out / "README.md").read_text() and [p.name for p in tmp_path.iterdir()] == ["out"]

    with pytest.raises(SpecError, match=r"holds the export of another model \(toy"):
        export_model(run.folder.path, out, at=1280, device="cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(SpecError, match="not empty, and no export of ours"):
        export_model(run.folder.path, tmp_path / "mine", device="cpu")
    with pytest.raises(SpecError, match="is there already and is no folder"):
        export_model(run.folder.path, tmp_path / "mine" / "thesis.tex", device="cpu")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_what_a_killed_export_left_is_cleared_away(run, tmp_path: Path) -> None:
    left = tmp_path / ".out.exporting" / "folder"
    left.mkdir(parents=True)
    (left / "junk.bin").write_text("half")
    export_model(run.folder.path, tmp_path / "out", device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (tmp_path / "out" / "junk.bin").exists()


def test_only_a_run_can_be_exported(run, tmp_path: Path) -> None:
    export_model(run.folder.path, tmp_path / "out", device="cpu")
    with pytest.raises(SpecError, match="a Hugging Face folder already"):
        export_model(tmp_path / "out", tmp_path / "again")
    with pytest.raises(SpecError, match="no run there"):
        export_model(tmp_path, tmp_path / "again")


# ------------------------------------------------------------------------------------------------------------- the card


def test_the_card_tells_what_the_record_says(run, tmp_path: Path) -> None:
    made = export_model(run.folder.path, tmp_path / "out", device="cpu")
    card, row = (tmp_path / "out" / "README.md").read_text(), run.folder.read_record().rows[-1]
    front = card.split("---")[1]
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front
    manifest = open_shards(run.shards).manifest
    for said in (
        f"{row.n_params:,}: blocks {row.n_body:,}",
        f"{row.n_tokens:,} (",
        f"{row.loss_nats:.4f} ± {row.loss_se_nats:.4f}",
        f"| bits per byte | {row.bpb:.4f} |",
        run.spec.science.hash,
        manifest.data_id,
        "| sources | text.jsonl |",
        f"{manifest.val.n_tokens:,} tokens, {manifest.val.n_bytes:,} bytes",
        "random weights",
        "Unknown: no law has been fitted in its lab",
        f"unknown: {run.folder.read_record().unknown['kwh']}",
        "Licence: unknown",
        "greedy",
        "seed 0",
        "vLLM",
    ):
        assert said in card, said
    assert all(sample.text in card for sample in made.samples if sample.text.isprintable())
    assert len({sample.text for sample in made.samples}) == 2
    for path in (tmp_path / "out").iterdir():  # nobody's disk is published
        assert path.suffix == ".safetensors" or str(run.shards.parent) not in path.read_text(), path.name


def test_the_law_of_the_lab_is_asked(run, tmp_path: Path, monkeypatch) -> None:
    """A lab with rows on a known Chinchilla law: the card says what that law says at this N and D."""

    def law(n: float, d: float) -> float:
        return 1.7 + 40 / n**0.3 + 60 / d**0.25

    points = [
        LossPoint(n_params=n, n_tokens=d, loss_nats=law(n, d)) for n in (1e4, 4e4, 2e5, 1e6) for d in (1e3, 1e4, 1e5)
    ]
    lab = tmp_path / "lab"
    folder = Path(shutil.copytree(run.folder.path, lab / "runs" / run.spec.run_id))
    spec = codec.read_plain_json(folder / "spec.json")
    codec.write_json(folder / "spec.json", spec | {"shards": str(run.shards)})
    save_fit(fit_points(points, laws=("chinchilla",), n_bootstrap=50, source="test"), lab / "fit")
    found = read_law(find_trained(folder))
    row = run.folder.read_record().rows[-1]
    assert not isinstance(found, str)
    assert found.forecast.loss_nats == pytest.approx(law(row.n_params, row.n_tokens), rel=2e-3)
    export_model(folder, tmp_path / "out", device="cpu")
    assert f"it says {found.forecast.loss_nats:.3f}" in (tmp_path / "out" / "README.md").read_text()


def test_a_state_between_rows_says_that_it_is_none(run, tmp_path: Path) -> None:
    (state,) = [p for p in run.folder.checkpoints.iterdir() if p.name.startswith("u")][-1:]
    made = export_model(run.folder.path, tmp_path / "out", at=state.name, device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "has not decayed" in card and "unknown: only finished rows are measured in full" in card
    assert f"{made.check.loss_nats:.4f}" in card and made.name.endswith(state.name)


def test_without_text_the_proof_is_on_random_tokens(runs, tmp_path: Path) -> None:
    run = runs["bytes"]
    folder = Path(shutil.copytree(run.folder.path, tmp_path / "r" / run.spec.run_id))
    spec = codec.read_plain_json(folder / "spec.json")
    codec.write_json(folder / "spec.json", spec | {"shards": str(tmp_path / "gone")})
    made = export_model(folder, tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    assert made.check.on.startswith("random tokens") and made.check.bpb is None
    assert "unknown: the shards are not where they were" in card and "From the end-of-text token" in card


def test_backticks_and_control_characters_do_not_break_the_card() -> None:
    shown = sample_texts((checking.Sample(how="greedy", prompt="```py\n", text="x\x00\x1b[31m````"),))
    assert shown[1].startswith("`````text\n") and shown[1].endswith("\n`````")
    assert "\x00" not in shown[1] and "\x1b" not in shown[1]


# ------------------------------------------------------------------------------------------------------------- the verb


def test_the_verb(run, tmp_path: Path, capsys) -> None:
    assert cli.main(["export", str(run.folder.path), "--out", str(tmp_path / "out"), "--json", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    plain = json.loads(told.out)
    assert "loading it again" in told.err and told.err.count("\n") == 1
    assert plain["folder"] == str(tmp_path / "out") and plain["check"]["whole"] is True
    assert cli.main(["export", str(run.folder.path), "--out", str(tmp_path / "out"), "--at", "7"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"homelab export: {run.spec.run_id} has no checkpoint at 7; rows: 1280, 2560; states between: "
        f"{', '.join(sorted(p.name for p in run.folder.checkpoints.glob('u*')))}\n"
    )
    assert cli.main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


def test_lm_eval_takes_the_folder(run, tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="the extra [eval] is not installed")
    from lm_eval.api.instance import Instance

    export_model(run.folder.path, tmp_path / "out", device="cpu")
    model = huggingface.HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2)
    asked = Instance(request_type="loglikelihood", doc={}, arguments=("Chapter 3. the", " 3 cats"), idx=0)
    ((logprob, greedy),) = model.loglikelihood([asked], disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Chapter 3. the 3 cats", return_tensors="pt")["input_ids"]
    n = len(tokenizer("Chapter 3. the")["input_ids"])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits[0].log_softmax(-1)
    wanted = sum(logits[i - 1, ids[0, i]].item() for i in range(n, ids.shape[1]))
    assert logprob == pytest.approx(wanted, abs=1e-3) and isinstance(greedy, bool)
