"""Does a second card pay on this machine: measures it, keeps it in LAB/machine/ddp.json, and advises for a ladder."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from homelab_scaling import codec
from homelab_scaling.bench.ddp_job import (
    N_STEPS,
    N_WARMUP,
    SECONDS_PER_RUNG,
    SWEEP_MIB,
    ProbeAnswer,
    ProbeJob,
    RungJob,
    rung_jobs,
)
from homelab_scaling.box import Box, describe_box, detect_box
from homelab_scaling.errors import MachineError, RunFailed
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.cost import measured_rates
from homelab_scaling.plan.ddp_advice import LadderAdvice, advise_ladder
from homelab_scaling.plan.ddp_judge import Judgement
from homelab_scaling.plan.ddp_times import DdpMeasurement, ddp_path, read_ddp, write_ddp
from homelab_scaling.plan.ladder import find_corpus, plan_ladder, read_ladder, shards_folder
from homelab_scaling.plan.parts import Plan
from homelab_scaling.specs import WatchLimits

Say = Callable[[str], None]

NCCL_SWITCH = "NCCL_P2P_DISABLE"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A ladder, planned for several ranks and for one, on the machine to be measured."""

    ladder: Ladder
    split: Plan
    single: Plan
    box: Box
    n_ranks: int


@dataclass(frozen=True, kw_only=True)
class RungVerdict:
    """What a rung's times say."""

    rung: str
    judgement: Judgement


@dataclass(frozen=True, kw_only=True)
class DdpReport:
    """`homelab ddp --json`."""

    ladder: str
    n_ranks: int
    measurement: DdpMeasurement | None
    """None where only the model speaks."""
    verdicts: tuple[RungVerdict, ...]
    """Of the rungs that were measured."""
    advice: LadderAdvice
    saved: str | None = None

    def summary(self) -> str:
        """The page, as `homelab bench ddp` prints it."""
        from homelab_scaling.bench.ddp_page import as_text

        return as_text(self)


def default_ladder(box: Box) -> str:
    """The shipped ladder that is made for such a machine."""
    return "gpt2_5m_120m" if box.on_gpu else "quickstart"


def open_setting(ladder: str, labs: Path, box: Box, n_ranks: int) -> Setting:
    """The ladder's plan on this machine; shards need not be there."""
    parsed, path = read_ladder(ladder)
    corpus = find_corpus(parsed, shards_folder(parsed, path, labs))
    measured = measured_rates([labs / parsed.name])

    def plan(ranks: int) -> Plan:
        one = replace(parsed, train=replace(parsed.train, processes=ranks))
        return plan_ladder(one, corpus, box, measured=measured, folder=path.parent)

    return Setting(ladder=parsed, split=plan(n_ranks), single=plan(1), box=box, n_ranks=n_ranks)


def choose_ranks(box: Box, asked: int | None) -> int:
    """Ranks to measure with: every card, or two on a CPU.

    Raises:
        MachineError: one card only, or more ranks than cards.
    """
    if box.n_gpus == 1 and asked in (None, 1, 2):
        raise MachineError(
            f"found one {box.device}, wants two: what a second one would do is modelled, not measured, by `homelab ddp "
            "--gpus 2`; `--cpu` measures two CPU ranks, `--times` judges somebody else's step times"
        )
    ranks = asked or (box.n_gpus if box.on_gpu else 2)
    if ranks < 2 or (box.on_gpu and ranks > box.n_gpus):
        most = f"2 to {box.n_gpus}, as many as there are cards" if box.on_gpu else "2 or more"
        raise MachineError(f"--ranks {ranks}: wants {most}")
    return ranks


def cpu_only() -> Box:
    """This machine without its cards."""
    return describe_box([])


def measure(
    setting: Setting,
    *,
    labs: Path,
    rungs: Sequence[str] = (),
    n_steps: int = N_STEPS,
    say: Say,
    save: bool = True,
    launch: Callable[[ProbeJob], ProbeAnswer] | None = None,
) -> DdpMeasurement:
    """Times everything on this machine and saves it; on GPUs the sweep runs with and without peer-to-peer.

    Rungs that were measured before on the same machine, and not now, are kept.

    Args:
        rungs: only these, however long they take; empty takes all that are done in reasonable time.
        save: write ddp.json.
        launch: starts the ranks and returns their answer; None is `accelerate launch`.

    Raises:
        SpecError: no such rung.
        RunFailed: the ranks left no answer.
        Stopped: asked to stop.
    """
    box = setting.box
    jobs = rung_jobs(setting.split, setting.single, names=rungs, optim=setting.ladder.optim, box=box)
    start = launch or (lambda job: launch_ranks(job, box=box, labs=labs, watch=setting.ladder.watch, say=say))
    names = ", ".join(job.name for job in jobs)
    say(f"timing {setting.n_ranks} {'cards' if box.on_gpu else 'CPU ranks'} on rungs {names}")
    answer = start(make_job(setting, jobs, n_steps=n_steps, patient=bool(rungs)))
    other = None
    if box.on_gpu:
        try:
            with flipped_switch():
                other = start(make_job(setting, (), n_steps=n_steps, patient=False)).sweep
        except RunFailed as error:  # with peer-to-peer that is claimed untruly nothing arrives; the rest stands
            say(f"with {NCCL_SWITCH} the other way: {error}")
    measurement = DdpMeasurement(
        device=box.device if box.on_gpu else "cpu",
        n_ranks=setting.n_ranks,
        backend=answer.backend,
        threads_per_rank=answer.threads_per_rank,
        measured_s=time.time(),
        torch=answer.torch,
        sweep=answer.sweep,
        other_sweep=other,
        links=answer.links,
        pairs=answer.pairs,
        why_no_links=answer.why_no_links,
        rungs=answer.rungs,
        skipped=answer.skipped,
    )
    if save:
        measurement = with_earlier(measurement, read_ddp(labs))
        write_ddp(labs, measurement)
    return measurement


def with_earlier(now: DdpMeasurement, before: DdpMeasurement | None) -> DdpMeasurement:
    """The new measurement, and of an older one by the same means the rungs that it lacks."""

    def means(m: DdpMeasurement) -> tuple[object, ...]:
        return m.device, m.n_ranks, m.backend, m.threads_per_rank, m.torch, m.sweep.setting

    if before is None or means(before) != means(now):
        return now
    new = {(r.shape, r.n_vocab, r.precision) for r in now.rungs}
    kept = tuple(r for r in before.rungs if (r.shape, r.n_vocab, r.precision) not in new)
    return replace(now, rungs=(*now.rungs, *kept))


def make_job(setting: Setting, rungs: tuple[RungJob, ...], *, n_steps: int, patient: bool) -> ProbeJob:
    """The order to the ranks; its answer's place is filled in when it is launched."""
    return ProbeJob(
        device="cuda" if setting.box.on_gpu else "cpu",
        n_ranks=setting.n_ranks,
        rungs=rungs,
        sweep_mib=SWEEP_MIB,
        n_warmup=N_WARMUP,
        n_steps=n_steps,
        seconds_per_rung=None if patient else SECONDS_PER_RUNG[setting.box.on_gpu],
        answer="",
    )


def launch_ranks(job: ProbeJob, *, box: Box, labs: Path, watch: WatchLimits, say: Say) -> ProbeAnswer:
    """Starts recipes/ddp_probe.py under `accelerate launch` and reads what it leaves."""
    from homelab_scaling.sweep.recipe import run_recipe

    with tempfile.TemporaryDirectory(prefix="homelab-ddp-") as folder:
        path, answer = Path(folder, "job.json"), Path(folder, "answer.json")
        codec.write_json(path, replace(job, answer=str(answer)), durable=False)
        code = run_recipe(
            "ddp_probe",
            ["--job", str(path)],
            n_processes=job.n_ranks,
            box=box,
            on_gpu=job.device == "cuda",
            lab=labs,
            watch=watch,
            say=say,
        )
        if not answer.exists():
            raise RunFailed(f"the timing ranks ended with exit code {code} and left no answer, for the reason above")
        return codec.read_json(answer, ProbeAnswer)


@contextlib.contextmanager
def flipped_switch() -> Iterator[None]:
    """The environment with NCCL_P2P_DISABLE the other way than a launch of ours has it."""
    from homelab_scaling.watch.p2p import nccl_environment

    before = os.environ.get(NCCL_SWITCH)
    off = (before or nccl_environment().get(NCCL_SWITCH, "0")) not in ("", "0")
    os.environ[NCCL_SWITCH] = "0" if off else "1"
    try:
        yield
    finally:
        os.environ.pop(NCCL_SWITCH, None)
        if before is not None:
            os.environ[NCCL_SWITCH] = before


def report(setting: Setting, measurement: DdpMeasurement | None, *, labs: Path | None = None) -> DdpReport:
    """Verdicts on what was measured and advice for the whole ladder.

    Args:
        labs: where the measurement was saved; None where it was not.
    """
    verdicts: tuple[RungVerdict, ...] = ()
    if measurement is not None:
        n = measurement.n_ranks
        verdicts = tuple(RungVerdict(rung=times.rung, judgement=times.judge(n)) for times in measurement.rungs)
    return DdpReport(
        ladder=setting.ladder.name,
        n_ranks=setting.n_ranks,
        measurement=measurement,
        verdicts=verdicts,
        advice=advise_ladder(measurement, setting.split, setting.n_ranks, box=setting.box),
        saved=None if labs is None else str(ddp_path(labs)),
    )


def run(*, n_rounds: int, say: Say) -> DdpReport:
    """`homelab bench ddp`: the ladder that suits this machine, each kind of step at least 2 x `n_rounds` times."""
    box, labs = detect_box(), Path("lab")
    setting = open_setting(default_ladder(box), labs, box, choose_ranks(box, None))
    measurement = measure(setting, labs=labs, n_steps=max(4, 2 * n_rounds), say=say)
    return report(setting, measurement, labs=labs)
