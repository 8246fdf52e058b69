"""The second terminal: run, law, cards, energy and what comes next on one screen, from files only; q ends it."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from homelab_scaling import cli, codec
from homelab_scaling.errors import UserError

if TYPE_CHECKING:
    from homelab_scaling.watch.frame import Frame
    from homelab_scaling.watch.gpu import SensorSource


@dataclass(frozen=True, kw_only=True)
class Args:
    """What to look at, and how to show it."""

    lab: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[LAB]")] = Path("lab")
    """The folder that holds the labs, or one of them (LAB/LADDER)."""
    run: str | None = None
    """Beginning of the run (or rung) to show; the one that is going on when not given."""
    once: bool = False
    """One frame, then end."""
    width: int | None = None
    """With --once: columns; 100 when not given and there is no terminal."""
    height: int | None = None
    """With --once: most lines; as many as there is to say when not given."""
    svg: Path | None = None
    """With --once: write the frame as a picture."""
    json: bool = False
    """With --once: the frame as one JSON document."""
    replay: Path | None = None
    """Play a recorded gpu.jsonl, and the runs of its lab, as if they happened now."""
    speed: float = 1.0
    """With --replay: recorded seconds per second."""
    at: float | None = None
    """With --replay: begin (with --once: be) so many seconds after its start; --once alone is at its end."""
    every: float = 1.0
    """Seconds between frames on a terminal."""


LINE_EVERY_S = 60.0
"""Without a terminal."""

Frames = Callable[[], "Frame"]


def main(args: Args) -> int:
    _check(args)
    frames, close = _source(args)
    try:
        if args.once:
            return _once(args, frames())
        if not sys.stdout.isatty():
            return _lines(frames)
        from homelab_scaling.watch.live import show

        show(frames, every_s=args.every)
        return 0
    finally:
        close()


def _check(args: Args) -> None:
    for name in ("width", "height", "svg", "json"):
        if getattr(args, name) not in (None, False) and not args.once:
            raise UserError(f"--{name} is for one frame; add --once")
    if args.json and args.svg:
        raise UserError("--json and --svg: choose one")
    if args.at is not None and args.replay is None:
        raise UserError("--at is a place in a recording; add --replay FILE")
    if not args.speed > 0:
        raise UserError(f"--speed {args.speed:g}, wants a positive number")
    if not 0.1 <= args.every <= 3600:
        raise UserError(f"--every {args.every:g}, wants 0.1 to 3600 seconds")
    if args.width is not None and args.width < 40:
        raise UserError(f"--width {args.width}, wants 40 or more")
    if args.height is not None and args.height < 5:
        raise UserError(f"--height {args.height}, wants 5 or more")


def _source(args: Args) -> tuple[Frames, Callable[[], None]]:
    """What gives the frame of this moment, and how to let go of it."""
    from homelab_scaling.watch.view import View, find_place

    if args.replay is not None:
        return _replayed(args)
    view = View(find_place(args.lab), run=args.run, open_sensors=_open_sensors)
    return lambda: view.frame(time.time()), view.close


def _replayed(args: Args) -> tuple[Frames, Callable[[], None]]:
    from homelab_scaling.watch.play import ReplayView
    from homelab_scaling.watch.view import find_place

    assert args.replay is not None
    place = None if args.lab == Args().lab else find_place(args.lab)
    view = ReplayView(args.replay, place, run=args.run)
    began = time.monotonic()
    if args.once:
        at = view.end_s if args.at is None else view.start_s + args.at
        return lambda: view.frame(at, args.speed), view.close
    start = view.start_s + (args.at or 0.0)
    return lambda: view.frame(min(view.end_s, start + (time.monotonic() - began) * args.speed), args.speed), view.close


def _open_sensors() -> "SensorSource":
    """The cards themselves, in a process of its own: a driver that hangs must not take the screen with it."""
    from homelab_scaling.watch.apart import SensorsApart

    return SensorsApart(start_s=5.0)


def _once(args: Args, frame: "Frame") -> int:
    if args.json:
        print(codec.dumps(frame))
        return 0
    from homelab_scaling.watch.live import print_frame, write_svg

    if args.svg is not None:
        write_svg(frame, args.svg, width=args.width or 100, height=args.height)
        print(args.svg)
        return 0
    columns = os.get_terminal_size().columns if sys.stdout.isatty() else 100
    print_frame(frame, args.width or columns, args.height)
    return 0


def _lines(frames: Frames) -> int:
    """A line a minute, until interrupted or closed."""
    from homelab_scaling.watch.screen import one_line

    while True:
        print(one_line(frames()), flush=True)
        time.sleep(LINE_EVERY_S)


if __name__ == "__main__":
    raise SystemExit(cli.main(["monitor", *sys.argv[1:]]))
