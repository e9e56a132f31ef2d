"""A solver around another one that keeps the last columns at 8 bits (Atom's outlier channels; BiSup, spec section 2).

The other solver rounds the remaining columns by the Hessian that is left when the kept ones take over what they can of its
errors; then they are chosen and rounded themselves. Shapes: R rows, C columns, k kept ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sordino.numerics.kept import Kept, set_apart
from sordino.rounding import Grid, Rounded, Solver, Stats


class Keeping:
    """See above.

    Args:
        inner: the solver of the other columns.
        kept: k.
        gain: fp32 [C - k, k], by which the kept columns take over errors; None where nothing is known of the inputs.
    """

    def __init__(self, inner: Any, kept: int, gain: Tensor | None):
        self.inner, self.kept, self.gain = inner, kept, gain

    @staticmethod
    def around(inner: Solver, kept: int, stats: Stats | None) -> Solver | Keeping:
        """Set the kept columns of the statistics apart, in place; the other solver itself where none are kept."""
        if not kept:
            return inner
        gain = None
        if stats is not None:
            stats.h, gain = set_apart(stats.h, kept)
        return Keeping(inner, kept, gain)

    def prepare(self, stats: Stats | None, group: int) -> Any:
        """As the other solver's."""
        return self.inner.prepare(stats, group)

    def solve(self, w: Tensor, prepared: Any, grid: Grid, group: int) -> Rounded:
        """Round fp32 [R, C]."""
        low, high = w.clone(), w[:, -self.kept :]
        low[:, -self.kept :] = 0
        rounded: Rounded = self.inner.solve(low, prepared, grid, group)
        if self.gain is not None:
            high = torch.addmm(high, (w - rounded.low_values())[:, : -self.kept], self.gain)
        return replace(rounded, kept=Kept.of(high))
