"""One rung, resolved: its size, its training, its place on the cards, its launches and its bill.

Each `plan_*` function takes what the ladder says and the parts made before it, and returns one frozen part. What was
wished and not met goes to `Given.warn`; what cannot be run at all is a SpecError.
"""

from homelab_scaling.ladder import Rung
from homelab_scaling.plan import cost, noise, rules
from homelab_scaling.plan.cost import Rate
from homelab_scaling.plan.counting import count_params, flops_6nd_per_token, flops_per_token
from homelab_scaling.plan.given import Given
from homelab_scaling.plan.parts import (
    Bill,
    FlopsPerToken,
    Launch,
    Placement,
    RungPlan,
    Size,
    Training,
)
from homelab_scaling.plan.placement import plan_placement
from homelab_scaling.plan.rules import gap
from homelab_scaling.plan.training import plan_training
from homelab_scaling.specs import ModelShape


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
