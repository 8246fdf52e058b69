"""Ends a launch whose owner is gone: `python -m homelab_scaling.sweep.tether OWNER TICKS LAUNCHER TICKS RUN_FOLDER`.

A trainer outlives the process that started it, which is right on one's own box and wrong on a cluster: there the run is
started again elsewhere, and two would train it. So a process beside each launch waits for its owner's death and then
asks the ranks to save and leave, as Ctrl-C would.
"""

import subprocess
import sys
import time
from pathlib import Path

from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep.launch import Launch, find_orphan
from homelab_scaling.watch import processes

POLL_S = 0.2


def tie(launch: Launch, owner: int) -> None:
    """Starts the process that ends `launch` when the process `owner` is gone."""
    launcher, own = launch.launcher, processes.look_up(owner)
    if launcher is None or own is None:  # over already
        return
    words = [str(n) for n in (owner, own.start_ticks, *launcher)]
    subprocess.Popen(
        [sys.executable, "-m", "homelab_scaling.sweep.tether", *words, str(launch.folder.path)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )


def hold(owner: tuple[int, int], launcher: tuple[int, int], folder: RunFolder) -> None:
    """Until the launch is over; ends it as soon as its owner is.

    Args:
        owner: pid and start; `launcher` the same.
    """
    while processes.still(dict([owner])):
        if not processes.still(dict([launcher])) and find_orphan(folder.read_spec(), folder, launcher) is None:
            return
        time.sleep(POLL_S)
    launch = find_orphan(folder.read_spec(), folder, launcher)
    if launch is None:
        return
    launch.ask_to_stop()
    while launch.poll() is None:
        time.sleep(POLL_S)


def main(words: list[str]) -> int:
    owner, ticks, launcher, launcher_ticks = map(int, words[:4])
    hold((owner, ticks), (launcher, launcher_ticks), RunFolder(Path(words[4])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
