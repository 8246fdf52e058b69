"""Tasks of lm-evaluation-harness: each document has its value, in whatever pieces it is asked; bad names and files."""

import json
import random
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asked import CONTEXT, WORDS, sentences, sitting, tiny_model

from homelab_scaling.errors import DataError, HomelabError, MachineError, SpecError
from homelab_scaling.evals import catalogue as module
from homelab_scaling.evals.catalogue import Catalogue
from homelab_scaling.evals.known import HARNESS
from homelab_scaling.evals.local import read_task
from homelab_scaling.evals.results import Outcome

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'homelab_scaling[eval]'")

# Not ours: what lm-eval's dependencies warn of when they are imported or called.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from homelab_scaling.evals.harness import HarnessTask, Loaded, Options, wrap  # noqa: E402

N = 12
Row = dict[str, Any]


def rows(form: str, n: int = N) -> list[Row]:
    rng, words = random.Random(form), WORDS.split()
    made: list[Row] = []
    for i, text in enumerate(sentences(n, seed=7)):
        one: Row = {"text": text * (1 + i % 4)}
        if form == "choices":
            k = 2 + i % 3
            choices = [" ".join(rng.sample(words, 1 + i % 2)) for _ in range(k)]
            one = {"context": text if i else "", "choices": choices, "answer": rng.randrange(k), "id": i}
        elif form == "target":
            one = {"prompt": text, "target": f" {rng.choice(words)}"}
        elif form == "answer":
            one = {"prompt": text, "answer": rng.choice(words)}
        made.append(one)
    return made


def write_jsonl(path: Path, lines: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("model"))


def simple(
    part: Any, model: Any, *, batch_seqs: int, shots: int | None, limit: int | None, cap: int | None
) -> list[Row]:
    """What lm-eval itself says of every document."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        wrap(model, batch_seqs),
        tasks=[part],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=shots,
        limit=limit,
        gen_kwargs={"max_gen_toks": cap} if cap is not None else None,
        bootstrap_iters=0,
    )
    assert found is not None
    (samples,) = found["samples"].values()
    return samples


def asked_in_pieces(task: HarnessTask, model: Any, sizes: tuple[int, ...]) -> list[Outcome]:
    documents, found = list(task.documents()), []
    for size in sizes:
        piece, documents = documents[:size], documents[size:]
        found += task.ask(model, piece)
    return found + (task.ask(model, documents) if documents else [])


# ------------------------------------------------------------------------------------------------------- lm-eval's own


@pytest.mark.parametrize(
    ("form", "shots"), [("text", None), ("choices", 0), ("choices", 2), ("target", 1), ("answer", 1)]
)
def test_each_document_s_number_is_lm_eval_s_own(tmp_path: Path, model: Any, form: str, shots: int | None) -> None:
    path = write_jsonl(tmp_path / f"{form}.jsonl", rows(form))
    (loaded,) = Catalogue().load(str(path))
    options = Options(shots=shots, limit=10, max_new_tokens=6, batch_seqs=3)
    task = HarnessTask(loaded, options, context_tokens=CONTEXT)
    found = asked_in_pieces(task, model, (1, 4, 2))
    (again,) = Catalogue().load(str(path))
    cap = 6 if form == "answer" else None
    samples = simple(again.parts[0], model, batch_seqs=5, shots=shots, limit=10, cap=cap)
    assert [outcome.doc_id for outcome in found] == [str(sample["doc_id"]) for sample in samples] and len(found) == 10
    for outcome, sample in zip(found, samples, strict=True):
        if form == "text":
            assert outcome.value == pytest.approx(-sample["bits_per_byte"][0], rel=1e-6)
            assert outcome.weight == sample["bits_per_byte"][1] == len(sample["doc"]["text"].encode())
        elif form == "choices":
            assert (outcome.value, outcome.also["acc"]) == (sample["acc_norm"], sample["acc"])
        elif form == "target":
            assert outcome.value == sample["acc"]
            assert outcome.also["nats"] == pytest.approx(-sample["perplexity"], rel=1e-5)
        else:
            assert outcome.value == sample["exact_match"]
    expected = {"text": "bits_per_byte", "choices": "acc_norm", "target": "acc", "answer": "exact_match"}[form]
    assert task.metric == expected and task.settings["shots"] == (shots or 0) and task.settings["limit"] == 10


def test_generated_answers_are_lm_eval_s_own(tmp_path: Path, model: Any) -> None:
    """Exact match alone would also agree if every answer were wrong: a random model answers nothing right."""
    lines = rows("answer")
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    (loaded,) = Catalogue().load(str(path))
    cap = {"cap": 8, "shots": 0, "limit": None}
    said = [sample["filtered_resps"][0] for sample in simple(loaded.parts[0], model, batch_seqs=4, **cap)]
    assert len(set(said)) > 1
    right = [line | {"answer": text.strip() or "x"} for line, text in zip(lines, said, strict=True)]
    clean = [line for line in right if "\n" not in line["answer"]]
    (loaded,) = Catalogue().load(str(write_jsonl(tmp_path / "b.jsonl", clean)))
    task = HarnessTask(loaded, Options(max_new_tokens=8), context_tokens=CONTEXT)
    values = [outcome.value for outcome in task.ask(model, task.documents())]
    assert sum(values) >= len(values) - 2, "those that end with blanks are told apart"


def test_chance_settings_and_texts(tmp_path: Path, model: Any) -> None:
    lines = rows("choices")
    (loaded,) = Catalogue().load(str(write_jsonl(tmp_path / "c.jsonl", lines)))
    task = HarnessTask(loaded, Options(), context_tokens=CONTEXT)
    assert task.kind == "share" and task.chance == pytest.approx(sum(1 / len(x["choices"]) for x in lines) / N)
    assert task.settings["normalisation"] == "characters of the choice"
    assert str(task.settings["harness"]).startswith("lm-eval 0.4")
    text = task.documents()[1].text
    assert text.startswith(lines[1]["context"]) and text.endswith(lines[1]["choices"][lines[1]["answer"]])
    other = HarnessTask(loaded, Options(limit=5), context_tokens=CONTEXT)
    assert len(other.documents()) == 5 and other.settings["questions"] != task.settings["questions"]
    for change in ({"context": "Another question"}, {"answer": 1 - lines[-1]["answer"] % 2}):
        changed = write_jsonl(tmp_path / "c.jsonl", [*lines[:-1], lines[-1] | change])
        again = HarnessTask(Catalogue().load(str(changed))[0], Options(), context_tokens=CONTEXT)
        assert again.settings["questions"] != task.settings["questions"], "what was asked before is not reused"


def test_a_prompt_that_does_not_fit_is_said(tmp_path: Path, model: Any) -> None:
    (loaded,) = Catalogue().load(str(write_jsonl(tmp_path / "c.jsonl", rows("choices"))))
    task = HarnessTask(loaded, Options(shots=6), context_tokens=CONTEXT)
    outcomes = task.ask(model, task.documents())
    assert all(outcome.also["cut"] == 1 for outcome in outcomes)
    choices = [len(asked.instances) for asked in task._requests.values()]
    assert [outcome.n_tokens for outcome in outcomes] == [CONTEXT * n for n in choices]
    score = replace(sitting(tmp_path / "m"), model=model).evaluate(task)
    said = "100% of the prompts are longer than the context of 64 tokens and lost their beginning, so not all of the 6"
    assert any(warning.startswith(said) for warning in score.warnings), score.warnings
    short = HarnessTask(loaded, Options(shots=0), context_tokens=CONTEXT)
    assert any(outcome.also["cut"] == 0 for outcome in short.ask(model, short.documents()))


def test_an_answer_longer_than_the_context_is_one_sentence(tmp_path: Path, model: Any) -> None:
    long = {"context": "a", "choices": ["b " * 100, "c"], "answer": 0}
    (loaded,) = Catalogue().load(str(write_jsonl(tmp_path / "c.jsonl", [long])))
    task = HarnessTask(loaded, Options(), context_tokens=CONTEXT)
    with pytest.raises(DataError, match=r"an answer of \d+ tokens is longer than the context of 64 that tiny has"):
        task.ask(model, task.documents())


def test_an_answer_leaves_half_of_the_context_to_the_prompt(tmp_path: Path, model: Any) -> None:
    (loaded,) = Catalogue().load(str(write_jsonl(tmp_path / "a.jsonl", rows("answer"))))
    task = HarnessTask(loaded, Options(max_new_tokens=10_000), context_tokens=CONTEXT)
    assert task.settings["max_new_tokens"] == CONTEXT // 2
    assert len(task.ask(model, task.documents()[:2])) == 2
    longer = HarnessTask(loaded, Options(max_new_tokens=100), context_tokens=4 * CONTEXT)
    assert longer.settings["max_new_tokens"] == 100
    own = HarnessTask(loaded, Options(), context_tokens=4 * CONTEXT)
    assert own.settings["max_new_tokens"] == 32, "the task's own, whatever models before it were given"


# ----------------------------------------------------------------------------------------------------------- YAML tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: "{{{{answer}}}}"
num_fewshot: {shots}
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two YAML tasks and a group of them, their data beside them; datasets' own cache in the test's folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    for name in ("first", "second"):
        write_jsonl(tasks / "data" / f"{name}.jsonl", [row | {"name": name} for row in rows("choices")])
        yaml = TASK.format(name=name, data=f"data/{name}.jsonl", shots="null" if name == "first" else 0)
        (tasks / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    (tasks / "both.yaml").write_text("group: both\ntask:\n  - first\n  - second\n", encoding="utf-8")
    return tasks


@pytest.mark.parametrize("how", ["file", "name"])
def test_a_yaml_task_finds_the_data_beside_it(folder: Path, model: Any, how: str) -> None:
    (loaded,) = Catalogue((folder,)).load("first") if how == "name" else Catalogue().load(str(folder / "first.yaml"))
    task = HarnessTask(loaded, Options(shots=2), context_tokens=CONTEXT)
    assert (task.name, task.metric, task.settings["version"], task.shots) == ("first", "acc", "2.0", 2)
    found = task.ask(model, task.documents())
    (again,) = Catalogue((folder,)).load("first")
    samples = simple(again.parts[0], model, batch_seqs=8, shots=2, limit=None, cap=None)
    assert [outcome.value for outcome in found] == [sample["acc"] for sample in samples]


def test_shots_that_a_task_forbids_stay_0(folder: Path) -> None:
    (loaded,) = Catalogue((folder,)).load("second")
    assert HarnessTask(loaded, Options(shots=2), context_tokens=CONTEXT).shots == 0, "as lm-eval decides it"


def test_a_group_is_one_task_of_all_its_documents(folder: Path, model: Any) -> None:
    (loaded,) = Catalogue((folder,)).load("both")
    task = HarnessTask(loaded, Options(limit=3), context_tokens=CONTEXT)
    ids = [document.doc_id for document in task.documents()]
    assert ids == [f"{name}/{i}" for name in ("first", "second") for i in range(3)] and task.settings["parts"] == 2
    values = {outcome.doc_id: outcome.value for outcome in task.ask(model, task.documents()[::-1])}
    for name in ("first", "second"):
        (one,) = Catalogue((folder,)).load(name)
        alone = HarnessTask(one, Options(limit=3), context_tokens=CONTEXT)
        for outcome in alone.ask(model, alone.documents()):
            assert values[f"{name}/{outcome.doc_id}"] == outcome.value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("metric: acc", "metric: f1"), r"scored by f1, which is no mean over documents"),
        (("doc_to_choice: choices", "doc_to_choice: nowhere"), r"first: lm-eval cannot make this task"),
        (("data/first.jsonl", "data/none.jsonl"), r"first: lm-eval cannot make this task"),
        (("task: first", "nothing: first"), r"first\.yaml: lm-eval cannot read this task"),
        (("task: first", "task: [first"), r"first\.yaml: lm-eval cannot read this task"),
    ],
)
def test_a_bad_yaml_task_is_one_sentence(folder: Path, change: tuple[str, str], said: str) -> None:
    path = folder / "first.yaml"
    text = path.read_text().replace(*change)
    path.write_text(text.replace("aggregation: mean", "aggregation: f1") if "f1" in change[1] else text)
    with pytest.raises(HomelabError, match=said) as caught:
        for loaded in Catalogue().load(str(path)):
            HarnessTask(loaded, Options(), context_tokens=CONTEXT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# ---------------------------------------------------------------------------------------------------------- JSONL files


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "a"}\n{"text": }\n', r"t\.jsonl, line 2: is not JSON"),
        ('{"text": "a"}\n\n{"text": ""}\n', r"line 3: text wants text that is not empty, found ''"),
        (
            '{"text": "a"}\n{"prompt": "a", "target": "b"}\n',
            r"line 2: has prompt, target, the lines before",
        ),
        ('{"question": "a"}\n', r"line 1: has question; wants one of \{text\}, \{context, choices, answer\}"),
        ('["a"]\n', r"line 1: wants an object such as"),
        ('{"text": "a", "prompt": "a", "target": "b"}\n', r"line 1: is of several forms at once"),
        ('{"context": "a", "choices": ["b"], "answer": 0}\n', r"line 1: choices wants two texts or more"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}\n', r"line 1: choices wants two texts or more"),
        (
            '{"context": "a", "choices": ["b", "c"], "answer": 2}\n',
            r"answer wants the place .* 0 to 1, found 2",
        ),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}\n', r"line 1: answer wants the place"),
        ('{"context": 3, "choices": ["b", "c"], "answer": 1}\n', r"line 1: context wants text, found 3"),
        ('{"prompt": "a", "answer": " b"}\n', r"line 1: answer wants one line without blanks around it"),
        ("\n \n", r"t\.jsonl: holds no line; a line is one of"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_task(path)


def test_a_jsonl_file_must_be_there_and_be_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        Catalogue().load(str(tmp_path / "none.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl: not UTF-8 text \(byte 10\)"):
        Catalogue().load(str(tmp_path / "b.jsonl"))


# ---------------------------------------------------------------------------------------------------- names and the hub


@pytest.mark.slow  # the index of all of lm-eval's tasks
def test_a_task_that_does_not_exist_is_told_by_its_neighbours(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no task 'hellaswagg'; did you mean .*hellaswag"):
        Catalogue().load("hellaswagg")
    with pytest.raises(SpecError, match=r"there is no task 'frist'; did you mean first"):
        Catalogue((folder,)).load("frist")
    with pytest.raises(SpecError, match=r"there is no task 'zzzzzzzzzz'; `homelab eval --list` names"):
        Catalogue().load("zzzzzzzzzz")
    with pytest.raises(SpecError, match=r"--include .*none: wants a folder of YAML tasks"):
        Catalogue((folder / "none",))
    with pytest.raises(SpecError, match=r"none\.yaml: no such file"):
        Catalogue().load(str(folder / "none.yaml"))


@pytest.mark.parametrize("name", ["blimp", "piqa"])  # a group and a task
def test_offline_a_usual_task_says_so_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(MachineError, match=rf"{name}: its data {HARNESS[name].data} are not in the cache and HF_HUB_"):
        Catalogue().load(name)
    assert time.monotonic() - began < 10


def test_a_hub_that_does_not_answer_is_found_out_in_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that takes the connection and says nothing, as a firewall does."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
        for place in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
            monkeypatch.setattr(place, False)
        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        monkeypatch.setattr(module, "PATIENCE_S", 0.5)
        monkeypatch.setattr(module, "hub_answers", lambda: hub_answers(0.5))
        with pytest.raises(MachineError, match=r"piqa: its data .* are not in the cache and the hub cannot be reached"):
            Catalogue().load("piqa")
        from datasets import config

        assert config.HF_HUB_OFFLINE is False, "as it was before"


hub_answers: Callable[[float], bool] = module.hub_answers


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(
        MachineError, match=r"lm-evaluation-harness is not installed.*pip install 'homelab_scaling\[eval\]'"
    ):
        Catalogue().load("hellaswag")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, model: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer)
    with pytest.raises(SpecError, match=r"tiny: its tokenizer has no token that begins or ends a text"):
        wrap(replace(model, tokenizer=bare, eot_id=None))


def test_a_task_for_what_no_text_model_has_is_refused(model: Any) -> None:
    class Part:
        MULTIMODAL, UNSAFE_CODE = False, True

    with pytest.raises(SpecError, match=r"humaneval runs code that the model writes"):
        HarnessTask(Loaded(name="humaneval", parts=(Part(),)), Options(), context_tokens=CONTEXT)
