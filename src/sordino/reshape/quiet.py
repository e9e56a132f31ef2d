"""Means of channels over the tokens that a prefix will not park, for reshapes that a survey prepares.

Shapes: B windows, L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WINDOWS = 16  # looked at; a mean needs no more
_LOUD = 1024.0  # times the median token's energy: what is louder is for the prefix, and is left out


def channel_means(batches: Iterable[tuple[slice, Tensor]], of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Means of the channels, or of what ``of`` makes of them, over the quiet tokens of the first windows.

    Args:
        batches: as :meth:`sordino.contract.BlockContext.inputs` gives them, [B, L, C] each.
        of: fp64 [T, C] -> the same; None leaves them.

    Returns:
        fp64 [C].
    """
    total, tokens, seen = torch.zeros(()), 0, 0
    for _, x in batches:
        flat = x.flatten(0, 1).double()
        energy = flat.square().sum(1)
        quiet = flat[energy <= _LOUD * energy.median()]
        total, tokens, seen = total + (quiet if of is None else of(quiet)).sum(0), tokens + len(quiet), seen + len(x)
        if seen >= WINDOWS:
            break
    return total / max(tokens, 1)
