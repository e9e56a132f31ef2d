"""Rank correlation."""

from __future__ import annotations

from torch import Tensor


def ranks(x: Tensor) -> Tensor:
    """Places of the entries of x [T] in rising order from 0, float64 [T]; equal ones share the mean of their places."""
    below = (x[:, None] > x).sum(1).double()
    return below + ((x[:, None] == x).sum(1).double() - 1) / 2


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's coefficient of x and y [T], in -1 … 1; None where one of them does not vary."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale > 0 else None
