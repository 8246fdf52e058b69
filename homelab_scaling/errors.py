"""Every error this project raises on purpose.

    HomelabError                 exit  meaning
    ├── UserError                  2   the user can fix it: found, wanted, what to do
    │   ├── SpecError              2   a ladder, spec or record says something impossible
    │   ├── DataError              2   text, shards or a points table are not what they should be
    │   ├── CheckpointError        2   no usable checkpoint where one is needed
    │   └── MachineError           2   this box lacks something: package, compiler, disk, card, lock
    ├── RunFailed                  1   a rung ended badly (diverged, crashed); the report is still written
    ├── StoppedByWatchdog          3   the watchdog ended it to protect the cards
    └── Stopped                   75   stopped cleanly; the same command resumes it

The library raises; `homelab_scaling.cli` catches once, prints one sentence and returns `exit_code`.
A message names what was found, what was wanted and what to do about it, in one sentence.
"""


class HomelabError(Exception):
    """Root of the tree; `exit_code` is what `homelab` returns."""

    exit_code = 1


class UserError(HomelabError):
    """The user can fix this."""

    exit_code = 2


class SpecError(UserError):
    """A ladder, spec, plan or record that cannot be obeyed."""


class DataError(UserError):
    """Text, shards or a points table that cannot be read as what they claim to be."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn or belongs to another run, or that could not be written."""


class MachineError(UserError):
    """Something this box lacks: a package, a compiler, disk space, a card, a free lock."""


class RunFailed(HomelabError):
    """A rung diverged or crashed."""


class StoppedByWatchdog(HomelabError):
    """The watchdog ended the run to protect the hardware."""

    exit_code = 3


class Stopped(HomelabError):
    """Stopped cleanly by a signal or a limit; the same command goes on from here."""

    exit_code = 75
