"""What follows from the figures of a published experiment: arithmetic on them, and nothing else.

Every function takes the reference and returns a sentence or two, or None where the figures it needs were not published.
"""

import math
from dataclasses import dataclass

from homelab_scaling.fit.words import brief, listed, short
from homelab_scaling.ladder import Reference
from homelab_scaling.plan.cost import GPU_MFU_WIDE
from homelab_scaling.plan.memory import EIGHT_BIT_STATE_BYTES
from homelab_scaling.plan.peaks import find_card
from homelab_scaling.report.states import Memory
from homelab_scaling.report.words import duration, flops_text, gigabytes, percent
from homelab_scaling.watch.energy import WallModel

KAPLAN_N = 0.076
"""Exponent of L(N), Kaplan et al. 2020 eq. 1.1."""
ADAMW_STATE_BYTES = 16
"""A parameter's weight, gradient and two moments in fp32."""
MOMENT_BYTES = 8
BUSY_FRAC, IDLE_FRAC = 0.6, 0.1
"""Of rated power and of peak FLOP/s: cards above the one and below the other are busy with something else."""


@dataclass(frozen=True, kw_only=True)
class Cards:
    """What is known of the published cards, all of them together."""

    words: str
    peak_flops: float | None
    rated_w: float | None


def cards_of(reference: Reference) -> Cards:
    """From what was published, and else from the table of cards."""
    card = find_card(reference.card) if reference.card else None
    peak = reference.peak_flops
    if peak is None and card is not None and card.bf16_tflops is not None:
        peak = card.bf16_tflops * 1e12 * reference.n_cards
    rated = card.board_watts * float(reference.n_cards) if card else None
    return Cards(words=reference.machine or "its machine", peak_flops=peak, rated_w=rated)


def what_follows(reference: Reference, memory: Memory | None) -> tuple[str, ...]:
    """Every sentence that the published figures allow.

    Args:
        memory: of our largest rung, for what of it is ours to add.
    """
    said = (speed(reference), power(reference), tokens(reference), exponent(reference), saving(reference, memory))
    return tuple(one for one in said if one)


def speed(reference: Reference) -> str | None:
    """FLOPs in hours, as a share of the cards' peak."""
    flops, hours = reference.value("flops_total"), reference.value("hours")
    if flops is None or hours is None:
        return None
    cards, rate = cards_of(reference), flops / (hours * 3600)
    said = f"{flops_text(flops)} FLOPs in {hours:g} h are {brief(rate / 1e12)} TFLOP/s"
    if cards.peak_flops is None:
        name = f"{reference.card} is not in the table of cards" if reference.card else "no card was named"
        return f"{said}; what share of the peak that is cannot be said, because {name}."
    share = rate / cards.peak_flops
    said += f": {percent(share)} of the {brief(cards.peak_flops / 1e12)} TFLOP/s that {cards.words} can reach (bf16)"
    if share > 1:
        return f"{said}. That is more than they can do, so one of these figures is wrong."
    if share > GPU_MFU_WIDE / 2:
        return f"{said}."
    least = flops / (GPU_MFU_WIDE * cards.peak_flops)
    return (
        f"{said}. At the {percent(GPU_MFU_WIDE)} of the peak that the plan assumes of wide models the same FLOPs take "
        f"{duration(least)}: most of those hours went to something else than counted matrix products."
    )


def power(reference: Reference) -> str | None:
    """Energy in hours, as watts, and whether that box can draw them."""
    kwh, hours = reference.value("kwh"), reference.value("hours")
    if kwh is None or hours is None:
        return None
    watts = 1000 * kwh / hours
    return _judged(reference, watts, f"{kwh:g} kWh in {hours:g} h are {watts:.0f} W")


def _judged(reference: Reference, watts: float, said: str) -> str:
    cards, wall = cards_of(reference), WallModel()
    if cards.rated_w is None:
        return (
            f"{said}; whether that machine draws as much cannot be said, because its cards' rated power is not known."
        )
    at_plug = wall.joules(cards.rated_w, 1.0)
    box = f"{wall.base_w:.0f} W beside the cards and a power supply of {percent(1 / wall.slope)}, both assumed"
    if watts > at_plug:
        return (
            f"{said}, more than the {at_plug:.0f} W that {cards.words} at their rated {cards.rated_w:.0f} W draw at "
            f"the plug ({box}): one of these figures is wrong, or the machine does more than train."
        )
    share = (watts - wall.base_w) / wall.slope / cards.rated_w
    if share <= 0:
        return (
            f"{said}, less than the machine takes without its cards ({box}): it is not at the plug, or not all of it."
        )
    said += f", consistent with {cards.words}: at the plug it is the cards at {percent(share)} of their rated "
    said += f"{cards.rated_w:.0f} W ({box})"
    if watts > cards.rated_w:
        said += "; the cards alone are not rated for as much."
    else:
        said += f"; if it is of the cards alone, they ran at {percent(watts / cards.rated_w)} of it."
    return said + (_busy_with_what(reference, cards) if share >= BUSY_FRAC else "")


def _busy_with_what(reference: Reference, cards: Cards) -> str:
    """Where cards draw most of their power and reach little of their peak."""
    flops, hours = reference.value("flops_total"), reference.value("hours")
    if flops is None or hours is None or cards.peak_flops is None:
        return ""
    of_peak = flops / (hours * 3600) / cards.peak_flops
    if of_peak > IDLE_FRAC:
        return ""
    return (
        f" So the cards drew much of their rated power while reaching {percent(of_peak)} of their peak: they were busy "
        "with memory traffic, or with work that the FLOPs do not count."
    )


def tokens(reference: Reference) -> str | None:
    """At most how many tokens a parameter the largest model can have seen."""
    flops, n = reference.value("flops_total"), reference.largest
    if flops is None or n is None:
        return None
    most = flops / (6 * n)
    return (
        f"Had all {flops_text(flops)} FLOPs gone to the largest model of {short(n)} parameters, it would have seen "
        f"{short(most)} tokens by 6 N D, {brief(most / n)} a parameter (the rule of thumb is 20); with the others in "
        "the same budget it saw fewer."
    )


def exponent(reference: Reference) -> str | None:
    """What R^2 and the number of models say of the exponent's error."""
    value, r2, n = reference.value("exponent_n"), reference.value("r2"), reference.n_models
    if value is None or r2 is None or n is None or n < 3:
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(n - 2, 0.975)) * value * math.sqrt((1 / r2 - 1) / (n - 2))
    low, high = value - half, value + half
    other = "and" if low <= KAPLAN_N <= high else "but not"
    said = (
        f"A line through {n} models in log-log with R² = {r2:g} has an exponent of {value:g} ± {half:.2g} (95 %, from "
        f"R² and the number of points alone): [{brief(low)}, {brief(high)}], {other} Kaplan's {KAPLAN_N:g} in it"
    )
    if low <= KAPLAN_N <= high:
        return f"{said}, so the two cannot be told apart."
    return f"{said}."


def saving(reference: Reference, memory: Memory | None) -> str | None:
    """What the saving of 8-bit moments can be a share of."""
    share = reference.value("optimizer_saving_frac")
    if share is None:
        return None
    whole = (MOMENT_BYTES - EIGHT_BIT_STATE_BYTES) / ADAMW_STATE_BYTES
    said = (
        f"{percent(share)} less memory with AdamW8bit can be of the model's state: {ADAMW_STATE_BYTES} bytes a "
        f"parameter become {ADAMW_STATE_BYTES - MOMENT_BYTES + EIGHT_BIT_STATE_BYTES:.2f}, {percent(whole)} less where "
        "all moments are in 8 bit"
    )
    if memory is not None:
        said += f" ({percent(memory.saved_of_state_frac)} for our {memory.rung}, whose embedding keeps 32-bit moments)"
    peak, n = reference.value("peak_vram_bytes"), reference.largest
    if peak is None or n is None:
        if memory is None:
            return f"{said}."
        of_ours = f"it is {percent(memory.saved_of_peak_frac)} for our {memory.rung}"
        return f"{said}. Of the peak, activations and all, {of_ours}."
    saved = (MOMENT_BYTES - EIGHT_BIT_STATE_BYTES) * n
    of_peak = saved / (peak + saved)
    if share * peak <= saved:
        return f"{said}; of a peak of {gigabytes(peak)} they save {percent(of_peak)}, so it can be of that, too."
    ours = "" if memory is None else f" ({percent(memory.saved_of_peak_frac)} for our {memory.rung})"
    return (
        f"{said}. It cannot be of the peak: 8-bit moments save {gigabytes(saved)} at {short(n)} parameters, "
        f"{percent(of_peak)} of a peak of {gigabytes(peak)} and what they saved{ours}; {percent(share)} of "
        f"{gigabytes(peak)} would be {gigabytes(share * peak)}, where all moments together take "
        f"{gigabytes(MOMENT_BYTES * n)}."
    )


def not_said(reference: Reference) -> str:
    """Which model a figure is of, where that was not published."""
    open_ones = [
        f"−{-figure.value:g}" for figure in reference.figures if figure.of == "slope_c" and figure.rung is None
    ]
    return f"Which model the slope of {listed(open_ones)} is of was not said." if open_ones else ""
