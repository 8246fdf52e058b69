"""One rank of `homelab ddp`: times steps with and without DDP, all-reduces of several sizes, and looks at the links.

Every rank calls the same blocks in the same order; where one rank alone computes, the others wait without spinning. A
step is what training does: its forward and backward passes, clipping, AdamW. Random tokens cost what text costs.
"""

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from homelab_scaling.bench.ddp_job import ProbeAnswer, ProbeJob, RungJob, mib
from homelab_scaling.doctor.driver import survey
from homelab_scaling.errors import MachineError
from homelab_scaling.plan.ddp import DEFAULT_BUCKET_MIB, GRADIENT_BYTES, MIB, choose_bucket_mib
from homelab_scaling.plan.ddp_times import CardLink, CardPair, RungTimes, Sweep, Timed, Transfer
from homelab_scaling.train import oom
from homelab_scaling.train.model import LanguageModel, build_model
from homelab_scaling.train.optim import MaskedAdamW
from homelab_scaling.train.parallel import Parallel, choose_static_graph
from homelab_scaling.train.ranks import Ranks

TIMED_TRANSFERS = 10
SECONDS_PER_SIZE = 10.0
"""An all-reduce size that would take longer is left out."""
AGAIN_WARMUP = 3
"""Steps before timing goes on with a kind that is warm already."""
N_ROUNDS = 2
"""Kinds take turns, so that a drift of the clock or the heat meets all of them."""
BARE_KINDS = ("alone_full", "together_full", "alone_rank", "together_rank")
"""In an order in which a compiled model is compiled twice."""
MIN_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Here:
    """This rank."""

    rank: int
    ranks: Ranks
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def meet(self, trouble: bool = False) -> bool:
        """Waits for every rank; true if any has trouble."""
        return bool(self.ranks.max([int(trouble)])[0])


def probe(job: ProbeJob) -> ProbeAnswer:
    """Everything the job asks for; the same call on every rank, the main rank's answer counts.

    Raises:
        MachineError: the launch has another number of ranks.
    """
    from accelerate import Accelerator

    from homelab_scaling.train.session import refuse_silent_split

    accelerator = Accelerator(cpu=job.device == "cpu", mixed_precision="no")
    refuse_silent_split(accelerator.num_processes, job.n_ranks, dict(os.environ))
    if job.n_ranks < 2:
        raise MachineError("one rank has nobody to exchange gradients with; launch two")
    here = Here(rank=accelerator.process_index, ranks=Ranks(job.n_ranks), device=accelerator.device)
    sweep = time_transfers(job, here)
    links, pairs, why = look_at_links(here)
    rungs, skipped = [], {}
    for rung in job.rungs:
        times = time_rung(job, rung, here)
        if isinstance(times, str):
            skipped[rung.name] = times
        else:
            rungs.append(times)
    return ProbeAnswer(
        backend=torch.distributed.get_backend(),
        threads_per_rank=None if here.on_gpu else torch.get_num_threads(),
        torch=torch.__version__,
        sweep=sweep,
        links=links,
        pairs=pairs,
        why_no_links=why,
        rungs=tuple(rungs),
        skipped=skipped,
    )


# ----------------------------------------------------------------------------------------------------- between ranks


def time_transfers(job: ProbeJob, here: Here) -> Sweep:
    """All-reduces of fp32 numbers, each waited for; the slower rank's seconds."""
    transfers: list[Transfer] = []
    skipped: dict[str, str] = {}
    for size in job.sweep_mib:
        if transfers:
            last = transfers[-1]
            expected = last.timed.seconds * size * MIB / last.n_bytes * (TIMED_TRANSFERS + 2)
            if here.meet(expected > SECONDS_PER_SIZE):
                skipped[mib(size * MIB)] = f"{TIMED_TRANSFERS + 2} of them would take about {expected:.0f} s"
                continue
        numbers = torch.zeros(size * MIB // GRADIENT_BYTES, device=here.device)
        seconds = [_transfer_s(numbers, here) for _ in range(TIMED_TRANSFERS + 2)][2:]
        slowest = [max(both) for both in zip(*here.ranks.gather(seconds), strict=True)]
        transfers.append(Transfer(n_bytes=size * MIB, timed=Timed.of(slowest)))
        del numbers
    return Sweep(setting=setting_of(here), transfers=tuple(transfers), skipped=skipped)


def _transfer_s(numbers: Tensor, here: Here) -> float:
    here.meet()
    wait(here.device)
    began = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    wait(here.device)
    return time.perf_counter() - began


def setting_of(here: Here) -> str:
    """How gradients travel, in a word."""
    if not here.on_gpu:
        return "gloo"
    off = os.environ.get("NCCL_P2P_DISABLE", "0") not in ("", "0")
    return "NCCL_P2P_DISABLE=1" if off else "NCCL_P2P_DISABLE unset"


def look_at_links(here: Here) -> tuple[tuple[CardLink, ...], tuple[CardPair, ...], str | None]:
    """The cards' PCI Express links while they are awake (idle ones show a lower generation), and who reads whom."""
    if not here.on_gpu:
        return (), (), "no GPU"
    if not here.is_main:
        return (), (), "another rank looks"
    driver = survey()
    links = tuple(
        CardLink(
            index=card.facts.index,
            name=card.facts.name,
            generation=card.link.generation,
            generation_max=card.link.generation_max,
            width=card.link.width,
            width_max=card.link.width_max,
        )
        for card in driver.cards
    )
    pairs = tuple(CardPair(first=p.first, second=p.second, p2p=p.p2p) for p in driver.pairs)
    return links, pairs, driver.error


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------------------- steps


class Stepper:
    """Optimizer steps of one rung on this rank, of every kind."""

    def __init__(self, job: RungJob, here: Here, n_ranks: int) -> None:
        self.job, self.here, self.n_ranks = job, here, n_ranks
        bare = build_model(job.shape, job.n_vocab, seed=0, loss_path=job.loss_path, recompute=job.recompute)
        self.model: LanguageModel = bare.to(here.device)
        self.optimizer = MaskedAdamW(self.model, job.optim)
        self.finite = torch.ones((), dtype=torch.bool, device=here.device)
        self.wrapped: Any = None
        generator = torch.Generator().manual_seed(here.rank)
        size = (job.batch_seqs, job.shape.context_tokens + 1)
        self.tokens = torch.randint(0, job.n_vocab, size, generator=generator).to(here.device)
        self._compiled_for: tuple[bool, int] | None = None

    def settings(self, bucket_mib: int, bf16: bool) -> Parallel:
        static, why = choose_static_graph(
            n_passes=self.job.batch_seqs // self.n_ranks // self.job.microbatch_seqs_per_rank, batch_warmup=False
        )
        return Parallel(
            bucket_mib=bucket_mib, static_graph=static, static_graph_reason=why, comm="bf16" if bf16 else "fp32"
        )

    @contextlib.contextmanager
    def under_ddp(self, bucket_mib: int, *, bf16: bool = False) -> Iterator[None]:
        """The model wrapped, and unwrapped again with all of its hooks."""
        self._compiled_for = None
        self.wrapped = self.settings(bucket_mib, bf16).wrap(self.model, self.here.device)
        try:
            yield
        finally:
            self.wrapped = None
            self.optimizer.zero_grad()
            gc.collect()

    def step(self, kind: str) -> None:
        """One step of a kind."""
        full = kind.endswith("_full")
        micro = self.job.single_microbatch_seqs if full else self.job.microbatch_seqs_per_rank
        n_passes = (self.job.batch_seqs if full else self.job.batch_seqs // self.n_ranks) // micro
        self._see_to_compiled(micro)
        for i in range(n_passes):
            silent = self.wrapped is not None and (kind == "no_sync" or i + 1 < n_passes)
            with self.wrapped.no_sync() if silent else contextlib.nullcontext():
                self._backward(self.tokens[i * micro : (i + 1) * micro], n_passes)
        self.optimizer.clip()
        self.optimizer.step(1e-6, self.finite)
        self.optimizer.zero_grad()

    def _backward(self, tokens_BT: Tensor, n_passes: int) -> None:
        model: nn.Module = self.wrapped or self.model
        on = self.job.precision == "bf16"
        with torch.autocast(self.here.device.type, dtype=torch.bfloat16, enabled=on):
            loss: Tensor = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (loss / n_passes).backward()  # type: ignore[no-untyped-call]

    def _see_to_compiled(self, micro: int) -> None:
        """Compiled anew for another shape or wrapping: else one graph for any shape, or one that DDP did not cut."""
        if not self.job.compile or self._compiled_for == (self.wrapped is not None, micro):
            return
        torch.compiler.reset()
        self.model.compile_in_place()
        self._compiled_for = (self.wrapped is not None, micro)


def time_rung(job: ProbeJob, rung: RungJob, here: Here) -> RungTimes | str:
    """The rung's times, or why there are none."""
    trouble = ""
    try:
        stepper = Stepper(rung, here, job.n_ranks)
        first_s = step_s(stepper, "together_full")
        first_s = step_s(stepper, "together_full")
    except RuntimeError as error:
        trouble = oom.complaint(error) or ""
        if not trouble:
            raise
    if here.meet(bool(trouble)):
        oom.free_caches()
        return f"not measured: {trouble or 'memory ran out on another rank'}"
    n_steps = here.ranks.max([-steps_within(job, first_s)])[0] * -1
    if n_steps < MIN_STEPS:
        return (
            f"not measured: a step takes {first_s:.1f} s here, so {len(BARE_KINDS) + 2} kinds of steps would take "
            f"longer than {job.seconds_per_rung:.0f} s; --rung {rung.name} takes the time"
        )
    found = take_turns(stepper, job.n_warmup, n_steps, rounds=1 if rung.compile else N_ROUNDS)
    times = {kind: Timed.of(seconds) for kind, seconds in found.items()}
    return RungTimes(
        rung=rung.name,
        shape=rung.shape,
        n_vocab=rung.n_vocab,
        precision=rung.precision,
        batch_tokens=rung.batch_tokens,
        microbatch_seqs_per_rank=rung.microbatch_seqs_per_rank,
        accumulation_steps=rung.batch_seqs // job.n_ranks // rung.microbatch_seqs_per_rank,
        compiled=rung.compile,
        bucket_mib=choose_bucket_mib(rung.shape, rung.n_vocab),
        **times,
    )


def steps_within(job: ProbeJob, step_of_all_s: float) -> int:
    """Timed steps of each kind that fit the time for a rung; as many as asked where there is no limit."""
    if job.seconds_per_rung is None:
        return job.n_steps
    per_step_s = step_of_all_s * (2 + 4 / job.n_ranks)  # of each kind one
    room = job.seconds_per_rung / per_step_s - job.n_warmup - AGAIN_WARMUP
    return max(0, min(job.n_steps, int(room)))


def take_turns(stepper: Stepper, n_warmup: int, n_steps: int, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of single steps by kind, over all ranks."""
    here, job = stepper.here, stepper.job
    ours = choose_bucket_mib(job.shape, job.n_vocab)
    wrappings: list[tuple[str, int, bool]] = [("", ours, False)]
    if ours != DEFAULT_BUCKET_MIB:
        wrappings.append(("_bucket_25", DEFAULT_BUCKET_MIB, False))
    if here.on_gpu and job.precision == "bf16":
        wrappings.append(("_bf16", ours, True))
    found: dict[str, list[float]] = {}

    def block(kind: str, suffix: str = "") -> None:
        name = kind + suffix
        warm = n_warmup if name not in found else AGAIN_WARMUP
        mine = timed_steps(stepper, kind, warm, -(-n_steps // rounds))
        found.setdefault(name, []).extend(over_ranks(here, kind, mine))

    for _ in range(rounds):
        for kind in BARE_KINDS:
            block(kind)
        for suffix, bucket, bf16 in wrappings:
            with stepper.under_ddp(bucket, bf16=bf16):
                block("sync", suffix)  # first: DDP learns its buckets and a static graph in a synchronised step
                if not suffix:
                    block("no_sync")
    return found


def over_ranks(here: Here, kind: str, seconds: list[float]) -> list[float]:
    """One list for all ranks: a synchronised step lasts as long as its slowest rank, others are as many timings."""
    lists = here.ranks.gather(seconds)
    if kind == "sync":
        return [max(step) for step in zip(*lists, strict=True)]
    return [one for mine in lists for one in mine]


def timed_steps(stepper: Stepper, kind: str, n_warmup: int, n_steps: int) -> list[float]:
    """Seconds of each of `n_steps` on this rank; none where another rank computes alone."""
    here = stepper.here
    here.meet()
    if kind.startswith("alone") and not here.is_main:
        seconds: list[float] = []
    else:
        for _ in range(n_warmup):
            stepper.step(kind)
        seconds = consecutive(lambda: stepper.step(kind), n_steps, here.device)
    here.meet()
    return seconds


def consecutive(step: Callable[[], None], n_steps: int, device: torch.device) -> list[float]:
    """Seconds of steps that follow one another; on a GPU by events, so that the host may run ahead as in training."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(n_steps):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n_steps + 1)]  # type: ignore[no-untyped-call]
    wait(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    wait(device)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def step_s(stepper: Stepper, kind: str) -> float:
    """Seconds of one step, waited for."""
    return consecutive(lambda: stepper.step(kind), 1, stepper.here.device)[0]
