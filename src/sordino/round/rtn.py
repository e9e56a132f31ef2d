"""Round to nearest with scale search: the baseline every other solver is measured against.

The scale is the best by the error of the weight itself, or (PrefixQuant, spec section 4.5) by that of the linear's output on
calibration text. Shapes: R rows, C columns, G groups of g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sordino.numerics.affine import SHARES, GridParams, round_scale
from sordino.rounding import Grid, Rounded, Stats


class RtnSolver:
    """Each group gets its best grid, each weight its nearest code.

    Args:
        output: judge scales by the output of the linear; the grid then says what the full range is.
    """

    cap: float | None = None
    keep_latent = False

    def __init__(self, output: bool = False):
        self.output = output
        self.needs = frozenset({"H"} if output else ())

    def prepare(self, stats: Stats | None, group: int) -> Tensor | None:
        """The Gram matrix of each group's inputs, fp32 [G, g, g], where outputs are looked at.

        Raises:
            ValueError: if the sums hold numbers that are not finite.
        """
        if stats is None or not self.output:
            return None
        if not bool(torch.isfinite(stats.h.diagonal()).all()):
            raise ValueError("the sums over the calibration inputs are not finite")
        count = stats.h.shape[0] // group
        return torch.stack([stats.h[i * group : (i + 1) * group, i * group : (i + 1) * group] for i in range(count)])

    def solve(self, w: Tensor, prepared: Tensor | None, grid: Grid, group: int) -> Rounded:
        """Round fp32 [R, C]."""
        params = grid.fit_groups(w, group)
        if prepared is not None:
            params = by_output(w, prepared, grid, params)
        codes, _ = grid.nearest(w, params)
        return Rounded.of(codes, params, grid, group, latent=w if self.keep_latent else None)


def by_output(w: Tensor, gram: Tensor, grid: Grid, full: GridParams) -> GridParams:
    """The share of the full range, by row and group, whose rounding changes the output least.

    Args:
        w: fp32 [R, C].
        gram: fp32 [G, g, g], ``X^T X`` of each group's inputs.
        grid: the grid.
        full: its parameters for the whole range, [R, G].
    """
    candidates = [GridParams(round_scale(full.scale * share), full.zero) for share in SHARES]
    errors = []
    for params in candidates:
        e = (w - grid.nearest(w, params)[1]).view(*params.scale.shape, -1).transpose(0, 1)  # [G, R, g]
        errors.append(((e @ gram) * e).sum(-1).T)
    best = torch.stack(errors).argmin(0, keepdim=True)
    return GridParams(torch.stack([c.scale for c in candidates]).gather(0, best)[0], full.zero)
