"""Round to nearest with scale search: the baseline every other solver is measured against."""

from __future__ import annotations

from torch import Tensor

from sordino.contract import Grid, Rounded, Stats


class RtnSolver:
    """Each group gets its best grid by squared weight error, each weight its nearest code."""

    needs: frozenset[str] = frozenset()
    cap: float | None = None
    keep_latent = False

    def prepare(self, stats: Stats | None, group: int) -> None:
        """Nothing to prepare: RTN does not look at the inputs."""

    def solve(self, w: Tensor, prepared: None, grid: Grid, group: int) -> Rounded:
        """Round fp32 [R, C]."""
        params = grid.fit_groups(w, group)
        codes, _ = grid.nearest(w, params)
        return Rounded.of(codes, params, grid, group, latent=w if self.keep_latent else None)
