"""What rounding hands around (DESIGN section 4): grids, statistics, rounded weights, solvers.

``round/`` implements solvers, ``numerics/`` grids. Shapes: R = out_features, C = in_features, G = groups, T = tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sordino.numerics.additive import additive_values
from sordino.numerics.affine import GridParams
from sordino.numerics.kept import Kept, with_kept
from sordino.numerics.side import Side


class Grid(Protocol):
    """Which numbers are allowed."""

    @property
    def name(self) -> Literal["affine", "additive"]:
        """How codes become values."""
        ...

    @property
    def bits(self) -> int:
        """Width of a code."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed at ``2^(bits-1)`` and need not be stored."""
        ...

    def fit(self, w: Tensor, diag_h: Tensor | None = None) -> GridParams:
        """Fit one group: fp32 [R, g] (current, error-compensated weights) -> params [R, 1]."""
        ...

    def fit_groups(self, w: Tensor, group: int, diag_h: Tensor | None = None) -> GridParams:
        """Fit all groups at once: fp32 [R, C] -> params [R, C/group]."""
        ...

    def nearest(self, w: Tensor, params: GridParams, cols: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Nearest codes and their values, fp32 [R, C] each; ``cols`` says which columns of the fitted group they are."""
        ...


@dataclass
class Stats:
    """Sums over calibration tokens at one site, unnormalized, so that processes can add them up.

    Attributes:
        tokens: how many tokens were summed.
        h: fp32 [C, C], sum of x x^T over the quantized stream's inputs x.
        d: fp32 [C, C], sum of (x_fp - x) x^T, where asked for.
    """

    tokens: int
    h: Tensor
    d: Tensor | None = None


@dataclass
class Rounded:
    """A rounded weight: codes plus grid.

    Attributes:
        codes: uint8 [R, C].
        scale: fp32 [R, G], numbers that bf16 and fp16 both hold; [R, G, b] if the grid is additive.
        zero: fp32 [R, G], integers.
        bits: width of a code.
        group: columns in a group, C/G.
        symmetric: the zero point is 2^(bits-1) everywhere and not stored.
        grid: how codes become values.
        column: fp32 [C], scale of every input column on top; the walk merges it into the linear before, or stores it.
        notes: what the solver wants to have said (damping raised, dead columns).
        latent: fp32 [R, C], what was rounded: the weight with the errors of earlier columns moved into it. Only kept
            where a move asks for it; it tells how near each code was to its neighbour.
        kept: the last columns at 8 bits, whose codes above are ignored; None for none.
        side: a low-rank pair that is added; None for none.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    symmetric: bool
    notes: dict[str, float] = field(default_factory=dict)
    latent: Tensor | None = None
    grid: Literal["affine", "additive"] = "affine"
    column: Tensor | None = None
    kept: Kept | None = None
    side: Side | None = None

    @staticmethod
    def of(codes: Tensor, params: GridParams, grid: Grid, group: int, **rest: Any) -> Rounded:
        """Codes [R, C] of any dtype on a fitted grid."""
        return Rounded(
            codes.to(torch.uint8), params.scale, params.zero, grid.bits, group, grid.symmetric,
            grid=grid.name, column=params.column, **rest,
        )  # fmt: skip

    def values(self) -> Tensor:
        """Dequantized weight, fp32 [R, C]."""
        return self.around(self.low_values())

    def around(self, low: Tensor, kept: Tensor | None = None) -> Tensor:
        """Low-bit values [R, C] with the kept columns (or these, [R, k]) and the low-rank pair, in their dtype."""
        if kept is None and self.kept is not None:
            kept = self.kept.values()
        own = low if kept is None else with_kept(low, kept)
        return own if self.side is None else own + self.side.values().to(own.dtype)

    def beside(self, rank: int) -> Rounded:
        """The same with an empty low-rank pair at its side, where the rank is not 0."""
        return replace(self, side=Side.none(rank, *self.codes.shape)) if rank else self

    def low_values(self) -> Tensor:
        """What the codes say, with the column scale, fp32 [R, C]."""
        return self.columned(self.grid_values())

    def columned(self, values: Tensor) -> Tensor:
        """Values [R, C] times the column scale, where there is one, in their dtype."""
        return values if self.column is None else values * self.column.to(values.dtype)

    def grid_values(self) -> Tensor:
        """What the codes alone say, fp32 [R, C]."""
        rows, groups = self.zero.shape
        codes = self.codes.view(rows, groups, -1)
        if self.grid == "additive":
            values = additive_values(codes, self.scale)
        else:
            values = (codes.float() - self.zero[..., None]) * self.scale[..., None]
        return values.view(rows, -1)

    def rows(self, span: slice) -> Rounded:
        """Some of the rows; notes go along."""
        latent = None if self.latent is None else self.latent[span]
        kept = None if self.kept is None else self.kept.rows(span)
        return replace(self, codes=self.codes[span], scale=self.scale[span], zero=self.zero[span], latent=latent, kept=kept)

    @staticmethod
    def join(parts: list[Rounded]) -> Rounded:
        """Stack the rows of several pieces of one weight; the notes are the first one's."""
        if len(parts) == 1:
            return parts[0]
        codes, scale, zero = (torch.cat([getattr(p, k) for p in parts]) for k in ("codes", "scale", "zero"))
        latents = [p.latent for p in parts if p.latent is not None]
        kept = [p.kept for p in parts if p.kept is not None]
        latent = torch.cat(latents) if latents else None
        return replace(parts[0], codes=codes, scale=scale, zero=zero, latent=latent, kept=Kept.join(kept) if kept else None)


class Solver(Protocol):
    """Rounds weights onto a grid it knows nothing about, in two steps: what depends on the inputs, then the rows.

    Rows of a weight do not depend on each other, so the walk stacks the linears that share an input and cuts what is
    too big: ``prepare`` runs once a site, ``solve`` once a stack of rows.
    """

    needs: frozenset[str]  # of "H", "D"
    cap: float | None  # a token's energy counts in the sums for at most about so many times the median one's
    keep_latent: bool  # whether solve should give what it rounded, which costs a copy of the weight

    def prepare(self, stats: Stats | None, group: int) -> Any:
        """Turn the statistics (which are used up) into what :meth:`solve` wants."""
        ...

    def solve(self, w: Tensor, prepared: Any, grid: Grid, group: int) -> Rounded:
        """Round fp32 [R, C]."""
        ...
