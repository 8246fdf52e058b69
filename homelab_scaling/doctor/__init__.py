"""What this box is and whether it can do the job: facts are gathered once, then judged one by one by pure functions.

torch and bitsandbytes are tried in processes of their own, so that a broken one costs a line instead of the command.
"""

from dataclasses import dataclass
from pathlib import Path

from homelab_scaling.box import Box
from homelab_scaling.doctor.driver import Driver
from homelab_scaling.doctor.facts import GIB, PACKAGES, Facts, gather, read_pins
from homelab_scaling.doctor.judge import judge
from homelab_scaling.doctor.measure import DiskSpeed, Matmul, TorchProbe
from homelab_scaling.doctor.report import Finding, Status

__all__ = [
    "GIB",
    "PACKAGES",
    "Checkup",
    "DiskSpeed",
    "Driver",
    "Facts",
    "Finding",
    "Matmul",
    "Status",
    "TorchProbe",
    "examine",
    "gather",
    "judge",
    "read_pins",
]


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """`homelab doctor --json`."""

    box: Box
    findings: tuple[Finding, ...]
    driver: Driver
    matmul: tuple[Matmul, ...]
    """Measured; empty where torch does not work."""
    disk: DiskSpeed

    @property
    def n_fail(self) -> int:
        return sum(f.status == "fail" for f in self.findings)

    @property
    def n_warn(self) -> int:
        return sum(f.status == "warn" for f in self.findings)


def examine(lab: Path) -> Checkup:
    """Every finding about this machine, with `lab` as the folder that will hold the runs."""
    facts = gather(lab)
    return Checkup(
        box=facts.box, findings=judge(facts), driver=facts.driver, matmul=facts.matmul, disk=facts.disk_speed
    )
