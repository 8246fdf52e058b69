"""What a branch test runs: one checkpoint of the smallest rung, trained on with several batches for the same tokens.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from homelab_scaling import codec
from homelab_scaling.batch.probe import BURN_IN_FRAC, work_folder
from homelab_scaling.batch.table import Setting, rate_of, split_batch
from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.plan.cost import GPU_START_S, VALIDATION_COST_FRAC
from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.runs import RunFolder
from homelab_scaling.specs import RunSpec, Schedule, make_run_id

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
