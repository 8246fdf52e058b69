"""From a ladder file to a plan: every derived number, wanted against actual, warnings, and the specs of its runs.

    find_ladder -> read_ladder -> find_corpus -> plan_ladder -> Plan (plan.json)

Without a corpus the plan has no runs (their identity needs the data's fingerprints) and says what it assumed.
"""

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.fit.words import listed
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan import cost
from homelab_scaling.plan.cost import MeasuredRate
from homelab_scaling.plan.ddp_times import DdpMeasurement
from homelab_scaling.plan.given import Given
from homelab_scaling.plan.nominal import not_one_budget, published_rungs
from homelab_scaling.plan.parts import AdvisedBatch, Launch, Plan, RungPlan, Start, Totals
from homelab_scaling.plan.rung import plan_rung
from homelab_scaling.plan.tuned import TunedRates, cost_words
from homelab_scaling.specs import CorpusManifest, ExecutionSpec, RunSpec, Schedule, ScienceSpec, make_run_id

BPE_VOCAB_RANGE = range(257, 1_000_001)
"""Room for 256 bytes and the end-of-text token, at least."""


# ------------------------------------------------------------------------------------------------------ finding things


def shipped_ladders() -> list[str]:
    """Names of the ladders that come with the project."""
    return sorted(p.stem for p in _ladder_folder().glob("*.toml"))


def _ladder_folder() -> Path:
    return Path(str(importlib.resources.files("homelab_scaling.recipes"))) / "ladders"


def find_ladder(name_or_path: str | Path) -> Path:
    """The ladder file meant: a path, or the name of a shipped one (`quickstart`, `recipes/ladders/quickstart.toml`).

    Raises:
        SpecError: neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    bare = path.parent == Path() or path.parts[-3:-1] == ("recipes", "ladders")
    shipped = _ladder_folder() / f"{path.name.removesuffix('.toml')}.toml"
    if bare and shipped.is_file():
        return shipped
    if path.is_dir():
        raise SpecError(f"{path}: this is a folder, a ladder file is wanted")
    raise SpecError(f"{path}: no such ladder; give a .toml file or one of {', '.join(shipped_ladders())}")


def read_ladder(name_or_path: str | Path) -> tuple[Ladder, Path]:
    """The ladder and the file it came from.

    Raises:
        SpecError: the file is missing or says something impossible.
    """
    path = find_ladder(name_or_path)
    return codec.read_toml(path, Ladder), path


def shards_folder(ladder: Ladder, ladder_path: Path, lab: Path) -> Path:
    """Where this ladder's shards are or will be: `data.shards` beside the ladder file, or LAB/<ladder>/shards."""
    if ladder.data.shards is not None:
        return (ladder_path.parent / ladder.data.shards).resolve()
    return lab / ladder.name / "shards"


def find_corpus(ladder: Ladder, folder: Path) -> CorpusManifest | None:
    """The manifest of finished shards, or None where they are still to be built.

    Raises:
        SpecError: the ladder names finished shards that are not there, or the manifest cannot be read.
    """
    path = folder / "manifest.json"
    if path.exists():
        return codec.read_json(path, CorpusManifest)
    if ladder.data.shards is not None:
        if any(folder.glob("*.bin")):
            raise SpecError(
                f"data.shards = {ladder.data.shards!r} holds token files without a manifest.json; run `homelab corpus "
                f"{folder} --tokenizer gpt2 --out DIR` (or what they were cut with) and say data.shards = DIR"
            )
        raise SpecError(
            f"data.shards = {ladder.data.shards!r}, but {path} is not there; make it with `homelab corpus SOURCE --out "
            f"{folder}`, or remove the line to build shards from data.sources"
        )
    return None


# ------------------------------------------------------------------------------------------------------------ planning


def plan_ladder(
    ladder: Ladder,
    corpus: CorpusManifest | None,
    box: Box,
    *,
    shards: str = "../../shards",
    measured: Sequence[MeasuredRate] = (),
    ddp: DdpMeasurement | None = None,
    advised: Mapping[str, AdvisedBatch] | None = None,
    tuned: TunedRates | None = None,
    watts: float | None = None,
    folder: Path = Path(),
    start: Start | None = None,
) -> Plan:
    """Everything that follows from a ladder, a corpus and a machine.

    Args:
        corpus: None plans without data: vocabulary assumed from the tokenizer's name, no epochs, no runs.
        shards: how the run specs name the shards' folder: absolute, or relative to a run's folder.
        measured: speeds from earlier records; they replace assumptions.
        ddp: what `homelab ddp` measured on this machine.
        advised: measured batches by rung, for those to which the ladder gives none.
        tuned: rates tuned on the smallest rungs, for a ladder with [lr] bracket.
        watts: stated power of the whole machine under load.
        folder: what a tokenizer's path is relative to.
        start: the weights that rungs of its shape begin from, where the ladder names some.

    Raises:
        SpecError: the ladder cannot be run as written.
    """
    if watts is not None and watts <= 0:
        raise SpecError(f"{watts:g} watts: wants the power of the machine under load, a positive number")
    n_vocab, basis = _vocabulary(ladder, corpus, folder)
    warnings: list[str] = []
    given = Given(
        ladder=ladder,
        corpus=corpus,
        box=box,
        n_vocab=n_vocab,
        val_tokens=_val_tokens(ladder, corpus),
        measured=measured,
        ddp=ddp,
        advised=advised or {},
        tuned=tuned,
        watts=watts,
        warn=warnings.append,
        start=start,
    )
    rungs = tuple(plan_rung(given, rung) for rung in ladder.rungs)
    warnings.extend(_across_rungs(ladder, rungs))
    if start is not None:
        warnings.append(_about_start(ladder, start, n_vocab, rungs))
    if (
        tuning := cost_words(ladder, rungs, {r.name for r in tuned.rungs} | set(tuned.kept) if tuned else ())
    ) is not None:
        warnings.append(tuning)
    runs: tuple[RunSpec, ...] = ()
    if corpus is not None:
        runs = tuple(
            _run_spec(given, corpus, rung=rung, launch=launch, seed=seed, shards=shards)
            for rung in rungs
            for seed in ladder.seeds
            for launch in rung.launches
        )
    return Plan(
        ladder=ladder.name,
        question=ladder.question,
        box=box,
        n_vocab=n_vocab,
        vocab_basis=basis,
        n_train_tokens=corpus.n_tokens_unique if corpus else None,
        data_id=corpus.data_id if corpus else None,
        val_tokens=given.val_tokens,
        rungs=rungs,
        totals=_totals(ladder, rungs),
        energy_basis="; ".join(dict.fromkeys(r.bill.power.basis for r in rungs if r.bill.power))
        or cost.why_no_power(box),
        warnings=tuple(dict.fromkeys(warnings)),
        runs=runs,
        seeds=ladder.seeds,
        reference=ladder.reference,
        horizons=ladder.horizons,
        published=published_rungs(ladder, [rung.size for rung in rungs]),
    )


def _vocabulary(ladder: Ladder, corpus: CorpusManifest | None, folder: Path) -> tuple[int, str]:
    """Real vocabulary and where the number comes from."""
    name = ladder.data.tokenizer
    if corpus is not None:
        if ladder.data.shards is None and Path(name).name != Path(corpus.tokenizer).name:
            raise SpecError(
                f"the shards were cut with tokenizer {corpus.tokenizer}, the ladder wants {name}; remove the shards or "
                "change data.tokenizer"
            )
        return corpus.n_vocab, f"{corpus.tokenizer}, from the shards"
    if name == "bytes":
        return 257, "assumed for bytes: 256 and an end-of-text token"
    if name == "gpt2":
        return 50_257, "assumed for gpt2"
    kind, _, number = name.partition(":")
    if kind == "bpe":
        if not number.isdecimal() or int(number) not in BPE_VOCAB_RANGE:
            raise SpecError(f"data.tokenizer = {name!r}: bpe wants a vocabulary of 257 to 1,000,000, such as bpe:2048")
        return int(number), f"assumed for {name}: the text is rich enough for all of it"
    if name.endswith(".json"):
        return _tokenizer_file_vocab(folder / name), f"read from {name}"
    raise SpecError(f"data.tokenizer = {name!r}: wants bytes, bpe:N, gpt2 or the path of a tokenizer.json")


def _tokenizer_file_vocab(path: Path) -> int:
    plain = codec.read_plain_json(path)
    try:
        ids = [int(i) for i in plain["model"]["vocab"].values()]
        ids += [int(token["id"]) for token in plain.get("added_tokens", [])]
        return max(ids) + 1
    except (KeyError, TypeError, AttributeError, ValueError):
        raise SpecError(
            f"{path}: not a tokenizer.json with a model.vocab table; save one with `tokenizers` or choose bpe:N"
        ) from None


def _val_tokens(ladder: Ladder, corpus: CorpusManifest | None) -> int:
    """Tokens of the full validation set in whole windows; both halves of the corpus must hold at least one."""
    context = ladder.context_tokens
    wanted = max(1, ladder.validation.full_tokens // context)
    if corpus is None:
        return wanted * context
    for half, n_tokens in (("training", corpus.train.n_tokens), ("held-out", corpus.val.n_tokens)):
        if n_tokens < context + 1:
            raise SpecError(
                f"the {half} text has {n_tokens:,} tokens, one window of {context} needs {context + 1:,}; add text, "
                "shorten context_tokens or raise data.val_frac"
            )
    return min(wanted, (corpus.val.n_tokens - 1) // context) * context


def _across_rungs(ladder: Ladder, rungs: tuple[RungPlan, ...]) -> list[str]:
    """What is only wrong when rungs are put side by side."""
    found = []
    h = ladder.horizons
    n_listed = len(h.tokens or h.tokens_per_param or h.flops or h.steps)
    if h.mode == "nominal" and n_listed > 1:
        found.append(
            f"horizons.mode = nominal takes each rung's one nominal_tokens; the {n_listed} listed horizons are not run"
        )
    if h.mode == "nominal":
        published = published_rungs(ladder, [rung.size for rung in rungs])
        said = not_one_budget(published, h.flops[0] if len(h.flops) == 1 else None)
        found += [said] if said else []
    if len({r.training.precision for r in rungs}) > 1:
        by = ", ".join(f"{r.name} {r.training.precision}" for r in rungs)
        found.append(f"rungs differ in precision ({by}), which bends a law; set train.precision for all of them")
    if len(rungs) < 3:
        found.append(f"{len(rungs)} rung{'s' * (len(rungs) > 1)}: a power law in N needs at least 3 to have a residual")
    return found


def _about_start(ladder: Ladder, start: Start, n_vocab: int, rungs: tuple[RungPlan, ...]) -> str:
    """What beginning from another model's weights means for this ladder, in a sentence or two.

    Raises:
        SpecError: it has another vocabulary, or no rung has its shape.
    """
    if start.n_vocab != n_vocab:
        raise SpecError(
            f"train.start = {start.name!r} has {start.n_vocab:,} token ids, the ladder's tokenizer {n_vocab:,}; cut "
            "the text with the checkpoint's own tokenizer"
        )
    begun = [rung for rung in rungs if rung.size.shape == start.shape]
    if not begun:
        s = start.shape
        raise SpecError(
            f"train.start = {start.name!r} has n_layer {s.n_layer}, d_model {s.d_model}, n_head {s.n_head}, "
            f"context_tokens {s.context_tokens} and {'a tied' if s.tied else 'its own'} output head, as no rung has; "
            "give one that shape"
        )
    names, one = listed([rung.name for rung in begun]), len(begun) == 1
    others = listed([rung.name for rung in rungs if rung not in begun])
    theirs = {rung.name for rung in ladder.rungs if rung.lr_peak is not None}
    fast = [rung for rung in begun if rung.name not in theirs]
    said = (
        f"rung{'s' * (not one)} {names} begin{'s' * one} from the weights of {start.name}"
        f"{f' ({others} from random ones)' if others else ''}; what that was trained with is in no figure here, so "
        "such rows belong to no law of training from random weights"
    )
    if not fast:
        return said
    return (
        f"{said}; the peak rate of {fast[0].training.lr_peak:.2g} is one for random weights, and going on from trained "
        f"ones usually wants less: set lr_peak of {listed([rung.name for rung in fast])}"
    )


def _totals(ladder: Ladder, rungs: tuple[RungPlan, ...]) -> Totals:
    def total(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) if len(known) == len(values) else None

    return Totals(
        n_runs=sum(r.bill.n_runs for r in rungs),
        n_rows=sum(len(r.training.horizons) for r in rungs) * len(ladder.seeds),
        tokens_trained=sum(r.bill.tokens_trained for r in rungs),
        flops=sum(r.bill.flops for r in rungs),
        seconds=total([r.bill.seconds for r in rungs]),
        kwh=total([r.bill.kwh for r in rungs]),
        usd=total([r.bill.usd for r in rungs]),
        usd_energy=total([r.bill.usd_energy for r in rungs]),
        usd_machine=total([r.bill.usd_machine for r in rungs]),
    )


def _run_spec(
    given: Given, corpus: CorpusManifest, *, rung: RungPlan, launch: Launch, seed: int, shards: str
) -> RunSpec:
    ladder, training, placement = given.ladder, rung.training, rung.placement
    start = given.start if given.start is not None and given.start.shape == rung.size.shape else None
    science = ScienceSpec(
        shape=rung.size.shape,
        n_vocab=given.n_vocab,
        tokenizer_hash=corpus.tokenizer_hash,
        train_fingerprint=corpus.train.fingerprint,
        val_fingerprint=corpus.val.fingerprint,
        horizons_tokens=launch.horizons_tokens,
        batch_tokens_global=training.batch_tokens,
        schedule=Schedule(
            name=ladder.schedule.name,
            lr_peak=training.lr_peak,
            warmup_tokens=training.warmup_tokens,
            decay_frac=ladder.schedule.decay_frac,
            lr_final_frac=ladder.schedule.lr_final_frac,
        ),
        optim=ladder.optim if training.beta2 is None else replace(ladder.optim, beta2=training.beta2),
        precision=training.precision,
        seed=seed,
        val_tokens=given.val_tokens,
        batch_warmup=rung.batch_warmup,
        start=start.sha256 if start is not None else None,
    )
    table = ladder.train
    execution = ExecutionSpec(
        device="cuda" if given.box.on_gpu else "cpu",
        n_processes=placement.n_processes,
        microbatch_seqs_per_rank=placement.microbatch_seqs_per_rank,
        compile=table.compile,
        loss=table.loss,
        activation_checkpointing=table.activation_checkpointing,
        sharding=table.sharding,
        ddp_comm=table.ddp_comm,
        log_every_steps=table.log_every_steps,
        checkpoint_every_s=table.checkpoint_every_s,
        checkpoint_every_steps=table.checkpoint_every_steps,
        curve_tokens=min(ladder.validation.curve_tokens, given.val_tokens),
        curve_every_tokens=launch.curve_every_tokens,
        noise_every_steps=launch.noise_every_steps,
        predicted_s=launch.seconds,
        start_from=start.folder if start is not None else None,
    )
    return RunSpec(
        run_id=make_run_id(rung.name, science),
        ladder=ladder.name,
        rung=rung.name,
        science=science,
        execution=execution,
        shards=shards,
        money=ladder.money,
        watch=ladder.watch,
    )
