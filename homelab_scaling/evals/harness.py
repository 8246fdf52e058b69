"""Tasks of lm-evaluation-harness, asked in pieces: the same requests, the same answers, the same value a document.

lm-eval makes the requests of a task in one go, because the examples in a prompt are drawn from one stream of random
numbers; only what is asked together is ours. It is imported when a task of it is wanted.
"""

import contextlib
import hashlib
import io
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from homelab_scaling.errors import DataError, SpecError
from homelab_scaling.evals.results import Document, Kind, Outcome, Setting
from homelab_scaling.evals.sitting import CUT
from homelab_scaling.export.convert import Portable
from homelab_scaling.export.hf_tokenizer import quiet_transformers

FEWSHOT_SEED = 1234
"""As `lm_eval.simple_evaluate` has it."""
PREFERRED = ("acc_norm", "acc", "exact_match", "bits_per_byte", "perplexity")
"""The first of a task's metrics among these is its score, the others stand beside it."""
RIGHT_OR_WRONG = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"})
NORMALISATION = {"acc_norm": "characters of the choice", "acc_bytes": "bytes of the choice", "acc": "none"}
MAX_NEW_TOKENS = 256
"""As lm-eval has it where a task says nothing."""
BATCH_SEQS = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user may change of a task."""

    shots: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_seqs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A task, or the tasks of a group, as lm-eval made them."""

    name: str
    parts: tuple[Any, ...]
    """lm_eval.api.task.Task."""
    default_shots: int | None = None
    """Of ours, where the task says nothing."""

    @cached_property
    def own(self) -> tuple[tuple[int | None, int | None], ...]:
        """(shots, most new tokens) that each part says itself; looked up before any model's are set."""
        return tuple(
            (part.get_config("num_fewshot"), (part.get_config("generation_kwargs") or {}).get("max_gen_toks"))
            for part in self.parts
        )


class HarnessTask:
    """A task, or a group of tasks as one, for one model.

    Raises:
        SpecError: no metric of it is a mean over documents, or it wants what no text model has.
    """

    def __init__(self, loaded: Loaded, options: Options, *, context_tokens: int) -> None:
        self.name, self.parts, self.options = loaded.name, loaded.parts, options
        self.context_tokens = context_tokens
        self.metric, self.others = _metrics(loaded)
        self._source = self.metric
        first = self.parts[0]
        aggregation = _aggregation(first, self.metric)
        self.kind: Kind = "mean"
        if aggregation == "bits_per_byte":
            self.kind = "bits per byte"
        elif aggregation == "perplexity":
            self.metric = "nats"
        elif self.metric in RIGHT_OR_WRONG and not callable(first.config.process_results):
            self.kind = "share"
        self.higher_is_better = bool(first.higher_is_better()[self._source]) and self.metric != "nats"
        self.filter = first._filters[0].name
        self.max_new_tokens: int | None = None
        for part, (shots, new_tokens) in zip(self.parts, loaded.own, strict=True):
            self._configure(part, shots, loaded.default_shots, new_tokens)
        self._lm: tuple[int, Any] | None = None

    def _configure(self, part: Any, own: int | None, default: int | None, new_tokens: int | None) -> None:
        """Shots as lm-eval decides them; a cap on what is generated, so that the prompt keeps half of the context."""
        wanted = self.options.shots if self.options.shots is not None else default
        if own == 0 or wanted is None:
            wanted = own or 0
        part.set_config(key="num_fewshot", value=wanted)
        if part.OUTPUT_TYPE == "generate_until":
            asked = self.options.max_new_tokens or new_tokens or MAX_NEW_TOKENS
            self.max_new_tokens = max(1, min(asked, self.context_tokens // 2))
            part.set_config(key="generation_kwargs", value={"max_gen_toks": self.max_new_tokens}, update=True)

    @property
    def shots(self) -> int:
        return int(self.parts[0].get_config("num_fewshot") or 0)

    @cached_property
    def _requests(self) -> "dict[str, _Asked]":
        """By document: its task, and its requests in their order."""
        found: dict[str, _Asked] = {}
        for part in self.parts:
            part.set_fewshot_seed(seed=FEWSHOT_SEED)
            with quiet():
                part.build_all_requests(limit=self.options.limit, rank=0, world_size=1)
            prefix = f"{part.config.task}/" if len(self.parts) > 1 else ""
            for instance in part.instances:
                doc_id = f"{prefix}{instance.doc_id}"
                found.setdefault(doc_id, _Asked(part=part, doc=instance.doc)).instances.append(instance)
        for asked in found.values():
            asked.instances.sort(key=lambda instance: instance.idx)
        return found

    @cached_property
    def chance(self) -> float | None:
        """Of a multiple choice, from the number of its choices; None elsewhere."""
        if self.kind != "share" or any(part.OUTPUT_TYPE != "multiple_choice" for part in self.parts):
            return None
        shares = []
        for asked in self._requests.values():
            right = asked.part.doc_to_target(asked.doc)
            n = len(asked.instances) // (2 if "acc_mutual_info" in asked.part.aggregation() else 1)
            shares.append((len(right) if isinstance(right, list) else 1) / n)
        return sum(shares) / len(shares)

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Everything that changes the number, the questions themselves (prompts, choices, answers) by their hash."""
        from lm_eval import __version__

        part = self.parts[0]
        digest = hashlib.sha256()
        for doc_id, asked in self._requests.items():
            digest.update(repr((doc_id, asked.doc, [instance.args for instance in asked.instances])).encode())
        found: dict[str, Setting] = {
            "harness": f"lm-eval {__version__}",
            "version": str(part.VERSION),
            "shots": self.shots,
            "limit": self.options.limit,
            "questions": digest.hexdigest()[:12],
        }
        if len(self.parts) > 1:
            found["parts"] = len(self.parts)
        if self.shots:
            found["fewshot_seed"] = FEWSHOT_SEED
        if self.metric in NORMALISATION and part.OUTPUT_TYPE == "multiple_choice":
            found["normalisation"] = NORMALISATION[self.metric]
        if self.filter != "none":
            found["filter"] = self.filter
        if self.max_new_tokens is not None:
            found["max_new_tokens"] = self.max_new_tokens
        return found

    def documents(self) -> list[Document]:
        """Every item, up to the limit (of each task of a group), named by lm-eval's own number."""
        return self._documents

    @cached_property
    def _documents(self) -> list[Document]:
        return [Document(doc_id=doc_id, text=_text_of(asked)) for doc_id, asked in self._requests.items()]

    def ask(self, model: Portable, documents: Sequence[Document]) -> list[Outcome]:
        """Asks the requests of some documents together, and lets the task judge the answers."""
        asked = [self._requests[document.doc_id] for document in documents]
        lm = self._model(model)
        with quiet(), quiet_transformers():  # of texts longer than the context, which are read in windows
            lengths = _answer(lm, [instance for one in asked for instance in one.instances])
        return [self._judge(document.doc_id, one, lengths) for document, one in zip(documents, asked, strict=True)]

    def _model(self, model: Portable) -> Any:
        if self._lm is None or self._lm[0] != id(model):
            self._lm = (id(model), wrap(model, self.options.batch_seqs))
        return self._lm[1]

    def _judge(self, doc_id: str, asked: "_Asked", lengths: "dict[int, _Length]") -> Outcome:
        part = asked.part
        for one in part._filters:
            one.apply(asked.instances)
        values: dict[str, Any] = {}
        for one in part._filters:
            answers = [instance.filtered_resps[one.name] for instance in asked.instances]
            for metric, value in part.process_results(asked.doc, answers).items():
                values[metric if one.name == self.filter else f"{metric},{one.name}"] = value
        n_each = [lengths[id(instance)] for instance in asked.instances]
        in_context = part.OUTPUT_TYPE != "loglikelihood_rolling"  # a rolling text is read in windows, all of it
        for instance in asked.instances:  # a hundred thousand of them are kept until the task is done
            instance.resps, instance.filtered_resps = [], {}
        value, weight = self._value(values.pop(self._source))
        also = {name: float(values[name]) for name in values if self._is_plain(name, values[name])}
        if "perplexity" in values and self._source != "perplexity":
            also["nats"] = -float(values["perplexity"])
        if in_context:
            also[CUT] = float(any(n.prompt > self._room for n in n_each))
        return Outcome(
            doc_id=doc_id,
            value=value,
            weight=weight,
            n_tokens=sum(min(n.passed, self.context_tokens) if in_context else n.passed for n in n_each),
            also=also,
        )

    @property
    def _room(self) -> int:
        """Tokens that a prompt may have: with its answer where that is scored, before it where it is generated."""
        return self.context_tokens - (self.max_new_tokens or 0)

    def _value(self, found: Any) -> tuple[float, float]:
        """Value and weight of what lm-eval calls this metric of one document."""
        if self.kind == "bits per byte":
            log_probability, n_bytes = found
            return -float(log_probability), float(n_bytes)
        return (-float(found) if self.metric == "nats" else float(found)), 1.0

    def _is_plain(self, name: str, value: Any) -> bool:
        return name.partition(",")[0] in {*self.others, self._source} and isinstance(value, int | float)


@dataclass(kw_only=True)
class _Asked:
    """A document's requests."""

    part: Any
    doc: Any
    instances: list[Any] = field(default_factory=list)


def _metrics(loaded: Loaded) -> tuple[str, tuple[str, ...]]:
    """The task's own metric, and those beside it that are means."""
    for part in loaded.parts:
        if getattr(part, "MULTIMODAL", False):
            raise SpecError(f"{loaded.name} wants pictures or sound; a language model of text cannot be asked")
        if getattr(part, "UNSAFE_CODE", False):
            raise SpecError(f"{loaded.name} runs code that the model writes; that is not done here")
    names = list(loaded.parts[0].aggregation())
    if any(set(part.aggregation()) != set(names) for part in loaded.parts):
        raise SpecError(f"the tasks of {loaded.name} are scored in different ways; name them one by one")
    fits = {name: _aggregation(loaded.parts[0], name) for name in names}
    means = tuple(name for name, how in fits.items() if how in ("mean", "nanmean"))
    usable = [*means, *(name for name, how in fits.items() if how in ("bits_per_byte", "perplexity"))]
    if not usable:
        raise SpecError(
            f"{loaded.name} is scored by {', '.join(names)}, which is no mean over documents; ask lm-eval itself"
        )
    main = next((name for name in PREFERRED if name in usable), usable[0])
    return main, tuple(name for name in means if name != main)


def _aggregation(part: Any, metric: str) -> str:
    return str(getattr(part.aggregation()[metric], "__name__", ""))


def _text_of(asked: _Asked) -> str:
    """What is looked for in training text: the question as the task puts it, and its right answer."""
    part, doc = asked.part, asked.doc
    target, choices = part.doc_to_target(doc), None
    if part.OUTPUT_TYPE == "loglikelihood_rolling":
        return str(target)
    if part.config.doc_to_choice is not None:
        choices = part.doc_to_choice(doc)
    question = None
    if part.config.should_decontaminate:
        with contextlib.suppress(Exception):  # a template of a task's author
            question = part.doc_to_decontamination_query(doc)
    if not isinstance(question, str):
        question = part.doc_to_text(doc)
    if isinstance(question, int) and choices is not None:  # of tasks that choose among contexts
        question = choices[question]
    elif choices is not None:
        target = target[0] if isinstance(target, list) and target else target
        target = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
    target = target[0] if isinstance(target, list) and target else target
    question, target = str(question), str(target)
    return question if target in question else f"{question.rstrip()} {target.lstrip()}"


# ------------------------------------------------------------------------------------------------------------ the model


def wrap(model: Portable, batch_seqs: int | None = None) -> Any:
    """lm-eval's view of a model, which notes how many tokens each request has.

    Raises:
        SpecError: the tokenizer has no token that begins a text.
    """
    from lm_eval.models.huggingface import HFLM

    class Noted(HFLM):  # type: ignore[misc]
        """HFLM without its progress bars."""

        lengths: list[int] | None = None

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise DataError(
                    f"an answer of {longest} tokens is longer than the context of {self.max_length} that {model.name} "
                    "has, so its probability cannot be told; leave this task out for this model"
                )
            if self.lengths is not None:
                self.lengths += [len(context) + len(continuation) - 1 for _, context, continuation in requests]
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    tokenizer: Any = model.tokenizer
    begins = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prefix = model.eot_id if begins is None else None
    if begins is None and prefix is None:
        raise SpecError(
            f"{model.name}: its tokenizer has no token that begins or ends a text, without which nothing can be asked; "
            "set bos_token or eos_token in its tokenizer_config.json"
        )
    kind = model.device.partition(":")[0]
    with quiet():
        return Noted(
            pretrained=model.model,
            tokenizer=tokenizer,
            max_length=model.context_tokens,
            batch_size=batch_seqs or BATCH_SEQS.get(kind, BATCH_SEQS["cuda"]),
            prefix_token_id=prefix,
        )


@dataclass(frozen=True, slots=True)
class _Length:
    """Tokens of a request."""

    prompt: int
    passed: int
    """Of the prompt and what was generated after it."""


def _answer(lm: Any, instances: list[Any]) -> dict[int, _Length]:
    """Puts the model's responses into the requests; the tokens of each, by id."""
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for instance in instances:
        instance.resps = []
        by_kind[instance.request_type].append(instance)
    lengths: dict[int, _Length] = {}
    for kind, some in by_kind.items():
        repeated = [instance for instance in some for _ in range(instance.repeats or 1)]
        responses, counted = _respond(lm, kind, repeated)
        for instance, response, length in zip(repeated, responses, counted, strict=True):
            instance.resps.append(response)
            before = lengths.get(id(instance))
            passed = length.passed + (before.passed if before is not None else 0)
            lengths[id(instance)] = _Length(prompt=length.prompt, passed=passed)
    return lengths


def _respond(lm: Any, kind: str, instances: list[Any]) -> tuple[list[Any], list[_Length]]:
    """Responses and tokens of requests of one kind; with half the batch after each failure for want of memory."""
    import torch

    while True:
        try:
            lm.lengths = [] if kind == "loglikelihood" else None
            responses = getattr(lm, kind)(instances, disable_tqdm=True)
            break
        except torch.OutOfMemoryError:
            if lm.batch_size_per_gpu == 1:
                raise
            lm.batch_size_per_gpu //= 2
            torch.cuda.empty_cache()
    if kind == "loglikelihood":
        return responses, [_Length(prompt=n, passed=n) for n in lm.lengths]
    prompts = [len(lm.tok_encode(instance.args[0])) for instance in instances]
    new = [len(lm.tok_encode(said)) if kind == "generate_until" else 0 for said in responses]
    return responses, [_Length(prompt=n, passed=n + more) for n, more in zip(prompts, new, strict=True)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval's bars and notes off the screen; what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
