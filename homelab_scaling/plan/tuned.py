"""Learning rates that were tuned on the smallest rungs, as far as the plan needs them (LAB/<ladder>/lr.json).

factor(N) = tuned rate / the rule's rate, a power law in body parameters through the tuned rungs; the rate of a larger
rung is the rule's at its own batch times factor(N).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from homelab_scaling.ladder import Ladder, LrTable
from homelab_scaling.plan.parts import RungPlan
from homelab_scaling.specs import ModelShape


@dataclass(frozen=True, kw_only=True)
class TunedRung:
    """A rung whose rate was tuned."""

    name: str
    shape: ModelShape
    n_body: int
    batch_tokens: int
    lr_peak: float
    """Of the run taken: the best that was tried."""
    factor: float
    """Best rate over the rule's, between the tried ones."""
    factor_sd_log: float | None
    """By the noise of seeds; None where it could not be told."""


@dataclass(frozen=True, kw_only=True)
class TunedRates:
    """What larger rungs take."""

    data_id: str
    rule: LrTable
    """[lr] as it was when the rates were tuned."""
    rungs: tuple[TunedRung, ...]
    """Ascending in size."""
    log_factor: float
    slope: float
    """log factor = log_factor + slope log n_body; 0 with one rung."""
    tried: tuple[float, ...] = ()
    """Factors that some rung was trained with; the law is not followed beyond them."""
    kept: dict[str, float] = field(default_factory=dict)
    """Rates of rungs whose training had begun before."""

    def factor(self, n_body: int) -> float:
        """On the rule's rate, of a rung that was not tuned itself; within the factors tried."""
        by_law = math.exp(self.log_factor + self.slope * math.log(n_body))
        return min(max(by_law, min(self.tried)), max(self.tried)) if self.tried else by_law

    def rung(self, name: str) -> TunedRung | None:
        return next((r for r in self.rungs if r.name == name), None)

    def holds_for(self, rule: LrTable, data_id: str | None) -> str | None:
        """Why these rates are not for a ladder with this [lr] and text; None where they are."""
        if data_id is not None and data_id != self.data_id:
            return "another text"
        before, now = (replace(table, bracket=(), bracket_rungs=2) for table in (self.rule, rule))
        return None if before == now else "another [lr] rule"

    @property
    def source(self) -> str:
        """`tuned on 54k, 110k`."""
        return f"tuned on {', '.join(r.name for r in self.rungs)}"

    @property
    def words(self) -> str:
        """What was found, in a sentence or two."""
        found = []
        for r in self.rungs:
            sd = "" if r.factor_sd_log is None else f", good to a factor of {math.exp(r.factor_sd_log):.2f}"
            found.append(f"{r.name} {r.factor:.2f}{sd}")
        law = "one rung, so larger ones take the same factor"
        if len(self.rungs) > 1:
            through = "exactly through two" if len(self.rungs) == 2 else f"fitted to {len(self.rungs)}"
            law = f"larger rungs take a factor that goes as N_body^{self.slope:+.2f}, {through}"
            if self.tried:
                law += f", from {min(self.tried):g} to {max(self.tried):g} at most"
        return f"best rates over the rule's: {', '.join(found)}; {law}"


def rungs_to_tune(ladder: Ladder, rungs: Sequence[RungPlan]) -> list[RungPlan]:
    """The smallest rungs, as many as `lr.bracket_rungs`, that have no rate of their own; none without a bracket."""
    if not ladder.lr.bracket:
        return []
    own = {r.name for r in ladder.rungs if r.lr_peak is not None}
    free = [r for r in rungs if r.name not in own]
    return sorted(free, key=lambda r: r.size.n_params)[: ladder.lr.bracket_rungs]


def cost_words(ladder: Ladder, rungs: Sequence[RungPlan], done: Collection[str]) -> str | None:
    """What tuning will train beside the plan's own runs; None where nothing is left to tune."""
    left = [r for r in rungs_to_tune(ladder, rungs) if r.name not in done]
    if not left:
        return None
    n_more = len(ladder.lr.bracket) - 1
    seconds = [sum(launch.seconds or 0.0 for launch in r.launches) for r in left]
    known = all(launch.seconds is not None for r in left for launch in r.launches)
    took = f"about {n_more * sum(seconds):,.0f} s" if known else "time unknown"
    tokens = n_more * sum(launch.tokens_trained for r in left for launch in r.launches)
    names = ", ".join(r.name for r in left)
    return (
        f"lr.bracket tunes the rate on {names}: {n_more} more rates each, and at most two beyond: {tokens:,} tokens, "
        f"{took}, that are not in the totals; the rates of larger rungs follow from it"
    )
