"""Rungs that are too large for the cards: which one, by how much, and what would fit. Asked before anything starts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from homelab_scaling.errors import SpecError
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan import memory
from homelab_scaling.plan.memory import LossPath
from homelab_scaling.plan.parts import Plan
from homelab_scaling.specs import ModelShape, OptimizerName, Precision, RunSpec

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Need:
    """What decides the memory of a rung's smallest step: one sequence on each rank."""

    rung: str
    shape: ModelShape
    n_vocab: int
    optimizer: OptimizerName
    precision: Precision
    loss_path: LossPath | None
    """None chooses by the rule."""
    checkpointing: bool
    card_bytes: int

    @property
    def bytes(self) -> int:
        """On one card."""
        path = memory.choose_loss_path(self.shape.context_tokens, self.n_vocab, on_gpu=True)
        return memory.predict_vram(
            self.shape,
            self.n_vocab,
            optimizer=self.optimizer,
            microbatch_seqs=1,
            n_processes=1,
            precision=self.precision,
            loss_path=self.loss_path or path,
            checkpointing=self.checkpointing,
        ).total_bytes

    @property
    def room_bytes(self) -> float:
        return memory.CARD_SHARE * self.card_bytes

    @property
    def fits(self) -> bool:
        return self.bytes <= self.room_bytes


def needs_of_plan(plan: Plan, ladder: Ladder) -> list[Need]:
    """Of every rung; none on CPU, nor where states are sharded over the ranks."""
    card, table = plan.box.vram_bytes, ladder.train
    if card is None or table.sharding != "none":
        return []
    return [
        Need(
            rung=rung.name,
            shape=rung.size.shape,
            n_vocab=plan.n_vocab,
            optimizer=ladder.optim.name,
            precision=rung.training.precision,
            loss_path=None if table.loss == "auto" else table.loss,
            checkpointing=table.activation_checkpointing,
            card_bytes=card,
        )
        for rung in plan.rungs
    ]


def need_of_run(spec: RunSpec, card_bytes: int | None) -> Need | None:
    """Of one run; None as above."""
    science, execution = spec.science, spec.execution
    if card_bytes is None or execution.sharding != "none":
        return None
    return Need(
        rung=spec.rung,
        shape=science.shape,
        n_vocab=science.n_vocab,
        optimizer=science.optim.name,
        precision=science.precision,
        loss_path=None if execution.loss == "auto" else execution.loss,
        checkpointing=execution.activation_checkpointing,
        card_bytes=card_bytes,
    )


def refuse_what_fits_no_card(needs: Iterable[Need | None]) -> None:
    """Stops before anything is started.

    Raises:
        SpecError: a rung is too large; all that are too large are named.
    """
    too_large = [need for need in needs if need is not None and not need.fits]
    if not too_large:
        return
    worst = max(too_large, key=lambda need: need.bytes)
    others = list(dict.fromkeys(need.rung for need in too_large if need.rung != worst.rung))
    more = f"; too large as well: {', '.join(others)}" if others else ""
    raise SpecError(why_no_room(worst) + more)


def why_no_room(need: Need) -> str:
    """One sentence about a rung that is too large."""
    over = (need.bytes - need.room_bytes) / GIB
    return (
        f"rung {need.rung}: one sequence of {need.shape.context_tokens} tokens needs {need.bytes / GIB:.1f} GiB, "
        f"{over:.1f} GiB more than 90 % of a card's {need.card_bytes / GIB:.0f} GiB; {what_would_fit(need)}"
    )


def what_would_fit(need: Need) -> str:
    """The mildest changes that make it fit, by their names in the ladder file."""
    shape, recompute, eight_bit = need.shape, "train.activation_checkpointing = true", 'optim.name = "adamw8bit"'
    tries = {
        recompute: replace(need, checkpointing=True),
        eight_bit: replace(need, optimizer="adamw8bit"),
        **{
            f"context_tokens = {tokens}": replace(need, shape=replace(shape, context_tokens=tokens))
            for tokens in (shape.context_tokens // 2, shape.context_tokens // 4)
            if tokens
        },
    }
    fitting = [said for said, one in tries.items() if one.fits][:2]
    if fitting:
        return f"{' or '.join(fitting)} would fit"
    if replace(need, checkpointing=True, optimizer="adamw8bit").fits:
        return f"{recompute} with {eight_bit} would fit"
    for n_layer in range(shape.n_layer - 1, 0, -1):
        if replace(need, shape=replace(shape, n_layer=n_layer)).fits:
            return f"n_layer = {n_layer} instead of {shape.n_layer} would fit"
    return "take a larger card or leave the rung out"
