"""A low-rank pair beside a rounded weight: ``x W^T + (x A^T) B^T`` (BiSup-style, our reading; spec section 5, L2).

Shapes: R = out_features, C = in_features, r = rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-4  # share of the mean diagonal


@dataclass(frozen=True)
class Side:
    """The pair.

    Attributes:
        a: fp32 [r, C], numbers that bf16 holds.
        b: fp32 [R, r], likewise.
    """

    a: Tensor
    b: Tensor

    @staticmethod
    def none(rank: int, rows: int, cols: int) -> Side:
        """A pair that adds nothing."""
        return Side(torch.zeros(rank, cols), torch.zeros(rows, rank))

    def values(self) -> Tensor:
        """What it adds to the weight, fp32 [R, C]."""
        return self.b @ self.a


def best_pair(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair that takes most of a weight's error off the output: ``argmin tr (E - B A) H (E - B A)^T``.

    With ``H = L L^T``, the truncated singular value decomposition of ``E L`` (Eckart and Young), A taken back by ``L^-1``; LQER
    has the diagonal of H in the place of L.

    Args:
        error: of the weight, fp32 [R, C].
        gram: fp32 [C, C], sum of x x^T.
        rank: r; pairs of a lower rank are filled up with zeros.

    Returns:
        A [r, C] whose rows have unit root mean square, and B [R, r], fp32.
    """
    h = gram.double()
    h.diagonal().add_(_RIDGE * h.diagonal().mean().clamp(min=1e-30))
    root = torch.linalg.cholesky(h)
    left, size, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    a = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    b = left[:, :rank] * size[:rank]
    length = a.square().mean(1).sqrt().clamp(min=1e-30)
    # The sign of a singular vector is arbitrary; the largest entry is made positive, so that runs agree.
    length = length * a.gather(1, a.abs().argmax(1, keepdim=True)).sign()[:, 0]
    a, b = a / length[:, None], b * length
    more = rank - len(a)
    return torch.nn.functional.pad(a, (0, 0, 0, more)).float(), torch.nn.functional.pad(b, (0, more)).float()
