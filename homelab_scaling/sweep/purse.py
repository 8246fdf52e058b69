"""What a ladder has cost so far: finished rows by their records, everything else by its clock and meters."""

from pathlib import Path

from homelab_scaling.runs import RUNS_FOLDERS
from homelab_scaling.watch import link
from homelab_scaling.watch.energy import read_wall_model
from homelab_scaling.watch.feed import FolderFeed
from homelab_scaling.watch.runview import RunEye

LOOK_EVERY_S = 10.0
MEASURING = ("batch", "batch_sweep/runs", "branch/runs")
"""Of LAB/<ladder>, where probes, sweeps and branches of the batch lie: they train too."""


class Purse:
    """Adds up energy and machine time over all that LAB/<ladder> trains: runs, trials of rates, measured batches.

    Args:
        lab: LAB/<ladder>.
        labs: the folder of labs.
    """

    def __init__(self, lab: Path, labs: Path) -> None:
        self.lab, self.labs = lab, labs
        self._eyes: dict[Path, RunEye] = {}
        self._looked_s, self._usd = float("-inf"), 0.0

    def spent(self, now_s: float) -> float:
        """Dollars so far; looks at the files at most every ten seconds."""
        if now_s - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = now_s
            places = [self.lab / name for name in (*RUNS_FOLDERS, *MEASURING)]
            here = [path for place in places for path in sorted(place.glob("*")) if path.is_dir()]
            self._eyes = {path: self._eyes.get(path) or RunEye(FolderFeed(path)) for path in here}
            for run in self._eyes.values():
                run.look(now_s)
            wall = read_wall_model(link.machine_folder(self.labs))
            self._usd = sum(run.cost(wall).usd or 0.0 for run in self._eyes.values() if run.state != "queued")
        return self._usd
