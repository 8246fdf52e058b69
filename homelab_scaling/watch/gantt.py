"""A timetable as text: a line per slot, a bar per run, for terminals from 40 columns up.

    GPU 0  [124m-----------------------------][124m===]
    GPU 1  [51m-------------][24m---][12m-][5m][124m===]
           21:04              |                   03:10

`-` is a run on one slot, `=` one on several (DDP), `#` what is done; `|` is now.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from homelab_scaling.plan.timetable import SlotNow, Timetable, Turn
from homelab_scaling.watch import words

STYLES = {
    "waiting": "dim",
    "running": "bold green",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "diverged": "red",
}
MIN_BAR = 16


def gantt(table: Timetable, now_s: float, width: int) -> list[Text]:
    """A line per slot, and one with the clock; empty where no time is known or there is no room.

    Args:
        width: of a line [columns].
    """
    turns = [turn for turn in table.turns if turn.start_s is not None and turn.end_s is not None and turn.slots]
    label = max((len(slot.name) for slot in table.slots), default=0) + 2
    room = width - label
    if not turns or room < MIN_BAR:
        return []
    view = _View(
        left=min(turn.start_s or 0.0 for turn in turns),
        right=max(turn.end_s or 0.0 for turn in turns),
        room=room,
        now_s=now_s,
        is_live=any(turn.state == "running" for turn in turns),
    )
    return [*(_line(slot, turns, view, label) for slot in table.slots), _axis(view, label)]


@dataclass(frozen=True)
class _View:
    """Which time is on which column."""

    left: float
    right: float
    room: int
    now_s: float
    is_live: bool

    def column(self, t_s: float) -> int:
        return min(self.room, max(0, round((t_s - self.left) * self.room / max(self.right - self.left, 1e-9))))

    @property
    def now(self) -> int:
        return min(self.room - 1, self.column(self.now_s))


def _line(slot: SlotNow, turns: Sequence[Turn], view: _View, label: int) -> Text:
    signs: list[tuple[str, str]] = [(" ", "")] * view.room
    for turn in turns:
        if slot.index not in turn.slots or turn.start_s is None or turn.end_s is None:
            continue
        first = min(view.room - 1, view.column(turn.start_s))
        last = max(first + 1, view.column(turn.end_s))
        done = {"waiting": 0, "running": view.now}.get(turn.state, view.room)
        for column, sign in enumerate(_bar(turn, last - first), start=first):
            signs[column] = ("#" if column < done and sign in "-=" else sign, STYLES[turn.state])
    if view.is_live and signs[view.now][0] in " -=#":
        signs[view.now] = ("|", "bold")
    text = Text(f"{slot.name:<{label}}", "red" if slot.lost else "bold")
    for sign, style in signs:
        text.append(sign, style)
    return text


def _bar(turn: Turn, n: int) -> str:
    """`[name---]` in n columns; what does not fit is left out, the name last."""
    fill = "=" if len(turn.slots) > 1 else "-"
    if n < 3:
        return fill * n
    return "[" + turn.rung[: n - 2].ljust(n - 2, fill) + "]"


def _axis(view: _View, label: int) -> Text:
    start, end = words.clock(view.left, seconds=False), words.when(view.right, view.left)
    if len(start) + len(end) + 2 > view.room:
        return Text(" " * label + end.rjust(view.room)[: view.room], "dim")
    return Text(" " * label + start + end.rjust(view.room - len(start)), "dim")


def sentences(table: Timetable) -> list[str]:
    """What the schedule is, in words: the ways there were where they differ, and why this one."""
    from homelab_scaling.watch.ahead import duration

    said = [f"{choice.name}: {duration(choice.seconds)} ({choice.what})" for choice in table.choices]
    return [*(["; ".join(said)] if said else []), table.why]


def queue_line(table: Timetable, width: int) -> Text:
    """Without times: what each slot does and what waits."""
    going = {
        slot.name: next((t.rung for t in table.turns if t.state == "running" and slot.index in t.slots), "idle")
        for slot in table.slots
    }
    waiting = list(dict.fromkeys(turn.rung for turn in table.turns if turn.state == "waiting"))
    said = ", ".join(f"{name} {rung}" for name, rung in going.items())
    text = Text(f"{said}{'; then ' + ', '.join(waiting) if waiting else ''}")
    text.truncate(width, overflow="ellipsis")
    return text
