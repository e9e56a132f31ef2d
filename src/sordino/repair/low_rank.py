"""Low-rank compensation that is merged before rounding: ``Q(W + eta B A)`` (BiSup-style, our reading; spec section 5, L1).

The checkpoint keeps its form and its bits. "Stabilized" is read as: directions that are known beforehand instead of random ones
(where the rounding error weighs most on the inputs), a scale of 1/sqrt(rank), and steps in proportion to the grid's.
As a side branch (L2) the pair is added to the rounded weight instead, at the price of its bits and of its products at run time.
Shapes: R = out_features, C = in_features, r = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sordino.numerics.side import Side

_LEAST = 1e-8


class LowRank(nn.Module):
    """``eta B A``, zero at first.

    Args:
        directions: fp32 [r, C], what A starts with; B starts at zero.
        rows: R.
    """

    def __init__(self, directions: Tensor, rows: int):
        super().__init__()
        self.a = nn.Parameter(directions.clone())
        self.b = nn.Parameter(torch.zeros(rows, len(directions)))
        self.eta = len(directions) ** -0.5

    def forward(self) -> Tensor:
        """The update, fp32 [R, C]."""
        update: Tensor = self.eta * (self.b @ self.a)
        return update

    def rates(self, rate: float, step: float) -> tuple[float, float]:
        """Learning rates of A and of B.

        Args:
            rate: how far the first update may move a weight, in steps of the grid.
            step: the grid's mean step.
        """
        size = max(float(self.a.detach().square().mean().sqrt()), _LEAST)
        return rate * size, rate * step / size


class SideBranch(nn.Module):
    """A pair beside the rounded weight, used as it will be stored.

    Args:
        a: fp32 [r, C], what A starts with.
        b: fp32 [R, r], what B starts with.
    """

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self) -> Tensor:
        """What it adds, fp32 [R, C]; gradients pass the rounding to bf16 straight through."""
        added: Tensor = _as_stored(self.b) @ _as_stored(self.a)
        return added

    def rates(self, rate: float, step: float) -> tuple[float, float]:
        """Learning rates of A and of B: as shares of their size."""
        a, b = (max(float(p.detach().square().mean().sqrt()), _LEAST) for p in (self.a, self.b))
        return rate * a, rate * b

    def pair(self) -> Side:
        """What it has become."""
        return Side(_as_stored(self.a).detach(), _as_stored(self.b).detach())


def _as_stored(x: Tensor) -> Tensor:
    return x + (x.detach().to(torch.bfloat16).float() - x.detach())


def error_directions(error: Tensor, gram: Tensor, tokens: int, rank: int) -> Tensor:
    """Input directions in which a rounding error weighs most.

    The leading right singular vectors of ``error * c`` over c, where c is the root mean square of each input channel (LQER's
    weighting), each scaled so that it has unit root mean square on the calibration inputs.

    Args:
        error: of the weight, fp32 [R, C].
        gram: fp32 [C, C], sum of x x^T.
        tokens: how many were summed.
        rank: r; at most min(R, C) are given.

    Returns:
        fp32 [r, C].
    """
    channel = (gram.diagonal() / tokens).sqrt().clamp(min=_LEAST)
    _, _, right = torch.linalg.svd((error * channel).double(), full_matrices=False)
    directions = right[:rank] / channel.double()
    # The sign of a singular vector is arbitrary; the largest entry is made positive, so that runs agree.
    peak = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return _to_unit(directions * peak, gram, tokens)


def random_directions(gram: Tensor, tokens: int, rank: int, rng: torch.Generator) -> Tensor:
    """Normally distributed ones, scaled likewise: what :func:`error_directions` is to be compared with, fp32 [r, C]."""
    drawn = torch.randn(min(rank, len(gram)), len(gram), generator=rng, dtype=torch.float64)
    return _to_unit(drawn, gram, tokens)


def _to_unit(directions: Tensor, gram: Tensor, tokens: int) -> Tensor:
    power = ((directions @ gram.double()) * directions).sum(1) / tokens
    scaled: Tensor = directions / power.clamp(min=_LEAST).sqrt()[:, None]
    return scaled.float()
