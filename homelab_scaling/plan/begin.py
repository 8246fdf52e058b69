"""The start that a ladder names; apart, because only a ladder that names one pays for reading weights."""

from pathlib import Path

from homelab_scaling.ladder import Ladder
from homelab_scaling.plan.parts import Start
from homelab_scaling.specs import CorpusManifest


def start_of(ladder: Ladder, ladder_file: Path, corpus: CorpusManifest | None, shards: Path) -> Start | None:
    """The checkpoint of `[train] start`, judged against the corpus; None where the ladder names none.

    Raises:
        UserError: it is not there, or cannot be a start of these runs.
    """
    if ladder.train.start is None:
        return None
    from homelab_scaling.export.start import find_start

    return find_start(ladder.train.start, ladder_file.parent, corpus, shards)
