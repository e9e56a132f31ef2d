"""Input channels that stay at 8 bits inside a linear of fewer (Atom's outlier channels; BiSup, spec section 2).

They are the last k columns of the weight, and the last k entries of its input; the low-bit codes there are ignored. Shapes:
R = out_features, C = in_features, k kept columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.numerics.affine import round_scale
from sordino.numerics.inputs import InputGrid

BITS = 8
_HALF = 1 << (BITS - 1)


@dataclass(frozen=True)
class Kept:
    """The last columns of a weight.

    Attributes:
        codes: int8 [R, k].
        scale: fp32 [R, 1], numbers that bf16 and fp16 both hold.
    """

    codes: Tensor
    scale: Tensor
    bounds = (-_HALF, _HALF - 1)  # of the codes

    @staticmethod
    def of(w: Tensor) -> Kept:
        """Nearest codes of fp32 [R, k], one scale a row."""
        scale = round_scale(w.abs().amax(1, keepdim=True) / (_HALF - 1))
        return Kept((w / scale).round_().clamp_(-_HALF, _HALF - 1).to(torch.int8), scale)

    def values(self) -> Tensor:
        """fp32 [R, k]."""
        return self.codes.float() * self.scale

    def rows(self, span: slice) -> Kept:
        """Some of the rows."""
        return Kept(self.codes[span], self.scale[span])

    @staticmethod
    def join(parts: list[Kept]) -> Kept:
        """Stack the rows of several pieces."""
        return Kept(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]))


def with_kept(w: Tensor, kept: Tensor) -> Tensor:
    """A weight [R, C] whose last columns are replaced by kept ones [R, k], in the weight's dtype."""
    return torch.cat([w[:, : w.shape[1] - kept.shape[1]], kept.to(w.dtype)], 1)


def round_with_kept(x: Tensor, grid: InputGrid, share: float | Tensor, kept: int, moving: bool = False) -> Tensor:
    """An input [..., C] on its dynamic grid, the last ``kept`` entries at 8 bits with a scale of their own for every token.

    As in Atom, the low-bit scales do not see the kept entries. ``share`` and ``moving`` as in :meth:`InputGrid.fit`, for those.
    """
    low = torch.cat([x[..., :-kept], torch.zeros_like(x[..., -kept:])], -1)
    high = x[..., -kept:]
    parts = grid.fake(low, share, moving), InputGrid(BITS).fake(high, 1.0)
    return torch.cat([parts[0][..., :-kept], parts[1]], -1)


def set_apart(h: Tensor, kept: int, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """What error compensation sees of the other columns when the kept ones are still to be chosen, and how to choose them.

    For any change E of the first columns, the best change of the kept ones is ``-E G``; what is left of the output's error has
    the Schur complement as its Hessian. Rounding by it and then choosing the kept columns equals GPTQ with the kept columns
    last.

    Args:
        h: fp32 [C, C], sum of x x^T.
        kept: k.
        damp: share of the kept columns' mean diagonal that is added to it, as GPTQ's.

    Returns:
        fp32 [C, C], the Schur complement, zero in the kept columns; fp32 [C - k, k], G.
    """
    n = h.shape[0] - kept
    last = h[n:, n:].clone()
    last.diagonal().add_(damp * last.diagonal().mean().clamp(min=1e-30))
    gain = torch.linalg.solve(last, h[n:, :n]).T
    out = torch.zeros_like(h)
    out[:n, :n] = h[:n, :n] - gain @ h[n:, :n]
    out[:n, :n] = (out[:n, :n] + out[:n, :n].T) / 2
    return out, gain
