"""Frames on a terminal that may change its size, as plain text, and as a picture."""

import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from homelab_scaling import codec
from homelab_scaling.watch.frame import Frame
from homelab_scaling.watch.screen import draw

KEY_EVERY_S = 0.1
"""How soon a key or a new size is noticed."""
FONTS = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
FONT_PX = 20.9
BACKGROUND, TEXT = (22, 27, 35), (214, 221, 230)
NORMAL = "3b4250 e06c75 7ec87a e5c067 61a0ef c68ce2 60c4ce d6dde6"
BRIGHT = "5c6370 f07880 8ed88a f0cd78 73b0fa d49eee 70d4de f0f4f8"
"""The picture's colours: black, red, green, yellow, blue, magenta, cyan, white."""


def show(frames: Callable[[], Frame], *, every_s: float = 1.0, console: Console | None = None) -> None:
    """A frame every so often, redrawn at once on a new size, until q, Q or Ctrl-C."""
    console = console or Console()
    plain = _is_ascii(console)

    def render() -> RenderableType:
        width, height = console.size
        return Group(*draw(frame, width, height, ascii_only=plain))

    with _keys() as key, contextlib.suppress(KeyboardInterrupt):
        frame = frames()
        size = console.size
        with Live(render(), console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            due = time.monotonic() + every_s
            while key(KEY_EVERY_S) not in ("q", "Q", "\x03", "\x04"):
                now = time.monotonic()
                if now >= due:
                    frame = frames()
                    due = max(due + every_s, now)
                elif console.size == size:
                    continue
                size = console.size
                live.update(render(), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str | None]]:
    """A function that waits so long for a key and returns it; without a keyboard it only waits."""
    try:
        import termios
        import tty

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (ImportError, OSError, ValueError, termios.error):
        yield _only_wait
        return

    def key(seconds: float) -> str | None:
        if select.select([keyboard], [], [], seconds)[0]:
            return os.read(keyboard, 1).decode("ascii", "replace") or "q"  # closed: nobody is there any more
        return None

    try:
        tty.setcbreak(keyboard)
        yield key
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _only_wait(seconds: float) -> str | None:
    time.sleep(seconds)
    return None


def print_frame(frame: Frame, width: int, height: int | None) -> None:
    """One frame on stdout, in colour where that is a terminal."""
    console = Console(width=width, highlight=False, soft_wrap=True)
    for line in draw(frame, width, height, ascii_only=_is_ascii(console)):
        console.print(line, no_wrap=True, crop=False)


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def write_svg(frame: Frame, path: Path, *, width: int, height: int | None, title: str = "homelab monitor") -> None:
    """One frame as a picture that loads nothing from anywhere."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(width=width, record=True, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text("\n").join(draw(frame, width, height)), crop=False, no_wrap=True)
    theme = TerminalTheme(BACKGROUND, TEXT, _colours(NORMAL), _colours(BRIGHT))
    text = console.export_svg(title=title, theme=theme, unique_id="monitor")
    codec.write_text(path, self_contained(text))


def self_contained(svg: str) -> str:
    """The picture without fonts from elsewhere, its letters high enough for boxes to join."""
    svg = re.sub(r"@font-face\s*\{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-size: 20px;", f"font-size: {FONT_PX}px;")
    return re.sub(r"font-family:\s*(?:Fira Code|arial)[^;]*;", f"font-family: {FONTS};", svg)


def _colours(text: str) -> list[tuple[int, int, int]]:
    return [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in text.split()]
