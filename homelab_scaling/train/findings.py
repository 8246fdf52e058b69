"""What --autotune found, and where it is kept: one readable file for each shape, batch, precision, device and torch."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError
from homelab_scaling.plan.memory import LossPath
from homelab_scaling.specs import ModelShape, OptimizerName, Precision

WORTH_FRAC = 0.03
"""A faster choice than the stated rule's must be this much faster: repeats differ by as much."""
Mode = Literal["off", "default", "reduce-overhead"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to execute a step."""

    microbatch_seqs: int
    mode: Mode
    """Of torch.compile."""
    loss: LossPath

    def __str__(self) -> str:
        compiled = {"off": "not compiled", "default": "compiled", "reduce-overhead": "compiled, CUDA graphs"}[self.mode]
        return f"{self.microbatch_seqs} sequences, {compiled}, {self.loss} loss"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a setting came to."""

    setting: Setting
    micro_s: float | None
    """Forward and backward of a micro-batch; None where it is out."""
    update_s: float | None
    """Clipping and the optimizer, once a step."""
    first_s: float | None
    """The first step, compilation included."""
    peak_bytes: int | None
    """Held by torch's allocator; None on a CPU."""
    why_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a finding holds for."""

    shape: ModelShape
    n_vocab: int
    seqs_per_rank: int
    """Of one optimizer step."""
    precision: Precision
    optimizer: OptimizerName
    recompute: bool
    device: str
    n_threads: int | None
    """Of a CPU; None on a GPU."""
    torch: str
    held: tuple[str, ...] = ()
    """What was not to be changed, such as `loss plain`."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Every trial of a minute, the stated rule's choice first."""

    key: Key
    trials: tuple[Trial, ...]
    seconds: float

    def step_s(self, trial: Trial) -> float | None:
        """Seconds of an optimizer step under this trial's setting."""
        if trial.micro_s is None or trial.update_s is None:
            return None
        return self.key.seqs_per_rank / trial.setting.microbatch_seqs * trial.micro_s + trial.update_s

    def best(self, n_steps: int | None = None) -> Trial | None:
        """The trial that is done first with a run of `n_steps`, compilation included; None counts steps alone.

        The rule's own unless another is worth it. None where every trial is out.
        """

        def cost(trial: Trial) -> float | None:
            step_s = self.step_s(trial)
            if step_s is None or n_steps is None:
                return step_s
            return (trial.first_s or 0.0) + n_steps * step_s

        costs = [(c, trial) for trial in self.trials if (c := cost(trial)) is not None]
        if not costs:
            return None
        least, best = min(costs, key=lambda pair: pair[0])
        if costs[0][1] is self.trials[0] and least > (1 - WORTH_FRAC) * costs[0][0]:
            return costs[0][1]
        return best


# ----------------------------------------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """Where findings are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "homelab_scaling" / "autotune"


def cache_file(key: Key, folder: Path) -> Path:
    """A readable name and the key's hash."""
    shape = key.shape
    name = f"L{shape.n_layer}-d{shape.d_model}-T{shape.context_tokens}-{key.precision}"
    return folder / f"{name}-{codec.stable_hash(codec.to_plain(key), n_chars=12)}.json"


def read_finding(key: Key, folder: Path, say: Callable[[str], None]) -> Finding | None:
    """What was found for this key, or None; a damaged file is as good as none, and is told of."""
    path = cache_file(key, folder)
    if not path.exists():
        return None
    try:
        finding = codec.read_json(path, Finding)
    except (HomelabError, OSError) as error:
        say(f"autotune: {path.name} is damaged and is measured again ({error})")
        return None
    return finding if finding.key == key else None
