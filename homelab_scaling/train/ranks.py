"""What ranks tell one another beside the training itself: a few integers, a few words.

Over gloo: it costs the device nothing and mixes with none of its collectives.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Ranks:
    """All ranks of a launch; alone, every answer is one's own. All make the same calls in the same order.

    Args:
        world_size: number of ranks; above 1 the default process group must be there.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._group: Any = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def max(self, wishes: Sequence[int]) -> list[int]:
        """The largest of all ranks' integers, one by one: how ranks agree at the same step."""
        if self._group is None:
            return list(wishes)
        vector = torch.tensor(wishes, dtype=torch.int64)
        torch.distributed.all_reduce(vector, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(n) for n in vector.tolist()]

    def gather(self, one: T) -> list[T]:
        """Every rank's object, in the order of ranks."""
        if self._group is None:
            return [one]
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, one, group=self._group)
        return found
