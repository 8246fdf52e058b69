"""One rung, resolved: its size, its training, its place on the cards, its launches and its bill.

Each `plan_*` function takes what the ladder says and the parts made before it, and returns one frozen part. What was
wished and not met goes to `Given.warn`; what cannot be run at all is a SpecError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from homelab_scaling.box import Box
from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder, Rung
from homelab_scaling.plan import cost, memory, noise, rules
from homelab_scaling.plan.cost import MeasuredRate, Rate
from homelab_scaling.plan.counting import count_params, flops_6nd_per_token, flops_per_token
from homelab_scaling.plan.ddp_times import DdpMeasurement
from homelab_scaling.plan.memory import LossPath, VramEstimate
from homelab_scaling.plan.parts import (
    AdvisedBatch,
    Bill,
    FlopsPerToken,
    HorizonPlan,
    Launch,
    OtherMode,
    Placement,
    RungPlan,
    Size,
    Training,
)
from homelab_scaling.plan.rules import gap
from homelab_scaling.plan.tuned import TunedRates
from homelab_scaling.specs import CorpusManifest, ModelShape, OptimizerName, Precision

FP32_BELOW_WIDTH_ON_CPU = 256
"""Narrower models gain nothing from bf16 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What every part reads."""

    ladder: Ladder
    corpus: CorpusManifest | None
    box: Box
    n_vocab: int
    val_tokens: int
    measured: Sequence[MeasuredRate]
    watts: float | None
    warn: Callable[[str], None]
    ddp: DdpMeasurement | None = None
    advised: Mapping[str, AdvisedBatch] = field(default_factory=dict)
    """Measured batches by rung, for those to which the ladder gives none."""
    tuned: TunedRates | None = None
    """Rates tuned on the smallest rungs, where the ladder asks for that."""


def plan_rung(given: Given, rung: Rung) -> RungPlan:
    """Every number of one rung.

    Raises:
        SpecError: it cannot be run as written.
    """
    size = plan_size(given, rung)
    training = plan_training(given, rung, size)
    placement = plan_placement(given, rung, size, training)
    rate = cost.predict_rate(
        size.shape,
        given.n_vocab,
        box=given.box,
        n_processes=placement.n_processes,
        microbatch_seqs=placement.microbatch_seqs_per_rank,
        accumulation_steps=placement.accumulation_steps,
        precision=training.precision,
        activation_checkpointing=given.ladder.train.activation_checkpointing,
        sharding=given.ladder.train.sharding,
        measured=given.measured,
        ddp=given.ddp,
    )
    launches = plan_launches(given, rung, training, placement, rate)
    bill = plan_bill(given, size=size, training=training, placement=placement, launches=launches, rate=rate)
    warmup = noise.plan_warmup(
        given.ladder,
        rung=rung.name,
        batch_tokens=training.batch_tokens,
        n_ranks=placement.n_processes,
        warn=given.warn,
    )
    return RungPlan(
        name=rung.name,
        size=size,
        training=training,
        placement=placement,
        launches=launches,
        bill=bill,
        batch_warmup=warmup,
    )


# ---------------------------------------------------------------------------------------------------------------- size


def plan_size(given: Given, rung: Rung) -> Size:
    """Shape, parameters and FLOPs per token."""
    ladder, vocab = given.ladder, given.n_vocab
    if rung.n_params_target is not None:
        shape = rules.nearest_shape(rung.n_params_target, vocab, ladder.context_tokens, tied=ladder.tied)
    else:
        assert rung.n_layer is not None and rung.d_model is not None and rung.n_head is not None
        shape = ModelShape(
            n_layer=rung.n_layer,
            d_model=rung.d_model,
            n_head=rung.n_head,
            context_tokens=ladder.context_tokens,
            tied=ladder.tied,
        )
    params = count_params(shape, vocab)
    if rung.n_params_target is not None and abs(gap(rung.n_params_target, params.n_params)) > rules.GAP_WARN_FRAC:
        given.warn(
            f"rung {rung.name}: wanted {rung.n_params_target:,} parameters, the nearest shape has {params.n_params:,} "
            f"({gap(rung.n_params_target, params.n_params):+.0%}); change n_params_target or tokenizer, or give a shape"
        )
    return Size(
        shape=shape,
        n_params_wanted=rung.n_params_target,
        n_params=params.n_params,
        params=params,
        flops_per_token=FlopsPerToken(
            causal=flops_per_token(shape, vocab),
            full=flops_per_token(shape, vocab, attention="full"),
            causal_padded=flops_per_token(shape, vocab, padded=True),
            full_padded=flops_per_token(shape, vocab, attention="full", padded=True),
            six_n=flops_6nd_per_token(params.n_params),
        ),
    )


# ------------------------------------------------------------------------------------------------------------ training


def plan_training(given: Given, rung: Rung, size: Size) -> Training:
    """Tokens, batch, learning rate and precision: the science of the rung."""
    ladder = given.ladder
    advised = _advised(given, rung, size)
    wanted_batch, batch, source = _batch(given, rung, size, advised)
    wishes = _wishes(ladder, rung, size, batch)
    horizons = tuple(_horizon(given, rung.name, wish, batch, size, said=True) for wish in wishes)
    tokens = _distinct(rung.name, horizons, batch)
    _check_epochs(given, rung.name, horizons[-1])
    if tokens[0] < rules.FEW_STEPS * batch:
        given.warn(
            f"rung {rung.name}: {horizons[0].n_steps} steps to the smallest horizon are too few for a loss that means "
            f"anything; shrink batch.tokens ({batch:,}) or lengthen the horizon"
        )
    lr = rules.choose_lr(rung, ladder.lr, size.params.n_body, tokens[-1])
    outside = size.params.n_body < rules.STEP_LAW_MIN_BODY or tokens[-1] < rules.STEP_LAW_MIN_TOKENS
    if lr.source == "Step Law" and outside:
        given.warn(
            f"rung {rung.name}: Step Law's rate {lr.value:.1e} is far outside the sizes it was fitted on (N_body above "
            '40M, D above 0.1B); measure the rate on the smallest rung and use lr.rule = "power"'
        )
    if advised is not None:
        lr = rules.scaled_lr(lr, rung, ladder.lr, advised.lr_scale)
    elif source not in ("rung", "ladder"):
        lr = rules.scaled_lr(lr, rung, ladder.lr, rules.unmeasured_lr_scale(ladder.lr, batch))
    lr = _tuned(given, rung, size, batch, lr)
    warmup = rules.warmup_tokens(ladder.schedule.warmup_frac, tokens[0], batch)
    if ladder.schedule.name == "wsd":
        _check_decays(given, rung.name, tokens, batch, warmup)
    return Training(
        horizons=horizons,
        other=_other_mode(given, rung, batch, size),
        batch_tokens_wanted=wanted_batch,
        batch_tokens=batch,
        batch_source=source,
        lr_peak=lr.value,
        lr_source=lr.source,
        warmup_tokens=warmup,
        precision=_precision(given, rung.name, size.shape.d_model),
        beta2=advised.beta2 if advised else None,
    )


def _advised(given: Given, rung: Rung, size: Size) -> AdvisedBatch | None:
    """What batch.json advises, where the ladder gives no batch and it was measured on this model and this text."""
    found = given.advised.get(rung.name)
    if found is None or rung.batch_tokens or given.ladder.batch.tokens:
        return None
    other = "model" if found.shape != size.shape else None
    horizon = None if given.ladder.horizons.steps else max(_wishes(given.ladder, rung, size, batch_tokens=1))
    if horizon is not None and abs(gap(horizon, found.n_tokens)) > rules.GAP_WARN_FRAC:
        other = "horizon"
    if given.corpus is not None and found.data_id != given.corpus.data_id:
        other = "text"
    if other is not None:
        given.warn(
            f"rung {rung.name}: batch.json advises a batch for another {other}, so it is not taken; run `homelab "
            "batch-size` again"
        )
        return None
    return found


def _tuned(given: Given, rung: Rung, size: Size, batch: int, lr: rules.Choice) -> rules.Choice:
    """The rung's rate by lr.json: its own where it was tuned or had begun, else the rule's times what tuning found."""
    tuned, table = given.tuned, given.ladder.lr
    if tuned is None or not table.bracket or rung.lr_peak is not None:
        return lr
    if (other := tuned.holds_for(table, given.corpus.data_id if given.corpus else None)) is not None:
        given.warn(f"rung {rung.name}: lr.json holds rates tuned for {other}, so they are not taken")
        return lr
    if rung.name in tuned.kept:
        return rules.Choice(value=tuned.kept[rung.name], source="begun before tuning")
    own = tuned.rung(rung.name)
    if own is not None and (own.shape, own.batch_tokens) == (size.shape, batch):
        return rules.Choice(value=own.lr_peak, source="tuned")
    if not tuned.rungs:
        return lr
    factor = tuned.factor(size.params.n_body)
    return rules.Choice(value=lr.value * factor, source=f"{lr.source} x {factor:.2f}, {tuned.source}")


def _batch(given: Given, rung: Rung, size: Size, advised: AdvisedBatch | None) -> tuple[int, int, str]:
    """Wanted tokens, actual tokens, source. One batch for all horizons of the rung."""
    ladder, context, ranks = given.ladder, size.shape.context_tokens, given.ladder.train.processes or 1
    wanted = rung.batch_tokens or ladder.batch.tokens
    source = "rung" if rung.batch_tokens else "ladder"
    if advised is not None:
        wanted, source = advised.batch_tokens, advised.basis
    if wanted is None:
        longest = None if ladder.horizons.steps else max(_wishes(ladder, rung, size, batch_tokens=1))
        choice = rules.unmeasured_batch(ladder.lr, longest)
        wanted, source = round(choice.value), choice.source
    batch = rules.round_batch(wanted, context, n_ranks=ranks, derived=source == "Step Law")
    if abs(gap(wanted, batch)) > rules.GAP_WARN_FRAC:
        given.warn(
            f"rung {rung.name}: wanted a batch of {wanted:,} tokens, {batch:,} is the nearest that splits into whole "
            f"{context}-token sequences on {ranks} ranks ({gap(wanted, batch):+.0%}); change batch.tokens, "
            "context_tokens or train.processes"
        )
    return wanted, batch, source


def _wishes(ladder: Ladder, rung: Rung, size: Size, batch_tokens: int) -> list[float]:
    """Wanted tokens of each horizon, ascending."""
    h = ladder.horizons
    if h.mode == "nominal":
        assert rung.nominal_tokens is not None
        return [float(rung.nominal_tokens)]
    if h.flops:
        return sorted(c / size.flops_per_token.causal for c in h.flops)
    if h.tokens_per_param:
        return sorted(r * size.n_params for r in h.tokens_per_param)
    return sorted(float(t) for t in h.tokens) or sorted(float(s * batch_tokens) for s in h.steps)


def _horizon(given: Given, name: str, wish: float, batch: int, size: Size, *, said: bool) -> HorizonPlan:
    """The nearest whole number of batches; `said` warns of a gap above 10 %."""
    tokens = rules.round_horizon(wish, batch, f"rung {name}")
    if said and abs(gap(wish, tokens)) > rules.GAP_WARN_FRAC:
        given.warn(
            f"rung {name}: wanted {wish:,.0f} tokens, whole batches of {batch:,} give {tokens:,} "
            f"({gap(wish, tokens):+.0%}); change horizons or shrink batch.tokens"
        )
    return HorizonPlan(
        wanted_tokens=round(wish),
        tokens=tokens,
        n_steps=tokens // batch,
        tokens_per_param=tokens / size.n_params,
        n_epochs=tokens / given.corpus.train.n_tokens if given.corpus else None,
        flops=tokens * size.flops_per_token.causal,
        flops_6nd=tokens * size.flops_per_token.six_n,
    )


def _other_mode(given: Given, rung: Rung, batch: int, size: Size) -> OtherMode | None:
    """The published D beside a solved one, or the solved D beside a published one."""
    h = given.ladder.horizons
    if h.mode == "exact":
        wish = rung.nominal_tokens
    else:
        wish = round(h.flops[0] / size.flops_per_token.causal) if len(h.flops) == 1 else None
    if wish is None:
        return None
    row = _horizon(given, rung.name, wish, batch, size, said=False)
    return OtherMode(mode="nominal" if h.mode == "exact" else "exact", row=row)


def _distinct(name: str, horizons: tuple[HorizonPlan, ...], batch: int) -> tuple[int, ...]:
    tokens = tuple(h.tokens for h in horizons)
    if len(set(tokens)) < len(tokens):
        raise SpecError(
            f"rung {name}: horizons {', '.join(f'{h.wanted_tokens:,}' for h in horizons)} round to "
            f"{', '.join(f'{t:,}' for t in tokens)} tokens in whole batches of {batch:,}, and one is there twice; "
            "space them wider or shrink the batch"
        )
    return tokens


def _check_epochs(given: Given, name: str, longest: HorizonPlan) -> None:
    if longest.n_epochs is None or given.corpus is None or longest.n_epochs <= 1:
        return
    allowed, have = given.ladder.data.max_epochs, given.corpus.train.n_tokens
    if longest.n_epochs > allowed:
        missing = longest.tokens / allowed - have
        raise SpecError(
            f"rung {name}: {longest.tokens:,} tokens are {longest.n_epochs:.1f} passes over the {have:,} tokens of "
            f"training text, data.max_epochs allows {allowed:g}; add {missing:,.0f} tokens of text, shorten the "
            "horizon or raise data.max_epochs"
        )
    given.warn(
        f"rung {name}: {longest.tokens:,} tokens are {longest.n_epochs:.2f} passes over the training text; repeated "
        "text counts for less than new text, add some or shorten the horizon"
    )


def _check_decays(given: Given, name: str, tokens: tuple[int, ...], batch: int, warmup: int) -> None:
    frac = given.ladder.schedule.decay_frac
    for horizon in tokens:
        steps = horizon // batch
        trunk = (steps - rules.decay_steps(steps, frac)) * batch
        if trunk < warmup or trunk < batch:
            raise SpecError(
                f"rung {name}: the decay to {horizon:,} tokens would begin after {trunk:,}, which leaves no trunk "
                f"between it and the warm-up of {warmup:,}; lower schedule.decay_frac ({frac:g}) or shrink the batch "
                f"({batch:,})"
            )
    if frac > 0.5:
        given.warn(
            f"schedule.decay_frac = {frac:g}: each decay is longer than the trunk before it; 0.1 to 0.2 is usual"
        )


def _precision(given: Given, name: str, d_model: int) -> Precision:
    asked, box = given.ladder.train.precision, given.box
    if asked == "auto":
        wide = box.on_gpu or d_model >= FP32_BELOW_WIDTH_ON_CPU
        return "bf16" if box.computes_bf16 and wide else "fp32"
    if asked == "bf16" and not box.computes_bf16:
        given.warn(f'rung {name}: train.precision = "bf16", but {box.device} emulates it slowly; use auto or fp32')
    return asked


# ----------------------------------------------------------------------------------------------------------- placement


def plan_placement(given: Given, rung: Rung, size: Size, training: Training) -> Placement:
    """Ranks, micro-batch, accumulation, loss path and the memory they need."""
    seqs = training.batch_tokens // size.shape.context_tokens
    ranks = _processes(given, rung.name, seqs)
    optimizer = given.ladder.optim.name
    asked = given.ladder.train.microbatch_seqs_per_rank
    best = memory.largest_microbatch(
        size.shape,
        given.n_vocab,
        seqs_per_rank=seqs // ranks,
        optimizer=optimizer,
        n_processes=ranks,
        precision=training.precision,
        card_bytes=given.box.vram_bytes,
        loss_path=None if given.ladder.train.loss == "auto" else given.ladder.train.loss,
    )
    if asked is not None and (seqs // ranks) % asked:
        raise SpecError(
            f"rung {rung.name}: train.microbatch_seqs_per_rank = {asked} does not divide the {seqs // ranks} sequences "
            f"of a rank's batch; choose a divisor{f', such as {best}' if best else ''}"
        )
    microbatch = asked or best or 1
    path = _loss_path(given, microbatch * size.shape.context_tokens)
    both: tuple[OptimizerName, OptimizerName] = (optimizer, "adamw" if optimizer == "adamw8bit" else "adamw8bit")
    estimates = tuple(
        memory.predict_vram(
            size.shape,
            given.n_vocab,
            optimizer=name,
            microbatch_seqs=microbatch,
            n_processes=ranks,
            precision=training.precision,
            loss_path=path,
        )
        for name in both
    )
    card = given.box.vram_bytes
    fits = None if card is None else estimates[0].total_bytes <= memory.CARD_SHARE * card
    if card is not None and not fits:
        _warn_too_large(given, rung.name, estimates[0], card, best)
    return Placement(
        n_processes=ranks,
        microbatch_seqs_per_rank=microbatch,
        accumulation_steps=seqs // ranks // microbatch,
        loss_path=path,
        memory=estimates,
        vram_bytes={e.optimizer: e.total_bytes for e in estimates},
        fits=fits,
    )


def _processes(given: Given, name: str, batch_seqs: int) -> int:
    """Ranks: as asked, or one per GPU as far as the batch divides; one on CPU."""
    asked, box = given.ladder.train.processes, given.box
    if asked is not None:
        if box.on_gpu and asked > box.n_gpus:
            raise SpecError(
                f"train.processes = {asked}, but there are {box.n_gpus} x {box.device}; use at most {box.n_gpus} "
                "or leave it out"
            )
        if not box.on_gpu and asked > box.n_cores:
            given.warn(f"train.processes = {asked} on {box.n_cores} CPU cores: the ranks will wait for each other")
        return asked
    ranks = next(k for k in range(max(1, box.n_gpus), 0, -1) if batch_seqs % k == 0)
    if ranks < box.n_gpus:
        given.warn(
            f"rung {name}: a batch of {batch_seqs} sequences does not split over {box.n_gpus} GPUs, so it uses "
            f"{ranks}; change batch.tokens"
        )
    return ranks


def _loss_path(given: Given, microbatch_tokens: int) -> LossPath:
    asked = given.ladder.train.loss
    return (
        memory.choose_loss_path(microbatch_tokens, given.n_vocab, on_gpu=given.box.on_gpu) if asked == "auto" else asked
    )


def _warn_too_large(given: Given, name: str, need: VramEstimate, card: int, best: int | None) -> None:
    room = memory.CARD_SHARE * card
    remedy = (
        f"train.microbatch_seqs_per_rank = {best} would fit"
        if best is not None
        else "not even one sequence fits; shorten context_tokens, narrow the model or take a larger card"
    )
    given.warn(
        f"rung {name}: needs {need.total_bytes / 2**30:.1f} GiB at {need.microbatch_seqs} sequences a micro-batch, "
        f"{(need.total_bytes - room) / 2**30:.1f} GiB more than 90 % of the card's {card / 2**30:.0f} GiB; {remedy}"
    )


# -------------------------------------------------------------------------------------------------- launches and bill


def plan_launches(
    given: Given, rung: Rung, training: Training, placement: Placement, rate: Rate | None
) -> tuple[Launch, ...]:
    """The runs of one seed, with their validation and measuring cadence and predicted seconds."""
    ladder, batch = given.ladder, training.batch_tokens
    tokens = tuple(h.tokens for h in training.horizons)
    groups = (tokens,) if ladder.schedule.name == "wsd" else tuple((t,) for t in tokens)
    curve_tokens = min(ladder.validation.curve_tokens, given.val_tokens)
    launches = []
    for group in groups:
        trained = rules.tokens_trained(group, batch, ladder.schedule.decay_frac)
        every, stretched = rules.curve_cadence(ladder.validation, group, batch)
        if stretched:
            given.warn(
                f"rung {rung.name}: validation.curve_every_steps = {ladder.validation.curve_every_steps} asks for more "
                f"than 20 points in {group[-1] // batch} steps and becomes {(every or 0) // batch}; raise it"
            )
        validated = len(group) * given.val_tokens + (trained // every * curve_tokens if every else 0)
        seconds = None
        if rate is not None:
            seconds = cost.run_seconds(rate, n_tokens_trained=trained, n_tokens_validated=validated, box=given.box)
        noise_every = noise.plan_cadence(
            ladder,
            rung=rung.name,
            horizons_tokens=group,
            batch_tokens=batch,
            n_passes=placement.accumulation_steps * placement.n_processes,
            warn=given.warn,
        )
        launches.append(
            Launch(
                horizons_tokens=group,
                tokens_trained=trained,
                curve_every_tokens=every,
                seconds=seconds,
                noise_every_steps=noise_every,
            )
        )
    return tuple(launches)


def plan_bill(
    given: Given,
    *,
    size: Size,
    training: Training,
    placement: Placement,
    launches: tuple[Launch, ...],
    rate: Rate | None,
) -> Bill:
    """Tokens, FLOPs, time, energy and money over all seeds; what is unknown says why."""
    n_seeds, box, money = len(given.ladder.seeds), given.box, given.ladder.money
    tokens = n_seeds * sum(launch.tokens_trained for launch in launches)
    known = [launch.seconds for launch in launches if launch.seconds is not None]
    seconds = n_seeds * sum(known) if rate is not None else None
    power = cost.predict_power(
        box, placement.n_processes, given.watts, shape=size.shape, measured=given.measured, money=money
    )
    kwh = cost.kwh_of(seconds, power) if seconds is not None and power is not None else None
    usd = cost.usd_of(seconds, kwh, money)
    usd_energy, usd_machine = cost.usd_parts(seconds, kwh, money)
    unknown = {}
    if rate is None:
        unknown["rate"] = unknown["seconds"] = cost.why_no_rate(box, training.precision)
    if kwh is None:
        unknown["kwh"] = unknown.get("seconds") or cost.why_no_power(box)
    if usd is None:
        priced = money.usd_per_kwh is not None or money.usd_per_machine_hour is not None
        unknown["usd"] = unknown.get("kwh", "") if priced else "the ladder's [money] table states no price"
    return Bill(
        rate=rate,
        n_runs=n_seeds * len(launches),
        tokens_trained=tokens,
        flops=tokens * size.flops_per_token.causal,
        seconds=seconds,
        kwh=kwh,
        usd=usd,
        usd_energy=usd_energy,
        usd_machine=usd_machine,
        power=power,
        unknown=unknown,
    )
