"""GPTQ and GPTAQ: column-by-column rounding with error compensation.

GPTQ (Frantar et al., 2210.17323) rounds one input column at a time and spreads its error over the columns still to
come, along ``U``, the upper Cholesky factor of the inverse Hessian. GPTAQ (2504.02692; formulas in the D²Quant
release, spec section 3.3) also moves the weights towards the full-precision stream: with ``D = sum (x_fp - x) x^T`` it
adds ``w_q P`` with ``P = alpha * triu(D U^T, 1) U``.

Choices that matter:
- a group's scale is fitted when its first column is reached, on the error-compensated weights;
- activation ordering keeps groups whole (GAR): columns by falling diag H inside a group, groups by their largest;
- a column that calibration never excites has nothing to compensate with: it is rounded to nearest, not zeroed.
Everything is stored transposed inside ([C, R]), so that a column of the weight is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.numerics.affine import GridParams
from sordino.numerics.gram import inverse_factor
from sordino.round.refit import refit
from sordino.rounding import Grid, Rounded, Stats

_BLOCK = 128


@dataclass(frozen=True)
class Prepared:
    """What the inputs of a site contribute, permuted.

    Attributes:
        perm: column order [C].
        u: upper factor of the inverse Hessian, fp32 [C, C].
        p: asymmetric term fp32 [C, C], or None.
        notes: what is worth saying.
        weights: of the columns in the grids' fit, fp32 [C], or None for equal ones.
        shift: what moves the weight to its target beforehand, fp32 [C, C], or None.
        h, d: the sums themselves in the original order, for a refit; h is None without one.
    """

    perm: Tensor
    u: Tensor
    p: Tensor | None
    notes: dict[str, float]
    weights: Tensor | None = None
    shift: Tensor | None = None
    h: Tensor | None = None
    d: Tensor | None = None


class GptqSolver:
    """GPTQ; with ``alpha`` above zero, GPTAQ.

    Attributes:
        damp: damping added to H, as a share of its mean diagonal; raised until the factorization succeeds.
        order: ``gar`` or ``none``.
        static_groups: fit every group's grid on the original weights before the first column.
        alpha: strength of the asymmetric term.
        weighted: weigh the columns of a group by diag H when its grid is fitted.
        refit: fit the scales again after the last column, codes frozen, under the full Hessian.
        cap: a massive token counts in the sums for at most about so many times the median one's energy.
        whole: instead of GPTAQ's column-wise term, move the whole weight to the least-squares target first.
    """

    keep_latent = False

    def __init__(
        self,
        damp: float = 0.01,
        order: str = "gar",
        static_groups: bool = False,
        alpha: float = 0.0,
        weighted: bool = False,
        whole: bool = False,
        refit: bool = False,
        cap: float | None = None,
    ):
        self.cap = cap
        self.damp, self.order, self.static_groups = damp, order, static_groups
        self.alpha, self.weighted, self.whole, self.refit = alpha, weighted, whole, refit
        self.needs = frozenset({"H", "D"} if alpha > 0 else {"H"})

    def prepare(self, stats: Stats | None, group: int) -> Prepared:
        """Order the columns and factor the inverse Hessian. The sums need no normalization: the factor's size cancels.

        Raises:
            ValueError: without statistics, or if they hold numbers that are not finite.
        """
        if stats is None:
            raise ValueError("GPTQ needs the Hessian of its inputs")
        dead = _revive(stats.h)
        perm = gar_order(stats.h.diagonal(), group) if self.order == "gar" else torch.arange(stats.h.shape[0])
        weights = stats.h.diagonal()[perm].clone() if self.weighted else None
        h = stats.h.clone() if self.refit else None
        u, damp = inverse_factor(_take(stats, perm), self.damp)
        p = shift = None
        if stats.d is not None and self.whole:
            shift = whole_shift(stats.d[perm[:, None], perm], u, self.alpha)
        elif stats.d is not None:
            p = asymmetric_term(stats.d[perm[:, None], perm], u, self.alpha)
        notes = {"damp": damp} if damp > self.damp else {}
        return Prepared(perm, u, p, notes | ({"dead_columns": float(dead)} if dead else {}), weights, shift, h, stats.d)

    def solve(self, w: Tensor, prepared: Prepared, grid: Grid, group: int) -> Rounded:
        """Round fp32 [R, C]."""
        perm, original = prepared.perm, w
        static = None
        wt = w.T[perm]
        if prepared.shift is not None:
            wt += prepared.shift.T @ wt
            w = wt[torch.argsort(perm)].T.contiguous()
        if self.static_groups:
            weights = None if prepared.weights is None else prepared.weights[torch.argsort(perm)]
            fitted, order = grid.fit_groups(w, group, weights), perm[::group] // group
            column = None if fitted.column is None else fitted.column[perm]
            static = GridParams(fitted.scale[:, order], fitted.zero[:, order], column)
        codes, params = _walk_columns(wt, prepared, grid, group, static)
        columns, groups = torch.argsort(perm), torch.argsort(perm[::group] // group)
        params = GridParams(
            params.scale[:, groups].contiguous(),
            params.zero[:, groups].contiguous(),
            None if params.column is None else params.column[columns],
        )
        latent = wt[columns].T.contiguous() if self.keep_latent else None
        rounded = Rounded.of(codes[columns].T.contiguous(), params, grid, group, notes=prepared.notes, latent=latent)
        if prepared.h is None:
            return rounded
        wh = original @ prepared.h
        if prepared.d is not None:
            wh.addmm_(original, prepared.d, alpha=self.alpha)
        return refit(rounded, prepared.h, wh)


def gar_order(diag: Tensor, group: int) -> Tensor:
    """Activation order that keeps groups whole: [C] diagonal of H -> permutation int64 [C]."""
    blocks = diag.view(-1, group)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    outside = blocks.amax(1).argsort(descending=True, stable=True)
    return (inside + group * torch.arange(blocks.shape[0])[:, None])[outside].reshape(-1)


def asymmetric_term(d: Tensor, u: Tensor, alpha: float) -> Tensor:
    """GPTAQ's ``P = alpha * triu(D U^T, 1) U``, fp32 [C, C], strictly upper triangular times upper triangular."""
    return alpha * (torch.triu(d @ u.T, 1) @ u)


def whole_shift(d: Tensor, u: Tensor, alpha: float) -> Tensor:
    """``alpha * D H^-1``, fp32 [C, C]: ``W (I + D H^-1)`` is the least-squares target ``argmin |W X_fp - W* X|^2``.

    GPTAQ's column-wise term keeps only a triangle of it.
    """
    return alpha * ((d @ u.T) @ u)


def _take(stats: Stats, perm: Tensor) -> Tensor:
    """The permuted Hessian; the sums themselves are let go of, so that a large model's exist once."""
    h = stats.h[perm[:, None], perm]
    stats.h = torch.empty(0)
    return h


def _revive(h: Tensor) -> int:
    """Give columns that were never excited the mean diagonal, in place, so that H is invertible; returns how many.

    Their off-diagonal entries are zero, so they neither pass on nor take over any error.
    """
    diagonal = h.diagonal()
    dead = diagonal == 0
    count = int(dead.sum())
    if count:
        diagonal[dead] = diagonal.mean() if count < h.shape[0] else 1.0
    return count


def _walk_columns(
    wt: Tensor, prepared: Prepared, grid: Grid, group: int, static: GridParams | None
) -> tuple[Tensor, GridParams]:
    """The column loop.

    Args:
        wt: fp32 [C, R], permuted, contiguous; overwritten by what was rounded in the end.
        prepared: the factor and the asymmetric term.
        grid: the grid.
        group: columns in a group; groups are contiguous here.
        static: grids fitted beforehand, [R, G] in permuted order, or None.

    Returns:
        codes uint8 [C, R] and grids of all groups, in permuted order.
    """
    cols, rows = wt.shape
    u, p = prepared.u, prepared.p
    codes = torch.empty(cols, rows, dtype=torch.uint8)
    fitted: list[GridParams] = []
    step = _step(cols, group)
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        block = wt[start:stop]  # a view: in-block updates land in wt
        before = torch.empty_like(block)
        errors = torch.empty_like(block)
        ub = u[start:stop]
        for j in range(stop - start):
            column = start + j
            g, offset = divmod(column, group)
            if offset == 0:
                if static is None:
                    weights = None if prepared.weights is None else prepared.weights[column : column + group]
                    fitted.append(grid.fit(wt[column : column + group].T.contiguous(), weights))
                else:
                    own = None if static.column is None else static.column[column : column + group]
                    fitted.append(GridParams(static.scale[:, g : g + 1], static.zero[:, g : g + 1], own))
            w = block[j]
            q, value = grid.nearest(w[:, None], fitted[g], slice(offset, offset + 1))
            codes[column] = q[:, 0]
            before[j] = w
            torch.sub(w, value[:, 0], out=errors[j]).div_(ub[j, column])
            if j + 1 < stop - start:
                block[j + 1 :].addr_(ub[j, column + 1 : stop], errors[j], alpha=-1.0)
                if p is not None:
                    block[j + 1 :].addr_(p[column, column + 1 : stop], before[j])
        if stop < cols:
            wt[stop:].addmm_(ub[:, stop:].T, errors, alpha=-1.0)
            if p is not None:
                wt[stop:].addmm_(p[start:stop, stop:].T, before)
    return codes, GridParams.join(fitted)


def _step(cols: int, group: int) -> int:
    """Columns of a lazy block: about 128, such that every group begins where a block begins or lies inside one.

    Then the weights of a group are fully compensated when its grid is fitted, whatever the block size.
    """
    if group <= _BLOCK:
        return group * (_BLOCK // group)
    if group == cols:
        return _BLOCK
    return next(s for s in range(_BLOCK, 0, -1) if group % s == 0)
