"""How often nominal 95 % intervals hold the truth, on simulated ladders: 100 worlds a round."""

from collections.abc import Callable
from dataclasses import dataclass

from homelab_scaling.fit.coverage import ALLOWED, N_DRAWS, PROMISED, SettingCoverage, study, table

WORLDS_A_ROUND = 100


@dataclass(frozen=True, kw_only=True)
class CoverageBench:
    """Every setting of the study."""

    settings: tuple[SettingCoverage, ...]

    def summary(self) -> str:
        """For a person."""
        low, high = ALLOWED
        missed = [
            f"{quantity} at {one.setting}"
            for one in self.settings
            for quantity in PROMISED
            if not low <= one.get(quantity).held_frac <= high
        ]
        verdict = f"MISSED by {', '.join(missed)}" if missed else "reached"
        return f"{table(self.settings)}\n{' and '.join(PROMISED)} wanted in {low:.0%} to {high:.0%}: {verdict}"


def run(*, n_rounds: int, say: Callable[[str], None], n_draws: int = N_DRAWS) -> CoverageBench:
    """The study with 100 worlds a round: 500, as the test has them, at the usual five.

    Args:
        n_rounds: hundreds of worlds.
        say: told what is going on.
        n_draws: resamples a world.
    """
    return CoverageBench(settings=tuple(study(n_worlds=n_rounds * WORLDS_A_ROUND, n_draws=n_draws, say=say)))
