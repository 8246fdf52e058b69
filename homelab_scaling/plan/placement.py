"""A rung's place on the cards: ranks, micro-batch, accumulation, loss path, and whether it fits."""

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Rung
from homelab_scaling.plan import memory
from homelab_scaling.plan.given import Given
from homelab_scaling.plan.memory import LossPath, VramEstimate
from homelab_scaling.plan.parts import Placement, Size, Training
from homelab_scaling.specs import OptimizerName


def plan_placement(given: Given, rung: Rung, size: Size, training: Training) -> Placement:
    """Ranks, micro-batch, accumulation, loss path and the memory they need."""
    seqs = training.batch_tokens // size.shape.context_tokens
    ranks = _processes(given, rung.name, seqs)
    optimizer, table = given.ladder.optim.name, given.ladder.train
    _check_sharding(given, rung.name, ranks)
    asked = table.microbatch_seqs_per_rank
    best = memory.largest_microbatch(
        size.shape,
        given.n_vocab,
        seqs_per_rank=seqs // ranks,
        optimizer=optimizer,
        n_processes=ranks,
        precision=training.precision,
        card_bytes=given.box.vram_bytes,
        loss_path=None if table.loss == "auto" else table.loss,
        checkpointing=table.activation_checkpointing,
        sharding=table.sharding,
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
            accumulates=microbatch < seqs // ranks,
            compiled=table.compile != "off" and given.box.has_compiler,
            checkpointing=table.activation_checkpointing,
            sharding=table.sharding,
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
        peak_vram_bytes=_measured_peak(given, size, training, ranks, microbatch),
    )


def _check_sharding(given: Given, name: str, ranks: int) -> None:
    sharding, optimizer = given.ladder.train.sharding, given.ladder.optim.name
    if sharding != "none" and ranks == 1:
        given.warn(f'rung {name}: train.sharding = "{sharding}" shares nothing on one rank; it trains whole')
    elif sharding != "none" and optimizer == "adamw8bit":
        raise SpecError(
            f'rung {name}: train.sharding = "{sharding}" would cut the blocks of 8-bit optimizer states; set [optim] '
            'name = "adamw", or sharding = "none"'
        )


def _measured_peak(given: Given, size: Size, training: Training, ranks: int, microbatch: int) -> int | None:
    """The highest that finished rows recorded with this placement."""
    table = given.ladder.train
    ours = {
        "shape": size.shape,
        "n_vocab": given.n_vocab,
        "device": given.box.device,
        "n_processes": ranks,
        "precision": training.precision,
        "microbatch_seqs": microbatch,
        "optimizer": given.ladder.optim.name,
        "activation_checkpointing": table.activation_checkpointing,
        "sharding": table.sharding,
    }
    same = [m for m in given.measured if all(getattr(m, key) == value for key, value in ours.items())]
    return max((m.peak_vram_bytes for m in same if m.peak_vram_bytes is not None), default=None)


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
