"""Losses and rates on their way from the device to metrics.jsonl: kept there until a log boundary asks for them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from homelab_scaling.plan.counting import flops_per_token
from homelab_scaling.runs import Machine
from homelab_scaling.specs import ScienceSpec
from homelab_scaling.train.hooks import Line
from homelab_scaling.train.ledger import peak_flops
from homelab_scaling.train.schedule import Phase
from homelab_scaling.train.session import sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class Pending:
    """One update whose loss and gradient norm are still on the device."""

    step: int
    lr: float
    loss: Tensor
    """Mean over this rank's tokens."""
    grad_norm: Tensor
    batch_tokens: int
    """Of each optimizer update: less than the step's in a batch warm-up."""


class Meter:
    """Collects the updates between two log boundaries."""

    def __init__(self, science: ScienceSpec, machine: Machine, device: torch.device) -> None:
        self.science, self.n_processes, self.device = science, machine.n_processes, device
        self.peak = peak_flops(machine, science.precision)
        self.flops_per_token = flops_per_token(science.shape, science.n_vocab)
        self.pending: list[Pending] = []

    def add(self, update: Pending) -> None:
        """Notes an update without looking at it."""
        self.pending.append(update)

    def drain(self, phase: Phase, update: int) -> tuple[list[Line], Pending | None]:
        """The pending updates as metrics lines (the mean loss over all ranks), and the first non-finite one.

        Waits for the device. Nothing after a non-finite update is reported.
        """
        values = torch.stack([torch.stack((p.loss, p.grad_norm.float())) for p in self.pending])
        values[:, 0] = sum_over_ranks(values[:, 0].contiguous()) / self.n_processes
        pending, self.pending = self.pending, []
        lines: list[Line] = []
        for offset, (one, (loss, norm)) in enumerate(zip(pending, values.tolist(), strict=True)):
            lines.append(
                {
                    "kind": "step",
                    "update": update - len(pending) + offset,
                    "phase": phase.name,
                    "step": one.step,
                    "tokens": (one.step + 1) * self.science.batch_tokens_global,
                    "lr": one.lr,
                    "loss": loss if math.isfinite(loss) else None,
                    "grad_norm": norm if math.isfinite(norm) else None,
                }
            )
            if one.batch_tokens != self.science.batch_tokens_global:
                lines[-1]["batch_tokens"] = one.batch_tokens
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return lines, one
        return lines, None

    def rate(self, phase: Phase, *, update: int, step: int, n_updates: int, seconds: float) -> Line:
        """The speed of the interval that ends here."""
        tokens = n_updates * self.science.batch_tokens_global
        tokens_per_s = tokens / seconds
        on_gpu = self.device.type == "cuda"
        return {
            "kind": "rate",
            "update": update,
            "phase": phase.name,
            "step": step,
            "tokens": step * self.science.batch_tokens_global,
            "interval_tokens": tokens,
            "interval_s": seconds,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.flops_per_token / (self.peak * self.n_processes) if self.peak else None,
            "vram_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        }
