"""What every part of a rung's plan reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from homelab_scaling.box import Box
from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.cost import MeasuredRate
from homelab_scaling.plan.ddp_times import DdpMeasurement
from homelab_scaling.plan.parts import AdvisedBatch, Start
from homelab_scaling.plan.tuned import TunedRates
from homelab_scaling.specs import CorpusManifest


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
    start: Start | None = None
    """The weights that rungs of its shape begin from."""
