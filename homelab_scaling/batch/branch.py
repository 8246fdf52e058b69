"""The branch test: one checkpoint of the smallest rung, trained on with several batches, each for the same tokens.

    LAB/<ladder>/branch/plan.json               what is to be run; another plan begins anew
    LAB/<ladder>/branch/runs/<run_id>           a branch (or the burn-in): spec, curve, windows.jsonl
    LAB/<ladder>/branch/result.json             what it found

The cheaper sibling of the sweep (verify.py): no rate is tuned, because the square root of the batch is taken on trust,
and the burn-in, whose checkpoint a probe of the rung leaves behind, is paid once. All branches read the same text on,
at a constant rate, with Adam's moments as the checkpoint has them; the second needs 1 / (1 - beta2) updates to feel the
new batch, so that a branch has several times as many. Batches above the rung's own keep its betas, as a run at an
advised batch does. Those below take beta^k, so that the moments remember as many tokens as before: with its own betas
the reference, at a quarter of the batch, came 0.145 nats less far than at the full one (54k rung), with beta^k as far.

Source: the square root with betas that go with the batch is the scaling of Malladi et al. 2022 (arXiv 2205.10287).
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from homelab_scaling import codec
from homelab_scaling.batch.branch_fit import TOLERANCE_NATS, BranchResult, Curve, Found, fit_branches
from homelab_scaling.batch.probe import BURN_IN_FRAC, work_folder
from homelab_scaling.batch.table import Setting, rate_of, split_batch
from homelab_scaling.box import Box
from homelab_scaling.errors import RunFailed, SpecError, StoppedByWatchdog
from homelab_scaling.plan.cost import GPU_START_S, VALIDATION_COST_FRAC
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec, Schedule, make_run_id
from homelab_scaling.sweep.recipe import run_recipe

SMALLEST_FRAC = 1 / 4
"""Of the rung's batch: the reference, from which every branch doubles."""
LARGEST = 8
"""Times the rung's batch, as far as the branch is long enough."""
N_LEAST = 5
"""Branches over a factor of 16: the same span as the sweep's."""
DELTA_FRAC = 0.1
"""Of the longest horizon: tokens of a branch."""
MIN_MEMORIES = 2.5
"""Updates of the largest batch, in memories 1 / (1 - beta2) of Adam's second moment."""
MIN_STEPS = 40
N_MARKS = 12
"""Validations of a branch, at the same tokens for all."""
EVAL_TOKENS, MIN_WINDOWS = 16_384, 64
"""Of each validation."""
LAUNCH_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """One branch to run."""

    spec: RunSpec
    n_steps: int
    first_sequence: int
    """Where in the order of the text it reads on."""


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """plan.json: everything `recipes/branch_test.py` needs."""

    rung: str
    start: RunSpec
    """The rung's own run up to the checkpoint."""
    start_steps: int
    start_tokens: int
    base_tokens: int
    delta_tokens: int
    mark_tokens: int
    branches: tuple[BranchSpec, ...]
    """Ascending in batch."""
    lab: str
    """LAB/<ladder>."""
    burn_in_paid: bool
    """A probe's checkpoint is there to begin from."""
    box: Box
    flops: float
    """At most: with the burn-in, unless it is paid."""
    tokens: int
    seconds: float | None
    """None where no speed is known."""
    beta2_steps: float
    """Memory of Adam's second moment, in updates."""

    @property
    def folder(self) -> Path:
        return Path(self.lab) / "branch"

    @property
    def start_folder(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / self.start.run_id)

    def run_folder(self, branch: BranchSpec) -> RunFolder:
        return RunFolder(self.folder / "runs" / branch.spec.run_id)

    @property
    def hash(self) -> str:
        """What decides the result, however it is executed."""
        parts = [self.start.science.hash, self.start_steps, self.mark_tokens]
        return codec.stable_hash([*parts, [[b.spec.science.hash, b.n_steps] for b in self.branches]])

    @property
    def words(self) -> str:
        """The plan in a sentence."""
        sizes = ", ".join(f"{b.spec.science.batch_tokens_global:,}" for b in self.branches)
        took = "time unknown" if self.seconds is None else f"about {self.seconds:,.0f} s"
        burn_in = "from the probe's checkpoint" if self.burn_in_paid else "from a checkpoint trained for it"
        return (
            f"branch test on {self.rung}: {burn_in} after {self.start_tokens:,} tokens, batches of {sizes} tokens "
            f"for {self.delta_tokens:,} tokens each, at a constant rate of {self.base_rate:.2e} x sqrt(B / "
            f"{self.base_tokens:,}), betas of smaller ones as they remember equal tokens; Adam's second moment is kept "
            f"and forgets within {self.beta2_steps:.0f} updates, the largest batch makes {self.branches[-1].n_steps}; "
            f"{self.tokens:,} tokens, {self.flops:.2g} FLOPs, {took}"
        )

    @property
    def base_rate(self) -> float:
        """At the checkpoint: a stretch knows no decay, whatever the run's schedule."""
        return self.start.science.schedule.lr_peak


def plan_branch(
    setting: Setting,
    template: RunSpec,
    lab: Path,
    shards: Path,
    *,
    burn_in_frac: float = BURN_IN_FRAC,
    delta_frac: float = DELTA_FRAC,
) -> BranchPlan:
    """What to run for one rung, the smallest of a ladder.

    Args:
        setting: of the rung.
        template: its run to the longest horizon (`measure.longest_run`), without advice.
        lab: LAB/<ladder>.
        shards: the folder of the text.
        burn_in_frac: of the longest horizon, before the checkpoint; the probe's, so that its checkpoint serves.
        delta_frac: of the longest horizon, tokens of each branch; more where the largest batch needs them for enough
            updates.

    Raises:
        SpecError: the horizon is too short for four batches over a factor of 16.
    """
    ladder = replace(setting.ladder, train=replace(setting.ladder.train, processes=1, microbatch_seqs_per_rank=None))
    setting = replace(setting, ladder=ladder)
    science = replace(template.science, batch_warmup=None)
    context, horizon = science.shape.context_tokens, science.horizons_tokens[-1]
    start_steps = round(burn_in_frac * horizon / science.batch_tokens_global)
    beta2_steps = 1 / max(1e-9, 1 - science.optim.beta2)
    sizes, delta = _sizes(science.batch_seqs_global, context, delta_frac * horizon, beta2_steps)
    if not max(1, science.schedule.warmup_tokens) <= start_steps * science.batch_tokens_global < horizon:
        raise SpecError(
            f"rung {template.rung}: a checkpoint after {burn_in_frac:.0%} of the longest horizon, {start_steps} steps, "
            "lies before the end of the warm-up or after the run; take another burn-in"
        )
    if delta + start_steps * science.batch_tokens_global > horizon:
        raise SpecError(
            f"rung {template.rung}: branches of {delta:,} tokens, which {MIN_STEPS} updates of the largest of "
            f"{N_LEAST} batches want, do not fit the horizon of {horizon:,} tokens; lengthen it or shrink the batch"
        )
    start_tokens = start_steps * science.batch_tokens_global
    paid = (work_folder(lab, template.rung).checkpoints / f"u{start_steps:08d}").is_dir()
    branches = tuple(
        _branch(setting, template, shards, seqs=seqs, delta=delta, first=start_steps * science.batch_seqs_global)
        for seqs in sizes
    )
    seconds = _seconds(setting, branches, 0 if paid else start_tokens, science.batch_seqs_global)
    tokens = len(sizes) * delta + (0 if paid else start_tokens)
    return BranchPlan(
        rung=template.rung,
        start=_start(setting, template, shards),
        start_steps=start_steps,
        start_tokens=start_tokens,
        base_tokens=science.batch_tokens_global,
        delta_tokens=delta,
        mark_tokens=delta // N_MARKS,
        branches=branches,
        lab=str(lab.resolve()),
        burn_in_paid=paid,
        box=setting.box,
        flops=tokens * flops_per_token(science.shape, science.n_vocab),
        tokens=tokens,
        seconds=seconds,
        beta2_steps=beta2_steps,
    )


def _sizes(base_seqs: int, context: int, wished_tokens: float, beta2_steps: float) -> tuple[tuple[int, ...], int]:
    """Batches in sequences, doubling, and tokens of each branch: whole marks of the largest."""
    steps = max(MIN_STEPS, math.ceil(MIN_MEMORIES * beta2_steps))
    smallest = max(1, round(SMALLEST_FRAC * base_seqs))
    least = smallest * 2 ** (N_LEAST - 1)
    most = max(least, LARGEST * base_seqs)
    longest = wished_tokens / context / steps  # the largest batch of which this is enough updates
    largest = least
    while 2 * largest <= min(most, longest):
        largest *= 2
    n_steps = max(steps, wished_tokens / context / largest)
    every = max(1, round(n_steps / N_MARKS))
    while every * N_MARKS < steps:
        every += 1
    sizes = tuple(smallest * 2**i for i in range(int(math.log2(largest // smallest)) + 1))
    return sizes, every * N_MARKS * largest * context


def _execution(setting: Setting, template: RunSpec, seqs: int) -> dict[str, Any]:
    """What burn-in and branches have in common."""
    split = split_batch(setting, seqs)
    if split is None:
        context = setting.shape.context_tokens
        raise SpecError(f"rung {setting.rung.name}: not even one sequence of {context} tokens fits the card")
    rate = rate_of(setting, *split)[0]
    return {
        "n_processes": 1,
        "microbatch_seqs_per_rank": split[1],
        "checkpoint_every_steps": None,
        "noise_every_steps": None,
        "sharding": "none",
        "trackers": (),
        "rate": rate,
    }


def _start(setting: Setting, template: RunSpec, shards: Path) -> RunSpec:
    science = replace(template.science, batch_warmup=None)
    name = f"{template.rung}-start"
    common = _execution(setting, template, science.batch_seqs_global)
    del common["rate"]
    return replace(
        template,
        rung=name,
        run_id=make_run_id(name, science),
        science=science,
        execution=replace(template.execution, curve_every_tokens=None, **common),
        shards=str(shards.resolve()),
    )


def _branch(setting: Setting, template: RunSpec, shards: Path, *, seqs: int, delta: int, first: int) -> BranchSpec:
    """A branch at one batch: the template's science with another batch and a constant rate."""
    context = setting.shape.context_tokens
    batch, n_steps = seqs * context, delta // (seqs * context)
    base, optim = template.science.batch_seqs_global, template.science.optim
    share = min(1.0, seqs / base)
    windows = max(MIN_WINDOWS, EVAL_TOKENS // context)
    val_tokens = min(template.science.val_tokens // context, windows) * context
    science = replace(
        template.science,
        horizons_tokens=(delta,),
        batch_tokens_global=batch,
        batch_warmup=None,
        optim=replace(optim, beta1=optim.beta1**share, beta2=optim.beta2**share),
        schedule=Schedule(
            name="wsd",
            lr_peak=float(f"{template.science.schedule.lr_peak * math.sqrt(seqs / base):.6g}"),
            warmup_tokens=0,
            decay_frac=1 / n_steps,  # never reached: the branch ends with its trunk
            lr_final_frac=0.0,
        ),
        val_tokens=max(context, val_tokens),
    )
    common = _execution(setting, template, seqs)
    rate = common.pop("rate")
    name = f"{template.rung}-b{batch}"
    return BranchSpec(
        spec=replace(
            template,
            rung=name,
            run_id=make_run_id(name, science),
            science=science,
            execution=replace(
                template.execution,
                log_every_steps=max(1, delta // N_MARKS // batch),
                curve_tokens=science.val_tokens,
                curve_every_tokens=delta // N_MARKS,
                checkpoint_every_s=86_400.0,  # it would begin again
                predicted_s=None if rate is None else delta / rate,
                **common,
            ),
            shards=str(shards.resolve()),
        ),
        n_steps=n_steps,
        first_sequence=first,
    )


def _seconds(setting: Setting, branches: tuple[BranchSpec, ...], burn_in: int, base_seqs: int) -> float | None:
    total = GPU_START_S if setting.box.on_gpu else LAUNCH_S
    parts = [(base_seqs, float(burn_in))]
    for branch in branches:
        science = branch.spec.science
        validated = (N_MARKS + 1) * science.val_tokens * VALIDATION_COST_FRAC
        parts.append((science.batch_seqs_global, science.horizons_tokens[0] + validated))
    for seqs, tokens in parts:
        split = split_batch(setting, seqs)
        rate = rate_of(setting, *split)[0] if split else None
        if rate is None:
            return None
        total += tokens / rate
    return total


# ------------------------------------------------------------------------------------------------------------ running


def windows_path(folder: RunFolder) -> Path:
    """Per-window losses of a branch."""
    return folder.path / "windows.jsonl"


def bill_path(folder: RunFolder) -> Path:
    """Seconds and kWh of a branch or burn-in that came to its end."""
    return folder.path / "bill.json"


def plan_path(plan: BranchPlan) -> Path:
    return plan.folder / "plan.json"


def result_path(lab: Path) -> Path:
    """Where a lab's branch test lies."""
    return lab / "branch" / "result.json"


def is_done(plan: BranchPlan, branch: BranchSpec) -> bool:
    """Whether a branch came to its end, or diverged, which it would do again."""
    folder = plan.run_folder(branch)
    record = folder.read_record()
    return record is not None and record.status in ("finished", "diverged")


def finished_branch(plan: BranchPlan) -> BranchResult | None:
    """The result of this very test, if it is there."""
    path = result_path(Path(plan.lab))
    if not path.exists():
        return None
    try:
        found = codec.read_json(path, BranchResult)
    except SpecError:  # of an older version: run again
        return None
    return found if found.plan_hash == plan.hash else None


def prepare_branch(plan: BranchPlan) -> Path:
    """Writes plan.json and every spec.json; what another plan left is thrown away."""
    path = plan_path(plan)
    if path.exists():
        try:
            same = codec.read_json(path, BranchPlan).hash == plan.hash
        except SpecError:
            same = False
        if not same:
            shutil.rmtree(plan.folder)
    codec.write_json(plan.start_folder.spec, plan.start)
    for branch in plan.branches:
        codec.write_json(plan.run_folder(branch).spec, branch.spec)
    codec.write_json(path, plan)
    return path


def run_branch(plan: BranchPlan, labs: Path, say: Say, *, tolerance_nats: float = TOLERANCE_NATS) -> BranchResult:
    """Runs what is not on disk yet and fits the critical batch.

    Args:
        labs: the folder of labs, whose watchdog guards the cards.

    Raises:
        RunFailed: a branch did not end; the same call goes on.
        DataError: fewer than four branches came to their end.
        Stopped, StoppedByWatchdog: it was asked to, or had to.
    """
    found = finished_branch(plan)
    if found is not None and found.tolerance_nats == tolerance_nats:
        return found
    path = prepare_branch(plan)
    if not all(is_done(plan, branch) for branch in plan.branches):
        say(plan.words)
        code = run_recipe(
            "branch_test",
            ["--plan", str(path)],
            n_processes=1,
            box=plan.box,
            on_gpu=plan.box.on_gpu,
            lab=labs,
            watch=plan.start.watch,
            say=say,
        )
        unfinished = [branch for branch in plan.branches if not is_done(plan, branch)]
        if unfinished:
            record = plan.run_folder(unfinished[0]).read_record() or plan.start_folder.read_record()
            if record is not None and record.stopped_by == "watchdog":
                raise StoppedByWatchdog(f"the branch test was ended by the watchdog: {record.reason}")
            why = record.reason if record and record.reason else f"the launch ended with exit code {code}"
            raise RunFailed(f"{len(unfinished)} branches did not end ({why}); the same command goes on")
    result = summarise(plan, tolerance_nats)
    codec.write_json(result_path(Path(plan.lab)), result)
    for branch in plan.branches:
        shutil.rmtree(plan.run_folder(branch).checkpoints, ignore_errors=True)
    for start in (plan.start_folder, work_folder(Path(plan.lab), plan.rung)):
        shutil.rmtree(start.checkpoints, ignore_errors=True)
    return result


def summarise(plan: BranchPlan, tolerance_nats: float = TOLERANCE_NATS) -> BranchResult:
    """The result from the curves on disk."""
    fit = fit_branches([read_curve(plan, branch) for branch in plan.branches], tolerance_nats=tolerance_nats)
    bills = [
        codec.read_plain_json(path)
        for folder in (plan.start_folder, *map(plan.run_folder, plan.branches))
        if (path := bill_path(folder)).exists()
    ]
    kwh = [bill["kwh"] for bill in bills]
    return BranchResult(
        rung=plan.rung,
        plan_hash=plan.hash,
        base_tokens=plan.base_tokens,
        start_tokens=plan.start_tokens,
        delta_tokens=plan.delta_tokens,
        flops=plan.flops,
        seconds=sum(bill["seconds"] for bill in bills) if bills else None,
        kwh=sum(kwh) if bills and all(k is not None for k in kwh) else None,
        **{f.name: getattr(fit, f.name) for f in fields(Found)},
    )


def read_curve(plan: BranchPlan, branch: BranchSpec) -> Curve:
    """What a branch left on disk."""
    folder = plan.run_folder(branch)
    record = folder.read_record()
    lines = codec.read_jsonl(windows_path(folder))
    return Curve(
        run_id=branch.spec.run_id,
        batch_tokens=branch.spec.science.batch_tokens_global,
        lr=branch.spec.science.schedule.lr_peak,
        tokens=tuple(int(line["tokens"]) for line in lines),
        losses=np.array([line["losses"] for line in lines], dtype=np.float64),
        diverged=record is not None and record.status == "diverged",
    )
