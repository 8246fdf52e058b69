"""What decides a rung's result: tokens, batch, learning rate, precision."""

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder, Rung
from homelab_scaling.plan import rules
from homelab_scaling.plan.given import Given
from homelab_scaling.plan.parts import (
    AdvisedBatch,
    HorizonPlan,
    OtherMode,
    Size,
    Training,
)
from homelab_scaling.plan.rules import gap
from homelab_scaling.specs import NEARLY_AS_GOOD_EPOCHS, Precision

FP32_BELOW_WIDTH_ON_CPU = 256
"""Narrower models gain nothing from bf16 on a CPU."""


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
        n_epochs=tokens / given.corpus.n_tokens_unique if given.corpus else None,
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
    _warn_of_sources(given, name, longest)
    if longest.n_epochs is None or given.corpus is None or longest.n_epochs <= 1:
        return
    allowed, have = given.ladder.data.max_epochs, given.corpus.n_tokens_unique
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


def _warn_of_sources(given: Given, name: str, longest: HorizonPlan) -> None:
    """Names the sources of a mixture that a run reads more often than repeated text is good for."""
    if given.corpus is None:
        return
    passes = longest.tokens / given.corpus.train.n_tokens
    for share in given.corpus.mixture:
        times = share.epochs * passes
        if share.epochs > 1 and times > NEARLY_AS_GOOD_EPOCHS:
            given.warn(
                f"rung {name}: {longest.tokens:,} tokens read {_last_part(share.name)} {times:.1f} times; up to "
                f"{NEARLY_AS_GOOD_EPOCHS} times is nearly as good as new text, so lower its weight or give it more text"
            )


def _last_part(source: str) -> str:
    return source if source.startswith("hf:") else source.rstrip("/").rpartition("/")[2]


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
