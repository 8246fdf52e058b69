"""The model card: what a stranger must know to use, judge or repeat a model; what is unknown says why."""

from collections.abc import Iterable

from homelab_scaling.export.check import Check, Sample
from homelab_scaling.export.law import Law
from homelab_scaling.export.trained import Trained, public_source
from homelab_scaling.fit.words import listed, short
from homelab_scaling.plan.counting import ParamCount, count_params
from homelab_scaling.report.bills import SOURCES
from homelab_scaling.report.words import duration, money
from homelab_scaling.runs import Row

TINY_PARAMS = 50e6
"""Below it a model says little that makes sense, whatever its loss."""
VLLM_HEAD_MULTIPLE = 8
"""Of the width of a head, in vLLM's attention kernels."""


# ------------------------------------------------------------------------------------------------------------- the card


def write_card(trained: Trained, *, dtype: str, check: Check, samples: tuple[Sample, ...], law: Law | str) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(trained),
        f"# {trained.name}",
        _what(trained, check),
        "## How to use it",
        *_usage(trained, dtype),
        "## What it says",
        *sample_texts(samples),
        "## How it was trained",
        _table(_training(trained)),
        "## The text",
        _table(_text(trained)),
        *_mixture(trained),
        "## How good it is",
        _table(_loss(trained, check, dtype)),
        "## The law of its lab",
        _law(trained, law),
        "## What it cost",
        _table(_cost(trained)),
        "## Limits",
        "\n".join(f"- {one}" for one in _limits(trained)),
        "## Where it comes from",
        _table(_provenance(trained)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(trained: Trained) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    base = trained.spec.execution.start_name or ""
    if trained.spec.science.start is not None and "/" in base:  # a model of the hub
        lines.insert(0, f"base_model: {base}")
    lines += [f"- {tag}" for tag in ("gpt2", "scaling-laws", "homelab_scaling")]
    return "\n".join(["---", *lines, "---"])


def _what(trained: Trained, check: Check) -> str:
    science, spec = trained.spec.science, trained.spec
    end = (
        "the finished model of this horizon: its learning rate has decayed."
        if trained.is_row
        else f"a state on the way (after {trained.checkpoint.update:,} updates, phase {trained.checkpoint.phase}): its "
        "learning rate has not decayed, so its loss is higher than that of a finished model."
    )
    began = "from random weights" if science.start is None else f"from the weights of {_start(trained)}"
    n, d = short(trained.n_params), short(trained.checkpoint.tokens)
    loss = ""
    if trained.row is not None:
        loss = f" Its loss on held-out text is {trained.row.loss_nats:.4f} nats per token."
    elif trained.corpus is not None:
        loss = f" Its loss on {check.on} is {check.loss_nats:.4f} nats per token."
    return (
        f"A GPT-2 of {n} parameters, trained {began} on {d} tokens as one point of the scaling-law ladder "
        f"`{spec.ladder}` (rung `{spec.rung}`). This is {end}{loss}"
    )


def _start(trained: Trained) -> str:
    name = f"`{trained.spec.execution.start_name}` " if trained.spec.execution.start_name else ""
    return f"{name}(SHA-256 {(trained.spec.science.start or '')[:12]})"


def _usage(trained: Trained, dtype: str) -> list[str]:
    context = trained.spec.science.shape.context_tokens
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\n'
        'inputs = tokenizer("...", return_tensors="pt")\n'
        f"output = model.generate(**inputs, max_new_tokens={min(64, context // 2)}, do_sample=True, "
        f"temperature=0.8, top_k=50)\n"
        "print(tokenizer.decode(output[0]))"
    )
    notes = (
        f"`DIR` is this folder. Weights are in {dtype}. Prompt and answer together hold at most {context:,} tokens: "
        "positions are learnt, there are no others. The tokenizer adds no token of its own, and of a text that spells "
        "out `<|endoftext|>` it takes the characters, as in training; append `tokenizer.eos_token_id` to end a "
        "document. lm-evaluation-harness takes the folder as it is: `lm_eval --model hf --model_args pretrained=DIR`. "
    )
    width = trained.spec.science.shape.d_model // trained.spec.science.shape.n_head
    if width % VLLM_HEAD_MULTIPLE == 0:
        served = "So should vLLM (`vllm serve DIR`), whose GPT-2 has the same names; that was not tried here."
    else:
        served = (
            f"The form is also what vLLM takes, but its attention kernels want heads whose width is a multiple of "
            f"{VLLM_HEAD_MULTIPLE}, and these are {width} wide."
        )
    return [f"```python\n{code}\n```", notes + served]


def sample_texts(samples: tuple[Sample, ...]) -> list[str]:
    """Each sample under a line that says how it was made, in a fence that its own backticks cannot close."""
    parts = []
    for one in samples:
        before = "From held-out text" if one.prompt else "From the end-of-text token"
        fence = "`" * max(3, *(len(run) + 1 for run in _runs_of_backticks(one.prompt + one.text)))
        shown = f"{fence}text\n{_visible(one.prompt)}⟪{_visible(one.text)}⟫\n{fence}"
        parts += [f"{before}, {one.how}; the model's own words stand in ⟪ ⟫:", shown]
    return parts


def _runs_of_backticks(text: str) -> list[str]:
    return ["", *("".join(c if c == "`" else " " for c in text).split())]


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


# ----------------------------------------------------------------------------------------------------------- its tables

Fact = tuple[str, str]


def _table(facts: Iterable[Fact]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    return "\n".join(["| | |", "|:--|:--|", *(f"| {cell(name)} | {cell(value)} |" for name, value in facts)])


def _training(trained: Trained) -> list[Fact]:
    science, shape = trained.spec.science, trained.spec.science.shape
    optim, schedule = science.optim, science.schedule
    groups: ParamCount = count_params(shape, science.n_vocab)
    head = "shares the embedding" if shape.tied else f"{groups.n_head:,}"
    decay = (
        f"constant, then decayed over the last {100 * schedule.decay_frac:.0f} % of the tokens (1 - sqrt)"
        if schedule.name == "wsd"
        else "one cosine"
    )
    tokens = trained.checkpoint.tokens
    n_steps = tokens // science.batch_tokens_global
    warm = f"; batch warm-up from {science.batch_warmup.from_tokens:,} tokens" if science.batch_warmup else ""
    return [
        (
            "architecture",
            f"GPT-2: {shape.n_layer} layers, width {shape.d_model}, {shape.n_head} heads, feed-forward "
            f"{4 * shape.d_model}, learnt positions, context {shape.context_tokens:,}",
        ),
        (
            "parameters N",
            f"{groups.n_params:,}: blocks {groups.n_body:,}, positions {groups.n_pos:,}, token embedding "
            f"{groups.n_embed:,}, output head {head}",
        ),
        ("began from", "random weights" if science.start is None else _start(trained)),
        ("tokens D", f"{tokens:,} ({tokens / groups.n_params:.3g} per parameter)"),
        (
            "training FLOPs",
            f"{trained.flops:.3g} (exact: causal attention, head included)"
            + ("; those behind the weights it began from are not known" if science.start is not None else ""),
        ),
        ("batch", f"{science.batch_tokens_global:,} tokens, {n_steps:,} steps{warm}"),
        (
            "learning rate",
            f"peak {schedule.lr_peak:.3g}, warm-up {schedule.warmup_tokens:,} tokens, {schedule.name}: "
            f"{decay} to {schedule.lr_final_frac:g} of the peak",
        ),
        (
            "optimizer",
            f"{optim.name}, betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}, weight decay "
            f"{optim.weight_decay:g} on matrices, gradients clipped at {optim.grad_clip:g}",
        ),
        ("precision", "bf16 (weights and optimizer in fp32)" if science.precision == "bf16" else "fp32"),
        ("dropout", "none"),
        ("seed", str(science.seed)),
        ("machine", _machine(trained)),
    ]


def _machine(trained: Trained) -> str:
    if trained.record is None:
        return "unknown: the run has no record.json"
    machine = trained.record.machine
    return f"{machine.n_processes} x {machine.device}" if machine.n_processes > 1 else machine.device


def _text(trained: Trained) -> list[Fact]:
    corpus = trained.corpus
    if corpus is None:
        why = f"unknown: the shards are not where they were; their data_id is {trained.checkpoint.data_id}"
        return [("text", why)]
    train, val = corpus.train, corpus.val
    near = "not looked for" if corpus.near_duplicates is None else f"at Jaccard {corpus.near_duplicates:g} and above"
    eot = "none: nothing tells documents apart" if corpus.eot_id is None else f"id {corpus.eot_id}"
    return [
        ("sources", listed([public_source(source) for source in corpus.sources])),
        ("training text", _half(train.n_tokens, train.n_bytes, train.n_documents)),
        ("seen by this model", _seen(trained)),
        ("held-out text", _half(val.n_tokens, val.n_bytes, val.n_documents)),
        ("how held out", corpus.held_out_rule),
        ("duplicates dropped", f"{corpus.n_duplicates_dropped:,} exact; near duplicates {near}"),
        ("tokenizer", f"`{public_source(corpus.tokenizer)}`, {corpus.n_vocab:,} ids, end of text {eot}"),
        ("data_id", f"`{corpus.data_id}` (losses with another one do not compare)"),
    ]


def _half(n_tokens: int, n_bytes: int | None, n_documents: int | None) -> str:
    of_bytes = f"{n_bytes:,} bytes" if n_bytes else "unknown number of bytes (the token files do not say)"
    documents = f"{n_documents:,} documents" if n_documents else "unknown number of documents"
    return f"{n_tokens:,} tokens, {of_bytes}, {documents}"


def _seen(trained: Trained) -> str:
    assert trained.corpus is not None
    passes = trained.checkpoint.tokens / trained.corpus.train.n_tokens
    unique = trained.corpus.unique_tokens(trained.checkpoint.tokens)
    return f"{trained.checkpoint.tokens:,} tokens, {passes:.3g} passes over it, {unique:,} of them different"


def _mixture(trained: Trained) -> list[str]:
    shares = trained.corpus.mixture if trained.corpus is not None else ()
    if not shares:
        return []
    total = sum(share.n_tokens for share in shares) or 1
    lines = [
        "| source | share of tokens | tokens | different tokens | times | documents |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for share in shares:
        cells = (f"{100 * share.n_tokens / total:.1f} %", f"{share.n_tokens:,}", f"{share.n_tokens_unique:,}")
        lines.append(
            f"| {public_source(share.name)} | {' | '.join(cells)} | {share.epochs:.3g} | {share.n_documents:,} |"
        )
    return ["\n".join(lines)]


def _loss(trained: Trained, check: Check, dtype: str) -> list[Fact]:
    row = trained.row
    if row is None:
        recorded = "unknown: " + (
            "the record does not have this row" if trained.is_row else "only finished rows are measured in full"
        )
    else:
        se = "" if row.loss_se_nats is None else f" ± {row.loss_se_nats:.4f} (standard error over documents)"
        recorded = f"{row.loss_nats:.4f}{se} nats per token, computed in {row.precision}"
    bpb = row.bpb if row is not None else check.bpb
    facts = [
        ("held-out loss, as recorded", recorded),
        ("bits per byte", "unknown: nobody counted the bytes behind the tokens" if bpb is None else f"{bpb:.4f}"),
        (
            "this folder",
            f"{check.loss_nats:.6f} nats on {check.on} ({check.n_tokens:,} tokens), computed in fp32 by "
            f"transformers; our own model with the same weights gives {check.loss_own_nats:.6f}",
        ),
    ]
    if dtype != "fp32":
        change = check.loss_nats - check.loss_fp32_nats
        facts.append((f"what {dtype} changes", f"{change:+.2g} nats against the weights in fp32"))
    facts.append(("seeds", "the seed alone moves small models by about 0.01 nats; this is one run"))
    return facts


def _law(trained: Trained, law: Law | str) -> str:
    if isinstance(law, str):
        return f"Unknown: {law}."
    forecast = law.forecast
    band = f" [{forecast.ci95[0]:.3f}, {forecast.ci95[1]:.3f}]" if forecast.ci95 else ""
    scatter = f"; single runs scatter around it by {100 * law.sigma_log:.1f} %" if law.sigma_log else ""
    row = trained.row
    beside = f", measured {row.loss_nats:.3f}" if row is not None else ""
    reach = "" if forecast.extrapolation <= 1 + 1e-7 else f" (x {forecast.extrapolation:.3g} outside what was measured)"
    inside = " It is one of the points behind the law." if row is not None else ""
    began = (
        " This model did not begin from random weights, which the law takes for granted."
        if trained.spec.science.start is not None
        else ""
    )
    return (
        f"`{law.name}`, {law.formula} (N: {law.count}), fitted to {law.n_points} points ({law.rows}): "
        f"{law.parameters}. At this N and D it says {forecast.loss_nats:.3f}{band} nats"
        f"{reach}{beside}{scatter}.{inside}{began}"
    )


def _cost(trained: Trained) -> list[Fact]:
    row = trained.row
    if row is None:
        return [("time, energy, money", "unknown: they are booked for finished rows")]
    unknown = trained.record.unknown if trained.record is not None else {}

    def said(column: str, shown: str | None) -> str:
        return shown if shown is not None else f"unknown: {unknown.get(column, 'the record does not say why')}"

    facts = [
        ("time", said("seconds", None if row.seconds is None else duration(row.seconds))),
        ("energy", said("kwh", _energy(row))),
    ]
    if row.kwh_wall is not None and row.kwh_from != "stated watts":
        facts.append(("energy at the plug", f"{row.kwh_wall:.3g} kWh, by a model of base load and power supply"))
    return [
        *facts,
        ("money", said("usd", None if row.usd is None else _money(row, row.usd))),
        ("speed", said("tokens_per_s", None if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f} tokens/s")),
        ("counted", "as if this row had been run alone; pauses ordered to cool the machine are in no figure"),
    ]


def _energy(row: Row) -> str | None:
    if row.kwh is None or row.kwh_from is None:
        return None
    err = f" ± {100 * row.kwh_err_frac:.0f} %" if row.kwh_err_frac is not None else ""
    return f"{row.kwh:.3g} kWh{err} ({SOURCES[row.kwh_from]}), {row.joules_per_token:.3g} J per token"


def _money(row: Row, usd: float) -> str:
    parts = (("energy", row.usd_energy), ("machine time", row.usd_machine))
    known = [f"{name} {money(part)}" for name, part in parts if part is not None]
    missing = [name for name, part in parts if part is None]
    if not known:
        return money(usd)
    return f"{money(usd)} ({', '.join(known)}{f'; without {missing[0]}, which is not known' if missing else ''})"


def _limits(trained: Trained) -> list[str]:
    science = trained.spec.science
    found = [
        "It was made to measure a scaling law, not to be used: it continues text and follows no instructions.",
        "What it writes can be false, and as offensive as its training text, which nobody has filtered for that; short "
        "texts may be repeated word for word.",
    ]
    if trained.n_params < TINY_PARAMS:
        found.append(
            f"With {short(trained.n_params)} parameters it mostly produces what looks like its text, not sense."
        )
    found.append(
        "Languages and topics are those of the sources above; its loss says nothing about other text, and compares "
        "only with losses of the same data_id."
    )
    if trained.corpus is None or trained.corpus.eot_id is None:
        found.append(
            "The training text had no token that ends a document (or none is known), so it does not know where to stop."
        )
    found.append(f"It has never seen a text longer than {science.shape.context_tokens:,} tokens.")
    found.append("Licence: unknown. Nobody has stated one for this model; the sources have their own.")
    return found


def _provenance(trained: Trained) -> list[Fact]:
    record = trained.record
    facts = [
        ("run", f"`{trained.spec.run_id}`, checkpoint `{trained.folder.name}`"),
        ("science hash", f"`{trained.spec.science.hash}`"),
        ("weights", f"SHA-256 `{trained.checkpoint.sha256['model.safetensors']}` of the run's own file"),
    ]
    if record is None:
        return [*facts, ("code", "unknown: the run has no record.json")]
    machine = record.machine
    commit = machine.git_commit or "unknown: not run from a git checkout"
    versions = (
        f"homelab_scaling {machine.homelab_scaling}, torch {machine.torch}, transformers {machine.transformers}, "
        f"accelerate {machine.accelerate}, Python {machine.python}"
    )
    return [*facts, ("code", f"commit {commit}"), ("versions", versions)]
