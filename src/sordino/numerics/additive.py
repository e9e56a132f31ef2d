"""Grids with a column scale (D²Quant, spec section 1): additive-binary levels as released, uniform ones as described.

One group of a weight is ``W[i, j] ≈ c[j] * S[i, j]``: every input column has one positive scale c, shared by all rows.
- :class:`AdditiveGrid` (the released form): ``S = sum_k r[i, k] * B_k[i, j]`` with signs B and b row scales r.
- :class:`DualScaleGrid` (the described form): S is any affine grid's.
Both are fitted by alternating steps, each the exact minimizer of the squared error. ``(a c, r / a)`` is the same weight for
any a > 0; here c has geometric mean one in every group, so it can be merged into another weight's scales without moving
their size. Shapes: R rows, g columns of a group, b bits, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sordino.numerics.affine import AffineGrid, GridParams, round_scale
from sordino.numerics.threads import one_thread

_TINY = 1e-8


def additive_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Levels of additive codes: bit k of a code set means ``+r_k``, else ``-r_k``.

    Args:
        codes: uint8 [..., K].
        scale: [..., b], the row scales of each leading index.

    Returns:
        [..., K] in the dtype of ``scale``.
    """
    out = torch.zeros(codes.shape, dtype=scale.dtype)
    for k in range(scale.shape[-1]):
        sign = ((codes >> k) & 1).to(scale.dtype).mul_(2).sub_(1)
        out += sign * scale[..., k : k + 1]
    return out


@dataclass(frozen=True)
class AdditiveGrid:
    """``2^b`` levels from b row scales per group, with or without a column scale.

    Attributes:
        bits: number of row scales.
        column: fit a column scale too.
        iterations: of the alternation; 15 are ample (spec section 6.1).
    """

    bits: int
    column: bool = True
    iterations: int = 15
    symmetric: bool = True  # there is no zero point to store

    name: ClassVar[Literal["additive"]] = "additive"

    def fit(self, w: Tensor, diag_h: Tensor | None = None) -> GridParams:
        """Fit one group.

        Args:
            w: fp32 [R, g].
            diag_h: fp32 [g] weights of the squared error, or None. They cancel in every step but the row scales'.

        Returns:
            Row scales [R, 1, b], zeros [R, 1], column scale [g] (or None).
        """
        with one_thread():
            c = w.abs().mean(0)
            alive = c > 0  # an empty column would take its scale to zero, and others' with it through the gauge
            c = torch.where(alive, c, torch.ones_like(c)) if self.column else torch.ones_like(c)
            r = self._greedy(w, c)
            codes = self._codes(w, c, r)
            for _ in range(self.iterations):
                codes, r = self._row_step(w, c, codes, r, diag_h)
                if self.column:
                    c = torch.where(alive, column_step(w, additive_values(codes, r), c), c)
                codes = self._codes(w, c, r)
            c, a = fix_gauge(c) if self.column else (c, 1.0)
        scale = round_scale(r * a)[:, None]
        return GridParams(scale, torch.zeros(w.shape[0], 1), c if self.column else None)

    def fit_groups(self, w: Tensor, group: int, diag_h: Tensor | None = None) -> GridParams:
        """Fit every group of fp32 [R, G*group]."""
        return fit_each(self, w, group, diag_h)

    def nearest(self, w: Tensor, params: GridParams, cols: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Nearest codes and values of some columns of a group [R, K], or of all columns of all groups [R, G*g]."""
        c = 1.0 if params.column is None else params.column[cols]
        rows, groups = params.zero.shape
        x = (w / c).view(rows, groups, -1)
        codes = self._codes(x, torch.ones(()), params.scale)
        return codes.view_as(w).float(), additive_values(codes, params.scale).view_as(w) * c

    def _greedy(self, w: Tensor, c: Tensor) -> Tensor:
        """First row scales: signs of the residual, one after another, [R, b]."""
        residual, scales, energy = w.clone(), [], c.square().sum()
        for _ in range(self.bits):
            basis = torch.where(residual < 0, -c, c)
            r = ((residual * basis).sum(1) / energy).abs().clamp(min=_TINY)
            residual -= r[:, None] * basis
            scales.append(r)
        return torch.stack(scales, 1)

    def _codes(self, w: Tensor, c: Tensor, r: Tensor) -> Tensor:
        """Nearest codes uint8 [..., K] of w [..., K], exhaustively."""
        every = torch.arange(1 << self.bits, dtype=torch.uint8)
        levels = additive_values(every.expand(*r.shape[:-1], -1), r)  # [..., 2^b]
        x = w / c
        best = (x - levels[..., :1]).abs()
        codes = torch.zeros(w.shape, dtype=torch.uint8)
        for i in range(1, 1 << self.bits):
            distance = (x - levels[..., i : i + 1]).abs()
            codes.masked_fill_(distance < best, i)
            best = torch.minimum(best, distance)
        return codes

    def _row_step(self, w: Tensor, c: Tensor, codes: Tensor, r: Tensor, diag_h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Least squares for the b row scales of every row; a negative one flips its signs."""
        h = torch.ones_like(c) if diag_h is None else diag_h / diag_h.mean().clamp(min=_TINY)
        signs = torch.stack([((codes >> k) & 1).float() * 2 - 1 for k in range(self.bits)], 1)  # [R, b, g]
        weighted = signs * (h * c.square())
        m = weighted @ signs.transpose(1, 2)
        # Two equal sign patterns make the system singular; a little ridge splits the scale between them.
        m.diagonal(dim1=1, dim2=2).add_(1e-6 * (h * c.square()).sum())
        p = (signs @ (h * c * w)[..., None])[..., 0]
        solved = torch.linalg.solve(m, p)
        flips = (solved < 0).to(torch.uint8) << torch.arange(self.bits, dtype=torch.uint8)
        return codes ^ flips.sum(1, dtype=torch.uint8)[:, None], solved.abs().clamp(min=_TINY)


@dataclass(frozen=True)
class DualScaleGrid:
    """An affine grid with a column scale: round ``W / c`` by the base grid, fit c to the result, again.

    Attributes:
        base: the affine grid, with its own scale search.
        iterations: of the alternation.
    """

    base: AffineGrid
    iterations: int = 15

    name: ClassVar[Literal["affine"]] = "affine"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.base.bits

    @property
    def symmetric(self) -> bool:
        """Whether the base grid is."""
        return self.base.symmetric

    def fit(self, w: Tensor, diag_h: Tensor | None = None) -> GridParams:
        """Fit one group fp32 [R, g]: scale and zero [R, 1], column scale [g]. The best iteration is kept."""
        c = torch.ones(w.shape[1])
        alive = w.abs().amax(0) > 0
        h = torch.ones_like(c) if diag_h is None else diag_h
        best: tuple[float, GridParams] | None = None
        for _ in range(self.iterations + 1):
            c, _a = fix_gauge(c)
            params = self.base.fit(w / c, None if diag_h is None else h * c.square())
            values = self.base.nearest(w / c, params)[1]
            error = float(((values * c - w).square() * h).sum())
            if best is None or error < best[0]:
                best = (error, GridParams(params.scale, params.zero, c))
            c = torch.where(alive, column_step(w, values, c), c)
        assert best is not None
        return best[1]

    def fit_groups(self, w: Tensor, group: int, diag_h: Tensor | None = None) -> GridParams:
        """Fit every group of fp32 [R, G*group]."""
        return fit_each(self, w, group, diag_h)

    def nearest(self, w: Tensor, params: GridParams, cols: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Nearest codes and values, as the base grid's of ``w / c``."""
        c = 1.0 if params.column is None else params.column[cols]
        codes, values = self.base.nearest(w / c, params)
        return codes, values * c


def column_step(w: Tensor, s: Tensor, old: Tensor) -> Tensor:
    """Least-squares column scale ``|<W_j, S_j> / <S_j, S_j>|`` [g]; a column of zeros keeps its old scale."""
    energy = s.square().sum(0)
    found = ((w * s).sum(0) / energy.clamp(min=_TINY)).abs()
    return torch.where((energy > _TINY) & (found > _TINY), found, old)


def fix_gauge(c: Tensor) -> tuple[Tensor, float]:
    """Scale c [g] to geometric mean one; returns it with the factor that the row scales take over."""
    a = float(c.log().mean().exp())
    return c / a, a


def fit_each(grid: AdditiveGrid | DualScaleGrid, w: Tensor, group: int, diag_h: Tensor | None) -> GridParams:
    """Fit the groups of a matrix one after another."""
    parts = w.split(group, 1)
    weights = [None] * len(parts) if diag_h is None else diag_h.split(group)
    return GridParams.join([grid.fit(p.contiguous(), h) for p, h in zip(parts, weights, strict=True)])
