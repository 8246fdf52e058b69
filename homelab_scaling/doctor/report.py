"""One line of the doctor's report."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, what was found, what to do about it."""

    topic: str
    status: Status
    found: str
    remedy: str | None = None
    """What to do; None only where nothing need be done."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.remedy, f"{self.topic}: a {self.status} without a remedy helps nobody"
