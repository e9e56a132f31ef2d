"""Closed-form refit of scales after rounding, codes frozen, under the full Hessian (D²Quant spec section 6.3; ours).

The error is ``tr[(W* - Ŵ) H (W* - Ŵ)^T]`` with ``W* H = W (H + alpha D)``. A rounded row is linear in its scales,
``ŵ = sum_n s_n t_n`` with one basis row t_n per group (and per bit of an additive grid), so the best scales of a row solve
``M s = p``, ``M_nm = t_n H t_m^T``, ``p_n = t_n · (W* H)``; a column scale c solves ``((S^T S) * H) c = diag(S^T W* H)``.
Shapes: R rows, C columns, G groups of g columns, b bits, N basis rows of a row (G, or G*b).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sordino.numerics.additive import fix_gauge
from sordino.numerics.affine import round_scale
from sordino.rounding import Rounded

_RIDGE = 1e-6


def refit(rounded: Rounded, h: Tensor, wh: Tensor) -> Rounded:
    """Refit column scales (where there are some), then row scales; rows that do not gain keep what they have.

    Args:
        rounded: what a solver made; its codes stay.
        h: fp32 [C, C], symmetric.
        wh: fp32 [R, C], the target times H.
    """
    if rounded.column is not None:
        candidate = _refit_columns(rounded, h, wh)
        if row_errors(candidate, h, wh).sum() < row_errors(rounded, h, wh).sum():
            rounded = candidate
    candidate = _refit_rows(rounded, h, wh)
    better = row_errors(candidate, h, wh) < row_errors(rounded, h, wh)
    scale = torch.where(better.view(-1, *[1] * (rounded.scale.ndim - 1)), candidate.scale, rounded.scale)
    return replace(rounded, scale=scale)


def row_errors(rounded: Rounded, h: Tensor, wh: Tensor) -> Tensor:
    """``ŵ H ŵ^T - 2 ŵ · (W* H)`` of every row, [R]: the squared error but for a constant."""
    values = rounded.values()
    return ((values @ h - 2 * wh) * values).sum(1)


def _refit_rows(rounded: Rounded, h: Tensor, wh: Tensor) -> Rounded:
    basis = _basis(rounded)  # [R, G, b, g]
    rows, groups, bits, size = basis.shape
    flat = basis.transpose(1, 2).reshape(rows, bits, groups * size)
    m = torch.empty(rows, groups, bits, groups, bits)
    for k in range(bits):
        through = flat[:, k].view(rows, groups, size)
        for g in range(groups):
            # t of this group through H, then with every other basis row
            seen = (through[:, g] @ h[g * size : (g + 1) * size]).view(rows, groups, 1, size)
            m[:, g, k] = (seen * basis).sum(-1)
    m = m.view(rows, groups * bits, groups * bits)
    p = (basis * wh.view(rows, groups, 1, size)).sum(-1).view(rows, -1)
    m.diagonal(dim1=1, dim2=2).add_(_RIDGE * m.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-20))
    solved, info = torch.linalg.solve_ex(m, p)
    old = rounded.scale.reshape(rows, -1)
    # A scale that would change its sign (or a singular row) stays as it was.
    usable = (solved > 0) & torch.isfinite(solved) & (info == 0)[:, None]
    return replace(rounded, scale=round_scale(torch.where(usable, solved, old)).view_as(rounded.scale))


def _refit_columns(rounded: Rounded, h: Tensor, wh: Tensor) -> Rounded:
    assert rounded.column is not None
    s = replace(rounded, column=None).values()
    a = (s.T @ s) * h
    a.diagonal().add_(_RIDGE * a.diagonal().mean())
    solved, info = torch.linalg.solve_ex(a, (s * wh).sum(0))
    if int(info) != 0:
        return rounded
    c = torch.where((solved > 0) & torch.isfinite(solved), solved, rounded.column).view(-1, rounded.group)
    scale = rounded.scale.clone()
    parts = []
    for g, part in enumerate(c):
        fixed, size = fix_gauge(part)
        scale[:, g] = round_scale(scale[:, g] * size)
        parts.append(fixed)
    return replace(rounded, scale=scale, column=torch.cat(parts))


def _basis(rounded: Rounded) -> Tensor:
    """What each scale multiplies, [R, G, b, g]; b is 1 for affine grids."""
    rows, groups = rounded.zero.shape
    codes = rounded.codes.view(rows, groups, 1, -1)
    if rounded.grid == "additive":
        shifts = torch.arange(rounded.bits, dtype=torch.uint8)[:, None]
        basis = ((codes >> shifts) & 1).float() * 2 - 1
    else:
        basis = codes.float() - rounded.zero[..., None, None]
    return basis if rounded.column is None else basis * rounded.column.view(groups, 1, -1)
