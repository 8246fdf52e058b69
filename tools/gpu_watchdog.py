"""Guards the cards beside any run: slows, pauses or stops it before heat does.

homelab watchdog                      in the foreground, until Ctrl-C (`homelab run` starts one of its own)
homelab watchdog -- CMD ...           runs any other trainer, paced and stopped by signals
homelab watchdog calibrate            what the wall plug draws, from a few readings of a smart plug
homelab watchdog power-sweep -- CMD   tokens per joule against the power limit (root)
homelab watchdog --once               what it says now
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli
from homelab_scaling.errors import UserError

if TYPE_CHECKING:
    from homelab_scaling.watch.link import MachineFolder


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to do, and where the files are."""

    action: Annotated[
        Literal["guard", "calibrate", "power-sweep"], tyro.conf.Positional, tyro.conf.arg(metavar="ACTION")
    ] = "guard"
    """guard, calibrate or power-sweep."""
    command: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    lab: Path = Path("lab")
    """The folder that holds the labs; the watchdog's files go to LAB/machine."""
    once: bool = False
    """Print what the watchdog says now (without one: what the cards say) and end."""
    json: bool = False
    """With --once, calibrate or power-sweep: one JSON document."""
    interval_s: float = 1.0
    """Seconds between polls."""
    while_runs: bool = False
    """End after two minutes without a run (how `homelab run` starts it)."""
    replay: Path | None = None
    """Play a recorded gpu.jsonl as if it happened now. Runs on this machine obey it."""
    speed: float = 1.0
    """With --replay: how many times faster than recorded."""
    target_temperature_c: float | None = None
    """Root: the temperature the driver itself regulates to; restored at the end."""
    power_limit_w: float | None = None
    """Root: power limit of every card; restored at the end."""
    fan_percent: float | None = None
    """Root: fixed fan speed of every card; the driver's own curve is restored at the end."""
    readings: tuple[str, ...] = ()
    """calibrate: pairs WALL:CARDS in watts instead of questions, for example `--readings 92:38 410:331`."""
    max_slowdown: float = 0.05
    """power-sweep: share of tokens/s that may be given up."""
    metrics: Path | None = None
    """power-sweep: metrics.jsonl that CMD appends to; without it CMD is a fixed piece of work, run once per limit."""


IDLE_EXIT_S = 120.0


def main(args: Args) -> int:
    from homelab_scaling.watch import link

    _check(args)
    machine = link.machine_folder(args.lab)
    if args.once:
        return _once(args, machine)
    if args.command:
        return _guard_command(args, machine)
    return _guard(args, machine)


def _check(args: Args) -> None:
    if args.json and args.action == "guard" and not args.once:
        raise UserError("--json goes with --once, calibrate or power-sweep; a watchdog that runs on has no last word")


def _once(args: Args, machine: "MachineFolder") -> int:
    return 0


def _guard_command(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch.foreign import guard_command
    from homelab_scaling.watch.signals import Signals

    with Signals() as signals:
        return guard_command(args.command, machine, signals=signals, say=lambda text: _say(f"watchdog: {text}"))


def _guard(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch import watchdog_loop
    from homelab_scaling.watch.apart import SensorsApart
    from homelab_scaling.watch.signals import Signals

    with watchdog_loop.sole_watchdog(machine) as mine, Signals() as signals:
        if not mine:
            _say(f"a watchdog is there already: {_who(args)}")
            return 0
        why = watchdog_loop.run_watchdog(
            machine,
            SensorsApart(interval_s=args.interval_s),
            stop=signals.asked,
            sleep=signals.sleep,
            options=watchdog_loop.Options(
                interval_s=args.interval_s, idle_exit_s=IDLE_EXIT_S if args.while_runs else None
            ),
        )
        _say(f"watchdog: ended ({why})")
    return 0


def _who(args: Args) -> str:
    """Pid and folder of the one that holds the lock."""
    from homelab_scaling.watch import link

    machine = link.machine_folder(args.lab)
    status = machine.read_status()
    return f"pid {status.pid}, files in {machine.path}" if status else f"files in {machine.path}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["watchdog", *sys.argv[1:]]))
