"""The machine that a plan is for: this one, or one described by its cards."""

import dataclasses

from homelab_scaling.box import Box, describe_box, detect_box
from homelab_scaling.errors import SpecError
from homelab_scaling.plan.peaks import box_with


def machine_for(card: str | None, gpus: int | None) -> Box:
    """This machine, or `gpus` cards of a tabled model; 0 is the CPU.

    Raises:
        SpecError: a card that is not in the table, or more than this machine has.
    """
    if card is not None:
        return box_with(card, 1 if gpus is None else gpus)
    box = detect_box()
    if gpus is None or gpus == box.n_gpus:
        return box
    if gpus == 0:
        return describe_box([])
    if not 0 < gpus < box.n_gpus:
        raise SpecError(f"--gpus {gpus}, but this machine has {box.n_gpus}; name the card you mean with --card")
    return dataclasses.replace(box, n_gpus=gpus)
