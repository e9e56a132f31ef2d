"""Affine grids: ``w ≈ (code - zero) * scale`` with integer codes 0 … 2^b - 1 and an integer zero point.

Symmetric grids fix ``zero = 2^(b-1)``; asymmetric ones fit it. Scales are stored numbers: 8 significant bits between
2^-14 and 65280, so that bf16 and fp16 both hold them exactly and every export is lossless (DESIGN section 4).
Shapes: R rows, K columns of one group (or G groups of g columns, K = G*g).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sordino.numerics.threads import one_thread

SCALE_FLOOR = 2.0**-14  # smallest normal fp16
SCALE_CEILING = 65280.0  # largest bf16 below fp16's maximum
# Elements of one search chunk: small enough that every temporary stays in the second-level cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class GridParams:
    """Scale and zero of a set of groups.

    Attributes:
        scale: fp32 [R, G], values that bf16 and fp16 hold exactly; [R, G, b] for additive grids.
        zero: fp32 [R, G], integers 0 … 2^b - 1.
        column: fp32 [G*g], scale of each input column on top, or None.
    """

    scale: Tensor
    zero: Tensor
    column: Tensor | None = None

    @staticmethod
    def join(parts: list[GridParams]) -> GridParams:
        """Groups of one matrix, side by side."""
        columns = [p.column for p in parts if p.column is not None]
        scale, zero = torch.cat([p.scale for p in parts], 1), torch.cat([p.zero for p in parts], 1)
        return GridParams(scale, zero, torch.cat(columns) if columns else None)


def round_scale(scale: Tensor) -> Tensor:
    """Round scales to numbers that bf16 and fp16 both hold exactly.

    Args:
        scale: fp32, any shape, non-negative.

    Returns:
        fp32, same shape, within ``[SCALE_FLOOR, SCALE_CEILING]``.
    """
    return scale.to(torch.bfloat16).float().clamp(SCALE_FLOOR, SCALE_CEILING)


# Of a full range, what PrefixQuant's searches of weights, keys and values try (spec section 4.5).
SHARES = tuple(1 - i / 20 for i in range(10))


@dataclass(frozen=True)
class AffineGrid:
    """An affine grid of ``bits`` bits.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8.
        symmetric: fix the zero point at ``2^(bits-1)``.
        search: candidates of the scale search; 0 takes the min-max range as it is.
        smallest: smallest share of the min-max range that the search tries.
    """

    bits: int
    symmetric: bool = False
    search: int = 24
    smallest: float = 0.4

    name: ClassVar[Literal["affine"]] = "affine"

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def fit(self, w: Tensor, diag_h: Tensor | None = None) -> GridParams:
        """Fit one scale and zero to each row by grouped squared error.

        Shrinks the min-max range step by step and keeps, per row, the share with the smallest
        ``sum_k h_k (w_k - nearest(w_k))^2``.

        Args:
            w: fp32 [R, K], one group.
            diag_h: fp32 [K] weights of the squared error, or None for equal ones.

        Returns:
            Grid parameters, both [R, 1].
        """
        rows = max(1, _CHUNK // w.shape[1])
        with one_thread():
            parts = [self._fit(chunk, diag_h) for chunk in w.split(rows)]
        return GridParams(torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts]))

    def fit_groups(self, w: Tensor, group: int, diag_h: Tensor | None = None) -> GridParams:
        """Fit every group of a matrix at once.

        Args:
            w: fp32 [R, G*group].
            group: columns in a group.
            diag_h: fp32 [G*group] or None.

        Returns:
            Grid parameters [R, G].
        """
        rows, cols = w.shape
        blocks = w.view(rows, cols // group, group)
        if diag_h is None:
            fit = self.fit(blocks.reshape(-1, group))
            return GridParams(fit.scale.view(rows, -1), fit.zero.view(rows, -1))
        fits = [self.fit(blocks[:, g], diag_h[g * group : (g + 1) * group]) for g in range(blocks.shape[1])]
        return GridParams(torch.cat([f.scale for f in fits], 1), torch.cat([f.zero for f in fits], 1))

    def codes(self, w: Tensor, params: GridParams) -> Tensor:
        """Nearest codes of a matrix.

        Args:
            w: fp32 [R, G*g].
            params: [R, G].

        Returns:
            fp32 [R, G*g] of integers 0 … 2^b - 1 (round half to even).
        """
        rows, groups = params.scale.shape
        x = w.view(rows, groups, -1) / params.scale[..., None]
        return x.round_().add_(params.zero[..., None]).clamp_(0, self.top).view_as(w)

    def values(self, codes: Tensor, params: GridParams) -> Tensor:
        """Dequantize: ``(code - zero) * scale``, fp32 [R, G*g]."""
        rows, groups = params.scale.shape
        x = codes.view(rows, groups, -1) - params.zero[..., None]
        return (x * params.scale[..., None]).view_as(codes)

    def nearest(self, w: Tensor, params: GridParams, cols: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Nearest codes and their values, both fp32 [R, G*g]; every column of a group is alike here."""
        codes = self.codes(w, params)
        return codes, self.values(codes, params)

    def _range(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Full range per row, always including zero: (low, high), each [R, 1]."""
        low = w.amin(1, keepdim=True).clamp(max=0.0)
        high = w.amax(1, keepdim=True).clamp(min=0.0)
        return low, high

    def _params(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            half = 1 << (self.bits - 1)
            # The negative side has one more level than the positive one; the range must cover the larger side.
            scale = round_scale(torch.maximum(-low / half, high / (half - 1)))
            return scale, torch.full_like(scale, half)
        scale = round_scale((high - low) / self.top)
        return scale, (-low / scale).round_().clamp_(0, self.top)

    def _fit(self, w: Tensor, diag_h: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = self._range(w)
        scale, zero = self._params(low, high)
        if self.search == 0:
            return scale, zero
        best = self._error(w, scale, zero, diag_h)
        for i in range(1, self.search):
            share = 1.0 - (1.0 - self.smallest) * i / (self.search - 1)
            s, z = self._params(low * share, high * share)
            error = self._error(w, s, z, diag_h)
            better = error < best
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
            best = torch.minimum(error, best)
        return scale, zero

    def _error(self, w: Tensor, scale: Tensor, zero: Tensor, diag_h: Tensor | None) -> Tensor:
        q = torch.mul(w, 1.0 / scale).round_().clamp_(-zero, self.top - zero)
        q.mul_(scale).sub_(w)
        if diag_h is None:
            return q.square_().sum(1, keepdim=True)
        return (q.square_() @ diag_h)[:, None]
