"""What a row cost and what it is worth: turns a finished decay into a `Row`, and rows into record.json."""

from homelab_scaling.plan.counting import count_params, flops_per_token
from homelab_scaling.plan.peaks import peak_bf16_flops
from homelab_scaling.runs import Machine, Row, RunRecord, RunStatus, StoppedBy
from homelab_scaling.specs import CorpusManifest, RunSpec
from homelab_scaling.train.bill import make_bill, why_unknown
from homelab_scaling.train.checkpoint import PAUSED, START, Clock
from homelab_scaling.train.evaluate import Validation
from homelab_scaling.train.schedule import Phase, phases
from homelab_scaling.watch.energy import JOULES_PER_KWH, WallModel


def trunk_of(plan: tuple[Phase, ...], decay: Phase) -> list[Phase]:
    """The trunk phases that lead to this decay."""
    return [p for p in plan if p.kind == "trunk" and p.index < decay.index]


def own_phases(plan: tuple[Phase, ...], decay: Phase) -> list[Phase]:
    """The phases that this row adds to the bill: its decay, and the stretch of trunk since the row before."""
    before = plan[decay.index - 1] if decay.index else None
    return [*([before] if before is not None and before.kind == "trunk" else []), decay]


def make_row(
    *,
    spec: RunSpec,
    corpus: CorpusManifest,
    decay: Phase,
    result: Validation,
    clock: Clock,
    machine: Machine,
    wall: WallModel,
    peak_vram_bytes: int | None,
) -> Row:
    """The row that `decay` earned."""
    science = spec.science
    plan = phases(science)
    counts = count_params(science.shape, science.n_vocab)
    per_token = flops_per_token(science.shape, science.n_vocab)
    alone, own = [*trunk_of(plan, decay), decay], own_phases(plan, decay)
    is_first = all(not p.earns_row for p in plan[: decay.index])
    money, wall = spec.own_money, wall.shared(spec.execution.machine_frac)
    whole = make_bill(clock, [START, *(p.key for p in alone)], money, wall)
    marginal = make_bill(clock, [*([START] if is_first else []), *(p.key for p in own)], money, wall)
    own_tokens = sum(p.n_updates for p in own) * science.batch_tokens_global
    rate = clock.rated_tokens / clock.rated_s if clock.rated_s else None
    peak = peak_flops(machine, science.precision)
    return Row(
        row_id=f"{spec.run_id}@{decay.horizon_tokens}",
        run_id=spec.run_id,
        rung=spec.rung,
        seed=science.seed,
        n_params=counts.n_params,
        n_tokens=decay.horizon_tokens,
        start=science.start,
        loss_nats=result.loss_nats,
        loss_se_nats=result.loss_se_nats,
        bpb=result.bpb,
        flops=per_token * decay.horizon_tokens,
        flops_marginal=per_token * own_tokens,
        n_body=counts.n_body,
        n_pos=counts.n_pos,
        n_embed=counts.n_embed,
        n_head=counts.n_head,
        n_steps=decay.end_step,
        batch_tokens=science.batch_tokens_global,
        lr_peak=science.schedule.lr_peak,
        schedule=science.schedule.name,
        decayed=True,
        optimizer=science.optim.name,
        precision=science.precision,
        data_id=corpus.data_id,
        n_tokens_unique=corpus.unique_tokens(decay.horizon_tokens),
        seconds=whole.seconds,
        seconds_marginal=marginal.seconds,
        tokens_per_s=rate,
        mfu_frac=rate * per_token / (peak * machine.n_processes) if rate and peak else None,
        kwh=whole.kwh,
        kwh_marginal=marginal.kwh,
        kwh_from=whole.kwh_from,
        kwh_err_frac=whole.kwh_err_frac,
        kwh_unmetered_frac=whole.kwh_unmetered_frac,
        kwh_wall=whole.kwh_wall,
        kwh_wall_marginal=marginal.kwh_wall,
        kwh_wall_err_frac=whole.kwh_wall_err_frac,
        usd=whole.usd,
        usd_marginal=marginal.usd,
        usd_energy=whole.usd_energy,
        usd_energy_marginal=marginal.usd_energy,
        usd_machine=whole.usd_machine,
        usd_machine_marginal=marginal.usd_machine,
        peak_vram_bytes=peak_vram_bytes,
    )


def peak_flops(machine: Machine, precision: str) -> float | None:
    """Peak of one device for MFU; None where none is tabled, or where the run is not in bf16."""
    return peak_bf16_flops(machine.device) if precision == "bf16" else None


def make_record(
    *,
    spec: RunSpec,
    rows: tuple[Row, ...],
    machine: Machine,
    clock: Clock,
    status: RunStatus,
    reason: str | None = None,
    stopped_by: StoppedBy | None = None,
    why_no_meter: str,
) -> RunRecord:
    """record.json for the state the run is in now."""
    unknown = {
        column: why
        for column, why in why_unknown(clock, spec.money, why_no_meter).items()
        if not rows or any(getattr(row, column) is None for row in rows)
    }
    if peak_flops(machine, spec.science.precision) is None:
        unknown["mfu_frac"] = (
            f"no peak is tabled for {machine.device}"
            if spec.science.precision == "bf16"
            else "MFU is stated against the bf16 peak, and this run is in fp32"
        )
    if any(row.tokens_per_s is None for row in rows):
        unknown["tokens_per_s"] = "the run had a single log interval, which holds start-up effects"
    if any(row.peak_vram_bytes is None for row in rows):
        unknown["peak_vram_bytes"] = "the run was on CPU"
    return RunRecord(
        run_id=spec.run_id,
        ladder=spec.ladder,
        rung=spec.rung,
        status=status,
        reason=reason,
        stopped_by=stopped_by,
        science_hash=spec.science.hash,
        rows=rows,
        machine=machine,
        seconds_train=sum(clock.train_s.values()),
        seconds_validate=sum(clock.validate_s.values()),
        seconds_checkpoint=sum(clock.checkpoint_s.values()),
        seconds_paused=sum(clock.paused_s.values()),
        seconds_paced=sum(clock.slept_s.values()),
        kwh_paused=clock.energy_j[PAUSED] / JOULES_PER_KWH if PAUSED in clock.energy_j else None,
        unknown=unknown,
    )
