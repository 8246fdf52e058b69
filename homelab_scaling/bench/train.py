"""How fast a training step is beside plain Hugging Face, its Trainer and nanoGPT, all in one run on this machine.

Every contestant is a process of its own, so that its peak memory is its own; they take turns on the same shapes, token
file, batch and precision, in the order A B C D, D C B A, ... One untimed step begins each turn, and compilation and
first steps come before the first. A ratio is taken within a round; its interval is Student's, of the mean log ratio.
"""

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from homelab_scaling.bench.train_job import N_VOCAB, Job, JobMaker
from homelab_scaling.bench.train_overheads import Overheads, measure
from homelab_scaling.bench.train_race import TITLES, Turns, race
from homelab_scaling.box import cpu_name, detect_box, missing_for_compile
from homelab_scaling.errors import MachineError, UserError
from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.plan.peaks import peak_bf16_flops, why_no_peak
from homelab_scaling.specs import ModelShape, Precision
from homelab_scaling.train.autotune import Tuner

OVERHEADS_SHAPE, OVERHEADS_CONTEXT = "6x320x5", 1024
"""The 24M rung of gpt2_5m_120m."""
HEAD_WIDTHS = (64, 32, 128)
"""Preferred widths of a head, for shapes given as LxD."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """For the subject `train`."""

    shapes: tuple[str, ...] = ("4x96", "6x256", "8x512")
    """Layers x width of each model; heads are 64 wide where that divides, else 32 or 128."""
    ladder: str | None = None
    """Take the shapes (and the context) from a ladder's rungs instead."""
    context: int | None = None
    """Tokens of a sequence; 256, or the ladder's."""
    tokens_per_step: int | None = None
    """Batch of one optimizer step; 2,048 on a CPU, 65,536 on a GPU."""
    microbatch: int | None = None
    """Sequences of one forward pass; the whole batch where left out."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of everybody."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to race."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT: its model.py races too, compiled, with its own optimizer."""
    only: tuple[str, ...] = ()
    """Race these alone: ours, hf, hf-trainer, nanogpt."""
    threads: int | None = None
    """CPU threads of each contestant; every core where left out."""
    turn_s: float = 3.0
    """About how long the slowest contestant's turn lasts."""
    autotune: bool = False
    """Ours takes the settings that `homelab run --autotune` would; the others keep theirs."""
    overheads: bool = False
    """Race nobody: measure what a run spends beside its steps (the 24M rung at context 1,024, unless --shapes says)."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours over another's tokens per second, paired round by round."""

    median: float
    low: float | None
    """95 % interval; None of a single pair."""
    high: float | None
    pairs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One contestant at one shape."""

    name: str
    about: str
    tokens_per_s: tuple[float, ...]
    """Wall clock, by round."""
    tokens_per_cpu_s: tuple[float, ...] | None
    """By CPU seconds of all its threads; None on a GPU, which they do not measure."""
    peak_bytes: int
    """Allocated by torch on a GPU; resident on a CPU, interpreter and libraries included."""
    mfu: float | None
    head_loss_frac: float | None
    """Share of a step that goes when head and loss are left out; None where that was not measured."""
    ratio: Ratio | None
    """Ours over this one; None of ours itself."""
    cpu_ratio: Ratio | None
    peak_ratio: float | None
    """Ours over this one's peak memory."""


@dataclass(frozen=True, kw_only=True)
class ShapeBench:
    """Everybody at one shape."""

    name: str
    shape: ModelShape
    n_params: int
    batch_seqs: int
    microbatch_seqs: int
    n_steps_a_turn: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """All shapes."""

    device: str
    precision: Precision
    n_vocab: int
    n_threads: int
    n_rounds: int
    why_no_mfu: str | None
    shapes: tuple[ShapeBench, ...]
    missing: tuple[str, ...]
    versions: dict[str, str]

    def summary(self) -> str:
        """For a person."""
        lines = [
            f"{self.device}, {self.precision}, {self.n_threads} thread{'s' if self.n_threads > 1 else ''}, random ids, "
            f"vocabulary {self.n_vocab:,}, {', '.join(f'{n} {v}' for n, v in self.versions.items())}",
            f"{self.n_rounds} interleaved rounds, wall clock; medians, ratios with 95 % intervals; head + loss: the "
            "share of a step that is saved by leaving them out (forward, backward, clip and update otherwise whole)",
        ]
        for one in self.shapes:
            lines += _table(one)
        lines += [f"not raced: {why}" for why in self.missing]
        lines += [f"no MFU: {self.why_no_mfu}"] if self.why_no_mfu else []
        return "\n".join(lines)


def _table(one: ShapeBench) -> list[str]:
    shape, batch = one.shape, one.batch_seqs * one.shape.context_tokens
    lines = [
        f"\n{one.name}: L{shape.n_layer} d{shape.d_model}, {shape.n_head} heads, context {shape.context_tokens}, "
        f"{one.n_params / 1e6:.1f}M parameters, {batch:,} tokens a step in micro-batches of {one.microbatch_seqs} "
        f"sequences, {one.n_steps_a_turn} step{'s' if one.n_steps_a_turn > 1 else ''} a turn",
        f"  {'':<28}{'tokens/s':>10}{'per CPU s':>11}{'peak MB':>9}{'MFU':>6}{'head+loss':>11}   ours is faster by",
    ]
    for entry in one.entries:
        cpu = f"{statistics.median(entry.tokens_per_cpu_s):,.0f}" if entry.tokens_per_cpu_s else "-"
        mfu = "-" if entry.mfu is None else f"{entry.mfu:.0%}"
        head = "-" if entry.head_loss_frac is None else f"{entry.head_loss_frac:.0%}"
        lines.append(
            f"  {TITLES[entry.name]:<28}{statistics.median(entry.tokens_per_s):>10,.0f}{cpu:>11}"
            f"{entry.peak_bytes / 1e6:>9,.0f}{mfu:>6}{head:>11}   {_against(entry)}"
        )
    lines += [f"    {TITLES[entry.name]}: {entry.about}" for entry in one.entries]
    return lines


def _against(entry: Entry) -> str:
    if entry.ratio is None:
        return ""
    cpu = f"; by CPU {_said(entry.cpu_ratio)}" if entry.cpu_ratio else ""
    return f"{_said(entry.ratio)}{cpu}; memory {entry.peak_ratio:.2f}x"


def _said(ratio: Ratio) -> str:
    spread = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio.low is not None and ratio.high is not None else ""
    return f"{ratio.median:.2f}x{spread}"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs, round by round: the median, and Student's 95 % interval of the mean log ratio."""
    from scipy.special import stdtrit

    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    low = high = None
    if len(logs) > 1:
        half = float(stdtrit(len(logs) - 1, 0.975)) * statistics.stdev(logs) / math.sqrt(len(logs))
        mean = statistics.fmean(logs)
        low, high = math.exp(mean - half), math.exp(mean + half)
    pairs = tuple(math.exp(x) for x in logs)
    return Ratio(median=statistics.median(pairs), low=low, high=high, pairs=pairs)


# ------------------------------------------------------------------------------------------------------- what to race


def shapes_of(options: TrainOptions) -> list[tuple[str, ModelShape]]:
    """Name and shape of every model to race.

    Raises:
        UserError: a shape is not written LxD.
        SpecError: no such ladder.
    """
    if options.ladder is not None:
        return _rungs(options.ladder, options.context)
    return [(text, parse_shape(text, options.context or 256)) for text in options.shapes]


def parse_shape(text: str, context: int) -> ModelShape:
    """`6x256` or `6x256x4`: layers, width, heads.

    Raises:
        UserError: it is something else.
    """
    try:
        n_layer, d_model, *heads = (int(word) for word in text.lower().split("x"))
        if len(heads) > 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--shapes {text}: wants LAYERSxWIDTH or LAYERSxWIDTHxHEADS, such as 6x256") from None
    width = next((w for w in HEAD_WIDTHS if d_model % w == 0), d_model)
    return ModelShape(
        n_layer=n_layer, d_model=d_model, n_head=heads[0] if heads else d_model // width, context_tokens=context
    )


def _rungs(name: str, context: int | None) -> list[tuple[str, ModelShape]]:
    from homelab_scaling.plan import rules
    from homelab_scaling.plan.ladder import read_ladder

    ladder, _ = read_ladder(name)
    tokens = context or ladder.context_tokens
    found = []
    for rung in ladder.rungs:
        if rung.n_params_target is not None:
            shape = rules.nearest_shape(rung.n_params_target, N_VOCAB, tokens, tied=ladder.tied)
        else:
            shape = ModelShape(
                n_layer=rung.n_layer or 1,
                d_model=rung.d_model or 1,
                n_head=rung.n_head or 1,
                context_tokens=tokens,
                tied=ladder.tied,
            )
        found.append((rung.name, shape))
    return found


def device_of(options: TrainOptions) -> tuple[Literal["cpu", "cuda"], str]:
    """What torch calls it, and its name."""
    box = detect_box()
    if options.device == "cuda" and not box.on_gpu:
        raise MachineError("--device cuda: this machine shows no NVIDIA card; see `homelab doctor`")
    if options.device == "cpu" or not box.on_gpu:
        return "cpu", cpu_name()
    return "cuda", box.device


def _contestants(options: TrainOptions) -> tuple[list[str], list[str]]:
    """Who races, and who does not and why."""
    unknown = set(options.only) - set(TITLES)
    if unknown:
        raise UserError(f"--only {', '.join(sorted(unknown))}: knows {', '.join(TITLES)}")
    missing = []
    names = [name for name in TITLES if not options.only or name in options.only]
    if options.nanogpt is None and "nanogpt" in names:
        names.remove("nanogpt")
        missing.append("nanoGPT: give its checkout with --nanogpt DIR")
    elif options.nanogpt is not None and not (options.nanogpt / "model.py").is_file():
        raise UserError(f"--nanogpt {options.nanogpt}: holds no model.py; give the folder of a nanoGPT checkout")
    if "ours" not in names:
        names.insert(0, "ours")
    return names, missing


# ------------------------------------------------------------------------------------------------------------ the race


def run(*, n_rounds: int, say: Callable[[str], None], options: TrainOptions | None = None) -> TrainBench | Overheads:
    """Races everybody at every shape, or measures the overheads of a run.

    Args:
        n_rounds: each runs every contestant once, every other one in reverse order.
        say: told what is going on.
        options: what to race; None takes the defaults.

    Raises:
        UserError: an option asks for something impossible.
        MachineError: a contestant's process died.
    """
    options = options or TrainOptions()
    device, device_name = device_of(options)
    if options.overheads:
        return _overheads(options, device, device_name, say)
    names, missing = _contestants(options)
    peak = peak_bf16_flops(device_name) if options.precision == "bf16" else None
    lacks = missing_for_compile()
    if lacks and "nanogpt" in names:
        missing.append(f"nanoGPT compiled: without {' and '.join(lacks)} it raced uncompiled")
    n_threads = options.threads or len(os.sched_getaffinity(0))
    maker = JobMaker(
        precision=options.precision,
        device=device,
        n_threads=n_threads,
        compiles=not lacks,
        nanogpt=options.nanogpt,
        tokens_per_step=options.tokens_per_step or (2048 if device == "cpu" else 65_536),
        microbatch_seqs=options.microbatch,
    )
    tune = Tuner(detect_box(), say, fixed_microbatch=options.microbatch is not None) if options.autotune else None
    shapes = []
    for label, shape in shapes_of(options):
        with tempfile.TemporaryDirectory(prefix="homelab-bench-") as folder:
            jobs = maker.write(Path(folder), names, shape, tune)
            turns = race(label, jobs, n_rounds=n_rounds, turn_s=options.turn_s, say=say)
        shapes.append(_judge(label, turns, next(iter(jobs.values()))[0], peak))
    return TrainBench(
        device=device_name,
        precision=options.precision,
        n_vocab=N_VOCAB,
        n_threads=n_threads,
        n_rounds=n_rounds,
        why_no_mfu=None if peak else why_no_peak(device_name) if options.precision == "bf16" else "fp32 has no peak",
        shapes=tuple(shapes),
        missing=tuple(missing),
        versions=versions(),
    )


def _overheads(
    options: TrainOptions, device: Literal["cpu", "cuda"], device_name: str, say: Callable[[str], None]
) -> Overheads:
    asked = options.shapes != TrainOptions().shapes or options.ladder is not None
    context = options.context or OVERHEADS_CONTEXT
    shape = shapes_of(options)[0][1] if asked else parse_shape(OVERHEADS_SHAPE, context)
    say(f"a short run of L{shape.n_layer} d{shape.d_model}, context {shape.context_tokens}")
    return measure(
        shape,
        precision=options.precision,
        device=device,
        device_name=device_name,
        batch_tokens=options.tokens_per_step or (2 * shape.context_tokens if device == "cpu" else 65_536),
        microbatch_seqs=options.microbatch,
        n_threads=options.threads,
    )


def _judge(label: str, turns: dict[str, Turns], job: Job, peak: float | None) -> ShapeBench:
    """Rates, shares and ratios from what the contestants' turns took."""
    ours, on_cpu = turns["ours"], job.device == "cpu"
    batch_tokens = job.batch_seqs * job.shape.context_tokens
    n_tokens = ours.n_steps * batch_tokens
    wall = {name: tuple(n_tokens / s for s in own.wall_s) for name, own in turns.items()}
    cpu = {name: tuple(n_tokens / s for s in own.cpu_s) for name, own in turns.items()}
    per_token = flops_per_token(job.shape, job.n_vocab)
    entries = [
        Entry(
            name=name,
            about=own.about,
            tokens_per_s=wall[name],
            tokens_per_cpu_s=cpu[name] if on_cpu else None,
            peak_bytes=own.peak_bytes,
            mfu=statistics.median(wall[name]) * per_token / peak if peak else None,
            head_loss_frac=own.head_loss_frac,
            ratio=paired_ratio(wall["ours"], wall[name]) if name != "ours" else None,
            cpu_ratio=paired_ratio(cpu["ours"], cpu[name]) if name != "ours" and on_cpu else None,
            peak_ratio=ours.peak_bytes / own.peak_bytes if name != "ours" else None,
        )
        for name, own in turns.items()
    ]
    return ShapeBench(
        name=label,
        shape=job.shape,
        n_params=count_params(job.shape, job.n_vocab).n_params,
        batch_seqs=job.batch_seqs,
        microbatch_seqs=job.microbatch_seqs,
        n_steps_a_turn=ours.n_steps,
        entries=tuple(entries),
    )


def versions() -> dict[str, str]:
    """Of the libraries that decide the speed."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate")}
