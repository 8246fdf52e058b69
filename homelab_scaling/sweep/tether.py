"""Ends a launch whose owner is gone: `python -m homelab_scaling.sweep.tether OWNER TICKS LAUNCHER TICKS RUN_FOLDER`.

A trainer outlives the process that started it, which is right on one's own box and wrong on a cluster: there the run is
started again elsewhere, and two would train it. So a process beside each launch waits for its owner's death and then
asks the ranks to save and leave, as Ctrl-C would.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

from homelab_scaling.runs import RunFolder
from homelab_scaling.sweep.launch import Launch, everyone_of, record_stamp
from homelab_scaling.sweep.recipe import GIVE_UP_S
from homelab_scaling.watch import link, processes

POLL_S = 0.2


def tie(launch: Launch, owner: int) -> None:
    """Starts the process that ends `launch` when the process `owner` is gone."""
    launcher, own = launch.launcher, processes.look_up(owner)
    if launcher is None or own is None:  # over already
        return
    words = [str(n) for n in (owner, own.start_ticks, *launcher)]
    command = [sys.executable, "-m", "homelab_scaling.sweep.tether", *words, str(launch.folder.path)]
    # By a shell that leaves at once: a worker of Ray kills its children when it ends, and this must not be one of them.
    subprocess.run(
        ["/bin/sh", "-c", '"$@" &', "sh", *command], start_new_session=True, stdin=subprocess.DEVNULL, check=True
    )


def hold(owner: tuple[int, int], launcher: tuple[int, int], folder: RunFolder) -> None:
    """Until the launch is over; ends it as soon as its owner is.

    Args:
        owner: pid and start; `launcher` the same.
    """
    pid = launcher[0]
    launch = Launch(
        folder.read_spec(),
        folder,
        process=None,
        session=pid,
        before=record_stamp(folder),
        began_s=link.now_s(),
    )
    while processes.still(dict([owner])):
        if not processes.still(dict([launcher])) and not everyone_of(pid):
            return
        time.sleep(POLL_S)
    begun = bool(launch.ranks())
    launch.ask_to_stop()
    if not begun:  # its launcher may have died with the owner, before any rank was known
        processes.send(everyone_of(pid), signal.SIGTERM)
    deadline = time.monotonic() + GIVE_UP_S
    while everyone_of(pid):
        if time.monotonic() > deadline:
            processes.send(everyone_of(pid), signal.SIGKILL)
        time.sleep(POLL_S)
    launch.poll()  # puts a record right that says "running"


def main(words: list[str]) -> int:
    owner, ticks, launcher, launcher_ticks = map(int, words[:4])
    hold((owner, ticks), (launcher, launcher_ticks), RunFolder(Path(words[4])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
