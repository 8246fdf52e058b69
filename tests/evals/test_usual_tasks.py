"""The usual tasks as lm-evaluation-harness defines them, over data of their form made here: no hub is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from asked import CONTEXT, sentences, tiny_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'homelab_scaling[eval]'")

from homelab_scaling.evals.harness import HarnessTask, Loaded, Options, wrap
from homelab_scaling.evals.known import HARNESS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

N = 14
FILES = {"blimp": "adjunct_island"}
"""Of a group, one of its tasks."""
EXPECTED = {
    "hellaswag": ("acc_norm", "share", 10, 0.25),
    "gsm8k": ("exact_match", "share", 5, None),
    "truthfulqa_mc2": ("acc", "mean", 0, None),
    "lambada_openai": ("acc", "share", 0, None),
    "blimp": ("acc", "share", 0, 0.5),
    "piqa": ("acc_norm", "share", 0, 0.5),
}
"""Metric, kind, shots and chance."""


def row(name: str, i: int) -> dict[str, Any]:
    """A row with the columns of the data set."""
    a, b, c, d = (text[:60] for text in sentences(4, seed=i))
    return {
        "hellaswag": {"ctx_a": a, "ctx_b": b, "activity_label": "Cats", "endings": [c, d, a, b], "label": str(i % 4)},
        "gsm8k": {"question": f"{a} How many?", "answer": f"{b}\n#### {i}"},
        "truthfulqa_mc2": {
            "question": a,
            "mc1_targets": {"choices": [b, c], "labels": [1, 0]},
            "mc2_targets": {"choices": [b, c, d], "labels": [1, 0, i % 2]},
        },
        "lambada_openai": {"text": a},
        "blimp": {"sentence_good": a, "sentence_bad": b, "UID": "x"},
        "piqa": {"goal": a, "sol1": b, "sol2": c, "label": i % 2},
    }[name]


def as_defined(name: str, folder: Path) -> Any:
    """The task of lm-eval's own YAML over rows of ours."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row(name, i)) + "\n" for i in range(N)), encoding="utf-8")
    path = Path(lm_eval.__file__).parent / "tasks" / HARNESS[name].folder / f"{FILES.get(name, name)}.yaml"
    config = load_yaml(path, resolve_func=True)
    assert config["dataset_path"] == HARNESS[name].data, "what --list says"
    splits = ("train", "validation", "test")
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data) for split in splits}},
    }
    return ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", sorted(HARNESS))
def test_a_usual_task_has_its_usual_settings_and_lm_eval_s_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    known = HARNESS[name]
    loaded = Loaded(name=name, parts=(as_defined(name, tmp_path),), default_shots=known.shots)
    task = HarnessTask(loaded, Options(max_new_tokens=8), context_tokens=CONTEXT)
    assert (task.metric, task.kind, task.shots, task.chance) == EXPECTED[name] and task.metric == known.metric
    documents = task.documents()
    found = [*task.ask(model, documents[:5]), *task.ask(model, documents[5:])]
    # Its own copy, with the settings that lm-eval's command line would be given for the same numbers.
    done = simple_evaluate(
        wrap(model, 4),
        tasks=[as_defined(name, tmp_path)],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=known.shots,
        gen_kwargs={"max_gen_toks": 8} if known.generates else None,
        bootstrap_iters=0,
    )
    assert done is not None
    (samples,) = done["samples"].values()
    samples = [sample for sample in samples if sample["filter"] == task.filter]
    assert len(found) == len(samples) == N
    for outcome, sample in zip(found, samples, strict=True):
        assert outcome.value == pytest.approx(float(sample[known.metric]), rel=1e-5), outcome.doc_id
    if name == "lambada_openai":
        assert [o.also["nats"] for o in found] == pytest.approx([-s["perplexity"] for s in samples], rel=1e-5)
    if name == "gsm8k":
        assert task.settings["filter"] == "strict-match" and "exact_match,flexible-extract" in found[0].also
    if name in ("hellaswag", "piqa"):
        assert [outcome.also["acc"] for outcome in found] == [sample["acc"] for sample in samples]
