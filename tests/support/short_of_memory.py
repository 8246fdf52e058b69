"""The recipe on a card that is too small: FITS sequences a forward pass go through, more run out of memory.

Run as a script, it is recipes/pretrain.py with that card from update AT on rank RANK (environment variables).
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch


def shorten(forward: Callable[..., Any], *, fits: int, at_call: int = 0) -> Callable[..., Any]:
    """A forward pass that does half its work and then complains, from call `at_call` on, unless the batch fits."""
    calls = []

    def short(self: Any, x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
        calls.append(len(x_BT))
        if torch.is_grad_enabled() and len(calls) > at_call and len(x_BT) > fits:
            forward(self, x_BT, y_BT)
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
        return forward(self, x_BT, y_BT)

    return short


if __name__ == "__main__":
    from homelab_scaling.recipes import pretrain
    from homelab_scaling.train.model import LanguageModel

    if os.environ.get("RANK", "0") == os.environ["SHORT_RANK"]:
        LanguageModel.forward = shorten(  # type: ignore[method-assign]
            LanguageModel.forward, fits=int(os.environ["SHORT_FITS"]), at_call=int(os.environ["SHORT_AT_CALL"])
        )
    raise SystemExit(pretrain.main(sys.argv[1:]))
