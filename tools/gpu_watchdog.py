"""Guards the cards beside any run: slows, pauses or stops it before heat does.

    homelab watchdog                      in the foreground, until Ctrl-C (`homelab run` starts one of its own)
    homelab watchdog -- CMD ...           runs any other trainer, slowed, paused and stopped by signals
    homelab watchdog --once               what it says now
    homelab watchdog calibrate            what the wall plug draws, from a few readings of a smart plug
    homelab watchdog power-sweep          tokens per joule against the power limit (root), or on `-- CMD ...`

A guarded command gets no terminal input; the exit code is its own, or 3 where the watchdog stopped it.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import MachineError, UserError

if TYPE_CHECKING:
    from homelab_scaling.watch.actuators import Actuators, Setting
    from homelab_scaling.watch.gpu import SensorSource
    from homelab_scaling.watch.link import MachineFolder, Status
    from homelab_scaling.watch.power import Work

IDLE_EXIT_S = 120.0
TEXT_LADDER = "quickstart"
"""The ladder whose text the built-in step of power-sweep reads."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to do, and where the files are."""

    action: Annotated[
        Literal["guard", "calibrate", "power-sweep"], tyro.conf.Positional, tyro.conf.arg(metavar="ACTION")
    ] = "guard"
    """`guard`, `calibrate` or `power-sweep`."""
    command: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    lab: Path = Path("lab")
    """The folder that holds the labs; the watchdog's files go to LAB/machine."""
    once: bool = False
    """Print what the watchdog says now (where there is none: what the cards say) and end."""
    json: bool = False
    """With --once, calibrate or power-sweep: one JSON document."""
    interval_s: float = 1.0
    """Seconds between polls."""
    while_runs: bool = False
    """End after two minutes without a run (how `homelab run` starts it)."""
    replay: Path | None = None
    """Play a recorded gpu.jsonl as if it happened now, to the end. Runs on this machine obey it."""
    speed: float = 1.0
    """With --replay: how many times faster than recorded."""
    target_temperature_c: float | None = None
    """Root: the temperature that the driver itself regulates to; put back at the end."""
    power_limit_w: float | None = None
    """Root: power limit of every card; put back at the end."""
    fan_percent: float | None = None
    """Root: fixed fan speed of every card; put back at the end."""
    readings: tuple[str, ...] = ()
    """calibrate: pairs WALL:CARDS in watts instead of questions, such as `--readings 92:38 250:170 410:331`."""
    max_slowdown: float = 0.05
    """power-sweep: share of the speed that may be given up."""
    metrics: Path | None = None
    """power-sweep: metrics.jsonl that CMD appends to; without it CMD is a fixed piece of work, run once per limit."""
    ladder: str | None = None
    """power-sweep: the ladder whose step is measured; without CMD and ladder, a built-in 25M model's."""
    rung: str | None = None
    """power-sweep: with --ladder, which rung."""


def main(args: Args) -> int:
    from homelab_scaling.watch import link

    _check(args)
    machine = link.machine_folder(args.lab)
    if args.action == "calibrate":
        return _calibrate(args, machine)
    if args.action == "power-sweep":
        return _power_sweep(args, machine)
    if args.once:
        return _once(args, machine)
    if args.command:
        return _guard_command(args, machine)
    return _guard(args, machine)


def _check(args: Args) -> None:
    """Flags that do nothing here are a mistake, not a habit."""
    default = Args()
    only = {
        "calibrate": ("readings",),
        "power-sweep": ("max_slowdown", "metrics", "ladder", "rung"),
        "guard": ("once", "while_runs", "replay", "target_temperature_c", "power_limit_w", "fan_percent"),
    }
    for action, names in only.items():
        for name in names:
            if args.action != action and getattr(args, name) != getattr(default, name):
                raise UserError(f"--{name.replace('_', '-')} goes with {action}, not with {args.action}")
    if args.json and args.action == "guard" and not args.once:
        raise UserError("--json goes with --once, calibrate or power-sweep; a watchdog that runs on has no last word")
    if args.command and args.action == "calibrate":
        raise UserError("calibrate takes no command; let the load run in another terminal")
    if args.interval_s < 0.1:
        raise UserError(f"--interval-s {args.interval_s:g}: wants 0.1 or more; drivers update no faster")
    if not 0 <= args.max_slowdown < 1:
        raise UserError(f"--max-slowdown {args.max_slowdown:g}: wants a share from 0 to less than 1, such as 0.05")
    if args.rung is not None and args.ladder is None:
        raise UserError("--rung wants --ladder too")
    if args.command and args.ladder is not None:
        raise UserError("--ladder and a command exclude each other; give one of them")


# -------------------------------------------------------------------------------------------------------------- guard


def _guard(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch import say, watchdog_loop
    from homelab_scaling.watch.signals import Signals

    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(watchdog_loop.sole_watchdog(machine))
        if not mine:
            _say(f"a watchdog is there already: {_who(args)}")
            return 0
        signals = stack.enter_context(Signals())
        source = stack.enter_context(contextlib.closing(_source(args)))
        options = watchdog_loop.Options(
            interval_s=args.interval_s if args.replay is None else source.interval_s,
            idle_exit_s=IDLE_EXIT_S if args.while_runs else None,
        )
        if not args.while_runs:
            _say(f"watching {say.count(len(source.facts), 'card')}, files in {machine.path}; Ctrl-C ends it")
        stack.enter_context(_settings(args, machine, source))
        why = watchdog_loop.run_watchdog(
            machine,
            source,
            stop=lambda: signals.asked() or _is_over(source),
            sleep=signals.sleep,
            options=options,
            on_turn=say.Narrator(_say, every_s=None if args.while_runs else say.MINUTE_S),
        )
        _say(f"watchdog: ended ({'the recording is over' if _is_over(source) else why})")
    return 0


def _source(args: Args) -> "SensorSource":
    if args.replay is None:
        from homelab_scaling.watch.apart import SensorsApart

        return SensorsApart(interval_s=args.interval_s)
    from homelab_scaling.watch.recording import Replay

    return Replay(args.replay, args.speed)


def _is_over(source: "SensorSource") -> bool:
    import time

    from homelab_scaling.watch.recording import Replay

    # A second ahead: the poll that would find it over must not be judged.
    return isinstance(source, Replay) and source.is_over(time.time() + 1.0)


def _who(args: Args) -> str:
    """Pid and folder of the one that holds the lock."""
    from homelab_scaling.watch import link

    machine = link.machine_folder(args.lab)
    status = machine.read_status()
    return f"pid {status.pid}, files in {machine.path}" if status else f"files in {machine.path}"


@contextlib.contextmanager
def _settings(args: Args, machine: "MachineFolder", source: "SensorSource") -> Iterator[None]:
    """The root settings that were asked for; also puts back what a crashed watchdog left behind."""
    from homelab_scaling.watch.actuators import Kind, Setting, journal_path

    asked: dict[Kind, float | None] = {
        "target_temperature_c": args.target_temperature_c,
        "power_limit_w": args.power_limit_w,
        "fan_percent": args.fan_percent,
    }
    wishes = [
        Setting(uuid=card.uuid, kind=kind, value=value)
        for card in source.facts
        for kind, value in asked.items()
        if value is not None
    ]
    wanted = any(value is not None for value in asked.values())
    if not wanted and not journal_path(machine).exists():
        yield
        return
    if args.replay is not None:
        raise UserError("a replay changes no card; leave the settings out, or the replay")
    with _actuators(machine, wanted=wanted) as (actuators, _limits):
        actuators.apply(wishes)
        yield


@contextlib.contextmanager
def _actuators(
    machine: "MachineFolder", *, wanted: bool
) -> "Iterator[tuple[Actuators, list[tuple[str, float, float]]]]":
    """Actuators over the driver, and each card's lowest and present power limit."""
    import os

    from homelab_scaling.watch.actuators import Actuators, NvmlSettings
    from homelab_scaling.watch.gpu import open_sensors

    if wanted and os.geteuid() != 0:
        raise MachineError(
            "setting a power limit, target temperature or fan speed needs root; run it with sudo, or leave it out: "
            "slowing, pausing and stopping need no root"
        )
    sensors = open_sensors()
    try:
        if wanted and not sensors.facts:
            raise MachineError(f"there is no card to set anything on ({sensors.error}); see `homelab doctor`")
        limits = [
            (f.uuid, f.power_limit_range_w[0], f.power_limit_w)
            for f in sensors.facts
            if f.power_limit_range_w and f.power_limit_w is not None
        ]
        with Actuators(NvmlSettings(sensors.call), machine, _say) as actuators:
            yield actuators, limits
    finally:
        sensors.close()


def _guard_command(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch.foreign import guard_command
    from homelab_scaling.watch.signals import Signals

    with Signals() as signals:
        return guard_command(args.command, machine, signals=signals, say=lambda text: _say(f"watchdog: {text}"))


def _once(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch import link, say

    status = machine.read_status()
    fresh = status is not None and status.is_fresh(link.now_s())
    if status is None or not fresh:
        status = _one_poll(args)
    if args.json:
        print(codec.dumps({"watchdog": fresh, "status": codec.to_plain(status)}))
        return 0
    print(f"watchdog: pid {status.pid}, files in {machine.path}" if fresh else "no watchdog is running; the cards say:")
    for line in say.card_lines(status):
        print(f"  {line}")
    names = say.short_names(status.facts)
    for one in status.transitions:
        print(f"  {say.clock(one.t_s)}  {say.transition_line(one, names)}")
    return 0


def _one_poll(args: Args) -> "Status":
    """What the cards say, judged as at first sight."""
    import os
    import time

    from homelab_scaling.watch.link import Status
    from homelab_scaling.watch.policy import initial_state, judge

    source, now = _source(args), time.time()
    try:
        sample = source.poll(now)
        facts = {one.uuid: one for one in source.facts}
        _state, verdict = judge(initial_state(), sample, facts, {})
        return Status(
            pid=os.getpid(),
            started_s=now,
            t_s=now,
            interval_s=args.interval_s,
            poll_p50_s=source.poll_p50_s,
            poll_p99_s=source.poll_p99_s,
            source=source.source,
            facts=source.facts,
            readings=sample.cards,
            cards=verdict.cards,
            sensor_error=source.error,
        )
    finally:
        source.close()


# -------------------------------------------------------------------------------------------------------------- power


def _calibrate(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch import calibrate
    from homelab_scaling.watch.energy import write_wall_model

    if args.readings:
        readings = calibrate.parse_readings(args.readings)
    else:
        if not sys.stdin.isatty():
            raise UserError("nobody is there to answer; give the readings: --readings WALL:CARDS ...")
        _have_watchdog(args, machine)
        readings = calibrate.ask_readings(input, lambda: calibrate.mean_cards_w(machine), _say)
    found = calibrate.fit_wall(readings)
    write_wall_model(machine, found.model)
    if args.json:
        print(codec.dumps(found))
        return 0
    model = found.model
    error = (
        f" (readings lie within {model.se_w:.1f} W)" if model.se_w is not None else " (a third reading tells how well)"
    )
    print(f"wall plug = {model.base_w:.1f} W + {model.slope:.3f} x cards{error}")
    print(f"written to {machine.path / 'wall.json'}; every later run on this machine uses it")
    return 0


def _have_watchdog(args: Args, machine: "MachineFolder") -> None:
    from homelab_scaling.watch.start import start_watchdog, wait_for_status

    start_watchdog(args.lab)
    if wait_for_status(machine, 20.0) is None:
        raise MachineError(f"no watchdog could be started; see {machine.log}")


def _power_sweep(args: Args, machine: "MachineFolder") -> int:
    from homelab_scaling.watch import power, say

    with _actuators(machine, wanted=True) as (actuators, limits):
        if not limits:
            raise MachineError("no card tells a power limit that may be set; laptops often fix it")
        uuids = [uuid for uuid, _low, _now in limits]
        steps = power.limits_to_try(
            lowest_w=max(low for _, low, _ in limits), now_w=min(now for _, _low, now in limits)
        )
        _have_watchdog(args, machine)

        def set_limit(watts: float) -> None:
            actuators.apply([_limit(uuid, watts) for uuid in uuids])

        with _work(args, machine) as work:
            found = power.sweep(
                steps,
                set_limit,
                work,
                say=_say,
                check=lambda: power.calm(machine),
                max_slowdown=args.max_slowdown,
            )
    if args.json:
        print(
            codec.dumps({**codec.to_plain(found), "slowdown_frac": found.slowdown_frac, "saved_frac": found.saved_frac})
        )
        return 0
    for line in say.sweep_lines(found):
        print(line)
    print(f"set it with: sudo homelab watchdog --power-limit-w {found.best.limit_w:.0f}")
    return 0


def _limit(uuid: str, watts: float) -> "Setting":
    from homelab_scaling.watch.actuators import Setting

    return Setting(uuid=uuid, kind="power_limit_w", value=watts)


@contextlib.contextmanager
def _work(args: Args, machine: "MachineFolder") -> "Iterator[Work]":
    """What keeps the cards busy."""
    from homelab_scaling.sweep.step import endless_step
    from homelab_scaling.watch import power

    meter = power.cards_meter(machine)
    if args.command and args.metrics is None:
        yield power.FixedWork(command=args.command, meter=meter)
        return
    command, metrics = list(args.command), args.metrics
    if metrics is None:
        ladder = args.ladder or TEXT_LADDER
        rung = None if args.ladder is None else args.rung or ""
        if rung == "":
            raise UserError("--ladder wants --rung NAME too; `homelab plan LADDER` lists the names")
        command, metrics = endless_step(ladder, rung, args.lab, machine.path / "power-sweep")
    with power.RunningTraining(command=command, metrics=metrics, meter=meter) as training:
        yield training


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.main(["watchdog", *sys.argv[1:]]))
