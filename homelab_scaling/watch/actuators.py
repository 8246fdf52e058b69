"""Card settings, for root and only when asked for: power limit, the driver's target temperature, fan speed.

What was set before is written to LAB/machine/actuators.json before anything is changed, and put back (that value, not
the maximum) when the watchdog ends, by whatever exit; after a crash or SIGKILL the next one puts it back at its start.
"""

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from homelab_scaling import codec
from homelab_scaling.errors import HomelabError, MachineError
from homelab_scaling.watch.link import MachineFolder
from homelab_scaling.watch.nvml import Fault

Kind = Literal["power_limit_w", "target_temperature_c", "fan_percent"]

FILE = "actuators.json"
NAMES: dict[Kind, tuple[str, str]] = {
    "power_limit_w": ("power limit", "W"),
    "target_temperature_c": ("target temperature", "C"),
    "fan_percent": ("fan speed", "%"),
}
TOLERANCE: dict[Kind, float] = {"power_limit_w": 1.0, "target_temperature_c": 0.5, "fan_percent": 1.0}
"""A driver may round; more than this is another value."""

# NVML's own numbers.
ACOUSTIC_MIN, ACOUSTIC_CURRENT, ACOUSTIC_MAX = 4, 5, 6
FAN_MANUAL = 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of one card."""

    uuid: str
    kind: Kind
    value: float | None
    """None: the driver's own choice (a fan curve)."""

    def __str__(self) -> str:
        name, unit = NAMES[self.kind]
        return f"{self.uuid}: {name} {'automatic' if self.value is None else f'{self.value:g} {unit}'}"


@dataclass(frozen=True, kw_only=True)
class Journal:
    """actuators.json: what to put back."""

    pid: int
    t_s: float
    previous: tuple[Setting, ...]


class CardSettings(Protocol):
    """What can be read and set; `NvmlSettings`, or a test's."""

    def get(self, uuid: str, kind: Kind) -> float | None:
        """The value now; None for the driver's own choice. Raises Fault."""

    def set(self, uuid: str, kind: Kind, value: float | None) -> None:
        """Raises Fault."""

    def range(self, uuid: str, kind: Kind) -> tuple[float, float]:
        """Lowest and highest value. Raises Fault."""


class NvmlSettings:
    """Settings through NVML.

    Args:
        call: `gpu.Sensors.call`.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def get(self, uuid: str, kind: Kind) -> float | None:
        if kind == "power_limit_w":
            return float(self.call(uuid, "nvmlDeviceGetPowerManagementLimit")) / 1000
        if kind == "target_temperature_c":
            return float(self.call(uuid, "nvmlDeviceGetTemperatureThreshold", ACOUSTIC_CURRENT))
        if self.call(uuid, "nvmlDeviceGetFanControlPolicy_v2", 0) != FAN_MANUAL:
            return None
        return float(self.call(uuid, "nvmlDeviceGetTargetFanSpeed", 0))

    def set(self, uuid: str, kind: Kind, value: float | None) -> None:
        if kind == "fan_percent":
            for fan in range(int(self.call(uuid, "nvmlDeviceGetNumFans"))):
                if value is None:
                    self.call(uuid, "nvmlDeviceSetDefaultFanSpeed_v2", fan)
                else:
                    self.call(uuid, "nvmlDeviceSetFanSpeed_v2", fan, round(value))
        elif value is None:
            raise Fault("unsupported", f"a {NAMES[kind][0]} wants a value")
        elif kind == "power_limit_w":
            self.call(uuid, "nvmlDeviceSetPowerManagementLimit", round(1000 * value))
        else:
            self.call(uuid, "nvmlDeviceSetTemperatureThreshold", ACOUSTIC_CURRENT, round(value))

    def range(self, uuid: str, kind: Kind) -> tuple[float, float]:
        if kind == "power_limit_w":
            low, high = self.call(uuid, "nvmlDeviceGetPowerManagementLimitConstraints")
            return low / 1000, high / 1000
        if kind == "target_temperature_c":
            low, high = (self.call(uuid, "nvmlDeviceGetTemperatureThreshold", k) for k in (ACOUSTIC_MIN, ACOUSTIC_MAX))
            return float(low), float(high)
        low, high = self.call(uuid, "nvmlDeviceGetMinMaxFanSpeed")
        return float(low), float(high)


class Actuators:
    """Sets, and puts back. Enter it around whatever the settings are for.

    Args:
        settings: the cards.
        machine: its folder keeps the journal.
        say: told each change.
        is_root: whether there is permission at all.
    """

    def __init__(
        self,
        settings: CardSettings,
        machine: MachineFolder,
        say: Callable[[str], None],
        *,
        is_root: bool | None = None,
    ) -> None:
        self.settings, self.path, self.say = settings, journal_path(machine), say
        self.is_root = os.geteuid() == 0 if is_root is None else is_root
        self._previous: tuple[Setting, ...] = ()

    def __enter__(self) -> "Actuators":
        atexit.register(self.restore)
        self.restore_left_behind()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        atexit.unregister(self.restore)

    def apply(self, wishes: Sequence[Setting]) -> None:
        """Sets each wish and reads it back; on any refusal everything is put back.

        Raises:
            MachineError: no root, a value out of range, a card that cannot, or one that keeps another value.
        """
        if not wishes:
            return
        if not self.is_root:
            names = " and ".join(dict.fromkeys(NAMES[one.kind][0] for one in wishes))
            raise MachineError(
                f"setting the {names} needs root; run it with sudo, or leave it out: slowing, pausing and stopping "
                "need no root"
            )
        try:
            for wish in wishes:
                self._apply(wish)
        except HomelabError:
            self.restore()
            raise

    def restore(self) -> None:
        """Puts back what this one changed; what cannot be put back stays in the journal and is said."""
        self._previous = self._put_back(self._previous)

    def restore_left_behind(self) -> None:
        """Puts back what one that crashed had changed."""
        left = left_behind(self.path)
        if not left:
            return
        if not self.is_root:
            self.say(how_to_restore(self.path, left))
            self._previous = ()
            return
        self.say(f"an earlier watchdog ended without putting back {len(left)} settings of the cards; doing it now")
        self._previous = self._put_back(left)

    def _apply(self, wish: Setting) -> None:
        name, unit = NAMES[wish.kind]
        try:
            self._check_range(wish)
            before = self.settings.get(wish.uuid, wish.kind)
            if all((p.uuid, p.kind) != (wish.uuid, wish.kind) for p in self._previous):
                self._write((*self._previous, Setting(uuid=wish.uuid, kind=wish.kind, value=before)))
            self.settings.set(wish.uuid, wish.kind, wish.value)
            now = self.settings.get(wish.uuid, wish.kind)
        except Fault as fault:
            raise MachineError(f"{wish.uuid}: the driver refuses to set the {name} ({fault}); leave it out") from None
        if not _same(now, wish):
            raise MachineError(
                f"{wish.uuid}: {name} of {wish.value} {unit} was set, {now} {unit} is what the card keeps; leave it out"
            )
        was = Setting(uuid=wish.uuid, kind=wish.kind, value=before)
        self.say(f"{wish} (was {str(was).rpartition(f'{name} ')[2]})")

    def _check_range(self, wish: Setting) -> None:
        name, unit = NAMES[wish.kind]
        try:
            low, high = self.settings.range(wish.uuid, wish.kind)
        except Fault as fault:
            if fault.kind == "unsupported":
                return  # newer cards do not tell it; the driver refuses what it must
            raise
        if wish.value is not None and not low <= wish.value <= high:
            raise MachineError(
                f"{wish.uuid}: {name} of {wish.value:g} {unit} was asked for; choose {low:g} to {high:g} {unit}"
            )

    def _put_back(self, previous: tuple[Setting, ...]) -> tuple[Setting, ...]:
        """What could not be put back."""
        left = []
        for one in reversed(previous):
            try:
                self.settings.set(one.uuid, one.kind, one.value)
                found = self.settings.get(one.uuid, one.kind)
                if not _same(found, one):
                    raise Fault("unsupported", f"the card keeps {found}")
                self.say(f"{one} again")
            except Fault as fault:
                left.append(one)
                self.say(f"{one} could not be put back ({fault}); a reboot does it")
        if previous:
            self._write(tuple(reversed(left)))
        return tuple(reversed(left))

    def _write(self, previous: tuple[Setting, ...]) -> None:
        """Before anything is set, and on disk: a power cut must not lose what was there."""
        self._previous = previous
        if previous:
            codec.write_json(self.path, Journal(pid=os.getpid(), t_s=time.time(), previous=previous))
        else:
            self.path.unlink(missing_ok=True)


def journal_path(machine: MachineFolder) -> Path:
    """Where the previous values are kept."""
    return machine.path / FILE


def left_behind(path: Path) -> tuple[Setting, ...]:
    """What a crashed watchdog has not put back; nothing where there is no journal that can be read."""
    try:
        return codec.read_json(path, Journal).previous
    except HomelabError:
        return ()


def how_to_restore(path: Path, left: Sequence[Setting]) -> str:
    """For whoever is not root."""
    return (
        f"an earlier watchdog ended without putting back {len(left)} settings of the cards ({path}); "
        "start one once as root: `sudo homelab watchdog`"
    )


def _same(found: float | None, wish: Setting) -> bool:
    if found is None or wish.value is None:
        return found is None and wish.value is None
    return abs(found - wish.value) <= TOLERANCE[wish.kind]
