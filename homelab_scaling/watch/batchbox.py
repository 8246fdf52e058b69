"""The batch of the run in focus as words: its size, the noise scale, and what B_crit makes of it."""

from rich.text import Text

from homelab_scaling.watch import words
from homelab_scaling.watch.bars import Part, fit, part
from homelab_scaling.watch.frame import BatchNow, RunNow


def batch_line(run: RunNow, width: int) -> Text | None:
    """Batch, noise scale and critical batch; None where nothing is known but the batch."""
    batch = run.batch
    if batch is None or (batch.noise is None and batch.critical is None and batch.n_steps == 1):
        return None
    return fit([batch_part(batch, 2), _noise(batch), _critical(batch)], width)


def batch_part(batch: BatchNow, keep: int) -> Part:
    """The present batch, and which of the sizes of a warm-up it is."""
    step = f"{batch.step} of {batch.n_steps}"
    warm, short = (f" (size {step})", f" ({step})") if batch.n_steps > 1 else ("", "")
    return part(keep, f"batch {words.count(batch.tokens)} tokens{warm}", f"batch {words.tokens(batch.tokens)}{short}")


def _noise(batch: BatchNow) -> Part:
    noise = batch.noise
    if noise is None:
        return part(1, "noise scale not measured yet")
    if noise.tokens is None:
        least = words.tokens(noise.at_least_tokens or 0.0)
        return part(4, f"noise scale at least {least}", f"noise ≥ {least}")
    said = words.tokens(noise.tokens)
    ends = ""
    if noise.low_tokens is not None and noise.high_tokens is not None:
        ends = f" [{words.tokens(noise.low_tokens)}, {words.tokens(noise.high_tokens)}]"
    return part(
        4,
        ["noise scale ", (said, "bold"), ends],
        ["noise ", (said, "bold")],
    )


def _critical(batch: BatchNow) -> Part | None:
    """B_crit and what the present batch costs by it."""
    critical = batch.critical
    if critical is None:
        return None
    side = "at least" if critical.basis == "bound" else critical.c_side
    about, sign = (f"{side} ", "≥ " if side == "at least" else "≤ ") if side else ("", "")
    said = words.tokens(critical.tokens)
    ends = "" if about else f" [{words.tokens(critical.low_tokens)}, {words.tokens(critical.high_tokens)}]"
    doubt = "uncalibrated" if critical.calibration == "uncalibrated" else f"by {critical.calibration}"
    ground = "" if critical.basis in ("measured", "bound") else f"{critical.basis}, "
    cost_side = {"at least": "at most ", "at most": "at least "}.get(side or "", "")
    cost = f"{cost_side}{words.percent(batch.tokens / critical.tokens)} more tokens than a small batch"
    return part(
        3,
        f"B_crit {about}{said}{ends} ({ground}{doubt}): {cost}",
        f"B_crit {about}{said}{ends} ({ground}{doubt})",
        f"B_crit {about}{said} ({doubt})",
        f"B_crit {sign}{said}",
    )
